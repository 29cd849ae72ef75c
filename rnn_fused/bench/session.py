"""One benchmark session: run the sections, show their tables, write the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import forecaster, grid, ragged, report
from .extras import require
from .plot import plot_forecast, plot_ratios
from .problems import Problem, select
from .records import Row, columns, environment, write_csv, write_json
from .summary import summarise
from .timer import Settings
from .workload import WrongResultError

BUSY = 0.7  # load average from which a warning is due


@dataclass(frozen=True)
class Options:
    """What to run; see the command line's help."""

    problems: tuple[Problem, ...]
    grid: str
    cells: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    passes: tuple[str, ...]
    device: torch.device
    threads: int
    time_per_row: float
    sections: tuple[str, ...]
    steps: int
    naive: bool
    output: Path


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Session:
    """The state of a run: the rows so far, what goes into the JSON, the files written."""

    options: Options
    rows: list[Row] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Ask for every optional package before the first minute is spent."""
        self.console = require("rich.console", "rich").Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = 120  # a log file has room for unbroken lines
        self.progress = require("rich.progress", "rich")
        require("matplotlib")
        if "forecaster" in self.options.sections:
            require("statsmodels.datasets", "statsmodels")
        on_cpu = self.options.device.type == "cpu"
        device = self.options.device
        self.settings = Settings(
            budget_s=self.options.time_per_row,
            synchronize=(lambda: None) if on_cpu else lambda: torch.accelerator.synchronize(device),
        )

    def run(self) -> None:
        """Every chosen section, then the files; WrongResultError if the loss curves part."""
        sections = {"grid": self.grid, "ragged": self.ragged, "forecaster": self.forecaster}
        self.options.output.mkdir(parents=True, exist_ok=True)
        with _threads(self.options.threads):
            self.where = environment(self.options.device)
            self.console.print(
                f"{self.where.processor}; {self.where.threads} threads, {self.where.device}; "
                f"torch {self.where.torch}, rnn_fused {self.where.rnn_fused} {self.where.commit}"
            )
            if self.where.load > BUSY:
                self.console.print(
                    f"[yellow]the machine is busy (load {self.where.load:.1f}): "
                    "times will be long, and ratios rough[/yellow]"
                )
            for name in self.options.sections:
                sections[name]()
        write_csv(self.path("rows.csv"), self.rows, self.where)
        write_json(self.path("bench.json"), {"environment": asdict(self.where), **self.content})
        for file in self.files:
            self.console.print(f"wrote {file}", soft_wrap=True)
        if not self.content.get("forecaster", {"agrees": True})["agrees"]:
            raise WrongResultError("the loss curves of rnn_fused and torch.nn differ")

    def path(self, name: str) -> Path:
        """A file of the output folder, remembered."""
        self.files.append(self.options.output / name)
        return self.files[-1]

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar; call what it yields with the next step's name."""
        shown = ("{task.description:40}", self.progress.BarColumn())
        clock = (self.progress.MofNCompleteColumn(), self.progress.TimeElapsedColumn())
        with self.progress.Progress(*shown, *clock, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda name: bar.update(task, advance=1, description=name)

    def grid(self) -> None:
        """The grid, row by row."""
        options = self.options
        problems = select(options.problems, options.cells)
        for reason in dict.fromkeys(p.obstacle for p in options.problems if p.obstacle):
            self.console.print(f"left out, torch.nn has none: {reason}")
        todo = grid.cases(problems, options.dtypes, options.passes, options.device)
        found: list[Row] = []
        with self.bar(len(todo)) as advance:
            for case in todo:
                found += grid.compare(case, self.settings, naive=options.naive)
                advance(str(case))
        if not found:
            self.console.print(f"no row of {options.grid} is left to time")
            return
        groups = summarise(found)
        self.console.print(report.grid_table(found), report.summary_table(groups))
        where = self.where
        title = (
            f"{options.grid} grid, {where.processor}, {where.threads} threads, torch {where.torch}"
        )
        plot_ratios(self.path("ratios.png"), found, title)
        self.rows += found
        self.content["grid"] = {
            "name": options.grid,
            "summary": [asdict(group) for group in groups],
            "rows": [columns(row) for row in found],
        }

    def ragged(self) -> None:
        """Packed training of the grid's problems, in the first dtype."""
        options = self.options
        problems = ragged.worth_packing(select(options.problems, options.cells))
        problems = [problem for problem in problems if not problem.inference_only]
        outcomes = []
        with self.bar(len(problems)) as advance:
            for problem in problems:
                dtype = options.dtypes[0]
                outcomes.append(ragged.compare(problem, self.settings, dtype, options.device))
                advance(str(problem))
        if outcomes:
            self.console.print(report.ragged_table(outcomes))
        self.rows += [row for outcome in outcomes for row in outcome.rows]
        self.content["ragged"] = [
            {**asdict(outcome), "rows": [columns(row) for row in outcome.rows]}
            for outcome in outcomes
        ]

    def forecaster(self) -> None:
        """The training on the real series."""
        with self.bar(2 * self.options.steps) as advance:
            steps, device = self.options.steps, self.options.device
            outcome = forecaster.run(device, steps, progress=lambda: advance("forecaster"))
        for line in report.forecast_lines(outcome):
            self.console.print(line)
        plot_forecast(self.path("forecaster.png"), outcome)
        self.rows += forecaster.rows(outcome, self.options.device)
        self.content["forecaster"] = {
            "losses": outcome.losses,
            "largest_difference": outcome.difference("rnn_fused", "torch.nn"),
            "largest_difference_from_float64": {
                name: outcome.difference(name, "float64") for name in ("torch.nn", "rnn_fused")
            },
            "agrees": outcome.agrees,
            "held_out_rmse_ppm": outcome.held_out_rmse,
            "persistence_rmse_ppm": outcome.persistence_rmse,
            "ratio": outcome.ratio,
        }

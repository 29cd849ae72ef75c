"""One benchmark session: run the sections, show their tables, write the files."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import devices, forecaster, grid, irregular, memory, page, report
from .extras import require
from .plot import plot_forecast
from .problems import Problem, select
from .providers import not_installed
from .records import Row, columns, environment
from .results import Results
from .summary import summarise
from .timer import Settings, cuda_events
from .workload import Case, WrongResultError, dtype_name, is_fatal

BUSY = 0.7  # load average from which a warning is due
SAVE_EVERY_S = 5.0
MOST_REASONS = 12  # shown; all are in bench.json
WEIGHED = ("torch.nn", "rnn_fused")  # whose memory is measured


class LostDeviceError(RuntimeError):
    """The device has failed: nothing more can run on it in this process."""


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
    providers: tuple[str, ...]  # beside torch.nn
    memory: bool
    seconds: float | None  # for everything
    output: Path
    resume: bool

    @property
    def method(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "grid": self.grid,
            "cells": list(self.cells),
            "dtypes": [dtype_name(dtype) for dtype in self.dtypes],
            "passes": list(self.passes),
            "providers": list(self.providers),
            "time_per_row": self.time_per_row,
            "steps": self.steps,
            "memory": self.memory,
        }


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
    """The state of a run."""

    options: Options
    files: list[Path] = field(default_factory=list)  # beside those of the results

    def __post_init__(self) -> None:
        """Ask for every optional package before the first minute is spent."""
        self.start = self.saved = time.monotonic()
        self.longest = 0.0  # seconds of a case so far
        self.console = require("rich.console", "rich").Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = 120  # a log file has room for unbroken lines
        self.progress = require("rich.progress", "rich")
        require("matplotlib")
        require("jinja2")
        if "forecaster" in self.options.sections:
            require("statsmodels.datasets", "statsmodels")
        on_cpu = self.options.device.type == "cpu"
        device = self.options.device
        self.settings = Settings(
            budget_s=self.options.time_per_row,
            synchronize=(lambda: None) if on_cpu else lambda: torch.accelerator.synchronize(device),
            measure=cuda_events(device) if device.type == "cuda" else None,
        )

    def run(self) -> None:
        """Every chosen section, then the files.

        Raises:
            WrongResultError: a result was wrong, a case failed, or the loss curves part.
            LostDeviceError: the device failed.
            ResumeError: there is nothing to go on from, or it was measured otherwise.
            KeyboardInterrupt: after what was measured is written.
        """
        sections: dict[str, Callable[[], bool]] = {
            "grid": self.grid,
            "devices": self.devices,
            irregular.RAGGED: partial(self.irregular, irregular.RAGGED),
            irregular.RESETS: partial(self.irregular, irregular.RESETS),
            "forecaster": self.forecaster,
        }
        with _threads(self.options.threads):
            self.results = Results(
                self.options.output, environment(self.options.device), self.options.method
            )
            if self.options.resume:
                self.results.resume()
            else:
                self.results.begin()
            self.introduce()
            try:
                for name in self.options.sections:
                    if name in self.results.finished:
                        continue
                    failures = len(self.results.failures)
                    complete = sections[name]() and failures == len(self.results.failures)
                    if complete and name != grid.SECTION:
                        self.results.finished.append(name)
            finally:
                self.finish()
        results = self.results
        if not results.content.get("forecaster", {"agrees": True})["agrees"]:
            raise WrongResultError("the loss curves of rnn_fused and torch.nn differ")
        if results.failures:
            raise WrongResultError(f"{len(results.failures)} failures, first {results.failures[0]}")

    def introduce(self) -> None:
        """Say where this is, what is busy and what is missing."""
        where, results = self.results.where, self.results
        self.console.print(
            f"{where.processor}; {where.threads} threads, {where.device}; "
            f"torch {where.torch}, rnn_fused {where.rnn_fused} {where.commit}"
        )
        if self.options.resume:
            self.console.print(f"going on: {len(results.rows)} rows are there")
            if where.commit.endswith("-dirty"):
                self.console.print(
                    "[yellow]this checkout has changes that are not committed: nobody knows "
                    "whether the rows that are there were measured with them[/yellow]"
                )
        if where.load > BUSY:
            self.console.print(
                f"[yellow]the machine is busy (load {where.load:.1f}): "
                "times will be long, and ratios rough[/yellow]"
            )
        for name in self.options.providers:
            if missing := not_installed(name):
                self.console.print(f"without {name}: {missing}")

    def finish(self) -> None:
        """Write all files and name them."""
        self.files = [*self.save(), *self.files]
        results = self.results
        if results.rows:
            contents = [(results.all_content(), results.rows[-1][1])]
            report_file = self.options.output / "report.html"
            self.files += page.write_page(report_file, results.rows, contents=contents)
        for file in self.files:
            self.console.print(f"wrote {file}", soft_wrap=True)

    def save(self) -> list[Path]:
        """Write what there is: a run that is cut off loses little."""
        self.saved = time.monotonic()
        return self.results.save()

    def has_time(self) -> bool:
        """Whether the budget allows one more case, should it be as long as the longest so far."""
        used = time.monotonic() - self.start
        return self.options.seconds is None or used + self.longest <= self.options.seconds

    def attempt(self, name: str, case: Case, compare: Callable[[], list[Row]]) -> list[Row]:
        """The rows of one case; what fails is told, kept and not the end."""
        begin, found = time.monotonic(), []
        try:
            found = compare()
            self.results.add(found)
        except WrongResultError as error:
            self.fail(str(error))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            self.fail(f"[{name}] {case}: {reason}")
            if is_fatal(error):
                raise LostDeviceError(f"{case}: {reason}") from error
        self.longest = max(self.longest, time.monotonic() - begin)
        self.release()
        if time.monotonic() - self.saved > SAVE_EVERY_S:
            self.save()
        return found

    def fail(self, what: str) -> None:
        """Keep a failure, and say it at once."""
        self.results.failures.append(what)
        self.console.print(f"FAILED {what}", style="red", markup=False, soft_wrap=True)

    def release(self) -> None:
        """Give cached memory back where half of the device's is taken: sizes differ widely."""
        device = self.options.device
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            if free < total // 2:
                torch.cuda.empty_cache()

    def path(self, name: str) -> Path:
        """A file of the output folder, remembered."""
        self.files.append(self.options.output / name)
        return self.files[-1]

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar; call what it yields with the next step's name."""
        shown = ("{task.description:40}", self.progress.BarColumn())
        clock = (
            self.progress.MofNCompleteColumn(),
            self.progress.TimeElapsedColumn(),
            self.progress.TimeRemainingColumn(),
        )
        with self.progress.Progress(*shown, *clock, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda name: bar.update(task, advance=1, description=name)

    # The sections: each says whether it left nothing out.

    def grid(self) -> bool:
        """The grid, row by row."""
        options = self.options
        problems = select(options.problems, options.cells)
        for reason in dict.fromkeys(p.obstacle for p in options.problems if p.obstacle):
            self.console.print(f"left out, torch.nn has none: {reason}")
        todo = grid.cases(problems, options.dtypes, options.passes, options.device)
        todo = grid.most_wanted_first(todo) if options.seconds is not None else todo
        done = {row.case for row in self.results.of_section(grid.SECTION)}
        todo = [case for case in todo if case.key not in done]
        refused = Counter(self.results.refused)
        dropped: list[Case] = []
        on_device = options.device.type != "cpu"

        def compare(case: Case) -> list[Row]:
            outcome = grid.compare(case, self.settings, options.providers, recurrence=on_device)
            refused.update(outcome.refused.items())
            for wrong in outcome.wrong:
                self.fail(wrong)
            return [self.weighed(row, case) for row in outcome.rows]

        try:
            _, dropped = self.each(grid.SECTION, todo, compare)
        finally:
            self.show_grid(refused, dropped)
        return not dropped

    def each(
        self, section: str, cases: Sequence[Case], compare: Callable[[Case], list[Row]]
    ) -> tuple[list[Row], list[Case]]:
        """The rows of the cases that there is time for, and those that there is none for."""
        found: list[Row] = []
        dropped: list[Case] = []
        with self.bar(len(cases)) as advance:
            for case in cases:
                if self.has_time():
                    found += self.attempt(section, case, partial(compare, case))
                else:
                    dropped.append(case)
                advance(str(case))
        if dropped:
            left = f"{len(dropped)} cases of {section} left out, {dropped[0]} first"
            self.console.print(f"out of time: {left}", soft_wrap=True)
        return found, dropped

    def weighed(self, row: Row, case: Case) -> Row:
        """The row with its peak memory, where that is asked for and not known yet."""
        if not self.options.memory or row.peak_mb is not None or row.provider not in WEIGHED:
            return row
        try:
            found = memory.measure_apart(case, row.provider, "resident", self.options.threads)
        except RuntimeError as error:  # no reason to lose the time
            self.fail(str(error))
            return row
        return replace(row, peak_mb=found["peak_mb"])

    def show_grid(self, refused: Counter[tuple[str, str]], dropped: list[Case]) -> None:
        """Tables, plot and JSON of the grid, and what is not in them."""
        options, found = self.options, self.results.of_section(grid.SECTION)
        for (provider, reason), count in refused.most_common(MOST_REASONS):
            line = f"without {provider}, {count} cases: {reason}"
            self.console.print(line, markup=False, soft_wrap=True)
        self.results.content["grid"] = {
            "name": options.grid,
            "refused": [{"provider": p, "reason": r, "cases": n} for (p, r), n in refused.items()],
            "out_of_time": [str(case) for case in dropped],
        }
        if not any(row.provider == "rnn_fused" for row in found):
            self.console.print(f"no row of {options.grid} is left to time")
            return
        groups = summarise(found)
        self.console.print(report.grid_table(found), report.summary_table(groups))
        self.results.content["grid"] |= {
            "summary": [asdict(group) for group in groups],
            "rows": [columns(row) for row in found],
        }

    def devices(self) -> bool:
        """A few problems on the CPU beside the device, in the last dtype."""
        options = self.options
        problems = devices.small_enough(select(options.problems, options.cells))
        todo = grid.cases(problems, options.dtypes[-1:], options.passes, options.device)
        found, dropped = self.each(
            devices.SECTION, todo, lambda case: devices.compare(case, self.settings)
        )
        if found:
            self.console.print(report.devices_table(found))
        self.results.content[devices.SECTION] = [columns(row) for row in found]
        return not dropped

    def irregular(self, section: str) -> bool:
        """Training with lengths or resets of the grid's problems, in the first dtype."""
        options = self.options
        chosen = select(options.problems, options.cells)
        problems = irregular.worth_it(section, chosen, options.device)
        todo = grid.cases(problems, options.dtypes[:1], ["training"], options.device)
        outcomes: list[irregular.Irregular] = []

        def compare(case: Case) -> list[Row]:
            outcomes.append(irregular.compare(section, case, self.settings))
            return list(outcomes[-1].rows)

        _, dropped = self.each(section, todo, compare)
        if outcomes:
            self.console.print(report.irregular_table(section, outcomes))
        self.results.content[section] = [
            {**asdict(outcome), "rows": [columns(row) for row in outcome.rows]}
            for outcome in outcomes
        ]
        return not dropped

    def forecaster(self) -> bool:
        """The training on the real series."""
        if not self.has_time():
            self.console.print("out of time: the forecaster left out")
            return False
        with self.bar(2 * self.options.steps) as advance:
            steps, device = self.options.steps, self.options.device
            outcome = forecaster.run(device, steps, progress=lambda: advance("forecaster"))
        for line in report.forecast_lines(outcome):
            self.console.print(line)
        plot_forecast(self.path("forecaster.png"), outcome)
        self.results.add(forecaster.rows(outcome, self.options.device))
        self.results.content["forecaster"] = {
            "losses": outcome.losses,
            "seconds": {name: timing.samples for name, timing in outcome.step.items()},
            "largest_difference": outcome.difference("rnn_fused", "torch.nn"),
            "largest_difference_from_float64": {
                name: outcome.difference(name, "float64") for name in ("torch.nn", "rnn_fused")
            },
            "agrees": outcome.agrees,
            "held_out_rmse_ppm": outcome.held_out_rmse,
            "persistence_rmse_ppm": outcome.persistence_rmse,
            "ratio": outcome.ratio,
        }
        return True

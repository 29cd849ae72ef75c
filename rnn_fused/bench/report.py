"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .devices import on_cpu
from .extras import require
from .forecaster import Forecast
from .irregular import RAGGED, RESETS, Irregular
from .records import Row
from .summary import Group

KNOWN = ("torch.nn", "rnn_fused", "naive")  # who has columns of his own


def _table(title: str, columns: Sequence[str], left: int = 1) -> Any:
    box = require("rich.box", "rich").SIMPLE
    rich_table = require("rich.table", "rich")
    table = rich_table.Table(title=title, title_justify="left", box=box, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", no_wrap=True)
    return table


def _ratio(value: float | None) -> str:
    """A ratio with losses in red."""
    if value is None:
        return "-"
    return f"[red]{value:.2f}x[/red]" if value < 1 else f"{value:.2f}x"


def grid_table(rows: Iterable[Row]) -> Any:
    """One line a case: times, the share of the rate of a large product, and how many times as fast
    as torch.nn everyone is; beside the naive loop, how many times as fast rnn_fused is. "-": not
    run, see what was said before."""
    rows = list(rows)
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.dtype, row.pass_, row.problem), {})[row.provider] = row
    others = [p for p in dict.fromkeys(r.provider for r in rows) if p not in KNOWN]
    columns = ["problem", "torch.nn ms", "rnn_fused ms", "us a step", "GFLOP/s", "share", "ratio"]
    columns += [name.removeprefix("rnn_fused ") for name in others] + ["to naive"]
    table = _table("How many times as fast as torch.nn: ratio, and the others' columns", columns)
    last = ""
    for (dtype, pass_, problem), by in cases.items():
        if last != f"{dtype} {pass_}":
            last = f"{dtype} {pass_}"
            table.add_section()
            table.add_row(f"[bold]{last}[/bold]")
        fused, naive = by.get("rnn_fused"), by.get("naive")
        table.add_row(
            problem,
            f"{by['torch.nn'].p50_ms:.3f}",
            f"{fused.p50_ms:.3f}" if fused else "-",
            f"{fused.us_per_step:.2f}" if fused else "-",
            f"{fused.gflops:.1f}" if fused else "-",
            f"{fused.share:.0%}" if fused and fused.share is not None else "-",
            _ratio(fused.ratio if fused else None),
            *(_ratio(by[name].ratio if name in by else None) for name in others),
            _ratio(fused.speedup_over(naive) if naive and fused else None),
        )
    return table


def devices_table(rows: Iterable[Row]) -> Any:
    """One line a case: the times on the device and on the CPU, and how many times as fast the
    device is."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((f"{row.dtype} {row.pass_}", row.problem), {})[row.provider] = row
    times = ("on the CPU", "times")
    columns = ("problem", "pass", "torch.nn ms", *times, "rnn_fused ms", *times)
    table = _table("The device beside the CPU (host's clock, one call at a time)", columns, left=2)
    for (pass_, problem), by in cases.items():
        cells = []
        for name in ("torch.nn", "rnn_fused"):
            there, here = by[name].p50_ms, by[on_cpu(name)].p50_ms
            cells += [f"{there:.3f}", f"{here:.3f}", _ratio(here / there)]
        table.add_row(problem, pass_, *cells)
    return table


def summary_table(groups: Iterable[Group]) -> Any:
    """One line for each dtype and pass; where rnn_fused loses is said as plainly as the rest."""
    columns = ("group", "worst rows", "rows", "below 1", "mean", "by cell", "to naive")
    title = "Summary (time of torch.nn / time of rnn_fused, geometric means)"
    table = _table(title, columns, left=2)
    for group in groups:
        below = f"{group.below_one}"
        table.add_row(
            group.name,
            "\n".join(group.worst),
            str(group.rows),
            f"[red]{below}[/red]" if group.below_one else below,
            _ratio(group.mean_ratio),
            "\n".join(f"{cell} {_ratio(mean)}" for cell, mean in group.by_cell.items()),
            _ratio(group.mean_ratio_to_naive),
        )
    return table


def irregular_table(section: str, outcomes: Iterable[Irregular]) -> Any:
    """Training with lengths or resets against the dense cost of the same steps."""
    columns = ("problem", "valid steps", "dense ms", f"{section} ms", "overhead", "ratio")
    what = {
        RAGGED: "Ragged training (overhead 1: a valid step costs what it does dense; "
        "ratio to torch.nn)",
        RESETS: "Training with resets (overhead 1: they cost nothing; ratio to torch.nn, a "
        "timestep at a time)",
    }
    table = _table(what[section], columns)
    for outcome in outcomes:
        _, with_it, dense = outcome.rows
        table.add_row(
            outcome.problem,
            f"{outcome.valid:.0%}",
            f"{dense.p50_ms:.3f}",
            f"{with_it.p50_ms:.3f}",
            f"{outcome.overhead:.2f}",
            _ratio(outcome.ratio),
        )
    return table


def forecast_lines(forecast: Forecast) -> list[str]:
    """The forecaster's outcome in a few sentences."""
    rmse = forecast.held_out_rmse
    steps = (
        f"CO2 forecaster, {len(forecast.losses['torch.nn'])} steps from the same weights: "
        f"{forecast.step['torch.nn'].median * 1e3:.1f} ms a step with torch.nn, "
        f"{forecast.step['rnn_fused'].median * 1e3:.1f} ms with rnn_fused: "
        f"{_ratio(forecast.ratio)} as fast."
    )
    losses = (
        f"Loss curves {'agree' if forecast.agrees else '[red]DIFFER[/red]'}: largest relative "
        f"difference {forecast.difference('rnn_fused', 'torch.nn'):.1e} between the two; from "
        f"float64, torch.nn {forecast.difference('torch.nn', 'float64'):.1e} and "
        f"rnn_fused {forecast.difference('rnn_fused', 'float64'):.1e}."
    )
    errors = (
        f"Held-out error, one week ahead: torch.nn {rmse['torch.nn']:.3f} ppm, "
        f"rnn_fused {rmse['rnn_fused']:.3f} ppm; assuming no change, "
        f"{forecast.persistence_rmse:.3f} ppm."
    )
    return [steps, losses, errors]

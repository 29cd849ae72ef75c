"""What the page says in words and in tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .findings import (
    CELLS,
    OURS,
    STOCK,
    Part,
    Standing,
    group,
    learning,
    memory_bars,
    problem,
    times,
)
from .problems import PASSES
from .providers import FROZEN
from .records import Environment, Row

COLUMNS = (
    "section", "provider", "cell", "T", "B", "I", "H", "layers", "directions", "layout", "dtype",
    "pass", "p20 ms", "p50 ms", "p80 ms", "ratio", "GFLOP/s", "share", "us a step",
    "recurrence ms", "predicted ms", "peak MB", "repeats", "calls",
)  # fmt: skip


def short(value: float) -> str:
    """Four digits, without an exponent where there is room."""
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def heading(where: Environment) -> str:
    """A machine and how it was used."""
    device = "" if where.device == "cpu" else f", {where.device}"
    return f"{where.processor}{device}, {where.threads} thread" + "s" * (where.threads > 1)


def verdict(ours: Sequence[Standing]) -> str:
    """What the rows of rnn_fused say of it against torch.nn, in plain words."""
    means = [standing.mean for standing in ours]
    every = sorted((c for s in ours for c in s.comparisons), key=lambda c: c.ratio)
    lost = sum(c.ratio < 1 for c in every)
    faster, worst = sum(mean >= 1 for mean in means), every[0]
    if faster in (0, len(means)):
        what = f"is {'faster' if faster else 'slower'} than torch.nn in the mean"
    else:
        what = f"is faster than torch.nn in the mean of {faster} of {len(means)} groups of rows"
    low, high = times(min(means)), times(max(means))
    return (
        f"rnn_fused {what}: {low if low == high else f'{low} to {high}'} times as fast. "
        f"Of {len(every)} rows it wins {len(every) - lost} and loses {lost}; the worst is "
        f"{times(worst.ratio)} ({problem(worst.row)}, {group(worst.row)})."
    )


def facts(part: Part) -> list[tuple[str, str]]:
    """Machine, versions and times; what differs between runs is joined."""

    def all_of(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value != ""))

    def between(values: Iterable[Any]) -> str:
        ordered = sorted(values)
        ends = [f"{v:.1f}" if isinstance(v, float) else v for v in (ordered[0], ordered[-1])]
        return " to ".join(dict.fromkeys(ends))

    runs = part.runs
    grids = [c["grid"]["name"] for c in part.contents if "name" in (c.get("grid") or {})]
    named = {
        "torch": all_of(w.torch for w in runs),
        "rnn_fused": all_of(w.rnn_fused for w in runs),
        "commit": all_of(w.commit for w in runs) or "not recorded",
        "Python": all_of(w.python for w in runs),
        "driver": all_of(w.driver for w in runs),
        "float32 on tensor cores (TF32)": "allowed" if any(w.tf32 for w in runs) else "",
        "measured": f"{runs[0].date[:10]} {between(w.date[11:16] for w in runs)} UTC",
        "load before": between(w.load for w in runs),
        "grid": all_of(grids),
    }
    return [(name, value) for name, value in named.items() if value]


def gaps(part: Part) -> list[str]:
    """What was not measured, as far as it can be told from what was."""
    rows, missing = part.rows, []
    for what, known, seen in (
        ("cells", CELLS, {row.cell for row in rows}),
        ("dtypes", ("float32", "bfloat16", "float16", "float64"), {row.dtype for row in rows}),
        ("passes", PASSES, {row.pass_ for row in rows}),
        ("providers", ("naive", FROZEN), {row.provider for row in rows}),
    ):
        if absent := [CELLS.get(name, name) for name in known if name not in seen]:
            missing.append(f"No rows of these {what}: {', '.join(absent)}.")
    there = {
        "stacks of layers": any(row.layers > 1 for row in rows),
        "bidirectional layers": any(row.directions > 1 for row in rows),
        "packed sequences": any(row.layout == "packed" for row in rows),
        "resets": any(row.layout == "resets" for row in rows),
        "memory": bool(memory_bars(part)),
        "training to a loss": any(learning(content) for content in part.contents),
        "a GPU": any(where.device != "cpu" for where in part.runs),
    }
    if absent := [what for what, measured in there.items() if not measured]:
        missing.append(f"Not measured: {', '.join(absent)}.")
    for grid in (content.get("grid") or {} for content in part.contents):
        missing += [
            f"{refused['provider']} was not timed on {refused['cases']} cases: {refused['reason']}."
            for refused in grid.get("refused", [])
        ]
        if late := grid.get("out_of_time"):
            missing.append(f"Out of time: {len(late)} cases, {late[0]} first.")
    return missing


def lessons(part: Part) -> list[str]:
    """The trainings in sentences."""
    sentences = []
    for content in part.contents:
        one = learning(content)
        if one is None:
            continue
        forecast = content["forecaster"]
        sentences.append(
            f"To a loss of {one.target:.3g} torch.nn took {one.reached(STOCK):.3g} s and "
            f"rnn_fused {one.reached(OURS):.3g} s."
        )
        if ratio := forecast.get("ratio"):
            sentences.append(f"A step with rnn_fused is {times(ratio)} times as fast.")
        rmse, naive = forecast.get("held_out_rmse_ppm"), forecast.get("persistence_rmse_ppm")
        if rmse and naive:
            sentences.append(
                "Error on weeks never trained on, one week ahead: "
                + ", ".join(f"{name} {value:.3f} ppm" for name, value in rmse.items())
                + f"; assuming no change {naive:.3f} ppm."
            )
    return sentences


def table(rows: Sequence[Row]) -> dict[str, Any]:
    """All rows as text, without the columns that are empty or the same everywhere as by default."""

    def optional(value: float | None) -> str:
        return "" if value is None else short(value)

    lines = [
        (
            r.section, r.provider, r.cell, str(r.T), str(r.B), str(r.I), str(r.H),
            str(r.layers), str(r.directions), r.layout, r.dtype, r.pass_,
            short(r.p20_ms), short(r.p50_ms), short(r.p80_ms),
            "" if r.ratio is None else times(r.ratio),
            short(r.gflops), optional(r.share), short(r.us_per_step), optional(r.recurrence_ms),
            optional(r.predicted_ms), optional(r.peak_mb), str(r.repeats), str(r.calls),
        )
        for r in rows
    ]  # fmt: skip
    dull = {"layers": {"1"}, "directions": {"1"}, "layout": {"dense"}}
    kept = [
        place
        for place, name in enumerate(COLUMNS)
        if {line[place] for line in lines} - dull.get(name, set()) - {""}
    ]
    return {
        "names": [COLUMNS[place] for place in kept],
        "rows": [[line[place] for place in kept] for line in lines],
    }

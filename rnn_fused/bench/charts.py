"""The pictures of a benchmark, as panels: each knows its size and how to draw itself on axes.

`plot.py` makes files and SVG of them. Text is sized for a panel that a phone shows in full width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from .extras import require
from .findings import (
    BYTES,
    CELLS,
    OURS,
    STOCK,
    Learning,
    Standing,
    by_size,
    group,
    intensity,
    problem,
    roof,
    times,
)
from .problems import GATES
from .records import Row

# Inches: a panel of text at 8.5 points and this width can be read on a phone.
NARROW, WIDE = 3.0, 3.7
# Blue and orange of Okabe and Ito's palette, which colour-blind readers tell apart.
WIN, LOSS, GREY, INK = "#0072b2", "#d55e00", "#8a8a8a", "#1d2530"
CELL_COLOURS = dict(zip(CELLS.values(), ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), strict=True))
OTHER_COLOURS = ("#56b4e9", "#7f3c8d", "#a5641d", "#333333", "#b8a000")
MARKERS = "os^DvP*X"
DIVERGING = "RdBu"  # red below 1, blue above
MOST = 4.0  # the ratio at which the heat map's colours end, and 1/MOST on the other side


@dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    alt: str  # what it shows, in words
    width: float  # inches
    height: float
    draw: Callable[[Any], None]  # on matplotlib axes


def ratio_axis(axis: Any, limits: Callable[..., Any], ratios: Iterable[float]) -> None:
    """A logarithmic axis of ratios around 1, with ticks that are read at a glance."""
    ratios = list(ratios)
    low, high = min(0.9, *ratios) / 1.06, max(1.12, *ratios) * 1.06
    fine = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2)
    digits = (1, 2, 5) if high / low < 50 else (1, 3)
    coarse = [m * 10.0**e for e in range(-3, 5) for m in digits]
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    ticks = [tick for tick in (fine if high / low < 3 else coarse) if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
    limits(low, high)


def plain_log(axis: Any, digits: Sequence[int] = (1,)) -> None:
    """A logarithmic axis with plain numbers, those that begin with one of the `digits`."""
    ticker = require("matplotlib.ticker", "matplotlib")
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_major_locator(ticker.LogLocator(subs=digits))
    axis.set_minor_locator(ticker.NullLocator())


def span(ratios: Iterable[float]) -> str:
    """The range in words."""
    ratios = list(ratios)
    lost = sum(ratio < 1 for ratio in ratios)
    return f"{len(ratios)} ratios from {times(min(ratios))} to {times(max(ratios))}, {lost} below 1"


def scale_stops(count: int = 9) -> list[str]:
    """The heat map's colours as CSS, from 1/MOST to MOST."""
    matplotlib = require("matplotlib")
    colours = matplotlib.colormaps[DIVERGING]
    to_hex = require("matplotlib.colors", "matplotlib").to_hex
    return [to_hex(colours(i / (count - 1))) for i in range(count)]


def heat_panel(standing: Standing) -> Panel:
    """The ratio for each H and B of one cell in one group; `standing` is of one cell."""
    sizes = by_size(standing.comparisons)
    columns = sorted({H for H, _ in sizes})
    lines = sorted({B for _, B in sizes})
    title = f"{standing.name}, {group(standing.comparisons[0].row)}"

    def draw(axes: Any) -> None:
        colours = require("matplotlib").colormaps[DIVERGING]
        patches = require("matplotlib.patches", "matplotlib")
        for (H, B), size in sizes.items():
            x, y = columns.index(H), lines.index(B)
            place = 0.5 + math.log(size.mean) / math.log(MOST) / 2
            colour = colours(min(max(place, 0.0), 1.0))
            dark = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2] < 0.45
            ink = "white" if dark else INK
            box = patches.Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=colour)
            axes.add_patch(box)
            if size.lost:  # none may hide in a mean
                box.set(edgecolor=LOSS, linewidth=2)
            centre = {"ha": "center", "va": "center", "color": ink}
            axes.text(x, y + 0.13, times(size.mean), weight="bold", **centre)
            axes.text(x, y - 0.24, size.steps, fontsize=7.2, **centre)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(lines)), lines)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(lines) - 0.5))
        axes.set(xlabel="hidden size H", ylabel="batch B", facecolor="#f1f1ee")
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)

    alt = f"Times as fast as torch.nn by H and B, {title}: {span(_ratios(standing))}"
    width = max(NARROW, 0.48 * len(columns) + 0.6)
    return Panel(title, alt, width, 0.4 * len(lines) + 0.6, draw)


def all_ratios(standings: Iterable[Standing]) -> list[float]:
    """What a common scale of several panels must have room for."""
    return [ratio for standing in standings for ratio in _ratios(standing)]


def _ratios(standing: Standing) -> list[float]:
    return [comparison.ratio for comparison in standing.comparisons]


def steps_panel(standing: Standing, scale: Sequence[float]) -> Panel:
    """The ratio against the number of timesteps, by cell, on an axis that has room for `scale`."""

    def draw(axes: Any) -> None:
        for cell, marker in zip(standing.cells, MARKERS * 9, strict=False):
            found = cell.comparisons
            axes.plot(
                [c.row.T for c in found], [c.ratio for c in found], marker, label=cell.name,
                color=CELL_COLOURS.get(cell.name, GREY), alpha=0.8, markeredgewidth=0,
            )  # fmt: skip
        axes.axhline(1.0, color=INK, linewidth=0.9)
        plain_log(axes.xaxis)
        ratio_axis(axes.yaxis, axes.set_ylim, scale)
        axes.set(xlabel="timesteps T", ylabel="times as fast as torch.nn")
        axes.grid(alpha=0.25)
        axes.legend(loc="best")

    alt = f"Ratio against timesteps, {standing.name}: {span(_ratios(standing))}"
    return Panel(standing.name, alt, NARROW, 2.4, draw)


def roofline_panel(standing: Standing, rows: Sequence[Row]) -> Panel | None:
    """GFLOP/s of both against the FLOPs per byte; `rows` have the shares that give the roof."""
    found = [
        (intensity(c.row), c.row.gflops, c.other.gflops)
        for c in standing.comparisons
        if c.row.layout == "dense" and c.row.cell in GATES and c.row.dtype in BYTES
    ]
    if not found:
        return None
    sample = standing.comparisons[0].row
    peak = roof(r for r in rows if (r.dtype, r.pass_) == (sample.dtype, sample.pass_))
    places, ours, stock = zip(*found, strict=True)

    def draw(axes: Any) -> None:
        axes.vlines(places, ours, stock, color=GREY, linewidth=0.8, alpha=0.6)
        axes.plot(places, stock, "s", color="white", markeredgecolor="#555555", label=STOCK)
        axes.plot(places, ours, "o", color=WIN, label=OURS)
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
        if peak:
            axes.axhline(peak, color=INK, linewidth=1)
            label = f"torch.mm: {peak:.3g}"
            axes.annotate(
                label, (0.02, peak), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", fontsize=7,
            )  # fmt: skip
            axes.set_ylim(top=max(peak, *ours, *stock) * 2.2)
        axes.set(xlabel="FLOPs per byte", ylabel="GFLOP/s")
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right")

    best = f"rnn_fused up to {max(ours):.3g} GFLOP/s, torch.nn up to {max(stock):.3g}"
    top = f"; a large product {peak:.3g}" if peak else ""
    alt = f"Roofline, {standing.name}: {best}{top}"
    return Panel(standing.name, alt, NARROW, 2.5, draw)


def ratios_panel(
    standing: Standing,
    rows: Sequence[Row],
    scale: Sequence[float],
    styles: Mapping[str, tuple[str, str]],
) -> Panel:
    """A bar a case, to the right of 1 where rnn_fused is faster and to the left where slower; marks
    for the other providers in `rows`. The axis has room for `scale`. `styles`: marker, colour."""
    found = [comparison for cell in standing.cells for comparison in cell.comparisons]
    ratios = [comparison.ratio for comparison in found]
    names = [problem(c.row) for c in found]
    place = {(c.row.section, c.row.case): y for y, c in enumerate(found)}
    marks: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for row in rows:
        y = place.get((row.section, row.case))
        if y is not None and row.provider not in (STOCK, OURS) and row.ratio is not None:
            marks[row.provider].append((row.ratio, y))

    def draw(axes: Any) -> None:
        colours = [WIN if ratio >= 1 else LOSS for ratio in ratios]
        widths = [ratio - 1 for ratio in ratios]
        axes.barh(range(len(found)), widths, left=1, color=colours, height=0.66)
        ratio_axis(axes.xaxis, axes.set_xlim, scale)
        axes.axvline(1, color=INK, linewidth=0.9)
        for name, points in marks.items():
            marker, colour = styles[name]
            axes.plot(
                *zip(*points, strict=True), marker, color=colour, markersize=5, label=name,
                markeredgecolor="white", markeredgewidth=0.5,
            )  # fmt: skip
        for y, ratio in enumerate(ratios):
            axes.annotate(
                times(ratio), (1.0, y), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", va="center", color=colours[y],
                weight="normal" if ratio >= 1 else "bold",
            )  # fmt: skip
        axes.set_yticks(range(len(found)), names)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlabel("times as fast as torch.nn")
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        if marks:
            axes.get_figure().legend(loc="outside lower center", ncols=2)

    height = 0.2 * len(found) + 0.7 + 0.18 * math.ceil(len(marks) / 2)
    width = max(WIDE, 2.1 + 0.066 * max(map(len, names)))
    alt = f"A bar a case, {standing.name}: {span(ratios)}"
    return Panel(standing.name, alt, width, height, draw)


def ratios_chart(standings: Sequence[Standing], rows: Sequence[Row]) -> list[Panel]:
    """The bars of every group, on one scale, a provider's marks alike in all."""
    scale = all_ratios(standings) + [row.ratio for row in rows if row.ratio is not None]
    names = [name for name in dict.fromkeys(r.provider for r in rows) if name not in (STOCK, OURS)]
    looks = zip(cycle("D^vP*X"), cycle(OTHER_COLOURS), strict=False)
    styles = dict(zip(names, looks, strict=False))
    return [ratios_panel(standing, rows, scale, styles) for standing in standings]


def memory_panel(title: str, problems: Mapping[str, Mapping[str, float]]) -> Panel:
    """Bars of peak memory, torch.nn's first, with how many times torch.nn's each is."""
    names = list(dict.fromkeys(name for by in problems.values() for name in by))
    names.sort(key=lambda name: (name != STOCK, name != OURS))
    palette = dict(zip(names, ("#b5b5b5", WIN, *OTHER_COLOURS * 9), strict=False))
    bars: list[tuple[float, str, float, float]] = []  # place, provider, MB, share of torch.nn's
    headings, y = [], 0.0
    for sizes, by in problems.items():
        headings.append((y, sizes))
        for name in names:
            if name in by:
                y += 1
                bars.append((y, name, by[name], by[name] / by[STOCK]))
        y += 1.5

    def draw(axes: Any) -> None:
        places, providers, values, _ = zip(*bars, strict=True)
        axes.barh(places, values, color=[palette[name] for name in providers], height=0.9)
        for place, name, value, share in bars:
            text = megabytes(value) + ("" if name == STOCK else f" ({times(share)})")
            axes.annotate(
                text, (value, place), xytext=(3, 0), textcoords="offset points", va="center",
                fontsize=7.5, color=LOSS if share > 1 else INK,
            )  # fmt: skip
        for place, heading in headings:
            axes.annotate(
                heading, (0, place), xytext=(3, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks([])
        axes.set_ylim(places[-1] + 0.8, -0.8)
        axes.set_xlim(0, max(values) * 1.25)
        axes.set_xlabel("peak MB (times torch.nn's)")
        patches = require("matplotlib.patches", "matplotlib")
        handles = [patches.Patch(color=palette[name], label=name) for name in names]
        axes.get_figure().legend(handles=handles, loc="outside lower center", ncols=2)

    height = 0.15 * y + 0.7 + 0.18 * math.ceil(len(names) / 2)
    ours = [share for _, name, _, share in bars if name == OURS]
    alt = f"Peak memory, {title}" + (
        f": rnn_fused takes {min(ours):.2f} to {max(ours):.2f} times torch.nn's" if ours else ""
    )
    return Panel(title, alt, WIDE, height, draw)


def megabytes(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def learning_panel(learning: Learning) -> Panel:
    """Training loss against the seconds spent in training steps."""

    def draw(axes: Any) -> None:
        for name, colour, width in ((STOCK, GREY, 2.2), (OURS, WIN, 1.4)):
            axes.plot(
                learning.seconds[name], learning.losses[name], color=colour, linewidth=width,
                label=name,
            )  # fmt: skip
            axes.plot(learning.reached(name), learning.target, "o", color=colour)
        axes.axhline(learning.target, color=INK, linewidth=0.8, linestyle=":")
        axes.set(xlabel="seconds of training", ylabel="training loss")
        plain_log(axes.yaxis, digits=(1, 2, 3, 5))
        axes.grid(alpha=0.25)
        axes.legend()

    alt = (
        f"Loss against seconds: to a loss of {learning.target:.3g} torch.nn took "
        f"{learning.reached(STOCK):.3g} s and rnn_fused {learning.reached(OURS):.3g} s"
    )
    return Panel("Loss against the clock", alt, WIDE, 2.8, draw)

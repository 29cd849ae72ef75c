"""Files and inline SVG of the panels in `charts.py`; the forecaster's plot."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .charts import GREY, WIN, Panel
from .extras import require
from .findings import OURS, STOCK
from .forecaster import Forecast

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # text stays text: small, found by a search, read aloud
    "text.parse_math": False,  # a dollar is a dollar
    "svg.hashsalt": "rnn_fused",  # the same rows make the same file
}
TALLEST = 100.0  # inches
OUTER_TAG = re.compile(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", re.DOTALL)
UNWANTED = re.compile(r"<(metadata|style)\b.*?</\1>\s*", re.DOTALL)  # a style would hold everywhere
TAG, DECIMALS = re.compile(r"<[^>]+>"), re.compile(r"(\.\d\d)\d+")
IDENTIFIER, REFERENCE = re.compile(r' id="([^"]*)"'), re.compile(r'(?<=["(])#([^")]+)')


def _figure(width: float, height: float) -> Any:
    """A figure that needs no screen and is known to nobody else."""
    return require("matplotlib.figure", "matplotlib").Figure((width, height), layout="constrained")


def _style() -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = require("matplotlib").rc_context(STYLE)
    return context


def _embedded(text: str, name: str) -> str:
    """An SVG file as a part of a page: identifiers begin with `name`, and those that nothing refers
    to are gone, as are digits that nobody sees."""
    text = UNWANTED.sub("", text[text.index("<svg") :])
    text = TAG.sub(lambda tag: DECIMALS.sub(r"\1", tag[0]), text)
    used = set(REFERENCE.findall(text))
    text = IDENTIFIER.sub(lambda i: f' id="{name}-{i[1]}"' if i[1] in used else "", text)
    return re.sub(r"\n *", "\n", REFERENCE.sub(rf"#{name}-\1", text))


def to_svg(panel: Panel, name: str) -> str:
    """An element for a page, without the title. `name`, unique in the page, goes before every
    identifier."""
    with _style():
        figure = _figure(panel.width, panel.height)
        panel.draw(figure.subplots())
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = _embedded(written.getvalue(), name)
    opening = f'role="img" aria-label="{html.escape(panel.alt)}"'
    return OUTER_TAG.sub(lambda tag: f"<svg {tag[1]} {opening}>", text, count=1)


def to_png(path: Path, panels: Sequence[Panel], title: str = "", columns: int = 2) -> bool:
    """A file with all panels side by side, in rows of at most `columns`; False, and none, where it
    would be too tall for those who look at it, and for matplotlib."""
    columns = min(columns, len(panels))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in line) + 0.3 for line in lines]
    width = max(panel.width for panel in panels)
    if sum(heights) > TALLEST:
        return False
    with _style():
        figure = _figure(max(width * columns, 6.0), sum(heights) + 0.5)
        grid = figure.subfigures(len(lines), columns, squeeze=False, height_ratios=heights)
        for panel, part in zip(panels, grid.flat, strict=False):
            panel.draw(part.subplots())
            part.suptitle(panel.title, weight="bold", fontsize=9.5)
        figure.suptitle(title, fontsize=9.5)
        figure.savefig(path, dpi=150)
    return True


def plot_forecast(path: Path, forecast: Forecast) -> None:
    """The loss curves of both libraries, and their relative difference below."""
    with _style():
        figure = _figure(6.5, 5)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        styles = {STOCK: (GREY, "-", 4), OURS: (WIN, "-", 1.4)}
        for name, (colour, line, width) in styles.items():
            above.plot(forecast.losses[name], line, color=colour, linewidth=width, label=name)
        above.set_ylabel("training loss (standardised)")
        above.set_title(f"CO2 forecaster: a training step is {forecast.ratio:.2f} times as fast")
        above.legend()
        for name, (colour, line, width) in styles.items():
            exact = zip(forecast.losses[name], forecast.losses["float64"], strict=True)
            difference = [max(abs(x - y) / abs(y), 1e-12) for x, y in exact]
            below.plot(difference, line, color=colour, linewidth=width)
        below.set_yscale("log")
        below.set_ylabel("relative difference\nfrom float64")
        below.set_xlabel("training step")
        figure.savefig(path, dpi=150)

"""The plots: ratio of every row, and the forecaster's loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .extras import require
from .forecaster import Forecast
from .records import Row

WIN, LOSS, NAIVE = "#2a7fb8", "#c8442e", "#9a9a9a"


def _pyplot() -> Any:
    """Matplotlib's pyplot on a backend that needs no screen."""
    require("matplotlib").use("Agg")
    return require("matplotlib.pyplot", "matplotlib")


def plot_ratios(path: Path, rows: Sequence[Row], title: str) -> None:
    """One panel for each dtype and pass: a bar a problem, 1 is torch.nn, losses in red."""
    plt = _pyplot()
    groups = list(dict.fromkeys((row.dtype, row.pass_) for row in rows))
    tallest = max(sum((r.dtype, r.pass_) == g for r in rows) for g in groups) / 3 + 2
    figure, panels = plt.subplots(
        1, len(groups), figsize=(4.2 * len(groups) + 1, 0.28 * tallest + 1.6), squeeze=False
    )
    for axes, group in zip(panels[0], groups, strict=True):
        members = [row for row in rows if (row.dtype, row.pass_) == group]
        ours = [row for row in members if row.provider == "rnn_fused"]
        naive = {row.problem: row.ratio for row in members if row.provider == "naive"}
        places = range(len(ours))
        ratios = [row.ratio or 0.0 for row in ours]
        bars = axes.barh(places, ratios, color=[WIN if r >= 1 else LOSS for r in ratios])
        axes.bar_label(bars, labels=[f"{ratio:.2f}" for ratio in ratios], padding=2, fontsize=7)
        if naive:
            marks = [naive[row.problem] for row in ours]
            axes.plot(marks, places, "|", color=NAIVE, markersize=9, label="naive Python loop")
            axes.legend(fontsize=7, loc="lower right")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks(places, [row.problem for row in ours], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(0, max(1.0, *ratios) * 1.2)
        axes.set_xlabel("times as fast as torch.nn", fontsize=8)
        axes.set_title(" ".join(group), fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_forecast(path: Path, forecast: Forecast) -> None:
    """The loss curves of both libraries, and their relative difference below."""
    plt = _pyplot()
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(6.5, 5), height_ratios=(2, 1), layout="constrained"
    )
    styles = {"torch.nn": (NAIVE, "-", 4), "rnn_fused": (WIN, "-", 1.4)}
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
    plt.close(figure)

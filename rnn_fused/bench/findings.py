"""What the page and its pictures show, as numbers: standings, losses, values of pictures."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from .memory import MemoryRow
from .problems import GATES, describe
from .providers import FROZEN
from .records import Environment, Row
from .summary import geometric_mean

STOCK, OURS = "torch.nn", "rnn_fused"
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN (tanh)", "rnn_relu": "RNN (ReLU)"}
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MEMORY_SECTION = "memory"
LEAST_MB = 1.0  # of torch.nn's peak memory: below, pages and caches decide
MOST_BARS = 24  # problems in a picture of memory
COMPARED = ("grid", "ragged")  # sections whose rows are of layers on one device


def is_ours(provider: str) -> bool:
    """Whether it is a layer of this package: by default, frozen, recomputing, of one family. The
    rows of a CPU beside a device compare machines, not libraries."""
    return provider.startswith(OURS) and not provider.endswith(" on the CPU")


def is_rival(provider: str) -> bool:
    """Whether it is neither ours nor torch.nn's."""
    return not provider.startswith((OURS, STOCK))


def group(row: Row) -> str:
    """What may be averaged: rows of one dtype, pass, layout and section."""
    words = f"{row.dtype} {row.pass_}" + (f", {row.layout}" if row.layout != "dense" else "")
    return words if row.section in (*COMPARED, row.layout) else f"{words}, {row.section}"


def kind(row: Row) -> str:
    """The cell, with its layers and directions where they are several."""
    words = [CELLS.get(row.cell, row.cell)]
    words += [f"{row.layers} layers"] if row.layers > 1 else []
    words += ["bidirectional"] if row.directions > 1 else []
    return ", ".join(words)


def problem(row: Row | MemoryRow) -> str:
    """The sizes in words, with the cell's name as everywhere else."""
    directions, layout = getattr(row, "directions", 1), getattr(row, "layout", "dense")
    name = CELLS.get(row.cell, row.cell)
    words = describe(name, row.T, row.B, row.I, row.H, row.layers, directions)
    return words if layout == "dense" else f"{words} {layout}"


def times(ratio: float) -> str:
    """A ratio in two decimals, in more where these would turn a loss into 1.00."""
    text = ""
    for digits in range(2, 6):
        text = f"{ratio:.{digits}f}"
        if ratio >= 1 or float(text) < 1:
            break
    return text


@dataclass(frozen=True)
class Comparison:
    """One case with two providers."""

    row: Row  # ours
    other: Row
    ratio: float  # time of the other / time of ours: below 1 we lose


def mean_of(found: Sequence[Comparison]) -> float:
    """The geometric mean of the ratios; of one alone, that ratio to the last digit."""
    return found[0].ratio if len(found) == 1 else geometric_mean(c.ratio for c in found)


def comparisons(rows: Iterable[Row], ours: str, against: str) -> list[Comparison]:
    """Every case that both ran."""
    rows = list(rows)
    others = {(row.section, row.case): row for row in rows if row.provider == against}
    found = []
    for row in rows:
        other = others.get((row.section, row.case))
        if row.provider != ours or other is None:
            continue
        ratio = row.ratio if against == STOCK else row.speedup_over(other)
        if ratio is not None:
            found.append(Comparison(row, other, ratio))
    return found


@dataclass(frozen=True)
class Standing:
    """How one provider of ours stands against another, in one group or in one of its cells."""

    name: str
    ours: str
    against: str
    comparisons: tuple[Comparison, ...]

    @property
    def mean(self) -> float:
        """The geometric mean of the ratios."""
        return mean_of(self.comparisons)

    @cached_property
    def ordered(self) -> list[Comparison]:
        """From the worst to the best."""
        return sorted(self.comparisons, key=lambda c: c.ratio)

    @property
    def lost(self) -> list[Comparison]:
        """Those below 1, the worst first."""
        return [c for c in self.ordered if c.ratio < 1]

    @property
    def cells(self) -> list[Standing]:
        """The same for each cell."""
        members: defaultdict[str, list[Comparison]] = defaultdict(list)
        for comparison in self.comparisons:
            members[kind(comparison.row)].append(comparison)
        return [replace(self, name=name, comparisons=tuple(m)) for name, m in members.items()]


def standings(rows: Iterable[Row], ours: str, against: str) -> list[Standing]:
    """One for each group, in the order of the rows."""
    members: defaultdict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons(rows, ours, against):
        members[group(comparison.row)].append(comparison)
    return [Standing(name, ours, against, tuple(found)) for name, found in members.items()]


def against_stock(rows: Sequence[Row]) -> list[Standing]:
    """All of our providers against torch.nn, the default one first."""
    names = dict.fromkeys(row.provider for row in rows if is_ours(row.provider))
    ordered = sorted(names, key=lambda name: name != OURS)
    return [s for name in ordered for s in standings(rows, name, STOCK)]


def against_rivals(rows: Sequence[Row]) -> list[Standing]:
    """What a user gets, by default and frozen, against everyone but torch.nn."""
    rivals = dict.fromkeys(row.provider for row in rows if is_rival(row.provider))
    return [s for rival in rivals for ours in (OURS, FROZEN) for s in standings(rows, ours, rival)]


@dataclass
class Part:
    """What was measured on one machine in one configuration: no case is in it twice."""

    runs: list[Environment] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    contents: list[Mapping[str, Any]] = field(default_factory=list)  # of bench.json

    @property
    def compared(self) -> list[Row]:
        """The rows of layers on one device."""
        return [row for row in self.rows if row.section in COMPARED]

    @property
    def measured(self) -> set[tuple[Any, ...]]:
        """What identifies each measurement."""
        timed = {(row.section, row.provider, *row.case) for row in self.rows}
        sizes = {
            (m.provider, m.cell, m.T, m.B, m.I, m.H, m.layers, m.dtype, m.pass_)
            for m in self.memory
        }
        return timed | sizes

    def add(self, run: Part) -> None:
        """Take in another run."""
        self.runs += run.runs
        self.rows += run.rows
        self.memory += run.memory
        self.contents += run.contents


def parts(
    rows: Iterable[tuple[Row, Environment]],
    memory: Iterable[tuple[MemoryRow, Environment]] = (),
    contents: Iterable[tuple[Mapping[str, Any], Environment]] = (),
) -> list[Part]:
    """Runs of one machine, configuration, commit and day are one part, unless they measured the
    same case: then each has its own. The newest first."""
    runs: defaultdict[Environment, Part] = defaultdict(Part)
    for row, where in rows:
        runs[where].rows.append(row)
    for taken, where in memory:
        runs[where].memory.append(taken)
    for content, where in contents:
        runs[where].contents.append(content)
    found: defaultdict[Environment, list[Part]] = defaultdict(list)
    for where, run in runs.items():
        run.runs = [where]
        alike = found[replace(where, date=where.date[:10], load=0.0)]
        home = next((part for part in alike if not part.measured & run.measured), None)
        if home is None:
            alike.append(run)
        else:
            home.add(run)
    separate = [part for alike in found.values() for part in alike]
    return sorted(separate, key=lambda part: max(w.date for w in part.runs), reverse=True)


@dataclass(frozen=True)
class Size:
    """The cases of one batch and hidden size, over T and I."""

    comparisons: tuple[Comparison, ...]

    @property
    def mean(self) -> float:
        """The geometric mean of the ratios."""
        return mean_of(self.comparisons)

    @property
    def lost(self) -> int:
        """How many ratios are below 1."""
        return sum(c.ratio < 1 for c in self.comparisons)

    @property
    def steps(self) -> str:
        """The numbers of timesteps, or how many cases where these leave no room."""
        steps = "T " + ", ".join(map(str, sorted({c.row.T for c in self.comparisons})))
        several = len(self.comparisons) > 2 or len(steps) > 8
        return f"{len(self.comparisons)} cases" if several else steps


def by_size(found: Iterable[Comparison]) -> dict[tuple[int, int], Size]:
    """The heat map: the cases of each (H, B)."""
    members: defaultdict[tuple[int, int], list[Comparison]] = defaultdict(list)
    for comparison in found:
        members[comparison.row.H, comparison.row.B].append(comparison)
    return {size: Size(tuple(members[size])) for size in sorted(members)}


def intensity(row: Row) -> float:
    """FLOPs per byte of a dense row, if every tensor passes once between memory and processor: the
    weights, the input and each layer's output, in training also the gradient of each."""
    gates, wide = GATES[row.cell], row.directions * row.H
    inputs = row.I + (row.layers - 1) * wide  # of all layers together
    weights = gates * wide * (inputs + row.layers * (row.H + 2))
    values = row.T * row.B * (row.I + row.layers * wide)
    tensors = 2 if row.pass_ == "training" else 1
    flops = row.gflops * row.p50_ms * 1e6
    return flops / (tensors * BYTES[row.dtype] * (weights + values))


def roof(rows: Iterable[Row]) -> float | None:
    """GFLOP/s of a large product of torch's: the median over the rows that were timed with it."""
    peaks = [row.gflops / row.share for row in rows if row.share]
    return statistics.median(peaks) if peaks else None


def memory_bars(part: Part) -> dict[str, dict[str, dict[str, float]]]:
    """Peak MB by "dtype pass", problem and provider, of problems of which torch.nn's is known."""
    bars: defaultdict[str, defaultdict[str, dict[str, float]]]
    bars = defaultdict(lambda: defaultdict(dict))
    for row in part.rows:
        if row.peak_mb is not None and row.section != "devices":
            bars[group(row).removesuffix(f", {MEMORY_SECTION}")][problem(row)][row.provider] = (
                row.peak_mb
            )
    for m in part.memory:
        bars[f"{m.dtype} {m.pass_}"][problem(m)][m.provider] = m.peak_mb
    known = {
        name: {
            sizes: by
            for sizes, by in problems.items()
            if by.get(STOCK, 0) >= LEAST_MB and len(by) > 1
        }
        for name, problems in bars.items()
    }
    return {name: _largest(problems) for name, problems in known.items() if problems}


def _largest(problems: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Those that take torch.nn the most memory, in the order that they had."""
    ordered = sorted(problems, key=lambda sizes: problems[sizes][STOCK], reverse=True)
    chosen = set(ordered[:MOST_BARS])
    return {sizes: by for sizes, by in problems.items() if sizes in chosen}


@dataclass(frozen=True)
class Learning:
    """Loss curves against the clock."""

    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]  # since the first step, at the end of each
    target: float  # the lowest loss that all reach

    def reached(self, name: str) -> float:
        """Seconds until the loss is first at the target or below."""
        pairs = zip(self.losses[name], self.seconds[name], strict=True)
        return next(second for loss, second in pairs if loss <= self.target)


def learning(content: Mapping[str, Any]) -> Learning | None:
    """The forecaster's training, or None where it was not run or not timed step by step."""
    forecast = content.get("forecaster") or {}
    taken = forecast.get("seconds") or {}
    if not {STOCK, OURS} <= taken.keys():
        return None
    names = (STOCK, OURS)
    losses = {name: forecast["losses"][name] for name in names}
    seconds = {name: list(accumulate(taken[name])) for name in names}
    return Learning(losses, seconds, max(min(losses[name]) for name in names))

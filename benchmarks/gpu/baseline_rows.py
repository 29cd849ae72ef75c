"""What baseline.py measures: the rows of grids.json crossed with precisions, layouts and providers.

Pure Python, so that the selection can be tested anywhere.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

GRIDS = Path(__file__).resolve().parents[2] / "rnn_fused" / "bench" / "grids.json"

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
# tf32 and float32 are both float32 tensors; they differ in torch.backends.cudnn.rnn.fp32_precision.
PRECISIONS = ("float16", "bfloat16", "tf32", "float32")
EVERYDAY_GRIDS = ("everyday", "fastrnns", "flashrnn")
SHORTEST = 0.4  # packed: lengths from 0.4 T to T

# Times for estimates only: deliberately slow, so that a row is dropped rather than overrun.
STEP_S = {"torch.nn": 20e-6, "loop": 400e-6, "cpu": 100e-6}
FLOPS = {"torch.nn": 2e13, "loop": 2e13, "cpu": 1e11}
PASSES = 25  # forward passes' worth of work in one row: warm-ups, repeats, backward
FIXED_S = 0.3


@dataclass(frozen=True)
class Row:
    """One case to time: forward, and unless `inference` forward+backward.

    layout: "dense"; "packed" (lengths from 0.4 T to T); "reset_P" (every sequence cut at random
    with probability P a step, the pieces packed: the least that torch.nn can do about resets).
    provider: "torch.nn" (cuDNN on a GPU), "loop" (a Python loop over timesteps), "cpu" (torch.nn
    on the CPU). heads > 1: that many layers of H units, one after the other, on the same input.
    """

    grid: str
    cell: str
    T: int
    B: int
    H: int
    I: int  # noqa: E741  the input size is I everywhere in this project
    precision: str
    layout: str = "dense"
    provider: str = "torch.nn"
    heads: int = 1
    inference: bool = False
    priority: int = 9  # 1 runs first; not part of the key

    @property
    def key(self) -> str:
        """Unique among the rows of one selection; stable between runs (for --resume)."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("priority", "inference")}
        return "/".join(str(v) for v in fields.values())

    @property
    def flops(self) -> int:
        """Of one forward pass over dense input, products only."""
        return 2 * self.T * self.B * self.heads * GATES[self.cell] * self.H * (self.H + self.I)

    @property
    def estimate_s(self) -> float:
        """An upper estimate of the time that measuring this row takes."""
        once = self.heads * self.T * STEP_S[self.provider] + self.flops / FLOPS[self.provider]
        return FIXED_S + PASSES * once


def lengths(row: Row) -> list[int] | None:
    """The sequence lengths, longest first, or None for dense input."""
    if row.layout == "dense":
        return None
    if row.layout == "packed":
        shortest = max(1, math.ceil(SHORTEST * row.T))
        span = max(row.B - 1, 1)
        return [row.T - round(b * (row.T - shortest) / span) for b in range(row.B)]
    probability = float(row.layout.removeprefix("reset_"))
    draw = random.Random(f"{row.T} {row.B} {probability}")
    pieces = []
    for _ in range(row.B):
        start = 0
        for t in range(1, row.T):
            if draw.random() < probability:
                pieces.append(t - start)
                start = t
        pieces.append(row.T - start)
    return sorted(pieces, reverse=True)


def load_grids(path: Path = GRIDS) -> dict[str, dict]:
    grids = json.loads(path.read_text())
    return {name: grid for name, grid in grids.items() if isinstance(grid, dict)}


def _shapes(name: str, grid: dict) -> Iterator[Row]:
    """The grid's rows, dense and in bfloat16; callers replace the rest."""
    for cell, T, B, H, *last in grid["rows"]:
        heads = last[0] if name == "flashrnn_heads" else 1
        given = last and name != "flashrnn_heads"
        I = last[0] if given else grid.get("I", H * heads)  # noqa: E741
        inference = bool(grid.get("inference"))
        yield Row(name, cell, T, B, H, I, "bfloat16", heads=heads, inference=inference)


def _cross(
    rows: Iterable[Row], precisions: Iterable[str], priority: int, **changes: object
) -> Iterator[Row]:
    precisions = tuple(precisions)
    for row in rows:
        for precision in precisions:
            yield replace(row, precision=precision, priority=priority, **changes)


def _ragged(rows: Iterable[Row]) -> list[Row]:
    """Those rows in which sequences can differ in length."""
    return [row for row in rows if row.B > 1 and row.T >= 5]


# The few shapes for the Python loop and for the CPU: small, launch-bound, long.
FEW = {
    ("everyday", "lstm", 24, 32, 32),
    ("everyday", "lstm", 200, 16, 256),
    ("everyday", "gru", 200, 16, 256),
    ("everyday", "lstm", 1, 1, 256),
    ("fastrnns", "lstm", 100, 64, 512),
}


def _quick(shapes: dict[str, list[Row]]) -> Iterator[Row]:
    """The default selection, most wanted first."""
    everyday = [row for name in EVERYDAY_GRIDS for row in shapes[name]]
    few = [row for row in everyday if (row.grid, row.cell, row.T, row.B, row.H) in FEW]
    yield from _cross(everyday, PRECISIONS, 1)
    yield from _cross(few, ("float32", "bfloat16"), 2, provider="cpu")
    yield from _cross(few, ("tf32", "bfloat16"), 2, provider="loop")
    yield from _cross(shapes["rl"], PRECISIONS, 3)
    yield from _cross(shapes["deepbench_train"], PRECISIONS, 3)
    ragged = _ragged([*everyday, *shapes["rl"]])
    yield from _cross(ragged, ("bfloat16", "tf32"), 4, layout="packed")
    yield from _cross(shapes["rnnt"], PRECISIONS, 4)
    yield from _cross(shapes["deepbench_infer_device"], PRECISIONS, 4)
    yield from _cross(shapes["deepbench_infer_server"], ("float16", "bfloat16"), 5)
    resets = [row for row in shapes["rl"] if row.B <= 512]
    yield from _cross(resets, ("bfloat16",), 5, layout="reset_0.01")
    haste = [row for row in shapes["haste"] if row.I == 256 and row.B in (1, 32)]
    yield from _cross(haste, ("tf32",), 6)
    yield from _cross(shapes["flashrnn_heads"], ("bfloat16",), 6)


def _rest(grids: dict[str, dict], shapes: dict[str, list[Row]]) -> Iterator[Row]:
    """What --full adds: every grid in every precision, ragged wherever that has a meaning."""
    for name, rows in shapes.items():
        yield from _cross(rows, PRECISIONS, 7)
        for probability in grids[name].get("reset_p", ()):
            if probability > 0:
                yield from _cross(rows, PRECISIONS, 8, layout=f"reset_{probability}")
    for rows in shapes.values():
        yield from _cross(_ragged(rows), PRECISIONS, 8, layout="packed")


def select(grids: dict[str, dict], *, full: bool, only: Iterable[str] = ()) -> list[Row]:
    """The rows to run, most wanted first, each key once. `only` keeps the named grids."""
    unknown = set(only) - set(grids)
    if unknown:
        raise ValueError(f"--grids must name grids of {sorted(grids)}, got {sorted(unknown)}")
    shapes = {name: list(_shapes(name, grid)) for name, grid in grids.items()}
    rows: dict[str, Row] = {}
    for row in [*_quick(shapes), *(_rest(grids, shapes) if full else ())]:
        rows.setdefault(row.key, row)
    wanted = set(only) or set(grids)
    return sorted((r for r in rows.values() if r.grid in wanted), key=lambda row: row.priority)


def shrink(rows: Iterable[Row]) -> list[Row]:
    """A dry run's selection: tiny, with every cell, precision, layout and provider of `rows`."""
    tiny: dict[tuple, Row] = {}
    for row in rows:
        kind = (row.cell, row.precision, row.layout, row.provider, row.heads > 1, row.inference)
        small = replace(
            row,
            T=min(row.T, 6),
            B=min(row.B, 3),
            H=min(row.H, 8),
            I=min(row.I, 8),
            heads=min(row.heads, 2),
        )
        tiny.setdefault(kind, small)
    return list({row.key: row for row in tiny.values()}.values())

"""Benchmark problems: the sizes of a recurrent layer, read from `grids.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

GRIDS = Path(__file__).with_name("grids.json")
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
PASSES = ("inference", "training")
LONG_STEPS, LONG_FLOPS = 1024, 1e13


def describe(
    cell: str,
    T: int,
    B: int,
    I: int,  # noqa: E741  the field's name for the input size
    H: int,
    layers: int = 1,
    directions: int = 1,
) -> str:
    """The sizes in words, the input size only where it differs from H."""
    stack = f" {layers} layers" if layers > 1 else ""
    both = " bidirectional" if directions > 1 else ""
    return f"{cell} T={T} B={B} H={H}" + ("" if I == H else f" I={I}") + stack + both


@dataclass(frozen=True)
class Problem:
    """A layer or a stack: T timesteps, batch B, input size I, hidden size H."""

    cell: str
    T: int
    B: int
    I: int  # noqa: E741  the field's name for the input size
    H: int
    layers: int = 1
    directions: int = 1
    heads: int = 1
    reset_p: float = 0.0
    inference_only: bool = False

    def __str__(self) -> str:
        """The sizes in words."""
        return describe(self.cell, self.T, self.B, self.I, self.H, self.layers, self.directions)

    @property
    def stacked(self) -> bool:
        """Whether it is more than one layer of one direction."""
        return self.layers * self.directions > 1

    @property
    def obstacle(self) -> str | None:
        """Why torch.nn has no counterpart of this problem, or None."""
        if self.heads > 1:
            return "block-diagonal recurrent weights"
        if self.reset_p > 0:
            return "resets inside a sequence"
        return None

    @property
    def long(self) -> bool:
        """Whether one row takes so long that, on a budget, many others go first."""
        return self.T > LONG_STEPS or self.flops("training") > LONG_FLOPS

    def flops(self, pass_: str) -> float:
        """Multiplies and adds of the matrix products; the backward pass has twice the forward's."""
        above = (self.layers - 1) * (self.directions + 1) * self.H
        width = self.directions * (self.I + self.H / self.heads + above)
        forward = 2.0 * GATES[self.cell] * self.H * width * self.T * self.B
        return forward * (3 if pass_ == "training" else 1)


def _parse_row(name: str, grid: dict[str, Any], row: list[Any], reset_p: float) -> Problem:
    cell, T, B, H, *rest = row
    if cell not in GATES:
        raise ValueError(f"[grids] {name}: cell must be one of {', '.join(GATES)}, got {cell!r}")
    heads, inputs = 1, None
    if name.endswith("_heads"):
        heads = rest[0]
    elif rest:
        inputs = rest[0]
    hidden = H * heads
    return Problem(
        cell,
        T,
        B,
        I=grid.get("I", inputs or hidden),
        H=hidden,
        layers=grid.get("layers", 1),
        directions=grid.get("directions", 1),
        heads=heads,
        reset_p=reset_p,
        inference_only=grid.get("inference", False),
    )


def load_grids(path: Path = GRIDS) -> dict[str, list[Problem]]:
    """Read every grid of a JSON file.

    A row is [cell, T, B, H], with I as an optional fifth; in grids named `*_heads` the fourth is
    the size of one head and the fifth the number of heads. `I`, `layers`, `directions` and
    `reset_p` of a grid hold for all of its rows; `inference` grids are not trained.
    """
    grids = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: [
            _parse_row(name, grid, row, p)
            for row, p in product(grid["rows"], grid.get("reset_p", [0.0]))
        ]
        for name, grid in grids.items()
        if isinstance(grid, dict)
    }


def select(problems: Iterable[Problem], cells: Iterable[str]) -> list[Problem]:
    """The problems of these cells that torch.nn can run too."""
    wanted = set(cells)
    return [p for p in problems if p.cell in wanted and p.obstacle is None]

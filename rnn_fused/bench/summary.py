"""What the rows say: means, losses and the worst rows, for each dtype and pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .records import Row


def geometric_mean(ratios: Iterable[float]) -> float:
    """The mean for ratios: exp of the mean logarithm."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


@dataclass(frozen=True)
class Group:
    """What a set of rows says of rnn_fused against torch.nn."""

    name: str
    rows: int
    mean_ratio: float  # geometric, as all means here
    by_cell: dict[str, float]
    mean_ratio_to_naive: float | None
    below_one: int
    worst: tuple[str, ...]  # "problem ratio", slowest first


def summarise(rows: Iterable[Row], worst: int = 3) -> list[Group]:
    """One group for each dtype x pass, wins and losses alike."""
    rows = list(rows)
    ours = [row for row in rows if row.provider == "rnn_fused" and row.ratio is not None]
    naive = {row.case: row for row in rows if row.provider == "naive"}
    groups = []
    for dtype, pass_ in dict.fromkeys((row.dtype, row.pass_) for row in ours):
        members = [row for row in ours if (row.dtype, row.pass_) == (dtype, pass_)]
        ratios = {row.problem: row.ratio or 0.0 for row in members}
        to_naive = [row.speedup_over(naive[row.case]) for row in members if row.case in naive]
        slowest = sorted(ratios, key=ratios.__getitem__)[:worst]
        groups.append(
            Group(
                name=f"{dtype} {pass_}",
                rows=len(members),
                mean_ratio=geometric_mean(ratios.values()),
                mean_ratio_to_naive=geometric_mean(to_naive) if to_naive else None,
                by_cell={
                    cell: geometric_mean(r.ratio or 0.0 for r in members if r.cell == cell)
                    for cell in dict.fromkeys(row.cell for row in members)
                },
                below_one=sum(ratio < 1.0 for ratio in ratios.values()),
                worst=tuple(f"{problem} {ratios[problem]:.2f}x" for problem in slowest),
            )
        )
    return groups

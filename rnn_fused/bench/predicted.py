"""What the plan expects the timestep loops to take on a GPU, beside what they took.

`python -m rnn_fused.bench.predicted ROWS` reads rows.csv or rows.jsonl files.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import torch

from ..explain import DTYPES, Gpu, cuda_plan, current_gpu
from .providers import FAMILIES
from .records import Row, read_rows
from .workload import Case, allows_tf32

KERNELS = {"rnn_fused": "auto"} | {f"rnn_fused {name}": name for name in FAMILIES}


def predicted_ms(case: Case, provider: str, gpu: Gpu | None = None) -> float | None:
    """The loops of both passes, or of the forward pass alone; to be compared with `recurrence_ms`.

    Of a lone dense layer on a CUDA device, by our own kernels; else None. gpu: the device's.
    """
    p = case.problem
    kernels = KERNELS.get(provider)
    ours = kernels is not None and kernels != "cudnn"
    if case.device.type != "cuda" or case.lengths or p.stacked or not ours:
        return None
    layer = p.cell, DTYPES[case.dtype], p.T, p.B, p.H, p.H, 1
    tf32 = case.dtype is torch.float32 and allows_tf32(case.device)
    gpu = gpu or current_gpu(case.device.index)
    passes = (False, True) if case.pass_ == "training" else (False,)
    plans = [cuda_plan(layer, gpu, tf32, kernels or "", backward=backward) for backward in passes]
    return p.T * sum(sum(plan["step_us"].values()) for plan in plans) * 1e-3


def ranked(rows: Iterable[Row]) -> tuple[int, int]:
    """Of the pairs of families on one case that differ by more than a tenth, how many the
    predictions have in the measured order, and how many there are."""
    cases: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for row in rows:
        if row.predicted_ms and row.recurrence_ms and row.provider != "rnn_fused":
            cases.setdefault(row.case, []).append((row.predicted_ms, row.recurrence_ms))
    right = pairs = 0
    for times in cases.values():
        for (p, m), (q, n) in combinations(times, 2):
            if max(m, n) > 1.1 * min(m, n):
                pairs += 1
                right += (p < q) == (m < n)
    return right, pairs


def report(rows: Sequence[Row]) -> str:
    """A line for each row that has both times, and what they say of the predictions."""
    known = [row for row in rows if row.predicted_ms and row.recurrence_ms]
    if not known:
        return "no row has both a predicted and a measured time: they are rows of a GPU's bench"
    lines = ["predicted  measured  measured/predicted"]
    errors = []
    for row in known:
        predicted, measured = row.predicted_ms or 0.0, max(row.recurrence_ms or 0.0, 1e-6)
        errors.append(math.log(measured / predicted))
        lines.append(
            f"{predicted:9.3f} {measured:9.3f} {measured / predicted:9.2f}  "
            f"{row.provider}: {row.problem} {row.dtype} {row.pass_}"
        )
    right, pairs = ranked(rows)
    center = math.exp(sum(errors) / len(errors))
    lines += [
        f"measured/predicted: geometric mean {center:.2f} of {len(errors)} rows",
        f"families in the right order: {right} of {pairs} pairs",
    ]
    return "\n".join(lines)


def main(paths: Sequence[str]) -> None:
    """Print the report of some files of rows."""
    if not paths:
        raise SystemExit("[predicted] needs at least one file of rows, got none")
    print(report([row for path in paths for row, _ in read_rows(Path(path))]))


if __name__ == "__main__":
    main(sys.argv[1:])

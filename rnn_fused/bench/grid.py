"""The main section: rnn_fused against torch.nn and the naive loop, row by row of a grid."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch

from .problems import Problem
from .records import Row, make_row
from .timer import Settings, interleave
from .workload import Case, contenders

SECTION = "grid"


def cases(
    problems: Iterable[Problem],
    dtypes: Iterable[torch.dtype],
    passes: Iterable[str],
    device: torch.device,
) -> list[Case]:
    """Every problem in every dtype and pass; problems of inference grids are not trained."""
    return [
        Case(problem, dtype, pass_, device)
        for dtype, pass_, problem in product(dtypes, passes, problems)
        if not (problem.inference_only and pass_ == "training")
    ]


def compare(case: Case, settings: Settings, *, naive: bool = True) -> list[Row]:
    """Verify, then time torch.nn and rnn_fused in turns, then the naive loop for a few rounds.

    The naive loop, slow and hard on the caches, has a turn-taking of its own with torch.nn.
    """
    workloads = contenders(case, ["rnn_fused", "naive"] if naive else ["rnn_fused"])
    pair = {name: workloads[name] for name in ("torch.nn", "rnn_fused")}
    times = interleave(pair, settings)
    ratio = times["rnn_fused"].speedup_over(times["torch.nn"])
    rows = [
        make_row(SECTION, "torch.nn", case, times["torch.nn"], 1.0),
        make_row(SECTION, "rnn_fused", case, times["rnn_fused"], ratio),
    ]
    if naive:
        pair = {name: workloads[name] for name in ("torch.nn", "naive")}
        times = interleave(pair, settings.few_rounds())
        ratio = times["naive"].speedup_over(times["torch.nn"])
        rows.append(make_row(SECTION, "naive", case, times["naive"], ratio))
    return rows

"""Ragged training: what variable lengths cost, in units of the dense cost of the same steps.

A PackedSequence of lengths 0.4 T ... T has about 70% of the dense batch's steps. `overhead` is
(time ragged / time dense) / (valid steps / all steps): 1 means that a step costs the same, and
anything below 1 / 0.7 that packing pays at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from .problems import Problem
from .records import Row, make_row
from .timer import Settings, interleave
from .workload import Case, contenders

SECTION = "ragged"
SHORTEST = 0.4  # of T


@dataclass(frozen=True)
class Ragged:
    """The outcome for one problem."""

    rows: tuple[Row, ...]
    problem: str
    valid: float  # valid steps / all steps
    overhead: float
    ratio: float  # time of torch.nn / time of rnn_fused, both packed


def lengths(problem: Problem) -> tuple[int, ...]:
    """One length for each sequence, uniform between 0.4 T and T, longest (T) first."""
    draw = torch.Generator().manual_seed(3)
    low = max(1, round(SHORTEST * problem.T))
    found = torch.randint(low, problem.T + 1, (problem.B - 1,), generator=draw).tolist()
    return (problem.T, *sorted(found, reverse=True))


def worth_packing(problems: Iterable[Problem]) -> list[Problem]:
    """The problems with a batch and a sequence to be ragged over."""
    return [p for p in problems if p.B >= 8 and p.T >= 10]


def compare(
    problem: Problem, settings: Settings, dtype: torch.dtype, device: torch.device
) -> Ragged:
    """Verify, then time dense and packed training in turns, then torch.nn's packed training."""
    dense = Case(problem, dtype, "training", device)
    packed = replace(dense, lengths=lengths(problem))
    workloads = contenders(packed, ["rnn_fused"])
    exchange = {
        "dense": contenders(dense, ["rnn_fused"])["rnn_fused"],
        "packed": workloads["rnn_fused"],
    }
    times = interleave(exchange, settings)
    against_torch = interleave(workloads, settings.few_rounds())
    ratio = against_torch["rnn_fused"].speedup_over(against_torch["torch.nn"])
    rows = (
        make_row(SECTION, "torch.nn", packed, against_torch["torch.nn"], 1.0),
        make_row(SECTION, "rnn_fused", packed, times["packed"], ratio),
        make_row(SECTION, "rnn_fused", dense, times["dense"], None),
    )
    valid = sum(packed.lengths or ()) / (problem.T * problem.B)
    overhead = times["dense"].speedup_over(times["packed"]) / valid
    return Ragged(rows, str(problem), valid, overhead, ratio)

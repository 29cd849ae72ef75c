"""Irregular training: what sequences of different lengths, or resets inside of them, cost in units
of the dense cost of the same steps.

`overhead` is (time irregular / time dense) / (valid steps / all steps), both ours: 1 means that a
step costs the same. A PackedSequence of lengths 0.4 T ... T has about 70% of the dense batch's
steps: anything below 1 / 0.7 means that packing pays at all. Resets, in one of 100 steps of a
sequence, leave all steps valid. torch.nn, which knows none, runs those a timestep at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from .grid import SLOW_STEPS
from .problems import Problem
from .records import Row, make_row
from .timer import Settings, interleave
from .workload import Case, contenders

RAGGED, RESETS = "ragged", "resets"  # the sections
SHORTEST = 0.4  # of T
RESET_P = 0.01  # of a step and sequence
MOST = 6  # problems on a device, where there are many


@dataclass(frozen=True)
class Irregular:
    """The outcome for one problem."""

    rows: tuple[Row, ...]
    problem: str
    valid: float  # valid steps / all steps
    overhead: float
    ratio: float  # time of torch.nn / time of rnn_fused, both irregular


def lengths(problem: Problem) -> tuple[int, ...]:
    """One length for each sequence, uniform between 0.4 T and T, longest (T) first."""
    draw = torch.Generator().manual_seed(3)
    low = max(1, round(SHORTEST * problem.T))
    found = torch.randint(low, problem.T + 1, (problem.B - 1,), generator=draw).tolist()
    return (problem.T, *sorted(found, reverse=True))


def worth_it(section: str, problems: Iterable[Problem], device: torch.device) -> list[Problem]:
    """The problems with a batch and a sequence to be irregular in; on a device a few of them, from
    the first to the last."""
    found = [p for p in problems if p.B >= 8 and p.T >= 10 and not p.inference_only]
    if section == RESETS:  # no step of both directions is the last
        found = [p for p in found if p.directions == 1]
    if device.type == "cpu":
        return found
    found = [p for p in found if p.T <= SLOW_STEPS]
    if len(found) <= MOST:
        return found
    return [found[i * (len(found) - 1) // (MOST - 1)] for i in range(MOST)]


def irregular(section: str, dense: Case) -> Case:
    """The same case with lengths, or resets."""
    if section == RAGGED:
        return replace(dense, lengths=lengths(dense.problem))
    return replace(dense, problem=replace(dense.problem, reset_p=RESET_P))


def compare(section: str, dense: Case, settings: Settings) -> Irregular:
    """Verify, then time dense and irregular training in turns, then torch.nn's irregular one."""
    case, problem = irregular(section, dense), dense.problem
    workloads = contenders(case, ["rnn_fused"])
    exchange = {
        "dense": contenders(dense, ["rnn_fused"])["rnn_fused"],
        section: workloads["rnn_fused"],
    }
    times = interleave(exchange, settings)
    against_torch = interleave(workloads, settings.few_rounds())
    ratio = against_torch["rnn_fused"].speedup_over(against_torch["torch.nn"])
    rows = (
        make_row(section, "torch.nn", case, against_torch["torch.nn"], 1.0),
        make_row(section, "rnn_fused", case, times[section], ratio),
        make_row(section, "rnn_fused", dense, times["dense"], None),
    )
    valid = sum(case.lengths) / (problem.T * problem.B) if case.lengths else 1.0
    overhead = times["dense"].speedup_over(times[section]) / valid
    return Irregular(rows, str(problem), valid, overhead, ratio)

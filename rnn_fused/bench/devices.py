"""The same problems on the CPU and on the device: how much a device is worth at each size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from .problems import Problem
from .records import Row, make_row
from .timer import Settings, interleave
from .workload import Case, contenders

SECTION = "devices"
MOST, MOST_FLOPS = 4, 1.5e10  # problems; FLOPs of one that a CPU can train in a moment


def small_enough(problems: Iterable[Problem]) -> list[Problem]:
    """A few problems that a CPU can time too, those with the most work."""
    candidates = [p for p in problems if p.flops("training") <= MOST_FLOPS]
    return sorted(candidates, key=lambda p: p.flops("training"), reverse=True)[:MOST]


def on_cpu(provider: str) -> str:
    """The name in the rows, whose other columns name the device."""
    return f"{provider} on the CPU"


def compare(case: Case, settings: Settings) -> list[Row]:
    """Verify on both, then time all in turns, by the host's clock, the wait for the device
    included. Ratios are to torch.nn on the device."""
    there = contenders(case, ["rnn_fused"])
    here = contenders(replace(case, device=torch.device("cpu")), ["rnn_fused"])
    both = {**there, **{on_cpu(name): workload for name, workload in here.items()}}
    times = interleave(both, replace(settings.few_rounds(), measure=None))
    stock = times["torch.nn"]
    return [make_row(SECTION, n, case, t, t.speedup_over(stock)) for n, t in times.items()]

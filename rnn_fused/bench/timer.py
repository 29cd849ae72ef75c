"""The interleaving timer: contenders take turns in one process, so that noise hits them alike.

A round gives every contender one sample, in the same order: A B A B ... A clock change, a busy
neighbour or a warm cache then moves whole rounds, and the ratio of two contenders is taken inside
each round before the median over the rounds. A sample repeats a short call until it lasts
`sample_s`, which hides the clock's own cost.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

Call = Callable[[], object]
FEW = 3


def _no_sync() -> None:
    """A CPU has nothing to wait for."""


@dataclass(frozen=True)
class Settings:
    """How long and how often to time.

    Rounds go on until both `min_rounds` are done and `budget_s` seconds are spent, and stop at
    `max_rounds` in any case. `synchronize` waits for the device; `clock` returns seconds.
    `measure`, where given, takes their place in a sample: see `cuda_events`.
    """

    budget_s: float = 2.0
    min_rounds: int = 5
    max_rounds: int = 200
    sample_s: float = 2e-3
    warmup: int = 2
    synchronize: Callable[[], None] = _no_sync
    clock: Callable[[], float] = time.perf_counter
    measure: Callable[[Call, int], float] | None = None

    def few_rounds(self) -> Settings:
        """For slow contenders: no more than FEW rounds."""
        return replace(self, min_rounds=FEW, max_rounds=FEW, warmup=1)


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample a round; each sample is the mean of `calls` calls."""

    samples: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        """Seconds of the median call."""
        return statistics.median(self.samples)

    def quantile(self, q: float) -> float:
        """Seconds at quantile `q` in [0, 1], by linear interpolation between samples."""
        ordered = sorted(self.samples)
        position = q * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    def speedup_over(self, other: Timing) -> float:
        """How many times faster than `other`: the median over rounds of other / self."""
        rounds = zip(other.samples, self.samples, strict=True)
        return statistics.median(theirs / ours for theirs, ours in rounds)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def cuda_events(device: torch.device) -> Callable[[Call, int], float]:
    """Seconds that the current stream of `device` takes for so many calls: between two events on
    it, so that the time of a lone launch and of the final wait stays out."""

    def measure(call: Call, calls: int) -> float:
        torch.cuda.synchronize(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return measure


def _sample(call: Call, calls: int, settings: Settings) -> float:
    """Seconds per call over one sample of `calls` calls."""
    if settings.measure is not None:
        return settings.measure(call, calls) / calls
    settings.synchronize()
    start = settings.clock()
    for _ in range(calls):
        call()
    settings.synchronize()
    return (settings.clock() - start) / calls


def _warm_up(call: Call, settings: Settings) -> int:
    """Run `call` untimed, then return how many calls make one sample of `sample_s`."""
    for _ in range(max(settings.warmup - 1, 0)):
        call()
    seconds = _sample(call, 1, settings)
    return max(1, math.ceil(settings.sample_s / max(seconds, 1e-9)))


def interleave(
    contenders: Mapping[str, Call], settings: Settings | None = None
) -> dict[str, Timing]:
    """Time every contender, taking turns; the rounds of the returned timings are paired."""
    settings = settings or Settings()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    with _no_garbage_collection():
        calls = {name: _warm_up(call, settings) for name, call in contenders.items()}
        start = settings.clock()
        for done in range(settings.max_rounds):
            if done >= settings.min_rounds and settings.clock() - start >= settings.budget_s:
                break
            for name, call in contenders.items():
                samples[name].append(_sample(call, calls[name], settings))
    return {name: Timing(tuple(samples[name]), calls[name]) for name in contenders}

"""The main section: rnn_fused against torch.nn and others, row by row of the grids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from .predicted import predicted_ms
from .problems import Problem
from .providers import APART, SLOW, obstacle
from .records import Row, make_row
from .timer import Settings, interleave
from .workload import Case, Workload, admit, input_product, large_product

SECTION = "grid"
SLOW_STEPS = 200  # on a device where steps are quick, loops in Python run up to this T


@dataclass(frozen=True)
class Outcome:
    """The rows of one case; who computed something wrong; who could not run it, and why."""

    rows: list[Row]
    wrong: list[str]
    refused: dict[str, str]


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


def most_wanted_first(cases: Iterable[Case]) -> list[Case]:
    """For a budget: training before inference, long rows last, else in the given order."""
    return sorted(cases, key=lambda case: (case.problem.long, case.pass_ != "training"))


def entrants(case: Case, providers: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Those of `providers` to try, and why not the others."""
    what = case.problem, case.dtype, case.device, case.pass_
    refused = {p: obstacle(p, *what) for p in providers}
    if case.device.type != "cpu" and case.problem.T > SLOW_STEPS:
        refused |= {p: f"T > {SLOW_STEPS}" for p in refused if p in SLOW}
    return [p for p, why in refused.items() if not why], {p: w for p, w in refused.items() if w}


def peak_mb(workload: Workload, device: torch.device) -> float | None:
    """Device memory that a call takes beyond what is there before it, in 10^6 bytes."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    workload()
    return (torch.cuda.max_memory_allocated(device) - before) * 1e-6


def share_of_product(case: Case, workload: Workload, settings: Settings) -> float:
    """The rate of a workload over that of a large product, timed in turns for a few rounds."""
    product, flops = large_product(case)
    times = interleave({"layer": workload, "product": product}, settings.few_rounds())
    return times["layer"].speedup_over(times["product"]) * case.problem.flops(case.pass_) / flops


def compare(
    case: Case, settings: Settings, providers: Sequence[str], *, recurrence: bool = False
) -> Outcome:
    """Verify, then time torch.nn and the others in turns, loops in Python for a few rounds.

    Those that are hard on who follows them have each a turn-taking of their own with torch.nn. With
    `recurrence`, the product of the input of a lone layer takes part, to be subtracted.
    """
    names, refused = entrants(case, providers)
    admitted = admit(case, names)
    quick = {name: w for name, w in admitted.workloads.items() if name not in APART}
    recurrence = recurrence and not case.problem.stacked
    alone = {"input product": input_product(case)} if recurrence else {}
    times = interleave({**quick, **alone}, settings)
    product_ms = times.pop("input product").median * 1e3 if recurrence else None
    ratios = {name: timing.speedup_over(times["torch.nn"]) for name, timing in times.items()}
    for name in [name for name in admitted.workloads if name in APART]:
        turns = {"torch.nn": quick["torch.nn"], name: admitted.workloads[name]}
        apart = interleave(turns, settings.few_rounds() if name in SLOW else settings)
        times[name] = apart[name]
        ratios[name] = apart[name].speedup_over(apart["torch.nn"])
    shares = dict.fromkeys(times, None)
    if "rnn_fused" in quick and not case.lengths:
        share = share_of_product(case, quick["rnn_fused"], settings)
        shares = {name: share * ratio / ratios["rnn_fused"] for name, ratio in ratios.items()}
    rows = [
        make_row(
            *(SECTION, name, case, timing, ratios[name]),
            share=shares[name],
            recurrence_ms=None if product_ms is None else timing.median * 1e3 - product_ms,
            predicted_ms=predicted_ms(case, name),
            peak_mb=peak_mb(admitted.workloads[name], case.device),
        )
        for name, timing in times.items()
    ]
    return Outcome(rows, admitted.wrong, refused | admitted.refused)

"""Peak memory of one pass, ours and torch.nn's: `python -m rnn_fused.bench.memory`, see `--help`.

What counts is what a pass takes beyond what is there before it: input, weights and the gradient of
the output. The pass ends with the gradients of the weights and of the input in place, so they
count, for all providers alike.

On a CPU every number comes from a process of its own: it runs the same layer over a few timesteps,
so that libraries have loaded their code and started their threads, gives back to the system what
malloc keeps, resets the kernel's mark of the highest resident memory, and runs the pass once. That
sees all memory, whoever allocated it; pages that were allocated and never written do not count.
`counted_mb` is what torch's allocator handed out at the peak, by torch's profiler: a check, since
memory that operators take from malloc is missing in it. On CUDA it is torch.cuda's own statistic.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .footprint import footprint
from .grid import peak_mb
from .problems import GATES, PASSES, Problem
from .records import columns, environment, write_csv, write_json
from .workload import Case, Workload, build, dtype_name

STEPS = 1000
SIZES = ((16, 128), (32, 128), (16, 256), (32, 256), (16, 512), (32, 512))  # B, H = I
WARM_STEPS = 4
PROVIDERS = ("torch.nn", "rnn_fused", "rnn_fused recompute")
METHODS = ("resident", "counted")


@dataclass(frozen=True)
class MemoryRow:
    """One provider on one case. In 10^6 bytes; `ratio` below 1 takes less than torch.nn."""

    provider: str
    cell: str
    T: int
    B: int
    I: int  # noqa: E741  the field's name for the input size
    H: int
    layers: int
    dtype: str
    pass_: str
    peak_mb: float
    kept_mb: float | None  # of it, resident after the pass; None on CUDA
    counted_mb: float | None  # by torch's allocator, where asked for
    predicted_mb: float | None  # by `footprint`, of ours
    ratio: float | None


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure_resident(workload: Workload) -> dict[str, float]:
    """What a call adds to the resident memory, at its peak and at its end."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM is VmRSS again
    before = resident("VmRSS")
    workload()
    after = resident("VmRSS")
    return {
        "peak_mb": (resident("VmHWM") - before) * 1e-6,
        "kept_mb": (after - before) * 1e-6,
    }


def measure_counted(workload: Workload) -> dict[str, float]:
    """The most that torch's allocator had handed out at once, by its profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        workload()
    results: Any = profile.profiler.kineto_results
    pending = list(results.experimental_event_tree())
    changes = []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return {"counted_mb": peak * 1e-6}


def measure(case: Case, provider: str, method: str) -> dict[str, float]:
    """One measurement, in this process."""
    if case.device.type == "cuda":
        workload = build(case, provider)
        workload()
        return {"peak_mb": peak_mb(workload, case.device) or 0.0}
    build(replace(case, problem=replace(case.problem, T=WARM_STEPS)), provider)()
    workload = build(case, provider)
    return measure_resident(workload) if method == "resident" else measure_counted(workload)


def measure_apart(case: Case, provider: str, method: str, threads: int) -> dict[str, float]:
    """The same in a process of its own, where this is a CPU.

    Raises:
        RuntimeError: the process failed.
    """
    if case.device.type == "cuda":
        return measure(case, provider, method)
    request = {
        "problem": asdict(case.problem),
        "dtype": dtype_name(case.dtype),
        "pass_": case.pass_,
        "provider": provider,
        "method": method,
        "threads": threads,
    }
    command = [sys.executable, "-m", __spec__.name, "--child", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        raise RuntimeError(f"[{provider}] {case}: memory: {said[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(request: str) -> None:
    """What `measure_apart` starts."""
    wish = json.loads(request)
    torch.set_num_threads(wish["threads"])
    case = Case(
        Problem(**wish["problem"]),
        getattr(torch, wish["dtype"]),
        wish["pass_"],
        torch.device("cpu"),
    )
    print(json.dumps(measure(case, wish["provider"], wish["method"])))


def available(providers: Iterable[str]) -> list[str]:
    """Those that this version of the package has."""
    import rnn_fused

    def has(provider: str) -> bool:
        if "recompute" not in provider:
            return True
        try:
            rnn_fused.LSTM(1, 1, save="recompute")
        except TypeError:
            return False
        return True

    return [provider for provider in providers if has(provider)]


def rows_of(
    case: Case, providers: Sequence[str], *, count: bool, threads: int
) -> Iterator[MemoryRow]:
    """A row for each provider, torch.nn's first."""
    stock: float | None = None
    problem = case.problem
    for provider in providers:
        recompute = provider == "rnn_fused recompute"
        predicted = footprint(case, recompute=recompute).total() * 1e-6
        found = measure_apart(case, provider, "resident", threads)
        counted = measure_apart(case, provider, "counted", threads) if count else {}
        if provider == "torch.nn":
            stock = found["peak_mb"]
        yield MemoryRow(
            provider=provider,
            cell=problem.cell,
            T=problem.T,
            B=problem.B,
            I=problem.I,
            H=problem.H,
            layers=problem.layers,
            dtype=dtype_name(case.dtype),
            pass_=case.pass_,
            peak_mb=found["peak_mb"],
            kept_mb=found.get("kept_mb"),
            counted_mb=counted.get("counted_mb"),
            predicted_mb=None if provider == "torch.nn" else predicted,
            ratio=found["peak_mb"] / stock if stock else None,
        )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rnn_fused.bench.memory",
        description="Peak memory of one pass over a long sequence, torch.nn's and ours. Training "
        "is forward and backward, with the gradients of the weights and of the input, which count; "
        "the input, the weights and the output's gradient are there before and do not.",
    )
    parser.add_argument("--cells", nargs="+", choices=GATES, default=["lstm", "gru", "rnn_tanh"])
    parser.add_argument("--steps", type=int, default=STEPS, help="T")
    parser.add_argument(
        "--sizes", nargs="+", metavar="BxH", default=[f"{B}x{H}" for B, H in SIZES],
        help="batch and hidden size; the input has the hidden size",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, default=["training"])
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument(
        "--count", action="store_true", help="also by torch's profiler, in a process of its own"
    )
    parser.add_argument("--output", type=Path, help="folder for memory.csv and memory.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write; 1 where a row could not be measured."""
    chosen = parse(arguments)
    if chosen.child:
        child(chosen.child)
        return 0
    where = environment(chosen.device)
    rows: list[MemoryRow] = []
    providers, failed = available(chosen.providers), False
    for pass_, dtype, layers, cell, size in product(
        chosen.passes, chosen.dtype, chosen.layers, chosen.cells, chosen.sizes
    ):
        B, H = map(int, size.split("x"))
        problem = Problem(cell, chosen.steps, B, I=H, H=H, layers=layers)
        case = Case(problem, getattr(torch, dtype), pass_, chosen.device)
        try:
            for row in rows_of(case, providers, count=chosen.count, threads=chosen.threads):
                rows.append(row)
                print(line(row), flush=True)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    if chosen.output:
        chosen.output.mkdir(parents=True, exist_ok=True)
        where = replace(where, threads=chosen.threads)
        write_csv(chosen.output / "memory.csv", [(row, where) for row in rows], MemoryRow)
        write_json(
            chosen.output / "memory.json",
            {"environment": asdict(where), "rows": [columns(row) for row in rows]},
        )
    return int(failed)


def line(row: MemoryRow) -> str:
    """The row in words."""
    parts = [
        f"{row.pass_} {row.dtype} {row.layers} x {row.cell} T={row.T} B={row.B} H={row.H}",
        f"{row.provider}: {row.peak_mb:.1f} MB",
    ]
    if row.ratio is not None and row.provider != "torch.nn":
        parts.append(f"{row.ratio:.2f} of torch.nn's")
    for name in ("kept", "counted", "predicted"):
        value = getattr(row, f"{name}_mb")
        if value is not None:
            parts.append(f"{name} {value:.1f}")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())

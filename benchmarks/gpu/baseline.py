"""The bar to beat: torch.nn (cuDNN) on every grid, and what a persistent kernel pays on this GPU.

    python benchmarks/gpu/baseline.py --out DIR [--full]

Needs torch with CUDA and nvcc, and nothing of this project that is compiled. Runs, in this order,
ceilings (copy, matrix product), microbenchmarks (microbench.cu) and rows (baseline_rows.py), most
wanted first, until they are done or --budget-s is spent. Every result is appended at once to
DIR/baseline.jsonl, one JSON object a line, whose "kind" is one of

    meta      the device, versions, the date, the selection; first
    ceiling   copy bandwidth, matrix products, the error of each precision
    micro     one line of microbench.cu
    row       one row: its shape and either its times or an "error"
    dropped   the keys of the rows that the budget left out
    end       seconds used, number of failures; its absence means that the run was cut off

Exit code: 0; 1 if anything failed its own check; 3 without a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import baseline_rows as rows_module
from baseline_rows import Row

SCHEMA = 1
NO_DEVICE = 3
QUICK_BUDGET_S = 420.0
RESERVE_S = 5.0  # kept for the table
HERE = Path(__file__).resolve().parent
MICRO_GROUPS = ("device", "launch", "barrier", "pair", "handoff", "broadcast", "cluster", "push")
NEEDS_CLUSTERS = ("cluster", "push")
# Even if everything here were to hang, the quick budget would hold.
MICRO_TIMEOUT_S = 30
NVCC_TIMEOUT_S = 120


class Budget:
    """Seconds left of a total, by a monotonic clock. None: no limit."""

    def __init__(self, total_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._total = total_s

    @property
    def used_s(self) -> float:
        return self._clock() - self._start

    def allows(self, seconds: float) -> bool:
        return self._total is None or self.used_s + seconds + RESERVE_S <= self._total


class Journal:
    """Appends records to a .jsonl file and keeps them for the table."""

    def __init__(self, path: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self._file = path.open("w")

    def add(self, kind: str, **fields: Any) -> dict[str, Any]:
        record = {"kind": kind, **fields}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.records.append(record)
        return record

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    @property
    def failures(self) -> int:
        return sum(r.get("ok") is False or "error" in r for r in self.records)


def output_of(command: list[str]) -> str:
    """Standard output, or "" where the program is missing or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=HERE)
        if done.returncode == 0:
            return done.stdout.strip()
    return ""


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [shutil.which("nvcc")] + [f"{home}/bin/nvcc" for home in homes if home]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def nvcc_command(nvcc: str, capability: tuple[int, int], output: Path) -> list[str]:
    """Builds microbench.cu for one architecture. Hopper's own instructions need sm_90a, and only
    this long form of the option keeps nvcc from emitting plain compute_90 beside it."""
    arch = "".join(map(str, capability)) + ("a" if capability == (9, 0) else "")
    return [
        *(nvcc, "-O3", "-std=c++17", "-gencode", f"arch=compute_{arch},code=sm_{arch}"),
        *(str(HERE / "microbench.cu"), "-o", str(output)),
    ]


def metadata(device: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "selection": "full" if arguments.full else "quick",
        "dry_run": arguments.dry_run,
        "budget_s": arguments.budget_s,
        "commit": output_of(["git", "rev-parse", "HEAD"]) or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": cpu_model(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        release = re.search(
            r"release (\S+), V(\S+)", output_of([find_nvcc() or "nvcc", "--version"])
        )
        facts |= {
            "device": properties.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": driver or None,
            "nvcc": release and release.group(2),
        }
    return facts


class MicroBench:
    """Builds microbench.cu in the background, then runs its groups, a process for each."""

    def __init__(self, capability: tuple[int, int], folder: Path) -> None:
        self._clusters = capability >= (9, 0)
        self._binary = folder / "microbench"
        self._build = None
        if nvcc := find_nvcc():
            self._build = subprocess.Popen(
                nvcc_command(nvcc, capability, self._binary),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def run(self, journal: Journal, steps: int) -> None:
        if self._build is None:
            journal.add("micro", bench="build", error="nvcc not found", ok=False)
            return
        try:
            log, _ = self._build.communicate(timeout=NVCC_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._build.kill()
            log, _ = self._build.communicate()
        if self._build.returncode != 0:
            journal.add("micro", bench="build", error=f"nvcc failed: {log[-2000:]}", ok=False)
            return
        for group in MICRO_GROUPS:
            if self._clusters or group not in NEEDS_CLUSTERS:
                self._run_group(journal, group, steps)

    def _run_group(self, journal: Journal, group: str, steps: int) -> None:
        command = [str(self._binary), group, str(steps)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=MICRO_TIMEOUT_S)
            output, problem = done.stdout, None
            if done.returncode < 0:
                problem = f"ended by signal {-done.returncode}"
        except subprocess.TimeoutExpired as timeout:
            output, problem = timeout.stdout or b"", f"no end after {MICRO_TIMEOUT_S} s"
        for line in parse_lines(output.decode(errors="replace")):
            journal.add("micro", **line)
        if problem:
            journal.add("micro", bench=group, error=problem, ok=False)


def parse_lines(output: str) -> list[dict[str, Any]]:
    """The JSON objects of the microbenchmark's output; any other line becomes an error."""
    lines = []
    for line in output.splitlines():
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            lines.append({"bench": "output", "error": f"not JSON: {line[:200]}", "ok": False})
    return lines


def run_ceilings(journal: Journal, device: Any, dry_run: bool) -> None:
    import baseline_time as timing

    copy, matmul = (1 << 16, 64) if dry_run else (1 << 30, 8192)
    calls = [lambda: timing.copy_ceiling(device, copy)]
    for precision in ("bfloat16", "tf32", "float32"):
        calls.append(lambda p=precision: timing.matmul_ceiling(device, matmul, p))
    for precision in rows_module.PRECISIONS:
        calls.append(lambda p=precision: timing.precision_error(device, p))
    for call in calls:
        try:
            journal.add("ceiling", **call())
        except RuntimeError as error:
            journal.add("ceiling", error=str(error), ok=False)


def run_rows(
    journal: Journal,
    rows: Iterable[Row],
    budget: Budget,
    measure: Callable[[Row], dict[str, Any]],
    done: dict[str, dict[str, Any]],
) -> None:
    """Measure the rows that are not in `done` while the budget lasts; note what it left out."""
    dropped: list[str] = []
    lost = False  # after a CUDA error other than lack of memory, nothing more can run
    for row in rows:
        if row.key in done:
            journal.add(**(done[row.key] | {"resumed": True}))
            continue
        if lost or not budget.allows(row.estimate_s):
            dropped.append(row.key)
            continue
        start = budget.used_s
        try:
            result = measure(row)
        except RuntimeError as error:
            result = {"error": str(error).strip().splitlines()[0]}
            lost = "CUDA error" in str(error) and "out of memory" not in str(error)
        seconds = round(budget.used_s - start, 3)
        journal.add("row", key=row.key, **asdict(row), **result, seconds=seconds)
    if dropped:
        journal.add("dropped", reason="device lost" if lost else "budget", rows=dropped)


def resumable(path: Path, meta: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The good rows of an earlier journal, by key. ValueError if it is of another device."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for name in ("schema", "device", "torch", "dry_run"):
        old, new = records[0].get(name), meta[name]
        if old != new:
            raise ValueError(
                f"--resume needs the same {name}: this run has {new!r}, it has {old!r}"
            )
    return {r["key"]: r for r in records if r["kind"] == "row" and "error" not in r}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for baseline.jsonl")
    parser.add_argument("--full", action="store_true", help="all rows, not the quick selection")
    parser.add_argument(
        "--budget-s",
        type=float,
        help=f"seconds for everything; default {QUICK_BUDGET_S:.0f}, with --full none",
    )
    parser.add_argument("--grids", default="", help="only these grids, separated by commas")
    parser.add_argument("--resume", type=Path, help="an earlier baseline.jsonl: keep its rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny rows: does it run at all?")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.dry_run:
        parser.error("--device cpu is only for --dry-run: the rows are sized for a GPU")
    if arguments.budget_s is None and not arguments.full:
        arguments.budget_s = QUICK_BUDGET_S
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    budget = Budget(arguments.budget_s)
    only = [name for name in arguments.grids.split(",") if name]
    rows = rows_module.select(rows_module.load_grids(), full=arguments.full, only=only)
    rows = rows_module.shrink(rows) if arguments.dry_run else rows

    import baseline_report
    import baseline_time as timing
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("baseline.py needs a CUDA device, and torch sees none", file=sys.stderr)
        return NO_DEVICE
    torch.seed()
    device = (
        torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    )
    meta = metadata(device, arguments)
    done = resumable(arguments.resume, meta) if arguments.resume else {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(arguments.out / "baseline.jsonl")
    journal.add("meta", **meta)

    limit_s = 0.001 if arguments.dry_run else 0.2 if arguments.full else 0.08

    def measure(row: Row) -> dict[str, Any]:
        try:
            return timing.measure(row, device, limit_s)
        finally:
            if device.type == "cuda" and torch.cuda.memory_reserved() > meta["memory_bytes"] // 2:
                gc.collect()
                torch.cuda.empty_cache()

    with tempfile.TemporaryDirectory() as folder:
        micro = None
        if device.type == "cuda":
            micro = MicroBench(torch.cuda.get_device_capability(device), Path(folder))
        run_ceilings(journal, device, arguments.dry_run)
        if micro:
            micro.run(journal, steps=50 if arguments.dry_run else 2000)
        run_rows(journal, rows, budget, measure, done)
    journal.add("end", seconds=round(budget.used_s, 1), failures=journal.failures)
    print(baseline_report.report(journal.records))
    return 1 if journal.failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""The one schema of every benchmark row, and the files that keep it."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from .problems import describe
from .timer import Timing
from .workload import Case, allows_tf32, dtype_name

Schema = TypeVar("Schema")


@dataclass(frozen=True)
class Environment:
    """Where and when the rows were measured."""

    processor: str
    device: str
    driver: str  # of the device, with its CUDA and cuDNN; "" on a CPU
    tf32: bool  # whether layers in float32 may use it
    threads: int
    torch: str
    rnn_fused: str
    python: str
    commit: str
    date: str
    load: float  # of the machine before the run: above 0.5 or so, someone else works on it


@dataclass(frozen=True)
class Row:
    """One provider on one case. Times in milliseconds per call; `ratio` above 1 beats torch.nn."""

    section: str
    provider: str
    cell: str
    T: int
    B: int
    I: int  # noqa: E741  the field's name for the input size
    H: int
    layers: int
    layout: str  # "dense", "packed" or "resets"
    dtype: str
    pass_: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    repeats: int
    calls: int  # calls in each repeat
    ratio: float | None  # time of torch.nn / time of this provider, median over rounds
    gflops: float
    us_per_step: float  # of the median call, a timestep
    recurrence_ms: float | None = None  # p50 less the product of the input, timed alone
    peak_mb: float | None = (
        None  # most memory that a call takes beyond its arguments, in 10^6 bytes
    )
    predicted_ms: float | None = None  # the plan's, of the timestep loops alone: `predicted`
    share: float | None = None  # gflops over those of a large product of torch's, in turns with it
    directions: int = 1

    @property
    def problem(self) -> str:
        """The sizes in words."""
        sizes = self.T, self.B, self.I, self.H
        return describe(self.cell, *sizes, self.layers, self.directions)

    @property
    def case(self) -> tuple[Any, ...]:
        """What it shares with the rows of other providers: `Case.key`."""
        sizes = self.cell, self.T, self.B, self.I, self.H, self.layers, self.directions
        return *sizes, self.layout, self.dtype, self.pass_

    def speedup_over(self, other: Row) -> float:
        """How many times as fast as another provider on the same case: by way of torch.nn, which
        each took turns with. Not all took turns with each other."""
        if self.ratio is None or other.ratio is None:
            return other.p50_ms / self.p50_ms
        return self.ratio / other.ratio


def make_row(
    section: str,
    provider: str,
    case: Case,
    timing: Timing,
    ratio: float | None,
    **measured: float | None,
) -> Row:
    """A row from a timing; packed steps that do not exist do not count as work."""
    problem = case.problem
    valid = sum(case.lengths) / (problem.T * problem.B) if case.lengths else 1.0
    return Row(
        section=section,
        provider=provider,
        cell=problem.cell,
        T=problem.T,
        B=problem.B,
        I=problem.I,
        H=problem.H,
        layers=problem.layers,
        directions=problem.directions,
        layout=case.layout,
        dtype=dtype_name(case.dtype),
        pass_=case.pass_,
        p20_ms=timing.quantile(0.2) * 1e3,
        p50_ms=timing.median * 1e3,
        p80_ms=timing.quantile(0.8) * 1e3,
        repeats=len(timing.samples),
        calls=timing.calls,
        ratio=ratio,
        gflops=problem.flops(case.pass_) * valid / timing.median * 1e-9,
        us_per_step=timing.median * 1e6 / problem.T,
        **measured,
    )


def processor_name(device: torch.device) -> str:
    """The model of the CPU, or of the accelerator."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def driver(device: torch.device) -> str:
    """The versions below torch, of a CUDA device."""
    if device.type != "cuda":
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        found = done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        found = "unknown"
    return f"driver {found}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


@cache
def git_commit() -> str:
    """The commit of the checkout that this package runs from, "" for an installed one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def package_version(name: str) -> str:
    """The installed version, or "" for a package that runs without being installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def environment(device: torch.device) -> Environment:
    """This machine, now."""
    simd = torch.backends.cpu.get_cpu_capability()
    return Environment(
        processor=f"{processor_name(device)}, {os.cpu_count()} CPUs, {simd}",
        device=str(device),
        driver=driver(device),
        tf32=allows_tf32(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        rnn_fused=package_version("rnn_fused"),
        python=platform.python_version(),
        commit=git_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        load=os.getloadavg()[0],
    )


def columns(row: Any) -> dict[str, Any]:
    """The row as it is written: `pass_` without its underscore, numbers to 5 digits."""
    return {
        name.removesuffix("_"): float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in asdict(row).items()
    }


def from_columns(found: Mapping[str, Any], schema: type[Schema]) -> Schema:
    """A row, or an environment, from what was written, be it text; columns of others are skipped.

    Raises:
        KeyError: a column without a default is missing.
        ValueError: a value is not of the column's type.
    """
    values = {}
    for name, kind in get_type_hints(schema).items():
        column = name.removesuffix("_")
        if column in found or name not in schema.__dict__:  # those that have a default
            values[name] = _parsed(found[column], kind)
    return schema(**values)


def _parsed(value: Any, kind: Any) -> Any:
    if kind == float | None:
        return None if value in ("", None) else float(value)
    if kind is bool:
        return value in ("True", True)
    return kind(value)


def read_rows(path: Path) -> list[tuple[Row, Environment]]:
    """The rows of a file of results, .jsonl or else CSV, each with where it was measured. A last
    line that a killed run left unfinished is passed over.

    Raises:
        ValueError: the file holds something else.
    """
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
            found: Iterable[dict[str, Any]] = map(json.loads, lines)
        else:
            found = csv.DictReader(text.splitlines())
        return [(from_columns(line, Row), from_columns(line, Environment)) for line in found]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"[bench] {path} must hold rows of this benchmark: {error!r}") from error


def to_lines(rows: Iterable[tuple[Row, Environment]]) -> str:
    """JSON lines: one a row, its environment on each."""
    return "".join(json.dumps(columns(row) | asdict(where)) + "\n" for row, where in rows)


def write_csv(path: Path, rows: Iterable[tuple[Any, Environment]], schema: type = Row) -> None:
    """One line a row, its environment on each, so that files can be concatenated."""
    names = [f.name.removesuffix("_") for f in (*fields(schema), *fields(Environment))]
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, names)
    writer.writeheader()
    writer.writerows(columns(row) | asdict(where) for row, where in rows)
    write_text(path, written.getvalue())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """All of it or nothing, whenever the process is killed."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8", newline="")
    beside.replace(path)

"""Build, test and time this checkout on a GPU machine that has no network.

    benchmarks/gpu/run.sh [--full] [--out DIR]

Needs Python with torch, pybind11, ninja and pytest (for the benchmark also rich and matplotlib),
nvcc, and nothing from outside. The stages run in this order, each under a limit of its own; one
that fails does not keep the others from running:

    build        libops.so, _C and build/gpu_primitives, for the present GPU's architecture only
    primitives   the PTX wrappers against what their emulation promises
    tests        pytest -m "gpu and not slow"; a test that hangs or loses the device is recorded,
                 and the rest goes on in a new process
    bench        python -m rnn_fused.bench --device cuda
    slow         pytest -m "gpu and slow", as far as there is time: sanitizers, very large layers

SKIP_BUILD=1 takes the rnn_fused/*.so that are there. libops.so knows nothing of Python; _C is tied
to a version of it, and if there is none for this one, _C alone is compiled.

In DIR (default: $OUT, or benchmarks/results/gpu): run.json, build.log, tests.jsonl, tests.log,
bench.log, and of the benchmark rows.csv, bench.json and report.html: eight files.

Exit status: 0; 1 if a stage failed or was cut off; 2 for wrong arguments; 3 without a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import baseline
import run_plugin

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NO_DEVICE = 3
QUICK_S = 530.0  # of everything, in the quick form
LAST_S = 10.0  # kept for the end
GRACE_S = 5.0  # from the request to stop to the kill, and from there to giving up


@dataclass(frozen=True)
class Limits:
    """Seconds. A stage may also be cut by what is left of the whole."""

    facts: float = 45
    build: float = 200
    primitives: float = 20
    tests: float = 150
    each_test: float = 25
    bench: float = 240
    slow: float = 240
    each_slow: float = 160


FULL = Limits(build=1200, tests=1800, each_test=120, bench=3600, slow=1800, each_slow=600)
STAGES = ("build", "primitives", "tests", "bench", "slow")
SHOWN = 8  # failures of a stage in the table
LEAST_S = {"tests": 20.0, "bench": 52.0, "slow": 45.0}  # below this a stage is not begun
BENCH_ENDS_S = 40.0  # of the benchmark's limit: imports, the last row, tables, the report
KEPT = ("rows.csv", "bench.json", "report.html")  # the page has the pictures
# Not collected: baseline.py has a run of its own, and its test compiles for a minute.
IGNORED = "tests/test_gpu_baseline.py"
FACTS = """
import json, torch
found = torch.cuda.is_available()
p = torch.cuda.get_device_properties(0) if found else None
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version() if found else None,
    "device": p.name if found else None,
    "capability": [p.major, p.minor] if found else None,
    "sms": p.multi_processor_count if found else None,
    "memory_bytes": p.total_memory if found else None,
    "devices": torch.cuda.device_count(),
}))
"""
# setup.py's build file without its build.
WRITE_NINJA = """
import setuptools
setuptools.setup = lambda **_: None
import setup
setup.write_ninja()
print(setup.FOLDER)
"""


@dataclass
class Stage:
    """What became of one stage."""

    name: str
    status: str  # ok, FAILED, cut off, left out
    seconds: float
    note: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """A process that has ended, or that was ended at its limit."""

    status: int | None  # exit status; None: ended at its limit
    seconds: float

    @property
    def words(self) -> str:
        return (
            f"stopped after {self.seconds:.0f} s"
            if self.status is None
            else f"exit status {self.status}"
        )


def execute(command: list[str], limit_s: float, log: Path, **env: str) -> Ended:
    """Run a command in a process group of its own, its output appended to `log`."""
    return start(command, limit_s, log, **env)()


def start(command: list[str], limit_s: float, log: Path, **env: str) -> Callable[[], Ended]:
    """Begin a command; the function that comes back waits for it, until its limit at most."""
    begin = time.monotonic()
    with log.open("a") as out:
        out.write(f"$ {' '.join(command)[:500]}\n")
        out.flush()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            out.write(f"{error}\n")
            return lambda: Ended(127, 0.0)

    def wait() -> Ended:
        left = limit_s - (time.monotonic() - begin)
        status = wait_or_stop(process, max(left, 0.0))
        return Ended(status, time.monotonic() - begin)

    return wait


def wait_or_stop(process: subprocess.Popen, limit_s: float) -> int | None:
    """The exit status, or None if it had to be stopped: politely, then not. A process that a
    driver holds on to even then is left behind."""
    for request in (signal.SIGINT, signal.SIGKILL, None):
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(limit_s)
            return status if request is signal.SIGINT else None
        limit_s = GRACE_S
        if request is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, request)
    return None


def architecture(capability: tuple[int, int]) -> str:
    """For TORCH_CUDA_ARCH_LIST. Hopper's own instructions need 9.0a."""
    return ".".join(map(str, capability)) + ("a" if capability == (9, 0) else "")


def primitives_command(nvcc: str, arch: str, binary: Path) -> list[str]:
    number = arch.replace(".", "")
    return [
        *(nvcc, "-std=c++20", "-O3", "-I.", f"-gencode=arch=compute_{number},code=sm_{number}"),
        *("tests/gpu/primitives.cu", "-o", str(binary)),
    ]


class Run:
    """One run: its budget, its folder and its stages so far."""

    def __init__(self, options: argparse.Namespace, python: str) -> None:
        self.options, self.python = options, python
        self.limits = FULL if options.full else Limits()
        self.out: Path = options.out
        self.budget = baseline.Budget(options.budget_s)
        self.stages: list[Stage] = []
        self.facts: dict[str, Any] = {}
        self.arch = ""

    def left(self, limit_s: float, keep_s: float = LAST_S) -> float:
        """Seconds that a stage with this limit may take."""
        if self.options.budget_s is None:
            return limit_s
        return max(0.0, min(limit_s, self.options.budget_s - self.budget.used_s - keep_s))

    # Stages --------------------------------------------------------------------------------------

    def build(self) -> Stage:
        log = self.out / "build.log"
        binary = ROOT / "build" / "gpu_primitives"
        binary.parent.mkdir(exist_ok=True)
        limit = self.left(self.limits.build)
        nvcc = baseline.find_nvcc()
        primitives = None
        if nvcc:
            binary.unlink(missing_ok=True)
            command = primitives_command(nvcc, self.arch, binary)
            primitives = start(command, limit, self.out / "build.log")
        env = {"TORCH_CUDA_ARCH_LIST": self.arch, "RNN_FUSED_CUDA": "1"}
        if os.environ.get("SKIP_BUILD") == "1":
            done, note = self.prebuilt(limit, log, env)
        else:
            # What is tested must not be an older library, should this build fail.
            (ROOT / "rnn_fused" / "libops.so").unlink(missing_ok=True)
            command = [self.python, "setup.py", "-q", "build_ext", "--inplace"]
            done, note = execute(command, limit, log, **env), f"for sm_{self.arch}"
        built = primitives() if primitives else Ended(127, 0.0)
        if nvcc is None:
            note = "no nvcc"
        failed = [
            f"{what}: {ended.words}"
            for what, ended in (("library", done), ("primitives", built))
            if ended.status != 0
        ]
        if failed:
            return Stage("build", "FAILED", 0, "; ".join([note, *failed]) + "; see build.log")
        return Stage("build", "ok", 0, note)

    def prebuilt(self, limit: float, log: Path, env: dict[str, str]) -> tuple[Ended, str]:
        """The libraries that are there; _C is compiled where there is none for this Python."""
        package = ROOT / "rnn_fused"
        if not (package / "libops.so").exists():
            return Ended(1, 0.0), "SKIP_BUILD=1 needs rnn_fused/libops.so, found none"
        suffix = self.output("import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
        target = package / f"_C{suffix}"
        if target.exists():
            return Ended(0, 0.0), "as it was"
        folder = self.output(WRITE_NINJA, **env)
        if not folder:
            return Ended(1, 0.0), f"no {target.name}, and setup.py failed"
        command = [self.python, "-m", "ninja", "-f", f"{folder}/build.ninja", f"{folder}/_C.so"]
        done = execute(command, limit, log)
        if done.status == 0:
            target.write_bytes((ROOT / folder / "_C.so").read_bytes())
        return done, f"libops.so as it was, {target.name} compiled"

    def primitives(self) -> Stage:
        binary = ROOT / "build" / "gpu_primitives"
        if not binary.exists():
            return Stage("primitives", "FAILED", 0, "not built")
        log = self.out / "build.log"
        done = execute([str(binary)], self.left(self.limits.primitives), log)
        if done.status != 0:
            return Stage("primitives", "FAILED", 0, f"{done.words}; see build.log")
        return Stage("primitives", "ok", 0, "")

    def tests(self) -> Stage:
        keep = LEAST_S["bench"] if "bench" in self.options.stages else 0.0
        limit = self.left(self.limits.tests, LAST_S + keep)
        return self.pytest("tests", "gpu and not slow", limit, self.limits.each_test)

    def slow(self) -> Stage:
        limit = self.left(self.limits.slow)
        return self.pytest("slow", "gpu and slow", limit, self.limits.each_slow)

    def pytest(self, name: str, marks: str, limit_s: float, each_s: float) -> Stage:
        journal, log = self.out / "tests.jsonl", self.out / "tests.log"
        before = len(run_plugin.read_journal(journal))
        deadline = time.monotonic() + limit_s
        command = [
            *(self.python, "-m", "pytest", "-p", "run_plugin", "-v", "--tb=short", "-m", marks),
            *("-p", "no:cacheprovider", "--continue-on-collection-errors"),
            *(f"--ignore={IGNORED}", *self.options.tests),
        ]
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        complete = False
        while not complete and deadline - time.monotonic() > 2 * GRACE_S:
            records = len(run_plugin.read_journal(journal))
            done = execute(
                command, deadline - time.monotonic() - 2 * GRACE_S, log,
                PYTHONPATH=path, JOURNAL=str(journal), EACH_S=str(each_s),
                RNN_FUSED_REQUIRE_CUDA="1",
            )  # fmt: skip
            new = run_plugin.read_journal(journal)[records:]
            if not any("left" in record for record in new):
                return Stage(name, "FAILED", 0, f"pytest did not start ({done.words}): tests.log")
            complete = not self.blame(journal, new, done, each_s)
            # Without an outcome more than before, the next process would fare no better.
            if not complete and len(run_plugin.read_journal(journal)) <= records + 1:
                break
        return self.judge(name, run_plugin.read_journal(journal)[before:], complete)

    @staticmethod
    def blame(journal: Path, new: list[dict], done: Ended, each_s: float) -> bool:
        """Whether tests are left. What ended the process, if it was not the limit of the stage,
        gets its outcome: "hung" or "crashed"."""
        finished = {record["test"] for record in new if "test" in record}
        starts = [record for record in new if "start" in record]
        left = next(record["left"] for record in reversed(new) if "left" in record)
        open_test = starts[-1] if starts and starts[-1]["start"] not in finished else None
        if open_test and done.status is not None:
            seconds = time.time() - open_test["at"]
            outcome = "hung" if seconds > each_s - 1 else "crashed"
            record = {"test": open_test["start"], "outcome": outcome, "seconds": round(seconds, 1)}
            with journal.open("a") as file:
                file.write(json.dumps(record | {"message": f"{done.words}: tests.log"}) + "\n")
            finished.add(open_test["start"])
        return len(finished) < left

    @staticmethod
    def judge(name: str, records: list[dict], complete: bool) -> Stage:
        results = [record for record in records if "test" in record]
        counts = Counter(record["outcome"] for record in results)
        bad = [r for r in results if r["outcome"] not in ("passed", "skipped")]
        note = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "no tests"
        status = "FAILED" if bad or not results else "ok" if complete else "cut off"
        failures = [
            {key: r.get(key) for key in ("test", "outcome", "seconds", "message")} for r in bad
        ]
        return Stage(name, status, 0, note, {"counts": dict(counts), "failures": failures})

    def bench(self) -> Stage:
        limit = self.left(self.limits.bench)
        command = [self.python, "-m", "rnn_fused.bench", "--device", "cuda"]
        folder = ROOT / "build" / "gpu-bench"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command += ["--output", str(folder)]
        if self.options.full:
            command.append("--full")
        command += ["--seconds", f"{max(limit - BENCH_ENDS_S, 1):.0f}"]
        done = execute(command, limit, self.out / "bench.log")
        for name in KEPT:
            with contextlib.suppress(OSError):
                shutil.copy(folder / name, self.out)
        found: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((folder / "bench.json").read_text())
        grid = found.get("grid", {})
        details = {key: grid[key] for key in ("summary", "refused") if key in grid}
        details["failures"] = found.get("failures", [])
        rows, left_out = len(grid.get("rows", [])), len(grid.get("out_of_time", []))
        note = f"{rows} rows, {left_out} cases left out, {len(details['failures'])} failures"
        if done.status == 0:
            return Stage("bench", "ok", 0, note, details)
        return Stage("bench", "FAILED", 0, f"{done.words}; {note}; see bench.log", details)

    # The run -------------------------------------------------------------------------------------

    def output(self, code: str, **env: str) -> str:
        """What a few lines of Python print, or "" if they fail."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [self.python, "-c", code], cwd=ROOT, env={**os.environ, **env}, text=True,
                capture_output=True, timeout=self.limits.facts, check=True,
            )  # fmt: skip
            return done.stdout.strip().splitlines()[-1]
        return ""

    def look(self) -> bool:
        """Collect the facts; whether there is a CUDA device."""
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        nvcc = baseline.find_nvcc()
        here = json.loads(self.output(FACTS) or "{}")
        commit = baseline.output_of(["git", "describe", "--always", "--dirty", "--exclude=*"])
        self.facts = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "form": "full" if self.options.full else "quick",
            "budget_s": self.options.budget_s,
            "commit": self.options.commit or commit or None,
            "python": platform.python_version(),
            "driver": baseline.output_of(query).splitlines()[0:1],
            "nvcc": baseline.output_of([nvcc, "--version"]).splitlines()[-2:-1] if nvcc else [],
            "cpu": baseline.cpu_model(),
            "cpus": os.cpu_count(),
            **here,
        }
        for name in ("driver", "nvcc"):
            self.facts[name] = next(iter(self.facts[name]), None)
        if here.get("capability"):
            self.arch = architecture(tuple(here["capability"]))
        return bool(here.get("capability"))

    def go(self) -> int:
        """All stages; the exit status."""
        for name in self.options.stages:
            begin = time.monotonic()
            if self.left(LEAST_S.get(name, 1.0) + 1) < LEAST_S.get(name, 1.0):
                stage = Stage(name, "left out", 0, "no time left")
            else:
                try:
                    stage = getattr(self, name)()
                except Exception as error:  # whatever it is, the next stage has its turn
                    stage = Stage(name, "FAILED", 0, f"{type(error).__name__}: {error}")
            stage.seconds = round(time.monotonic() - begin, 1)
            self.stages.append(stage)
            self.write()
            print(self.line(stage), flush=True)
        print(self.table(), flush=True)
        return self.status

    def give_up(self) -> None:
        """End this process at once, with what is known."""
        print(self.table(), "\nout of time: given up", flush=True)
        os._exit(1)

    @property
    def status(self) -> int:
        """0 if nothing went wrong. The slow tests may be left out for lack of time."""
        fine = all(
            s.status == "ok" or (s.name == "slow" and s.status in ("left out", "cut off"))
            for s in self.stages
        )
        return 0 if fine and len(self.stages) == len(self.options.stages) else 1

    def write(self) -> None:
        content = {**self.facts, "stages": [asdict(stage) for stage in self.stages]}
        (self.out / "run.json").write_text(json.dumps(content, indent=1) + "\n")

    def table(self) -> str:
        """The run in some 40 lines."""
        facts = self.facts
        names = "device", "driver", "torch", "cudnn", "commit", "date"
        lines = ["", "; ".join(f"{name} {facts.get(name)}" for name in names)]
        lines += map(self.line, self.stages)
        for stage in self.stages:
            failures = stage.details.get("failures", [])
            for failure in failures[:SHOWN]:
                words = (
                    [failure] if stage.name == "bench" else [failure["outcome"], failure["test"]]
                )
                lines.append("  " + " ".join(words)[:200])
            if len(failures) > SHOWN:
                lines.append(f"  and {len(failures) - SHOWN} more of {stage.name}")
        for stage in self.stages:
            for group in stage.details.get("summary", []):
                cells = ", ".join(f"{cell} {mean:.2f}" for cell, mean in group["by_cell"].items())
                lines.append(
                    f"  {group['name']}: {group['mean_ratio']:.2f} times torch.nn over "
                    f"{group['rows']} rows, {group['below_one']} below 1 ({cells})"
                )
        return "\n".join(lines)

    @staticmethod
    def line(stage: Stage) -> str:
        return f"{stage.name:<11}{stage.status:<9}{stage.seconds:>6.0f} s  {stage.note}"

    def plan(self) -> str:
        """What would run, and how long at most."""
        limits = asdict(self.limits)
        total = "no limit" if self.options.budget_s is None else f"{self.options.budget_s:.0f} s"
        lines = [f"{name:<11}at most {limits[name]:.0f} s" for name in self.options.stages]
        return "\n".join([*lines, f"all         {total}; into {self.out}"])


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--out", type=Path, default=default, help="folder of the results")
    parser.add_argument("--full", action="store_true", help="all grids, no limit of time")
    parser.add_argument(
        "--budget-s", type=float,
        help=f"seconds for everything; default {QUICK_S:.0f}, with --full none",
    )  # fmt: skip
    parser.add_argument("--stages", default=",".join(STAGES), help="only these, with commas")
    parser.add_argument("--commit", help="what is run, where there is no git to ask")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and end")
    parser.add_argument("tests", nargs="*", default=["tests"], help="files or folders of the tests")
    options = parser.parse_args(argv)
    options.stages = options.stages.split(",")
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"--stages must be among {', '.join(STAGES)}, got {', '.join(unknown)}")
    if options.budget_s is None and not options.full:
        options.budget_s = QUICK_S
    options.out = options.out.resolve()
    return options


def main(argv: list[str] | None = None, python: str = sys.executable) -> int:
    options = parse_arguments(argv)
    run = Run(options, python)
    if options.dry_run:
        print(run.plan())
        return 0
    if options.budget_s is not None:
        # For what no limit reaches: a call of this process itself that a driver does not return.
        signal.signal(signal.SIGALRM, lambda *_: run.give_up())
        signal.setitimer(signal.ITIMER_REAL, options.budget_s + GRACE_S)
    try:
        if not run.look():
            print("run.sh needs a CUDA device, and torch sees none", file=sys.stderr)
            return NO_DEVICE
        options.out.mkdir(parents=True, exist_ok=True)
        for name in ("build.log", "tests.log", "tests.jsonl", "bench.log"):
            (options.out / name).unlink(missing_ok=True)
        return run.go()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    sys.exit(main())

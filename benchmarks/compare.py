"""Compare this checkout's benchmarks with those of another commit.

    make bench-compare BASE=v0.1.0
    make bench-compare BASE=HEAD~3 COMPARE_ARGS="-k 'gru and training' --rounds 3"

The other commit is checked out beside this one (a git worktree in build/compare) and compiled
there; then `pytest benchmarks` runs in both by turns: base, this, base, this. Each commit runs its
own benchmark files, and tests that both have are compared:

    time      median time of this checkout over that of the base: above 1 it is slower
    to torch  the ratio to torch.nn, base -> this, where the benchmark has one. torch.nn was timed
              in turns in the same process: trust it where the machine is not quiet

The files that pytest-benchmark wrote stay in build/compare, for `pytest-benchmark compare`.

Exit status: 0; 1 where a test is slower by more than --fail-at in both measures; 2 for a failed
build or run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "compare"
RATIO = "ratio_to_torch"  # in a benchmark's extra_info; above 1 is faster than torch.nn


class CompareError(RuntimeError):
    """A command that the comparison needs has failed."""


@dataclass(frozen=True)
class Measured:
    """One test in one commit, over all its runs."""

    seconds: float
    to_torch: float | None


@dataclass(frozen=True)
class Line:
    """One test in both."""

    name: str
    base: Measured
    this: Measured

    @property
    def time(self) -> float:
        """Time of this over that of the base."""
        return self.this.seconds / self.base.seconds

    @property
    def against_torch(self) -> float | None:
        """The same by way of torch.nn, or None."""
        if self.base.to_torch is None or self.this.to_torch is None:
            return None
        return self.base.to_torch / self.this.to_torch

    def slower(self, allowed: float) -> bool:
        """Whether it is more than `allowed` times as slow, by each measure that there is."""
        measures = [self.time, self.against_torch]
        return all(measure is None or measure > allowed for measure in measures)


def collect(runs: Iterable[dict[str, Any]]) -> dict[str, Measured]:
    """The tests of pytest-benchmark's files of one commit, by name."""
    times: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for run in runs:
        for test in run["benchmarks"]:
            times.setdefault(test["fullname"], []).append(test["stats"]["median"])
            if RATIO in test["extra_info"]:
                ratios.setdefault(test["fullname"], []).append(test["extra_info"][RATIO])
    return {
        name: Measured(
            statistics.median(found),
            statistics.median(ratios[name]) if name in ratios else None,
        )
        for name, found in times.items()
    }


def compare(base: dict[str, Measured], this: dict[str, Measured]) -> list[Line]:
    """The tests of both, slowest against the base first."""
    lines = [Line(name, base[name], this[name]) for name in base.keys() & this.keys()]
    return sorted(lines, key=lambda line: (-line.time, line.name))


def table(lines: Sequence[Line], allowed: float) -> str:
    """A line a test, those that fail marked."""
    width = max((len(line.name) for line in lines), default=4)
    shown = [f"{'test':{width}}    base ms    this ms   time  to torch"]
    for line in lines:
        base, this = line.base.to_torch, line.this.to_torch
        to_torch = "" if base is None or this is None else f"  {base:.2f} -> {this:.2f}"
        mark = "  SLOWER" if line.slower(allowed) else ""
        times = f"{line.base.seconds * 1e3:10.3f} {line.this.seconds * 1e3:10.3f}"
        shown.append(f"{line.name:{width}} {times} {line.time:6.2f}{to_torch}{mark}")
    return "\n".join(shown)


def call(command: Sequence[str], cwd: Path, **env: str) -> str:
    """What a command prints.

    Raises:
        CompareError: it failed.
    """
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise CompareError(f"{' '.join(command)} in {cwd} failed:\n{done.stdout[-2000:]}")
    return done.stdout.strip()


def check_out(revision: str) -> Path:
    """The folder of a commit, compiled."""
    commit = call(["git", "rev-parse", "--verify", f"{revision}^{{commit}}"], ROOT)
    folder = FOLDER / commit[:12]
    if not folder.exists():
        call(["git", "worktree", "prune"], ROOT)
        call(["git", "worktree", "add", "--detach", str(folder), commit], ROOT)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    call(build, folder, PYTHONPATH=str(folder))
    return folder


def run(folder: Path, file: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run the benchmarks of a checkout; what pytest-benchmark wrote."""
    path = {"PYTHONPATH": str(folder)}
    where = call(
        [sys.executable, "-c", "import rnn_fused; print(rnn_fused.__file__)"], folder, **path
    )
    if not Path(where).is_relative_to(folder):
        raise CompareError(f"in {folder}, rnn_fused must come from there, got {where}")
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", f"--benchmark-json={file}"]
    call([*command, *options], folder, **path)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, run in turns, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("-k", dest="expression", default="", help="which tests, as for pytest")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turns")
    parser.add_argument("--fail-at", type=float, default=1.1, help="times as slow as the base")
    chosen = parser.parse_args(arguments)
    options = ["-k", chosen.expression] if chosen.expression else []
    runs: dict[str, list[dict[str, Any]]] = {"base": [], "this": []}
    try:
        folders = {"base": check_out(chosen.base), "this": ROOT}
        for turn in range(chosen.rounds):
            for name, folder in folders.items():
                print(f"round {turn + 1} of {chosen.rounds}: {name}", flush=True)
                runs[name].append(run(folder, FOLDER / f"{name}-{turn}.json", options))
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    base, this = (collect(found) for found in runs.values())
    lines = compare(base, this)
    print(table(lines, chosen.fail_at))
    for name, only in (("base", base.keys() - this.keys()), ("this", this.keys() - base.keys())):
        if only:
            print(f"only in {name}: {', '.join(sorted(only))}")
    return int(any(line.slower(chosen.fail_at) for line in lines))


if __name__ == "__main__":
    sys.exit(main())

"""benchmarks/gpu/run.sh without a GPU: its budgets, its stages on stand-ins, and its tests' plugin
on tests that pass, fail, hang, crash and lose the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"
sys.path.insert(0, str(FOLDER))

import run  # noqa: E402
import run_plugin  # noqa: E402

FACTS = {
    "torch": "2.11", "cuda": "13.0", "cudnn": 91000, "device": "A GPU", "capability": [9, 0],
    "sms": 132, "memory_bytes": 1, "devices": 1,
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout to build in that is not this one, and a fake nvcc and nvidia-smi."""
    root = tmp_path / "checkout"
    (root / "rnn_fused").mkdir(parents=True)
    monkeypatch.setattr(run, "ROOT", root)
    monkeypatch.delenv("SKIP_BUILD", raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    binary = r"printf '#!/bin/sh\nexit 0\n'"
    compiles = f'for last; do :; done; {binary} > "$last"; chmod +x "$last"'
    script(programs / "nvcc", f"[ $1 = --version ] && echo release && exit\n{compiles}")
    script(programs / "nvidia-smi", "echo 580.1")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(run.baseline, "find_nvcc", lambda: str(programs / "nvcc"))
    return root


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


BENCH = {
    "grid": {
        "rows": [1, 2, 3],
        "out_of_time": ["one"],
        "refused": [],
        "summary": [
            {
                "name": "bfloat16 training", "mean_ratio": 1.5, "rows": 3, "below_one": 1,
                "by_cell": {"lstm": 1.5},
            }
        ],
    },
    "failures": [],
}  # fmt: skip


BUILD = 'touch rnn_fused/libops.so; echo "for $TORCH_CUDA_ARCH_LIST"'


def fake_python(root: Path, *, build: str = "", bench: str = "", facts: dict = FACTS) -> str:
    """An interpreter that knows what run.py asks of it; pytest is this one's."""
    json_of_bench = json.dumps(BENCH).replace('"', '\\"')
    return str(
        script(
            root / "python",
            f"""
            case "$*" in
              *torch.cuda*) echo '{json.dumps(facts)}' ;;
              *EXT_SUFFIX*) echo .cpython-399-x.so ;;
              *setup.FOLDER*) echo build/ninja ;;
              *ninja*) mkdir -p build/ninja; echo built > build/ninja/_C.so ;;
              *build_ext*) {build or BUILD} ;;
              *rnn_fused.bench*)
                while [ "$1" != --output ]; do shift; done
                {bench or f'echo "{json_of_bench}" > "$2/bench.json"'} ;;
              *pytest*) exec {sys.executable} "$@" ;;
              *) echo "what is $*?"; exit 9 ;;
            esac""",
        )
    )


def write_tests(root: Path, text: str) -> None:
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n gpu\n slow\n")
    (root / "tests").mkdir()
    (root / "tests" / "test_it.py").write_text(
        "import os, time, pytest\npytestmark = pytest.mark.gpu\n" + text
    )


GOOD = """
def test_good():
    assert os.environ["RNN_FUSED_REQUIRE_CUDA"] == "1"

@pytest.mark.slow
def test_slow(): pass
"""


def go(root: Path, *options: str, **fakes: str) -> tuple[int, dict]:
    out = root / "out"
    status = run.main(["--out", str(out), *options], python=fake_python(root, **fakes))
    return status, json.loads((out / "run.json").read_text())


def stages(content: dict) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in content["stages"]}


def test_all_stages(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tests(root, GOOD)
    status, content = go(root, "--commit", "abc")
    assert stages(content) == dict.fromkeys(run.STAGES, "ok")
    assert status == 0
    assert content["device"] == "A GPU"
    assert content["driver"] == "580.1"
    assert content["commit"] == "abc"
    assert {"date", "torch", "cuda", "cudnn", "python", "cpu", "nvcc", "form"} <= set(content)
    assert "for 9.0a" in (root / "out" / "build.log").read_text()
    shown = capsys.readouterr().out
    assert "bfloat16 training: 1.50 times torch.nn over 3 rows, 1 below 1 (lstm 1.50)" in shown
    assert len(list((root / "out").iterdir())) + len(["rows.csv", "report.html"]) <= 8


def test_a_stage_that_fails_does_not_keep_the_next_from_running(root: Path) -> None:
    write_tests(root, GOOD + "def test_bad(): assert False, 'oh'\n")
    (root / "rnn_fused" / "libops.so").touch()
    status, content = go(root, build="exit 4", bench="exit 5")
    assert status == 1
    assert stages(content) == {
        "build": "FAILED", "primitives": "ok", "tests": "FAILED", "bench": "FAILED", "slow": "ok",
    }  # fmt: skip
    notes = {stage["name"]: stage["note"] for stage in content["stages"]}
    assert "exit status 4" in notes["build"]
    assert notes["tests"] == "1 failed, 1 passed"
    assert "exit status 5" in notes["bench"]
    assert not (root / "rnn_fused" / "libops.so").exists(), "an old library could be tested"
    (failure,) = content["stages"][2]["details"]["failures"]
    assert failure["test"] == "tests/test_it.py::test_bad"
    assert "oh" in failure["message"]


def test_only_some_stages(root: Path) -> None:
    write_tests(root, GOOD)
    status, content = go(root, "--stages", "tests")
    assert (status, stages(content)) == (0, {"tests": "ok"})
    with pytest.raises(SystemExit):
        go(root, "--stages", "test")


# Building -----------------------------------------------------------------------------------------


def test_what_is_built_can_be_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIP_BUILD", "1")
    status, content = go(root, "--stages", "build", build="exit 4")
    assert status == 1
    assert "needs rnn_fused/libops.so" in content["stages"][0]["note"]
    (root / "rnn_fused" / "libops.so").write_text("ops")
    status, content = go(root, "--stages", "build", build="exit 4")
    assert (status, content["stages"][0]["status"]) == (0, "ok")
    module = root / "rnn_fused" / "_C.cpython-399-x.so"
    assert module.read_text() == "built\n"
    module.write_text("mine")
    status, content = go(root, "--stages", "build", build="exit 4")
    assert (status, content["stages"][0]["note"]) == (0, "as it was")
    assert (module.read_text(), (root / "rnn_fused" / "libops.so").read_text()) == ("mine", "ops")


def test_the_build_file_can_be_had_without_a_build() -> None:
    """What SKIP_BUILD=1 relies on in setup.py, in a copy of what it reads."""
    root = FOLDER.parents[1]
    code = run.WRITE_NINJA.replace("setup.write_ninja()", "assert setup.write_ninja")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("build/ninja-")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "8.0"), ((9, 0), "9.0a"), ((10, 0), "10.0"), ((12, 0), "12.0")],
)
def test_architectures(capability: tuple[int, int], arch: str) -> None:
    assert run.architecture(capability) == arch
    number = arch.replace(".", "")
    command = run.primitives_command("nvcc", arch, Path("out"))
    assert f"-gencode=arch=compute_{number},code=sm_{number}" in command


# Tests that go wrong ------------------------------------------------------------------------------

BAD = """
def test_a(): pass
def test_hangs(): time.sleep(60)
def test_b(): pass
def test_crashes(): os.kill(os.getpid(), 11)
def test_c(): pytest.skip("not here")
def test_loses_the_device(): raise RuntimeError("[x] failed: an illegal memory access was met")
def test_d(): pass
def test_fails(): assert 1 == 2
"""


def test_what_hangs_or_crashes_costs_only_itself(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tests(root, BAD)
    limits = run.Limits(tests=40, each_test=2)
    monkeypatch.setattr(run, "Limits", lambda: limits)
    start = time.monotonic()
    status, content = go(root, "--stages", "tests")
    assert time.monotonic() - start < 40
    assert status == 1
    journal = run_plugin.read_journal(root / "out" / "tests.jsonl")
    outcomes = {r["test"].rpartition("::")[2]: r["outcome"] for r in journal if "test" in r}
    assert outcomes == {
        "test_a": "passed", "test_hangs": "hung", "test_b": "passed", "test_crashes": "crashed",
        "test_c": "skipped", "test_loses_the_device": "failed", "test_d": "passed",
        "test_fails": "failed",
    }  # fmt: skip
    assert [r["left"] for r in journal if "left" in r] == [8, 6, 4, 2]
    assert content["stages"][0]["details"]["counts"]["passed"] == 3
    messages = {r["test"]: r["message"] for r in journal if "test" in r}
    assert messages["tests/test_it.py::test_c"] == "Skipped: not here"
    # The traceback of the hanging test, from the thread that ended it.
    assert "in test_hangs" in (root / "out" / "tests.log").read_text()


def test_results_of_a_stage_that_is_cut_off_are_kept(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    write_tests(root, slow + "def test_a(): pass\ndef test_b(): time.sleep(90)\n")
    limits = run.Limits(tests=7, each_test=60)
    monkeypatch.setattr(run, "Limits", lambda: limits)
    monkeypatch.setattr(run, "GRACE_S", 1.0)
    start = time.monotonic()
    status, content = go(root, "--stages", "tests")
    assert time.monotonic() - start < 25
    assert status == 1
    assert stages(content) == {"tests": "cut off"}
    assert content["stages"][0]["note"] == "1 passed"


def test_a_pytest_that_does_not_start_is_a_failure(root: Path) -> None:
    write_tests(root, GOOD)
    (root / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    status, content = go(root, "--stages", "tests")
    assert (status, stages(content)) == (1, {"tests": "FAILED"})
    assert "did not start" in content["stages"][0]["note"]


def test_no_tests_at_all_are_a_failure(root: Path) -> None:
    write_tests(root, "")
    status, content = go(root, "--stages", "tests")
    assert (status, content["stages"][0]["note"]) == (1, "no tests")


# Budgets ------------------------------------------------------------------------------------------


def test_the_quick_form_fits_into_nine_minutes() -> None:
    limits = run.Limits()
    assert run.QUICK_S + run.GRACE_S <= 9 * 60
    correctness = limits.facts + limits.build + limits.primitives + limits.tests
    assert run.QUICK_S - correctness - run.LAST_S >= 2 * run.LEAST_S["bench"]
    usual = 90 + 5 + 90  # seconds that build, primitives and tests should take
    assert run.QUICK_S - usual - run.LAST_S >= limits.bench


def test_a_stage_gets_what_is_left(root: Path) -> None:
    options = run.parse_arguments(["--budget-s", "100", "--out", str(root)])
    one = run.Run(options, "python")
    assert one.left(20) == 20
    assert 85 < one.left(1000) <= 90
    one.budget._start -= 95
    assert one.left(1000) == 0
    assert one.go() == 1
    assert {stage.status for stage in one.stages} == {"left out"}
    unlimited = run.Run(run.parse_arguments(["--full"]), "python")
    assert unlimited.left(1e6) == 1e6


def test_a_benchmark_without_end_is_stopped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = run.Limits(bench=2)
    monkeypatch.setattr(run, "Limits", lambda: limits)
    monkeypatch.setattr(run, "GRACE_S", 0.5)
    start = time.monotonic()
    # Bash waits for its child, and neither minds the polite request.
    status, content = go(root, "--stages", "bench", bench="trap '' INT; sleep 60")
    assert time.monotonic() - start < 10
    assert (status, stages(content)) == (1, {"bench": "FAILED"})
    assert "stopped after" in content["stages"][0]["note"]


def test_the_benchmark_is_told_its_time(root: Path) -> None:
    script(root / "says", 'echo "$@" > "$OUT_FILE"')
    go(root, "--stages", "bench", "--budget-s", "120", bench='echo "$@"; exit 0')
    text = (root / "out" / "bench.log").read_text()
    seconds = float(text.split("--seconds ")[1].split()[0])
    assert 60 < seconds <= 120 - run.LAST_S - run.BENCH_ENDS_S


def test_the_slow_tests_may_be_left_out() -> None:
    one = run.Run(run.parse_arguments(["--stages", "bench,slow"]), "python")
    one.stages = [run.Stage("bench", "ok", 1, ""), run.Stage("slow", "left out", 0, "")]
    assert one.status == 0
    one.stages[0].status = "left out"
    assert one.status == 1


# The command --------------------------------------------------------------------------------------


def test_dry_run_says_what_would_run() -> None:
    done = subprocess.run(
        [FOLDER / "run.sh", "--dry-run"], env={**os.environ, "PYTHON": sys.executable, "OUT": "/o"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*run.STAGES, "all"]
    assert "530 s; into /o" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [FOLDER / "run.sh", "--out", tmp_path / "out"],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == run.NO_DEVICE
    assert "needs a CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_interpreter_without_torch_is_no_device(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = str(script(root / "none", "exit 1"))
    assert run.main(["--out", str(root / "out")], python=python) == run.NO_DEVICE
    assert "torch sees none" in capsys.readouterr().err

"""The benchmark as a command: whom it compares with, going on after a stop, stacks, memory."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnn_fused.bench import (
    Case,
    Problem,
    Settings,
    contenders,
    grid,
    irregular,
    memory,
    providers,
)
from rnn_fused.bench.__main__ import INTERRUPTED, main, parse
from rnn_fused.bench.problems import load_grids
from rnn_fused.bench.providers import Haste, not_installed, plain_name
from rnn_fused.bench.records import Row as BenchRow
from rnn_fused.bench.records import columns, environment, from_columns, read_rows, write_csv
from rnn_fused.bench.results import Results, ResumeError
from rnn_fused.bench.workload import WrongResultError

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
WHERE = environment(CPU)
METHOD = {"providers": ["rnn_fused"], "time_per_row": 1.0}


def row(section: str = "grid", T: int = 5) -> BenchRow:
    times = {"p20_ms": 1.25, "p50_ms": 1.5, "p80_ms": 2.0}
    sizes = {"cell": "lstm", "T": T, "B": 3, "I": 8, "H": 8, "layers": 2, "layout": "dense"}
    return BenchRow(
        section, "rnn_fused", **sizes, dtype="float32", pass_="training", **times,
        repeats=5, calls=1, ratio=None, gflops=1.0, us_per_step=1.0, share=0.5, directions=2,
    )  # fmt: skip


def command(tmp_path: Path, *more: str) -> list[str]:
    """Four cases: two problems, two passes."""
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"tiny": {"rows": [["lstm", 10, 8, 8], ["gru", 10, 8, 8, 4]]}}))
    output = ["--output", str(tmp_path / "out"), "--grid", "tiny", "--grid-file", str(path)]
    return [*output, "--quick", "--sections", "grid", "--dtype", "float32", *more]


# Whom it compares with ---------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["torch,naive"], ["naive"], ["torch", "naive,naive"]])
def test_against_names_the_contenders(names: list[str]) -> None:
    assert parse(["--against", *names]).providers == ("rnn_fused", "rnn_fused frozen", "naive")


def test_against_nobody_but_torch() -> None:
    assert parse(["--against", "torch"]).providers == ("rnn_fused", "rnn_fused frozen")


def test_an_unknown_contender_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--against", "torch,cudnn"])
    assert "torch, naive, onnxruntime, jax, flashrnn, haste, torchrl, got cudnn" in (
        capsys.readouterr().err
    )


@pytest.mark.usefixtures("no_pictures")
def test_what_is_not_installed_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(providers.PACKAGES, "jax", ("no_such_package", "another_one"))
    assert main(command(tmp_path, "--against", "jax,naive", "--pass", "training")) == 0
    assert "without jax: no_such_package and another_one not installed" in capsys.readouterr().out
    found = {row.provider for row, _ in read_rows(tmp_path / "out" / "rows.jsonl")}
    assert found == {"torch.nn", "rnn_fused", "naive"}


@pytest.mark.parametrize(
    ("cell", "dtype", "pass_"),
    [
        *((cell, "float32", "training") for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
        ("lstm", "bfloat16", "training"),
        ("gru", "float16", "inference"),
    ],
)
def test_jax_computes_the_same(cell: str, dtype: str, pass_: str) -> None:
    pytest.importorskip("jax")
    case = Case(Problem(cell, T=6, B=3, I=5, H=4), getattr(torch, dtype), pass_, CPU)
    contenders(case, ["jax"])["jax"]()


class HasteCell(nn.Module):
    """Haste's layer by its documentation: weights [I, G*H] and [H, G*H], gates i, g, f, o or z, r,
    h, one bias for an LSTM and two for a GRU, the reset gate behind the product."""

    def __init__(self, input_size: int, hidden_size: int, gates: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(input_size, gates * hidden_size))
        self.recurrent_kernel = nn.Parameter(torch.empty(hidden_size, gates * hidden_size))
        self.bias = nn.Parameter(torch.empty(gates * hidden_size))
        if gates == 3:
            self.recurrent_bias = nn.Parameter(torch.empty(gates * hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        h = c = x.new_zeros(x.size(1), self.recurrent_kernel.size(0))
        outputs = []
        for x_t in x:
            gates, recurrent = x_t @ self.kernel + self.bias, h @ self.recurrent_kernel
            if self.bias.numel() == 4 * h.size(1):
                i, g, f, o = (gates + recurrent).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (z, r, n), (hz, hr, hn) = (
                    t.chunk(3, -1) for t in (gates, recurrent + self.recurrent_bias)
                )
                z = (z + hz).sigmoid()
                h = (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h
            outputs.append(h)
        state = (h.unsqueeze(0), c.unsqueeze(0)) if self.bias.numel() == 4 * h.size(1) else h[None]
        return torch.stack(outputs), state


@pytest.mark.parametrize("pass_", ["inference", "training"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_haste_is_given_weights_as_it_documents_them(
    monkeypatch: pytest.MonkeyPatch, cell: str, pass_: str
) -> None:
    package = ModuleType("haste_pytorch")
    for name, gates in (("LSTM", 4), ("GRU", 3)):
        setattr(package, name, lambda I, H, gates=gates: HasteCell(I, H, gates))  # noqa: E741
    monkeypatch.setitem(sys.modules, "haste_pytorch", package)
    case = Case(Problem(cell, T=6, B=3, I=5, H=4), torch.float32, pass_, CPU)
    workload = contenders(case, ["haste"])["haste"]
    assert isinstance(workload.module, Haste)
    assert {plain_name(name) for name, _ in workload.module.named_parameters()} == {
        "weight_ih", "weight_hh", "bias_ih", "bias_hh",
    }  # fmt: skip


def test_another_library_that_computes_something_else_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is named and never timed, but not our failure."""

    class Wrong(nn.LSTM):
        def forward(self, x: Tensor, hx: Any = None) -> Any:
            output, state = super().forward(x, hx)
            return output + 1e-3, state

    monkeypatch.setitem(providers.PROVIDERS, "jax", lambda p: Wrong(p.I, p.H))
    monkeypatch.setitem(providers.PACKAGES, "jax", ())
    case = Case(Problem("lstm", 6, 3, 5, 4), torch.float32, "inference", CPU)
    outcome = grid.compare(case, Settings(budget_s=0), ["rnn_fused", "jax"])
    assert [r.provider for r in outcome.rows] == ["torch.nn", "rnn_fused"]
    assert outcome.wrong == []
    assert outcome.refused == {"jax": "results further from float64 than is allowed"}


def test_peers_say_where_they_are_compared() -> None:
    if not not_installed("jax"):
        double = Case(Problem("gru", 6, 3, 5, 4), torch.float64, "training", CPU)
        assert grid.entrants(double, ["jax"])[1] == {"jax": "compared on the CPU, up to float32"}
    stack = Case(Problem("gru", 6, 3, 5, 4, layers=2), torch.float32, "training", CPU)
    assert grid.entrants(stack, ["naive"])[1] == {"naive": "compared on one layer of one direction"}


# Stacks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pass_", ["inference", "training"])
@pytest.mark.parametrize(("layers", "directions"), [(2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_stacks_compute_the_same(cell: str, layers: int, directions: int, pass_: str) -> None:
    problem = Problem(cell, T=6, B=3, I=5, H=4, layers=layers, directions=directions)
    case = Case(problem, torch.float32, pass_, CPU)
    names = ["rnn_fused", *([providers.FROZEN] if pass_ == "inference" else [])]
    outcome = grid.compare(case, Settings(budget_s=0), names, recurrence=True)
    assert outcome.wrong == []
    assert [r.provider for r in outcome.rows] == ["torch.nn", *names]
    for found in outcome.rows:
        assert found.case == case.key
        assert (found.layers, found.directions) == (layers, directions)
        assert found.recurrence_ms is None


def test_operations_of_stacks() -> None:
    """Against the sizes of torch's own weights."""
    for layers, directions in ((1, 1), (3, 1), (1, 2), (3, 2)):
        problem = Problem("gru", T=7, B=3, I=5, H=4, layers=layers, directions=directions)
        stock = nn.GRU(5, 4, layers, bidirectional=directions == 2)
        weights = sum(w.numel() for name, w in stock.named_parameters() if "weight" in name)
        assert problem.flops("inference") == 2 * weights * 7 * 3


def test_grids_of_stacks() -> None:
    grids = load_grids()
    assert {(p.layers, p.directions) for p in grids["stacked"]} == {(2, 1)}
    assert {(p.layers, p.directions) for p in grids["bidirectional"]} == {(1, 2)}
    assert str(grids["stacked"][0]) == "lstm T=24 B=32 H=64 2 layers"
    assert str(grids["bidirectional"][0]) == "lstm T=40 B=32 H=128 bidirectional"


# Files -------------------------------------------------------------------------------------------


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = Results(tmp_path, WHERE, METHOD)
    results.begin()
    results.add([row(), row("forecaster")])
    table = tmp_path / "rows.csv"
    assert results.save() == [tmp_path / "rows.jsonl", table, tmp_path / "bench.json"]
    where = replace(WHERE, load=float(f"{WHERE.load:.5g}"))
    expected = [(row(), where), (row("forecaster"), where)]
    for path in (table, tmp_path / "rows.jsonl"):
        found = [(r, replace(w, load=float(f"{w.load:.5g}"))) for r, w in read_rows(path)]
        assert found == expected


def test_an_unfinished_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    results = Results(tmp_path, WHERE, METHOD)
    results.begin()
    results.add([row()])
    path.write_text(path.read_text() + path.read_text()[:40])
    assert len(read_rows(path)) == 1


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("provider,cell\nrnn_fused,lstm\n")
    with pytest.raises(ValueError, match=r"rows\.csv must hold rows of this benchmark.*section"):
        read_rows(path)
    write_csv(path, [(row(), WHERE)])
    path.write_text(path.read_text().replace("1.25", "fast"))
    with pytest.raises(ValueError, match="fast"):
        read_rows(path)


def test_older_rows_have_one_direction() -> None:
    older = {k: v for k, v in columns(row()).items() if k != "directions"}
    assert from_columns(older, BenchRow).directions == 1
    files = sorted(RESULTS.glob("2026-11-23-zen4-*thread*.csv"))
    assert files
    assert all(r.directions == 1 for path in files for r, _ in read_rows(path))


# Going on ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = grid.compare, []

    def compare(case: Case, *arguments: Any, **options: Any) -> grid.Outcome:
        seen.append(str(case))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(case, *arguments, **options)

    monkeypatch.setattr(grid, "compare", compare)
    arguments = command(tmp_path, "--against", "torch")
    assert main(arguments) == INTERRUPTED
    shown = capsys.readouterr()
    assert "--resume goes on" in shown.err
    assert "report.html" in shown.out
    out = tmp_path / "out"
    before = (out / "rows.jsonl").read_text()
    assert len({r.case for r, _ in read_rows(out / "rows.jsonl")}) == 2

    assert main([*arguments, "--resume"]) == 0
    assert len(seen) == 5  # the third again, and the fourth
    assert seen[3] == seen[2]
    assert (out / "rows.jsonl").read_text().startswith(before)
    assert len({r.case for r, _ in read_rows(out / "rows.csv")}) == 4
    content = json.loads((out / "bench.json").read_text())
    assert sum(group["rows"] for group in content["grid"]["summary"]) == 4
    assert main([*arguments, "--resume"]) == 0
    assert len(seen) == 5
    assert main(arguments) == 0  # from the beginning
    assert len(seen) == 9


@pytest.fixture
def first(tmp_path: Path) -> Results:
    """What an earlier run left: one row of the grid."""
    results = Results(tmp_path, WHERE, METHOD)
    results.begin()
    results.add([row()])
    results.save()
    return results


def again(tmp_path: Path, **changes: Any) -> Results:
    results = Results(tmp_path, replace(WHERE, **changes), METHOD)
    results.resume()
    return results


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"commit": "0123456789ab"}, "commit was"),
        ({"threads": 77}, "threads was .* and is now 77"),
        ({"torch": "2.11.0"}, "torch was .* is now '2.11.0'"),
    ],
    ids=["commit", "threads", "torch"],
)
def test_rows_measured_otherwise_are_not_mixed(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ResumeError, match=named):
        again(tmp_path, **change)
    with pytest.raises(ResumeError, match=r"time_per_row was 1\.0 and is now 2\.0"):
        Results(tmp_path, WHERE, METHOD | {"time_per_row": 2.0}).resume()
    later = again(tmp_path, date="later", load=0.0)
    assert later.of_section("grid") == [row()]
    assert later.rows[0][1] == WHERE


def test_unfinished_sections_are_run_again(tmp_path: Path, first: Results) -> None:
    first.add([row("ragged"), row("forecaster")])
    first.content |= {"forecaster": {"agrees": True}, "ragged": []}
    first.finished.append("forecaster")
    first.save()
    later = again(tmp_path)
    assert [r.section for r, _ in later.rows] == ["grid", "forecaster"]
    assert later.content == {"forecaster": {"agrees": True}}
    assert read_rows(tmp_path / "rows.jsonl") == later.rows


def test_cases_with_a_failure_are_run_again(tmp_path: Path, first: Results) -> None:
    """A resumed run must not pass because the failure is of the run before."""
    first.add([row(T=6)])
    first.failures.append(f"[rnn_fused] {row().problem} float32 training: relative error")
    first.content["grid"] = {"refused": [{"provider": "jax", "reason": "absent", "cases": 2}]}
    first.save()
    later = again(tmp_path)
    assert [r.T for r, _ in later.rows] == [6]
    assert later.refused == {("jax", "absent"): 2}


def test_a_new_run_leaves_nothing_of_the_old_one(tmp_path: Path, first: Results) -> None:
    first.content["ragged"] = [{"ratio": 99.0}]
    first.save()
    Results(tmp_path, WHERE, METHOD).begin()  # and is killed at once
    later = again(tmp_path)
    assert (later.rows, later.content) == ([], {})


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("name", ["bench.json", "rows.jsonl"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(path.read_text().replace('"', "", 3))
    with pytest.raises(ResumeError, match="cannot resume"):
        again(tmp_path)


@pytest.mark.usefixtures("no_pictures")
def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--resume")) == 1
    assert "there is nothing to resume in" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_one_wrong_result_does_not_end_a_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = irregular.compare

    def compare(section: str, case: Case, settings: Settings) -> irregular.Irregular:
        if case.problem.cell == "lstm":
            raise WrongResultError("[rnn_fused] lstm T=10 B=8 H=8 float32 training: wrong")
        return real(section, case, settings)

    monkeypatch.setattr(irregular, "compare", compare)
    arguments = command(tmp_path, "--against", "torch")
    arguments[arguments.index("grid", arguments.index("--sections"))] = "ragged"
    assert main(arguments) == 1
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [outcome["problem"][:3] for outcome in content["ragged"]] == ["gru"]
    assert len(content["failures"]) == 1
    monkeypatch.setattr(irregular, "compare", real)
    assert main([*arguments, "--resume"]) == 0
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert len(content["ragged"]) == 2
    assert len({r.case for r, _ in read_rows(tmp_path / "out" / "rows.jsonl")}) == 4


@pytest.mark.usefixtures("no_pictures")
def test_what_there_is_no_time_for_is_said_and_made_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(tmp_path, "--against", "torch")
    arguments[arguments.index("grid", arguments.index("--sections"))] = "ragged"
    assert main([*arguments, "--seconds", "0"]) == 0
    assert "out of time: 2 cases of ragged left out" in capsys.readouterr().out
    assert main([*arguments, "--resume"]) == 0
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert len(content["ragged"]) == 2


def test_another_library_that_fails_in_any_way_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: Problem) -> nn.Module:
        raise ImportError("libcudart.so.11: cannot open shared object file")

    monkeypatch.setitem(providers.PROVIDERS, "jax", broken)
    monkeypatch.setitem(providers.PACKAGES, "jax", ())
    case = Case(Problem("lstm", 6, 3, 5, 4), torch.float32, "inference", CPU)
    outcome = grid.compare(case, Settings(budget_s=0), ["jax"])
    assert outcome.refused == {"jax": "libcudart.so.11: cannot open shared object file"}


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pictures")
def test_memory_is_measured_where_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measure_apart(case: Case, provider: str, method: str, threads: int) -> dict[str, float]:
        asked.append((str(case), provider, method, threads))
        return {"peak_mb": float(len(asked))}

    monkeypatch.setattr(memory, "measure_apart", measure_apart)
    arguments = command(tmp_path, "--against", "naive", "--pass", "training", "--threads", "1")
    assert main(arguments) == 0
    assert asked == []
    assert main([*arguments, "--memory"]) == 0
    first, second = (
        [(case, name, "resident", 1) for name in ("torch.nn", "rnn_fused")]
        for case in ("lstm T=10 B=8 H=8 float32 training", "gru T=10 B=8 H=8 I=4 float32 training")
    )
    assert asked == [*first, *second]
    asked.clear()

    def killed(*_: Any) -> dict[str, float]:
        raise RuntimeError("[torch.nn] a case: memory: ended with status -9")

    peaks = [(r.provider, r.peak_mb) for r, _ in read_rows(tmp_path / "out" / "rows.jsonl")]
    assert peaks == [
        ("torch.nn", 1.0), ("rnn_fused", 2.0), ("naive", None),
        ("torch.nn", 3.0), ("rnn_fused", 4.0), ("naive", None),
    ]  # fmt: skip
    monkeypatch.setattr(memory, "measure_apart", killed)
    assert main([*arguments, "--memory"]) == 1
    assert len(read_rows(tmp_path / "out" / "rows.jsonl")) == 6


# The report's interface --------------------------------------------------------------------------


def test_the_environment_is_on_every_row(tmp_path: Path) -> None:
    results = Results(tmp_path, WHERE, METHOD)
    results.begin()
    results.add([row()])
    line = json.loads((tmp_path / "rows.jsonl").read_text())
    assert {*asdict(WHERE)} <= {*line}
    assert line["pass"] == "training"

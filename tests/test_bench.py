"""The benchmarks: timer, problems, verification, summary, forecaster, command line."""

import csv
import importlib.machinery
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rnn_fused import families
from rnn_fused.bench import (
    Case,
    Problem,
    Settings,
    Timing,
    WrongResultError,
    admit,
    build,
    contenders,
    devices,
    extras,
    forecaster,
    grid,
    interleave,
    irregular,
    load_grids,
    providers,
    timer,
    workload,
)
from rnn_fused.bench.__main__ import main, parse
from rnn_fused.bench.problems import select
from rnn_fused.bench.records import Row
from rnn_fused.bench.summary import summarise

CPU = torch.device("cpu")
SMALL = Problem("lstm", T=6, B=3, I=5, H=4)


class FakeClock:
    """A clock that only the contenders move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, *seconds: float):
        """A call that takes the given seconds, in a cycle."""
        durations = itertools.cycle(seconds)

        def call() -> None:
            self.log.append(name)
            self.now += next(durations)

        return call


def test_timer_interleaves_and_pairs_rounds() -> None:
    clock = FakeClock()
    calls = {"a": clock.contender("a", 2.0), "b": clock.contender("b", 1.0)}
    settings = Settings(budget_s=0, min_rounds=5, warmup=1, clock=clock)
    times = interleave(calls, settings)
    assert "".join(clock.log) == "ab" + "ab" * 5
    assert times["a"].samples == (2.0,) * 5
    assert times["b"].speedup_over(times["a"]) == 2.0


def test_timer_repeats_short_calls_until_a_sample_is_long_enough() -> None:
    clock = FakeClock()
    calls = {"short": clock.contender("s", 0.25), "long": clock.contender("l", 8.0)}
    settings = Settings(budget_s=0, min_rounds=2, warmup=1, sample_s=1.0, clock=clock)
    times = interleave(calls, settings)
    assert "".join(clock.log) == "sl" + "ssssl" * 2
    assert (times["short"].calls, times["long"].calls) == (4, 1)
    assert times["short"].median == 0.25


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 5), (20.0, 10), (1e9, 30)])
def test_timer_keeps_its_budget(budget: float, rounds: int) -> None:
    clock = FakeClock()
    calls = {"a": clock.contender("a", 1.0), "b": clock.contender("b", 1.0)}
    settings = Settings(budget_s=budget, min_rounds=5, max_rounds=30, clock=clock)
    assert len(interleave(calls, settings)["a"].samples) == rounds


def test_timer_waits_for_the_device_inside_the_sample() -> None:
    clock = FakeClock()
    wait = clock.contender("wait", 0.0, 3.0)
    settings = Settings(
        budget_s=0, min_rounds=1, warmup=1, sample_s=0, clock=clock, synchronize=wait
    )
    assert interleave({"a": clock.contender("a", 1.0)}, settings)["a"].samples == (4.0,)


def test_timer_measures_by_events_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is what lies between two events, in milliseconds, over the number of calls."""
    clock = FakeClock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            clock.now += 100.0

        def elapsed_time(self, end: "Event") -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    measure = timer.cuda_events(torch.device("cuda"))
    settings = Settings(budget_s=0, min_rounds=2, warmup=1, sample_s=1.0, measure=measure)
    times = interleave({"a": clock.contender("a", 0.25)}, settings)
    assert times["a"].samples == (0.25, 0.25)
    assert "".join(clock.log) == "a" + "aaaa" * 2


def test_timing_statistics() -> None:
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0), calls=1)
    assert timing.median == 3.0
    assert timing.quantile(0.25) == 2.0
    assert timing.quantile(0.9) == pytest.approx(4.6)
    slow_rounds = Timing((15.0, 3.0, 6.0, 12.0, 9.0), calls=1)
    assert timing.speedup_over(slow_rounds) == 3.0


def test_every_grid_parses() -> None:
    grids = load_grids()
    assert len(grids["everyday"]) == 16
    assert grids["haste"][1] == Problem("lstm", 50, 1, I=128, H=128)
    assert grids["flashrnn_heads"][0].H == 16 * 48
    assert {p.reset_p for p in grids["rl"]} == {0, 0.001, 0.01, 0.1}
    assert all(p.I == 64 for p in grids["rl"])
    assert all(p.inference_only for p in grids["deepbench_infer_server"])
    problems = itertools.chain.from_iterable(grids.values())
    assert all(p.flops("training") == 3 * p.flops("inference") > 0 for p in problems)


def test_selection_leaves_out_what_torch_cannot_run() -> None:
    grids = load_grids()
    assert {p.heads for p in select(grids["flashrnn_heads"], ["lstm"])} == {1}
    assert {p.reset_p for p in select(grids["rl"], ["gru"])} == {0}
    assert {p.cell for p in select(grids["everyday"], ["gru"])} == {"gru"}


def test_unknown_cell_is_named(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"mine": {"rows": [["lstn", 1, 1, 8]]}}))
    with pytest.raises(ValueError, match=r"mine: cell must be one of lstm.*got 'lstn'"):
        load_grids(path)


@pytest.mark.parametrize("pass_", ["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_all_providers_compute_the_same(cell: str, dtype: torch.dtype, pass_: str) -> None:
    case = Case(Problem(cell, T=6, B=3, I=5, H=4), dtype, pass_, CPU)
    workloads = contenders(case, ["rnn_fused", "naive"])
    names = {name for name in workloads["naive"].results() if name.startswith("gradient")}
    assert len(names) == (5 if pass_ == "training" else 0)
    for one in workloads.values():
        one()
        assert all(leaf.grad is None for leaf in one.leaves.values())


@pytest.mark.parametrize("pass_", ["inference", "training"])
def test_families_compute_the_same(pass_: str) -> None:
    names = [providers.forced(family) for family in providers.FAMILIES]
    case = Case(SMALL, torch.float32, pass_, CPU)
    results = [w.results().keys() for w in contenders(case, names).values()]
    assert all(found == results[0] for found in results)


def test_families_are_forced_while_their_layers_run() -> None:
    seen = []
    layer = providers.Forced(SMALL, "persistent")
    layer.cell.register_forward_pre_hook(lambda *_: seen.append(families.forced()))
    layer(torch.randn(2, 3, SMALL.I))
    assert (seen, families.forced()) == (["persistent"], "auto")


class Failing(nn.LSTM):
    message = "[lstm] the persistent kernels cannot run this layer: a projection, P = 2"

    def forward(self, x, state=None):
        raise RuntimeError(self.message)


def fail(monkeypatch: pytest.MonkeyPatch, provider: str, message: str) -> None:
    kind = type("Broken", (Failing,), {"message": message})
    monkeypatch.setitem(providers.PROVIDERS, provider, lambda p: kind(p.I, p.H))


def test_a_refusal_is_kept_and_an_error_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "rnn_fused persistent", Failing.message)
    fail(monkeypatch, "rnn_fused stepwise", "CUDA out of memory.\nmore")
    case = Case(SMALL, torch.float32, "training", CPU)
    names = ["rnn_fused", "rnn_fused persistent", "rnn_fused stepwise", "flashrnn"]
    outcome = grid.compare(case, Settings(budget_s=0), names, recurrence=True)
    assert [row.provider for row in outcome.rows] == ["torch.nn", "rnn_fused"]
    assert outcome.refused == {
        "rnn_fused persistent": Failing.message,
        "flashrnn": "flashrnn not installed",
    }
    assert outcome.wrong == [f"[rnn_fused stepwise] {case}: CUDA out of memory."]
    with pytest.raises(RuntimeError, match="cannot run this layer"):
        contenders(case, ["rnn_fused persistent"])
    for row in outcome.rows:
        assert row.us_per_step == pytest.approx(row.p50_ms * 1e3 / SMALL.T)
        assert row.recurrence_ms is not None
        assert row.recurrence_ms < row.p50_ms
        assert row.peak_mb is None
    stock, ours = outcome.rows
    assert 0 < ours.share < 1
    assert stock.share == pytest.approx(ours.share / ours.ratio)


def test_a_lost_device_is_no_mere_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "rnn_fused", "CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        admit(Case(SMALL, torch.float32, "inference", CPU), ["rnn_fused"])


def test_what_cannot_be_compared_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    names = ["flashrnn", "torchrl", "naive"]
    spec = importlib.machinery.ModuleSpec("there", None)
    monkeypatch.setattr(providers, "find_spec", lambda name: spec)
    gru = Problem("gru", T=1000, B=3, I=5, H=4)
    todo, refused = grid.entrants(Case(gru, torch.bfloat16, "training", cuda), names)
    assert todo == []
    assert refused == {
        "flashrnn": "compared on CUDA, for the LSTM in 16 bits",
        "torchrl": "T > 200",
        "naive": "T > 200",
    }
    assert grid.entrants(Case(SMALL, torch.bfloat16, "training", cuda), names) == (names, {})
    # On the CPU the naive loop has no such limit.
    assert grid.entrants(Case(gru, torch.float32, "training", CPU), ["naive"])[0] == ["naive"]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_onnx_runtime_infers_the_same(cell: str) -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    problem = Problem(cell, T=5, B=3, I=4, H=8)
    case = Case(problem, torch.float32, "inference", CPU)
    assert [*contenders(case, ["onnxruntime"])] == ["torch.nn", "onnxruntime"]  # and verified
    assert grid.entrants(case, ["onnxruntime"])[0] == ["onnxruntime"]
    for other in (replace(case, pass_="training"), replace(case, dtype=torch.bfloat16)):
        reason = "compared on the CPU, in float32 inference"
        assert grid.entrants(other, ["onnxruntime"])[1] == {"onnxruntime": reason}
    reason = "compared on one layer of one direction"
    for more in ({"layers": 2}, {"directions": 2}):
        stack = replace(case, problem=replace(problem, **more))
        assert grid.entrants(stack, ["onnxruntime"])[1] == {"onnxruntime": reason}


def test_the_same_problems_on_the_cpu() -> None:
    rows = devices.compare(Case(SMALL, torch.float32, "training", CPU), Settings(budget_s=0))
    names = ["torch.nn", "rnn_fused"]
    assert [row.provider for row in rows] == [*names, *map(devices.on_cpu, names)]
    assert all(row.ratio is not None for row in rows)
    few = devices.small_enough(load_grids()["everyday"])
    assert 0 < len(few) <= devices.MOST
    assert all(p.flops("training") <= devices.MOST_FLOPS for p in few)


def test_packed_providers_compute_the_same() -> None:
    case = Case(SMALL, torch.float32, "training", CPU, lengths=irregular.lengths(SMALL))
    assert case.lengths is not None
    assert case.lengths[0] == 6
    assert list(case.lengths) == sorted(case.lengths, reverse=True)
    results = contenders(case, ["rnn_fused"])["rnn_fused"].results()
    assert results["output"].shape == (sum(case.lengths), 4)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("layers", [1, 2])
def test_providers_with_resets_compute_the_same(cell: str, layers: int) -> None:
    problem = replace(SMALL, cell=cell, layers=layers, T=20, reset_p=0.3)
    case = Case(problem, torch.float64, "training", CPU)
    assert case.layout == "resets"
    with_resets = contenders(case, ["rnn_fused"])["rnn_fused"].results()
    dense = contenders(replace(case, problem=replace(problem, reset_p=0.0)), ["rnn_fused"])
    assert (with_resets["output"] - dense["rnn_fused"].results()["output"]).abs().max() > 1e-3


def test_torch_nn_a_timestep_at_a_time_is_torch_nn() -> None:
    torch.manual_seed(0)
    stepped, x = providers.Stepped(SMALL), torch.randn(SMALL.T, SMALL.B, SMALL.I)
    output, state = stepped(x, torch.zeros(SMALL.T, SMALL.B, dtype=torch.bool))
    expected, last = stepped.cell(x)
    torch.testing.assert_close((output, *state), (expected, *last))
    output, _ = stepped(x, torch.ones(SMALL.T, SMALL.B, dtype=torch.bool))
    torch.testing.assert_close(output[2:3], stepped.cell(x[2:3])[0])


def test_what_resets_and_lengths_are_compared_on() -> None:
    both = replace(SMALL, T=10, B=8, directions=2)
    others = [replace(SMALL, T=10, B=7), replace(SMALL, T=9, B=8)]
    many = [replace(SMALL, T=10, B=8, H=h) for h in range(1, 21)]
    for section, extra in ((irregular.RAGGED, [both]), (irregular.RESETS, [])):
        assert irregular.worth_it(section, [*others, *many, both], CPU) == [*many, *extra]
        few = irregular.worth_it(section, many, torch.device("cuda"))
        assert len(few) == irregular.MOST
        assert [few[0], few[-1]] == [many[0], many[-1]]
        assert irregular.worth_it(section, many[:3], torch.device("cuda")) == many[:3]
    long = replace(SMALL, T=1024, B=8)
    assert irregular.worth_it(irregular.RESETS, [long], CPU) == [long]
    assert irregular.worth_it(irregular.RESETS, [long], torch.device("cuda")) == []


@pytest.mark.parametrize(
    ("section", "layout"), [(irregular.RAGGED, "packed"), (irregular.RESETS, "resets")]
)
def test_overhead_is_of_a_valid_step(
    section: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"dense": 2.0, section: 3.0, "rnn_fused": 3.0, "torch.nn": 12.0}

    def timed(calls: dict[str, object], _: Settings) -> dict[str, Timing]:
        return {name: Timing((seconds[name],) * 2, calls=1) for name in calls}

    monkeypatch.setattr(irregular, "interleave", timed)
    problem = replace(SMALL, T=10, B=8)
    dense = Case(problem, torch.float32, "training", CPU)
    outcome = irregular.compare(section, dense, Settings(budget_s=0))
    steps = sum(irregular.lengths(problem)) if section == irregular.RAGGED else 80
    assert [row.layout for row in outcome.rows] == [layout, layout, "dense"]
    assert [row.provider for row in outcome.rows] == ["torch.nn", "rnn_fused", "rnn_fused"]
    assert outcome.valid == pytest.approx(steps / 80)
    assert outcome.overhead == pytest.approx(1.5 * 80 / steps)
    assert outcome.ratio == pytest.approx(4.0)


@pytest.mark.parametrize("pass_", ["inference", "training"])
def test_wrong_results_are_never_timed(monkeypatch: pytest.MonkeyPatch, pass_: str) -> None:
    class Wrong(nn.LSTM):
        def forward(self, x, state=None):
            output, state = super().forward(x, state)
            return output + 1e-3 * x.mean(), state

    monkeypatch.setitem(providers.PROVIDERS, "rnn_fused", lambda p: Wrong(p.I, p.H))
    with pytest.raises(WrongResultError, match=r"\[rnn_fused\] lstm T=6 .* not timed"):
        contenders(Case(SMALL, torch.float32, pass_, CPU), ["rnn_fused"])


def test_not_a_number_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.LSTM):
        def forward(self, x, state=None):
            output, state = super().forward(x, state)
            return output * math.nan, state

    monkeypatch.setitem(providers.PROVIDERS, "rnn_fused", lambda p: Broken(p.I, p.H))
    with pytest.raises(WrongResultError):
        contenders(Case(SMALL, torch.float32, "inference", CPU), ["rnn_fused"])


def test_exact_workload_sees_the_rounded_numbers() -> None:
    case = Case(SMALL, torch.bfloat16, "inference", CPU)
    rounded, exact = build(case, "torch.nn"), build(case, "torch.nn", exact=True)
    assert exact.input.dtype == torch.float64
    assert torch.equal(rounded.input.double(), exact.input)
    assert workload.relative_error(exact.results()["output"], exact.results()["output"]) == 0


def row(provider: str, T: int, ratio: float | None, milliseconds: float, cell: str = "lstm") -> Row:
    times = {"p20_ms": milliseconds, "p50_ms": milliseconds, "p80_ms": milliseconds}
    sizes = {"cell": cell, "T": T, "B": 1, "I": 8, "H": 8, "layers": 1, "layout": "dense"}
    return Row(
        "grid", provider, **sizes, dtype="float32", pass_="training", **times,
        repeats=5, calls=1, ratio=ratio, gflops=1.0, us_per_step=1.0,
    )  # fmt: skip


def test_summary_counts_losses() -> None:
    rows = [
        row("rnn_fused", 1, 0.5, 2.0),
        row("naive", 1, 0.1, 4.0),
        row("rnn_fused", 2, 4.0, 1.0, cell="gru"),
        row("naive", 2, 0.5, 8.0, cell="gru"),
        row("rnn_fused", 3, 4.0, 1.0, cell="gru"),
    ]
    (group,) = summarise(rows, worst=1)
    assert (group.name, group.rows, group.below_one) == ("float32 training", 3, 1)
    assert group.mean_ratio == pytest.approx(2.0)
    assert group.mean_ratio_to_naive == pytest.approx((0.5 / 0.1 * 4.0 / 0.5) ** 0.5)
    assert group.by_cell == pytest.approx({"lstm": 0.5, "gru": 4.0})
    assert group.worst == ("lstm T=1 B=1 H=8 0.50x",)


def test_cuda_has_defaults_of_its_own() -> None:
    options = parse(["--device", "cuda"])
    assert options.grid == "deepbench_train, flashrnn, rl, everyday"
    assert options.dtypes == (torch.bfloat16, torch.float16, torch.float32)
    assert set(options.providers) == {
        "rnn_fused", "rnn_fused stepwise", "rnn_fused persistent", "rnn_fused handoff",
        "rnn_fused split", "rnn_fused cluster", "flashrnn", "haste", "torchrl", "naive",
    }  # fmt: skip
    assert options.sections == ("devices", "ragged", "resets", "grid")
    assert parse([]).providers == (
        "rnn_fused", "rnn_fused frozen", "onnxruntime", "jax", "naive",
    )  # fmt: skip
    everything = load_grids()
    assert all(p in options.problems for p in everything["flashrnn"])
    assert len(set(options.problems)) == len(options.problems)


def test_on_a_budget_the_most_wanted_goes_first() -> None:
    options = parse(["--device", "cuda"])
    problems = select(options.problems, options.cells)
    cases = grid.cases(problems, options.dtypes, options.passes, options.device)
    ordered = grid.most_wanted_first(cases)
    assert sorted(map(str, ordered)) == sorted(map(str, cases))
    first = ordered[: len([p for p in problems if not p.long])]
    assert {(case.dtype, case.pass_) for case in first} == {(torch.bfloat16, "training")}
    assert all(case.problem.long for case in ordered[-10:])
    hard_bar = Problem("lstm", T=1024, B=16, I=768, H=768)
    assert hard_bar in {case.problem for case in first}


def test_out_of_time_is_said_and_the_rest_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("rich", "matplotlib"):
        pytest.importorskip(package)
    arguments = [*tiny_grid(tmp_path), "--sections", "grid", "--seconds", "0", "--against", "torch"]
    assert main(arguments) == 0
    assert "out of time: 8 cases of grid left out, lstm T=10" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert len(content["grid"]["out_of_time"]) == 8


@pytest.mark.usefixtures("no_pictures")
def test_failures_do_not_end_the_run_but_fail_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "rnn_fused stepwise", "no kernel image is available")
    arguments = [*tiny_grid(tmp_path), "--sections", "grid", "--against", "torch"]
    arguments += ["--dtype", "float32"]
    assert main([*arguments, "--families", "stepwise", "persistent"]) == 1
    assert capsys.readouterr().out.count("FAILED [rnn_fused stepwise]") == 4
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert len(content["failures"]) == 4
    with (tmp_path / "out" / "rows.csv").open() as file:
        found = {row["provider"] for row in csv.DictReader(file)}
    assert found - {*providers.OTHERS, providers.FROZEN} == {
        "torch.nn",
        "rnn_fused",
        "rnn_fused persistent",
    }


@pytest.mark.usefixtures("no_pictures")
def test_a_lost_device_ends_the_run_with_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = providers.PROVIDERS["rnn_fused"]

    def layer(problem: Problem) -> nn.Module:
        if problem.cell == "gru":
            raise RuntimeError("CUDA error: unspecified launch failure")
        return real(problem)

    monkeypatch.setitem(providers.PROVIDERS, "rnn_fused", layer)
    arguments = [*tiny_grid(tmp_path), "--sections", "grid", "--against", "torch"]
    arguments += ["--dtype", "float32"]
    assert main([*arguments, "--pass", "training"]) == 1
    shown = capsys.readouterr()
    assert "unspecified launch failure" in shown.err
    assert "lstm T=10 B=8 H=8" in shown.out
    with (tmp_path / "out" / "rows.csv").open() as file:
        assert {row["cell"] for row in csv.DictReader(file)} == {"lstm"}


def test_forecaster_learns_the_same_with_both_libraries() -> None:
    pytest.importorskip("statsmodels")
    forecast = forecaster.run(CPU, steps=4, hidden=8)
    assert {len(losses) for losses in forecast.losses.values()} == {4}
    assert forecast.difference("rnn_fused", "torch.nn") < 1e-4
    assert forecast.agrees
    assert forecast.losses["rnn_fused"][0] != forecast.losses["rnn_fused"][-1]
    assert 0 < forecast.held_out_rmse["rnn_fused"] < 2 * forecast.persistence_rmse


def test_forecaster_sees_curves_part() -> None:
    losses = {"torch.nn": [1.0, 0.5], "float64": [1.0, 0.5], "rnn_fused": [1.0, 0.6]}
    timing = Timing((1.0,), calls=1)
    step = {"torch.nn": timing, "rnn_fused": timing}
    forecast = forecaster.Forecast(losses, {}, 1.0, step, 1.0)
    assert forecast.difference("rnn_fused", "torch.nn") == pytest.approx(0.2)
    assert not forecast.agrees


def tiny_grid(tmp_path: Path) -> list[str]:
    path = tmp_path / "grid.json"
    rows = [["lstm", 10, 8, 8], ["gru", 10, 8, 8, 4]]
    path.write_text(json.dumps({"tiny": {"rows": rows}}))
    output = str(tmp_path / "out")
    return ["--grid", "tiny", "--grid-file", str(path), "--quick", "--output", output]


def test_command_line_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("rich", "matplotlib", "statsmodels"):
        pytest.importorskip(package)
    threads = torch.get_num_threads()
    assert main([*tiny_grid(tmp_path), "--steps", "2", "--threads", "1"]) == 0
    assert torch.get_num_threads() == threads
    output = tmp_path / "out"
    shown = capsys.readouterr().out
    assert "Loss curves agree" in shown
    for name in ("ratios.png", "forecaster.png", "report.html"):
        assert name in shown
    for name in ("ratios.png", "forecaster.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
        assert name in shown
    with (output / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    grid_rows = [
        r for r in rows if r["section"] == "grid" and r["provider"] not in providers.OTHERS
    ]
    # Problems, dtypes; providers in two passes, and in inference alone.
    assert len(grid_rows) == 2 * 2 * (2 * 3 + 1)
    assert {r["provider"] for r in grid_rows} == {
        "torch.nn",
        "rnn_fused",
        providers.FROZEN,
        "naive",
    }
    assert all(float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"]) for r in rows)
    assert all(r["threads"] == "1" and r["torch"] == torch.__version__ for r in rows)
    content = json.loads((output / "bench.json").read_text())
    assert content["forecaster"]["agrees"]
    assert len(content["ragged"]) == len(content["resets"]) == 2
    assert sum(group["rows"] for group in content["grid"]["summary"]) == 8


@pytest.mark.usefixtures("no_pictures")
def test_command_line_fails_where_loss_curves_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("rich", "matplotlib", "statsmodels"):
        pytest.importorskip(package)
    monkeypatch.setattr(forecaster.Forecast, "agrees", False)
    assert main([*tiny_grid(tmp_path), "--sections", "forecaster", "--steps", "1"]) == 1
    assert "loss curves" in capsys.readouterr().err
    assert (tmp_path / "out" / "forecaster.png").exists()


def test_command_line_names_the_missing_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(tiny_grid(tmp_path)) == 1
    assert "need rich" in (message := capsys.readouterr().err)
    assert "pip install rnn_fused[bench]" in message
    assert not (tmp_path / "out").exists()
    with pytest.raises(extras.MissingExtraError):
        extras.require("rich.console", "rich")


def test_command_line_names_the_grids(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--grid", "nowhere"])
    assert "everyday" in capsys.readouterr().err

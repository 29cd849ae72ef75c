"""The GPU baseline's logic, without a GPU: selection, budget, journal, timing path, compilation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"
sys.path.insert(0, str(FOLDER))

import baseline  # noqa: E402
import baseline_report  # noqa: E402
import baseline_rows  # noqa: E402
import baseline_time  # noqa: E402
from baseline_rows import PRECISIONS, Row  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def grids() -> dict:
    return baseline_rows.load_grids()


@pytest.fixture(autouse=True)
def _restore_precision():
    yield
    baseline_time.set_precision("float32")
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    if hasattr(rnn, "fp32_precision"):
        rnn.fp32_precision = "tf32"  # torch's default


# Selection -----------------------------------------------------------------------------------


def shape(row: Row) -> tuple:
    return row.grid, row.cell, row.T, row.B, row.H


def test_full_covers_every_row_of_every_grid_in_every_precision(grids):
    covered = {(*shape(row), row.precision) for row in baseline_rows.select(grids, full=True)}
    for name, grid in grids.items():
        for cell, T, B, H, *_ in grid["rows"]:
            for precision in PRECISIONS:
                assert (name, cell, T, B, H, precision) in covered


def test_full_times_every_ragged_shape_packed_and_every_reset_rate(grids):
    rows = baseline_rows.select(grids, full=True)
    dense = {shape(r) for r in rows if r.layout == "dense" and r.B > 1 and r.T >= 5}
    assert {shape(r) for r in rows if r.layout == "packed"} == dense
    rates = {f"reset_{p}" for p in grids["rl"]["reset_p"] if p}
    assert {r.layout for r in rows if r.grid == "rl"} == {"dense", "packed"} | rates


def test_quick_is_part_of_full_and_keys_are_unique(grids):
    quick = [row.key for row in baseline_rows.select(grids, full=False)]
    full = [row.key for row in baseline_rows.select(grids, full=True)]
    assert set(quick) < set(full)
    assert max(Counter(full).values()) == 1


def test_quick_runs_what_matters_first(grids):
    rows = baseline_rows.select(grids, full=False)
    assert [r.priority for r in rows] == sorted(r.priority for r in rows)
    early = {(*shape(r), r.precision) for r in rows if r.priority <= 3 and r.layout == "dense"}
    for name in ("everyday", "fastrnns", "flashrnn", "rl", "deepbench_train"):
        for cell, T, B, H, *_ in grids[name]["rows"]:
            assert all((name, cell, T, B, H, p) in early for p in PRECISIONS)
    assert {r.provider for r in rows} == {"torch.nn", "loop", "cpu"}


def test_input_sizes_heads_and_inference_follow_the_grid(grids):
    rows = baseline_rows.select(grids, full=True)
    assert {r.I for r in rows if r.grid == "rl"} == {grids["rl"]["I"]}
    assert {r.I for r in rows if r.grid == "haste"} == {64, 128, 256, 512}
    assert all(r.H * r.heads == r.I for r in rows if r.grid == "flashrnn_heads")
    assert all(r.inference == r.grid.startswith("deepbench_infer") for r in rows)


def test_only_the_named_grids(grids):
    rows = baseline_rows.select(grids, full=True, only=["rnnt"])
    assert {r.grid for r in rows} == {"rnnt"}
    with pytest.raises(ValueError, match=r"must name grids .* got \['nope'\]"):
        baseline_rows.select(grids, full=True, only=["nope"])


# Lengths -------------------------------------------------------------------------------------

ROW = Row("everyday", "lstm", 20, 7, 4, 3, "float32")


def test_packed_lengths_run_from_the_longest_to_two_fifths():
    found = baseline_rows.lengths(replace(ROW, layout="packed"))
    assert len(found) == ROW.B
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (20, 8)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.9])
def test_resets_cut_all_timesteps_into_pieces(rate):
    found = baseline_rows.lengths(replace(ROW, layout=f"reset_{rate}"))
    assert sum(found) == ROW.T * ROW.B
    assert found == sorted(found, reverse=True)
    assert min(found) >= 1


def test_batch_sizes_are_those_of_pack_padded_sequence():
    of = [5, 5, 3, 1]
    packed = pack_padded_sequence(torch.zeros(5, 4, 2), torch.tensor(of))
    assert torch.equal(baseline_time._batch_sizes(of), packed.batch_sizes)


# Budget and journal --------------------------------------------------------------------------


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def rows_of(*priorities: int) -> list[Row]:
    return [replace(ROW, T=10 + i, priority=p) for i, p in enumerate(priorities)]


def test_the_budget_drops_the_last_rows_and_records_them(tmp_path):
    clock = FakeClock()
    budget = baseline.Budget(20.0, clock)
    journal = baseline.Journal(tmp_path / "j.jsonl")
    rows = rows_of(1, 1, 2, 3, 3)

    def measure(row: Row) -> dict:
        clock.now += 6.0
        return {"forward": {"us": 1.0}}

    baseline.run_rows(journal, rows, budget, measure, done={})
    # 0, 6 and 12 s used leave room for a row and the reserve; 18 s do not.
    assert [r["key"] for r in journal.of("row")] == [r.key for r in rows[:3]]
    assert journal.of("dropped") == [
        {"kind": "dropped", "reason": "budget", "rows": [r.key for r in rows[3:]]}
    ]
    lines = (tmp_path / "j.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == journal.records


def test_no_budget_means_no_limit():
    clock = FakeClock()
    budget = baseline.Budget(None, clock)
    clock.now += 1e9
    assert budget.allows(1e9)


def test_estimates_grow_with_the_work():
    small, large = ROW, replace(ROW, T=2000, B=64, H=2048, I=2048)
    assert small.estimate_s < large.estimate_s < 60
    assert replace(ROW, provider="loop").estimate_s > small.estimate_s


def test_an_error_is_recorded_and_the_rest_goes_on(tmp_path):
    journal = baseline.Journal(tmp_path / "j.jsonl")
    rows = rows_of(1, 1)

    def measure(row: Row) -> dict:
        if row is rows[0]:
            raise RuntimeError("CUDA out of memory. Tried a lot\nmore")
        return {"forward": {"us": 1.0}}

    baseline.run_rows(journal, rows, baseline.Budget(None), measure, done={})
    failed, good = journal.of("row")
    assert failed["error"] == "CUDA out of memory. Tried a lot"
    assert "error" not in good
    assert journal.failures == 1


def test_after_a_lost_device_nothing_more_runs(tmp_path):
    journal = baseline.Journal(tmp_path / "j.jsonl")

    def measure(row: Row) -> dict:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rows = rows_of(1, 1, 1)
    baseline.run_rows(journal, rows, baseline.Budget(None), measure, done={})
    assert len(journal.of("row")) == 1
    assert journal.of("dropped")[0]["reason"] == "device lost"


# The microbenchmark's outside ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "80"), ((9, 0), "90a"), ((10, 0), "100"), ((12, 0), "120")]
)
def test_nvcc_builds_for_one_architecture(capability, arch):
    command = baseline.nvcc_command("nvcc", capability, Path("out"))
    assert f"arch=compute_{arch},code=sm_{arch}" in command
    assert not any(word.startswith("-arch") for word in command)


def test_lines_that_are_not_json_become_errors():
    good, bad = baseline.parse_lines('{"bench": "pair", "ok": true}\nterminate called\n')
    assert good == {"bench": "pair", "ok": True}
    assert bad["ok"] is False
    assert "terminate called" in bad["error"]


def test_a_missing_or_hanging_or_crashing_microbench_is_an_error(tmp_path, monkeypatch):
    journal = baseline.Journal(tmp_path / "j.jsonl")
    monkeypatch.setattr(baseline, "find_nvcc", lambda: None)
    micro = baseline.MicroBench((9, 0), tmp_path)
    micro.run(journal, steps=1)
    script = tmp_path / "microbench"
    script.write_text(
        """#!/bin/sh
        echo '{"bench": "pair", "ok": true}'
        [ "$1" = pair ] && exec sleep 9
        kill -9 $$
        """
    )
    script.chmod(0o755)
    monkeypatch.setattr(baseline, "MICRO_TIMEOUT_S", 1)
    micro._run_group(journal, "pair", 1)
    micro._run_group(journal, "push", 1)
    errors = [record.get("error") for record in journal.records]
    assert errors == ["nvcc not found", None, "no end after 1 s", None, "ended by signal 9"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_microbench_compiles_without_spills(tmp_path):
    command = baseline.nvcc_command("nvcc", (9, 0), tmp_path / "microbench")
    strict = ["-Xptxas", "-warn-spills,-Werror", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    done = subprocess.run([*command, *strict], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Without a device, or with one, an unknown group is a JSON error and not a crash.
    done = subprocess.run([tmp_path / "microbench", "nope"], capture_output=True, text=True)
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False


# The timing path, on the CPU -----------------------------------------------------------------


@pytest.mark.parametrize("cell", sorted(baseline_rows.GATES))
def test_the_loop_agrees_with_torch_nn(cell):
    row = replace(ROW, cell=cell, provider="loop")
    assert baseline_time.measure(row, CPU, limit_s=0.0)["error_vs_torch_nn"] < 1e-5


def test_a_row_holds_what_was_promised():
    record = baseline_time.measure(replace(ROW, layout="packed"), CPU, limit_s=0.0)
    assert record["tokens"] == sum(baseline_rows.lengths(replace(ROW, layout="packed")))
    for kind in ("forward", "train"):
        times = record[kind]
        assert times["repeats"] == 3
        assert 0 < times["p20_us"] <= times["us"] <= times["p80_us"]
        assert times["us_per_step"] == times["us"] / ROW.T
        assert times["recurrence_us"] == times["us"] - record["input_gemm"][f"{kind}_us"]
        assert times["peak_bytes"] is None


def test_inference_rows_have_no_training_time():
    record = baseline_time.measure(replace(ROW, inference=True, H=5), CPU, limit_s=0.0)
    assert "train" not in record
    assert record["input_gemm"]["train_us"] is None


def test_dry_run_end_to_end_and_resume(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--device", "cpu", "--dry-run", "--grids", "rl,deepbench_infer_device"]
    assert baseline.main(["--out", str(out), *options]) == 0
    assert "0 dropped, 0 failed" in capsys.readouterr().out
    journal = out / "baseline.jsonl"
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert records[0]["kind"] == "meta"
    assert {"device", "torch", "cuda", "cudnn", "date", "commit", "cpu", "schema"} <= set(
        records[0]
    )
    assert records[-1]["kind"] == "end"
    assert {r["name"] for r in records if r["kind"] == "ceiling"} == {
        "copy",
        "matmul",
        "lstm_error",
    }
    rows = [r for r in records if r["kind"] == "row"]
    assert {r["precision"] for r in rows} == set(PRECISIONS)
    assert {r["layout"] for r in rows} == {"dense", "packed", "reset_0.01"}
    assert all(r["forward"]["us"] > 0 for r in rows)
    assert all(("train" in r) != r["inference"] for r in rows)

    assert baseline.main(["--out", str(out), *options, "--resume", str(journal)]) == 0
    again = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [r["key"] for r in again if r.get("resumed")] == [r["key"] for r in rows]


def test_resume_refuses_another_device(tmp_path):
    old = tmp_path / "old.jsonl"
    meta = {"kind": "meta", "schema": 1, "device": "A", "torch": "2", "dry_run": False}
    old.write_text(json.dumps(meta) + "\n")
    with pytest.raises(ValueError, match="needs the same device"):
        baseline.resumable(old, {**meta, "device": "B"})


def test_report_has_a_line_for_each_kind_of_result():
    micro = [
        {"bench": "launch", "how": "graph", "steps": 1000, "us": 1.0},
        {"bench": "barrier", "how": "flags", "exchange_bytes": 64, "blocks": 4, "us": 2.0},
        {"bench": "pair", "word_bytes": 8, "us": 3.0},
        {"bench": "handoff", "word_bytes": 8, "payload_bytes": 64, "blocks": 4, "us": 4.0},
        {"bench": "broadcast", "bytes": 64, "us": 5.0},
        {"bench": "cluster", "how": "relaxed", "cluster": 8, "clusters": 1, "us": 6.0},
        {"bench": "push", "how": "bulk", "bytes": 64, "cluster": 8, "clusters": 9, "us": 7.0},
        {"bench": "push", "how": "bulk", "bytes": 64, "error": "bad", "ok": False},
    ]
    meta = {"kind": "meta", "device": "D", "torch": "2", "cudnn": 9, "date": "today"}
    text = baseline_report.report([meta, *({"kind": "micro", **m} for m in micro)])
    for us in range(1, 8):
        assert f": {us}.000" in text
    assert "push bulk full chip cluster=8" in text
    assert "FAILED push: bad" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_without_a_device_it_says_so(tmp_path, capsys):
    assert baseline.main(["--out", str(tmp_path)]) == baseline.NO_DEVICE
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_cpu_is_only_for_dry_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        baseline.main(["--out", str(tmp_path), "--device", "cpu"])
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("RNN_FUSED_REQUIRE_CUDA") != "1",
    reason="needs a CUDA device",
)
def test_dry_run_on_the_gpu(tmp_path):
    assert baseline.main(["--out", str(tmp_path), "--dry-run", "--grids", "everyday"]) == 0
    lines = (tmp_path / "baseline.jsonl").read_text().splitlines()
    micro = [r for r in map(json.loads, lines) if r["kind"] == "micro"]
    assert micro
    assert all(r["ok"] for r in micro)

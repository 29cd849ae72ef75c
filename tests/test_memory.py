"""Peak memory: the command that measures it, the count from shapes, the bound to torch.nn."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from rnn_fused.bench import Case, Problem, memory
from rnn_fused.bench.footprint import footprint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def case(
    cell: str, *, layers: int = 1, device: torch.device = CPU, pass_: str = "training"
) -> Case:
    problem = Problem(cell, T=1000, B=32, I=64, H=64, layers=layers)
    return Case(problem, torch.float32, pass_, device)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_a_step_takes_what_is_counted_and_less_than_torch_nn(cell: str) -> None:
    stock, *ours = memory.rows_of(case(cell), memory.PROVIDERS, count=False, threads=1)
    assert stock.ratio == 1
    # What torch.nn's RNN takes above its tensors is the heap's, and varies.
    bounds = (1, 1) if cell == "rnn_tanh" else (0.6, 0.35)
    for row, bound in zip(ours, bounds, strict=True):
        assert row.predicted_mb is not None
        assert row.ratio is not None
        assert row.peak_mb == pytest.approx(row.predicted_mb, rel=0.1, abs=3)
        assert row.ratio < bound


@pytest.mark.parametrize(
    ("cell", "layers", "provider"),
    [
        ("gru", 1, "rnn_fused"),
        ("gru", 1, "rnn_fused recompute"),
        ("rnn_tanh", 1, "rnn_fused"),
        ("lstm", 2, "rnn_fused"),
        ("lstm", 3, "rnn_fused recompute"),
        ("gru", 3, "rnn_fused"),
    ],
)
def test_the_profiler_sees_what_is_counted(cell: str, layers: int, provider: str) -> None:
    """Less the sums in float64, which are not torch's."""
    found = memory.measure_counted(memory.build(case(cell, layers=layers), provider))
    counted = footprint(case(cell, layers=layers), recompute="recompute" in provider)
    del counted["sums in float64"]
    assert found["counted_mb"] == pytest.approx(counted.total() * 1e-6, rel=0.02)


def test_count() -> None:
    """In units of one value per hidden unit and row."""
    unit = 1000 * 32 * 64 * 4

    def units(case: Case, recompute: bool = False) -> float:
        counted = footprint(case, recompute=recompute)
        small = counted["gradients of weights"] + counted["sums in float64"]
        return (counted.total() - small) / unit

    window = 67 / 1000  # of the timesteps: 15 windows of more than 2048 rows

    assert units(case("lstm")) == 7  # output, four gates, c, the gradient of the input
    assert units(case("gru")) == 6
    assert units(case("rnn_tanh")) == 2 + window  # of the gradients of the pre-activations
    assert units(case("lstm", layers=2)) == 12  # twice six; the gradient of the input replaces c
    assert units(case("gru", layers=2)) == 11  # twice five, and the gradient of the input
    assert units(case("lstm"), recompute=True) == 3 + 4 * window
    assert units(case("lstm", layers=2), recompute=True) == 5 + 4 * window
    assert units(case("lstm", device=CUDA)) == 8  # h before each step
    assert units(case("lstm", device=CUDA), recompute=True) == pytest.approx(3 + 9 * window)
    assert units(case("rnn_tanh", device=CUDA)) == 4
    assert units(case("lstm", pass_="inference")) == 1
    assert units(case("gru", pass_="inference", device=CUDA)) == 4  # W_ih x


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--cells", "gru", "--steps", "20", "--sizes", "2x8", "--threads", "1"]
    assert memory.main([*sizes, "--output", str(tmp_path)]) == 0
    assert "rnn_fused: " in capsys.readouterr().out
    content = json.loads((tmp_path / "memory.json").read_text())
    with (tmp_path / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == [row["provider"] for row in content["rows"]]
    assert [row["provider"] for row in rows[:2]] == ["torch.nn", "rnn_fused"]
    assert all(float(row["peak_mb"]) >= 0 and row["pass"] == "training" for row in rows)
    assert content["environment"]["threads"] == 1


def test_command_goes_on_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--cells", "gru", "--steps", "0", "--sizes", "2x8", "--threads", "1"]
    assert memory.main(wrong) == 1
    assert "gru T=0 B=2 H=8" in capsys.readouterr().err

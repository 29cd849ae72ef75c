"""Predicted times of the timestep loops beside measured ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rnn_fused.bench import predicted
from rnn_fused.bench.predicted import predicted_ms, ranked, report
from rnn_fused.bench.problems import Problem
from rnn_fused.bench.records import Row, environment, make_row, write_csv
from rnn_fused.bench.timer import Timing
from rnn_fused.bench.workload import Case
from rnn_fused.explain import GPUS

PROBLEM = Problem("lstm", T=100, B=16, I=256, H=256)
CUDA = torch.device("cuda")


def case_of(problem: Problem = PROBLEM, pass_: str = "inference") -> Case:
    return Case(problem, torch.bfloat16, pass_, CUDA)


def ms(case: Case, provider: str) -> float:
    found = predicted_ms(case, provider, GPUS["H100"])
    assert found is not None
    return found


def row(provider: str, measured_ms: float) -> Row:
    timing = Timing((measured_ms * 1e-3,), calls=1)
    times = {"recurrence_ms": measured_ms, "predicted_ms": ms(case_of(), provider)}
    return make_row("grid", provider, case_of(), timing, 1.0, **times)


def test_each_family_has_its_own_prediction() -> None:
    families = [
        ms(case_of(), f"rnn_fused {name}") for name in ("cluster", "persistent", "stepwise")
    ]
    assert families == sorted(set(families))
    assert ms(case_of(), "rnn_fused") == families[1]  # the plan never chooses clusters
    # Of all timesteps, and of both passes in training.
    assert ms(case_of(replace(PROBLEM, T=200)), "rnn_fused") == pytest.approx(2 * families[1])
    assert ms(case_of(pass_="training"), "rnn_fused") > 1.5 * families[1]


@pytest.mark.parametrize(
    ("case", "provider"),
    [
        (replace(case_of(), device=torch.device("cpu")), "rnn_fused"),
        (replace(case_of(), lengths=(9, 3)), "rnn_fused"),
        (case_of(replace(PROBLEM, layers=2)), "rnn_fused"),
        (case_of(), "rnn_fused cudnn"),
        (case_of(), "torch.nn"),
        (case_of(), "naive"),
    ],
)
def test_only_loops_of_ours_are_predicted(case: Case, provider: str) -> None:
    assert predicted_ms(case, provider, GPUS["H100"]) is None


def test_says_how_far_off_and_whether_families_are_in_order() -> None:
    right = [row("rnn_fused cluster", 0.1), row("rnn_fused persistent", 0.2)]
    assert ranked(right) == (1, 1)
    wrong = [row("rnn_fused cluster", 0.3), row("rnn_fused persistent", 0.2)]
    assert ranked(wrong) == (0, 1)
    level = [row("rnn_fused cluster", 0.21), row("rnn_fused persistent", 0.2)]
    assert ranked([*level, row("rnn_fused", 0.1)]) == (0, 0)
    exact = row("rnn_fused persistent", ms(case_of(), "rnn_fused persistent"))
    text = report([exact, row("rnn_fused cluster", 1e9)])
    assert "1.00  rnn_fused persistent: lstm T=100 B=16 H=256 bfloat16 inference" in text
    assert text.endswith("families in the right order: 0 of 1 pairs")
    assert "no row has both" in report([replace(exact, predicted_ms=None)])


def test_reads_files_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.csv"
    write_csv(file, [(row("rnn_fused cluster", 0.1), environment(torch.device("cpu")))])
    predicted.main([str(file)])
    assert "geometric mean" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="at least one file"):
        predicted.main([])

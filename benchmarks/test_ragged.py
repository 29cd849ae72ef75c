"""Training on a PackedSequence: `extra_info` keeps the overhead over the dense cost of a step."""

from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from rnn_fused.bench import Case, Settings, contenders, ragged
from rnn_fused.bench.problems import Problem

PROBLEMS = [Problem(cell, 168, 64, I=64, H=64) for cell in ("lstm", "gru")]
SETTINGS = Settings(budget_s=0.5)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_ragged_training(benchmark: BenchmarkFixture, problem: Problem) -> None:
    cpu = torch.device("cpu")
    outcome = ragged.compare(problem, SETTINGS, torch.float32, cpu)
    benchmark.extra_info["overhead"] = round(outcome.overhead, 3)
    benchmark.extra_info["ratio_to_torch"] = round(outcome.ratio, 3)
    dense = Case(problem, torch.float32, "training", cpu)
    packed = replace(dense, lengths=ragged.lengths(problem))
    workload = contenders(packed, ["rnn_fused"])["rnn_fused"]
    benchmark.pedantic(workload, rounds=outcome.rows[1].repeats, iterations=1)

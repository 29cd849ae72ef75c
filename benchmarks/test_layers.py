"""One layer, one pass, one row of the everyday grid: compare commits with pytest-benchmark.

The absolute times compare commits on one quiet machine. `extra_info` keeps the ratio to torch.nn,
which was timed in turns in the same process and compares commits on a busy machine as well.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from rnn_fused.bench import Case, Settings, contenders, interleave
from rnn_fused.bench.problems import PASSES, Problem

# One row for each regime: a streaming step, small and short, forecasting, tagging, small batch.
PROBLEMS = [
    Problem(cell, T, B, I=H, H=H)
    for cell in ("lstm", "gru")
    for T, B, H in ((1, 1, 256), (24, 32, 32), (168, 64, 64), (200, 16, 256), (50, 1, 256))
]
SETTINGS = Settings(budget_s=0.5)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_layer(
    benchmark: BenchmarkFixture, problem: Problem, dtype: torch.dtype, pass_: str
) -> None:
    case = Case(problem, dtype, pass_, torch.device("cpu"))
    workloads = contenders(case, ["rnn_fused"])
    times = interleave(workloads, SETTINGS)
    fused = times["rnn_fused"]
    benchmark.extra_info["ratio_to_torch"] = round(fused.speedup_over(times["torch.nn"]), 3)
    benchmark.extra_info["gflops"] = round(problem.flops(pass_) / fused.median * 1e-9, 1)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    rounds = len(fused.samples)
    benchmark.pedantic(workloads["rnn_fused"], rounds=rounds, iterations=fused.calls)

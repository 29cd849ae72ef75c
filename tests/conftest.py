from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Reproducible on every machine; the first example may compile or load something.
settings.register_profile("rnn_fused", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("rnn_fused")


# Threads that spin wait long where others need the cores; tests of threads ask for their own.
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn. RNN_FUSED_REQUIRE_CUDA=1 turns a missing GPU into a failure."""
    if request.param == "cuda" and not torch.cuda.is_available():
        if os.environ.get("RNN_FUSED_REQUIRE_CUDA") == "1":
            pytest.fail("RNN_FUSED_REQUIRE_CUDA=1, but torch finds no CUDA device")
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test draws the same random numbers, whatever ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tf32_in_layers
from hypothesis import settings

# Reproducible on every machine; the first example may compile or load something.
settings.register_profile("rnn_fused", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("rnn_fused")


# Threads that spin wait long where others need the cores; tests of threads ask for their own.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated-cuda",
        metavar="LIBRARY",
        help="libemulated_ops.so: run layers on the CPU by the emulated CUDA kernels",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--emulated-cuda")
    if path is None:
        return
    from rnn_fused import library, ops

    ops.takes_lengths = lambda *_: False  # type: ignore[assignment] # as CUDA, it has to be packed
    torch.ops.load_library(path)
    for op in ("forward", "backward", "backward_"):
        for name in (f"layer_{op}", f"stack_{op}"):
            setattr(library, name, getattr(torch.ops.rnn_fused_emulated, name).default)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--emulated-cuda") is not None:
        skip = pytest.mark.skip(reason="about the operators of the installed library")
        for item in items:
            if item.get_closest_marker("own_ops") or item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn. RNN_FUSED_REQUIRE_CUDA=1 turns a missing GPU into a failure."""
    if request.param == "cuda" and not torch.cuda.is_available():
        if os.environ.get("RNN_FUSED_REQUIRE_CUDA") == "1":
            pytest.fail("RNN_FUSED_REQUIRE_CUDA=1, but torch finds no CUDA device")
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """No TF32 in float32 layers on CUDA, torch's default there, unless a test asks for it."""
    with tf32_in_layers(False):
        yield


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test draws the same random numbers, whatever ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def ops_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that run."""
    from rnn_fused import library

    names: list[str] = []
    run = library.run

    def spy(op: Any, *args: Any) -> Any:
        names.append(op._schema.name.removeprefix("rnn_fused::"))
        return run(op, *args)

    monkeypatch.setattr(library, "run", spy)
    return names


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's page without its pictures, which take seconds."""
    for package in ("rich", "matplotlib"):
        pytest.importorskip(package)
    from rnn_fused.bench import page

    def write_page(path: Path, rows: list[Any], contents: list[Any]) -> list[Path]:
        assert rows
        assert contents[0][1].processor == rows[-1][1].processor
        path.write_text("the page")
        return [path]

    monkeypatch.setattr(page, "write_page", write_page)

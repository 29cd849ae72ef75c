"""Which kernels run a layer: `explain` and `kernels`."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tf32_in_layers, threads
from torch import nn

import rnn_fused
from rnn_fused import families


def test_explains_a_layer_on_the_cpu() -> None:
    text = rnn_fused.explain(rnn_fused.GRU(8, 64, 2, bidirectional=True), T=100, B=16)
    assert text.startswith("GRU H=64, 2 layers, bidirectional, T=100, B=16, float32\n")
    assert "on the CPU" in text
    assert "packed once a call" in text
    assert "as they lie" in rnn_fused.explain(rnn_fused.GRU(8, 64), T=1, B=1)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="threads are no more than the cores")
def test_explains_the_division_among_threads() -> None:
    with threads(2):
        assert "sequences divided among 2" in rnn_fused.explain(rnn_fused.LSTM(8, 256), 100, 16)
        assert "hidden units divided among 2" in rnn_fused.explain(rnn_fused.LSTM(8, 512), 100, 1)
        small = rnn_fused.LSTM(8, 64, 3)
        assert "one thread; weights packed once a call" in rnn_fused.explain(small, 100, 1)
        text = rnn_fused.explain(rnn_fused.freeze(small), 100, 1)
        assert "layers divided among 2 threads, each 8 timesteps behind the one below" in text
        assert "weights packed by freeze" in text


@pytest.mark.parametrize("gpu", ["A100", "H100", "H200", "B200", "RTX 4090"])
def test_explains_a_layer_on_a_gpu_that_is_not_there(gpu: str) -> None:
    layer = rnn_fused.LSTM(512, 512, dtype=torch.float16)
    text = rnn_fused.explain(layer, T=1000, B=16, device=gpu)
    assert f"on {gpu} (sm_" in text
    assert text.count("persistent: 64 blocks of 8 hidden units, weights in registers (8") == 2


def test_explains_layers_side_by_side() -> None:
    options: dict[str, Any] = {"num_layers": 4, "dtype": torch.bfloat16, "device": "meta"}
    text = rnn_fused.explain(rnn_fused.LSTM(8, 256, **options), T=1000, B=16, device="H100")
    guide = (Path(__file__).parents[1] / "docs/gpu.md").read_text()
    _, _, _, _, forward, times, _, _, backward, times_backward = text.splitlines()
    side = "of all layers: 4 layers side by side, each 72 timesteps behind the one"
    blocks = "blocks of 8 hidden units, weights in registers ("
    assert forward.startswith(f"  forward {side} below: persistent: 128 {blocks}")
    assert backward.startswith(f"  backward {side} above: persistent: ")
    for how, predicted in ((forward, times), (backward, times_backward)):
        line = r" +predicted, .*: \d+ us for all layers' loops, \d+ us in turn"
        assert re.fullmatch(line, predicted)
        assert f"{how}\n{predicted}\n" in guide
    rebuilt = rnn_fused.LSTM(8, 256, save="recompute", **options)
    text = rnn_fused.explain(rebuilt, T=1000, B=16, device="H100")
    assert forward in text
    assert "backward of all layers" not in text
    for layer in (
        rnn_fused.LSTM(8, 256, dtype=torch.bfloat16, device="meta"),
        rnn_fused.LSTM(8, 256, bidirectional=True, **options),
        rnn_fused.LSTM(8, 2048, **options),
    ):
        assert "side" not in rnn_fused.explain(layer, T=1000, B=16, device="H100")
    with rnn_fused.kernels("stepwise"):
        layer = rnn_fused.LSTM(8, 256, **options)
        assert "side" not in rnn_fused.explain(layer, T=1000, B=16, device="H100")


def test_explains_where_weights_are_that_registers_have_no_room_for() -> None:
    layer = rnn_fused.LSTM(8, 2048, dtype=torch.bfloat16, bidirectional=True)
    text = rnn_fused.explain(layer, T=10, B=16, device="H100")
    how = "128 blocks of 16 hidden units for one direction after the other, weights in registers"
    assert text.count(f"persistent: {how} (8 warps, 8 runs each, the last 5 in shared memory)") == 2


def test_explains_weights_that_are_read_from_l2() -> None:
    for layer, backward, how in (
        (rnn_fused.RNN(8, 2560, dtype=torch.bfloat16), True, ""),
        (rnn_fused.GRU(8, 2816, dtype=torch.float16), False, ", 64% of them, in L2, read"),
    ):
        text = rnn_fused.explain(layer, T=1000, B=2, device="H100").splitlines()
        line = text[4 if backward else 2]
        blocks = (layer.hidden_size + 31) // 32
        assert f"persistent: {blocks} blocks of 32 hidden units, weights in shared" in line
        assert how in line
        assert ("%" in line) == bool(how)


def test_explains_clusters() -> None:
    layer = rnn_fused.LSTM(8, 200, dtype=torch.bfloat16, bidirectional=True)
    with rnn_fused.kernels("cluster"):
        text = rnn_fused.explain(layer, T=10, B=300, device="H100")
        for how in ("forward: cluster", "backward: cluster"):
            blocks = "20 clusters of 13 blocks of 16 hidden units"
            assert f"{how}: {blocks}, weights in registers (8 w" in text
        assert text.count(" 2 runs each), 32 sequences each, ") == 2
        text = rnn_fused.explain(layer, T=10, B=16, device="A100")
        assert text.count("cluster cannot run it: compute capability at least 90 is needed") == 2
        text = rnn_fused.explain(rnn_fused.LSTM(8, 512, dtype=torch.float16), 10, 16, device="H100")
        assert "16 blocks of 32 hidden units, weights in registers (8 warps, 4 runs each, " in text
        assert "each, the last 1 in shared memory)" in text
    with rnn_fused.kernels("handoff"):
        text = rnn_fused.explain(rnn_fused.GRU(8, 512), T=10, B=16, device="H100")
        how = "128 blocks of 8 hidden units that hand off, 2 slices of up to 8 sequences, weights"
        assert text.count(f"persistent: {how}") == 2
    with rnn_fused.kernels("split"):
        text = rnn_fused.explain(rnn_fused.GRU(8, 512), T=10, B=16, device="H100")
        slices = "2 slices of up to 8 sequences, weights"
        assert f"forward: persistent: 128 blocks of 8 hidden units, {slices}" in text
        how = "66 blocks of 8 hidden units in clusters of 3 that divide the gates, weights"
        assert f"backward: persistent: {how}" in text
        text = rnn_fused.explain(rnn_fused.RNN(8, 512), T=10, B=16, device="H100")
        assert text.count("split cannot run it: one gate is nothing to divide") == 2


def test_a_small_gpu_runs_small_layers_only() -> None:
    gpu = rnn_fused.Gpu("small", 86, 4, 65536, 100 << 10, 99 << 10)
    assert "persistent" in rnn_fused.explain(rnn_fused.GRU(8, 32), 10, 8, device=gpu)
    text = rnn_fused.explain(rnn_fused.GRU(8, 512), 10, 8, device=gpu)
    assert text.count("stepwise: 32 blocks of 16 hidden units must be resident at once") == 2


def test_explains_what_runs_on_an_old_gpu() -> None:
    gpu = rnn_fused.Gpu("T4", 75, 40, 65536, 64 << 10, 64 << 10)
    text = rnn_fused.explain(rnn_fused.GRU(8, 32), 10, 8, device=gpu)
    assert text.endswith("on T4: torch's own op, the GPU is too old (sm_75)")


def test_explain_needs_whole_numbers_and_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        rnn_fused.explain(rnn_fused.GRU(8, 32), 10, 2.5)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match='needs a CUDA device: name a GPU, such as "H100"'):
        rnn_fused.explain(rnn_fused.GRU(8, 32), 10, 8, device="cuda")


def test_explains_a_device_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "has_kernels", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    text = rnn_fused.explain(rnn_fused.GRU(8, 32), 10, 8, device="cuda")
    assert text.endswith("torch's own op, since this build has no code for the device")


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: rnn_fused.LSTM(8, 64, proj_size=16), "a projection, P = 16"),
        (lambda: rnn_fused.LSTM(8, 64, dtype=torch.float64), "float64"),
        (lambda: rnn_fused.LSTM(8, 2049), "H up to 2048, got 2049"),
        (
            lambda: rnn_fused.RNN(8, 4225, dtype=torch.float16),
            "133 blocks of 32 hidden units must be resident at once, there is room for 132",
        ),
    ],
)
def test_says_why_a_layer_runs_stepwise(layer, why: str) -> None:
    text = rnn_fused.explain(layer(), 10, 8, device="H100")
    assert text.count("stepwise") == 2
    assert why in text


def test_tf32_follows_the_setting_of_torch_nn(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in (False, True):
        monkeypatch.setattr(families, "allows_tf32", lambda allowed=allowed: allowed)
        text = rnn_fused.explain(nn.LSTM(8, 64), 10, 8, device="H100")
        assert text.count("TF32") == (2 if allowed else 0)


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 9), ["sm_80", "sm_90a"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((9, 0), ["sm_80"], False),
        ((10, 3), ["sm_100"], True),
        ((10, 3), ["sm_100a"], False),
        ((12, 0), ["sm_80", "sm_90a", "sm_100", "sm_120"], True),
        ((11, 0), ["sm_100", "sm_120"], False),
        ((7, 5), ["sm_75"], False),
        ((9, 0), [], False),
    ],
)
def test_kernels_run_where_there_is_code_for_the_device(
    capability: tuple[int, int], archs: list[str], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(families._C, "cuda_archs", archs)
    assert families.has_kernels("cuda", 0) == runs
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm
    assert not families.has_kernels("cuda", 0)
    assert families.has_kernels("cpu", None)
    assert not families.has_kernels("mps", 0)


def test_kernels_nest_and_end_with_an_error() -> None:
    assert families.forced() == "auto"
    with rnn_fused.kernels("stepwise"):
        with rnn_fused.kernels("persistent"):
            assert families.forced() == "persistent"
        with pytest.raises(ZeroDivisionError), rnn_fused.kernels("cudnn"):
            _ = 1 / 0
        assert families.forced() == "stepwise"
        text = rnn_fused.explain(rnn_fused.GRU(8, 32), 10, 8, device="H100")
        assert "forced: stepwise" in text
        assert (
            "\n  forward: stepwise\n    predicted, not measured: 7.0 us a step (launches, " in text
        )
    with rnn_fused.kernels("cudnn"):
        text = rnn_fused.explain(rnn_fused.GRU(8, 32), 10, 8, device="H100")
        assert text.count("persistent") == 2
    assert families.forced() == "auto"


def test_contexts_of_threads_that_overlap_leave_nothing_behind() -> None:
    first, second = rnn_fused.kernels("stepwise"), rnn_fused.kernels("persistent")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert families.forced() == "persistent"
    second.__exit__(None, None, None)
    assert families.forced() == "auto"


def test_a_compiler_is_shown_no_cache(recwarn: pytest.WarningsRecorder) -> None:
    torch.compile(rnn_fused.GRU(4, 8), backend="eager", fullgraph=True)(torch.randn(3, 2, 4))
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]


def test_the_cpu_is_not_concerned() -> None:
    layer, x = rnn_fused.GRU(4, 8), torch.randn(3, 2, 4)
    expected = layer(x)[0]
    for family in families.KERNELS:
        with rnn_fused.kernels(family):
            assert torch.equal(layer(x)[0], expected)


def test_bad_arguments_are_named() -> None:
    layer = rnn_fused.GRU(4, 8)
    unknown = pytest.raises(ValueError, match=r"kernels must be one of .*, got 'fast'")
    with unknown, rnn_fused.kernels("fast"):
        pass
    with pytest.raises(TypeError, match="explain needs an LSTM, GRU or RNN, got Linear"):
        rnn_fused.explain(nn.Linear(2, 2), 1, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, got T=0, B=2"):
        rnn_fused.explain(layer, 0, 2)
    with pytest.raises(ValueError, match=r"device must be .*, got 'TPU'"):
        rnn_fused.explain(layer, 1, 1, device="TPU")
    with pytest.raises(TypeError, match=r"no kernels for torch\.complex64"):
        rnn_fused.explain(nn.GRU(4, 8, dtype=torch.complex64), 1, 1)


@pytest.fixture
def _products_in_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("_products_in_tf32")
def test_warns_where_products_would_round_in_an_exact_layer() -> None:
    families._warn_of_products.cache_clear()
    with tf32_in_layers(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert families.allows_tf32()
    with pytest.warns(UserWarning, match="matmul allows TF32"):
        assert not families.allows_tf32()
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        assert not families.allows_tf32()

"""CUDA: every family of kernels against torch.nn, and what only a device can go wrong at: streams,
graphs, several devices, memory, barriers. Without a GPU all of it is skipped."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    KINDS,
    NOISE,
    Problem,
    assert_accurate,
    assert_as_accurate,
    each_kind,
    error,
    problem,
    tf32_in_layers,
    values_and_gradients,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_fused
from rnn_fused import ops
from rnn_fused.explain import GPUS

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["cuda"], indirect=True)]

FAMILIES = ("stepwise", "persistent", "handoff", "split", "cluster")
each_family = pytest.mark.parametrize("family", FAMILIES)
PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
each_precision = pytest.mark.parametrize("precision", PRECISIONS)
FEW = 100  # elements of a state
# cuDNN need not use TF32 where it may, so that twice its error does not bound ours.
TF32_NOISE = 2.0**-9


@contextmanager
def using(family: str, precision: str = "float32") -> Iterator[None]:
    """Forces a family of kernels; skips the test where its plan does not reach."""
    try:
        with rnn_fused.kernels(family), tf32_in_layers(precision == "tf32"):
            yield
    except RuntimeError as refusal:
        if family == "stepwise" or "cannot run this layer" not in str(refusal):
            raise
        pytest.skip(str(refusal))


def check(case: Problem, family: str, precision: str) -> None:
    dtype = case.input.dtype
    noise = TF32_NOISE if precision == "tf32" else NOISE[dtype] * torch.finfo(dtype).eps
    noise *= max(1.0, case.hx.shape[-1] / 64) ** 0.5  # of a sum over k, in whatever order
    if case.hx.numel() < FEW:
        noise *= 4  # a rounding of one of them is not averaged away, and torch's may be lucky
    with using(family, precision):
        assert_accurate(case, noise)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to the order in which torch's library sums in another stream: what is read too
    early, or from another call, is far off or NaN."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert error(actual[name], value) < 1e-2, name


# Values and gradients -----------------------------------------------------------------------------


@each_kind
@each_family
@each_precision
@pytest.mark.parametrize("lengths", [None, (9, 9, 5, 4, 1)], ids=["dense", "packed"])
@pytest.mark.parametrize("directions", [1, 2])
def test_accuracy(
    kind: str,
    family: str,
    precision: str,
    lengths: tuple[int, ...] | None,
    directions: int,
    device: str,
) -> None:
    sizes = {"T": 9, "B": 5, "I": 12, "H": 40, "lengths": lengths}
    options = {"dtype": PRECISIONS[precision], "device": device}
    check(problem(**KINDS[kind], **sizes, **options, directions=directions), family, precision)


# T, B, I, H: ones, odd sizes, and either side of what a warp, a tile or a block takes.
SHAPES = [
    (1, 1, 1, 1), (1, 7, 5, 3), (7, 1, 3, 13), (5, 2, 67, 1), (2, 17, 1, 31), (3, 37, 19, 41),
    (4, 16, 32, 256), (3, 65, 8, 257), (4, 64, 24, 512), (2, 130, 8, 520), (9, 16, 64, 768),
    (3, 3, 8, 1000), (2, 1, 8, 1024), (3, 5, 7, 1100),
    (3, 33, 8, 1536), (2, 17, 8, 2048), (2, 3, 7, 2050),
    (3, 35, 8, 2560), (3, 17, 8, 2816), (2, 3, 8, 4096),  # weights of large blocks, some in L2
    (3, 130, 8, 256), (20, 300, 8, 250), (300, 16, 8, 256),  # clusters of 16 and of 32 sequences
    (20, 300, 8, 264), (300, 16, 8, 500),  # clusters of blocks of 32 hidden units
]  # fmt: skip


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@each_family
@each_precision
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(
    cell: str, family: str, precision: str, shape: tuple[int, int, int, int], device: str
) -> None:
    sizes = dict(zip(("T", "B", "I", "H"), shape, strict=True))
    dtype = PRECISIONS[precision]
    check(problem(cell, **sizes, dtype=dtype, device=device), family, precision)


@each_kind
@each_family
@each_precision
@pytest.mark.parametrize(
    "lengths",
    [None, (9, 9, 5, 4, 1), (9,) * 18 + (6,) * 20 + (1, 1)],  # the last in slices
    ids=["dense", "packed", "many packed"],
)
def test_resets(
    kind: str, family: str, precision: str, lengths: tuple[int, ...] | None, device: str
) -> None:
    sizes = {"T": 9, "B": 5, "I": 12, "H": 40, "lengths": lengths, "directions": 2}
    options = {"resets": 0.3, "reset_state": True, "dtype": PRECISIONS[precision], "device": device}
    check(problem(**KINDS[kind], **sizes, **options), family, precision)


@each_family
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_without_biases_and_with_one_length(cell: str, family: str, device: str) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "bias": False}
    check(problem(cell, H=72, lengths=(6,), directions=2, **options), family, "bfloat16")
    check(problem(cell, H=72, lengths=(1, 1, 1), **options), family, "bfloat16")


def layers(
    cell: str,
    I: int,  # noqa: E741 the field's name for it
    H: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours, with the same weights."""
    name, *nonlinearity = cell.split("_")
    options: dict[str, Any] = {"nonlinearity": nonlinearity[0]} if nonlinearity else {}
    stock = getattr(nn, name.upper())(I, H, **options)
    ours = getattr(rnn_fused, name.upper())(I, H, **options)
    ours.load_state_dict(stock.state_dict())
    return stock.to(device, dtype), ours.to(device, dtype)


def module_results(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and the weights."""
    leaf = x.detach().requires_grad_()
    output = module(leaf)[0]
    gradients = torch.autograd.grad(output, [leaf, *module.parameters()], grad)
    names = ["input", *(name for name, _ in module.named_parameters())]
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


@each_family
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize(("cell", "H"), [("lstm", 64), ("gru", 264)])
def test_thousands_of_steps(cell: str, H: int, precision: str, family: str, device: str) -> None:
    """So many barriers, and no step lost."""
    dtype = PRECISIONS[precision]
    stock, ours = layers(cell, 16, H, dtype, device)
    x = torch.randn(5000, 4, 16, device=device, dtype=dtype)
    grad = torch.randn(5000, 4, H, device=device, dtype=dtype)
    theirs = module_results(stock, x, grad)
    with using(family, precision):
        results = module_results(ours, x, grad)
    exact = module_results(stock.double(), x.double(), grad.double())
    assert_as_accurate(results, theirs, exact)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("precision", ["bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_to_hand_off_changes_no_bit(cell: str, precision: str, reset: bool, device: str) -> None:
    """Nor where all sequences are reset: there no block waits for another's h."""
    T, B, H, dtype = 1000, 20, 520, PRECISIONS[precision]
    _, ours = layers(cell, 16, H, dtype, device)
    x = torch.randn(T, B, 16, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(T, B, H, device=device, dtype=dtype)
    resets = (torch.arange(T, device=device) % 9 > 0)[:, None].expand(T, B) if reset else None
    found = []
    for family in ("persistent", "handoff"):
        with using(family, precision):
            output = ours(x, resets=resets)[0]
            # Not the weights' gradients: torch's library may add up in another order.
            found.append((output, *torch.autograd.grad(output, x, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_more_elements_than_32_bits_count(device: str) -> None:
    if torch.cuda.get_device_properties(device).total_memory < 70e9:
        pytest.skip("needs 70 GB of device memory")
    T, B, H = 1100, 512, 1024  # 4*H*T*B > 2**31
    stock, ours = layers("lstm", 64, H, torch.bfloat16, device)
    x = torch.randn(T, B, 64, device=device, dtype=torch.bfloat16)
    grad = torch.randn(T, B, H, device=device, dtype=torch.bfloat16)
    theirs = module_results(stock, x, grad)
    results = module_results(ours, x, grad)
    for name, value in theirs.items():
        whole = value.dim() < 3
        parts = [(results[name], value)] if whole else zip(results[name], value, strict=True)
        assert max(error(a, b) for a, b in parts) < 3e-2, name


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32"])
def test_large_blocks_of_both_directions(cell: str, precision: str, device: str) -> None:
    sizes = {"T": 3, "B": 17, "I": 8, "H": 2100, "directions": 2}
    options = {"dtype": PRECISIONS[precision], "device": device}
    check(problem(cell, **sizes, **options), "persistent", precision)


# Which kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("H", "gpu"),
    [(768, "A100"), (1024, "A100"), (2048, "A100"), (2048, "H100"), (4096, "H100")],
)
def test_persistent_kernels_reach_their_sizes(
    cell: str, dtype: torch.dtype, H: int, gpu: str, device: str
) -> None:
    """Else every test of them could be skipped, and nobody the wiser."""
    here, least = torch.cuda.get_device_properties(device), GPUS[gpu]
    if (
        here.multi_processor_count < least.sm_count
        or here.shared_memory_per_block_optin < least.shared_per_block
    ):
        pytest.skip(f"needs as many SMs, and as much shared memory, as an {gpu} has")
    _, ours = layers(cell, H, H, dtype, device)
    with rnn_fused.kernels("persistent"):
        output = ours(torch.randn(8, 16, H, device=device, dtype=dtype))[0]
        output.backward(torch.ones_like(output))


def test_a_family_that_cannot_run_says_why(device: str) -> None:
    _, ours = layers("lstm", 8, 8, torch.float64, device)
    x = torch.randn(3, 2, 8, device=device, dtype=torch.float64)
    with (
        rnn_fused.kernels("persistent"),
        pytest.raises(RuntimeError, match=r"\[lstm\] .* cannot run this layer: .*float64"),
    ):
        ours(x)
    assert ours(x)[0].isfinite().all()


def test_cudnn_is_torchs_own(device: str) -> None:
    stock, ours = layers("gru", 16, 32, torch.float32, device)
    x = torch.randn(5, 3, 16, device=device)
    with rnn_fused.kernels("cudnn"):
        torch.testing.assert_close(ours(x)[0], stock(x)[0], rtol=0, atol=0)


def test_explain_names_the_kernels(device: str) -> None:
    for dtype, family in ((torch.bfloat16, None), (torch.float64, "stepwise")):
        _, ours = layers("lstm", 64, 64, dtype, device)
        text = rnn_fused.explain(ours, 100, 16)
        names = [family] if family else ["stepwise", "persistent", "cudnn"]
        assert any(name in text.lower() for name in names), text


@each_family
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_backward_pass_keeps_its_family(cell: str, family: str, device: str) -> None:
    case = problem(cell, T=6, B=5, H=64, dtype=torch.bfloat16, device=device)

    def gradients(inside: bool) -> tuple[Tensor, ...]:
        with using(family):
            output = case.run(ops.layer)[0]
            if inside:
                return torch.autograd.grad(output.sum(), case.tensors)
        return torch.autograd.grad(output.sum(), case.tensors)

    torch.testing.assert_close(gradients(False), gradients(True), rtol=0, atol=0)


# Bits ---------------------------------------------------------------------------------------------


@each_kind
@each_family
@each_precision
def test_repeats_bit_for_bit(kind: str, family: str, precision: str, device: str) -> None:
    sizes = {"T": 40, "B": 33, **layer_of(family)}
    options = {"directions": 2, "dtype": PRECISIONS[precision], "device": device}
    case = problem(**KINDS[kind], **sizes, **options)
    with using(family, precision):
        first = values_and_gradients(case, ops.layer)
        for _ in range(3):
            torch.testing.assert_close(values_and_gradients(case, ops.layer), first, rtol=0, atol=0)


# Streams and graphs -------------------------------------------------------------------------------

LAYER = {"I": 24, "H": 264}


def layer_of(family: str) -> dict[str, int]:
    """With no more units than a cluster can have."""
    return {**LAYER, "H": 248} if family == "cluster" else LAYER


def busy(device: str) -> None:
    """Some milliseconds of work on the current stream."""
    torch.cuda._sleep(20_000_000)
    a = torch.randn(2048, 2048, device=device)
    for _ in range(4):
        a = a @ a


@each_family
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_streams(family: str, packed: bool, device: str) -> None:
    """Kernels run on the current stream: what they read is written late on it, and other streams
    are busy."""
    lengths = (12, 12, 9, 2) if packed else None
    case = problem(
        "lstm", T=12, B=4, **layer_of(family), lengths=lengths, dtype=torch.bfloat16, device=device
    )
    with using(family):
        expected = values_and_gradients(case, ops.layer)
        late = case.map(lambda x: torch.full_like(x, torch.nan).requires_grad_())
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        busy(device)
        with torch.cuda.stream(side):
            busy(device)
            with torch.no_grad():
                for to, value in zip(late.tensors, case.tensors, strict=True):
                    to.copy_(value)
            actual = values_and_gradients(late, ops.layer)
        busy(device)
        side.synchronize()
    assert_same(actual, expected)


@each_family
def test_two_streams_at_once(family: str, device: str) -> None:
    """Two layers that run side by side do not meet in each other's barriers or scratch memory."""
    cases = [
        problem("gru", T=60, B=8, **layer_of(family), dtype=torch.float16, device=device)
        for _ in "ab"
    ]
    streams = [torch.cuda.Stream() for _ in cases]
    with using(family):
        expected = [values_and_gradients(case, ops.layer) for case in cases]
        torch.cuda.synchronize()
        for _ in range(5):
            actual = []
            for case, stream in zip(cases, streams, strict=True):
                with torch.cuda.stream(stream):
                    actual.append(values_and_gradients(case, ops.layer))
            torch.cuda.synchronize()
            for got, wanted in zip(actual, expected, strict=True):
                assert_same(got, wanted)


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the function, and the tensors that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@each_family
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward_and_backward"])
@pytest.mark.parametrize("lengths", [None, (20, 11, 11, 1)], ids=["dense", "packed"])
def test_graphs(
    kind: str, training: bool, family: str, lengths: tuple[int, ...] | None, device: str
) -> None:
    """A captured call, replayed on other numbers than those that it was captured with."""
    sizes = {"T": 20, "B": 4, **layer_of(family), "lengths": lengths, "directions": 2}
    case = problem(**KINDS[kind], **sizes, dtype=torch.bfloat16, device=device)

    def call() -> dict[str, Tensor]:
        if training:
            return values_on_device(case)
        with torch.no_grad():
            return {"output": case.run(ops.layer)[0]}

    with using(family):
        graph, results = captured(call)
        gc.collect()  # what the host held for the call is gone
        for _ in range(2):
            with torch.no_grad():
                for x in case.tensors:
                    x.copy_(torch.randn_like(x) * 0.1)
            graph.replay()
            torch.cuda.synchronize()
            replayed = {name: value.clone() for name, value in results.items()}
            assert_same(replayed, call())


@each_family
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_a_stream_in_a_graph(cell: str, family: str, device: str) -> None:
    """The state goes round inside the graph, through two layers."""
    kind = getattr(rnn_fused, cell.split("_")[0].upper())
    rnn = kind(16, 40, num_layers=2, device=device, dtype=torch.bfloat16)
    states = [torch.zeros(2, 3, 40, device=device, dtype=torch.bfloat16) for _ in range(2)]
    kept = states if cell == "lstm" else states[:1]
    x = torch.zeros(3, 16, device=device, dtype=torch.bfloat16)

    def step() -> Tensor:
        output, state = rnn.step(x, tuple(kept) if cell == "lstm" else kept[0])
        for old, new in zip(kept, state if cell == "lstm" else [state], strict=True):
            old.copy_(new)
        return output

    frames = torch.randn(12, 3, 16, device=device, dtype=torch.bfloat16)
    with using(family), torch.no_grad():
        graph, output = captured(step)
        for state in kept:
            state.zero_()
        found = []
        for frame in frames:
            x.copy_(frame)
            graph.replay()
            found.append(output.clone())
        expected = rnn(frames)[0]
    torch.testing.assert_close(torch.stack(found), expected, rtol=2e-2, atol=2e-2)


def values_on_device(case: Problem) -> dict[str, Tensor]:
    """The outputs, and the gradients of their sum: nothing of it comes from the host."""
    outputs = case.run(ops.layer)
    gradients = torch.autograd.grad(outputs, case.tensors, [torch.ones_like(o) for o in outputs])
    return {str(k): value for k, value in enumerate((*outputs, *gradients))}


# Devices and memory -------------------------------------------------------------------------------


@each_family
def test_another_device_than_the_current_one(family: str, device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = problem("lstm", T=9, B=4, **layer_of(family), dtype=torch.bfloat16, device="cuda:1")
    with using(family):
        with torch.cuda.device(0):
            actual = values_and_gradients(case, ops.layer)
        with torch.cuda.device(1):
            expected = values_and_gradients(case, ops.layer)
    assert {value.device.index for value in actual.values()} == {1}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_tensors_on_two_devices_are_an_error(device: str) -> None:
    case = problem("lstm", dtype=torch.float32, device=device, requires_grad=False)
    mixed = case.with_tensors([*case.tensors[:3], *(w.cpu() for w in case.tensors[3:])])
    with pytest.raises(RuntimeError, match=r"one device|same device"):
        mixed.run(ops.layer)


@each_family
def test_out_of_memory_leaves_the_module_usable(family: str, device: str) -> None:
    _, ours = layers("lstm", 256, 256, torch.bfloat16, device)
    large = torch.randn(400, 256, 256, device=device, dtype=torch.bfloat16)
    small = large[:4].clone()
    with using(family):
        expected = ours(small)[0].detach()
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        allowed = torch.cuda.memory_reserved() + 2**26  # the gates alone need 2**28 bytes
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        try:
            with pytest.raises(RuntimeError):
                ours(large)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        torch.testing.assert_close(ours(small)[0], expected, rtol=0, atol=0)
        ours(large)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_memory_comes_back(device: str) -> None:
    _, ours = layers("gru", 64, 128, torch.bfloat16, device)
    x = torch.randn(50, 16, 64, device=device, dtype=torch.bfloat16)

    def train() -> int:
        ours.zero_grad(set_to_none=True)
        ours(x)[0].sum().backward()
        ours.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    train()  # torch's libraries take a workspace of their own
    before = train()
    assert {train() for _ in range(5)} == {before}


# Layers in use ------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(family: str, backend: str, device: str) -> None:
    torch._dynamo.reset()
    _, ours = layers("lstm", 24, 64, torch.float32, device)
    x = torch.randn(7, 3, 24, device=device)
    grad = torch.randn(7, 3, 64, device=device)
    with using(family):
        expected = module_results(ours, x, grad)
        compiled = torch.compile(ours, fullgraph=True, backend=backend)
        output = compiled(x)[0]
        gradients = torch.autograd.grad(output, list(ours.parameters()), grad)
    torch.testing.assert_close(output, expected["output"])
    torch.testing.assert_close(list(gradients), list(expected.values())[2:])
    torch._dynamo.reset()


@each_family
def test_stacked_ragged_training_step(family: str, device: str) -> None:
    """Two layers, both directions, packed, through an optimizer, as torch.nn does it."""
    stock = nn.GRU(16, 64, 2, bidirectional=True).to(device)
    ours = rnn_fused.GRU(16, 64, 2, bidirectional=True).to(device)
    ours.load_state_dict(stock.state_dict())
    lengths = torch.tensor([5, 30, 17, 1])
    x = torch.randn(30, 4, 16, device=device)
    losses: list[list[Tensor]] = []
    with using(family):
        for module in (stock, ours):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            losses.append([])
            for _ in range(3):
                output, state = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
                loss = (output.data - 0.5).square().mean() + state.square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_cells(device: str) -> None:
    for name in ("LSTMCell", "GRUCell", "RNNCell"):
        stock = getattr(nn, name)(12, 20).to(device)
        ours = getattr(rnn_fused, name)(12, 20).to(device)
        ours.load_state_dict(stock.state_dict())
        x = torch.randn(5, 12, device=device)
        torch.testing.assert_close(ours(x), stock(x))


# Sanitizers ---------------------------------------------------------------------------------------

SELECTION = """
import torch
import rnn_fused

torch.manual_seed(0)
ran = []
for family in ("stepwise", "persistent", "handoff", "split", "cluster"):
    for name, dtype in (("LSTM", torch.bfloat16), ("GRU", torch.float32), ("RNN", torch.float16)):
        if (family, name) == ("split", "RNN"):
            continue  # it has one gate
        layer = getattr(rnn_fused, name)(5, 41, bidirectional=True, device="cuda", dtype=dtype)
        x = torch.randn(4, 3, 5, device="cuda", dtype=dtype, requires_grad=True)
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, [4, 2, 1])
        with rnn_fused.kernels(family):
            for given in (x, packed):
                output = layer(given)[0]
                getattr(output, "data", output).sum().backward()
        ran.append(f"{family} {name}")
torch.cuda.synchronize()
print("ran", len(ran))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str, device: str) -> None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = shutil.which("compute-sanitizer", path=f"{home}/bin{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip("needs compute-sanitizer")
    command = [path, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SELECTION]
    # Without torch's caching, what lies outside a tensor is outside an allocation, too.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=150, check=False
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ran 14" in done.stdout

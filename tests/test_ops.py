"""The fused op: values and gradients in every dtype, layouts, checks, autocast, other devices."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    KINDS,
    NOISE,
    Problem,
    assert_accurate,
    assert_agrees_with_reference,
    each_kind,
    each_layout,
    problem,
    threads,
    values_and_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rnn_fused
from rnn_fused import library, ops, reference
from rnn_fused.ops import LayerWeights

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@each_kind
@each_dtype
@pytest.mark.parametrize("lengths", [None, (9, 9, 5, 4, 1)], ids=["dense", "packed"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_accuracy(
    kind: str,
    dtype: torch.dtype,
    lengths: tuple[int, ...] | None,
    directions: int,
    bias: bool,
    device: str,
) -> None:
    sizes = {"T": 9, "B": 5, "I": 12, "H": 20, "lengths": lengths}
    options = {"directions": directions, "bias": bias, "dtype": dtype, "device": device}
    assert_accurate(problem(**KINDS[kind], **sizes, **options))


@each_kind
@each_dtype
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (1, 7, 5, 3), (7, 1, 3, 13), (2, 17, 1, 31), (5, 2, 67, 1), (3, 37, 19, 41)],
    ids=str,
)
def test_odd_shapes(
    kind: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: str,
    pytestconfig: pytest.Config,
) -> None:
    sizes = dict(zip(("T", "B", "I", "H"), shape, strict=True))
    arguments = KINDS[kind]
    if sizes["H"] == 1:  # leaves no room for a projection
        arguments = {"cell": arguments["cell"]}
    noise = NOISE[dtype] * torch.finfo(dtype).eps
    if pytestconfig.getoption("--emulated-cuda") and sizes["B"] * sizes["H"] == 1:
        noise *= 4  # as test_cuda.py has it: one rounding is not averaged away, torch may be lucky
    assert_accurate(problem(**arguments, **sizes, dtype=dtype, device=device), noise)


@each_dtype
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_long_and_wide(cell: str, dtype: torch.dtype, device: str) -> None:
    assert_accurate(problem(cell, T=70, B=3, I=40, H=136, dtype=dtype, device=device))


SIZE = st.integers(1, 19)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    T=SIZE,
    B=SIZE,
    I=SIZE,
    H=st.integers(3, 40),
    two=st.booleans(),
)
def test_any_shape(kind: str, T: int, B: int, I: int, H: int, two: bool) -> None:  # noqa: E741
    case = problem(**KINDS[kind], T=T, B=B, I=I, H=H, directions=1 + two)
    assert_agrees_with_reference(case)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    lengths=st.lists(SIZE, min_size=1, max_size=19),
    H=st.integers(3, 40),
    two=st.booleans(),
)
def test_any_lengths(kind: str, lengths: list[int], H: int, two: bool) -> None:
    lengths = sorted(lengths, reverse=True)
    case = problem(**KINDS[kind], H=H, lengths=lengths, directions=1 + two)
    assert_agrees_with_reference(case)


# Large enough to be divided among threads: by sequences, and by hidden units.
DIVIDED = {
    "sequences": {"T": 40, "B": 5, "H": 64},
    "packed_sequences": {"lengths": (50, 41, 41, 30, 1), "H": 64},
    "units": {"T": 6, "B": 1, "H": 256},
}


@each_kind
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("sizes", DIVIDED)
@pytest.mark.parametrize("count", [2, 3])
def test_threads(kind: str, directions: int, sizes: str, count: int) -> None:
    case = problem(**KINDS[kind], **DIVIDED[sizes], directions=directions)
    with threads(count):
        assert_agrees_with_reference(case)
        first = values_and_gradients(case, ops.layer)
        torch.testing.assert_close(values_and_gradients(case, ops.layer), first, rtol=0, atol=0)


@each_kind
def test_empty_batch(kind: str, device: str) -> None:
    assert_agrees_with_reference(problem(**KINDS[kind], B=0, directions=2, device=device))


@each_kind
def test_without_a_state_it_begins_with_zeros(kind: str, device: str) -> None:
    case = problem(**KINDS[kind], directions=2, resets=0.3, device=device)
    absent = replace(case, hx=None, cx=None)
    states = {name: getattr(case, name) for name in ("hx", "cx")}
    zeros = {name: None if s is None else torch.zeros_like(s) for name, s in states.items()}

    def run(case: Problem) -> list[Tensor]:
        outputs = case.run(ops.layer)
        loss = sum(o.square().sum() for o in outputs)
        return [*outputs, *torch.autograd.grad(loss, absent.tensors)]

    torch.testing.assert_close(run(absent), run(replace(case, **zeros)), rtol=0, atol=0)


@each_kind
@each_layout
def test_equal_lengths_make_a_dense_batch(
    kind: str, lengths: tuple[int, ...] | None, device: str
) -> None:
    dense = problem(**KINDS[kind], directions=2, device=device)
    T, B = dense.input.shape[:2]
    packed = replace(dense, input=dense.input.flatten(0, 1), batch_sizes=torch.full((T,), B))
    for name, value in values_and_gradients(packed, ops.layer).items():
        expected = values_and_gradients(dense, ops.layer)[name]
        torch.testing.assert_close(value.reshape(expected.shape), expected)


def call_op(case: Problem, save: bool) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return library.layer_forward(*case.op_arguments, save, save)


@each_kind
@each_layout
@each_dtype
def test_saving_does_not_change_the_outputs(
    kind: str, lengths: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    case = problem(**KINDS[kind], H=11, lengths=lengths, directions=2, dtype=dtype)
    *lean, no_gates, no_cells = call_op(case, save=False)
    *outputs, gates, cells = call_op(case, save=True)
    torch.testing.assert_close(lean, outputs, rtol=0, atol=0)
    assert no_gates.shape == no_cells.shape == (0,)
    rows = case.input.shape[:-1].numel()
    assert gates.shape == ((0,) if kind.startswith("rnn") else (2, rows, 4, 11))
    assert cells.shape == ((2, rows, 11) if case.cell == "lstm" else (0,))
    assert cells.dtype == (dtype if dtype.itemsize > 2 else torch.float32)


def test_saved_state_of_the_lstm() -> None:
    case = problem("lstm", directions=1)
    output, _, _, gates, cells = call_op(case, save=True)
    i, f, g, o = gates[0].unbind(1)
    before = torch.cat([case.cx[0], cells[0, : -case.hx.shape[1]]])
    torch.testing.assert_close(cells[0], f * before + i * g)
    torch.testing.assert_close(output.flatten(0, 1), o * cells[0].tanh())


def test_saved_state_of_the_gru() -> None:
    case = problem("gru", directions=1)
    output, _, _, gates, _ = call_op(case, save=True)
    r, z, n, h_n = gates[0].unbind(1)
    before = torch.cat([case.hx, output[:-1]]).flatten(0, 1)
    torch.testing.assert_close(output.flatten(0, 1), (1 - z) * n + z * before)
    H = case.hx.shape[-1]
    weight, bias = case.weights.weight_hh[0], case.weights.bias_hh[0]
    torch.testing.assert_close(h_n, before @ weight[2 * H :].T + bias[2 * H :])
    x = torch.nn.functional.linear(
        case.input.flatten(0, 1), case.weights.weight_ih[0], case.weights.bias_ih[0]
    )
    torch.testing.assert_close(n, (x[:, 2 * H :] + r * h_n).tanh())


class Calls(TorchDispatchMode):
    """Records the arguments of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rnn_fused":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.own_ops
@each_kind
def test_saves_only_where_a_gradient_is_needed(kind: str) -> None:
    case = problem(**KINDS[kind])
    constant = case.map(torch.Tensor.detach)
    with Calls() as mode:
        case.run(ops.layer)
        constant.run(ops.layer)
        with torch.no_grad():
            case.run(ops.layer)
    assert [args[-2:] for _, args in mode.calls] == [(True, True), (False, False), (False, False)]


@pytest.mark.own_ops
def test_computes_only_the_gradients_that_are_needed() -> None:
    case = problem("lstm", requires_grad=False)
    case.weights.bias_hh[0].requires_grad_()
    with Calls() as mode:
        case.run(ops.layer)[0].sum().backward()
    assert mode.calls[1][1][-3:] == (False, False, True)


def test_inference_mode() -> None:
    case = problem("lstm")
    with torch.inference_mode():
        outputs = case.run(ops.layer)
    assert not any(o.requires_grad for o in outputs)
    torch.testing.assert_close([*outputs], [o.detach() for o in case.run(reference.layer)])


@each_kind
@each_dtype
@each_layout
def test_repeats_bit_for_bit(
    kind: str, dtype: torch.dtype, lengths: tuple[int, ...] | None, device: str
) -> None:
    sizes = {"T": 12, "B": 18, "I": 24, "H": 48, "lengths": lengths}
    case = problem(**KINDS[kind], **sizes, directions=2, dtype=dtype, device=device)
    first = values_and_gradients(case, ops.layer)
    for _ in range(3):
        torch.testing.assert_close(values_and_gradients(case, ops.layer), first, rtol=0, atol=0)


@each_kind
@each_layout
def test_views(kind: str, lengths: tuple[int, ...] | None, device: str) -> None:
    """Each argument in turn lies inside a larger storage: further on, and then strided as well."""
    case = problem(**KINDS[kind], lengths=lengths, directions=2, device=device)
    for which in range(len(case.tensors)):
        for dim in (0, -1):
            views = [x.detach() for x in case.tensors]
            view = torch.stack([torch.full_like(views[which], torch.nan), views[which]], dim)
            views[which] = view.select(dim, 1)
            assert_agrees_with_reference(case.with_tensors(x.requires_grad_() for x in views))


@each_kind
def test_strided_gradients(kind: str, device: str) -> None:
    case = problem(**KINDS[kind], device=device)
    expected = torch.autograd.grad(case.run(reference.layer)[0].sum(), case.tensors)
    output = case.run(ops.layer)[0]
    torch.testing.assert_close(torch.autograd.grad(output.sum(), case.tensors), expected)
    output = case.run(ops.layer)[0]
    ones = torch.ones(output.shape[::-1]).to(output).permute(2, 1, 0)
    torch.testing.assert_close(torch.autograd.grad(output, case.tensors, ones), expected)


@each_kind
@pytest.mark.parametrize("which", [0, 1, -1])
def test_each_output_alone(kind: str, which: int, device: str) -> None:
    case = problem(**KINDS[kind], directions=2, device=device)

    def gradients(layer: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            case.run(layer)[which].sum(), case.tensors, materialize_grads=True
        )

    torch.testing.assert_close(gradients(ops.layer), gradients(reference.layer))


@each_kind
def test_each_gradient_alone(kind: str, device: str) -> None:
    case = problem(**KINDS[kind], directions=2, device=device, requires_grad=False)
    for tensor in case.tensors:
        tensor.requires_grad_()
        ours, expected = (
            torch.autograd.grad(case.run(layer)[0].sum(), tensor, materialize_grads=True)
            for layer in (ops.layer, reference.layer)
        )
        torch.testing.assert_close(ours, expected)
        tensor.requires_grad_(False)


# Mistakes: what is changed, and what the message must say.


def test_unknown_cell() -> None:
    with pytest.raises(ValueError, match=r"cell must be one of .*, got 'peephole'"):
        replace(problem("lstm"), cell="peephole").run(ops.layer)


def swap(case: Problem, **fields: Tensor) -> Problem:
    pairs = {name: (tensor,) for name, tensor in fields.items()}
    return replace(case, weights=case.weights._replace(**pairs))


MISTAKES = {
    "input_dim": (lambda p: replace(p, input=torch.ones(2, 3)), r"3 dimensions \[T, B, I\], got 2"),
    "hx": (lambda p: replace(p, hx=torch.ones(1, 5, 4)), r"hx .*\[1, 2, 4\], got \[1, 5, 4\]"),
    "cx": (lambda p: replace(p, cx=torch.ones(1, 2, 5)), r"cx .*\[1, 2, 4\], got \[1, 2, 5\]"),
    "no_cx": (lambda p: replace(p, cx=None), "cx must be given"),
    "no_hx": (lambda p: replace(p, hx=None), "hx must be given with cx"),
    "packed_without_hx": (
        lambda p: replace(p, input=p.input[0], hx=None, cx=None, batch_sizes=torch.tensor([2])),
        "hx must be given with batch_sizes",
    ),
    "weight_ih": (
        lambda p: swap(p, weight_ih=torch.ones(16, 7)),
        r"\[lstm\] weight_ih must have shape \[G\*H, I\] = \[16, 3\], got \[16, 7\]",
    ),
    "weight_hh": (
        lambda p: swap(p, weight_hh=torch.ones(16, 2)),
        r"\[lstm\] weight_hh must have shape \[G\*H, P\] = \[16, 4\], got \[16, 2\]",
    ),
    "bias": (lambda p: swap(p, bias_hh=torch.ones(4)), r"bias_hh .*\[16\], got \[4\]"),
    "weight_hr": (lambda p: swap(p, weight_hr=torch.ones(4, 4)), "less than the hidden size"),
    "dtype": (lambda p: replace(p, hx=p.hx.double()), "hx must have the dtype of input"),
    "integers": (lambda p: p.to(torch.int64), "must be float32, float64, bfloat16 or float16"),
    "no_steps": (lambda p: replace(p, input=torch.ones(0, 2, 3)), "at least 1 timestep, got 0"),
    "batch_sizes": (
        lambda p: replace(p, input=torch.ones(3, 3), batch_sizes=torch.tensor([2, 2])),
        "sum to no more than the rows of input, 3, got more at timestep 1",
    ),
    "increasing": (
        lambda p: replace(p, input=torch.ones(3, 3), batch_sizes=torch.tensor([1, 2])),
        "increase, got 2 at timestep 1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    change, message = MISTAKES[mistake]
    case = change(problem("lstm", dtype=torch.float32, requires_grad=False))
    with pytest.raises(RuntimeError, match=message):
        case.run(ops.layer)


@pytest.mark.own_ops
@pytest.mark.parametrize(
    ("mistake", "device", "message"),
    [
        ("no_hx", "cpu", "cx must be absent where hx is"),
        ("packed_without_hx", "cpu", "hx must be given with batch_sizes"),
        ("packed_without_hx", "meta", "hx must be given with batch_sizes"),
    ],
)
def test_the_op_checks_for_the_state(mistake: str, device: str, message: str) -> None:
    change, _ = MISTAKES[mistake]
    case = change(problem("lstm", dtype=torch.float32, requires_grad=False)).to(device)
    with pytest.raises(RuntimeError, match=message):
        library.layer_forward(*case.op_arguments, False, False)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(kind: str, dtype: torch.dtype, device: str) -> None:
    case = problem(**KINDS[kind], dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=dtype):
        outputs = case.run(ops.layer)
    low = case.to(dtype)
    expected = low.run(ops.layer)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    gradients = torch.autograd.grad(outputs[0].sum(), case.tensors, materialize_grads=True)
    expected = torch.autograd.grad(expected[0].sum(), low.tensors, materialize_grads=True)
    torch.testing.assert_close(gradients, tuple(g.float() for g in expected), rtol=0, atol=0)


def test_autocast_leaves_float64(device: str) -> None:
    case = problem("lstm", device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert case.run(ops.layer)[0].dtype == torch.float64


@pytest.mark.own_ops
@each_kind
@pytest.mark.parametrize(
    "layout", [{}, {"lengths": (3, 2, 2)}, {"state": False}], ids=["dense", "packed", "no_state"]
)
def test_meta_tensors(kind: str, layout: dict[str, Any]) -> None:
    case = problem(**KINDS[kind], **layout, directions=2)
    real = values_and_gradients(case, ops.layer)
    meta = values_and_gradients(case.to("meta"), ops.layer)
    assert {k: v.shape for k, v in meta.items()} == {k: v.shape for k, v in real.items()}
    assert all(value.is_meta for value in meta.values())


@each_kind
@each_layout
def test_devices_without_kernels_run_torch(
    kind: str, lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(**KINDS[kind], lengths=lengths, directions=2, bias=kind != "gru")
    expected = values_and_gradients(case, reference.layer)
    monkeypatch.setattr(ops.families, "has_kernels", lambda *_: False)
    ops._warn_unfused.cache_clear()
    with pytest.warns(UserWarning, match="no kernels for cpu"):
        actual = values_and_gradients(case, ops.layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # once is enough
        case.run(ops.layer)
    torch.testing.assert_close(actual, expected)


def test_missing_library_is_explained(tmp_path: Path) -> None:
    copy = tmp_path / "library.py"
    copy.write_text(Path(library.__file__).read_text())
    spec = importlib.util.spec_from_file_location("rnn_fused.library_alone", copy)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"cannot load its op library .*libops\.so"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.own_ops
def test_weight_gradients_stay_accurate_over_many_rows() -> None:
    """Gradients of one sign, summed over 10^5 rows: a chain in float32 would lose three digits."""
    steps, batch = 200, 500
    stock = torch.nn.RNN(1, 2, nonlinearity="relu")
    ours = rnn_fused.RNN(1, 2, nonlinearity="relu")
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(0.2 * torch.rand_like(parameter))
    ours.load_state_dict(stock.state_dict())
    exact = torch.nn.RNN(1, 2, nonlinearity="relu").double()
    exact.load_state_dict(stock.state_dict())
    x = torch.rand(steps, batch, 1)
    for layer, sequence in ((stock, x), (ours, x), (exact, x.double())):
        layer(sequence)[0].sum().backward()
    for name, parameter in exact.named_parameters():
        error = relative_error(ours.get_parameter(name).grad, parameter.grad)
        assert error <= 2 * relative_error(stock.get_parameter(name).grad, parameter.grad) + 1e-6


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.own_ops
@pytest.mark.parametrize("module", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_tensors_on_meta_beside_the_cpu_are_an_error(module: str) -> None:
    layer = getattr(rnn_fused, module)(4, 8, device="meta")
    with pytest.raises(RuntimeError, match=r"same device|one device"):
        layer(torch.randn(5, 4))


def test_one_bias_without_the_other_is_an_error() -> None:
    weights = LayerWeights((torch.randn(12, 3),), (torch.randn(12, 4),), (), (torch.randn(12),), ())
    with pytest.raises(RuntimeError, match="both or neither"):
        ops.layer(torch.randn(2, 1, 3), torch.zeros(1, 1, 4), None, weights, cell="gru")


def test_out_of_memory_has_the_type_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 20\.00 GiB"):
        library.run(fail)


@pytest.mark.own_ops
def test_out_of_memory_says_so() -> None:
    """The message is torch's own; nothing is allocated before it fails."""
    x = torch.empty(1, 1, 1).expand(10**6, 10**6, 1)  # to be made contiguous: 4 TB
    with pytest.raises(RuntimeError, match="allocate"):
        rnn_fused.LSTM(1, 64)(x)

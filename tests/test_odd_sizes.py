"""Sizes, layouts and values at the edges: 1, primes, 10^5 steps, nothing at all; tensors that are
views, overlap or are not aligned; NaN, infinities, huge and subnormal numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    KINDS,
    Problem,
    assert_agrees_with_reference,
    each_kind,
    problem,
    torch_layer,
    values_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn_fused
from rnn_fused import ops, reference

# Constructor arguments beyond the sizes. Of torch.nn and of ours.
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
each_module = pytest.mark.parametrize("kind", MODULES)


def pair(
    kind: str,
    I: int = 3,  # noqa: E741
    H: int = 5,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours, with the same weights."""
    name, more = MODULES[kind]
    stock = getattr(nn, name)(I, H, dtype=dtype, **more, **options)
    ours = getattr(rnn_fused, name)(I, H, dtype=dtype, **more, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def flatten(results: Any) -> list[Tensor]:
    if isinstance(results, PackedSequence):
        return [results.data]
    if isinstance(results, Tensor):
        return [results]
    return [tensor for result in results for tensor in flatten(result)]


def run(module: nn.Module, x: Tensor, *args: Any, of: Callable[[Tensor], Any] | None = None) -> Any:
    """Outputs, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    outputs = flatten(module(x if of is None else of(x), *args))
    loss = sum(o.sum() + o.square().sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])]


# ---------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------

ODD = st.sampled_from((1, 2, 3, 5, 7, 11, 13))


@given(
    kind=st.sampled_from(sorted(KINDS)),
    T=ODD,
    B=ODD,
    I=st.sampled_from((0, 1, 2, 17)),
    H=st.sampled_from((1, 3, 7, 31, 37)),
    two=st.booleans(),
    resets=st.booleans(),
    lengths=st.none() | st.lists(ODD, min_size=1, max_size=5),
)
def test_sizes_that_nothing_divides(
    kind: str,
    T: int,
    B: int,
    I: int,  # noqa: E741
    H: int,
    two: bool,
    resets: bool,
    lengths: list[int] | None,
) -> None:
    arguments = KINDS[kind] if H > 2 else {"cell": KINDS[kind]["cell"]}  # room for a projection
    case = problem(
        **arguments,
        T=T,
        B=B,
        I=I,
        H=H,
        directions=1 + two,
        lengths=None if lengths is None else sorted(lengths, reverse=True),
        resets=0.3 if resets else None,
        reset_state=resets,
    )
    assert_agrees_with_reference(case)


@each_module
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_batch_of_no_sequences(kind: str, bidirectional: bool, layers: int) -> None:
    stock, ours = pair(kind, bidirectional=bidirectional, num_layers=layers)
    x = torch.randn(4, 0, 3, dtype=torch.float64)
    for expected, got in zip(run(stock, x), run(ours, x), strict=True):
        torch.testing.assert_close(got, expected)
    if not bidirectional:
        output, state = ours.step(x[0])
        assert output.shape == (0, flatten(ours(x))[0].shape[2])
        assert ours.step(x[1], state)[0].shape == output.shape
    resets = torch.zeros(4, 0, dtype=torch.bool)
    assert flatten(ours(x, None, resets=resets))[0].shape[:2] == (4, 0)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_of_no_sequences(kind: str) -> None:
    stock, ours = getattr(nn, kind)(3, 5), getattr(rnn_fused, kind)(3, 5)
    for expected, got in zip(
        run(stock, torch.randn(0, 3)), run(ours, torch.randn(0, 3)), strict=True
    ):
        assert got.shape == expected.shape
        assert got.eq(0).all()


@each_module
@pytest.mark.parametrize("shape", [(0, 2, 3), (0, 0, 3), (0, 3)], ids=str)
def test_no_timestep_is_the_error_of_torch(kind: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.float64)
    for module in pair(kind):
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
            module(x)


@each_module
@pytest.mark.parametrize(
    "lengths", [(1,), (7,), (1, 1, 1), (5, 5), (1, 11, 1), (2, 3, 1, 13)], ids=str
)
def test_packed_lengths(kind: str, lengths: tuple[int, ...]) -> None:
    x = torch.randn(max(lengths), len(lengths), 3, dtype=torch.float64)

    def pack(x: Tensor) -> PackedSequence:
        return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)

    stock, ours = pair(kind, bidirectional=True)
    for expected, got in zip(run(stock, x, of=pack), run(ours, x, of=pack), strict=True):
        torch.testing.assert_close(got, expected)


# ---------------------------------------------------------------------------------------------
# 10^5 timesteps
# ---------------------------------------------------------------------------------------------

STEPS = 100_000
CHUNKS = 250


@pytest.mark.own_ops  # minutes under emulation
@each_module
def test_a_long_sequence_is_its_chunks_and_they_are_right(kind: str) -> None:
    """Forward and backward pass of 10^5 steps, against the same in chunks, whose states and
    gradients are handed on; and the chunks, as the sequences of one batch, against torch.nn, which
    would take minutes for the whole."""
    stock, ours = pair(kind, I=2, H=3)
    parameters = list(ours.parameters())
    x = torch.randn(STEPS, 1, 2, dtype=torch.float64, requires_grad=True)
    output, _ = ours(x)
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, [x, *parameters], upstream)
    assert all(gradient.isfinite().all() for gradient in gradients)

    pieces, state = [], None
    for part in x.detach().split(STEPS // CHUNKS):
        inputs = part.requires_grad_(), state
        piece, after = ours(*inputs)
        pieces.append((inputs, piece, flatten(after)))
        begin = [s.detach().requires_grad_() for s in flatten(after)]
        state = tuple(begin) if len(begin) == 2 else begin[0]
    assert torch.equal(output, torch.cat([piece for _, piece, _ in pieces]))

    ending = [torch.zeros_like(s) for s in pieces[-1][2]]  # the gradients of the states at an end
    totals = [torch.zeros_like(p) for p in parameters]
    begins, ends, of_input = [], [], []
    for ((part, state), piece, after), up in reversed(
        list(zip(pieces, upstream.split(STEPS // CHUNKS), strict=True))
    ):
        before = [] if state is None else flatten(state)
        grads = torch.autograd.grad(
            [piece, *after], [part, *parameters, *before], [up, *ending], allow_unused=True
        )
        ends.append((after, ending))
        begins.append(before or [torch.zeros_like(s) for s in after])
        of_input.append(grads[0])
        for total, gradient in zip(totals, grads[1:], strict=False):
            total += gradient
        ending = list(grads[1 + len(parameters) :])
        begins[-1] = [begins[-1], ending]
    begins, ends, of_input = begins[::-1], ends[::-1], of_input[::-1]
    for whole, part in zip(gradients, [torch.cat(of_input), *totals], strict=True):
        torch.testing.assert_close(whole, part)

    def batch(tensors: Any) -> Tensor:
        return torch.cat(list(tensors), dim=1)

    states = range(len(ends[0][0]))
    hx = [batch(begin[0][k] for begin in begins).detach().requires_grad_() for k in states]
    x = batch(part for (part, _), _, _ in pieces).detach().requires_grad_()
    up = batch(upstream.split(STEPS // CHUNKS))
    expected, after = stock(x, tuple(hx) if len(hx) == 2 else hx[0])
    torch.testing.assert_close(batch(piece for _, piece, _ in pieces), expected)
    for k in states:
        torch.testing.assert_close(batch(end[0][k] for end in ends), flatten(after)[k])
    exact = torch.autograd.grad(
        [expected, *flatten(after)],
        [x, *stock.parameters(), *hx],
        [up, *(batch(end[1][k] for end in ends) for k in states)],
    )
    torch.testing.assert_close(batch(of_input), exact[0])
    for got, gradient in zip(totals, exact[1:], strict=False):
        torch.testing.assert_close(got, gradient)
    for k in states:  # of the first chunk the state is not the caller's
        got = batch(begin[1][k] for begin in begins[1:])
        torch.testing.assert_close(got, exact[1 + len(parameters) + k][:, 1:])


@pytest.mark.own_ops
@each_module
def test_two_long_directions_are_one_each(kind: str) -> None:
    _, both = pair(kind, I=2, H=3, bidirectional=True)
    x = torch.randn(STEPS, 1, 2, dtype=torch.float64)
    results = run(both, x)
    weights = both.state_dict()
    for suffix, flipped in (("", False), ("_reverse", True)):
        _, one = pair(kind, I=2, H=3)
        one.load_state_dict({name: weights[name + suffix] for name in one.state_dict()})
        output = one(x.flip(0) if flipped else x)[0]
        P = output.shape[2]
        expected = results[0][..., P:] if flipped else results[0][..., :P]
        assert torch.equal(output.flip(0) if flipped else output, expected)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.own_ops
@each_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_the_last_step_reaches_back_or_vanishes(
    kind: str, dtype: torch.dtype
) -> None:
    _, ours = pair(kind, I=1, H=3, dtype=dtype)
    x = torch.randn(STEPS, 1, 1, dtype=dtype, requires_grad=True)
    gradients = torch.autograd.grad(ours(x)[0][-1].sum(), [x, *ours.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][-1].ne(0).all()
    if kind != "rnn_relu":
        assert gradients[0][0].eq(0).all()


# ---------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------


def misaligned(x: Tensor) -> Tensor:
    """Begins one element behind a boundary of 64 bytes."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def with_gaps(x: Tensor) -> Tensor:
    return torch.full((*x.shape, 2), float("nan"), dtype=x.dtype)[..., 0].copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def overlapping(x: Tensor) -> Tensor:
    """Every element beside its neighbour along every axis."""
    size = sum(n - 1 for n in x.shape) + 1
    return torch.randn(max(size, 1), dtype=x.dtype).as_strided(x.shape, (1,) * x.dim())


LAYOUTS = [Tensor.contiguous, misaligned, with_gaps, transposed, expanded, overlapping]


@settings(max_examples=20)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    H=st.sampled_from((3, 8, 16)),
    B=st.sampled_from((1, 2, 5)),
    two=st.booleans(),
    packed=st.booleans(),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=24, max_size=24),
)
def test_layouts_do_not_matter(
    kind: str,
    dtype: torch.dtype,
    H: int,
    B: int,
    two: bool,
    packed: bool,
    layouts: list[Callable[[Tensor], Tensor]],
) -> None:
    """The same bits as from contiguous tensors, of values and gradients; nothing is written to."""
    lengths = [4, 4, 3, 2, 1][:B] if packed else None
    sizes = {"T": 4, "B": B, "I": 3, "H": H, "directions": 1 + two, "lengths": lengths}
    case = problem(**KINDS[kind], **sizes, resets=0.3, reset_state=True, dtype=dtype)
    rest = iter(layouts)
    case = case.map(lambda x: next(rest, Tensor.contiguous)(x.detach()).requires_grad_())
    plain = case.map(lambda x: x.detach().clone(memory_format=torch.contiguous_format))
    plain = plain.map(Tensor.requires_grad_)
    assert case.resets is not None
    case = replace(case, resets=case.resets.t().contiguous().t() if not packed else case.resets)
    before = [x.detach().clone() for x in case.tensors]

    def results(case: Problem, layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
        outputs = case.run(ops.layer)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        if layout in (expanded, overlapping):  # other values
            layout = misaligned
        gradients = torch.autograd.grad(outputs, case.tensors, [layout(g) for g in grads])
        return [*outputs, *gradients]

    for got, expected in zip(
        results(case, layouts[-1]), results(plain, Tensor.contiguous), strict=True
    ):
        assert torch.equal(got, expected)
    assert all(torch.equal(x, y) for x, y in zip(case.tensors, before, strict=True))


@settings(max_examples=20)
@given(
    kind=st.sampled_from(sorted(KINDS)), wanted=st.lists(st.booleans(), min_size=16, max_size=16)
)
def test_any_of_the_tensors_may_want_a_gradient(kind: str, wanted: list[bool]) -> None:
    case = problem(**KINDS[kind], directions=2, resets=0.3, reset_state=True)
    every = values_and_gradients(case, ops.layer)
    flags = iter(wanted)
    some = case.map(lambda x: x.detach().requires_grad_(next(flags, True)))
    outputs = some.run(ops.layer)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    needed = [x for x in some.tensors if x.requires_grad]
    gradients = iter(torch.autograd.grad(outputs, needed, grads) if needed else ())
    for k, x in enumerate(some.tensors):
        if x.requires_grad:
            assert torch.equal(next(gradients), every[f"gradient {k}"]), k
    assert all(o.requires_grad == bool(needed) for o in outputs)


@each_module
def test_a_gradient_finds_its_way_through_views(kind: str) -> None:
    """One leaf is the input and, in part, the state."""
    stock, ours = pair(kind, I=2, H=5, batch_first=True)
    H = [2 if kind == "lstm_proj" else 5, 5][: 1 + kind.startswith("lstm")]
    gradients = []
    for module in (stock, ours):
        leaf = torch.linspace(-1, 1, 4 * 7 * 4, dtype=torch.float64).view(4, 7, 4).requires_grad_()
        x = leaf[1:, :, ::2]
        state = [leaf.flatten()[1 : 1 + 3 * n].view(1, 3, n) for n in H]
        output, _ = module(x, tuple(state) if len(H) == 2 else state[0])
        (output.square().sum() + leaf.sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------

VALUES = [float("nan"), float("inf"), -float("inf"), 1e30, 3e38, 1e-40]


def values_of_passes(case: Problem, layer: Callable[..., Any], grad: float) -> list[Tensor]:
    outputs = case.run(layer)
    grads = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(o) for o in outputs]
    grads[0].view(-1)[1] = grad
    return [*outputs, *torch.autograd.grad(outputs, case.tensors, grads)]


@each_kind
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_go_where_they_go_in_torch(kind: str, value: float, dtype: torch.dtype) -> None:
    """One of them at a time in the input, each state, each weight, and the output's gradient."""
    if kind == "rnn_relu" and value == 3e38 and dtype == torch.float32:
        pytest.skip("whether a sum overflows depends on its order")
    sizes = {"T": 4, "B": 3, "I": 3, "H": 5, "directions": 2}
    plain = problem(**KINDS[kind], **sizes, dtype=dtype)
    for place in range(len(plain.tensors) + 1):
        tensors = [x.detach().clone() for x in plain.tensors]
        if place < len(tensors):
            tensors[place].view(-1)[tensors[place].numel() // 2] = value
        case = plain.with_tensors(x.requires_grad_() for x in tensors)
        grad = value if place == len(tensors) else 0.5
        ours, theirs = (values_of_passes(case, layer, grad) for layer in (ops.layer, torch_layer))
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a, b = a.detach(), b.detach()
            if place == len(tensors) and kind == "gru":
                # dn is dh (1 - z) here and dh - z dh in torch: infinite, where that is NaN.
                a, b = (x.where(x.isfinite(), torch.nan) for x in (a, b))
            scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
            tolerance = 64 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                *(a, b),
                rtol=tolerance,
                atol=tolerance * max(1.0, scale),
                equal_nan=True,
                msg=lambda message, k=k, place=place: f"result {k}, place {place}: {message}",
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_subnormal_numbers_are_kept(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 16
    case = problem("rnn_relu", T=3, B=2, I=3, H=5, bias=False, dtype=dtype)
    case = replace(case, input=case.input.detach().abs() * tiny, hx=case.hx.detach().abs() * tiny)
    output = case.run(ops.layer)[0]
    expected = case.run(reference.layer)[0]
    assert output.max() > 0
    torch.testing.assert_close(output / tiny, expected / tiny, rtol=1e-5, atol=1e-4)

"""Resets of the state inside a sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    KINDS,
    assert_accurate,
    assert_agrees_with_reference,
    each_kind,
    each_layout,
    problem,
    values_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import tensors
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn_fused
from rnn_fused import library, ops, reference

ROUNDING: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}


@each_kind
@each_layout
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("reset_state", [False, True], ids=["to zero", "to a state"])
def test_values_and_gradients(
    kind: str, lengths: tuple[int, ...] | None, directions: int, reset_state: bool, device: str
) -> None:
    options = {"resets": 0.4, "reset_state": reset_state, "directions": directions}
    sizes = {"T": 9, "B": 5, "H": 20, "lengths": lengths and (9, 7, 7, 3, 1)}
    case = problem(**KINDS[kind], **sizes, **options, device=device)
    assert_agrees_with_reference(case, **ROUNDING)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from([*KINDS]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    probability=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    H=st.integers(3, 40),
    two=st.booleans(),
    state=st.booleans(),
)
def test_any_resets(
    kind: str,
    lengths: list[int],
    probability: float,
    H: int,
    two: bool,
    state: bool,
) -> None:
    lengths.sort(reverse=True)
    options = {"resets": probability, "reset_state": state, "directions": 1 + two}
    case = problem(**KINDS[kind], H=H, lengths=lengths, **options)
    assert_agrees_with_reference(case, **ROUNDING)


@each_kind
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("reset_state", [False, True], ids=["to zero", "to a state"])
def test_equal_to_splitting_by_hand(kind: str, directions: int, reset_state: bool) -> None:
    """Each sequence alone, cut at its resets: the pieces know nothing of each other."""
    options = {"resets": 0.3, "reset_state": reset_state, "directions": directions}
    case = problem(**KINDS[kind], T=12, B=4, H=8, **options)

    def by_hand(
        input: Tensor, hx: Tensor, cx: Tensor | None, weights: Any, **_: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        T, B = case.resets.shape
        given = case.states[2:] if reset_state else (None, None)
        zeros = [None if s is None else torch.zeros_like(s) for s in (hx, cx)]
        other = [z if g is None else g for z, g in zip(zeros, given, strict=True)]
        outputs, finals = [], []
        for b in range(B):
            borders = [t for t in range(1, T) if case.resets[t, b]]
            pieces = [*zip([0, *borders], [*borders, T], strict=True)]
            results, ends = [], []
            for begin, end in pieces:
                # The forward direction enters at the piece's begin, the reverse one at its end.
                fresh = [begin == 0 and not case.resets[0, b], end == T]
                state = [
                    None
                    if x is None
                    else torch.stack([(x if fresh[d] else r)[d, b] for d in range(directions)])
                    for x, r in zip((hx, cx), other, strict=True)
                ]
                state = [None if s is None else s.unsqueeze(1) for s in state]
                piece = input[begin:end, b : b + 1]
                output, *final = ops.layer(piece, *state, weights, cell=case.cell)
                results.append(output)
                ends.append(final)
            outputs.append(torch.cat(results))
            last = (ends[-1], ends[0])  # the last pieces of the two directions
            finals.append(
                [
                    None if s is None else torch.stack([last[d][i][d] for d in range(directions)])
                    for i, s in enumerate((hx, cx))
                ]
            )
        h_n, c_n = (None if f[0] is None else torch.cat(f, 1) for f in zip(*finals, strict=True))
        return torch.cat(outputs, 1), h_n, c_n

    for name, value in values_and_gradients(case, by_hand).items():
        ours = values_and_gradients(case, ops.layer)[name]
        torch.testing.assert_close(ours, value, **ROUNDING)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [24, 150])
def test_accuracy(kind: str, dtype: torch.dtype, H: int, device: str) -> None:
    options = {"resets": 0.2, "reset_state": True, "directions": 2}
    sizes = {"T": 20, "B": 7, "H": H}
    assert_accurate(problem(**KINDS[kind], **sizes, **options, dtype=dtype, device=device))


@each_kind
@each_layout
def test_derivatives(kind: str, lengths: tuple[int, ...] | None) -> None:
    options = {"resets": 0.4, "reset_state": True, "directions": 2}
    case = problem(**KINDS[kind], H=3, **options, lengths=lengths)
    function = case.function(ops.layer)
    assert gradcheck(function, case.tensors, fast_mode=True)
    assert gradgradcheck(function, case.tensors, fast_mode=True)


@pytest.mark.own_ops
@each_kind
@each_layout
def test_derivatives_of_the_ops_themselves(kind: str, lengths: tuple[int, ...] | None) -> None:
    case = problem(**KINDS[kind], H=3, resets=0.4, reset_state=True, lengths=lengths)
    function = case.op_function()
    assert gradcheck(function, case.tensors, fast_mode=True)
    assert gradgradcheck(function, case.tensors, fast_mode=True)


@each_kind
def test_func_transforms_and_forward_mode(kind: str) -> None:
    case = problem(**KINDS[kind], resets=0.4, reset_state=True)
    tensors = tuple(x.detach() for x in case.tensors)
    for transform in (torch.func.grad, torch.func.jacfwd):
        ours = transform(case.loss(ops.layer))(*tensors)
        exact = transform(case.loss(reference.layer))(*tensors)
        torch.testing.assert_close(ours, exact)
    inputs = torch.stack([tensors[0], 2 * tensors[0]])
    ours, exact = (
        torch.func.vmap(lambda x, layer=layer: case.function(layer)(x, *tensors[1:]))(inputs)
        for layer in (ops.layer, reference.layer)
    )
    torch.testing.assert_close(ours, exact)


def test_no_resets_are_the_plain_call_bit_for_bit() -> None:
    for kind in KINDS.values():
        case = problem(**kind, T=6, B=5, H=33, directions=2, dtype=torch.float32, resets=0.0)
        plain = replace(case, resets=None)
        for name, value in values_and_gradients(plain, ops.layer).items():
            assert torch.equal(values_and_gradients(case, ops.layer)[name], value)


def test_the_initial_state_has_no_part_in_what_follows_a_reset() -> None:
    case = problem("lstm", T=4, B=2, resets=0.0, reset_state=True)
    case.resets[2] = True
    states = case.hx, case.reset_hx
    hx, reset_hx = torch.autograd.grad(case.run(ops.layer)[0][2:].sum(), states)
    assert not hx.any()
    assert reset_hx.all()
    hx, reset_hx = torch.autograd.grad(case.run(ops.layer)[0][:2].sum(), states)
    assert hx.all()
    assert not reset_hx.any()


@pytest.mark.own_ops
@each_kind
def test_compiles_to_one_graph(kind: str) -> None:
    torch._dynamo.reset()

    def layer(*args: Any, **options: Any) -> Any:
        return ops.layer(*args, **options)

    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for T in (4, 5, 6):
        case = problem(**KINDS[kind], T=T, directions=2, resets=0.4, reset_state=True)
        exact = values_and_gradients(case, ops.layer)
        for name, value in values_and_gradients(case, fast).items():
            torch.testing.assert_close(value, exact[name])


@pytest.mark.own_ops
@pytest.mark.parametrize("kind", ["lstm_proj", "gru"])
def test_opcheck(kind: str) -> None:
    options = {"resets": 0.4, "reset_state": True, "directions": 2, "dtype": torch.float32}
    case = problem(**KINDS[kind], **options)
    torch.library.opcheck(library.layer_forward, (*case.op_arguments, True, True))
    with torch.no_grad():
        output, h_n, _, *saved = library.layer_forward(*case.op_arguments, True, True)
    grads = torch.randn_like(output), torch.randn_like(h_n), None, None
    frozen = case.map(lambda x: x.detach())
    arguments = *grads, *frozen.op_arguments, output, *saved, True, True, True
    torch.library.opcheck(library.layer_backward, arguments)


# Modules ------------------------------------------------------------------------------------------


def two_layers(name: str, **options: Any) -> Any:
    cls = getattr(rnn_fused, name)
    return cls(5, 7, num_layers=2, dtype=torch.float64, **options).requires_grad_()


def random_state(module: Any, *batch: int) -> Any:
    rows = 4 if module.bidirectional else 2
    h = torch.randn(rows, *batch, 7).double()
    return (h, torch.randn_like(h)) if module.mode == "LSTM" else h


def assert_equal(actual: Any, expected: Any) -> None:
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, e, **ROUNDING)


each_module = pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])


@each_module
@pytest.mark.parametrize("bidirectional", [False, True])
def test_stacked_layers_equal_splitting_by_hand(name: str, bidirectional: bool) -> None:
    module = two_layers(name, bidirectional=bidirectional)
    x, hx, other = torch.randn(9, 1, 5).double(), random_state(module, 1), random_state(module, 1)
    resets = torch.zeros(9, 1, dtype=torch.bool)
    resets[4] = True

    def both(begin: Any, end: Any) -> Any:
        """Of the state's rows, those of the forward direction, and those of the reverse."""
        if not bidirectional:
            return begin
        pairs = zip(tensors(begin), tensors(end), strict=True)
        mixed = [torch.stack([a[0], b[1], a[2], b[3]]) for a, b in pairs]
        return tuple(mixed) if len(mixed) > 1 else mixed[0]

    first, begin_n = module(x[:4], both(hx, other))
    second, end_n = module(x[4:], both(other, hx))
    expected = torch.cat([first, second]), both(end_n, begin_n)
    assert_equal(module(x, hx, resets=resets, reset_state=other), expected)


@each_module
def test_layouts(name: str) -> None:
    module = two_layers(name, bidirectional=True)
    x, resets = torch.randn(6, 3, 5).double(), torch.rand(6, 3) < 0.4
    hx, other = random_state(module, 3), random_state(module, 3)
    output, state = module(x, hx, resets=resets, reset_state=other)

    batch_first = two_layers(name, bidirectional=True, batch_first=True)
    batch_first.load_state_dict(module.state_dict())
    transposed, same_state = batch_first(x.transpose(0, 1), hx, resets=resets.T, reset_state=other)
    assert_equal((transposed.transpose(0, 1), same_state), (output, state))

    def of(s: Any, b: int) -> Any:
        return tuple(part[:, b] for part in s) if isinstance(s, tuple) else s[:, b]

    alone = module(x[:, 1], of(hx, 1), resets=resets[:, 1], reset_state=of(other, 1))
    assert_equal(alone, (output[:, 1], of(state, 1)))

    lengths = [2, 6, 4]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    flags = pack_padded_sequence(resets, lengths, enforce_sorted=False)
    result, final = module(packed, hx, resets=flags, reset_state=other)
    padded, _ = pad_packed_sequence(result)
    for b, length in enumerate(lengths):
        piece = x[:length, b], of(hx, b)
        expected = module(*piece, resets=resets[:length, b], reset_state=of(other, b))
        assert_equal((padded[:length, b], of(final, b)), expected)


@each_module
def test_steps_with_resets_make_a_sequence(name: str) -> None:
    module = two_layers(name)
    x, resets = torch.randn(6, 3, 5).double(), torch.rand(6, 3) < 0.4
    expected, final = module(x, resets=resets)
    outputs, state = [], None
    for t in range(6):
        output, state = module.step(x[t], state, resets=resets[t])
        outputs.append(output)
    assert_equal((torch.stack(outputs), state), (expected, final))
    single, _ = module.step(x[0, 0], resets=torch.tensor(True))
    assert_equal(single, expected[0, 0])


@each_module
def test_resets_to_the_learned_state(name: str) -> None:
    module = two_layers(name, learn_initial_state=True)
    learned = [p for n, p in module.named_parameters() if n.startswith("initial")]
    for p in learned:
        torch.nn.init.normal_(p)
    x, resets = torch.randn(6, 3, 5).double(), torch.zeros(6, 3, dtype=torch.bool)
    resets[3] = True
    output, _ = module(x, resets=resets)
    assert_equal(output, torch.cat([module(x[:3])[0], module(x[3:])[0]]))
    gradients = torch.autograd.grad(output[3:].sum(), learned)
    assert_equal(gradients, torch.autograd.grad(module(x[3:])[0].sum(), learned))


@pytest.mark.own_ops
def test_a_module_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    module = two_layers("GRU")
    fast = torch.compile(module, backend="aot_eager", fullgraph=True)
    x, resets = torch.randn(6, 3, 5).double(), torch.rand(6, 3) < 0.4
    assert_equal(fast(x, resets=resets), module(x, resets=resets))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m, x: m(x, reset_state=torch.zeros(2, 3, 7).double()),
            ValueError,
            "GRU: reset_state needs resets, got none",
        ),
        (
            lambda m, x: m(x, resets=torch.zeros(3, 6).bool()),
            RuntimeError,
            r"GRU: resets must have shape \[T, B\] = \[6, 3\], got \[3, 6\]",
        ),
        (
            lambda m, x: m(x, resets=[True]),
            TypeError,
            "GRU: resets must be a Tensor, as input is, got list",
        ),
        (
            lambda m, x: m(
                x, resets=torch.zeros(6, 3).bool(), reset_state=torch.zeros(1, 3, 7).double()
            ),
            RuntimeError,
            r"Expected reset_state size \(2, 3, 7\), got \[1, 3, 7\]",
        ),
        (
            lambda m, x: m(x, resets=torch.zeros(6, 3)),
            RuntimeError,
            "resets must be bool, on the device of input .* got Float",
        ),
        (
            lambda m, x: m(
                pack_padded_sequence(x, [6, 4, 4]),
                resets=pack_padded_sequence(torch.zeros(6, 3).bool(), [6, 4, 3]),
            ),
            RuntimeError,
            "resets must have the batch_sizes of input, .* got",
        ),
        (
            lambda m, x: m(
                pack_padded_sequence(x, [2, 6, 4], enforce_sorted=False),
                resets=pack_padded_sequence(
                    torch.zeros(6, 3).bool(), [6, 2, 4], enforce_sorted=False
                ),
            ),
            RuntimeError,
            "resets must have the sorted_indices of input, .* got",
        ),
        (lambda m, x: m.step(x[0], resets=True), TypeError, "resets must be a Tensor, got bool"),
        (
            lambda m, x: m.step(x[0], resets=torch.tensor(True)),
            RuntimeError,
            r"resets of a step must have shape \[3\], got \[\]",
        ),
        (
            lambda m, x: m(x, resets=torch.zeros(6, 3).bool(), reset_state=torch.zeros(2, 7)),
            RuntimeError,
            "reset_state should also be 3-D but got 2-D",
        ),
    ],
)
@pytest.mark.own_ops
def test_mistakes_of_a_module(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(two_layers("GRU"), torch.randn(6, 3, 5).double())


# Errors of the op ---------------------------------------------------------------------------------

MISTAKES = {
    "dtype": (lambda p: replace(p, resets=p.resets.int()), "resets must be bool.*got Int"),
    "shape": (
        lambda p: replace(p, resets=p.resets[1:]),
        r"of shape \[T, B\] = \[3, 2\], got Bool of shape \[2, 2\]",
    ),
    "state without resets": (
        lambda p: replace(p, resets=None),
        "reset_hx and reset_cx need resets, got none",
    ),
    "half a state": (lambda p: replace(p, reset_cx=None), "reset_cx must be given with reset_hx"),
    "size of the state": (
        lambda p: replace(p, reset_hx=torch.zeros(1, 2, 5).double()),
        r"reset_hx must have shape \[D, B, P\] = \[1, 2, 4\], got \[1, 2, 5\]",
    ),
}


@pytest.mark.parametrize("mistake", ["state without resets", "half a state"])
def test_a_reset_state_alone_is_no_transforms_secret(mistake: str) -> None:
    make, message = MISTAKES[mistake]
    case = make(problem("lstm", resets=0.4, reset_state=True, requires_grad=False))
    with pytest.raises(RuntimeError, match=message), torch.autograd.forward_ad.dual_level():
        case.run(ops.layer)


@pytest.mark.own_ops
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    make, message = MISTAKES[mistake]
    case = make(problem("lstm", resets=0.4, reset_state=True, requires_grad=False))
    with pytest.raises(RuntimeError, match=message):
        case.run(ops.layer)

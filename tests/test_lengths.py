"""Lengths of the sequences of a padded batch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import (
    KINDS,
    Problem,
    assert_agrees_with_reference,
    each_kind,
    padded_layer,
    problem,
    values_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import LAYERS, tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn_fused
from rnn_fused import library, ops, reference
from rnn_fused.reference import CellOptions

ROUNDING: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _sizes_on_an_emulated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNN_FUSED_EMULATED_SIZES", "device")


# The op: rows behind the last, sequences without timesteps, timesteps without sequences -----------


def with_tail(case: Problem, rows: int = 4, timesteps: int = 2) -> Problem:
    """The packed case with more rows than its sequences have, and more timesteps."""

    def more(x: Tensor) -> Tensor:
        return torch.cat([x.detach(), torch.ones_like(x[:rows])])

    return replace(
        case,
        input=more(case.input).requires_grad_(case.input.requires_grad),
        batch_sizes=torch.cat([case.batch_sizes, case.batch_sizes.new_zeros(timesteps)]),
        resets=None if case.resets is None else more(case.resets),
    )


@pytest.fixture(params=["host", "device"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who knows batch_sizes; without a device, or an emulated one, the host always does."""
    monkeypatch.setenv("RNN_FUSED_EMULATED_SIZES", request.param)
    return str(request.param)


def placed(case: Problem, place: str) -> Problem:
    device = case.input.device if place == "device" else "cpu"
    return replace(case, batch_sizes=case.batch_sizes.to(device))


IDLE = (7, 4, 4, 1, 0, 0)


@each_kind
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("resets", [None, 0.4], ids=["", "resets"])
def test_the_op_with_a_tail(
    kind: str, directions: int, resets: float | None, place: str, device: str
) -> None:
    options = {"directions": directions, "resets": resets, "reset_state": resets is not None}
    packed = problem(**KINDS[kind], lengths=IDLE, H=11, **options, device=device)
    case = placed(with_tail(packed), place)
    assert_agrees_with_reference(case, **ROUNDING)
    output, h_n, *_ = case.run(ops.layer)
    assert not output[16:].any()
    assert torch.equal(h_n[:, 4:], case.hx[:, 4:])
    exact, ours = values_and_gradients(packed, ops.layer), values_and_gradients(case, ops.layer)
    torch.testing.assert_close(ours["output 0"][:16], exact["output 0"], **ROUNDING)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_op_in_low_precision(kind: str, dtype: torch.dtype, place: str, device: str) -> None:
    """The rows that there are have the bits that they have without a tail."""
    options = {"directions": 2, "H": 16, "dtype": dtype, "device": device}
    packed = problem(**KINDS[kind], lengths=IDLE, **options)
    case = placed(with_tail(packed), place)
    exact = values_and_gradients(packed.to(torch.float64), reference.layer)
    tolerance = 64 * torch.finfo(dtype).eps
    outputs = (name for name in exact if name.startswith("output"))
    for name, value in zip(outputs, case.run(ops.layer), strict=True):
        expected = exact[name].to(dtype)
        torch.testing.assert_close(value[: len(expected)], expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(case.run(ops.layer)[0][:16], packed.run(ops.layer)[0])


@each_kind
def test_no_sequence_has_a_timestep(kind: str, place: str, device: str) -> None:
    case = problem(**KINDS[kind], lengths=(2, 1), directions=2, device=device)
    case = replace(case, batch_sizes=torch.zeros(3, dtype=torch.int64))
    assert_agrees_with_reference(placed(case, place), **ROUNDING)
    assert not values_and_gradients(placed(case, place), ops.layer)["output 0"].any()


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from([*KINDS]),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    tail=st.integers(0, 5),
    two=st.booleans(),
    resets=st.sampled_from([None, 0.3]),
)
def test_any_tail(kind: str, lengths: list[int], tail: int, two: bool, resets: Any) -> None:
    lengths = [max(1, *lengths), *sorted(lengths, reverse=True)]
    case = problem(**KINDS[kind], lengths=lengths, directions=1 + two, H=5, resets=resets)
    assert_agrees_with_reference(with_tail(case, tail, tail), **ROUNDING)


# The op on the CPU: padded batches themselves -----------------------------------------------------


@pytest.mark.own_ops
@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("resets", [None, 0.4], ids=["", "resets"])
@pytest.mark.parametrize("lengths", [IDLE, (9,), (1, 1)], ids=str)
def test_a_padded_batch_has_the_bits_of_the_packed_one(
    kind: str, dtype: torch.dtype, directions: int, resets: float | None, lengths: Any
) -> None:
    case = problem(
        **KINDS[kind],
        lengths=lengths,
        H=19,
        I=8,
        directions=directions,
        resets=resets,
        reset_state=resets is not None,
        dtype=dtype,
    )
    if resets:
        options = CellOptions(grad_clip_value=0.5)
        case = replace(case, options=options, all_cells=case.cell == "lstm")
    ours, packed = (values_and_gradients(case, layer) for layer in (padded_layer, ops.layer))
    torch.testing.assert_close(ours, packed, rtol=0, atol=0)


@pytest.mark.own_ops
@each_kind
def test_second_derivatives_of_a_padded_batch(kind: str) -> None:
    case = problem(**KINDS[kind], lengths=(3, 2, 0), directions=2, resets=0.4, reset_state=True)
    case = replace(case, all_cells=case.cell == "lstm")
    assert gradcheck(case.function(padded_layer), case.tensors, fast_mode=True)
    if kind != "rnn_relu":  # which has kinks
        assert gradgradcheck(case.function(padded_layer), case.tensors, fast_mode=True)


PADDED_MISTAKES: dict[str, tuple[Any, str]] = {
    "float": (torch.ones(3), r"lengths must be a vector of int64 .* got Float of shape \[3\]"),
    "matrix": (torch.ones(3, 1).long(), r"of the 3 sequences of input, got Long of shape \[3, 1\]"),
    "too few": (torch.ones(2).long(), r"of the 3 sequences of input, got Long of shape \[2\]"),
    "too long": (torch.tensor([1, 5, 6]), "between 0 and T = 4, got 5 at index 1"),
    "negative": (torch.tensor([1, 2, -7]), "between 0 and T = 4, got -7 at index 2"),
}


@pytest.mark.own_ops
@pytest.mark.parametrize("mistake", PADDED_MISTAKES)
def test_mistakes_in_the_lengths_of_the_op(mistake: str) -> None:
    lengths, message = PADDED_MISTAKES[mistake]
    case = problem("gru", T=4, B=3, requires_grad=False)
    with pytest.raises(RuntimeError, match=rf"\[gru\] lengths .*{message}|\[gru\] {message}"):
        ops.layer(case.input, case.hx, None, case.weights, cell="gru", lengths=lengths)


@pytest.mark.own_ops
def test_where_the_op_takes_no_lengths() -> None:
    case = problem("gru", T=4, B=3, requires_grad=False)
    lengths = torch.tensor([2, 4, 0])

    def run(input: Tensor, **options: Any) -> Tensor:
        arguments = input, case.hx, None, case.weights
        return ops.layer(*arguments, cell="gru", lengths=lengths, **options).output

    message = r"\[gru\] lengths need a padded batch on the CPU, without batch_sizes"
    with pytest.raises(RuntimeError, match=message):
        run(case.input, batch_sizes=torch.tensor([3, 3, 3, 3]))
    with pytest.raises(RuntimeError, match=message):
        run(case.input.flatten(0, 1))
    with pytest.raises(RuntimeError, match=r"packed input must have 2 dimensions \[N, I\], got 3"):
        ops.layer(
            *(case.input, case.hx, None, case.weights), cell="gru", batch_sizes=torch.tensor([3])
        )
    with pytest.raises(RuntimeError, match=message):
        run(case.input.to("meta"))
    with pytest.raises(RuntimeError, match=message):
        grad(lambda x: run(x).sum())(case.input)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match=message):
        run(mode.from_tensor(case.input))
    on_meta = replace(case.to("meta"), batch_sizes=lengths)
    with pytest.raises(RuntimeError, match="of a padded batch depends on its lengths"):
        library.layer_forward(*on_meta.op_arguments, True, True)


# Modules ------------------------------------------------------------------------------------------

each_module = pytest.mark.parametrize("which", LAYERS)
I, H = 4, 6  # noqa: E741


def make(which: str, device: str = "cpu", package: Any = rnn_fused, **options: Any) -> Any:
    name, own = LAYERS[which]
    torch.manual_seed(7)
    options = {"num_layers": 2, "dtype": torch.float64, "device": device, **own, **options}
    return getattr(package, name)(I, H, **options)


def random_state(module: Any, B: int) -> Any:
    weight = module.weight_hh_l0
    rows = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(rows, B, module.proj_size or H).to(weight).requires_grad_()
    if module.mode != "LSTM":
        return h
    return h, torch.randn(rows, B, H).to(weight).requires_grad_()


def random_batch(module: Any, T: int, B: int) -> Tensor:
    shape = (B, T, I) if module.batch_first else (T, B, I)
    return torch.randn(*shape).to(module.weight_hh_l0).requires_grad_()


def of(state: Any, b: int) -> Any:
    return tuple(part[:, b] for part in state) if isinstance(state, tuple) else state[:, b]


def split_by_hand(
    module: Any, x: Tensor, lengths: list[int], hx: Any, **options: Any
) -> tuple[Tensor, Any]:
    """Each sequence alone."""
    time = 1 if module.batch_first else 0
    outputs, finals = [], []
    for b, length in enumerate(lengths):
        sequence = x.select(1 - time, b)
        width = (1 + module.bidirectional) * (module.proj_size or H)
        output, final = sequence.new_zeros(0, width), of(hx, b)
        if length > 0:
            own = {name: value.select(1 - time, b)[:length] for name, value in options.items()}
            output, final = module(sequence[:length], of(hx, b), **own)
        padding = output.new_zeros(len(sequence) - length, width)
        outputs.append(torch.cat([output, padding]))
        finals.append(final)
    if isinstance(hx, tuple):
        final = tuple(torch.stack(parts, 1) for parts in zip(*finals, strict=True))
    else:
        final = torch.stack(finals, 1)
    return torch.stack(outputs, 1 - time), final


def assert_same(actual: Any, expected: Any, leaves: list[Tensor]) -> None:
    """Outputs, and what they send back to the leaves."""
    generator = torch.Generator().manual_seed(1)
    gradients = []
    for result in (actual, expected):
        # Zeros of the expected result may depend on nothing.
        outputs = [
            o for o, e in zip(tensors(result), tensors(expected), strict=True) if e.requires_grad
        ]
        grads = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        generator.manual_seed(1)
        gradients.append(
            torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)
        )
    torch.testing.assert_close(tensors(actual), tensors(expected), **ROUNDING)
    torch.testing.assert_close(*gradients, **ROUNDING)


LENGTHS = {
    "mixed": [3, 7, 1, 5],
    "zeros": [0, 4, 7, 0],
    "full": [7, 7, 7, 7],
    "none": [0, 0, 0, 0],
    "alone": [2],
}


@each_module
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "two ways"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_splitting_by_hand(
    which: str, bidirectional: bool, batch_first: bool, lengths: str, device: str
) -> None:
    module = make(which, device, bidirectional=bidirectional, batch_first=batch_first)
    values = LENGTHS[lengths]
    x, hx = random_batch(module, 7, len(values)), random_state(module, len(values))
    leaves = [x, *tensors(hx), *module.parameters()]
    ours = module(x, hx, lengths=torch.tensor(values, device=device))
    assert_same(ours, split_by_hand(module, x, values, hx), leaves)


@each_module
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_torch_on_packed_sequences(which: str, batch_first: bool, device: str) -> None:
    options = {"bidirectional": True, "batch_first": batch_first, "device": device}
    ours, stock = make(which, **options), make(which, package=nn, **options)
    stock.load_state_dict(ours.state_dict())
    lengths = torch.tensor([3, 7, 1, 5, 7])
    x = random_batch(ours, 9, 5)
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    output, state = stock(packed)
    padded, _ = pad_packed_sequence(output, batch_first=batch_first, total_length=9)
    result = ours(x, lengths=lengths.to(device))
    expected = torch.autograd.grad(padded.square().sum(), [x, *stock.parameters()])
    gradients = torch.autograd.grad(result[0].square().sum(), [x, *ours.parameters()])
    torch.testing.assert_close(tensors(result), tensors((padded, state)), **ROUNDING)
    torch.testing.assert_close(gradients, expected, **ROUNDING)


@settings(deadline=None, max_examples=40)
@given(
    which=st.sampled_from([*LAYERS]),
    lengths=st.lists(st.integers(0, 8), min_size=1, max_size=6),
    longer=st.integers(0, 3),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    probability=st.sampled_from([None, 0.3]),
    known=st.booleans(),
)
def test_any_lengths(
    which: str,
    lengths: list[int],
    longer: int,
    bidirectional: bool,
    batch_first: bool,
    probability: float | None,
    known: bool,
) -> None:
    module = make(which, bidirectional=bidirectional, batch_first=batch_first)
    T, B = max(1, *lengths) + longer, len(lengths)
    x, hx = random_batch(module, T, B), random_state(module, B)
    options = {} if probability is None else {"resets": torch.rand(x.shape[:2]) < probability}
    values = torch.tensor(lengths)
    with pytest.MonkeyPatch.context() as patch:
        if not known:  # as on a device
            patch.setattr(ops, "takes_lengths", lambda *_: False)
        ours = module(x, hx, lengths=values, **options)
    expected = split_by_hand(module, x, lengths, hx, **options)
    assert_same(ours, expected, [x, *tensors(hx), *module.parameters()])


@pytest.mark.parametrize("which", ["lstm", "gru"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_padding_never_matters(
    which: str, garbage: float, known: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(ops, "takes_lengths", lambda *_: False)
    module = make(which, device, bidirectional=True)
    lengths = torch.tensor([3, 0, 5, 2], device=device)
    clean = random_batch(module, 6, 4)
    padding = torch.arange(6, device=device).unsqueeze(1) >= lengths
    dirty = clean.detach().masked_fill(padding.unsqueeze(-1), garbage).requires_grad_()
    results = []
    for x in (clean, dirty):
        outputs = tensors(module(x, lengths=lengths))
        # What comes back at the padding does not matter either.
        grads = [torch.ones_like(outputs[0]).masked_fill(padding.unsqueeze(-1), garbage)]
        grads += [torch.ones_like(o) for o in outputs[1:]]
        results.append((outputs, torch.autograd.grad(outputs, [x, *module.parameters()], grads)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert not results[0][0][0][padding].any()
    assert not results[0][1][0][padding].any()


@each_module
def test_the_learned_state(which: str, device: str) -> None:
    module = make(which, device, learn_initial_state=True, bidirectional=True)
    learned = [p for n, p in module.named_parameters() if n.startswith("initial")]
    for p in learned:
        nn.init.normal_(p)
    x = random_batch(module, 5, 3)
    hx = tuple(p.unsqueeze(1).expand(-1, 3, -1) for p in learned)
    hx = hx if len(hx) == 2 else hx[0]
    lengths = [4, 0, 2]
    ours = module(x, lengths=torch.tensor(lengths, device=device))
    assert_same(ours, split_by_hand(module, x, lengths, hx), [x, *module.parameters()])
    for p, final in zip(learned, tensors(ours[1]), strict=True):
        assert torch.equal(final[:, 1], p)


def test_states_with_the_batch_first() -> None:
    plain = make("lstm", batch_first=True, bidirectional=True)
    module = make("lstm", batch_first=True, bidirectional=True, batch_first_states=True)
    x, hx, lengths = random_batch(plain, 6, 3), random_state(plain, 3), torch.tensor([2, 6, 0])
    output, state = plain(x, hx, lengths=lengths)
    first, states = module(x, tuple(s.transpose(0, 1) for s in hx), lengths=lengths)
    assert torch.equal(first, output)
    for a, b in zip(states, state, strict=True):
        assert torch.equal(a.transpose(0, 1), b)


@pytest.mark.own_ops
def test_dropout_falls_as_without_lengths() -> None:
    module = make("lstm", dropout=0.5)
    x, lengths = random_batch(module, 6, 3), torch.tensor([2, 6, 4])

    def run(**options: Any) -> Tensor:
        torch.manual_seed(3)
        output: Tensor = module(x, **options)[0]
        return output

    output = run(lengths=lengths)
    assert torch.equal(run(lengths=lengths, return_all_states=True), output)
    full = run()
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(output[:length, b], full[:length, b])


@pytest.mark.own_ops
def test_lengths_may_change_before_the_backward_pass() -> None:
    module = make("lstm")
    x, lengths = random_batch(module, 6, 3), torch.tensor([2, 6, 4])
    (expected,) = torch.autograd.grad(module(x, lengths=lengths)[0].sum(), x)
    output, _ = module(x, lengths=lengths)
    lengths.fill_(0)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient, expected)


@each_module
def test_reset_state(which: str, device: str) -> None:
    """Resets in the padding mean nothing; the reset state may be given."""
    module = make(which, device)
    x, hx, other = random_batch(module, 6, 3), random_state(module, 3), random_state(module, 3)
    lengths = torch.tensor([3, 6, 0], device=device)
    resets = torch.rand(6, 3, device=device) < 0.4
    outside = torch.arange(6, device=device).unsqueeze(1) >= lengths
    leaves = [x, *tensors(hx), *tensors(other), *module.parameters()]
    results = [
        module(x, hx, lengths=lengths, resets=flags, reset_state=other)
        for flags in (resets | outside, resets & ~outside)
    ]
    assert_same(*results, leaves)
    alone = module(x[:3, 0], of(hx, 0), resets=resets[:3, 0], reset_state=of(other, 0))
    torch.testing.assert_close(results[0][0][:3, 0], alone[0], **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["lstm", "gru"])
def test_low_precision(which: str, dtype: torch.dtype, device: str) -> None:
    """As accurate as each sequence alone."""
    module = make(which, device, bidirectional=True, dtype=dtype)
    exact = copy.deepcopy(module).double()
    x, values = random_batch(module, 7, 4), [3, 7, 0, 5]
    hx = random_state(module, 4)
    output, _ = module(x, hx, lengths=torch.tensor(values, device=device))
    wide = tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()
    expected, _ = split_by_hand(exact, x.double(), values, wide)
    assert output.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_any_integers(dtype: torch.dtype) -> None:
    module = make("gru")
    x, lengths = random_batch(module, 6, 3), torch.tensor([2, 6, 0])
    assert torch.equal(module(x, lengths=lengths.to(dtype))[0], module(x, lengths=lengths)[0])


def test_autocast() -> None:
    module = make("lstm", dtype=torch.float32)
    x, lengths = random_batch(module, 6, 3), torch.tensor([2, 6, 0])
    exact, _ = module(x, lengths=lengths)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(x, lengths=lengths)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)


def test_empty_batch() -> None:
    module = make("lstm")
    output, (h_n, _) = module(torch.zeros(5, 0, I).double(), lengths=torch.zeros(0).long())
    assert output.shape == (5, 0, H)
    assert h_n.shape == (2, 0, H)


# Derivatives --------------------------------------------------------------------------------------


@each_module
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_gradcheck(which: str, batch_first: bool) -> None:
    if which == "rnn_relu":
        pytest.skip("has kinks")
    module = make(which, num_layers=1, bidirectional=True, batch_first=batch_first)
    x, hx, lengths = random_batch(module, 3, 3), random_state(module, 3), torch.tensor([2, 0, 3])

    def run(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        state = states if len(states) == 2 else states[0]
        return tuple(tensors(module(x, state, lengths=lengths)))

    inputs = x, *tensors(hx)
    assert gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


def test_batched_gradients() -> None:
    module = make("gru")
    x, lengths = random_batch(module, 4, 3), torch.tensor([2, 0, 4])
    output, _ = module(x, lengths=lengths)
    grads = torch.randn(3, *output.shape).double()
    (batched,) = torch.autograd.grad(output, x, grads, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        (expected,) = torch.autograd.grad(output, x, grads[k], retain_graph=True)
        torch.testing.assert_close(batched[k], expected, **ROUNDING)


@pytest.mark.parametrize("lengths_too", [False, True])
def test_gradients_of_each_sample(lengths_too: bool) -> None:
    module = make("lstm", bidirectional=True)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(3, 5, 2, I).double()
    lengths = torch.tensor([[5, 2], [0, 3], [4, 4]]) if lengths_too else torch.tensor([2, 5])

    def loss(weights: Any, x: Tensor, lengths: Tensor) -> Tensor:
        return functional_call(module, weights, (x,), {"lengths": lengths})[0].square().sum()

    axes = (None, 0, 0 if lengths_too else None)
    each = vmap(grad(loss), axes)(weights, x, lengths)
    for k in range(3):
        alone = grad(loss)(weights, x[k], lengths[k] if lengths_too else lengths)
        for name, value in alone.items():
            torch.testing.assert_close(each[name][k], value, **ROUNDING)


def test_forward_mode(device: str) -> None:
    module = make("lstm", device, bidirectional=True)
    lengths = torch.tensor([4, 0, 2], device=device)
    x, tangent = random_batch(module, 5, 3).detach(), torch.randn(5, 3, I).double().to(device)
    hx = zero_state(module, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        _, derivative = forward_ad.unpack_dual(module(dual, lengths=lengths)[0])
    _, exact = torch.func.jvp(
        lambda x: split_by_hand(module, x, [4, 0, 2], hx)[0], (x,), (tangent,)
    )
    torch.testing.assert_close(derivative, exact, **ROUNDING)


def zero_state(module: Any, B: int) -> Any:
    return tuple(torch.zeros_like(s) for s in random_state(module, B))


# Compilers, and what the host may ask -----------------------------------------------------------


@pytest.mark.own_ops
@pytest.mark.parametrize("which", ["lstm_proj", "gru"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_compiles_to_one_graph(which: str, batch_first: bool, device: str) -> None:
    torch._dynamo.reset()
    module = make(which, device, bidirectional=True, batch_first=batch_first)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(module, backend=counter, fullgraph=True)
    for T, B in ((4, 3), (6, 5), (7, 2), (9, 8)):
        x, lengths = random_batch(module, T, B), torch.randint(0, T + 1, (B,), device=device)
        ours, expected = fast(x, lengths=lengths), module(x, lengths=lengths)
        assert_same(ours, expected, [x, *module.parameters()])
    assert counter.frame_count <= 2  # sizes are constants at first, then symbols


@pytest.mark.own_ops
def test_compiled_code(device: str) -> None:
    torch._dynamo.reset()
    module = make("gru", device, dtype=torch.float32)
    fast = torch.compile(module, fullgraph=True)
    x, lengths = random_batch(module, 5, 3), torch.tensor([5, 0, 2], device=device)
    ours, expected = fast(x, lengths=lengths), module(x, lengths=lengths)
    torch.testing.assert_close(tensors(ours), tensors(expected))
    gradients = [
        torch.autograd.grad(r[0].sum(), [x, *module.parameters()]) for r in (ours, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.own_ops
@pytest.mark.parametrize("batch_first", [False, True])
def test_nothing_waits_for_a_device(batch_first: bool) -> None:
    """Meta tensors have no values: asking for one fails, as it would wait on a device."""
    module = make("lstm", "meta", bidirectional=True, batch_first=batch_first)
    x = random_batch(module, 6, 3)
    resets = torch.zeros(x.shape[:2], dtype=torch.bool, device="meta")
    for lengths in (torch.zeros(3, dtype=torch.int64, device="meta"), torch.tensor([1, 6, 0])):
        output, _ = module(x, lengths=lengths, resets=resets)
        output.sum().backward()
        assert output.shape == (*x.shape[:2], 2 * H)


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    module = make("lstm", "cuda", bidirectional=True)
    x, lengths = random_batch(module, 6, 3), torch.tensor([2, 6, 0], device="cuda")
    module(x, lengths=lengths)[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x, lengths=lengths)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.own_ops
def test_on_the_cpu_the_padding_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    run = library.run
    monkeypatch.setattr(library, "run", lambda *args: (results.append(run(*args)), results[-1])[1])
    module = make("gru")
    module(random_batch(module, 9, 4), lengths=torch.tensor([1, 5, 0, 2]))
    assert [g.shape for *_, gates, _ in results for g in gates] == [(1, 8, 4, H)] * 2


# Mistakes -----------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "packed": (
        lambda m, x: m(pack_padded_sequence(x, [6, 4, 4]), lengths=torch.tensor([6, 4, 4])),
        TypeError,
        "GRU: lengths need input to be a padded batch, a Tensor, got a PackedSequence",
    ),
    "unbatched": (
        lambda m, x: m(x[:, 0], lengths=torch.tensor([6])),
        ValueError,
        "GRU: lengths need input to be batched, 3D, got unbatched 2D input",
    ),
    "list": (
        lambda m, x: m(x, lengths=[6, 4, 4]),
        TypeError,
        "GRU: lengths must be a Tensor, got list",
    ),
    "dtype": (
        lambda m, x: m(x, lengths=torch.ones(3)),
        RuntimeError,
        "GRU: lengths must have an integer dtype, got torch.float32",
    ),
    "bool": (
        lambda m, x: m(x, lengths=torch.ones(3).bool()),
        RuntimeError,
        "GRU: lengths must have an integer dtype, got torch.bool",
    ),
    "shape": (
        lambda m, x: m(x, lengths=torch.ones(4).long()),
        RuntimeError,
        r"GRU: lengths must have shape \[B\] = \[3\], got \[4\]",
    ),
    "too long": (
        lambda m, x: m(x, lengths=torch.tensor([2, 7, 1])),
        RuntimeError,
        "GRU: lengths must be between 0 and T = 6, got 7 at index 1",
    ),
    "negative": (
        lambda m, x: m(x, lengths=torch.tensor([2, 1, -1])),
        RuntimeError,
        "GRU: lengths must be between 0 and T = 6, got -1 at index 2",
    ),
    "no steps": (
        lambda m, x: m(x[:0], lengths=torch.zeros(3).long()),
        RuntimeError,
        "Expected sequence length to be larger than 0 in RNN, got 0",
    ),
    "state": (
        lambda m, x: m(x, torch.zeros(2, 4, H).double(), lengths=torch.tensor([2, 1, 1])),
        RuntimeError,
        r"Expected hidden size \(2, 3, 6\), got \[2, 4, 6\]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call(make("gru"), torch.randn(6, 3, I).double())


def test_narrow_integers_of_a_long_batch() -> None:
    module = make("gru")
    x, lengths = random_batch(module, 300, 2), torch.tensor([255, 3])
    expected, _ = module(x, lengths=lengths)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        output = forward_ad.unpack_dual(module(dual, lengths=lengths.to(torch.uint8))[0]).primal
    torch.testing.assert_close(output, expected, **ROUNDING)


@pytest.mark.own_ops
def test_values_that_the_host_does_not_know() -> None:
    torch._dynamo.reset()
    fast = torch.compile(make("gru"), backend="aot_eager", fullgraph=True)
    x, wrong = torch.randn(6, 3, I).double(), torch.tensor([2, 7, 1])
    message = "GRU: lengths must be between 0 and T"
    with pytest.raises(RuntimeError, match=message):
        fast(x, lengths=wrong)
    with pytest.raises(RuntimeError, match=message):
        grad(lambda x: make("gru")(x, lengths=wrong)[0].sum())(x)


@pytest.mark.own_ops
def test_too_few_sequences_for_the_op() -> None:
    case = problem("gru", lengths=(3, 2), requires_grad=False)
    with pytest.raises(RuntimeError, match="hx must have the sequences of batch_sizes, at least 2"):
        library.layer_forward(*replace(case, hx=case.hx[:, :1]).op_arguments, False, False)


@pytest.mark.own_ops
@pytest.mark.parametrize("kind", ["lstm_proj", "gru"])
def test_opcheck(kind: str) -> None:
    case = with_tail(problem(**KINDS[kind], lengths=IDLE, directions=2, dtype=torch.float32))
    torch.library.opcheck(library.layer_forward, (*case.op_arguments, True, True))


@pytest.mark.own_ops
def test_only_our_kernels_run_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.families, "has_kernels", lambda *_: False)
    monkeypatch.setattr(ops, "_warn_unfused", lambda device: None)
    module = make("gru", "meta")
    with pytest.raises(RuntimeError, match="lengths: rnn_fused has no kernels for meta tensors"):
        module(random_batch(module, 4, 2), lengths=torch.zeros(2).long().to("meta"))

"""States of the layers: learned, with the batch first, carried from step to step, detached."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from pairs import HIDDEN, INPUT, LAYERS, LENGTHS, gradients, initial_state, pair, sequence, tensors
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

import rnn_fused

layers = pytest.mark.parametrize("kind", LAYERS)
forms = pytest.mark.parametrize("form", ["padded", "unbatched", "packed", "packed_unsorted"])


def build(kind: str, *sizes: int, **options: Any) -> nn.Module:
    name, own = LAYERS[kind]
    options = {"dtype": torch.float64, **own, **options}
    return getattr(rnn_fused, name)(*(sizes or (INPUT, HIDDEN)), **options)


def learning(kind: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(torch.nn's module, ours that learns its initial state), with the same weights."""
    stock, _ = pair(kind, **options)
    ours = build(kind, **options, learn_initial_state=True)
    ours.load_state_dict(stock.state_dict(), strict=False)
    for state in initial(ours):
        nn.init.normal_(state)
    return stock, ours


def initial(module: nn.Module) -> list[Tensor]:
    return [p for name, p in module.named_parameters() if name.startswith("initial_")]


def state_of(module: nn.Module, values: list[Tensor]) -> Any:
    return tuple(values) if module.mode == "LSTM" else values[0]


def with_batch_first(state: Any) -> Any:
    """A batched state in the other order, either way."""
    if isinstance(state, tuple):
        return tuple(map(with_batch_first, state))
    return state.transpose(0, 1)


# Learned initial states


@layers
@forms
@pytest.mark.parametrize("batch_first", [False, True])
def test_learned_state_is_an_hx_for_every_sequence(kind: str, form: str, batch_first: bool) -> None:
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    stock, ours = learning(kind, **options)
    x = sequence(form, batch_first)
    values = [p.detach().clone().requires_grad_() for p in initial(ours)]
    hx = values if form == "unbatched" else [
        v.unsqueeze(1).expand(-1, len(LENGTHS), -1) for v in values
    ]  # fmt: skip
    expected, got = tensors(stock(x, state_of(ours, hx))), tensors(ours(x))
    torch.testing.assert_close(got, expected)
    weights = [p for name, p in ours.named_parameters() if not name.startswith("initial_")]
    torch.testing.assert_close(
        gradients(got, [*weights, *initial(ours)]),
        gradients(expected, [*stock.parameters(), *values]),
    )


@layers
def test_a_given_state_is_preferred_to_the_learned_one(kind: str) -> None:
    stock, ours = learning(kind)
    x, hx = sequence("padded"), initial_state(stock, "padded")
    torch.testing.assert_close(tensors(ours(x, hx)), tensors(stock(x, hx)))


@layers
def test_learned_state_shapes_start_and_weights(kind: str) -> None:
    options = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(0)
    ours = build(kind, **options, learn_initial_state=True)
    after = torch.rand(1)
    stock, _ = pair(kind, **options)
    assert torch.equal(after, torch.rand(1))  # no more random numbers drawn than by torch.nn
    widths = {"initial_h": ours.proj_size or HIDDEN, "initial_c": HIDDEN}
    names = [n for n, _ in ours.named_parameters() if n.startswith("initial_")]
    assert names == list(widths)[: 2 if ours.mode == "LSTM" else 1]
    for name in names:
        assert torch.equal(getattr(ours, name), torch.zeros(4, widths[name], dtype=torch.float64))
    for name in names:
        nn.init.normal_(getattr(ours, name))
    draws = []
    for module in (stock, ours):
        torch.manual_seed(3)
        module.reset_parameters()
        draws.append(torch.rand(1))
    assert torch.equal(*draws)
    expected = stock.state_dict() | {name: torch.zeros_like(getattr(ours, name)) for name in names}
    torch.testing.assert_close(dict(ours.state_dict()), expected, rtol=0, atol=0)
    assert {id(w) for group in ours.all_weights for w in group} == {
        id(p) for name, p in ours.named_parameters() if name not in names
    }
    assert ours._flat_weights_names == stock._flat_weights_names


@layers
def test_learned_state_survives_copies_and_moves(kind: str) -> None:
    _, ours = learning(kind, num_layers=2)
    x = sequence("padded")
    expected = tensors(ours(x))
    fresh = build(kind, num_layers=2, learn_initial_state=True)
    fresh.load_state_dict(ours.state_dict())
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), fresh):
        torch.testing.assert_close(tensors(module(x)), expected, rtol=0, atol=0)
    moved = copy.deepcopy(ours).float()
    assert all(p.dtype == torch.float32 for p in initial(moved))
    torch.testing.assert_close(
        tensors(moved(x.float())), tensors(expected), check_dtype=False, rtol=1e-4, atol=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert moved(x.float())[0].dtype == torch.bfloat16


def test_learned_state_under_functional_call_and_meta() -> None:
    _, ours = learning("lstm")
    x = sequence("padded")
    other = {n: torch.randn_like(p, requires_grad=True) for n, p in ours.named_parameters()}
    results = tensors(functional_call(ours, other, (x,)))
    assert all(g.any() for g in gradients(results, other.values()))
    meta = build("lstm", learn_initial_state=True, device="meta")
    assert meta.initial_c.is_meta
    assert meta(x.to("meta"))[0].is_meta


def test_learned_state_trains() -> None:
    _, ours = learning("gru")
    x, optimizer = sequence("padded"), torch.optim.SGD(ours.parameters(), 0.5)
    before = ours.initial_h.detach().clone()
    losses = []
    for _ in range(5):
        loss = (ours(x)[0] - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert (ours.initial_h != before).all()


def test_batch_of_zero_with_a_learned_state() -> None:
    _, ours = learning("lstm")
    output, (h_n, _) = ours(torch.empty(3, 0, INPUT, dtype=torch.float64))
    assert output.shape == (3, 0, HIDDEN)
    assert h_n.shape == (1, 0, HIDDEN)


def test_strict_loading_names_what_is_missing() -> None:
    stock, ours = learning("lstm")
    with pytest.raises(RuntimeError, match=r'Missing key.*"initial_h", "initial_c"'):
        ours.load_state_dict(stock.state_dict())


# States with the batch first


@layers
@forms
@pytest.mark.parametrize("given", [False, True], ids=["none", "hx"])
def test_batch_first_states(kind: str, form: str, given: bool) -> None:
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    stock, _ = pair(kind, **options)
    ours = build(kind, **options, batch_first_states=True)
    ours.load_state_dict(stock.state_dict())
    x, hx = sequence(form, True), initial_state(stock, form) if given else None
    swap = (lambda state: state) if form == "unbatched" else with_batch_first
    expected, expected_state = stock(x, hx)
    output, state = ours(x, None if hx is None else swap(hx))
    torch.testing.assert_close(tensors((output, swap(state))), tensors((expected, expected_state)))
    if form != "unbatched":
        assert tensors(state)[0].shape[:2] == (len(LENGTHS), 4)
    # The result of one call is the argument of the next.
    torch.testing.assert_close(tensors(ours(x, state)[0]), tensors(stock(x, expected_state)[0]))


def test_batch_first_states_with_learned_ones() -> None:
    options = {"batch_first": True, "learn_initial_state": True}
    ours = build("lstm", **options, batch_first_states=True)
    for p in initial(ours):
        nn.init.normal_(p)
    hx = tuple(p.expand(len(LENGTHS), 1, -1) for p in initial(ours))
    x = sequence("padded", True)
    torch.testing.assert_close(tensors(ours(x)), tensors(ours(x, hx)))


@pytest.mark.parametrize("kind", ["lstm_proj", "gru"])
@pytest.mark.parametrize("form", ["padded", "packed", "packed_unsorted"])
def test_errors_show_the_batch_first_shape(kind: str, form: str) -> None:
    ours = build(kind, num_layers=2, batch_first=True, batch_first_states=True)
    x, hx = sequence(form, True), initial_state(ours, form)
    width = ours.proj_size or HIDDEN
    message = rf"size \(3, 2, {width}\), got \[2, 3, {width}\]"
    with pytest.raises(RuntimeError, match=message):
        ours(x, hx)
    flat = tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
    with pytest.raises(RuntimeError, match="be 3-D but got 2-D"):
        ours(x, flat)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_options_are_checked(name: str) -> None:
    make = getattr(rnn_fused, name)
    with pytest.raises(ValueError, match="batch_first_states=True needs batch_first=True"):
        make(INPUT, HIDDEN, batch_first_states=True)
    for option in ("learn_initial_state", "batch_first_states"):
        with pytest.raises(TypeError, match=f"{option} should be of type bool, got: int"):
            make(INPUT, HIDDEN, batch_first=True, **{option: 1})


def test_options_in_repr_and_by_default() -> None:
    options = {"batch_first": True, "learn_initial_state": True, "batch_first_states": True}
    ours = rnn_fused.GRU(4, 5, **options)
    assert repr(ours) == (
        "GRU(4, 5, batch_first=True, learn_initial_state=True, batch_first_states=True)"
    )
    # Modules that came from torch.nn, or from a pickle that is older than the options.
    converted = rnn_fused.convert(nn.GRU(4, 5)).model
    assert repr(converted) == "GRU(4, 5)"
    assert converted.learn_initial_state is converted.batch_first_states is False


@pytest.mark.parametrize("option", ["learn_initial_state", "batch_first_states"])
def test_revert_skips_what_torch_has_not(option: str) -> None:
    net = nn.Sequential(
        rnn_fused.LSTM(4, 5, batch_first=True, **{option: True}), rnn_fused.GRU(5, 5)
    )
    report = rnn_fused.revert(net)
    assert report.replaced == ("1",)
    assert report.skipped == {"0": f"torch.nn has no {option}=True"}
    assert type(net[0]) is rnn_fused.LSTM


# Streaming


def run_in_parts(module: nn.Module, parts: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
    outputs, state = [], None
    for part in parts:
        output, state = module(part, state)
        outputs.append(output)
    return torch.cat(outputs, 1 if module.batch_first else 0), state


def run_in_steps(module: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    time = 1 if module.batch_first and x.dim() == 3 else 0
    outputs, state = [], None
    for step in x.unbind(time):
        output, state = module.step(step, state)
        outputs.append(output)
    return torch.stack(outputs, time), state


@layers
@pytest.mark.parametrize("form", ["padded", "unbatched"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"batch_first": True, "batch_first_states": True}],
    ids=["time_first", "batch_first", "batch_first_states"],
)
def test_steps_are_the_sequence(kind: str, form: str, options: dict[str, bool]) -> None:
    ours = build(kind, num_layers=2, learn_initial_state=True, **options)
    for p in initial(ours):
        nn.init.normal_(p)
    x = sequence(form, "batch_first" in options).requires_grad_()
    expected, got = tensors(ours(x)), tensors(run_in_steps(ours, x))
    torch.testing.assert_close(got, expected)
    leaves = [x, *ours.parameters()]
    torch.testing.assert_close(gradients(got, leaves), gradients(expected, leaves))


def test_step_drops_between_layers_in_training() -> None:
    ours = build("gru", num_layers=2, dropout=0.5)
    x = torch.randn(1, 3, INPUT, dtype=torch.float64)
    for module in (ours, ours.eval()):
        torch.manual_seed(1)
        expected = module(x)[0][0]
        torch.manual_seed(1)
        assert torch.equal(module.step(x[0])[0], expected)


def test_hooks_see_steps() -> None:
    ours, calls = build("gru"), []
    ours.register_forward_hook(lambda *args: calls.append(args))
    ours.step(torch.randn(3, INPUT, dtype=torch.float64))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_mistakes_of_step(name: str) -> None:
    make = getattr(rnn_fused, name)
    x = torch.randn(3, INPUT)
    with pytest.raises(ValueError, match=f"{name}: step needs bidirectional=False"):
        make(INPUT, HIDDEN, bidirectional=True).step(x)
    with pytest.raises(ValueError, match=r"1D or 2D.*got 3D"):
        make(INPUT, HIDDEN).step(x.unsqueeze(0))
    with pytest.raises(RuntimeError, match="Expected 4, got 5"):
        make(INPUT, HIDDEN).step(torch.randn(3, INPUT + 1))


@pytest.mark.own_ops
@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("batch", "length"), [(1, 12), (1, 16), (3, 4), (3, 23), (12, 1), (16, 1), (16, 16)]
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_chunks_of_12_rows_give_the_bits_of_the_whole(
    kind: str, dtype: torch.dtype, batch: int, length: int, training: bool
) -> None:
    ours = build(kind, 33, 40, num_layers=2, dtype=dtype)
    x = torch.randn(4 * length, batch, 33, dtype=dtype)
    with torch.set_grad_enabled(training):
        whole, parts = ours(x), run_in_parts(ours, x.split(length))
    torch.testing.assert_close(tensors(parts), tensors(whole), rtol=0, atol=0)


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_smaller_chunks_are_close(kind: str, dtype: torch.dtype) -> None:
    """They sum in another order; c of 16-bit layers is rounded where a chunk ends."""
    ours = build(kind, 33, 40, num_layers=2, dtype=dtype)
    x = torch.randn(16, 2, 33, dtype=dtype)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    for length in (1, 3, 5):
        parts = run_in_parts(ours, x.split(length))
        torch.testing.assert_close(tensors(parts), tensors(ours(x)), **tolerance)


# Truncated back-propagation through time


def test_detach_state() -> None:
    h, c = torch.ones(2, requires_grad=True) * 2, torch.ones(3, requires_grad=True) * 3
    detached = rnn_fused.detach_state(([h, (c, None)], h))
    assert isinstance(detached, tuple)
    assert isinstance(detached[0], list)
    assert not any(t.requires_grad for t in tensors(detached))
    assert [t.data_ptr() for t in tensors(detached)] == [t.data_ptr() for t in (h, c, h)]
    assert h.requires_grad
    assert rnn_fused.detach_state(None) is None
    for mistake in ("h", 1.0, {"h": h}, PackedSequence(h, torch.tensor([2]))):
        with pytest.raises(TypeError, match=f"got {type(mistake).__name__}"):
            rnn_fused.detach_state(mistake)


@layers
def test_truncated_gradients_stop_at_the_chunk(kind: str) -> None:
    ours = build(kind)
    first, second = (sequence("padded").requires_grad_() for _ in range(2))
    _, state = ours(first)
    output, _ = ours(second, rnn_fused.detach_state(state))
    grads = torch.autograd.grad(output.sum(), (first, second), allow_unused=True)
    assert grads[0] is None
    assert grads[1].any()


# Compilation


@pytest.mark.own_ops
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("form", ["padded", "unbatched", "packed_unsorted"])
def test_options_compile_to_one_graph(kind: str, form: str) -> None:
    options = {"batch_first": True, "learn_initial_state": True, "batch_first_states": True}
    ours = build(kind, num_layers=2, bidirectional=True, **options)
    for p in initial(ours):
        nn.init.normal_(p)

    def run(x: Any, state: Any) -> list[Tensor]:
        return tensors(ours(x, rnn_fused.detach_state(state)))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = sequence(form, True)
    for state in (None, ours(x)[1]):
        expected, got = run(x, state), compiled(x, state)
        torch.testing.assert_close(got, expected)
        leaves = list(ours.parameters())[: -2 if state is not None else None]
        if state is None:
            torch.testing.assert_close(gradients(got, leaves), gradients(expected, leaves))


@pytest.mark.own_ops
@pytest.mark.parametrize("kind", ["lstm", "rnn_tanh"])
def test_step_compiles_to_one_graph(kind: str) -> None:
    ours = build(kind, num_layers=2, batch_first=True, learn_initial_state=True)
    torch._dynamo.reset()
    compiled = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, INPUT, dtype=torch.float64)
    for state in (None, ours.step(x)[1]):
        torch.testing.assert_close(tensors(compiled(x, state)), tensors(ours.step(x, state)))


def test_torchs_own_op_is_given_contiguous_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's refuses others, such as one state for all sequences."""
    monkeypatch.setattr(rnn_fused.families, "has_kernels", lambda *_: False)
    given, lstm = [], torch._VF.lstm
    monkeypatch.setattr(
        torch._VF, "lstm", lambda x, states, *rest: given.extend(states) or lstm(x, states, *rest)
    )
    module = rnn_fused.LSTM(3, 4, 2, batch_first=True, learn_initial_state=True)
    module(torch.randn(5, 6, 3))
    module = rnn_fused.LSTM(3, 4, 2, batch_first=True, batch_first_states=True)
    module(torch.randn(5, 6, 3), (torch.zeros(5, 2, 4), torch.zeros(5, 2, 4)))
    assert len(given) == 8
    assert all(state.is_contiguous() for state in given)

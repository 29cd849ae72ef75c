"""gate_slope, cell_clip, grad_clip_value, the c of every step, and gates that are rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import (
    KINDS,
    Problem,
    assert_accurate,
    assert_agrees_with_reference,
    each_kind,
    each_layout,
    problem,
    values_and_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

import rnn_fused
from rnn_fused import library, ops, reference
from rnn_fused.reference import PLAIN, CellOptions

MODULES = ("LSTM", "GRU", "RNN")
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}
rebuilt = partial(ops.layer, recompute=True)


def with_options(case: Problem, grad_clip_value: float | None = 0.05) -> Problem:
    """All of them that the cell has, so tight that they matter."""
    lstm = case.cell == "lstm"
    options = CellOptions(
        gate_slope=1.7 if library.GATES[case.cell] > 1 else 1.0,
        cell_clip=0.3 if lstm else None,
        grad_clip_value=grad_clip_value,
    )
    return replace(case, options=options, all_cells=lstm)


@each_kind
@each_layout
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("resets", [None, 0.3], ids=["whole", "resets"])
def test_agrees_with_the_reference(
    kind: str,
    lengths: Sequence[int] | None,
    directions: int,
    resets: float | None,
    device: str,
) -> None:
    sizes = {"directions": directions, "lengths": lengths, "resets": resets}
    case = with_options(problem(**KINDS[kind], **sizes, reset_state=bool(resets), device=device))
    assert_agrees_with_reference(case, **ROUNDING)
    ours, again = (values_and_gradients(case, layer) for layer in (ops.layer, rebuilt))
    torch.testing.assert_close(again, ours, **ROUNDING)
    plain = values_and_gradients(replace(case, options=PLAIN), ops.layer)
    if kind != "rnn_relu":  # which may pass no gradient at all
        assert not all(torch.equal(plain[name], ours[name]) for name in plain)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Problem, bool]:
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    gated, lstm = library.GATES[kind["cell"]] > 1, kind["cell"] == "lstm"
    lengths = draw(st.none() | st.lists(st.integers(1, 6), min_size=1, max_size=5))
    if lengths is not None:
        lengths.sort(reverse=True)
    options = CellOptions(
        gate_slope=draw(st.sampled_from([0.5, 1.0, 3.0])) if gated else 1.0,
        cell_clip=draw(st.none() | st.floats(0.05, 1)) if lstm else None,
        grad_clip_value=draw(st.none() | st.floats(0.01, 1)),
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    case = problem(
        **kind,
        T=draw(st.integers(1, 6)),
        B=draw(st.integers(1, 5)),
        I=draw(st.integers(1, 9)),
        H=draw(st.integers(3, 19)),
        directions=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        lengths=lengths,
        resets=draw(st.none() | st.floats(0, 1)),
    )
    recompute = draw(st.booleans())
    return replace(case, options=options, all_cells=lstm and draw(st.booleans())), recompute


@given(cases())
def test_any_combination_agrees_with_the_reference(drawn: tuple[Problem, bool]) -> None:
    case, recompute = drawn
    ours = values_and_gradients(case, rebuilt if recompute else ops.layer)
    torch.testing.assert_close(ours, values_and_gradients(case, reference.layer), **ROUNDING)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [8, 48])
def test_accuracy(kind: str, dtype: torch.dtype, H: int, device: str) -> None:
    case = problem(**KINDS[kind], T=7, B=18, I=24, H=H, dtype=dtype, device=device)
    # Where clipping begins is a jump for c's gradient, and rounding decides on which side.
    assert_accurate(replace(with_options(case), options=CellOptions(grad_clip_value=0.05)))
    if case.cell in ("lstm", "gru"):
        assert_accurate(replace(case, options=CellOptions(gate_slope=1.7)))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rebuilt_gates_change_nothing_but_rounding(
    kind: str, dtype: torch.dtype, device: str
) -> None:
    sizes = {"T": 9, "B": 18, "I": 24, "H": 48, "directions": 2, "dtype": dtype, "device": device}
    case = with_options(problem(**KINDS[kind], **sizes, resets=0.2))
    ours, again = (values_and_gradients(case, layer) for layer in (ops.layer, rebuilt))
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(again, ours, rtol=tolerance, atol=tolerance)


@each_kind
@each_layout
@pytest.mark.parametrize("layer", [ops.layer, rebuilt], ids=["gates", "recompute"])
def test_gradcheck(
    kind: str, lengths: Sequence[int] | None, layer: Callable[..., Any], device: str
) -> None:
    """Of the true derivatives: without grad_clip_value, which changes them."""
    case = problem(**KINDS[kind], lengths=lengths, resets=0.3, device=device)
    function = with_options(case, grad_clip_value=None).function(layer)
    assert gradcheck(function, case.tensors, fast_mode=True)
    assert gradgradcheck(function, case.tensors, fast_mode=True)


@pytest.mark.own_ops
@each_kind
def test_derivatives_of_the_ops_themselves(kind: str) -> None:
    case = problem(**KINDS[kind], H=3)
    case = replace(with_options(case, grad_clip_value=None), all_cells=False)
    function = case.op_function()
    assert gradcheck(function, case.tensors, fast_mode=True)
    assert gradgradcheck(function, case.tensors, fast_mode=True)


@each_kind
def test_func_transforms_and_forward_mode(kind: str) -> None:
    case = with_options(problem(**KINDS[kind], T=2, B=2, I=2, H=3))
    tensors = tuple(x.detach() for x in case.tensors)
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        ours = transform(case.loss(ops.layer))(*tensors)
        torch.testing.assert_close(ours, transform(case.loss(reference.layer))(*tensors))
    inputs = torch.stack([tensors[0], 2 * tensors[0]]), *tensors[1:]
    in_dims = 0, *[None] * (len(tensors) - 1)
    for transform in (case.function, lambda layer: torch.func.grad(case.loss(layer))):
        ours, exact = (
            torch.func.vmap(transform(layer), in_dims)(*inputs)
            for layer in (ops.layer, reference.layer)
        )
        torch.testing.assert_close(ours, exact)


@pytest.mark.own_ops
@each_kind
@pytest.mark.parametrize("recompute", [False, True], ids=["gates", "recompute"])
def test_compiles_to_one_graph(kind: str, recompute: bool) -> None:
    torch._dynamo.reset()

    def layer(*args: Any, **options: Any) -> Any:
        return ops.layer(*args, **options, recompute=recompute)

    fast = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for T in (5, 6, 9):
        case = with_options(problem(**KINDS[kind], T=T, B=T + 6, directions=2))
        exact = values_and_gradients(case, ops.layer)
        torch.testing.assert_close(values_and_gradients(case, fast), exact)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.own_ops
@pytest.mark.parametrize("kind", ["lstm_proj", "gru"])
@pytest.mark.parametrize("save_gates", [True, False], ids=["gates", "recompute"])
def test_opcheck(kind: str, save_gates: bool) -> None:
    case = with_options(problem(**KINDS[kind], directions=2, dtype=torch.float32))
    torch.library.opcheck(library.layer_forward, (*case.op_arguments, save_gates, True))
    with torch.no_grad():
        output, h_n, _, gates, cells = library.layer_forward(*case.op_arguments, save_gates, True)
    grad_cells = torch.randn_like(cells) if case.cell == "lstm" else None
    grads = torch.randn_like(output), torch.randn_like(h_n), None, grad_cells
    frozen = case.map(lambda x: x.detach())
    arguments = *grads, *frozen.op_arguments, output, gates, cells, True, True, True
    torch.library.opcheck(library.layer_backward, arguments)


@each_kind
def test_what_is_kept_for_the_backward_pass(kind: str) -> None:
    def kept(recompute: bool) -> int:
        case = problem(**KINDS[kind], T=7, B=5, H=8)
        sizes = []

        def count(x: Tensor) -> Tensor:
            sizes.append(0 if any(x is t for t in case.tensors) else x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            ops.layer(
                *(case.input, case.hx, case.cx, case.weights), cell=case.cell, recompute=recompute
            )
        return sum(sizes)

    gates = 0 if kind.startswith("rnn") else 7 * 5 * 4 * 8
    assert kept(recompute=False) - kept(recompute=True) == gates


def test_an_empty_batch() -> None:
    case = with_options(problem("lstm", B=0))
    for layer in (ops.layer, rebuilt):
        assert [o.shape for o in case.run(layer)] == [(3, 0, 4), (1, 0, 4), (1, 0, 4), (3, 0, 4)]
        gradients = torch.autograd.grad(case.loss(layer)(*case.tensors), case.tensors)
        assert not any(g.any() for g in gradients)


# Modules ------------------------------------------------------------------------------------------


def pair(name: str, sizes: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """The fused module with the options, and torch.nn's with the same weights; float64."""
    torch.manual_seed(0)
    fused = getattr(rnn_fused, name)(3, 5, **sizes, **options).double()
    stock = getattr(nn, name)(3, 5, **sizes).double()
    stock.load_state_dict(fused.state_dict())
    return fused, stock


def gradients(module: nn.Module, x: Tensor, loss: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(loss, (x, *module.parameters()))]


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_gate_slope_scales_what_enters_the_gates(name: str) -> None:
    sizes = {"num_layers": 2, "bidirectional": True}
    fused, stock = pair(name, sizes, gate_slope=2.5)
    rows = torch.full((library.GATES[name.lower()], 5), 2.5, dtype=torch.float64)
    rows[2] = 1  # LSTM's g, GRU's n
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(rows.view(-1, *[1] * (parameter.dim() - 1)))
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(fused(x), stock(x), **ROUNDING)


def cell_of(lstm: rnn_fused.LSTM) -> nn.LSTMCell:
    """torch.nn's, with the weights of a layer that `pair` made."""
    cell = nn.LSTMCell(3, 5).double()
    cell.load_state_dict({name[: -len("_l0")]: w for name, w in lstm.state_dict().items()})
    return cell


def lstm_by_hand(
    cell: nn.LSTMCell, x: Tensor, on_state: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """h and c of every step; on_state sees the state between two steps."""
    h = c = x.new_zeros(x.shape[1], 5)
    states = []
    for step in x:
        h, c = cell(step, on_state(h, c))
        states.append((h, c))
    return torch.stack([h for h, _ in states]), torch.stack([c for _, c in states])


def test_grad_clip_value_clips_between_the_steps() -> None:
    fused, _ = pair("LSTM", {}, grad_clip_value=0.01)
    cell = cell_of(fused)

    def clipped(h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        states = h + 0, c + 0  # nodes of their own: only what passes here is clipped
        for state in states:
            if state.requires_grad:
                state.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        return states

    x = torch.randn(9, 4, 3, dtype=torch.float64, requires_grad=True)
    h, c = lstm_by_hand(cell, x, clipped)
    output, (_, c_n) = fused(x)
    torch.testing.assert_close((output, c_n[0]), (h, c[-1]), **ROUNDING)
    torch.testing.assert_close(
        gradients(fused, x, (output**2).sum() + c_n.sum()),
        gradients(cell, x, (h**2).sum() + c[-1].sum()),
        **ROUNDING,
    )


def test_a_clipped_gradient_does_not_explode() -> None:
    def first_gradient(**options: Any) -> float:
        torch.manual_seed(0)
        rnn = rnn_fused.RNN(4, 16, nonlinearity="relu", **options)
        with torch.no_grad():
            rnn.weight_hh_l0.copy_(1.5 * torch.eye(16))
        x = torch.rand(60, 2, 4, requires_grad=True)
        rnn(x)[0][-1].sum().backward()
        return float(x.grad[0].norm())

    assert first_gradient() > 1e8
    assert first_gradient(grad_clip_value=1.0) < 100


def test_cell_clip_bounds_c() -> None:
    fused, stock = pair("LSTM", {}, cell_clip=0.1)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    output, (h_n, c_n) = fused(x)
    assert c_n.abs().max() == 0.1
    assert stock(x)[1][1].abs().max() > 0.1
    state = torch.zeros(1, 4, 5, dtype=torch.float64), torch.zeros(1, 4, 5, dtype=torch.float64)
    for t in range(6):  # h follows from the clipped c: o * tanh(c)
        _, (h, c) = stock(x[t : t + 1], state)
        clipped = c.clamp(-0.1, 0.1)
        h = h / c.tanh() * clipped.tanh()
        torch.testing.assert_close(output[t], h[0], **ROUNDING)
        state = h, clipped
    torch.testing.assert_close((h_n, c_n), state, **ROUNDING)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("form", ["time first", "batch first", "unbatched", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_all_states(name: str, form: str, bidirectional: bool) -> None:
    sizes = {"num_layers": 2, "bidirectional": bidirectional, "batch_first": form == "batch first"}
    fused, _ = pair(name, sizes)
    D, x = 1 + bidirectional, torch.randn(6, 4, 3, dtype=torch.float64)
    given: Any = x.requires_grad_()
    if form == "unbatched":
        given = x[:, 0]
    elif form == "packed":
        given = pack_sequence([x[:n, b] for b, n in enumerate((3, 6, 1, 4))], enforce_sorted=False)
    output, state, layers = fused(given, return_all_states=True)
    plain, final = fused(given)
    assert len(layers) == 2
    for layer, states in enumerate(layers):
        for kind, every in enumerate(states if name == "LSTM" else (states,)):
            last = (state[kind] if name == "LSTM" else state)[D * layer : D * (layer + 1)]
            if isinstance(given, PackedSequence):
                assert isinstance(every, PackedSequence)
                sequences = unpack_sequence(every)
            elif form == "unbatched":
                sequences, last = [every], last.unsqueeze(1)
            else:
                sequences = [*every.unbind(0 if form == "batch first" else 1)]
            for b, sequence in enumerate(sequences):
                ends = sequence[-1, :5], sequence[0, 5:]
                for d in range(D):
                    assert torch.equal(ends[d], last[d, b])
        if name == "LSTM":
            h, c = (s.data if form == "packed" else s for s in states)
            assert c.shape == h.shape
            assert (h.abs() <= c.tanh().abs()).all()  # h = o * tanh(c)
    top = layers[-1][0] if name == "LSTM" else layers[-1]
    if form == "packed":
        output, plain, top = output.data, plain.data, top.data
    assert torch.equal(output, plain)
    assert torch.equal(output, top)
    torch.testing.assert_close(state, final, rtol=0, atol=0)


def test_gradients_reach_every_c() -> None:
    fused, _ = pair("LSTM", {})
    cell = cell_of(fused)
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    _, _, ((h, c),) = fused(x, return_all_states=True)
    expected = lstm_by_hand(cell, x, lambda h, c: (h, c))
    torch.testing.assert_close((h, c), expected, **ROUNDING)
    torch.testing.assert_close(
        gradients(fused, x, (h * c**2).sum()),
        gradients(cell, x, (expected[0] * expected[1] ** 2).sum()),
        **ROUNDING,
    )


@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_everything_at_once_equals_each_sequence_alone(batch_first: bool, device: str) -> None:
    torch.manual_seed(0)
    options = {"gate_slope": 1.5, "cell_clip": 0.3, "grad_clip_value": 0.1, "save": "recompute"}
    sizes = {"num_layers": 2, "bidirectional": True, "proj_size": 4, "batch_first": batch_first}
    lstm = rnn_fused.LSTM(3, 5, **sizes, **options).to(device, torch.float64)
    time, lengths = int(batch_first), (3, 6, 0, 1)
    x = torch.randn(4, 6, 3) if batch_first else torch.randn(6, 4, 3)
    x = x.to(device, torch.float64).requires_grad_()
    resets = torch.rand(x.shape[:2], device=device) < 0.3

    def loss(*states: Tensor) -> Tensor:
        return sum((state**2).sum() for state in states)

    given = torch.tensor(lengths, device=device)
    _, _, layers = lstm(x, lengths=given, resets=resets, return_all_states=True)
    (whole,) = torch.autograd.grad(loss(*layers[0], *layers[1]), x)
    for b, n in enumerate(lengths):
        rows = x.select(1 - time, b), resets.select(1 - time, b)
        assert not whole.select(1 - time, b)[n:].any()
        if n == 0:
            continue
        alone, flags = (row[:n].unsqueeze(1 - time) for row in rows)
        _, _, own = lstm(alone, resets=flags, return_all_states=True)
        (gradient,) = torch.autograd.grad(loss(*own[0], *own[1]), alone)
        for every, expected in zip((*layers[0], *layers[1]), (*own[0], *own[1]), strict=True):
            sequence = every.select(1 - time, b)
            torch.testing.assert_close(sequence[:n], expected.squeeze(1 - time), **ROUNDING)
            assert not sequence[n:].any()
        actual = whole.select(1 - time, b)[:n]
        torch.testing.assert_close(actual, gradient.squeeze(1 - time), **ROUNDING)


@pytest.mark.parametrize("name", MODULES)
def test_recompute_of_a_stack(name: str) -> None:
    sizes = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    fused, stock = pair(name, sizes, save="recompute")
    x = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    results = [(module, module(x)[0]) for module in (fused, stock)]
    ours, theirs = (gradients(module, x, (y**2).sum()) for module, y in results)
    torch.testing.assert_close(ours, theirs, **ROUNDING)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("LSTM", {"gate_slope": 0}, ValueError, "gate_slope must be positive and finite, got 0"),
        ("LSTM", {"gate_slope": "2"}, TypeError, "gate_slope should be a number, got: str"),
        ("RNN", {"gate_slope": 2.0}, ValueError, "gate_slope needs the gates of .*RNN, got 2.0"),
        ("LSTM", {"cell_clip": -1.0}, ValueError, "cell_clip must be positive and .* got -1.0"),
        ("GRU", {"cell_clip": 1.0}, ValueError, "cell_clip needs the c of an LSTM, not GRU"),
        ("RNN", {"cell_clip": 1.0}, ValueError, "cell_clip needs the c of an LSTM, not RNN"),
        ("GRU", {"grad_clip_value": float("inf")}, ValueError, "grad_clip_value .* got inf"),
        ("GRU", {"grad_clip_value": True}, TypeError, "grad_clip_value should be a number"),
        ("LSTM", {"save": "h"}, ValueError, "save must be 'gates' or 'recompute', got 'h'"),
    ],
)
def test_wrong_options(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(rnn_fused, name)(3, 5, **options)


def test_save_may_change_later() -> None:
    module, x = rnn_fused.GRU(3, 5, 2), torch.randn(4, 2, 3, requires_grad=True)
    expected = torch.autograd.grad(module(x)[0].sum(), x)
    module.save = "recompute"
    torch.testing.assert_close(torch.autograd.grad(module(x)[0].sum(), x), expected)
    module.save = "Recompute"
    with pytest.raises(ValueError, match="save must be 'gates' or 'recompute', got 'Recompute'"):
        module(x)


def test_the_op_refuses_what_its_cell_lacks() -> None:
    for cell, options, message in (
        ("rnn_tanh", CellOptions(gate_slope=2.0), r"^\[rnn_tanh\] gate_slope needs gates"),
        ("gru", CellOptions(cell_clip=2.0), r"^\[gru\] cell_clip needs the c of an LSTM"),
        ("lstm", CellOptions(grad_clip_value=-1.0), r"grad_clip_value must be positive"),
    ):
        with pytest.raises(RuntimeError, match=message):
            replace(problem(cell), options=options).run(ops.layer)


def test_a_bound_that_float32_has_not() -> None:
    x = torch.randn(2, 1, 3)
    with pytest.raises(RuntimeError, match=r"cell_clip must be .* in float32, got 1e-46"):
        rnn_fused.LSTM(3, 5, cell_clip=1e-46)(x)
    with pytest.raises(RuntimeError, match=r"gate_slope must be .* in float32, got 1e\+39"):
        rnn_fused.GRU(3, 5, gate_slope=1e39)(x)
    assert not rnn_fused.LSTM(3, 5, cell_clip=1e-46).double()(x.double())[0].isnan().any()


def test_options_are_kept_and_shown() -> None:
    options = {"gate_slope": 2.0, "cell_clip": 3.0, "grad_clip_value": 0.5, "save": "recompute"}
    module = rnn_fused.LSTM(3, 5, **options)
    shown = repr(module)
    for name, value in options.items():
        assert getattr(module, name) == value
        assert f"{name}={value!r}" in shown
    assert rnn_fused.revert(module).skipped == {"": "torch.nn has no gate_slope=2.0"}
    assert "gate_slope" not in repr(rnn_fused.LSTM(3, 5))

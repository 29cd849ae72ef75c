"""Stacks of layers, which are one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import KINDS, Problem, each_kind, error, problem
from hypothesis import given
from hypothesis import strategies as st
from pairs import LAYERS, tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_fused
from rnn_fused import library, ops
from rnn_fused.explain import DTYPES, GPUS, Gpu, current_gpu, plan_stack

own_ops = pytest.mark.own_ops  # about the operators of the installed library
each_module = pytest.mark.parametrize("which", LAYERS)
I, H, L = 7, 19, 3  # noqa: E741


def make(which: str, **options: Any) -> Any:
    name, own = LAYERS[which]
    torch.manual_seed(7)
    return getattr(rnn_fused, name)(I, H, **{"num_layers": L, **own, **options})


@contextmanager
def layers_in_turn() -> Iterator[None]:
    """With a call for each layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "runs_stack", lambda *_: False)
        yield


def layer_after_layer(module: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    with layers_in_turn(), torch.no_grad():
        return [*tensors(module(*args, **kwargs))]


def values_and_gradients(
    module: Any, leaves: Sequence[Tensor], *args: Any, retain_graph: bool = False, **kwargs: Any
) -> list[Tensor]:
    """The module's results and, where they depend on these and the weights, its gradients."""
    results = tensors(module(*args, **kwargs))
    every = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
    weights = torch.arange(2 * H, dtype=torch.float64).sin()  # no two units alike
    loss = sum((r.double().square() * weights[: r.size(-1)].to(r.device)).sum() for r in results)
    grads = torch.autograd.grad(loss, every, retain_graph=retain_graph, allow_unused=True)
    return [*(r.detach() for r in results), *(g for g in grads if g is not None)]


def assert_same(ours: Any, theirs: Any, device: str = "cpu") -> None:
    """The same bits; up to rounding on a device, where layers that run side by side may have other
    blocks."""
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        largest = b.abs().max().item() if device != "cpu" and b.numel() > 0 else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(b.dtype).eps * largest)


@own_ops
@each_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "two ways"])
@pytest.mark.parametrize("T", [1, 40])
def test_one_call_equals_layer_after_layer(
    which: str,
    dtype: torch.dtype,
    bidirectional: bool,
    T: int,
    device: str,
    ops_called: list[str],
) -> None:
    module = make(which, bidirectional=bidirectional, dtype=dtype, device=device)
    x = torch.randn(T, 3, I, dtype=dtype, device=device)
    expected = layer_after_layer(module, x)
    ops_called.clear()
    with torch.no_grad():
        ours = module(x)
    assert ops_called == ["stack_forward"]
    assert_same(ours, expected, device)


@own_ops
@pytest.mark.parametrize("which", ["lstm_proj", "gru"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "two ways"])
def test_every_form_of_input_and_option(
    which: str, bidirectional: bool, device: str, ops_called: list[str]
) -> None:
    options = {"gate_slope": 1.5, "learn_initial_state": True, "batch_first_states": True}
    options |= {"cell_clip": 0.3} if which == "lstm_proj" else {}
    options |= {"batch_first": True, "bidirectional": bidirectional, "device": device}
    module = make(which, dtype=torch.float64, **options)
    nn.init.normal_(module.initial_h)
    x = torch.randn(4, 40, I, dtype=torch.float64, device=device)
    lengths = torch.tensor([3, 40, 0, 25])
    packed = pack_padded_sequence(x, torch.tensor([3, 40, 1, 25]), True, enforce_sorted=False)
    with torch.no_grad():
        state = module(x)[1]
    flags = torch.rand(4, 40, device=device) < 0.3
    calls = {
        "lengths": ((x,), {"lengths": lengths}),
        "packed": ((packed,), {}),
        "state": ((x, state), {}),
        "resets": ((x,), {"resets": flags, "reset_state": state}),
        "unbatched": ((x[0],), {}),
        "no sequences": ((x[:0],), {}),
    }
    for name, (args, kwargs) in calls.items():
        expected = layer_after_layer(module, *args, **kwargs)
        ops_called.clear()
        with torch.no_grad():
            ours = module(*args, **kwargs)
        assert ops_called == ["stack_forward"], name
        assert_same(ours, expected, device)


@own_ops
@given(
    which=st.sampled_from([*LAYERS]),
    T=st.integers(1, 20),
    B=st.integers(0, 5),
    layers=st.integers(2, 5),
    bias=st.booleans(),
    bidirectional=st.booleans(),
)
def test_any_shape(
    which: str, T: int, B: int, layers: int, bias: bool, bidirectional: bool
) -> None:
    module = make(which, num_layers=layers, bias=bias, bidirectional=bidirectional)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        ours = module(x)
    assert_same(ours, layer_after_layer(module, x))


@own_ops
def test_a_step_of_a_stream_is_one_call(device: str, ops_called: list[str]) -> None:
    module = make("gru", device=device)
    x = torch.randn(5, 2, I, device=device)
    with torch.inference_mode():
        whole, final = module(x)
        state, outputs = None, []
        for x_t in x:
            output, state = module.step(x_t, state)
            outputs.append(output)
    assert ops_called == ["stack_forward"] * 6
    torch.testing.assert_close(torch.stack(outputs), whole)
    torch.testing.assert_close(state, final)


@own_ops
@each_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "two ways"])
@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("T", [1, 40])
def test_training_in_one_call_equals_layer_after_layer(
    which: str,
    dtype: torch.dtype,
    bidirectional: bool,
    save: str,
    T: int,
    device: str,
    ops_called: list[str],
) -> None:
    options = {"bidirectional": bidirectional, "save": save, "dropout": 0.3}
    module = make(which, **options, dtype=dtype, device=device)
    x = torch.randn(T, 3, I, dtype=dtype, device=device, requires_grad=True)
    results = []
    for in_turn in (False, True):
        torch.manual_seed(1)  # the same dropout
        with layers_in_turn() if in_turn else nullcontext():
            results.append(values_and_gradients(module, [x], x))
    assert ops_called[:2] == ["stack_forward", "stack_backward_"]
    assert ops_called[2:] == ["layer_forward"] * L + ["layer_backward_"] * L
    assert_same(results[0], results[1], device)


@own_ops
@pytest.mark.parametrize("which", ["lstm_proj", "gru"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "two ways"])
def test_training_with_every_form_of_input_and_option(
    which: str, bidirectional: bool, device: str, ops_called: list[str]
) -> None:
    options = {"gate_slope": 1.5, "learn_initial_state": True, "batch_first_states": True}
    options |= {"cell_clip": 0.3} if which == "lstm_proj" else {}
    options |= {"grad_clip_value": 0.1, "dropout": 0.3}
    options |= {"batch_first": True, "bidirectional": bidirectional, "device": device}
    module = make(which, dtype=torch.float64, **options)
    nn.init.normal_(module.initial_h)
    x = torch.randn(4, 40, I, dtype=torch.float64, device=device, requires_grad=True)
    lengths = torch.tensor([3, 40, 0, 25])
    packed = pack_padded_sequence(x, torch.tensor([3, 40, 1, 25]), True, enforce_sorted=False)
    with torch.no_grad():
        state: Any = module(x)[1]
    state = tuple(s.requires_grad_() for s in state) if which != "gru" else state.requires_grad_()
    flags = torch.rand(4, 40, device=device) < 0.3
    calls: dict[str, Any] = {
        "lengths": ([x], (x,), {"lengths": lengths}),
        "packed": ([x], (packed,), {}),
        "state": ([x, *tensors(state)], (x, state), {}),
        "resets": ([*tensors(state)], (x,), {"resets": flags, "reset_state": state}),
        "unbatched": ([x], (x[0],), {}),
        "no sequences": ([x], (x[:0],), {}),
    }
    for name, (leaves, args, kwargs) in calls.items():
        results = []
        for in_turn in (False, True):
            torch.manual_seed(1)
            ops_called.clear()
            with layers_in_turn() if in_turn else nullcontext():
                results.append(
                    values_and_gradients(module, leaves, *args, **kwargs, retain_graph=True)
                )
            if not in_turn:
                assert ops_called == ["stack_forward", "stack_backward"], name
        assert len(results[0]) > len(leaves), name
        assert_same(results[0], results[1], device)


@own_ops
@given(
    which=st.sampled_from([*LAYERS]),
    T=st.integers(1, 20),
    B=st.integers(0, 5),
    layers=st.integers(2, 5),
    bias=st.booleans(),
    bidirectional=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_training_with_any_shape(
    which: str, T: int, B: int, layers: int, bias: bool, bidirectional: bool, dropout: float
) -> None:
    options = {"bias": bias, "bidirectional": bidirectional, "dropout": dropout}
    module = make(which, num_layers=layers, **options)
    x = torch.randn(T, B, I, requires_grad=True)
    torch.manual_seed(1)
    ours = values_and_gradients(module, [x], x)
    torch.manual_seed(1)
    with layers_in_turn():
        assert_same(ours, values_and_gradients(module, [x], x))


@own_ops
@each_module
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "two ways"])
def test_derivatives(which: str, dropout: float, bidirectional: bool) -> None:
    options = {"num_layers": 2, "dropout": dropout, "bidirectional": bidirectional}
    name, own = LAYERS[which]
    module = getattr(rnn_fused, name)(2, 4, **{**own, **options}, dtype=torch.float64)
    state = tuple(torch.randn(s, dtype=torch.float64) for s in module._state_sizes(2))
    names = [name for name, _ in module.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        hx: Any = rest[: len(state)] if len(state) == 2 else rest[0]
        weights = dict(zip(names, rest[len(state) :], strict=True))
        results = torch.func.functional_call(module, weights, (x, hx))
        assert "StackForward" in str(results[0].grad_fn)
        return tuple(tensors(results))

    inputs = x, *(t.detach().requires_grad_() for t in (*state, *module.parameters()))
    assert torch.autograd.gradcheck(run, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@own_ops
@pytest.mark.parametrize("who", ["weights", "input", "state", "top", "bottom", "biases"])
def test_gradients_of_some(who: str, ops_called: list[str]) -> None:
    """Of some weights alone, layers are calls of their own: those below may then have no gradient
    at all."""
    module = make("gru").requires_grad_(who == "weights")
    for name, parameter in module.named_parameters():
        last, first, bias = f"l{L - 1}" in name, "l0" in name, "bias" in name
        if (who, True) in (("top", last), ("bottom", first), ("biases", bias)):
            parameter.requires_grad_()
    x = torch.randn(4, 2, I, requires_grad=who == "input")
    state = torch.randn(L, 2, H, requires_grad=who == "state")
    leaves = [t for t in (x, state) if t.requires_grad]
    ours = values_and_gradients(module, leaves, x, state)
    stacked = who in ("weights", "input", "state")
    assert ops_called[0] == ("stack_forward" if stacked else "layer_forward")
    assert ops_called.count("layer_backward_") == {"top": 1}.get(who, 0 if stacked else L)
    with layers_in_turn():
        assert_same(ours, values_and_gradients(module, leaves, x, state))
    assert len(ours) > 2


@own_ops
def test_the_graph_may_be_used_again(ops_called: list[str]) -> None:
    """Then what is saved stays; in its last use it is given back."""
    module, x = make("lstm"), torch.randn(4, 2, I, requires_grad=True)
    output, _ = module(x)
    first = torch.autograd.grad(output.sum(), x, retain_graph=True)
    second = torch.autograd.grad(output.sum(), x)
    assert ops_called == ["stack_forward", "stack_backward", "stack_backward_"]
    assert torch.equal(*first, *second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), x)


@own_ops
def test_the_layers_may_be_differentiated_in_batches() -> None:
    module, x = make("gru", dtype=torch.float64), torch.randn(3, 2, I, dtype=torch.float64)
    batch = torch.randn(5, 3, 2, H, dtype=torch.float64)

    def gradients(x: Tensor, **options: Any) -> Any:
        return torch.autograd.grad(module(x)[0], x, batch, is_grads_batched=True, **options)[0]

    ours = gradients(x.requires_grad_(), create_graph=True)
    each = [torch.autograd.grad(module(x)[0], x, v)[0] for v in batch]
    torch.testing.assert_close(ours, torch.stack(each))
    output, _ = module(x)
    assert "StackForward" in str(output.grad_fn)

    def vjp(v: Tensor) -> Any:
        return torch.autograd.grad(output, x, v, retain_graph=True)[0]

    torch.testing.assert_close(torch.func.vmap(vjp)(batch), torch.stack(each))
    (second,) = torch.autograd.grad(ours.square().sum(), module.weight_ih_l0)
    state = torch.randn(L, 2, H, dtype=torch.float64)  # of whose gradient nobody asks

    def loss(x: Tensor) -> Tensor:
        return module(x, state)[0].square().sum()

    hessians = [torch.autograd.functional.hessian(loss, x, vectorize=v) for v in (True, False)]
    torch.testing.assert_close(*hessians)
    with layers_in_turn():
        ours = gradients(x, create_graph=True)
    torch.testing.assert_close(
        second, torch.autograd.grad(ours.square().sum(), module.weight_ih_l0)[0]
    )


@own_ops
def test_saved_tensors_go_through_hooks() -> None:
    module, x = make("lstm", dropout=0.5), torch.randn(4, 2, I, requires_grad=True)
    torch.manual_seed(1)
    expected = values_and_gradients(module, [x], x)
    torch.manual_seed(1)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> int:
        kept.append(t.clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        assert_same(values_and_gradients(module, [x], x), expected)
    outputs_and_masks = [t for t in kept if t.shape == (4, 2, H) and t.dtype == x.dtype]
    assert len(outputs_and_masks) == L + L - 1


@own_ops
def test_what_is_given_back_is_noticed() -> None:
    """By hooks that keep the saved tensors beyond the backward pass."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    module, x = make("lstm"), torch.randn(4, 2, I, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, _ = module(x)
    before = [t._version for t in kept]
    output.sum().backward()
    changed = [t for t, v in zip(kept, before, strict=True) if t._version != v]
    assert len(changed) == 2 * L  # gates and cells
    assert not any(t.numel() for t in changed)


@own_ops
@each_module
def test_a_backward_pass_that_failed_is_not_repeated(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gates may be gone; without gates to lose, the second one is right."""
    backward = library.stack_backward_

    def fail(*args: Any) -> None:
        backward(*args)
        raise RuntimeError("no memory")

    module, x = make(which), torch.randn(4, 2, I, requires_grad=True)
    output, _ = module(x)
    expected = torch.autograd.grad(output.sum(), x, retain_graph=True)
    monkeypatch.setattr(library, "stack_backward_", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        torch.autograd.grad(output.sum(), x)
    monkeypatch.setattr(library, "stack_backward_", backward)
    if which.startswith("rnn"):
        assert torch.equal(*torch.autograd.grad(output.sum(), x), *expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(output.sum(), x)


@own_ops
@pytest.mark.parametrize("which", ["lstm_proj", "gru"])
@pytest.mark.parametrize("save", ["gates", "recompute"])
def test_padded_batches_give_back_what_was_saved(
    which: str, save: str, ops_called: list[str]
) -> None:
    module = make(which, bidirectional=True, save=save)
    x, lengths = torch.randn(40, 4, I, requires_grad=True), torch.tensor([3, 40, 0, 25])
    ours = values_and_gradients(module, [x], x, lengths=lengths)
    assert ops_called == ["stack_forward", "stack_backward_"]
    with layers_in_turn():
        assert_same(ours, values_and_gradients(module, [x], x, lengths=lengths))


@own_ops
def test_all_states_are_of_calls_of_their_own(ops_called: list[str]) -> None:
    module, x = make("lstm"), torch.randn(4, 2, I)
    _, _, layers = module(x, return_all_states=True)
    assert len(layers) == L
    assert ops_called == ["layer_forward"] * L


@own_ops
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_dropout_falls_between_layers(grad: bool, ops_called: list[str]) -> None:
    module, x = make("lstm", dropout=0.5), torch.randn(4, 2, I)
    with torch.set_grad_enabled(grad):
        torch.manual_seed(1)
        dropped = module(x)
        assert ops_called == ["stack_forward"]
        torch.manual_seed(1)
        assert_same([t.detach() for t in tensors(dropped)], layer_after_layer(module, x))
        whole = module.eval()(x)
    assert_same([t.detach() for t in tensors(whole)], layer_after_layer(module, x))
    assert not torch.equal(dropped[0], whole[0])


@own_ops
def test_autocast(device: str, ops_called: list[str]) -> None:
    module, x = make("gru", dropout=0.5, device=device), torch.randn(4, 3, I, device=device)
    results = []
    for in_turn in (False, True):
        torch.manual_seed(1)
        with layers_in_turn() if in_turn else nullcontext(), torch.autocast(device, torch.bfloat16):
            assert module(x)[0].dtype == torch.bfloat16
            torch.manual_seed(1)
            results.append(values_and_gradients(module, [x.requires_grad_()], x))
    assert ops_called[:3] == ["stack_forward", "stack_forward", "stack_backward_"]
    assert results[0][-1].dtype == torch.float32
    assert_same(results[0], results[1], device)


@own_ops
def test_transforms_and_forward_mode_do_without(ops_called: list[str]) -> None:
    module, x = make("gru"), torch.randn(2, 4, 3, I)
    with torch.no_grad():
        expected = torch.stack([module(each)[0] for each in x])
        torch.testing.assert_close(torch.func.vmap(lambda each: module(each)[0])(x), expected)
        _, tangent = torch.func.jvp(lambda each: module(each)[0], (x[0],), (x[1],))
    assert tangent.abs().sum() > 0
    assert ops_called.count("stack_forward") == 2
    gradient = torch.func.grad(lambda each: module(each)[0].sum())(x[0])
    assert ops_called.count("stack_forward") == 2
    leaf = x[0].clone().requires_grad_()
    module(leaf)[0].sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


@own_ops
def test_a_stack_is_traced_as_one_call() -> None:
    module, x = make("lstm"), torch.randn(4, 2, I)
    with torch.no_grad():
        graph = make_fx(lambda x: module(x)[0])(x)
        expected, _ = module(x)
    assert len(graph.graph.find_nodes(op="call_function", target=library.stack_forward)) == 1
    assert torch.equal(graph(x), expected)


@own_ops
def test_training_is_traced_as_two_calls() -> None:
    module, x = make("lstm"), torch.randn(4, 2, I, requires_grad=True)

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(module(x)[0].square().sum(), x)[0]

    graph = make_fx(gradient)(x)
    for op in (library.stack_forward, library.stack_backward):
        assert len(graph.graph.find_nodes(op="call_function", target=op)) == 1
    torch.testing.assert_close(graph(x), gradient(x))


# The op itself, which the emulated kernels have too.


def stacked(kind: str, layers: int = L, **options: Any) -> list[Problem]:
    """The arguments of layers that fit on top of each other."""
    options = {"requires_grad": False, "H": 6, **KINDS[kind], **options}
    first = problem(**options)
    width = options.get("directions", 1) * (options.get("projection", 0) or options["H"])
    above = [problem(**{**options, "I": width}) for _ in range(layers - 1)]
    return [first, *above]


Run = tuple[list[Tensor], list[Problem], list[Any]]


def masked(x: Tensor, masks: list[Tensor], layer: int) -> Tensor:
    return x * masks[layer] if masks and layer < len(masks) else x


def run_one_by_one(
    cases: list[Problem],
    kernels: str = "auto",
    save: tuple[bool, bool] = (False, False),
    masks: list[Tensor] = [],  # noqa: B006 nobody changes it
) -> Run:
    """The last output and the final states of all; and the layers' arguments and results."""
    x = cases[0].input
    states: list[Any] = []
    layers, results = [], []
    for k, case in enumerate(cases):
        here = replace(case, input=x, resets=cases[0].resets)
        output, *state, gates, cells = library.layer_forward(*arguments_of(here, kernels), *save)
        states.append(state)
        layers.append(here)
        results.append((output, gates, cells))
        x = masked(output, masks, k)
    return [output, *(torch.cat(s) for s in zip(*states, strict=True))], layers, results


def arguments_of(case: Problem, kernels: str) -> Any:
    call = library.Call(case.cell, kernels=kernels)
    return *case.op_arguments[: -len(call.arguments)], *call.arguments


def gradients_one_by_one(
    layers: list[Problem],
    results: list[Any],
    grads: list[Tensor | None],
    kernels: str = "auto",
    masks: list[Tensor] = [],  # noqa: B006
) -> list[Tensor]:
    """grads: of the last output and of the final states."""
    above = grads[0]
    states: list[Any] = []
    weights: list[Any] = []
    D = len(layers[0].weights.weight_ih)
    for k in reversed(range(len(layers))):
        own = [None if g is None else g[k * D : (k + 1) * D] for g in grads[1:]]
        upstream = above if k + 1 == len(layers) else masked(above, masks, k)  # type: ignore[arg-type]
        above, *of_states, of_weights = library.layer_backward(
            *(upstream, *own, None, *arguments_of(layers[k], kernels), *results[k]),
            *(True, True, True),
        )
        states.insert(0, of_states)
        weights.insert(0, iter(of_weights))
    fields = [[field for _ in field] for field in layers[0].weights]
    lists = [[next(w) for _ in field] for field in fields for w in weights]
    every = [torch.cat(s) for s in zip(*states, strict=True)]
    return [above, *every, *(g for part in lists for g in part)]  # type: ignore[list-item]


def together(*states: Tensor | None) -> Tensor | None:
    return None if states[0] is None else torch.cat(states)  # type: ignore[arg-type]


def stack_primals(cases: list[Problem], kernels: str = "auto", allow_tf32: bool = False) -> Any:
    """Of library.stack_forward, up to the layers."""
    fields = zip(*(case.weights for case in cases), strict=True)
    lists = [[w for of_layer in field for w in of_layer] for field in fields]
    states = map(together, *(case.states for case in cases))
    rows = cases[0].batch_sizes, cases[0].resets
    first = cases[0].input, *states, *lists, *rows, cases[0].cell
    return [*first, 1.0, None, None, kernels, allow_tf32, len(cases)]


def op_arguments(cases: list[Problem], kernels: str = "auto", allow_tf32: bool = False) -> Any:
    """Of library.stack_forward, which saves nothing."""
    return [*stack_primals(cases, kernels, allow_tf32), [], False, False]


def upstream(results: Sequence[Tensor], absent: int | None = None) -> list[Tensor | None]:
    """Of an output, h_n and c_n, which an RNN has not."""
    grads: list[Tensor | None] = [torch.randn(r.shape).to(r) for r in results]
    if results[2].dim() == 1:
        grads[2] = None
    if absent is not None:
        grads[absent] = None
    return grads


ROWS: dict[str, dict[str, Any]] = {
    "dense": {},
    "no state": {"state": False},
    "packed": {"lengths": (9, 4, 4, 1)},
    "resets": {"resets": 0.3, "reset_state": True},
}


@each_kind
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save", [(False, False), (True, True), (False, True)], ids=str)
def test_the_ops_equal_their_layers(
    kind: str, directions: int, rows: str, dtype: torch.dtype, save: tuple[bool, bool]
) -> None:
    cases = stacked(kind, T=9, B=4, directions=directions, dtype=dtype, **ROWS[rows])
    primals, masks = stack_primals(cases), []
    if rows != "no state":
        width = library.stack_forward(*primals, [], False, False)[0]
        masks = [torch.randn_like(width) for _ in cases[1:]]
    output, *states, below, gates, cells = library.stack_forward(*primals, masks, *save)
    expected, layers, results = run_one_by_one(cases, "auto", save, masks)
    torch.testing.assert_close([output, *states], expected, rtol=0, atol=0)
    if save == (False, False):
        assert below == gates == cells == []
        return
    saved = [*zip([*below, output], gates, cells, strict=True)]
    torch.testing.assert_close(saved, results, rtol=0, atol=0)
    grads = upstream([output, *states], directions)
    wanted = gradients_one_by_one(layers, results, grads, "auto", masks)
    after = masks, output, below, gates, cells, True, True, True
    for op in (library.stack_backward, library.stack_backward_):
        *ours, of_weights = op(*grads, *primals, *after)
        torch.testing.assert_close([*ours, *of_weights], wanted, rtol=0, atol=0)
    assert not any(t.numel() for t in (*gates, *cells))  # whose memory is given back


@pytest.fixture
def gpu(device: str, request: pytest.FixtureRequest) -> Gpu:
    """The device's, or the one that is emulated."""
    if device == "cuda":
        return current_gpu()
    if request.config.getoption("--emulated-cuda") is None:
        pytest.skip("on the CPU no layers run side by side")
    return GPUS["H100"]


CHUNKED = {torch.float32: 2e-7, torch.bfloat16: 1e-3}  # products that are divided, relative


def check_side_by_side(
    cases: list[Problem],
    kernels: str,
    gpu: Gpu,
    masks: list[Tensor],
    together: int | None = None,
    absent: int | None = None,
) -> None:
    """Both passes, with several layers at once, against the layers one by one; the bits of what the
    forward pass leaves are the same, those of the gradients up to products that are divided."""
    first = cases[0]
    hidden = first.weights.weight_hh[0].size(1)
    T, B = first.input.shape[:2] if first.batch_sizes is None else (len(first.batch_sizes), 0)
    B = B if first.hx is None else first.hx.size(1)
    shape = first.cell, DTYPES[first.input.dtype], T, B, hidden, hidden, 1
    for backward in (False, True):
        how = plan_stack(shape, len(cases), gpu, False, kernels, backward=backward)
        assert how["together"] == together or (together is None and how["together"] > 1)
    primals = stack_primals(cases, kernels)
    for save in ((False, False), (False, True), (True, True)):
        output, *states, below, gates, cells = library.stack_forward(*primals, masks, *save)
        expected, layers, results = run_one_by_one(cases, kernels, save, masks)
        torch.testing.assert_close([output, *states], expected, rtol=0, atol=0)
        if not any(save):
            continue
        saved = [*zip([*below, output], gates, cells, strict=True)]
        torch.testing.assert_close(saved, results, rtol=0, atol=0)
        grads = upstream([output, *states], absent)
        wanted = gradients_one_by_one(layers, results, grads, kernels, masks)
        for op in (library.stack_backward, library.stack_backward_):
            *ours, of_weights = op(
                *(*grads, *primals, masks, output, below, gates, cells, True, True, True)
            )
            for mine, theirs in zip([*ours, *of_weights], wanted, strict=True):
                assert error(mine, theirs) <= CHUNKED[mine.dtype]
        assert not any(t.numel() for t in (*gates, *cells))


@pytest.mark.parametrize("kernels", ["persistent", "handoff", "split", "cluster"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize(
    "rows",
    [{}, {"lengths": (47, 30, 30, 9, 1)}, {"resets": 0.1, "reset_state": True}],
    ids=["dense", "packed", "resets"],
)
def test_layers_side_by_side(
    kind: str, dtype: torch.dtype, kernels: str, rows: dict[str, Any], device: str, gpu: Gpu
) -> None:
    """A chunk of timesteps each: c, dh and dc between two of them are not rounded."""
    if kernels in ("split", "cluster") and gpu.compute_capability < 90:
        pytest.skip("needs clusters of blocks")
    if kernels == "split" and kind == "rnn_tanh":
        pytest.skip("one gate is nothing to divide")
    cases = stacked(kind, T=47, B=5, H=24, dtype=dtype, device=device, **rows)
    masks = []
    if rows:  # dropout of packed and reset ones
        width = (*cases[0].input.shape[:-1], 24)
        masks = [torch.randn(width).to(cases[0].input) for _ in cases[1:]]
    check_side_by_side(cases, kernels, gpu, masks)


@pytest.mark.parametrize("layers", [2, 5])
def test_side_by_side_with_a_tail_and_idle_sequences(layers: int, device: str, gpu: Gpu) -> None:
    """Rows behind those of the timesteps, a sequence without any, timesteps without sequences; and
    layers that come when those before are done."""
    cases = stacked("lstm", layers, lengths=(60, 44, 3), device=device, dtype=torch.float32)
    sizes = torch.cat([cases[0].batch_sizes, torch.tensor([0, 0])])  # type: ignore[list-item]

    def wider(state: Tensor | None) -> Tensor | None:
        return None if state is None else torch.cat([state, torch.ones_like(state[:, :1])], 1)

    longer = torch.cat([cases[0].input, torch.ones_like(cases[0].input[:4])])
    cases = [
        replace(case, input=longer, hx=wider(case.hx), cx=wider(case.cx), batch_sizes=sizes)
        for case in cases
    ]
    masks = [torch.rand(len(longer), 6).to(longer) for _ in cases[1:]]
    for absent in (None, 0, 1):
        which = masks if absent is None else []
        check_side_by_side(cases, "auto", gpu, which, min(layers, 4), absent)
    output, *_ = library.stack_forward(*op_arguments(cases))
    assert not output[-4:].any()


@own_ops
@each_kind
def test_the_ops_describe_themselves(kind: str) -> None:
    for state in (True, False):
        cases = stacked(kind, directions=2, state=state)
        primals = stack_primals(cases)
        torch.library.opcheck(library.stack_forward, (*primals, [], False, False))
        width = 2 * (2 if kind == "lstm_proj" else 6)
        masks = [torch.rand(3, 2, width, dtype=torch.float64) for _ in cases[1:]]
        for save in ((True, True), (False, True)):
            arguments = (*primals, masks, *save)
            torch.library.opcheck(library.stack_forward, arguments)
            output, *states, below, gates, cells = library.stack_forward(*arguments)
            after = masks, output, below, gates, cells, state, True, state
            for op in (library.stack_backward, library.stack_backward_):
                # Torch's functionalization refuses lists that are mutated; no tracer is given one.
                kinds = ["test_schema", "test_faketensor"]
                kinds += ["test_aot_dispatch_dynamic"] if op is library.stack_backward else []
                grads = upstream([output, *states])
                torch.library.opcheck(op, (*grads, *primals, *after), test_utils=kinds)


@own_ops
def test_tracers_are_refused_what_is_no_stack() -> None:
    arguments = op_arguments(stacked("gru"))
    arguments[LAYERS_AT] = 0
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="got 3 for"):
        library.stack_forward(*arguments)


LAYERS_AT = 18  # where the number of layers is among the op's arguments


def test_the_op_refuses_what_is_no_stack() -> None:
    arguments = op_arguments(stacked("gru"))
    position = {"hx": 1, "weight_hh": 6, "resets": 11, "layers": LAYERS_AT, "masks": 19}

    def refused(message: str, **changes: Any) -> None:
        changed = list(arguments)
        for name, value in changes.items():
            changed[position[name]] = value
        with pytest.raises(RuntimeError, match=message):
            library.stack_forward(*changed)

    refused("at least 1: got 3 for 0", layers=0)
    refused("at least 1: got 3 for 2", layers=2)
    refused(r"hx must have 3 dimensions \[L\*D, B, \.\.\.\], L\*D = 3", hx=arguments[1][:2])
    refused(r"L\*D = 3, got shape \[3, 2\]", hx=arguments[1][..., 0])
    refused("weight_hh must hold as many tensors", weight_hh=arguments[6][:2])
    refused("resets must be bool", resets=torch.zeros(3, 2))
    wide = [torch.zeros(18, 5, dtype=torch.float64), *arguments[6][1:]]
    refused(r"weight_hh must have shape \[G\*H, P\]", weight_hh=wide)
    mask = torch.ones(3, 2, 6, dtype=torch.float64)
    refused("masks must hold one for each layer but the last, or none, got 1", masks=[mask])
    refused(r"masks must be like the outputs .* \[3, 2, 6\], got", masks=[mask[:2], mask])
    refused(r"masks must be like the outputs .* got Float", masks=[mask, mask.float()])


def test_the_backward_op_refuses_what_no_stack_left() -> None:
    primals = stack_primals(stacked("lstm"))
    output, *states, below, gates, cells = library.stack_forward(*primals, [], True, True)
    given = {"grads": [output, *states], "output": output, "below": below}
    given |= {"gates": gates, "cells": cells}

    def refused(message: str, **changes: Any) -> None:
        grads, *after = (given | changes).values()
        with pytest.raises(RuntimeError, match=message):
            library.stack_backward(*grads, *primals, [], *after, True, True, True)

    refused(
        r"\[lstm\] below must hold 2 tensors for the layers of the stack, got 1", below=below[:1]
    )
    refused(
        "gates must be saved of all layers or of none", gates=[*gates[:2], gates[2][:0, 0, 0, 0]]
    )
    refused("gates must hold 3 tensors", gates=[])
    refused("cells must hold 3 tensors", cells=cells[:2])
    refused(r"gates must have shape \[D, N, 4, H\]", gates=[*gates[:2], gates[2][:, 1:]])
    refused("cells must be what the forward pass saved", cells=[cells[0][:, 1:], *cells[1:]])
    refused(r"input must have|weight_ih must have shape", below=[below[0][..., 1:], below[1]])
    refused(r"grad_h_n must have 3 dimensions \[L\*D, B", grads=[output, states[0][:2], states[1]])
    refused("grad_output must have shape", grads=[output[1:], *states])
    refused("output must have shape", output=output[1:])


@pytest.mark.parametrize("kind", ["gru", "lstm_proj"])
def test_layers_of_other_sizes_are_refused(kind: str) -> None:
    """Whose states would not fit behind those of the first."""
    first = stacked(kind, 1, state=False)
    width = 2 if kind == "lstm_proj" else 6
    others = {"projection": 3} if kind == "lstm_proj" else {"H": 9}
    cases = [*first, *stacked(kind, 1, state=False, I=width, **others)]
    with pytest.raises(RuntimeError, match="layers of a stack must have the same sizes, got H = "):
        library.stack_forward(*op_arguments(cases))


@own_ops
def test_all_layers_are_on_one_device(device: str) -> None:
    if device == "cpu":
        pytest.skip("needs two devices")
    arguments = op_arguments(stacked("gru"))
    arguments[6][-1] = arguments[6][-1].cuda()
    with pytest.raises(RuntimeError, match="weight_hh must be on the device of input"):
        library.stack_forward(*arguments)

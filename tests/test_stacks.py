"""Stacks of layers, which are one call where no gradients are recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import KINDS, Problem, each_kind, problem
from hypothesis import given
from hypothesis import strategies as st
from pairs import LAYERS, tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_fused
from rnn_fused import library
from rnn_fused.explain import DTYPES, GPUS, Gpu, current_gpu, plan_stack

own_ops = pytest.mark.own_ops  # about the operators of the installed library
each_module = pytest.mark.parametrize("which", LAYERS)
I, H, L = 7, 19, 3  # noqa: E741


def make(which: str, **options: Any) -> Any:
    name, own = LAYERS[which]
    torch.manual_seed(7)
    return getattr(rnn_fused, name)(I, H, **{"num_layers": L, **own, **options})


def layer_after_layer(module: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    """As with gradients, whose layers are a call each."""
    with torch.enable_grad():
        return [t.detach() for t in tensors(module(*args, **kwargs))]


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
@pytest.mark.parametrize("who", ["weights", "input", "state"])
def test_layers_are_calls_of_their_own_where_gradients_are_recorded(
    who: str, ops_called: list[str]
) -> None:
    module = make("gru").requires_grad_(who == "weights")
    x = torch.randn(4, 2, I, requires_grad=who == "input")
    state = torch.randn(L, 2, H, requires_grad=who == "state")
    output, _ = module(x, state)
    assert ops_called == ["layer_forward"] * L
    assert output.requires_grad


@own_ops
def test_layers_are_calls_of_their_own_where_something_is_between_them(
    ops_called: list[str],
) -> None:
    module, x = make("lstm", dropout=0.5), torch.randn(4, 2, I)
    with torch.no_grad():
        _, _, layers = module(x, return_all_states=True)
        assert len(layers) == L
        module.eval()
        assert_same(module(x), layer_after_layer(module, x))
        module.train()
        ops_called.clear()
        torch.manual_seed(1)
        dropped, _ = module(x)
    assert ops_called == ["layer_forward"] * L
    torch.manual_seed(1)
    assert torch.equal(dropped, layer_after_layer(module, x)[0])


@own_ops
def test_autocast_transforms_and_forward_mode_do_without(ops_called: list[str]) -> None:
    module, x = make("gru"), torch.randn(2, 4, 3, I)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x[0])[0].dtype == torch.bfloat16
        expected = torch.stack([module(each)[0] for each in x])
        torch.testing.assert_close(torch.func.vmap(lambda each: module(each)[0])(x), expected)
        _, tangent = torch.func.jvp(lambda each: module(each)[0], (x[0],), (x[1],))
    assert tangent.abs().sum() > 0
    assert ops_called.count("stack_forward") == 2


@own_ops
def test_a_stack_is_traced_as_one_call() -> None:
    module, x = make("lstm"), torch.randn(4, 2, I)
    with torch.no_grad():
        graph = make_fx(lambda x: module(x)[0])(x)
        expected, _ = module(x)
    assert len(graph.graph.find_nodes(op="call_function", target=library.stack_forward)) == 1
    assert torch.equal(graph(x), expected)


# The op itself, which the emulated kernels have too.


def stacked(kind: str, layers: int = L, **options: Any) -> list[Problem]:
    """The arguments of layers that fit on top of each other."""
    options = {"requires_grad": False, "H": 6, **KINDS[kind], **options}
    first = problem(**options)
    width = options.get("directions", 1) * (options.get("projection", 0) or options["H"])
    above = [problem(**{**options, "I": width}) for _ in range(layers - 1)]
    return [first, *above]


def run_one_by_one(cases: list[Problem], kernels: str = "auto") -> list[Tensor]:
    """The last output, and the final states of all."""
    x, states = cases[0].input, []
    for case in cases:
        here = replace(case, input=x, resets=cases[0].resets)
        call = library.Call(case.cell, kernels=kernels)
        arguments = *here.op_arguments[: -len(call.arguments)], *call.arguments
        x, *state, _, _ = library.layer_forward(*arguments, False, False)
        states.append(state)
    return [x, *(torch.cat(s) for s in zip(*states, strict=True))]


def together(*states: Tensor | None) -> Tensor | None:
    return None if states[0] is None else torch.cat(states)  # type: ignore[arg-type]


def op_arguments(cases: list[Problem], kernels: str = "auto", allow_tf32: bool = False) -> Any:
    """Of library.stack_forward."""
    fields = zip(*(case.weights for case in cases), strict=True)
    lists = [[w for of_layer in field for w in of_layer] for field in fields]
    states = map(together, *(case.states for case in cases))
    rows = cases[0].batch_sizes, cases[0].resets
    first = cases[0].input, *states, *lists, *rows, cases[0].cell
    return [*first, 1.0, None, kernels, allow_tf32, len(cases)]


@each_kind
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    "rows",
    [{}, {"state": False}, {"lengths": (9, 4, 4, 1)}, {"resets": 0.3, "reset_state": True}],
    ids=["dense", "no state", "packed", "resets"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_op_equals_its_layers(
    kind: str, directions: int, rows: dict[str, Any], dtype: torch.dtype
) -> None:
    cases = stacked(kind, T=9, B=4, directions=directions, dtype=dtype, **rows)
    ours = library.stack_forward(*op_arguments(cases))
    torch.testing.assert_close([*ours], run_one_by_one(cases), rtol=0, atol=0)


@pytest.fixture
def gpu(device: str, request: pytest.FixtureRequest) -> Gpu:
    """The device's, or the one that is emulated."""
    if device == "cuda":
        return current_gpu()
    if request.config.getoption("--emulated-cuda") is None:
        pytest.skip("on the CPU no layers run side by side")
    return GPUS["H100"]


@pytest.mark.parametrize("kernels", ["persistent", "handoff", "cluster"])
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
    """A chunk of timesteps each: c between two of them is not rounded."""
    if kernels == "cluster" and gpu.compute_capability < 90:
        pytest.skip("needs clusters of blocks")
    T, B, hidden = 47, 5, 24
    how = plan_stack((kind, DTYPES[dtype], T, B, hidden, hidden, 1), L, gpu, False, kernels)
    assert how["together"] > 1
    cases = stacked(kind, T=T, B=B, H=hidden, dtype=dtype, device=device, **rows)
    ours = library.stack_forward(*op_arguments(cases, kernels))
    torch.testing.assert_close([*ours], run_one_by_one(cases, kernels), rtol=0, atol=0)


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
    shape = "lstm", "f32", len(sizes), 4, 6, 6, 1
    assert plan_stack(shape, layers, gpu, False, "auto")["together"] == min(layers, 4)
    ours = library.stack_forward(*op_arguments(cases))
    torch.testing.assert_close([*ours], run_one_by_one(cases), rtol=0, atol=0)
    assert not ours[0][-4:].any()


@own_ops
@each_kind
def test_the_op_describes_itself(kind: str) -> None:
    for state in (True, False):
        cases = stacked(kind, directions=2, state=state)
        torch.library.opcheck(library.stack_forward, op_arguments(cases))


@own_ops
def test_tracers_are_refused_what_is_no_stack() -> None:
    arguments = op_arguments(stacked("gru"))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="got 3 for"):
        library.stack_forward(*arguments[:-1], 0)


def test_the_op_refuses_what_is_no_stack() -> None:
    arguments = op_arguments(stacked("gru"))
    position = {"hx": 1, "weight_hh": 6, "resets": 11, "layers": 17}

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

"""Modules for inference, with packed weights."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import pytest
import torch
from helpers import KINDS, each_kind, problem, threads
from pairs import LAYERS, tensors
from torch import Tensor, nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

import rnn_fused
from rnn_fused import Frozen, freeze, library, ops

pytestmark = pytest.mark.own_ops

each_module = pytest.mark.parametrize("which", LAYERS)
I, H = 7, 19  # noqa: E741


def make(which: str, **options: Any) -> Any:
    name, own = LAYERS[which]
    torch.manual_seed(7)
    return getattr(rnn_fused, name)(I, H, **{"num_layers": 2, **own, **options})


@each_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "two ways"])
def test_the_bits_of_the_module(
    which: str, dtype: torch.dtype, bidirectional: bool, ops_called: list[str]
) -> None:
    module = make(which, bidirectional=bidirectional, dtype=dtype)
    frozen = freeze(module)
    x = torch.randn(8, 3, I, dtype=dtype)
    with torch.no_grad():
        expected = tensors(module(x))
        ops_called.clear()
        torch.testing.assert_close(tensors(frozen(x)), expected, rtol=0, atol=0)
    assert ops_called == ["stack_infer"]


@each_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B", [1, 4])
def test_few_rows_agree_up_to_rounding(which: str, dtype: torch.dtype, B: int) -> None:
    """The module multiplies with weights where they are, in another order."""
    module = make(which, dtype=dtype)
    frozen = freeze(module)
    tolerance = 8 * torch.finfo(dtype).eps
    with torch.no_grad():
        state: Any = None
        for x in torch.randn(3, B, I, dtype=dtype):
            expected = module.step(x, state)
            output, state = frozen.step(x, state)
            torch.testing.assert_close(
                tensors((output, state)), tensors(expected), rtol=tolerance, atol=tolerance
            )


@each_module
def test_single_steps_have_the_bits_of_one_call(which: str) -> None:
    frozen, x = freeze(make(which)), torch.randn(8, 2, I)
    with torch.no_grad():
        whole, final = frozen(x)
        state, outputs = None, []
        for x_t in x:
            output, state = frozen.step(x_t, state)
            outputs.append(output)
    assert torch.equal(torch.stack(outputs), whole)
    torch.testing.assert_close(tensors(state), tensors(final), rtol=0, atol=0)


@pytest.mark.parametrize("which", ["lstm_proj", "gru"])
def test_every_form_of_input_and_option(which: str, ops_called: list[str]) -> None:
    options = {"gate_slope": 1.5, "learn_initial_state": True, "batch_first_states": True}
    options |= {"cell_clip": 0.3} if which == "lstm_proj" else {}
    module = make(which, bidirectional=True, batch_first=True, dtype=torch.float64, **options)
    nn.init.normal_(module.initial_h)
    frozen = freeze(module)
    x, lengths = torch.randn(4, 13, I).double(), torch.tensor([3, 13, 0, 5])
    packed = pack_padded_sequence(x, torch.tensor([3, 13, 1, 5]), True, enforce_sorted=False)
    state = module(x)[1]
    calls = {
        "lengths": ((x,), {"lengths": lengths}),
        "packed": ((packed,), {}),
        "state": ((x, state), {}),
        "resets": ((x,), {"resets": torch.rand(4, 13) < 0.3, "reset_state": state}),
        "unbatched": ((x[0],), {}),
    }
    for name, (args, kwargs) in calls.items():
        with torch.no_grad():
            expected = module(*args, **kwargs)
            ops_called.clear()
            ours = frozen(*args, **kwargs)
        assert ops_called == ["stack_infer"], name
        torch.testing.assert_close(tensors(ours), tensors(expected), rtol=0, atol=0)
    with torch.no_grad():
        every = {"return_all_states": True}
        ours, expected = (tensors(m(x, **every)) for m in (frozen, module))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="threads are no more than the cores")
@each_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layers_side_by_side(which: str, dtype: torch.dtype) -> None:
    """One sequence, and threads that it leaves idle: each takes some layers."""
    module = make(which, num_layers=3, dtype=dtype)
    frozen, x = freeze(module), torch.randn(600, 1, I, dtype=dtype)
    resets = torch.rand(600, 1) < 0.02
    with torch.no_grad(), threads(2):
        expected = tensors(module(x, resets=resets))
        assert "layers divided among 2 threads" in rnn_fused.explain(frozen, 600, 1)
        for _ in range(5):
            ours = tensors(frozen(x, resets=resets))
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("B", [3, 40, 256, 450])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_many_sequences_of_small_layers(B: int, count: int) -> None:
    module = rnn_fused.LSTM(4, 4, 4)
    frozen, x = freeze(module), torch.randn(12, B, 4)
    with torch.no_grad(), threads(count):
        torch.testing.assert_close(tensors(frozen(x)), tensors(module(x)), rtol=0, atol=0)


def test_dropout_is_off() -> None:
    module = make("lstm", dropout=0.5)
    frozen, x = freeze(module), torch.randn(8, 3, I)
    with torch.no_grad():
        expected = module.eval()(x)[0]
        assert torch.equal(frozen.train()(x)[0], expected)


def test_later_weights_do_not_reach_it() -> None:
    module, x = make("gru"), torch.randn(8, 3, I)
    frozen = freeze(module)
    with torch.no_grad():
        before = module(x)[0]
        for p in module.parameters():
            p.data.zero_()
        assert torch.equal(frozen(x)[0], before)
    assert all(p.requires_grad for p in module.parameters())


class Tagger(nn.Module):
    """With one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, I)
        self.stack = nn.ModuleList([rnn_fused.GRU(I, H, batch_first=True), nn.GRU(H, H)])
        self.again = self.stack[0]
        self.cell = rnn_fused.LSTMCell(H, H)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(H, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.stack[0](x)[0] + self.again(x)[0]
        result: Tensor = self.head(self.cell(self.stack[1](y)[0].flatten(0, 1))[0])
        return result


def test_a_whole_model(ops_called: list[str]) -> None:
    model, tokens = Tagger(), torch.randint(11, (3, 8))
    frozen = freeze(model)
    assert model.training
    assert isinstance(model.stack[0], rnn_fused.GRU)
    assert isinstance(frozen, Tagger)
    assert isinstance(frozen.stack[0], Frozen)
    assert frozen.again is frozen.stack[0]
    assert isinstance(frozen.stack[1], nn.GRU)
    model.eval()
    with torch.no_grad():
        expected = model(tokens)
        ops_called.clear()
        assert torch.equal(frozen(tokens), expected)
    assert ops_called == ["stack_infer", "stack_infer", "layer_forward"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = rnn_fused.GRU(H, H)
        self.tied = nn.Linear(H, 3 * H, bias=False)
        self.tied.weight = self.rnn.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        output: Tensor = self.rnn(x)[0]
        return output + self.tied(x)[..., :H]


def test_a_block_registered_twice_with_a_tied_weight() -> None:
    block, x = Block(), torch.randn(8, 3, H)
    frozen: Any = freeze(nn.Sequential(block, block))
    assert frozen[0] is frozen[1]
    assert isinstance(frozen[0].rnn, Frozen)
    assert frozen[0].tied.weight.requires_grad
    with torch.no_grad():
        assert torch.equal(frozen(x), block(block(x)))
    again = freeze(frozen)
    assert again is not frozen
    with torch.no_grad():
        assert torch.equal(again(x), frozen(x))


def test_one_layer_under_two_names_of_a_parent() -> None:
    rnn = rnn_fused.GRU(H, H)
    frozen: Any = freeze(nn.ModuleList([rnn, rnn]))
    assert isinstance(frozen[0], Frozen)
    assert frozen[0] is frozen[1]


@pytest.mark.parametrize("swap", [rnn_fused.convert, rnn_fused.revert])
def test_converting_passes_it_over(swap: Any) -> None:
    report = swap(freeze(nn.Sequential(make("gru"))))
    assert report.skipped == {"0": "is frozen"}


def test_parametrised_weights() -> None:
    module = parametrizations.weight_norm(make("gru", num_layers=1), "weight_hh_l0")
    frozen, x = freeze(module), torch.randn(8, 3, I)
    with torch.no_grad():
        assert torch.equal(frozen(x)[0], module(x)[0])
        assert torch.equal(copy.deepcopy(frozen)(x)[0], module(x)[0])
    assert "weight_hh_l0" in module.parametrizations


def test_made_in_inference_mode() -> None:
    module, x = make("gru"), torch.randn(8, 3, I, requires_grad=True)
    with torch.inference_mode():
        frozen = freeze(module)
    (ours,) = torch.autograd.grad(frozen(x)[0].sum(), x)
    (expected,) = torch.autograd.grad(module(x)[0].sum(), x)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(copied: Any, ops_called: list[str]) -> None:
    frozen, x = freeze(make("lstm")), torch.randn(8, 3, I)
    with torch.no_grad():
        expected = frozen(x)[0]
        other = copied(frozen)
        ops_called.clear()
        assert torch.equal(other(x)[0], expected)
    assert ops_called == ["stack_infer"]


def test_a_pickle_holds_the_weights_once() -> None:
    module = rnn_fused.LSTM(64, 64)
    weights = sum(p.nbytes for p in module.parameters())
    assert len(pickle.dumps(freeze(module))) < 1.2 * weights


@each_module
@pytest.mark.parametrize("form", ["dense", "stateless", "lengths", "packed"])
def test_compiled(which: str, form: str) -> None:
    module = make(which, bidirectional=True, learn_initial_state=True)
    nn.init.normal_(module.initial_h)
    frozen, x, lengths = freeze(module), torch.randn(8, 3, I), torch.tensor([3, 8, 5])
    options: dict[str, Any] = {"lengths": {"lengths": lengths}}.get(form, {})
    graphs = []

    def look(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        expected = tensors(module(x, **options))
        state: Any = module(x)[1] if form == "dense" else None
        if form == "packed":
            x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        expected = tensors(module(x, state, **options))
        fast = torch.compile(frozen, backend=look, fullgraph=True)
        torch.testing.assert_close(tensors(fast(x, state, **options)), expected)
        torch._dynamo.reset()
        fast = torch.compile(frozen, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(tensors(fast(x, state, **options)), expected)
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert names.count("rnn_fused.stack_infer.default") == 1
    assert "rnn_fused.layer_forward.default" not in names


def test_exported_programs_hold_plain_weights() -> None:
    """Another machine may pack them otherwise."""
    module, x = make("lstm"), torch.randn(8, 3, I)
    frozen = freeze(module)
    with torch.no_grad():
        program = torch.export.export(frozen, (x,), strict=False)
        torch.testing.assert_close(program.module()(x)[0], module(x)[0])
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("rnn_fused.layer_forward.default") == 2
    held = [*program.constants.values(), *program.state_dict.values()]
    assert sorted(t.shape for t in held) == sorted(p.shape for p in module.parameters())


@each_kind
def test_the_op_describes_itself(kind: str) -> None:
    case = problem(**KINDS[kind], requires_grad=False)
    packed = ops.pack_weights(case.weights, case.cell)
    h = case.hx.shape[2]  # type: ignore[union-attr]
    for states in (case.hx, case.cx), (None, None):
        arguments = (case.input, *states, None, None, [packed], None, None, case.cell, 4, h, 1.0)
        torch.library.opcheck(library.stack_infer, (*arguments, None))


# Where packed weights cannot be used, the results are the same.


def test_gradients_reach_the_input_only() -> None:
    module = make("lstm", dtype=torch.float64)
    frozen = freeze(module)
    x = torch.randn(8, 3, I).double().requires_grad_()
    (ours,) = torch.autograd.grad(frozen(x)[0].square().sum(), x)
    (expected,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    torch.testing.assert_close(ours, expected)
    assert not frozen(x.detach())[0].requires_grad


def test_autocast() -> None:
    module, x = make("gru"), torch.randn(8, 3, I)
    frozen = freeze(module)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x)[0], module(x)[0])


def test_transforms() -> None:
    module, x = make("gru"), torch.randn(8, 3, I)
    frozen = freeze(module)
    with torch.no_grad():
        expected = module(x)[0]
        each = vmap(lambda x: frozen(x)[0], in_dims=1, out_dims=1)(x.unsqueeze(2))
    torch.testing.assert_close(each.squeeze(2), expected)


def test_tracers() -> None:
    """What they record may run where weights are packed otherwise."""
    module, x = make("gru"), torch.randn(8, 3, I)
    frozen = freeze(module)
    with torch.no_grad():
        expected = module(x)[0]
        traced = torch.jit.trace(lambda x: frozen(x)[0], x, check_trace=False)
        for _ in range(3):
            torch.testing.assert_close(traced(x), expected)
        graph = make_fx(lambda x: frozen(x)[0])(x)
        torch.testing.assert_close(graph(x), expected)
    assert "stack_infer" not in str(traced.graph) + graph.code


@pytest.mark.parametrize("what", ["hx", "resets", "reset_state"])
def test_tensors_of_two_devices(what: str) -> None:
    frozen, x = freeze(make("gru")), torch.randn(8, 3, I)
    state, resets = torch.zeros(2, 3, H, device="meta"), torch.zeros(8, 3, dtype=torch.bool)
    calls: dict[str, dict[str, Any]] = {
        "hx": {"hx": state},
        "resets": {"resets": resets.to("meta")},
        "reset_state": {"resets": resets, "reset_state": state},
    }
    with torch.no_grad(), pytest.raises(RuntimeError, match="must be on one device, got cpu and m"):
        frozen(x, **calls[what])


def test_a_parametrised_weight_is_computed_once() -> None:
    calls = []

    class Count(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(weight)
            return 2 * weight

    module = make("lstm")
    parametrize.register_parametrization(module, "weight_ih_l0", Count())
    calls.clear()
    module(torch.randn(8, 3, I))
    assert len(calls) == 1


def test_other_devices() -> None:
    frozen = freeze(make("lstm", device="meta"))
    with torch.no_grad():
        assert frozen(torch.zeros(8, 3, I, device="meta"))[0].shape == (8, 3, H)


def test_what_can_be_read() -> None:
    frozen = freeze(make("lstm", cell_clip=2.0))
    assert (frozen.hidden_size, frozen.num_layers, frozen.cell_clip) == (H, 2, 2.0)
    assert repr(frozen) == "Frozen(LSTM(7, 19, num_layers=2, cell_clip=2.0))"
    assert not [*frozen.parameters()]
    assert not frozen.state_dict()
    with pytest.raises(AttributeError, match="a frozen LSTM has no weight_ih_l0: keep the model"):
        _ = frozen.weight_ih_l0
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = frozen.nonsense


# Mistakes


def test_mistakes() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        freeze("lstm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"GRU contains no LSTM, GRU or RNN of rnn_fused"):
        freeze(nn.GRU(2, 3))
    with pytest.raises(ValueError, match="LSTMCell contains no LSTM, GRU or RNN of rnn_fused"):
        freeze(rnn_fused.LSTMCell(2, 3))
    pruned = prune.l1_unstructured(rnn_fused.GRU(2, 3), "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match="1 has forward pre-hooks, which may set its weights"):
        freeze(nn.Sequential(nn.Linear(2, 2), pruned))


def test_it_stays_where_it_is() -> None:
    frozen = freeze(make("gru"))
    assert frozen.cpu().float() is frozen
    message = r"a frozen GRU stays in torch\.float32 on cpu, got torch\.float64 on cpu: convert and"
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(frozen).double()
    with pytest.raises(RuntimeError, match=r"got torch\.float32 on meta"):
        frozen.to("meta")


@each_kind
def test_mistakes_of_the_ops(kind: str) -> None:
    case = problem(**KINDS[kind], requires_grad=False)
    name = rf"\[{case.cell}\]"
    packed = ops.pack_weights(case.weights, case.cell)
    states = (case.hx,) if case.cx is None else (case.hx, case.cx)
    H, P = 4, case.hx.shape[2]  # type: ignore[union-attr]

    def run(packed: Any, H: int = H, P: int = P, states: Any = states, **options: Any) -> Any:
        sizes = {"hidden_size": H, "output_size": P}
        return ops.packed_stack(case.input, states, packed, cell=case.cell, **sizes, **options)

    output, final = run([packed])
    torch.testing.assert_close((output, *final), case.run(ops.layer))
    with pytest.raises(RuntimeError, match=rf"{name} packed must have shape \[D, packed"):
        run([packed[:, 1:]])
    with pytest.raises(RuntimeError, match="packed must have the dtype of input, Double"):
        run([packed.float()])
    with pytest.raises(RuntimeError, match=rf"{name} packed must be what pack_weights makes here"):
        run([torch.zeros_like(packed)])
    with pytest.raises(RuntimeError, match=rf"{name} all tensors must be on one device"):
        run([packed.to("meta")])
    for nothing in ([], [packed[0]]):
        with pytest.raises(RuntimeError, match=rf"{name} packed must hold a tensor \[D, packed"):
            run(nothing)
    with pytest.raises(RuntimeError, match=rf"{name} a layer must have 1 or 2 directions, got 3"):
        run([packed.expand(3, -1)])
    with pytest.raises(RuntimeError, match=rf"{name} hx must have shape \[L\*D, B, P\] = \[2, 2"):
        run([packed, packed])
    for size in (0, H + 1, -1):
        with pytest.raises(RuntimeError, match=rf"{name} output_size must be hidden_size = 4, or "):
            run([packed], P=size)
    with pytest.raises(RuntimeError, match=rf"{name} output_size must be hidden_size = 0"):
        run([packed], H=0, P=0)
    with pytest.raises(RuntimeError, match=rf"{name} reset_hx and reset_cx need resets, got none"):
        run([packed], reset_states=states)
    pack = library.pack_weights
    with pytest.raises(RuntimeError, match=rf"{name} weight_hh must"):
        pack(case.weights.weight_ih, [torch.ones(3).double()], [], [], [], case.cell)
    with pytest.raises(RuntimeError, match=rf"{name} bias_ih and bias_hh must be given both or"):
        pack(*case.weights[:3], [], case.weights.weight_hr, case.cell)
    with pytest.raises(
        RuntimeError, match="cell must be lstm, gru, rnn_tanh or rnn_relu, got 'rnn'"
    ):
        pack(*case.weights, "rnn")
    with pytest.raises(RuntimeError, match="weight_ih must"):
        pack([], case.weights.weight_hh, [], [], [], case.cell)

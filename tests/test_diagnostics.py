"""gradient_flow: against perturbed steps of the reference, and what it says of known networks."""

from __future__ import annotations

import builtins
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairs import HIDDEN, INPUT, LAYERS, LENGTHS, initial_state, sequence, tensors
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnn_fused
from rnn_fused import init, reference
from rnn_fused.diagnostics import GradientFlow, gradient_flow

layers = pytest.mark.parametrize("kind", LAYERS)


def build(kind: str, **options: Any) -> nn.Module:
    name, own = LAYERS[kind]
    return getattr(rnn_fused, name)(INPUT, HIDDEN, dtype=torch.float64, **own, **options)


def weighted(output: Tensor, state: Any) -> Tensor:
    """A loss in which every element of output and state counts differently."""
    return sum((t.square() * torch.linspace(1, 2, t.numel()).view(t.shape)).sum()
               for t in tensors((output, state)))  # fmt: skip


def last_output(output: Tensor, state: Any) -> Tensor:
    return output[-1].sum()


def perturbed(
    module: nn.Module, x: Tensor, states: tuple[Tensor, ...], loss_fn: Callable[..., Tensor]
) -> Tensor:
    """[L, D, T]: norms of the gradients of what is added to each h_t, in plain PyTorch.

    x [T, B, I], states [L*D, B, ..], and the loss sees them in that form.
    """
    T, rows, final = x.size(0), states[0].size(0), []
    added = torch.zeros(rows, T, *states[0].shape[1:], dtype=x.dtype, requires_grad=True)
    for layer in range(module.num_layers):
        weights, outputs = module._weights_by_layer()[layer], []
        for d in range(rows // module.num_layers):
            row, h_of = len(final), {}
            step = reference.STEPS[module.mode.lower()]
            if weights.weight_hr:
                step = partial(step, weight_hr=weights.weight_hr[d])
            state = tuple(s[row] for s in states)
            for t in reversed(range(T)) if d else range(T):
                bias = weights.bias_ih[d], weights.bias_hh[d]
                product = F.linear(x[t], weights.weight_ih[d], bias[0])
                h, *c = step(product, *state, weights.weight_hh[d], bias[1])
                state = (h + added[row, t], *c)
                h_of[t] = state[0]
            final.append(state)
            outputs.append(torch.stack([h_of[t] for t in range(T)]))
        x = torch.cat(outputs, -1)
    states = tuple(torch.stack(s) for s in zip(*final, strict=True))
    state = states if module.mode == "LSTM" else states[0]
    (grad,) = torch.autograd.grad(loss_fn(x, state), added)
    return grad.flatten(2).norm(dim=-1).view(module.num_layers, -1, T)


@layers
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("loss_fn", [weighted, last_output])
def test_norms_are_those_of_the_whole_gradient(
    kind: str, bidirectional: bool, loss_fn: Callable[..., Tensor]
) -> None:
    module = build(kind, num_layers=2, bidirectional=bidirectional)
    x, hx = sequence("padded"), initial_state(module, "padded")
    flow = gradient_flow(module, x, loss_fn, hx)
    assert flow.norms.shape == (2, 1 + bidirectional, max(LENGTHS))
    expected = perturbed(module, x, tuple(tensors(hx)), loss_fn)
    torch.testing.assert_close(flow.norms, expected)
    first, last = expected[..., 0], expected[..., -1]
    torch.testing.assert_close(flow.ratio()[:, 0], (first / last)[:, 0])
    torch.testing.assert_close(flow.ratio()[:, 1:], (last / first)[:, 1:])


@pytest.mark.parametrize("kind", ["lstm_proj", "gru"])
@pytest.mark.parametrize("given", [False, True], ids=["none", "hx"])
@pytest.mark.parametrize("form", ["padded", "unbatched"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"batch_first": True, "batch_first_states": True}],
    ids=["time_first", "batch_first", "batch_first_states"],
)
def test_the_loss_sees_what_the_module_returns(
    kind: str, given: bool, form: str, options: dict[str, bool]
) -> None:
    module = build(
        kind, num_layers=2, bidirectional=True, dropout=0.5, learn_initial_state=True, **options
    )
    for name, p in module.named_parameters():
        if name.startswith("initial_"):
            nn.init.normal_(p)
    x, hx = sequence(form, "batch_first" in options), None
    if given:
        hx = module(x)[1]
    seen = []

    def loss_fn(output: Tensor, state: Any) -> Tensor:
        assert isinstance(state, tuple) == (kind == "lstm_proj")
        seen.extend(tensors((output, state)))
        return output.sum()

    torch.manual_seed(1)
    expected = tensors(module(x, hx))
    torch.manual_seed(1)
    gradient_flow(module, x, loss_fn, hx)
    torch.testing.assert_close(seen, expected)


def test_the_module_is_left_alone() -> None:
    module = build("lstm", num_layers=2, dropout=0.3)
    x = sequence("padded").requires_grad_()
    module(x)[0].sum().backward()
    x.grad = None
    before = copy.deepcopy(module.state_dict())
    grads = [p.grad.clone() for p in module.parameters()]
    for training in (True, False):
        module.train(training)
        gradient_flow(module, x, weighted)
        assert module.training is training
    assert x.grad is None
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), grads, strict=True))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_frozen_weights_and_no_grad_change_nothing() -> None:
    module, x = build("gru", num_layers=2), sequence("padded")
    expected = gradient_flow(module, x, weighted).norms
    with torch.no_grad():
        norms = gradient_flow(module.requires_grad_(False), x, weighted).norms
    assert not norms.requires_grad
    torch.testing.assert_close(norms, expected)


def test_steps_that_the_loss_does_not_see() -> None:
    flow = gradient_flow(build("rnn_tanh"), sequence("padded"), lambda output, _: output[2].sum())
    assert (flow.norms[0, 0, :3] > 0).all()
    assert not flow.norms[0, 0, 3:].any()


def test_16_bits() -> None:
    module, x = build("lstm"), sequence("padded")
    expected = gradient_flow(module, x, weighted).norms
    norms = gradient_flow(module.bfloat16(), x.bfloat16(), weighted).norms
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("gain", "vanishes"), [(0.3, True), (3.0, False)])
def test_vanishing_and_exploding(gain: float, vanishes: bool) -> None:
    """A tanh RNN near the origin, where tanh is almost linear: each step back is W_hh^T."""
    rnn = init.orthogonal_(rnn_fused.RNN(INPUT, 32, bias=False, dtype=torch.float64), gain)
    x = 1e-9 * torch.randn(15, 2, INPUT, dtype=torch.float64)
    ratio = gradient_flow(rnn, x, last_output).ratio()
    assert ratio.shape == (1, 1)
    torch.testing.assert_close(ratio.item(), gain**14, rtol=0.01, atol=0)
    assert (ratio < 1e-3) if vanishes else (ratio > 1e3)


def test_plot(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    module = build("lstm", num_layers=2, bidirectional=True)
    figure = gradient_flow(module, sequence("padded"), weighted).plot(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines] == [
        "layer 0", "layer 0, reverse", "layer 1", "layer 1, reverse"
    ]  # fmt: skip
    assert matplotlib.pyplot.get_fignums() == []
    shown = GradientFlow(torch.ones(1, 1, 3)).plot()
    assert matplotlib.pyplot.get_fignums() == [shown.number]
    matplotlib.pyplot.close(shown)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install matplotlib"):
        GradientFlow(torch.ones(1, 1, 3)).plot()


def test_mistakes() -> None:
    module, x = build("lstm"), sequence("padded")
    packed = sequence("packed")
    assert isinstance(packed, PackedSequence)
    for mistake, input, error, message in (
        (nn.LSTM(INPUT, HIDDEN), x, TypeError, "an LSTM, GRU or RNN of rnn_fused"),
        (module, packed, TypeError, "got a PackedSequence"),
        (module, x[0, 0], ValueError, "2-D or 3-D, got 1-D"),
        (module, x[..., :2], RuntimeError, "Expected 4, got 2"),
        (module, x.float(), ValueError, "does not match weight dtype"),
    ):
        with pytest.raises(error, match=message):
            gradient_flow(mistake, input, weighted)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 3, 5\), got \[1, 2"):
        gradient_flow(module, x, weighted, module(x[:, :2])[1])
    with pytest.raises(RuntimeError, match="should also be 3-D but got 2-D"):
        gradient_flow(module, x, weighted, module(x[:, 0])[1])
    for loss_fn, error, message in (
        (lambda output, state: 1.0, TypeError, "return a Tensor, got float"),
        (lambda output, state: output.sum(-1), ValueError, r"a scalar, got shape \[6, 3\]"),
        (lambda output, state: output.detach().sum(), ValueError, "depend on output or state"),
    ):
        with pytest.raises(error, match=message):
            gradient_flow(module, x, loss_fn)


def test_norms_below_the_root_of_the_smallest_number() -> None:
    rnn = rnn_fused.RNN(3, 4)
    norms = gradient_flow(rnn, torch.randn(2, 5, 3), lambda output, _: 1e-30 * output[1].sum())
    expected = 1e30 * norms.norms.double()
    plain = gradient_flow(rnn.double(), torch.randn(2, 5, 3).double(), lambda y, _: y[1].sum())
    assert norms.norms.dtype == torch.float32
    assert expected[0, 0, 1] == pytest.approx(float(plain.norms[0, 0, 1]), rel=1e-5)
    assert expected[0, 0, 0] > 0

"""Initialisers: which values they give to which gates, and what they leave."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rnn_fused
from rnn_fused import init

I, H = 4, 6  # noqa: E741 the field's name for it

libraries = pytest.mark.parametrize("library", [rnn_fused, nn], ids=["rnn_fused", "torch.nn"])
lstms = pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
every = pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])


def build(library: Any, name: str, **options: Any) -> nn.Module:
    if "Cell" not in name:
        options = {"num_layers": 2, "bidirectional": True, **options}
    return getattr(library, name)(I, H, **options)


def gates(module: nn.Module, kind: str) -> Iterator[tuple[Tensor, ...]]:
    """The blocks of each parameter of this kind, gate by gate."""
    for name, parameter in module.named_parameters():
        if name.startswith(kind):
            yield parameter.split(H)


def changed(module: nn.Module, initialise: Callable[[nn.Module], nn.Module]) -> set[str]:
    """The names of the parameters that it changes, and what it gives back is the module."""
    before = copy.deepcopy(module.state_dict())
    assert initialise(module) is module
    assert all(p.requires_grad and p.grad_fn is None for p in module.parameters())
    return {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}


@libraries
@lstms
def test_forget_gate_bias(library: Any, name: str) -> None:
    module = build(library, name)
    others = [g[k].clone() for g in gates(module, "bias") for k in (0, 2, 3)]
    names = changed(module, init.forget_gate_bias_)
    assert names == {n for n, _ in module.named_parameters() if "bias" in n}
    assert all((g[1] == 1).all() for g in gates(module, "bias_ih"))
    assert all((g[1] == 0).all() for g in gates(module, "bias_hh"))
    rest = [g[k] for g in gates(module, "bias") for k in (0, 2, 3)]
    assert all(torch.equal(*pair) for pair in zip(rest, others, strict=True))
    init.forget_gate_bias_(module, -2.5)
    assert all((g[1] == -2.5).all() for g in gates(module, "bias_ih"))


def test_forget_gate_bias_is_that_of_the_forget_gate() -> None:
    """c stays where the forget gate is open and nothing comes in."""
    cell = rnn_fused.LSTMCell(I, H)
    for p in cell.parameters():
        nn.init.zeros_(p)  # i = o = 0.5, g = 0
    init.forget_gate_bias_(cell, 20.0)
    c = torch.randn(2, H)
    torch.testing.assert_close(cell(torch.zeros(2, I), (torch.zeros(2, H), c))[1], c)


@libraries
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell", "GRU", "GRUCell"])
def test_chrono(library: Any, name: str) -> None:
    module, length = build(library, name), 50
    names = changed(module, lambda m: init.chrono_(m, length))
    assert names == {n for n, _ in module.named_parameters() if "bias" in n}
    for g in gates(module, "bias_ih"):
        assert ((g[1] >= 0) & (g[1] <= math.log(length - 1))).all()
        assert len(g[1].unique()) == H
        if "LSTM" in name:
            assert torch.equal(g[0], -g[1])
    for g in gates(module, "bias_hh"):
        assert not g[1].any()
        assert not g[0].any() or "GRU" in name


def test_chrono_draws_uniform_times() -> None:
    module = rnn_fused.LSTMCell(1, 4000)
    init.chrono_(module, 101, generator=torch.Generator().manual_seed(1))
    times = module.bias_ih.detach().split(4000)[1].exp()
    quantiles = torch.linspace(0, 1, 11)
    torch.testing.assert_close(times.quantile(quantiles), 1 + 99 * quantiles, atol=2.5, rtol=0)


def test_chrono_reckons_with_steeper_gates() -> None:
    plain, steep = rnn_fused.LSTM(2, 5), rnn_fused.LSTM(2, 5, gate_slope=4.0)
    for module in (plain, steep):
        init.chrono_(module, 50, generator=torch.Generator().manual_seed(1))
    gates = slice(0, 10)  # i and f
    torch.testing.assert_close(4 * steep.bias_ih_l0[gates], plain.bias_ih_l0[gates])


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_chrono_remembers_for_as_long(name: str) -> None:
    """Without input, u = T - 1 makes what is kept shrink by 1 - 1/T a step."""
    module = init.chrono_(getattr(rnn_fused, name)(I, H), 30)
    u = module.bias_ih.detach().split(H)[1].exp()
    for key, p in module.named_parameters():
        if "weight" in key:
            nn.init.zeros_(p)
        elif name == "GRUCell":
            p.detach()[2 * H :] = 0  # n = 0
        else:
            p.detach()[2 * H : 3 * H] = 0  # g = 0
    kept = torch.rand(1, H)
    state = (torch.zeros(1, H), kept) if name == "LSTMCell" else kept
    new = module(torch.zeros(1, I), state)
    new = new[1] if name == "LSTMCell" else new
    torch.testing.assert_close(new, kept * (1 - 1 / (1 + u)))


@libraries
@every
@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_orthogonal(library: Any, name: str, gain: float) -> None:
    module = build(library, name, dtype=torch.float64)
    names = changed(module, lambda m: init.orthogonal_(m, gain))
    assert names == {n for n, _ in module.named_parameters() if "weight_hh" in n}
    blocks = [block for g in gates(module, "weight_hh") for block in g]
    for block in blocks:
        torch.testing.assert_close(block @ block.T, gain**2 * torch.eye(H, dtype=torch.float64))
    assert not torch.equal(blocks[0], blocks[-1]) or len(blocks) == 1


def test_orthogonal_with_a_projection() -> None:
    module = init.orthogonal_(build(rnn_fused, "LSTM", proj_size=3, dtype=torch.float64))
    for g in gates(module, "weight_hh"):
        for block in g:
            torch.testing.assert_close(block.T @ block, torch.eye(3, dtype=torch.float64))


def test_orthogonal_in_16_bits() -> None:
    module = init.orthogonal_(build(rnn_fused, "GRU", dtype=torch.bfloat16))
    for g in gates(module, "weight_hh"):
        for block in g:
            product = block.float() @ block.float().T
            torch.testing.assert_close(product, torch.eye(H), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "initialise",
    [lambda m, g: init.chrono_(m, 9, generator=g), lambda m, g: init.orthogonal_(m, generator=g)],
    ids=["chrono", "orthogonal"],
)
def test_generator(initialise: Callable[..., nn.Module]) -> None:
    first, second = build(rnn_fused, "LSTM"), build(rnn_fused, "LSTM")
    second.load_state_dict(first.state_dict())
    before = torch.get_rng_state()
    for module in (first, second):
        initialise(module, torch.Generator().manual_seed(7))
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    initialise(second, torch.Generator().manual_seed(8))
    assert not torch.equal(
        torch.cat([p.flatten() for p in first.parameters()]),
        torch.cat([p.flatten() for p in second.parameters()]),
    )


INITIALISERS = [init.forget_gate_bias_, lambda m: init.chrono_(m, 10), init.orthogonal_]


@pytest.mark.parametrize("initialise", INITIALISERS, ids=["forget", "chrono", "orthogonal"])
def test_other_modules_are_refused(initialise: Callable[[Any], Any]) -> None:
    for mistake in (nn.Linear(2, 2), nn.Sequential(nn.LSTM(2, 2)), "LSTM"):
        with pytest.raises(TypeError, match=f"got {type(mistake).__name__}"):
            initialise(mistake)


@pytest.mark.parametrize("name", ["GRU", "GRUCell", "RNN", "RNNCell"])
def test_no_forget_gate(name: str) -> None:
    with pytest.raises(ValueError, match=f"got {name}, which has no forget gate"):
        init.forget_gate_bias_(build(rnn_fused, name))


@pytest.mark.parametrize("name", ["RNN", "RNNCell"])
def test_no_gates(name: str) -> None:
    with pytest.raises(ValueError, match=f"got {name}, which has no gates"):
        init.chrono_(build(rnn_fused, name), 10)


@lstms
def test_no_biases(name: str) -> None:
    for initialise in INITIALISERS[:2]:
        with pytest.raises(ValueError, match=f"the {name} must have biases, got bias=False"):
            initialise(build(rnn_fused, name, bias=False))


@pytest.mark.parametrize("length", [2, 0, -5, math.inf, math.nan])
def test_length(length: float) -> None:
    with pytest.raises(ValueError, match=f"max_length must be at least 3 and finite, got {length}"):
        init.chrono_(build(rnn_fused, "LSTM"), length)


def test_parametrized_weights_are_refused() -> None:
    module = parametrizations.weight_norm(rnn_fused.GRU(I, H), "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0 is parametrized"):
        init.orthogonal_(module)

"""Training with what torch.nn lacks: `extra_info` keeps what each option costs over the same call
without it, and the ratio to what is written today instead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from steps import ratio, training_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rnn_fused
from rnn_fused.bench.timer import Settings

SIZES = [(100, 32, 64, 64), (100, 32, 256, 256)]  # T, B, I, H
SETTINGS = Settings(budget_s=3)
BOUND = 0.05


def loop_over_cell(
    cell: nn.LSTMCell,
    x: Tensor,
    clip_gradient: bool = False,
    clip_c: bool = False,
    every_c: bool = False,
) -> Tensor:
    h = c = x.new_zeros(x.size(1), cell.hidden_size)
    outputs = []
    for x_t in x:
        if clip_c:  # between the two halves of a cell, so that these are written out
            gates = F.linear(x_t, cell.weight_ih, cell.bias_ih)
            i, f, g, o = (gates + F.linear(h, cell.weight_hh, cell.bias_hh)).chunk(4, -1)
            c = (f.sigmoid() * c + i.sigmoid() * g.tanh()).clamp(-BOUND, BOUND)
            h = o.sigmoid() * c.tanh()
        else:
            h, c = cell(x_t, (h, c))
        outputs.append(torch.cat([h, c], -1) if every_c else h)
        if clip_gradient:
            h, c = h + 0, c + 0
            for state in (h, c):
                state.register_hook(lambda grad: grad.clamp(-BOUND, BOUND))
    return torch.stack(outputs)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "grad_clip_value": ({"grad_clip_value": BOUND}, {"clip_gradient": True}),
    "cell_clip": ({"cell_clip": BOUND}, {"clip_c": True}),
    "all states": ({}, {"every_c": True}),
    "recompute": ({"save": "recompute"}, {}),
    "gate_slope": ({"gate_slope": 2.0}, {}),
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_training_with(
    benchmark: BenchmarkFixture, option: str, sizes: tuple[int, int, int, int]
) -> None:
    T, B, I, H = sizes  # noqa: E741
    torch.manual_seed(0)
    of_layer, of_loop = OPTIONS[option]
    layer, plain = rnn_fused.LSTM(I, H, **of_layer), rnn_fused.LSTM(I, H)
    stock, cell = nn.LSTM(I, H), nn.LSTMCell(I, H)
    weights = layer.state_dict()
    plain.load_state_dict(weights)
    # Steeper gates are steeper weights; they have to be scaled at every step of training.
    scale = torch.ones(4, H)
    scale[[0, 1, 3]] = of_layer.get("gate_slope", 1.0)
    scale = scale.flatten()
    every_c = option == "all states"
    x, grad = torch.randn(T, B, I), torch.randn(T, B, H * (1 + every_c))

    def ours(module: nn.Module) -> Tensor:
        if not every_c:
            return module(x)[0]
        _, _, ((h, c),) = module(x, return_all_states=True)
        return torch.cat([h, c], -1)

    def today() -> Tensor:
        if option == "recompute":  # saves more, and runs the whole layer again
            return checkpoint(lambda x: stock(x)[0], x, use_reentrant=False)
        if option == "gate_slope":
            steep = {
                name: w * (scale.unsqueeze(1) if w.dim() == 2 else scale)
                for name, w in stock.named_parameters()
            }
            return torch.func.functional_call(stock, steep, (x,))[0]
        return loop_over_cell(cell, x, **of_loop)

    with torch.no_grad():
        stock.load_state_dict(weights)
        cell.load_state_dict({name.removesuffix("_l0"): w for name, w in weights.items()})
    torch.testing.assert_close(ours(layer), today())

    leaves = [p for module in (layer, plain, stock, cell) for p in module.parameters()]

    def training(output: Callable[[], Tensor]) -> Callable[[], None]:
        return training_step(output, grad, leaves)

    fused = training(lambda: ours(layer))
    without = training(lambda: plain(x)[0])
    benchmark.extra_info["overhead"] = ratio(fused, without, SETTINGS)
    benchmark.extra_info["ratio_to_today"] = ratio(training(today), fused, SETTINGS)
    benchmark.pedantic(fused, rounds=5, iterations=1)

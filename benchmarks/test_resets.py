"""Training with resets inside the sequences, as recurrent policies need it: `extra_info` keeps what
they cost over the same call without, and the ratio to the loop over a cell that is used today."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from steps import ratio, training_step
from torch import Tensor, nn

import rnn_fused
from rnn_fused.bench.timer import Settings

SIZES = [(64, 128, 64, 256), (128, 8, 16, 64)]  # T, B, I, H: of the rl grid, and a small policy
SETTINGS = Settings(budget_s=3)


def loop_over_cell(cell: nn.LSTMCell, x: Tensor, resets: Tensor) -> Tensor:
    keep = (~resets).unsqueeze(-1).to(x.dtype)
    h = c = x.new_zeros(x.size(1), cell.hidden_size)
    outputs = []
    for x_t, keep_t in zip(x, keep, strict=True):
        h, c = cell(x_t, (h * keep_t, c * keep_t))
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.01, 0.1], ids=lambda p: f"reset_p={p}")
def test_training_with_resets(
    benchmark: BenchmarkFixture, p: float, sizes: tuple[int, int, int, int]
) -> None:
    T, B, I, H = sizes  # noqa: E741
    torch.manual_seed(0)
    layer, cell = rnn_fused.LSTM(I, H), nn.LSTMCell(I, H)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            parameter.copy_(getattr(layer, f"{name}_l0"))
    x, grad, resets = torch.randn(T, B, I), torch.randn(T, B, H), torch.rand(T, B) < p
    torch.testing.assert_close(layer(x, resets=resets)[0], loop_over_cell(cell, x, resets))

    leaves = *layer.parameters(), *cell.parameters()

    def training(output: Callable[[], Tensor]) -> Callable[[], None]:
        return training_step(output, grad, leaves)

    fused = training(lambda: layer(x, resets=resets)[0])
    plain = training(lambda: layer(x)[0])
    loop = training(lambda: loop_over_cell(cell, x, resets))
    benchmark.extra_info["overhead"] = ratio(fused, plain, SETTINGS)
    benchmark.extra_info["ratio_to_loop"] = ratio(loop, fused, SETTINGS)
    benchmark.pedantic(fused, rounds=5, iterations=1)

"""Training on padded batches with `lengths`: `extra_info` keeps the time over that of the same
batch without them, divided by the share of steps that are valid, the same of a PackedSequence made
before, and the ratio to torch.nn between `pack_padded_sequence` and `pad_packed_sequence`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from steps import ratio, training_step
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn_fused
from rnn_fused.bench.timer import Settings

SIZES = [(24, 32, 32, 32), (64, 32, 64, 64), (64, 32, 128, 128), (100, 64, 256, 256)]  # T, B, I, H
SETTINGS = Settings(budget_s=3)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_training_with_lengths(
    benchmark: BenchmarkFixture, cell: str, sizes: tuple[int, int, int, int]
) -> None:
    T, B, I, H = sizes  # noqa: E741
    torch.manual_seed(0)
    layer, stock = getattr(rnn_fused, cell)(I, H), getattr(nn, cell)(I, H)
    stock.load_state_dict(layer.state_dict())
    lengths = torch.randint(T // 4, T + 1, (B,))
    x, grad = torch.randn(T, B, I, requires_grad=True), torch.randn(T, B, H)

    def through_packing(module: Any) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        padded: Tensor = pad_packed_sequence(module(packed)[0], total_length=T)[0]
        return padded

    torch.testing.assert_close(layer(x, lengths=lengths)[0], through_packing(stock))

    leaves = x, *layer.parameters(), *stock.parameters()

    def training(output: Callable[[], Tensor]) -> Callable[[], None]:
        return training_step(output, grad, leaves)

    fused = training(lambda: layer(x, lengths=lengths)[0])
    dense = training(lambda: layer(x)[0])
    share = float(lengths.sum()) / (T * B)
    cost = ratio(fused, dense, SETTINGS) / share
    made = pack_padded_sequence(x.detach(), lengths, enforce_sorted=False)
    made.data.requires_grad_()
    rows = training_step(
        lambda: layer(made)[0].data, torch.randn(len(made.data), H), [*leaves, made.data]
    )
    benchmark.extra_info["cost_of_packed"] = round(ratio(rows, dense, SETTINGS) / share, 3)
    packing = training(lambda: through_packing(stock))
    benchmark.extra_info["cost_per_valid_step"] = round(cost, 3)
    benchmark.extra_info["ratio_to_torch"] = ratio(packing, fused, SETTINGS)
    benchmark.pedantic(fused, rounds=5, iterations=1)

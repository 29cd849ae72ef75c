"""The cells against torch.nn's: values, gradients, state, dtypes and torch's tools."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from pairs import CELLS, HIDDEN, INPUT, compare, pair, tensors
from torch.func import functional_call
from torch.nn.utils import parametrizations

cells = pytest.mark.parametrize("kind", CELLS)
F64 = {"dtype": torch.float64}


def state(kind: str, *batch: int, **options: Any) -> Any:
    options = {**F64, **options}
    h, c = (torch.randn(*batch, HIDDEN, **options) for _ in range(2))
    return (h, c) if kind == "lstm_cell" else h


@cells
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (0,)], ids=["unbatched", "1", "3", "0"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_options(kind: str, bias: bool, batch: tuple[int, ...], given: bool) -> None:
    hx = state(kind, *batch) if given else None
    compare(*pair(kind, bias=bias), torch.randn(*batch, INPUT, **F64), hx)


@cells
def test_loop_over_steps(kind: str) -> None:
    """The gradient through several steps: states feed the next call."""
    x, results = torch.randn(4, 2, INPUT, requires_grad=True, **F64), []
    for module in pair(kind):
        hx = None
        for step in x:
            hx = module(step, hx)
        grads = torch.autograd.grad(sum(t.sum() for t in tensors(hx)), [x, *module.parameters()])
        results.append([*tensors(hx), *grads])
    torch.testing.assert_close(results[1], results[0])


@cells
@pytest.mark.parametrize("sizes", [(0, HIDDEN), (INPUT, 0)], ids=["no_input", "no_hidden"])
def test_empty_sizes(kind: str, sizes: tuple[int, int]) -> None:
    stock, ours = pair(kind, sizes=sizes)
    x = torch.randn(2, sizes[0], **F64)
    torch.testing.assert_close(tensors(ours(x)), tensors(stock(x)))


@cells
def test_same_module_outside(kind: str) -> None:
    """Seed, names, repr, state_dict both ways, pickle and deepcopy."""
    stock, ours = pair(kind, bias=False)
    assert repr(ours) == repr(stock)
    torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=0, atol=0)
    x = torch.randn(3, INPUT, **F64)
    ours.reset_parameters()
    stock.load_state_dict(ours.state_dict(), strict=True)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        compare(stock, module, x)
    stock.reset_parameters()
    ours.load_state_dict(stock.state_dict(), strict=True)
    compare(stock, ours, x)


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_moves(kind: str, dtype: torch.dtype) -> None:
    stock, ours = (module.to(dtype) for module in pair(kind))
    tolerance = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    options = {"dtype": dtype}
    compare(stock, ours, torch.randn(3, INPUT, **options), state(kind, 3, **options), **tolerance)


@cells
def test_autocast_keeps_the_precision_of_the_state(kind: str) -> None:
    _, ours = pair(kind, dtype=torch.float32)
    x, hx = torch.randn(3, INPUT), state(kind, 3, dtype=torch.float32)
    expected = tensors(ours(x, hx))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(tensors(ours(x, hx)), expected, rtol=0, atol=0)
        mixed = tensors(ours(x.bfloat16(), hx))
    torch.testing.assert_close(mixed, expected, rtol=0.02, atol=0.02)


@cells
def test_weights_from_elsewhere(kind: str) -> None:
    stock, ours = (parametrizations.weight_norm(module, "weight_hh") for module in pair(kind))
    x = torch.randn(3, INPUT, **F64)
    compare(stock, ours, x)
    other = {name: torch.randn_like(p) for name, p in stock.named_parameters()}
    expected, got = (tensors(functional_call(module, other, (x,))) for module in (stock, ours))
    torch.testing.assert_close(got, expected)


@cells
def test_compiles_to_one_graph(kind: str) -> None:
    stock, ours = pair(kind)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    compare(stock, compiled, torch.randn(3, INPUT, **F64), state(kind, 3))


@cells
def test_meta_device(kind: str) -> None:
    stock, ours = pair(kind, device="meta")
    x = torch.randn(3, INPUT, device="meta", **F64)
    for expected, got in zip(tensors(stock(x)), tensors(ours(x)), strict=True):
        assert got.is_meta
        assert got.shape == expected.shape

"""float32 layers on the CPU under `torch.set_float32_matmul_precision`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import error
from pairs import LAYERS, tensors

import rnn_fused
from rnn_fused import _C, families

I, H = 40, 48  # noqa: E741
SPLITS = _C.selected_isa() == "amx_bf16"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def results(module: Any, x: torch.Tensor, precision: str) -> list[torch.Tensor]:
    """Outputs and gradients."""
    torch.set_float32_matmul_precision(precision)
    x = x.clone().requires_grad_()
    outputs = tensors(module(x))
    loss = sum(o.square().sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])]


@pytest.mark.parametrize("save", ["gates", "recompute"])
@pytest.mark.parametrize("which", LAYERS)
def test_products_are_exact_unless_torch_allows_less(which: str, save: Any) -> None:
    name, own = LAYERS[which]
    torch.manual_seed(3)
    module = getattr(rnn_fused, name)(I, H, bidirectional=True, save=save, **own)
    x = torch.randn(9, 20, I)
    exact = results(module.double(), x.double(), "highest")
    module.float()
    errors = {}
    for precision in ("highest", "high", "medium"):
        actual = results(module, x, precision)
        errors[precision] = max(map(error, actual, exact))
    assert errors["highest"] < 1e-6
    assert errors["high"] == errors["medium"]
    if SPLITS:
        assert 2 * errors["highest"] < errors["high"] < 2e-5
    else:
        assert errors["high"] == errors["highest"]


def test_what_cannot_be_split_is_exact() -> None:
    """Hidden sizes that 16 does not divide, and few rows."""
    torch.manual_seed(3)
    for hidden, rows in ((50, (9, 20)), (H, (1, 10))):
        module, x = rnn_fused.GRU(I, hidden), torch.randn(*rows, I)
        exact, ours = (results(module, x, p) for p in ("highest", "high"))
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)


def test_frozen_layers_are_exact() -> None:
    torch.manual_seed(3)
    module, x = rnn_fused.LSTM(I, H), torch.randn(9, 20, I)
    expected = results(module, x, "highest")[:3]
    torch.set_float32_matmul_precision("high")
    with torch.no_grad():
        ours = tensors(rnn_fused.freeze(module)(x))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_compiled_code_follows_the_setting() -> None:
    module, x = rnn_fused.LSTM(I, H), torch.randn(9, 20, I)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for precision in ("high", "highest"):
        torch.set_float32_matmul_precision(precision)
        torch.testing.assert_close(tensors(compiled(x)), tensors(module(x)), rtol=0, atol=0)


def test_the_setting_of_layers_on_the_cpu_comes_first() -> None:
    torch.set_float32_matmul_precision("high")
    before = torch.backends.mkldnn.rnn.fp32_precision
    torch.backends.mkldnn.rnn.fp32_precision = "ieee"
    try:
        assert not families.allows_split()
    finally:
        torch.backends.mkldnn.rnn.fp32_precision = before
    assert families.allows_split()


def test_mixed_settings_mean_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    assert families.allows_split()

    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert not families.allows_split()

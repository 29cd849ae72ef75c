"""The kernel families of the CUDA operators, forced in turn on the emulated kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rnn_fused import library
from rnn_fused.library import GATES


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--emulated-cuda") is None:
        pytest.skip("needs --emulated-cuda")


def arguments(cell: str, dtype: torch.dtype, H: int = 24, P: int | None = None) -> list[Any]:
    """Of layer_forward, up to the cell: T=5, B=3, I=4, two directions, ragged, with resets."""
    G, D, B = GATES[cell], 2, 3
    batch_sizes = torch.tensor([3, 3, 2, 1, 1])

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape).mul(0.5).to(dtype)

    lists = [
        [draw(*s) for _ in range(D)] for s in ((G * H, 4), (G * H, P or H), (G * H,), (G * H,))
    ]
    projection = [draw(P, H) for _ in range(D)] if P else []
    cx = draw(D, B, H) if cell == "lstm" else None
    hx, reset_hx = draw(D, B, P or H), draw(D, B, P or H)
    states = hx, cx, reset_hx, None if cx is None else draw(D, B, H)
    return [draw(10, 4), *states, *lists, projection, batch_sizes, torch.rand(10) < 0.3, cell]


def run(args: list[Any], kernels: str, allow_tf32: bool = False) -> list[torch.Tensor]:
    """Every output and gradient of both passes."""
    forward = library.layer_forward(*args, True, kernels, allow_tf32)
    output, _, _, gates, cells = forward
    upstream = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    *grads, weights = library.layer_backward(
        *(upstream, None, None, *args, output, gates, cells, True, True, True),
        *(kernels, allow_tf32),
    )
    return [*forward, *grads, *weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", GATES)
def test_families_agree(cell: str, dtype: torch.dtype) -> None:
    args = arguments(cell, dtype)
    persistent, stepwise = run(args, "persistent"), run(args, "stepwise")
    tolerance = 64 * torch.finfo(dtype).eps
    for a, b in zip(persistent, stepwise, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(run(args, "auto"), persistent, strict=True))


@pytest.mark.parametrize("kernels", ["persistent", "stepwise"])
@pytest.mark.parametrize("cell", GATES)
def test_a_tail_and_idle_sequences(
    cell: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows behind those of the timesteps, a sequence without any, a timestep without sequences."""
    input, *states, W_ih, W_hh, b_ih, b_hh, W_hr, sizes, resets, _ = arguments(cell, torch.float32)
    weights = W_ih, W_hh, b_ih, b_hh, W_hr
    longer = torch.cat([input, torch.ones(4, 4)])
    wider = [None if s is None else torch.cat([s, torch.ones_like(s[:, :1])], 1) for s in states]
    more = torch.cat([sizes, torch.tensor([0])]), torch.cat([resets, torch.ones(4).bool()])
    expected = run([input, *states, *weights, sizes, resets, cell], kernels)
    known = run([longer, *wider, *weights, *more, cell], kernels)
    monkeypatch.setenv("RNN_FUSED_EMULATED_SIZES", "device")
    values = run([longer, *wider, *weights, *more, cell], kernels)
    output, h_n, c_n, gates, cells, grad_input = values[:6]
    for tensor, dim in ((output, 0), (grad_input, 0), (gates, 1), (cells, 1)):
        assert tensor.numel() == 0 or not tensor.narrow(dim, 10, 4).any()
    assert torch.equal(h_n[:, 3], wider[0][:, 3])
    for value, e in zip((output, h_n, c_n), expected, strict=False):
        if e.numel() > 0:
            value = value[:10] if value is output else value[:, :3]
            torch.testing.assert_close(value, e)
    for value, on_host in zip(values, known, strict=True):
        torch.testing.assert_close(value, on_host)


def test_tf32_rounds_the_factors() -> None:
    args = arguments("gru", torch.float32)
    exact, rounded = run(args, "persistent"), run(args, "persistent", allow_tf32=True)
    error = max((a - b).abs().max().item() for a, b in zip(exact, rounded, strict=True) if len(a))
    assert 1e-6 < error < 1e-2


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"dtype": torch.float64}, "float64 has no persistent kernels"),
        ({"dtype": torch.float32, "P": 5}, "a projection, P = 5"),
    ],
)
def test_a_family_that_cannot_run_says_why(args: dict[str, Any], why: str) -> None:
    layer = arguments("lstm", **args)
    with pytest.raises(RuntimeError, match=rf"^\[lstm\] the persistent kernels cannot .*: {why}"):
        library.layer_forward(*layer, True, "persistent", False)
    assert library.layer_forward(*layer, True, "auto", False)[0].isfinite().all()


def test_an_unknown_family_is_an_error() -> None:
    layer = arguments("gru", torch.float32)
    with pytest.raises(RuntimeError, match="must be auto, stepwise or persistent, got 'cudnn'"):
        library.layer_forward(*layer, True, "cudnn", False)

"""The kernel families of the CUDA operators, forced in turn on the emulated kernels."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from rnn_fused import library
from rnn_fused.library import GATES, Call
from rnn_fused.reference import PLAIN, CellOptions


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--emulated-cuda") is None:
        pytest.skip("needs --emulated-cuda")


def arguments(cell: str, dtype: torch.dtype, H: int = 24, P: int | None = None) -> list[Any]:
    """Of layer_forward, up to the call: T=5, B=3, I=4, two directions, ragged, with resets."""
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
    return [draw(10, 4), *states, *lists, projection, batch_sizes, torch.rand(10) < 0.3]


def options_of(cell: str) -> CellOptions:
    """Tight enough to matter at every step."""
    return CellOptions(
        gate_slope=1.7 if GATES[cell] > 1 else 1.0,
        cell_clip=0.4 if cell == "lstm" else None,
        grad_clip_value=0.05,
    )


def run(args: list[Any], call: Call, recompute: bool = False) -> list[torch.Tensor]:
    """Every output and gradient of both passes."""
    output, h_n, c_n, gates, cells = library.layer_forward(
        *args, *call.arguments, not recompute, True
    )

    def upstream(like: torch.Tensor) -> torch.Tensor:
        return torch.linspace(-1, 1, like.numel()).view_as(like).to(like.dtype)

    grads = upstream(output), None, None, upstream(cells) if call.cell == "lstm" else None
    *gradients, weights = library.layer_backward(
        *(*grads, *args, *call.arguments, output, gates, cells, True, True, True)
    )
    saved = [] if recompute else [gates]
    return [output, h_n, c_n, cells, *saved, *gradients, *weights]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "options"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", GATES)
def test_families_agree(cell: str, dtype: torch.dtype, plain: bool) -> None:
    args, options = arguments(cell, dtype), PLAIN if plain else options_of(cell)
    families = ["persistent", "stepwise", "cluster", "handoff", "auto"]
    if GATES[cell] > 1:
        families.insert(1, "split")
    persistent, *others, auto = (run(args, Call(cell, options, family)) for family in families)
    handoff = others[-1]
    tolerance = 64 * torch.finfo(dtype).eps
    for other in others:
        for a, b in zip(persistent, other, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for same in (auto, handoff):  # which add up in the same order
        assert all(torch.equal(a, b) for a, b in zip(same, persistent, strict=True))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_each_family_has_a_backward_pass_of_its_own(cell: str) -> None:
    """Which adds up in an order of its own: as close as they are, no two have the same bits."""
    args = arguments(cell, torch.float32, H=72)
    output, _, _, gates, cells = library.layer_forward(*args, *Call(cell).arguments, True, True)
    grads = torch.ones_like(output), None, None, None
    found = {
        family: library.layer_backward(
            *(*grads, *args, *Call(cell, kernels=family).arguments, output, gates, cells),
            *(True, True, True),
        )[0]
        for family in ("stepwise", "persistent", "split", "cluster")
    }
    for (a, x), (b, y) in combinations(found.items(), 2):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert not torch.equal(x, y), f"{a} and {b} are one"


@pytest.mark.parametrize("kernels", ["persistent", "stepwise", "cluster"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_rebuilt_gates_are_those_of_the_forward_pass(
    cell: str, dtype: torch.dtype, kernels: str
) -> None:
    args, call = arguments(cell, dtype), Call(cell, options_of(cell), kernels)
    output, h_n, c_n, cells, _, *saved = run(args, call)
    rebuilt = run(args, call, recompute=True)
    tolerance = 16 * torch.finfo(dtype).eps  # sums of another order
    for a, b in zip(rebuilt, (output, h_n, c_n, cells, *saved), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", ["persistent", "stepwise", "cluster"])
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("recompute", [False, True], ids=["gates", "recompute"])
def test_a_tail_and_idle_sequences(
    cell: str, kernels: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows behind those of the timesteps, a sequence without any, a timestep without sequences."""
    input, *states, W_ih, W_hh, b_ih, b_hh, W_hr, sizes, resets = arguments(cell, torch.float32)
    weights = W_ih, W_hh, b_ih, b_hh, W_hr
    longer = torch.cat([input, torch.ones(4, 4)])
    wider = [None if s is None else torch.cat([s, torch.ones_like(s[:, :1])], 1) for s in states]
    more = torch.cat([sizes, torch.tensor([0])]), torch.cat([resets, torch.ones(4).bool()])
    call = Call(cell, options_of(cell), kernels)
    expected = run([input, *states, *weights, sizes, resets], call, recompute)
    known = run([longer, *wider, *weights, *more], call, recompute)
    monkeypatch.setenv("RNN_FUSED_EMULATED_SIZES", "device")
    values = run([longer, *wider, *weights, *more], call, recompute)
    output, h_n, c_n, cells, *saved = values[: 5 if recompute else 6]
    for tensor in (output, cells, *saved):
        dim = 0 if tensor.dim() == 2 else 1
        assert tensor.numel() == 0 or not tensor.narrow(dim, 10, 4).any()
    assert torch.equal(h_n[:, 3], wider[0][:, 3])
    for value, e in zip((output, h_n, c_n), expected, strict=False):
        if e.numel() > 0:
            value = value[:10] if value is output else value[:, :3]
            torch.testing.assert_close(value, e)
    for value, on_host in zip(values, known, strict=True):
        torch.testing.assert_close(value, on_host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", GATES)
def test_a_nan_is_handed_on(cell: str, dtype: torch.dtype) -> None:
    """Whatever its bits: all set they stand for a value that is not there yet."""
    input, hx, *others = arguments(cell, dtype)
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    hx[:, 1] = torch.full_like(hx[:, 1], -1, dtype=bits).view(dtype)
    input[0] = torch.full_like(input[0], -1, dtype=bits).view(dtype)
    barrier, handed = (
        run([input, hx, *others], Call(cell, kernels=kernels))
        for kernels in ("persistent", "handoff")
    )
    assert barrier[0].isnan().any()
    for a, b in zip(barrier, handed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_tf32_rounds_the_factors() -> None:
    args = arguments("gru", torch.float32)
    exact, rounded = (
        run(args, Call("gru", kernels="persistent", allow_tf32=tf32)) for tf32 in (False, True)
    )
    error = max((a - b).abs().max().item() for a, b in zip(exact, rounded, strict=True) if len(a))
    assert 1e-6 < error < 1e-2


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"dtype": torch.float64}, "float64 has no persistent kernels"),
        ({"dtype": torch.float32, "P": 5}, "a projection, P = 5"),
    ],
)
@pytest.mark.parametrize("kernels", ["persistent", "handoff", "split", "cluster"])
def test_a_family_that_cannot_run_says_why(args: dict[str, Any], why: str, kernels: str) -> None:
    layer, forced = arguments("lstm", **args), Call("lstm", kernels=kernels)
    with pytest.raises(RuntimeError, match=rf"^\[lstm\] the {kernels} kernels cannot .*: {why}"):
        library.layer_forward(*layer, *forced.arguments, True, True)
    assert library.layer_forward(*layer, *Call("lstm").arguments, True, True)[0].isfinite().all()


def test_an_unknown_family_is_an_error() -> None:
    layer = arguments("gru", torch.float32)
    with pytest.raises(RuntimeError, match="handoff, split or cluster, got 'cudnn'"):
        library.layer_forward(*layer, *Call("gru", kernels="cudnn").arguments, True, True)

"""The backward loop in windows of timesteps: on the CPU where the gradients of the gates have
memory of their own, everywhere where gates are rebuilt."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import (
    KINDS,
    assert_as_accurate,
    each_kind,
    padded_layer,
    problem,
    values_and_gradients,
)

from rnn_fused import ops, reference
from rnn_fused.reference import CellOptions

rebuilt = partial(ops.layer, recompute=True)
# With 2048 rows a window or more, and no fewer than sequences: windows from 2 to 4.
RAGGED = (150,) * 40 + (70,) * 20 + (11,) * 9
SKEWED = (90,) * 3 + (2,) * 2000
SIZES = {"dense": {"T": 151, "B": 60}, "packed": {"lengths": RAGGED}, "skewed": {"lengths": SKEWED}}


@each_kind
@pytest.mark.parametrize("layout", SIZES)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("resets", [None, 0.1], ids=["whole", "resets"])
def test_windows_agree_with_the_reference(
    kind: str, layout: str, directions: int, resets: float | None, device: str
) -> None:
    case = problem(
        **KINDS[kind],
        **SIZES[layout],
        directions=directions,
        resets=resets,
        reset_state=bool(resets),
        device=device,
    )
    if resets:
        slope = 1.5 if case.cell in ("lstm", "gru") else 1.0
        options = CellOptions(gate_slope=slope, grad_clip_value=0.5)
        case = replace(case, options=options, all_cells=case.cell == "lstm")
    exact = values_and_gradients(case, reference.layer)
    # With the graph kept, saved gates stay what they are.
    for layer, retain_graph in ((rebuilt, False), (ops.layer, True)):
        ours = values_and_gradients(case, layer, retain_graph)
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.own_ops
@each_kind
@pytest.mark.parametrize("layout", ["packed", "skewed"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "rebuilt"])
def test_windows_of_a_padded_batch(kind: str, layout: str, recompute: bool) -> None:
    case = problem(**KINDS[kind], **SIZES[layout], directions=2, resets=0.1, reset_state=True)
    ours, exact = (
        values_and_gradients(case, partial(layer, recompute=recompute), not recompute)
        for layer in (padded_layer, ops.layer)
    )
    torch.testing.assert_close(ours, exact, rtol=0, atol=0)


@each_kind
def test_a_kept_graph_is_still_there(kind: str, device: str) -> None:
    case = problem(**KINDS[kind], T=151, B=60, device=device)
    output = ops.layer(case.input, case.hx, case.cx, case.weights, cell=case.cell).output
    first, again = (
        torch.autograd.grad(output.sum(), case.tensors[:2], retain_graph=True) for _ in range(2)
    )
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_windows_add_little_error(kind: str, dtype: torch.dtype, device: str) -> None:
    case = problem(**KINDS[kind], T=150, B=60, directions=2, dtype=dtype, device=device)
    exact = values_and_gradients(case.to(torch.float64), reference.layer)
    assert_as_accurate(
        values_and_gradients(case, rebuilt), values_and_gradients(case, ops.layer), exact
    )

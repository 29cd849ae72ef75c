"""The reference against torch.nn, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import KINDS, each_kind, each_layout, problem, torch_layer, values_and_gradients

from rnn_fused import reference


@each_kind
@each_layout
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_agrees_with_torch(
    kind: str, lengths: tuple[int, ...] | None, directions: int, bias: bool, device: str
) -> None:
    case = problem(
        **KINDS[kind], T=5, lengths=lengths, directions=directions, bias=bias, device=device
    )
    torch.testing.assert_close(
        values_and_gradients(case, reference.layer), values_and_gradients(case, torch_layer)
    )


@each_kind
def test_steps_make_a_layer(kind: str) -> None:
    case = problem(**KINDS[kind], requires_grad=False)
    weight_ih, weight_hh, bias_ih, bias_hh, *weight_hr = (w[0] for w in case.weights if w)
    state = [s[0] for s in (case.hx, case.cx) if s is not None]
    for x in case.input:
        x = torch.nn.functional.linear(x, weight_ih, bias_ih)
        state = reference.STEPS[case.cell](x, *state, weight_hh, bias_hh, *weight_hr)
    _, *final = case.run(reference.layer)
    torch.testing.assert_close([s[0] for s in final], list(state))


@each_kind
def test_derivatives(kind: str) -> None:
    case = problem(**KINDS[kind], T=2, lengths=(2, 1), H=2, directions=2)
    function = case.function(reference.layer)
    torch.autograd.gradcheck(function, case.tensors, fast_mode=True, check_forward_ad=True)
    torch.autograd.gradgradcheck(function, case.tensors, fast_mode=True)

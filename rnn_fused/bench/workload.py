"""What is timed: one pass of one provider's layer, checked before the clock runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .problems import Problem
from .providers import PROVIDERS, plain_name

# Relative error (Frobenius norm, against float64) that counts as rounding for each dtype.
NOISE_FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


class WrongResultError(AssertionError):
    """A provider's numbers are wrong, so that its time means nothing."""


@dataclass(frozen=True)
class Case:
    """A problem with all that fixes its numbers; `lengths` (sorted, longest first) packs it."""

    problem: Problem
    dtype: torch.dtype
    pass_: str
    device: torch.device
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """The case in words."""
        packed = " packed" if self.lengths else ""
        return f"{self.problem} {dtype_name(self.dtype)} {self.pass_}{packed}"


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


class Workload:
    """One pass of one layer on one input; calling it runs what is timed.

    The training pass computes the gradients of the weights and the input from a given gradient of
    the output; all of them start as None.
    """

    def __init__(self, module: nn.Module, x: Tensor, grad: Tensor, case: Case) -> None:
        """Take the input `x` [T, B, I] and the output's gradient `grad` [T, B, H]."""
        self.module = module
        self.training = case.pass_ == "training"
        self.leaves: dict[str, Tensor] = {
            plain_name(name): p for name, p in module.named_parameters()
        }
        if case.lengths is None:
            self.grad = grad
            self.input: Any = x.requires_grad_(self.training)
            self.leaves["input"] = x
        else:
            self.grad = pack_padded_sequence(grad, list(case.lengths)).data
            packed = pack_padded_sequence(x, list(case.lengths))
            self.leaves["input"] = packed.data.requires_grad_(self.training)
            self.input = PackedSequence(self.leaves["input"], packed.batch_sizes)

    def _forward(self) -> tuple[Tensor, Any]:
        output, state = self.module(self.input)
        return output.data if isinstance(output, PackedSequence) else output, state

    def __call__(self) -> None:
        """Run the pass once."""
        if not self.training:
            with torch.inference_mode():
                self._forward()
            return
        output, _ = self._forward()
        output.backward(self.grad)
        for leaf in self.leaves.values():
            leaf.grad = None

    def results(self) -> dict[str, Tensor]:
        """Everything that the pass computes, by name."""
        with torch.inference_mode(not self.training):
            output, state = self._forward()
        states = state if isinstance(state, tuple) else (state,)
        found = {"output": output} | dict(zip(("h_n", "c_n"), states, strict=False))
        if self.training:
            output.backward(self.grad)
            for name, leaf in self.leaves.items():
                if leaf.grad is None:
                    raise WrongResultError(f"no gradient reached {name}")
                found[f"gradient of {name}"], leaf.grad = leaf.grad, None
        return {name: value.detach() for name, value in found.items()}


def build(case: Case, provider: str, *, exact: bool = False) -> Workload:
    """The workload of a provider: the same numbers for all, rounded to the case's dtype.

    With `exact`, the same rounded numbers are then computed in float64.
    """
    problem = case.problem
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(case.device, case.dtype)

    bound = problem.H**-0.5  # torch.nn's own initialisation: uniform within +-1/sqrt(H)
    module = PROVIDERS[provider](problem).to(case.device, case.dtype)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters(), key=lambda item: plain_name(item[0])):
            parameter.copy_(torch.rand(parameter.shape, generator=draw) * (2 * bound) - bound)
    x = random(problem.T, problem.B, problem.I)
    grad = random(problem.T, problem.B, problem.H)
    if exact:
        module, x, grad = module.double(), x.double(), grad.double()
    return Workload(module, x, grad, case)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the error over that of the exact values."""
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def verify(case: Case, workloads: dict[str, Workload]) -> None:
    """Raise WrongResultError unless every provider is as accurate as torch.nn.

    The error of each output and gradient against float64 may be at most twice the error of
    torch.nn in the case's own dtype, plus NOISE_FLOOR.
    """
    exact = build(case, "torch.nn", exact=True).results()
    errors = {
        provider: {k: relative_error(v, exact[k]) for k, v in workload.results().items()}
        for provider, workload in workloads.items()
    }
    for provider, found in errors.items():
        for name, error in found.items():
            allowed = 2 * errors["torch.nn"][name] + NOISE_FLOOR[case.dtype]
            if not error <= allowed:  # NaN is wrong too
                raise WrongResultError(
                    f"[{provider}] {case}: relative error of {name} must be at most {allowed:.2e} "
                    f"(twice torch.nn's own, plus rounding), got {error:.2e}: not timed"
                )


def contenders(case: Case, providers: Sequence[str]) -> dict[str, Workload]:
    """Verified workloads of torch.nn and of `providers`, ready to be timed."""
    names = dict.fromkeys(("torch.nn", *providers))
    workloads = {name: build(case, name) for name in names}
    verify(case, workloads)
    return workloads

"""What is timed: one pass of one provider's layer, checked before the clock runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .problems import GATES, Problem
from .providers import OTHERS, PROVIDERS, plain_name

# Relative error (Frobenius norm, against float64) that counts as rounding for each dtype.
NOISE_FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
TF32_NOISE_FLOOR = 1e-3  # cuDNN does not use TF32 in every layer in which it may


class WrongResultError(AssertionError):
    """A provider's numbers are wrong, so that its time means nothing."""


@dataclass(frozen=True)
class Case:
    """A problem with all that fixes its numbers; `lengths` (sorted, longest first) packs it, the
    problem's `reset_p` draws resets."""

    problem: Problem
    dtype: torch.dtype
    pass_: str
    device: torch.device
    lengths: tuple[int, ...] | None = None

    @property
    def layout(self) -> str:
        """dense, packed, or dense with resets."""
        return "packed" if self.lengths else "resets" if self.problem.reset_p > 0 else "dense"

    @property
    def key(self) -> tuple[Any, ...]:
        """What its rows have in common: `Row.case`."""
        p = self.problem
        sizes = p.cell, p.T, p.B, p.I, p.H, p.layers, p.directions
        return *sizes, self.layout, dtype_name(self.dtype), self.pass_

    def __str__(self) -> str:
        """The case in words."""
        layout = "" if self.layout == "dense" else f" {self.layout}"
        return f"{self.problem} {dtype_name(self.dtype)} {self.pass_}{layout}"


def allows_tf32(device: torch.device) -> bool:
    """Whether layers in float32 may multiply in TF32 there: torch.nn's default on CUDA."""
    if device.type != "cuda":
        return False
    precision: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


def noise_floor(case: Case) -> float:
    """The error that counts as rounding."""
    if case.dtype is torch.float32 and allows_tf32(case.device):
        return TF32_NOISE_FLOOR
    return NOISE_FLOOR[case.dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


class Workload:
    """One pass of one layer on one input; calling it runs what is timed.

    The training pass computes the gradients of the weights and the input from a given gradient of
    the output; all of them start as None.
    """

    def __init__(
        self, module: nn.Module, x: Tensor, grad: Tensor, case: Case, **options: Tensor
    ) -> None:
        """Take the input `x` [T, B, I] and the output's gradient `grad` [T, B, H]; options: what
        the module takes besides."""
        self.options = options
        self.training = case.pass_ == "training"
        self.module = module.train(self.training)
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
        output, state = self.module(self.input, **self.options)
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
    draw = torch.Generator(case.device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=case.device).to(case.dtype)

    bound = problem.H**-0.5  # torch.nn's own initialisation: uniform within +-1/sqrt(H)
    module = PROVIDERS[provider](problem).to(case.device, case.dtype)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters(), key=lambda item: plain_name(item[0])):
            uniform = torch.rand(parameter.shape, generator=draw, device=case.device)
            parameter.copy_(uniform * (2 * bound) - bound)
    x = random(problem.T, problem.B, problem.I)
    grad = random(problem.T, problem.B, problem.H * problem.directions)
    options = {}
    if problem.reset_p > 0:
        chance = torch.rand(problem.T, problem.B, generator=draw, device=case.device)
        options["resets"] = chance < problem.reset_p
    if exact:
        module, x, grad = module.double(), x.double(), grad.double()
    return Workload(module, x, grad, case, **options)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the error over that of the exact values."""
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def errors(results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of each output and gradient."""
    return {name: relative_error(results[name], value) for name, value in exact.items()}


def mistake(
    case: Case, provider: str, found: Mapping[str, float], torchs: Mapping[str, float]
) -> str:
    """What is wrong with a provider's errors `found`, in words, or "".

    Each may be at most twice that of torch.nn in the case's own dtype, plus the noise floor.
    """
    for name, error in found.items():
        allowed = 2 * torchs[name] + noise_floor(case)
        if not error <= allowed:  # NaN is wrong too
            return (
                f"[{provider}] {case}: relative error of {name} must be at most {allowed:.2e} "
                f"(twice torch.nn's own, plus rounding), got {error:.2e}: not timed"
            )
    return ""


FATAL = ("CUDA error", "illegal memory access", "launch failure", "misaligned address")
REFUSAL = "cannot run this layer"  # a family of kernels says so where its plan does not reach


@dataclass
class Admission:
    """Who may be timed on a case, and who not: what is wrong, or why they cannot run."""

    workloads: dict[str, Workload] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def admit(case: Case, providers: Sequence[str]) -> Admission:
    """Verified workloads of torch.nn and of those `providers` that run the case."""
    exact = build(case, "torch.nn", exact=True).results()
    found = Admission()
    torchs: dict[str, float] = {}
    for name in dict.fromkeys(("torch.nn", *providers)):
        tolerated = Exception if name in OTHERS else RuntimeError
        try:
            workload = build(case, name)
            own = errors(workload.results(), exact)
        except tolerated as error:
            if name == "torch.nn" or is_fatal(error):
                raise
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            if name in OTHERS or REFUSAL in reason:
                found.refused[name] = reason
            else:
                found.wrong.append(f"[{name}] {case}: {reason}")
            continue
        torchs = torchs or own
        problem = mistake(case, name, own, torchs)
        if problem and name in OTHERS:
            found.refused[name] = "results further from float64 than is allowed"
        elif problem:
            found.wrong.append(problem)
        else:
            found.workloads[name] = workload
    return found


def is_fatal(error: Exception) -> bool:
    """Whether CUDA cannot be used any more in this process."""
    return any(words in str(error) for words in FATAL) and "out of memory" not in str(error)


def contenders(case: Case, providers: Sequence[str]) -> dict[str, Workload]:
    """Verified workloads of torch.nn and of all `providers`, ready to be timed.

    Raises:
        WrongResultError: a provider computes something else.
        RuntimeError: a provider cannot run the case.
    """
    found = admit(case, providers)
    if found.wrong:
        raise WrongResultError(found.wrong[0])
    for name, reason in found.refused.items():
        raise RuntimeError(f"[{name}] {case}: {reason}")
    return found.workloads


def input_product(case: Case) -> Callable[[], None]:
    """The products of the input alone: W_ih x, in training also those of both its gradients.

    What a layer takes beyond it is its recurrence, unless the layer overlaps the two.
    """
    problem = case.problem
    rows = sum(case.lengths) if case.lengths else problem.T * problem.B
    options: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    x = torch.randn(rows, problem.I, **options)
    weight = torch.randn(GATES[problem.cell] * problem.H, problem.I, **options)
    training = case.pass_ == "training"
    grad = torch.randn(rows, weight.shape[0], **options) if training else weight

    def call() -> None:
        with torch.inference_mode(), _products_as_in_layers(case):
            x @ weight.T
            if training:
                grad @ weight
                grad.T @ x

    return call


def large_product(case: Case) -> tuple[Callable[[], None], float]:
    """A product of square matrices, large enough for torch's library to reach its best on a few
    cores or a GPU, and its multiplications and additions."""
    size = 1024 if case.device.type == "cpu" else 8192
    options: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    left, right, out = (torch.randn(size, size, **options) for _ in range(3))

    def call() -> None:
        with torch.inference_mode(), _products_as_in_layers(case):
            torch.mm(left, right, out=out)

    return call, 2.0 * size**3


@contextmanager
def _products_as_in_layers(case: Case) -> Iterator[None]:
    """TF32 where layers may use it: torch's default for products outside of them is exact."""
    matmul = torch.backends.cuda.matmul
    if case.dtype is not torch.float32 or not allows_tf32(case.device):
        yield
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before

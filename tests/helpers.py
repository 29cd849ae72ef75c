"""One layer's arguments as a value, torch.nn's module with the same weights, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnn_fused import library, ops, reference
from rnn_fused.library import GATES
from rnn_fused.reference import PLAIN, CellOptions, LayerOutputs, LayerWeights

Layer = Callable[..., LayerOutputs]

# What distinguishes the layers: arguments of `problem`.
KINDS: dict[str, dict[str, Any]] = {
    "lstm": {"cell": "lstm"},
    "lstm_proj": {"cell": "lstm", "projection": 2},
    "gru": {"cell": "gru"},
    "rnn_tanh": {"cell": "rnn_tanh"},
    "rnn_relu": {"cell": "rnn_relu"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_layout = pytest.mark.parametrize("lengths", [None, (3, 2, 2)], ids=["dense", "packed"])


@dataclass(frozen=True)
class Problem:
    """The arguments of `layer`."""

    input: Tensor
    hx: Tensor | None
    cx: Tensor | None
    weights: LayerWeights
    cell: str
    batch_sizes: Tensor | None
    resets: Tensor | None = None
    reset_hx: Tensor | None = None
    reset_cx: Tensor | None = None
    options: CellOptions = PLAIN
    all_cells: bool = False

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        return self.hx, self.cx, self.reset_hx, self.reset_cx

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that can be differentiated."""
        states = (state for state in self.states if state is not None)
        return self.input, *states, *(w for field in self.weights for w in field)

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """Of the op itself, up to what is to be saved."""
        weights = map(list, self.weights)
        call = library.Call(self.cell, self.options)
        rows = self.batch_sizes, self.resets
        return self.input, *self.states, *weights, *rows, *call.arguments

    def with_tensors(self, tensors: Iterable[Tensor]) -> Problem:
        rest = iter(tensors)
        names = ("input", "hx", "cx", "reset_hx", "reset_cx")
        return replace(
            self,
            **{name: next(rest) for name in names if getattr(self, name) is not None},
            weights=LayerWeights(*(tuple(next(rest) for _ in field) for field in self.weights)),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        return self.with_tensors(map(function, self.tensors))

    def to(self, *args: Any) -> Problem:
        moved = self.map(lambda x: x.detach().to(*args).requires_grad_(x.requires_grad))
        if self.resets is None:
            return moved
        return replace(moved, resets=self.resets.to(moved.input.device))

    def run(self, layer: Layer) -> tuple[Tensor, ...]:
        """The layer's outputs, those that there are."""
        outputs = layer(
            *(self.input, self.hx, self.cx, self.weights),
            cell=self.cell,
            batch_sizes=self.batch_sizes,
            resets=self.resets,
            reset_hx=self.reset_hx,
            reset_cx=self.reset_cx,
            **({} if self.options == PLAIN else {"options": self.options}),
            **({"all_cells": True} if self.all_cells else {}),
        )
        return tuple(o for o in outputs if o is not None)

    def function(self, layer: Layer) -> Callable[..., tuple[Tensor, ...]]:
        """The layer as a function of `tensors`."""
        return lambda *tensors: self.with_tensors(tensors).run(layer)

    def op_function(self) -> Callable[..., tuple[Tensor, ...]]:
        """The op itself, which compilers trace, as a function of `tensors`."""

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            arguments = self.with_tensors(tensors).op_arguments
            outputs = library.layer_forward(*arguments, True, True)
            return outputs[: 3 if self.cell == "lstm" else 2]

        return function

    def loss(self, layer: Layer) -> Callable[..., Tensor]:
        """A scalar whose derivatives of every order depend on all the tensors."""
        return lambda *tensors: sum(o.square().sum() for o in self.function(layer)(*tensors))


def problem(
    cell: str,
    T: int = 3,
    B: int = 2,
    I: int = 3,  # noqa: E741 the field's name for it
    H: int = 4,
    *,
    directions: int = 1,
    bias: bool = True,
    projection: int = 0,
    state: bool = True,
    lengths: Sequence[int] | None = None,
    resets: float | None = None,
    reset_state: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    requires_grad: bool = True,
) -> Problem:
    """A random layer and its input: [T, B, I], or packed where lengths (decreasing) are given.

    resets: the probability of one; with reset_state to another state than zero.
    """

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(*shape, dtype=torch.float64)
        return x.to(device, dtype).requires_grad_(requires_grad)

    G, P = GATES[cell], projection or H
    shapes = {
        "weight_ih": (G * H, I),
        "weight_hh": (G * H, P),
        "bias_ih": (G * H,) if bias else None,
        "bias_hh": (G * H,) if bias else None,
        "weight_hr": (P, H) if projection else None,
    }
    fields = {
        name: tuple(random(*shape, scale=(I + H) ** -0.5) for _ in range(directions))
        if shape
        else ()
        for name, shape in shapes.items()
    }
    batch_sizes, rows = None, (T, B)
    if lengths is not None:
        B, rows = len(lengths), (sum(lengths),)
        batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])])
    return Problem(
        input=random(*rows, I),
        hx=random(directions, B, P) if state else None,
        cx=random(directions, B, H) if state and cell == "lstm" else None,
        weights=LayerWeights(**fields),
        cell=cell,
        batch_sizes=batch_sizes,
        resets=None if resets is None else torch.rand(rows, device=device) < resets,
        reset_hx=random(directions, B, P) if reset_state else None,
        reset_cx=random(directions, B, H) if reset_state and cell == "lstm" else None,
    )


def torch_layer(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: LayerWeights,
    *,
    cell: str,
    batch_sizes: Tensor | None = None,
    resets: None = None,
    reset_hx: None = None,
    reset_cx: None = None,
) -> LayerOutputs:
    """torch.nn's module, as a function with the signature of ours. It has no resets."""
    name, *nonlinearity = cell.split("_")
    hidden = weights.weight_hh[0].shape[0] // GATES[cell]
    module = getattr(nn, name.upper())(
        *(input.shape[-1], hidden),
        bias=bool(weights.bias_ih),
        bidirectional=len(weights.weight_ih) == 2,
        device="meta",
        **({"nonlinearity": nonlinearity[0]} if nonlinearity else {}),
        **({"proj_size": hx.shape[-1]} if weights.weight_hr else {}),
    )
    parameters = {
        f"{field}_l0{suffix}": w
        for field, pair in zip(weights._fields, weights, strict=True)
        for w, suffix in zip(pair, ("", "_reverse"), strict=False)
    }
    x = input if batch_sizes is None else PackedSequence(input, batch_sizes)
    state = hx if cx is None else (hx, cx)
    output, state = torch.func.functional_call(module, parameters, (x, state))
    h_n, c_n = (state, None) if cx is None else state
    return LayerOutputs(output if batch_sizes is None else output.data, h_n, c_n, None)


def padded_layer(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: LayerWeights,
    *,
    batch_sizes: Tensor,
    resets: Tensor | None = None,
    reset_hx: Tensor | None = None,
    reset_cx: Tensor | None = None,
    **options: Any,
) -> LayerOutputs:
    """`ops.layer` on a padded batch of the packed sequences, in another order, with timesteps more
    than the longest has, NaN in the padding, and resets there."""
    T, B = len(batch_sizes) + 2, hx.shape[1]
    lengths = (torch.arange(B).unsqueeze(1) < batch_sizes).sum(1)
    # Where the packed sequences stand; among those of one length, the first of them first.
    rank = torch.randperm(B, generator=torch.Generator().manual_seed(B))
    rank = rank[(rank - B * lengths).argsort()]
    order = rank.argsort()
    rows = torch.cat([t * B + rank[:n] for t, n in enumerate(batch_sizes.tolist())])

    def pad(packed: Tensor, padding: float | bool) -> Tensor:
        batch = torch.full((T * B, *packed.shape[1:]), padding, dtype=packed.dtype)
        return batch.index_copy(0, rows, packed).unflatten(0, (T, B))

    def pack(batch: Tensor) -> Tensor:
        padding = torch.ones(T * B, dtype=torch.bool).index_fill(0, rows, False)
        assert not batch.flatten(0, 1)[padding].any()
        return batch.flatten(0, 1)[rows]

    def sort(state: Tensor | None) -> Tensor | None:
        return None if state is None else state[:, order]

    outputs = ops.layer(
        *(pad(input, torch.nan), sort(hx), sort(cx), weights),  # type: ignore[arg-type]
        lengths=lengths[order],
        resets=None if resets is None else pad(resets, True),
        reset_hx=sort(reset_hx),
        reset_cx=sort(reset_cx),
        **options,
    )
    return LayerOutputs(
        pack(outputs.output),
        outputs.h_n[:, rank],
        None if outputs.c_n is None else outputs.c_n[:, rank],
        None if outputs.cells is None else pack(outputs.cells),
    )


def values_and_gradients(
    case: Problem, layer: Layer, retain_graph: bool = False
) -> dict[str, Tensor]:
    """Outputs, and what each of them sends back to the tensors when weighted at random."""
    outputs = case.run(layer)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, case.tensors, grads, retain_graph=retain_graph)
    names = [f"output {k}" for k in range(len(outputs))]
    names += [f"gradient {k}" for k in range(len(gradients))]
    return dict(zip(names, (*outputs, *gradients), strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def error(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact|, in the 2-norm."""
    exact = exact.detach().to(torch.float64)
    difference = torch.linalg.vector_norm(actual.detach().to(torch.float64) - exact)
    return float(difference / torch.linalg.vector_norm(exact).clamp_min(1e-30))


@contextmanager
def tf32_in_layers(allowed: bool) -> Iterator[None]:
    """What torch.nn's layers on CUDA do in float32.

    By torch.backends.cudnn.allow_tf32, which moves torch.backends.cudnn.rnn.fp32_precision as well:
    while the two differ, torch.export fails. By its setter, since torch's own test utilities forbid
    assignments to it.
    """
    before = torch.backends.cudnn.rnn.fp32_precision == "tf32"
    torch._C._set_cudnn_allow_tf32(allowed)
    try:
        yield
    finally:
        torch._C._set_cudnn_allow_tf32(before)


# The noise of a result, in units of rounding (eps). float64 has no more exact result beside it.
NOISE = {torch.float64: 64, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}


def assert_as_accurate(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    exact: dict[str, Tensor],
    noise: float | None = None,
) -> None:
    """Our error is at most twice torch's own in the same dtype, plus the noise: relative, by
    default that of the dtype."""
    for name, value in exact.items():
        dtype = ours[name].dtype
        assert ours[name].shape == value.shape, name
        assert dtype == theirs[name].dtype, name
        floor = NOISE[dtype] * torch.finfo(dtype).eps if noise is None else noise
        limit = 2 * error(theirs[name], value) + floor
        assert error(ours[name], value) <= limit, f"{name}: {limit=:.1e}"


def assert_accurate(case: Problem, noise: float | None = None) -> None:
    """The fused op against torch.nn and the reference in float64, values and gradients. For what
    torch.nn lacks, the bound is the error of the reference in the case's own dtype."""
    exact = values_and_gradients(case.to(torch.float64), reference.layer)
    plain = case.resets is None and case.options == PLAIN and not case.all_cells
    theirs = values_and_gradients(case, torch_layer if plain else reference.layer)
    ours = values_and_gradients(case, ops.layer)
    active = [run["output 0"] > 0 for run in (exact, theirs, ours)]
    if case.cell == "rnn_relu" and not all(a.equal(active[0]) for a in active):
        # An activation was rounded across 0, where ReLU's derivative jumps.
        exact = {name: value for name, value in exact.items() if name.startswith("output")}
    assert_as_accurate(ours, theirs, exact, noise)


def assert_agrees_with_reference(case: Problem, **tolerance: float) -> None:
    """The fused op against the reference in the case's own dtype, values and gradients."""
    ours, exact = (values_and_gradients(case, layer) for layer in (ops.layer, reference.layer))
    torch.testing.assert_close(ours, exact, **tolerance)

"""Loads the op library, `libops.so`, and describes its ops to FakeTensor and meta tensors.

The schemas are defined, and explained, in `csrc/binding/schemas.cpp`. Axes as in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import PLAIN, CellOptions

LIBRARY = Path(__file__).with_name("libops.so")
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}  # G

try:
    torch.ops.load_library(LIBRARY)
except OSError as error:
    raise ImportError(
        f"rnn_fused cannot load its op library {LIBRARY} into torch {torch.__version__}: {error}. "
        "It is built when the package is installed: pip install --no-build-isolation -v ."
    ) from error


@dataclass(slots=True)  # frozen ones take three times as long to make
class Call:
    """What says how a layer runs, besides tensors: the ops' arguments in their order."""

    cell: str
    options: CellOptions = PLAIN
    kernels: str = "auto"  # the family of CUDA kernels; the CPU has but one
    # Float32 products may be less exact: TF32 on CUDA, on the CPU those of two bfloat16 terms.
    allow_tf32: bool = False

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.cell, *self.options, self.kernels, self.allow_tf32


layer_forward = torch.ops.rnn_fused.layer_forward.default
pack_weights = torch.ops.rnn_fused.pack_weights.default
stack_forward = torch.ops.rnn_fused.stack_forward.default
stack_infer = torch.ops.rnn_fused.stack_infer.default
layer_backward = torch.ops.rnn_fused.layer_backward.default
layer_backward_ = torch.ops.rnn_fused.layer_backward_.default
stack_backward = torch.ops.rnn_fused.stack_backward.default
stack_backward_ = torch.ops.rnn_fused.stack_backward_.default


def run(op: Callable[..., Any], *args: Any) -> Any:
    """Calls an op that is to record no derivative, past its autograd in Python.

    Raises:
        torch.OutOfMemoryError: as torch's own ops do, where torch tells the op why it failed.
    """
    with torch._C._AutoDispatchBelowAutograd():
        try:
            return op(*args)
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from None
            raise


def _check_devices(cell: str, input: Tensor, *others: Tensor | None) -> None:
    """The kernels check this too, but a meta tensor among the arguments leads to fakes instead."""
    for tensor in others:
        if tensor is not None and tensor.device != input.device:
            devices = f"{input.device} and {tensor.device}"
            raise RuntimeError(f"[{cell}] all tensors must be on one device, got {devices}")


def _check_batch(cell: str, input: Tensor, hx: Tensor | None, sizes: Tensor | None) -> None:
    """The kernels check this as well."""
    if hx is None and sizes is not None and input.dim() == 2:
        raise RuntimeError(f"[{cell}] hx must be given with batch_sizes, which do not tell B")


@torch.library.register_fake("rnn_fused::layer_forward")
def _fake_forward(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    reset_hx: Tensor | None,
    reset_cx: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    weight_hr: Sequence[Tensor],
    sizes: Tensor | None,
    resets: Tensor | None,
    cell: str,
    gate_slope: float,
    cell_clip: float | None,
    grad_clip_value: float | None,
    kernels: str,
    allow_tf32: bool,
    save_gates: bool,
    save_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = *weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr
    _check_devices(cell, input, hx, cx, reset_hx, reset_cx, resets, *weights)
    _check_batch(cell, input, hx, sizes)
    directions = len(weight_ih)
    hidden = weight_ih[0].shape[0] // GATES[cell]
    if hx is None:
        state = directions, input.shape[1]
        h_n = input.new_empty(*state, weight_hr[0].shape[0] if weight_hr else hidden)
        c_n = input.new_empty(*state, hidden) if cell == "lstm" else input.new_empty(0)
    else:
        h_n = hx.new_empty(hx.shape)
        c_n = input.new_empty(0) if cx is None else cx.new_empty(cx.shape)
    output = input.new_empty(*input.shape[:-1], directions * h_n.shape[-1])
    saved = _fake_saved(cell, input, sizes, directions, hidden, save_gates, save_cells)
    return output, h_n, c_n, *saved


@torch.library.register_fake("rnn_fused::stack_forward")
def _fake_stack(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    reset_hx: Tensor | None,
    reset_cx: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    weight_hr: Sequence[Tensor],
    sizes: Tensor | None,
    resets: Tensor | None,
    cell: str,
    gate_slope: float,
    cell_clip: float | None,
    grad_clip_value: float | None,
    kernels: str,
    allow_tf32: bool,
    layers: int,
    masks: Sequence[Tensor],
    save_gates: bool,
    save_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    weights = *weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr
    _check_devices(cell, input, hx, cx, reset_hx, reset_cx, resets, *weights)
    _check_batch(cell, input, hx, sizes)
    if layers < 1 or len(weight_ih) % layers != 0:
        raise RuntimeError(
            f"[{cell}] weight_ih must hold as many tensors for each of the layers, at least 1: got "
            f"{len(weight_ih)} for {layers}"
        )
    hidden = weight_ih[0].shape[0] // GATES[cell]
    output_size = weight_hr[0].shape[0] if weight_hr else hidden
    directions = len(weight_ih) // layers
    results = _fake_results(cell, input, hx, layers, directions, hidden, output_size)
    if not (save_gates or save_cells):
        return *results, [], [], []
    below = [results[0].new_empty(results[0].shape) for _ in range(layers - 1)]
    how = cell, input, sizes, directions, hidden, save_gates, save_cells
    saved = [_fake_saved(*how) for _ in range(layers)]
    return *results, below, [gates for gates, _ in saved], [cells for _, cells in saved]


def _fake_saved(
    cell: str,
    input: Tensor,
    sizes: Tensor | None,
    directions: int,
    hidden: int,
    save_gates: bool,
    save_cells: bool,
) -> tuple[Tensor, Tensor]:
    if sizes is not None and input.dim() == 3:
        raise RuntimeError(f"[{cell}] how much is saved of a padded batch depends on its lengths")
    rows = input.shape[0] if sizes is not None else input.shape[0] * input.shape[1]
    gates, cells = input.new_empty(0), input.new_empty(0, dtype=_state_dtype(input))
    if save_gates and cell in ("lstm", "gru"):
        gates = input.new_empty(directions, rows, 4, hidden)
    if save_cells and cell == "lstm":
        cells = cells.new_empty(directions, rows, hidden)
    return gates, cells


@torch.library.register_fake("rnn_fused::stack_infer")
def _fake_packed_stack(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    reset_hx: Tensor | None,
    reset_cx: Tensor | None,
    packed: Sequence[Tensor],
    sizes: Tensor | None,
    resets: Tensor | None,
    cell: str,
    hidden_size: int,
    output_size: int,
    gate_slope: float,
    cell_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(cell, input, hx, cx, reset_hx, reset_cx, resets, *packed)
    _check_batch(cell, input, hx, sizes)
    directions = packed[0].shape[0]
    return _fake_results(cell, input, hx, len(packed), directions, hidden_size, output_size)


def _fake_results(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    layers: int,
    directions: int,
    hidden_size: int,
    output_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    state = layers * directions, input.shape[1] if hx is None else hx.shape[1]
    return (
        input.new_empty(*input.shape[:-1], directions * output_size),
        input.new_empty(*state, output_size),
        input.new_empty(*state, hidden_size) if cell == "lstm" else input.new_empty(0),
    )


@torch.library.register_fake("rnn_fused::layer_backward_")
@torch.library.register_fake("rnn_fused::layer_backward")
def _fake_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    reset_hx: Tensor | None,
    reset_cx: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    weight_hr: Sequence[Tensor],
    sizes: Tensor | None,
    resets: Tensor | None,
    cell: str,
    gate_slope: float,
    cell_clip: float | None,
    grad_clip_value: float | None,
    kernels: str,
    allow_tf32: bool,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    need_input: bool,
    need_state: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    weights = [*weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr]
    states = hx, cx, reset_hx, reset_cx
    return _fake_gradients(input, states, weights, need_input, need_state, need_weights)


@torch.library.register_fake("rnn_fused::stack_backward_")
@torch.library.register_fake("rnn_fused::stack_backward")
def _fake_stack_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    reset_hx: Tensor | None,
    reset_cx: Tensor | None,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    weight_hr: Sequence[Tensor],
    sizes: Tensor | None,
    resets: Tensor | None,
    cell: str,
    gate_slope: float,
    cell_clip: float | None,
    grad_clip_value: float | None,
    kernels: str,
    allow_tf32: bool,
    layers: int,
    masks: Sequence[Tensor],
    output: Tensor,
    below: Sequence[Tensor],
    gates: Sequence[Tensor],
    cells: Sequence[Tensor],
    need_input: bool,
    need_state: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    weights = [*weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr]
    states = hx, cx, reset_hx, reset_cx
    return _fake_gradients(input, states, weights, need_input, need_state, need_weights)


def _fake_gradients(
    input: Tensor,
    states: tuple[Tensor | None, ...],
    weights: list[Tensor],
    need_input: bool,
    need_state: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    def gradient(like: Tensor | None, needed: bool) -> Tensor:
        return input.new_empty(like.shape if like is not None and needed else 0)

    hx, cx, reset_hx, reset_cx = (gradient(state, need_state) for state in states)
    of_weights = [gradient(w, True) for w in weights] if need_weights else []
    return gradient(input, need_input), hx, cx, reset_hx, reset_cx, of_weights


def _state_dtype(input: Tensor) -> torch.dtype:
    """c stays in float32 between the steps of a 16-bit layer."""
    return torch.float32 if input.dtype.itemsize == 2 else input.dtype

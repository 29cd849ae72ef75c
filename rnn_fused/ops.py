"""`layer`: one recurrent layer, all its steps and directions, in one call of the fused op; `stack`:
all layers in one call; and `packed_stack`: the same for inference, with packed weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import families, library, reference
from .autograd import LayerForward, StackForward, apply, flatten, forward_mode, join_directions
from .ragged import host_knows, ragged
from .reference import PLAIN, CellOptions, LayerOutputs, LayerWeights

__all__ = ["CellOptions", "LayerOutputs", "LayerWeights", "layer", "packed_stack", "stack"]


def layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: LayerWeights,
    *,
    cell: str,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_hx: Tensor | None = None,
    reset_cx: Tensor | None = None,
    options: CellOptions = PLAIN,
    all_cells: bool = False,
    recompute: bool = False,
) -> LayerOutputs:
    """Runs one layer like `reference.layer`, which see for the shapes and the mathematics.

    All tensors share one dtype (float32, float64, bfloat16 or float16) and device, except
    `batch_sizes`, which may be on the CPU too, and `resets`, which are bool. Under autocast they
    are cast to its dtype, float64 excepted, and the results have that dtype. 16-bit layers compute
    and keep c in float32, and round h after each step. `batch_sizes` on a CUDA device are neither
    waited for nor checked; on the CPU a layer computes less.

    lengths: int64 [B], those of the sequences of a padded batch [T, B, I], in any order. Outputs
    behind the end of a sequence are zero; the final states are those at its own end, where the
    reverse direction begins; without a timestep it keeps its initial state. Where `takes_lengths`.

    recompute: keep nothing of the gates for the backward pass, which rebuilds them.

    Derivatives of every order and kind pass through it: backward, `torch.func`, forward mode. With
    grad_clip_value those that run backwards are clipped, and no derivatives in the strict sense.

    Raises:
        ValueError: the cell is unknown.
        RuntimeError: shapes, dtypes, devices or batch sizes do not fit together; an option out of
            range, or of another cell; resets, options, or batch_sizes on a device, where only
            torch's own op can run; lengths where the batch has to be packed.
    """
    if cell not in library.GATES:
        raise ValueError(f"[layer] cell must be one of {[*library.GATES]}, got {cell!r}")
    if lengths is not None and not (batch_sizes is None and takes_lengths(input, lengths)):
        raise RuntimeError(
            f"[{cell}] lengths need a padded batch on the CPU, without batch_sizes, outside "
            "compilers, transforms and forward mode"
        )
    if batch_sizes is not None and input.dim() != 2:
        raise RuntimeError(
            f"[{cell}] packed input must have 2 dimensions [N, I], got {input.dim()}"
        )
    if hx is None and (batch_sizes is not None or cx is not None):
        given = "batch_sizes" if cx is None else "cx"
        raise RuntimeError(f"[{cell}] hx must be given with {given}")
    if resets is None and (reset_hx is not None or reset_cx is not None):
        raise RuntimeError(f"[{cell}] reset_hx and reset_cx need resets, got none")
    wants_reset_cx = reset_hx is not None and cell == "lstm"
    if (reset_cx is not None) != wants_reset_cx:
        rule = "given with reset_hx" if wants_reset_cx else "absent"
        raise RuntimeError(f"[{cell}] reset_cx must be {rule}")
    outputs = run_layer(
        *(input, hx, cx, weights),
        cell=cell,
        batch_sizes=batch_sizes,
        lengths=lengths,
        resets=resets,
        reset_hx=reset_hx,
        reset_cx=reset_cx,
        options=options,
        all_cells=all_cells,
        recompute=recompute,
    )
    return LayerOutputs(*outputs)


def run_layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: LayerWeights,
    *,
    cell: str,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_hx: Tensor | None = None,
    reset_cx: Tensor | None = None,
    options: CellOptions = PLAIN,
    all_cells: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`layer` without its checks, for modules, whose arguments go together."""
    device = _device(input)
    if device != "meta" and torch.is_autocast_enabled(device):
        primals = input, hx, cx, reset_hx, reset_cx
        (input, hx, cx, reset_hx, reset_cx), (weights,) = _autocast(device, primals, [weights])
    # torch.func's transforms inside a compiled region see neither Functions nor register_autograd.
    compiling = torch.compiler.is_compiling()
    transformed = torch._C._are_functorch_transforms_active()
    if forward_mode() or (compiling and transformed):
        return reference.layer(
            *(input, hx, cx, weights),
            cell=cell,
            batch_sizes=batch_sizes,
            resets=resets,
            reset_hx=reset_hx,
            reset_cx=reset_cx,
            options=options,
            all_cells=all_cells,
        )
    ask: Any = families
    if compiling:  # to import it in eager mode takes a second
        from . import constants as ask
    if not ask.has_kernels(device, input.device.index):
        _warn_unfused(device)
        if wanted := _extras(batch_sizes, resets, options, all_cells, recompute):
            raise RuntimeError(f"[{cell}] {wanted}: rnn_fused has no kernels for {device} tensors")
        return _torch_layer(input, hx, cx, weights, cell, batch_sizes)
    kernels, allow_tf32 = _choice(device, input.dtype, ask)
    if kernels == "cudnn":
        if not transformed:
            if wanted := _extras(batch_sizes, resets, options, all_cells, recompute):
                raise RuntimeError(f'[{cell}] kernels("cudnn") cannot run {wanted}')
            return _torch_layer(input, hx, cx, weights, cell, batch_sizes)
        kernels = "auto"  # torch.func's transforms have no rules for torch's op

    sizes = batch_sizes if lengths is None else lengths
    primals = input, hx, cx, reset_hx, reset_cx
    training = torch.is_grad_enabled() and (transformed or _requires_grad(primals, weights))
    save = training and not recompute, training or all_cells
    if transformed or (training and not compiling):
        call = library.Call(cell, options, kernels, allow_tf32)
        tensors = sizes, resets, *primals, *flatten(weights)
        output, h_n, c_n, _, cells = apply(LayerForward, (call, *save), tensors)
    else:
        how = cell, *options, kernels, allow_tf32, *save
        arguments = *primals, *weights, sizes, resets, *how
        if compiling:
            output, h_n, c_n, _, cells = library.layer_forward(*arguments)
        else:
            output, h_n, c_n, _, cells = library.run(library.layer_forward, *arguments)
    if cell != "lstm":
        return output, h_n, None, None
    if not all_cells:
        return output, h_n, c_n, None
    cells = join_directions(cells, input, sizes)
    if lengths is not None:
        T, B = input.shape[:2]
        cells = ragged(lengths, input).unpack(F.pad(cells, (0, 0, 0, T * B - len(cells))))
    return output, h_n, c_n, cells


def stack(
    input: Tensor,
    states: tuple[Tensor, ...] | None,
    weights: Sequence[LayerWeights],
    *,
    cell: str,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_states: tuple[Tensor, ...] | None = None,
    options: CellOptions = PLAIN,
    dropout: float = 0,
    recompute: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs layers one on top of the other, where `runs_stack`.

    states, reset_states: (h,) or (h, c) of all layers, [L*D, B, P] and [L*D, B, H].
    dropout: on the output of each layer but the last. The masks are those of F.dropout, layer by
    layer, for contiguous outputs.
    The others as for `layer`.

    Returns:
        The last layer's output, and the final states of all.

    Raises:
        RuntimeError: as `layer`.
    """
    hx, cx, *_ = (*(states or ()), None, None)
    reset_hx, reset_cx, *_ = (*(reset_states or ()), None, None)
    primals = input, hx, cx, reset_hx, reset_cx
    device = _device(input)
    if device != "meta" and torch.is_autocast_enabled(device):
        primals, weights = _autocast(device, primals, weights)
    lists = [[w for of_layer in field for w in of_layer] for field in zip(*weights, strict=True)]
    sizes = batch_sizes if lengths is None else lengths
    kernels, allow_tf32 = _choice(device, primals[0].dtype, families)
    training = torch.is_grad_enabled() and _requires_grad(primals, weights[0])  # as all of them
    masks = _masks(primals[0], weights, dropout) if dropout > 0 else []
    how = len(weights), masks, training and not recompute, training
    if training:
        call = library.Call(cell, options, kernels, allow_tf32)
        tensors = sizes, resets, *primals, *flatten(lists)
        output, h_n, c_n, *_ = apply(StackForward, (call, *how), tensors)
    else:
        output, h_n, c_n, *_ = library.run(
            library.stack_forward,
            *(*primals, *lists, sizes, resets, cell, *options, kernels, allow_tf32, *how),
        )
    return output, (h_n, c_n) if cell == "lstm" else (h_n,)


def _masks(input: Tensor, weights: Sequence[LayerWeights], p: float) -> list[Tensor]:
    """Of dropout on the outputs of all layers but the last."""
    P = weights[0].weight_hh[0].size(1)
    output = input.new_ones(*input.shape[:-1], len(weights[0].weight_ih) * P)
    return [F.dropout(output, p) for _ in weights[1:]]


def runs_stack(input: Tensor, weights: Sequence[LayerWeights]) -> bool:
    """Whether `stack` runs these: eagerly, outside transforms, forward mode and torch.jit, on a
    device that has kernels; with gradients of all weights or of none."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._get_tracing_state() is not None:  # torch.jit empties lists that it calls ops with
        return False
    if torch.is_grad_enabled():
        wanted = {w.requires_grad for layer in weights for field in layer for w in field}
        if len(wanted) > 1:
            return False
    device = _device(input)
    if device == "cuda" and families.forced() == "cudnn":
        return False
    return families.has_kernels(device, input.device.index) and not forward_mode()


def _device(x: Tensor) -> str:
    return "cpu" if x.is_cpu else x.device.type  # the latter takes a microsecond


def _choice(device: str, dtype: torch.dtype, ask: Any) -> tuple[str, bool]:
    """The family of kernels, and whether float32 products may be less exact."""
    if device == "cpu":
        return "auto", dtype == torch.float32 and ask.allows_split()
    if device == "cuda":
        return families.forced(), dtype == torch.float32 and ask.allows_tf32()
    return "auto", False


def pack_weights(weights: LayerWeights, cell: str) -> Tensor:
    """The weights of a layer on the CPU in the order of this processor's kernels, [D, values], for
    many calls of `packed_stack`."""
    with torch.no_grad():
        packed: Tensor = library.run(library.pack_weights, *weights, cell)
    return packed


def packed_stack(
    input: Tensor,
    states: tuple[Tensor, ...] | None,
    packed: Sequence[Tensor],
    *,
    cell: str,
    hidden_size: int,
    output_size: int,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_states: tuple[Tensor, ...] | None = None,
    options: CellOptions = PLAIN,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`stack`, where `runs_packed`.

    packed: `pack_weights` of each layer.
    hidden_size, output_size: H and P.
    The others, results and errors as of `stack`.
    """
    hx, cx, *_ = (*(states or ()), None, None)
    reset_hx, reset_cx, *_ = (*(reset_states or ()), None, None)
    arguments = (
        *(input, hx, cx, reset_hx, reset_cx, packed),
        *(batch_sizes if lengths is None else lengths, resets),
        *(cell, hidden_size, output_size, *options[:2]),
    )
    if torch.compiler.is_compiling():
        output, h_n, c_n = library.stack_infer(*arguments)
    else:
        output, h_n, c_n = library.run(library.stack_infer, *arguments)
    return output, (h_n, c_n) if cell == "lstm" else (h_n,)


def runs_packed(*primals: Tensor) -> bool:
    """Whether `packed_stack` runs these, an input and states: on the CPU, where no gradients are
    recorded, outside autocast, transforms and forward mode. Not for `torch.export` and other
    tracers, whose program may be loaded where packed weights have another order."""
    if torch.compiler.is_compiling():
        if not primals[0].is_cpu or torch.compiler.is_exporting():
            return False
    else:
        recorded = torch._C._get_tracing_state() is not None
        traced = recorded or torch._C._len_torch_dispatch_stack() > 0
        if traced or not host_knows(primals[0]):
            return False
    if torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled("cpu"):
        return False
    records = torch.is_grad_enabled() and any(x.requires_grad for x in primals)
    return not records and not forward_mode()


def takes_lengths(input: Tensor, lengths: Tensor) -> bool:
    """Whether `layer` takes the lengths of this input. Elsewhere it has to be packed."""
    if input.dim() != 3 or not isinstance(lengths, Tensor):
        return False
    return host_knows(input) and host_knows(lengths) and not forward_mode()


def _extras(
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    options: CellOptions,
    all_cells: bool,
    recompute: bool,
) -> str:
    """What a call asks for that torch's own op lacks, by name."""
    lengths = batch_sizes is not None and not batch_sizes.is_cpu  # as those of a module are
    asked = {"lengths": lengths, "resets": resets is not None}
    asked |= {"all_cells": all_cells, "recompute": recompute}
    for name, default in PLAIN._asdict().items():
        asked[name] = getattr(options, name) != default
    return ", ".join(name for name, on in asked.items() if on)


def _requires_grad(primals: tuple[Tensor | None, ...], weights: LayerWeights) -> bool:
    for field in weights:
        for weight in field:
            if weight.requires_grad:
                return True
    return any(x is not None and x.requires_grad for x in primals)


def _autocast(
    device: str, primals: tuple[Tensor | None, ...], weights: Sequence[LayerWeights]
) -> tuple[Any, list[LayerWeights]]:
    """These in the dtype of autocast; weights: of some layers."""
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype == torch.float64 else x.to(dtype)

    layers: Any = [[tuple(cast(w) for w in field) for field in layer] for layer in weights]
    return tuple(map(cast, primals)), [LayerWeights(*layer) for layer in layers]


def _torch_layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: LayerWeights,
    cell: str,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """torch's own op: cuDNN's, or for the devices that have no fused kernels."""
    if hx is None:
        hx, cx, *_ = (*reference.zero_states(input, weights, cell), None)
    hx, cx = hx.contiguous(), None if cx is None else cx.contiguous()  # cuDNN asks for it
    bidirectional = len(weights.weight_ih) == 2
    flat = [field[d] for d in range(1 + bidirectional) for field in weights if field]
    state = hx if cx is None else (hx, cx)
    # bias, layers, dropout, training, bidirectional
    options = (bool(weights.bias_ih), 1, 0.0, torch.is_grad_enabled(), bidirectional)
    op = getattr(torch._VF, cell)
    if batch_sizes is None:
        output, h_n, *c_n = op(input, state, flat, *options, False)  # not batch_first
    else:
        output, h_n, *c_n = op(input, batch_sizes, state, flat, *options)
    return output, h_n, c_n[0] if c_n else None, None


@cache
def _warn_unfused(device: str) -> None:
    warnings.warn(
        f"rnn_fused has no kernels for {device} tensors: it runs torch's own op there",
        stacklevel=2,
    )

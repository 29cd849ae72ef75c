"""`gradient_flow`: how the gradient fares on its way back through time and layers.

Axes: T steps, B batch, I input size, H hidden size, P = `proj_size` or H, L layers,
D directions (2 if bidirectional).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .base import FusedRNNBase, Hidden
from .ops import CellOptions, LayerWeights


@dataclass(frozen=True, eq=False)
class GradientFlow:
    """What `gradient_flow` found."""

    norms: Tensor  # [L, D, T]: |dLoss/dh_t|, the 2-norm over batch and units

    def ratio(self) -> Tensor:
        """[L, D]: the norm at the step that each direction takes first, divided by that at its
        last. Far below 1 the gradient vanishes on its way back, far above it explodes (Hochreiter
        1991; Bengio et al. 1994, https://doi.org/10.1109/72.279181). inf or nan where the loss
        does not depend on the last."""
        walked = torch.cat([self.norms[:, :1], self.norms[:, 1:].flip(-1)], 1)
        return walked[..., 0] / walked[..., -1]

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Draws the norms over time, on a logarithmic axis, a line for each layer and direction.

        Args:
            path: where to save the image; its ending tells the format. None leaves the figure open
                for `matplotlib.pyplot.show()`.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                f"GradientFlow.plot needs matplotlib, which cannot be imported ({error}); "
                "install it with: pip install matplotlib"
            ) from error
        figure, axes = pyplot.subplots(layout="constrained")
        for layer, directions in enumerate(self.norms.cpu()):
            for norms, direction in zip(directions, ("", ", reverse"), strict=False):
                axes.plot(range(len(norms)), norms.tolist(), label=f"layer {layer}{direction}")
        axes.set(xlabel="timestep t", ylabel="|dLoss / dh_t|", yscale="log")
        axes.legend()
        if path is not None:
            figure.savefig(path)
            pyplot.close(figure)
        return figure


def gradient_flow(
    module: FusedRNNBase,
    input: Tensor,
    loss_fn: Callable[[Tensor, Any], Tensor],
    hx: Hidden | None = None,
) -> GradientFlow:
    """Measures the gradient of a loss with respect to h of every step, layer and direction.

    It is the whole gradient dLoss/dh_t: of the output at t, through all later steps and through the
    layers above. In an LSTM h_t and c_t are two nodes: what goes from c_t to c_t+1 does not pass
    through h_t.

    The module runs step by step, one op call each, as it would in `forward`: with its dropout if it
    is in training. Exact up to rounding (c of a 16-bit LSTM is rounded at every step, not so in
    `forward`), but much slower than `forward`. Nothing of the module changes: neither
    weights nor their `.grad`, nor its mode.

    Args:
        module: an LSTM, GRU or RNN of this package.
        input, hx: as for `forward`; input is dense, [T, B, I], [B, T, I] if batch_first, or [T, I].
        loss_fn: takes what `forward` would return, output and state, and gives a scalar.

    Raises:
        TypeError: the module is of another kind, the input is a PackedSequence, or the loss is no
            Tensor.
        ValueError: the input is not 2-D or 3-D; the loss is not a scalar, or does not depend on
            output or state.
        Else as `forward`.
    """
    if not isinstance(module, FusedRNNBase):
        raise TypeError(
            "gradient_flow needs an LSTM, GRU or RNN of rnn_fused (rnn_fused.convert makes one of "
            f"torch.nn's), got {type(module).__name__}"
        )
    if isinstance(input, PackedSequence):
        raise TypeError(
            "gradient_flow needs a dense input, in which every sequence has all the timesteps; "
            "got a PackedSequence: give it sequences of one length"
        )
    if input.dim() not in (2, 3):
        raise ValueError(f"input must be 2-D or 3-D, got {input.dim()}-D")
    with torch.enable_grad():
        sequence, states = _enter(module, input, hx)
        nodes, sequence, states = _walk(module, sequence, states)
        loss = loss_fn(*_leave(module, sequence, states, batched=input.dim() == 3))
        _check_loss(loss)
        grads = torch.autograd.grad(loss, nodes, allow_unused=True)
    dtype = torch.promote_types(sequence.dtype, torch.float32)
    norms = [
        sequence.new_zeros((), dtype=dtype)
        if grad is None  # the loss does not depend on this h_t
        # The squares of what has vanished are below the numbers of float32.
        else torch.linalg.vector_norm(grad, dtype=torch.float64).to(dtype)
        for grad in grads
    ]
    return GradientFlow(torch.stack(norms).view(module.num_layers, -1, sequence.size(0)))


def _enter(
    module: FusedRNNBase, input: Tensor, hx: Hidden | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `module.forward` makes of its arguments: [T, B, I], and states [L*D, B, P or H].

    The states are leaves that ask for gradients, so that every h_t does, whatever is frozen.
    """
    sequence, rank = input.detach(), input.dim()
    states = None if hx is None else module._read_state(hx, packed=False, rank=rank)
    sequence = sequence.unsqueeze(1) if rank == 2 else module._time_first(sequence)
    module._check_sequence(sequence, None, module._weights_by_layer()[0].weight_ih[0])
    batch = sequence.size(1)
    if states is None:
        states = module._initial_states(sequence, batch)
    else:
        module._check_states(states, batch)
    return sequence, tuple(state.detach().requires_grad_() for state in states)


def _walk(
    module: FusedRNNBase, sequence: Tensor, states: tuple[Tensor, ...]
) -> tuple[list[Tensor], Tensor, tuple[Tensor, ...]]:
    """Runs all layers; returns the h_t, [1, B, P] each, by layer, direction and t, then the output
    [T, B, D*P] and the final states [L*D, B, P or H]."""
    nodes: list[Tensor] = []
    final: list[tuple[Tensor, ...]] = []
    for layer in range(module.num_layers):
        if layer > 0:
            sequence = F.dropout(sequence, module.dropout, module.training)
        weights = module._weights_by_layer()[layer]
        outputs = []
        for d in range(len(weights.weight_ih)):
            row = len(final)
            h, state = _walk_direction(
                sequence,
                tuple(state[row : row + 1] for state in states),
                LayerWeights(*(field[d : d + 1] for field in weights)),
                cell=module.mode.lower(),
                options=module._cell_options(),
                reverse=d == 1,
            )
            nodes += h
            final.append(state)
            outputs.append(torch.cat(h))
        sequence = torch.cat(outputs, -1)
    return nodes, sequence, tuple(torch.cat(rows) for rows in zip(*final, strict=True))


def _walk_direction(
    sequence: Tensor,
    state: tuple[Tensor, ...],
    weights: LayerWeights,
    *,
    cell: str,
    options: CellOptions,
    reverse: bool,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """h_t in the order of t, and the final state. Everything that follows a step uses its h_t as
    this one node of the graph."""
    steps = range(sequence.size(0))
    nodes = {}
    for t in reversed(steps) if reverse else steps:
        h, *c = state
        cx = c[0] if c else None
        _, h, c_next, _ = ops.layer(sequence[t : t + 1], h, cx, weights, cell=cell, options=options)
        state = (h,) if c_next is None else (h, c_next)
        nodes[t] = h
    return [nodes[t] for t in steps], state


def _leave(
    module: FusedRNNBase, sequence: Tensor, states: tuple[Tensor, ...], batched: bool
) -> tuple[Tensor, Hidden]:
    """Output and state in the form in which `module.forward` returns them."""
    if not batched:
        sequence, states = sequence.squeeze(1), tuple(state.squeeze(1) for state in states)
        return sequence, module._join_state(states)
    if module.batch_first:
        sequence = sequence.transpose(0, 1)
    if module.batch_first_states:
        states = tuple(state.transpose(0, 1) for state in states)
    return sequence, module._join_state(states)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a Tensor, got {type(loss).__name__}")
    if loss.dim() > 0:
        raise ValueError(f"loss_fn must return a scalar, got shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("the loss must depend on output or state, got one without a gradient")

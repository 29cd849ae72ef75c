"""The layers' mathematics in plain, differentiable PyTorch.

This is the oracle that the fused kernels are tested against, and what runs where they do not:
forward-mode AD and derivatives of the backward pass. It works in every dtype, on every device,
and under every `torch.func` transform.

Axes: T steps, B batch, I input size, H hidden size, P = `proj_size` or H, D directions,
G gates (LSTM i, f, g, o; GRU r, z, n; RNN one), N rows, those of `batch_sizes` and maybe more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


class CellOptions(NamedTuple):
    """What a cell does besides its equations; the defaults change nothing."""

    gate_slope: float = 1.0
    """Gates are sigmoid(gate_slope * x): a steeper gate is nearer to 0 or 1, and what passes
    through open ones vanishes more slowly. LSTM and GRU."""
    cell_clip: float | None = None
    """c is clipped to this magnitude after every step; where it reaches that, no gradient passes
    through it. LSTM."""
    grad_clip_value: float | None = None
    """The gradients of h and c that a step passes back to the step before it, or to the initial
    state, are clipped to this magnitude, value by value (after Graves 2013). Those that come from
    outside, through output, h_n and c_n, are added unclipped. What is clipped is no derivative any
    more, and second derivatives, which run backwards through these steps again, are clipped too."""


class LayerOutputs(NamedTuple):
    output: Tensor  # [T, B, D*P], or packed [N, D*P]
    h_n: Tensor  # [D, B, P]
    c_n: Tensor | None  # [D, B, H], of an LSTM
    cells: Tensor | None  # c after every step, where asked for: [T, B, D*H], or packed [N, D*H]


class LayerWeights(NamedTuple):
    """One layer's weights: each field holds D tensors, or is `()` where the layer has none."""

    weight_ih: tuple[Tensor, ...]  # [G*H, I]
    weight_hh: tuple[Tensor, ...]  # [G*H, P]
    bias_ih: tuple[Tensor, ...] = ()  # [G*H]
    bias_hh: tuple[Tensor, ...] = ()  # [G*H]
    weight_hr: tuple[Tensor, ...] = ()  # [P, H]


PLAIN = CellOptions()


def lstm_step(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    options: CellOptions = PLAIN,
) -> tuple[Tensor, Tensor]:
    """One LSTM step (Hochreiter & Schmidhuber 1997; projection: Sak et al. 2014).

        i, f, g, o = x + W_hh h + b_hh,  x = W_ih x_t + b_ih
        c' = s(f) * c + s(i) * tanh(g),  s(x) = sigmoid(gate_slope * x)
        h' = W_hr (s(o) * tanh(c'))

    with c' clipped to cell_clip, and without W_hr where the layer has no projection.
    Shapes: x [B, 4*H], h [B, P], c [B, H]; returns (h', c').
    """
    i, f, g, o = (x + F.linear(h, weight_hh, bias_hh)).chunk(4, -1)
    s, bound = options.gate_slope, options.cell_clip
    c = (s * f).sigmoid() * c + (s * i).sigmoid() * g.tanh()
    if bound is not None:
        c = torch.where(c.abs() >= bound, c.detach().clamp(-bound, bound), c)
    h = (s * o).sigmoid() * c.tanh()
    return h if weight_hr is None else F.linear(h, weight_hr), c


def gru_step(
    x: Tensor,
    h: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None = None,
    options: CellOptions = PLAIN,
) -> tuple[Tensor]:
    """One GRU step (Cho et al. 2014), with the reset gate after the product, as in cuDNN.

        x_r, x_z, x_n = W_ih x_t + b_ih;  h_r, h_z, h_n = W_hh h + b_hh
        r = s(x_r + h_r),  s(x) = sigmoid(gate_slope * x)
        z = s(x_z + h_z)
        n = tanh(x_n + r * h_n)
        h' = (1 - z) * n + z * h

    Shapes: x [B, 3*H], h [B, H]; returns (h',).
    """
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, weight_hh, bias_hh).chunk(3, -1)
    r = (options.gate_slope * (x_r + h_r)).sigmoid()
    z = (options.gate_slope * (x_z + h_z)).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (n + z * (h - n),)


def rnn_step(
    x: Tensor,
    h: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None = None,
    options: CellOptions = PLAIN,
    *,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
) -> tuple[Tensor]:
    """One step of a plain RNN (Elman 1990): h' = activation(W_ih x_t + b_ih + W_hh h + b_hh).

    Shapes: x [B, H] (the input's share, W_ih x_t + b_ih), h [B, H]; returns (h',).
    """
    return (activation(x + F.linear(h, weight_hh, bias_hh)),)


STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": rnn_step,
    "rnn_relu": partial(rnn_step, activation=torch.relu),
}


def layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: LayerWeights,
    *,
    cell: str,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    reset_hx: Tensor | None = None,
    reset_cx: Tensor | None = None,
    options: CellOptions = PLAIN,
    all_cells: bool = False,
) -> LayerOutputs:
    """Runs one layer, in one direction or both, over all steps.

    Args:
        input: [T, B, I], or packed [N, I] where `batch_sizes` is given.
        hx: initial h, [D, B, P]; of [T, B, I] also None, for zeros.
        cx: initial c, [D, B, H], of an LSTM that is given hx; else None.
        weights: of D directions; the second one runs backwards in time.
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        batch_sizes: int64 [T], non-increasing, as in `torch.nn.utils.rnn.PackedSequence`. Each
            sequence then ends at its own length: the reverse direction starts there. On any device:
            this function waits for the values, where the fused op does not. The last sequences may
            have no timestep, and keep their initial state; the last timesteps may have no sequence;
            and input may have rows behind those of all timesteps, whose output is zero. Those must
            be finite: here they take no part, in the op they may be multiplied by zero.
        resets: bool [T, B], or packed [N]. True at (t, b) parts sequence b between timesteps
            t - 1 and t into two that know nothing of each other, as if they were separate: the
            forward direction comes to t, and the reverse one to t - 1, with the reset state. True
            at t = 0 replaces the forward direction's initial state.
        reset_hx, reset_cx: the reset state, of the shapes of hx and cx; zero if absent.
        options: of the cell.
        all_cells: whether to return the c of every step, of an LSTM.
    """
    given = tuple(state for state in (hx, cx) if state is not None)
    states = given or zero_states(input, weights, cell)
    if reset_hx is None:
        reset_states = tuple(torch.zeros_like(state) for state in states)
    else:
        reset_states = (reset_hx,) if reset_cx is None else (reset_hx, reset_cx)
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    tail = 0
    if sizes is not None:
        tail = input.shape[0] - sum(sizes)
        input = input[: sum(sizes)]
        resets = None if resets is None else resets[: sum(sizes)]

    def steps(rows: Tensor) -> Sequence[Tensor]:
        return rows.unbind(0) if sizes is None else rows.split(sizes)

    def join(rows: list[Tensor]) -> Tensor:
        if sizes is None:
            return torch.stack(rows)
        return F.pad(torch.cat(rows), (0, 0, 0, tail)) if tail else torch.cat(rows)

    outputs, cells, finals = [], [], []
    for d, weight_ih in enumerate(weights.weight_ih):
        x = F.linear(input, weight_ih, weights.bias_ih[d] if weights.bias_ih else None)
        recurrent = [w[d] for w in (weights.weight_hh, weights.bias_hh) if w]
        projection = {"weight_hr": weights.weight_hr[d]} if weights.weight_hr else {}
        states_after, final = _scan(
            partial(STEPS[cell], **projection, options=options),
            steps(x),
            tuple(state[d] for state in states),
            recurrent,
            None if resets is None else steps(resets),
            tuple(state[d] for state in reset_states),
            reverse=d == 1,
            grad_clip_value=options.grad_clip_value,
        )
        outputs.append(join([h for h, *_ in states_after]))
        if all_cells and cell == "lstm":
            cells.append(join([c for _, c in states_after]))
        finals.append(final)
    h_n, *c_n = (torch.stack(final) for final in zip(*finals, strict=True))
    return LayerOutputs(
        output=torch.cat(outputs, -1),
        h_n=h_n,
        c_n=c_n[0] if c_n else None,
        cells=torch.cat(cells, -1) if cells else None,
    )


def zero_states(input: Tensor, weights: LayerWeights, cell: str) -> tuple[Tensor, ...]:
    """(hx,), of an LSTM (hx, cx), with which a layer over [T, B, I] begins that is given none."""
    D, B = len(weights.weight_hh), input.shape[1]
    GH, P = weights.weight_hh[0].shape
    widths = (P, GH // 4) if cell == "lstm" else (P,)
    return tuple(input.new_zeros(D, B, width) for width in widths)


def _scan(
    step: Callable[..., tuple[Tensor, ...]],
    xs: Sequence[Tensor],
    state: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    resets: Sequence[Tensor] | None,
    reset_state: tuple[Tensor, ...],
    reverse: bool,
    grad_clip_value: float | None,
) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Returns the state after each step, in order of time, of the rows that make it; and the final
    one.

    xs[t] has the rows of the sequences that reach step t, the longest first. The other rows of
    the state wait: finished (forward), or not begun yet (reverse).
    """
    after = []
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        rows = xs[t].shape[0]
        border = t + 1 if reverse else t
        if resets is not None and border < len(xs):
            state = _reset(state, resets[border], reset_state)
        entering = (s[:rows] for s in state)
        if grad_clip_value is not None:
            entering = (_clip_gradient(s, grad_clip_value) for s in entering)
        new = step(xs[t], *entering, *weights)
        after.append(new)
        waiting = (s[rows:] for s in state)
        state = tuple(torch.cat(pair) for pair in zip(new, waiting, strict=True))
    return after[::-1] if reverse else after, state


def _reset(
    state: tuple[Tensor, ...], where: Tensor, reset_state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """where: [rows], the first of the state's; the others stay."""
    where = torch.cat((where, where.new_zeros(state[0].shape[0] - where.shape[0]))).unsqueeze(-1)
    return tuple(torch.where(where, r, s) for r, s in zip(reset_state, state, strict=True))


class _ClipGradient(Function):
    """x, with its gradient clipped to a magnitude."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].clamp(-ctx.bound, ctx.bound), None


class _ClipGradientWithTangent(_ClipGradient):
    """Apart, since compilers trace no Function with a forward-mode rule."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


def _clip_gradient(x: Tensor, bound: float) -> Tensor:
    compiling = torch.compiler.is_compiling()
    clipped: Tensor = (_ClipGradient if compiling else _ClipGradientWithTangent).apply(x, bound)
    return clipped

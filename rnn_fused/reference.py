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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerWeights(NamedTuple):
    """One layer's weights: each field holds D tensors, or is `()` where the layer has none."""

    weight_ih: tuple[Tensor, ...]  # [G*H, I]
    weight_hh: tuple[Tensor, ...]  # [G*H, P]
    bias_ih: tuple[Tensor, ...] = ()  # [G*H]
    bias_hh: tuple[Tensor, ...] = ()  # [G*H]
    weight_hr: tuple[Tensor, ...] = ()  # [P, H]


def lstm_step(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step (Hochreiter & Schmidhuber 1997; projection: Sak et al. 2014).

        i, f, g, o = x + W_hh h + b_hh,  x = W_ih x_t + b_ih
        c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h' = W_hr (sigmoid(o) * tanh(c'))

    without W_hr where the layer has no projection.
    Shapes: x [B, 4*H], h [B, P], c [B, H]; returns (h', c').
    """
    i, f, g, o = (x + F.linear(h, weight_hh, bias_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if weight_hr is None else F.linear(h, weight_hr), c


def gru_step(
    x: Tensor, h: Tensor, weight_hh: Tensor, bias_hh: Tensor | None = None
) -> tuple[Tensor]:
    """One GRU step (Cho et al. 2014), with the reset gate after the product, as in cuDNN.

        x_r, x_z, x_n = W_ih x_t + b_ih;  h_r, h_z, h_n = W_hh h + b_hh
        r = sigmoid(x_r + h_r)
        z = sigmoid(x_z + h_z)
        n = tanh(x_n + r * h_n)
        h' = (1 - z) * n + z * h

    Shapes: x [B, 3*H], h [B, H]; returns (h',).
    """
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, weight_hh, bias_hh).chunk(3, -1)
    r = (x_r + h_r).sigmoid()
    z = (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (n + z * (h - n),)


def rnn_step(
    x: Tensor,
    h: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None = None,
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
    hx: Tensor,
    cx: Tensor | None,
    weights: LayerWeights,
    *,
    cell: str,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    reset_hx: Tensor | None = None,
    reset_cx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs one layer, in one direction or both, over all steps.

    Args:
        input: [T, B, I], or packed [N, I] where `batch_sizes` is given.
        hx: initial h, [D, B, P].
        cx: initial c, [D, B, H], for the LSTM; else None.
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

    Returns:
        output [T, B, D*P] (packed: [N, D*P]), h_n [D, B, P], and c_n [D, B, H] or None.
    """
    states = (hx,) if cx is None else (hx, cx)
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

    outputs, finals = [], []
    for d, weight_ih in enumerate(weights.weight_ih):
        x = F.linear(input, weight_ih, weights.bias_ih[d] if weights.bias_ih else None)
        recurrent = [w[d] for w in (weights.weight_hh, weights.bias_hh) if w]
        projection = {"weight_hr": weights.weight_hr[d]} if weights.weight_hr else {}
        output, final = _scan(
            partial(STEPS[cell], **projection),
            steps(x),
            tuple(state[d] for state in states),
            recurrent,
            None if resets is None else steps(resets),
            tuple(state[d] for state in reset_states),
            reverse=d == 1,
        )
        outputs.append(torch.stack(output) if sizes is None else torch.cat(output))
        finals.append(final)
    h_n, *c_n = (torch.stack(final) for final in zip(*finals, strict=True))
    joined = torch.cat(outputs, -1)
    return F.pad(joined, (0, 0, 0, tail)) if tail else joined, h_n, c_n[0] if c_n else None


def _scan(
    step: Callable[..., tuple[Tensor, ...]],
    xs: Sequence[Tensor],
    state: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    resets: Sequence[Tensor] | None,
    reset_state: tuple[Tensor, ...],
    reverse: bool,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Returns h after each step, in order of time, and the final state.

    xs[t] has the rows of the sequences that reach step t, the longest first. The other rows of
    the state wait: finished (forward), or not begun yet (reverse).
    """
    output = []
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        rows = xs[t].shape[0]
        border = t + 1 if reverse else t
        if resets is not None and border < len(xs):
            state = _reset(state, resets[border], reset_state)
        new = step(xs[t], *(s[:rows] for s in state), *weights)
        output.append(new[0])
        waiting = (s[rows:] for s in state)
        state = tuple(torch.cat(pair) for pair in zip(new, waiting, strict=True))
    return output[::-1] if reverse else output, state


def _reset(
    state: tuple[Tensor, ...], where: Tensor, reset_state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """where: [rows], the first of the state's; the others stay."""
    where = torch.cat((where, where.new_zeros(state[0].shape[0] - where.shape[0]))).unsqueeze(-1)
    return tuple(torch.where(where, r, s) for r, s in zip(reset_state, state, strict=True))

"""LSTM, GRU and RNN: drop-in replacements for the modules of the same names in `torch.nn`.

Axes: T steps, B batch, I input size, H hidden size, P = `proj_size` or H, L layers,
D directions (2 if bidirectional), N = sum of the lengths of packed sequences.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .base import FusedRNNBase, Hidden


class LSTM(FusedRNNBase):
    """Long short-term memory layers, as `torch.nn.LSTM`, run by fused kernels.

    Args: those of `torch.nn.LSTM`, with the same defaults, and options by keyword.
        input_size, hidden_size: I and H.
        num_layers: L, stacked layers.
        bias: whether the gates have biases.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...]; states are not,
            unless batch_first_states.
        dropout: probability of dropout on each layer's output but the last's, in training.
        bidirectional: also run backwards in time; outputs are concatenated.
        proj_size: P > 0 projects h from H to P (Sak et al. 2014, https://arxiv.org/abs/1402.1128).
        device, dtype: of the parameters. float32, float64, bfloat16 and float16 have kernels.
        learn_initial_state: the state that is used where hx is absent is learned: parameters
            `initial_h` [L*D, P] and `initial_c` [L*D, H], zero at first and after
            `reset_parameters`, the same for every sequence of a batch. They come last in
            `parameters()` and are no part of `all_weights`; a `state_dict` of torch.nn, which has
            none, loads with strict=False.
        batch_first_states: needs batch_first. hx and the returned states have the batch first,
            [B, L*D, ...], for packed input too, whose sequences are meant in the caller's order.
            The returned ones are views, not contiguous. Unbatched states stay as they are.
        gate_slope: a > 0: the gates i, f, o are sigmoid(a * x). Steeper ones (a > 1) are nearer to
            open or shut, and the gradient through open ones vanishes more slowly.
        cell_clip: k > 0: c is clipped to [-k, k] after every step (as in Sak et al. 2014); where it
            reaches a bound, no gradient passes through it.
        grad_clip_value: v > 0: the gradients of h and c that a step passes back to the one before
            it, or to the initial state, are clipped to [-v, v] value by value, inside the backward
            loop (after Graves 2013, https://arxiv.org/abs/1308.0850). Those of output, of h_n and
            c_n and of every c come in unclipped.
        save: what training keeps of every step: "gates" (4*H values, and c), or "recompute" (c
            alone; the backward pass computes the gates again).

    Inputs:
        input: [T, B, I] ([B, T, I] if batch_first), unbatched [T, I], or a `PackedSequence`,
            which is run packed.
        hx: (h_0, c_0), [L*D, B, P] and [L*D, B, H]; zeros, or what was learned, if absent.
            Without the B axis if the input is unbatched.
        lengths, by keyword: integers [B], in any order, on any device, of the sequences of a padded
            batch, 0 to T. Each then ends at its own length: there its final states are taken, and
            there the reverse direction begins. Its output is zero from there on, and what the input
            (or resets) has there never matters, not even NaN. One of length 0 keeps its initial
            state. The batch runs packed, so a length is paid for, not T; on CUDA nothing waits for
            the lengths, and there those out of range stop the device (`torch._assert_async`).
        resets, by keyword: bool, [T, B] ([B, T] if batch_first, [T] unbatched), or a
            `PackedSequence` of bools with the lengths of a packed input. True at (t, b) parts
            sequence b between timesteps t - 1 and t: what comes before and after is computed, in
            every layer and both directions, as if it were two sequences, and no gradient crosses.
            The forward direction goes on at t, the reverse one at t - 1, with reset_state; at
            t = 0 the forward direction begins with it instead of hx.
        reset_state, by keyword: the state after resets, in the form of hx; what was learned, or
            zeros, if absent.
        return_all_states, by keyword: also return the states after every step.

    Returns:
        output, (h_n, c_n): [T, B, D*P] in the form of the input; states as the initial ones.
        With return_all_states also a tuple of (h, c) for each layer: [T, B, D*P] and [T, B, D*H],
        in the form of the input, before dropout; a reset does not show in the step before it.

    Raises:
        ValueError: input not 2-D or 3-D, its dtype not that of the weights (packed input:
            RuntimeError), or an argument of the constructor out of range: also
            batch_first_states without batch_first, an option of another cell; reset_state without
            resets; lengths of an unbatched input.
        TypeError: an argument of the constructor of the wrong type; resets not of the input's form;
            lengths not a Tensor, or of a `PackedSequence`.
        RuntimeError: a size that does not fit; T = 0; resets that are not bool, or on a device
            without kernels, and lengths there; lengths that are not integers, or out of range.
        IndexError, TypeError, RuntimeError: hx is one Tensor instead of two, or one in a tuple.

    Differences to `torch.nn.LSTM`: `isinstance(module, torch.nn.LSTM)` is False; packed input
    and its states are checked here, with these messages; complex dtypes and `torch.jit` are not
    supported, `torch.compile(fullgraph=True)` is; `flatten_parameters` does nothing.
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        learn_initial_state: bool = False,
        batch_first_states: bool = False,
        gate_slope: float = 1.0,
        cell_clip: float | None = None,
        grad_clip_value: float | None = None,
        save: Literal["gates", "recompute"] = "gates",
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def _split_state(self, hx: Hidden, packed: bool, what: str = "hx") -> tuple[Tensor, ...]:
        if isinstance(hx, Tensor):
            # The type in which torch.nn.LSTM fails: its op refuses a Tensor, unless indexing it
            # or the check of its rank failed before.
            error = TypeError if packed else IndexError if len(hx) < 2 else RuntimeError
            raise error(f"LSTM: {what} must be the pair (h_0, c_0), got a Tensor {list(hx.shape)}")
        for index, state in enumerate(hx):
            if not isinstance(state, Tensor):
                raise AttributeError(
                    f"LSTM: {what}[{index}] must be a Tensor, got {type(state).__name__}"
                )
        if len(hx) != 2:
            error = IndexError if len(hx) < 2 else RuntimeError
            raise error(f"LSTM: {what} must be the pair (h_0, c_0), got {len(hx)} values")
        return tuple(hx)

    def _join_state(self, states: tuple[Tensor, ...]) -> Hidden:
        h_n, c_n = states
        return h_n, c_n


class GRU(FusedRNNBase):
    """Gated recurrent unit layers, as `torch.nn.GRU`, run by fused kernels.

    Args, shapes and dtypes: as `rnn_fused.LSTM`, without proj_size and cell_clip and with one
    state: hx is h_0, [L*D, B, H], and the second result is h_n; return_all_states gives an h a
    layer. gate_slope acts on r and z; save="recompute" keeps none of the 4*H values a step.

    Raises:
        ValueError: also if proj_size is given.
        AttributeError: hx is not a Tensor.
        Else as `rnn_fused.LSTM`.

    Differences to `torch.nn.GRU`: those of `rnn_fused.LSTM`; under autocast on a CPU the results
    have autocast's dtype, where `torch.nn.GRU` mixes it with float32.
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        learn_initial_state: bool = False,
        batch_first_states: bool = False,
        gate_slope: float = 1.0,
        grad_clip_value: float | None = None,
        save: Literal["gates", "recompute"] = "gates",
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *args, **kwargs)


class RNN(FusedRNNBase):
    """Elman RNN layers with tanh or ReLU, as `torch.nn.RNN`, run by fused kernels.

    Args: as `rnn_fused.GRU`, with nonlinearity, "tanh" or "relu", after num_layers, and without
    gate_slope. An RNN saves nothing but its output: save makes no difference.
    Shapes, dtypes, errors and differences: as `rnn_fused.GRU`.

    Raises:
        ValueError: also if the nonlinearity is unknown.
    """

    nonlinearity: str

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        learn_initial_state: bool = False,
        batch_first_states: bool = False,
        grad_clip_value: float | None = None,
        save: Literal["gates", "recompute"] = "gates",
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > 3:
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)
        self.nonlinearity = nonlinearity

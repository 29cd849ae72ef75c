"""LSTMCell, GRUCell and RNNCell: drop-in replacements for the cells of `torch.nn`, one step each.

Axes: B batch, I input size, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase

from . import ops, reference
from .ops import LayerWeights


class FusedCellBase(RNNCellBase):
    """What the three cells share; construction and parameters are those of `torch.nn`'s base."""

    def _step(self, input: Tensor, states: tuple[Tensor, ...], cell: str) -> tuple[Tensor, ...]:
        """The new states, from input [B, I] or [I]; states [B, H] or [H], none for zeros."""
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead"
            )
        for index, state in enumerate(states):
            if state.dim() not in (1, 2):
                label = f"hx[{index}]" if cell == "lstm" else "hidden"
                raise ValueError(
                    f"{type(self).__name__}: Expected {label} to be 1D or 2D, "
                    f"got {state.dim()}D instead"
                )
        if input.dim() == 1:
            states = tuple(state.unsqueeze(0) for state in states)
            states = self._step_batched(input.unsqueeze(0), states, cell)
            return tuple(state.squeeze(0) for state in states)
        return self._step_batched(input, states, cell)

    def _step_batched(
        self, input: Tensor, states: tuple[Tensor, ...], cell: str
    ) -> tuple[Tensor, ...]:
        batch = input.size(0)
        if input.size(1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}"
            )
        for index, state in enumerate(states):
            if state.size(0) != batch:
                raise RuntimeError(
                    f"Input batch size {batch} doesn't match "
                    f"hidden{index} batch size {state.size(0)}"
                )
            if state.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: "
                    f"got {state.size(1)}, expected {self.hidden_size}"
                )

        weights = self._weights()
        device = input.device.type
        # meta has no autocast. Dynamo of torch 2.11 cannot trace is_autocast_available.
        if device != "meta" and torch.is_autocast_enabled(device):
            # The op would run in 16 bits and round c after every step, where torch.nn does not.
            dtype = weights.weight_ih[0].dtype
            input, states = input.to(dtype), tuple(state.to(dtype) for state in states)
            with torch.autocast(device, enabled=False):
                return self._run_op(input, states, weights, cell)
        return self._run_op(input, states, weights, cell)

    def _run_op(
        self, input: Tensor, states: tuple[Tensor, ...], weights: LayerWeights, cell: str
    ) -> tuple[Tensor, ...]:
        # A layer of one direction over one step: T = D = 1. The kernels want H > 0, torch.nn's
        # cells do not.
        layer = ops.run_layer if self.hidden_size > 0 else reference.layer
        hx, cx, *_ = (*(state.unsqueeze(0) for state in states), None, None)
        _, h_n, c_n, _ = layer(input.unsqueeze(0), hx, cx, weights, cell=cell)
        return tuple(state.squeeze(0) for state in (h_n, c_n) if state is not None)

    def _weights(self) -> LayerWeights:
        bias_ih, bias_hh = self.bias_ih, self.bias_hh
        return LayerWeights(
            weight_ih=(self.weight_ih,),
            weight_hh=(self.weight_hh,),
            bias_ih=() if bias_ih is None else (bias_ih,),
            bias_hh=() if bias_hh is None else (bias_hh,),
        )


class LSTMCell(FusedCellBase):
    """One step of a long short-term memory cell, as `torch.nn.LSTMCell`, run by a fused kernel.

    Args: those of `torch.nn.LSTMCell`.
        input_size, hidden_size: I and H.
        bias: whether the gates have biases.
        device, dtype: of the parameters. float32, float64, bfloat16 and float16 have kernels.

    Inputs:
        input: [B, I] or [I].
        hx: (h, c), each [B, H], or [H] if the input is [I]; zeros if absent.

    Returns:
        The new (h, c), of the same shapes.

    Raises:
        ValueError: input or a state is not 1-D or 2-D.
        RuntimeError: a size or dtype that does not fit, or hx not of two states.
        TypeError: hx is one Tensor instead of two.

    Differences to `torch.nn.LSTMCell`: `isinstance(module, torch.nn.LSTMCell)` is False; c must
    have the dtype of h; autocast leaves the step in the weights' dtype; `torch.jit` is not
    supported.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        if isinstance(hx, Tensor):
            raise TypeError(f"LSTMCell: hx must be the pair (h, c), got a Tensor {list(hx.shape)}")
        if hx is not None and len(hx) != 2:
            raise RuntimeError(f"LSTMCell: hx must be the pair (h, c), got {len(hx)} values")
        h, c = self._step(input, () if hx is None else tuple(hx), "lstm")
        return h, c


class GRUCell(FusedCellBase):
    """One step of a gated recurrent unit, as `torch.nn.GRUCell`, run by a fused kernel.

    Args, shapes and errors: as `rnn_fused.LSTMCell`, with the one state h for hx and result.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        (h,) = self._step(input, () if hx is None else (hx,), "gru")
        return h


class RNNCell(FusedCellBase):
    """One step of an Elman RNN with tanh or ReLU, as `torch.nn.RNNCell`, run by a fused kernel.

    Args, shapes and errors: as `rnn_fused.GRUCell`, with nonlinearity, "tanh" or "relu", after
    bias. As in torch.nn, an unknown one is a RuntimeError of the forward pass.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(
                f"Unknown nonlinearity: {self.nonlinearity}. Select from 'tanh' or 'relu'."
            )
        (h,) = self._step(input, () if hx is None else (hx,), f"rnn_{self.nonlinearity}")
        return h

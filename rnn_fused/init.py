"""Initialisers for recurrent weights, beside those of `torch.nn.init`.

All of them take a layer or a cell, of this package or of `torch.nn`, change every layer and
direction of it in place, without gradients, and return it. A weight that is parametrized
(`torch.nn.utils.parametrize`) is a ValueError, since only what it is made of could be changed.

Axes: I input size, H hidden size, P = `proj_size` or H, G gates. Gates have torch's order: LSTM
i, f, g, o; GRU r, z, n.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.rnn import RNNBase

from . import cells

Module = TypeVar("Module", bound=nn.Module)

INPUT_GATE, FORGET_GATE = 0, 1  # of an LSTM
UPDATE_GATE = 1  # of a GRU


@torch.no_grad()
def forget_gate_bias_(module: Module, value: float = 1.0) -> Module:
    """Sets the bias of an LSTM's forget gates, so that they remember from the start: Gers et al.
    2000 (https://doi.org/10.1162/089976600300015015); 1 by Jozefowicz et al. 2015
    (https://proceedings.mlr.press/v37/jozefowicz15.html).

    torch adds two biases: that of bias_ih becomes `value`, that of bias_hh 0. The biases of the
    other gates stay as they are.

    Args:
        module: an LSTM or LSTMCell.
        value: the sum of the two biases.

    Raises:
        TypeError: the module is no recurrent layer or cell.
        ValueError: it has no forget gate, or no biases.
    """
    if _cell(module) != "LSTM":
        raise ValueError(
            f"forget_gate_bias_ needs an LSTM or LSTMCell, got {type(module).__name__}, "
            "which has no forget gate"
        )
    for bias_ih, bias_hh in _biases(module):
        _gate(bias_ih, 4, FORGET_GATE).fill_(value)
        _gate(bias_hh, 4, FORGET_GATE).zero_()
    return module


@torch.no_grad()
def chrono_(module: Module, max_length: float, *, generator: Generator | None = None) -> Module:
    """Chrono initialisation: biases for memories that last from 2 to `max_length` timesteps
    (Tallec & Ollivier 2018, https://arxiv.org/abs/1804.11188).

    With u drawn uniformly from [1, max_length - 1] for each hidden unit:

        LSTM   b_f = log(u), b_i = -log(u)
        GRU    b_z = log(u)

    The paper's leaky units take the new value with a gate g of bias -log(u), and keep the old with
    1 - g. torch's GRU, h' = (1 - z) n + z h, keeps it with z: z = 1 - g has the bias log(u).

    The logarithms are divided by the module's gate_slope. As torch adds two biases, these are of
    bias_ih, and the same gates' of bias_hh become 0. The other gates' biases stay as they are.

    Args:
        module: an LSTM, GRU, LSTMCell or GRUCell.
        max_length: the longest dependency that is expected, in timesteps, at least 3.
        generator: of the random numbers, on the module's device; torch's own if None.

    Raises:
        TypeError: the module is no recurrent layer or cell.
        ValueError: it has no gates, or no biases; max_length is below 3 or not finite.
    """
    cell = _cell(module)
    if cell == "RNN":
        raise ValueError(
            "chrono_ needs an LSTM, GRU, LSTMCell or GRUCell, "
            f"got {type(module).__name__}, which has no gates"
        )
    if not 3 <= max_length < math.inf:
        raise ValueError(f"max_length must be at least 3 and finite, got {max_length}")
    for bias_ih, bias_hh in _biases(module):
        gates = 4 if cell == "LSTM" else 3
        keep = FORGET_GATE if cell == "LSTM" else UPDATE_GATE
        bias = _gate(bias_ih, gates, keep)
        bias.uniform_(1, max_length - 1, generator=generator).log_()
        bias.div_(getattr(module, "gate_slope", 1.0))
        _gate(bias_hh, gates, keep).zero_()
        if cell == "LSTM":
            _gate(bias_ih, gates, INPUT_GATE).copy_(-bias)
            _gate(bias_hh, gates, INPUT_GATE).zero_()
    return module


@torch.no_grad()
def orthogonal_(module: Module, gain: float = 1.0, *, generator: Generator | None = None) -> Module:
    """Makes the recurrent weights of each gate a random orthogonal matrix times `gain` (Saxe et al.
    2014, https://arxiv.org/abs/1312.6120).

    Each weight_hh [G*H, P] holds G blocks [H, P], of which each is orthogonal by itself; with a
    projection (P < H) its columns are orthonormal. All else stays as it is.

    Args:
        module: a layer or cell of any kind.
        gain: the blocks' singular values.
        generator: of the random numbers, on the module's device; torch's own if None.

    Raises:
        TypeError: the module is no recurrent layer or cell.
    """
    _cell(module)
    for weight in _weights(module, "weight_hh"):
        for block in weight.split(module.hidden_size):
            # torch has no QR decomposition in 16 bits.
            wide = torch.empty_like(block, dtype=torch.promote_types(block.dtype, torch.float32))
            block.copy_(nn.init.orthogonal_(wide, gain, generator))
    return module


def _cell(module: nn.Module) -> str:
    """The kind of cell: LSTM, GRU or RNN."""
    if isinstance(module, RNNBase):
        return module.mode.split("_")[0]
    kinds = {
        "LSTM": (nn.LSTMCell, cells.LSTMCell),
        "GRU": (nn.GRUCell, cells.GRUCell),
        "RNN": (nn.RNNCell, cells.RNNCell),
    }
    for name, types in kinds.items():
        if isinstance(module, types):
            return name
    raise TypeError(
        "the module must be an LSTM, GRU, RNN, LSTMCell, GRUCell or RNNCell, "
        f"got {type(module).__name__}"
    )


def _weights(module: nn.Module, kind: str) -> list[Tensor]:
    """The parameters of this kind, of every layer and direction."""
    names = [kind]
    if isinstance(module, RNNBase):
        directions = ("", "_reverse") if module.bidirectional else ("",)
        names = [f"{kind}_l{k}{d}" for k in range(module.num_layers) for d in directions]
    for name in names:
        if name not in module._parameters:  # but computed: a parametrization, weight_norm
            raise ValueError(
                f"{name} is parametrized, so it cannot be changed in place: initialise it before"
            )
    return [getattr(module, name) for name in names]


def _biases(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    if not module.bias:
        raise ValueError(f"the {type(module).__name__} must have biases, got bias=False")
    both = _weights(module, "bias_ih"), _weights(module, "bias_hh")
    return list(zip(*both, strict=True))


def _gate(bias: Tensor, gates: int, index: int) -> Tensor:
    """A gate's part [H] of a bias [G*H]."""
    return bias.chunk(gates)[index]

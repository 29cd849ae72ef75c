"""Providers of a recurrent layer: torch.nn's, ours, and the loop that a user writes by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .problems import Problem


class NaiveLoop(nn.Module):
    """What a user writes by hand: a Python loop over torch.nn.LSTMCell, GRUCell or RNNCell."""

    def __init__(self, problem: Problem) -> None:
        """Build the cell of `problem`."""
        super().__init__()
        self.cell: nn.Module
        if problem.cell.startswith("rnn_"):
            self.cell = nn.RNNCell(problem.I, problem.H, nonlinearity=problem.cell[4:])
        else:
            cells = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}
            self.cell = cells[problem.cell](problem.I, problem.H)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Run [T, B, I] -> [T, B, H] and the last state, shaped as torch.nn shapes it."""
        state: Any = None
        outputs = []
        for x_t in x:
            state = self.cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        if isinstance(state, tuple):
            return torch.stack(outputs), tuple(s.unsqueeze(0) for s in state)
        return torch.stack(outputs), state.unsqueeze(0)


def layer_from(namespace: Any, problem: Problem) -> nn.Module:
    """A layer of `torch.nn`, or of any namespace with the same LSTM, GRU and RNN."""
    layer: nn.Module
    if problem.cell.startswith("rnn_"):
        layer = namespace.RNN(problem.I, problem.H, nonlinearity=problem.cell[4:])
    else:
        layer = getattr(namespace, problem.cell.upper())(problem.I, problem.H)
    return layer


def ours() -> Any:
    """The namespace of our layers, imported late: this package is importable without them."""
    import rnn_fused

    return rnn_fused


PROVIDERS: dict[str, Callable[[Problem], nn.Module]] = {
    "torch.nn": lambda problem: layer_from(nn, problem),
    "rnn_fused": lambda problem: layer_from(ours(), problem),
    "naive": NaiveLoop,
}


def plain_name(parameter: str) -> str:
    """A parameter's name without what depends on the provider: weight_ih, bias_hh, ..."""
    return parameter.removeprefix("cell.").removesuffix("_l0")

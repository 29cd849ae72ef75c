"""Modules of torch.nn beside ours, with the same weights, and the comparison of the two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnn_fused

# What distinguishes the layers: class and arguments of the constructor.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 3}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm_cell": ("LSTMCell", {}),
    "gru_cell": ("GRUCell", {}),
    "rnn_cell_tanh": ("RNNCell", {}),
    "rnn_cell_relu": ("RNNCell", {"nonlinearity": "relu"}),
}
INPUT, HIDDEN = 4, 5
LENGTHS = (3, 6, 1)


def pair(
    kind: str, *, sizes: tuple[int, int] = (INPUT, HIDDEN), **options: Any
) -> tuple[nn.Module, nn.Module]:
    """(torch.nn's module, ours), initialised under the same seed."""
    name, own = (LAYERS | CELLS)[kind]
    options = {"dtype": torch.float64, **own, **options}
    modules = []
    for library in (nn, rnn_fused):
        torch.manual_seed(0)
        modules.append(getattr(library, name)(*sizes, **options))
    return modules[0], modules[1]


def sequence(form: str, batch_first: bool = False, **options: Any) -> PackedSequence | Tensor:
    """Random input in one of four forms: padded, unbatched, packed, packed_unsorted."""
    options = {"dtype": torch.float64, **options}
    if form.startswith("packed"):
        lengths = LENGTHS if form == "packed_unsorted" else sorted(LENGTHS, reverse=True)
        steps = [torch.randn(length, INPUT, **options) for length in lengths]
        return pack_sequence(steps, enforce_sorted=form == "packed")
    steps = torch.randn(max(LENGTHS), len(LENGTHS), INPUT, **options)
    if form == "unbatched":
        return steps[:, 0].contiguous()
    return steps.transpose(0, 1).contiguous() if batch_first else steps


def initial_state(module: nn.Module, form: str) -> Any:
    """A random state for the module, h or (h, c), that asks for gradients."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if form == "unbatched" else (len(LENGTHS),)
    options = {"dtype": module.weight_ih_l0.dtype, "requires_grad": True}
    h = torch.randn(rows, *batch, module.proj_size or HIDDEN, **options)
    return (h, torch.randn(rows, *batch, HIDDEN, **options)) if module.mode == "LSTM" else h


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a result or argument, packed sequences by their data."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [] if value is None else [t for item in value for t in tensors(item)]


def gradients(results: Iterable[Tensor], wanted: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum that weighs every element of the results differently."""
    total = sum((r * torch.linspace(-1, 2, r.numel()).view_as(r)).sum() for r in results)
    return torch.autograd.grad(total, [w for w in wanted if w.requires_grad])


def compare(stock: nn.Module, ours: nn.Module, *args: Any, **tolerance: float) -> None:
    """Asserts equal results and equal gradients of every argument and parameter.

    Both run from the same random state, so that dropout draws alike.
    """
    leaves = [t for t in tensors(args) if t.is_leaf]
    for leaf in leaves:
        leaf.requires_grad_()
    found = []
    for module in (stock, ours):
        torch.manual_seed(1)
        results = tensors(module(*args))
        found.append((results, gradients(results, [*leaves, *module.parameters()])))
    torch.testing.assert_close(found[1], found[0], **tolerance)

"""Sequences of different lengths in a padded batch: packed where they are, run, and unpacked.

Nothing here waits for a device. Where the lengths are not known to the host, every row of the batch
is packed, those of the padding behind the others; on the CPU they are left out.

Axes: T steps, B sequences, F features, N rows: one row is one sequence at one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .autograd import forward_mode


class Ragged(NamedTuple):
    """How a padded batch [T, B, F], or [B, T, F], lies packed, as in a `PackedSequence`."""

    shape: tuple[int, int]  # (T, B) or (B, T), as in the batch
    batch_sizes: Tensor  # int64 [T], or of the longest length
    order: Tensor  # [B] the sequences, the longest first
    rank: Tensor  # [B] the inverse of order
    rows: Tensor  # [N] the rows of the batch in packed order; with padding [T*B]
    # Only where rows has the padding too:
    places: Tensor | None  # [T*B] the inverse of rows
    padding: Tensor | None  # [T*B, 1] whether a row of the batch is padding

    def pack(self, batch: Tensor) -> Tensor:
        """[N, F], the padding zero, whatever it was."""
        rows = batch.flatten(0, 1)
        if self.places is not None and self.padding is not None:
            return _permute(rows.masked_fill(self.padding, 0), self.places)
        return rows.index_select(0, self.rows)

    def unpack(self, packed: Tensor) -> Tensor:
        """The batch of packed rows [N, F], zero in the padding."""
        if self.places is not None:
            rows = _permute(packed, self.rows)
        else:  # on the CPU, where index_add is faster than index_copy
            zeros = packed.new_zeros(self.shape[0] * self.shape[1], packed.shape[1])
            rows = zeros.index_add_(0, self.rows, packed)
        return rows.view(*self.shape, packed.shape[1])

    def pack_flags(self, flags: Tensor) -> Tensor:
        """Of the form of the batch without F; those of the padding stay what they are."""
        return flags.flatten().index_select(0, self.rows)

    def sort(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """States [.., B, F] in the packed sequences' order."""
        return tuple(state.index_select(1, self.order) for state in states)

    def unsort(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(state.index_select(1, self.rank) for state in states)


def ragged(lengths: Tensor, batch: Tensor, batch_first: bool, module: str) -> Ragged:
    """Checks the lengths of a batch and says how it lies packed. module: its name, for messages."""
    B, T = batch.shape[:2] if batch_first else (batch.shape[1], batch.shape[0])
    values = _read(lengths, T, B, module)
    known = values is not None and batch.is_cpu and not forward_mode()
    # Towards a device; a copy from one is not there when the CPU goes on.
    lengths = lengths.to(batch.device, torch.int64, non_blocking=not batch.is_cpu)
    descending, order = lengths.sort(descending=True, stable=True)
    longest = max(1, *values) if known and values else T
    steps = torch.arange(longest, device=batch.device).unsqueeze(1)
    exists = descending > steps  # [T, B], true in the order of the packed rows
    rows = order * T + steps if batch_first else steps * B + order
    places = padding = None
    if known:
        rows = rows[exists]
    else:
        # A row's place is the number of such rows before it, and of padding, of all the others too.
        flags = exists.flatten()
        before = flags.cumsum(0)
        index = torch.arange(T * B, device=batch.device)
        place = torch.where(flags, before - 1, index - before + before[-1:])
        rows = rows.flatten()
        places = torch.empty_like(place).scatter(0, rows, place)
        rows = torch.empty_like(place).scatter(0, place, rows)
        padding = _over(lengths, steps, batch_first).reshape(-1, 1)
    shape = (B, T) if batch_first else (T, B)
    return Ragged(shape, exists.sum(1), order, order.argsort(), rows, places, padding)


def _over(lengths: Tensor, steps: Tensor, batch_first: bool) -> Tensor:
    return lengths.unsqueeze(1) <= steps.squeeze(1) if batch_first else lengths <= steps


def _read(lengths: Tensor, T: int, B: int, module: str) -> list[int] | None:
    """The values of lengths, where they may be asked for; checked there or on the device."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{module}: lengths must be a Tensor, got {type(lengths).__name__}")
    dtype = lengths.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise RuntimeError(f"{module}: lengths must have an integer dtype, got {dtype}")
    if lengths.shape != (B,):
        raise RuntimeError(
            f"{module}: lengths must have shape [B] = [{B}], got {list(lengths.shape)}"
        )
    compiling = torch.compiler.is_compiling()
    transformed = torch._C._are_functorch_transforms_active()
    if compiling or transformed or isinstance(lengths, FakeTensor) or not lengths.is_cpu:
        if compiling or not _batched(lengths):  # vmap has no rule for the assertion
            wide = lengths.to(torch.int64)
            inside = ((wide >= 0) & (wide <= T)).all()
            torch._assert_async(inside, f"{module}: lengths must be between 0 and T")
        return None
    values: list[int] = lengths.tolist()
    for length in values:
        if not 0 <= length <= T:
            raise RuntimeError(
                f"{module}: lengths must be between 0 and T = {T}, got {length} at index "
                f"{values.index(length)}"
            )
    return values


def _batched(x: Tensor) -> bool:
    """Whether vmap, maybe below another transform, has a sample of its own for each."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _permute(rows: Tensor, to: Tensor) -> Tensor:
    """Row k goes to row to[k], a permutation. Its derivative reads rows where that of
    `index_select` would add to them, on CUDA one element after the other."""
    return torch.empty_like(rows).index_copy(0, to, rows)

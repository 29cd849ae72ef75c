"""Sequences of different lengths in a padded batch: packed where they are, run, and unpacked.

For devices, compilers and transforms, which do not know the lengths: every row of the batch is
packed, those of the padding behind the others. Elsewhere the op on the CPU takes the batch itself.

Axes: T steps, B sequences, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


class Ragged(NamedTuple):
    """How a padded batch [T, B, F], or [B, T, F], lies packed, as in a `PackedSequence`."""

    shape: tuple[int, int]  # (T, B) or (B, T), as in the batch
    batch_sizes: Tensor  # int64 [T]
    order: Tensor  # [B] the sequences, the longest first
    rank: Tensor  # [B] the inverse of order
    rows: Tensor  # [T*B] the rows of the batch in packed order, those of the padding the last
    places: Tensor  # [T*B] the inverse of rows
    padding: Tensor  # [T*B, 1] whether a row of the batch is padding

    def pack(self, batch: Tensor) -> Tensor:
        """[T*B, F], the padding zero, whatever it was."""
        return _permute(batch.flatten(0, 1).masked_fill(self.padding, 0), self.places)

    def unpack(self, packed: Tensor) -> Tensor:
        """The batch of packed rows [T*B, F]."""
        return _permute(packed, self.rows).view(*self.shape, packed.shape[1])

    def pack_flags(self, flags: Tensor) -> Tensor:
        """Of the form of the batch without F; those of the padding stay what they are."""
        return flags.flatten().index_select(0, self.rows)

    def sort(self, state: Tensor) -> Tensor:
        """A state [.., B, F] in the packed sequences' order."""
        return state.index_select(1, self.order)

    def unsort(self, state: Tensor) -> Tensor:
        return state.index_select(1, self.rank)


def ragged(lengths: Tensor, batch: Tensor, batch_first: bool = False) -> Ragged:
    """How a batch of sequences of these lengths lies packed. Nothing here waits for a device."""
    B, T = batch.shape[:2] if batch_first else (batch.shape[1], batch.shape[0])
    # Towards a device; a copy from one is not there when the CPU goes on.
    lengths = lengths.to(batch.device, torch.int64, non_blocking=not batch.is_cpu)
    descending, order = lengths.sort(descending=True, stable=True)
    steps = torch.arange(T, device=batch.device).unsqueeze(1)
    exists = descending > steps  # [T, B], true in the order of the packed rows
    # A row's place is the number of such rows before it, and of padding, of all the others too.
    flags = exists.flatten()
    before = flags.cumsum(0)
    index = torch.arange(T * B, device=batch.device)
    place = torch.where(flags, before - 1, index - before + before[-1:])
    rows = (order * T + steps if batch_first else steps * B + order).flatten()
    places = torch.empty_like(place).scatter(0, rows, place)
    rows = torch.empty_like(place).scatter(0, place, rows)
    over = lengths.unsqueeze(1) <= steps.squeeze(1) if batch_first else lengths <= steps
    shape = (B, T) if batch_first else (T, B)
    return Ragged(shape, exists.sum(1), order, order.argsort(), rows, places, over.reshape(-1, 1))


def check_lengths(lengths: Tensor, T: int, B: int, module: str) -> None:
    """Checks lengths: their values at once where the host may ask for them, and on the device
    elsewhere. module: its name, for messages."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{module}: lengths must be a Tensor, got {type(lengths).__name__}")
    dtype = lengths.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise RuntimeError(f"{module}: lengths must have an integer dtype, got {dtype}")
    if lengths.shape != (B,):
        raise RuntimeError(
            f"{module}: lengths must have shape [B] = [{B}], got {list(lengths.shape)}"
        )
    if not host_knows(lengths):
        if torch.compiler.is_compiling() or not _batched(lengths):  # vmap lacks a rule for it
            wide = lengths.to(torch.int64)
            inside = ((wide >= 0) & (wide <= T)).all()
            torch._assert_async(inside, f"{module}: lengths must be between 0 and T")
        return
    values: list[int] = lengths.tolist()
    for index, length in enumerate(values):
        if not 0 <= length <= T:
            raise RuntimeError(
                f"{module}: lengths must be between 0 and T = {T}, got {length} at index {index}"
            )


def host_knows(values: Tensor) -> bool:
    """Whether the host may ask for the values of a tensor: it need not wait for a device, and no
    compiler or transform is under way, to which they are unknown."""
    compiling = torch.compiler.is_compiling()
    transformed = torch._C._are_functorch_transforms_active()
    return values.is_cpu and not (compiling or transformed or isinstance(values, FakeTensor))


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

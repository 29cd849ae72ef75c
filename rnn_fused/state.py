"""`detach_state`: cuts the graph behind a recurrent state."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

State = TypeVar("State")


def detach_state(state: State) -> State:
    """The same state without its history, for truncated back-propagation through time (Williams &
    Peng 1990): gradients of what follows stop here.

    Args:
        state: a Tensor, None, or a tuple or list of such states, nested as deep as it likes: what
            layers and cells return, a list of them for a stack of cells.

    Returns:
        A state of the same form; its tensors share memory with those given.

    Raises:
        TypeError: something else.
    """
    if state is None:
        return state
    if isinstance(state, Tensor):
        return state.detach()  # type: ignore[return-value]
    if type(state) in (tuple, list):
        return type(state)(detach_state(part) for part in state)  # type: ignore[call-arg, attr-defined]
    name = type(state).__name__
    raise TypeError(f"detach_state needs a Tensor, None, or a tuple or list of states, got {name}")

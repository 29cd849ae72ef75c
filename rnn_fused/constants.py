"""What compiled graphs take as constants. A compiler imports this while it traces, since marking
functions imports the compiler: see `families._constant`."""

from collections.abc import Callable
from typing import Any

import torch

from . import families

_ASKED: tuple[Any, ...] = (families.has_kernels, families.allows_tf32, families.allows_split)
CONSTANT: dict[str, Callable[..., bool]] = {
    ask.__name__: torch.compiler.assume_constant_result(ask.__wrapped__) for ask in _ASKED
}

"""Fused recurrent layers for PyTorch: drop-in replacements for the RNN modules of `torch.nn`."""

# The op library links against torch's shared objects: torch must be loaded first.
import torch  # noqa: F401

from . import diagnostics, init, ops, reference
from .build_info import build_info
from .cells import GRUCell, LSTMCell, RNNCell
from .convert import convert, revert
from .explain import Gpu, explain
from .families import kernels
from .freeze import Frozen, freeze
from .modules import GRU, LSTM, RNN
from .state import detach_state

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Frozen",
    "GRUCell",
    "Gpu",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "build_info",
    "convert",
    "detach_state",
    "diagnostics",
    "explain",
    "freeze",
    "init",
    "kernels",
    "ops",
    "reference",
    "revert",
]

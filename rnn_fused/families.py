"""Which kernels run a layer on CUDA: `kernels` forces a family."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch

from . import _C

KERNELS = ("auto", "stepwise", "persistent", "handoff", "split", "cluster", "cudnn")
OLDEST_CAPABILITY = (8, 0)

# The families of the contexts that are open, oldest first, and the one that counts: a global of its
# own, which compilers guard.
_open: list[list[str]] = []
_lock = Lock()
_forced = "auto"


@contextmanager
def kernels(family: str) -> Iterator[None]:
    """Forces the kernels of layers on CUDA tensors, as `torch.nn.attention.sdpa_kernel` does for
    attention. Layers on the CPU have but one kind and are not concerned.

    - "auto": the plan chooses, see `rnn_fused.explain`.
    - "stepwise": a product and a fused kernel for each timestep; any sizes, dtypes, projections.
    - "persistent": one launch for all timesteps, weights kept on the chip, or as many of them as it
      holds; at most 32 hidden units to an SM, in exact float32 16 and H up to 2048 (on an H100 an
      LSTM 1024, a GRU 1280).
    - "handoff": "persistent", but no step waits at a barrier of all blocks: each block polls for
      the values that it reads; at most 16 hidden units to an SM, H up to 2048.
    - "split": "persistent", but backward the blocks of a thread-block cluster divide the gates, so
      that an SM reads the gradients of one gate only; LSTM and GRU, compute capability
      9.0 on.
    - "cluster": one launch of thread-block clusters that each run some sequences and wait for no
      other; compute capability 9.0 on, H up to 512, of LSTMs and GRUs in float32 256 (from 11.0 on
      half of that).
    - "cudnn": torch's own op, which runs cuDNN where that can. For comparisons: torch.nn's modules
      keep their weights in one piece, which spares cuDNN a copy of them at every call.

    "auto" chooses none of "handoff", "split" and "cluster": no GPU has run any of these kernels
    yet.

    The youngest open context counts, for all threads. A backward pass has the choice of its forward
    pass.

    Raises:
        ValueError: the family is unknown.
        RuntimeError: later, from a layer that the family cannot run.
    """
    global _forced
    if family not in KERNELS:
        raise ValueError(f"kernels must be one of {[*KERNELS]}, got {family!r}")
    entry = [family]  # a list: found again by its identity
    with _lock:
        _open.append(entry)
        _forced = family
    try:
        yield
    finally:
        with _lock:
            _open[:] = [other for other in _open if other is not entry]
            _forced = _open[-1][0] if _open else "auto"


def forced() -> str:
    return _forced


def has_kernels(device: str, index: int | None) -> bool:
    """Whether this build has kernels for a device; elsewhere torch's own op runs."""
    if device != "cuda":
        return device in ("cpu", "meta")
    if torch.version.cuda is None:  # a ROCm device is called cuda, too
        return False
    capability = torch.cuda.get_device_capability(index)
    return any(_runs_on(arch, capability) for arch in _C.cuda_archs)


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether a device runs machine code of `arch`: that of its own major version, not of a later
    minor one; sm_90a and its like run on their very own version only."""
    digits = arch.removeprefix("sm_").rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    if capability < OLDEST_CAPABILITY or major != capability[0]:
        return False
    return minor == capability[1] if arch.endswith("a") else minor <= capability[1]


def allows_tf32() -> bool:
    """What torch.nn's layers obey on CUDA: `torch.backends.cudnn.rnn.fp32_precision`.

    A compiled graph keeps what held when it was compiled: nothing guards the setting.
    """
    try:
        layers: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
        products: str = torch.backends.cuda.matmul.fp32_precision
    except RuntimeError:  # old and new settings mixed
        return False
    if products == "tf32" and layers != "tf32":
        _warn_of_products()
    return layers == "tf32"


def allows_split() -> bool:
    """Whether float32 products on the CPU may be those of bfloat16 terms: by
    `torch.get_float32_matmul_precision()`, unless that of layers on the CPU says "ieee". Compilers
    guard the former.
    """
    try:
        if torch.get_float32_matmul_precision() == "highest":
            return False
    except RuntimeError:  # old and new settings mixed
        return False
    layers = getattr(torch.backends.mkldnn, "rnn", None)
    return getattr(layers, "fp32_precision", "none") != "ieee"


@cache
def _warn_of_products() -> None:
    warnings.warn(
        "torch.backends.cudnn.rnn asks for exact float32 layers, but torch.backends.cuda.matmul "
        "allows TF32, which the products of rnn_fused's CUDA layers around the timesteps follow",
        stacklevel=5,
    )

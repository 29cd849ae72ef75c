"""What the installed native libraries are made of and what this machine can run of them."""

from __future__ import annotations

from typing import TypedDict

import torch

import rnn_fused
from rnn_fused import _C


class CudaInfo(TypedDict):
    version: str  # of the toolkit that built it, e.g. "13.0"
    archs: list[str]  # e.g. ["sm_80", "sm_90a"]


class CpuInfo(TypedDict):
    compiled: list[str]  # instruction sets in the library
    supported: list[str]  # those of `compiled` that this machine can run
    selected: str  # the one in use: the best supported one, or RNN_FUSED_CPU_ISA


class BuildInfo(TypedDict):
    version: str
    compiler: str
    torch_target: str  # the oldest torch whose stable ABI the library needs, e.g. "2.11"
    cuda: CudaInfo | None
    cpu: CpuInfo
    threads: int  # torch.get_num_threads()


def build_info() -> BuildInfo:
    """Version, compiler, ABI target, CUDA architectures and CPU instruction sets of this build.

    Raises:
        ValueError: the environment variable RNN_FUSED_CPU_ISA names an instruction set that is
            unknown or that this machine cannot run.
    """
    return {
        "version": rnn_fused.__version__,
        "compiler": _C.compiler,
        "torch_target": _torch_version(int(_C.torch_target, 16)),
        "cuda": {"version": _C.cuda_version, "archs": _C.cuda_archs} if _C.cuda_version else None,
        "cpu": {
            "compiled": _C.compiled_isas,
            "supported": _C.supported_isas(),
            "selected": _C.selected_isa(),
        },
        "threads": torch.get_num_threads(),
    }


def _torch_version(target: int) -> str:
    """Unpacks TORCH_TARGET_VERSION: the major version is the first byte of eight, the minor the
    second."""
    return f"{target >> 56}.{target >> 48 & 0xFF}"

from typing import Any

compiler: str
torch_target: str
cuda_version: str
cuda_archs: list[str]
compiled_isas: list[str]

def supported_isas() -> list[str]: ...
def selected_isa() -> str: ...
def plan_cpu(
    cell: str,
    dtype: str,
    T: int,
    B: int,
    H: int,
    P: int,
    directions: int,
    layers: int,
    threads: int,
) -> dict[str, int]: ...
def plan_cuda(
    cell: str,
    dtype: str,
    T: int,
    B: int,
    H: int,
    P: int,
    directions: int,
    allow_tf32: bool,
    gpu: tuple[int, int, int, int, int],
    backward: bool,
    kernels: str,
) -> dict[str, Any]: ...
def plan_cuda_stack(
    cell: str,
    dtype: str,
    T: int,
    B: int,
    H: int,
    P: int,
    directions: int,
    allow_tf32: bool,
    gpu: tuple[int, int, int, int, int],
    backward: bool,
    kernels: str,
    layers: int,
) -> dict[str, Any]: ...

compiler: str
torch_target: str
cuda_version: str
cuda_archs: list[str]
compiled_isas: list[str]

def supported_isas() -> list[str]: ...
def selected_isa() -> str: ...

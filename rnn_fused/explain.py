"""`explain`: how a module's layers will run, in words."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase

from . import _C, families
from .freeze import Frozen

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}


# cell, dtype, T, B, H, P, directions
_Layer: TypeAlias = tuple[str, str, int, int, int, int, int]


@dataclass(frozen=True)
class Gpu:
    """What the plan needs to know of a GPU."""

    name: str
    compute_capability: int  # 90 for 9.0
    sm_count: int
    registers_per_sm: int
    shared_per_sm: int  # bytes
    shared_per_block: int  # bytes, with opt-in


# From NVIDIA's architecture white papers and tuning guides.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 108, 65536, 164 << 10, 163 << 10),
        Gpu("H100", 90, 132, 65536, 228 << 10, 227 << 10),
        Gpu("H200", 90, 132, 65536, 228 << 10, 227 << 10),
        Gpu("B200", 100, 148, 65536, 228 << 10, 227 << 10),
        Gpu("RTX 4090", 89, 128, 65536, 100 << 10, 99 << 10),
    )
}


def explain(module: RNNBase | Frozen, T: int, B: int, *, device: str | Gpu | None = None) -> str:
    """How `module` runs on a dense batch: the plan of each pass, and why it is that.

    Args:
        module: an LSTM, GRU or RNN of this package (or of torch.nn: how it would run converted), or
            a frozen one.
        T, B: timesteps and sequences, at least 1.
        device: "cpu", "cuda" for the current CUDA device, the name of a GPU that need not be
            present ("A100", "H100", "H200", "B200", "RTX 4090"), or a `Gpu`. The device of the
            module's weights if absent.

    Returns:
        A few lines of text. Not a format to parse.

    Raises:
        TypeError: the module is no RNNBase or Frozen, its dtype has no kernels, or T or B is no
            integer.
        ValueError: T or B is below 1, or the device is unknown.
        RuntimeError: "cuda" without a CUDA device.
    """
    frozen = isinstance(module, Frozen)
    if isinstance(module, Frozen):
        module = module._module
    if not isinstance(module, RNNBase):
        raise TypeError(f"explain needs an LSTM, GRU or RNN, got {type(module).__name__}")
    T, B = operator.index(T), operator.index(B)
    if T < 1 or B < 1:
        raise ValueError(f"T and B must be at least 1, got T={T}, B={B}")
    weight: Tensor = module.weight_hh_l0  # type: ignore[assignment]
    if weight.dtype not in DTYPES:
        raise TypeError(f"there are no kernels for {weight.dtype}")
    where = weight.device.type if device is None else device
    if where == "cuda" and not torch.cuda.is_available():
        raise RuntimeError('explain on "cuda" needs a CUDA device: name a GPU, such as "H100"')

    layers = f"{module.num_layers} layer{'s' if module.num_layers > 1 else ''}"
    both = ", bidirectional" if module.bidirectional else ""
    projected = f", proj_size={module.proj_size}" if module.proj_size else ""
    title = f"{module.mode} H={module.hidden_size}{projected}, {layers}{both}, T={T}, B={B}"
    H = module.hidden_size
    P, directions = module.proj_size or H, 2 if module.bidirectional else 1
    layer = module.mode.lower(), DTYPES[weight.dtype], T, B, H, P, directions
    lines = [f"{title}, {str(weight.dtype).removeprefix('torch.')}"]
    if where == "cuda" and not families.has_kernels("cuda", weight.device.index):
        lines.append("  on CUDA: torch's own op, since this build has no code for the device")
    elif where == "cpu":
        threads = min(torch.get_num_threads(), os.cpu_count() or 1)  # as the op takes them
        lines += _cpu(_C.plan_cpu(*layer, module.num_layers, threads), frozen)
    else:
        gpu = _gpu(where, weight.device.index)
        rebuilds = getattr(module, "save", "gates") == "recompute" and layer[0] in ("lstm", "gru")
        lines += _cuda(layer, module.num_layers, gpu, weight.dtype, rebuilds)
    return "\n".join(lines)


def _gpu(where: str | Gpu, index: int | None) -> Gpu:
    if isinstance(where, Gpu):
        return where
    if where == "cuda":
        return current_gpu(index)
    if where not in GPUS:
        raise ValueError(f"device must be cpu, cuda or one of {[*GPUS]}, got {where!r}")
    return GPUS[where]


def current_gpu(index: int | None = None) -> Gpu:
    """A CUDA device of this machine."""
    p = torch.cuda.get_device_properties(index)
    return Gpu(
        p.name,
        10 * p.major + p.minor,
        p.multi_processor_count,
        p.regs_per_multiprocessor,  # type: ignore[attr-defined]
        p.shared_memory_per_multiprocessor,
        p.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def _cpu(plan: dict[str, int], frozen: bool) -> list[str]:
    if frozen and plan["stack_parts"] > 1:
        threads = (
            f"layers divided among {plan['stack_parts']} threads, each {plan['timesteps_behind']} "
            "timesteps behind the one below"
        )
    elif plan["unit_parts"] > 1:
        threads = f"hidden units divided among {plan['unit_parts']} threads, a barrier each step"
    elif plan["row_parts"] > 1:
        threads = f"sequences divided among {plan['row_parts']} threads, no barrier"
    else:
        threads = "one thread"
    if frozen:
        weights = "packed by freeze"
    elif plan["pack"]:
        weights = "packed once a call"
    else:
        weights = "as they lie: few rows, packing not repaid"
    return [f"  on the CPU ({_C.selected_isa()}): {threads}; weights {weights}"]


def _cuda(layer: _Layer, layers: int, gpu: Gpu, dtype: torch.dtype, rebuilds: bool) -> list[str]:
    if gpu.compute_capability < 10 * families.OLDEST_CAPABILITY[0]:
        return [
            f"  on {gpu.name}: torch's own op, the GPU is too old (sm_{gpu.compute_capability})"
        ]
    tf32 = dtype == torch.float32 and families.allows_tf32()
    lines = [f"  on {gpu.name} (sm_{gpu.compute_capability}, {gpu.sm_count} SMs)"]
    kernels = families.forced()
    if kernels == "cudnn":
        lines.append("  forced: cudnn, torch's own op; the plan would be")
        kernels = "auto"
    elif kernels != "auto":
        lines.append(f"  forced: {kernels}")
    for name, backward in (("forward", False), ("backward", True)):
        plan = cuda_plan(layer, gpu, tf32, kernels, backward=backward)
        cannot = kernels not in ("auto", plan["family"])
        how = f"{kernels} cannot run it: {plan['why']}" if cannot else _how(plan, tf32)
        lines.append(f"  {name}: {how}")
        if not cannot:
            lines.append(f"    {_predicted(plan['step_us'])}")
        if backward and rebuilds:
            continue  # gates, layer after layer
        stack = plan_stack(layer, layers, gpu, tf32, kernels, backward=backward)
        if stack["together"] > 1:
            other = "above" if backward else "below"
            behind = f"each {stack['chunk']} timesteps behind the one {other}"
            how = f"{stack['together']} layers side by side, {behind}: {_how(stack['plan'], tf32)}"
            us, in_turn = stack["us"], stack["us_in_turn"]
            times = f"{us:.0f} us for all layers' loops, {in_turn:.0f} us in turn"
            lines += [f"  {name} of all layers: {how}", f"    predicted, not measured: {times}"]
    return lines


def cuda_plan(
    layer: _Layer, gpu: Gpu, tf32: bool, kernels: str, *, backward: bool
) -> dict[str, Any]:
    """What a family of `kernels`, or for "auto" the plan's own, would do with a layer."""
    return _C.plan_cuda(*layer, tf32, _limits(gpu), backward, kernels)


def plan_stack(
    layer: _Layer, layers: int, gpu: Gpu, tf32: bool, kernels: str, *, backward: bool
) -> dict[str, Any]:
    """How a stack of such layers runs."""
    return _C.plan_cuda_stack(*layer, tf32, _limits(gpu), backward, kernels, layers)


def _limits(gpu: Gpu) -> tuple[int, int, int, int, int]:
    return (
        *(gpu.compute_capability, gpu.sm_count, gpu.registers_per_sm),
        *(gpu.shared_per_sm, gpu.shared_per_block),
    )


def _how(plan: dict[str, Any], tf32: bool) -> str:
    if plan["family"] == "stepwise":
        return f"stepwise{': ' * bool(plan['why'])}{plan['why']}"
    runs, resident = plan["k_blocks"], plan["register_blocks"]
    streamed, octets = plan["streamed_octets"], plan["streamed_octets"] + plan["shared_octets"]
    if octets > 0:
        again = f" and, {100 * streamed / octets:.0f}% of them, in L2, read in every step"
        weights = f"weights in shared memory{again * (streamed > 0)}"
    else:
        memory = f", the last {runs - resident} in shared memory" * (runs > resident)
        weights = (
            f"weights in registers ({plan['warps']} warps, {_count(runs, 'run')} each{memory})"
        )
    shared = f"{plan['shared_bytes']} bytes of shared memory{', TF32' * tf32}"
    if plan["family"] == "cluster":
        return (
            f"cluster: {_count(plan['blocks'] // plan['cluster'], 'cluster')} of "
            f"{_count(plan['cluster'], 'block')} of {plan['units']} hidden units, {weights}, "
            f"{plan['batch_tile']} sequences each, {shared}"
        )
    blocks = f"{_count(plan['blocks'], 'block')} of {plan['units']} hidden units"
    polling = " that hand off" * (plan["family"] == "handoff")
    divided = f" in clusters of {plan['cluster']} that divide the gates" * (plan["cluster"] > 1)
    tile = min(plan["batch_tile"], plan["slice"])
    in_turns = " for one direction after the other" * (plan["launches"] > 1)
    sliced = f", {plan['slices']} slices of up to {plan['slice']} sequences" * (plan["slices"] > 1)
    return (
        f"persistent: {blocks}{polling}{divided}{in_turns}{sliced}, {weights}, up to {tile} "
        f"sequences a pass, {shared}"
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _predicted(step_us: dict[str, float]) -> str:
    parts = {
        "waits": "launches, barriers and trips between SMs",
        "traffic": "L2 and other SMs' memory",
        "shared": "shared memory",
        "maths": "products and gates",
    }
    spent = ", ".join(f"{what} {step_us[part]:.1f}" for part, what in parts.items())
    return f"predicted, not measured: {sum(step_us.values()):.1f} us a step ({spent})"

"""The rules of kernel_table.py can fail, and its parsers read what cuobjdump prints."""

from __future__ import annotations

import shutil

import pytest
from kernel_table import (
    NO_LIMITS,
    Code,
    Kernels,
    Variant,
    blocks_of_registers,
    broken_rules,
    count_instructions,
    read_resources,
    readable,
    table,
)

NAME = (
    "_ZN9rnn_fused10persistent14forward_kernelINS0_3MmaI6__halfEELNS_4CellE0ELi8EEEv"
    "NS_13ForwardParamsEiiPv"
)
OTHER = "_ZN9rnn_fused41_GLOBAL__N__b9a4e7c9_9_device_cu_bc76bfe713write_numbersENS0_7NumbersEPli"
RESOURCES = f"""
Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function {NAME}:
  REG:255 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:1208 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {OTHER}:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:2412 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function {NAME}:
  REG:248 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1384 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""
Fatbin elf code:
================
arch = sm_90a

	code for sm_90a
	.target	sm_90a

		Function : {NAME}
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0010*/                   HFMA2.MMA R142, -RZ, RZ, 0, 0 ;     /* 0x00000060ff8e7435 */
        /*0020*/              @!P0 HMMA.16816.F32 R8, R4, R12, R8 ;    /* 0x0000000c0408723c */
        /*0030*/                   UTCHMMA gdesc[UR4], tmem[UR6] ;     /* 0x00000000000079ea */
        /*a0f0*/                   IMAD.MOV.U32 R0, RZ, RZ, R2 ;       /* 0x000000ffff007224 */
        /*a100*/                   FFMA.SAT R2, R2, R3, 0.5 ;          /* 0x3f00000002027423 */
        /*a110*/               @P1 FFMA2 R2, R2, R3, R4 ;              /* 0x0000000302027249 */
		..........
"""
VARIANT = "forward_kernel<{}, {}, {}>"
CLUSTER = "cluster_backward_kernel<Mma<__half>, gru, 16>"
SPLIT = "split_backward_kernel<Ffma, lstm, 4>"


def test_reads_what_cuobjdump_prints() -> None:
    kernels = read_resources(RESOURCES.splitlines(keepends=True))
    count_instructions(SASS.splitlines(keepends=True), kernels)
    assert kernels == {
        NAME: {
            "sm_80": Code(registers=255, shared=0, local=24),
            "sm_90a": Code(registers=248, shared=1024, local=0, tensor=2, ffma=3),
        },
        OTHER: {"sm_80": Code(registers=8, shared=0, local=0)},
    }


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_table_has_readable_names() -> None:
    kernels = readable(read_resources(RESOURCES.splitlines(keepends=True)))
    text = table(kernels, ["sm_80", "sm_90a"])
    assert "| kernel | sm_80 | sm_90a | planned |" in text
    assert "| forward LSTM f16, 8 k-blocks | 255 / 0 / 1 / 0 | 248 / 1024 / 1 / 0" in text
    assert "| write_numbers | 8 / 0 |  |" in text


def healthy() -> Kernels:
    """A kernel of each policy, and one that is not persistent."""
    kernels = {
        VARIANT.format(policy, "lstm", k_blocks): {"sm_80": Code(registers, 0, 0, tensor=8, ffma=9)}
        for policy, k_blocks, registers in (
            ("Mma<__nv_bfloat16>", 1, 128),
            ("Mma<__half>", 8, 255),
            ("Tf32", 1, 255),
            ("Tf32", 0, 255),
        )
    }
    kernels[VARIANT.format("Ffma", "rnn_tanh", 1)] = {"sm_80": Code(255, 0, 0, ffma=32)}
    kernels["forward_step<double, gru>"] = {"sm_80": Code(40, 0, 0)}
    kernels[CLUSTER] = {"sm_90a": Code(200, 0, 0, tensor=8), "sm_80": Code(8, 0, 0)}
    kernels[SPLIT] = {"sm_90a": Code(200, 0, 0, ffma=128), "sm_80": Code(8, 0, 0)}
    return kernels


def test_healthy_kernels_break_no_rule() -> None:
    kernels = healthy()
    of_clusters = {name: kernels.pop(name) for name in (CLUSTER, SPLIT)}
    assert list(broken_rules(of_clusters, ["sm_80", "sm_90a"]))[1:] == []
    assert list(broken_rules(kernels, ["sm_80"])) == []


def test_kernels_of_clusters_multiply_in_the_tensor_cores() -> None:
    kernels = {CLUSTER: healthy()[CLUSTER]}
    kernels[CLUSTER]["sm_90a"].tensor = 0
    _, broken = broken_rules(kernels, ["sm_80", "sm_90a"])
    assert broken.startswith(f"{CLUSTER}, sm_90a: must multiply in the tensor cores, got none")


BF16, EXACT = VARIANT.format("Mma<__nv_bfloat16>", "lstm", 1), VARIANT.format("Ffma", "rnn_tanh", 1)
BF16_NAME, EXACT_NAME = "forward LSTM bf16, 1 k-block", "forward RNN f32, 1 k-block"


@pytest.mark.parametrize(
    ("kernel", "field", "value", "message"),
    [
        (BF16, "tensor", 0, f"{BF16_NAME}, sm_80: must multiply in the tensor cores, got none"),
        (BF16, "local", 16, f"{BF16_NAME}, sm_80: must have no stack and spill nothing, got 16"),
        (BF16, "registers", 129, f"{BF16_NAME}, sm_80: an SM must have registers for 2 blocks"),
        (EXACT, "tensor", 1, f"{EXACT_NAME}, sm_80: must multiply exactly"),
        (EXACT, "ffma", 31, f"{EXACT_NAME}, sm_80: must multiply exactly"),
        ("forward_step<double, gru>", "local", 8, "forward_step<double, gru>, sm_80: must have no"),
    ],
)
def test_broken_rule(kernel: str, field: str, value: int, message: str) -> None:
    kernels = healthy()
    del kernels[CLUSTER], kernels[SPLIT]
    setattr(kernels[kernel]["sm_80"], field, value)
    (broken,) = broken_rules(kernels, ["sm_80"])
    assert broken.startswith(message)


def test_missing_kernels() -> None:
    kernels = healthy()
    del kernels[CLUSTER], kernels[SPLIT]
    broken_archs = list(broken_rules(kernels, ["sm_80", "sm_120"]))
    assert len(broken_archs) == len(kernels)
    del kernels[EXACT]
    (broken,) = broken_rules(kernels, ["sm_80"])
    assert broken == "there must be persistent kernels of every policy, got none of ['f32']"
    assert "must be compiled for ['sm_80', 'sm_120'], got ['sm_80']" in broken_archs[0]


def test_promise_is_that_of_the_plan() -> None:
    for k_blocks in (1, 2, 4, 8):
        variant = Variant(False, "bf16", "lstm", k_blocks)
        assert variant.plan(1, k_blocks, *NO_LIMITS)["k_blocks"] == k_blocks
    # csrc/cuda/plan.h, blocks_per_sm: two blocks of 16-bit kernels with one k-block.
    assert Variant(False, "bf16", "lstm", 1).promise() == (2, 8)
    assert Variant(True, "f16", "gru", 2).promise() == (1, 8)
    assert Variant(True, "f32", "rnn_tanh", 1).promise() == (1, 8)
    assert Variant(False, "tf32", "lstm", 8).promise() == (1, 8)
    # Of large blocks, of H up to 32 times the SMs.
    for backward in (False, True):
        large = Variant(backward, "tf32", "lstm", 0)
        assert large.promise() == (1, 8)
        assert large.on_h100()[0] == "4096"
        assert str(large).endswith("LSTM tf32, large")


def test_blocks_of_registers() -> None:
    # 129 registers of 32 threads take 17 units of 256, 128 take 16.
    assert [blocks_of_registers(n, warps=8) for n in (32, 128, 129, 255)] == [8, 2, 1, 1]

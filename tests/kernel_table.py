"""Reads the kernels of a built library: writes a table of what they take of a GPU, and fails where
their machine code breaks a rule. Needs no GPU, but cuobjdump and nvdisasm of the CUDA toolkit.

    python tests/kernel_table.py rnn_fused/libops.so --out build/kernels.md
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnn_fused import _C
from rnn_fused.explain import GPUS

H100 = GPUS["H100"]
NO_LIMITS = (1 << 30,) * 3  # SMs, bytes of shared memory of an SM and of a block
BATCH = 32  # of the shapes whose dynamic shared memory the table has
BLOCK = 256  # hidden units of a k-block: kKBlock in csrc/cuda/plan.h
WIDEST, LARGE = 8, 0  # k-blocks: the most of wide blocks, and any number, of large ones
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # in the order of Cell in csrc/core/params.h
POLICIES = {"Mma<__nv_bfloat16>": "bf16", "Mma<__half>": "f16", "Tf32": "tf32", "Ffma": "f32"}
# In Ffma::multiply, which has eight k of four sequences for each gate. The gates' maths has fewer.
FEWEST_FFMA = {"lstm": 4 * 32, "gru": 3 * 32, "rnn_tanh": 32}


@dataclass
class Code:
    """One kernel for one architecture."""

    registers: int  # of a thread
    shared: int  # bytes of static shared memory
    local: int  # bytes of stack and local memory
    tensor: int = 0  # instructions of the tensor cores
    ffma: int = 0  # multiply-adds in float32


Kernels = dict[str, dict[str, Code]]  # by name, mangled or readable, and architecture


@dataclass(frozen=True, order=True)
class Variant:
    """Which persistent kernel."""

    backward: bool
    policy: str  # a value of POLICIES
    cell: str
    k_blocks: int

    def __str__(self) -> str:
        size = f"{self.k_blocks} k-block{'s' * (self.k_blocks > 1)}"
        return (
            f"{'backward' if self.backward else 'forward'} {self.cell.split('_')[0].upper()} "
            f"{self.policy}, {'large' if self.k_blocks == LARGE else size}"
        )

    @property
    def sizes(self) -> range:
        """The k-blocks of the layers that run by this kernel, on an H100 or a larger GPU."""
        if self.k_blocks == LARGE:
            return range(WIDEST + 1, H100.sm_count * 32 // BLOCK + 1)
        return range(self.k_blocks // 2 + 1, self.k_blocks + 1)

    def plan(
        self, batch: int, k_blocks: int, sms: int, shared_per_sm: int, shared: int
    ) -> dict[str, Any]:
        """For the largest H of so many k-blocks, on an H100 but for these limits."""
        H, tf32 = BLOCK * k_blocks, self.policy == "tf32"
        gpu = (H100.compute_capability, sms, H100.registers_per_sm, shared_per_sm, shared)
        layer = (self.cell, "f32" if tf32 else self.policy, 1, batch, H, H, 1)
        return _C.plan_cuda(*layer, tf32, gpu, self.backward, "persistent")

    def promise(self) -> tuple[int, int]:
        """The blocks for which the plan takes an SM's registers to have room, and warps of a block.
        Told by the smallest GPU, otherwise without limits, on which the layer runs like this."""
        whole = self.plan(1, self.sizes[-1], *NO_LIMITS)
        runs = (
            sms
            for sms in range(1, whole["blocks"] + 1)
            if self.plan(1, self.sizes[-1], sms, *NO_LIMITS[1:])["units"] == whole["units"]
        )
        return -(-whole["blocks"] // next(runs)), whole["warps"]

    def on_h100(self) -> list[str]:
        """The largest H, of multiples of BLOCK, and a block's bytes of dynamic shared memory."""
        units = self.plan(1, self.sizes[-1], *NO_LIMITS)["units"]
        for k_blocks in reversed(self.sizes):
            limits = H100.sm_count, H100.shared_per_sm, H100.shared_per_block
            plan = self.plan(BATCH, k_blocks, *limits)
            if plan["units"] == units:
                return [str(BLOCK * k_blocks), str(plan["shared_bytes"])]
        return ["-", "-"]


@dataclass(frozen=True)
class Cluster:
    """Which kernel of clusters, of either pass; or one whose blocks divide the gates."""

    policy: str  # a value of POLICIES
    cell: str


def blocks_of_registers(registers: int, warps: int) -> int:
    """Blocks for which an SM has registers; a warp gets them in units of 256."""
    return H100.registers_per_sm // (-(-registers * 32 // 256) * 256 * warps)


def read_resources(lines: Iterable[str]) -> Kernels:
    """What `cuobjdump --dump-resource-usage` prints."""
    kernels: Kernels = {}
    arch = name = ""
    for line in lines:
        if match := re.match(r"arch = (\S+)|\s*Function (\S+):$", line):
            arch, name = match[1] or arch, match[2] or name
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            kernels.setdefault(name, {})[arch] = Code(registers, shared, stack + local)
    return kernels


def count_instructions(lines: Iterable[str], kernels: Kernels) -> None:
    """Adds what `cuobjdump --dump-sass` prints of the same library: millions of lines."""
    arch = ""
    code = None
    for line in lines:
        if "MMA" in line or "FFMA" in line:
            # The first word alone: HFMA2.MMA is no instruction of the tensor cores.
            match = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z0-9]+)", line)
            if match and code:
                code.tensor += match[1].endswith("MMA")
                code.ffma += {"FFMA": 1, "FFMA2": 2}.get(match[1], 0)
        elif match := re.match(r"arch = (\S+)|\s*Function : (\S+)", line):
            arch = match[1] or arch
            code = kernels[match[2]][arch] if match[2] else None


def readable(kernels: Kernels) -> Kernels:
    """With names such as forward_step<float, lstm>."""
    names = subprocess.run(
        ["c++filt", "-p"], input="\n".join(kernels), text=True, capture_output=True, check=True
    ).stdout.splitlines()
    short = {}
    for name, codes in zip(names, kernels.values(), strict=True):
        name = re.sub(r"rnn_fused::(gpu::|persistent::|\(anonymous namespace\)::)?", "", name)
        short[re.sub(r"\(Cell\)(\d)", lambda match: CELLS[int(match[1])], name)] = codes
    return short


def cluster_of(name: str) -> Cluster | None:
    """Of a readable name; None for a kernel that is not one of clusters."""
    match = re.fullmatch(r"(?:cluster|split)_\w+_kernel<(.+), (\w+), \d+>", name)
    return Cluster(POLICIES[match[1]], match[2]) if match else None


def variant_of(name: str) -> Variant | None:
    """Of a readable name; None for a kernel that is not persistent."""
    match = re.fullmatch(r"(forward|backward)_kernel<(.+), (\w+), (\d+)>", name)
    if match is None:
        return None
    which, policy, cell, blocks = match.groups()
    return Variant(which == "backward", POLICIES[policy], cell, int(blocks))


def broken_rules(kernels: Kernels, archs: list[str]) -> Iterator[str]:
    """kernels: by readable names."""
    found = {v.policy for v in map(variant_of, kernels) if v}
    if missing := set(POLICIES.values()) - found:
        yield f"there must be persistent kernels of every policy, got none of {sorted(missing)}"
    for name, codes in kernels.items():
        variant = variant_of(name)
        if sorted(codes) != sorted(archs):
            yield f"{variant or name}: must be compiled for {archs}, got {[*codes]}"
        for arch, code in codes.items():
            # On sm_80, without clusters, the kernel is empty.
            cluster = None if arch.startswith("sm_8") else cluster_of(name)
            for rule in broken_rules_of(code, variant or cluster):
                yield f"{variant or name}, {arch}: {rule}"


def broken_rules_of(code: Code, variant: Variant | Cluster | None) -> Iterator[str]:
    if code.local:
        yield f"must have no stack and spill nothing, got {code.local} bytes of local memory"
    if variant is None:
        return
    yield from broken_rules_of_products(code, variant)
    if isinstance(variant, Cluster):
        return
    promised, warps = variant.promise()
    blocks = blocks_of_registers(code.registers, warps)
    if blocks < promised:
        yield (
            f"an SM must have registers for {promised} blocks, got {code.registers} of a thread, "
            f"which leaves room for {blocks}"
        )


def broken_rules_of_products(code: Code, variant: Variant | Cluster) -> Iterator[str]:
    if variant.policy != "f32":
        if code.tensor == 0:
            yield "must multiply in the tensor cores, got none of their instructions"
    elif code.tensor or code.ffma < FEWEST_FFMA[variant.cell]:
        yield (
            f"must multiply exactly, by at least {FEWEST_FFMA[variant.cell]} FFMA and none of the "
            f"tensor cores' instructions, got {code.ffma} and {code.tensor}"
        )


def table(kernels: Kernels, archs: list[str]) -> str:
    """kernels: by readable names."""
    persistent, others = [], []
    for name, codes in sorted(kernels.items()):
        variant = variant_of(name)
        promised, warps = variant.promise() if variant else (0, 0)
        cells = [""] * len(archs)
        for arch, code in codes.items():
            cell = f"{code.registers} / {code.shared}"
            if variant:
                products = code.ffma if variant.policy == "f32" else code.tensor
                cell += f" / {blocks_of_registers(code.registers, warps)} / {products}"
            cells[archs.index(arch)] = cell
        if variant:
            persistent.append((variant, [str(variant), *cells, str(promised), *variant.on_h100()]))
        else:
            others.append([name, *cells, "", "", ""])
    heading = ["kernel", *archs, "planned", "H", "dynamic"]
    rows = [heading, ["---"] * len(heading), *(row for _, row in sorted(persistent)), *others]
    return f"""\
# Kernels of this build

Of each architecture: registers of a thread / bytes of static shared memory, from sm_90 on with 1024
of the system's; of a persistent kernel also / blocks for which an SM has registers / instructions
of the tensor cores (f32: FFMA). `planned`: blocks for which the plan takes an SM's registers to
have room. `H`: the largest multiple of {BLOCK} that an H100 runs by the kernel, in one direction
and with B = {BATCH}; `dynamic`: a block's bytes of dynamic shared memory then.

""" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def find_cuobjdump() -> str:
    """The toolkit's, or else that in PATH, or else that of the package nvidia-cuda-cuobjdump."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    folders = []
    if nvcc is not None:  # it may be a link or a wrapper script: only nvcc knows its toolkit
        dryrun = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        said = subprocess.run(dryrun, capture_output=True, text=True, check=True).stderr
        folders += [f"{top}/bin" for top in re.findall(r"TOP=(\S+)", said)]
    folders += os.environ.get("PATH", "").split(os.pathsep)
    package = importlib.util.find_spec("nvidia")
    for place in (package and package.submodule_search_locations) or ():
        folders += map(str, Path(place).glob("cu*/bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        raise SystemExit(
            "[kernel_table] needs cuobjdump, found none in nvcc's toolkit or PATH: install it, for "
            "example by `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`"
        )
    return found


def dump(cuobjdump: str, what: str, library: Path) -> Iterator[str]:
    # It looks for nvdisasm in PATH.
    path = f"{Path(cuobjdump).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [cuobjdump, what, str(library)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path}
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode != 0:
        raise SystemExit(f"[kernel_table] {' '.join(command)} failed, see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the table, as Markdown")
    args = parser.parse_args()
    cuobjdump = find_cuobjdump()
    kernels = read_resources(dump(cuobjdump, "--dump-resource-usage", args.library))
    count_instructions(dump(cuobjdump, "--dump-sass", args.library), kernels)
    kernels = readable(kernels)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    archs = list(dict.fromkeys(arch for codes in kernels.values() for arch in codes))
    args.out.write_text(table(kernels, archs))
    broken = list(broken_rules(kernels, _C.cuda_archs))
    print(f"{len(kernels)} kernels for {archs}, {len(broken)} broken rules: {args.out}")
    if broken:
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    main()

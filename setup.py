"""Builds libops.so (the operators, LibTorch stable ABI) and _C (build information, pybind11) with
ninja, from csrc/sources.json. CONTRIBUTING.md lists the environment variables that it reads."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pybind11
import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # else it rejects pyproject.toml
    raise SystemExit(f"building needs setuptools 77 or later, got {setuptools.__version__}")

ROOT = Path(__file__).resolve().parent
# Not setuptools' build_temp, which is a new folder at every editable install.
FOLDER = f"build/ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
SOURCES = json.loads((ROOT / "csrc/sources.json").read_text())
TORCH_TARGET = "0x020b000000000000"  # the oldest torch that the operators load in: 2.11
CUDA_ARCHS = ("8.0", "9.0a", "10.0", "12.0")
CXX = shlex.split(os.environ.get("CXX", "c++"))
WERROR = os.environ.get("RNN_FUSED_WERROR") == "1"
CXX_FLAGS = SOURCES["flags"] + ["-Werror"] * WERROR
# Tile registers in memory, for tests where the processor has none.
CPU_FLAGS = ["-DRNN_FUSED_EMULATED_AMX"] * (os.environ.get("RNN_FUSED_EMULATED_AMX") == "1")
RULES = f"""\
builddir = {FOLDER}
rule compile
  command = $compiler $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = $compiler -shared -o $out $in $flags
  description = link $out
"""


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: str
    archs: list[str]  # that device code is made for: "80", "90a", ...
    gencode: list[str]  # the same as flags of nvcc, with PTX where it was asked for
    include_dirs: list[str]
    library_dirs: list[str]


def find_cuda() -> Cuda | None:
    """The CUDA toolkit to build with, or None for a build without CUDA."""
    wish = os.environ.get("RNN_FUSED_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"RNN_FUSED_CUDA must be auto, 0 or 1, got {wish!r}")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if wish == "1" and nvcc is None:
        raise SystemExit(f"RNN_FUSED_CUDA=1 needs nvcc, found none in {home}/bin or PATH")
    if wish == "0" or nvcc is None:
        return None
    archs, gencode = parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), nvcc)
    # nvcc may be a link or a wrapper script: only nvcc itself knows where its toolkit is.
    toolkit = output_of(nvcc, "--dryrun", "-x", "cu", os.devnull)
    return Cuda(
        nvcc=nvcc,
        version=re.findall(r"release (\d+\.\d+)", output_of(nvcc, "--version"))[0],
        archs=archs,
        gencode=gencode,
        include_dirs=re.findall(r'"-I([^"]+)"', re.findall("INCLUDES=.*", toolkit)[0]),
        library_dirs=re.findall(r'"-L([^"]+)"', re.findall("LIBRARIES=.*", toolkit)[0]),
    )


def output_of(command: str, *args: str) -> str:
    """What the command prints, on both of its streams."""
    return subprocess.check_output([command, *args], stderr=subprocess.STDOUT, text=True)


def parse_archs(wish: str, nvcc: str) -> tuple[list[str], list[str]]:
    """TORCH_CUDA_ARCH_LIST, e.g. "8.0 9.0a+PTX", as Cuda.archs and Cuda.gencode. An empty one means
    those of CUDA_ARCHS that this nvcc knows."""
    items = re.findall(r"[^\s;,]+", wish)
    if not items:
        known = output_of(nvcc, "--list-gpu-code").split()
        items = [a for a in CUDA_ARCHS if f"sm_{a.replace('.', '').rstrip('a')}" in known]
    archs, gencode = [], []
    for item in items:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(f'TORCH_CUDA_ARCH_LIST must be like "8.0 9.0a+PTX", got {wish!r}')
        arch = match[1] + match[2]
        archs.append(arch)
        for code in ["sm", "compute"] if match[3] else ["sm"]:
            gencode.append(f"-gencode=arch=compute_{arch},code={code}_{arch}")
    return archs, gencode


def units(group: str) -> list[dict]:
    """One group of sources.json, without the sources of other processors."""
    return [u for u in SOURCES[group] if u.get("machine", platform.machine()) == platform.machine()]


@dataclass
class NinjaFile:
    """The build statements so far. Paths are absolute or relative to ROOT."""

    cuda: Cuda | None
    text: str = RULES

    def add(self, rule: str, inputs: list[str], out: str, compiler: list, flags: list) -> str:
        self.text += f"build {FOLDER}/{out}: {rule} {' '.join(inputs)}\n"
        for name, words in (("compiler", compiler), ("flags", flags)):
            self.text += f"  {name} = {shlex.join(words).replace('$', '$$')}\n"
        return f"{FOLDER}/{out}"

    def compile(self, group: str, cxx_flags: list[str]) -> list[str]:
        """The objects of one group of sources.json; cxx_flags are not for its CUDA sources."""
        objects = []
        for unit in units(group):
            source = unit["source"]
            nvcc = source.endswith(".cu")
            compiler, flags = self.nvcc() if nvcc else (CXX, CXX_FLAGS + cxx_flags)
            flags = flags + unit.get("flags", []) + ["-I."]
            objects += [self.add("compile", [source], f"{source}.o", compiler, flags)]
        return objects

    def nvcc(self) -> tuple[list[str], list[str]]:
        host = [flag for flag in CXX_FLAGS if not flag.startswith(("-std", "-O"))]
        flags = ["-std=c++20", "-O3", "-Xcompiler=" + ",".join(host)]
        flags += ["-Xptxas=-warn-spills" + ",-Werror" * WERROR]
        compiler = [self.cuda.nvcc, *([f"-ccbin={CXX[0]}"] if "CXX" in os.environ else [])]
        return compiler, flags + self.cuda.gencode


def write_ninja() -> dict[str, str]:
    """Writes build.ninja; returns the file that becomes each extension."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        raise SystemExit("building rnn_fused needs torch: install it first")
    torch_dir = Path(torch.origin).parent
    torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-isystem{torch_dir}/include"]
    cuda = find_cuda()
    ninja = NinjaFile(cuda)
    cpu = ninja.compile("cpu", CPU_FLAGS)
    plan = ninja.compile("plan", [])
    ops = cpu + plan + ninja.compile("binding", torch_flags)
    ops_flags = [f"-L{torch_dir}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    ops_flags += ["-Wl,--as-needed", "-Wl,-rpath,$ORIGIN/../torch/lib", "-Wl,-z,defs"]
    if cuda is not None:
        ops += ninja.compile("kernels", [])
        ops += ninja.compile("cuda", torch_flags + [f"-isystem{d}" for d in cuda.include_dirs])
        ops_flags += [f"-L{d}" for d in cuda.library_dirs] + ["-Wl,--exclude-libs,ALL"]
        ops_flags += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    facts = {
        "TORCH_TARGET": TORCH_TARGET,
        "ISAS": ",".join(unit["isa"] for unit in units("cpu") if "isa" in unit),
        "CUDA_VERSION": cuda.version if cuda else "",
        "CUDA_ARCHS": ",".join(f"sm_{arch}" for arch in cuda.archs) if cuda else "",
    }
    module_flags = [f'-DRNN_FUSED_{name}="{fact}"' for name, fact in facts.items()]
    headers = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    module = ninja.compile("module", module_flags + headers)
    # The module tells which instruction set is in use, and the plans; that needs no kernel.
    module += [obj for obj in cpu if obj.endswith(("select.cpp.o", "cpu/plan.cpp.o"))] + plan
    built = {
        "rnn_fused.libops": ninja.add("link", ops, "libops.so", CXX, ops_flags),
        "rnn_fused._C": ninja.add("link", module, "_C.so", CXX, []),
    }
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    (ROOT / FOLDER / "build.ninja").write_text(ninja.text)
    return built


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libops"):  # has no Python symbols: no Python version in its name
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        built = write_ninja()
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        ninja = [sys.executable, "-m", "ninja", "-f", f"{FOLDER}/build.ninja", *jobs]
        if subprocess.run(ninja, cwd=ROOT).returncode != 0:
            raise SystemExit("building rnn_fused failed, see above")
        for name, file in built.items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # a process that has it loaded keeps the old one
            shutil.copy2(ROOT / file, target)


setup(
    ext_modules=[Extension("rnn_fused.libops", []), Extension("rnn_fused._C", [])],
    cmdclass={"build_ext": BuildNative},
)

"""The native libraries, the source distribution and the wheel are what users of other machines,
other torch builds and other folders need."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import rnn_fused

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(rnn_fused.__file__).parent
SOURCES = [
    unit["source"]
    for group, units in json.loads((ROOT / "csrc/sources.json").read_text()).items()
    if group != "flags"
    for unit in units
]
BUILD = (sys.executable, "setup.py", "-q", "build_ext")


def attempt(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    full_env = {**os.environ, **env}
    return subprocess.run(
        command, cwd=cwd, env=full_env, capture_output=True, text=True, check=False
    )


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    done = attempt(*command, cwd=cwd, **env)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_build_info() -> None:
    info = rnn_fused.build_info()
    assert info["version"] == rnn_fused.__version__ == version("rnn_fused")
    assert re.match(r"(g\+\+|clang) \d+", info["compiler"])
    assert info["torch_target"] == "2.11"
    assert info["threads"] == torch.get_num_threads()
    cpu = info["cpu"]
    assert cpu["compiled"][0] == "portable"
    assert set(cpu["supported"]) <= set(cpu["compiled"])
    assert cpu["selected"] in cpu["supported"]
    assert info["cuda"] is None or all(
        re.fullmatch(r"sm_\d+[af]?", a) for a in info["cuda"]["archs"]
    )


# Each in a new process, since the choice is made once in each. The module needs no torch.
PRINT_ISA = (sys.executable, "-c", "import _C; print(_C.selected_isa())")


def test_every_supported_isa_can_be_chosen() -> None:
    for isa in rnn_fused.build_info()["cpu"]["supported"]:
        assert run(*PRINT_ISA, cwd=PACKAGE, RNN_FUSED_CPU_ISA=isa).strip() == isa


def test_unknown_isa_is_an_error() -> None:
    done = attempt(*PRINT_ISA, cwd=PACKAGE, RNN_FUSED_CPU_ISA="sse9")
    assert done.returncode == 1
    message = r"ValueError: RNN_FUSED_CPU_ISA must be one of portable.*, got 'sse9'"
    assert re.search(message, done.stderr)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RNN_FUSED_CUDA", "2", "RNN_FUSED_CUDA must be auto, 0 or 1, got '2'"),
        ("TORCH_CUDA_ARCH_LIST", "Hopper", "must be like \"8.0 9.0a+PTX\", got 'Hopper'"),
    ],
)
def test_build_refuses_bad_settings(variable: str, value: str, message: str) -> None:
    if variable == "TORCH_CUDA_ARCH_LIST" and rnn_fused.build_info()["cuda"] is None:
        pytest.skip("needs a CUDA toolkit")
    done = attempt(*BUILD, **{variable: value})
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_libops_needs_no_python() -> None:
    dynamic = run("readelf", "--wide", "--dynamic", "--dyn-syms", PACKAGE / "libops.so")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert not [name for name in needed if "python" in name or "cuda" in name]
    assert "$ORIGIN/../torch/lib" in dynamic
    undefined = re.findall(r"\bUND\s+(\S+)", dynamic)
    assert undefined, "readelf listed no symbol"
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    if rnn_fused.build_info()["cuda"] is not None:
        assert re.search(r"WEAK .* UND aoti_torch_get_current_cuda_stream", dynamic)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_library_has_code_for_this_gpu(device: str) -> None:
    arch = torch.ops.rnn_fused.cuda_probe(torch.empty(0, device=device))
    major, minor = torch.cuda.get_device_capability()
    # Code for sm_80 runs on 8.6 too, within one major version.
    assert major * 100 <= arch <= major * 100 + minor * 10


def test_sources_json_lists_every_source() -> None:
    on_disk = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in {".cpp", ".cu"}
    ]
    assert sorted(SOURCES) == sorted(on_disk)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.mark.slow
def test_sdist_has_every_source(sdist: Path) -> None:
    headers = list((ROOT / "csrc").rglob("*.h"))
    python = [path for path in PACKAGE.rglob("*.py*") if path.suffix in {".py", ".pyi"}]
    paths = {path.relative_to(ROOT).as_posix() for path in headers + python}
    others = {"CMakeLists.txt", "LICENSE", "csrc/sources.json", "pyproject.toml", "setup.py"}
    assert [name for name in {*SOURCES, *paths, *others} if not (sdist / name).is_file()] == []
    assert list(sdist.glob("rnn_fused/*.so")) == []


@pytest.fixture(scope="module")
def built_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source distribution, compiled; the objects of this tree are taken along, where
    there are any, so that only what differs is compiled again."""
    folder = tmp_path_factory.mktemp("built") / "sdist"
    shutil.copytree(sdist, folder)
    for objects in (ROOT / "build").glob("ninja-*"):
        shutil.copytree(objects, folder / "build" / objects.name)
    run(*BUILD, cwd=folder)
    return folder


@pytest.mark.slow
def test_build_compiles_only_what_changed(built_sdist: Path) -> None:
    def build() -> list[tuple[str, str]]:
        steps = re.findall(r"^\[\d+/\d+\] (\w+) (\S+)", run(*BUILD, cwd=built_sdist), re.MULTILINE)
        return [(step, Path(file).name) for step, file in steps]

    assert build() == []
    (built_sdist / "csrc/binding/module.cpp").touch()
    assert build() == [("compile", "module.cpp"), ("link", "_C.so")]
    (built_sdist / "csrc/cuda/probe.h").touch()
    compiled = {file for step, file in build() if step == "compile"}
    assert compiled == ({"probe.cu", "ops_cuda.cpp"} if rnn_fused.build_info()["cuda"] else set())


def requirements_of(name: str) -> set[str]:
    """The distributions that an installed one needs, itself included."""
    found: set[str] = set()
    todo = [name]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            requirements = map(Requirement, distribution(name).requires or [])
            todo += [
                r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})
            ]
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_instruction_sets_share_no_code(built_sdist: Path) -> None:
    """The linker keeps one copy of an inline function, which must not be one that was compiled for
    a CPU that this machine is not: what isa_*.cpp define is inside a namespace of its own."""
    for unit in json.loads((ROOT / "csrc/sources.json").read_text())["cpu"]:
        objects = built_sdist.glob(f"build/ninja-*/{unit['source']}.o")
        if unit.get("flags") and (path := next(objects, None)):
            symbols = re.findall(r" [uVW] (\S+)", run("nm", "--defined-only", path))
            own = f"9rnn_fused{len(unit['isa'])}{unit['isa']}"  # mangled namespaces
            shared = [s for s in symbols if own not in s and not s.startswith("DW.ref.")]
            assert shared == [], unit["source"]


@pytest.mark.slow
def test_wheel_runs_in_an_environment_with_torch_alone(built_sdist: Path, tmp_path: Path) -> None:
    """The fresh environment sees torch and what torch requires as links to this one's, which
    stands for the installation of a large package: nothing else of this one is in sight."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel_options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    run(*pip, "wheel", *wheel_options, built_sdist)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        content = {name.removeprefix("rnn_fused/") for name in archive.namelist()}
    assert {"libops.so", "py.typed", "_C.pyi", "bench/grids.json"} <= content

    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    for name in requirements_of("torch"):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    run(*pip, f"--python={python}", "install", "--no-deps", "--no-index", wheel)

    code = """
import importlib.util, sys
assert importlib.util.find_spec("numpy") is None
import torch, rnn_fused
assert rnn_fused.__file__.startswith(sys.prefix), rnn_fused.__file__
print(rnn_fused.build_info())
torch.manual_seed(0)
ours = rnn_fused.LSTM(3, 4)
theirs = torch.nn.LSTM(3, 4)
theirs.load_state_dict(ours.state_dict())
input = torch.randn(5, 2, 3)
for module in (ours, theirs):
    module(input)[0].square().sum().backward()
for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
    torch.testing.assert_close(p.grad, q.grad, msg=name)
"""
    run(python, "-W", "ignore", "-c", code, cwd=tmp_path)

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
NATIVE = {".cpp", ".cu"}


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
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


@pytest.mark.parametrize("isa", rnn_fused.build_info()["cpu"]["supported"])
def test_isa_can_be_chosen(isa: str) -> None:
    code = "import rnn_fused; print(rnn_fused.build_info()['cpu']['selected'])"
    assert run(sys.executable, "-c", code, RNN_FUSED_CPU_ISA=isa).strip() == isa


def test_unknown_isa_is_an_error() -> None:
    code = """
import pytest, rnn_fused
with pytest.raises(ValueError, match="sse9"):
    rnn_fused.build_info()
"""
    run(sys.executable, "-c", code, RNN_FUSED_CPU_ISA="sse9")


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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_library_has_code_for_this_gpu() -> None:
    arch = torch.ops.rnn_fused.cuda_probe(torch.empty(0, device="cuda"))
    major, minor = torch.cuda.get_device_capability()
    # Code for sm_80 runs on 8.6 too, within one major version.
    assert major * 100 <= arch <= major * 100 + minor * 10


def test_sources_json_lists_every_source() -> None:
    on_disk = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in NATIVE
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
    files = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    headers = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.h")}
    python = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    others = {"CMakeLists.txt", "LICENSE", "csrc/sources.json", "pyproject.toml", "setup.py"}
    assert {*SOURCES, *headers, *python, *others} <= files
    assert not [name for name in files if name.endswith((".so", ".o"))]


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
def test_wheel_runs_in_an_environment_with_torch_alone(sdist: Path, tmp_path: Path) -> None:
    """The fresh environment sees torch and what torch requires as links to this one's, which
    stands for the installation of a large package: nothing else of this one is in sight."""
    # The compiled objects, where this tree has them, save compiling the same sources again.
    if (ROOT / "build").is_dir():
        shutil.copytree(ROOT / "build", sdist / "build", ignore=shutil.ignore_patterns("lib.*"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel_options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    run(*pip, "wheel", *wheel_options, sdist)
    wheel = next(tmp_path.glob("*.whl"))

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

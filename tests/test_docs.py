"""What README.md and docs/ show is true: the Python runs, the commands parse, the links lead on,
and the site builds from it and loads nothing from elsewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from rnn_fused.bench.__main__ import parse

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "benchmarks", "examples")
PAGES = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
    *sorted(str(p.relative_to(ROOT)) for f in FOLDERS for p in (ROOT / f).rglob("*.md")),
]
ON_A_GPU = "benchmarks/gpu/"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


RUN = [page for page in PAGES if PYTHON.search(text(page)) and not page.startswith(ON_A_GPU)]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in one namespace, from top to bottom; a traceback names the line of the page."""
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    source, namespace = text(page), dict[str, Any]()
    for block in PYTHON.finditer(source):
        before = source.count("\n", 0, block.start(1))
        exec(compile("\n" * before + block[1], page, "exec"), namespace)


def test_all_python_is_run() -> None:
    """No block is overlooked for its form."""
    assert {"README.md", "docs/drop-in.md", "docs/options.md"} < set(RUN)
    for page in PAGES:
        assert text(page).count("```python") == len(PYTHON.findall(text(page))), page


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_benchmark_commands_parse(page: str) -> None:
    commands = re.findall(r"^python -m rnn_fused\.bench(?: +(.*))?$", text(page), re.MULTILINE)
    assert commands
    for arguments in commands:
        parse(shlex.split(arguments, comments=True))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_on(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", FENCED.sub("", text(page)))
    folder = (ROOT / page).parent
    assert [link for link in links if not (folder / link).exists()] == []


class Loaded(HTMLParser):
    """What a browser loads to show a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        of_tag = given.get("href") if tag == "link" else given.get("src")
        self.addresses += [of_tag] if of_tag else []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strict: a page that is not in the navigation, a link or an anchor that leads nowhere and
    maths that cannot be read are errors."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert site / "api" / "layers.html" in pages
    addresses = {(page.name, address) for page in pages for address in Loaded(page).addresses}
    assert any(address.endswith(".css") for _, address in addresses)
    assert [pair for pair in addresses if re.match(r"(?:[a-z]+:)?//", pair[1])] == []
    styles = {path.name: path.read_text(encoding="utf-8") for path in site.rglob("*.css")}
    outside = re.compile(r"(?:url\(|@import )[\"']?(?:https?:)?//")
    assert [name for name, style in styles.items() if outside.search(style)] == []


@pytest.mark.slow
def test_site_shows_maths_and_drawings(site: Path) -> None:
    options = (site / "options.html").read_text(encoding="utf-8")
    assert "<math" in options
    for page in site.rglob("*.html"):
        shown = page.read_text(encoding="utf-8")
        assert "arithmatex" not in shown, page
        maths = re.findall(r"<math.*?</math>", shown, re.DOTALL)
        # What latex2mathml does not know it leaves as it is.
        assert [formula for formula in maths if "\\" in formula or "&amp;" in formula] == []
    overview = (site / "performance-overview.html").read_text(encoding="utf-8")
    drawings = {path.name for path in (ROOT / "docs" / "images").glob("*.svg")}
    assert drawings
    assert overview.count('<svg class="drawing"') == 2
    assert (site / "gpu.html").read_text(encoding="utf-8").count('<svg class="drawing"') == 1

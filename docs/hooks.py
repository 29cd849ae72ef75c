"""What mkdocs does not do by itself: pages that come from outside docs/, and maths as MathML.

Links are written for the repository, relative to the file that they stand in, so that they lead on
there as well. In the site a link to a source file leads to a page that shows it.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # their places in the site
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmark.md",
    "benchmarks/gpu/README.md": "benchmark-gpu.md",
    "benchmarks/gpu/QUEUE.md": "gpu-queue.md",
    "examples/README.md": "examples.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)\s#]+)(?=[)#])")
MATHS = re.compile(r'<(?:span|div) class="arithmatex">(\\[(\[])(.*?)\\[)\]]</(?:span|div)>', re.S)
DRAWING = re.compile(r'<img alt="([^"]*)" src="(images/[^"]*\.svg)" ?/?>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    linked = {target for file in files.documentation_pages() for target in _targets(file)}
    for path in sorted(linked):
        if _place(path) != (place := f"source/{path}.md"):
            continue
        suffix = Path(path).suffix.removeprefix(".")
        language = {"h": "cpp", "cu": "cuda", "cuh": "cuda"}.get(suffix, suffix)
        text = (ROOT / path).read_text(encoding="utf-8")
        page = f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n`````{language}\n{text}\n`````\n"
        files.append(
            File.generated(config, place, content=page, inclusion=InclusionLevel.NOT_IN_NAV)
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.abs_src_path is None:
        return markdown

    def rewritten(link: re.Match[str]) -> str:
        path = _in_repository(page.file, link[1])
        if path is None:
            return link[1]
        return os.path.relpath(_place(path), PurePosixPath(page.file.src_uri).parent)

    return LINK.sub(rewritten, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    # Drawings in the page itself take its colours, light or dark.
    def drawing(image: re.Match[str]) -> str:
        svg = (ROOT / "docs" / image[2]).read_text(encoding="utf-8")
        return svg.replace("<svg", f'<svg class="drawing" role="img" aria-label="{image[1]}"', 1)

    content = DRAWING.sub(drawing, content)

    def mathml(maths: re.Match[str]) -> str:
        display = "block" if maths[1] == r"\[" else "inline"
        return convert(html.unescape(maths[2]), display=display)

    return MATHS.sub(mathml, content)


def _targets(file: File) -> list[str]:
    """The files of the repository that a page links to."""
    found = (_in_repository(file, link[1]) for link in LINK.finditer(file.content_string))
    return [path for path in found if path is not None]


def _in_repository(file: File, link: str) -> str | None:
    """From the root, where there is such a file."""
    if file.abs_src_path is None:
        return None
    target = Path(os.path.normpath(Path(file.abs_src_path).parent / link))
    if not target.is_file() or not target.is_relative_to(ROOT):
        return None
    return target.relative_to(ROOT).as_posix()


def _place(path: str) -> str:
    """Where a file of the repository is in the site's sources."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"source/{path}.md")

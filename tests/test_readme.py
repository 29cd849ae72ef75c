"""What README.md and docs/ show is true: the Python runs, the commands parse, the links lead on."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from rnn_fused.bench.__main__ import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/design.md", "docs/performance.md"]


@pytest.mark.slow
def test_python_runs() -> None:
    """All blocks in one namespace, from top to bottom; a traceback names the line of README.md."""
    torch._dynamo.reset()
    namespace: dict[str, Any] = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        before = README.count("\n", 0, block.start(1))
        exec(compile("\n" * before + block[1], "README.md", "exec"), namespace)


def test_benchmark_commands_parse() -> None:
    commands = re.findall(r"^python -m rnn_fused\.bench *(.*)$", README, re.MULTILINE)
    assert commands
    for arguments in commands:
        parse(shlex.split(arguments, comments=True))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_on(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    folder = (ROOT / page).parent
    assert [link for link in links if not (folder / link).exists()] == []

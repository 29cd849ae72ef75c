"""What our docstrings say in ways of their own, as griffe's Google style wants it."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Function, Object


def paragraph(section: re.Match[str]) -> str:
    return f"**Returns:** {textwrap.dedent(section[1])}"


REWRITTEN: tuple[tuple[str, Any], ...] = (
    # "Args: those of ...", with parameters below or without.
    (r"^Args: (.+(?:\n\S.*)*)(?=\n )", r"The arguments: \1\n\nArgs:"),
    (r"^Args: (.+)", r"The arguments: \1"),
    # Of the call, beside those of the constructor.
    (r"^Inputs:$", "Args: Inputs:"),
    # Sentences, whose words before a colon are no type.
    (r"^Returns:\n((?: +.*\n?)+)", paragraph),
    # Of "Raises:", what has no type.
    (r"^ +(Else as .*)$", r"\n\1"),
)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if isinstance(obj, Function) and obj.overloads:
            # One takes anything, for those who call it as they call torch.nn's.
            obj.overloads = [one for one in obj.overloads if "kwargs" not in one.parameters]
        if obj.docstring is None:
            return
        for pattern, replacement in REWRITTEN:
            obj.docstring.value = re.sub(pattern, replacement, obj.docstring.value, flags=re.M)

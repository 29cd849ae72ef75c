"""Optional packages: found, or asked for in one clear sentence."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """An optional package is not installed."""


def require(module: str, package: str | None = None) -> Any:
    """Import `module`, or say which command installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"the benchmarks need {package or module}, which cannot be imported ({error}); "
            "install it with: pip install rnn_fused[bench]"
        ) from error

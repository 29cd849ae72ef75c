"""The comparison of two commits' benchmarks, from what pytest-benchmark writes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    path = ROOT / "benchmarks" / "compare.py"
    spec = importlib.util.spec_from_file_location("compare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module
    spec.loader.exec_module(module)
    return module


def run(**tests: tuple[float, float | None]) -> dict[str, Any]:
    """A file of pytest-benchmark, in part: median in seconds, and the ratio to torch.nn."""
    return {
        "benchmarks": [
            {
                "fullname": name,
                "stats": {"median": median},
                "extra_info": {} if ratio is None else {"ratio_to_torch": ratio},
            }
            for name, (median, ratio) in tests.items()
        ]
    }


def test_tests_of_both_are_compared_by_their_medians(compare: ModuleType) -> None:
    base = compare.collect([run(a=(1.0, 2.0), b=(4.0, None), gone=(1.0, 1.0)) for _ in range(2)])
    this = compare.collect([run(a=(1.0, 1.0), b=(4.0, None)), run(a=(5.0, 1.0), new=(1.0, 1.0))])
    first, second = compare.compare(base, this)
    assert (first.name, first.time, first.against_torch) == ("a", 3.0, 2.0)
    assert (second.name, second.time, second.against_torch) == ("b", 1.0, None)


@pytest.mark.parametrize(
    ("median", "ratio", "slower"),
    [
        (2.0, 1.0, True),
        (2.0, 2.0, False),  # the machine was slow: torch.nn too
        (1.0, 1.0, False),
        (2.0, None, True),
        (1.05, 1.0, False),
    ],
)
def test_a_regression_shows_in_every_measure(
    compare: ModuleType, median: float, ratio: float | None, slower: bool
) -> None:
    base = compare.collect([run(a=(1.0, 2.0))])
    (line,) = compare.compare(base, compare.collect([run(a=(median, ratio))]))
    assert line.slower(1.1) == slower
    assert ("SLOWER" in compare.table([line], 1.1)) == slower


def test_an_unknown_commit_is_an_error(
    compare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert compare.main(["no-such-commit"]) == 2
    assert "git rev-parse --verify no-such-commit" in capsys.readouterr().err

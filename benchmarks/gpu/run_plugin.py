"""A pytest plugin for tests that may hang or break the device: run.py loads it by -p.

It appends to the journal (environment variable JOURNAL) one JSON object a line:

    {"left": 12}                     tests that this session is going to run
    {"start": ID, "at": SECONDS}     a test begins; without an end, it is what ended the process
    {"test": ID, "outcome": "passed", "failed" or "skipped", "seconds": S, "message": TEXT}

Tests with an outcome in the journal are not run again. A test that takes longer than EACH_S
seconds ends the process with its traceback, from a thread that no hanging call can stop. So does a
test after which the device cannot be used any more. run.py starts a new process for the rest.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LOST_DEVICE = 77  # exit status
KEPT = 3000  # characters of a failure
# Of the CUDA errors that a process does not recover from.
STICKY = (
    "illegal memory access", "unspecified launch failure", "misaligned address",
    "illegal instruction", "device-side assert", "hardware stack error", "launch timed out",
)  # fmt: skip

_stderr = os.dup(2)  # before pytest redirects it


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Its records; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def is_sticky(text: str) -> bool:
    """Whether the failure's text speaks of a lost device."""
    return any(error in text for error in STICKY)


class Journal:
    def __init__(self, path: Path, each_s: float) -> None:
        self.path, self.each_s = path, each_s
        self.reports: list[pytest.TestReport] = []

    def write(self, **record: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        done = {record.get("test") for record in read_journal(self.path)}
        items[:] = [item for item in items if item.nodeid not in done]
        self.write(left=len(items))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.reports = []
        self.write(start=item.nodeid, at=time.time())
        faulthandler.dump_traceback_later(self.each_s, exit=True, file=_stderr)
        try:
            result = yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.finish(item.nodeid)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def finish(self, nodeid: str) -> None:
        outcomes = [report.outcome for report in self.reports]
        outcome = next((o for o in ("failed", "skipped") if o in outcomes), "passed")
        # A skip's longrepr is (file, line, reason).
        texts = [
            r.longrepr[2] if isinstance(r.longrepr, tuple) else r.longreprtext
            for r in self.reports
            if r.outcome != "passed"
        ]
        message = "\n".join(texts)
        seconds = round(sum(report.duration for report in self.reports), 3)
        self.write(test=nodeid, outcome=outcome, seconds=seconds, message=message[-KEPT:])
        if outcome == "failed" and is_sticky(message):
            sys.stdout.flush()
            os._exit(LOST_DEVICE)


def pytest_configure(config: pytest.Config) -> None:
    journal = Journal(Path(os.environ["JOURNAL"]), float(os.environ["EACH_S"]))
    config.pluginmanager.register(journal, "journal")

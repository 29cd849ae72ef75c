"""The folder of a run: its rows as they come, what else it found, and going on after a stop."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .records import (
    Environment,
    Row,
    from_columns,
    read_rows,
    to_lines,
    write_csv,
    write_json,
    write_text,
)

ROWS, TABLE, CONTENT = "rows.jsonl", "rows.csv", "bench.json"
SAME = ("processor", "device", "driver", "tf32", "threads", "torch", "rnn_fused", "python")
BY_CASE = "grid"  # the section that goes on where it stopped; others are run again as a whole


class ResumeError(ValueError):
    """A run cannot go on from what lies in its folder."""


class Results:
    """Rows, failures and the content of bench.json, in memory and in a folder.

    Rows are in rows.jsonl as soon as they are measured. `save` writes the rest.
    """

    def __init__(self, folder: Path, where: Environment, method: Mapping[str, Any]) -> None:
        """Begin in `folder`, which is made. method: what rows must share to be compared."""
        self.folder, self.where, self.method = folder, where, dict(method)
        self.rows: list[tuple[Row, Environment]] = []
        self.content: dict[str, Any] = {}
        self.failures: list[str] = []
        self.refused: dict[tuple[str, str], int] = {}  # (provider, reason): cases of the grid
        self.finished: list[str] = []  # sections with nothing left to do
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Drop what an earlier run left."""
        self._write_rows()
        self.save()

    def resume(self) -> None:
        """Take over what an earlier run left: the grid's rows, and sections that were finished.
        Cases with a failure are run again.

        Raises:
            ResumeError: it ran elsewhere, with other versions, at another commit or otherwise.
        """
        path = self.folder / ROWS
        if not path.exists():
            raise ResumeError(f"there is nothing to resume in {self.folder}: it has no {ROWS}")
        try:
            found = read_rows(path)
            content = json.loads((self.folder / CONTENT).read_text(encoding="utf-8"))
            places = [
                *(where for _, where in found),
                from_columns(content["environment"], Environment),
            ]
            method, failures, finished = (content[k] for k in ("method", "failures", "finished"))
        except (OSError, KeyError, ValueError) as error:
            raise ResumeError(f"cannot resume {self.folder}: {error!r}") from error
        for where in places:
            for name in (*SAME, "commit"):
                self._compare(name, getattr(where, name), getattr(self.where, name))
        for name, value in method.items():
            self._compare(name, value, self.method.get(name))
        self.finished = finished
        self.content = {name: content[name] for name in self.finished}
        grid = content.get(BY_CASE, {})
        self.refused = {(r["provider"], r["reason"]): r["cases"] for r in grid.get("refused", [])}
        failed = "\n".join(failures)
        kept = (BY_CASE, *self.finished)
        self.rows = [
            (row, where)
            for row, where in found
            if row.section in kept and f"] {row.problem} {row.dtype} {row.pass_}: " not in failed
        ]
        self._write_rows()

    def _compare(self, name: str, before: Any, now: Any) -> None:
        if before != now:
            raise ResumeError(
                f"cannot resume {self.folder}: its {name} was {before!r} and is now {now!r}; "
                "choose another --output"
            )

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, in memory and on disk."""
        added = [(row, self.where) for row in rows]
        self.rows += added
        with (self.folder / ROWS).open("a", encoding="utf-8") as file:
            file.write(to_lines(added))  # in one write

    def of_section(self, section: str) -> list[Row]:
        """The rows of one section."""
        return [row for row, _ in self.rows if row.section == section]

    def all_content(self) -> dict[str, Any]:
        """What is in bench.json."""
        return {
            "environment": asdict(self.where),
            "method": self.method,
            "finished": self.finished,
            "failures": self.failures,
            **self.content,
        }

    def save(self) -> list[Path]:
        """Write the table and the content."""
        table, content = self.folder / TABLE, self.folder / CONTENT
        write_csv(table, self.rows)
        write_json(content, self.all_content())
        return [self.folder / ROWS, table, content]

    def _write_rows(self) -> None:
        write_text(self.folder / ROWS, to_lines(self.rows))

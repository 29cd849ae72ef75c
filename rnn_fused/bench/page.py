"""The report: one page of HTML that needs nothing else, and PNG files of its pictures.

`python -m rnn_fused.bench.page PATHS... --output FOLDER` makes it of files or folders of results;
those of several machines or runs have a part of the page each.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import charts, findings, words
from .charts import Panel
from .extras import MissingExtraError, require
from .findings import OURS, STOCK, Part, problem, times
from .memory import MemoryRow
from .plot import to_png, to_svg
from .records import Environment, Row, from_columns, read_rows

TEMPLATE = Path(__file__).with_name("page.html")
TITLE = "rnn_fused against torch.nn"
CAPTIONS = {
    "ratios": "Times as fast as torch.nn: bars rnn_fused, marks others",
    "heat": "Times as fast as torch.nn, by hidden size and batch",
    "steps": "Times as fast as torch.nn, by timesteps",
    "roofline": "GFLOP/s and FLOPs per byte of weights, inputs and outputs",
    "memory": "Peak memory of a call beyond its arguments",
    "learning": "The same training with both libraries",
}
Located = tuple[Row, Environment]


@dataclass
class Found:
    """What files of results hold, each with where it was measured."""

    rows: list[Located] = field(default_factory=list)
    memory: list[tuple[MemoryRow, Environment]] = field(default_factory=list)
    contents: list[tuple[Mapping[str, Any], Environment]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # in words


def panels(part: Part) -> dict[str, list[Panel]]:
    """The pictures of a part, by the name of their file."""
    ours = findings.standings(part.compared, OURS, STOCK)
    scale = charts.all_ratios(ours)
    roofs = [charts.roofline_panel(standing, part.rows) for standing in ours]
    learnings = [findings.learning(content) for content in part.contents]
    return {
        "ratios": charts.ratios_chart(ours, part.compared),
        "heat": [charts.heat_panel(cell) for standing in ours for cell in standing.cells],
        "steps": [charts.steps_panel(standing, scale) for standing in ours],
        "roofline": [panel for panel in roofs if panel],
        "memory": [
            charts.memory_panel(name, problems)
            for name, problems in findings.memory_bars(part).items()
        ],
        "learning": [charts.learning_panel(one) for one in learnings if one],
    }


def view(part: Part, name: str, pictures: Mapping[str, Sequence[Panel]]) -> dict[str, Any]:
    """What the template shows of a part; `name` is unique in the page."""
    where = part.runs[0]
    stock = findings.against_stock(part.compared)
    rivals = findings.against_rivals(part.compared)
    ours = [standing for standing in stock if standing.ours == OURS]
    return {
        "id": name,
        "heading": words.heading(where),
        "version": f"{where.date[:10]} {where.commit}",
        "facts": words.facts(part),
        "failures": [failure for c in part.contents for failure in c.get("failures", [])],
        "ours": ours,
        "variants": [standing for standing in stock if standing.ours != OURS],
        "rivals": rivals,
        "verdict": words.verdict(ours) if ours else "",
        "losses": [(s, c) for s in (*stock, *rivals) for c in s.lost],
        "means": {standing.name: standing.mean for standing in ours},
        "count": sum(len(standing.comparisons) for standing in ours),
        "lost": sum(len(standing.lost) for standing in ours),
        "charts": {
            chart: [(p, to_svg(p, f"{name}-{chart}-{i}")) for i, p in enumerate(found)]
            for chart, found in pictures.items()
        },
        "has_roof": any(row.share for row in part.rows),
        "learnings": words.lessons(part),
        "gaps": words.gaps(part),
        "table": words.table(part.rows),
    }


def write_page(
    path: Path,
    rows: Iterable[Located],
    *,
    memory: Iterable[tuple[MemoryRow, Environment]] = (),
    contents: Iterable[tuple[Mapping[str, Any], Environment]] = (),
) -> list[Path]:
    """Write the page at `path` and a PNG file of each chart beside it; return all files.

    memory: rows of `python -m rnn_fused.bench.memory`. contents: what is in bench.json, of which
    the forecaster's training, refusals and failures are shown.

    Raises:
        MissingExtraError: matplotlib or jinja2 is missing.
    """
    jinja2 = require("jinja2")
    found = findings.parts(rows, memory, contents)
    files, views = [path], []
    for number, part in enumerate(found, 1):
        pictures = panels(part)
        views.append(view(part, f"p{number}", pictures))
        where = f"{views[-1]['heading']}, torch {part.runs[0].torch}, {views[-1]['version']}"
        prefix = f"{number}-" if len(found) > 1 else ""
        for chart, shown in pictures.items():
            file = path.with_name(f"{prefix}{chart}.png")
            if shown and to_png(file, shown, f"{CAPTIONS[chart]}\n{where}"):
                files.append(file)
    templates = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    templates.filters |= {"times": times, "problem": problem, "short": words.short}
    page = templates.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=TITLE,
        parts=views,
        overview=list(dict.fromkeys(name for view in views for name in view["means"])),
        stops=", ".join(charts.scale_stops()),
    )
    path.write_text(page + "\n", encoding="utf-8")
    return files


def files_in(path: Path) -> list[Path]:
    """The files of results at a path: itself, or those of a folder; bench.json belongs to the rows
    beside it. Of rows as JSON lines and as CSV the lines are read: a run that was killed wrote
    them last."""
    folder = path if path.is_dir() else path.parent
    tables = [path]
    if path.is_dir():
        lines = sorted(folder.glob("*.jsonl"))
        written = {file.stem for file in lines}
        tables = lines + [t for t in sorted(folder.glob("*.csv")) if t.stem not in written]
    beside = folder / "bench.json"
    wanted = path.is_dir() or path.stem == "rows"
    return tables + ([beside] if wanted and beside.exists() else [])


def read(paths: Iterable[Path]) -> Found:
    """The results at these paths; files that hold something else are named in `unreadable`."""
    results = Found()
    for file in dict.fromkeys(file for path in paths for file in files_in(path)):
        try:
            _read_file(file, results)
        except (KeyError, ValueError) as error:
            results.unreadable.append(f"{file}: {error!r}")
    return results


def _read_file(file: Path, results: Found) -> None:
    text = file.read_text(encoding="utf-8")
    if file.name == "bench.json":
        content = json.loads(text)
        results.contents.append((content, from_columns(content["environment"], Environment)))
    elif "kept_mb" in text.partition("\n")[0].split(","):
        results.memory += [
            (from_columns(line, MemoryRow), from_columns(line, Environment))
            for line in csv.DictReader(text.splitlines())
        ]
    else:
        results.rows += read_rows(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, write, say what was written; 1 if nothing was read or a package is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m rnn_fused.bench.page",
        description="One HTML page, and PNG files of its pictures, of benchmark results.",
    )
    parser.add_argument("paths", nargs="+", type=Path, help="rows.csv, rows.jsonl, memory.csv, "
                        "or folders of them")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder of report.html")
    chosen = parser.parse_args(arguments)
    try:
        results = read(chosen.paths)
        for reason in results.unreadable:
            print(f"left out {reason}", file=sys.stderr)
        if not results.rows and not results.memory:
            print("error: there are no rows at these paths", file=sys.stderr)
            return 1
        chosen.output.mkdir(parents=True, exist_ok=True)
        written = write_page(
            chosen.output / "report.html",
            results.rows,
            memory=results.memory,
            contents=results.contents,
        )
    except (OSError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for file in written:
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

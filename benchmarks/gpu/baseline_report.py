"""The short table that baseline.py prints last, from the records of its journal.

    python benchmarks/gpu/baseline_report.py DIR/baseline.jsonl [PRIORITY]

prints it again from a file, with the rows up to that priority (default 2).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from baseline_rows import PRECISIONS

Record = dict[str, Any]

# For each microbenchmark, the field that runs along a line of the table.
AXES = {
    "launch": "steps",
    "barrier": "blocks",
    "pair": "word_bytes",
    "handoff": "payload_bytes",
    "broadcast": "bytes",
    "cluster": "cluster",
    "push": "bytes",
}
PRIORITY = 2


def _label(record: Record) -> str:
    """What the results of one line have in common."""
    words = [record["bench"], record.get("how", "")]
    if record.get("exchange_bytes"):
        words.append("exchange")
    if record["bench"] == "handoff":
        words += [f"{record['word_bytes']:.0f}B", f"blocks={record['blocks']:.0f}"]
    if "clusters" in record:
        words.append("one" if record["clusters"] == 1 else "full chip")
    if record["bench"] == "push":
        words.append(f"cluster={record['cluster']:.0f}")
    return " ".join(word for word in words if word)


def micro_lines(records: list[Record]) -> Iterator[str]:
    lines: dict[str, list[str]] = {}
    for record in records:
        if record["kind"] != "micro" or "us" not in record:
            continue
        x = record[AXES[record["bench"]]]
        lines.setdefault(_label(record), []).append(f"{x:.0f}: {record['us']:.3f}")
    for label, values in lines.items():
        yield f"{label:36s} {'  '.join(values)}"


def ceiling_lines(records: list[Record]) -> Iterator[str]:
    for record in records:
        if record["kind"] != "ceiling":
            continue
        for unit in ("gb_per_s", "tflop_per_s", "relative_error"):
            if unit in record:
                name = f"{record['name']} {record.get('precision', '')}"
                yield f"{name:36s} {record[unit]:.4g} {unit}"
                break


def row_lines(records: list[Record], priority: int = PRIORITY) -> Iterator[str]:
    table: dict[str, dict[str, str]] = {}
    for record in records:
        if record["kind"] != "row" or record["priority"] > priority:
            continue
        shape = " ".join(str(record[name]) for name in ("cell", "T", "B", "I", "H"))
        label = f"{record['provider']:8s} {record['layout']:7s} {shape}"
        cells = [f"{record[k]['us']:.1f}" for k in ("forward", "train") if k in record]
        if record.get("forward", {}).get("launch_bound"):
            cells[0] += "*"
        table.setdefault(label, {})[record["precision"]] = " / ".join(cells) or "failed"
    if table:
        yield f"{'provider layout  cell T B I H':38s}" + "".join(f"{p:>20s}" for p in PRECISIONS)
    for label, cells in table.items():
        yield f"{label:38s}" + "".join(f"{cells.get(p, '-'):>20s}" for p in PRECISIONS)


def report(records: list[Record], priority: int = PRIORITY) -> str:
    """All of it: ceilings, microbenchmarks (us a step), rows (us a call), what is missing."""
    meta = records[0]
    dropped = sum(len(r["rows"]) for r in records if r["kind"] == "dropped")
    rows = sum(r["kind"] == "row" for r in records)
    failed = [r for r in records if r.get("ok") is False or "error" in r]
    lines = [
        f"{meta['device']}, torch {meta['torch']}, cuDNN {meta['cudnn']}, {meta['date']}",
        *ceiling_lines(records),
        "-- microbenchmarks, us a step --",
        *micro_lines(records),
        "-- torch.nn, us a call: forward / forward+backward; * the host sets the pace --",
        *row_lines(records, priority),
        f"{rows} rows measured, {dropped} dropped, {len(failed)} failed",
    ]
    for record in failed[:10]:
        what = record.get("key") or record.get("bench") or record.get("name")
        lines.append(f"  FAILED {what}: {record.get('error')}")
    return "\n".join(lines)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    print(
        report(
            [json.loads(line) for line in file.read_text().splitlines()],
            int(sys.argv[2]) if len(sys.argv) > 2 else PRIORITY,
        )
    )

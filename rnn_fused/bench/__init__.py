"""Benchmarks of rnn_fused, on the CPU and on CUDA: `python -m rnn_fused.bench`.

| file | what |
|---|---|
| `timer.py` | the interleaving timer: contenders take turns, ratios are paired |
| `problems.py`, `grids.json` | the sizes of the field |
| `providers.py`, `onnx_layer.py`, `jax_layer.py` | whose layer is timed |
| `workload.py` | one pass of it, verified against float64 |
| `grid.py`, `devices.py`, `irregular.py`, `forecaster.py` | the sections |
| `memory.py`, `footprint.py` | peak memory, a command of its own; the same counted from shapes |
| `records.py`, `summary.py` | the schema of every row; means, losses, worst rows |
| `results.py`, `session.py` | the folder of a run, going on after a stop; the run |
| `report.py` | tables for the terminal |
| `page.py`, `page.html` | the report, one page of HTML |
| `findings.py`, `words.py`, `charts.py`, `plot.py` | its numbers, sentences and pictures |
"""

from .problems import Problem, load_grids
from .timer import Settings, Timing, interleave
from .workload import Case, Workload, WrongResultError, admit, build, contenders

__all__ = [
    "Case",
    "Problem",
    "Settings",
    "Timing",
    "Workload",
    "WrongResultError",
    "admit",
    "build",
    "contenders",
    "interleave",
    "load_grids",
]

"""Benchmarks of rnn_fused, on the CPU and on CUDA: `python -m rnn_fused.bench`.

| file | what |
|---|---|
| `timer.py` | the interleaving timer: contenders take turns, ratios are paired |
| `problems.py`, `grids.json` | the sizes of the field |
| `providers.py`, `onnx_layer.py` | whose layer is timed |
| `workload.py` | one pass of it, verified against float64 |
| `grid.py`, `devices.py`, `ragged.py`, `forecaster.py` | the sections |
| `memory.py`, `footprint.py` | peak memory, a command of its own; the same counted from shapes |
| `records.py`, `summary.py` | the CSV schema; means, losses, worst rows |
| `report.py`, `plot.py`, `session.py` | tables, plots, and the run that makes them |
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

"""The front: `python -m rnn_fused.bench`, see `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .extras import MissingExtraError
from .problems import GATES, GRIDS, PASSES, load_grids
from .session import Options, Session
from .workload import WrongResultError

DTYPES = ("float32", "bfloat16", "float16", "float64")
SECTIONS = ("grid", "ragged", "forecaster")


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rnn_fused.bench",
        description="Time rnn_fused against torch.nn and a naive Python loop, interleaved in one "
        "process; train a forecaster with both; write CSV, JSON and plots. Without options: the "
        "everyday grid in float32 and bfloat16, inference and training, in a few minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--grid", default="everyday", help="a grid of the grid file")
    parser.add_argument("--grid-file", type=Path, default=GRIDS, help="JSON file of the grids")
    parser.add_argument("--cells", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument(
        "--pass", dest="passes", nargs="+", choices=PASSES, default=list(PASSES),
        help="inference: forward without gradients; training: forward and backward",
    )  # fmt: skip
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of the CPU work"
    )
    parser.add_argument("--time-per-row", type=float, default=1.0, help="seconds, for each case")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--steps", type=int, default=120, help="training steps of the forecaster")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive loop out")
    parser.add_argument("--quick", action="store_true", help="fewest rounds: a look, not a figure")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latest"))
    chosen = parser.parse_args(arguments)
    grids = load_grids(chosen.grid_file)
    if chosen.grid not in grids:
        parser.error(f"--grid must be one of {', '.join(grids)}, got {chosen.grid}")
    return Options(
        problems=tuple(grids[chosen.grid]),
        grid=chosen.grid,
        cells=tuple(chosen.cells),
        dtypes=tuple(getattr(torch, name) for name in chosen.dtype),
        passes=tuple(chosen.passes),
        device=chosen.device,
        threads=chosen.threads,
        time_per_row=0.0 if chosen.quick else chosen.time_per_row,
        sections=tuple(chosen.sections),
        steps=min(chosen.steps, 20) if chosen.quick else chosen.steps,
        naive=not chosen.no_naive,
        output=chosen.output,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a package is missing or a result is wrong."""
    options = parse(arguments)
    try:
        Session(options).run()
    except (MissingExtraError, WrongResultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

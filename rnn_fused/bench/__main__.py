"""The front: `python -m rnn_fused.bench`, see `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .extras import MissingExtraError
from .problems import GATES, GRIDS, PASSES, load_grids
from .providers import FAMILIES, FROZEN, PEERS, forced
from .session import LostDeviceError, Options, Session
from .workload import WrongResultError

DTYPES = ("float32", "bfloat16", "float16", "float64")
SECTIONS = ("grid", "devices", "ragged", "forecaster")
# What is run where nothing else is said, most wanted first. "cuda" stands for any accelerator.
DEFAULTS = {
    "cpu": {
        "grid": ["everyday"],
        "dtype": ["float32", "bfloat16"],
        "sections": ["grid", "ragged", "forecaster"],
        "families": [],
        "time_per_row": 1.0,
    },
    "cuda": {
        "grid": ["deepbench_train", "flashrnn", "rl", "everyday"],
        "dtype": ["bfloat16", "float16", "float32"],
        "sections": ["devices", "grid"],
        "families": ["stepwise", "persistent", "cluster"],
        "time_per_row": 0.2,
    },
}


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rnn_fused.bench",
        description="Time rnn_fused against torch.nn and a naive Python loop, interleaved in one "
        "process; train a forecaster with both; write CSV, JSON and plots. Without options: the "
        "everyday grid in float32 and bfloat16, inference and training, in a few minutes, beside "
        "ONNX Runtime (float32 inference) where it is installed. On CUDA also every family of "
        "kernels, FlashRNN and TorchRL where they are installed, the time of the recurrence alone "
        "and the memory, on the grids deepbench_train, flashrnn, rl and everyday in bfloat16, "
        "float16 and float32 (TF32, as torch.nn): give it --seconds.",
    )
    parser.add_argument("--grid", nargs="+", metavar="NAME", help="grids of the grid file")
    parser.add_argument("--grid-file", type=Path, default=GRIDS, help="JSON file of the grids")
    parser.add_argument("--cells", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument(
        "--pass", dest="passes", nargs="+", choices=PASSES, default=list(PASSES),
        help="inference: forward without gradients; training: forward and backward",
    )  # fmt: skip
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--time-per-row", type=float, help="seconds, for each case")
    parser.add_argument(
        "--seconds", type=float,
        help="for everything: training and short rows go first, and what is left out is said",
    )  # fmt: skip
    parser.add_argument("--sections", nargs="+", choices=SECTIONS)
    parser.add_argument(
        "--families", nargs="*", choices=FAMILIES, help="kernels to force, beside the plan's own"
    )
    parser.add_argument("--steps", type=int, default=120, help="training steps of the forecaster")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive loop out")
    parser.add_argument("--quick", action="store_true", help="fewest rounds: a look, not a figure")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latest"))
    chosen = parser.parse_args(arguments)
    on_cpu = chosen.device.type == "cpu"
    for name, value in DEFAULTS["cpu" if on_cpu else "cuda"].items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    grids = load_grids(chosen.grid_file)
    if unknown := [name for name in chosen.grid if name not in grids]:
        parser.error(f"--grid must be among {', '.join(grids)}, got {', '.join(unknown)}")
    if on_cpu and "devices" in chosen.sections:
        parser.error("--sections devices compares with the CPU: it needs another --device")
    return Options(
        problems=tuple(dict.fromkeys(p for name in chosen.grid for p in grids[name])),
        grid=", ".join(chosen.grid),
        cells=tuple(chosen.cells),
        dtypes=tuple(getattr(torch, name) for name in chosen.dtype),
        passes=tuple(chosen.passes),
        device=chosen.device,
        threads=chosen.threads,
        time_per_row=0.0 if chosen.quick else chosen.time_per_row,
        sections=tuple(chosen.sections),
        steps=min(chosen.steps, 20) if chosen.quick else chosen.steps,
        providers=(
            "rnn_fused",
            *(forced(family) for family in chosen.families),
            *((FROZEN,) if on_cpu else ()),
            *PEERS["cpu" if on_cpu else "cuda"],
            *(() if chosen.no_naive else ("naive",)),
        ),
        seconds=chosen.seconds,
        output=chosen.output,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a package is missing, a result is wrong or a device lost."""
    options = parse(arguments)
    try:
        Session(options).run()
    except (MissingExtraError, WrongResultError, LostDeviceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

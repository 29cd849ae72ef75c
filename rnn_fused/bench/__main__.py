"""The front: `python -m rnn_fused.bench`, see `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .extras import MissingExtraError
from .problems import GATES, GRIDS, PASSES, load_grids
from .providers import FAMILIES, FROZEN, OTHERS, PEERS, forced
from .results import ResumeError
from .session import LostDeviceError, Options, Session
from .workload import WrongResultError

DTYPES = ("float32", "bfloat16", "float16", "float64")
SECTIONS = ("grid", "devices", "ragged", "resets", "forecaster")
AGAINST = ("torch", "naive", *OTHERS)
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
# What is run where nothing else is said, most wanted first. "cuda" stands for any accelerator.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "grid": ["everyday"],
        "dtype": ["float32", "bfloat16"],
        "sections": ["grid", "ragged", "resets", "forecaster"],
        "families": [],
        "time_per_row": 1.0,
    },
    "cuda": {
        "grid": ["deepbench_train", "flashrnn", "rl", "everyday"],
        "dtype": ["bfloat16", "float16", "float32"],
        "sections": ["devices", "ragged", "resets", "grid"],
        "families": ["stepwise", "persistent", "handoff", "split", "cluster"],
        "time_per_row": 0.2,
    },
}
# --full. On a CPU without the largest training problems, minutes each.
FULL: dict[str, dict[str, Any]] = {
    "cpu": {
        "grid": [
            "everyday", "stacked", "bidirectional", "haste", "fastrnns", "rl", "rnnt",
            "deepbench_infer_device", "deepbench_infer_server",
        ],
        "time_per_row": 2.0,
        "memory": True,
    },
    "cuda": {
        "grid": [
            "deepbench_train", "flashrnn", "rl", "everyday", "stacked", "bidirectional",
            "fastrnns", "rnnt", "haste", "deepbench_infer_device", "deepbench_infer_server",
        ],
        "families": list(FAMILIES),
    },
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rnn_fused.bench",
        description="Time rnn_fused against torch.nn and others, interleaved in one process; train "
        "a forecaster with both; write a report (HTML), plots, JSON and CSV. Without options: the "
        "everyday grid in float32 and bfloat16, inference and training: some ten minutes. On CUDA "
        "also every family of kernels, the time of the recurrence alone and the memory, on the "
        "grids deepbench_train, flashrnn, rl and everyday in bfloat16, float16 and float32 (TF32, "
        "as torch.nn): give it --seconds. Ctrl-C keeps what was measured; --resume goes on.",
    )
    parser.add_argument("--grid", nargs="+", metavar="NAME", help="grids of the grid file")
    parser.add_argument("--grid-file", type=Path, default=GRIDS, help="JSON file of the grids")
    parser.add_argument("--cells", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument(
        "--pass", dest="passes", nargs="+", choices=PASSES, default=list(PASSES),
        help="inference: forward without gradients; training: forward and backward",
    )  # fmt: skip
    parser.add_argument(
        "--against", nargs="+", metavar="NAME",
        help=f"whom to time beside rnn_fused: {', '.join(AGAINST)}, with commas or spaces between "
        "them; torch always takes part. Without it, all that are compared on the device; what is "
        "not installed is named and left out",
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
    parser.add_argument(
        "--memory", action="store_true", default=None,
        help="also the peak memory of torch.nn and rnn_fused; on a CPU in a process for each, some "
        "seconds more a case",
    )  # fmt: skip
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="fewest rounds: a look, not a figure")
    length.add_argument(
        "--full", action="store_true",
        help="all grids that suit the device, memory too, more rounds: hours",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latest"))
    parser.add_argument(
        "--resume", action="store_true", help="go on with what an interrupted run left in --output"
    )
    return parser


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    front = parser()
    chosen = front.parse_args(arguments)
    on_cpu = chosen.device.type == "cpu"
    kind = "cpu" if on_cpu else "cuda"
    for name, value in (DEFAULTS[kind] | (FULL[kind] if chosen.full else {})).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    grids = load_grids(chosen.grid_file)
    if unknown := [name for name in chosen.grid if name not in grids]:
        front.error(f"--grid must be among {', '.join(grids)}, got {', '.join(unknown)}")
    if on_cpu and "devices" in chosen.sections:
        front.error("--sections devices compares with the CPU: it needs another --device")
    peers = [*PEERS[kind], "naive"]
    if chosen.against is not None:
        peers = [name.strip() for names in chosen.against for name in names.split(",")]
        if unknown := [name for name in peers if name not in AGAINST]:
            front.error(f"--against must be among {', '.join(AGAINST)}, got {', '.join(unknown)}")
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
            *(name for name in dict.fromkeys(peers) if name != "torch"),
        ),
        memory=bool(chosen.memory),
        seconds=chosen.seconds,
        output=chosen.output,
        resume=chosen.resume,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a package is missing, a result is wrong or a device lost."""
    options = parse(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser().error(f"--device {options.device} needs a CUDA device, torch finds none")
    try:
        Session(options).run()
    except (OSError, MissingExtraError, WrongResultError, LostDeviceError, ResumeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How baseline.py times one row: torch.nn (cuDNN or CPU) or a Python loop over timesteps.

Inputs are random and taken in turn from a few sets; times are medians, on a GPU of CUDA events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from baseline_rows import GATES, Row, lengths
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
}
MODULES = {
    "lstm": torch.nn.LSTM,
    "gru": torch.nn.GRU,
    "rnn_tanh": torch.nn.RNN,
    "rnn_relu": lambda *args, **kwargs: torch.nn.RNN(*args, nonlinearity="relu", **kwargs),
}
INPUT_SETS = 3
LAUNCH_BOUND = 0.9  # of the time: the host needs that much of it merely to enqueue the call


def set_precision(precision: str) -> None:
    """Choose TF32 or exact float32, for cuDNN's RNNs and for matrix products."""
    tf32 = precision == "tf32"
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    if hasattr(rnn, "fp32_precision"):
        rnn.fp32_precision = "tf32" if tf32 else "ieee"
    else:
        torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(
    call: Callable[[int], Any], device: torch.device, limit_s: float, most: int = 200
) -> dict[str, Any]:
    """Time call(i), i counting up, for about limit_s seconds; at least 3 and at most `most` times.

    Returns medians and percentiles in microseconds. host_us is the time until a lone call has
    returned to Python, nothing waited for (unless its kernels fill the launch queue).
    """
    for i in range(2):
        call(i)
    returned, finished = [], []
    for i in range(2):
        synchronize(device)
        start = time.perf_counter()
        call(i)
        returned.append(time.perf_counter() - start)
        synchronize(device)
        finished.append(time.perf_counter() - start)
    once, host_us = min(finished), min(returned) * 1e6
    repeats = max(3, min(most, int(limit_s / max(once, 1e-6))))

    if device.type == "cuda":
        events = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)
        ]
        for i, (begin, end) in enumerate(events):
            begin.record()
            call(i)
            end.record()
        synchronize(device)
        times = [begin.elapsed_time(end) * 1e3 for begin, end in events]
    else:
        times = []
        for i in range(repeats):
            start = time.perf_counter()
            call(i)
            times.append((time.perf_counter() - start) * 1e6)

    times.sort()
    us = statistics.median(times)
    return {
        "us": us,
        "p20_us": times[repeats // 5],
        "p80_us": times[min(repeats - 1, repeats * 4 // 5)],
        "repeats": repeats,
        "host_us": host_us,
        "launch_bound": device.type == "cuda" and host_us > LAUNCH_BOUND * us,
    }


def peak_bytes(call: Callable[[int], Any], device: torch.device) -> int | None:
    """Device memory that one call needs beyond what is there before it (inputs, weights)."""
    if device.type != "cuda":
        return None
    call(0)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(1)
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm())


@dataclass
class Case:
    """A row made ready: forward(i) and train(i) use input set i modulo their number."""

    modules: list[torch.nn.Module]  # in eval mode for forward, in training mode for train
    forward: Callable[[int], Tensor]
    train: Callable[[int], Any]
    tokens: int  # sum of the lengths
    error: float | None = None  # against torch.nn, for providers that are not torch.nn


def _batch_sizes(of: list[int]) -> Tensor:
    """PackedSequence.batch_sizes of descending lengths."""
    sorted_lengths = torch.tensor(of).flip(0)
    steps = torch.arange(of[0])
    return len(of) - torch.searchsorted(sorted_lengths, steps, right=True)


def _loop(cell: str, x: Tensor, state: tuple[Tensor, ...], module: torch.nn.Module) -> Tensor:
    """One layer as one would write it in plain PyTorch, the input product of all steps at once."""
    w_ih, w_hh, b_ih, b_hh = module.parameters()
    h, *cells = state
    outputs = []
    for gates in F.linear(x, w_ih, b_ih).unbind(0):
        hidden = F.linear(h, w_hh, b_hh)
        if cell == "lstm":
            i, f, g, o = (gates + hidden).chunk(4, 1)
            cells[0] = f.sigmoid() * cells[0] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * cells[0].tanh()
        elif cell == "gru":
            (r, z, n), (hr, hz, hn) = gates.chunk(3, 1), hidden.chunk(3, 1)
            z = (z + hz).sigmoid()
            n = (n + (r + hr).sigmoid() * hn).tanh()
            h = n + z * (h - n)
        elif cell == "rnn_tanh":
            h = (gates + hidden).tanh()
        else:
            h = (gates + hidden).relu()
        outputs.append(h)
    return torch.stack(outputs)


def build(row: Row, device: torch.device) -> Case:
    """Weights, input sets and the calls to time for one row."""
    options = {"device": device, "dtype": DTYPES[row.precision]}
    modules = [MODULES[row.cell](row.I, row.H, **options).eval() for _ in range(row.heads)]
    parameters = [p for module in modules for p in module.parameters()]
    of = lengths(row)
    batch_sizes = None if of is None else _batch_sizes(of)
    batch = row.B if of is None else len(of)
    lead = (row.T, row.B) if of is None else (sum(of),)

    states = 2 if row.cell == "lstm" else 1
    sets = [
        (
            torch.randn(*lead, row.I, **options).requires_grad_(),
            tuple(torch.randn(1, batch, row.H, **options) for _ in range(states)),
            torch.randn(*lead, row.H, **options),
        )
        for _ in range(INPUT_SETS)
    ]

    def run(module: torch.nn.Module, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        if row.provider == "loop":
            return _loop(row.cell, x, tuple(s[0] for s in state), module)
        hx = state if row.cell == "lstm" else state[0]
        if batch_sizes is None:
            return module(x, hx)[0]
        return module(PackedSequence(x, batch_sizes), hx)[0].data

    def forward(i: int) -> Tensor:
        x, state, _ = sets[i % INPUT_SETS]
        with torch.no_grad():
            return [run(module, x, state) for module in modules][-1]

    def train(i: int) -> Any:
        x, state, grad = sets[i % INPUT_SETS]
        outputs = [run(module, x, state) for module in modules]
        return torch.autograd.grad(outputs, [x, *parameters], [grad] * len(outputs))

    case = Case(modules, forward, train, tokens=row.T * row.B if of is None else sum(of))
    if row.provider == "loop":
        x, state, _ = sets[0]
        with torch.no_grad():
            want = modules[0](x, state if row.cell == "lstm" else state[0])[0]
        case.error = relative_error(forward(0), want)
    return case


_gemms: dict[tuple, dict[str, float | None]] = {}


def input_gemm(row: Row, tokens: int, device: torch.device, limit_s: float) -> dict[str, Any]:
    """Time of the input product alone, and of it with its two gradient products, in us."""
    key = (tokens, row.I, row.H, row.heads, row.cell, row.precision, device.type, row.inference)
    if key in _gemms:
        return _gemms[key]
    options = {"device": device, "dtype": DTYPES[row.precision]}
    xs = [torch.randn(tokens, row.I, **options) for _ in range(INPUT_SETS)]
    weight = torch.randn(GATES[row.cell] * row.H * row.heads, row.I, **options)
    grad = torch.randn(tokens, weight.shape[0], **options)

    def forward(i: int) -> Tensor:
        return xs[i % INPUT_SETS] @ weight.t()

    def train(i: int) -> tuple[Tensor, ...]:
        return forward(i), grad @ weight, grad.t() @ xs[i % INPUT_SETS]

    _gemms[key] = {
        "forward_us": sample(forward, device, limit_s)["us"],
        "train_us": None if row.inference else sample(train, device, limit_s)["us"],
    }
    return _gemms[key]


def measure(row: Row, device: torch.device, limit_s: float) -> dict[str, Any]:
    """All numbers of one row. limit_s bounds each of its few timed loops, roughly.

    recurrence_us is the difference to the input product: the recurrence alone, if nothing of the
    product was overlapped with it.
    """
    set_precision(row.precision)
    device = torch.device("cpu") if row.provider == "cpu" else device
    case = build(row, device)
    first, second = case.forward(0), case.forward(1)
    if not (first.isfinite().all() and not torch.equal(first, second)):
        raise RuntimeError("outputs must be finite and differ between inputs, and are not")
    del first, second
    gemm = input_gemm(row, case.tokens, device, limit_s / 4)
    record: dict[str, Any] = {
        "tokens": case.tokens,
        "error_vs_torch_nn": case.error,
        "input_gemm": gemm,
    }
    kinds = {"forward": case.forward} | ({} if row.inference else {"train": case.train})
    for kind, call in kinds.items():
        for module in case.modules:
            module.train(kind == "train")
        times = sample(call, device, limit_s)
        times["peak_bytes"] = peak_bytes(call, device)
        times["us_per_step"] = times["us"] / row.T
        times["recurrence_us"] = times["us"] - gemm[f"{kind}_us"]
        record[kind] = times
    return record


def copy_ceiling(device: torch.device, size: int) -> dict[str, Any]:
    """A device-to-device copy of `size` bytes; bytes read plus bytes written over the time."""
    sources = [torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)]
    sources.append(~sources[0])
    target = torch.full_like(sources[0], -1)
    times = sample(lambda i: target.copy_(sources[i % 2]), device, limit_s=0.3)
    target.fill_(-1)
    target.copy_(sources[0])
    return {
        "name": "copy",
        "bytes": size,
        "us": times["us"],
        "gb_per_s": 2 * size / times["us"] / 1e3,
        "ok": torch.equal(target, sources[0]),
    }


def matmul_ceiling(device: torch.device, size: int, precision: str) -> dict[str, Any]:
    """A [size, size] product on random data, a few of its rows checked against float64."""
    set_precision(precision)
    options = {"device": device, "dtype": DTYPES[precision]}
    a, b = (torch.randn(size, size, **options) for _ in range(2))
    out = torch.full_like(a, torch.nan)
    times = sample(lambda _: torch.mm(a, b, out=out), device, limit_s=0.5)
    out.fill_(torch.nan)
    torch.mm(a, b, out=out)
    error = relative_error(out[:16], a[:16].double() @ b.double())
    return {
        "name": "matmul",
        "precision": precision,
        "size": size,
        "us": times["us"],
        "tflop_per_s": 2 * size**3 / times["us"] / 1e6,
        "relative_error": error,
        "ok": error < 1e-2 and bool(out.isfinite().all()),
    }


def precision_error(device: torch.device, precision: str) -> dict[str, Any]:
    """The error of torch.nn.LSTM against float64 on the CPU: shows that the setting took effect."""
    set_precision(precision)
    generator = torch.Generator().manual_seed(0)
    exact = torch.nn.LSTM(256, 256, dtype=torch.float64)
    for parameter in exact.parameters():
        torch.nn.init.uniform_(parameter, -1 / 16, 1 / 16, generator=generator)
    x = torch.randn(32, 16, 256, dtype=torch.float64, generator=generator)
    module = torch.nn.LSTM(256, 256, device=device, dtype=DTYPES[precision])
    module.load_state_dict(exact.state_dict())
    with torch.no_grad():
        error = relative_error(module(x.to(device, DTYPES[precision]))[0], exact(x)[0])
    return {
        "name": "lstm_error",
        "precision": precision,
        "relative_error": error,
        "ok": error < 3e-2,
    }

"""Streaming inference: a frozen model reads one observation at a time and carries its state.

The stream is the voltage of a nerve cell's membrane, in mV, 2000 samples a second for 6 seconds
(`membrane.dat` of matplotlib's sample data). After every sample a GRU says what the voltage will be
4 samples, 2 ms, later. It trains on the first 3.5 s; the next second tells which of its states to
keep, and the last 1.5 s are the test. The baselines are persistence, the voltage now, and a linear
autoregression on the last 32 samples.

Then the test is streamed, and each sample timed, in five ways that take turns:

    frozen step      rnn_fused.freeze(model), one step a sample, the state carried on
    step             the same, not frozen
    torch.nn step    a torch.nn.GRU, called with one timestep and the state
    frozen window    without a state: the last 128 samples again, at every sample
    torch.nn window  the same with torch.nn.GRU

    python examples/streaming.py
    python examples/streaming.py --quick

The full form takes half a minute of CPU time and prints an RMSE of 3.92 mV for persistence, 3.22
for the autoregression and 1.69 for the GRU. Streamed, its forecasts are those of one run over the
whole series up to 5e-6 mV; those from windows are off by up to 0.07 mV, as they forget. Median and
99th percentile, us a sample, the least and the most of four runs on one thread of a 2-core virtual
machine (AMD EPYC, Zen 4; load 1.3 to 2.4):

    frozen step        46 to 77       177 to 217
    step              113 to 184      340 to 355
    torch.nn step      64 to 73       194 to 229
    frozen window     250 to 297      446 to 874
    torch.nn window  2662 to 3321    5418 to 7330

The frozen step was faster than torch.nn's in one run (46 and 64) and slightly slower in three. Not
frozen, a step of this GRU takes about twice as long as torch.nn's, so freeze a model for streaming.
An LSTM's does not: with one layer of 64 units it took 51 us, torch.nn's 75, frozen 26.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib import cbook
from torch import Tensor, nn

import rnn_fused

AHEAD = 4  # samples of 0.5 ms
TRAIN, VALIDATION = 7000, 9000  # where they end
WINDOW = 128  # samples, of training and of inference without a state
BLOCK = 500  # samples that one way is timed for, before the next finds the caches cold


class Forecaster(nn.Module):
    """[T, B, 2] voltage and its last change -> [T, B] its change over the next `AHEAD` samples."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.recurrent = rnn_fused.GRU(2, hidden, layers)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, state = self.recurrent(x, state)
        return self.head(output).squeeze(-1), state

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One timestep, [B, 2] -> [B]."""
        output, state = self.recurrent.step(x, state)
        return self.head(output).squeeze(-1), state


def load() -> Tensor:
    """[T] mV, as in matplotlib's own plots of the file."""
    path = cbook.get_sample_data("membrane.dat", asfileobj=False)
    return torch.from_numpy(100 * np.fromfile(path, np.float32))


def train(model: Forecaster, x: Tensor, change: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    best, kept = float("inf"), copy.deepcopy(model.state_dict())
    for step in range(1, steps + 1):
        starts = torch.randint(TRAIN - AHEAD - WINDOW, (32,))
        window = torch.arange(WINDOW)[:, None] + starts  # [T, B]
        loss = nn.functional.mse_loss(model(x[window])[0], change[window])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            with torch.no_grad():
                forecast = model(x[: VALIDATION - AHEAD, None])[0][TRAIN - AHEAD :, 0]
                target = change[TRAIN - AHEAD : VALIDATION - AHEAD]
                error = nn.functional.mse_loss(forecast, target).item()
            if error < best:
                best, kept = error, copy.deepcopy(model.state_dict())
        if step % 100 == 0:
            print(f"step {step:4}  loss {loss.item():.4f}  validation {error:.4f}")
    model.load_state_dict(kept)


def autoregression(mv: Tensor, order: int = 32) -> Tensor:
    """[T] linear forecasts for t + AHEAD, by least squares on the training samples."""
    lags = [torch.cat([mv[:1].expand(k), mv[: len(mv) - k]]) for k in range(order)]
    past = torch.stack([*lags, torch.ones_like(mv)], -1).double()
    target = mv[AHEAD:TRAIN].double()
    weights = torch.linalg.lstsq(past[: TRAIN - AHEAD], target[:, None]).solution
    forecast: Tensor = (past @ weights).squeeze(-1).float()
    return forecast


@torch.inference_mode()
def stream(model: Forecaster, x: Tensor, first: int, last: int) -> dict[str, tuple[Tensor, Tensor]]:
    """For each way the forecasts at [first, last), and the seconds that each took."""
    frozen = rnn_fused.freeze(model)
    stock = copy.deepcopy(model)
    rnn_fused.revert(stock)  # to torch.nn
    calls: dict[str, Callable[[int, Tensor], tuple[Tensor, Tensor]]] = {
        "frozen step": lambda t, state: frozen.step(x[t, None], state),
        "step": lambda t, state: model.step(x[t, None], state),
        "torch.nn step": lambda t, state: stock(x[t, None, None], state),
        "frozen window": lambda t, _: frozen(x[t + 1 - WINDOW : t + 1, None]),
        "torch.nn window": lambda t, _: stock(x[t + 1 - WINDOW : t + 1, None]),
    }
    _, past = model(x[:first, None])  # one call over all that came before the stream
    states = dict.fromkeys(calls, past)
    forecasts: dict[str, list[Tensor]] = {name: [] for name in calls}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for block in range(first, last, BLOCK):
        for name, call in calls.items():
            for t in range(block, min(block + BLOCK, last)):
                began = time.perf_counter()
                forecast, states[name] = call(t, states[name])
                seconds[name].append(time.perf_counter() - began)
                forecasts[name].append(forecast.flatten()[-1])
    return {name: (torch.stack(forecasts[name]), torch.tensor(seconds[name])) for name in calls}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short training and stream")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)

    mv = load()
    step = nn.functional.pad(mv.diff(), (1, 0))
    change = mv[AHEAD:] - mv[:-AHEAD]
    scale = change[: TRAIN - AHEAD].std()
    x = torch.stack(
        [(mv - mv[:TRAIN].mean()) / mv[:TRAIN].std(), step / step[:TRAIN].std()], -1
    )  # [T, 2]
    model = Forecaster(hidden=64, layers=2)
    train(model, x, change / scale, 60 if options.quick else 600)

    first, last = VALIDATION - AHEAD, len(mv) - AHEAD  # the targets are the test
    with torch.inference_mode():
        whole = model(x[:last, None])[0][first:, 0]
    forecasts = {
        "persistence": mv[first:last],
        "autoregression": autoregression(mv)[first:last],
        "gru": whole * scale + mv[first:last],
    }
    print(f"RMSE in mV, {AHEAD * 0.5:.0f} ms ahead")
    metrics = {}
    for name, forecast in forecasts.items():
        metrics[name] = (forecast - mv[VALIDATION:]).square().mean().sqrt().item()
        print(f"  {name:18} {metrics[name]:6.2f}")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one timestep has no work for two
    count = 100 if options.quick else len(whole)
    streamed = stream(model, x, first, first + count)
    torch.set_num_threads(threads)
    print(f"{count} samples, one at a time    median      p99 us   largest difference in mV")
    for name, (forecast, seconds) in streamed.items():
        median, p99 = (1e6 * seconds.quantile(q).item() for q in (0.5, 0.99))
        difference = (forecast - whole[:count]).abs().max().item() * scale.item()
        metrics |= {f"{name}: us": median, f"{name}: difference": difference}
        print(f"  {name:24} {median:8.0f} {p99:11.0f}   {difference:.1e}")
    return metrics


if __name__ == "__main__":
    main()

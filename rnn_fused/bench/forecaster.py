"""A forecaster trained on a real series with both libraries, from the same weights and batches.

The series is the weekly CO2 concentration at Mauna Loa, 1958-2001, which comes inside the
statsmodels package. The model predicts next week's change from the weeks before it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .extras import require
from .problems import Problem
from .providers import ours
from .records import Row, make_row
from .timer import Timing
from .workload import Case

T, B, H, LAYERS = 104, 32, 64, 2  # two years of weeks; batch; units; layers
HELD_OUT = 208  # weeks at the end that are forecast and never trained on
NOISE_FLOOR = 1e-4  # relative difference of losses that is rounding, amplified by training


@dataclass(frozen=True)
class Series:
    """Weekly changes, standardised by the mean and deviation of the training weeks."""

    changes: Tensor  # [weeks]
    ppm: float  # parts per million of one unit
    persistence_rmse: float  # of forecasting no change, on the held-out weeks


@dataclass(frozen=True)
class Forecast:
    """How two trainings compare. Losses by library: torch.nn, rnn_fused, float64."""

    losses: dict[str, list[float]]
    held_out_rmse: dict[str, float]  # ppm, one week ahead
    persistence_rmse: float
    step: dict[str, Timing]
    ratio: float  # time of a torch.nn step / time of an rnn_fused step, median over steps

    def difference(self, a: str, b: str) -> float:
        """The largest relative difference between two loss curves."""
        ours, theirs = torch.tensor(self.losses[a]), torch.tensor(self.losses[b])
        return float(((ours - theirs) / theirs).abs().max())

    @property
    def agrees(self) -> bool:
        """Whether rnn_fused is as near to the float64 curve as torch.nn (within twice)."""
        allowed = 2 * self.difference("torch.nn", "float64") + NOISE_FLOOR
        return self.difference("rnn_fused", "float64") <= allowed


class Forecaster(nn.Module):
    """A recurrent stack with a linear head: [B, T, 1] past changes -> [B, T] next changes."""

    def __init__(self, recurrent: nn.Module, hidden: int) -> None:
        """Take the recurrent stack (batch_first, `hidden` units)."""
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Predict the change after each step."""
        output, _ = self.recurrent(x)
        forecast: Tensor = self.head(output)
        return forecast.squeeze(-1)


def load_series() -> Series:
    """Read the series from statsmodels; missing weeks are interpolated."""
    datasets = require("statsmodels.datasets", "statsmodels")
    weekly = datasets.co2.load_pandas().data["co2"].interpolate()
    changes = torch.tensor(weekly.diff().iloc[1:].to_numpy(), dtype=torch.float32)
    train = changes[:-HELD_OUT]
    ppm = float(train.std())
    persistence = float(changes[-HELD_OUT:].square().mean().sqrt())
    return Series((changes - train.mean()) / ppm, ppm, persistence)


class Training:
    """One model in training; `step` takes the next batch of windows."""

    def __init__(self, model: Forecaster, series: Series, device: torch.device) -> None:
        """Adam, and batches drawn from the same seed for every training."""
        dtype = next(model.parameters()).dtype
        self.model = model.to(device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        self.changes = series.changes.to(device, dtype)
        self.windows = self.changes[:-HELD_OUT].unfold(0, T + 1, 1)
        self.draw = torch.Generator().manual_seed(5)
        self.losses: list[float] = []

    def step(self) -> None:
        """Draw a batch, predict the next change after each of its weeks, learn."""
        chosen = torch.randint(len(self.windows), (B,), generator=self.draw)
        batch = self.windows[chosen.to(self.windows.device)]
        loss = nn.functional.mse_loss(self.model(batch[:, :-1, None]), batch[:, 1:])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    @torch.inference_mode()
    def held_out_rmse(self) -> float:
        """Error of one-week-ahead forecasts of the held-out weeks, in standardised units."""
        inputs, targets = self.changes[None, -HELD_OUT - T : -1, None], self.changes[-HELD_OUT:]
        forecast = self.model(inputs)[0, -HELD_OUT:]
        return float((forecast - targets).square().mean().sqrt())


def trainings(
    series: Series, device: torch.device, namespace: Any, hidden: int = H
) -> dict[str, Training]:
    """torch.nn, `namespace` and a float64 torch.nn, all from the same weights."""
    torch.manual_seed(7)
    options = {"num_layers": LAYERS, "batch_first": True}
    first = Forecaster(nn.LSTM(1, hidden, **options), hidden)
    second = Forecaster(namespace.LSTM(1, hidden, **options), hidden)
    second.load_state_dict(first.state_dict())
    models = {"torch.nn": first, "rnn_fused": second, "float64": copy.deepcopy(first).double()}
    return {name: Training(model, series, device) for name, model in models.items()}


def run(
    device: torch.device,
    steps: int,
    *,
    namespace: Any = None,
    hidden: int = H,
    progress: Callable[[], None] = lambda: None,
) -> Forecast:
    """Train for `steps` steps: both libraries taking turns step by step, then float64 alone."""
    series = load_series()
    trained = trainings(series, device, namespace or ours(), hidden)
    seconds: dict[str, list[float]] = {"torch.nn": [], "rnn_fused": []}
    for _ in range(steps):
        for name, taken in seconds.items():
            start = time.perf_counter()
            trained[name].step()  # ends in loss.item(), which waits for the device
            taken.append(time.perf_counter() - start)
        progress()
    for _ in range(steps):
        trained["float64"].step()
        progress()
    step = {name: Timing(tuple(taken), calls=1) for name, taken in seconds.items()}
    return Forecast(
        losses={name: training.losses for name, training in trained.items()},
        held_out_rmse={n: t.held_out_rmse() * series.ppm for n, t in trained.items()},
        persistence_rmse=series.persistence_rmse,
        step=step,
        ratio=step["rnn_fused"].speedup_over(step["torch.nn"]),
    )


def rows(forecast: Forecast, device: torch.device) -> list[Row]:
    """The training steps in the schema of every benchmark row."""
    problem = Problem("lstm", T, B, 1, H, layers=LAYERS)
    case = Case(problem, torch.float32, "training", device)
    ratios = {"torch.nn": 1.0, "rnn_fused": forecast.ratio}
    return [make_row("forecaster", n, case, forecast.step[n], r) for n, r in ratios.items()]

"""A step of training as something to time, and how many times as long as another it takes."""

from collections.abc import Callable, Iterable

from torch import Tensor

from rnn_fused.bench.timer import Settings, interleave


def training_step(
    output: Callable[[], Tensor], grad: Tensor, leaves: Iterable[Tensor]
) -> Callable[[], None]:
    """Forward and backward. grad: of the output, or of one with more columns; leaves: whose
    gradients are dropped afterwards."""
    leaves = tuple(leaves)

    def run() -> None:
        y = output()
        y.backward(grad[..., : y.shape[-1]])
        for leaf in leaves:
            leaf.grad = None

    return run


def ratio(a: Callable[[], object], b: Callable[[], object], settings: Settings) -> float:
    """The time of `a` over that of `b`, in turns of these two alone: in turns of three, the one
    behind a slow loop would pay for the caches that the loop left cold."""
    times = interleave({"a": a, "b": b}, settings)
    return round(times["b"].speedup_over(times["a"]), 3)

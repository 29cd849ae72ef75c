"""A step of training as something to time."""

from collections.abc import Callable, Iterable

from torch import Tensor


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

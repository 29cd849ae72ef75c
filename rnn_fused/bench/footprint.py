"""The memory of a pass, counted from shapes: what our operators allocate, tensor by tensor.

It follows `csrc/binding/passes.h` and each device's operators, and is tested against what a CPU
really takes. For CUDA it is a prediction.
"""

from __future__ import annotations

from collections import Counter
from math import ceil

from .problems import GATES
from .workload import Case

SAVED = {"lstm": 4, "gru": 4}  # values per unit that the forward pass saves; of an RNN none
WINDOWS, ROWS_OF_A_WINDOW = 16, 2048  # of the backward loop: at most, and at least
REBUILT_SUMS = 1 << 22  # values that CUDA sums at a time for the gates of a window
ROWS_OF_A_BLOCK = 1024  # beyond which the CPU sums weights' gradients in float64 between blocks


def footprint(case: Case, *, recompute: bool = False) -> Counter[str]:
    """Bytes of everything alive at the peak of our pass, by name, a stack's layers together;
    beyond the input, the weights and the output's gradient. recompute: with `save="recompute"`.

    For dense layers of one direction with biases and without a projection, whose gradients are all
    wanted. Leaves out what has the size of a timestep or of the caches, and packed weights; and, of
    layers that run side by side on CUDA, that all of them are there until they are done.
    """
    problem, on_cuda = case.problem, case.device.type == "cuda"
    size = case.dtype.itemsize
    rows, gates = problem.T * problem.B, GATES[problem.cell]
    h = rows * problem.H * size  # one value per unit and row
    layers = range(problem.layers)
    gated = problem.cell in SAVED
    saved = 0 if recompute else SAVED.get(problem.cell, 0)
    # Saved gates make room for their gradients; other gradients are there for a window at a time.
    windowed = (recompute and gated) or not (gated or on_cuda)
    windows = rows // max(ROWS_OF_A_WINDOW, problem.B) if windowed else 1
    windows = min(max(windows, 1), WINDOWS)
    steps = ceil(problem.T / windows)
    window = steps * problem.B * problem.H * size

    if case.pass_ == "inference":
        return Counter(
            {
                "output": h * min(2, problem.layers),  # of a layer, and of the one below it
                "W_ih x": gates * h if on_cuda and gated else 0,
            }
        )

    def weights(layer: int) -> int:
        return gates * problem.H * ((problem.H if layer else problem.I) + problem.H + 2)

    # A stack's call gives back the cells of a layer behind its loop; one layer's leaves them there.
    spends = problem.layers > 1 and windows == 1

    def backward(layer: int, behind: bool) -> Counter[str]:
        """While the gradients of one layer are computed, in its loop or behind it; those above it
        have theirs."""
        top = layer == problem.layers - 1
        several_blocks = steps * problem.B > ROWS_OF_A_BLOCK and not on_cuda
        cells = layer + (not (spends and behind))
        of_input = rows * (problem.H if layer else problem.I) * size
        return Counter(
            {
                "output": h * problem.layers,
                "gates": h * saved * (layer + 1),
                "cells": rows * problem.H * max(4, size) * cells * (problem.cell == "lstm"),
                "gradient of gates": 0 if saved else window * SAVED.get(problem.cell, 1),
                "gradient of the output": 0 if top else h,
                "gradient of the input": of_input if behind else 0,
                "h before each step": window if on_cuda else 0,
                "sums of rebuilt gates": max(4, size)
                * min(steps * problem.B * gates * problem.H, REBUILT_SUMS)
                * (on_cuda and recompute and gated),
                "gradients of weights": size * sum(map(weights, layers[layer:])),
                "sums of windows": 4 * weights(layer) if windows > 1 and size == 2 else 0,
                "sums in float64": 8 * weights(layer) if several_blocks else 0,
            }
        )

    moments = (backward(layer, behind) for layer in layers for behind in (False, True))
    return max(moments, key=Counter.total)

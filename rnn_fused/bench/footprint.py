"""The memory of a pass, counted from shapes: what our operators allocate, tensor by tensor.

It follows `csrc/binding/passes.h` and each device's operators, and is tested against what a CPU
really takes. For CUDA it is a prediction.
"""

from __future__ import annotations

from collections import Counter

from .problems import GATES
from .workload import Case

SAVED = {"lstm": 4, "gru": 4}  # values per unit that the forward pass saves; of an RNN none
ROWS_OF_A_BLOCK = 1024  # beyond which the CPU sums weights' gradients in float64 between blocks


def footprint(case: Case) -> Counter[str]:
    """Bytes of everything alive at the peak of our pass, by name, a stack's layers together;
    beyond the input, the weights and the output's gradient.

    For dense layers of one direction with biases and without a projection, whose gradients are all
    wanted. Leaves out what has the size of a timestep or of the caches, and packed weights.
    """
    problem, on_cuda = case.problem, case.device.type == "cuda"
    size = case.dtype.itemsize
    rows, gates = problem.T * problem.B, GATES[problem.cell]
    h = rows * problem.H * size  # one value per unit and row
    layers = range(problem.layers)

    if case.pass_ == "inference":
        return Counter(
            {
                "output": h * min(2, problem.layers),  # of a layer, and of the one below it
                "W_ih x": gates * h if on_cuda and problem.cell in SAVED else 0,
            }
        )

    def weights(layer: int) -> int:
        return gates * problem.H * ((problem.H if layer else problem.I) + problem.H + 2)

    def backward(layer: int) -> Counter[str]:
        """While the gradients of one layer are computed; those above it have theirs."""
        top = layer == problem.layers - 1
        several_blocks = rows > ROWS_OF_A_BLOCK and not on_cuda
        return Counter(
            {
                "output": h * (layer + (1 if top else 2)),  # the caller keeps the last one
                "gates": h * SAVED.get(problem.cell, 0) * (layer + 1),
                "cells": rows * problem.H * max(4, size) * (layer + 1) * (problem.cell == "lstm"),
                "gradient of gates": 0 if problem.cell in SAVED else h,  # else in their place
                "gradient of the output": 0 if top else h,
                "gradient of the input": rows * (problem.H if layer else problem.I) * size,
                "h before each step": h if on_cuda else 0,
                "gradients of weights": size * sum(map(weights, layers[layer:])),
                "sums in float64": 8 * weights(layer) if several_blocks else 0,
            }
        )

    return max(map(backward, layers), key=Counter.total)

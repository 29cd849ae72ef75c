"""JAX's way of a recurrent layer: a step under `lax.scan`, compiled as a whole by XLA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class JaxLayer(nn.Module):
    """Runs the weights of `cell`, a cell of torch.nn, in JAX on the CPU."""

    def __init__(self, kind: str, cell: nn.Module) -> None:
        """Take the cell; `kind` is lstm, gru, rnn_tanh or rnn_relu."""
        super().__init__()
        self.cell = cell
        self.kind = kind
        self.weights: tuple[Any, ...] = ()  # for inference, as they are at the first call

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Run [T, B, I] -> [T, B, H] and the last state, shaped as torch.nn shapes it."""
        weights = [getattr(self.cell, name) for name in NAMES]
        if self.training:
            output, *state = _Scan.apply(self.kind, x, *weights)
        else:
            self.weights = self.weights or tuple(map(_to_jax, weights))
            infer, _ = _functions(self.kind)
            output, *state = _to_torch(infer(_to_jax(x), *self.weights))
        last = tuple(s.unsqueeze(0) for s in state)
        return output, last if len(last) > 1 else last[0]


class _Scan(torch.autograd.Function):
    """Between the two libraries without a copy, where the memory is aligned as XLA wants it."""

    @staticmethod
    def forward(ctx: Any, kind: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        _, train = _functions(kind)
        results, ctx.pullback = train(*map(_to_jax, tensors))
        return _to_torch(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_to_torch(_pull()(ctx.pullback, tuple(map(_to_jax, grads)))))


def _to_jax(tensor: Tensor) -> Any:
    return _jax().dlpack.from_dlpack(tensor.detach().contiguous())


def _to_torch(arrays: Any) -> tuple[Tensor, ...]:
    return tuple(map(torch.utils.dlpack.from_dlpack, _jax().block_until_ready(arrays)))


@cache
def _jax() -> Any:
    """The library, with as many threads as torch has: XLA takes one for each CPU that it may run
    on when it starts."""
    import jax

    with _on_cpus(torch.get_num_threads()):
        jax.config.update("jax_platforms", "cpu")
        jax.devices()
    return jax


@contextmanager
def _on_cpus(count: int) -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@cache
def _functions(kind: str) -> tuple[Callable[..., Any], ...]:
    """Compiled: the results of (x, weights and biases), and the same with what `_pull` needs."""
    jax = _jax()
    jnp, sigmoid = jax.numpy, jax.nn.sigmoid

    def cell(state: Any, gates: Any, recurrent: Any) -> Any:
        """The next state from W_ih x + b_ih and W_hh h + b_hh, each [B, G*H]."""
        if kind == "lstm":
            i, f, g, o = jnp.split(gates + recurrent, 4, axis=-1)
            c = sigmoid(f) * state[1] + sigmoid(i) * jnp.tanh(g)
            return sigmoid(o) * jnp.tanh(c), c
        if kind == "gru":
            (r, z, n), (hr, hz, hn) = (jnp.split(a, 3, axis=-1) for a in (gates, recurrent))
            z = sigmoid(z + hz)
            n = jnp.tanh(n + sigmoid(r + hr) * hn)
            return ((1 - z) * n + z * state[0],)
        activation = jnp.tanh if kind == "rnn_tanh" else jax.nn.relu
        return (activation(gates + recurrent),)

    def layer(x: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
        def step(state: Any, gates: Any) -> Any:
            state = cell(state, gates, state[0] @ weight_hh.T + bias_hh)
            return state, state[0]

        zero = jnp.zeros((x.shape[1], weight_hh.shape[1]), x.dtype)
        first = (zero, zero) if kind == "lstm" else (zero,)
        last, output = jax.lax.scan(step, first, x @ weight_ih.T + bias_ih)
        return output, *last

    return jax.jit(layer), jax.jit(lambda *args: jax.vjp(layer, *args))


@cache
def _pull() -> Callable[..., Any]:
    """Compiled: the arguments' gradients, from a pullback and the results' gradients."""

    def pull(pullback: Any, grads: Any) -> Any:
        return pullback(grads)

    compiled: Callable[..., Any] = _jax().jit(pull)
    return compiled

"""Providers of a recurrent layer: torch.nn's, ours, other libraries', and a user's own loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .jax_layer import JaxLayer
from .onnx_layer import OnnxRuntimeLayer
from .problems import Problem

# Of CUDA kernels, beside the plan's.
FAMILIES = ("stepwise", "persistent", "handoff", "split", "cluster", "cudnn")
# Other libraries, by the device on which they are compared, and the modules they are.
PEERS = {"cpu": ("onnxruntime", "jax"), "cuda": ("flashrnn", "haste", "torchrl")}
OTHERS = tuple(name for names in PEERS.values() for name in names)
PACKAGES = {name: (name,) for name in OTHERS} | {
    "onnxruntime": ("onnxruntime", "onnx"),
    "haste": ("haste_pytorch",),
}
FROZEN = "rnn_fused frozen"
SLOW = ("naive", "torchrl")  # loops in Python
# Whoever would follow them in a round would find cold caches, or their threads still awake.
APART = (*SLOW, "jax")


def cell_of(problem: Problem) -> nn.Module:
    """torch.nn's cell of one layer."""
    if problem.cell.startswith("rnn_"):
        return nn.RNNCell(problem.I, problem.H, nonlinearity=problem.cell[4:])
    cells = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}
    return cells[problem.cell](problem.I, problem.H)


class NaiveLoop(nn.Module):
    """What a user writes by hand: a Python loop over torch.nn.LSTMCell, GRUCell or RNNCell."""

    def __init__(self, problem: Problem) -> None:
        """Build the cell of `problem`."""
        super().__init__()
        self.cell = cell_of(problem)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Run [T, B, I] -> [T, B, H] and the last state, shaped as torch.nn shapes it."""
        state: Any = None
        outputs = []
        for x_t in x:
            state = self.cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        if isinstance(state, tuple):
            return torch.stack(outputs), tuple(s.unsqueeze(0) for s in state)
        return torch.stack(outputs), state.unsqueeze(0)


class Stepped(nn.Module):
    """torch.nn's layers over sequences with resets, which they cannot run at once: a timestep at a
    time, with the state set to zero in between."""

    def __init__(self, problem: Problem) -> None:
        """Build the layers of `problem`."""
        super().__init__()
        self.cell = layer_from(nn, problem)

    def forward(self, x: Tensor, resets: Tensor) -> tuple[Tensor, Any]:
        """Run [T, B, I] with resets [T, B] -> [T, B, H] and the last state."""
        state: Any = None
        outputs = []
        for x_t, keep in zip(x.split(1), (~resets).to(x.dtype).unsqueeze(-1), strict=True):
            if isinstance(state, tuple):
                state = state[0] * keep, state[1] * keep
            elif state is not None:
                state = state * keep
            output, state = self.cell(x_t, state)
            outputs.append(output)
        return torch.cat(outputs), state


class Forced(nn.Module):
    """Our layer, by one family of kernels. A backward pass runs its forward pass's family."""

    def __init__(self, problem: Problem, family: str) -> None:
        """Build the layer; whether the family can run it shows in the first call."""
        super().__init__()
        self.cell = layer_from(ours(), problem)
        self.family = family

    def forward(self, x: Any) -> Any:
        """As our layer; RuntimeError where the family cannot run it."""
        with ours().kernels(self.family):
            return self.cell(x)


class FlashRNN(nn.Module):
    """FlashRNN's fused LSTM with one head (https://github.com/NX-AI/flashrnn), and the product of
    the input that it leaves to its caller."""

    def __init__(self, problem: Problem) -> None:
        """Hold the parameters of torch.nn.LSTM, from which FlashRNN's are views."""
        super().__init__()
        self.cell = nn.LSTMCell(problem.I, problem.H)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run [T, B, I] -> [T, B, H] and the last state."""
        from flashrnn import flashrnn

        cell, (T, B, _) = self.cell, x.shape
        G, H = 4, cell.hidden_size
        product = nn.functional.linear(x, cell.weight_ih).view(T, B, G, 1, H)
        states, last = flashrnn(
            product.transpose(0, 1),
            cell.weight_hh.view(G, 1, H, H),
            (cell.bias_ih + cell.bias_hh).view(G, 1, H),
            function="lstm",
            backend="cuda_fused",
            dtype=str(x.dtype).removeprefix("torch."),
        )  # [h and c, B, T, heads, H]
        h_n, c_n = last[:, :, -1, 0].unsqueeze(1)
        return states[0, :, :, 0].transpose(0, 1), (h_n, c_n)


class Haste(nn.Module):
    """Haste's LSTM or GRU (https://github.com/lmnt-com/haste), whose weights are transposed and in
    another order of gates: for training they are rearranged in every call, for inference once."""

    def __init__(self, problem: Problem) -> None:
        """Hold the parameters of torch.nn's cell."""
        super().__init__()
        import haste_pytorch

        self.cell = cell_of(problem)
        # Of torch.nn's blocks: i, g, f, o; z, r, n.
        self.order = {"lstm": (0, 2, 1, 3), "gru": (1, 0, 2)}[problem.cell]
        kind = getattr(haste_pytorch, problem.cell.upper())
        self.layer = (kind(problem.I, problem.H),)  # hidden in a tuple: its weights are not used
        self.arranged: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Run [T, B, I] -> [T, B, H] and the last state."""
        if self.training or not self.arranged:
            self.arranged = self._arrange()
        layer = self.layer[0].train(self.training)
        result: tuple[Tensor, Any] = torch.func.functional_call(layer, self.arranged, (x,))
        return result

    def _arrange(self) -> dict[str, Tensor]:
        cell: Any = self.cell

        def ordered(blocks: Tensor) -> Tensor:
            parts = blocks.chunk(len(self.order))
            return torch.cat([parts[k] for k in self.order])

        weights = {
            "kernel": ordered(cell.weight_ih).T.contiguous(),
            "recurrent_kernel": ordered(cell.weight_hh).T.contiguous(),
        }
        if len(self.order) == 4:
            return {**weights, "bias": ordered(cell.bias_ih + cell.bias_hh)}
        biases = {"bias": ordered(cell.bias_ih), "recurrent_bias": ordered(cell.bias_hh)}
        return weights | biases


def layer_from(namespace: Any, problem: Problem, **options: Any) -> nn.Module:
    """A layer of `torch.nn`, or of any namespace with the same LSTM, GRU and RNN."""
    options |= {"num_layers": problem.layers} if problem.layers > 1 else {}
    options |= {"bidirectional": True} if problem.directions > 1 else {}
    layer: nn.Module
    if problem.cell.startswith("rnn_"):
        layer = namespace.RNN(problem.I, problem.H, nonlinearity=problem.cell[4:], **options)
    else:
        layer = getattr(namespace, problem.cell.upper())(problem.I, problem.H, **options)
    return layer


def ours() -> Any:
    """The namespace of our layers, imported late: this package is importable without them."""
    import rnn_fused

    return rnn_fused


class FrozenLayer(nn.Module):
    """Our layer as `rnn_fused.freeze` makes it, of the parameters at the first call."""

    def __init__(self, problem: Problem) -> None:
        """Build the layer to be frozen."""
        super().__init__()
        self.cell = layer_from(ours(), problem)
        self.frozen: nn.Module | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Run [T, B, I] -> [T, B, H] and the last state."""
        if self.frozen is None:
            self.frozen = ours().freeze(self.cell)
        result: tuple[Tensor, Any] = self.frozen(x)
        return result


def torchrl_layer(problem: Problem) -> nn.Module:
    """TorchRL's LSTM or GRU, written in Python; batch_first unless told otherwise."""
    from torchrl.modules.tensordict_module import rnn

    return layer_from(rnn, problem, batch_first=False)


def forced(family: str) -> str:
    """The name of the provider that forces a family."""
    return f"rnn_fused {family}"


PROVIDERS: dict[str, Callable[[Problem], nn.Module]] = {
    "torch.nn": lambda p: Stepped(p) if p.reset_p > 0 else layer_from(nn, p),
    "rnn_fused": lambda problem: layer_from(ours(), problem),
    "rnn_fused recompute": lambda problem: layer_from(ours(), problem, save="recompute"),
    FROZEN: FrozenLayer,
    **{forced(family): partial(Forced, family=family) for family in FAMILIES},
    "naive": NaiveLoop,
    "onnxruntime": lambda problem: OnnxRuntimeLayer(problem, layer_from(nn, problem)),
    "jax": lambda problem: JaxLayer(problem.cell, cell_of(problem)),
    "flashrnn": FlashRNN,
    "haste": Haste,
    "torchrl": torchrl_layer,
}


def obstacle(
    provider: str, problem: Problem, dtype: torch.dtype, device: torch.device, pass_: str
) -> str:
    """Why a provider cannot run a problem, as far as that can be told before trying; or ""."""
    if provider == FROZEN and (device.type != "cpu" or pass_ != "inference"):
        return "compared on the CPU, in inference"
    if missing := not_installed(provider):
        return missing
    if problem.stacked and (provider == "naive" or provider in OTHERS):
        return "compared on one layer of one direction"
    on_cuda = device.type == "cuda"
    if provider == "onnxruntime" and (on_cuda or dtype != torch.float32 or pass_ != "inference"):
        return "compared on the CPU, in float32 inference"
    if provider == "jax" and (device.type != "cpu" or dtype == torch.float64):
        return "compared on the CPU, up to float32"
    if provider == "flashrnn" and (problem.cell != "lstm" or dtype.itemsize != 2 or not on_cuda):
        return "compared on CUDA, for the LSTM in 16 bits"
    if provider == "haste" and (dtype != torch.float32 or not on_cuda):
        return "compared on CUDA, in float32"
    if provider in ("haste", "torchrl") and problem.cell not in ("lstm", "gru"):
        return "has no RNN"
    return ""


def not_installed(provider: str) -> str:
    """Which package of another library is missing, in words, or ""."""
    missing = [name for name in PACKAGES.get(provider, ()) if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""


def plain_name(parameter: str) -> str:
    """A parameter's name without what depends on the provider: weight_ih, bias_hh, ..."""
    return parameter.removeprefix("cell.").removesuffix("_l0")

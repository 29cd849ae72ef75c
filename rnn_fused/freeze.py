"""`freeze`: recurrent modules for inference, their weights rearranged once for many calls."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from . import ops
from .base import OWN_OPTIONS, FusedRNNBase


def freeze(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference on the CPU, with the weights of its LSTM, GRU and RNN modules
    packed.

    Kernels want weights in another order than the parameters have. A layer packs them at every
    call, or, where few rows are to be multiplied, does without. That is what short sequences in
    small batches, and single steps of a stream, mostly pay for; a `Frozen` module never does.

    The copy is in evaluation mode and independent of `model`: weights that change later do not
    reach it. It holds the weights twice, packed and plain.

    Args:
        model: a `rnn_fused` LSTM, GRU or RNN, or a module that contains some (`convert` those of
            torch.nn first). Cells stay as they are.

    Returns:
        The copy, in which every such module is a `Frozen` one: of a recurrent module itself a
        `Frozen`, else of the type of `model`.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: it contains no LSTM, GRU or RNN of rnn_fused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FusedRNNBase)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} contains no LSTM, GRU or RNN of rnn_fused to freeze; convert "
            "those of torch.nn first"
        )
    model = copy.deepcopy(model).eval()
    if isinstance(model, FusedRNNBase):
        return Frozen(model)
    frozen: dict[FusedRNNBase, Frozen] = {}
    for name, _ in found:
        module = model.get_submodule(name)
        assert isinstance(module, FusedRNNBase)
        if module not in frozen:  # it may be registered twice
            frozen[module] = Frozen(module)
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, frozen[module])
    return model


class Frozen(nn.Module):
    """An LSTM, GRU or RNN as it was when `freeze` made this: called like it, with the same results
    up to rounding, and `step` too.

    It has no parameters: nothing in it can be trained, moved or loaded, and gradients reach its
    inputs only. Its options can be read under their names. Weights are packed for the processor of
    this machine; pickles are packed again where they are loaded.

    Packed weights are used on the CPU, outside autocast, compilers and transforms, by calls that
    record no gradients and do not return all states of an LSTM. Elsewhere it runs as the module
    did.
    """

    def __init__(self, module: FusedRNNBase) -> None:
        """module: nobody else's, in evaluation mode."""
        super().__init__()
        self.eval()
        self.__dict__["_module"] = module.requires_grad_(False)  # not a submodule
        self._pack()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.step(*args, **kwargs)

    def extra_repr(self) -> str:
        return repr(self._module)

    def _pack(self) -> None:
        module: FusedRNNBase = self._module
        layers = [module._layer_weights(layer) for layer in range(module.num_layers)]
        module._packed = tuple(ops.pack_weights(w, module.mode.lower()) for w in layers)

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("_module")
        if module is not None and (name in module.__constants__ or name in OWN_OPTIONS):
            return getattr(module, name)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        module = copy.copy(self._module)
        module._packed = None
        return {**self.__dict__, "_module": module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

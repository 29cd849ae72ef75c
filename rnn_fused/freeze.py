"""`freeze`: recurrent modules for inference, their weights rearranged once for many calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import ops
from .base import OWN_OPTIONS, FusedRNNBase
from .ragged import host_knows


def freeze(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference on the CPU, with the weights of its LSTM, GRU and RNN modules
    packed.

    Kernels want weights in another order than the parameters have. A layer packs them at every
    call, or, where few rows are to be multiplied, does without. That is what short sequences in
    small batches, and single steps of a stream, pay for; a `Frozen` module does not.

    The copy is in evaluation mode and independent of `model`: weights that change later do not
    reach it. It holds the weights twice, packed and plain, and neither is among its parameters or
    in its `state_dict`: save it whole, or keep `model`.

    Args:
        model: a `rnn_fused` LSTM, GRU or RNN, or a module that contains some (`convert` those of
            torch.nn first: they stay as they are, like cells). Parametrised weights are taken as
            they are.

    Returns:
        The copy, in which every such module is a `Frozen` one: of a recurrent module itself a
        `Frozen`, else of the type of `model`.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: it contains no LSTM, GRU or RNN of rnn_fused, or one with forward pre-hooks,
            which may set its weights at every call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, FusedRNNBase | Frozen)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} contains no LSTM, GRU or RNN of rnn_fused to freeze; convert "
            "those of torch.nn first (cells cannot be frozen)"
        )
    for name, module in found:
        if isinstance(module, FusedRNNBase) and module._forward_pre_hooks:
            raise ValueError(
                f"{name or type(module).__name__} has forward pre-hooks, which may set its weights "
                "at every call: remove them before freeze (as torch.nn.utils.remove_weight_norm "
                "and torch.nn.utils.prune.remove do)"
            )
    with torch.inference_mode(False):
        model = copy.deepcopy(model).eval()
        if isinstance(model, FusedRNNBase):
            return Frozen(model)
        frozen: dict[nn.Module, Frozen] = {}  # a module may be registered more than once
        for parent in [m for m in model.modules() if not isinstance(m, FusedRNNBase)]:
            for name, child in parent._modules.items():  # also the second name of one
                if isinstance(child, FusedRNNBase):
                    # A copy of its own, whose parameters nobody shares.
                    module = frozen.get(child) or Frozen(copy.deepcopy(child))
                    frozen[child] = module
                    setattr(parent, name, module)
    return model


class Frozen(nn.Module):
    """An LSTM, GRU or RNN as it was when `freeze` made this: called like it, with the same results
    up to rounding, and `step` too.

    It has no parameters: nothing in it can be trained, moved or loaded, and gradients reach its
    inputs only. Its options can be read under their names. Weights are packed for the processor of
    this machine; pickles are packed again where they are loaded.

    Packed weights are used on the CPU, outside autocast, transforms, `torch.export` and other
    tracers, by calls that record no gradients and do not return all states; all layers are then one
    call. Elsewhere it runs as the module did. `torch.export` needs strict=False, its default, for
    weights that are no parameters.
    """

    def __init__(self, module: FusedRNNBase) -> None:
        """module: nobody else's, in evaluation mode."""
        super().__init__()
        self.eval()
        _bake(module)
        self.__dict__["_module"] = module.requires_grad_(False)  # not a submodule
        self._pack()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        return self._module(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own: one timestep of a stream, `step(input, state)`."""
        return self._module.step(*args, **kwargs)

    def flatten_parameters(self) -> None:
        """Does nothing, as the module's own."""

    def extra_repr(self) -> str:
        return repr(self._module)

    def _pack(self) -> None:
        module: FusedRNNBase = self._module
        layers = module._weights_by_layer()
        if host_knows(layers[0].weight_hh[0]):
            module._packed = [ops.pack_weights(w, module.mode.lower()) for w in layers]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        """What `to`, `half` and the like do: refused where it would change anything.

        Raises:
            RuntimeError: fn changes the dtype or the device.
        """
        like = self._module.weight_hh_l0.new_empty(0)
        moved = fn(like)
        if (moved.dtype, moved.device) != (like.dtype, like.device):
            raise RuntimeError(
                f"a frozen {self._module._get_name()} stays in {like.dtype} on {like.device}, got "
                f"{moved.dtype} on {moved.device}: convert and move the model before freeze"
            )
        super()._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("_module")
        if module is not None and (name in module.__constants__ or name in OWN_OPTIONS):
            return getattr(module, name)
        if module is not None and name in module._parameters:
            kind = module._get_name()
            raise AttributeError(f"a frozen {kind} has no {name}: keep the model it came from")
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        module = copy.copy(self._module)
        module._packed = None
        return {**self.__dict__, "_module": module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()


def _bake(module: FusedRNNBase) -> None:
    """Parametrised weights become plain ones. Not by `remove_parametrizations`, which changes the
    class, and a copied module shares that with the original."""
    if not parametrize.is_parametrized(module):
        return
    names: Any = module.parametrizations
    values = {name: getattr(module, name).detach().clone() for name in names}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))

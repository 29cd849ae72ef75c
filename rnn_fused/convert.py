"""Swaps the recurrent modules inside a model for their fused twins, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import cells, modules
from .base import OWN_OPTIONS
from .freeze import Frozen

FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNN: modules.RNN,
    nn.LSTMCell: cells.LSTMCell,
    nn.GRUCell: cells.GRUCell,
    nn.RNNCell: cells.RNNCell,
}
STOCK = {fused: stock for stock, fused in FUSED.items()}

NOTES = (
    (
        "isinstance(module, torch.nn.LSTM) is now False (likewise GRU, RNN and the cells): code "
        "that asks for those types passes the converted modules over, such as initialisers of "
        "weights, torch.ao.quantization.quantize_dynamic and pruning"
    ),
    (
        "torch.jit.script, torch.jit.trace and the TorchScript-based torch.onnx.export need the "
        "modules of torch.nn: run rnn_fused.revert(model) before them"
    ),
    (
        "torch.fx.symbolic_trace keeps modules of torch.nn whole and would trace into converted "
        "ones: use a torch.fx.Tracer whose is_leaf_module names them"
    ),
    (
        "an output must not be changed in place before backward (y += x, F.relu_(y)): it is saved "
        "for the gradients, as cuDNN does; some layers of torch.nn on the CPU allow it"
    ),
)


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` or `revert` did; print it to read it.

    Names are those of `model.named_modules()`; a module registered under several names is listed
    under each, and the model itself is "".
    """

    model: nn.Module
    replaced: tuple[str, ...]
    skipped: Mapping[str, str]  # name -> reason
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, skipped {len(self.skipped)}"]
        lines += [
            f"  replaced {_label(name)}: {type(self.model.get_submodule(name)).__name__}"
            for name in self.replaced
        ]
        lines += [f"  skipped {_label(name)}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def convert(model: nn.Module) -> ConversionReport:
    """Makes every `torch.nn` LSTM, GRU, RNN and cell in `model`, itself included, a fused one.

    The modules change their class and stay the objects they are. So nothing that holds them or
    their parameters notices: optimizers, hooks, shared modules, training mode, requires_grad,
    parametrizations (`torch.nn.utils.parametrize`) and references from Python containers. The
    names in `state_dict` stay too: checkpoints load before and after alike.

    Only modules of exactly these types are converted. A subclass has code of its own that may
    rely on the parent's, so it is left as it is and reported as skipped, like a TorchScript
    module and one whose `forward` was replaced on the instance. Modules that are not registered
    in the model, such as those in a plain list, are not found.

    Returns:
        A report; its `model` is `model`.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
    """
    return _swap(model, FUSED, NOTES)


def revert(model: nn.Module) -> ConversionReport:
    """Undoes `convert`: every module of this package in `model` becomes its `torch.nn` original.

    It makes no difference whether the modules came from `convert` or were constructed as fused.
    One with an option that torch.nn lacks, such as `learn_initial_state`, is skipped.
    What is kept, skipped, returned and raised: as for `convert`.
    """
    report = _swap(model, STOCK, ())
    for name in report.replaced:
        module = model.get_submodule(name)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN wants the weights in one piece
    return report


def _swap(
    model: nn.Module,
    table: Mapping[type[nn.Module], type[nn.Module]],
    notes: tuple[str, ...],
) -> ConversionReport:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = list(model.named_modules(remove_duplicate=False))
    skipped = {name: reason for name, module in found if (reason := _obstacle(module, table))}
    chosen = {
        name: module
        for name, module in found
        if name not in skipped and parametrize.type_before_parametrizations(module) in table
    }
    for module in {id(module): module for module in chosen.values()}.values():
        _set_class(module, table[parametrize.type_before_parametrizations(module)])
    return ConversionReport(model, tuple(chosen), skipped, notes if chosen else ())


def _obstacle(module: nn.Module, table: Mapping[type[nn.Module], type[nn.Module]]) -> str | None:
    """Why a module that looks like one of the table's is to be left alone."""
    if isinstance(module, torch.jit.ScriptModule):
        names = {cls.__name__ for cls in table}
        return "is a TorchScript module" if module.original_name in names else None
    if isinstance(module, Frozen):
        return "is frozen"
    if not isinstance(module, tuple(table)):
        return None
    cls = parametrize.type_before_parametrizations(module)
    if cls not in table:
        base = next(base for base in cls.__mro__ if base in table)
        return f"{cls.__qualname__} is a subclass of {base.__name__}: its code may rely on the base"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    for option, default in OWN_OPTIONS.items():
        if (value := getattr(module, option, default)) != default:
            return f"torch.nn has no {option}={value!r}"
    return None


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        # torch keeps the parametrised tensors as properties of a class made for this module.
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    module.__class__ = cls


def _label(name: str) -> str:
    return name or "(the model itself)"

"""torch's own samples for its recurrent modules, run on ours.

They are the entries of `module_db`, from which torch's test suite takes its inputs, references
and mistakes. Beyond comparing results, the checks are those which that suite makes.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from pairs import compare, tensors
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

import rnn_fused

common = pytest.importorskip("torch.testing._internal.common_modules")

MODULES = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
INFOS = {i.module_cls.__name__: i for i in common.module_db if i.module_cls in MODULES}
infos = pytest.mark.parametrize("name", INFOS)


def samples(name: str, **options: Any) -> Iterator[tuple[nn.Module, nn.Module, tuple, Any]]:
    """(torch.nn's module, ours with its weights, arguments of forward, torch's sample)."""
    info = INFOS[name]
    options = {
        "device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": True, **options
    }  # fmt: skip
    torch.manual_seed(0)
    for sample in info.module_inputs_func(info, **options):
        arguments = sample.constructor_input
        keywords = {"dtype": options["dtype"], **arguments.kwargs}
        stock, ours = (
            getattr(library, name)(*arguments.args, **keywords).train(options["training"])
            for library in (nn, rnn_fused)
        )
        ours.load_state_dict(stock.state_dict())
        assert not sample.forward_input.kwargs
        yield stock, ours, sample.forward_input.args, sample


@infos
def test_there_are_samples(name: str) -> None:
    assert sum(1 for _ in samples(name)) >= 2


@infos
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_and_gradients(name: str, training: bool, dtype: torch.dtype) -> None:
    for stock, ours, args, sample in samples(name, training=training, dtype=dtype):
        compare(stock, ours, *args)
        if sample.reference_fn is not None and not isinstance(args[0], PackedSequence):
            expected = sample.reference_fn(ours, *args)
            assert_close(tensors(ours(*args)), tensors(expected))


@infos
def test_derivatives(name: str) -> None:
    """First, second and forward-mode derivatives against finite differences."""
    # Every fifth: the samples are a product of options with two values each.
    for _, ours, args, _ in islice(samples(name), 0, None, 5):
        if isinstance(args[0], PackedSequence):
            continue
        leaves = tensors(args)
        names, weights = zip(*ours.named_parameters(), strict=True)

        def run(*values: Tensor, ours: Any = ours, args: Any = args, names: Any = names) -> Any:
            given, values = values[: -len(names)], values[-len(names) :]
            hx = given[1:] if isinstance(args[-1], tuple) else given[1] if given[1:] else None
            parameters = dict(zip(names, values, strict=True))
            return tuple(tensors(torch.func.functional_call(ours, parameters, (given[0], hx))))

        inputs = [t.detach().requires_grad_() for t in (*leaves, *weights)]
        assert gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(run, inputs, fast_mode=True)


@infos
def test_mistakes(name: str) -> None:
    info = INFOS[name]
    mistakes = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
    )
    for mistake in mistakes:
        sample = mistake.module_error_input
        arguments, forward = sample.constructor_input, sample.forward_input
        at_construction = mistake.error_on == common.ModuleErrorEnum.CONSTRUCTION_ERROR

        def construct(arguments: Any = arguments) -> nn.Module:
            keywords = {"dtype": torch.float64, **arguments.kwargs}
            return getattr(rnn_fused, name)(*arguments.args, **keywords)

        call = construct if at_construction else construct()
        args = () if at_construction else forward.args
        with pytest.raises(mistake.error_type) as raised:
            call(*args)
        assert re.search(mistake.error_regex, str(raised.value))


@infos
def test_non_contiguous_tensors(name: str) -> None:
    """Any argument or weight may have gaps."""

    def gapped(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)[..., 0].detach() if t.numel() > 1 else t

    for stock, ours, args, _ in samples(name, requires_grad=False):
        if isinstance(args[0], PackedSequence):
            continue
        for parameter in ours.parameters():
            parameter.data = gapped(parameter.data)
        x, *hx = args
        states = [tuple(map(gapped, s)) if isinstance(s, tuple) else gapped(s) for s in hx]
        assert_close(tensors(ours(gapped(x), *states)), tensors(stock(*args)))


@infos
def test_copies_and_moves(name: str) -> None:
    for _, ours, args, _ in samples(name, requires_grad=False):
        expected = tensors(ours(*args))
        assert repr(ours)
        for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert_close(tensors(module(*args)), expected)
        for memory_format in (torch.contiguous_format, torch.preserve_format):
            assert_close(tensors(ours.to(memory_format=memory_format)(*args)), expected)
        assert_close(tensors(ours.float().double()(*args)), expected, rtol=1e-6, atol=1e-6)


@infos
def test_factory_arguments(name: str) -> None:
    info = INFOS[name]
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
    ):
        arguments = sample.constructor_input
        for expected in ({"device": "meta"}, {"dtype": torch.float16}):
            module = getattr(rnn_fused, name)(*arguments.args, **{**arguments.kwargs, **expected})
            for parameter in module.parameters():
                assert parameter.dtype == expected.get("dtype", torch.get_default_dtype())
                assert parameter.device.type == expected.get("device", "cpu")


@infos
def test_inputs_are_left_alone(name: str) -> None:
    for _, ours, args, _ in samples(name, requires_grad=False):
        before = copy.deepcopy(tensors(args))
        ours(*args)
        assert_close(tensors(args), before, rtol=0, atol=0)

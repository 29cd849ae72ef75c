"""Derivatives of every order and kind, as torch's tools take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import KINDS, Layer, Problem, each_kind, each_layout, problem
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from rnn_fused import autograd, library, ops, reference


def small(kind: str, **options: Any) -> Problem:
    """Few numbers, since checks by finite differences and Hessians take a pass for each."""
    return problem(**KINDS[kind], **{"T": 3, "B": 2, "I": 2, "H": 3, **options})


def assert_same(function: Callable[[Layer], Any]) -> None:
    torch.testing.assert_close(function(ops.layer), function(reference.layer))


@each_kind
@each_layout
@pytest.mark.parametrize("directions", [1, 2])
def test_gradcheck(kind: str, lengths: tuple[int, ...] | None, directions: int) -> None:
    case = small(kind, lengths=lengths, directions=directions)
    function = case.function(ops.layer)
    assert gradcheck(
        function, case.tensors, fast_mode=True, check_forward_ad=True, check_batched_grad=True
    )
    assert gradgradcheck(
        function, case.tensors, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@each_kind
def test_without_a_state(kind: str) -> None:
    case = small(kind, state=False, directions=2)
    for function in (case.function(ops.layer), case.op_function()):
        assert gradcheck(function, case.tensors, fast_mode=True)
        assert gradgradcheck(function, case.tensors, fast_mode=True)
    case = case.map(Tensor.detach)
    tensors, every = case.tensors, tuple(range(len(case.tensors)))
    inputs = torch.stack([case.input, -case.input])
    dims = (0, *(None,) * (len(tensors) - 1))
    assert_same(lambda layer: hessian(case.loss(layer), (0, len(tensors) - 1))(*tensors))
    assert_same(lambda layer: jvp(case.function(layer), tensors, tensors))
    assert_same(lambda layer: vmap(case.function(layer), dims)(inputs, *tensors[1:]))
    assert_same(lambda f: vmap(grad(case.loss(f), every), dims)(inputs, *tensors[1:]))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradcheck_of_every_element(cell: str) -> None:
    case = small(cell, T=2, H=2)
    assert gradcheck(case.function(ops.layer), case.tensors)


@pytest.mark.own_ops
@each_kind
@each_layout
def test_the_ops_themselves(kind: str, lengths: tuple[int, ...] | None) -> None:
    """Direct calls, which compilers trace too, take their derivatives from the registration."""
    case = small(kind, lengths=lengths, bias=kind != "gru")
    function = case.op_function()
    assert gradcheck(function, case.tensors, fast_mode=True)
    assert gradgradcheck(function, case.tensors, fast_mode=True)


@each_kind
@each_layout
def test_func_transforms(kind: str, lengths: tuple[int, ...] | None) -> None:
    case = small(kind, lengths=lengths, requires_grad=False)
    tensors, every = case.tensors, tuple(range(len(case.tensors)))
    assert_same(lambda layer: grad(case.loss(layer), every)(*tensors))
    assert_same(lambda layer: jacrev(case.function(layer), every)(*tensors))
    assert_same(lambda layer: jacfwd(case.function(layer), every)(*tensors))
    assert_same(lambda layer: jvp(case.function(layer), tensors, tensors))


@pytest.mark.parametrize("kind", ["lstm_proj", "gru", "rnn_tanh"])
@each_layout
def test_hessians(kind: str, lengths: tuple[int, ...] | None) -> None:
    case = small(kind, T=2, lengths=lengths and (2, 1), H=3, requires_grad=False)
    some = 0, len(case.tensors) - 1
    assert_same(lambda layer: hessian(case.loss(layer), some)(*case.tensors))
    assert_same(lambda layer: jacrev(jacrev(case.loss(layer), some), some)(*case.tensors))


@each_kind
@each_layout
def test_vmap(kind: str, lengths: tuple[int, ...] | None) -> None:
    case = small(kind, lengths=lengths, directions=2, requires_grad=False)
    tensors, rest = case.tensors, len(case.tensors) - 1
    inputs = torch.stack([tensors[0], -tensors[0], 2 * tensors[0]], 1)
    states = torch.stack([tensors[1], -tensors[1], 2 * tensors[1]])
    last = torch.stack([tensors[-1], -tensors[-1], 2 * tensors[-1]])

    def over(layer: Layer, *dims: int | None, out: int = 0) -> Any:
        return vmap(case.function(layer), dims, out)

    none = (None,) * (rest - 1)
    assert_same(lambda f: over(f, 1, None, *none)(inputs, *tensors[1:]))
    assert_same(lambda f: over(f, None, 0, *none, out=1)(tensors[0], states, *tensors[2:]))
    assert_same(lambda f: over(f, 1, *(None,) * (rest - 1), 0)(inputs, *tensors[1:-1], last))
    assert_same(
        lambda f: vmap(over(f, 1, None, *none), (None, 0, *none))(inputs, states, *tensors[2:])
    )


@each_kind
@each_layout
def test_per_sample_gradients(kind: str, lengths: tuple[int, ...] | None) -> None:
    case = small(kind, lengths=lengths, directions=2, requires_grad=False)
    inputs = torch.stack([case.input, -case.input])
    every = tuple(range(len(case.tensors)))

    def per_sample(layer: Layer) -> Any:
        dims = (0, *(None,) * (len(every) - 1))
        return vmap(grad(case.loss(layer), every), dims)(inputs, *case.tensors[1:])

    def through_vmap(layer: Layer) -> Any:
        def loss(inputs: Tensor, weight: Tensor) -> Tensor:
            rest = *case.tensors[1:-1], weight
            return vmap(lambda x: case.loss(layer)(x, *rest))(inputs).sum()

        return grad(loss, (0, 1))(inputs, case.tensors[-1])

    assert_same(per_sample)
    assert_same(through_vmap)


def test_vmap_without_gradients_saves_nothing() -> None:
    case = small("lstm", requires_grad=False)
    inputs = torch.stack([case.input, -case.input])

    def run(layer: Layer) -> Any:
        with torch.no_grad():
            return vmap(lambda x: replace(case, input=x).run(layer))(inputs)

    assert_same(run)


@each_kind
def test_dual_numbers(kind: str) -> None:
    case = small(kind, requires_grad=False)

    def tangent(layer: Layer) -> Tensor:
        with forward_ad.dual_level():
            dual = replace(case, input=forward_ad.make_dual(case.input, case.input.cos()))
            return forward_ad.unpack_dual(dual.run(layer)[0]).tangent

    assert_same(tangent)


@each_kind
def test_vectorized_jacobian_and_hessian(kind: str) -> None:
    """torch.autograd.functional's batched gradients, which predate torch.func."""
    case = small(kind, T=2)
    functional = torch.autograd.functional
    assert_same(lambda f: functional.jacobian(case.function(f), case.tensors, vectorize=True))
    assert_same(lambda f: functional.hessian(case.loss(f), case.tensors, vectorize=True))


@each_kind
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(kind: str, reentrant: bool) -> None:
    case = small(kind)

    def gradients(layer: Layer, **options: Any) -> tuple[Tensor, ...]:
        outputs = checkpoint(case.function(layer), *case.tensors, use_reentrant=reentrant)
        sum(o.sum() for o in outputs).backward()
        result = tuple(x.grad for x in case.tensors)
        for x in case.tensors:
            x.grad = None
        return result

    assert_same(gradients)


class Module(nn.Module):
    def __init__(self, case: Problem, layer: Layer) -> None:
        super().__init__()
        self.case, self.layer = case, layer
        self.parameters_ = nn.ParameterList(w.detach() for field in case.weights for w in field)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        states = (s for s in (self.case.hx, self.case.cx) if s is not None)
        return self.case.with_tensors([input, *states, *self.parameters_]).run(self.layer)


@each_kind
def test_functional_call(kind: str) -> None:
    case = small(kind, requires_grad=False)

    def gradients(layer: Layer) -> dict[str, Tensor]:
        module = Module(case, layer)
        parameters = {name: 2 * p.detach() for name, p in module.named_parameters()}
        return grad(lambda p: functional_call(module, p, (case.input,))[0].sum())(parameters)

    assert_same(gradients)


@each_kind
def test_accumulates_into_grad(kind: str) -> None:
    case = small(kind)
    for _ in range(2):
        case.run(ops.layer)[0].sum().backward()
    once = torch.autograd.grad(case.run(ops.layer)[0].sum(), case.tensors, materialize_grads=True)
    for tensor, gradient in zip(case.tensors, once, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad, 2 * gradient
        )


@pytest.mark.parametrize("kind", ["lstm_proj", "gru"])
@each_layout
def test_backward_takes_the_place_of_the_gates(
    kind: str, lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where nobody can come back for them, and with the same bits."""
    ops_run: list[str] = []
    run = autograd._run_backward

    def spy(op: Any, *args: Any) -> Any:
        ops_run.append(op.overloadpacket.__name__)
        return run(op, *args)

    monkeypatch.setattr(autograd, "_run_backward", spy)
    case = small(kind, lengths=lengths, directions=2, resets=0.3)
    output = case.run(ops.layer)[0]
    first, second, last = (
        torch.autograd.grad(output.sum(), case.tensors, retain_graph=keep)
        for keep in (True, True, False)
    )
    assert ops_run == ["layer_backward", "layer_backward", "layer_backward_"]
    for a, b, c in zip(first, second, last, strict=True):
        assert a.equal(b)
        assert a.equal(c)
    ops_run.clear()
    torch.autograd.grad(case.run(ops.layer)[0].sum(), case.tensors, create_graph=True)
    torch.func.grad(case.loss(ops.layer))(*case.map(Tensor.detach).tensors)
    assert ops_run == ["layer_backward"] * 2


def test_a_backward_pass_that_failed_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gates may be gone; without gates to lose, the second one is right."""
    backward = library.layer_backward_

    def fail(*args: Any) -> None:
        backward(*args)
        raise RuntimeError("no memory")

    for cell in ("lstm", "rnn_tanh"):
        case = problem(cell)
        output = case.run(ops.layer)[0].sum()
        expected = torch.autograd.grad(output, case.tensors, retain_graph=True)
        monkeypatch.setattr(library, "layer_backward_", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            torch.autograd.grad(output, case.tensors)
        monkeypatch.setattr(library, "layer_backward_", backward)
        if cell == "lstm":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(output, case.tensors)
        else:
            again = torch.autograd.grad(output, case.tensors)
            torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_overwritten_gates_are_noticed() -> None:
    """By hooks that keep the saved tensors beyond the backward pass."""
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    case = small("lstm")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = case.run(ops.layer)[0]
    before = [x._version for x in kept]
    output.sum().backward()
    changed = [x for x, v in zip(kept, before, strict=True) if x._version != v]
    assert [x.dim() for x in changed] == [4]  # gates [D, N, 4, H]


def test_saved_tensor_hooks() -> None:
    case = small("lstm")
    with torch.autograd.graph.save_on_cpu():
        output = case.run(ops.layer)[0]
    expected = torch.autograd.grad(case.run(ops.layer)[0].sum(), case.tensors)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), case.tensors), expected)


def test_changed_weights_are_noticed() -> None:
    case = small("lstm")
    output = case.run(ops.layer)[0]
    with torch.no_grad():
        case.weights.weight_hh[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()

"""The op under torch.compile, torch.export and torch's own checks of custom ops."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import KINDS, Problem, each_kind, problem, values_and_gradients
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from rnn_fused import library, ops, reference
from rnn_fused.reference import LayerWeights


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend: str = "aot_eager", dynamic: bool | None = None) -> Callable[..., Any]:
    def layer(*args: Any, **options: Any) -> Any:
        return ops.layer(*args, **options)

    return torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@each_kind
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["training", "inference"])
def test_one_graph_for_all_lengths(kind: str, packed: bool, requires_grad: bool) -> None:
    layer, before = compiled(dynamic=True), graphs()
    for n in (5, 6, 9):  # no two sizes are equal at first, since equal ones stay tied
        sizes: dict[str, Any] = (
            {"lengths": (n, n, 2, 2, 2, 1, 1)} if packed else {"T": n, "B": n + 6}
        )
        case = problem(**KINDS[kind], **sizes, directions=2, requires_grad=requires_grad)
        if requires_grad:
            actual, expected = (values_and_gradients(case, f) for f in (layer, ops.layer))
            torch.testing.assert_close(actual, expected)
        else:
            torch.testing.assert_close(case.run(layer), case.run(ops.layer))
    assert graphs() - before == 1


def test_inductor() -> None:
    case = problem("lstm", directions=2, dtype=torch.float32)
    torch.testing.assert_close(
        values_and_gradients(case, compiled("inductor")), values_and_gradients(case, ops.layer)
    )


def test_autocast() -> None:
    case = problem("gru", dtype=torch.float32)

    def layer(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ops.layer(*args, **options)

    actual = values_and_gradients(case, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(actual, values_and_gradients(case, layer))


def test_func_transforms() -> None:
    """Inside a compiled region they run the reference, unrolled."""
    case = problem("lstm", T=2, requires_grad=False)
    inputs = torch.stack([case.input, -case.input])
    dims = (0, *(None,) * (len(case.tensors) - 1))
    rest = case.tensors[1:]

    def derivatives(layer: Any) -> Any:
        per_sample = vmap(grad(case.loss(layer), (0, 1)), dims)(inputs, *rest)
        return per_sample, jvp(case.function(layer), case.tensors, case.tensors)

    run = torch.compile(lambda: derivatives(ops.layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(), derivatives(reference.layer))


class Module(nn.Module):
    def __init__(self, case: Problem) -> None:
        super().__init__()
        self.case = case
        self.flat = nn.ParameterList(w.detach() for field in case.weights for w in field)

    def forward(
        self,
        input: Tensor,
        hx: Tensor,
        cx: Tensor | None,
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, ...]:
        rest = iter(self.flat)
        weights = LayerWeights(*(tuple(next(rest) for _ in field) for field in self.case.weights))
        outputs = ops.layer(input, hx, cx, weights, cell=self.case.cell, batch_sizes=batch_sizes)
        return tuple(o for o in outputs if o is not None)


@pytest.mark.parametrize("kind", ["lstm_proj", "gru"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(kind: str, packed: bool, strict: bool) -> None:
    def case(n: int) -> Problem:
        sizes: dict[str, Any] = {"lengths": (n, n, 2)} if packed else {"T": n, "B": n + 1}
        return problem(**KINDS[kind], **sizes, requires_grad=False)

    def arguments(case: Problem) -> tuple[Tensor | None, ...]:
        return case.input, case.hx, case.cx, case.batch_sizes

    first, second = case(3), case(5)
    module = Module(first)
    dynamic = torch.export.Dim.AUTO
    axes = (
        ({0: dynamic}, None, None, {0: dynamic})
        if packed
        else (
            {0: dynamic, 1: dynamic},
            {1: dynamic},
            (first.cx is not None and {1: dynamic}) or None,
            None,
        )
    )
    program = torch.export.export(module, arguments(first), dynamic_shapes=axes, strict=strict)
    assert program.graph.find_nodes(op="call_function", target=library.layer_forward)
    exported = program.module()
    outputs, expected = exported(*arguments(second)), module(*arguments(second))
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(
        torch.autograd.grad(outputs[0].sum(), tuple(exported.parameters())),
        torch.autograd.grad(expected[0].sum(), tuple(module.parameters())),
    )


def test_make_fx() -> None:
    case = problem("lstm")

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(case.function(ops.layer)(*tensors)[0].sum(), tensors)

    graph = make_fx(gradients)(*case.tensors).graph
    for op in (library.layer_forward, library.layer_backward):
        assert len(graph.find_nodes(op="call_function", target=op)) == 1


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("lstm_proj", {}),
        ("lstm_proj", {"state": False}),
        ("lstm", {"lengths": (3, 2)}),
        ("gru", {}),
        ("rnn_relu", {"lengths": (2, 2)}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck_of_the_forward(kind: str, layout: dict[str, Any], dtype: torch.dtype) -> None:
    case = problem(**KINDS[kind], **layout, directions=2, dtype=dtype)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {}
    arguments = *case.op_arguments, True, True
    torch.library.opcheck(library.layer_forward, arguments, **tolerance)


@pytest.mark.parametrize(
    ("kind", "layout", "needs"),
    [
        ("lstm", {}, (True, True, True)),
        ("lstm", {"state": False}, (True, True, True)),
        ("lstm_proj", {"lengths": (3, 2)}, (False, True, False)),
        ("gru", {"lengths": (3, 2)}, (True, False, True)),
        ("rnn_tanh", {}, (False, False, True)),
    ],
)
def test_opcheck_of_the_backward(
    kind: str, layout: dict[str, Any], needs: tuple[bool, ...]
) -> None:
    # torch 2.11 cannot trace a second derivative, and that of packed input takes a while.
    second = "lengths" not in layout and not torch.__version__.startswith("2.11.")
    options = {**layout, "requires_grad": second}
    case = problem(**KINDS[kind], **options, directions=2, dtype=torch.float32)
    with torch.no_grad():
        output, h_n, c_n, *saved = library.layer_forward(*case.op_arguments, True, True)
    lstm = case.cell == "lstm"
    likes = [output, h_n, c_n if lstm else None, saved[1] if lstm else None]
    grads = [None if o is None else torch.randn_like(o, requires_grad=second) for o in likes]
    arguments = *grads, *case.op_arguments, output, *saved, *needs
    torch.library.opcheck(library.layer_backward, arguments)


def test_the_compiler_is_not_imported_before_it_is_wanted() -> None:
    """It takes a second."""
    code = (
        "import sys, torch, rnn_fused; rnn_fused.GRU(2, 3)(torch.ones(1, 1, 2));"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

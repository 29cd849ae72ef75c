"""Derivatives of the fused ops.

`LayerForward` and `LayerBackward` are what `ops.layer` runs in eager mode: autograd and the
transforms of `torch.func` both understand an autograd.Function with `setup_context` and a `vmap`
rule. `StackForward` is what `ops.stack` runs, outside transforms. The layers' ops themselves carry
the same formulas through `register_autograd`, for compilers and direct calls. Forward-mode AD runs
the reference instead.

A layer's *primals* are `input, hx, cx, reset_hx, reset_cx, *slots`, where the slots are its
weights, field by field and direction by direction, None where absent: Functions take tensors as
flat arguments. Those of a stack have its states, and field by field the layers one after the other.
`sizes` (the ops' batch_sizes or lengths) and `resets` have no derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress, islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import Function, forward_ad

from . import library, reference
from .library import Call
from .ragged import ragged
from .reference import CellOptions, LayerOutputs, LayerWeights

Slots = Sequence[Tensor | None]
FIELDS = len(LayerWeights._fields)
STATES = 5  # primals before the slots
GRADS = 4  # outputs with a gradient: output, h_n, c_n, cells


def flatten(fields: Sequence[Sequence[Any]]) -> list[Any]:
    """LayerWeights, or anything of that form, as slots."""
    absent = [None] * len(fields[0])
    slots: list[Any] = []
    for field in fields:
        slots += field or absent
    return slots


def unflatten(slots: Slots) -> LayerWeights:
    D = len(slots) // FIELDS
    fields: Any = [() if slots[k] is None else slots[k : k + D] for k in range(0, len(slots), D)]
    return LayerWeights(*fields)


def forward_mode() -> bool:
    """Whether forward-mode AD is under way (and can be told: a compiler traces no dual numbers)."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def batched_grads(grads: Slots) -> bool:
    """Whether these come from `torch.autograd.grad(is_grads_batched=True)`, which knows no rules
    of Functions."""
    return not torch.compiler.is_compiling() and any(
        torch._C._functorch.is_legacy_batchedtensor(g) for g in grads if g is not None
    )


class LayerForward(Function):
    """`layer_forward`, differentiable to any order."""

    @staticmethod
    def forward(
        call: Call,
        save_gates: bool,
        save_cells: bool,
        sizes: Tensor | None,
        resets: Tensor | None,
        *primals: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = library.run(
            library.layer_forward,
            *(*primals[:STATES], *unflatten(primals[STATES:]), sizes, resets),
            *(*call.arguments, save_gates, save_cells),
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        ctx.call, _, _, sizes, resets, *primals = inputs
        output, _, c_n, gates, cells = outputs
        ctx.save_for_backward(sizes, resets, output, gates, cells, *primals)
        absent = [x for x in (c_n, cells) if x.dim() == 1]
        ctx.mark_non_differentiable(gates, *absent)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph
        once = not torch.compiler.is_compiling() and not keep_graph()
        return *(None,) * 5, *first_order(ctx, grads, ctx.needs_input_grad[5:], once=once)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        *how, sizes, resets, input, hx, cx, _, _ = args[: 5 + STATES]
        ragged_or_reset = sizes is not None or resets is not None
        if ragged_or_reset or any(dim is not None for dim in in_dims[5 + STATES :]):
            return _loop_over_samples(LayerForward, info, in_dims, args)
        slots = args[5 + STATES :]
        return _fold_samples(info.batch_size, in_dims[5:8], how, input, hx, cx, slots)


class StackForward(Function):
    """`stack_forward`, differentiable to any order: what the layers are one by one."""

    @staticmethod
    def forward(
        call: Call,
        layers: int,
        masks: Sequence[Tensor],
        save_gates: bool,
        save_cells: bool,
        sizes: Tensor | None,
        resets: Tensor | None,
        *primals: Tensor | None,
    ) -> tuple[Tensor, ...]:
        *outputs, below, gates, cells = library.run(
            library.stack_forward,
            *(*primals[:STATES], *unflatten(primals[STATES:]), sizes, resets),
            *(*call.arguments, layers, masks, save_gates, save_cells),
        )
        # Second derivatives come through `below`, the inputs of the layers above the first.
        return *outputs, *below, *gates, *cells

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        ctx.call, ctx.layers, masks, _, _, sizes, resets, *primals = inputs
        output, _, c_n, *saved = outputs
        ctx.primals = len(primals)
        ctx.save_for_backward(sizes, resets, output, *saved, *primals, *masks)
        absent = [c_n] if c_n.dim() == 1 else []
        ctx.mark_non_differentiable(*saved[ctx.layers - 1 :], *absent)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed, layers = ctx.needs_input_grad[7:], ctx.layers
        sizes, resets, output, *rest = ctx.saved_tensors
        saved = iter(rest)
        counts = layers - 1, layers, layers, ctx.primals
        below, gates, cells, primals = ([*islice(saved, count)] for count in counts)
        masks = [*saved]
        states, of_below = grads[:3], grads[3 : 2 + layers]
        if _one_by_one(grads) or any(g is not None for g in of_below):
            of_layers = [*zip([*below, output], gates, cells, strict=True)]
            how = ctx.call, sizes, resets, of_layers, masks
            gradients = _layers_in_turn(how, [*of_below, states[0]], states[1:], primals, needed)
            return *(None,) * 7, *gradients
        op = library.stack_backward
        if not torch._C._autograd._get_current_graph_task_keep_graph() and _expendable(
            gates + cells
        ):
            op = library.stack_backward_
        *gradients, weights = library.run(
            op,
            *(*states, *primals[:STATES], *unflatten(primals[STATES:]), sizes, resets),
            *(*ctx.call.arguments, layers, masks, output, below, gates, cells, *_needs(needed)),
        )
        return *(None,) * 7, *_placed((*gradients, *weights), primals, needed)


class LayerBackward(Function):
    """`layer_backward`, differentiable to any order through the reference."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _run_backward(library.layer_backward, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        ctx.call, need_input, need_state, _, sizes, resets, _, _, _, *rest = inputs
        ctx.save_for_backward(sizes, resets, *rest)  # of the outputs the gradients, primals
        states = rest[GRADS + 1 : GRADS + STATES]
        computed = need_input, *(need_state and state is not None for state in states)
        empty = [gradient for gradient, c in zip(outputs[:STATES], computed, strict=True) if not c]
        ctx.mark_non_differentiable(*empty)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *(None,) * 9, *second_order(ctx, grads)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return _loop_over_samples(LayerBackward, info, in_dims, args)


def _run_backward(
    op: Callable[..., Any],
    call: Call,
    need_input: bool,
    need_state: bool,
    need_weights: bool,
    sizes: Tensor | None,
    resets: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    *grads_and_primals: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of the primals that are present, by `layer_backward` or `layer_backward_`."""
    grads, primals = grads_and_primals[:GRADS], grads_and_primals[GRADS:]
    *gradients, grad_weights = library.run(
        op,
        *(*grads, *primals[:STATES], *unflatten(primals[STATES:]), sizes, resets),
        *(*call.arguments, output, gates, cells, need_input, need_state, need_weights),
    )
    return *gradients, *grad_weights


def apply(function: type[Function], how: Sequence[Any], tensors: Slots) -> Any:
    """`function.apply(*how, *tensors)`, without its search for default arguments, which takes as
    long as a small layer. Compilers and torch.func's transforms have to see `Function.apply`
    itself."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*how, *tensors)
    # A tensor that was left over from a transform is a wrapper.
    unwrapped = [x if x is None else unwrap_if_dead(x) for x in tensors]
    return super(Function, function).apply(*how, *unwrapped)  # type: ignore[misc]


def first_order(
    ctx: Any, grads: Slots, needed: Sequence[bool | None], *, once: bool = False
) -> list[Tensor | None]:
    """The gradients of the primals that are needed, from those of LayerForward's outputs.

    once: nobody else will see the saved gates, so that their memory may be overwritten.
    """
    return _layer_gradients(ctx.call, ctx.saved_tensors, grads, needed, once)


def _layer_gradients(
    call: Call, saved: Sequence[Any], grads: Slots, needed: Sequence[bool | None], once: bool
) -> list[Tensor | None]:
    """saved: as LayerForward saves it."""
    sizes, resets, output, gates, cells, *primals = saved
    if forward_mode() or batched_grads(grads):
        return reference_vjp(call, sizes, resets, _differentiable(grads), primals)
    how = call, *_needs(needed)
    tensors = sizes, resets, output, gates, cells, *_differentiable(grads), *primals
    if _differentiates():
        gradients = apply(LayerBackward, how, tensors)
    elif once and _expendable([gates]):
        gradients = _run_backward(library.layer_backward_, *how, *tensors)
    else:
        gradients = LayerBackward.forward(*how, *tensors)
    return _placed(gradients, primals, needed)


def _layers_in_turn(
    how: tuple[Call, Tensor | None, Tensor | None, Sequence[Any], Sequence[Tensor]],
    grad_outputs: Slots,
    grad_states: Slots,
    primals: Slots,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of a stack's primals, from those of the outputs of all layers and of the final
    states. how: the call, sizes, resets, what is saved of each layer, and masks."""
    call, sizes, resets, saved, masks = how
    layers, slots = len(saved), primals[STATES:]
    size = len(slots) // FIELDS // layers  # D

    def own(states: Slots, layer: int) -> list[Tensor | None]:
        return [s if s is None else s[layer * size : (layer + 1) * size] for s in states]

    def own_slots(values: Sequence[Any], layer: int) -> list[Any]:
        fields = range(layer * size, len(values), layers * size)
        return [value for k in fields for value in values[k : k + size]]

    of_layers: list[Any] = []  # gradients of their own states and slots
    above: Tensor | None = None  # the gradient of a layer's input
    for layer in reversed(range(layers)):
        input: Any = primals[0] if layer == 0 else saved[layer - 1][0]
        mask = masks[layer - 1] if masks and layer > 0 else None
        if mask is not None:
            input = input * mask
        mine = *own(primals[1:STATES], layer), *own_slots(slots, layer)
        tensors = sizes, resets, *saved[layer], input, *mine
        given = grad_outputs[layer]
        total = above if given is None else given if above is None else given + above
        grads = total, *own(grad_states, layer), None, None
        wanted = layer > 0 or needed[0], *needed[1:STATES], *own_slots(needed[STATES:], layer)
        above, *gradients = _layer_gradients(call, tensors, grads, wanted, False)
        if mask is not None and above is not None:
            above = above * mask
        of_layers.insert(0, gradients)
    of_states = zip(*(gradients[: STATES - 1] for gradients in of_layers), strict=True)
    states = [
        torch.cat(parts) if need and parts[0] is not None else None
        for need, parts in zip(needed[1:STATES], of_states, strict=True)
    ]
    fields = range(STATES - 1, STATES - 1 + FIELDS * size, size)
    of_slots = [g for k in fields for gradients in of_layers for g in gradients[k : k + size]]
    return [above, *states, *of_slots]


def _one_by_one(grads: Slots) -> bool:
    """Whether the backward pass of a stack is to be differentiated, or takes what no op does."""
    return forward_mode() or batched_grads(grads) or _differentiates()


def _differentiates() -> bool:
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _needs(needed: Sequence[bool | None]) -> tuple[bool, bool, bool]:
    """Of the primals: the input, states, weights."""
    return bool(needed[0]), any(needed[1:STATES]), any(needed[STATES:])


def _expendable(saved: Sequence[Any]) -> bool:
    """Whether an op may mutate these, which nobody else will see. Subclasses of Tensor, and modes
    that trace, get the op without mutation."""
    if torch._C._len_torch_dispatch_stack() or any(type(x) is not Tensor for x in saved):
        return False
    # Before, so that whoever sees them later, a second try after an error too, is told.
    torch.autograd.graph.increment_version([x for x in saved if x.numel() > 0])
    return True


def _placed(gradients: Slots, primals: Slots, needed: Sequence[bool | None]) -> list[Tensor | None]:
    """An op's gradients, weights without those that are absent, as those of the primals."""
    weights = iter(gradients[STATES:])
    slots = [None if w is None else next(weights, None) for w in primals[STATES:]]
    return [
        gradient if need else None
        for gradient, need in zip((*gradients[:STATES], *slots), needed, strict=True)
    ]


def second_order(ctx: Any, grads: Slots) -> list[Tensor | None]:
    """The gradients of LayerBackward's grads and primals, from those of its outputs."""
    sizes, resets, *tensors = ctx.saved_tensors

    def backward(*tensors: Tensor | None) -> list[Tensor]:
        gradients = reference_vjp(ctx.call, sizes, resets, tensors[:GRADS], tensors[GRADS:])
        return [g for g in gradients if g is not None]

    # Absent states have no gradient; absent weights are not among the outputs.
    present = [primal is not None for primal in tensors[GRADS : GRADS + STATES]]
    return _vjp(backward, tensors, [*compress(grads, present), *grads[STATES:]])


def reference_vjp(
    call: Call, sizes: Tensor | None, resets: Tensor | None, grads: Slots, primals: Slots
) -> list[Tensor | None]:
    """`layer_backward` by the reference: the gradients of all the primals."""

    output, h_n, c_n, cells = grads

    def forward(*primals: Any) -> list[Tensor]:
        every = cells is not None
        if sizes is not None and padded(primals[0], sizes):
            outputs = _reference_of_padded(call, sizes, resets, every, *primals)
        else:
            outputs = _reference(call, sizes, resets, every, *primals)
        return [o for o in outputs if o is not None]

    input = primals[0]
    if cells is None or input is None:
        return _vjp(forward, primals, (output, h_n, c_n))
    return _vjp(forward, primals, (output, h_n, c_n, join_directions(cells, input, sizes)))


def _reference(
    call: Call,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    all_cells: bool,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    reset_hx: Tensor | None,
    reset_cx: Tensor | None,
    *slots: Tensor | None,
) -> LayerOutputs:
    return reference.layer(
        *(input, hx, cx, unflatten(slots)),
        cell=call.cell,
        batch_sizes=batch_sizes,
        resets=resets,
        reset_hx=reset_hx,
        reset_cx=reset_cx,
        options=call.options,
        all_cells=all_cells,
    )


def _reference_of_padded(
    call: Call,
    lengths: Tensor,
    resets: Tensor | None,
    all_cells: bool,
    input: Tensor,
    *states_and_slots: Tensor | None,
) -> LayerOutputs:
    """The cells packed, as the op saves them."""
    rows = ragged(lengths, input)
    states: Any = [None if s is None else rows.sort(s) for s in states_and_slots[: STATES - 1]]
    slots = states_and_slots[STATES - 1 :]
    flags = None if resets is None else rows.pack_flags(resets)
    output, h_n, c_n, cells = _reference(
        call, rows.batch_sizes, flags, all_cells, rows.pack(input), *states, *slots
    )
    return LayerOutputs(
        rows.unpack(output),
        rows.unsort(h_n),
        None if c_n is None else rows.unsort(c_n),
        None if cells is None else cells[: int(lengths.sum())],
    )


def padded(input: Tensor, sizes: Tensor | None) -> bool:
    """Whether sizes are the lengths of a padded batch."""
    return sizes is not None and input.dim() == 3


def join_directions(cells: Tensor, input: Tensor, sizes: Tensor | None) -> Tensor:
    """The c of every row in the dtype of input, from [D, N, H]: [T, B, D*H], or [N, D*H] where the
    rows are packed."""
    D, N, H = cells.shape
    shape = (N,) if padded(input, sizes) else input.shape[:-1]
    return cells.movedim(0, 1).reshape(*shape, D * H).to(input.dtype)


def _differentiable(grads: Slots) -> list[Tensor | None]:
    """Of the gradients of layer_forward's outputs: all but that of the gates."""
    output, h_n, c_n, _, cells = grads
    return [output, h_n, c_n, cells]


def _vjp(
    function: Callable[..., list[Tensor]], primals: Slots, grads: Slots
) -> list[Tensor | None]:
    """The gradient of each primal that is not None; gradients that are None or missing are 0."""

    def place(values: Iterable[Tensor]) -> list[Tensor | None]:
        rest = iter(values)
        return [None if p is None else next(rest) for p in primals]

    present = [p for p in primals if p is not None]
    outputs, vjp = torch.func.vjp(  # type: ignore[misc] # three values with has_aux only
        lambda *values: function(*place(values)), *present
    )
    pairs = zip(outputs, chain(grads, repeat(None)), strict=False)
    return place(vjp([torch.zeros_like(o) if g is None else g for o, g in pairs]))


def _loop_over_samples(
    function: type[Function], info: Any, in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[Any, Any]:
    samples = [
        function.apply(
            *(
                arg if dim is None else arg.select(dim, v)
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for v in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(output) for output in zip(*samples, strict=True))
    return outputs, (0,) * len(outputs)


def _fold_samples(
    V: int,
    dims: Sequence[int | None],
    how: Sequence[Any],
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    slots: Slots,
) -> tuple[Any, Any]:
    """V samples that share their weights are one batch of V*B."""

    def fold(x: Tensor, dim: int | None) -> Tensor:  # [.., V, ..] -> [K, V*B, F]
        x = x.unsqueeze(1).expand(-1, V, -1, -1) if dim is None else x.movedim(dim, 1)
        return x.flatten(1, 2)

    states = [None if x is None else fold(x, d) for x, d in zip((hx, cx), dims[1:], strict=True)]
    no_resets = None, None
    primals = fold(input, dims[0]), *states, *no_resets, *slots
    folded = LayerForward.apply(*how, None, None, *primals)

    T, B = folded[0].shape[0], folded[0].shape[1] // V
    outputs = [  # [K, V*B, F] -> [K, V, B, F], and saved [D, T*V*B, ..] -> [D, V, T*B, ..]
        *(x.unflatten(1, (V, B)) if x.dim() > 1 else x for x in folded[:3]),
        *(
            x.unflatten(1, (T, V, B)).transpose(1, 2).flatten(2, 3) if x.dim() > 1 else x
            for x in folded[3:]
        ),
    ]
    return tuple(outputs), tuple(1 if x.dim() > 1 else None for x in outputs)


# The same formulas for the ops themselves, whose weights come as lists.

BEFORE_WEIGHTS = GRADS + STATES  # of layer_backward's arguments: gradients, then primals


def _call(cell: str, slope: float, cell_clip: Any, grad_clip_value: Any, *rest: Any) -> Call:
    """Inverse of `Call.arguments`."""
    return Call(cell, CellOptions(slope, cell_clip, grad_clip_value), *rest)


def _nested(slots: Slots, fields: Sequence[Sequence[Any]]) -> list[list[Tensor | None]]:
    """Inverse of `flatten`, for gradients of these fields."""
    D = len(fields[0])
    return [list(slots[k * D : k * D + len(field)]) for k, field in enumerate(fields)]


def _forward_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    primals = *inputs[:STATES], *flatten(inputs[STATES : STATES + FIELDS])
    sizes, resets, *how, save_gates, save_cells = inputs[STATES + FIELDS :]
    arguments = _call(*how), save_gates, save_cells, sizes, resets, *primals
    LayerForward.setup_context(ctx, arguments, output)


def _forward_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    fields = needed[STATES : STATES + FIELDS]
    gradients = first_order(ctx, grads, [*needed[:STATES], *flatten(fields)])
    return *gradients[:STATES], *_nested(gradients[STATES:], fields), *(None,) * 10


def _backward_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:
    fields = inputs[BEFORE_WEIGHTS : BEFORE_WEIGHTS + FIELDS]
    sizes, resets, *rest = inputs[BEFORE_WEIGHTS + FIELDS :]
    how, saved, needs = rest[:6], rest[6:9], rest[9:]
    tensors = *inputs[:BEFORE_WEIGHTS], *flatten(fields)
    LayerBackward.setup_context(
        ctx,
        (_call(*how), *needs, sizes, resets, *saved, *tensors),
        (*output[:STATES], *output[STATES]),
    )


def _backward_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    gradients = second_order(ctx, (*grads[:STATES], *grads[STATES]))
    tensors, slots = gradients[:BEFORE_WEIGHTS], gradients[BEFORE_WEIGHTS:]
    fields = ctx.needs_input_grad[BEFORE_WEIGHTS : BEFORE_WEIGHTS + FIELDS]
    return *tensors, *_nested(slots, fields), *(None,) * 14


torch.library.register_autograd(
    library.layer_forward, _forward_derivative, setup_context=_forward_context
)
torch.library.register_autograd(
    library.layer_backward, _backward_derivative, setup_context=_backward_context
)

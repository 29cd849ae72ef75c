"""The layers against torch.nn's: values, gradients, state, dtypes and torch's tools."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from pairs import (
    HIDDEN,
    INPUT,
    LAYERS,
    LENGTHS,
    compare,
    gradients,
    initial_state,
    pair,
    sequence,
    tensors,
)
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

FORMS = ("padded", "unbatched", "packed", "packed_unsorted")
layers = pytest.mark.parametrize("kind", LAYERS)


@layers
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_options(
    kind: str,
    form: str,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    bidirectional: bool,
    given: bool,
) -> None:
    stock, ours = pair(
        kind,
        num_layers=num_layers,
        bias=bias,
        batch_first=batch_first,
        bidirectional=bidirectional,
    )
    hx = initial_state(stock, form) if given else None
    compare(stock, ours, sequence(form, batch_first), hx)


@layers
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_draws_the_same_mask(kind: str, form: str, p: float) -> None:
    stock, ours = pair(kind, num_layers=3, dropout=p, bidirectional=True)
    compare(stock, ours, sequence(form))
    compare(stock.eval(), ours.eval(), sequence(form))


def test_dropout_changed_after_construction() -> None:
    stock, ours = pair("gru", num_layers=2, dropout=0.5)
    for p in (0.2, 0.0, 1.0):
        stock.dropout = ours.dropout = p
        compare(stock, pickle.loads(pickle.dumps(ours)), sequence("padded"))


def test_dropout_warns_without_a_layer_to_fall_on() -> None:
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        pair("lstm", dropout=0.1)


@layers
@pytest.mark.parametrize("batch_first", [False, True])
def test_batch_of_zero(kind: str, batch_first: bool) -> None:
    stock, ours = pair(kind, num_layers=2, bidirectional=True, batch_first=batch_first)
    shape = (0, 3) if batch_first else (3, 0)
    compare(stock, ours, torch.randn(*shape, INPUT, dtype=torch.float64))


@layers
def test_packed_batch_of_zero(kind: str) -> None:
    empty = PackedSequence(torch.empty(0, INPUT, dtype=torch.float64), torch.tensor([0]))
    stock, ours = pair(kind)
    for expected, got in zip(tensors(stock(empty)), tensors(ours(empty)), strict=True):
        assert got.shape == expected.shape


@layers
def test_one_step_one_sample(kind: str) -> None:
    compare(*pair(kind), torch.randn(1, 1, INPUT, dtype=torch.float64))


def test_state_may_be_a_list() -> None:
    stock, ours = pair("lstm")
    compare(stock, ours, sequence("padded"), list(initial_state(stock, "padded")))


def test_non_contiguous_input_and_state() -> None:
    stock, ours = pair("gru")
    x = torch.randn(INPUT, len(LENGTHS), 6, dtype=torch.float64).permute(2, 1, 0)
    h = torch.randn(1, HIDDEN, len(LENGTHS), dtype=torch.float64).transpose(1, 2)
    compare(stock, ours, x, h)


@layers
@pytest.mark.parametrize("batch_first", [False, True])
def test_layout_of_the_output(kind: str, batch_first: bool) -> None:
    stock, ours = pair(kind, num_layers=2, batch_first=batch_first)
    x = sequence("padded", batch_first)
    assert ours(x)[0].stride() == stock(x)[0].stride()


@layers
@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l1", "bias_", "_l0", ""])
def test_frozen_weights(kind: str, frozen: str) -> None:
    stock, ours = pair(kind, num_layers=2)
    for module in (stock, ours):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(frozen not in name)
    compare(stock, ours, sequence("padded"))


def test_only_weights_ask_for_gradients() -> None:
    stock, ours = pair("lstm")
    x = sequence("padded")
    for module in (stock, ours):
        module(x)[0].square().sum().backward()
    assert x.grad is None
    for expected, got in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_no_grad() -> None:
    _, ours = pair("lstm")
    with torch.no_grad():
        assert not ours(sequence("padded"))[0].requires_grad


@layers
def test_autocast(kind: str) -> None:
    stock, ours = pair(kind, dtype=torch.float32)
    x = sequence("padded", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for input in (x, x.bfloat16()):
            output, expected = ours(input)[0], stock(input)[0]
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output, expected.bfloat16(), atol=0.05, rtol=0.05)


@layers
def test_seed_names_and_repr(kind: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.1, "batch_first": True}
    stock, ours = pair(kind, bias=False, **options)
    for (name, parameter), (our_name, our) in zip(
        stock.named_parameters(), ours.named_parameters(), strict=True
    ):
        assert our_name == name
        assert torch.equal(our, parameter)
    assert repr(ours) == repr(stock)
    for module in (stock, ours):
        torch.manual_seed(3)
        module.reset_parameters()
    torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=0, atol=0)


@layers
def test_state_dict_both_ways(kind: str) -> None:
    stock, ours = pair(kind, num_layers=2, bidirectional=True)
    ours.reset_parameters()
    stock.load_state_dict(ours.state_dict(), strict=True)
    compare(stock, ours, sequence("padded"))
    stock.reset_parameters()
    ours.load_state_dict(stock.state_dict(), strict=True)
    compare(stock, ours, sequence("padded"))


@layers
def test_copies(kind: str) -> None:
    stock, ours = pair(kind, num_layers=2)
    compare(stock, copy.deepcopy(ours), sequence("padded"))
    compare(stock, pickle.loads(pickle.dumps(ours)), sequence("padded"))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    compare(stock, torch.load(buffer, weights_only=False), sequence("padded"))


def test_pickle_from_before_projections() -> None:
    stock, ours = pair("lstm")
    state = ours.__getstate__()
    del state["proj_size"]
    old = type(ours).__new__(type(ours))
    old.__setstate__(state)
    compare(stock, old, sequence("padded"))


def test_all_weights_are_the_parameters() -> None:
    _, ours = pair("lstm_proj", num_layers=2, bidirectional=True)
    assert [len(group) for group in ours.all_weights] == [5] * 4
    assert {id(w) for group in ours.all_weights for w in group} == set(map(id, ours.parameters()))


def test_flatten_parameters_leaves_the_weights_in_place() -> None:
    _, ours = pair("lstm")
    before = [p.data_ptr() for p in ours.parameters()]
    ours.flatten_parameters()
    assert [p.data_ptr() for p in ours.parameters()] == before


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_moves(kind: str, dtype: torch.dtype) -> None:
    """A module moved to another dtype follows; 16 bits may differ by a few roundings."""
    stock, ours = (module.to(dtype) for module in pair(kind, num_layers=2))
    tolerance = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    compare(stock, ours, sequence("padded", dtype=dtype), **tolerance)
    compare(*(module.double() for module in (stock, ours)), sequence("padded"))


def test_half_and_bfloat16_methods() -> None:
    _, ours = pair("gru")
    assert ours.half().weight_hh_l0.dtype == torch.float16
    assert ours.bfloat16()(sequence("padded", dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
    ids=lambda wrap: wrap.__name__,
)
@layers
def test_parametrizations(kind: str, wrap: Any) -> None:
    # Spectral norm iterates on each access in training; torch.nn accesses more often than we do.
    stock, ours = (wrap(module, "weight_hh_l0").eval() for module in pair(kind))
    ours.load_state_dict(stock.state_dict())
    compare(stock, ours, sequence("padded"))
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours).__name__ == LAYERS[kind][0]


def test_old_weight_norm_and_pruning() -> None:
    """Both set the weight as a plain attribute in a forward hook."""
    stock, ours = pair("lstm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for module in (stock, ours):
            nn.utils.weight_norm(module, "weight_ih_l0")
            prune.l1_unstructured(module, "weight_hh_l0", 0.5)
    compare(stock, ours, sequence("padded"))


@layers
def test_functional_call(kind: str) -> None:
    stock, ours = pair(kind, num_layers=2)
    x = sequence("packed_unsorted")
    other = {name: torch.randn_like(p, requires_grad=True) for name, p in ours.named_parameters()}
    before = tensors(ours(x))
    expected, got = (tensors(functional_call(module, other, (x,))) for module in (stock, ours))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, other.values()), gradients(expected, other.values()))
    torch.testing.assert_close(tensors(ours(x)), before, rtol=0, atol=0)


def test_assigned_weight_takes_effect() -> None:
    stock, ours = pair("lstm")
    weight = torch.randn_like(ours.weight_hh_l0)
    for module in (stock, ours):
        module.weight_hh_l0 = nn.Parameter(weight)
    compare(stock, ours, sequence("padded"))


@pytest.mark.own_ops
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_compiles_to_one_graph(kind: str, given: bool) -> None:
    stock, ours = pair(kind, num_layers=2, bidirectional=True, batch_first=True)
    hx = initial_state(stock, "padded") if given else None
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    compare(stock, compiled, sequence("padded", batch_first=True), hx)


@pytest.mark.own_ops
@pytest.mark.parametrize("form", ["packed", "packed_unsorted"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_packed_input_compiles_to_one_graph(form: str, given: bool) -> None:
    stock, ours = pair("lstm", bidirectional=True)

    def run(module: nn.Module, packed: PackedSequence, hx: Any) -> Any:
        output, state = module(packed, hx)
        return output.data, state

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    args = sequence(form), initial_state(stock, form) if given else None
    torch.testing.assert_close(tensors(compiled(ours, *args)), tensors(run(stock, *args)))


def test_output_of_unsorted_packing_unpacks() -> None:
    stock, ours = pair("lstm", batch_first=True)
    x = torch.randn(len(LENGTHS), max(LENGTHS), INPUT, dtype=torch.float64)
    packed = pack_padded_sequence(x, list(LENGTHS), batch_first=True, enforce_sorted=False)
    results = []
    for module in (stock, ours):
        output, _ = module(packed)
        padded, lengths = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
        results.append((padded, lengths, *output[1:]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.own_ops
@layers
def test_meta_device(kind: str) -> None:
    stock, ours = pair(kind, num_layers=2, bidirectional=True, device="meta")
    x = sequence("padded", device="meta")
    for expected, got in zip(tensors(stock(x)), tensors(ours(x)), strict=True):
        assert got.is_meta
        assert got.shape == expected.shape


def test_data_parallel_replica() -> None:
    """A replica's weights are plain tensors, set as attributes."""
    stock, ours = pair("lstm")
    replica = ours._replicate_for_data_parallel()
    for name, parameter in ours.named_parameters():
        setattr(replica, name, parameter * 1)
    x = sequence("padded")
    torch.testing.assert_close(tensors(replica(x)), tensors(stock(x)))

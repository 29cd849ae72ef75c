"""For each mistake that torch.nn reports: the same exception type, and a message that tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import HIDDEN, INPUT
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnn_fused

B, T = 2, 4
LAYER_NAMES, CELL_NAMES = ("LSTM", "GRU", "RNN"), ("LSTMCell", "GRUCell", "RNNCell")


def raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def check(call: Callable[[Any], Any], message: str) -> None:
    """Calls with torch.nn, then with rnn_fused: both must fail alike, ours with the message."""
    expected, got = raised(lambda: call(nn)), raised(lambda: call(rnn_fused))
    assert expected is not None, "torch.nn accepts this"
    assert type(got) is type(expected), f"torch.nn: {expected!r}, rnn_fused: {got!r}"
    assert message in str(got)


def state(name: str, *shape: int, **options: Any) -> Any:
    h = torch.randn(*shape, **options)
    return (h, torch.randn(*shape, **options)) if name.startswith("LSTM") else h


def packed(enforce_sorted: bool = True) -> PackedSequence:
    lengths = [T, 2] if enforce_sorted else [2, T]
    return pack_padded_sequence(torch.randn(T, B, INPUT), lengths, enforce_sorted=enforce_sorted)


CONSTRUCTOR = [
    ({"input_size": 0}, "input_size must be greater than zero"),
    ({"input_size": -1}, "input_size must be greater than zero"),
    ({"input_size": 4.0}, "input_size should be of type int, got: float"),
    ({"hidden_size": 0}, "hidden_size must be greater than zero"),
    ({"hidden_size": -5}, "hidden_size must be greater than zero"),
    ({"hidden_size": 5.0}, "hidden_size should be of type int, got: float"),
    ({"num_layers": 0}, "num_layers must be greater than zero"),
    ({"num_layers": -1}, "num_layers must be greater than zero"),
    ({"num_layers": 1.5}, "'float' object cannot be interpreted as an integer"),
    ({"bias": 1}, "bias should be of type bool, got: int"),
    ({"batch_first": 0}, "batch_first should be of type bool, got: int"),
    ({"dropout": 1.5}, "dropout should be a number in range [0, 1]"),
    ({"dropout": -0.1}, "dropout should be a number in range [0, 1]"),
    ({"dropout": True}, "dropout should be a number in range [0, 1]"),
    ({"dropout": "half"}, "half"),
    ({"proj_size": -1}, "proj_size"),
    ({"proj_size": HIDDEN}, "proj_size"),
    ({"dtype": "float"}, "dtype"),
    ({"dtype": torch.int64}, "floating point"),
    ({"device": "nowhere"}, "nowhere"),
    ({"mode": "GRU"}, "mode"),
    ({"unknown": 1}, "unknown"),
]


@pytest.mark.parametrize("name", LAYER_NAMES)
@pytest.mark.parametrize(("options", "message"), CONSTRUCTOR, ids=repr)
def test_layer_constructor(name: str, options: dict[str, Any], message: str) -> None:
    options = {"input_size": INPUT, "hidden_size": HIDDEN, **options}
    check(lambda library: getattr(library, name)(**options), message)


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_layer_without_sizes(name: str) -> None:
    check(lambda library: getattr(library, name)(), "input_size")
    check(lambda library: getattr(library, name)(INPUT), "hidden_size")


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_projection_is_for_the_lstm(name: str) -> None:
    for size in (0, 2):
        check(lambda library, size=size: getattr(library, name)(4, 5, proj_size=size), "LSTM")
    # By position torch.nn takes it, and fails in forward.
    tanh = () if name == "GRU" else ("tanh",)
    with pytest.raises(ValueError, match="LSTM"):
        getattr(rnn_fused, name)(4, 5, 1, *tanh, True, False, 0.0, False, 2)


def test_nonlinearity() -> None:
    for value in ("sigmoid", None, 1):
        check(lambda library, v=value: library.RNN(4, 5, nonlinearity=v), "Select from 'tanh'")
        check(lambda library, v=value: library.RNN(4, 5, 1, v), "Select from 'tanh'")
    check(lambda library: library.LSTM(4, 5, nonlinearity="tanh"), "nonlinearity")
    cell = "Unknown nonlinearity: sigmoid"  # reported when it is called, as in torch.nn
    check(lambda library: library.RNNCell(4, 5, nonlinearity="sigmoid")(torch.ones(2, 4)), cell)


LAYER_INPUT: list[tuple[str, Any, str]] = [
    ("1-D", torch.randn(INPUT), "2D or 3D, got 1D"),
    ("4-D", torch.randn(1, T, B, INPUT), "2D or 3D, got 4D"),
    ("width", torch.randn(T, B, INPUT + 1), f"Expected {INPUT}, got {INPUT + 1}"),
    ("unbatched_width", torch.randn(T, INPUT + 1), f"Expected {INPUT}, got {INPUT + 1}"),
    ("no_steps", torch.randn(0, B, INPUT), "sequence length to be larger than 0"),
    ("no_steps_unbatched", torch.randn(0, INPUT), "sequence length to be larger than 0"),
    ("dtype", torch.randn(T, B, INPUT).double(), "input.to(torch.float32)"),
    ("integers", torch.ones(T, B, INPUT, dtype=torch.long), "torch.int64"),
    ("meta", torch.randn(T, B, INPUT, device="meta"), "device"),
    ("list", [[1.0]], "list"),
    ("None", None, "None"),
    ("packed_dtype", packed().double(), "dtype"),
    ("packed_3-D", PackedSequence(torch.randn(6, 1, INPUT), torch.tensor([2, 2, 1, 1])), ""),
    ("packed_growing", PackedSequence(torch.randn(3, INPUT), torch.tensor([1, 2])), "batch_sizes"),
    ("packed_no_steps", PackedSequence(torch.randn(0, INPUT), torch.tensor([]).long()), "index 0"),
    (
        "packed_int32",
        PackedSequence(torch.randn(3, INPUT), torch.tensor([2, 1], dtype=torch.int32)),
        "batch_sizes",
    ),
]


@pytest.mark.parametrize("name", LAYER_NAMES)
@pytest.mark.parametrize(
    ("label", "input", "message"), LAYER_INPUT, ids=[i[0] for i in LAYER_INPUT]
)
def test_layer_input(name: str, label: str, input: Any, message: str) -> None:
    check(lambda library: getattr(library, name)(INPUT, HIDDEN)(input), message)


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_packed_width(name: str) -> None:
    check(lambda library: getattr(library, name)(INPUT + 1, HIDDEN)(packed()), "input_size")


SHAPES = [
    ("width", (1, B, HIDDEN + 1), "size (1, 2, 5), got [1, 2, 6]"),
    ("batch", (1, B + 1, HIDDEN), "size (1, 2, 5), got [1, 3, 5]"),
    ("layers", (2, B, HIDDEN), "size (1, 2, 5), got [2, 2, 5]"),
]


@pytest.mark.parametrize("name", LAYER_NAMES)
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize(("label", "shape", "message"), SHAPES, ids=[s[0] for s in SHAPES])
def test_state_shape(
    name: str, form: str, label: str, shape: tuple[int, ...], message: str
) -> None:
    input = packed() if form == "packed" else torch.randn(T, B, INPUT)
    check(
        lambda library: getattr(library, name)(INPUT, HIDDEN)(input, state(name, *shape)), message
    )


def test_cell_state_shape() -> None:
    hx = (torch.randn(1, B, 3), torch.randn(1, B, 3))
    message = "hidden[1] size (1, 2, 5), got [1, 2, 3]"
    x = torch.randn(T, B, INPUT)
    check(lambda library: library.LSTM(INPUT, HIDDEN, proj_size=3)(x, hx), message)


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_state_rank(name: str) -> None:
    flat, full = state(name, B, HIDDEN), state(name, 1, 1, HIDDEN)
    x = torch.randn(T, B, INPUT)
    check(lambda library: getattr(library, name)(INPUT, HIDDEN)(x, flat), "be 3-D but got 2-D")
    check(
        lambda library: getattr(library, name)(INPUT, HIDDEN)(x[:, 0], full), "be 2-D but got 3-D"
    )


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_of_several_mistakes_the_first_is_reported(name: str) -> None:
    """The rank of the input, the state's, the input's sizes, the state's."""
    x, deep = torch.randn(T, B, INPUT + 1), torch.randn(1, T, B, INPUT)
    flat, wide = state(name, B, HIDDEN), state(name, 1, B, HIDDEN + 1)
    mistakes = [
        (deep, flat, "2D or 3D, got 4D"),
        (x, flat, "be 3-D but got 2-D"),
        (x, wide, f"Expected {INPUT}, got {INPUT + 1}"),
        (x[..., :INPUT], wide, f"got [1, {B}, {HIDDEN + 1}]"),
    ]
    for input, hx, message in mistakes:
        check(lambda library, x=input, hx=hx: getattr(library, name)(INPUT, HIDDEN)(x, hx), message)


@pytest.mark.parametrize("name", LAYER_NAMES)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_state_for_a_smaller_packed_batch(name: str, enforce_sorted: bool) -> None:
    hx = state(name, 1, B - 1, HIDDEN)
    input = packed(enforce_sorted)
    check(lambda library: getattr(library, name)(INPUT, HIDDEN)(input, hx), "")


@pytest.mark.parametrize("name", LAYER_NAMES)
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_state_dtype(name: str, form: str) -> None:
    input = packed() if form == "packed" else torch.randn(T, B, INPUT)
    hx = state(name, 1, B, HIDDEN, dtype=torch.float64)
    check(lambda library: getattr(library, name)(INPUT, HIDDEN)(input, hx), "dtype")


H0 = torch.randn(1, B, HIDDEN)


@pytest.mark.parametrize(
    ("layers", "form", "hx", "message"),
    [
        (1, "padded", H0, "must be the pair (h_0, c_0), got a Tensor"),
        (2, "padded", H0.repeat(2, 1, 1), "must be the pair (h_0, c_0), got a Tensor"),
        (1, "packed", H0, "must be the pair (h_0, c_0), got a Tensor"),
        (1, "padded", (H0,), "must be the pair (h_0, c_0), got 1 value"),
        (1, "padded", (H0, H0, H0), "must be the pair (h_0, c_0), got 3 values"),
        (1, "padded", (H0, None), "hx[1] must be a Tensor, got NoneType"),
        (1, "padded", (None, None), "hx[0] must be a Tensor, got NoneType"),
        (1, "padded", "zeros", "must be a Tensor, got str"),
    ],
    ids=["tensor", "tensor_2", "packed_tensor", "one", "three", "no_c", "nones", "str"],
)
def test_lstm_state_is_a_pair(layers: int, form: str, hx: Any, message: str) -> None:
    input = packed() if form == "packed" else torch.randn(T, B, INPUT)
    check(lambda library: library.LSTM(INPUT, HIDDEN, layers)(input, hx), message)


@pytest.mark.parametrize("name", ["GRU", "RNN"])
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("hx", [(H0, H0), [H0], "zeros"], ids=["pair", "list", "str"])
def test_state_is_a_tensor(name: str, form: str, hx: Any) -> None:
    input = packed() if form == "packed" else torch.randn(T, B, INPUT)
    check(lambda library: getattr(library, name)(INPUT, HIDDEN)(input, hx), "hx must be a Tensor")


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize(
    "options", [{"input_size": -1}, {"hidden_size": -1}, {"input_size": 4.0}, {"num_chunks": 2}]
)
def test_cell_constructor(name: str, options: dict[str, Any]) -> None:
    options = {"input_size": INPUT, "hidden_size": HIDDEN, **options}
    check(lambda library: getattr(library, name)(**options), "")


CELL_MISTAKES: list[tuple[str, tuple[int, ...], tuple[int, ...], str]] = [
    ("input_0-D", (), (B, HIDDEN), "1D or 2D, got 0D"),
    ("input_3-D", (1, B, INPUT), (B, HIDDEN), "1D or 2D, got 3D"),
    ("input_width", (B, INPUT + 1), (B, HIDDEN), "input_size: got 5 expected 4"),
    ("unbatched_width", (INPUT + 1,), (HIDDEN,), "input_size: got 5 expected 4"),
    ("hx_3-D", (B, INPUT), (1, B, HIDDEN), "1D or 2D, got 3D"),
    ("hx_width", (B, INPUT), (B, HIDDEN + 1), "hidden_size: got 6, expected 5"),
    ("hx_batch", (B, INPUT), (B + 1, HIDDEN), "doesn't match hidden0 batch size 3"),
    ("hx_batch_1", (B, INPUT), (1, HIDDEN), "doesn't match hidden0 batch size 1"),
    ("hx_1-D", (B, INPUT), (HIDDEN,), "doesn't match hidden0 batch size 5"),
    ("hx_1-D_fits", (HIDDEN, INPUT), (HIDDEN,), ""),
    ("unbatched_hx_2-D", (INPUT,), (1, HIDDEN), "hidden_size"),
]


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize(
    ("label", "x", "h", "message"), CELL_MISTAKES, ids=[m[0] for m in CELL_MISTAKES]
)
def test_cell_input(
    name: str, label: str, x: tuple[int, ...], h: tuple[int, ...], message: str
) -> None:
    input, hx = torch.randn(x), state(name, *h)
    check(lambda library: getattr(library, name)(INPUT, HIDDEN)(input, hx), message)


@pytest.mark.parametrize("name", CELL_NAMES)
def test_cell_dtype(name: str) -> None:
    x, hx = torch.randn(B, INPUT), state(name, B, HIDDEN)
    double = state(name, B, HIDDEN, dtype=torch.float64)
    check(lambda library: getattr(library, name)(INPUT, HIDDEN)(x.double(), hx), "dtype")
    check(lambda library: getattr(library, name)(INPUT, HIDDEN)(x, double), "dtype")


def test_cell_state_kind() -> None:
    x, h = torch.randn(B, INPUT), torch.randn(B, HIDDEN)

    def mistake(name: str, hx: Any, message: str) -> None:
        check(lambda library: getattr(library, name)(INPUT, HIDDEN)(x, hx), message)

    mistake("LSTMCell", h, "must be the pair (h, c), got a Tensor")
    mistake("LSTMCell", (h,), "must be the pair (h, c), got 1 value")
    mistake("LSTMCell", (h, h, h), "must be the pair (h, c), got 3 values")
    mistake("LSTMCell", (h, None), "None")
    mistake("LSTMCell", (h, h[:1]), "doesn't match hidden1 batch size 1")
    mistake("LSTMCell", (h, h[:, 1:]), "hidden1 has inconsistent hidden_size")
    mistake("GRUCell", (h, h), "tuple")

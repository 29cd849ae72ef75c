"""convert and revert: what they swap, what they keep, what they leave, and what loads where."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from pairs import tensors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn_fused

WORDS, WIDTH = 11, 6


class Encoder(nn.Module):
    """Embedding and a packed bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.rnn = nn.LSTM(WIDTH, 4, 2, batch_first=True, dropout=0.3, bidirectional=True)

    def forward(self, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(self.embed(words), lengths, True, enforce_sorted=False)
        output, (h_n, _) = self.rnn(packed)
        padded, _ = pad_packed_sequence(output, batch_first=True)
        return padded, torch.cat([h_n[-2], h_n[-1]], -1)


class Decoder(nn.Module):
    """A loop of two cells with attention; the second cell is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.cells = nn.ModuleList([nn.GRUCell(WIDTH, 8), nn.GRUCell(8, 8)])
        self.top = self.cells[1]
        self.out = nn.Linear(8, WORDS)

    def forward(self, words: Tensor, memory: Tensor, h: Tensor) -> Tensor:
        states, logits = [h, h], []
        for word in words.unbind(1):
            states[0] = self.cells[0](self.embed(word), states[0])
            states[1] = self.top(states[0], states[1])
            weights = torch.einsum("bth,bh->bt", memory, states[1]).softmax(-1)
            logits.append(self.out(states[1] + torch.einsum("bt,bth->bh", weights, memory)))
        return torch.stack(logits, 1)


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        self.judge = nn.Sequential(nn.Linear(WORDS, 5), nn.RNN(5, 3, nonlinearity="relu"))

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.decoder(target, *self.encoder(source, lengths))
        return logits, self.judge(logits)[0]


REPLACED = ("encoder.rnn", "decoder.cells.0", "decoder.cells.1", "decoder.top", "judge.1")


def model(seed: int = 0) -> Seq2Seq:
    torch.manual_seed(seed)
    return Seq2Seq().double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    words = torch.randint(WORDS, (2, 3, 7))
    return words[0], torch.tensor([4, 7, 2]), words[1]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> list[Tensor]:
    """Losses and final parameters of a few steps, dropout included."""
    torch.manual_seed(6)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits, judged = net(*batch())
        loss = logits.logsumexp(-1).mean() + judged.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *net.state_dict().values()]


def whole(net: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    return buffer.getvalue()


def test_realistic_model_trains_alike() -> None:
    stock, ours = model(), model()
    optimizer = torch.optim.Adam(ours.parameters())  # made before the conversion
    report = rnn_fused.convert(ours)
    assert report.model is ours
    assert report.replaced == REPLACED
    assert not report.skipped
    assert type(ours.encoder.rnn) is rnn_fused.LSTM
    assert type(ours.judge[1]) is rnn_fused.RNN
    expected = train(stock, torch.optim.Adam(stock.parameters()))
    torch.testing.assert_close(train(ours, optimizer), expected)


def test_revert_undoes_it() -> None:
    stock, ours = model(), model()
    rnn_fused.convert(ours)
    report = rnn_fused.revert(ours)
    assert report.replaced == REPLACED
    assert repr(ours) == repr(stock)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    expected = train(stock, torch.optim.SGD(stock.parameters(), 0.1))
    torch.testing.assert_close(train(ours, torch.optim.SGD(ours.parameters(), 0.1)), expected)


def test_what_it_keeps() -> None:
    net = model().eval()
    net.encoder.rnn.weight_hh_l0.requires_grad_(False)
    before = {name: (id(p), p.requires_grad) for name, p in net.named_parameters()}
    modules, calls = list(net.modules()), []
    net.encoder.rnn.register_forward_hook(lambda *_: calls.append("hook"))
    net.encoder.rnn.register_forward_pre_hook(lambda *_: calls.append("pre"))
    net.encoder.rnn.register_buffer("extra", torch.ones(1))
    rnn_fused.convert(net)
    assert {name: (id(p), p.requires_grad) for name, p in net.named_parameters()} == before
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert not any(module.training for module in net.modules())
    assert net.decoder.top is net.decoder.cells[1]
    net(*batch())
    assert calls == ["pre", "hook"]
    assert net.encoder.rnn.extra.item() == 1


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_root_may_be_the_module(name: str) -> None:
    module = getattr(nn, name)(3, 4)
    x = torch.randn(2, 3)
    expected = tensors(module(x))
    assert rnn_fused.convert(module).replaced == ("",)
    assert type(module) is getattr(rnn_fused, name)
    torch.testing.assert_close(tensors(module(x)), expected)
    rnn_fused.revert(module)
    assert type(module) is getattr(nn, name)


def test_checkpoints_load_before_and_after() -> None:
    stock, ours = model(1), model(2)
    rnn_fused.convert(ours)
    ours.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(ours.eval()(*batch()), stock.eval()(*batch()))
    back = model(3)
    back.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(back.eval()(*batch()), stock.eval()(*batch()))


def test_whole_models_load_before_and_after() -> None:
    stock = model().eval()
    expected = stock(*batch())
    fused = torch.load(io.BytesIO(whole(stock)), weights_only=False)
    rnn_fused.convert(fused)
    saved = whole(fused)
    assert b"rnn_fused" in saved
    again = torch.load(io.BytesIO(saved), weights_only=False)
    assert type(again.encoder.rnn) is rnn_fused.LSTM
    torch.testing.assert_close(again(*batch()), expected)
    rnn_fused.revert(again)
    assert b"rnn_fused" not in whole(again)  # loads where this package is not installed
    torch.testing.assert_close(again(*batch()), expected)


def test_second_conversion_finds_nothing() -> None:
    net = model()
    rnn_fused.convert(net)
    report = rnn_fused.convert(copy.deepcopy(net))
    assert not report.replaced
    assert not report.skipped
    assert not report.notes


def test_constructed_modules_revert_too() -> None:
    module = rnn_fused.RNN(3, 4, 2, "relu")
    x = torch.randn(5, 2, 3)
    expected = module(x)
    rnn_fused.revert(module)
    assert type(module) is nn.RNN
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["weight", "spectral"],
)
def test_parametrizations_stay(wrap: Any) -> None:
    net = nn.ModuleDict({"rnn": wrap(nn.LSTM(3, 4), "weight_hh_l0")}).eval()
    module, x = net["rnn"], torch.randn(5, 2, 3)
    expected = tensors(module(x))
    report = rnn_fused.convert(net)
    assert report.replaced == ("rnn",)
    assert isinstance(module, rnn_fused.LSTM)
    assert parametrize.is_parametrized(module, "weight_hh_l0")
    torch.testing.assert_close(tensors(module(x)), expected)
    rnn_fused.revert(net)
    assert isinstance(module, nn.LSTM)
    torch.testing.assert_close(tensors(module(x)), expected)
    rnn_fused.convert(net)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is rnn_fused.LSTM
    torch.testing.assert_close(tensors(module(x)), expected)


class Peephole(nn.LSTM):
    pass


def test_what_it_skips() -> None:
    net = nn.ModuleDict({"own": Peephole(3, 4), "patched": nn.GRU(3, 4), "plain": nn.GRU(3, 4)})
    net["patched"].forward = net["patched"].forward  # as tools do that wrap the forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net["scripted"] = torch.jit.script(nn.LSTM(3, 4))
    report = rnn_fused.convert(net)
    assert report.replaced == ("plain",)
    assert "Peephole is a subclass of LSTM" in report.skipped["own"]
    assert "forward was replaced" in report.skipped["patched"]
    assert "TorchScript" in report.skipped["scripted"]
    assert type(net["own"]) is Peephole
    assert type(net["patched"]) is nn.GRU


def test_report_reads_well() -> None:
    text = str(rnn_fused.convert(nn.ModuleDict({"a": nn.LSTM(3, 4), "b": Peephole(3, 4)})))
    assert "replaced 1, skipped 1" in text
    assert "replaced a: LSTM" in text
    assert "skipped b: Peephole" in text
    assert "isinstance(module, torch.nn.LSTM) is now False" in text
    assert "(the model itself): GRU" in str(rnn_fused.convert(nn.GRU(3, 4)))


@pytest.mark.parametrize("function", [rnn_fused.convert, rnn_fused.revert])
def test_not_a_module(function: Any) -> None:
    with pytest.raises(TypeError, match="got list"):
        function([nn.LSTM(3, 4)])


def test_converted_model_compiles_to_one_graph() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4, 2, batch_first=True)).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = tensors(net(x))
    rnn_fused.convert(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tensors(compiled(x)), expected)


def test_compiled_model_may_be_converted() -> None:
    """A graph that torch.compile took from the stock module is not run for the converted one."""
    net = nn.Sequential(nn.GRU(3, 4))
    x = torch.randn(5, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    expected = tensors(compiled(x))
    assert rnn_fused.convert(compiled).replaced == ("_orig_mod.0",)
    torch.testing.assert_close(tensors(compiled(x)), expected)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_model_of_another_package(kind: str) -> None:
    """The tagger of bi-lstm-crf (on PyPI; `pip install --no-deps` suffices) trains alike."""
    tagger = pytest.importorskip("bi_lstm_crf").BiRnnCrf(50, 5, 8, 12, 2, kind).double()
    twin = copy.deepcopy(tagger)
    assert rnn_fused.convert(twin).replaced == ("rnn",)
    words = torch.randint(1, 50, (4, 9)) * (torch.arange(9) < torch.tensor([[9], [4], [6], [2]]))
    tags = torch.randint(5, (4, 9)) * (words > 0)
    for net in (tagger, twin):
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            net.loss(words, tags).backward()
            optimizer.step()
    torch.testing.assert_close(twin.state_dict(), tagger.state_dict())
    assert twin(words)[1] == tagger(words)[1]

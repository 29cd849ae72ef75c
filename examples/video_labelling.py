"""Label every frame of a video whose frames show too little: many to many, frame by frame.

A video shows one of scikit-learn's 1797 handwritten digits (8x8 pixels) through a slit of two rows,
which moves up and down by one row a frame, under noise. With a chance of 1 in 20 a frame it cuts to
another image. Every frame is to be labelled with its digit. Videos to train on are filmed anew for
every step from the first half of the images; those to choose the weights, from another quarter;
those to test, from the last.

A GRU reads the frames. Online, a label may depend on this frame and those before it: the test
gives a frozen copy one frame at a time (`rnn_fused.freeze`, `step`). Offline, a bidirectional one
has the whole video.

Baselines: the most frequent digit; a feed-forward network, frame by frame; and one that sees the
last 12 frames, in which the slit goes up and down once. Training is the same for all.

    python examples/video_labelling.py
    python examples/video_labelling.py --quick   # 80 steps each

The full form takes 100 s on one core of a Zen 4 and prints

    accuracy, by frames since the cut:
                         0     1     2     4     8    16   all
    online           0.242 0.387 0.507 0.718 0.846 0.880 0.748
    offline          0.611 0.678 0.744 0.814 0.854 0.895 0.832
    last 12 frames   0.246 0.371 0.515 0.692 0.835 0.854 0.731
    frame by frame   0.492 0.484 0.472 0.470 0.488 0.493 0.482
    most frequent    0.110 0.108 0.109 0.106 0.112 0.121 0.118

The GRU is only a little better than the window, which has to be told how far back to look. Memory
has its price: at a cut, and in the frame after it, one frame alone is the better guide.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import rnn_fused

T = 60  # frames
CUT, NOISE = 1 / 20, 0.3  # chance a frame; standard deviation, where black to white is 1
WINDOW = 12  # frames; 8 are no better in validation


class Videos(NamedTuple):
    frames: Tensor  # [B, T, 64]
    digits: Tensor  # [B, T]
    since: Tensor  # [B, T], frames since the cut


def film(images: Tensor, digits: Tensor, count: int) -> Videos:
    """`count` videos of images [n, 8, 8], which show digits [n]."""
    time = torch.arange(T)
    cut = torch.rand(count, T) < CUT
    last_cut = (time * cut).cummax(1).values
    image = torch.randint(len(images), (count, T)).gather(1, last_cut)
    # The upper row of the slit goes 0, 1, .. 6, 5, .. 0, from anywhere on this way.
    phase = (torch.randint(12, (count, 1)) + time) % 12
    upper = (6 - (phase - 6).abs()).unsqueeze(-1)
    row = torch.arange(8)
    seen = (row == upper) | (row == upper + 1)
    frames = images[image] * seen.unsqueeze(-1)
    frames += NOISE * torch.randn_like(frames)
    return Videos(frames.flatten(2), digits[image], time - last_cut)


class Labeller(nn.Module):
    """Logits of every frame's digit, from those before it too or from the whole video."""

    def __init__(self, bidirectional: bool = False, H: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, H), nn.ReLU(), nn.Dropout(0.2), nn.Linear(H, H), nn.ReLU()
        )
        self.rnn = rnn_fused.GRU(H, H, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(2 * H if bidirectional else H, 10)

    def forward(self, frames: Tensor) -> Tensor:
        x, _ = self.rnn(self.encoder(frames))
        return self.head(x)


class Window(nn.Module):
    """Logits of every frame's digit, from the k frames up to it; zeros before the first."""

    def __init__(self, k: int, H: int = 128) -> None:
        super().__init__()
        self.k = k
        self.layers = nn.Sequential(
            nn.Linear(64 * k, H),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(H, H),
            nn.ReLU(),
            nn.Linear(H, 10),
        )

    def forward(self, frames: Tensor) -> Tensor:
        frames = pad(frames, (0, 0, self.k - 1, 0))
        return self.layers(frames.unfold(1, self.k, 1).flatten(2))


@torch.no_grad()
def label(model: nn.Module, frames: Tensor) -> Tensor:
    return model(frames).argmax(-1)


@torch.no_grad()
def label_live(model: Labeller, frames: Tensor) -> Tensor:
    """Labels [B, T], each before the next frame comes."""
    frozen = rnn_fused.freeze(model)
    labels, state = [], None
    for frame in frames.unbind(1):
        y, state = frozen.rnn.step(frozen.encoder(frame), state)
        labels.append(frozen.head(y).argmax(-1))
    return torch.stack(labels, 1)


def accuracy(labels: Tensor, videos: Videos) -> float:
    return (labels == videos.digits).double().mean().item()


def train(model: nn.Module, images: Tensor, digits: Tensor, validation: Videos, steps: int) -> None:
    """Keeps the weights that did best in validation, which is every 250 steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    best, best_weights = -1.0, {}
    for step in range(1, steps + 1):
        videos = film(images, digits, 32)
        loss = cross_entropy(model(videos.frames).flatten(0, 1), videos.digits.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step == steps:
            model.eval()
            score = accuracy(label(model, validation.frames), validation)
            model.train()
            print(f"step {step}: loss {loss.item():.3f}, validation accuracy {score:.3f}")
            if score > best:
                best, best_weights = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    model.eval()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="80 steps of training")
    parser.add_argument("--steps", type=int, default=1500, help="of training, with 32 videos each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the network is small: threads would wait for each other
    steps = 80 if options.quick else options.steps
    torch.manual_seed(options.seed)

    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels / 16).float().view(-1, 8, 8)
    digits = torch.from_numpy(targets)
    validation = film(images[898:1347], digits[898:1347], 100)
    test = film(images[1347:], digits[1347:], 500)

    models = {
        "online": Labeller(),
        "offline": Labeller(bidirectional=True),
        f"last {WINDOW} frames": Window(WINDOW),
        "frame by frame": Window(1),
    }
    labels = {}
    for name, model in models.items():
        print(f"{name}, {steps} steps")
        train(model, images[:898], digits[:898], validation, steps)
        labels[name] = (label_live if name == "online" else label)(model, test.frames)
    labels["most frequent"] = digits[:898].mode().values.expand(test.digits.shape)

    moments = (0, 1, 2, 4, 8, 16)
    print("accuracy, by frames since the cut:")
    print(" " * 16, *(f"{moment:5d}" for moment in moments), "  all")
    for name, guess in labels.items():
        right = (guess == test.digits).double()
        then = [right[test.since == moment].mean().item() for moment in moments]
        print(f"{name:16}", *(f"{share:.3f}" for share in (*then, accuracy(guess, test))))
    return {name: accuracy(guess, test) for name, guess in labels.items()}


if __name__ == "__main__":
    main()

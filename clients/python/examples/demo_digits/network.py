"""A small network in numpy, the gradient written out by hand, and the batches it learns from.

Knows arrays; does not know that other peers exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

PIXELS, HIDDEN, CLASSES = 64, 32, 10
BATCH = 32
LEARNING_RATE = np.float32(0.4)
INITIAL_SEED = 0
"""Every trainer starts from the same weights."""


class Network:
    """64 pixels -> 32 tanh -> 10 classes, cross-entropy, plain SGD."""

    def __init__(self) -> None:
        rng = np.random.default_rng(INITIAL_SEED)
        self.parameters = {
            "hidden.bias": np.zeros(HIDDEN, np.float32),
            "hidden.weight": rng.normal(0, PIXELS**-0.5, (PIXELS, HIDDEN)).astype(np.float32),
            "output.bias": np.zeros(CLASSES, np.float32),
            "output.weight": rng.normal(0, HIDDEN**-0.5, (HIDDEN, CLASSES)).astype(np.float32),
        }

    @classmethod
    def from_vector(cls, vector: Floats) -> Network:
        """The network whose `vector` this is."""
        network = cls()
        start = 0
        for values in network.parameters.values():
            values[...] = vector[start : start + values.size].reshape(values.shape)
            start += values.size
        return network

    def vector(self) -> Floats:
        """A copy of all parameters in one row, tensors in order of name."""
        return np.concatenate([values.ravel() for values in self.parameters.values()])

    def step(self, pixels: Floats, labels: Labels) -> float:
        """One step of SGD on one batch, pixels (batch, 64) and labels (batch,); returns the loss before it."""
        p = self.parameters
        hidden, probabilities = self._forward(pixels)
        rows = np.arange(len(labels))
        loss = -np.log(probabilities[rows, labels] + 1e-12).mean()
        by_score = probabilities.copy()
        by_score[rows, labels] -= 1
        by_score /= len(labels)
        by_hidden = (by_score @ p["output.weight"].T) * (1 - hidden**2)
        p["output.weight"] -= LEARNING_RATE * (hidden.T @ by_score)
        p["output.bias"] -= LEARNING_RATE * by_score.sum(axis=0)
        p["hidden.weight"] -= LEARNING_RATE * (pixels.T @ by_hidden)
        p["hidden.bias"] -= LEARNING_RATE * by_hidden.sum(axis=0)
        return float(loss)

    def loss(self, pixels: Floats, labels: Labels) -> float:
        """Mean cross-entropy."""
        _, probabilities = self._forward(pixels)
        return float(-np.log(probabilities[np.arange(len(labels)), labels] + 1e-12).mean())

    def accuracy(self, pixels: Floats, labels: Labels) -> float:
        """The share of digits it names rightly."""
        _, probabilities = self._forward(pixels)
        return float((probabilities.argmax(axis=1) == labels).mean())

    def _forward(self, pixels: Floats) -> tuple[Floats, Floats]:
        p = self.parameters
        hidden = np.tanh(pixels @ p["hidden.weight"] + p["hidden.bias"])
        scores = hidden @ p["output.weight"] + p["output.bias"]
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        return hidden, odds / odds.sum(axis=1, keepdims=True)


def batches(pixels: Floats, labels: Labels, batch: int, seed: int) -> Iterator[tuple[Floats, Labels]]:
    """Batches drawn without end."""
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.integers(len(labels), size=batch)
        yield pixels[chosen], labels[chosen]

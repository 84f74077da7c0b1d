"""scikit-learn's handwritten digits, cut into the shards of a swarm that nobody shuffled.

Knows the data set, how unevenly it is dealt out, and what can be learned without a swarm: from one shard alone, or from
all shards in one process. Does not know daemons or averaging.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from network import BATCH, CLASSES, Floats, Labels, Network, batches
from sklearn.datasets import load_digits

TEST_SIZE = 517
SKEW = 0.3
"""Dirichlet concentration of the classes on one shard: 0.3 leaves most shards with two or three common digits."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Pixels (n, 64) between 0 and 1 with their labels (n,)."""

    pixels: Floats
    labels: Labels


@dataclass(frozen=True, slots=True)
class Course:
    """What training on some digits led to: the final network, and its loss on all shards after every stretch."""

    network: Network
    losses: list[float]


def deal(peers: int, seed: int) -> tuple[list[Digits], Digits]:
    """`peers` shards of equal size and unequal content, and the test set, which has all classes alike."""
    rng = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    pixels, labels = (pixels[order] / 16).astype(np.float32), labels[order].astype(np.int64)
    test = Digits(pixels[:TEST_SIZE], labels[:TEST_SIZE])
    pixels, labels = pixels[TEST_SIZE:], labels[TEST_SIZE:]

    # Peers take turns, one digit each, of a class drawn by the peer's taste from the classes that are left.
    pools = [list(np.flatnonzero(labels == label)) for label in range(CLASSES)]
    tastes = rng.dirichlet([SKEW] * CLASSES, size=peers) + 1e-9
    hands: list[list[int]] = [[] for _ in range(peers)]
    for _ in range(len(labels) // peers):
        for hand, taste in zip(hands, tastes, strict=True):
            left = taste * [bool(pool) for pool in pools]
            hand.append(int(pools[rng.choice(CLASSES, p=left / left.sum())].pop()))
    return [Digits(pixels[hand], labels[hand]) for hand in hands], test


def together(shards: list[Digits]) -> Digits:
    """All shards as one."""
    return Digits(np.concatenate([s.pixels for s in shards]), np.concatenate([s.labels for s in shards]))


def train_alone(shards: list[Digits], peer: int, *, stretches: int, steps: int, seed: int) -> Course:
    """What this peer would have learned from its shard without the others, in as many steps."""
    return _train(shards[peer], together(shards), batch=BATCH, stretches=stretches, steps=steps, seed=seed)


def train_on_all(shards: list[Digits], *, stretches: int, steps: int, seed: int) -> Course:
    """What one process learns from all shards in as many steps, each with a batch as large as all peers' together."""
    everything = together(shards)
    return _train(everything, everything, batch=BATCH * len(shards), stretches=stretches, steps=steps, seed=seed)


def _train(on: Digits, judged_by: Digits, *, batch: int, stretches: int, steps: int, seed: int) -> Course:
    network, losses = Network(), []
    draws = batches(on.pixels, on.labels, batch, seed)
    for _ in range(stretches):
        for _ in range(steps):
            network.step(*next(draws))
        losses.append(network.loss(judged_by.pixels, judged_by.labels))
    return Course(network, losses)

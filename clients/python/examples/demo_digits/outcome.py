"""What the swarm did, in numbers: every peer's loss, the spread between peers against theory, accuracies, a verdict.

Knows the parameters that trainers recorded before and after every averaging and what their receipts said; does not know
processes, sockets or how anything is drawn.

The theory. Spread is the mean squared distance of the peers' parameters from their mean. Let the peers drift apart by u
in their local steps. On a grid whose axes alternate, whatever distance was left by the rounds before lies along the
lines of this round's axis and is averaged away; of the fresh drift u there stays exactly what lies between the means of
the groups. For r groups of peers that sit at random among N, that is expected to be

    spread(after) = (r - 1) / (N - 1) * spread(u)

or 3/7 for the four groups of two on a 2x4 grid, 1/7 for the two groups of four. Peers keep their seats for the whole
run and their shards pull them the same way each time, so one run has a share of its own. The averaging at the end runs
a round on both axes: nothing is left.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from digits import Course, Digits, together
from network import Floats, Network

POINTS_BELOW_ALL_DATA_MAX = 2.0
RELATIVE_ERROR_MAX = 1e-6


@dataclass(frozen=True, slots=True)
class Averaging:
    """One averaging as one peer saw it."""

    number: int
    outcome: str
    axis: int | None
    """Of its first round, as `group` and `members` are; None when it met nobody."""
    group: str
    members: int
    seconds: float
    loss: float
    """On the peer's own shard, with the averaged parameters."""
    before: Floats
    after: Floats


@dataclass(frozen=True, slots=True)
class Round:
    """One Moshpit round of the whole swarm."""

    groups: int
    drift: float
    """Spread that the local steps since the last averaging would have made among equal peers."""
    before: float
    after: float
    theory: float
    """For `after`: the spread between the means of the groups, of the fresh drift alone."""
    theory_random_seats: float
    """The same, expected over all ways to seat the peers."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that has to hold, and how it turned out."""

    held: bool
    said: str


@dataclass(frozen=True)
class Outcome:
    """Everything the table and the picture show. `averagings` is one list a peer, the last of each the exact one."""

    shards: list[Digits]
    test: Digits
    averagings: list[list[Averaging]]
    lone: list[Course]
    all_data: Course

    @cached_property
    def losses(self) -> list[list[float]]:
        """Each peer's loss on all shards, just before each averaging."""
        everything = together(self.shards)
        return [
            [Network.from_vector(each.before).loss(everything.pixels, everything.labels) for each in seen]
            for seen in self.averagings
        ]

    @cached_property
    def final_loss(self) -> float:
        """The first peer's loss on all shards after the exact averaging."""
        everything = together(self.shards)
        return Network.from_vector(self.averagings[0][-1].after).loss(everything.pixels, everything.labels)

    @cached_property
    def rounds(self) -> list[Round]:
        """The rounds of the training, in order."""
        found, last = [], np.zeros(())
        for seen in list(zip(*self.averagings, strict=True))[:-1]:
            before, after = _rows(seen, lambda each: each.before), _rows(seen, lambda each: each.after)
            # All started from the same weights, so the first drift is simply what stands before the first averaging.
            drift = before - last
            groups = [each.group for each in seen]
            kept = np.stack([drift[[other == group for other in groups]].mean(axis=0) for group in groups])
            count = len(set(groups))
            random_seats = (count - 1) / (len(seen) - 1) * spread(drift)
            spreads = spread(drift), spread(before), spread(after), spread(kept)
            found.append(Round(count, *spreads, random_seats))
            last = after
        return found

    @cached_property
    def final_spread(self) -> float:
        """The spread after the exact averaging."""
        return spread(_rows([seen[-1] for seen in self.averagings], lambda each: each.after))

    @cached_property
    def accuracies(self) -> list[float]:
        """On the test set, of each peer at the end."""
        return [
            Network.from_vector(seen[-1].after).accuracy(self.test.pixels, self.test.labels) for seen in self.averagings
        ]

    @cached_property
    def lone_accuracies(self) -> list[float]:
        """On the test set, of each peer had it trained on its shard alone."""
        return [course.network.accuracy(self.test.pixels, self.test.labels) for course in self.lone]

    @cached_property
    def all_data_accuracy(self) -> float:
        """On the test set, of one process that had all shards."""
        return self.all_data.network.accuracy(self.test.pixels, self.test.labels)

    def outcomes(self) -> Counter[str]:
        """How many averagings ended how, over all peers."""
        return Counter(each.outcome for seen in self.averagings for each in seen)

    def checks(self) -> list[Check]:
        """What has to hold for the demo to have succeeded."""
        digests = Counter(hashlib.sha256(seen[-1].after.tobytes()).hexdigest()[:16] for seen in self.averagings)
        same = ", ".join(f"{count} peers hold {digest}" for digest, count in digests.most_common())
        error = max(self._errors())
        swarm, everything = 100 * min(self.accuracies), 100 * self.all_data_accuracy
        lone = 100 * statistics.mean(self.lone_accuracies)
        return [
            Check(len(digests) == 1, f"same bits everywhere: {same}"),
            Check(
                error <= RELATIVE_ERROR_MAX, f"every complete average is the float64 mean of its group to {error:.1e}"
            ),
            Check(
                swarm >= everything - POINTS_BELOW_ALL_DATA_MAX,
                f"test accuracy {swarm:.1f} %, within {POINTS_BELOW_ALL_DATA_MAX:.0f} points of the {everything:.1f} % "
                "of one process with all data",
            ),
            Check(swarm > lone, f"test accuracy {swarm:.1f} %, above the {lone:.1f} % of the average peer alone"),
        ]

    def _errors(self) -> list[float]:
        """For each complete averaging, the largest error against float64 over the largest mean."""
        errors = []
        for seen in zip(*self.averagings, strict=True):
            last = seen[0].number == len(self.averagings[0]) - 1
            for group in {each.group for each in seen}:
                peers = seen if last else [each for each in seen if each.group == group]
                if any(each.outcome != "complete" for each in peers):
                    continue  # whoever was dropped is missing from the mean, and its receipt says so
                mean = _rows(peers, lambda each: each.before).mean(axis=0)
                found = _rows(peers, lambda each: each.after)
                errors.append(float(np.abs(found - mean).max() / np.abs(mean).max()))
        return errors or [float("inf")]


def spread(rows: npt.NDArray[np.float64]) -> float:
    """Mean squared distance of the rows from their mean."""
    return float(((rows - rows.mean(axis=0)) ** 2).sum(axis=1).mean())


def _rows(seen: Sequence[Averaging], which: Callable[[Averaging], Floats]) -> npt.NDArray[np.float64]:
    return np.stack([which(each) for each in seen]).astype(np.float64)

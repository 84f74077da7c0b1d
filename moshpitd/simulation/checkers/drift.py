"""Members of lossy rounds differ by as much as theory says, and it does not grow."""

from __future__ import annotations

import numpy as np

from moshpitd.simulation.checkers.checker import Checker

SETTLED = 20
"""Rounds until what members began with no longer shows."""
TOLERANCE = 0.15
ROUNDS_MIN = 3 * SETTLED


def drift_from_owner(loss: float) -> float:
    """E |th_i - th_j|^2 between two receivers of an owner that stays, per variance of one update: their last packets
    are |a - b| updates apart, a and b geometric."""
    return 2 * loss / (1 - loss**2)


class Drift(Checker):
    """Is told, after each round, how far members are apart."""

    name = "drift"

    def __init__(self, expected: float | None = None) -> None:
        """`expected`: per variance of one update, where theory gives it."""
        super().__init__()
        self._expected = expected
        self._apart: list[float] = []

    def in_step(self, at: float, apart: float, update: float) -> None:
        """After a round: E |th_i - th_j|^2 an element over all pairs, and the variance of what each step adds."""
        self.looked += 1
        self._apart.append(apart / update)
        if self.looked < ROUNDS_MIN or self.looked % SETTLED:
            return
        settled = np.array(self._apart[SETTLED:])
        half = len(settled) // 2
        before, after = float(settled[:half].mean()), float(settled[half:].mean())
        if after > (1 + 2 * TOLERANCE) * before:
            self.complain(at, f"drift grows: {before:.3f} in the first half of {len(settled)} rounds, {after:.3f} then")
        if self._expected is not None and abs(settled.mean() / self._expected - 1) > TOLERANCE:
            self.complain(at, f"drift is {settled.mean():.3f} of an update's variance, not {self._expected:.3f}")

"""The spread falls as theory says, and is nothing after as many fault-free rounds as the grid has axes."""

from __future__ import annotations

from moshpitd.simulation.checkers.checker import Checker

EXACT = 1e-11
"""Variance, relative to the first, that float32 arithmetic leaves of nothing."""


class Contraction(Checker):
    """Is told of each round of a swarm that averages in step."""

    name = "contraction"

    def __init__(self) -> None:
        super().__init__()
        self._clean = 0
        self._first = 0.0

    def in_step(self, at: float, before: float, after: float, *, axes: int, clean: bool, full: bool) -> None:
        """A round of everybody ended: variance over all peers before and after. `clean`: nobody was absent and nothing
        failed; `full`: every cell is held once, so that all axes together mix everything."""
        self.looked += 1
        self._first = max(self._first, before)
        self._clean = self._clean + 1 if clean else 0
        if after > before * (1 + 1e-6) + EXACT * self._first and full:
            self.complain(at, f"the spread grew from {before:.3e} to {after:.3e} in a round of averages")
        if full and self._clean >= axes and after > EXACT * self._first:
            self.complain(at, f"after {self._clean} fault-free rounds on {axes} axes the spread is still {after:.3e}")

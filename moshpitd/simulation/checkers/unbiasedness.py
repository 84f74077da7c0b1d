"""An owner's estimates do not lean: neither to its own values nor away from them, over many lossy rounds."""

from __future__ import annotations

import math

import numpy as np

from moshpitd.averaging.receipt import Outcome
from moshpitd.simulation.checkers.checker import Checker
from moshpitd.simulation.history import RoundRecord
from moshpitd.simulation.swarm import Swarm

LEAN_MAX = 0.008
"""Of the distance from the mean to the owner's values. The naive mean of what arrived leans by .016 where 8 members
lose a tenth."""
LEAN_MAX_IN_BURSTS = 0.04
"""... where packets are lost in bursts and a span has a dozen: what is believed of a link's loss then stems from the
round under way, and who got through counts for less."""
CERTAIN = 4.0
"""Standard errors."""


class Unbiasedness(Checker):
    """Adds up, over committed rounds, how far each owner's result of its own span lies towards its own values."""

    name = "unbiasedness"

    def __init__(self, lean_max: float = LEAN_MAX) -> None:
        super().__init__()
        self._lean_max = lean_max
        self._leans: list[float] = []

    def round_ended(self, record: RoundRecord) -> None:
        group = record.group.group
        rank = group.rank_of(record.peer.id)
        if record.receipt.outcome is not Outcome.COMPLETE:  # who was not heard at all is not in it
            return
        if rank is None or any(member.peer not in record.group.inputs for member in group.members):
            return
        span = slice(group.spans[rank], group.spans[rank + 1])
        weights = np.array([member.weight for member in group.members])
        inputs = np.stack([record.group.inputs[member.peer][span].astype(np.float64) for member in group.members])
        if weights.sum() <= 0 or not inputs.shape[1]:
            return
        self.judge(inputs, weights, rank, record.output[span].astype(np.float64))

    def judge(self, inputs: np.ndarray, weights: np.ndarray, owner: int, estimate: np.ndarray) -> None:
        """One owner's estimate of a span, from what each member held of it (a row each)."""
        # Sums, not products of matrices: those wake up a thread for every core, for microseconds of work.
        mean = (weights[:, None] * inputs).sum(axis=0) / weights.sum()
        away = inputs[owner] - mean
        size = float((away * away).sum())
        if size > 0:
            self.looked += 1
            self._leans.append(float(((estimate - mean) * away).sum()) / size)

    @property
    def lean(self) -> tuple[float, float]:
        """Of all that was judged, and its standard error."""
        if len(self._leans) < 2:
            return 0.0, math.inf
        return float(np.mean(self._leans)), float(np.std(self._leans, ddof=1) / math.sqrt(len(self._leans)))

    def verdict(self, at: float) -> None:
        """To be asked at the end."""
        lean, error = self.lean
        if abs(lean) > self._lean_max and abs(lean) > CERTAIN * error:
            self.complain(at, f"estimates lean by {lean:+.4f} (+-{error:.4f}) towards their owners' values")

    def finish(self, swarm: Swarm) -> None:
        self.verdict(swarm.now)

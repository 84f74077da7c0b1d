"""What lossy rounds teach about the paths between peers: how much is lost, how long to wait, what has become stale.

Knows counts of packets, durations and element positions. Outlives rounds: one of each a session. Does not know packets'
contents, sockets or the clock. What is learnt here is believed by the next round's machine (lossy_reduce.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.names import PeerId


class LinkLosses:
    """The share of packets lost on the way from each peer to us, from their sequence numbers.

    Counts are aged, not shares, so that a large round teaches more than a small one. Every link is taken to be a bit
    like the others (`KINSHIP` packets' worth), since few packets say little: were a link judged by one packet, its
    estimate would lean towards who got through. Much kinship leans too: 32 packets' worth by 1 % where a round has 50
    packets a link and one of four links loses half, against .3 % (+-.2) without any.
    """

    AGEING = 0.8
    """What a count is worth a round later: 90 % of what is believed stems from the last ten rounds."""
    KINSHIP = 4.0

    def __init__(self) -> None:
        self._counts: dict[PeerId, tuple[float, float]] = {}
        """Sent and lost."""

    def learn(self, peer: PeerId, *, sent: int, lost: int) -> None:
        """After a round's packets from this peer are through."""
        assert 0 <= lost <= sent
        before, before_lost = self._counts.get(peer, (0.0, 0.0))
        self._counts[peer] = (before * self.AGEING + sent, before_lost * self.AGEING + lost)

    def of(self, peer: PeerId, among: Iterable[PeerId]) -> float:
        """Believed of this link, `among` those of the same round; unknown ones are like the others."""
        known = [self._counts[other] for other in among if other in self._counts]
        sent, lost = math.fsum(count for count, _ in known), math.fsum(count for _, count in known)
        usual = lost / sent if sent else 0.0
        own_sent, own_lost = self._counts.get(peer, (0.0, 0.0))
        return (own_lost + self.KINSHIP * usual) / (own_sent + self.KINSHIP)

    def forget(self, peers: Iterable[PeerId]) -> None:
        """They left for good."""
        for peer in peers:
            self._counts.pop(peer, None)

    @property
    def packets(self) -> int:
        """How many packets' worth all this rests on."""
        return round(math.fsum(count for count, _ in self._counts.values()))

    @property
    def worst(self) -> float:
        """Of the links; one of few packets is a bit like the others."""
        return max((self.of(peer, self._counts) for peer in self._counts), default=0.0)

    @property
    def typical(self) -> float:
        """Over all links, by packets."""
        sent = math.fsum(count for count, _ in self._counts.values())
        return math.fsum(lost for _, lost in self._counts.values()) / sent if sent else 0.0


@dataclass(frozen=True, slots=True)
class DeadlineConfig:
    """How long a lossy round waits for what may be lost."""

    rounds: int = 100
    """Remembered: their 99th percentile is the worst of them."""
    slack_share: float = 0.5
    """Added to it, as a share ..."""
    slack_min_s: float = 0.1
    """... and at least: what a busy machine's scheduler takes."""
    doubt: float = 4.0
    """Few rounds do not know their percentile: all of it is longer by this, divided by their number. Patience costs
    time only where the ends of streams are lost too."""
    first_s: float = 5.0
    """Nothing is known yet: waited so long beyond what a slow line needs for the bytes. A sender says when it is
    through, so that this passes only where the ends of its streams are lost too."""
    first_bytes_s: float = 10e6
    """Such a slow line."""


class Deadline:
    """When a half of a round is given up, counted from its beginning: the 99th percentile of recent rounds plus slack.

    What is learnt is when the last packet came, also one that came too late: so a deadline that was too short grows.
    """

    def __init__(self, config: DeadlineConfig | None = None) -> None:
        self._config = config or DeadlineConfig()
        self._took: deque[tuple[float, int]] = deque(maxlen=self._config.rounds)

    def learn(self, seconds: float, size: int) -> None:
        """In a round with so many bytes to come the last one came after so long."""
        self._took.append((seconds, size))

    def seconds(self, size: int) -> float:
        """For a round with so many bytes to come."""
        config = self._config
        if not self._took:
            return config.first_s + size / config.first_bytes_s
        # A larger round takes longer, in proportion at most.
        ordered = sorted(took * max(1.0, size / max(1, known)) for took, known in self._took)
        worst = ordered[math.ceil(0.99 * len(ordered)) - 1]
        return (worst + max(config.slack_min_s, config.slack_share * worst)) * (1 + config.doubt / len(ordered))


@dataclass(slots=True)
class Staleness:
    """For how many rounds each part of the vector has gone without an average. A map in blocks of BLOCK elements."""

    elements: int
    ages: npt.NDArray[np.uint16] = field(init=False)

    BLOCK = 256

    def __post_init__(self) -> None:
        self.ages = np.zeros(-(-self.elements // self.BLOCK), np.uint16)

    def round_over(self, stale: Iterable[tuple[int, int]]) -> None:
        """These elements kept local values, all others were averaged."""
        is_stale = np.zeros(len(self.ages), np.bool_)
        for start, stop in stale:
            is_stale[start // self.BLOCK : -(-stop // self.BLOCK)] = True
        self.ages += self.ages < np.iinfo(np.uint16).max
        self.ages[~is_stale] = 0

    @property
    def oldest(self) -> int:
        """In rounds."""
        return int(self.ages.max(initial=0))

    @property
    def share(self) -> float:
        """Of the vector that is stale."""
        return float(np.count_nonzero(self.ages)) / max(1, len(self.ages))


RELIABLE_EVERY_MIN, RELIABLE_EVERY_MAX = 8, 128


def reliable_every(loss: float, *, ranges: int, members: int) -> tuple[int, str]:
    """After how many lossy rounds one that loses nothing brings all to the same bits, and why, in words.

    Drift is bounded without it: a range is missed a times in a row with probability p^a. The longest such run among
    all ranges and members is about log(ranges * members) / log(1/p); eight times that keeps reliable rounds, whose
    time grows with loss, few, and is soon enough for what a run beyond all odds would leave behind.
    """
    if loss <= 0:
        every = RELIABLE_EVERY_MIN
        return every, f"no packet was lost so far, a reliable round costs no more than another: one of every {every}"
    run = max(1, math.ceil(math.log(max(2, ranges * members)) / math.log(1 / min(loss, 0.9))))
    # A power of two: leaders that choose differently still have averagings in common that are reliable everywhere.
    every = min(max(1 << (8 * run - 1).bit_length(), RELIABLE_EVERY_MIN), RELIABLE_EVERY_MAX)
    return every, f"at {loss:.1%} loss a range is missed up to {run} times in a row; one of every {every} is reliable"

"""What a machine's line to the others carries, learnt from the rounds it takes part in.

A sender does not see its own uplink: socket buffers swallow megabytes, and how long a round took only says how slow the
slowest was. Those that receive see it: all contributions are there when a round begins, so how soon they are through is
up to the line. Each member therefore tells each sender how soon that one's contributions were here (in Ready).

A line that is not kept busy tells only what it carries at least. Of the uplink we take the best that half of the
receivers bear out: others may sit behind slow lines themselves. A downlink is known only where it was the obstacle:
where most senders were through far later than their own uplinks explain. Who never is the obstacle has no known
downlink, and goes by its uplink.

Knows counts of bytes and durations. Does not know the clock, members, or what is done with the rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BYTES_MIN = 256 << 10
"""Fewer say more about latency than about the line."""
SECONDS_MIN = 0.02
"""Shorter ones say more about the scheduler: the line carries at least what they show, taken as if they had lasted so
long."""
NEWEST_SHARE = 0.5
"""Of the newest measure in what is believed, on a scale of ratios: a line ten times slower or faster is known to a
factor of 1.4 after three rounds, and the noise of single rounds is almost halved."""
LATE_FACTOR = 2.0
"""A contribution that took so many times what its sender's uplink explains was held up on our side."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """How much had come how soon after the round's begin, at the moment somebody's last contribution was there."""

    size: int
    """In bytes; 0: nothing to tell."""
    seconds: float


NOTHING_HEARD = Arrival(0, 0.0)


@dataclass(frozen=True, slots=True)
class Measure:
    """What one round showed of one direction."""

    bytes_s: float
    at_least: bool
    """The line may carry more."""


class LinkRates:
    """What is believed of a daemon's line. One a daemon, shared by its sessions: it outlives them."""

    def __init__(self) -> None:
        self.up_bytes_s = 0.0
        """0: not known."""
        self.down_bytes_s = 0.0

    def learn(self, *, up: Measure | None, down: Measure | None) -> None:
        """After a round."""
        self.up_bytes_s = _believed(self.up_bytes_s, up)
        if self.down_bytes_s or not (down and down.at_least):  # what it carries at least must not hide a faster uplink
            self.down_bytes_s = _believed(self.down_bytes_s, down)


def _believed(before: float, newest: Measure | None) -> float:
    if newest is None or (newest.at_least and newest.bytes_s <= before):
        return before
    if not before:
        return newest.bytes_s
    return before * math.exp(NEWEST_SHARE * math.log(newest.bytes_s / before))


class Transfers:
    """What one member sees of its line in one round: fed by the all-reduce while contributions come in.

    Only the first view counts: in later ones members wait for agreement, not for lines.
    """

    def __init__(self, owed: Sequence[int], now: float) -> None:
        """`owed`: how many contributions each member will send us."""
        self._owed = list(owed)
        self._began = now
        self._total = 0
        self._by_sender = [0] * len(owed)
        self._through: dict[int, Arrival] = {}
        """By sender, what it had sent us, averages too, when it was through or held up."""
        self._through_in_all: dict[int, Arrival] = {}
        """... and what all together had."""
        self._reported: dict[int, Arrival] = {}
        """By receiver, how soon our contributions were there."""

    def chunk(self, sender: int, size: int) -> None:
        """Something came."""
        self._total += size
        self._by_sender[sender] += size

    def contribution(self, sender: int, now: float) -> None:
        """... and it was one of the contributions owed."""
        self._owed[sender] -= 1
        if self._owed[sender] == 0 and sender not in self._through:
            self._through[sender] = Arrival(self._by_sender[sender], now - self._began)
            self._through_in_all[sender] = Arrival(self._total, now - self._began)

    def held_up(self, sender: int, now: float) -> None:
        """What comes from now on comes when we let it: that says nothing of its line, or ours."""
        if sender not in self._through and self._by_sender[sender]:
            self._through[sender] = Arrival(self._by_sender[sender], now - self._began)
            self._through_in_all[sender] = Arrival(self._total, now - self._began)

    def heard_of(self, sender: int) -> Arrival:
        """To be told to that sender."""
        return self._through.get(sender, NOTHING_HEARD)

    def report(self, receiver: int, arrival: Arrival) -> None:
        """This receiver tells how soon ours were there."""
        self._reported.setdefault(receiver, arrival)

    def up(self) -> Measure | None:
        """The uplink, as the receivers bear it out."""
        return _best(_added_up(arrival for arrival in self._reported.values() if arrival.size))

    def down(self, explained_s: Sequence[float], now: float) -> Measure | None:
        """The downlink. `explained_s`: by member, how long its own uplink needs for all it sends; infinite: unknown."""
        late = [
            self._through_in_all[sender]
            for sender, arrival in self._through.items()
            if arrival.seconds >= LATE_FACTOR * explained_s[sender]
        ]
        if len(self._through) >= 2 and len(late) > len(self._through) / 2:
            return _best(late)
        so_far = Arrival(self._total, now - self._began)
        best = _best([*self._through_in_all.values(), so_far])
        return best and Measure(best.bytes_s, at_least=True)


def _added_up(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """What was through everywhere by each moment, from the one on by which half of the receivers had theirs."""
    ordered = sorted(arrivals, key=lambda arrival: arrival.seconds)
    sizes = [sum(arrival.size for arrival in ordered[: count + 1]) for count in range(len(ordered))]
    sums = [Arrival(size, arrival.seconds) for size, arrival in zip(sizes, ordered, strict=True)]
    return sums[(len(sums) - 1) // 2 :]


def _best(arrivals: Iterable[Arrival]) -> Measure | None:
    """The highest rate among those that say anything."""
    rates = [
        Measure(arrival.size / max(arrival.seconds, SECONDS_MIN), at_least=arrival.seconds < SECONDS_MIN)
        for arrival in arrivals
        if arrival.size >= BYTES_MIN and math.isfinite(arrival.seconds)
    ]
    return max(rates, key=lambda rate: rate.bytes_s, default=None)

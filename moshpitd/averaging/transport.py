"""Over what the values of a group travel, and why: what a session asks for, and what a leader makes of it.

Knows what members report of the datagram paths to them. Does not know packets, sockets or the clock.

    reliable   everything arrives
    lossy      rounds are lossy; every R-th averaging is reliable and brings all to the same bits
    auto       lossy where the paths lose so much that reliable streams would be slow, else reliable
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.losses import reliable_every
from moshpitd.averaging.messages import Member, PathReport
from moshpitd.averaging.partition import known_rate
from moshpitd.averaging.ranges import PAYLOAD_BYTES_MAX

RELIABLE, LOSSY, AUTO = "reliable", "lossy", "auto"
TRANSPORTS = (RELIABLE, LOSSY, AUTO)
RELIABLE_EVERY_MAX = 1 << 20
LOSS_FELT = 0.005
"""On a path that loses more, the slowest of a round's streams has waited for a lost packet more often than not."""
PROBE_EVERY = 64
"""With auto, each so many averagings one is lossy where the paths were good: only lossy rounds measure."""
MATHIS = 1.22
MEMBERS_MAX = 256
"""Of a lossy group: a packet names its sender by one byte."""
BLOCKED_TOLD_MAX = 32
"""Peers in a report."""


@dataclass(frozen=True, slots=True)
class Transport:
    """What a session asks for; all of a swarm's alike."""

    name: str = RELIABLE
    every: int = 0
    """Averagings from one that loses nothing to the next; 0: chosen by the loss."""

    def check(self) -> None:
        """Raises InvalidInput."""
        if self.name not in TRANSPORTS:
            raise InvalidInput(f"transport {self.name!r}: give reliable, lossy or auto")
        if not 0 <= self.every <= RELIABLE_EVERY_MAX:
            raise InvalidInput(f"reliable_every {self.every}: must be auto (0) or 1 to {RELIABLE_EVERY_MAX}")
        if self.every and self.name == RELIABLE:
            raise InvalidInput(
                f"reliable_every {self.every} with transport 'reliable': all its averagings are; ask for transport "
                "'lossy' or 'auto', or leave it out"
            )

    @property
    def term(self) -> str:
        """What two sessions must have in common."""
        return f"{self.name}, every {self.every} reliable" if self.every else self.name

    def __str__(self) -> str:
        return self.term

    @property
    def may_lose(self) -> bool:
        return self.name != RELIABLE


EVERYTHING_ARRIVES = Transport()


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """Of one group."""

    is_lossy: bool
    why: str
    """In words."""


def choose_transport(transport: Transport, members: Sequence[Member], *, k: int, ranges: int) -> TransportChoice:
    """The leader's choice for a round of averaging k, of a vector of so many packet ranges."""
    if not transport.may_lose:
        return TransportChoice(False, "")
    n, loss = len(members), max(member.paths.loss for member in members)
    if n > MEMBERS_MAX:
        return TransportChoice(False, f"reliable: a lossy group has at most {MEMBERS_MAX} members")
    blocked, pairs = _blocked_pairs(members), n * (n - 1) // 2
    if 2 * blocked > pairs:
        between = "the two" if n == 2 else f"{blocked} of {pairs} pairs of members"
        return TransportChoice(
            False,
            f"reliable: no datagram passes between {between}, as behind a firewall; tried again after some minutes",
        )
    every, why_every = _every(transport, loss, ranges=ranges, members=n)
    if (k + 1) % every == 0:  # the first averaging, all there is of a single one, is what was asked for
        return TransportChoice(False, f"reliable, so that all hold the same again: {why_every}")
    if transport.name == AUTO:
        chosen = _auto(members, loss, k)
        return TransportChoice(chosen.is_lossy, f"{chosen.why}; {why_every}" if chosen.is_lossy else chosen.why)
    return TransportChoice(True, f"lossy as asked for; {why_every}")


def _auto(members: Sequence[Member], loss: float, k: int) -> TransportChoice:
    """By what TCP makes of such paths: a rate of about MSS / (rtt sqrt(p)) a connection (Mathis et al. 1997)."""
    if not all(member.paths.packets for member in members):
        return TransportChoice(True, "lossy, to measure the paths: not every member has done so yet")
    round_trip_s = max(member.paths.round_trip_s for member in members)
    measured = f"{loss:.2%} of the packets are lost on the worst path, round trip {round_trip_s * 1000:.1f} ms"
    if loss >= LOSS_FELT:
        return TransportChoice(True, f"lossy: {measured}, and what is lost would be waited for")
    rates = [rate for member in members if (rate := known_rate(member)) > 0]
    if loss > 0 and round_trip_s > 0 and rates:
        wanted = min(rates) / (len(members) - 1)
        tcp = MATHIS * PAYLOAD_BYTES_MAX / (round_trip_s * math.sqrt(loss))
        if tcp < wanted:
            rated = (
                f"a TCP connection would carry {tcp / 1e6:.1f} MB/s of the {wanted / 1e6:.1f} that the line has for it"
            )
            return TransportChoice(True, f"lossy: {measured}, so that {rated}")
    if (k + 1) % PROBE_EVERY == 1:
        return TransportChoice(True, f"lossy, to measure the paths anew; last time {measured}")
    return TransportChoice(False, f"reliable: {measured}, which slows nobody")


def report_is_sound(report: PathReport) -> bool:
    """Whether one from outside can be true."""
    return 0 <= report.loss <= 1 and report.round_trip_s >= 0 and len(report.blocked) <= BLOCKED_TOLD_MAX


def _blocked_pairs(members: Sequence[Member]) -> int:
    """Pairs of these of which one says that no datagram passes between the two."""
    here = {member.peer for member in members}
    pairs = {frozenset((member.peer, other)) for member in members for other in member.paths.blocked if other in here}
    return sum(len(pair) == 2 for pair in pairs)


def _every(transport: Transport, loss: float, *, ranges: int, members: int) -> tuple[int, str]:
    """How often a reliable averaging, and why."""
    if transport.every:
        return transport.every, f"one of every {transport.every}, as asked for"
    return reliable_every(loss, ranges=ranges, members=members)

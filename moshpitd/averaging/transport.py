"""Over what the values of a group travel, and why: what a session asks for, and what a leader makes of it.

Knows what members report of the datagram paths to them. Does not know packets, sockets or the clock.

    reliable   everything arrives
    lossy      rounds are lossy; every R-th averaging is reliable and brings all to the same bits
    auto       lossy where the paths lose so much that reliable streams would be slow, else reliable
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.losses import reliable_every
from moshpitd.averaging.messages import Member

RELIABLE, LOSSY, AUTO = "reliable", "lossy", "auto"
TRANSPORTS = (RELIABLE, LOSSY, AUTO)
RELIABLE_EVERY_MAX = 1 << 20


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
    loss = max(member.paths.loss for member in members)
    every, why_every = _every(transport, loss, ranges=ranges, members=len(members))
    if (k + 1) % every == 0:  # the first averaging, all there is of a single one, is what was asked for
        return TransportChoice(False, f"a reliable averaging brings all to the same bits: {why_every}")
    return TransportChoice(True, f"asked for; {why_every}")


def _every(transport: Transport, loss: float, *, ranges: int, members: int) -> tuple[int, str]:
    """How often a reliable averaging, and why."""
    if transport.every:
        return transport.every, f"one of every {transport.every}, as asked for"
    return reliable_every(loss, ranges=ranges, members=members)

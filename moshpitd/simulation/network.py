"""Links: how long what somebody sends is under way, and what gets through at all.

Knows delay, bandwidth, loss and partitions. Does not know what is sent. Loss costs a retransmission, as TCP does; what
meets a partition is held until it heals, and the connection breaks when that takes longer than the keepalive.
"""

from __future__ import annotations

import random
from bisect import insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from moshpitd.averaging.names import PeerId

Span = tuple[float, float]
RETRANSMISSION_S = 0.2
"""After the first loss; doubles with each further one."""
RETRANSMISSION_MAX_S = 3.0
SMALL_BYTES = 1500.0
"""What fits a packet does not queue behind bulk: a link takes turns among its connections."""


@dataclass(frozen=True, slots=True)
class Weather:
    """How long things take for everybody: seconds, drawn evenly between the two."""

    message: Span = (0.0002, 0.002)
    dial: Span = (0.0005, 0.003)
    directory: Span = (0.001, 0.01)
    stale_s: float = 0.0
    """A record announced may stay unseen for up to this long."""
    lost_writes: float = 0.0
    """The share of announcements that nobody sees before the record is renewed."""
    noticed: Span = (0.001, 0.05)
    """Until the other end notices that a channel broke."""
    dial_timeout_s: float = 5.0
    keepalive_s: float = 10.0
    """Until a connection is given up over which nothing comes any more."""
    compute_bytes_s: float = 2e9
    """How fast a daemon reduces, encodes and decodes."""


@dataclass(frozen=True, slots=True)
class Link:
    """One class of peers: what its own line to the net adds."""

    name: str = "peer"
    delay_s: float = 0.0
    """One way, each way."""
    up_bytes_s: float = 0.0
    """0: not limited."""
    down_bytes_s: float = 0.0
    loss: float = 0.0
    """The share of messages that have to be sent again."""


class Network:
    """Every peer's line, and who can reach whom."""

    def __init__(self, weather: Weather, rng: random.Random) -> None:
        self.weather = weather
        self.bytes_scale = 1.0
        """Bytes that count for one byte of a chunk: simulates large vectors by small ones."""
        self.messages: defaultdict[PeerId, int] = defaultdict(int)
        self.bytes: defaultdict[PeerId, float] = defaultdict(float)
        """Sent, by peer."""
        self._rng = rng
        self._links: dict[PeerId, Link] = {}
        self._up_free: dict[PeerId, float] = {}
        self._down_taken: defaultdict[PeerId, list[Span]] = defaultdict(list)
        """When bulk that is under way will be coming in, by receiver, in order."""
        self._blocked: dict[tuple[PeerId, PeerId], float] = {}
        """(from, to) and since when."""

    def attach(self, peer: PeerId, link: Link) -> None:
        self._links[peer] = link

    def link_of(self, peer: PeerId) -> Link:
        return self._links.get(peer, PLAIN)

    # ---- partitions

    def block(self, senders: Iterable[PeerId], receivers: Iterable[PeerId], now: float) -> None:
        """From now on nothing of these senders reaches these receivers."""
        receivers = list(receivers)
        for sender in senders:
            for receiver in receivers:
                if sender != receiver:
                    self._blocked.setdefault((sender, receiver), now)

    def heal(self) -> None:
        self._blocked.clear()

    def blocked_since(self, sender: PeerId, receiver: PeerId) -> float | None:
        return self._blocked.get((sender, receiver)) if self._blocked else None

    @property
    def is_parted(self) -> bool:
        return bool(self._blocked)

    def hears(self, one: PeerId, other: PeerId) -> bool:
        """Whether the two can hold a connection: packets go both ways."""
        return not self._blocked or ((one, other) not in self._blocked and (other, one) not in self._blocked)

    # ---- time

    def arrival(
        self, sender: PeerId, receiver: PeerId, size: float, base: Span, now: float, *, resent: bool = True
    ) -> float:
        """When this many bytes, sent now, are there. `resent`: what is lost on the way is sent again; else its fate is
        somebody else's to tell."""
        self.messages[sender] += 1
        self.bytes[sender] += size
        moment = now + self._rng.uniform(*base)
        if not self._links:
            return moment
        ours, theirs = self._links.get(sender, PLAIN), self._links.get(receiver, PLAIN)
        moment += ours.delay_s + theirs.delay_s
        if size <= SMALL_BYTES:
            moment += sum(size / rate for rate in (ours.up_bytes_s, theirs.down_bytes_s) if rate)
        elif ours.up_bytes_s:
            begins = max(now, self._up_free.get(sender, 0.0))
            self._up_free[sender] = begins + size / ours.up_bytes_s
            moment += self._up_free[sender] - now
        if theirs.down_bytes_s and size > SMALL_BYTES:
            moment = self._through_downlink(receiver, size / theirs.down_bytes_s, moment, now)
        loss = ours.loss + theirs.loss
        wait = RETRANSMISSION_S
        while resent and loss and self._rng.random() < min(loss, 0.9):
            moment += wait
            wait = min(2 * wait, RETRANSMISSION_MAX_S)
        return moment

    def _through_downlink(self, receiver: PeerId, took_s: float, moment: float, now: float) -> float:
        """When it is through, taking the first gap from the moment on that it is there: what a slow sender will bring
        only later must not hold up what others bring before."""
        taken = self._down_taken[receiver] = [span for span in self._down_taken[receiver] if span[1] > now]
        for begins, ends in taken:
            if moment + took_s <= begins:
                break
            moment = max(moment, ends)
        insort(taken, (moment, moment + took_s))
        return moment + took_s


PLAIN = Link()

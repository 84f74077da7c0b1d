"""The directory's twin: announced records, seen late, old, or not at all.

Knows delay, staleness, lost writes, renewal and partitions. Does not know what the records mean. A reader is brought
only what became visible since it last looked: to see a sequence number twice changes nothing (membership ignores it).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from moshpitd.averaging.effects import Announce
from moshpitd.averaging.messages import Record, Sighting
from moshpitd.averaging.names import Incarnation, Key, PeerId
from moshpitd.simulation.clock import Clock
from moshpitd.simulation.network import Network

RENEWALS = 3
"""A lease is renewed this often within its ttl."""


@dataclass(eq=False, slots=True)
class Shelf:
    """What is known under one key."""

    visible: list[Sighting[Record]] = field(default_factory=list)
    """In the order in which they became visible. One record is the same sighting for all who see it."""
    newest: dict[PeerId, Sighting[Record]] = field(default_factory=dict)
    """What each owner announced last, visible or not; nothing of who withdrew."""
    counting: dict[PeerId, Sighting[Record]] = field(default_factory=dict)
    """Of what is visible, the newest of each owner; nothing of who withdrew."""

    def show(self, sighting: Sighting[Record]) -> None:
        self.visible.append(sighting)
        before = self.counting.get(sighting.peer)
        if sighting.peer in self.newest and (before is None or before.sequence < sighting.sequence):
            self.counting[sighting.peer] = sighting


@dataclass(eq=False, slots=True)
class Bookmark:
    """How far one reader has read a shelf."""

    position: int = 0
    hidden: list[Sighting[Record]] = field(default_factory=list)
    """Passed over, because their owner could not reach this reader."""


class Directory:
    """All keys. Readers are told apart by peer and incarnation: who restarts has seen nothing."""

    def __init__(self, clock: Clock, network: Network, rng: random.Random) -> None:
        self.unseen: set[tuple[PeerId, PeerId]] = set()
        """(reader, owner): whose records a reader does not find."""
        self._clock = clock
        self._network = network
        self._rng = rng
        self._sequence = 0
        self._shelves: defaultdict[Key, Shelf] = defaultdict(Shelf)
        self._bookmarks: defaultdict[tuple[Key, PeerId, Incarnation], Bookmark] = defaultdict(Bookmark)

    def store(self, owner: PeerId, incarnation: Incarnation, effect: Announce, is_alive: Callable[[], bool]) -> None:
        """Keep the record; a lease is renewed until its owner dies, withdraws or announces anew."""
        self._sequence += 1
        now = self._clock.now
        sighting = Sighting(owner, incarnation, self._sequence, now, now + effect.ttl_s, effect.record)
        shelf = self._shelves[effect.key]
        shelf.newest[owner] = sighting
        weather = self._network.weather
        if self._rng.random() >= weather.lost_writes:
            self._clock.at(now + self._rng.uniform(0, weather.stale_s), lambda: shelf.show(sighting))
        if effect.slot != "lease":
            return

        def renew() -> None:
            if is_alive() and shelf.newest.get(owner) is sighting:
                self.store(owner, incarnation, effect, is_alive)

        self._clock.at(now + effect.ttl_s / RENEWALS, renew)

    def withdraw(self, owner: PeerId, key: Key) -> None:
        shelf = self._shelves[key]
        shelf.newest.pop(owner, None)
        shelf.counting.pop(owner, None)

    def read(self, key: Key, reader: PeerId, incarnation: Incarnation) -> list[Sighting[Record]]:
        """What this reader has not seen yet."""
        shelf, bookmark = self._shelves[key], self._bookmarks[key, reader, incarnation]
        fresh, counting = shelf.visible[bookmark.position :], shelf.counting
        bookmark.position = len(shelf.visible)
        if bookmark.hidden or self.unseen or self._network.is_parted:
            both = [*bookmark.hidden, *fresh]
            bookmark.hidden = [sighting for sighting in both if self._is_hidden(sighting, reader)]
            fresh = [sighting for sighting in both if not self._is_hidden(sighting, reader)]
            in_order = sorted(fresh, key=lambda sighting: sighting.sequence)
            counting = {sighting.peer: sighting for sighting in in_order if sighting.peer in shelf.newest}
        now, found = self._clock.now, {sighting.peer: counting.get(sighting.peer) for sighting in fresh}
        return [sighting for sighting in found.values() if sighting and sighting.expires_at > now]

    def everything(self, key: Key) -> list[Sighting[Record]]:
        """What somebody who never looked would find."""
        return [one for one in self._shelves[key].counting.values() if one.expires_at > self._clock.now]

    def _is_hidden(self, sighting: Sighting[Record], reader: PeerId) -> bool:
        since = self._network.blocked_since(sighting.peer, reader)
        return (reader, sighting.peer) in self.unseen or (since is not None and sighting.seen_at >= since)

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
class Entry:
    """A record as it was announced at one moment."""

    owner: PeerId
    incarnation: Incarnation
    sequence: int
    record: Record
    ttl_s: float
    announced_at: float


@dataclass(eq=False, slots=True)
class Shelf:
    """What is known under one key."""

    visible: list[Entry] = field(default_factory=list)
    """In the order in which they became visible."""
    newest: dict[PeerId, Entry] = field(default_factory=dict)
    """What each owner announced last, visible or not."""


@dataclass(eq=False, slots=True)
class Bookmark:
    """How far one reader has read a shelf."""

    position: int = 0
    hidden: list[Entry] = field(default_factory=list)
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
        entry = Entry(owner, incarnation, self._sequence, effect.record, effect.ttl_s, self._clock.now)
        shelf = self._shelves[effect.key]
        shelf.newest[owner] = entry
        weather = self._network.weather
        if self._rng.random() >= weather.lost_writes:
            self._clock.at(self._clock.now + self._rng.uniform(0, weather.stale_s), lambda: shelf.visible.append(entry))
        if effect.slot != "lease":
            return

        def renew() -> None:
            if is_alive() and shelf.newest.get(owner) is entry:
                self.store(owner, incarnation, effect, is_alive)

        self._clock.at(self._clock.now + effect.ttl_s / RENEWALS, renew)

    def withdraw(self, owner: PeerId, key: Key) -> None:
        self._shelves[key].newest.pop(owner, None)

    def read(self, key: Key, reader: PeerId, incarnation: Incarnation) -> list[Sighting]:
        """What this reader has not seen yet."""
        shelf, bookmark = self._shelves[key], self._bookmarks[key, reader, incarnation]
        fresh = [*bookmark.hidden, *shelf.visible[bookmark.position :]]
        bookmark.position = len(shelf.visible)
        if bookmark.hidden or self.unseen or self._network.is_parted:
            bookmark.hidden = [entry for entry in fresh if self._is_hidden(entry, reader)]
            fresh = [entry for entry in fresh if not self._is_hidden(entry, reader)]
        return self._sightings(shelf, fresh)

    def everything(self, key: Key) -> list[Sighting]:
        """What somebody who never looked would find."""
        shelf = self._shelves[key]
        return self._sightings(shelf, shelf.visible)

    def _sightings(self, shelf: Shelf, entries: list[Entry]) -> list[Sighting]:
        """One of each owner, the newest; none of who withdrew."""
        now, newest = self._clock.now, dict[PeerId, Entry]()
        for entry in entries:
            known = newest.get(entry.owner)
            if known is None or known.sequence < entry.sequence:
                newest[entry.owner] = entry
        return [
            Sighting(e.owner, e.incarnation, e.sequence, left, e.record)
            for e in newest.values()
            if (left := e.announced_at + e.ttl_s - now) > 0 and e.owner in shelf.newest
        ]

    def _is_hidden(self, entry: Entry, reader: PeerId) -> bool:
        since = self._network.blocked_since(entry.owner, reader)
        return (reader, entry.owner) in self.unseen or (since is not None and entry.announced_at >= since)

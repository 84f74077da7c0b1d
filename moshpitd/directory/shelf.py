"""Records kept by key and kind: merged, counted down, handed out in pages.

Knows checked records and a clock that is handed in as `now`. Does not know sockets, signatures or who is close to a
key. A `Book` is all records of one (key, kind), one a peer; a node's `Shelf` holds the books it keeps for the swarm; a
reader keeps a book of what it has read. In both:

- the higher sequence wins; a sequence already seen changes nothing, so neither a replay nor a second holder extends a
  life;
- a record lives for its ttl from when *this* book first saw it, or for what its holder said remained, if that is less;
- the sequence of an expired record is remembered for a while, so that a replay does not revive it.

Every change gets the next revision of its shelf. A page holds what changed after a revision, so a second read costs
only what is new; the tag (xor of the records' signatures) tells a reader that it already holds all that a holder has.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from moshpitd.averaging.announcements import Roster
from moshpitd.averaging.names import Key
from moshpitd.directory.config import DirectoryConfig
from moshpitd.directory.records import SIGNATURE_BYTES, Record

ENTRY = struct.Struct("!IH")
SWEEP_PAUSE_S = 1.0


class Verdict(Enum):
    """What became of a record that was offered."""

    TAKEN = "taken"
    KNOWN = "known"
    """The very same record is here already; its life is not extended."""
    STALE = "stale"
    """As new a record of that peer, or a newer one, was seen before."""
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Page:
    """What changed in a book after a revision, as much as fits."""

    entries: tuple[tuple[float, bytes], ...]
    """Remaining ttl in seconds, record."""
    cursor: int
    """The revision to go on after."""
    left: int
    """How many changed records did not fit."""
    head: int
    """The newest revision there was."""
    tag: int

    def pack(self) -> bytes:
        """The entries as they travel."""
        return b"".join(ENTRY.pack(max(1, int(ttl_s * 1000)), len(raw)) + raw for ttl_s, raw in self.entries)


def unpack_entries(raw: bytes) -> Iterator[tuple[float, bytes]]:
    """The entries of a packed page; a truncated one ends it."""
    while len(raw) >= ENTRY.size:
        ttl_ms, length = ENTRY.unpack_from(raw)
        record = raw[ENTRY.size : ENTRY.size + length]
        if len(record) < length:
            return
        yield ttl_ms / 1000, record
        raw = raw[ENTRY.size + length :]


@dataclass(slots=True)
class _Entry:
    record: Record
    deadline: float
    revision: int
    tag: int


class Book:
    """All records of one key and kind, the newest of each peer."""

    def __init__(self, config: DirectoryConfig) -> None:
        """Empty."""
        self._config = config
        self._entries: dict[bytes, _Entry] = {}  # by public key, in the order of revisions
        self._seen: dict[bytes, tuple[int, float]] = {}  # of expired records: sequence, and until when it is remembered
        self._next_change = float("inf")
        self._revision = 0
        self.tag = 0

    def put(self, record: Record, remaining_s: float, now: float, revision: int | None = None) -> Verdict:
        """Merges a checked record whose holder gives it `remaining_s` to live."""
        self._expire(now)
        known, seen = self._entries.get(record.public_key), self._seen.get(record.public_key)
        if known is not None and record.sequence <= known.record.sequence:
            return Verdict.KNOWN if record.raw == known.record.raw else Verdict.STALE
        if seen is not None and record.sequence <= seen[0]:
            return Verdict.STALE
        if known is None and len(self._entries) >= self._config.records_per_key_max:
            return Verdict.FULL
        self._remove(record.public_key)
        self._revision = self._revision + 1 if revision is None else revision
        deadline = now + min(remaining_s, record.ttl_s)
        tag = int.from_bytes(record.raw[-SIGNATURE_BYTES:][:8], "big")
        self._entries[record.public_key] = _Entry(record, deadline, self._revision, tag)
        self._seen.pop(record.public_key, None)
        self._next_change = min(self._next_change, deadline)
        self.tag ^= tag
        return Verdict.TAKEN

    def roster(self, now: float) -> Roster:
        """What others may know: live records that were not withdrawn."""
        self._expire(now)
        live = (entry for entry in self._entries.values() if not entry.record.withdrawn)
        return tuple(
            sorted((entry.record.announcement(entry.deadline - now) for entry in live), key=lambda one: one.peer)
        )

    def page(self, after: int, *, lane: int, lanes: int, room_bytes: int, now: float) -> Page:
        """Changes after a revision, of the peers in one of `lanes` equal parts: parts are read side by side."""
        self._expire(now)
        entries: list[tuple[float, bytes]] = []
        cursor, left, room = after, 0, room_bytes
        for entry in self._entries.values():
            if entry.revision <= after or entry.record.public_key[0] % lanes != lane:
                continue
            room -= ENTRY.size + len(entry.record.raw)
            if left or room < 0:
                left += 1
                continue
            entries.append((entry.deadline - now, entry.record.raw))
            cursor = entry.revision
        return Page(tuple(entries), cursor if left else max(after, self._revision), left, self._revision, self.tag)

    def changes(self, after: int, now: float) -> tuple[int, list[tuple[float, Record]]]:
        """The newest revision, and every change after one, for a reader in this process."""
        self._expire(now)
        news = [(one.deadline - now, one.record) for one in self._entries.values() if one.revision > after]
        return self._revision, news

    def owners(self) -> Iterator[bytes]:
        """The public keys of all live records."""
        return iter(self._entries)

    def holds(self, public_key: bytes) -> bool:
        """Whether a live record of that peer is here."""
        return public_key in self._entries

    def is_blank(self, now: float) -> bool:
        """Nothing in it, and nothing to remember."""
        self._expire(now)
        return not self._entries and not self._seen

    def __len__(self) -> int:
        """Live records, withdrawals included."""
        return len(self._entries)

    def _remove(self, public_key: bytes) -> None:
        entry = self._entries.pop(public_key, None)
        if entry is not None:
            self.tag ^= entry.tag

    def _expire(self, now: float) -> None:
        if now < self._next_change:
            return
        for public_key, entry in list(self._entries.items()):
            if entry.deadline <= now:
                self._remove(public_key)
                self._seen[public_key] = (entry.record.sequence, now + self._config.remember_s)
        for public_key in [one for one, (_, until) in self._seen.items() if until <= now]:
            del self._seen[public_key]
        while len(self._seen) > 2 * self._config.records_per_key_max:
            del self._seen[next(iter(self._seen))]
        moments = [entry.deadline for entry in self._entries.values()] + [until for _, until in self._seen.values()]
        self._next_change = min(moments, default=float("inf"))


class Shelf:
    """The books a node keeps for the swarm, within its limits."""

    def __init__(self, config: DirectoryConfig) -> None:
        """Empty."""
        self._config = config
        self._books: dict[tuple[Key, str], Book] = {}
        self._by_peer: Counter[bytes] = Counter()  # never too low; exact after a sweep
        self._records = 0
        self._revision = 0
        self._swept_at = float("-inf")

    def put(self, key: Key, record: Record, now: float) -> Verdict:
        """Merges a checked record into its book."""
        book = self._books.get((key, record.kind))
        is_new = book is None or not book.holds(record.public_key)
        if is_new and self._is_full(record.public_key):
            self.sweep(now)
            if self._is_full(record.public_key):
                return Verdict.FULL
        if book is None:
            book = self._books[key, record.kind] = Book(self._config)
        # One count over all books, so that a book that was swept and made anew does not go back behind its readers.
        verdict = book.put(record, record.ttl_s, now, self._revision + 1)
        if verdict is Verdict.TAKEN:
            self._revision += 1
            if is_new:
                self._by_peer[record.public_key] += 1
                self._records += 1
        return verdict

    def book(self, key: Key, kind: str) -> Book | None:
        """The book of a key and kind, if there is one."""
        return self._books.get((key, kind))

    def sweep(self, now: float) -> None:
        """Throws out blank books and counts anew; at most once a second, however often it is asked for."""
        if now - self._swept_at < SWEEP_PAUSE_S:
            return
        self._swept_at = now
        for name in [name for name, book in self._books.items() if book.is_blank(now)]:
            del self._books[name]
        self._by_peer = Counter(owner for book in self._books.values() for owner in book.owners())
        self._records = self._by_peer.total()

    def _is_full(self, public_key: bytes) -> bool:
        limits = self._config
        return (
            self._records >= limits.records_max
            or self._by_peer[public_key] >= limits.records_per_peer_max
            or len(self._books) >= 2 * limits.records_max
        )

"""What a peer signs to announce something, as bytes and as an object.

Knows the layout, the limits and the signature. Does not know where records are kept or what a body means. A record
names neither its owner (it follows from the public key), nor its key, nor its swarm: both are signed, so that a record
lifted to another key or swarm is a forgery, and both are known to whoever holds it.

    version 1 | public key 32 | incarnation 8 | sequence 8 | ttl in ms 4 | flags 1 | kind length 1 | kind | body
    | signature 64
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass

from moshpitd.averaging.announcements import Announcement
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.names import Incarnation, Key, PeerId
from moshpitd.directory.config import DirectoryConfig
from moshpitd.identity import Identity, peer_id, verify

CONTEXT = "moshpitd directory record"
VERSION = 1
HEADER = struct.Struct("!B32sQQIBB")
SIGNATURE_BYTES = 64
WITHDRAWN = 0b1
SEQUENCE_MAX = (1 << 63) - 1
CHECKED_MAX = 4_096


class RecordRefused(RemoteProtocolError):
    """The record is forged, malformed or beyond a limit."""


class DirectoryError(Exception):
    """What was to be announced cannot be; the message says why."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record whose signature was checked."""

    peer: PeerId
    public_key: bytes
    incarnation: Incarnation
    sequence: int
    ttl_s: float
    """As signed; what remains of it is for each holder to count."""
    kind: str
    withdrawn: bool
    """The owner takes back what it announced: it stays to hide older records, and enters no roster."""
    body: bytes
    raw: bytes

    def announcement(self, ttl_s: float) -> Announcement:
        """What the rest of the daemon sees of it."""
        return Announcement(self.peer, self.incarnation, self.sequence, ttl_s, self.body)


class Notary:
    """Writes our records and checks those of others, for one swarm."""

    def __init__(self, swarm_id: bytes, config: DirectoryConfig) -> None:
        """Checked records are remembered: the same bytes come from every holder, and a check costs 130 us."""
        self._swarm_id = swarm_id
        self._config = config
        self._checked: OrderedDict[tuple[Key, bytes], Record] = OrderedDict()

    def write(
        self, identity: Identity, key: Key, kind: str, body: bytes, ttl_s: float, *, withdrawn: bool = False
    ) -> Record:
        """Signs with a fresh sequence number. Raises `DirectoryError` for what no holder would take."""
        limits, kind_raw = self._config, kind.encode()
        if len(body) > limits.body_bytes_max:
            raise DirectoryError(
                f"a body of {len(body)} bytes is too large to announce as {kind!r}: {limits.body_bytes_max} fit"
            )
        if not 0 < len(kind_raw) <= limits.kind_bytes_max:
            raise DirectoryError(f"kind {kind!r} must have 1 to {limits.kind_bytes_max} bytes")
        if not 0.001 <= ttl_s <= limits.ttl_s_max:
            raise DirectoryError(f"a ttl of {ttl_s} s cannot be announced: it lasts up to {limits.ttl_s_max:g} s")
        if len(key) != 20:
            raise DirectoryError(f"a key has 20 bytes, not {len(key)}")
        sequence, flags = identity.next_sequence(), WITHDRAWN if withdrawn else 0
        unsigned = (
            HEADER.pack(
                VERSION, identity.public_key, identity.incarnation, sequence, round(ttl_s * 1000), flags, len(kind_raw)
            )
            + kind_raw
            + body
        )
        raw = unsigned + identity.sign(CONTEXT, self._swarm_id, key, unsigned)
        return self._remember(
            key,
            Record(
                identity.peer_id, identity.public_key, identity.incarnation, sequence, ttl_s, kind, withdrawn, body, raw
            ),
        )

    def check(self, key: Key, raw: bytes) -> Record:
        """The record, if its owner signed it for this key of this swarm and it keeps the limits. Raises
        `RecordRefused`."""
        known = self._checked.get((key, raw))
        if known is not None:
            self._checked.move_to_end((key, raw))
            return known
        limits = self._config
        if not HEADER.size + 1 + SIGNATURE_BYTES <= len(raw) <= record_bytes_max(limits):
            raise RecordRefused(f"a record of {len(raw)} bytes")
        unsigned, signature = raw[:-SIGNATURE_BYTES], raw[-SIGNATURE_BYTES:]
        version, public_key, incarnation, sequence, ttl_ms, flags, kind_length = HEADER.unpack_from(unsigned)
        kind_raw, body = unsigned[HEADER.size :][:kind_length], unsigned[HEADER.size + kind_length :]
        if version != VERSION or flags & ~WITHDRAWN or sequence > SEQUENCE_MAX:
            raise RecordRefused(f"a record of version {version}, flags {flags:#x}, sequence {sequence}")
        if not 0 < ttl_ms <= limits.ttl_s_max * 1000:
            raise RecordRefused(f"a record with a ttl of {ttl_ms} ms")
        if not 0 < kind_length == len(kind_raw) <= limits.kind_bytes_max or len(body) > limits.body_bytes_max:
            raise RecordRefused(f"a record with a kind of {kind_length} bytes and a body of {len(body)}")
        try:
            kind = kind_raw.decode()
        except UnicodeDecodeError as error:
            raise RecordRefused("a record whose kind is not UTF-8") from error
        if not verify(public_key, signature, CONTEXT, self._swarm_id, key, unsigned):
            raise RecordRefused(f"a record that {peer_id(public_key)[:8]} did not sign for this key and swarm")
        return self._remember(
            key,
            Record(
                peer_id(public_key),
                public_key,
                Incarnation(incarnation),
                sequence,
                ttl_ms / 1000,
                kind,
                bool(flags & WITHDRAWN),
                body,
                raw,
            ),
        )

    def _remember(self, key: Key, record: Record) -> Record:
        self._checked[key, record.raw] = record
        if len(self._checked) > CHECKED_MAX:
            self._checked.popitem(last=False)
        return record


def record_bytes_max(config: DirectoryConfig) -> int:
    """The largest record that anybody may send."""
    return HEADER.size + config.kind_bytes_max + config.body_bytes_max + SIGNATURE_BYTES

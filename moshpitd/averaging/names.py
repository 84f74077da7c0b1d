"""The names of things: who a peer is, which start of it, which group, which place in a group.

Knows how a name is hashed into an order that every peer computes alike. Does not know where names come from: the
identity door makes peer ids, leaders draw group ids from dice handed in.
"""

from __future__ import annotations

import hashlib
from typing import NewType

PeerId = NewType("PeerId", str)
"""64 lower-case hex digits: SHA-256 of the peer's raw Ed25519 public key."""

Incarnation = NewType("Incarnation", int)
"""64 random bits drawn at every start of a daemon: a restarted peer is a new member."""

GroupId = NewType("GroupId", bytes)
"""16 random bytes drawn by the leader that closes a group."""

Rank = NewType("Rank", int)
"""A member's place in its group: members sorted by line coordinate, then peer id."""

Key = NewType("Key", bytes)
"""20 bytes: where in the directory something is announced."""


def short(peer: PeerId) -> str:
    """The eight digits by which people recognise a peer in messages."""
    return peer[:8]


def digest(*parts: bytes | str | int) -> bytes:
    """SHA-256 over the parts, each framed by its length, so that ("ab", "c") and ("a", "bc") differ."""
    hasher = hashlib.sha256()
    for part in parts:
        match part:
            case bytes():
                raw = part
            case str():
                raw = part.encode()
            case int():
                raw = part.to_bytes(16, "big", signed=True)
        hasher.update(len(raw).to_bytes(4, "big"))
        hasher.update(raw)
    return hasher.digest()


def key(*parts: bytes | str | int) -> Key:
    """The directory key of the parts: the first 20 bytes of their digest."""
    return Key(digest(*parts)[:20])

"""What the directory says about others: one announcement a peer, a roster of them a key.

Knows neither how announcements travel nor what their bodies mean: whoever announced under the key encodes and decodes
them. All in a roster were signed by the peer they name and had not expired when the roster was read.
"""

from __future__ import annotations

from dataclasses import dataclass

from moshpitd.averaging.names import Incarnation, PeerId


@dataclass(frozen=True, slots=True)
class Announcement:
    """What one peer says of itself under one key."""

    peer: PeerId
    incarnation: Incarnation
    sequence: int
    """Grows with everything the peer announces, restarts included: the higher one is the newer."""
    ttl_s: float
    """What remained of its life when the roster was read, counted from first sight: a duration, never a moment."""
    body: bytes


Roster = tuple[Announcement, ...]
"""Every live announcement of a key, in the order of peer ids."""

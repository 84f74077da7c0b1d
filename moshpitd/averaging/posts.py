"""The models a trainer posted: which buffer is whose, so that none is ever torn and one is always there.

Knows three owners. The trainer writes into one buffer; the newest post is what the daemon puts in next; a version under
way reads one until it has committed, perhaps an older one. Posting passes the trainer's buffer to the daemon whole, and
the trainer gets another, which is neither of the other two: with three buffers there always is one. Does not know what
a version is, or how bytes get into a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moshpitd.averaging.vector import Vector

BUFFERS = 3


@dataclass(slots=True)
class Post:
    """A model as its trainer posted it."""

    vector: Vector
    version: int
    """As which it counts."""


class Posts:
    """Of one trainer. Buffers are told apart by identity; whoever streams its values may bring a new one each time."""

    def __init__(self) -> None:
        self.newest: Post | None = None
        self.sending: Post | None = None
        """What a version under way reads."""

    def post(self, vector: Vector, version: int) -> Post:
        """The trainer is done writing this buffer; from here on it is ours."""
        assert not self.holds(vector), "the trainer wrote into a buffer that was not its own"
        self.newest = Post(vector, version)
        return self.newest

    def send(self) -> Post:
        """The newest post goes into a version. One at a time."""
        assert self.sending is None
        assert self.newest is not None
        self.sending = self.newest
        return self.sending

    def sent(self) -> None:
        """Nothing reads it any more."""
        self.sending = None

    def holds(self, vector: Vector) -> bool:
        """Whether the trainer must not write here."""
        return any(post is not None and post.vector is vector for post in (self.newest, self.sending))

    def writable(self, buffers: Sequence[Vector]) -> Vector:
        """The one the trainer writes its next model into."""
        return next(buffer for buffer in buffers if not self.holds(buffer))

"""What the all-reduce asks of a codec: one coding for each of its halves, for any stretch of the vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from moshpitd.averaging.codecs.anchored import Anchored
from moshpitd.averaging.codecs.coding import Coding
from moshpitd.averaging.vector import Floats, Vector


class VectorCodec(Protocol):
    """How the values of one layout travel."""

    @property
    def name(self) -> str:
        """Canonical: what means the same has the same name."""
        ...

    def of(self, start: int, stop: int, anchor: Vector | None = None) -> Codec:
        """For elements [start, stop), which lie in one segment. `anchor`: what all members hold alike, for those codecs
        that code the difference to it."""
        ...


@dataclass(frozen=True, slots=True)
class Codec:
    """How values travel, everywhere alike. Whatever the group's size they are coded twice: as a contribution, and in
    the average."""

    name: str
    """Canonical: codecs that mean the same have the same name."""
    contribution: Coding
    average: Coding
    precision: float
    """The largest error of a mean, as a share of the largest value that went into it (of a float32 vector)."""
    anchored: bool = False
    """Differences are coded, where there is something that they can be taken to."""

    def of(self, start: int, stop: int, anchor: Vector | None = None) -> Codec:
        return self if anchor is None else self.around(partial(anchor.elements, start, stop))

    def around(self, anchor: Callable[[], Floats]) -> Codec:
        """For values at a place where the anchor is this; itself, if it is not of those that are anchored."""
        if not self.anchored:
            return self
        return replace(self, contribution=Anchored(self.contribution, anchor), average=Anchored(self.average, anchor))

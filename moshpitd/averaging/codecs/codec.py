"""What the all-reduce asks of a codec: one coding for each of its halves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moshpitd.averaging.vector import Floats


class Coding(Protocol):
    """Turns a chunk into bytes and back. Decoding what was encoded is deterministic, bit for bit, on every machine."""

    def encode(self, values: Floats) -> bytes | memoryview:
        """`values`: one-dimensional, of any dtype in DTYPES. May return a view of them: they must not change after."""
        ...

    def decode(self, payload: bytes | memoryview, dtype: np.dtype, elements: int) -> Floats:
        """Values of `dtype`; may be a read-only view of the payload. Raises RemoteProtocolError for what is no code."""
        ...

    def encoded_bytes(self, dtype: np.dtype, elements: int) -> int:
        """The exact size of the code."""
        ...


@dataclass(frozen=True, slots=True)
class Codec:
    """How values travel. Whatever the group's size they are coded twice: as a contribution, and in the average."""

    name: str
    """Canonical: codecs that mean the same have the same name."""
    contribution: Coding
    average: Coding
    precision: float
    """The largest error of a mean, as a share of the largest value that went into it (of a float32 vector)."""

"""Differences instead of values: to an anchor, a vector that all members of the group hold bit for bit.

What is coded then is as large as the members' spread and not as the values, and so is the error. The code is one byte,
DIFFERENCE or VALUES, and the inner coding's: values themselves are sent where they are no larger than the difference
(one whose values have nothing to do with the last average, gradients), so that anchoring never costs precision.
Decoding adds in float32 (float64 for float64), elementwise: all who hold the anchor end with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moshpitd.averaging.codecs.coding import Coding
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.vector import DTYPES, LARGEST, Floats

VALUES, DIFFERENCE = b"\0", b"\1"


@dataclass(frozen=True, slots=True)
class Anchored:
    """A coding around an anchor."""

    coding: Coding
    anchor: Callable[[], Floats]
    """The anchor's elements for what is coded; asked when needed, for they may have to be gathered."""

    def encode(self, values: Floats) -> bytes:
        with np.errstate(over="ignore", invalid="ignore"):
            difference = np.subtract(values, self.anchor(), dtype=_wide(values.dtype))
        # Not of what is not finite: it shall be refused as what it is.
        if _magnitude(difference) < _magnitude(values):
            return DIFFERENCE + self.coding.encode(difference)
        return VALUES + self.coding.encode(values)

    def decode(self, payload: bytes | memoryview, dtype: np.dtype, elements: int) -> Floats:
        inner = memoryview(payload)[1:]
        match bytes(payload[:1]):
            case b"\0":
                return self.coding.decode(inner, dtype, elements)
            case b"\1":
                wide = _wide(dtype)
                values = np.add(self.anchor(), self.coding.decode(inner, wide, elements), dtype=wide)
                largest = LARGEST[dtype.name]
                return np.clip(values, -largest, largest, out=values).astype(dtype, copy=False)
            case other:
                raise RemoteProtocolError(f"an anchored code that begins with {other.hex() or 'nothing'}")

    def encoded_bytes(self, dtype: np.dtype, elements: int) -> int:
        return 1 + self.coding.encoded_bytes(dtype, elements)


def _wide(dtype: np.dtype) -> np.dtype:
    return DTYPES["float64" if dtype.itemsize == 8 else "float32"]


def _magnitude(values: Floats) -> float:
    """NaN if one is."""
    return max(-float(values.min()), float(values.max()))

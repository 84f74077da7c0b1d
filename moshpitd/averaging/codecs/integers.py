"""Integers in as few bytes as they need: how sums travel, exactly.

Knows float64 values that are integers, at most 2^53 away from 0. A chunk is cut into blocks of BLOCK; each is written
with as many bytes an integer as its largest needs, so that a few large numbers (the words beside a sketch) do not widen
all. A code is the width of every block, a byte each, then the blocks of width 1, those of width 2 and so on, in their
order, as little-endian two's complement; the last block is filled up with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.codecs.codec import Codec
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.vector import Floats

BLOCK = 128
WIDTHS = range(1, 8)
LARGEST = 2**53
"""Above it float64 has gaps."""

Wide = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Integers:
    """A coding of float64 chunks that hold integers."""

    def encode(self, values: Floats) -> bytes:
        assert values.dtype == np.float64
        blocks = np.zeros((_blocks(len(values)), BLOCK), np.int64)
        # Beyond the limit (strangers' contributions may add up to it) it is refused by who decodes it.
        blocks.reshape(-1)[: len(values)] = np.clip(values, -4.0 * LARGEST, 4.0 * LARGEST)
        widths = _widths_of(blocks)
        raw = blocks.astype("<i8", copy=False).view(np.uint8).reshape(-1, BLOCK, 8)
        return b"".join([widths.tobytes(), *(raw[widths == width][:, :, :width].tobytes() for width in WIDTHS)])

    def decode(self, payload: bytes | memoryview, dtype: np.dtype, elements: int) -> Floats:
        count = _blocks(elements)
        widths = np.frombuffer(payload, np.uint8, min(count, len(payload)))
        if dtype != np.float64 or not np.isin(widths, WIDTHS).all():
            raise RemoteProtocolError("a code of integers of an impossible width")
        if len(payload) != count + BLOCK * int(widths.sum()):
            raise RemoteProtocolError(f"{elements} integers in {len(payload)} bytes")
        raw = np.zeros((count, BLOCK, 8), np.uint8)
        at = count
        for width in WIDTHS:
            mine = widths == width
            if size := int(mine.sum()) * BLOCK * width:
                raw[mine, :, 8 - width :] = np.frombuffer(payload, np.uint8, size, at).reshape(-1, BLOCK, width)
                at += size
        blocks = raw.reshape(count, BLOCK * 8).view("<i8") >> (64 - 8 * widths.astype(np.int64))[:, None]
        integers = blocks.reshape(-1)[:elements]
        if np.abs(integers).max(initial=0) > LARGEST:
            raise RemoteProtocolError("integers that float64 does not hold")
        decoded: Floats = integers.astype(np.float64)
        return decoded

    def encoded_bytes(self, dtype: np.dtype, elements: int) -> int:
        return _blocks(elements) * (1 + BLOCK * WIDTHS[-1])


def _blocks(elements: int) -> int:
    return -(-elements // BLOCK)


def _widths_of(blocks: Wide) -> npt.NDArray[np.uint8]:
    """Bytes for the largest of each block, the sign included."""
    largest = np.maximum(blocks.max(axis=1), ~blocks.min(axis=1))
    bounds = [1 << (8 * width - 1) for width in WIDTHS[:-1]]
    widths: npt.NDArray[np.uint8] = (1 + np.searchsorted(bounds, largest, side="right")).astype(np.uint8)
    return widths


INTEGERS = Codec("integers", Integers(), Integers(), 0.0)

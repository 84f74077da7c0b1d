"""How chunks of the vector are cut into packet ranges, and ranges turned into what datagrams hold, and back.

A range is what one datagram carries: as many elements as fit `PAYLOAD_BYTES_MAX` under the codec, coded by themselves,
so that each datagram can be decoded whatever became of the others. Ranges are numbered over the whole vector; no range
crosses a chunk. Knows codings and arithmetic. Does not know headers, peers or what arrives.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.codecs import Codec, Coding
from moshpitd.averaging.codecs.cast import Cast
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.names import Rank
from moshpitd.averaging.partition import Piece
from moshpitd.averaging.vector import DTYPES, Floats

PAYLOAD_BYTES_MAX = 1400
"""With the header and IPv6's 48 bytes it still fits an Ethernet frame: a datagram is never fragmented."""
GRAIN = 8
"""Ranges hold multiples of so many elements, which is what bits are packed by ..."""
GRAIN_LARGE = 128
"""... and of so many, the largest group of a block-wise codec, where a range holds 1,024 or more."""

Rows = npt.NDArray[np.uint8]
"""Payloads of equal size, one a row."""
Numbers = npt.NDArray[np.intp]
"""Of ranges."""


@dataclass(frozen=True, slots=True)
class Packets:
    """Payloads of equal size and the numbers of their ranges."""

    numbers: Numbers
    rows: Rows


@dataclass(frozen=True, slots=True)
class Cut:
    """A chunk's ranges: numbers [first, first + count)."""

    piece: Piece
    first: int
    count: int
    range_elements: int

    @property
    def stop(self) -> int:
        return self.first + self.count

    def elements(self, number: int) -> tuple[int, int]:
        """Start and stop of a range, in elements of the vector."""
        start = self.piece.start + (number - self.first) * self.range_elements
        return start, min(start + self.range_elements, self.piece.stop)


class Ranges:
    """All ranges of a group's vector; the same at every member."""

    def __init__(self, pieces: Sequence[Piece], codec: Codec) -> None:
        cuts: list[Cut] = []
        per_range = {dtype: range_elements(codec, DTYPES[dtype]) for dtype in {piece.dtype for piece in pieces}}
        first = 0
        for piece in pieces:
            elements = per_range[piece.dtype]
            count = -(-(piece.stop - piece.start) // elements)
            cuts.append(Cut(piece, first, count, elements))
            first += count
        self.cuts = tuple(cuts)
        self.total = first
        self._firsts = [cut.first for cut in cuts]

    def cut_of(self, number: int) -> Cut:
        assert 0 <= number < self.total
        return self.cuts[bisect_right(self._firsts, number) - 1]

    def span(self, rank: Rank) -> tuple[int, int]:
        """The numbers [first, stop) of what this member reduces."""
        own = [cut for cut in self.cuts if cut.piece.reducer == rank]
        return (own[0].first, own[-1].stop) if own else (0, 0)


def range_elements(codec: Codec, dtype: np.dtype) -> int:
    """As many as fit one datagram, as a contribution and in an average."""
    codings = (codec.contribution, codec.average)
    elements = GRAIN
    while all(coding.encoded_bytes(dtype, elements + GRAIN) <= PAYLOAD_BYTES_MAX for coding in codings):
        elements += GRAIN
    return elements // GRAIN_LARGE * GRAIN_LARGE if elements >= 8 * GRAIN_LARGE else elements


def payload_bytes(coding: Coding, cut: Cut, number: int) -> int:
    """How long this range's payload must be."""
    start, stop = cut.elements(number)
    return coding.encoded_bytes(DTYPES[cut.piece.dtype], stop - start)


def encode_ranges(coding: Coding, cut: Cut, values: Floats, first: int, stop: int) -> list[Packets]:
    """The payloads of ranges [first, stop) of this cut, `values` all of its elements. At most two: of ranges of the
    usual size, and of a shorter last one."""
    size = cut.range_elements
    packets: list[Packets] = []
    whole = stop if stop < cut.stop or len(values) == cut.count * size else stop - 1
    if whole > first:
        part = values[(first - cut.first) * size : (whole - cut.first) * size]
        packets.append(Packets(np.arange(first, whole), _encode_rows(coding, part, size)))
    if whole < stop:
        part = values[(whole - cut.first) * size :]
        packets.append(Packets(np.arange(whole, stop), _encode_rows(coding, part, len(part))))
    return packets


def _encode_rows(coding: Coding, values: Floats, size: int) -> Rows:
    if isinstance(coding, Cast):  # element by element: a row's code is a row of the code
        return np.frombuffer(coding.encode(values), np.uint8).reshape(len(values) // size, -1)
    codes = [coding.encode(values[at : at + size]) for at in range(0, len(values), size)]
    return np.frombuffer(b"".join(codes), np.uint8).reshape(len(codes), -1)


class Slots:
    """Where the payloads of one cut from one sender are kept until they are decoded."""

    def __init__(self, cut: Cut, coding: Coding) -> None:
        self._cut = cut
        self._coding = coding
        self._dtype = DTYPES[cut.piece.dtype]
        self._tail = cut.piece.stop - cut.piece.start - (cut.count - 1) * cut.range_elements
        self._tail_bytes = coding.encoded_bytes(self._dtype, self._tail)
        width = coding.encoded_bytes(self._dtype, cut.range_elements)
        self._rows: Rows = np.zeros((cut.count, width), np.uint8)
        """The last payload may be shorter than its row."""

    def put(self, packets: Packets) -> None:
        """Raises RemoteProtocolError where a payload has not the size of its range."""
        places = packets.numbers - self._cut.first
        width = packets.rows.shape[1]
        has_last = int(places.max()) == self._cut.count - 1
        sizes = {self._tail_bytes if has_last else self._rows.shape[1]}
        if len(places) > 1:
            sizes.add(self._rows.shape[1])
        if sizes != {width}:
            raise RemoteProtocolError(f"a packet of range {int(packets.numbers[-1])} with {width} bytes")
        if width == self._rows.shape[1]:
            self._rows[places] = packets.rows
        else:
            self._rows[places, :width] = packets.rows

    def decode(self, arrived: npt.NDArray[np.bool_]) -> tuple[Floats, dict[int, str]]:
        """All elements of the cut, 0 where nothing arrived; by range, why one that arrived is refused (0 as well)."""
        cut, size = self._cut, self._cut.range_elements
        elements = cut.piece.stop - cut.piece.start
        refused: dict[int, str] = {}
        if isinstance(self._coding, Cast):
            code = self._rows.reshape(-1)[: (cut.count - 1) * self._rows.shape[1] + self._tail_bytes]
            values = self._coding.decode(code.data, self._dtype, elements)
        else:
            values = np.zeros(elements, self._dtype)
            for place in np.flatnonzero(arrived):
                target = values[place * size : (place + 1) * size]
                width = self._tail_bytes if place == cut.count - 1 else self._rows.shape[1]
                try:
                    target[:] = self._coding.decode(self._rows[place, :width].data, self._dtype, len(target))
                except RemoteProtocolError as wrong:
                    refused[cut.first + int(place)] = str(wrong)
        return values, refused


def non_finite_ranges(values: Floats, cut: Cut) -> Numbers:
    """The ranges that hold NaN or infinity."""
    return cut.first + np.unique(np.flatnonzero(~np.isfinite(values)) // cut.range_elements)

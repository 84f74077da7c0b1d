"""Block-wise integers: Flash Communication's asymmetric codes (arXiv 2412.04964; bit splitting and spike reserving from
its V2, 2508.03760).

Each `group` consecutive elements share a scale and a minimum: x ~ minimum + scale * q, q of `bits` bits. As float16 the
minimum is rounded down and the scale up, so that nothing clips: an element is off by half a scale at most. A chunk's
code, all of it little-endian:

    exponent   int16              what follows is in units of 2^exponent, chosen from the chunk's largest magnitude, so
                                  that float16 neither overflows nor, where all values are tiny, underflows
    scales     float16 a group
    minima     float16 a group
    spikes     with spike reserving, a group: the smallest and the largest element, float16 each, and their places in
               the group, uint8 each; scale and minimum are those of the rest
    codes      planes of `bits` bits (planes.py), in blocks of BLOCK elements

that is bits + 32/group bits an element, bits + 80/group with spikes, and less than 10 bytes a chunk beside it.

A group of equal elements is exact: its scale has the sign bit set, which no other has, and the 15 bits behind it, the
16 of the minimum and the lowest of its first code are the element itself, a float32. With spikes, two equal places mean
that there are none, because all elements are equal.

Decoding is float32, elementwise, one rounding an operation: every machine decodes the same bits. Where float32 has no
room for that, near its ends and for float64 beyond them, the elements themselves are taken in those units too
(`_is_moved`). So float64 keeps its range, but float32's precision at best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.codecs.planes import Codes, pack, packed_bytes, unpack
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.vector import LARGEST, Floats

Float32s = npt.NDArray[np.float32]
Fields = npt.NDArray[np.uint16]
"""What is told of each group: a row a field, a column a group."""

GROUPS = (128, 32)
"""Sizes of a group, the default first. The small one follows the values closer and costs three quarters of a bit."""
BLOCK = 1 << 16
"""Elements coded at a time: they and their codes stay in a core's second cache."""
UNITS_BITS = 15
"""Magnitudes stay below 2^15 units, and with them the range of a group below float16's 65,504."""
EXPONENT_MIN, EXPONENT_MAX = -1022, 1024 - UNITS_BITS
"""For the smallest normal and the largest float64."""
NOT_FINITE = EXPONENT_MAX + 1
CONSTANT = 0x8000


@dataclass(frozen=True, slots=True)
class Flash:
    """A coding in `bits` bits an element, 2 to 8."""

    bits: int
    group: int = GROUPS[0]
    spikes: bool = False
    """Reserve each group's smallest and largest element: pays at 2 and 3 bits, and where tails are heavy."""

    def encode(self, values: Floats) -> memoryview:
        """Values that are not finite become a code that is refused by who gets it, as the values were to be before."""
        elements = len(values)
        code = np.empty(self.encoded_bytes(values.dtype, elements), np.uint8)
        exponent, wide = _in_range(values)
        code[:2].view("<i2")[:] = exponent
        if exponent == NOT_FINITE:
            code[2:] = 0
            return code.data
        if tail := -elements % self.group:
            wide = np.pad(wide, (0, tail), "edge")
        unit = _unit(exponent)
        fields = code[2 : self._codes_at(elements)].view("<u2").reshape(self._fields, -1)
        if self.spikes:
            wide = _take_spikes(wide.reshape(-1, self.group), fields[2:], unit)
        low, inverse, last_bits = self._describe(wide, fields, unit)
        self._quantise(wide, low, inverse, last_bits, code[self._codes_at(elements) :], elements)
        return code.data

    def decode(self, payload: bytes | memoryview, dtype: np.dtype, elements: int) -> Floats:
        if len(payload) != (size := self.encoded_bytes(dtype, elements)):
            raise RemoteProtocolError(
                f"{elements} elements as {self.bits}-bit codes have {size} bytes, not {len(payload)}"
            )
        code = np.frombuffer(payload, np.uint8)
        exponent = int.from_bytes(payload[:2], "little", signed=True)
        if not EXPONENT_MIN <= exponent <= EXPONENT_MAX:
            raise RemoteProtocolError(f"codes of values that are not finite (in units of 2^{exponent})")
        unit = _unit(exponent)
        fields = code[2 : self._codes_at(elements)].view("<u2").reshape(self._fields, -1)
        rows = np.empty((fields.shape[1], self.group), np.float32)
        self._restore(code[self._codes_at(elements) :], *self._described(fields, unit), rows, elements)
        if self.spikes:
            _put_spikes(rows, fields[2:], unit)
        return _out_of_range(rows.reshape(-1)[:elements], exponent, dtype)

    def encoded_bytes(self, dtype: np.dtype, elements: int) -> int:
        return self._codes_at(elements) + packed_bytes(self.bits, elements)

    # ---- how it is laid out

    @property
    def _top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def _fields(self) -> int:
        return 5 if self.spikes else 2

    def _codes_at(self, elements: int) -> int:
        return 2 + -(-elements // self.group) * 2 * self._fields

    # ---- one way

    def _describe(self, wide: Float32s, fields: Fields, unit: np.float32) -> tuple[Float32s, Float32s, Codes]:
        """Write scales and minima; the minima as they will be decoded, inverse scales, and the lowest bits of
        constants (0 of other groups)."""
        starts = np.arange(0, len(wide), self.group)
        lowest = np.minimum.reduceat(wide, starts) + np.float32(0)  # never -0.0: which of two zeros is less is not said
        highest = np.maximum.reduceat(wide, starts)
        is_constant = lowest == highest
        minima = (lowest / unit).astype(np.float16)
        bits = minima.view(np.int16)
        bits += (minima.astype(np.float32) * unit > lowest) * np.where(bits < 0, np.int16(1), np.int16(-1))
        low = minima.astype(np.float32) * unit
        span = highest - low
        top = np.float32(self._top)
        scales = (span / top / unit).astype(np.float16)
        scales.view(np.int16)[:] += scales.astype(np.float32) * unit * top < span
        inverse = np.zeros_like(span)
        np.divide(np.float32(1), scales.astype(np.float32) * unit, out=inverse, where=~is_constant)
        value = lowest.view(np.uint32)
        fields[0] = np.where(is_constant, CONSTANT | value >> 17, scales.view(np.uint16))
        fields[1] = np.where(is_constant, value >> 1 & 0xFFFF, minima.view(np.uint16))
        return low, inverse, (value & is_constant).astype(np.uint8)

    def _quantise(
        self, wide: Float32s, low: Float32s, inverse: Float32s, last_bits: Codes, packed: Codes, elements: int
    ) -> None:
        size = min(BLOCK, len(wide))
        steps = np.empty(size, np.float32)
        codes, scratch = np.empty((2, size), np.uint8)
        for start in range(0, len(wide), BLOCK):
            block = wide[start : start + BLOCK]
            groups = slice(start // self.group, (start + len(block)) // self.group)
            steps, codes = steps[: len(block)], codes[: len(block)]
            rows = steps.reshape(-1, self.group)
            np.subtract(block.reshape(-1, self.group), low[groups, None], out=rows)
            rows *= inverse[groups, None]
            steps += np.float32(0.5)
            np.copyto(codes, steps, casting="unsafe")  # cuts off: with the half above this rounds
            codes[:: self.group] |= last_bits[groups]
            count = min(len(block), elements - start)
            first, last = packed_bytes(self.bits, start), packed_bytes(self.bits, start + count)
            count = -(-count // 8) * 8
            pack(codes[:count], self.bits, packed[first:last], scratch[:count])

    # ---- and back

    def _described(self, fields: Fields, unit: np.float32) -> tuple[Float32s, Float32s, Codes]:
        """Scales, minima and which groups are constant; the minimum of those still lacks its last bit."""
        is_constant = fields[0] >= CONSTANT
        with np.errstate(all="ignore"):
            value = (fields[0] & 0x7FFF).astype(np.uint32) << 17 | fields[1].astype(np.uint32) << 1
            scale = np.where(is_constant, np.float32(0), fields[0].view("<f2").astype(np.float32) * unit)
            low = np.where(is_constant, value.view(np.float32), fields[1].view("<f2").astype(np.float32) * unit)
            if not np.isfinite(scale * np.float32(self._top) + low).all():
                raise RemoteProtocolError("codes of values that are not finite")
        return scale, low, is_constant.view(np.uint8)

    def _restore(
        self, packed: Codes, scale: Float32s, low: Float32s, is_constant: Codes, rows: Float32s, elements: int
    ) -> None:
        codes, scratch = np.empty((2, min(BLOCK, rows.size)), np.uint8)
        for start in range(0, elements, BLOCK):
            groups = slice(start // self.group, (start + BLOCK) // self.group)
            block = rows[groups]
            count = min(BLOCK, elements - start)
            first, last = packed_bytes(self.bits, start), packed_bytes(self.bits, start + count)
            count = -(-count // 8) * 8
            unpack(packed[first:last], self.bits, codes[:count], scratch[:count])
            codes[count : block.size] = 0
            np.copyto(block.reshape(-1), codes[: block.size])
            low.view(np.uint32)[groups] |= codes[: block.size : self.group] & is_constant[groups]
            block *= scale[groups, None]
            block += low[groups, None]


def _take_spikes(rows: Float32s, fields: Fields, unit: np.float32) -> Float32s:
    """Write the smallest and the largest element of each row; the rows with another element in both places, flat."""
    every = np.arange(len(rows))
    first, last = rows.argmin(axis=1), rows.argmax(axis=1)
    for field, places in zip(fields, (first, last), strict=False):
        field[:] = (rows[every, places] / unit).astype(np.float16).view(np.uint16)
    fields[2] = first | last << 8
    other = np.where((first != 0) & (last != 0), 0, np.where((first != 1) & (last != 1), 1, 2))
    rest = rows.copy()
    rest[every, first] = rest[every, last] = rows[every, other]
    return rest.reshape(-1)


def _put_spikes(rows: Float32s, fields: Fields, unit: np.float32) -> None:
    first, last = fields[2] & 0xFF, fields[2] >> 8
    with np.errstate(invalid="ignore"):
        values = fields[:2].view("<f2").astype(np.float32) * unit
    if (first >= rows.shape[1]).any() or (last >= rows.shape[1]).any():
        raise RemoteProtocolError(f"a spike outside of its group of {rows.shape[1]}")
    if not np.isfinite(values).all():
        raise RemoteProtocolError("codes of spikes that are not finite")
    there = np.flatnonzero(first != last)
    rows[there, first[there]] = values[0, there]
    rows[there, last[there]] = values[1, there]


def _is_moved(exponent: int) -> bool:
    """Whether elements are coded in units, because sums and inverse scales of theirs may not fit float32."""
    return not -100 <= exponent <= 110


def _unit(exponent: int) -> np.float32:
    """What one unit is for those who code."""
    return np.float32(1.0 if _is_moved(exponent) else 2.0**exponent)


def _in_range(values: Floats) -> tuple[int, Float32s]:
    """The exponent, and the elements as float32, moved if need be."""
    wide = values if values.dtype.itemsize >= 4 else values.astype(np.float32)
    largest = max(-float(wide.min(initial=0)), float(wide.max(initial=0)))
    if not math.isfinite(largest):
        return NOT_FINITE, np.empty(0, np.float32)
    exponent = max(EXPONENT_MIN, math.frexp(largest)[1] - UNITS_BITS)
    if _is_moved(exponent):
        wide = wide * np.float64(2.0**-exponent)
    return exponent, wide.astype(np.float32, copy=False)


def _out_of_range(wide: Float32s, exponent: int, dtype: np.dtype) -> Floats:
    """The inverse. Scales are rounded up, so the largest values may come out beyond the range: they saturate."""
    is_moved = _is_moved(exponent)
    if dtype.itemsize >= 4 and not is_moved:
        return wide.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        values = wide * np.float64(2.0**exponent) if is_moved else wide
    largest = LARGEST[dtype.name]
    return np.clip(values, -largest, largest).astype(dtype)

"""Codes of any width lie in memory without a gap, and come back."""

from __future__ import annotations

import numpy as np
import pytest

from moshpitd.averaging.codecs.planes import WIDTHS, Codes, pack, packed_bytes, unpack

LENGTHS = (8, 16, 24, 1000, 4096, 65_536)


def packed(codes: Codes, bits: int) -> Codes:
    there = np.empty(packed_bytes(bits, len(codes)), np.uint8)
    pack(codes.copy(), bits, there, np.empty_like(codes))
    return there


def unpacked(there: Codes, bits: int, count: int) -> Codes:
    codes = np.full(count, 255, np.uint8)
    unpack(there, bits, codes, np.full(count, 255, np.uint8))
    return codes


def dumb_unpacked(there: bytes, bits: int, count: int) -> list[int]:
    """Bit by bit, as planes.py describes it."""
    codes = [0] * count
    at = shift = 0
    for width in WIDTHS[bits]:
        size = count * width // 8
        for place in range(count):
            byte, within = place % size, place // size * width
            if width == 1:
                byte, within = place // 8, 7 - place % 8
            codes[place] |= (there[at + byte] >> within & (1 << width) - 1) << shift
        at += size
        shift += width
    return codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_planes_fill_their_width_and_each_divides_a_byte(bits: int) -> None:
    assert sum(WIDTHS[bits]) == bits
    assert all(8 % width == 0 for width in WIDTHS[bits])
    assert packed_bytes(bits, 800) == 100 * bits
    assert packed_bytes(bits, 801) == packed_bytes(bits, 808) == 101 * bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_comes_back_from_every_place(bits: int) -> None:
    count = 8 << bits
    for turn in range(8):
        codes = np.roll(np.arange(count, dtype=np.uint8) & (1 << bits) - 1, turn)
        assert np.array_equal(unpacked(packed(codes, bits), bits, count), codes)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_any_row_comes_back(bits: int, length: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, length, np.uint8)
    there = packed(codes, bits)
    assert len(there) * 8 == bits * length
    assert np.array_equal(unpacked(there, bits, length), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_bits_lie_where_they_are_said_to_lie(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 240, np.uint8)
    assert dumb_unpacked(packed(codes, bits).tobytes(), bits, 240) == codes.tolist()

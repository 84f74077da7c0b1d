"""Codes of 2 to 8 bits, packed without a gap by splitting their bits into planes of 4, 2 and 1.

Five bits are a plane of the low four and one of the fifth, seven are 4 + 2 + 1: each plane's width divides a byte, so
none wastes a bit. A plane of 4 or 2 puts codes from different parts of the row into a byte (the low half of the row in
the low nibbles, the high half in the high ones), so that all work is on contiguous runs; a plane of 1 is numpy's own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]

WIDTHS: dict[int, tuple[int, ...]] = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
"""The planes of a code of so many bits, the lowest bits first."""


def packed_bytes(bits: int, count: int) -> int:
    """What `count` codes take. Rows are filled up to a multiple of eight, so that every plane ends with a byte."""
    return -(-count // 8) * bits


def pack(codes: Codes, bits: int, packed: Codes, scratch: Codes) -> None:
    """`codes`: each below 2^bits, a multiple of eight of them. `scratch` is as long; both are overwritten."""
    at = shift = 0
    for width in WIDTHS[bits]:
        size = len(codes) * width // 8
        plane = packed[at : at + size]
        if width == bits:
            field = codes
        else:
            field = np.right_shift(codes, shift, out=scratch)
            np.bitwise_and(field, (1 << width) - 1, out=field)
        if width == 1:
            plane[:] = np.packbits(field)
        else:
            plane[:] = field[:size]
            for part in range(1, 8 // width):
                # Bytes have no vector shift: numpy multiplies them several times faster.
                run = field[part * size : (part + 1) * size]
                np.bitwise_or(plane, np.multiply(run, 1 << part * width, out=run), out=plane)
        at += size
        shift += width


def unpack(packed: Codes, bits: int, codes: Codes, scratch: Codes) -> None:
    """The inverse, into `codes`; `scratch` is as long."""
    at = shift = 0
    for width in WIDTHS[bits]:
        size = len(codes) * width // 8
        plane = packed[at : at + size]
        field = codes if shift == 0 else scratch
        if width == 1:
            field[:] = np.unpackbits(plane)
        else:
            for part in range(8 // width):
                run = np.right_shift(plane, part * width, out=field[part * size : (part + 1) * size])
                if (part + 1) * width < 8:
                    np.bitwise_and(run, (1 << width) - 1, out=run)
        if shift:
            np.multiply(field, 1 << shift, out=field)
            np.bitwise_or(codes, field, out=codes)
        at += size
        shift += width

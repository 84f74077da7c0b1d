"""A late model meets a sum it missed: (sum + W') / (S + 1), piece by piece.

Knows the arithmetic of one piece and how a vector is cut for it. Does not know versions. The all-reduce hands out
means, sum / S rounded once; the sum is that times S, exact where S is a power of two and one rounding off elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from moshpitd.averaging.partition import ALIGNMENT
from moshpitd.averaging.receipt import SpanLine
from moshpitd.averaging.vector import DTYPES, Floats, Vector

PIECE_BYTES = 1 << 20


def merge_piece(mean: Floats, count: int, own: Floats, output: Floats) -> None:
    """float64 is merged in float64, everything else in float32. `output` may be `own`, not `mean`."""
    wide = np.float64 if output.dtype == np.float64 else np.float32
    total = np.multiply(mean, wide(count), dtype=wide)
    total += own
    total /= wide(count + 1)
    with np.errstate(over="ignore"):
        output[:] = total


def merge_jobs(mean: Vector, spans: Sequence[SpanLine], own: Vector, output: Vector) -> Iterator[Callable[[], None]]:
    """One job a piece; each span counts those whose models are in it."""
    for segment in mean.layout.segments:
        step = PIECE_BYTES // DTYPES[segment.dtype].itemsize // ALIGNMENT * ALIGNMENT
        for span in spans:
            for start in range(max(span.start, segment.start), min(span.stop, segment.stop), step):
                stop = min(start + step, span.stop, segment.stop)
                pieces = (vector.elements(start, stop) for vector in (mean, own, output))
                mean_piece, own_piece, output_piece = pieces
                yield partial(merge_piece, mean_piece, len(span.contributors), own_piece, output_piece)

"""The one weighted mean: of what peers send of a chunk, and of what the trainers of one daemon hold.

Knows arrays and weights, and in which precision they are added. Does not know who gave them, or codecs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from moshpitd.averaging.vector import DTYPES, Floats, Vector

JOB_BYTES_MAX = 4 << 20
"""What one job reads: a few milliseconds at most."""


def scaled_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights as float32 multiples of a power of two above their sum, so that no sum of values can overflow.

    Dividing by a power of two instead of the sum itself is exact: equal and small integer weights stay exact, and lines
    that carry the same weights split among more members still add up to the same bits.
    """
    total = float(np.sum(np.asarray(weights, np.float64)))
    if total <= 0:
        return tuple(0.0 for _ in weights)
    _, exponent = math.frexp(total)
    return tuple(float(np.float32(math.ldexp(weight, -exponent))) for weight in weights)


def weighted_mean(parts: Sequence[tuple[int, float, Floats]]) -> Floats:
    """Their `weighted_sum`, divided by the sum of their weights."""
    total = weighted_sum(parts)
    return np.divide(total, total.dtype.type(math.fsum(weight for _, weight, _ in parts)), out=total)


def weighted_sum(parts: Sequence[tuple[int, float, Floats]], *, one_a_coordinate: bool = False) -> Floats:
    """The sum of (coordinate, scaled weight, values), added in the order given, in a new array.

    Those that share a coordinate stand beside each other and are added up first: the cell they stand for then weighs
    the same bits whether one or two hold it. With `one_a_coordinate` only the first of them counts. float64 is reduced
    in float64, everything else in float32.
    """
    first = parts[0][2]
    wide = np.float64 if first.dtype == np.float64 else np.float32
    total: Floats | None = None
    cell: Floats | None = None
    scratch = np.empty(len(first), wide)
    for position, (coordinate, weight, values) in enumerate(parts):
        if cell is None:
            cell = np.multiply(values, wide(weight), out=None if total is None else scratch, dtype=wide)
        elif not one_a_coordinate:
            cell += np.multiply(values, wide(weight), dtype=wide)
        is_last_of_cell = position + 1 == len(parts) or parts[position + 1][0] != coordinate
        if is_last_of_cell:
            total = cell if total is None else np.add(total, cell, out=total)
            cell = None
    assert total is not None
    return total


def mean_jobs(vectors: Sequence[Vector], weights: Sequence[float], output: Vector) -> Iterator[Callable[[], None]]:
    """Jobs, in any order, that write the weighted mean of the vectors into the output. Some weight must be above 0;
    those of weight 0 are not even read."""
    counting = [(scaled, vector) for scaled, vector in zip(scaled_weights(weights), vectors, strict=True) if scaled > 0]
    assert counting
    for segment in output.layout.segments:
        step = max(1, JOB_BYTES_MAX // (len(counting) * DTYPES[segment.dtype].itemsize))
        for start in range(segment.start, segment.stop, step):
            yield partial(_write_mean, counting, output, start, min(start + step, segment.stop))


def copy_jobs(source: Vector, target: Vector) -> Iterator[Callable[[], None]]:
    """Jobs, in any order, that make the target equal to the source."""
    for start in range(0, source.layout.byte_size, JOB_BYTES_MAX):
        stop = start + JOB_BYTES_MAX
        yield partial(np.copyto, target.buffer[start:stop], source.buffer[start:stop])


def _write_mean(counting: Sequence[tuple[float, Vector]], output: Vector, start: int, stop: int) -> None:
    parts = [(place, weight, vector.elements(start, stop)) for place, (weight, vector) in enumerate(counting)]
    output.elements(start, stop)[:] = weighted_mean(parts)

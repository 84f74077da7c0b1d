"""(sum + W') / (S + 1), bit for bit what the rule says, in every dtype and however the vector is cut."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from moshpitd.averaging.merge import PIECE_BYTES, merge_jobs
from moshpitd.averaging.names import PeerId
from moshpitd.averaging.receipt import SpanLine
from moshpitd.averaging.vector import Vector

A, B, C, D = (PeerId(letter * 64) for letter in "abcd")


def merged(mean: Vector, own: Vector, spans: list[SpanLine]) -> Vector:
    output = Vector.of({name: np.full_like(array, np.nan) for name, array in mean.arrays().items()})
    for job in merge_jobs(mean, spans, own, output):
        job()
    return output


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_of_a_power_of_two_it_is_the_sum_itself_that_is_merged(count: int) -> None:
    rng = np.random.default_rng(count)
    rows = rng.normal(size=(count + 1, 9_999)).astype(np.float32)
    total = rows[0].copy()
    for row in rows[1:count]:
        total += row
    spans = [SpanLine(A, 0, 9_999, (A, B, C, D, A, B, C, D)[:count])]
    result = merged(Vector.of({"w": total / np.float32(count)}), Vector.of({"w": rows[count]}), spans)
    reference = (total + rows[count]) / np.float32(count + 1)
    assert np.array_equal(result.arrays()["w"], reference)


def test_a_sum_of_three_is_their_mean_times_three() -> None:
    mean, own = (np.random.default_rng(seed).normal(size=500).astype(np.float32) for seed in (1, 2))
    result = merged(Vector.of({"w": mean}), Vector.of({"w": own}), [SpanLine(A, 0, 500, (A, B, C))])
    assert np.array_equal(result.arrays()["w"], (mean * np.float32(3) + own) / np.float32(4))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_dtypes_are_merged_wide(dtype: np.dtype) -> None:
    mean, own = np.array([60_000.0, 1.0]).astype(dtype), np.array([50_000.0, 3.0]).astype(dtype)
    result = merged(Vector.of({"w": mean}), Vector.of({"w": own}), [SpanLine(A, 0, 2, (A, B))])
    wide = (mean.astype(np.float32) * 2 + own.astype(np.float32)) / 3
    assert np.array_equal(result.arrays()["w"], wide.astype(dtype)), "the sum alone would not fit"


def test_each_span_counts_those_who_are_in_it() -> None:
    """A member that died on the way is in some spans of a sum and not in others."""
    mean = Vector.of({"w": np.full(8, 2.0, np.float32)})
    own = Vector.of({"w": np.full(8, 8.0, np.float32)})
    result = merged(mean, own, [SpanLine(A, 0, 5, (A, B)), SpanLine(B, 5, 8, (A,))])
    assert result.arrays()["w"].tolist() == [4.0] * 5 + [5.0] * 3


def test_large_and_mixed_vectors_are_cut_into_jobs() -> None:
    rng = np.random.default_rng(0)
    many = PIECE_BYTES // 4 + 4097

    def arrays() -> dict[str, np.ndarray]:
        return {"a": rng.normal(size=many).astype(np.float32), "b": rng.normal(size=5000)}

    mean, own = arrays(), arrays()
    spans = [SpanLine(A, 0, 6000, (A, B)), SpanLine(B, 6000, many + 5000, (A, B))]
    assert len(list(merge_jobs(Vector.of(mean), spans, Vector.of(own), Vector.of(mean)))) == 4
    result = merged(Vector.of(mean), Vector.of(own), spans).arrays()
    assert np.array_equal(result["a"], (mean["a"] * np.float32(2) + own["a"]) / np.float32(3))
    assert np.array_equal(result["b"], (mean["b"] * 2 + own["b"]) / 3)

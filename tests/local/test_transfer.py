"""Chunks become a vector, or are refused by name."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.vector import Layout, TensorSpec, Vector
from moshpitd.local.transfer import Intake

ALL_DTYPES = Layout.of(
    [
        TensorSpec("b", (3,), "float32"),
        TensorSpec("w", (2, 2), "float32"),
        TensorSpec("d", (), "float64"),
        TensorSpec("h", (5,), "float16"),
        TensorSpec("x", (3,), "bfloat16"),
    ]
)


@given(st.lists(st.integers(1, ALL_DTYPES.byte_size - 1), unique=True), st.integers(0, 2**32))
def test_any_cut_gives_the_same_vector(cuts: list[int], seed: int) -> None:
    values = Vector.empty(ALL_DTYPES)
    dice = np.random.default_rng(seed)
    for _, view in values.views():
        view[...] = dice.standard_normal(view.size).astype(view.dtype)
    assert take(ALL_DTYPES, values.buffer.tobytes(), cuts).buffer.tobytes() == values.buffer.tobytes()


@given(
    st.integers(0, ALL_DTYPES.elements - 1),
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.lists(st.integers(1, ALL_DTYPES.byte_size - 1), unique=True),
)
def test_the_tensor_that_is_not_finite_is_named_however_it_is_cut(position: int, bad: float, cuts: list[int]) -> None:
    values = Vector(ALL_DTYPES, np.zeros(ALL_DTYPES.byte_size, np.uint8))
    first = 0
    for spec, view in values.views():  # noqa: B007
        if position < first + view.size:
            break
        first += view.size
    view[position - first] = bad
    word = {"nan": "nan", "inf": "infinity", "-inf": "-infinity"}[str(bad)]
    with pytest.raises(InvalidInput, match=f"tensor '{spec.name}' holds {word} at element {position - first}:"):
        take(ALL_DTYPES, values.buffer.tobytes(), cuts)


def test_large_finite_values_whose_sum_overflows_are_welcome() -> None:
    values = Vector.of({"w": np.full(100, 3e38, np.float32), "x": np.full(9, 3e38, ml_dtypes.bfloat16)})
    take(values.layout, values.buffer.tobytes(), [])


@pytest.mark.parametrize(
    ("chunks", "complaint"),
    [
        ([(0, 8), (12, 8)], "begins at byte 12 where byte 8 was due"),
        ([(0, 8), (0, 8)], "begins at byte 0 where byte 8 was due"),
        ([(4, 8)], "begins at byte 4 where byte 0 was due"),
        ([(0, 24)], "has 24 bytes where 20 are left of 20"),
        ([(0, 20), (20, 4)], "has 4 bytes where 0 are left"),
        ([(0, 0)], "has 0 bytes"),
        ([(0, 8)], "ended after 8 of 20 bytes"),
        ([], "ended after 0 of 20 bytes"),
    ],
)
def test_gaps_repeats_overruns_and_short_streams_are_refused(chunks: list[tuple[int, int]], complaint: str) -> None:
    intake = Intake(Layout.of([TensorSpec("w", (5,), "float32")]))
    with pytest.raises(InvalidInput, match=complaint):
        for offset, size in chunks:
            intake.accept(offset, bytes(size))
        intake.finish()


def take(layout: Layout, raw: bytes, cuts: list[int]) -> Vector:
    intake = Intake(layout)
    places = [0, *sorted(cuts), layout.byte_size]
    for start, stop in pairwise(places):
        intake.accept(start, raw[start:stop])
    return intake.finish()

"""Sums that come out alike everywhere, and what N peers learn about one another from one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshpitd.averaging.compressors import Stage
from moshpitd.averaging.compressors.fixed_point import (
    MAGNITUDE_BITS,
    OWN_MAX,
    Standing,
    magnitude_of,
    quantised,
    read_words,
    words_of,
)
from moshpitd.averaging.vector import Vector
from tests.averaging.compressors.grid_on_paper import Grid

GRIDS = [((5,), 5), ((5,), 7), ((2, 2), 4), ((2, 3), 9), ((3, 3), 13), ((2, 2, 2), 11), ((2, 3, 2), 17), ((2, 2), 13)]
"""Without holes; where there are more peers than cells, some cells are held by two, the last ones by three or four."""


@pytest.mark.parametrize(("sides", "peers"), GRIDS)
def test_over_all_axes_every_peer_counts_once_whatever_the_weights(sides: tuple[int, ...], peers: int) -> None:
    """Along the first axis all members are added; along the others the cells, each standing for a whole line."""
    rng = np.random.default_rng(peers)
    integers = np.rint(rng.standard_normal((peers, 9000)) * OWN_MAX / 8)
    stages = [Stage("sketch", 0, Vector.of({"q": own}), sums=True, lossless=True) for own in integers]
    results, _ = Grid(sides, peers).through_all_axes(stages, [float(w) for w in rng.integers(0, 3, peers)])
    expected = integers.astype(np.int64).sum(axis=0)
    for result in results:
        assert np.array_equal(result.arrays()["q"].astype(np.int64), expected)


def test_order_cannot_matter_up_to_the_largest_integers() -> None:
    rows = np.random.default_rng(1).choice([-OWN_MAX, OWN_MAX, 1.0, -1.0], (6, 50))
    sums = {np.add.reduce(rows[list(order)]).tobytes() for order in itertools.permutations(range(6))}
    assert len(sums) == 1


def test_floats_would_differ_from_order_to_order() -> None:
    """Why the sketch is in fixed point at all."""
    rows = np.random.default_rng(1).standard_normal((6, 50)).astype(np.float32)
    sums = {np.add.reduce(rows[list(order)]).tobytes() for order in itertools.permutations(range(6))}
    assert len(sums) > 1


def test_what_does_not_fit_is_told() -> None:
    integers, fits = quantised(np.array([1.5, -3.0, 1e30, np.inf, np.nan]), 1)
    assert not fits
    assert integers.tolist() == [3.0, -6.0, 0.0, 0.0, 0.0]
    assert quantised(np.array([OWN_MAX]), 0)[1]
    assert not quantised(np.array([OWN_MAX * 2]), 0)[1]


@given(st.floats(1e-30, 1e30), st.floats(0, 1))
def test_a_usual_peer_uses_the_bits_it_was_given(largest: float, share: float) -> None:
    assembly = read_words(words_of(Standing(b"", magnitude_of(largest), False)))
    assert assembly.next_exponent is not None
    integers, fits = quantised(np.array([largest, share * largest]), assembly.next_exponent)
    assert fits
    assert 2 ** (MAGNITUDE_BITS - 1) <= integers[0] <= 2**MAGNITUDE_BITS


@given(st.lists(st.sampled_from([b"one", b"two", b"three", None]), min_size=1, max_size=40))
def test_equal_and_different_are_told_apart_by_sums_alone(holdings: list[bytes | None]) -> None:
    assembly = read_words(sum(words_of(Standing(holds, 3, False)) for holds in holdings))
    held = [holds for holds in holdings if holds is not None]
    assert assembly.peers == len(holdings)
    assert assembly.agreed == (len(set(held)) <= 1 and 2 * len(held) >= len(holdings))
    assert assembly.holders == len(held)


def test_one_that_wants_a_dense_stage_is_heard_by_all() -> None:
    quiet, loud = Standing(b"x", 1, False), Standing(b"x", 1, True)
    assert not read_words(words_of(quiet) * 500).wants_dense
    assert read_words(words_of(quiet) * 500 + words_of(loud)).wants_dense


def test_nothing_but_zeros_gives_no_scale() -> None:
    assert magnitude_of(0.0) is None
    assert read_words(words_of(Standing(b"x", None, False))).next_exponent is None

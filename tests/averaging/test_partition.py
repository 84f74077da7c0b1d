"""How a vector is cut: the shares against a search that knows no formula, the cuts against what they must never do."""

from __future__ import annotations

import itertools
import random

import pytest

from moshpitd.averaging.messages import Address, Member
from moshpitd.averaging.names import Incarnation, PeerId
from moshpitd.averaging.partition import ALIGNMENT, fractions_by_rate, pieces_of, spans_of
from moshpitd.averaging.vector import DTYPES, Layout, TensorSpec


def members_with(rates: list[float], *, undialable: frozenset[int] = frozenset()) -> list[Member]:
    return [
        Member(
            peer=PeerId(f"{rank:064x}"),
            incarnation=Incarnation(1),
            coordinate=rank,
            weight=1.0,
            address=Address("host:1"),
            dialable=rank not in undialable,
            up_bytes_s=rate,
            down_bytes_s=rate,
        )
        for rank, rate in enumerate(rates)
    ]


def layout_of(**elements: int) -> Layout:
    """One tensor a dtype."""
    return Layout.of(TensorSpec(f"t.{dtype}", (count,), dtype) for dtype, count in elements.items())


# ---- shares


def slowest(rates: list[float], fractions: list[float]) -> float:
    """How long the slowest of those that may hold a span takes: 1 + (n-2)f vectors over its link."""
    n = len(rates)
    return max((1 + (n - 2) * f) / rate for f, rate in zip(fractions, rates, strict=True) if f > 0)


def shares_by_search(rates: list[float]) -> list[float]:
    """Bisection on the time: how much could everybody reduce until then?"""
    n = len(rates)

    def until(time: float) -> list[float]:
        return [max(0.0, (time * rate - 1) / (n - 2)) if rate > 0 else 0.0 for rate in rates]

    low, high = 0.0, n / min(rate for rate in rates if rate > 0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(until(middle)) < 1 else (low, middle)
    return until(high)


@pytest.mark.parametrize("seed", range(100))
def test_water_filling_finds_what_a_search_finds(seed: int) -> None:
    dice = random.Random(seed)
    rates = [
        dice.choice([0.0, 1.0, dice.uniform(0.01, 1), 10 ** dice.uniform(-3, 3)]) for _ in range(dice.randint(3, 12))
    ]
    rates[dice.randrange(len(rates))] = dice.uniform(0.1, 10)
    assert fractions_by_rate(rates) == pytest.approx(shares_by_search(rates), abs=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_no_other_sharing_is_faster(seed: int) -> None:
    dice = random.Random(seed)
    rates = [dice.uniform(0.1, 10) for _ in range(dice.randint(3, 5))]
    best = slowest(rates, fractions_by_rate(rates))
    steps = 12
    for cut in itertools.combinations_with_replacement(range(steps + 1), len(rates) - 1):
        edges = [0, *cut, steps]
        shares = [(b - a) / steps for a, b in itertools.pairwise(edges)]
        assert slowest(rates, shares) >= best * (1 - 1e-12)


def test_equal_links_reduce_equal_shares() -> None:
    assert fractions_by_rate([3.0] * 5) == pytest.approx([0.2] * 5)


def test_a_link_too_slow_to_help_reduces_nothing() -> None:
    assert fractions_by_rate([100.0, 100.0, 1.0]) == pytest.approx([0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("rates", "shares"), [([5.0, 1.0], [0.5, 0.5]), ([5.0, 0.0], [1.0, 0.0]), ([0.0, 1.0], [0.0, 1.0])]
)
def test_two_members_move_the_same_bytes_whatever_the_share(rates: list[float], shares: list[float]) -> None:
    assert fractions_by_rate(rates) == shares


# ---- spans


@pytest.mark.parametrize("seed", range(100))
def test_spans_cover_the_vector_are_aligned_and_pass_by_those_nobody_can_dial(seed: int) -> None:
    dice = random.Random(seed)
    layout = layout_of(
        **{d: dice.choice([1, 100, 5000, 65_536, dice.randint(1, 300_000)]) for d in DTYPES if dice.random() < 0.6}
        or {"float32": 9}
    )
    rates = [dice.choice([0.0, dice.uniform(1, 100)]) for _ in range(dice.randint(2, 9))]
    undialable = frozenset(dice.sample(range(len(rates)), dice.randint(0, len(rates) - 1)))
    spans = spans_of(layout, members_with(rates, undialable=undialable))
    assert len(spans) == len(rates) + 1
    assert (spans[0], spans[-1]) == (0, layout.elements)
    assert list(spans) == sorted(spans)
    assert all(spans[rank] == spans[rank + 1] for rank in undialable)
    for edge in spans[1:-1]:
        inside = [s for s in layout.segments if s.start < edge < s.stop]
        assert all((edge - s.start) % ALIGNMENT == 0 for s in inside)


def test_unknown_rates_count_as_the_median_of_the_known() -> None:
    layout = layout_of(float32=10 * ALIGNMENT)
    assert spans_of(layout, members_with([2.0, 0.0, 2.0])) == spans_of(layout, members_with([2.0, 2.0, 2.0]))
    assert spans_of(layout, members_with([0.0] * 5)) == tuple(range(0, 11 * ALIGNMENT, 2 * ALIGNMENT))


def test_spans_follow_the_shares_as_closely_as_alignment_allows() -> None:
    layout = layout_of(float32=1000 * ALIGNMENT + 77)
    rates = [1.0, 4.0, 2.0, 8.0]
    spans = spans_of(layout, members_with(rates))
    for (start, stop), share in zip(itertools.pairwise(spans), fractions_by_rate(rates), strict=True):
        assert abs((stop - start) - share * layout.elements) <= ALIGNMENT + 1


# ---- pieces


@pytest.mark.parametrize("seed", range(100))
def test_pieces_tile_the_vector_and_cross_nothing(seed: int) -> None:
    dice = random.Random(seed)
    layout = layout_of(**{d: dice.choice([1, 5000, dice.randint(1, 200_000)]) for d in DTYPES})
    spans = spans_of(layout, members_with([dice.uniform(1, 100) for _ in range(dice.randint(2, 7))]))
    chunk_bytes = dice.choice([1, 40_000, 65_536, 1 << 20])
    pieces = pieces_of(layout, spans, chunk_bytes)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert [(a.stop, b.start) for a, b in itertools.pairwise(pieces)] == [(b.start,) * 2 for b in pieces[1:]]
    assert (pieces[0].start, pieces[-1].stop) == (0, layout.elements)
    for piece in pieces:
        (segment,) = [s for s in layout.segments if s.start <= piece.start and piece.stop <= s.stop]
        assert piece.dtype == segment.dtype
        assert (piece.start - segment.start) % ALIGNMENT == 0
        assert spans[piece.reducer] <= piece.start < piece.stop <= spans[piece.reducer + 1]
        assert piece.byte_size <= max(chunk_bytes, ALIGNMENT * DTYPES[piece.dtype].itemsize)


def test_chunks_hold_as_many_whole_blocks_as_fit() -> None:
    layout = layout_of(float32=100 * ALIGNMENT)
    pieces = pieces_of(layout, (0, layout.elements), 3 * ALIGNMENT * 4 + 5)
    assert {piece.stop - piece.start for piece in pieces[:-1]} == {3 * ALIGNMENT}

"""How a vector is cut: the shares against a search that knows no formula, the cuts against what they must never do."""

from __future__ import annotations

import itertools
import random

import pytest

from moshpitd.averaging.messages import Address, Member
from moshpitd.averaging.names import Incarnation, PeerId
from moshpitd.averaging.partition import (
    ALIGNMENT,
    NOISE_FACTOR,
    fractions_by_rate,
    pieces_of,
    relative_rates,
    spans_of,
)
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


def seconds_by_member(ups: list[float], downs: list[float], shares: list[float]) -> list[float]:
    """Until each line is done, vectors counted one by one in both directions, as they are sent."""
    n = len(shares)
    out, into = [0.0] * n, [0.0] * n
    for sender, receiver in itertools.permutations(range(n), 2):
        moved = shares[receiver] + shares[sender]  # its contribution there, and the average of its own span
        out[sender] += moved
        into[receiver] += moved
    return [max(o / up, i / down) for o, i, up, down in zip(out, into, ups, downs, strict=True)]


def seconds_of_round(ups: list[float], downs: list[float], shares: list[float]) -> float:
    return max(seconds_by_member(ups, downs, shares))


def shares_by_trial(ups: list[float], downs: list[float]) -> list[float]:
    """From equal shares on, crumbs go from one to another as long as the slowest, or those after it, get faster by it;
    then smaller crumbs."""
    n = len(ups)
    shares, crumb = [1 / n] * n, 0.1
    while crumb > 1e-4:
        best = sorted(seconds_by_member(ups, downs, shares), reverse=True)
        for giver, taker in itertools.permutations(range(n), 2):
            given = min(crumb, shares[giver])
            tried = [s - given * (r == giver) + given * (r == taker) for r, s in enumerate(shares)]
            seconds = sorted(seconds_by_member(ups, downs, tried), reverse=True)
            if seconds < [second - 1e-9 for second in best]:
                shares = tried
                break
        else:
            crumb /= 2
    return shares


@pytest.mark.parametrize("seed", range(40))
def test_the_slower_direction_decides_and_trial_and_error_comes_to_the_same(seed: int) -> None:
    dice = random.Random(seed)
    n = dice.randint(2, 8)
    ups, downs = ([10 ** dice.uniform(-1, 1) for _ in range(n)] for _ in range(2))
    ours = seconds_of_round(ups, downs, fractions_by_rate([min(both) for both in zip(ups, downs, strict=True)]))
    theirs = seconds_of_round(ups, downs, shares_by_trial(ups, downs))
    assert ours * (1 - 1e-9) <= theirs <= ours * 1.01


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


def seconds_over_the_best(true_rates: list[float], told: list[float]) -> float:
    """How much longer a round takes than it had to, if rates are told so."""
    shares = fractions_by_rate(relative_rates(members_with(told)))
    best = seconds_of_round(true_rates, true_rates, fractions_by_rate(true_rates))
    return seconds_of_round(true_rates, true_rates, shares) / best


@pytest.mark.parametrize("n", [3, 4, 8, 16])
def test_equal_links_measured_with_noise_stay_nearly_equal(n: int) -> None:
    dice = random.Random(n)
    rounds = [[dice.lognormvariate(0, 0.2) for _ in range(n)] for _ in range(200)]
    drawn_together = [seconds_over_the_best([1.0] * n, told) for told in rounds]
    as_told = [seconds_of_round([1.0] * n, [1.0] * n, fractions_by_rate(told)) for told in rounds]
    equal = seconds_of_round([1.0] * n, [1.0] * n, [1 / n] * n)
    assert sum(drawn_together) / 200 < 1.1 < sum(as_told) / 200 / equal
    assert seconds_over_the_best([1.0] * n, [dice.uniform(1, NOISE_FACTOR) for _ in range(n)]) == pytest.approx(1.0)


@pytest.mark.parametrize("n", [3, 4, 8])
def test_one_slow_link_costs_little_more_than_its_optimum_however_slow(n: int) -> None:
    over = {
        slowness: seconds_over_the_best([1.0] * (n - 1) + [1 / slowness], [1.0] * (n - 1) + [1 / slowness])
        for slowness in (1.2, 1.4, 1.7, 2, 3, 10, 100)
    }
    assert max(over.values()) < 1.4
    assert over[10] == over[100] == pytest.approx(1.0)


def test_one_direction_that_is_not_known_leaves_the_other() -> None:
    ups = [
        Member(m.peer, m.incarnation, m.coordinate, 1.0, m.address, True, m.up_bytes_s, 0.0)
        for m in members_with([4.0, 4.0, 0.1, 4.0])
    ]
    layout = layout_of(float32=100 * ALIGNMENT)
    assert spans_of(layout, ups) == spans_of(layout, members_with([4.0, 4.0, 0.1, 4.0]))
    assert spans_of(layout, ups)[2] == spans_of(layout, ups)[3]


@pytest.mark.parametrize("told", [-1.0, 1e308, 5e-324, -1e308])
@pytest.mark.parametrize("honest", [0.0, 3.0, 1e308])
def test_rates_that_nobody_can_have_still_cut_the_vector(told: float, honest: float) -> None:
    layout = layout_of(float32=100 * ALIGNMENT)
    spans = spans_of(layout, members_with([told, honest, told, honest]))
    assert (spans[0], spans[-1], list(spans)) == (0, layout.elements, sorted(spans))
    alone = spans_of(layout, members_with([told, honest], undialable=frozenset([1])))
    assert alone == (0, layout.elements, layout.elements)


def test_spans_follow_the_shares_as_closely_as_alignment_allows() -> None:
    layout = layout_of(float32=1000 * ALIGNMENT + 77)
    rates = [1.0, 4.0, 2.0, 8.0]
    spans = spans_of(layout, members_with(rates))
    shares = fractions_by_rate(relative_rates(members_with(rates)))
    for (start, stop), share in zip(itertools.pairwise(spans), shares, strict=True):
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

"""Plans, cells, axes and the planner: everybody computes the same grid, no cell is empty, no mass is lost."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, partial

import numpy as np
import pytest

from moshpitd.averaging.grid import (
    AXES_MAX,
    Cell,
    Loads,
    Plan,
    Terms,
    carried_weight,
    cells_of,
    choose_sides,
    decider,
    format_sides,
    grid_key,
    group_size_allowed,
    leadership,
    line_of,
    new_plan_due,
    parse_sides,
    session_key,
)
from moshpitd.averaging.names import PeerId, digest

SIZES = range(1, 201)
LIMITS = (2, 3, 4, 5, 8, 16)
TERMS = Terms(b"layout", 0)


def peer(number: int) -> PeerId:
    return PeerId(digest("peer", number).hex())


def plan_for(
    sessions: int, sides: tuple[int, ...], *, version: int = 1, first_k: int = 0, signer: PeerId | None = None
) -> Plan:
    roster = tuple(sorted(peer(number) for number in range(sessions)))
    return Plan(version, sides, TERMS.digest, first_k, roster, signer or roster[0])


# ---- the planner


@pytest.mark.parametrize("limit", LIMITS)
def test_no_plan_has_more_cells_than_sessions_or_cells_held_by_three(limit: int) -> None:
    for sessions in SIZES:
        sides = choose_sides(sessions, limit)
        cells = math.prod(sides)
        assert sessions / 2 <= cells <= sessions, (sessions, sides)
        loads = Loads(sides, cells_of(sides, sessions))
        assert loads.empty_cells() == 0
        assert {loads.holders(cell) for cell in all_cells(sides)} <= {1, 2}


@pytest.mark.parametrize("limit", LIMITS)
def test_sides_keep_the_limit_and_doubled_groups_stay_a_quarter_above_it(limit: int) -> None:
    for sessions in SIZES:
        sides = choose_sides(sessions, limit)
        loads = Loads(sides, cells_of(sides, sessions))
        allowed = math.floor(limit * 1.25) if len(sides) > 1 else limit
        assert group_size_allowed(sides, limit) == allowed
        if loads.largest_group() > allowed:
            assert not any(fits(sessions, other, limit) for other in grids(sessions, limit)), (sessions, sides)
        else:
            assert max(sides) <= limit


@pytest.mark.parametrize("limit", LIMITS)
def test_all_in_one_group_while_they_fit(limit: int) -> None:
    assert [choose_sides(sessions, limit) for sessions in range(1, limit + 1)] == [(n,) for n in range(1, limit + 1)]


@pytest.mark.parametrize("limit", LIMITS)
def test_fewest_axes_then_the_smallest_largest_group(limit: int) -> None:
    for sessions in range(limit + 1, 201, 3):
        sides = choose_sides(sessions, limit)
        fitting = [other for other in grids(sessions, limit) if fits(sessions, other, limit)]
        if fitting:
            assert len(sides) == min(map(len, fitting)), (sessions, sides)
            best = min(largest_group(sessions, other) for other in fitting if len(other) == len(sides))
            assert largest_group(sessions, sides) == best, (sessions, sides)


@pytest.mark.parametrize(
    ("sessions", "limit", "sides"),
    [
        (7, 4, (2, 3)),
        (12, 4, (3, 4)),
        (16, 4, (4, 4)),
        (64, 8, (8, 8)),
        (512, 8, (8, 8, 8)),
        (1024, 32, (32, 32)),
        (7, 16, (7,)),
    ],
)
def test_familiar_swarms_get_familiar_grids(sessions: int, limit: int, sides: tuple[int, ...]) -> None:
    assert choose_sides(sessions, limit) == sides


def test_a_limit_that_cannot_be_kept_is_passed_by_as_little_as_possible() -> None:
    """Three sessions in groups of two would leave a hole: exactness comes before size."""
    assert choose_sides(3, 2) == (3,)
    assert choose_sides(5, 2) == (2, 2)


def all_cells(sides: tuple[int, ...]) -> list[Cell]:
    return list(itertools.product(*(range(side) for side in sides)))


def grids(sessions: int, limit: int) -> list[tuple[int, ...]]:
    """Every grid without holes or triples, sides in order, found the long way."""

    def grow(sides: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(sides) > 1 and math.prod(sides) >= sessions / 2:
            yield sides
        for side in range(sides[-1] if sides else 2, limit + 1):
            if math.prod(sides) * side > sessions:
                break
            yield from grow((*sides, side))

    return list(grow(()))


@cache
def largest_group(sessions: int, sides: tuple[int, ...]) -> int:
    return Loads(sides, cells_of(sides, sessions)).largest_group()


def fits(sessions: int, sides: tuple[int, ...], limit: int) -> bool:
    return largest_group(sessions, sides) <= math.floor(limit * 1.25)


# ---- when a new plan is due


@pytest.mark.parametrize("limit", LIMITS)
def test_a_fresh_plan_is_not_due_again(limit: int) -> None:
    for sessions in SIZES:
        sides = choose_sides(sessions, limit)
        if sessions <= limit or any(fits(sessions, other, limit) for other in grids(sessions, limit)):
            plan = plan_for(sessions, sides)
            assert not new_plan_due(plan, plan.cells.values(), limit, pinned=False), (sessions, sides)


def test_an_empty_cell_makes_a_new_plan_due() -> None:
    plan = plan_for(12, (3, 4))
    held = list(plan.cells.values())
    assert new_plan_due(plan, held[1:], 4, pinned=False)


def test_one_of_two_holders_may_leave() -> None:
    plan = plan_for(13, (3, 4))
    doubled = next(cell for cell in plan.cells.values() if list(plan.cells.values()).count(cell) == 2)
    held = list(plan.cells.values())
    held.remove(doubled)
    assert not new_plan_due(plan, held, 4, pinned=False)


def test_joiners_are_taken_in_until_a_group_passes_the_limit() -> None:
    plan = plan_for(16, (4, 4))
    loads = Loads(plan.sides, plan.cells.values())
    held = list(plan.cells.values())
    while not new_plan_due(plan, held, 4, pinned=False):
        held.append(loads.emptiest(b""))
        loads.add(held[-1])
    assert len(held) == 21  # four diagonal joiners make every line five, a quarter above four; one more is too many


def test_a_flat_group_stays_exact_with_empty_places() -> None:
    plan = plan_for(8, (8,))
    assert not new_plan_due(plan, list(plan.cells.values())[:3], 8, pinned=False)


def test_a_pinned_grid_is_the_users_word() -> None:
    plan = plan_for(8, (2, 4))
    assert not new_plan_due(plan, [], 2, pinned=True)


# ---- cells


def test_everybody_computes_the_same_cells_from_the_same_plan() -> None:
    plan = plan_for(13, (3, 4))
    twin = dataclasses.replace(plan)
    assert plan.cells == twin.cells
    assert set(plan.cells) == set(plan.roster)


def test_another_plan_shuffles_the_cells() -> None:
    one, other = plan_for(64, (8, 8)), plan_for(64, (8, 8), version=2)
    assert sum(one.cells[p] == other.cells[p] for p in one.roster) < 16


def test_joiners_go_where_the_lines_are_emptiest() -> None:
    loads = Loads((2, 2), [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)])
    assert loads.emptiest(b"") == (1, 1)


def test_an_empty_cell_comes_first() -> None:
    assert Loads((2, 2), [(0, 0), (0, 1), (1, 0)]).emptiest(b"salt") == (1, 1)


def test_joiners_at_once_do_not_all_choose_the_same_cell() -> None:
    loads = Loads((4, 4), all_cells((4, 4)))
    assert len({loads.emptiest(bytes([number])) for number in range(40)}) > 8


# ---- plans


@pytest.mark.parametrize(
    "change",
    [
        {"sides": ()},
        {"sides": (0,)},
        {"sides": (-2, -3)},
        {"sides": (1,) * (AXES_MAX + 1)},
        {"sides": (3, 3)},
        {"version": 0},
        {"first_k": -1},
        {"roster": ()},
        {"roster": tuple(sorted(map(peer, range(6)), reverse=True))},
        {"roster": tuple(sorted([*map(peer, range(6)), peer(0)]))},
    ],
    ids=str,
)
def test_impossible_plans_are_seen_to_be_so(change: dict[str, object]) -> None:
    plan = plan_for(6, (2, 3))
    assert plan.is_well_formed()
    assert not dataclasses.replace(plan, **change).is_well_formed()  # type: ignore[arg-type]


def test_the_signature_covers_everything() -> None:
    plan = plan_for(6, (2, 3))
    changed = [
        dataclasses.replace(plan, version=2),
        dataclasses.replace(plan, sides=(3, 2)),
        dataclasses.replace(plan, terms=b"other"),
        dataclasses.replace(plan, first_k=1),
        dataclasses.replace(plan, roster=plan.roster[1:]),
        dataclasses.replace(plan, signer=peer(3)),
    ]
    assert len({plan.body, *(other.body for other in changed)}) == 7


def test_the_higher_version_counts_and_then_the_hash_of_the_signer() -> None:
    rivals = [plan_for(6, (2, 3), signer=peer(number)) for number in range(6)]
    assert len({plan.precedence for plan in rivals}) == 6
    newer = plan_for(6, (2, 3), version=2, signer=min(rivals, key=lambda plan: plan.precedence).signer)
    assert all(newer.precedence > plan.precedence for plan in rivals)


@pytest.mark.parametrize(("axes", "rounds"), [(2, 1), (3, 1), (2, 2), (3, 3), (3, 2)])
def test_axes_alternate_over_averagings(axes: int, rounds: int) -> None:
    """With one round an averaging, too; and every axis is used once in any `axes` rounds running."""
    plan = plan_for(2**axes, (2,) * axes)
    used = [plan.axis(k, j, rounds) for k in range(12) for j in range(rounds)]
    for start in range(len(used) - axes):
        assert sorted(used[start : start + axes]) == list(range(axes))


# ---- keys, leaders, deciders


def test_members_of_a_line_meet_under_one_key_and_nobody_else() -> None:
    plan = plan_for(12, (3, 4))
    keys = defaultdict(set)
    for cell in plan.cells.values():
        keys[grid_key(b"swarm", TERMS.digest, plan, k=1, j=0, axis=1, cell=cell)].add(cell[0])
    assert sorted(map(sorted, keys.values())) == [[0], [1], [2]]


def test_a_key_is_good_for_one_round_of_one_swarm_under_one_plan() -> None:
    plan = plan_for(4, (2, 2))

    def key_of(
        swarm: bytes = b"swarm", terms: bytes = TERMS.digest, plan: Plan = plan, k: int = 0, j: int = 0, axis: int = 0
    ) -> bytes:
        return grid_key(swarm, terms, plan, k=k, j=j, axis=axis, cell=(1, 1))

    others = [
        key_of(swarm=b"other"),
        key_of(terms=b"other"),
        key_of(plan=plan_for(4, (2, 2), version=2)),
        key_of(k=1),
        key_of(j=1),
        key_of(axis=1),
        session_key(b"swarm", "name"),
    ]
    assert len({key_of(), *others}) == 8


def test_every_key_has_its_own_leader() -> None:
    plan = plan_for(16, (16,))
    leaders = set()
    for k in range(40):
        key = grid_key(b"swarm", TERMS.digest, plan, k=k, j=0, axis=0, cell=(0,))
        leaders.add(min(plan.roster, key=partial(leadership, key)))
    assert len(leaders) > 8


def test_who_decides_changes_with_the_version_and_not_with_the_order_of_names() -> None:
    peers = [peer(number) for number in range(20)]
    assert decider(3, peers) == decider(3, reversed(peers))
    assert len({decider(version, peers) for version in range(40)}) > 8


def test_terms_differ_in_words() -> None:
    mine = Terms(b"layout", 0, codec="float16")
    assert mine.first_difference(mine) is None
    assert mine.first_difference(Terms(b"other", 1)) == "the layout differs"
    assert mine.first_difference(Terms(b"layout", 0)) == "codec 'float16' against 'float32'"


def test_every_term_is_in_the_digest() -> None:
    terms = Terms(b"layout", 2)
    changes = [
        {"layout": b"other"},
        {"rounds": 3},
        {"codec": "float16"},
        {"compressor": "other"},
        {"normalise": "other"},
        {"transport": "other"},
        {"protocol": 99},
        {"averaging": "other"},
    ]
    assert len(changes) == len(dataclasses.fields(Terms))
    assert len({terms.digest, *(dataclasses.replace(terms, **change).digest for change in changes)}) == 9  # type: ignore[arg-type]


# ---- mass


@pytest.mark.parametrize("seed", range(50))
def test_carried_weight_conserves_mass_whoever_shares_a_cell(seed: int) -> None:
    dice = random.Random(seed)
    n = dice.randint(2, 9)
    coordinates = [dice.randrange(4) for _ in range(n)]
    weights = [dice.choice([0.0, 1.0, dice.uniform(0, 100)]) for _ in range(n)]
    carried = [carried_weight(weights, coordinates, rank) for rank in range(n)]
    assert math.fsum(carried) == pytest.approx(math.fsum(weights), rel=1e-15)


def test_on_a_line_without_doubles_everybody_carries_the_mean() -> None:
    assert [carried_weight([1, 2, 6], [0, 1, 2], rank) for rank in range(3)] == [3, 3, 3]


def test_two_in_a_cell_carry_half_of_it_each() -> None:
    assert [carried_weight([1, 2, 3], [0, 0, 1], rank) for rank in range(3)] == [1.5, 1.5, 3]


@pytest.mark.parametrize("limit", [4, 8])
@pytest.mark.parametrize("sessions", [7, 12, 13, 61])
@pytest.mark.parametrize("k", [0, 1, 5])
def test_after_as_many_rounds_as_axes_everybody_has_the_weighted_mean(sessions: int, limit: int, k: int) -> None:
    rng = np.random.default_rng(sessions)
    plan = plan_for(sessions, choose_sides(sessions, limit))
    values = dict(zip(plan.roster, rng.normal(size=sessions), strict=True))
    weights = dict(zip(plan.roster, rng.uniform(0, 10, sessions) * (rng.random(sessions) > 0.2), strict=True))
    mean = np.average(list(values.values()), weights=list(weights.values()))
    for j in range(len(plan.sides)):
        axis = plan.axis(k, j, len(plan.sides))
        mass = math.fsum(weights[p] * values[p] for p in plan.roster)
        values, weights = a_round(plan, axis, values, weights)
        assert math.fsum(weights[p] * values[p] for p in plan.roster) == pytest.approx(mass, rel=1e-12)
    assert list(values.values()) == pytest.approx([mean] * sessions, rel=1e-12)


def test_a_hole_breaks_exactness() -> None:
    """Why a plan has no more cells than sessions."""
    plan = plan_for(12, (3, 4))
    values = {p: float(number) for number, p in enumerate(plan.roster)}
    missing = plan.roster[5]
    values.pop(missing)
    weights = dict.fromkeys(values, 1.0)
    mean = np.mean(list(values.values()))
    for axis in (0, 1):
        values, weights = a_round(plan, axis, values, weights)
    assert np.abs(np.array(list(values.values())) - mean).max() > 0.001


def a_round(
    plan: Plan, axis: int, values: dict[PeerId, float], weights: dict[PeerId, float]
) -> tuple[dict[PeerId, float], dict[PeerId, float]]:
    """Every line averages along the axis, on paper."""
    lines = defaultdict(list)
    for p in values:
        lines[line_of(plan.cells[p], axis)].append(p)
    new_values, new_weights = {}, {}
    for line in lines.values():
        w, x = [weights[p] for p in line], [values[p] for p in line]
        mean = math.fsum(a * b for a, b in zip(w, x, strict=True)) / math.fsum(w) if any(w) else None
        for rank, p in enumerate(line):
            new_values[p] = values[p] if mean is None else mean
            new_weights[p] = carried_weight(w, [plan.cells[q][axis] for q in line], rank)
    return new_values, new_weights


# ---- how grids are written


@pytest.mark.parametrize(("text", "sides"), [("8", (8,)), ("4x4", (4, 4)), ("2X3x4", (2, 3, 4)), ("1x4096", (1, 4096))])
def test_grids_are_read(text: str, sides: tuple[int, ...]) -> None:
    assert parse_sides(text) == sides
    assert parse_sides(format_sides(sides)) == sides


@pytest.mark.parametrize("text", ["", "auto", "4x", "x4", "0x4", "-1", "4*4", "4x4.5", "4097", "x".join(["1"] * 13)])
def test_what_is_no_grid_is_told_what_one_looks_like(text: str) -> None:
    with pytest.raises(ValueError, match="is not a grid: write auto, or sides like"):
        parse_sides(text)

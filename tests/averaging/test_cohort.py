"""A cohort's grid: lines part the members, all of a line compute the same group, word reaches everybody."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshpitd.averaging.cohort import COHORT_MAX, Cohort, WaitAvoidance, cohort_sides
from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.names import GroupId, PeerId
from moshpitd.averaging.vector import Vector
from tests.averaging.group_on_paper import group_of, peer

LAYOUT = Vector.of({"w": np.zeros(20_000, np.float32)}).layout
COHORT = GroupId(b"a cohort on pap.")


def cohorts(peers: int, group_size: int, gone: tuple[PeerId, ...] = ()) -> dict[PeerId, Cohort]:
    """The same cohort as each member sees it."""
    group = group_of([Vector.empty(LAYOUT)] * peers)
    members = tuple(member for member in group.members if member.peer not in gone)
    return {one.peer: Cohort(COHORT, group, members, one.peer, group_size) for one in members}


@pytest.mark.parametrize(
    ("peers", "group_size", "sides"),
    [
        (8, 2, (2, 2, 2)),
        (16, 4, (4, 4)),
        (16, 8, (8, 2)),
        (12, 4, (4, 3)),
        (6, 4, (3, 2)),
        (7, 4, (4, 2)),
        (17, 4, (3, 3, 2)),
        (3, 2, (2, 2)),
        (5, 8, (5,)),
        (2, 2, (2,)),
        (64, 2, (2,) * 6),
    ],
)
def test_the_grid_of_a_cohort(peers: int, group_size: int, sides: tuple[int, ...]) -> None:
    assert cohort_sides(peers, group_size) == sides


@given(peers=st.integers(2, COHORT_MAX), group_size=st.integers(2, 16), version=st.integers(1, 50))
def test_the_lines_of_a_version_part_the_members(peers: int, group_size: int, version: int) -> None:
    sides = cohort_sides(peers, group_size)
    assert max(sides) <= group_size and math.prod(sides) >= peers and list(sides) == sorted(sides, reverse=True)
    every = cohorts(peers, group_size)
    lines = {cohort.line(version) for cohort in every.values()}
    assert sorted(rank for line in lines for rank in line) == list(range(peers))
    assert all(len(line) <= group_size for line in lines)
    assert len({cohort.group_id(version) for cohort in every.values()}) == len(lines)


@given(peers=st.integers(2, 24), group_size=st.integers(2, 5), version=st.integers(1, 9))
def test_all_of_a_line_compute_the_same_group(peers: int, group_size: int, version: int) -> None:
    groups = {
        one: cohort.group(version, LAYOUT, chunk_bytes=1 << 16, budget_s=30.0)
        for one, cohort in cohorts(peers, group_size).items()
    }
    for one, group in groups.items():
        if group is not None:
            assert group.rank_of(one) is not None
            assert all(groups[member.peer] == group for member in group.members)


def test_who_is_out_stays_in_the_group_and_is_known_to_be_out() -> None:
    cohort = cohorts(4, 4)[peer(0)]
    assert cohort.cast_out(peer(2), "dead")
    assert not cohort.cast_out(peer(2), "dead again"), "found out once"
    assert not cohort.cast_out(peer(9), "never was in")
    group = cohort.group(1, LAYOUT, chunk_bytes=1 << 16, budget_s=30.0)
    assert group is not None and len(group.members) == 4
    assert [member.peer for member in cohort.live] == [peer(0), peer(1), peer(3)]


def test_alone_on_its_line_there_is_no_group() -> None:
    cohort = cohorts(4, 2)[peer(0)]
    for other in (1, 2, 3):
        cohort.cast_out(peer(other), "dead")
    assert cohort.group(1, LAYOUT, chunk_bytes=1 << 16, budget_s=30.0) is None


def test_those_whom_the_barrier_dropped_are_not_in() -> None:
    every = cohorts(5, 4, gone=(peer(3),))
    assert [member.peer for member in every[peer(0)].members] == [peer(0), peer(1), peer(2), peer(4)]
    assert every[peer(4)].rank == 3 and peer(3) not in every[peer(0)]


@given(peers=st.integers(2, COHORT_MAX), dead=st.sets(st.integers(0, COHORT_MAX - 1)), start=st.integers(0, 63))
def test_word_reaches_all_the_living_in_log_p_hops(peers: int, dead: set[int], start: int) -> None:
    every = cohorts(peers, 4)
    living = [rank for rank in range(peers) if rank not in dead]
    if not living:
        return
    for cohort in every.values():
        for rank in dead:
            cohort.cast_out(peer(rank), "dead")
    have = {peer(living[start % len(living)])}
    said, hops, fresh = 0, 0, set(have)
    while fresh:
        told = [member.peer for one in fresh for member in every[one].neighbours()]
        said += len(told)
        fresh = set(told) - have
        have |= fresh
        hops += bool(fresh)
    assert have == {peer(rank) for rank in living}
    assert hops <= math.ceil(math.log2(max(2, len(living))))
    assert said == len(living) * math.ceil(math.log2(len(living)))


@pytest.mark.parametrize(
    ("chosen", "given_too", "why"),
    [
        (WaitAvoidance(1, 10), {}, "group size 1"),
        (WaitAvoidance(65, 10), {}, "group size 65"),
        (WaitAvoidance(2, 0), {}, "barrier every 0"),
        (WaitAvoidance(2, 1025), {}, "barrier every 1025"),
        (WaitAvoidance(8, 10), {"min_peers": 4}, "larger than the first cohort may be, min_peers 4"),
        (WaitAvoidance(2, 10), {"min_peers": 65}, "min_peers 65"),
        (WaitAvoidance(2, 10), {"rounds": 2}, "rounds 2"),
        (WaitAvoidance(2, 10), {"compressor": "arc"}, "compressor 'arc'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(chosen: WaitAvoidance, given_too: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        chosen.check(**{"min_peers": 64, **given_too})  # type: ignore[arg-type]

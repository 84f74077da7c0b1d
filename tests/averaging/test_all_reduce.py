"""Stories of one group's all-reduce: what everybody ends with when members die, stall, lie or come late."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import pytest

from moshpitd.averaging.all_reduce import (
    AllReduce,
    AllReduceConfig,
    Reduced,
    Spoilt,
    State,
    checksums,
    decode_average,
    reduce_chunk,
)
from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.effects import Compute, Effect, Send
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.grid import carried_weight
from moshpitd.averaging.messages import Chunk, Heartbeat, Holdings, Ready, ReductionMessage, Suspect, View
from moshpitd.averaging.names import Rank, short
from moshpitd.averaging.partition import ALIGNMENT, Piece
from moshpitd.averaging.vector import DTYPES, Floats, Vector
from moshpitd.averaging.weighted_mean import scaled_weights
from tests.averaging.group_on_paper import GroupOnPaper, Message, flat, group_of, normal_vectors, number_of, peer

TOLERANCE = {"float32": 1e-6, "float16": 3e-3, "bfloat16": 2e-2}
TOLERANCE |= {name: codec_named(name).precision for name in ("flash8", "flash4-8:32", "flash2+spikes")}


def group_on_paper(
    members: int | Sequence[Vector],
    *,
    weights: Sequence[float] | None = None,
    coordinates: Sequence[int] | None = None,
    undialable: Sequence[int] = (),
    chunk_elements: int = ALIGNMENT,
    budget_s: float = 60.0,
    seed: int = 0,
    codec: str = "float32",
    config: AllReduceConfig | None = None,
    latency_s: tuple[float, float] = (0.001, 0.05),
    starts_s: Sequence[float] | None = None,
    anchor: Vector | None = None,
) -> GroupOnPaper:
    """A number of members gets 40,000 normal values each: ten chunks."""
    values = normal_vectors(members, 40_000) if isinstance(members, int) else members
    group = group_of(
        values,
        weights=weights,
        coordinates=coordinates,
        undialable=undialable,
        chunk_elements=chunk_elements,
        budget_s=budget_s,
    )
    return GroupOnPaper(
        group, values, seed=seed, codec=codec, config=config, latency_s=latency_s, starts_s=starts_s, anchor=anchor
    )


def dropped(paper: GroupOnPaper, rank: int) -> dict[int, str]:
    """Whom this member's receipt names as left out, and why."""
    return {number_of(line.peer): line.why for line in paper.machines[Rank(rank)].dropped_lines()}


def contributors(paper: GroupOnPaper, rank: int) -> list[set[int]]:
    """Of each span of this member's receipt."""
    return [{number_of(c) for c in line.contributors} for line in paper.machines[Rank(rank)].span_lines()]


def suspicions(paper: GroupOnPaper) -> list[str]:
    return [line for line in paper.log if "suspects" in line]


# ---- a round in which nothing goes wrong


@pytest.mark.parametrize("codec", TOLERANCE)
@pytest.mark.parametrize("members", range(2, 7))
def test_a_complete_round_ends_alike_for_everybody(members: int, codec: str) -> None:
    paper = group_on_paper(members, weights=[1.0, 2.5, 0.3, 7.0, 1.0, 4.0][:members], codec=codec)
    paper.run()
    machines = paper.machines.values()
    assert all(
        machine.is_complete and machine.why == "" and machine.live == tuple(range(members)) for machine in machines
    )
    assert len({machine.group_id for machine in machines}) == 1
    assert len({machine.digest for machine in machines}) == 1
    paper.check_promises(TOLERANCE[codec])


def test_the_receipt_tells_who_reduced_what() -> None:
    paper = group_on_paper(4)
    paper.run()
    for machine in paper.machines.values():
        lines = machine.span_lines()
        assert [(line.start, line.stop) for line in lines] == list(
            zip(paper.group.spans, paper.group.spans[1:], strict=False)
        )
        assert [line.reducer for line in lines] == [peer(rank) for rank in range(4)]
        assert all(line.contributors == tuple(map(peer, range(4))) for line in lines)
        assert machine.dropped_lines() == ()
        assert machine.fraction_done() == 1


def test_bytes_are_counted_as_the_paper_has_them() -> None:
    """2 (n-1)/n vectors each way for every member."""
    paper = group_on_paper(normal_vectors(4, 8 * ALIGNMENT))
    paper.run()
    expected = 2 * 3 / 4 * 8 * ALIGNMENT * 4
    assert {(machine.bytes_sent, machine.bytes_received) for machine in paper.machines.values()} == {
        (expected, expected)
    }


def test_one_hundred_orders_of_arrival_give_the_same_bits() -> None:
    values = normal_vectors(5, 9000)
    results = set()
    for seed in range(100):
        paper = group_on_paper(values, weights=[1, 2, 3, 4, 5], seed=seed)
        paper.run()
        results |= {(paper.result(rank), machine.digest) for rank, machine in paper.machines.items()}
    assert len(results) == 1


def test_the_digest_does_not_depend_on_how_the_vector_was_cut() -> None:
    values = normal_vectors(3, 50_000)
    digests = set()
    for chunk_elements in (ALIGNMENT, 3 * ALIGNMENT, 1 << 20):
        for weights in ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]):
            paper = group_on_paper(values, weights=weights, chunk_elements=chunk_elements)
            paper.run()
            digests |= {machine.digest for machine in paper.machines.values()}
    assert len(digests) == 1


def test_every_dtype_is_averaged_in_one_vector() -> None:
    rng = np.random.default_rng(1)
    values = [Vector.of({dtype: rng.standard_normal(9001).astype(DTYPES[dtype]) for dtype in DTYPES}) for _ in range(3)]
    paper = group_on_paper(values, weights=[1, 2, 4])
    paper.run()
    assert paper.committed == [0, 1, 2]
    paper.check_promises(2e-2)
    for dtype, tolerance in {"float64": 1e-7, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}.items():
        every = np.stack([vector.arrays()[dtype].astype(np.float64) for vector in values])
        error = paper.result_arrays(0)[dtype].astype(np.float64) - np.average(every, axis=0, weights=[1, 2, 4])
        assert np.abs(error).max() <= tolerance * np.abs(every).max()


@pytest.mark.parametrize("seed", range(20))
def test_mass_is_conserved_whoever_shares_a_cell(seed: int) -> None:
    dice = random.Random(seed)
    n = dice.randint(2, 6)
    coordinates = sorted(dice.randrange(n) for _ in range(n))
    weights = [dice.choice([0.0, 1.0, dice.uniform(0.1, 10)]) for _ in range(n - 1)] + [1.0]
    values = normal_vectors(n, 5000, seed=seed)
    paper = group_on_paper(values, weights=weights, coordinates=coordinates, seed=seed)
    paper.run()
    before = sum(w * flat(vector) for w, vector in zip(weights, values, strict=True))
    after = sum(carried_weight(weights, coordinates, rank) * paper.result_flat(rank) for rank in range(n))
    assert np.abs(after - before).max() <= 1e-6 * sum(weights) * 4


def test_a_member_without_weight_receives_and_reduces() -> None:
    paper = group_on_paper(3, weights=[1.0, 0.0, 3.0])
    paper.run()
    assert paper.committed == [0, 1, 2]
    assert all(ranks == {0, 2} for ranks in contributors(paper, 1))
    assert {line.reducer for line in paper.machines[Rank(0)].span_lines()} == {peer(0), peer(1), peer(2)}
    paper.check_promises()


def test_only_one_has_weight() -> None:
    paper = group_on_paper(3, weights=[0.0, 2.0, 0.0])
    paper.run()
    assert {paper.result(rank) for rank in paper.committed} == {normal_vectors(3, 40_000)[1].buffer.tobytes()}


def test_a_group_without_any_weight_fails_at_once() -> None:
    paper = group_on_paper(3, weights=[0.0, 0.0, 0.0])
    paper.run()
    assert {machine.why for machine in paper.machines.values()} == {"nobody in the group has any weight"}


def test_members_that_start_seconds_apart_wait_for_each_other() -> None:
    paper = group_on_paper(4, starts_s=[0.0, 2.0, 0.5, 2.5])
    paper.run()
    assert all(machine.is_complete for machine in paper.machines.values())


@pytest.mark.parametrize("undialable", [[3], [1, 3], [0, 1, 2]])
def test_those_nobody_can_dial_take_part_like_all_others(undialable: list[int]) -> None:
    """Two of them never hear each other; that must not keep anybody waiting."""
    paper = group_on_paper(4, undialable=undialable)
    paper.run()
    assert all(machine.is_complete for machine in paper.machines.values())
    assert suspicions(paper) == []
    assert paper.now < 3
    paper.check_promises()


# ---- deaths


def test_a_member_that_never_came_costs_only_its_part() -> None:
    paper = group_on_paper(4)
    paper.kill(2)
    paper.run()
    assert paper.committed == [0, 1, 3]
    assert all(ranks == {0, 1, 3} for rank in paper.committed for ranks in contributors(paper, rank))
    assert {dropped(paper, rank)[2] for rank in paper.committed} == {"the connection broke"}
    for rank in paper.committed:
        assert {line.reducer for line in paper.machines[rank].span_lines()} == {peer(0), peer(1), peer(3)}
    assert not any(machine.is_complete for machine in paper.machines.values())
    paper.check_promises()


def test_what_a_dead_contributor_had_sent_counts() -> None:
    paper = group_on_paper(3, weights=[1, 1, 1], undialable=[2])
    sent = 0

    def fate(sender: Rank, receiver: Rank, message: Message) -> bool:
        nonlocal sent
        if isinstance(message, Chunk) and sender == 2 and 2 not in paper.dead:
            sent += 1
            if sent == 6:
                paper.at(paper.now + 0.05, partial(paper.kill, 2))
        return sender != 2 or sent <= 6

    paper.fate = fate
    paper.run()
    assert paper.committed == [0, 1]
    assert sorted(map(len, contributors(paper, 0))) != [2, 2]
    assert {0, 1} in contributors(paper, 0)
    assert {0, 1, 2} in contributors(paper, 0)
    paper.check_promises()


@pytest.mark.parametrize("moment", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("victim", range(4))
def test_a_dead_reducer_does_not_cost_its_span(victim: int, moment: float) -> None:
    paper = group_on_paper(4)
    paper.at(moment, partial(paper.kill, victim))
    paper.run()
    survivors = [rank for rank in range(4) if rank != victim]
    assert [rank for rank in paper.committed if rank != victim] == survivors
    assert len({paper.result(rank) for rank in survivors}) == 1
    for rank in survivors:
        lines = paper.machines[Rank(rank)].span_lines()
        assert (lines[0].start, lines[-1].stop) == (0, 40_000)
        assert all(set(map(peer, survivors)) <= set(line.contributors) for line in lines)
    paper.check_promises()


def test_an_average_that_one_survivor_holds_is_served_again_and_never_reduced_again() -> None:
    paper = group_on_paper(4)

    def fate(sender: Rank, receiver: Rank, message: Message) -> bool:
        if isinstance(message, Chunk) and message.is_average and sender == 3:
            paper.at(paper.now + 0.3, partial(paper.kill, 3))
            return receiver == 1
        return True

    paper.fate = fate
    paper.run()
    assert [rank for rank in paper.committed if rank != 3] == [0, 1, 2]
    for rank in (0, 1, 2):
        lines = [line for line in paper.machines[Rank(rank)].span_lines() if line.reducer == peer(3)]
        assert lines
        assert all(line.contributors == tuple(map(peer, range(4))) for line in lines)
    paper.check_promises()


@pytest.mark.parametrize("told", range(4))
@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("victim", [0, 2, 4])
def test_a_death_after_ready_to_some_splits_nobody(victim: int, told: int, noticed: bool) -> None:
    paper = group_on_paper(5)
    heard = 0

    def fate(sender: Rank, receiver: Rank, message: Message) -> bool:
        nonlocal heard
        if sender == victim and isinstance(message, Ready):
            heard += 1
            if heard == told + 1:
                paper.kill(victim, noticed=noticed)
            return heard <= told
        return True

    paper.fate = fate
    paper.run()
    survivors = [rank for rank in range(5) if rank != victim]
    assert [rank for rank in paper.committed if rank != victim] == survivors
    assert len({paper.result(rank) for rank in survivors}) == 1
    assert not any("unconfirmed" in paper.machines[Rank(rank)].why for rank in survivors)
    paper.check_promises()


def test_who_said_ready_to_all_and_died_is_still_missed_by_one_that_lacks_its_averages() -> None:
    """The others need nothing more of it, but must not go on waiting for the one that does."""
    paper = group_on_paper(4)
    said = 0

    def fate(sender: Rank, receiver: Rank, message: Message) -> bool:
        nonlocal said
        if sender == 3 and isinstance(message, Ready):
            said += 1
            if said == 3:
                paper.at(paper.now + 0.2, partial(paper.kill, 3))
        return not (sender == 3 and receiver == 2 and isinstance(message, Chunk) and message.is_average)

    paper.fate = fate
    paper.run()
    assert [rank for rank in paper.committed if rank != 3] == [0, 1, 2]
    assert not any("unconfirmed" in machine.why for machine in paper.machines.values())
    assert paper.now < 30
    paper.check_promises()


@pytest.mark.parametrize(("committed", "waiting"), [(1, 2), (2, 1)])
def test_who_committed_and_fell_quiet_is_not_taken_for_dead(committed: int, waiting: int) -> None:
    """Two die without a sound, one of them with a view half told; the one that waits needs the one that is done."""
    paper = group_on_paper(4)

    def fate(sender: Rank, receiver: Rank, message: Message) -> bool:
        if sender == 3 and isinstance(message, Ready):
            paper.at(paper.now + 0.2, partial(paper.kill, 3, noticed=False))
            return receiver == committed
        if sender == 0 and isinstance(message, View):
            paper.at(paper.now + 0.2, partial(paper.kill, 0, noticed=False))
            return receiver == 1
        return sender != 0 or not isinstance(message, Holdings)

    paper.fate = fate
    paper.run()
    assert {committed, waiting} <= set(paper.committed)
    assert paper.machines[Rank(committed)].is_complete
    assert set(dropped(paper, waiting)) == {0, 3}
    assert paper.result(committed) == paper.result(waiting)
    assert paper.now < 30
    paper.check_promises()


def test_nobody_commits_before_all_are_ready_also_those_it_cannot_hear() -> None:
    paper = group_on_paper(4, undialable=[2, 3])

    def fate(sender: Rank, receiver: Rank, message: Message) -> bool:
        if sender == 3 and isinstance(message, Ready):
            paper.kill(3)
        return 3 not in paper.dead or sender != 3

    paper.fate = fate
    paper.run()
    assert paper.committed == [0, 1, 2]
    assert {paper.machines[rank].live for rank in paper.committed} == {(0, 1, 2)}
    assert len({paper.machines[rank].group_id for rank in paper.committed}) == 1


@pytest.mark.parametrize("told", range(3))
@pytest.mark.parametrize("noticed", [True, False])
def test_the_author_of_a_view_dies_before_it_told_everybody(told: int, noticed: bool) -> None:
    """The others may be in different views, with different ideas of who owns what."""
    paper = group_on_paper(5)
    paper.at(0.2, partial(paper.kill, 4))
    views = 0

    def fate(sender: Rank, receiver: Rank, message: Message) -> bool:
        nonlocal views
        if sender == 0 and isinstance(message, View) and 0 not in paper.dead:
            views += 1
            if views == told + 1:
                paper.kill(0, noticed=noticed)
            return views <= told
        return sender != 0 or 0 not in paper.dead

    paper.fate = fate
    paper.run()
    assert paper.committed == [1, 2, 3]
    assert all(set(dropped(paper, rank)) == {0, 4} for rank in paper.committed)
    assert len({paper.machines[rank].group_id for rank in paper.committed}) == 1
    assert paper.now < 30
    paper.check_promises()


@pytest.mark.parametrize("victims", [(0, 1), (0, 4), (2, 3), (1, 4)])
@pytest.mark.parametrize("apart_s", [0.0, 0.02, 0.1])
def test_two_deaths_cost_two_members(victims: tuple[int, int], apart_s: float) -> None:
    paper = group_on_paper(5)
    paper.at(0.15, partial(paper.kill, victims[0]))
    paper.at(0.15 + apart_s, partial(paper.kill, victims[1]))
    paper.run()
    assert [rank for rank in paper.committed if rank not in victims] == sorted(set(range(5)) - set(victims))
    paper.check_promises()


def test_all_others_die_and_the_last_one_keeps_its_values() -> None:
    paper = group_on_paper(3)
    paper.at(0.1, partial(paper.kill, 0))
    paper.at(0.1, partial(paper.kill, 2))
    paper.run()
    assert paper.machines[Rank(1)].state is State.FAILED
    assert paper.machines[Rank(1)].why == "everybody else is gone"
    assert set(dropped(paper, 1)) == {0, 2}
    assert paper.untouched(1)


def test_all_who_had_weight_die() -> None:
    paper = group_on_paper(3, weights=[1.0, 0.0, 0.0])
    paper.kill(0)
    paper.run()
    assert {paper.machines[Rank(rank)].why for rank in (1, 2)} == {"nobody left has any weight"}


@pytest.mark.parametrize("victim", range(3))
def test_a_reducer_dies_among_members_nobody_can_dial(victim: int) -> None:
    paper = group_on_paper(6, undialable=[3, 4, 5])
    paper.at(0.2, partial(paper.kill, victim))
    paper.run()
    assert paper.committed == [rank for rank in range(6) if rank != victim]
    assert len({machine.group_id for rank, machine in paper.machines.items() if rank != victim}) == 1
    paper.check_promises()


# ---- silence, slowness, sleep


def test_a_member_that_falls_silent_is_left_out_long_before_the_deadline() -> None:
    paper = group_on_paper(4, budget_s=60)
    paper.at(0.2, partial(paper.kill, 1, noticed=False))
    paper.run()
    assert paper.committed == [0, 2, 3]
    assert all("not heard from for" in dropped(paper, rank)[1] for rank in paper.committed)
    assert paper.now < 10
    paper.check_promises()


def test_all_that_fall_silent_at_once_are_left_out_at_once() -> None:
    paper = group_on_paper(6)
    for victim in (0, 1, 4):
        paper.at(0.1, partial(paper.kill, victim, noticed=False))
    paper.run()
    assert paper.committed == [2, 3, 5]
    assert paper.now < 10
    paper.check_promises()


def test_heartbeats_are_as_frequent_as_configured() -> None:
    paper = group_on_paper(4, config=AllReduceConfig(heartbeat_s=0.1))
    paper.at(0.2, partial(paper.kill, 1, noticed=False))
    paper.run()
    assert paper.committed == [0, 2, 3]
    assert paper.now < 2


def test_a_slow_member_that_moves_is_waited_for() -> None:
    paper = group_on_paper(4, budget_s=600)
    paper.chunk_seconds[Rank(2)] = 2.5
    paper.run()
    assert all(machine.is_complete for machine in paper.machines.values())
    assert suspicions(paper) == []
    assert paper.now > 10


def test_quick_members_are_held_up_where_a_slow_one_lacks_and_for_no_longer() -> None:
    chunk_bytes, waiting = 4 * ALIGNMENT, list[int]()
    config = AllReduceConfig(ahead_bytes_max=4 * chunk_bytes)
    paper = group_on_paper(normal_vectors(4, 100 * ALIGNMENT), budget_s=600, config=config)
    paper.chunk_seconds[Rank(2)] = 2.5

    def look() -> None:
        waiting.append(max(paper.machines[Rank(r)].waiting_bytes for r in range(4) if Rank(r) in paper.machines))
        if not all(machine.finished for machine in paper.machines.values()):
            paper.at(paper.now + 0.1, look)

    paper.at(1.0, look)
    paper.run()
    assert all(machine.is_complete for machine in paper.machines.values())
    assert suspicions(paper) == [], "who is kept from moving is not taken for dead"
    assert 4 * chunk_bytes < max(waiting) <= 2 * 5 * chunk_bytes, "of the two quick ones, and never 2 * 25 chunks"


def test_a_member_held_up_that_dies_is_found_out() -> None:
    paper = group_on_paper(4, budget_s=600, config=AllReduceConfig(ahead_bytes_max=0))
    paper.chunk_seconds[Rank(2)] = 2.5
    paper.at(3.0, partial(paper.kill, 1, noticed=False))
    paper.run()
    assert paper.committed == [0, 2, 3]
    paper.check_promises()


def test_a_member_that_lives_but_does_not_move_is_left_out() -> None:
    paper = group_on_paper(4)
    paper.fate = lambda sender, receiver, message: not (sender == 2 and isinstance(message, Chunk))
    paper.run()
    assert [rank for rank in paper.committed if rank != 2] == [0, 1, 3]
    assert all("made no progress for" in dropped(paper, rank)[2] for rank in (0, 1, 3))
    paper.check_promises()


def test_who_waits_for_a_dead_member_is_not_taken_for_dead() -> None:
    """Its averages do not come because a contribution does not come: the one that stopped falls first."""
    paper = group_on_paper(5, undialable=[4])
    paper.fate = lambda sender, receiver, message: not (sender == 4 and isinstance(message, Chunk) and receiver == 1)
    paper.run()
    assert [rank for rank in paper.committed if rank != 4] == [0, 1, 2, 3]
    assert all(set(dropped(paper, rank)) == {4} for rank in (0, 1, 2, 3))


@pytest.mark.parametrize("sleeper", range(3))
def test_who_slept_accuses_nobody(sleeper: int) -> None:
    paper = group_on_paper(3)
    paper.at(0.1, partial(paper.pause, sleeper, 30))
    paper.run()
    assert not any(f" {sleeper}: " in line for line in suspicions(paper))
    assert paper.machines[Rank(sleeper)].why.startswith("left out by")
    assert paper.untouched(sleeper)
    paper.check_promises()


def test_all_sleep_and_go_on_as_if_nothing_had_been() -> None:
    paper = group_on_paper(4)
    for rank in range(4):
        paper.at(0.1, partial(paper.pause, rank, 30))
    paper.run()
    assert all(machine.is_complete for machine in paper.machines.values())
    assert suspicions(paper) == []


@pytest.mark.parametrize("pair", [(0, 1), (0, 3), (1, 2)])
def test_two_that_can_no_longer_hear_each_other_end_in_different_groups(pair: tuple[int, int]) -> None:
    """The others go on with one of them or the other, each under the id of those it went on with."""
    paper = group_on_paper(4)
    paper.at(0.1, partial(paper.cut_link, *pair))
    paper.run()
    assert paper.committed
    for rank in paper.committed:
        assert not set(pair) <= set(paper.machines[rank].live)
    assert len({paper.machines[rank].group_id for rank in paper.committed}) == len(
        {paper.machines[rank].live for rank in paper.committed}
    )
    assert paper.now < 30
    paper.check_promises()


# ---- bad values


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_contribution_leaves_its_sender_out_by_name(bad: float) -> None:
    values = normal_vectors(4, 40_000)
    values[2].elements(0, 40_000)[17] = bad
    paper = group_on_paper(values)
    paper.run()
    assert paper.committed == [0, 1, 3]
    assert all(f"sent {bad} for element 17" in dropped(paper, rank)[2] for rank in (0, 1, 3))
    assert paper.machines[Rank(2)].why.startswith("left out by")
    assert np.isfinite(paper.result_flat(0)).all()


def test_a_reducer_with_bad_values_of_its_own_is_left_out_too() -> None:
    values = normal_vectors(4, 40_000)
    values[0].elements(0, 40_000)[17] = np.nan
    paper = group_on_paper(values)
    paper.run()
    assert [rank for rank in paper.committed if rank != 0] == [1, 2, 3]
    assert all("sent an average with nan at element 17" in dropped(paper, rank)[0] for rank in (1, 2, 3))
    assert np.isfinite(paper.result_flat(1)).all()


def test_a_contribution_of_a_wrong_size_leaves_its_sender_out() -> None:
    paper = group_on_paper(3)
    machine = paper.machines
    paper.run(until=0.06)
    first = machine[Rank(0)]
    first.chunk_received(Chunk(0, 0, b"short", is_average=False), Rank(1), paper.now)
    paper.run()
    assert 1 in dropped(paper, 0)
    assert "bytes, not 5" in dropped(paper, 0)[1]


# ---- the deadline


def test_time_that_ends_before_the_averages_are_here_leaves_the_values_untouched() -> None:
    paper = group_on_paper(3, budget_s=2.0)
    paper.chunk_seconds[Rank(1)] = 1.5
    paper.run()
    assert paper.failed == [0, 1, 2]
    why = paper.machines[Rank(0)].why
    assert why == f"time ran out with 8 of 10 chunks missing; waited for {short(peer(1))}, {short(peer(2))}"
    assert dropped(paper, 0)[1] == "had not finished when time ran out"
    assert all(paper.untouched(rank) for rank in range(3))


def test_time_that_ends_between_ready_and_commit_is_told() -> None:
    paper = group_on_paper(3, budget_s=2.0)
    paper.fate = lambda sender, receiver, message: not (isinstance(message, Ready) and sender == 2)
    paper.run()
    assert paper.committed == [0, 1, 2]
    assert paper.machines[Rank(0)].why == f"unconfirmed: {short(peer(2))}"
    assert not paper.machines[Rank(0)].is_complete
    assert paper.machines[Rank(2)].is_complete
    paper.check_promises()


# ---- whatever happens


@pytest.mark.parametrize("block", range(10))
def test_all_that_commit_under_one_id_hold_the_same_bytes_and_their_receipts_are_true(block: int) -> None:
    for seed in range(block * 30, block * 30 + 30):
        paper, codec = a_bad_day(seed, links=seed % 3 == 0)
        paper.run()
        try:
            paper.check_promises(TOLERANCE[codec])
            assert all(machine.finished for rank, machine in paper.machines.items() if rank not in paper.dead)
            if seed % 3 and paper.group.budget_s == 60:
                check_that_only_the_dead_are_missing(paper)
        except AssertionError as wrong:
            raise AssertionError(f"seed {seed}: {wrong}") from wrong


def a_bad_day(seed: int, *, links: bool) -> tuple[GroupOnPaper, str]:
    """Members of all kinds; all but one may die, with or without a sound; with `links`, living ones part."""
    dice = random.Random(seed)
    n = dice.randint(2, 6)
    codec = dice.choice(["float32", "float32", "float32", "float16", "bfloat16"])
    paper = group_on_paper(
        normal_vectors(n, dice.choice([5000, 20_000, 40_000]), seed=seed),
        weights=[1.0, *(dice.choice([0.0, 1.0, 1.0, 2.5, 0.3]) for _ in range(n - 1))],
        coordinates=sorted(dice.randrange(n) for _ in range(n)) if dice.random() < 0.5 else None,
        undialable=[rank for rank in range(1, n) if dice.random() < 0.15],
        budget_s=dice.choice([60, 60, 60, dice.uniform(0.2, 6)]),
        seed=seed,
        codec=codec,
        latency_s=dice.choice([(0.001, 0.05), (0.001, 0.3)]),
        config=AllReduceConfig(ahead_bytes_max=0) if seed % 2 else None,
    )
    for rank in dice.sample(range(n), dice.randint(0, n - 1)):
        paper.at(dice.uniform(0, 1.5), partial(paper.kill, rank, noticed=dice.random() < 0.6))
    if links:
        for _ in range(dice.randint(0, 2)):
            paper.at(dice.uniform(0, 1), partial(paper.cut_link, *dice.sample(range(n), 2)))
        if dice.random() < 0.4:
            paper.at(dice.uniform(0, 1), partial(paper.pause, dice.randrange(n), dice.uniform(0.5, 8)))
    return paper, codec


def check_that_only_the_dead_are_missing(paper: GroupOnPaper) -> None:
    """With time enough and the links between the living whole, the living lose nobody but the dead."""
    members = paper.group.members
    alive = [rank for rank in paper.machines if rank not in paper.dead]
    if not any(members[rank].dialable for rank in alive):
        return  # they cannot reach each other
    for rank in alive:
        machine = paper.machines[rank]
        assert all(number in paper.dead or number in paper.failed for number in dropped(paper, rank))
        assert "time ran out" not in machine.why
        assert "unconfirmed" not in machine.why
        if machine.state is State.FAILED:
            assert machine.why in ("everybody else is gone", "nobody left has any weight")


# ---- liars


class Alone:
    """One machine of a group, spoken to by hand. It is rank 1 of four; rank 2 has no weight."""

    def __init__(self, rank: int = 1) -> None:
        self.values = normal_vectors(4, 8 * ALIGNMENT)
        self.group = group_of(self.values, weights=[1.0, 1.0, 0.0, 1.0])
        self.result = Vector.empty(self.values[rank].layout)
        self.machine = AllReduce(
            self.group,
            Rank(rank),
            values=self.values[rank],
            result=self.result,
            codec=codec_named("float32"),
            config=AllReduceConfig(),
            now=0.0,
        )

    def hear(self, message: ReductionMessage, sender: int) -> list[Effect]:
        self.machine.take_effects()
        self.machine.receive(message, Rank(sender), 0.1)
        return self.machine.take_effects()

    def chunk(self, chunk: Chunk, sender: int) -> list[Effect]:
        self.machine.take_effects()
        self.machine.chunk_received(chunk, Rank(sender), 0.1)
        return self.machine.take_effects()

    def view(self, number: int, author: int, live: Iterable[int]) -> View:
        return View(self.group.group_id, number, Rank(author), tuple(map(Rank, live)), "a story")

    def payload(self, sender: int, index: int) -> bytes:
        return self.values[sender].elements(index * ALIGNMENT, (index + 1) * ALIGNMENT).tobytes()


def test_a_result_is_let_go_when_the_round_is_over_and_no_job_of_it_runs() -> None:
    """It may be another round's next: a job that is late would write into that one."""
    alone = Alone()
    everybody = (Rank(0), Rank(1), Rank(3))
    [job] = alone.chunk(Chunk(0, 0, alone.payload(0, 0), is_average=True, contributors=everybody), sender=0)
    assert isinstance(job, Compute)
    alone.machine.handle_timer(1e9)
    assert alone.machine.state is State.FAILED
    assert alone.machine.may_write_to(alone.result) and not alone.machine.may_write_to(alone.values[1])
    alone.machine.compute_finished(job.job_id, job.job(), 1e9)
    assert not alone.machine.may_write_to(alone.result)


@pytest.mark.parametrize(
    ("sender", "chunk", "message"),
    [
        (0, Chunk(8, 0, b"", is_average=False), "chunk 8 of 8"),
        (0, Chunk(-1, 0, b"", is_average=True), "chunk -1 of 8"),
        (2, Chunk(2, 0, b"", is_average=False), "joined with weight 0 but sent a contribution"),
        (0, Chunk(4, 0, b"", is_average=True, contributors=(Rank(0),)), "not its to send"),
        (0, Chunk(2, 0, b"", is_average=True, contributors=(Rank(0),)), "not its to send"),
        (0, Chunk(0, 0, b"", is_average=True), "impossible contributors"),
        (0, Chunk(0, 0, b"", is_average=True, contributors=(Rank(2),)), "impossible contributors"),
        (0, Chunk(0, 0, b"", is_average=True, contributors=(Rank(9),)), "impossible contributors"),
        (0, Chunk(0, 0, b"", is_average=True, contributors=(Rank(0), Rank(0))), "impossible contributors"),
        (0, Chunk(0, 0, b"", is_average=True, contributors=(Rank(0),), made_in=7), "made in view"),
        (0, Chunk(0, 0, b"", is_average=True, contributors=(Rank(0),), made_in=-1), "made in view"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_chunks_are_their_senders_fault(sender: int, chunk: Chunk, message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        Alone().chunk(chunk, sender)


@pytest.mark.parametrize(
    ("sender", "number", "author", "live"),
    [
        (0, 4, 0, [0, 1, 4]),
        (0, 4, 0, [0, 1, -1]),
        (0, 4, 0, [0, 1, 1, 2]),
        (0, 4, 0, []),
        (0, 4, 0, [1, 2, 3]),
        (3, 7, 3, [1, 3]),
        (3, 4, 0, [0, 1, 2]),
        (0, 5, 0, [0, 1, 2]),
        (0, 1 << 40, 0, [0, 1, 2]),
        (0, 8, 0, [0, 1, 2]),
        (0, 0, 0, [0, 1, 2, 3]),
        (0, 4, 0, [0, 1, 2, 3]),
    ],
)
def test_impossible_views_are_their_senders_fault(sender: int, number: int, author: int, live: list[int]) -> None:
    alone = Alone()
    with pytest.raises(RemoteProtocolError, match="opened"):
        alone.hear(alone.view(number, author, live), sender)
    assert alone.machine.live == (0, 1, 2, 3)


def test_a_view_is_taken_from_its_author_and_from_who_passes_it_on() -> None:
    for sender in (0, 2):
        alone = Alone()
        told = alone.hear(alone.view(4, 0, [0, 1, 2]), sender)
        assert alone.machine.live == (0, 1, 2)
        assert [e.message.view for e in told if isinstance(e, Send) and isinstance(e.message, Holdings)] == [4, 4]


def test_a_lower_view_or_one_that_brings_back_the_dead_changes_nothing() -> None:
    alone = Alone()
    alone.hear(alone.view(8, 0, [0, 1]), 0)
    alone.hear(alone.view(4, 0, [0, 1, 2]), 0)
    alone.hear(alone.view(9, 1, [1, 2]), 2)
    assert alone.machine.live == (0, 1)


def test_a_view_without_us_ends_the_round_for_us_and_says_who_opened_it() -> None:
    alone = Alone()
    alone.hear(alone.view(4, 0, [0, 2, 3]), 0)
    assert alone.machine.state is State.FAILED
    assert alone.machine.why == f"left out by {short(peer(0))}: a story"


def test_who_was_left_out_can_accuse_nobody() -> None:
    alone = Alone(rank=0)
    alone.machine.suspect(Rank(3), "gone", 0.1)
    view = 4
    effects = alone.hear(Suspect(alone.group.group_id, view, Rank(1), "revenge"), 3)
    assert alone.machine.live == (0, 1, 2)
    assert effects == []


def test_nobody_is_accused_by_itself_and_no_stranger_is_accused() -> None:
    alone = Alone(rank=0)
    alone.hear(Suspect(alone.group.group_id, 0, Rank(2), "me"), 2)
    alone.hear(Suspect(alone.group.group_id, 0, Rank(0), "you"), 2)
    assert alone.machine.live == (0, 1, 2, 3)
    with pytest.raises(RemoteProtocolError, match="rank 4 in a group of 4"):
        alone.hear(Suspect(alone.group.group_id, 0, Rank(4), "who?"), 2)


def test_holdings_of_another_number_of_chunks_are_their_senders_fault() -> None:
    alone = Alone()
    with pytest.raises(RemoteProtocolError, match="holdings of 3 chunks, there are 8"):
        alone.hear(Holdings(alone.group.group_id, 0, (-1, -1, -1)), 0)


def test_another_digest_than_ours_ends_the_round_by_name() -> None:
    paper = group_on_paper(3)
    paper.fate = lambda sender, receiver, message: not (sender == 2 and isinstance(message, Ready))
    paper.run(until=1.0)
    paper.machines[Rank(0)].receive(Ready(paper.group.group_id, 0, b"other"), Rank(2), paper.now)
    assert paper.machines[Rank(0)].state is State.FAILED
    assert paper.machines[Rank(0)].why == f"agreement failed: {short(peer(2))} hold other averages than we do"
    assert paper.untouched(0)


def test_the_second_of_two_contributions_to_a_chunk_is_ignored() -> None:
    alone = Alone()
    honest, other = alone.payload(0, 2), alone.payload(3, 5)
    assert alone.chunk(Chunk(2, 0, honest, is_average=False), 0) == []
    assert alone.chunk(Chunk(2, 0, other, is_average=False), 0) == []
    (effect,) = [e for e in alone.chunk(Chunk(2, 0, other, is_average=False), 3) if isinstance(e, Compute)]
    alone.machine.compute_finished(effect.job_id, effect.job(), 0.2)
    mean = np.mean([np.frombuffer(raw, np.float32) for raw in (honest, alone.payload(1, 2), other)], axis=0)
    outgoing = alone.machine.next_outgoing(Rank(0))
    assert outgoing is not None
    assert np.frombuffer(outgoing.encode(), np.float32) == pytest.approx(mean, abs=1e-6)


def test_a_flood_of_chunks_of_views_to_come_is_its_senders_fault() -> None:
    """What cannot be judged yet is kept, but not without end, and never at the cost of others."""
    alone = Alone()
    with pytest.raises(RemoteProtocolError, match="too much of views to come"):
        for _ in range(1000):
            alone.chunk(Chunk(0, 8, b"", is_average=False), 0)


# ---- jobs


def dumb_mean(rows: list[Floats], weights: list[float]) -> Floats:
    return np.average(np.stack([row.astype(np.float64) for row in rows]), axis=0, weights=weights)


def reduce_rows(
    rows: list[Floats], weights: Sequence[float], coordinates: Sequence[int], codec: str = "float32", own: int = 0
) -> tuple[Reduced | Spoilt, Floats]:
    dtype = rows[0].dtype
    piece = Piece(0, 0, len(rows[0]), next(name for name, known in DTYPES.items() if known == dtype), Rank(0))
    contributions = [
        (coordinate, weight, None if rank == own else bytes(codec_named(codec).contribution.encode(row)))
        for rank, (coordinate, weight, row) in enumerate(zip(coordinates, weights, rows, strict=True))
    ]
    output = np.empty_like(rows[0])
    return reduce_chunk(piece, contributions, rows[own], output, codec_named(codec)), output


@pytest.mark.parametrize("codec", TOLERANCE)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-7), ("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3)]
)
@pytest.mark.parametrize("seed", range(10))
def test_a_reduction_is_the_float64_mean(dtype: str, tolerance: float, codec: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 8))
    rows = [rng.standard_normal(5000).astype(DTYPES[dtype]) for _ in range(n)]
    weights = list(map(float, rng.uniform(0.01, 100, n)))
    coordinates = sorted(map(int, rng.integers(0, n, n)))
    reduced, output = reduce_rows(rows, scaled_weights(weights), coordinates, codec)
    assert isinstance(reduced, Reduced)
    error = np.abs(output.astype(np.float64) - dumb_mean(rows, weights)).max()
    assert error <= max(tolerance, TOLERANCE[codec] if codec != "float32" else 0) * 5


@pytest.mark.parametrize("codec", TOLERANCE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reducer_keeps_what_its_code_decodes_to(dtype: str, codec: str) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(5000).astype(DTYPES[dtype]) for _ in range(3)]
    reduced, kept = reduce_rows(rows, scaled_weights([1, 2, 3]), [0, 1, 2], codec)
    assert isinstance(reduced, Reduced)
    received = np.empty_like(kept)
    piece = Piece(0, 0, 5000, dtype, Rank(0))
    assert decode_average(piece, reduced.code, codec_named(codec).average, received) == reduced.checksum
    assert received.tobytes() == kept.tobytes()
    again = np.empty_like(kept)
    assert decode_average(piece, kept.tobytes(), None, again) == reduced.checksum


def test_a_cell_held_by_two_weighs_the_same_bits_as_one_held_by_one() -> None:
    """So lines of different populations end with the same bits when the same lines met before."""
    rows = [np.random.default_rng(seed).standard_normal(5000, np.float32) for seed in range(3)]
    weights = [0.7, 1.3, 2.9]
    _, single = reduce_rows(rows, scaled_weights(weights), [0, 1, 2])
    for doubled in range(3):
        more_rows = [row for rank, row in enumerate(rows) for _ in range(2 if rank == doubled else 1)]
        more_weights = [
            w / (2 if r == doubled else 1) for r, w in enumerate(weights) for _ in range(2 if r == doubled else 1)
        ]
        coordinates = [rank for rank in range(3) for _ in range(2 if rank == doubled else 1)]
        for own in range(4):
            _, output = reduce_rows(more_rows, scaled_weights(more_weights), coordinates, own=own)
            assert output.tobytes() == single.tobytes()


def test_equal_values_stay_what_they_are() -> None:
    row = np.random.default_rng(0).standard_normal(5000, np.float32)
    _, output = reduce_rows([row] * 4, scaled_weights([1, 1, 1, 1]), [0, 1, 2, 3])
    assert output.tobytes() == row.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.7], [3.0, 1.0, 2.0], [1e-3] * 7])
def test_the_mean_of_the_largest_values_does_not_overflow(dtype: str, weights: list[float]) -> None:
    largest = np.finfo(np.float64 if dtype == "float64" else np.float32).max / 1.001
    if dtype in ("float16", "bfloat16"):
        largest = {"float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120}[dtype]
    rows = [np.full(10, largest).astype(DTYPES[dtype]) for _ in weights]
    for codec in TOLERANCE:
        reduced, output = reduce_rows(rows, scaled_weights(weights), list(range(len(weights))), codec)
        assert isinstance(reduced, Reduced)
        assert np.isfinite(output.astype(np.float64)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_is_told_with_its_place(bad: float) -> None:
    rows = [np.ones(10, np.float32) for _ in range(3)]
    rows[1][7] = bad
    reduced, _ = reduce_rows(rows, [1.0, 1.0, 1.0], [0, 1, 2])
    assert reduced == Spoilt(1, f"sent {bad} for element 7")


def test_a_bad_average_is_refused_and_not_written() -> None:
    output = np.zeros(10, np.float32)
    piece = Piece(3, 100, 110, "float32", Rank(0))
    bad = np.array([1] * 9 + [np.nan], np.float32).tobytes()
    for coding in (None, codec_named("float32").average):
        assert decode_average(piece, bad, coding, output) == "sent an average with nan at element 109"
        assert isinstance(decode_average(piece, bad[:-1], coding, output), str)
    assert not output.any()


@pytest.mark.parametrize(
    "weights", [[1.0], [1, 2, 3], [0, 0, 5], [1e-300, 1e300], [5e-324, 5e-324], [1e-12] * 3, [0.1] * 10]
)
def test_scaled_weights_keep_their_ratios_and_stay_below_one(weights: list[float]) -> None:
    scaled = scaled_weights(weights)
    assert sum(scaled) <= 1
    assert sum(scaled) >= 0.25
    for weight, other in zip(weights, scaled, strict=True):
        assert other == pytest.approx(sum(scaled) * (weight / math.fsum(weights)), rel=1e-6, abs=1e-38)


def test_weights_of_nothing_are_nothing() -> None:
    assert scaled_weights([0.0, 0.0]) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksums_do_not_depend_on_chunks(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(10 * ALIGNMENT + 17).astype(DTYPES[dtype])
    whole = checksums(values)
    for blocks in (1, 2, 3, 7):
        step = blocks * ALIGNMENT
        assert b"".join(checksums(values[at : at + step]) for at in range(0, len(values), step)) == whole
    values[5] += values.dtype.type(1)
    assert checksums(values) != whole


# ---- what is asked of the machine


def test_a_finished_machine_asks_for_nothing() -> None:
    paper = group_on_paper(3)
    paper.run()
    machine = paper.machines[Rank(0)]
    assert machine.next_deadline() is None
    assert machine.next_outgoing(Rank(1)) is None
    assert machine.idle
    machine.handle_timer(1e9)
    machine.receive(Heartbeat(paper.group.group_id, 5), Rank(1), 1e9)
    machine.suspect(Rank(2), "went home", 1e9)
    assert machine.state is State.COMMITTED


# ---- several codecs, and differences to what all hold

MIXED = "*.bias=float32,size<1000=bfloat16,*=flash4-8+anchored"


def models(count: int, *, seed: int = 0) -> list[Vector]:
    """Weights and biases in turn, and some of another dtype: codecs change within chunks."""
    rng = np.random.default_rng(seed)
    sizes = {f"{block}.{kind}": size for block in range(6) for kind, size in (("weight", 5000), ("bias", 77))}
    return [
        Vector.of(
            {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
            | {"half": rng.standard_normal(3000).astype(np.float16), "scale": rng.standard_normal(9)}
        )
        for _ in range(count)
    ]


def about(centre: Vector, count: int, spread: float, *, seed: int = 0) -> list[Vector]:
    """Members near each other, as trainers' parameters are."""
    rng = np.random.default_rng(seed)
    return [
        Vector.of({n: (a + spread * rng.standard_normal(a.shape)).astype(a.dtype) for n, a in centre.arrays().items()})
        for _ in range(count)
    ]


def error_of(paper: GroupOnPaper) -> float:
    """Of the mean, by norm."""
    exact = paper.mean_by_receipt(0)
    return float(np.linalg.norm(paper.result_flat(0) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_several_codecs_in_a_chunk_end_alike_for_everybody_whoever_dies(seed: int, anchored: bool) -> None:
    centre = models(1, seed=9)[0]
    values = about(centre, 4, 0.01, seed=seed)
    chunk_elements = [ALIGNMENT, 3 * ALIGNMENT][seed % 2]
    paper = group_on_paper(
        values, codec=MIXED, seed=seed, chunk_elements=chunk_elements, anchor=centre if anchored else None
    )
    if seed > 1:
        paper.at(0.1 * seed, partial(paper.kill, seed % 4))
    paper.run()
    assert len(paper.committed) >= 3
    # Seven steps of 4 bits and then 255 on the range: 0.27 of values around 4, of differences around 0.04.
    paper.check_promises(0.003 if anchored else 0.3)
    biases = {name: array for name, array in paper.result_arrays(paper.committed[0]).items() if "bias" in name}
    lines = paper.machines[paper.committed[0]].span_lines()
    if len({line.contributors for line in lines}) == 1:
        ranks = [number_of(contributor) for contributor in lines[0].contributors]
        for name, array in biases.items():
            exact = np.mean([values[rank].arrays()[name].astype(float) for rank in ranks], axis=0)
            assert np.abs(array - exact).max() < 1e-6


def test_what_a_survivor_serves_again_is_no_difference() -> None:
    """Its reducer died after one member had the average: that one serves it decoded, whatever the anchor."""
    centre = normal_vectors(1, 40_000)[0]
    paper = group_on_paper(about(centre, 4, 0.01), codec="flash4+anchored", anchor=centre, seed=3)
    served_again = 0

    def fate(sender: Rank, receiver: Rank, message: Message) -> bool:
        nonlocal served_again
        if isinstance(message, Chunk):
            served_again += message.decoded
            if message.is_average and sender == 1 and not message.decoded:
                paper.at(paper.now + 0.06, partial(paper.kill, 1))
                return receiver == 0
        return True

    paper.fate = fate
    paper.run()
    assert paper.committed == [0, 2, 3] and served_again > 0
    paper.check_promises(0.003)


def test_bytes_and_bits_are_those_of_the_formula() -> None:
    values = normal_vectors(4, 16 * ALIGNMENT)
    for codec, bits, extra in (("flash4-8", 6.25, 0), ("flash4+anchored", 4.25, 1), ("*=flash8", 8.25, 0)):
        paper = group_on_paper(values, codec=codec, anchor=values[0])
        paper.run()
        for machine in paper.machines.values():
            chunks = 24  # 12 contributions to others, 4 averages to each of 3
            assert machine.bytes_sent == 24 * ALIGNMENT * bits / 8 + chunks * (2 + extra)
            assert machine.bits_per_element == pytest.approx(bits, rel=0.002)


def test_the_receipts_error_is_that_of_the_contribution_as_others_decode_it() -> None:
    """Measured on the first of every 16 chunks; normal values: the figures of the codecs' table."""
    values = normal_vectors(2, 64 * ALIGNMENT)
    found = {}
    for codec in ("float32", "bfloat16", "flash8", "flash4", "flash4:32"):
        paper = group_on_paper(values, codec=codec)
        paper.run()
        found[codec] = paper.machines[Rank(0)].relative_error
    assert found.pop("float32") == 0 and 0.001 < found.pop("bfloat16") < 0.003
    assert found == pytest.approx({"flash8": 0.0059, "flash4": 0.0998, "flash4:32": 0.0782}, rel=0.03)


def test_anchored_four_bits_beat_plain_eight_on_parameters_that_drift() -> None:
    """Trainers start from the average, each goes its way by 1 % of the norm, and all drift: averaging by averaging."""
    rng = np.random.default_rng(4)
    errors: dict[str, list[float]] = {"flash8": [], "flash4+anchored": []}
    held = dict.fromkeys(errors, normal_vectors(1, 60_000, seed=5)[0])
    for step in range(5):
        drift = 0.01 * rng.standard_normal(60_000)
        own = [0.01 * rng.standard_normal(60_000) for _ in range(4)]
        for codec, last in held.items():
            values = [Vector.of({"w": (last.arrays()["w"] + drift + each).astype(np.float32)}) for each in own]
            paper = group_on_paper(values, codec=codec, anchor=last if step else None, seed=step)
            paper.run()
            assert paper.committed == [0, 1, 2, 3]
            paper.check_promises(0.3)
            errors[codec].append(error_of(paper))
            held[codec] = Vector.of({"w": paper.result_arrays(0)["w"].copy()})
    plain, anchored = errors.values()
    assert anchored[0] > plain[0]  # the first has nothing to be anchored to
    assert max(anchored[1:]) < 0.5 * min(plain)

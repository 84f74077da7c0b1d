"""Tau is the one of the authors' rule, the same at all peers, and brings what it is said to bring."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshpitd.averaging.compute_budget import (
    NO_BUDGET,
    TABLES_MAX,
    TABLES_MIN,
    BudgetKeeper,
    BudgetOptions,
    best_tau,
    carried_out,
    expected,
    find_budget,
)
from moshpitd.averaging.errors import InvalidInput, Precondition, RemoteProtocolError
from moshpitd.averaging.messages import Address, Budget, Latencies, Member, Table
from moshpitd.averaging.names import Incarnation, PeerId
from moshpitd.averaging.receipt import Outcome
from moshpitd.averaging.session import Call, SessionConfig
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.compute_budget import authors_noise
from moshpitd.simulation.network import Weather
from moshpitd.simulation.swarm import Ending, Peer, Swarm, options_for

M, LEARNT = 12, 44
MICRO_BATCH = 1.5
"""Of the authors: 1 and the noise, whose mean is a half."""

Floats = npt.NDArray[np.float64]


def steps_of(rng: np.random.Generator, peers: int, steps: int = LEARNT) -> Floats:
    """[step, peer, micro-batch]"""
    return 1.0 + authors_noise(rng, (steps, peers, M))


def reference(latencies: Floats, exchange_s: float) -> tuple[float, float, float]:
    """The rule as SYSTEMS.md tells it: (tau, expected speed-up, drop rate)."""
    c = np.cumsum(latencies, axis=2)
    longest = c[:, :, -1].max(axis=1)
    best = (-1.0, 0.0, 0.0)
    for tau in np.linspace(c[:, :, latencies.shape[2] // 2 - 1].min(), c.max(), 200):
        below = np.where(c < tau, c, 0.0).max(axis=(1, 2))
        speedup = (longest - below) / (longest + exchange_s)
        drop = (c >= tau).mean(axis=(1, 2))
        with np.errstate(invalid="ignore"):  # nothing done in no time
            effective = float(((1 - drop) / (1 - speedup)).mean())
        if effective > best[0]:
            best = (effective, float(tau), float(drop.mean()))
    return best[1], best[0], best[2]


# ---- the rule


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(2, 14), st.floats(0, 10))
def test_tau_is_that_of_a_plain_reference(seed: int, peers: int, micro_batches: int, exchange_s: float) -> None:
    rng = np.random.default_rng(seed)
    latencies = 1.0 + authors_noise(rng, (20, peers, micro_batches))
    choice = best_tau(list(latencies), exchange_s)
    tau, speedup, drop_rate = reference(latencies, exchange_s)
    assert choice.tau_s == tau
    assert (choice.speedup, choice.drop_rate) == pytest.approx((speedup, drop_rate), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(7)))
def test_the_order_of_peers_does_not_matter_to_the_last_bit(seed: int, order: list[int]) -> None:
    latencies = steps_of(np.random.default_rng(seed), 7)
    assert best_tau(list(latencies[:, order]), 2.0) == best_tau(list(latencies), 2.0)


@pytest.mark.parametrize(
    ("peers", "figures"),
    [(4, (1.069, 1.056, 1.031)), (8, (1.126, 1.103, 1.068))],
)
def test_the_expected_speed_up_is_that_of_the_authors_noise(peers: int, figures: Sequence[float]) -> None:
    steps = list(steps_of(np.random.default_rng(0), peers, 600))
    for figure, exchange in zip(figures, (0.5, 2, 6), strict=True):
        choice = best_tau(steps, exchange * MICRO_BATCH)
        assert choice.speedup == pytest.approx(figure, abs=0.02)
        assert 0.04 < choice.drop_rate < 0.15


def test_two_hundred_peers_would_gain_a_third() -> None:
    choice = best_tau(list(steps_of(np.random.default_rng(0), 200, 60)), 2 * MICRO_BATCH)
    assert choice.speedup == pytest.approx(1.33, abs=0.04)


def test_a_tau_from_44_steps_is_nearly_as_good_as_the_best_there_is() -> None:
    rng = np.random.default_rng(1)
    unseen = list(steps_of(rng, 8, 600))
    oracle = best_tau(unseen, 2 * MICRO_BATCH).speedup
    for _ in range(5):
        learnt = best_tau(list(steps_of(rng, 8)), 2 * MICRO_BATCH)
        [speedup], _ = expected(unseen, np.array([learnt.tau_s]), 2 * MICRO_BATCH)
        assert speedup > 0.99 * oracle


def test_a_trainer_that_finishes_what_it_began_gains_less_than_the_rule_says_and_drops_less() -> None:
    steps = list(steps_of(np.random.default_rng(2), 8, 600))
    rule = best_tau(steps, 2 * MICRO_BATCH)
    real = carried_out(steps, rule.tau_s, 2 * MICRO_BATCH)
    assert 1.05 < real.speedup < rule.speedup
    assert 0.02 < real.drop_rate < rule.drop_rate
    assert carried_out(steps, 1e9, 2 * MICRO_BATCH).speedup == 1.0


def peer(number: int) -> PeerId:
    return PeerId(f"{number:064x}")


def table(number: int, latencies: Floats, steps: Sequence[int], exchange_s: float = 0.1) -> Table:
    seconds = latencies.ravel().tolist()
    return Table(peer(number), tuple(steps), tuple(seconds), (exchange_s,) * len(steps))


def test_steps_are_those_of_who_was_there_and_the_exchange_is_that_of_who_waited_least() -> None:
    latencies = steps_of(np.random.default_rng(3), 3, 20)
    everywhere, later = range(20), range(5, 20)
    tables = {
        peer(0): table(0, latencies[:, 0], everywhere, exchange_s=0.9),
        peer(1): table(1, latencies[:, 1], everywhere, exchange_s=0.5),
        peer(2): table(2, latencies[5:, 2], later, exchange_s=0.75),
    }
    found = find_budget(tables, M, steps_min=10, k=20)
    choice = best_tau([*latencies[:5, :2], *latencies[5:]], 0.5)
    assert found == Budget(20, 3, choice.tau_s, choice.speedup, choice.drop_rate)


@pytest.mark.parametrize(
    ("tables", "micro_batches"),
    [
        ({0: np.ones((20, M))}, M),
        ({0: np.ones((5, M)), 1: np.ones((5, M))}, M),
        ({0: np.ones((20, 1)), 1: np.ones((20, 1))}, 1),
        ({0: np.zeros((20, M)), 1: np.zeros((20, M))}, M),
    ],
    ids=["one peer", "few steps", "a single micro-batch", "no time at all"],
)
def test_too_little_gives_no_tau(tables: dict[int, Floats], micro_batches: int) -> None:
    told = {peer(n): table(n, each, range(len(each))) for n, each in tables.items()}
    assert find_budget(told, micro_batches, steps_min=10, k=20) is None


# ---- bad input


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (BudgetOptions(0), "micro_batches 0: must be 1 to"),
        (BudgetOptions(-3), "micro_batches -3"),
        (BudgetOptions(M, tau_s=0.0), "tau 0.0: must be more than 0"),
        (BudgetOptions(M, tau_s=-1.0), "tau -1.0"),
        (BudgetOptions(M, tau_s=float("nan")), "tau nan"),
        (BudgetOptions(M, tau_s=1.0, off=True), "choose one"),
        (BudgetOptions(M, "mean"), "normalise 'mean': must be fixed or computed"),
        (BudgetOptions(M, warm_up=-1), "warm_up"),
        (BudgetOptions(M, learn=1), "learn 1"),
        (BudgetOptions(M, refresh_every=49), "refresh_every 49: must be 0 .never. or at least warm_up . learn = 50"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options: BudgetOptions, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        options.check()


def test_wait_avoiding_averaging_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidInput, match="wait-avoiding averaging: there nobody waits for the slowest"):
        BudgetOptions(M).check(averaging="wait_avoiding")


@pytest.mark.parametrize("seconds", [(-0.1,), (0.1, float("nan")), (float("inf"),)])
def test_latencies_that_cannot_be_are_refused(seconds: tuple[float, ...]) -> None:
    with pytest.raises(InvalidInput, match="of micro-batch"):
        Call(micro_batch_s=(seconds,)).check()


# ---- one session's keeper

QUICK = BudgetOptions(4, "computed", warm_up=1, learn=4)
"""Windows of five averagings: 0 to 4, 5 to 9, ..."""


def member(number: int, budget: Budget = NO_BUDGET) -> Member:
    return Member(peer(number), Incarnation(1), number, 1.0, Address("h:1"), True, budget=budget)


def told(window: int, *tables: Table) -> Latencies:
    return Latencies(window, tables)


def test_of_more_tables_than_fit_everybody_keeps_the_same() -> None:
    wide = replace(QUICK, micro_batches=256, learn=64, warm_up=0)
    tables = [Table(peer(number), (63,), (0.25,) * 256, (0.0,)) for number in range(1, 3 * TABLES_MIN)]
    kept = []
    for seed in range(2):
        order = random.Random(seed).sample(tables, len(tables))
        keeper = BudgetKeeper(peer(0), wide)
        for each in order:
            keeper.receive(told(63, each), 63)
        keeper.start(((0.1,) * 256,))
        messages = keeper.group_formed(63, [member(0), member(1)], turns=1)
        kept.append({table for message in messages for table in message.tables if table.peer != peer(0)})
    assert len(kept[0]) >= TABLES_MIN - 1
    assert kept[0] == kept[1]


BAD_TABLES = {
    "negative": Table(peer(1), (3,), (0.1, 0.1, 0.1, -0.1), (0.0,)),
    "endless": Table(peer(1), (3,), (0.1, 0.1, 0.1, 1e9), (0.0,)),
    "a latency too few": Table(peer(1), (3,), (0.1, 0.1, 0.1), (0.0,)),
    "no exchange": Table(peer(1), (3,), (0.1,) * 4, ()),
    "out of the window": Table(peer(1), (5,), (0.1,) * 4, (0.0,)),
    "backwards": Table(peer(1), (3, 2), (0.1,) * 8, (0.0, 0.0)),
    "too many": Table(peer(1), (3,) * 33, (0.1,) * 132, (0.0,) * 33),
}


@pytest.mark.parametrize("bad", BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_table_that_cannot_be_is_its_senders_fault(bad: Table) -> None:
    with pytest.raises(RemoteProtocolError):
        BudgetKeeper(peer(0), QUICK).receive(told(4, bad), 4)


def test_endless_tables_are_their_senders_fault() -> None:
    crowd = [Table(peer(number), (), (), ()) for number in range(TABLES_MAX + 1)]
    with pytest.raises(RemoteProtocolError, match="257 peers in one message"):
        BudgetKeeper(peer(0), QUICK).receive(told(4, *crowd), 4)


@pytest.mark.parametrize(
    "lie",
    [
        Budget(2, 5, 0.1, 1.1, 0.1),
        Budget(1, 1, 0.1),
        Budget(1, 2, 0.0),
        Budget(1, 2, -1.0),
        Budget(1, 5, 0.1, 1.1, 1.5),
    ],
    ids=["of the future", "of one peer", "zero", "negative", "more than all dropped"],
)
def test_a_budget_that_cannot_be_is_not_adopted(lie: Budget) -> None:
    keeper = BudgetKeeper(peer(0), QUICK)
    keeper.start(((0.1,),))
    keeper.group_formed(1, [member(0), member(1, lie)], turns=1)
    assert keeper.budget == NO_BUDGET


# ---- swarms on paper


class Trainers:
    """Trainers with a compute budget, whose micro-batches take as long as they are told."""

    def __init__(self, swarm: Swarm, peers: Sequence[Peer], options: BudgetOptions) -> None:
        self.swarm, self.options = swarm, options
        self.rng = np.random.default_rng(7)
        self.told: list[dict[Peer, tuple[float, ...]]] = []
        """Of each step, the latencies of each."""
        for each in peers:
            self.give(each)

    def give(self, peer: Peer, **other: object) -> None:
        with_other = replace(self.options, **other)  # type: ignore[arg-type]
        peer.machine.set_budget(with_other, self.swarm.now)

    def call(self, peer: Peer, *micro_batch_s: tuple[float, ...], weight: float = 1.0, timeout_s: float = 20.0) -> Call:
        """As the door would make it."""
        call = Call(weight, timeout_s, micro_batch_s=micro_batch_s)
        return peer.machine.weighed(call, self.swarm.now)

    def step(self, peers: Sequence[Peer]) -> dict[Peer, Ending]:
        """One step of each, then their averaging. They begin no micro-batch after tau."""
        calls = {}
        self.told.append({})
        for peer in peers:
            line = peer.machine.status(self.swarm.now).budget
            assert line is not None
            latencies = 0.01 * (1.0 + authors_noise(self.rng, (self.options.micro_batches,)))
            ends = np.cumsum(latencies)
            begun = 1 + int(np.sum(ends[:-1] <= line.tau_s)) if line.tau_s else len(ends)
            micro_batch_s = tuple(np.diff(ends, prepend=0.0)[:begun].tolist())
            self.told[-1][peer] = micro_batch_s
            calls[peer] = (ones(), self.call(peer, micro_batch_s))
        return self.swarm.average(calls, apart_s=0.01, limit_s=21.0)


ELEMENTS = 4096


def ones() -> Vector:
    return Vector.of({"w": np.ones(ELEMENTS, np.float32)})


def trainers_of(
    n: int,
    options: BudgetOptions = QUICK,
    *,
    group_size_max: int = 16,
    rounds: int = 0,
    give: bool = True,
    min_peers: int = 0,
) -> tuple[Trainers, list[Peer]]:
    swarm = Swarm(
        0, Weather(directory=(0.005, 0.005)), SessionConfig(chunk_bytes=1 << 14, group_size_max=group_size_max)
    )
    session = options_for(np.zeros(ELEMENTS, np.float32), rounds=rounds, min_peers=min_peers or n)
    peers = [swarm.open(f"p{number}", session) for number in range(n)]
    trainers = Trainers(swarm, peers if give else [], options)
    swarm.run_for(1.0)
    return trainers, peers


def budgets(endings: dict[Peer, Ending]) -> set[tuple[int, int, float]]:
    lines = [ending.told.budget for ending in endings.values()]
    return {(line.k, line.tables, line.tau_s) for line in lines if line is not None}


@pytest.mark.parametrize(
    ("n", "group_size_max", "rounds", "found_after"),
    [(4, 16, 0, 4), (9, 3, 0, 4), (9, 3, 1, 5), (8, 2, 0, 4)],
    ids=["one group", "a grid of 3x3", "3x3, an axis an averaging", "a grid of 2x2x2"],
)
def test_all_peers_find_the_same_tau_at_once_whatever_the_grid(
    n: int, group_size_max: int, rounds: int, found_after: int
) -> None:
    trainers, peers = trainers_of(n, group_size_max=group_size_max, rounds=rounds)
    for _ in range(found_after):
        assert {tau for *_, tau in budgets(trainers.step(peers))} == {0.0}
    [(k, tables, tau)] = budgets(trainers.step(peers))
    assert (k, tables) == (found_after + 1, n)
    assert tau > 0
    endings = trainers.step(peers)
    assert {ending.told.budget.note for ending in endings.values() if ending.told.budget} == {""}
    assert not trainers.swarm.protocol_errors


def test_tau_is_the_references_of_what_the_trainers_told() -> None:
    trainers, peers = trainers_of(4, replace(QUICK, warm_up=2, learn=12))
    endings = [trainers.step(peers) for _ in range(14)]
    latencies = np.array([[told[peer] for peer in peers] for told in trainers.told[2:]])
    took = [min(ending.told.seconds_total for ending in each.values()) for each in endings[2:-1]]
    tau, _, _ = reference(latencies, float(np.median(took)))
    assert budgets(endings[-1]) == {(14, 4, tau)}


def test_the_weights_on_the_wire_are_the_micro_batches_computed() -> None:
    trainers, peers = trainers_of(4, replace(QUICK, tau_s=0.03))
    for _ in range(3):
        endings = trainers.step(peers)
        completed = {peer.id: ending.told.budget.completed for peer, ending in endings.items() if ending.told.budget}
        assert {1, 2, 3, 4} & set(completed.values()), completed
        for ending in endings.values():
            [round_] = ending.told.rounds
            assert {line.peer: line.weight for line in round_.members} == completed
            assert ending.told.weight_total == sum(completed.values())


def test_fixed_against_computed_is_the_completed_fraction() -> None:
    """Every trainer's gradient is the same, g for each micro-batch: fixed must give it times the completed fraction."""
    means = {}
    for normalise in ("fixed", "computed"):
        trainers, peers = trainers_of(3, replace(QUICK, normalise=normalise, off=True))
        calls = {}
        for completed, each in zip((1, 3, 4), peers, strict=True):
            given = completed / 4 if normalise == "fixed" else 1.0
            calls[each] = (
                Vector.of({"w": np.full(ELEMENTS, given, np.float32)}),
                trainers.call(each, (0.01,) * completed, weight=2.0),
            )
        endings = trainers.swarm.average(calls, apart_s=0.01, limit_s=21.0)
        [means[normalise]] = {float(ending.values[0]) for ending in endings.values()}
    assert means["computed"] == 1.0
    assert means["fixed"] / means["computed"] == pytest.approx(8 / 12)


def test_a_newcomer_goes_by_the_others_tau_one_averaging_later() -> None:
    trainers, peers = trainers_of(3)
    for _ in range(6):
        trainers.step(peers)
    late = trainers.swarm.open("late", peers[0].machine.options)
    trainers.give(late)
    trainers.swarm.run_for(1.0)
    trainers.step([*peers, late])  # nobody expects it yet
    endings = trainers.step([*peers, late])
    assert endings[late].told.outcome is Outcome.COMPLETE
    [(_, tables, tau)] = budgets(endings)
    assert tables == 3 and tau > 0
    assert "1 of 4 members did not go by the newest tau yet" in (endings[late].told.budget or pytest.fail()).note


def test_a_member_that_dies_before_it_told_is_not_in_the_tau_and_the_others_agree() -> None:
    trainers, peers = trainers_of(4)
    for _ in range(4):
        trainers.step(peers)
    trainers.swarm.kill(peers[3])
    endings = trainers.step(peers[:3])
    [(_, tables, tau)] = budgets(endings)
    assert tables == 3 and tau > 0


@pytest.mark.parametrize("after_ms", [1, 8, 16, 24, 40])
def test_a_death_amid_the_telling_parts_them_for_a_turn_of_the_axes_at_most(after_ms: int) -> None:
    trainers, peers = trainers_of(9, group_size_max=3, min_peers=8)
    for _ in range(4):
        trainers.step(peers)
    swarm = trainers.swarm
    swarm.at(swarm.now + after_ms / 1000, lambda: swarm.kill(peers[8]))
    trainers.step(peers)
    trainers.step(peers[:8])
    trainers.step(peers[:8])
    [(k, tables, tau)] = budgets(trainers.step(peers[:8]))
    assert k == 5 and tables in (8, 9) and tau > 0
    assert not swarm.protocol_errors


def test_who_lacked_a_table_goes_by_what_the_others_found() -> None:
    rng = np.random.default_rng(0)
    tables = [table(number, rng.uniform(0.1, 0.2, (4, 4)), range(1, 5)) for number in range(3)]
    keepers = [BudgetKeeper(peer(number), QUICK) for number in range(2)]
    for keeper, heard in zip(keepers, (tables[1:], tables[:1]), strict=True):
        for k in range(5):
            keeper.start(((0.1,) * 4,))
            keeper.group_formed(k, [member(0), member(1)], turns=1)
            keeper.receive(told(4, *heard), k)
            keeper.averaged(k, turns=1, exchange_s=0.1, now=float(k))
    [newer, older] = [keeper.budget for keeper in keepers]
    assert (newer.tables, older.tables) == (3, 2) and newer.tau_s != older.tau_s
    for keeper in keepers:
        keeper.start(((0.1,) * 4,))
        keeper.group_formed(5, [member(0, newer), member(1, older)], turns=1)
        line = keeper.line(6)
        assert (line.tau_s, line.tables) == (newer.tau_s, 3)
        assert line.note.startswith("1 of 2 members did not go by the newest tau yet")


def test_tau_is_found_anew_every_so_often_and_nothing_is_dropped_while_it_is() -> None:
    trainers, peers = trainers_of(3, replace(QUICK, refresh_every=10))
    found, measured = [], []
    for step in range(20):
        endings = trainers.step(peers)
        [(k, _, tau)] = budgets(endings)
        found.append(k)
        if tau == 0:
            measured.append(step + 1)  # told after a step, for the next one
    assert sorted(set(found)) == [0, 5, 15]
    assert measured == [1, 2, 3, 4, 11, 12, 13, 14]


def test_by_hand_and_off_are_each_ones_own_word() -> None:
    trainers, peers = trainers_of(4)
    trainers.give(peers[0], tau_s=0.02)
    trainers.give(peers[1], off=True)
    for _ in range(6):
        endings = trainers.step(peers)
    lines = [endings[each].told.budget for each in peers]
    assert [line.state.split(":")[0].split(" since")[0] for line in lines if line] == [
        "by hand",
        "off",
        *["in force"] * 2,
    ]
    assert lines[0] and lines[0].tau_s == 0.02 and lines[0].drop_rate > 0
    assert lines[1] and lines[1].tau_s == 0 and lines[1].completed == 4
    assert lines[2] and lines[2].tables == 3, (
        "one that drops by hand tells no latencies: only its quick steps are whole"
    )


def test_members_that_normalise_otherwise_refuse_each_other_by_name() -> None:
    trainers, peers = trainers_of(3)
    trainers.give(peers[2], normalise="fixed")
    trainers.swarm.run_for(1.0)
    for each in peers[:2]:
        trainers.swarm.start(each, ones(), trainers.call(each, (0.01,), timeout_s=5.0))
    before = {peers[2]: 0}
    trainers.swarm.start(peers[2], ones(), trainers.call(peers[2], (0.01,), timeout_s=5.0))
    ending = trainers.swarm.run_until_ended(before, 6.0)[peers[2]]
    assert isinstance(ending.error, Precondition)
    assert "normalise 'fixed of 4 micro-batches" in str(ending.error)
    assert "against 'computed of 4 micro-batches" in str(ending.error)


def test_one_that_has_not_said_how_it_normalises_is_waited_for_and_not_held_against_others() -> None:
    trainers, peers = trainers_of(3, give=False)
    for each in peers:
        trainers.give(each, normalise="")
    trainers.swarm.run_for(1.0)
    before = dict.fromkeys(peers, 0)
    for moment, each in enumerate(peers):

        def begin(each: Peer = each) -> None:
            trainers.give(each, normalise="computed")
            trainers.swarm.start(each, ones(), trainers.call(each, (0.01,)))

        trainers.swarm.at(trainers.swarm.now + 2.0 * moment, begin)
    endings = trainers.swarm.run_until_ended(before, 25.0)
    assert {ending.told.outcome for ending in endings.values()} == {Outcome.COMPLETE}


def test_latencies_and_budget_go_together() -> None:
    swarm = Swarm(0, Weather())
    alone = swarm.open("alone", options_for(np.zeros(ELEMENTS, np.float32)))
    vector = ones()
    with pytest.raises(InvalidInput, match="without a compute budget"):
        alone.machine.weighed(Call(micro_batch_s=((0.1,),)), swarm.now)
    alone.machine.set_budget(QUICK, swarm.now)
    for seconds in ((), (0.1,) * 5):
        with pytest.raises(InvalidInput, match=f"latencies of {len(seconds)} micro-batches"):
            alone.machine.weighed(Call(micro_batch_s=(seconds,)), swarm.now)
    with pytest.raises(InvalidInput, match="go together"):
        alone.machine.start(Call(), vector, swarm.now)
    alone.machine.start(Call(micro_batch_s=((0.1,),)), vector, swarm.now)
    alone.machine.set_budget(QUICK, swarm.now)  # the same: nothing to do
    with pytest.raises(Precondition, match="under way"):
        alone.machine.set_budget(replace(QUICK, tau_s=1.0), swarm.now)


def test_the_trainers_of_one_daemon_count_each_for_itself() -> None:
    """Two daemons, one with a quick and a slow trainer: tau is that of three trainers."""
    rng = np.random.default_rng(0)
    latencies = rng.uniform(0.1, 0.2, (5, 3, 4))
    keepers = [BudgetKeeper(peer(number), QUICK) for number in range(2)]
    for k in range(5):
        keepers[0].start(tuple(map(tuple, latencies[k, :2].tolist())))
        keepers[1].start(tuple(map(tuple, latencies[k, 2:].tolist())))
        heard = [keeper.group_formed(k, [member(0), member(1)], turns=1) for keeper in keepers]
        for keeper, messages in zip(keepers, reversed(heard), strict=True):
            for message in messages:
                keeper.receive(message, k)
            keeper.averaged(k, turns=1, exchange_s=0.25, now=float(k))
    choice = best_tau(list(latencies[1:]), 0.25)
    assert {keeper.budget for keeper in keepers} == {Budget(5, 2, choice.tau_s, choice.speedup, choice.drop_rate)}
    assert keepers[0].line(5).completed == 8


def test_the_speed_up_that_is_seen_is_that_of_the_steps() -> None:
    keeper = BudgetKeeper(peer(0), QUICK)
    now = 0.0
    group = [member(0), member(1)]
    for k in range(5):
        keeper.start(((0.1,) * 4,))
        keeper.group_formed(k, group, turns=1)
        now += 1.0
        keeper.receive(told(4, table(1, np.full((3, 4), 0.2), range(1, 4))), k)
        keeper.averaged(k, turns=1, exchange_s=0.1, now=now)
    assert keeper.line(5).tau_s > 0
    for k in range(5, 9):
        keeper.start(((0.1,) * 3,))
        keeper.group_formed(k, group, turns=1)
        now += 0.6
        keeper.averaged(k, turns=1, exchange_s=0.1, now=now)
    line = keeper.line(9)
    assert line.speedup == pytest.approx((3 / 0.6) / (4 / 1.0))
    assert line.drop_rate == pytest.approx(0.25)


def test_windows_follow_each_other_without_a_hole() -> None:
    """Whatever k is, it is measured in exactly one window or is one of its first steps."""
    keeper = BudgetKeeper(peer(0), QUICK)
    states = [keeper.line(k).state.split(",")[0].split(":")[0] for k in range(15)]
    assert all(one != other or one == "measuring" for one, other in pairwise(states))
    assert states.count("measuring") == 12

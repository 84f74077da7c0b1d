"""Nobody waits, on paper: versions, merges, barriers, and what becomes of them when daemons die."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from moshpitd.averaging.cohort import CohortConfig, WaitAvoidance
from moshpitd.averaging.compute_budget import BudgetOptions
from moshpitd.averaging.errors import InvalidInput, NoGroup, Precondition, Unavailable
from moshpitd.averaging.messages import Activation, Contributing, Outcast, View
from moshpitd.averaging.receipt import Outcome, VersionReceipt
from moshpitd.averaging.session import Call, SessionConfig
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.swarm import Array, Ending, Peer, Swarm, options_for

ELEMENTS = 2 * 4096 + 17
CONFIG = SessionConfig(chunk_bytes=1 << 14)
CALL = Call(timeout_s=60.0)


class Cohort:
    """Trainers that do what a story says, and have had their first barrier."""

    def __init__(
        self, peers: int, group_size: int = 2, barrier_every: int = 1000, *, lockstep: bool = False, min_peers: int = 0
    ) -> None:
        self.swarm = Swarm(0, config=CONFIG, keep_messages=True)
        chosen = WaitAvoidance(group_size, barrier_every, lockstep)
        self.options = options_for(
            np.zeros(ELEMENTS, np.float32), wait_avoidance=chosen, min_peers=min_peers or peers, joining="contribute"
        )
        self.rng = np.random.default_rng(0)
        self.peers = [self.swarm.open(f"p{number}", self.options) for number in range(peers)]
        self.posted: dict[Peer, Array] = {}
        self.swarm.run_for(1.0)
        self.step()

    def step(
        self, peers: Sequence[Peer] | None = None, *, models: Mapping[Peer, Array] | None = None
    ) -> dict[Peer, Ending]:
        """These post within 10 ms; a second later they begin the next step."""
        calls = {}
        for peer in self.peers if peers is None else peers:
            model = models[peer] if models else self.rng.normal(size=ELEMENTS).astype(np.float32)
            self.posted[peer] = model
            calls[peer] = (Vector.of({"w": model}), CALL)
        endings = self.swarm.average(calls)
        self.swarm.run_for(1.0)
        return endings

    def post(self, peer: Peer, model: Array | None = None) -> None:
        self.posted[peer] = self.rng.normal(size=ELEMENTS).astype(np.float32) if model is None else model
        self.swarm.start(peer, Vector.of({"w": self.posted[peer]}), CALL)

    def ending(self, peer: Peer, limit_s: float = 120.0) -> Ending:
        """Of the call under way."""
        self.swarm.run_until(lambda: not peer.busy, limit_s)
        return peer.endings[-1]

    def sent(self, kind: type, since: float = 0.0) -> int:
        return sum(isinstance(send.message, kind) for at, _, send in self.swarm.sent if at >= since)


def told(ending: Ending) -> VersionReceipt:
    assert ending.told.version is not None
    return ending.told.version


def kinds(endings: Mapping[Peer, Ending]) -> set[str]:
    return {told(ending).kind for ending in endings.values()}


def bits(endings: Mapping[Peer, Ending]) -> int:
    """How many different models there are."""
    return len({ending.values.tobytes() for ending in endings.values()})


def seconds(endings: Mapping[Peer, Ending]) -> float:
    return max(ending.told.seconds_total for ending in endings.values())


# ---- SYSTEMS.md, section 4


@pytest.mark.parametrize(("peers", "group_size"), [(4, 2), (8, 2), (16, 2), (16, 4), (4, 4), (12, 4)])
def test_all_punctual_the_mean_is_exact_after_log_s_p_versions(peers: int, group_size: int) -> None:
    cohort = Cohort(peers, group_size)
    models = {peer: cohort.rng.normal(size=ELEMENTS).astype(np.float32) for peer in cohort.peers}
    mean = np.mean([model.astype(np.float64) for model in models.values()], axis=0)
    held: Mapping[Peer, Array] = models
    for version in range(1, math.ceil(math.log(peers, group_size)) + 1):
        endings = cohort.step(models=held)
        assert kinds(endings) == {"fresh"}
        assert {told(ending).version for ending in endings.values()} == {version}
        held = {peer: ending.values for peer, ending in endings.items()}
    assert max(float(np.max(np.abs(model - mean))) for model in held.values()) < 1e-6
    assert {ending.told.outcome for ending in endings.values()} == {Outcome.COMPLETE}


def test_one_sleeps_and_nobody_waits_for_it() -> None:
    cohort = Cohort(8)
    cohort.step()
    sleeper, others = cohort.peers[0], cohort.peers[1:]
    last_post = cohort.posted[sleeper]
    endings = cohort.step(others)
    assert seconds(endings) < 0.2
    partner = next(
        peer
        for peer, ending in endings.items()
        if len(told(ending).contributors) == 2 and any(line.peer == sleeper.id for line in told(ending).contributors)
    )
    lines = {line.peer: line.posted for line in told(endings[partner]).contributors}
    assert lines == {sleeper.id: 1, partner.id: 2}, "the daemon put in the last model it had"
    sum_of_two = last_post + cohort.posted[partner]
    assert np.array_equal(endings[partner].values, sum_of_two / np.float32(2))

    cohort.post(sleeper)
    late = cohort.ending(sleeper)
    assert (told(late).kind, told(late).version, told(late).staleness) == ("merge", 2, 1)
    assert late.told.seconds_total < 0.02
    assert np.array_equal(late.values, (sum_of_two + cohort.posted[sleeper]) / np.float32(3)), "(sum + W') / (S + 1)"
    cohort.swarm.run_for(1.0)
    assert kinds(cohort.step()) == {"fresh"}, "it goes on with the others"


def test_who_misses_several_versions_goes_on_from_the_newest() -> None:
    cohort = Cohort(4)
    for _ in range(3):
        cohort.step(cohort.peers[1:])
    late = cohort.step(cohort.peers[:1])[cohort.peers[0]]
    assert (told(late).kind, told(late).version, told(late).staleness, told(late).skipped) == ("merge", 3, 3, 2)
    assert {told(ending).version for ending in cohort.step().values()} == {4}


def test_in_lockstep_it_makes_every_step_itself() -> None:
    cohort = Cohort(4, barrier_every=5, lockstep=True)
    late, others = cohort.peers[0], cohort.peers[1:]
    for _ in range(4):
        cohort.step(others)
    for peer in others:
        cohort.post(peer)
    merges = [cohort.step([late])[late] for _ in range(4)]
    assert [(told(each).kind, told(each).version, told(each).skipped) for each in merges] == [("merge", 4, 0)] * 4
    assert all(peer.busy for peer in others), "the barrier is a true one"
    cohort.post(late)
    endings = {peer: cohort.ending(peer) for peer in cohort.peers}
    assert kinds(endings) == {"barrier"} and bits(endings) == 1


def test_a_late_call_goes_to_a_barrier_where_the_others_wait() -> None:
    cohort = Cohort(4, barrier_every=3)
    late, others = cohort.peers[0], cohort.peers[1:]
    for _ in range(2):
        cohort.step(others)
    for peer in others:
        cohort.post(peer)
    cohort.swarm.run_for(5.0)
    assert all(peer.busy for peer in others)
    cohort.post(late)
    endings = {peer: cohort.ending(peer) for peer in cohort.peers}
    assert kinds(endings) == {"barrier"} and bits(endings) == 1
    mean = np.mean([cohort.posted[peer].astype(np.float64) for peer in cohort.peers], axis=0)
    assert np.max(np.abs(endings[late].values - mean)) < 1e-6
    assert {told(ending).skipped for peer, ending in endings.items() if peer is late} == {2}


def test_after_every_barrier_all_hold_the_same_bits() -> None:
    cohort = Cohort(6, 4, barrier_every=3)
    for step in range(1, 10):
        endings = cohort.step()
        assert (kinds(endings) == {"barrier"}) == (step % 3 == 0)
        assert bits(endings) == 1 or step % 3


def test_two_begin_a_version_at_once_and_it_runs_once() -> None:
    cohort = Cohort(8)
    cohort.step()
    began: list[tuple[Peer, int]] = []
    for peer in cohort.peers[:2]:
        cohort.post(peer)
    endings = [cohort.ending(peer) for peer in cohort.peers[:2]]
    cohort.swarm.run_for(1.0)
    assert {told(ending).version for ending in endings} == {2}
    for peer in cohort.peers:
        status = peer.machine.status(cohort.swarm.now).cohort
        assert status is not None and status.version == 2
        began += [(peer, 2)] * status.counts.get("passive", 0)
    assert len(began) == 6
    assert cohort.sent(Activation) <= 3 * 8 * 3, "every daemon passes a version on once, to three"


# ---- what gets lost


def test_a_lost_activation_is_made_good_by_any_message_of_its_version() -> None:
    cohort = Cohort(4)
    deaf = cohort.peers[0]
    cohort.swarm.swallow = lambda _, send: send.peer == deaf.id and isinstance(send.message, Activation)
    endings = cohort.step(cohort.peers[1:])
    assert seconds(endings) < 0.1
    cohort.swarm.swallow = lambda _, send: send.peer == deaf.id and isinstance(send.message, Activation | Contributing)
    endings = cohort.step(cohort.peers[1:])
    assert seconds(endings) < 1.1, "a heartbeat of the group wakes it"
    assert {ending.told.outcome for ending in endings.values()} == {Outcome.COMPLETE}


def test_two_that_nobody_can_dial_average_over_those_that_can_be() -> None:
    swarm = Swarm(0, config=CONFIG)
    options = options_for(np.zeros(9, np.float32), wait_avoidance=WaitAvoidance(4, 10), min_peers=4)
    peers = [swarm.open(f"p{number}", options, dialable=number > 1) for number in range(4)]
    swarm.run_for(1.0)
    for step in range(3):
        calls = {p: (Vector.of({"w": np.full(9, float(n), np.float32)}), CALL) for n, p in enumerate(peers)}
        endings = swarm.average(calls)
        assert kinds(endings) == {"fresh" if step else "barrier"} and bits(endings) == 1
        assert endings[peers[0]].values.tolist() == [1.5] * 9
        swarm.run_for(1.0)


def test_a_trainer_that_stops_waiting_leaves_its_model_in_the_sum() -> None:
    cohort = Cohort(4, 4)
    cohort.step()
    impatient, others = cohort.peers[0], cohort.peers[1:]
    cohort.post(impatient)
    cohort.swarm.abandon(impatient)
    assert isinstance(impatient.endings[-1].error, Unavailable)
    endings = cohort.step(others)
    assert {ending.told.outcome for ending in endings.values()} == {Outcome.COMPLETE}
    lines = {line.peer: line.posted for line in told(endings[others[0]]).contributors}
    assert impatient.id in lines


def test_a_call_does_not_outlast_its_time() -> None:
    """A daemon of its line stands still; a caller with little time gets its own model back, and is told why."""
    cohort = Cohort(4, 2, min_peers=2)
    cohort.step()
    cohort.swarm.pause(cohort.peers[0])
    vectors = {peer: Vector.of({"w": np.full(ELEMENTS, 3.0, np.float32)}) for peer in cohort.peers[1:]}
    endings = cohort.swarm.average({peer: (vector, Call(timeout_s=1.0)) for peer, vector in vectors.items()})
    assert seconds(endings) < 1.001
    alone = [ending for ending in endings.values() if told(ending).kind == "alone"]
    assert len(alone) == 1 and "had not ended when the caller's time was up" in alone[0].told.why
    assert alone[0].values.tolist() == [3.0] * ELEMENTS


def test_a_broken_connection_is_no_death() -> None:
    cohort = Cohort(4)
    cohort.swarm.cut(cohort.peers[0], cohort.peers[1])
    cohort.swarm.run_for(1.0)
    for _ in range(3):
        assert {ending.told.outcome for ending in cohort.step().values()} == {Outcome.COMPLETE}
    assert cohort.sent(Outcast) == 0


# ---- deaths


def test_a_death_between_barriers_is_found_out_once() -> None:
    cohort = Cohort(8, 4, barrier_every=8, min_peers=4)
    cohort.step()
    dead, living = cohort.peers[0], cohort.peers[1:]
    cohort.swarm.kill(dead)
    died_at = cohort.swarm.now
    cohort.swarm.run_for(1.0)
    for _ in range(4):
        endings = cohort.step(living)
        assert seconds(endings) < 0.1, "nobody waits for the dead"
        assert all(dead.id not in ending.told.peers for ending in endings.values())
        assert kinds(endings) <= {"fresh", "alone"}, "alone: who has only the dead one on its line"
    assert 7 <= cohort.sent(Outcast, died_at) <= 3 * 7 * 2
    for _ in range(2):
        cohort.step(living)
    endings = cohort.step(living)
    assert kinds(endings) == {"barrier"} and bits(endings) == 1
    assert all(len(told(ending).contributors) == 7 for ending in endings.values())
    views = cohort.sent(View)
    assert kinds(cohort.step(living)) <= {"fresh", "alone"}
    assert cohort.sent(View) == views, "the next cohort does without it"


def test_a_daemon_that_loses_its_power_costs_one_version_and_no_more() -> None:
    cohort = Cohort(8, 4, barrier_every=100, min_peers=4)
    cohort.step()
    dead, living = cohort.peers[0], cohort.peers[1:]
    cohort.swarm.kill(dead, silent=True)
    times = [seconds(cohort.step(living)) for _ in range(4)]
    assert max(times) < 8.0
    assert sorted(times)[-2] < 0.1, "found out once"


def test_it_dies_as_it_activates() -> None:
    cohort = Cohort(8, 4, min_peers=4)
    cohort.step()
    dead, living = cohort.peers[0], cohort.peers[1:]
    cohort.post(dead)
    cohort.swarm.kill(dead)
    cohort.swarm.run_for(5.0)
    for _ in range(2):
        endings = cohort.step(living)
        assert seconds(endings) < 0.2
    for ending in endings.values():
        present = {line.peer for line in told(ending).contributors}
        assert dead.id not in present


def test_its_share_is_missing_and_the_sum_is_divided_by_those_who_are_in_it() -> None:
    cohort = Cohort(4, 4, min_peers=4)
    cohort.step()
    dead, living = cohort.peers[0], cohort.peers[1:]
    cohort.swarm.kill(dead)
    endings = cohort.step(living)
    assert bits(endings) == 1
    mean = np.mean([cohort.posted[peer].astype(np.float64) for peer in living], axis=0)
    assert np.max(np.abs(endings[living[0]].values - mean)) < 1e-6
    assert {ending.told.outcome for ending in endings.values()} == {Outcome.PARTIAL}


def test_one_dies_while_the_others_wait_for_it_at_the_barrier() -> None:
    cohort = Cohort(4, 2, barrier_every=2, min_peers=2)
    cohort.step()
    dead, living = cohort.peers[0], cohort.peers[1:]
    for peer in living:
        cohort.post(peer)
    cohort.swarm.run_for(4.0)
    assert all(peer.busy for peer in living), "its daemon says that it is coming"
    died_at = cohort.swarm.now
    cohort.swarm.kill(dead)
    endings = {peer: cohort.ending(peer) for peer in living}
    assert max(ending.at for ending in endings.values()) < died_at + 5.0
    assert kinds(endings) == {"barrier"} and bits(endings) == 1


def test_who_closes_says_so_and_is_missed_by_nobody() -> None:
    cohort = Cohort(4, 2, barrier_every=3, min_peers=2)
    cohort.step()
    cohort.swarm.close(cohort.peers[0])
    cohort.swarm.run_for(1.0)
    living = cohort.peers[1:]
    assert seconds(cohort.step(living)) < 0.1
    endings = cohort.step(living)
    assert kinds(endings) == {"barrier"} and seconds(endings) < 1.0


def test_the_last_one_left_goes_on_alone_and_says_so() -> None:
    cohort = Cohort(3, 2, min_peers=2)
    for peer in cohort.peers[1:]:
        cohort.swarm.close(peer)
    cohort.swarm.run_for(1.0)
    cohort.swarm.start(cohort.peers[0], Vector.of({"w": np.ones(ELEMENTS, np.float32)}), Call(timeout_s=5.0))
    ending = cohort.ending(cohort.peers[0])
    assert ending.receipt is not None and ending.receipt.outcome is Outcome.ALONE


# ---- who comes and goes


def test_the_first_barrier_needs_min_peers_and_later_ones_whoever_is_alive() -> None:
    cohort = Cohort(4, 2, barrier_every=2)  # min_peers 4
    cohort.step()
    for dead in cohort.peers[:2]:
        cohort.swarm.kill(dead)
    living = cohort.peers[2:]
    for expected in ("barrier", "fresh", "barrier"):
        endings = cohort.step(living)
        assert expected in kinds(endings) <= {expected, "alone"}
        assert seconds(endings) < 10.0
    back = cohort.swarm.open("p0", cohort.options)
    cohort.post(back)
    while back.busy:  # three are less than four, but it sees that the others go on
        cohort.step(living)
    assert told(back.endings[-1]).kind == "barrier"


def test_a_newcomer_waits_for_the_barrier_and_brings_nothing_into_a_sum() -> None:
    cohort = Cohort(4, 2, barrier_every=4, min_peers=2)
    cohort.step()
    newcomer = cohort.swarm.open("new", replace(cohort.options, joining="receive"))
    cohort.swarm.run_for(0.5)
    cohort.post(newcomer, np.full(ELEMENTS, 1e6, np.float32))
    for _ in range(2):
        assert kinds(cohort.step()) == {"fresh"}
    assert newcomer.busy
    endings = cohort.step()
    joined = cohort.ending(newcomer)
    assert kinds(endings) == {"barrier"} and joined.told.joined
    assert np.array_equal(joined.values, endings[cohort.peers[0]].values)
    endings = cohort.step()  # it computes its first step; its daemon takes part with the mean
    assert kinds(endings) <= {"fresh", "alone"}
    assert max(float(np.max(np.abs(ending.values))) for ending in endings.values()) < 100


def test_who_misses_the_barrier_is_out_until_it_calls_again() -> None:
    cohort = Cohort(4, 2, barrier_every=3, min_peers=2)
    stays_away, others = cohort.peers[0], cohort.peers[1:]
    for _ in range(2):
        cohort.step(others)
    endings = cohort.step(others)  # its daemon lives and its trainer is silent: some time they stop waiting
    assert kinds(endings) == {"barrier"}
    assert 10.0 < seconds(endings) < 30.0
    assert all(len(told(ending).contributors) == 3 for ending in endings.values())
    for _ in range(2):
        assert seconds(cohort.step(others)) < 0.2
    comes_back(cohort, stays_away, others)


def test_a_paused_daemon_is_left_out_and_comes_back_at_the_barrier() -> None:
    cohort = Cohort(4, 2, barrier_every=4, min_peers=2)
    cohort.step()
    paused, others = cohort.peers[0], cohort.peers[1:]
    cohort.swarm.pause(paused)
    first = cohort.step(others)
    assert seconds(first) < 8.0
    assert seconds(cohort.step(others)) < 0.2
    cohort.swarm.resume(paused)
    cohort.swarm.run_for(1.0)
    comes_back(cohort, paused, others)


def comes_back(cohort: Cohort, peer: Peer, others: Sequence[Peer]) -> None:
    """At a barrier. One that comes to a barrier too late ends alone, and is told."""
    for _ in range(3):
        cohort.post(peer)
        while peer.busy:
            endings = cohort.step(others)
        if told(peer.endings[-1]).kind == "barrier":
            break
        assert "closed" in peer.endings[-1].told.why
    assert kinds(endings) == {"barrier"}
    assert np.array_equal(peer.endings[-1].values, endings[others[0]].values)


# ---- bad input


def test_bad_calls_are_refused_by_name() -> None:
    cohort = Cohort(2)
    peer, vector = cohort.peers[0], Vector.of({"w": np.zeros(ELEMENTS, np.float32)})
    with pytest.raises(InvalidInput, match=r"weight 2\.0: models of a wait-avoiding session all weigh the same"):
        cohort.swarm.start(peer, vector, Call(weight=2.0))
    with pytest.raises(InvalidInput, match="epoch 7: versions of a wait-avoiding session are numbered"):
        cohort.swarm.start(peer, vector, Call(epoch=7))
    with pytest.raises(InvalidInput, match="does not go with wait-avoiding averaging"):
        peer.machine.set_budget(BudgetOptions(micro_batches=4), cohort.swarm.now)
    with pytest.raises(InvalidInput, match="takes no compute budget"):
        peer.machine.weighed(Call(micro_batch_s=((0.1,),)), cohort.swarm.now)
    with pytest.raises(InvalidInput, match="the layout changed: tensor"):
        cohort.swarm.start(peer, Vector.of({"w": np.zeros(3, np.float32)}), CALL)
    cohort.post(peer)
    peer.busy = False
    with pytest.raises(Precondition, match="still under way"):
        cohort.swarm.start(peer, vector, CALL)
    cohort.swarm.close(peer)
    with pytest.raises(Unavailable, match="closed"):
        peer.machine.start(CALL, vector, cohort.swarm.now)


def test_fewer_than_the_barrier_needs_is_said_with_both_numbers() -> None:
    swarm = Swarm(0, config=CONFIG)
    options = options_for(np.zeros(9, np.float32), wait_avoidance=WaitAvoidance(2, 10), min_peers=3)
    peers = [swarm.open(f"p{number}", options) for number in range(2)]
    swarm.run_for(1.0)
    endings = swarm.average({p: (Vector.of({"w": np.zeros(9, np.float32)}), Call(timeout_s=5.0)) for p in peers})
    for ending in endings.values():
        assert isinstance(ending.error, NoGroup)
        assert "2 of 3 peers here" in str(ending.error)


def test_other_group_sizes_and_synchronous_sessions_never_meet() -> None:
    swarm = Swarm(0, config=CONFIG)
    plain = options_for(np.zeros(9, np.float32), rounds=1, min_peers=2)
    avoiding = replace(plain, wait_avoidance=WaitAvoidance(2, 10))
    other = replace(plain, wait_avoidance=WaitAvoidance(2, 20))
    peers = [swarm.open(f"p{number}", each) for number, each in enumerate((plain, plain, avoiding, other))]
    swarm.run_for(1.0)
    calls = {p: (Vector.of({"w": np.zeros(9, np.float32)}), Call(timeout_s=5.0)) for p in peers}
    endings = swarm.average(calls)
    assert {endings[peer].told.outcome for peer in peers[:2]} == {Outcome.COMPLETE}
    for peer in peers[2:]:
        assert isinstance(endings[peer].error, Precondition)
        assert "averaging 'wait-avoiding, groups of 2, barrier every" in str(endings[peer].error)


def test_without_patience_for_the_punctual_only_the_first_is_fresh() -> None:
    """As in the paper; and the reason for the patience."""
    config = replace(CONFIG, cohort=CohortConfig(punctual_share=0.0))
    swarm = Swarm(0, config=config)
    options = options_for(np.zeros(9, np.float32), wait_avoidance=WaitAvoidance(2, 10), min_peers=2)
    peers = [swarm.open(f"p{number}", options) for number in range(2)]
    swarm.run_for(1.0)
    for _ in range(2):
        calls = {p: (Vector.of({"w": np.ones(9, np.float32)}), CALL) for p in peers}
        endings = swarm.average(calls)
        swarm.run_for(1.0)
    assert sorted(told(ending).kind for ending in endings.values()) == ["fresh", "merge"]

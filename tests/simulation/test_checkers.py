"""Each checker is silent on a sound run and complains about a run that somebody falsified: who guards the guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from moshpitd.averaging.messages import Begin, Group
from moshpitd.averaging.names import GroupId, PeerId, Rank
from moshpitd.averaging.receipt import RoundReceipt
from moshpitd.averaging.session import EARLY_MESSAGES_MAX, Call, SessionConfig
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.checkers import (
    Agreement,
    Bounds,
    Checker,
    Conservation,
    Contraction,
    HonestReceipts,
    Leaks,
    Liveness,
)
from moshpitd.simulation.history import History
from moshpitd.simulation.network import Weather
from moshpitd.simulation.swarm import Ending, Observer, Peer, Swarm, options_for
from moshpitd.simulation.workloads import Absence, InStep, InStepOptions

ELEMENTS = 4 * 4096 + 5
STRANGER = PeerId("f" * 64)
Lie = Callable[[Peer, Ending], Ending]


class Liar(Observer):
    """Stands between the swarm and what watches it, and tells another story of how calls end."""

    def __init__(self, listener: Observer, lie: Lie) -> None:
        self._listener = listener
        self._lie = lie

    def call_began(self, peer: Peer, call: Call, vector: Vector, now: float) -> None:
        self._listener.call_began(peer, call, vector, now)

    def group_began(self, peer: Peer, group: Group, rank: Rank, values: Vector, now: float) -> None:
        self._listener.group_began(peer, group, rank, values, now)

    def group_ended(self, peer: Peer, group_id: GroupId, result: Vector) -> None:
        self._listener.group_ended(peer, group_id, result)

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        self._listener.call_ended(peer, self._lie(peer, ending))


def truth(peer: Peer, ending: Ending) -> Ending:
    return ending


def four(checker: Checker, lie: Lie = truth) -> Swarm:
    """Four peers that average once, as the liar tells it to the checker."""
    swarm = Swarm(3, Weather(directory=(0.005, 0.005)), SessionConfig(chunk_bytes=1 << 14, group_size_max=4))
    swarm.observers.append(Liar(History([checker]), lie))
    options = options_for(np.zeros(ELEMENTS, np.float32), joining="contribute")
    for number in range(4):
        swarm.open(f"p{number}", options)
    swarm.run_for(1.0)
    return swarm


def average(swarm: Swarm, checker: Checker, timeout_s: float = 20.0) -> list[str]:
    """All call, all ends, the checker looks a last time: what it complains about."""
    values = np.random.default_rng(7)
    swarm.average(
        {
            peer: (
                Vector.of({"w": values.normal(size=ELEMENTS).astype(np.float32)}),
                Call(weight=1.0 + number, timeout_s=timeout_s),
            )
            for number, peer in enumerate(swarm.living())
        }
    )
    swarm.run_for(40.0)
    checker.finish(swarm)
    return checker.complaints


def of(name: str, change: Callable[[RoundReceipt], RoundReceipt]) -> Lie:
    """A peer's receipt, changed in every round."""

    def lie(peer: Peer, ending: Ending) -> Ending:
        if peer.name != name or ending.receipt is None:
            return ending
        return replace(ending, receipt=replace(ending.receipt, rounds=tuple(map(change, ending.receipt.rounds))))

    return lie


def flipped(*names: str, element: int = 100) -> Lie:
    """One bit of these peers' result is another."""

    def lie(peer: Peer, ending: Ending) -> Ending:
        if peer.name not in names or ending.vector is None:
            return ending
        buffer = ending.vector.buffer.copy()
        buffer[4 * element + 2] ^= 0x40  # a high bit of the mantissa
        return replace(ending, vector=Vector(ending.vector.layout, buffer))

    return lie


def without_one(receipt: RoundReceipt) -> RoundReceipt:
    first, *rest = receipt.spans
    return replace(receipt, spans=(replace(first, contributors=first.contributors[1:]), *rest))


def with_a_stranger(receipt: RoundReceipt) -> RoundReceipt:
    first, *rest = receipt.spans
    return replace(receipt, spans=(replace(first, contributors=(*first.contributors, STRANGER)), *rest))


def test_a_sound_run_pleases_them_all() -> None:
    checkers: Sequence[Checker] = (Agreement(), HonestReceipts(), Conservation(), Bounds(), Leaks(), Liveness())
    for checker in checkers:
        assert average(four(checker), checker) == [], checker.name
        assert checker.looked, f"{checker.name} looked at nothing"


def test_a_run_with_a_death_in_it_pleases_them_too() -> None:
    for checker in (Agreement(), HonestReceipts(), Conservation(), Bounds(), Leaks(), Liveness()):
        swarm = four(checker)
        victim = swarm.living()[3]
        swarm.at(swarm.now + 0.018, lambda swarm=swarm, victim=victim: swarm.kill(victim))  # type: ignore[misc]
        assert average(swarm, checker) == [], checker.name


def test_one_bit_at_one_member_breaks_agreement() -> None:
    checker = Agreement()
    (complaint, *_) = average(four(checker, flipped("p2")), checker)
    assert complaint.startswith("agreement: at ") and "p2" in complaint and "hold other bits of group" in complaint


def test_another_digest_for_the_same_group_breaks_agreement() -> None:
    checker = Agreement()
    lie = of("p1", lambda receipt: replace(receipt, digest=b"x" * 32))
    assert any("have other digests for group" in text for text in average(four(checker, lie), checker))


def test_a_result_that_all_hold_but_nobody_reduced_is_dishonest() -> None:
    checker = HonestReceipts()
    complaints = average(four(checker, flipped("p0", "p1", "p2", "p3")), checker)
    assert len(complaints) == 4 and all("away from the mean of" in text for text in complaints)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without_one, "away from the mean of"),
        (with_a_stranger, "names ffffffff, which never began this group"),
        (lambda receipt: replace(receipt, spans=receipt.spans[1:]), "its spans leave out 0 to"),
        (lambda receipt: replace(receipt, spans=receipt.spans[:-1]), f"of {ELEMENTS}"),
    ],
    ids=["a contributor too few", "a non-contributor", "no first span", "no last span"],
)
def test_a_receipt_that_names_others_than_contributed_is_dishonest(
    change: Callable[[RoundReceipt], RoundReceipt], complaint: str
) -> None:
    checker = HonestReceipts()
    complaints = average(four(checker, of("p2", change)), checker)
    assert any("p2's round 0.0" in text and complaint in text for text in complaints), complaints


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_weight_that_is_carried_on_wrongly_breaks_conservation(factor: float) -> None:
    checker = Conservation()
    lie = of("p3", lambda receipt: replace(receipt, weight_after=factor * receipt.weight_after))
    (complaint,) = average(four(checker, lie), checker)
    assert "round 0.0 of 4 changed the swarm's sum" in complaint


def test_values_from_nowhere_break_conservation() -> None:
    checker = Conservation()
    (complaint,) = average(four(checker, flipped("p0", "p1", "p2", "p3")), checker)
    assert "changed the swarm's sum by" in complaint


def test_a_call_that_ends_after_its_deadline_breaks_liveness() -> None:
    checker = Liveness()
    late: Lie = lambda peer, ending: replace(ending, at=ending.at + 30.0) if peer.name == "p1" else ending  # noqa: E731
    (complaint,) = average(four(checker, late), checker)
    assert "p1's call ended" in complaint and "after its deadline" in complaint


def test_a_call_that_never_ends_breaks_liveness() -> None:
    checker = Liveness()
    swarm = four(checker)
    deaf = swarm.living()[2]
    deaf.machine.take_effects = list  # type: ignore[method-assign]  # a driver that carries nothing out any more
    for peer in swarm.living():
        swarm.start(peer, Vector.of({"w": np.zeros(ELEMENTS, np.float32)}), Call(timeout_s=5.0))
    swarm.run_for(60.0)
    checker.finish(swarm)
    (complaint,) = checker.complaints
    assert "p2 still waits" in complaint


def test_a_daemon_that_stood_still_is_forgiven_just_so_long() -> None:
    checker = Liveness()
    swarm = four(checker)
    sleeper = swarm.living()[0]
    swarm.pause(sleeper)
    swarm.at(swarm.now + 30.0, lambda: swarm.resume(sleeper))
    assert average(swarm, checker, timeout_s=5.0) == []


def test_whoever_fails_when_all_is_calm_breaks_liveness() -> None:
    checker = Liveness()
    checker.calm_at = 0.0
    swarm = four(checker)
    victim = swarm.living()[3]
    swarm.at(swarm.now + 0.018, lambda: swarm.kill(victim))
    complaints = average(swarm, checker)
    assert complaints and all("is partial" in text for text in complaints)


def test_a_queue_above_its_limit_breaks_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Bounds()
    swarm = four(checker)
    hoarder = swarm.living()[1].machine
    load = hoarder.load
    monkeypatch.setattr(hoarder, "load", lambda: replace(load(), early_messages=EARLY_MESSAGES_MAX + 1))
    complaint, *_ = average(swarm, checker)
    assert f"p1 keeps {EARLY_MESSAGES_MAX + 1} early messages, its limit is {EARLY_MESSAGES_MAX}" in complaint


def test_what_is_left_of_a_round_is_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Leaks()
    swarm = four(checker)
    groups: list[tuple[Group, Rank]] = []

    class Keeper(Observer):
        def group_began(self, peer: Peer, group: Group, rank: Rank, values: Vector, now: float) -> None:
            groups.append((group, rank))

    swarm.observers.append(Keeper())
    assert average(swarm, checker) == []
    timer, _, reductions, early = (peer.machine for peer in swarm.living())
    monkeypatch.setattr(timer, "next_deadline", lambda: swarm.now + 9.0)
    swarm.living()[1].streams[groups[0][0].group_id] = groups[0]
    reducing, kept = reductions.load(), early.load()
    monkeypatch.setattr(reductions, "load", lambda: replace(reducing, reductions_running=1))
    monkeypatch.setattr(early, "load", lambda: replace(kept, early_messages=2))
    checker.finish(swarm)
    told = [text.partition(" s ")[2] for text in checker.complaints]
    assert told == [
        "p0 is idle and still has a timer: in 9.0 s",
        f"p1 is idle and still has streams of groups: {groups[0][0].group_id.hex()[:8]}",
        "p2 is idle and still has reductions that run: 1",
        "p3 is idle and still has early messages: 2",
    ]


def test_a_spread_that_grows_breaks_contraction_on_a_full_grid() -> None:
    checker = Contraction()
    checker.in_step(1.0, 1.0, 0.2, axes=2, clean=False, full=True)
    checker.in_step(2.0, 0.2, 0.5, axes=2, clean=False, full=False)
    assert checker.complaints == []
    checker.in_step(3.0, 0.5, 0.6, axes=2, clean=False, full=True)
    assert "the spread grew from 5.000e-01 to 6.000e-01" in checker.complaints[0]


def test_a_spread_that_is_left_after_as_many_clean_rounds_as_axes_breaks_contraction() -> None:
    checker = Contraction()
    checker.in_step(1.0, 1.0, 0.3, axes=2, clean=True, full=True)
    checker.in_step(2.0, 0.3, 0.1, axes=2, clean=False, full=True)  # a burst: counted anew
    checker.in_step(3.0, 0.1, 0.02, axes=2, clean=True, full=True)
    assert checker.complaints == []
    checker.in_step(4.0, 0.02, 1e-6, axes=2, clean=True, full=True)
    assert "after 2 fault-free rounds on 2 axes the spread is still 1.000e-06" in checker.complaints[0]


def test_faults_that_nobody_owned_up_to_break_contraction_and_liveness() -> None:
    """The whole workload: it believes that nothing fails, and somebody swallows every Begin."""
    workload = InStep(InStepOptions(peers=4, grid="2x2", averagings_max=3, timeout_s=2.0))
    workload.swarm.swallow = lambda peer, send: isinstance(send.message, Begin)
    complaints = workload.run().complaints
    assert any(text.startswith("contraction: ") and "fault-free rounds" in text for text in complaints)
    assert any(text.startswith("liveness: ") and "had no fault and is not complete" in text for text in complaints)
    assert not any(text.startswith(("agreement: ", "honest receipts: ")) for text in complaints)


def test_a_burst_that_was_owned_up_to_is_forgiven() -> None:
    report = InStep(InStepOptions(peers=4, grid="2x2", averagings_max=6, bursts=(Absence(0, 0.25),))).run()
    assert report.complaints == [] and report.rounds_to_agreement == 3

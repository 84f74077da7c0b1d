"""Step times and spreads of WAGMA-SGD (arXiv 2005.00124) with the real machines on paper, and that their judges can
complain."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from moshpitd.averaging.names import Rank
from moshpitd.averaging.receipt import ContributorLine
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.checkers.wait_avoidance import EqualAfterBarrier, OnceEach, Staleness
from moshpitd.simulation.stragglers import StepsReport, Straggler, Stragglers, StragglersOptions
from moshpitd.simulation.swarm import Ending, Observer, Peer
from tests.simulation.wait_avoiding_storm import Storm

TWO_SLOW = (Straggler(2, 0.32),)
ON_TIME = StragglersOptions(steps=40)


def run(options: StragglersOptions) -> StepsReport:
    report = Stragglers(options).run()
    assert report.complaints == []
    return report


def test_two_of_eight_are_slow_in_every_step() -> None:
    """Base 100 ms, two random ranks +320 ms, S = 2: the algorithm alone takes 420, 320 and 251 ms."""
    options = StragglersOptions(stragglers=TWO_SLOW, steps=60)
    everybody = run(replace(options, averaging="global"))
    groups = run(replace(options, averaging="group"))
    lockstep = run(replace(options, lockstep=True))
    newest = run(options)
    assert everybody.step_ms == pytest.approx(425, rel=0.05)
    assert lockstep.step_ms == pytest.approx(251, rel=0.1)
    assert everybody.step_ms / lockstep.step_ms > 1.6
    assert groups.step_ms / lockstep.step_ms > 1.25
    assert newest.step_ms < lockstep.step_ms, "it skips what late trainers missed"
    assert newest.own_step_ms < 1.1 * lockstep.step_ms, "... and they make their own steps as fast"
    assert lockstep.staleness_max <= 10 and newest.staleness_max <= 10


def test_without_delays_nobody_pays_for_it() -> None:
    taken = {averaging: run(replace(ON_TIME, averaging=averaging)).step_ms for averaging in ("wait-avoiding", "group")}
    assert taken["wait-avoiding"] < 108 and taken["group"] < 110


@pytest.mark.parametrize("barrier_every", [4, 20])
def test_rarer_barriers_are_faster_and_models_older(barrier_every: int) -> None:
    options = StragglersOptions(stragglers=TWO_SLOW, steps=60, lockstep=True, barrier_every=barrier_every)
    report = run(options)
    assert report.staleness_max <= barrier_every
    assert report.step_ms == pytest.approx({4: 289, 20: 232}[barrier_every], rel=0.12)


@pytest.mark.parametrize(("late", "spread"), [(0.0, 0.18), (0.3, 0.2), (0.6, 0.25)])
def test_the_spread_between_peers_stays_flat(late: float, spread: float) -> None:
    """P = 16, S = 4, tau = 10, one step's noise: about .18, .19, .25, and it does not grow with time."""
    options = StragglersOptions(peers=16, group_size=4, on_the_beat=True, late=late, steps=60)
    report = run(options)
    assert report.spread_mean == pytest.approx(spread, abs=0.02)
    between = [each for each in report.spreads[1:] if each > 1e-9]
    half = len(between) // 2
    assert fmean(between[half:]) == pytest.approx(fmean(between[:half]), rel=0.15)


def test_daemons_die_and_every_promise_holds() -> None:
    for seed in range(4):
        options = StragglersOptions(peers=8, steps=40, crash=0.02, barrier_every=5, seed=seed, lockstep=seed % 2 == 1)
        report = run(replace(options, stragglers=(Straggler(1, 0.5),)))
        assert report.looked["untorn posts"] > 100 and report.looked["once each"] > 100


def test_the_same_seed_gives_the_same_run() -> None:
    options = StragglersOptions(peers=4, steps=20, stragglers=(Straggler(1, 0.2),), crash=0.01)
    assert Stragglers(options).run() == Stragglers(options).run()


# ---- the checkers complain


class Endings(Observer):
    """Keeps them, for those who change them before they hand them to a checker."""

    def __init__(self, workload: Stragglers) -> None:
        self.endings: list[tuple[Peer, Ending]] = []
        workload.swarm.observers.append(self)

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        self.endings.append((peer, ending))


@pytest.fixture(scope="module")
def endings() -> list[tuple[Peer, Ending]]:
    workload = Stragglers(StragglersOptions(peers=4, steps=12, barrier_every=3))
    seen = Endings(workload)
    workload.run()
    return seen.endings


def test_a_model_that_is_too_old_is_complained_of(endings: list[tuple[Peer, Ending]]) -> None:
    checker = Staleness(3)
    peer, ending = next((p, e) for p, e in endings if e.told.version and e.told.version.version > 8)
    assert ending.told.version is not None
    old = replace(ending.told.version, contributors=(ContributorLine(peer.id, 1),))
    checker.call_ended(peer, replace(ending, receipt=replace(ending.told, version=old)))
    assert "a model of version 1" in checker.complaints[0]


def test_other_bits_after_a_barrier_are_complained_of(endings: list[tuple[Peer, Ending]]) -> None:
    checker = EqualAfterBarrier()
    barrier = [(p, e) for p, e in endings if e.told.version and e.told.version.kind == "barrier"][:2]
    checker.call_ended(*barrier[0])
    peer, ending = barrier[1]
    checker.call_ended(peer, replace(ending, vector=Vector.of({"w": ending.values + np.float32(1)})))
    assert "hold other bits after barrier" in checker.complaints[0]


class Torn(Observer):
    """Changes what a version reads while it reads it."""

    def group_began(self, peer: Peer, group: object, rank: Rank, values: Vector, now: float) -> None:
        if now > 1.3:
            values.arrays()["w"][0] += 7


def test_a_post_that_changes_while_it_is_read_and_a_version_that_runs_twice_are_complained_of() -> None:
    workload = Stragglers(StragglersOptions(peers=4, steps=6, barrier_every=50))
    workload.swarm.observers.append(Torn())
    report = workload.run()
    assert any("untorn posts" in complaint for complaint in report.complaints)

    workload, seen = Stragglers(StragglersOptions(peers=2, steps=3)), []
    workload.swarm.observers.append(_Groups(seen))
    workload.run()
    checker = OnceEach()
    for _ in range(2):
        peer, group, rank, values, now = seen[-1]
        checker.group_began(peer, group, rank, values, now)
    assert "after version" in checker.complaints[0]


class _Groups(Observer):
    def __init__(self, seen: list) -> None:
        self._seen = seen

    def group_began(self, *what: object) -> None:
        self._seen.append(what)


@pytest.mark.parametrize("seed", [*range(5), 58])
def test_everything_goes_wrong_that_may_and_then_all_are_one_cohort_again(seed: int) -> None:
    """58: a late second group named one of its own members as absent."""
    found = Storm(seed).run()
    assert found.complaints == []
    assert found.looked["staleness"] > 100
    assert found.reunited_s < 30.0

"""Nobody waits, with real daemons: versions, late trainers, deaths between and at barriers, posts never torn."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

import moshpit_client
from moshpit_client import InvalidInput, NoGroup, PreconditionFailed, Receipt
from tests.end_to_end.swarm import (
    DEADLINE_S,
    Peer,
    Swarm,
    Trainer,
    average_all,
    environment,
    error,
    mean,
    random_tensors,
    trainers,
    until,
)

NEVER = 1000
"""As `barrier_every`: after the first there is none in the test."""


PATIENT = """
[cohort]
punctual_share = 1000.0
punctual_max_s = 10.0
"""
"""Whoever has posted by then counts as punctual, however busy this machine is."""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Peer]]:
    """Patient ones."""
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_text(PATIENT)
    with Swarm("--config", str(file)) as swarm:
        yield swarm.start(4)


@pytest.fixture(scope="module")
def hasty() -> Iterator[list[Peer]]:
    with Swarm() as swarm:
        yield swarm.start(4)


def options(name: str, peers: int = 4, barrier_every: int = NEVER, **more: object) -> dict[str, object]:
    chosen = {"averaging": "wait_avoiding", "group_size": 2, "barrier_every": barrier_every, "min_peers": peers}
    return {"name": name, "joining": "contribute", **chosen, **more}


def version(receipt: Receipt) -> moshpit_client.Version:
    assert receipt.version is not None
    return receipt.version


def kinds(receipts: Sequence[Receipt]) -> set[str]:
    return {version(receipt).kind for receipt in receipts}


def cohort(trainer: Trainer) -> moshpit_client.Cohort:
    with trainer.peer.connect() as daemon:
        [session] = [each for each in daemon.status().sessions if each.name == trainer.session.name]
    assert session.cohort is not None
    return session.cohort


def test_all_punctual_the_mean_is_exact_after_two_versions(four: list[Peer]) -> None:
    with trainers(four, random_tensors, **options("exact")) as there:
        assert kinds(average_all(there)) == {"barrier"}
        assert len({trainer.tensors["w"].tobytes() for trainer in there}) == 1
        for index, trainer in enumerate(there):  # a step
            trainer.tensors["w"][:] = random_tensors(10 + index)["w"]
        exact = mean([trainer.tensors["w"].copy() for trainer in there], [1.0] * 4)
        for number in (1, 2):
            receipts = average_all(there)
            assert {version(receipt).version for receipt in receipts} == {number}
            assert all(receipt.fresh and receipt.staleness == 0 for receipt in receipts), receipts
        assert max(error(trainer.tensors["w"], exact) for trainer in there) < 1e-6
        for trainer in there:
            state = cohort(trainer)
            assert (state.members, state.live, state.version, state.barrier) == (4, 4, 2, NEVER)
            assert (state.counts["barrier"], state.counts["fresh"], state.staleness_max) == (1, 2, 0)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_nobody_waits_for_a_late_trainer_and_it_loses_nothing(hasty: list[Peer], shared_memory: bool) -> None:
    name = f"late-{shared_memory}"
    with trainers(hasty, random_tensors, **options(name, shared_memory=shared_memory)) as there:
        average_all(there)
        late, others = there[0], there[1:]
        for _ in range(3):
            receipts = average_all(others)
            assert "barrier" not in kinds(receipts) and max(receipt.seconds.total for receipt in receipts) < 1.0
        until(lambda: cohort(late).version == 3)
        assert cohort(late).counts["passive"] == 3, "its daemon put in its last model"
        old = [each for receipt in receipts for each in version(receipt).contributors if each.peer == late.peer.id]
        assert {each.posted for each in old} == {0}
        late.tensors["w"][:] = 1e3
        receipt = late.average().result(DEADLINE_S)
        assert (version(receipt).kind, receipt.fresh, receipt.staleness) == ("merge", False, 3)
        assert version(receipt).skipped == 2 and version(receipt).version == 3
        # (sum of two models near 0 + its own) / 3
        assert abs(float(np.mean(late.tensors["w"])) - 1e3 / 3) < 10
        explained = late.peer.cli("explain", "last").stdout
        assert "came late for version 3" in explained and "3 versions old" in explained
        assert "cohort of 4" in late.peer.cli("status").stdout
        sessions = late.peer.json("status")["sessions"]
        assert isinstance(sessions, list)
        [shown] = [each["cohort"] for each in sessions if each["name"] == name]
        assert shown["counts"]["merge"] == 1 and shown["staleness_max"] == 3


def test_a_daemon_killed_between_barriers_and_one_at_a_barrier(swarm: Swarm) -> None:
    peers = swarm.start(5)
    with trainers(peers, random_tensors, **options("deaths", peers=5, barrier_every=4, lockstep=True)) as there:
        average_all(there)
        average_all(there)
        peers[0].kill()
        living = there[1:]
        for _ in range(2):
            average_all(living)
        until(lambda: all(cohort(trainer).live == 4 for trainer in living))
        last = living.pop()
        calls = [trainer.average() for trainer in living]  # the barrier: they wait for the last one
        until(lambda: all(state(trainer) in ("gathering", "matching") for trainer in living))
        last.peer.kill()
        receipts = [call.result(DEADLINE_S) for call in calls]
        assert kinds(receipts) == {"barrier"}
        assert all(len(version(receipt).contributors) == 3 for receipt in receipts)
        assert len({trainer.tensors["w"].tobytes() for trainer in living}) == 1
        assert "barrier" not in kinds(average_all(living))


def state(trainer: Trainer) -> str:
    with trainer.peer.connect() as daemon:
        return daemon.status().sessions[0].state


TRAINER = """
import sys
import numpy as np
import moshpit_client
w = np.zeros(2_000_000, np.float32)
chosen = dict(averaging="wait_avoiding", group_size=2, barrier_every=1000, min_peers=2, joining="contribute")
with moshpit_client.connect(sys.argv[1]) as daemon, daemon.open_session({"w": w}, name="torn", **chosen) as session:
    number = float(sys.argv[2])
    while True:
        number += 1
        w[:] = number
        session.average()
"""


@contextlib.contextmanager
def training(peers: Sequence[Peer]) -> Iterator[list[subprocess.Popen[str]]]:
    """A trainer as a process at each; they end with the block."""
    words = [[sys.executable, "-c", TRAINER, str(peer.socket), str(1000 * n)] for n, peer in enumerate(peers)]
    started = [subprocess.Popen(each, env=environment(), stdout=subprocess.DEVNULL) for each in words]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_posts_are_never_torn_and_a_killed_trainer_takes_nothing_along(swarm: Swarm) -> None:
    """Two trainers write one number into all of a vector, as fast as they can, and a third one as slowly as it likes: a
    sum of torn posts would not be one number. One is killed in the midst of it, perhaps while it writes."""
    peers = swarm.start(3)
    w = np.zeros(2_000_000, np.float32)
    chosen = options("torn", peers=2)
    with training(peers[1:]) as processes:
        watcher = Trainer(peers[0], {"w": w}, **chosen)
        try:
            for number in range(1, 25):
                w[:] = 1e6 * number
                receipt = watcher.average().result(DEADLINE_S)
                assert np.ptp(w) == 0.0, receipt
                if number == 12:
                    processes[0].kill()
        finally:
            watcher.close()


# ---- bad input


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({"group_size": 1}, "group size 1: a version adds up 2 to 64 models"),
        ({"group_size": 65, "min_peers": 64}, "group size 65"),
        ({"group_size": None}, "needs group_size"),
        ({"barrier_every": 1025}, "barrier every 1025: must be 1 to 1024"),
        ({"barrier_every": None}, "needs barrier_every"),
        ({"barrier_every": 0}, "barrier_every=0"),
        ({"group_size": 8}, "group size 8 is larger than the first cohort may be, min_peers 4"),
        ({"min_peers": 1}, "group size 2 is larger than the first cohort may be, min_peers 1"),
        ({"min_peers": 65}, "min_peers 65"),
        ({"rounds": 2}, "rounds 2: a version"),
        ({"averaging": "in_step"}, "group_size 2 in a session that averages in step"),
        ({"averaging": "sometimes"}, "give 'in_step' or 'wait_avoiding'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(four: list[Peer], chosen: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        Trainer(four[0], random_tensors(0), **{**options("refused"), **chosen})


def test_weights_epochs_second_trainers_and_too_few_peers_are_refused(four: list[Peer]) -> None:
    first = Trainer(four[0], random_tensors(0), **options("alone"))
    try:
        for wish, why in (({"weight": 2.0}, "all weigh the same"), ({"epoch": 3}, "numbered by the daemons")):
            with pytest.raises(InvalidInput, match=why):
                first.average(**wish).result(DEADLINE_S)  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="a compute budget does not go with wait-avoiding averaging"):
            first.session.compute_budget(micro_batches=4)
        with pytest.raises(PreconditionFailed, match="takes one a daemon"):
            Trainer(four[0], random_tensors(0), **options("alone"))
        with pytest.raises(NoGroup, match="1 of 4 peers here"):
            first.average(timeout=1.0).result(DEADLINE_S)
        assert first.is_untouched()
    finally:
        first.close()


def test_who_avoids_waiting_otherwise_is_told_the_difference(four: list[Peer]) -> None:
    """Groups of two and groups of four: at least one of them hears of it."""
    chosen = [options("mixed", peers=4, group_size=size) for size in (2, 2, 2, 4)]
    there = [Trainer(peer, random_tensors(0), **each) for peer, each in zip(four, chosen, strict=True)]
    try:
        calls = [trainer.average(timeout=5.0) for trainer in there]
        told = [call.exception(DEADLINE_S) for call in calls]
        assert isinstance(told[-1], PreconditionFailed) and "groups of 4" in str(told[-1])
    finally:
        for trainer in there:
            trainer.close()

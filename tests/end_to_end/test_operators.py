"""What an operator sees of a live swarm, as JSON and in words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.end_to_end.swarm import Peer, Swarm, Trainer, average_all, random_tensors, trainers, until


@pytest.fixture(scope="module")
def averaged() -> Iterator[list[Trainer]]:
    """Four sessions on a 2x2 grid after two averagings."""
    with Swarm("--group-size-max", "2") as swarm:
        peers = swarm.start(4)
        with trainers(peers, random_tensors, min_peers=4) as there:
            average_all(there, [1.0, 2.0, 3.0, 4.0])
            average_all(there, [1.0, 2.0, 3.0, 4.0])
            yield there


@pytest.fixture
def peer(averaged: list[Trainer]) -> Peer:
    return averaged[0].peer


def words(peer: Peer, *verb: str) -> str:
    done = peer.cli(*verb)
    assert done.returncode == 0 and done.stderr == "", done
    return done.stdout


def test_status(peer: Peer) -> None:
    status = peer.json("status")
    assert status["ready"] is True and status["peers"] == 3 and status["swarm"] == "test"
    assert status["listen"] == peer.address and len(str(status["peer_id"])) == 64
    assert isinstance(status["sessions"], list)
    (session,) = status["sessions"]
    assert session["grid"] == "2x2" and session["live_sessions"] == 4 and session["epoch"] == 2
    assert session["averagings"] == {"complete": 2} and session["state"] == "idle"
    told = words(peer, "status")
    assert "ready" in told and "3 other peers" in told and "2 complete" in told and "2x2" in told


def test_status_says_that_the_daemon_can_be_dialled(peer: Peer) -> None:
    until(lambda: peer.json("status")["dialable"] is True)


def test_status_tells_what_the_line_carried(swarm: Swarm) -> None:
    peers = swarm.start(2)
    assert peers[0].json("status")["bandwidth"] == {"up_bytes_s": 0.0, "down_bytes_s": 0.0}
    with trainers(peers, lambda seed: {"w": np.full(1 << 20, seed, np.float32)}) as there:
        average_all(there, [1.0, 1.0])
    carried = [peer.json("status")["bandwidth"]["up_bytes_s"] for peer in peers]  # type: ignore[call-overload, index]
    assert min(carried) > 1e6, "it outlives the session"


def test_peers(averaged: list[Trainer], peer: Peer) -> None:
    listed = peer.json("peers")["peers"]
    assert isinstance(listed, list)
    others = [trainer.peer for trainer in averaged[1:]]
    assert {each["peer_id"]: each["address"] for each in listed} == {each.id: each.address for each in others}
    assert {each["state"] for each in listed} == {"live"}
    assert all(each["sessions"] == ["default"] for each in listed)
    told = words(peer, "peers")
    assert all(each.id[:8] in told and each.address in told for each in others)


def test_rounds(peer: Peer) -> None:
    averagings = peer.json("rounds")["averagings"]
    assert isinstance(averagings, list)
    assert [receipt["epoch"] for receipt in averagings] == [1, 0]
    assert [round_["axis"] for round_ in averagings[0]["rounds"]] == [0, 1]
    told = words(peer, "rounds").splitlines()
    assert [line.split()[0] for line in told] == ["round", "1.0", "1.1", "0.0", "0.1"]


def test_explain(averaged: list[Trainer], peer: Peer) -> None:
    told = words(peer, "explain", "last")
    assert "Averaging 1 of session 'default' was complete: this peer and 2 others met on a grid of 2x2" in told
    assert "total weight 10" in told and "Round 1.0" in told and "Round 1.1" in told
    met = [trainer.peer.id[:8] for trainer in averaged[1:] if trainer.peer.id[:8] in told]
    assert len(met) == 2 and "this peer reduced" in told
    assert words(peer, "explain", "0.1").startswith("Round 0.1")
    assert peer.json("explain", "1")["averagings"][0]["receipt"]["epoch"] == 1  # type: ignore[index]
    unknown = peer.cli("explain", "77")
    assert unknown.returncode == 1 and "remembers 0 to 1" in unknown.stderr


def test_id_and_version_and_configuration(peer: Peer) -> None:
    assert words(peer, "id").strip() == peer.json("status")["peer_id"]
    shown = peer.json("config", "show")
    assert {name: shown[name] for name in ("group_size_max", "http")} == {
        "group_size_max": {"value": "2", "source": "flag"},
        "http": {"value": "off", "source": "flag"},
    }
    assert "group_size_max" in words(peer, "config", "show")


def test_a_pinned_grid_that_nobody_can_fill_says_how_many_are_missing(swarm: Swarm) -> None:
    peers = swarm.start(2, "--grid", "2x4")
    with trainers(peers, random_tensors) as there:
        futures = [trainer.average(timeout=3) for trainer in there]
        for trainer, future in zip(there, futures, strict=True):
            complaint = str(future.exception(60))
            assert "2 of 8 peers here, waiting for 6 more (the pinned grid 2x4 has 8 cells)" in complaint
            assert trainer.is_untouched()

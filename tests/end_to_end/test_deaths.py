"""Peers come and go, at any moment. The others are told, and go on."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import moshpit_client
from tests.end_to_end.swarm import (
    Array,
    Peer,
    Process,
    Swarm,
    Trainer,
    average_all,
    error,
    mean,
    random_tensors,
    trainers,
    until,
)

ELEMENTS = 16 << 20
"""64 MB: long enough to be met in the middle."""
REDUCING = r"round \d+\.\d+ reducing: group of"


def large(index: int) -> dict[str, Array]:
    return {"w": np.full(ELEMENTS, 2.0**index, np.float32)}


def settle(there: list[Trainer]) -> None:
    """Average until nobody is new and everybody meets; then all have the values that they began with.

    Sessions open one by one and the plan is made before the last of them is there: that one joins, perhaps late once.
    """
    for _ in range(6):
        if {receipt.outcome for receipt in average_all(there, timeout=5)} == {"complete"}:
            break
    else:
        raise AssertionError("they never all met")
    for trainer in there:
        trainer.tensors["w"][:] = trainer.began_with["w"]


def assert_as_receipt_says(there: list[Trainer], survivors: list[Trainer], receipt: moshpit_client.Receipt) -> None:
    """Each span is the mean of those whom the receipt names, at all survivors the same."""
    began = {trainer.peer.id: trainer.began_with["w"] for trainer in there}
    (round_,) = receipt.rounds
    for span in round_.spans:
        expected = np.mean([began[peer][span.start] for peer in span.contributors])
        for trainer in survivors:
            assert np.allclose(trainer.tensors["w"][span.start : span.stop], expected, rtol=1e-6)


def test_a_daemon_killed_in_the_middle_of_a_round_costs_only_its_share(swarm: Swarm) -> None:
    peers = swarm.start(4)
    with trainers(peers, large, min_peers=3) as there:
        settle(there)
        victim, survivors, dead = there[2], [*there[:2], there[3]], peers[2].id
        said = {trainer: len(trainer.peer.lines) for trainer in there}
        futures = {trainer: trainer.average() for trainer in survivors}
        # One that joined and stands still for a moment: the round cannot end before the victim is dead.
        sleeper = next(
            trainer
            for trainer in survivors
            if trainer.peer.says("matching: (waiting|leads)", said[trainer])[1] == "waiting"
        )
        sleeper.peer.signal(signal.SIGSTOP)
        futures[victim] = victim.average()
        for trainer in (victim, *survivors):
            if trainer is not sleeper:
                trainer.peer.says(REDUCING, said[trainer])
        victim.peer.kill()
        sleeper.peer.signal(signal.SIGCONT)
        with pytest.raises(moshpit_client.DaemonUnreachable, match="moshpitd run"):
            futures[victim].result(60)
        assert victim.is_untouched()
        receipts = [futures[trainer].result(60) for trainer in survivors]
        assert {receipt.outcome for receipt in receipts} == {"partial"}
        assert {tuple(dropped.peer for dropped in receipt.rounds[0].dropped) for receipt in receipts} == {(dead,)}
        assert all(dead[:8] in receipt.why for receipt in receipts)
        assert len({(receipt.rounds[0].group_id, receipt.digest) for receipt in receipts}) == 1
        assert_as_receipt_says(there, survivors, receipts[0])
        for trainer in survivors:
            trainer.tensors["w"][:] = trainer.began_with["w"]
        again = average_all(survivors)
        assert {(receipt.outcome, len(receipt.peers)) for receipt in again} == {("complete", 2)}
        assert {trainer.tensors["w"][-1] for trainer in survivors} == {np.float32((1 + 2 + 8) / 3)}


def test_a_daemon_that_stands_still_is_left_out_and_comes_back(swarm: Swarm) -> None:
    peers = swarm.start(4)
    with trainers(peers, large, min_peers=3) as there:
        settle(there)
        frozen, said = peers[1].id, [len(peer.lines) for peer in peers]
        futures = [trainer.average() for trainer in there]
        for peer, lines in zip(peers, said, strict=True):
            peer.says(REDUCING, lines)
        peers[1].signal(signal.SIGSTOP)
        receipts = [futures[index].result(60) for index in (0, 2, 3)]
        assert {receipt.outcome for receipt in receipts} == {"partial"}
        assert {dropped.peer for receipt in receipts for dropped in receipt.rounds[0].dropped} == {frozen}
        assert all("not heard from" in receipt.why or "no progress" in receipt.why for receipt in receipts), receipts
        assert_as_receipt_says(there, [there[0], *there[2:]], receipts[0])
        peers[1].signal(signal.SIGCONT)
        assert futures[1].result(60).outcome in ("alone", "partial")
        # The others may have gone on without it, once; then it is in time again.
        outcomes = {receipt.outcome for receipt in average_all(there, timeout=10)}
        if outcomes != {"complete"}:
            outcomes = {receipt.outcome for receipt in average_all(there, timeout=10)}
        assert outcomes == {"complete"}
        assert len({trainer.tensors["w"].tobytes() for trainer in there}) == 1


def test_a_daemon_killed_between_averagings_is_not_waited_for(swarm: Swarm) -> None:
    peers = swarm.start(4)
    with trainers(peers, random_tensors, min_peers=3) as there:
        settle(there)
        peers[3].kill()
        receipts = average_all(there[:3], timeout=20)
        assert {len(receipt.peers) for receipt in receipts} == {2}
        assert all(receipt.seconds.total < 10 for receipt in receipts)
        assert {receipt.outcome for receipt in average_all(there[:3])} == {"complete"}


def test_a_grid_goes_on_when_one_of_its_peers_is_killed(swarm: Swarm) -> None:
    """Sessions that open one by one outgrow their first plan; whoever dies leaves a hole that the next plan closes."""
    peers = swarm.start(6, "--group-size-max", "3")
    with trainers(peers, random_tensors, min_peers=5) as there:
        settle(there)
        peers[4].kill()
        left = [trainer for trainer in there if trainer.peer is not peers[4]]
        for _ in range(5):
            receipts = average_all(left, timeout=20)
            assert {receipt.outcome for receipt in receipts} <= {"complete", "partial"}
        for index, trainer in enumerate(left):
            trainer.tensors["w"][:] = random_tensors(20 + index)["w"]
        values = [trainer.tensors["w"].copy() for trainer in left]
        assert {receipt.outcome for receipt in average_all(left)} == {"complete"}
        expected = mean(values, [1.0] * 5)
        assert max(error(trainer.tensors["w"], expected) for trainer in left) < 1e-6


def test_the_first_member_may_die_and_newcomers_join_through_another(swarm: Swarm) -> None:
    first, *others = swarm.start(3)
    first.kill()
    (newcomer,) = swarm.start(join=others[1])
    peers = [*others, newcomer]
    with trainers(peers, random_tensors, min_peers=3) as there:
        receipts = average_all(there)
        assert {receipt.outcome for receipt in receipts} == {"complete"}
        expected = mean([trainer.began_with["w"] for trainer in there], [1.0] * 3)
        assert max(error(trainer.tensors["w"], expected) for trainer in there) < 1e-6


def test_a_restarted_daemon_is_the_same_peer_and_takes_part_again(swarm: Swarm) -> None:
    peers = swarm.start(3)
    with trainers(peers, random_tensors, min_peers=3) as there:
        average_all(there)
        before = peers[2].id
        peers[2].kill()
        (again,) = swarm.start(home=peers[2].home)
        assert again.id == before
        back = Trainer(again, random_tensors(7), min_peers=3)
        try:
            together = [there[0], there[1], back]
            # It has forgotten the count, so the others may go on without it once; then it is in time.
            receipts = average_all(together, timeout=10)
            if {len(receipt.peers) for receipt in receipts} != {2}:
                receipts = average_all(together, timeout=10)
            assert {(receipt.outcome, len(receipt.peers)) for receipt in receipts} == {("complete", 2)}
            assert len({trainer.tensors["w"].tobytes() for trainer in together}) == 1
        finally:
            back.close()


def test_a_restarted_daemon_finds_its_swarm_without_being_told_where(swarm: Swarm) -> None:
    """It remembers peers in its data directory."""
    peers = swarm.start(3)
    ports = [peer.address.rpartition(":")[2] for peer in peers[1:]]
    until(lambda: all(port in read(peers[0].data / "peers") for port in ports))
    peers[0].kill()
    again = Peer(peers[0].home, swarm="test", join=[])
    swarm.peers.append(again)
    again.is_ready()
    until(lambda: again.json("status")["peers"] == 2)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_sigterm_lets_the_running_round_finish_and_exits_0(swarm: Swarm) -> None:
    peers = swarm.start(3)
    with trainers(peers, large, min_peers=3) as there:
        futures = [trainer.average() for trainer in there]
        peers[1].says(REDUCING)
        peers[1].signal(signal.SIGTERM)
        receipts = [future.result(60) for future in futures]
        assert {receipt.outcome for receipt in receipts} == {"complete"}
        assert {trainer.tensors["w"][0] for trainer in there} == {np.float32(7 / 3)}
        assert peers[1].ends() == 0
        with pytest.raises(moshpit_client.DaemonUnreachable):
            there[1].average().result(60)


def test_the_others_do_not_wait_for_one_that_left(swarm: Swarm) -> None:
    peers = swarm.start(4)
    with trainers(peers, random_tensors, min_peers=3) as there:
        settle(there)
        peers[0].signal(signal.SIGTERM)
        assert peers[0].ends() == 0
        receipts = average_all(there[1:])
        assert {(receipt.outcome, len(receipt.peers)) for receipt in receipts} == {("complete", 2)}


@pytest.mark.parametrize("moment", ["open", "reducing"])
def test_a_trainer_killed_in_its_call_does_not_hurt_the_others(swarm: Swarm, moment: str) -> None:
    """In the middle of a round its daemon finishes for the others; before one it is left out."""
    peers = swarm.start(3)
    together = 2 if moment == "open" else 3
    doomed = Process("tests.end_to_end.trainer", str(peers[2].socket), "default", str(ELEMENTS), str(together))
    try:
        doomed.says("^open$")
        if moment == "open":
            until(lambda: sessions(peers[2])[0]["state"] == "gathering")
            doomed.kill()
        with trainers(peers[:2], large, min_peers=together) as there:
            futures = [trainer.average() for trainer in there]
            if moment == "reducing":
                peers[2].says(REDUCING)
                doomed.kill()
            receipts = [future.result(60) for future in futures]
            met = 1 if moment == "open" else 2
            assert {(receipt.outcome, len(receipt.peers)) for receipt in receipts} == {("complete", met)}
            until(lambda: not sessions(peers[2]))
    finally:
        doomed.kill()


def sessions(peer: Peer) -> list[dict[str, object]]:
    listed = peer.json("status")["sessions"]
    assert isinstance(listed, list)
    return listed


def test_an_interrupted_command_leaves_its_files_and_the_swarm(swarm: Swarm, tmp_path: Path) -> None:
    """Ctrl+C while waiting: exit 130, nothing written, the session is gone."""
    (peer,) = swarm.start()
    path = tmp_path / "in.safetensors"
    save_file({"w": np.ones(3, np.float32)}, path)
    command = peer.cli_start("average", path, "-o", path, "--min-peers", "2")
    until(lambda: bool(sessions(peer)))
    command.send_signal(signal.SIGINT)
    _, complaint = command.communicate(timeout=30)
    assert command.returncode == 130 and "Traceback" not in complaint
    until(lambda: not sessions(peer))
    assert list(path.parent.iterdir()) == [path]

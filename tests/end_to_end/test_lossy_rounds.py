"""Lossy rounds between real daemons: nothing lost, a tenth lost by the kernel, and no datagram passing at all."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.end_to_end.swarm import (
    DEADLINE_S,
    Array,
    Peer,
    Swarm,
    average_all,
    error,
    finish,
    mean,
    random_tensors,
    trainers,
)

ELEMENTS = 300_000
LOSSES = "tests.end_to_end.lossy_daemon"


@pytest.fixture(scope="module")
def four() -> Iterator[list[Peer]]:
    with Swarm() as swarm:
        yield swarm.start(4)


@pytest.fixture(scope="module")
def lossy_four() -> Iterator[list[Peer]]:
    with Swarm(launcher=(LOSSES, "0.1")) as swarm:
        yield swarm.start(4)


def whole_numbers(index: int) -> dict[str, Array]:
    """Whose mean over four is exact, in whatever order they are added."""
    return {"w": np.random.default_rng(index).integers(-4000, 4000, ELEMENTS).astype(np.float32)}


def test_a_lossy_round_that_loses_nothing_is_a_reliable_one_to_the_bit(four: list[Peer]) -> None:
    results: dict[str, Array] = {}
    for transport in ("reliable", "lossy"):
        with trainers(four, whole_numbers, name=transport, min_peers=4, transport=transport) as there:
            receipts = average_all(there)
            assert {receipt.outcome for receipt in receipts} == {"complete"}, [r.why for r in receipts]
            for trainer in there:
                assert np.array_equal(trainer.tensors["w"], there[0].tensors["w"])
            results[transport] = there[0].tensors["w"].copy()
    assert np.array_equal(results["lossy"], results["reliable"])
    for receipt in receipts:
        for round_ in receipt.rounds:
            assert round_.transport == "lossy"
            assert round_.digest == ""
            assert round_.lossy is not None
            assert round_.lossy.stale == ()
            assert {link.transport for link in round_.links} == {"udp"}
            assert sum(link.lost for link in round_.lossy.links) == 0


def test_a_tenth_of_the_packets_lost_is_a_lossy_mean_that_all_nearly_hold(lossy_four: list[Peer]) -> None:
    expected = mean([random_tensors(i, ELEMENTS)["w"] for i in range(4)], [1.0] * 4)
    with trainers(
        lossy_four, lambda i: random_tensors(i, ELEMENTS), min_peers=4, transport="lossy", reliable_every=3
    ) as there:
        off: list[float] = []
        for number in range(3):
            receipts = average_all(there)
            assert {receipt.outcome for receipt in receipts} == {"complete"}, [r.why for r in receipts]
            off.append(max(error(trainer.tensors["w"], expected) for trainer in there))
            lossy = [round_.lossy for receipt in receipts for round_ in receipt.rounds]
            if number < 2:
                links = [link for each in lossy if each for link in each.links]
                share = sum(link.lost for link in links) / sum(link.sent for link in links)
                assert 0.05 < share < 0.16
                assert not any(link.blocked for link in links)
                assert all(each and each.stale_elements for each in lossy)
            else:
                assert lossy == [None] * len(lossy)
        assert all(np.array_equal(trainer.tensors["w"], there[0].tensors["w"]) for trainer in there)
    assert off[0] > off[1]


def test_the_command_line_averages_files_lossy_and_explains_it(four: list[Peer], tmp_path: Path) -> None:
    started = []
    for index, peer in enumerate(four[:3]):
        source = tmp_path / f"{index}.safetensors"
        save_file(whole_numbers(index), source)
        words = ("average", source, "-o", tmp_path / f"{index}.out", "--transport", "lossy", "--min-peers", "3")
        started.append(peer.cli_start(*words, "--name", "files", "--json"))
    receipts = [json.loads(finish(each).stdout) for each in started]
    results = [load_file(tmp_path / f"{index}.out")["w"] for index in range(3)]
    assert error(results[0], mean([whole_numbers(i)["w"] for i in range(3)], [1.0] * 3)) < 1e-6
    for receipt, result in zip(receipts, results, strict=True):
        assert receipt["outcome"] == "complete", receipt["why"]
        assert np.array_equal(result, results[0])
        (round_,) = receipt["rounds"]
        assert round_["transport"] == "lossy"
        assert round_["lossy"]["stale"] == []
        assert len(round_["lossy"]["links"]) == 2
    told = four[0].cli("explain", "last").stdout
    assert "by lossy packets in float32" in told
    assert "Why this way: lossy as asked for" in told
    assert "Nothing on its way to this peer was lost" in told


def test_firewalls_that_drop_every_datagram_cost_one_slow_round() -> None:
    with Swarm(launcher=(LOSSES, "1.0")) as swarm:
        peers = swarm.start(3)
        with trainers(peers, whole_numbers, min_peers=3, transport="lossy") as there:
            first, second = average_all(there), average_all(there)
        for receipt in first:
            assert receipt.outcome == "complete", receipt.why
            (round_,) = receipt.rounds
            assert round_.lossy is not None
            assert all(link.blocked for link in round_.lossy.links)
            assert {link.transport for link in round_.links} == {"tcp"}
            assert round_.seconds.reduce < 10
        for receipt in second:
            (round_,) = receipt.rounds
            assert (round_.transport, round_.lossy) == ("tcp", None)
            assert "no datagram passes between 3 of 3 pairs of members" in round_.transport_why
        assert all(np.array_equal(trainer.tensors["w"], there[0].tensors["w"]) for trainer in there)
        assert "No datagram passed between" in peers[0].cli("explain", str(first[0].epoch)).stdout


def test_one_member_behind_a_firewall_is_reached_over_streams(four: list[Peer]) -> None:
    with Swarm(launcher=(LOSSES, "1.0")) as walled:
        (outside,) = walled.start(1, join=four[0])
        there_too = [*four[:2], outside]
        with trainers(there_too, whole_numbers, name="wall", min_peers=3, transport="lossy") as there:
            for _ in range(2):
                receipts = average_all(there)
                for peer, receipt in zip(there_too, receipts, strict=True):
                    assert receipt.outcome == "complete", receipt.why
                    (round_,) = receipt.rounds
                    assert round_.lossy is not None or "pairs of members" in round_.transport_why
                    if round_.lossy is not None:
                        blocked = {link.peer for link in round_.lossy.links if link.blocked}
                        assert blocked == ({p.id for p in four[:2]} if peer is outside else {outside.id})
            assert error(there[0].tensors["w"], mean([t.began_with["w"] for t in there], [1.0] * 3)) < 1e-6


def test_one_that_stands_still_or_dies_in_a_lossy_round_holds_nobody_up_for_long() -> None:
    def large(index: int) -> dict[str, Array]:
        return {"w": np.full(1_000_000, index, np.float32)}

    with Swarm(launcher=(LOSSES, "0.05")) as swarm:
        peers = swarm.start(4)
        with trainers(peers, large, min_peers=2, transport="lossy", reliable_every=1000) as there:
            for _ in range(3):
                average_all(there)
            for number in (signal.SIGSTOP, signal.SIGKILL):
                seen = [len(peer.lines) for peer in peers]
                futures = [trainer.average() for trainer in there]
                for peer, lines in zip(peers, seen, strict=True):
                    peer.says("reducing, lossy", lines)
                peers[3].signal(number)
                receipts = [future.result(DEADLINE_S) for future in futures[:3]]
                for receipt in receipts:
                    assert receipt.outcome in ("partial", "complete")
                    assert receipt.seconds.reduce < 20
                peers[3].signal(signal.SIGCONT)
                if number is signal.SIGSTOP:
                    futures[3].result(DEADLINE_S)
                else:
                    assert futures[3].exception(DEADLINE_S) is not None
            receipts = average_all(there[:3])
            assert {receipt.outcome for receipt in receipts} <= {"complete", "partial"}
            assert all(np.isfinite(trainer.tensors["w"]).all() for trainer in there[:3])

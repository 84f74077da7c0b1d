"""Lossy rounds between real daemons: nothing lost, a tenth lost by the kernel, and no datagram passing at all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.end_to_end.swarm import Array, Peer, Swarm, average_all, error, mean, random_tensors, trainers

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

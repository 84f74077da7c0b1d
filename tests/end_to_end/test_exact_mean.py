"""What the swarm is for: the exact weighted mean, whatever the grid."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from moshpit_client import Receipt
from tests.end_to_end.swarm import Peer, Swarm, Trainer, average_all, error, mean, random_tensors, trainers


@pytest.fixture(scope="module")
def thirteen() -> Iterator[list[Peer]]:
    """With groups of at most 4."""
    with Swarm("--group-size-max", "4") as swarm:
        yield swarm.start(13)


@pytest.fixture(scope="module")
def eight() -> Iterator[list[Peer]]:
    """As they come."""
    with Swarm() as swarm:
        yield swarm.start(8)


def weights_of(count: int) -> list[float]:
    return [1.0 + (7 * index) % 5 for index in range(count)]


def assert_exact(there: list[Trainer], receipts: list[Receipt], weights: list[float], *, same_bits: bool) -> None:
    expected = mean([trainer.began_with["w"] for trainer in there], weights)
    assert max(error(trainer.tensors["w"], expected) for trainer in there) < 1e-6
    assert {receipt.outcome for receipt in receipts} == {"complete"}
    assert [receipt.weight_total for receipt in receipts] == pytest.approx([sum(weights)] * len(there))
    bits = {trainer.tensors["w"].tobytes() for trainer in there}
    digests = {receipt.digest for receipt in receipts}
    assert len(bits) == len(digests)
    if same_bits:
        assert len(bits) == 1


@pytest.mark.parametrize(
    ("count", "grid", "rounds"), [(12, "3x4", 2), (7, "2x3", 2), (13, None, 2)], ids=["12", "7", "13"]
)
def test_with_groups_of_four_every_peer_ends_with_the_exact_mean_and_the_same_bits(
    thirteen: list[Peer], count: int, grid: str | None, rounds: int
) -> None:
    weights = weights_of(count)
    with trainers(thirteen[:count], random_tensors, name=f"exact-{count}", min_peers=count) as there:
        receipts = average_all(there, weights)
        assert_exact(there, receipts, weights, same_bits=True)
    assert {len(receipt.rounds) for receipt in receipts} == {rounds}
    assert len({receipt.grid for receipt in receipts}) == 1
    if grid is not None:
        assert receipts[0].grid == grid
    assert max(len(round_.members) for receipt in receipts for round_ in receipt.rounds) <= 5


def test_seven_fit_into_one_flat_group_and_need_one_round(eight: list[Peer]) -> None:
    weights = weights_of(7)
    with trainers(eight[:7], random_tensors, name="flat", min_peers=7) as there:
        receipts = average_all(there, weights)
        assert_exact(there, receipts, weights, same_bits=True)
    assert {(receipt.grid, len(receipt.rounds), len(receipt.peers)) for receipt in receipts} == {("7", 1, 6)}


def test_eight_pinned_to_two_by_four(swarm: Swarm) -> None:
    weights = weights_of(8)
    with trainers(swarm.start(8, "--grid", "2x4"), random_tensors, min_peers=8) as there:
        receipts = average_all(there, weights)
        assert_exact(there, receipts, weights, same_bits=True)
    assert {(receipt.grid, len(receipt.rounds)) for receipt in receipts} == {("2x4", 2)}
    assert {len(round_.members) for receipt in receipts for round_ in receipt.rounds} == {2, 4}


def test_averaging_after_averaging_stays_exact_and_counts(thirteen: list[Peer]) -> None:
    count = 12
    with trainers(thirteen[:count], random_tensors, name="again", min_peers=count) as there:
        for epoch in range(4):
            for index, trainer in enumerate(there):
                trainer.tensors["w"][:] = random_tensors(100 * epoch + index)["w"]
            values = [trainer.tensors["w"].copy() for trainer in there]
            receipts = average_all(there, weights_of(count))
            assert {(receipt.outcome, receipt.epoch) for receipt in receipts} == {("complete", epoch)}
            expected = mean(values, weights_of(count))
            assert max(error(trainer.tensors["w"], expected) for trainer in there) < 1e-6


def test_one_round_averages_along_one_axis_and_the_axes_alternate(thirteen: list[Peer]) -> None:
    """So two averagings of one round with the same values are one averaging of two."""
    count = 12
    with trainers(thirteen[:count], random_tensors, name="one-round", min_peers=count, rounds=1) as there:
        first = average_all(there)
        groups = {receipt.rounds[0].group_id for receipt in first}
        assert len(groups) > 1 and {len(receipt.rounds) for receipt in first} == {1}
        for trainer, receipt in zip(there, first, strict=True):
            met = [other for other in there if other.peer.id in {trainer.peer.id, *receipt.peers}]
            expected = mean([other.began_with["w"] for other in met], [1.0] * len(met))
            assert error(trainer.tensors["w"], expected) < 1e-6
        second = average_all(there)
        assert {receipt.rounds[0].axis for receipt in second}.isdisjoint(receipt.rounds[0].axis for receipt in first)
        expected = mean([trainer.began_with["w"] for trainer in there], [1.0] * count)
        assert max(error(trainer.tensors["w"], expected) for trainer in there) < 1e-6


def test_the_exact_mean_also_of_tiny_vectors(eight: list[Peer]) -> None:
    """Fewer elements than members: most of them reduce nothing."""
    with trainers(eight, lambda i: {"w": np.array([i], np.float32)}, name="tiny", min_peers=8) as there:
        average_all(there)
        assert [trainer.tensors["w"].item() for trainer in there] == [3.5] * 8

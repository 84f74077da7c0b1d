"""Lost packets, and the checkers that judge what becomes of rounds that lose them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moshpitd.averaging.lossy_reduce import Paths
from moshpitd.averaging.unbiased import Heard, estimate
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.checkers import Drift, Unbiasedness
from moshpitd.simulation.checkers.drift import drift_from_owner
from moshpitd.simulation.packet_loss import LossModel, PacketLoss
from tests.averaging.group_on_paper import flat, group_of, normal_vectors, peer
from tests.averaging.lossy_on_paper import LossyGroupOnPaper

ONE, OTHER = peer(1), peer(2)


@pytest.mark.parametrize("loss", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("length", [1.5, 8.0, 40.0])
def test_bursts_are_as_long_and_as_many_as_asked(loss: float, length: float) -> None:
    model = LossModel.bursts(loss, length=length)
    fates = PacketLoss(model, random.Random(1))
    arrived = np.array([fates.arrives(ONE, OTHER) for _ in range(200_000)])
    assert model.loss == pytest.approx(loss)
    assert fates.lost / fates.packets == pytest.approx(loss, rel=0.25)
    begins = np.count_nonzero(~arrived[1:] & arrived[:-1])
    assert fates.lost / begins == pytest.approx(length, rel=0.15)


def test_links_lose_each_on_their_own() -> None:
    fates = PacketLoss(LossModel(), random.Random(1), {(ONE, OTHER): LossModel.even(0.5)})
    assert all(fates.arrives(OTHER, ONE) for _ in range(1000))
    assert 400 < sum(fates.arrives(ONE, OTHER) for _ in range(1000)) < 600


@pytest.mark.parametrize("naive", [False, True])
def test_the_checker_of_unbiasedness_tells_the_naive_mean_from_ours(naive: bool) -> None:
    rng, checker = np.random.default_rng(1), Unbiasedness()
    weights = np.ones(8)
    for _ in range(200):
        inputs = rng.standard_normal((8, 400)).astype(np.float32)
        arrived = rng.random((8, 40)) >= 0.1
        arrived[3] = True
        if naive:
            heard = arrived.repeat(10, axis=1)
            result = (inputs * heard).sum(axis=0) / heard.sum(axis=0)
        else:
            result, _ = estimate([Heard(r, 1 / 16, 0.1, inputs[r], arrived[r]) for r in range(8)], 3, range_elements=10)
        checker.judge(inputs.astype(np.float64), weights, 3, result.astype(np.float64))
    checker.verdict(1.0)
    assert bool(checker.complaints) is naive, checker.lean


@pytest.mark.parametrize(
    ("loss", "lean"),
    [(LossModel.even(0.2), 0.008), (LossModel.bursts(0.2, length=6.0), 0.02)],
    ids=["evenly lost", "lost in bursts"],
)
def test_whole_rounds_do_not_lean_over_unequal_links(loss: LossModel, lean: float) -> None:
    """One link of each owner is far worse than the others; the paths are learnt on the way. In bursts, counts of
    packets say less: six lost in a row are one event."""
    checker, paths = Unbiasedness(), [Paths() for _ in range(5)]
    bad = {(sender, (sender + 1) % 5): LossModel.even(0.5) for sender in range(5)}
    for seed in range(24):
        values = normal_vectors(5, 20 * 4096, seed=seed)
        paper = LossyGroupOnPaper(group_of(values), values, loss=loss, losses=bad, seed=seed, paths=paths).run()
        paper.check_promises()
        rows = np.stack([flat(vector) for vector in values])
        for rank in range(5):
            span = slice(paper.group.spans[rank], paper.group.spans[rank + 1])
            if seed >= 3:  # by then links are known
                checker.judge(rows[:, span], np.ones(5), rank, paper.result(rank)[span])
    found, error = checker.lean
    assert abs(found) < lean + 3 * error
    assert error < 0.01


def drift(loss: float, *, increments: bool) -> Drift:
    rng, checker = np.random.default_rng(2), Drift(drift_from_owner(loss))
    owner, held = np.zeros(4000), np.zeros((2, 4000))
    for step in range(400):
        moved = rng.standard_normal(4000)
        owner += moved
        arrived = rng.random((2, 4000)) >= loss
        held = held + arrived * moved if increments else np.where(arrived, owner, held)
        checker.in_step(float(step), float(((held[0] - held[1]) ** 2).mean()), 1.0)
    return checker


def test_the_checker_of_drift_tells_increments_from_absolute_values() -> None:
    assert drift(0.2, increments=False).complaints == []
    assert any("grows" in complaint for complaint in drift(0.2, increments=True).complaints)


def test_drift_from_a_fixed_owner_is_the_tables() -> None:
    assert [round(drift_from_owner(loss), 3) for loss in (0.1, 0.2, 0.4)] == [0.202, 0.417, 0.952]


def test_a_group_of_machines_that_loses_in_bursts_does_not_drift_apart() -> None:
    rng, checker = np.random.default_rng(3), Drift()
    held = [np.zeros(8 * 4096, np.float32) for _ in range(4)]
    for step in range(80):
        vectors = [Vector.of({"w": each + rng.standard_normal(len(each), np.float32)}) for each in held]
        paper = LossyGroupOnPaper(group_of(vectors), vectors, loss=LossModel.bursts(0.1, length=5), seed=step).run()
        held = [result.arrays()["w"] for result in paper.results]
        checker.in_step(float(step), paper.spread, 1.0)
    assert checker.complaints == [] and checker.looked == 80

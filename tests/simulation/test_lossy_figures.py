"""What lossy rounds are worth on paper: the figures are the table's, their controls fail."""

from __future__ import annotations

import numpy as np
import pytest

from moshpitd.averaging.lossy_reduce import Part, State
from moshpitd.averaging.vector import Layout, TensorSpec, Vector
from moshpitd.simulation.lossy_figures import bias, drift_from_owner, drift_of_group, least_noise
from moshpitd.simulation.lossy_rounds import LossyRounds

EQUAL = [1.0] * 8


def test_estimates_lean_no_more_than_chance_and_the_naive_mean_does() -> None:
    found = bias([0.2] * 7, EQUAL, mean=0.5, spread=1.0, rounds=2, seed=3)
    assert found.trials == 8192
    assert found.bias < 1.5 * found.floor < 0.006
    assert found.naive == pytest.approx(0.055, rel=0.1)


@pytest.mark.parametrize(("loss", "least"), [(0.1, 0.1197), (0.2, 0.1809), (0.4, 0.3008)])
def test_ours_scatters_a_little_more_than_the_best_rule_there_is(loss: float, least: float) -> None:
    """4 % more where two fifths are lost: the price of not having to know how much is."""
    assert least_noise(loss) == pytest.approx(least, abs=1e-4)
    found = bias([loss] * 7, EQUAL, mean=1.0, spread=0.01, rounds=8, seed=3)
    assert 0.99 * least_noise(loss) < found.noise < 1.06 * least_noise(loss), (
        "1 % is what chance shows in so many trials"
    )


def test_drift_is_bounded_and_increments_drift_for_ever() -> None:
    bounded = drift_from_owner(0.2, steps=4000, seed=1)
    assert bounded.drift == pytest.approx(0.417, rel=0.03)
    assert abs(bounded.growth) < 4 * bounded.growth_error < 0.2
    assert drift_from_owner(0.2, steps=4000, seed=1, increments=True).growth > 1
    assert drift_of_group(0.2, steps=600, seed=1).drift == pytest.approx(0.398, rel=0.05)


@pytest.mark.parametrize("codec", ["float32", "flash4"])
def test_a_group_without_loss_ends_with_the_same_bits_and_with_loss_within_the_spread(codec: str) -> None:
    rng = np.random.default_rng(1)
    layout = Layout.of([TensorSpec("w", (400_000,), "float32")])
    values = [Vector.of({"w": rng.standard_normal(400_000, np.float32)}) for _ in range(4)]
    results = [Vector.empty(layout) for _ in range(4)]
    machines = LossyRounds(layout, 4, 0.0, rng, codec=codec).play(values, results)
    assert all(machine.is_complete and not machine.stale() for machine in machines)
    assert len({result.buffer.tobytes() for result in results}) == 1

    lossy = LossyRounds(layout, 4, 0.3, rng, codec=codec)
    machines = lossy.play(values, results)
    assert {machine.state for machine in machines} == {State.COMMITTED}
    assert lossy.lost / lossy.packets == pytest.approx(0.3, abs=0.05)
    assert any(machine.repaired for machine in machines) and not any(machine.unrepaired for machine in machines)
    assert len({result.buffer.tobytes() for result in results}) == 4


def test_one_owner_may_reduce_all_and_keep_it() -> None:
    rng = np.random.default_rng(1)
    layout = Layout.of([TensorSpec("w", (10_000,), "float32")])
    values = [Vector.of({"w": np.full(10_000, rank, np.float32)}) for rank in range(3)]
    results = [Vector.zeros(layout) for _ in range(3)]
    LossyRounds(layout, 3, 0.0, rng, one_owner=True, weights=[1.0, 2.0, 1.0]).play(values, results, part=Part.SCATTER)
    assert [float(result.arrays()["w"].mean()) for result in results] == [1.0, 0.0, 0.0]

"""Sessions average on paper: exactly when nothing fails, honestly when something does, and never past a deadline."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from moshpitd.averaging.errors import InvalidInput, NoGroup, Precondition, SessionError, Unavailable
from moshpitd.averaging.grid import decider
from moshpitd.averaging.messages import PlanNotice
from moshpitd.averaging.receipt import Outcome, Receipt
from moshpitd.averaging.session import Call, SessionConfig
from moshpitd.averaging.vector import Vector
from tests.averaging.swarm_on_paper import Array, Ending, Peer, Swarm, Weather, options_for

ELEMENTS = 2 * 4096 + 17
SLOW = Weather(message=(0.001, 0.08), dial=(0.01, 0.2), directory=(0.02, 0.6), stale_s=1.0, noticed=(0.01, 1.0))
LAN = Weather()
SMALL = SessionConfig(chunk_bytes=1 << 14, group_size_max=4)


def values(rng: np.random.Generator, dtype: str = "float32") -> Array:
    return rng.normal(size=ELEMENTS).astype(dtype)


def packed(array: Array) -> Vector:
    return Vector.of({"w": array})


def mean_of(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    """The dumb twin: float64 all the way."""
    total = sum(weight * array.astype(np.float64) for array, weight in zip(arrays, weights, strict=True))
    assert isinstance(total, np.ndarray)
    return total / sum(weights)


def relative_error(result: Array, expected: Array) -> float:
    return float(np.max(np.abs(result - expected)) / np.max(np.abs(expected)))


def swarm_of(
    n: int,
    *,
    seed: int = 0,
    weather: Weather = LAN,
    config: SessionConfig = SMALL,
    **chosen: object,
) -> tuple[Swarm, list[Peer]]:
    """n sessions that wait for each other, so that the first plan is made for all of them."""
    swarm = Swarm(seed, weather, config)
    options = options_for(np.zeros(ELEMENTS, np.float32), **{"min_peers": n, **chosen})
    return swarm, [swarm.open(f"p{number}", options) for number in range(n)]


@dataclass(frozen=True)
class Story:
    """One averaging of a swarm on paper: what each gave, how each ended."""

    given: dict[Peer, tuple[Array, float]]
    endings: dict[Peer, Ending]

    @property
    def receipts(self) -> dict[Peer, Receipt]:
        return {peer: ending.told for peer, ending in self.endings.items()}

    def error_against(self, givers: Sequence[Peer]) -> float:
        """The largest relative error of any result against the weighted mean of these."""
        expected = mean_of([self.given[p][0] for p in givers], [self.given[p][1] for p in givers])
        return max(relative_error(ending.values, expected) for ending in self.endings.values())

    def is_exact(self) -> bool:
        everybody = list(self.given)
        whole = all(r.outcome is Outcome.COMPLETE for r in self.receipts.values())
        return whole and self.error_against(everybody) < 1e-6


def average(
    swarm: Swarm,
    peers: Sequence[Peer],
    *,
    timeout_s: float = 20.0,
    epoch: int | None = None,
    weights: Sequence[float] | None = None,
    apart_s: float = 0.01,
) -> Story:
    rng = np.random.default_rng(swarm.rng.getrandbits(32))
    drawn = weights or [float(rng.uniform(0.5, 3.0)) for _ in peers]
    given = {peer: (values(rng), weight) for peer, weight in zip(peers, drawn, strict=True)}
    calls = {peer: (packed(a), Call(weight=w, timeout_s=timeout_s, epoch=epoch)) for peer, (a, w) in given.items()}
    return Story(given, swarm.average(calls, apart_s=apart_s, limit_s=timeout_s + 1.0))


# ---- exactness


@pytest.mark.parametrize("n", [2, 3, 7, 8, 12, 13])
@pytest.mark.parametrize("weather", [LAN, SLOW], ids=["lan", "slow"])
def test_a_fault_free_swarm_averages_exactly_from_its_first_averaging_on(n: int, weather: Weather) -> None:
    swarm, peers = swarm_of(n, seed=n, weather=weather)

    for k in range(4):
        story = average(swarm, peers)

        assert {r.epoch for r in story.receipts.values()} == {k}
        assert {r.outcome for r in story.receipts.values()} == {Outcome.COMPLETE}
        assert story.error_against(peers) < 1e-6
        assert len({ending.values.tobytes() for ending in story.endings.values()}) == 1, "not the same bits"
        assert len({r.digest for r in story.receipts.values()}) == 1
        total = sum(weight for _, weight in story.given.values())
        assert all(r.weight_total == pytest.approx(total) for r in story.receipts.values())
    assert not swarm.protocol_errors

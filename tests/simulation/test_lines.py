"""Members with lines of their own: what they carry is learnt from the rounds, and the spans follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from moshpitd.averaging.partition import fractions_by_rate
from moshpitd.averaging.receipt import Outcome
from moshpitd.averaging.session import Call, SessionConfig
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.network import Link, Weather
from moshpitd.simulation.swarm import Peer, Swarm, options_for

MB = 1e6
ELEMENTS = 128 * 4096
VECTOR_BYTES = 4 * ELEMENTS
FAST, SLOW = Link(up_bytes_s=10 * MB), Link(up_bytes_s=MB)


class Lines:
    """A group with these lines, averaging again and again."""

    def __init__(self, *links: Link, seed: int = 0) -> None:
        config = SessionConfig(chunk_bytes=1 << 14, group_size_max=len(links))
        self.swarm = Swarm(seed, Weather(directory=(0.005, 0.005)), config)
        options = options_for(np.zeros(ELEMENTS, np.float32), joining="contribute")
        self.peers = [self.swarm.open(f"p{n}", options, link=link) for n, link in enumerate(links)]
        self.swarm.run_for(1.0)
        self.shares: list[float] = []

    def average(self, *, times: int = 1, timeout_s: float = 60.0) -> float:
        """How long the last one's data took."""
        took_s = 0.0
        for _ in range(times):
            calls = {peer: (self._vector(number), Call(timeout_s=timeout_s)) for number, peer in enumerate(self.peers)}
            endings = self.swarm.average(calls)
            receipts = [ending.told for ending in endings.values()]
            assert {receipt.outcome for receipt in receipts} == {Outcome.COMPLETE}
            took_s = max(receipt.seconds_reduce for receipt in receipts)
            self.shares = [self._share(peer) for peer in self.peers]
        return took_s

    def change(self, number: int, link: Link) -> None:
        self.swarm.network.attach(self.peers[number].id, link)

    def _vector(self, number: int) -> Vector:
        return Vector.of({"w": np.full(ELEMENTS, number, np.float32)})

    def _share(self, peer: Peer) -> float:
        receipt = peer.endings[-1].told
        return sum(span.stop - span.start for span in receipt.rounds[0].spans if span.reducer == peer.id) / ELEMENTS


def optimum_s(rates: Sequence[float]) -> float:
    """The least time that any spans allow on these lines."""
    shares = fractions_by_rate(rates)
    return max((1 + (len(rates) - 2) * f) / rate for f, rate in zip(shares, rates, strict=True)) * VECTOR_BYTES


def test_a_slow_uplink_holds_a_small_span_once_it_is_known_and_an_equal_one_when_it_has_healed() -> None:
    lines = Lines(FAST, FAST, FAST, SLOW)
    best_s = optimum_s([10 * MB] * 3 + [MB])
    assert lines.average() > 1.3 * best_s and lines.shares == [0.25] * 4

    assert lines.average(times=3) < 1.05 * best_s
    assert lines.shares[3] == 0.0

    lines.change(3, FAST)
    healed_s = lines.average(times=4)
    assert lines.shares == [0.25] * 4
    assert healed_s < 1.1 * optimum_s([10 * MB] * 4)


def test_a_slow_downlink_is_found_once_the_others_uplinks_are_known() -> None:
    free, slow = Link(up_bytes_s=10 * MB, down_bytes_s=20 * MB), Link(up_bytes_s=10 * MB, down_bytes_s=MB)
    lines = Lines(free, free, free, slow)
    best_s = optimum_s([10 * MB] * 3 + [MB])
    assert lines.average() > 1.3 * best_s
    assert lines.average(times=3) < 1.05 * best_s

    lines.change(3, free)
    lines.average(times=5)
    assert lines.shares == [0.25] * 4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "link", [Link(), FAST, Link(up_bytes_s=10 * MB, down_bytes_s=10 * MB)], ids=["lan", "up", "both"]
)
def test_equal_lines_keep_equal_spans(link: Link, seed: int) -> None:
    lines = Lines(link, link, link, link, seed=seed)
    for _ in range(5):
        lines.average()
        assert lines.shares == [0.25] * 4


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_uplinks_are_a_round_takes_little_more_than_it_must(seed: int) -> None:
    dice = np.random.default_rng(seed)
    rates = [float(rate) for rate in 10 ** dice.uniform(6, 7.5, size=int(dice.integers(3, 8)))]
    lines = Lines(*(Link(up_bytes_s=rate, down_bytes_s=50 * MB) for rate in rates), seed=seed)
    lines.average(times=3)
    assert lines.average() < 1.3 * optimum_s(rates)


def test_a_line_that_turned_slow_does_not_lock_its_trainer_out() -> None:
    """Its caller's time is shorter than the rate that is known makes one fear, and longer than what a round takes."""
    lines = Lines(FAST, FAST, FAST, SLOW)
    lines.average(times=2)
    lines.average(times=3, timeout_s=optimum_s([10 * MB] * 3 + [MB]) + 1.0)

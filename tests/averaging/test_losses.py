"""What lossy rounds teach: losses, deadlines, staleness, and how often a reliable round is due."""

from __future__ import annotations

import numpy as np
import pytest

from moshpitd.averaging.losses import Deadline, DeadlineConfig, LinkLosses, Staleness, reliable_every
from tests.averaging.group_on_paper import peer

ONE, OTHER, THIRD = peer(1), peer(2), peer(3)


def test_a_link_is_known_by_its_packets_after_some_rounds() -> None:
    losses, rng = LinkLosses(), np.random.default_rng(1)
    for _ in range(20):
        losses.learn(ONE, sent=500, lost=int(rng.binomial(500, 0.5)))
        losses.learn(OTHER, sent=500, lost=int(rng.binomial(500, 0.02)))
    assert losses.of(ONE, [ONE, OTHER]) == pytest.approx(0.5, abs=0.03)
    assert losses.of(OTHER, [ONE, OTHER]) == pytest.approx(0.02, abs=0.02)


def test_an_unknown_link_is_like_the_others_and_the_first_of_all_loses_nothing() -> None:
    losses = LinkLosses()
    assert losses.of(ONE, [ONE, OTHER]) == 0
    losses.learn(OTHER, sent=1000, lost=100)
    assert losses.of(ONE, [ONE, OTHER]) == pytest.approx(0.1)


def test_one_packet_says_little() -> None:
    """Else who got through with its only packet would be taken for sure, who did not for lost: a lean."""
    losses = LinkLosses()
    losses.learn(ONE, sent=1, lost=0)
    losses.learn(OTHER, sent=1, lost=1)
    assert losses.of(OTHER, [ONE, OTHER]) - losses.of(ONE, [ONE, OTHER]) < 0.25


def test_a_link_that_became_better_is_forgiven() -> None:
    losses = LinkLosses()
    for _ in range(10):
        losses.learn(ONE, sent=500, lost=250)
    for _ in range(20):
        losses.learn(ONE, sent=500, lost=0)
    assert losses.of(ONE, [ONE]) < 0.01
    assert losses.typical < 0.01


def test_who_left_is_forgotten() -> None:
    losses = LinkLosses()
    losses.learn(ONE, sent=500, lost=250)
    losses.forget([ONE, THIRD])
    assert losses.typical == 0


def test_the_first_deadline_has_patience_and_later_ones_have_slack() -> None:
    deadline = Deadline(DeadlineConfig(first_s=5.0, first_bytes_s=1e6, slack_share=0.5, slack_min_s=0.01, doubt=0.0))
    assert deadline.seconds(2_000_000) == pytest.approx(7.0)
    for seconds in (0.2, 0.1, 0.3, 0.2):
        deadline.learn(seconds, 1000)
    assert deadline.seconds(1000) == pytest.approx(0.45)
    assert deadline.seconds(2000) == pytest.approx(0.9), "twice the bytes take twice as long at most"
    assert deadline.seconds(10) == pytest.approx(0.45), "fewer bytes may take as long"


def test_a_first_round_is_not_trusted_as_a_hundred_are() -> None:
    deadline = Deadline()
    deadline.learn(0.1, 1000)
    after_one = deadline.seconds(1000)
    for _ in range(50):
        deadline.learn(0.1, 1000)
    assert after_one > 4 * deadline.seconds(1000) > 4 * 0.2


def test_a_pause_long_ago_is_forgotten() -> None:
    deadline = Deadline(DeadlineConfig(rounds=50))
    deadline.learn(10.0, 1000)
    for _ in range(50):
        deadline.learn(0.1, 1000)
    assert deadline.seconds(1000) < 1


def test_staleness_counts_rounds_without_an_average_by_place() -> None:
    stale = Staleness(10_000)
    stale.round_over([(0, 300), (5000, 5100)])
    stale.round_over([(256, 300)])
    assert stale.ages[:3].tolist() == [0, 2, 0]
    assert stale.oldest == 2
    assert stale.share == pytest.approx(1 / 40)
    stale.round_over([])
    assert stale.oldest == 0


def test_reliable_rounds_are_rarer_where_they_cost_more_and_say_why() -> None:
    few, why = reliable_every(0.01, ranges=10_000, members=8)
    many, _ = reliable_every(0.4, ranges=10_000, members=8)
    assert 8 <= few < many <= 128
    assert "1.0% loss" in why and str(few) in why
    assert reliable_every(0.0, ranges=1, members=2)[0] == 8
    assert reliable_every(0.99, ranges=10**7, members=64)[0] == 128

"""The pace of one path, on paper: a line with a capacity, a loss of its own, and reports every ten milliseconds."""

from __future__ import annotations

import random

import pytest

from moshpitd.peer.pace import Pace, PaceConfig

PACKET = 1400
TICK_S = 0.01


def play(pace: Pace, *, capacity: float, loss: float, seconds: float, seed: int = 1) -> tuple[float, float]:
    """(bytes a second sent, share of packets lost beyond the path's own) over the second half."""
    dice, now, sent_in_all, excess = random.Random(seed), 0.0, 0, 0.0
    ticks, told, heard_of = int(seconds / TICK_S), 0, 0
    for tick in range(ticks):
        sent, until = 0, now + TICK_S
        while now < until:
            if (delay := pace.delay(PACKET, now)) > 0:
                now += delay
            else:
                sent += 1
        fits = int(min(sent, capacity * TICK_S / PACKET))
        heard = sum(dice.random() >= loss for _ in range(fits))
        told, heard_of = told + sent, heard_of + heard
        if told >= 50:
            pace.report(sent=told, heard=heard_of, is_full=True)
            told = heard_of = 0
        if tick >= ticks // 2:
            sent_in_all += sent
            excess += sent - fits
    return sent_in_all * PACKET / (seconds / 2), excess / sent_in_all


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("first", [5e6, 200e6])
def test_a_line_is_filled_whatever_it_loses(loss: float, first: float) -> None:
    pace = Pace(PaceConfig(), first)
    rate, excess = play(pace, capacity=50e6, loss=loss, seconds=6.0)
    assert 0.6 * 50e6 < rate < 1.35 * 50e6
    assert excess < 0.15
    assert pace.path_loss == pytest.approx(loss, abs=0.12)


def test_loss_that_does_not_fall_with_the_rate_is_not_ours() -> None:
    pace = Pace(PaceConfig(), 20e6)
    pace.report(sent=1000, heard=900, is_full=True)
    assert pace.bytes_s == pytest.approx(12e6), "perhaps it is"
    pace.report(sent=1000, heard=905, is_full=True)
    assert pace.bytes_s == pytest.approx(20e6) and pace.backed_off == 0
    pace.report(sent=1000, heard=890, is_full=True)
    assert pace.bytes_s > 20e6, "what is usual no longer alarms"


def test_loss_that_falls_with_the_rate_is_ours() -> None:
    pace = Pace(PaceConfig(), 20e6)
    pace.report(sent=1000, heard=700, is_full=True)
    pace.report(sent=1000, heard=1000, is_full=True)
    assert pace.bytes_s == pytest.approx(12e6) and pace.backed_off == 1


def test_few_packets_say_nothing_and_an_idle_path_does_not_grow() -> None:
    pace = Pace(PaceConfig(), 20e6)
    pace.report(sent=3, heard=0, is_full=True)
    pace.report(sent=1000, heard=1000, is_full=False)
    assert pace.bytes_s == 20e6


def test_tokens_do_not_pile_up_while_nobody_sends() -> None:
    pace = Pace(PaceConfig(burst_s=0.004), 1e6)
    assert pace.delay(4000, 0.0) == 0
    assert pace.delay(4000, 100.0) == 0
    assert pace.delay(4000, 100.0) == pytest.approx(0.004)
    assert pace.delay(64_000, 200.0) == 0, "a batch longer than a burst is paid for by itself"

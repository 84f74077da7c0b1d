"""Lines of peers: delay, bandwidth, loss, partitions."""

from __future__ import annotations

import random

import pytest

from moshpitd.averaging.names import PeerId
from moshpitd.simulation.network import RETRANSMISSION_S, Link, Network, Weather

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
BASE = (0.001, 0.002)
MB = 1e6


def network(**links: Link) -> Network:
    net = Network(Weather(), random.Random(1))
    for name, link in links.items():
        net.attach(PeerId(name), link)
    return net


def test_without_links_a_message_takes_what_the_weather_says() -> None:
    net = network()
    moments = [net.arrival(A, B, 100.0, BASE, 5.0) - 5.0 for _ in range(100)]
    assert 0.001 <= min(moments) < max(moments) <= 0.002
    assert (net.messages[A], net.bytes[A], net.messages[B]) == (100, 10_000.0, 0)


def test_both_ends_add_their_delay() -> None:
    net = network(a=Link(delay_s=0.04), b=Link(delay_s=0.01))
    assert net.arrival(A, B, 100.0, (0.0, 0.0), 0.0) == pytest.approx(0.05)
    assert net.arrival(B, A, 100.0, (0.0, 0.0), 0.0) == pytest.approx(0.05)


def test_bulk_queues_on_an_uplink_whoever_it_is_for() -> None:
    net = network(a=Link(up_bytes_s=MB), b=Link())
    moments = [net.arrival(A, to, 0.5 * MB, (0.0, 0.0), 0.0) for to in (B, C, B)]
    assert moments == pytest.approx([0.5, 1.0, 1.5])


def test_bulk_queues_on_a_downlink_whoever_it_is_from() -> None:
    net = network(c=Link(down_bytes_s=MB))
    assert net.arrival(A, C, MB, (0.0, 0.0), 0.0) == pytest.approx(1.0)
    assert net.arrival(B, C, MB, (0.0, 0.0), 0.0) == pytest.approx(2.0)


def test_what_a_slow_uplink_brings_later_holds_up_nobody_on_a_downlink() -> None:
    net = network(a=Link(up_bytes_s=MB), c=Link(down_bytes_s=10 * MB))
    assert net.arrival(A, C, MB, (0.0, 0.0), 0.0) == pytest.approx(1.1)
    assert net.arrival(B, C, MB, (0.0, 0.0), 0.0) == pytest.approx(0.1)
    assert net.arrival(B, C, 9.5 * MB, (0.0, 0.0), 0.0) == pytest.approx(1.1 + 0.95), "there is no gap for so much"
    assert net.arrival(B, C, MB, (0.0, 0.0), 5.0) == pytest.approx(5.1)


def test_a_slow_line_is_slow_also_towards_peers_without_one() -> None:
    net = network(a=Link(up_bytes_s=MB, delay_s=0.1))
    assert net.arrival(A, B, MB, (0.0, 0.0), 0.0) == pytest.approx(1.1)
    assert net.arrival(B, A, MB, (0.0, 0.0), 0.0) == pytest.approx(0.1)


def test_a_heartbeat_does_not_wait_behind_bulk() -> None:
    net = network(a=Link(up_bytes_s=MB))
    net.arrival(A, B, 60 * MB, (0.0, 0.0), 0.0)
    assert net.arrival(A, C, 250.0, (0.0, 0.0), 0.0) < 0.01


def test_an_uplink_that_was_idle_is_free_at_once() -> None:
    net = network(a=Link(up_bytes_s=MB))
    net.arrival(A, B, MB, (0.0, 0.0), 0.0)
    assert net.arrival(A, B, MB, (0.0, 0.0), 10.0) == pytest.approx(11.0)


def test_loss_costs_retransmissions_that_double() -> None:
    net = network(a=Link(loss=0.5))
    waits = [net.arrival(A, B, 100.0, (0.0, 0.0), 0.0) for _ in range(4000)]
    for times, share in ((0, 1 / 2), (1, 1 / 4), (2, 1 / 8)):
        wait = sum(RETRANSMISSION_S * 2**i for i in range(times))
        assert sum(moment == pytest.approx(wait) for moment in waits) / 4000 == pytest.approx(share, abs=0.03)


def test_a_one_way_partition_blocks_one_way_and_lets_nobody_hold_a_connection() -> None:
    net = network()
    net.block([A], [A, B], now=3.0)
    assert net.is_parted
    assert (net.blocked_since(A, B), net.blocked_since(B, A), net.blocked_since(A, A)) == (3.0, None, None)
    assert not net.hears(A, B) and not net.hears(B, A) and net.hears(A, C)
    net.heal()
    assert not net.is_parted and net.blocked_since(A, B) is None and net.hears(A, B)

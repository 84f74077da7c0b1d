"""The proxies do what they say, over plain sockets and between real daemons, which reach each other in no other way."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.end_to_end.chaos.fleet import Fleet, name_of
from tests.end_to_end.chaos.proxies import BLOCKED, HOST, Network, Weather
from tests.end_to_end.swarm import average_all, random_tensors, trainers

PATIENCE_S = 10.0
SILENCE_S = 0.2
"""Nothing came for so long: blocked."""


@pytest.fixture
def network() -> Iterator[Network]:
    """Two places, "here" and "there"; this process is who dials from here and who listens there."""
    with Network(0) as opened:
        opened.place("here")
        yield opened


class Pair:
    """A connection from here to there, through the proxy."""

    def __init__(self, network: Network) -> None:
        at = network.place("there")
        with socket.create_server((HOST, 0)) as server:
            server.settimeout(PATIENCE_S)
            network.move_in("there", f"{HOST}:{server.getsockname()[1]}")
            network.expect("here", os.getpid())
            self.here = socket.create_connection((HOST, int(at.rpartition(":")[2])), PATIENCE_S)
            self.there, _ = server.accept()
        self.there.settimeout(PATIENCE_S)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.here.close()
        self.there.close()


def receive(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := end.recv(count - len(data))):
        data += more
    return data


def is_silent(end: socket.socket) -> bool:
    """Neither a byte nor a datagram nor an end comes; what came is taken."""
    end.settimeout(SILENCE_S)
    try:
        end.recv(100)
    except TimeoutError:
        return True
    finally:
        end.settimeout(PATIENCE_S)
    return False


def test_fair_weather_carries_everything_both_ways_and_counts_it(network: Network) -> None:
    with Pair(network) as pair:
        pair.here.sendall(b"ping" * 1000)
        assert receive(pair.there, 4000) == b"ping" * 1000
        pair.there.sendall(b"pong")
        assert receive(pair.here, 4) == b"pong"
        assert network.traffic.tcp_bytes == {("here", "there"): 4000, ("there", "here"): 4}
        pair.here.shutdown(socket.SHUT_WR)
        assert receive(pair.there, 1) == b""  # and the other direction still stands
        pair.there.sendall(b"bye")
        assert receive(pair.here, 3) == b"bye"


def test_a_blocked_direction_holds_what_is_said_until_it_is_lifted_and_the_other_goes_on(network: Network) -> None:
    with Pair(network) as pair:
        network.change(BLOCKED, ["here"], ["there"])
        pair.here.sendall(b"held")
        pair.there.sendall(b"free")
        assert receive(pair.here, 4) == b"free"
        assert is_silent(pair.there)
        network.clear()
        assert receive(pair.there, 4) == b"held"


def test_a_death_behind_a_black_hole_is_not_heard(network: Network) -> None:
    with Pair(network) as pair:
        network.change(BLOCKED, ["here"], ["there"])
        pair.here.close()
        assert is_silent(pair.there)
        network.clear()
        assert receive(pair.there, 1) == b""


def test_latency_and_bandwidth_take_their_time(network: Network) -> None:
    with Pair(network) as pair:
        network.change(Weather(latency_s=0.2, jitter_s=0.1), ["here"], ["there"])
        begun = time.monotonic()
        pair.here.sendall(b"x")
        assert receive(pair.there, 1) == b"x"
        assert time.monotonic() - begun >= 0.2
        network.change(Weather(bytes_s=100_000), ["here"], ["there"])
        begun = time.monotonic()
        pair.here.sendall(b"x" * 30_000)
        assert receive(pair.there, 30_000) == b"x" * 30_000
        assert time.monotonic() - begun >= 0.29


def test_a_slow_close_is_heard_late(network: Network) -> None:
    with Pair(network) as pair:
        network.change(Weather(slow_close_s=0.3), ["here"], ["there"])
        begun = time.monotonic()
        pair.here.close()
        assert receive(pair.there, 1) == b""
        assert time.monotonic() - begun >= 0.3


def test_a_cut_comes_after_so_many_bytes_and_resets_both_ends(network: Network) -> None:
    with Pair(network) as pair:
        network.change(Weather(cut_after=1000), ["here"], ["there"])
        pair.here.sendall(b"x" * 900)
        assert len(receive(pair.there, 900)) == 900
        pair.here.sendall(b"x" * 900)
        for end in (pair.there, pair.here):
            with pytest.raises(ConnectionResetError):
                receive(end, 901)
        assert network.traffic.broken == {("here", "there"): 1}


def test_a_reset_is_one_at_both_ends(network: Network) -> None:
    with Pair(network) as pair:
        pair.here.sendall(b"x")
        assert receive(pair.there, 1) == b"x"
        assert network.reset("there", ["here"]) == 1
        for end in (pair.there, pair.here):
            with pytest.raises(ConnectionResetError):
                receive(end, 1)


def test_datagrams_are_carried_both_ways_lost_blocked_and_late(network: Network) -> None:
    at = network.place("there")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there,
    ):
        for end in (here, there):
            end.bind((HOST, 0))
            end.settimeout(PATIENCE_S)
        network.move_in("here", f"{HOST}:{here.getsockname()[1]}")
        network.move_in("there", f"{HOST}:{there.getsockname()[1]}")
        door = (HOST, int(at.rpartition(":")[2]))

        here.sendto(b"ping", door)
        data, back = there.recvfrom(100)
        there.sendto(b"pong", back)
        assert (data, here.recvfrom(100)) == (b"ping", (b"pong", door))

        network.change(Weather(loss=1.0), ["there"], ["here"])
        there.sendto(b"never", back)
        here.sendto(b"one way", door)
        assert there.recvfrom(100)[0] == b"one way"
        assert is_silent(here)

        network.change(Weather(latency_s=0.2), ["there"], ["here"])
        begun = time.monotonic()
        there.sendto(b"late", back)
        assert here.recvfrom(100)[0] == b"late"
        assert time.monotonic() - begun >= 0.2

        network.change(Weather(loss=0.5), ["here"], ["there"])
        for number in range(200):
            here.sendto(bytes([number]), door)
        heard = 0
        while not is_silent(there):
            heard += 1
        assert 60 <= heard <= 140
        assert network.traffic.lost["here", "there"] == 200 - heard


def test_nobody_answers_before_a_daemon_moved_in(network: Network) -> None:
    at = network.place("there")
    network.expect("here", os.getpid())
    door = (HOST, int(at.rpartition(":")[2]))
    with socket.create_connection(door, PATIENCE_S) as early, pytest.raises(ConnectionResetError):
        receive(early, 1)


def test_daemons_that_announce_their_places_reach_each_other_in_no_other_way() -> None:
    with Network(0) as network, Fleet(network) as fleet:
        fleet.launch(3)
        with trainers(fleet.peers, random_tensors, min_peers=3) as there:
            receipts = average_all(there)
            assert {receipt.outcome for receipt in receipts} == {"complete"}
            ours = network.own_ports()
            for peer in fleet.peers:
                outside = [
                    each
                    for each in psutil.Process(peer.process.pid).net_connections("tcp")
                    if each.status == psutil.CONN_ESTABLISHED and each.raddr.port not in ours
                ]
                assert not outside
                with peer.connect() as daemon:
                    assert {known.address for known in daemon.peers()} <= {f"{HOST}:{port}" for port in ours}
        for index, receipt in enumerate(receipts):
            passed = sum(count for (source, _), count in network.traffic.tcp_bytes.items() if source == name_of(index))
            assert passed > receipt.bytes.sent > 0
            assert any(source == name_of(index) for source, _ in network.traffic.datagrams)
        assert threading.active_count() < 100

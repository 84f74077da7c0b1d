"""Strangers, liars and noise at the doors while a swarm averages."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import moshpit_client
from tests.end_to_end.swarm import Array, Peer, Swarm, average_all, error, mean, random_tensors, trainers

TLS_HELLO = bytes.fromhex("16030100750100007103035f" + "ab" * 31 + "00000213010100")
HTTP = b"GET / HTTP/1.1\r\nHost: moshpitd\r\n\r\n"
HTTP2_THEN_NOISE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(4096)


@pytest.fixture(scope="module")
def three() -> Iterator[list[Peer]]:
    with Swarm() as swarm:
        yield swarm.start(3)


@contextlib.contextmanager
def noise(peers: list[Peer]) -> Iterator[None]:
    """Until the block is left, everything that is no peer's."""
    enough = threading.Event()
    made: list[int] = []

    def shout(peer: Peer) -> None:
        host, _, port = peer.address.rpartition(":")
        rng = np.random.default_rng(int(port))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            while not enough.is_set():
                for greeting in (TLS_HELLO, HTTP, HTTP2_THEN_NOISE, rng.bytes(3000)):
                    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as stream:
                        stream.sendall(greeting)
                        stream.settimeout(0.2)
                        stream.recv(1000)
                for size in (0, 1, 20, 21, 22, 100, 1400, 8000):
                    with contextlib.suppress(OSError):
                        # 0 and 1 open the package's requests and answers.
                        datagrams.sendto(bytes([size % 2]) + rng.bytes(size), (host, int(port)))
                made.append(1)

    threads = [threading.Thread(target=shout, args=[peer]) for peer in peers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()
        assert made


def test_garbage_at_both_ports_does_not_stop_the_swarm(three: list[Peer]) -> None:
    with trainers(three, lambda i: random_tensors(i, 1 << 20), name="noise", min_peers=3) as there:
        with noise(three):
            for _ in range(5):
                for index, trainer in enumerate(there):
                    trainer.tensors["w"][:] = random_tensors(index, 1 << 20)["w"]
                assert {receipt.outcome for receipt in average_all(there)} == {"complete"}
        expected = mean([trainer.began_with["w"] for trainer in there], [1.0] * 3)
        assert max(error(trainer.tensors["w"], expected) for trainer in there) < 1e-6
    for peer in three:
        assert peer.cli("status").returncode == 0
        assert "Traceback" not in peer.log, peer.log


def test_a_daemon_of_another_swarm_stays_outside(three: list[Peer]) -> None:
    """It says why it is not ready, and nobody here averages with it."""
    with Swarm(name="elsewhere") as other:
        stranger = Peer(three[0].home.parent / "stranger", swarm="elsewhere", join=[three[0].address])
        other.peers.append(stranger)
        stranger.says("^not ready: waiting for ")
        status = stranger.cli("status")
        assert status.returncode == 4 and "swarm" in status.stdout, status
        assert "another swarm" in status.stdout or "other swarm" in status.stdout, status.stdout
    with trainers(three, random_tensors, name="inside", min_peers=3) as there:
        assert {len(receipt.peers) for receipt in average_all(there)} == {2}
    assert all(peer.json("status")["peers"] == 2 for peer in three)


def test_infinity_is_refused_to_the_one_that_has_it_and_the_others_average(three: list[Peer]) -> None:

    def tensors(index: int) -> dict[str, Array]:
        return {"w": np.full(9, 1.0 if index else np.inf, np.float32)}

    with trainers(three, tensors, name="infinite", min_peers=2) as there:
        futures = [trainer.average(timeout=6) for trainer in there]
        with pytest.raises(moshpit_client.InvalidInput, match="'w'"):
            futures[0].result(60)
        assert there[0].is_untouched()
        assert {len(future.result(60).peers) for future in futures[1:]} == {1}


def test_what_a_narrow_codec_cannot_carry_saturates_and_never_becomes_infinite(three: list[Peer]) -> None:
    def tensors(index: int) -> dict[str, Array]:
        return {"w": np.array([1e30, 1, -1e30], np.float32)}

    with trainers(three, tensors, name="narrow", min_peers=3, codec="float16") as there:
        average_all(there)
        assert [trainer.tensors["w"].tolist() for trainer in there] == [[65504, 1, -65504]] * 3

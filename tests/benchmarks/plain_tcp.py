"""The bytes of an all-reduce over plain sockets, with nothing else done to them: what a network, or this machine's
loopback, would allow.

One process a peer and one connection a pair; every peer sends each other one n-th of its vector twice, as a
reduce-scatter and an all-gather do, to all at the same time and without waiting for what it receives. Threads,
`sendall` and `recv_into`, from memory and into memory. Does not add, check or agree on anything.

    parent -- round --> peer (python -m tests.benchmarks.plain_tcp), one a place
           <-- began, ended, processor seconds --
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from moshpitd.cli.namespaces import Place
from tests.benchmarks.contest import Sample
from tests.benchmarks.rivals import Unavailable

TIMEOUT_S = 120.0
AT_ONCE = 1 << 20


class PlainTcp:
    """A contestant that only moves bytes. Made by `plain_tcp`."""

    name = "plain TCP"

    def __init__(self, peers: Sequence[subprocess.Popen[str]]) -> None:
        self._peers = peers
        self._bytes = 0
        ports = [str(self._hear(peer)) for peer in peers]
        self._tell(" ".join(ports))
        for peer in peers:
            self._hear(peer)

    def open(self, megabytes: float) -> None:
        self._bytes = 2 * int(megabytes * 1e6) // len(self._peers)

    def round(self) -> Sample:
        self._tell(str(self._bytes))
        began, ended, cpu_s = zip(*(self._hear(peer) for peer in self._peers), strict=True)
        slowest = max(end - begin for begin, end in zip(began, ended, strict=True))
        return Sample(slowest, max(ended) - min(began), sum(cpu_s))

    def check(self) -> None:
        pass

    def _tell(self, line: str) -> None:
        for peer in self._peers:
            assert peer.stdin is not None
            peer.stdin.write(line + "\n")
            peer.stdin.flush()

    @staticmethod
    def _hear(peer: subprocess.Popen[str]) -> list[float]:
        assert peer.stdout is not None
        line = peer.stdout.readline()
        if not line:
            raise Unavailable("a peer of the plain TCP exchange died")
        heard: list[float] = json.loads(line)
        return heard


@contextlib.contextmanager
def plain_tcp(places: Sequence[Place]) -> Iterator[PlainTcp]:
    """One peer a place."""
    addresses = [place.address for place in places]
    peers: list[subprocess.Popen[str]] = []
    try:
        for rank, place in enumerate(places):
            command = [*place.prefix, sys.executable, "-m", "tests.benchmarks.plain_tcp", str(rank), *addresses]
            peers.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
                )
            )
        yield PlainTcp(peers)
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()


def _be_a_peer(rank: int, addresses: Sequence[str]) -> None:
    """Connect to all, then one exchange a line until the input ends."""
    listening = socket.create_server((addresses[rank], 0), backlog=len(addresses))
    _say(listening.getsockname()[1])
    ports = [int(port) for port in sys.stdin.readline().split()]
    connections: list[socket.socket] = []
    for other in range(rank):
        connections.append(socket.create_connection((addresses[other], ports[other]), TIMEOUT_S))
    for _ in range(rank + 1, len(addresses)):
        connections.append(listening.accept()[0])
    for connection in connections:
        connection.settimeout(TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _say(None)
    outgoing, incoming = bytearray(), [bytearray() for _ in connections]
    for line in sys.stdin:
        size = int(line)
        if len(outgoing) != size:
            outgoing, incoming = bytearray(size), [bytearray(size) for _ in connections]
        cpu, began = time.process_time(), time.monotonic()
        threads = [threading.Thread(target=_send, args=(each, memoryview(outgoing))) for each in connections]
        for connection, into in zip(connections, incoming, strict=True):
            threads.append(threading.Thread(target=_receive, args=(connection, memoryview(into))))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _say([began, time.monotonic(), time.process_time() - cpu])


def _send(connection: socket.socket, view: memoryview) -> None:
    for start in range(0, len(view), AT_ONCE):
        connection.sendall(view[start : start + AT_ONCE])


def _receive(connection: socket.socket, view: memoryview) -> None:
    while view:
        view = view[connection.recv_into(view, min(len(view), AT_ONCE)) :]


def _say(what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    _be_a_peer(int(sys.argv[1]), sys.argv[2:])

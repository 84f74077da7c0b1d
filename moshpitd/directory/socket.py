"""The daemon's one UDP socket: a drain loop, and datagrams told apart by their first byte.

Knows file descriptors and address families. Does not know what datagrams say: whoever claims a first byte is handed all
that begin with it. Works alike under asyncio and uvloop, because it uses neither's datagram transport (uvloop's refuses
host names and queues without bound; ours drops what the kernel does not take, as UDP may).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from moshpitd.directory.addresses import Address, address, resolve

log = logging.getLogger(__name__)

RECEIVE_BUFFER_BYTES = 4 << 20
"""Asked of the kernel: with the default of 212,992 a burst of bulk datagrams loses 0.4-0.8 %."""
DATAGRAM_BYTES_MAX = 65_535
DRAIN_MAX = 64
"""Datagrams read in one turn of the loop: enough to be cheap, few enough that a flood leaves turns to everything
else."""

Handler = Callable[[bytes, Address], None]
Drop = Callable[[bytes, Address], bool]


class PortInUse(Exception):
    """Another program holds the port; the message names it."""


@dataclass(slots=True)
class SocketCounters:
    """What passed, since the socket was opened."""

    sent: int = 0
    received: int = 0
    unclaimed: int = 0
    """Datagrams whose first byte nobody claimed."""
    refused: int = 0
    """Datagrams the kernel did not take: full buffer, unreachable network, wrong family."""
    dropped: int = 0
    """Lost on purpose by the fault injector."""


class DatagramSocket:
    """Bound, non-blocking, registered with the running loop until closed."""

    def __init__(self, bound: socket.socket, drop: Drop | None) -> None:
        """Use `DatagramSocket.open`."""
        self._socket = bound
        self._drop = drop
        self._handlers: dict[int, Handler] = {}
        self._buffer = memoryview(bytearray(DATAGRAM_BYTES_MAX))
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(bound.fileno(), self._drain)
        self.address = address(*bound.getsockname()[:2])
        self.counters = SocketCounters()
        self.receive_buffer_bytes = bound.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        """What the kernel granted (it doubles what it was asked, for its own use)."""

    @classmethod
    async def open(cls, host: str, port: int, *, drop: Drop | None = None) -> DatagramSocket:
        """Binds host:port; port 0 lets the kernel choose. "::" takes IPv4 too.

        The daemon binds gRPC's TCP port first and opens this with the number it got. `drop` loses outgoing datagrams
        for tests and benchmarks. Raises `PortInUse`, `AddressError`, OSError.
        """
        target = (await resolve(f"[{host}]:{port}" if ":" in host else f"{host}:{port}"))[0]
        family = socket.AF_INET6 if ":" in target.host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_DGRAM)
        try:
            bound.setblocking(False)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(target.host != "::"))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            bound.bind((target.host, port))
        except OSError as error:
            bound.close()
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(f"UDP port {target} is in use; choose another --listen or stop its owner") from error
            raise
        opened = cls(bound, drop)
        if opened.receive_buffer_bytes < RECEIVE_BUFFER_BYTES:
            log.info(
                "UDP receive buffer: asked for %d bytes, granted %d; raise net.core.rmem_max for lossy rounds",
                RECEIVE_BUFFER_BYTES,
                opened.receive_buffer_bytes,
            )
        return opened

    def close(self) -> None:
        """Twice does no harm."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()

    def claim(self, first_byte: int, handler: Handler) -> None:
        """Hands every datagram that begins with this byte to the handler, on the loop; it must neither block nor
        raise."""
        assert first_byte not in self._handlers, f"first byte {first_byte:#x} is claimed already"
        self._handlers[first_byte] = handler

    def release(self, first_byte: int) -> None:
        """Datagrams that begin with this byte are dropped from now on."""
        self._handlers.pop(first_byte, None)

    def reaches(self, to: Address) -> bool:
        """Whether a datagram can leave here for it: IPv4 reaches IPv4, "::" reaches both, other IPv6 itself."""
        is_ipv6 = self._socket.family == socket.AF_INET6
        return is_ipv6 if ":" in to.host else not is_ipv6 or self.address.host == "::"

    def send(self, datagram: bytes, to: Address) -> None:
        """Sends or loses; never blocks, never raises for what the network does."""
        if self._socket.fileno() < 0:
            return
        if self._drop is not None and self._drop(datagram, to):
            self.counters.dropped += 1
            return
        host = to.host
        if self._socket.family == socket.AF_INET6 and ":" not in host:
            host = f"::ffff:{host}"
        try:
            self._socket.sendto(datagram, (host, to.port))
            self.counters.sent += 1
        except OSError:
            self.counters.refused += 1

    def _drain(self) -> None:
        for _ in range(DRAIN_MAX):
            try:
                size, sender = self._socket.recvfrom_into(self._buffer)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                continue  # an ICMP error of an earlier send; the next call gives the next datagram
            self.counters.received += 1
            handler = self._handlers.get(self._buffer[0]) if size else None
            if handler is None:
                self.counters.unclaimed += 1
            else:
                handler(bytes(self._buffer[:size]), address(*sender[:2]))


class ClaimedTransport(asyncio.DatagramTransport):
    """What a protocol written for asyncio's datagram endpoints sees of the shared socket: its own first bytes."""

    def __init__(
        self, shared: DatagramSocket, first_bytes: tuple[int, ...], protocol: asyncio.DatagramProtocol
    ) -> None:
        """Connects the protocol; `close` disconnects it and leaves the socket open."""
        super().__init__()
        self._shared = shared
        self._first_bytes: tuple[int, ...] = first_bytes
        for first_byte in first_bytes:
            shared.claim(first_byte, protocol.datagram_received)
        protocol.connection_made(self)

    def sendto(self, data: bytes, addr: tuple[str, int] | None = None) -> None:  # type: ignore[override]
        """To an IP literal, always."""
        assert addr is not None
        self._shared.send(data, Address(*addr))

    def close(self) -> None:
        """Gives the first bytes back."""
        for first_byte in self._first_bytes:
            self._shared.release(first_byte)
        self._first_bytes = ()

    def is_closing(self) -> bool:
        """Whether `close` was called."""
        return not self._first_bytes

    def abort(self) -> None:
        """The same as `close`: nothing is buffered."""
        self.close()

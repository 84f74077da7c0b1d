"""The daemon's one UDP socket: a drain loop, and datagrams told apart by their first byte.

Knows file descriptors and address families. Does not know what datagrams say: whoever claims a first byte is handed all
that begin with it. Works alike under asyncio and uvloop, because it uses neither's datagram transport (uvloop's refuses
host names and queues without bound; ours drops what the kernel does not take, as UDP may).

Bulk datagrams of equal size cross the kernel's border many at a time where it can: it cuts one large send into
datagrams (GSO) and hands over several of one sender as one (GRO). No datagram is ever fragmented: one that does not fit
the path is refused or lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
import sys
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

DRAIN_BYTES_MAX = 1 << 20
"""... and so many bytes: those of bulk cost milliseconds."""
SEND_BYTES_MAX = 65_000
"""As one send, headers of lower layers included ..."""
SEGMENTS_MAX = 64
"""... and so many datagrams."""
SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104
"""Linux; Python does not name them all."""
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DO = 10, 23, 2

Handler = Callable[[bytes, Address], None]
BulkHandler = Callable[[memoryview, int, Address], None]
"""Datagrams of one size behind each other, the last may be shorter; valid during the call only."""
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

    def __init__(self, bound: socket.socket, drop: Drop | None, *, offload: bool) -> None:
        """Use `DatagramSocket.open`."""
        self._socket = bound
        self._drop = drop
        self._handlers: dict[int, Handler] = {}
        self._bulk_handlers: dict[int, BulkHandler] = {}
        self._buffer = memoryview(bytearray(2 * DATAGRAM_BYTES_MAX))
        self._room: asyncio.Future[None] | None = None
        """Somebody waits for room to send."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(bound.fileno(), self._drain)
        self.address = address(*bound.getsockname()[:2])
        self.counters = SocketCounters()
        self.receive_buffer_bytes = bound.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        """What the kernel granted (it doubles what it was asked, for its own use)."""
        self._offload = offload
        self.segments_sent = offload and _has_option(bound, UDP_SEGMENT)
        """The kernel cuts large sends into datagrams."""
        self.segments_received = False
        """The kernel hands several datagrams over at once: asked of it when somebody claims bulk."""

    @classmethod
    async def open(cls, host: str, port: int, *, drop: Drop | None = None, offload: bool = True) -> DatagramSocket:
        """Binds host:port; port 0 lets the kernel choose. "::" takes IPv4 too.

        The daemon binds gRPC's TCP port first and opens this with the number it got. `drop` loses outgoing datagrams
        for tests and benchmarks; without `offload` the kernel neither cuts nor joins datagrams, so that a filter of its
        own sees each. Raises `PortInUse`, `AddressError`, OSError.
        """
        target = (await resolve(f"[{host}]:{port}" if ":" in host else f"{host}:{port}"))[0]
        family = socket.AF_INET6 if ":" in target.host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_DGRAM)
        try:
            bound.setblocking(False)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(target.host != "::"))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DO)
            if family == socket.AF_INET or target.host == "::":
                bound.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
            bound.bind((target.host, port))
        except OSError as error:
            bound.close()
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(f"UDP port {target} is in use; choose another --listen or stop its owner") from error
            raise
        opened = cls(bound, drop, offload=offload)
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
            self._has_room()
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()

    def fileno(self) -> int:
        """The kernel's number of it."""
        return self._socket.fileno()

    def claim(self, first_byte: int, handler: Handler) -> None:
        """Hands every datagram that begins with this byte to the handler, on the loop; it must neither block nor
        raise."""
        assert first_byte not in self._handlers, f"first byte {first_byte:#x} is claimed already"
        self._handlers[first_byte] = handler

    def claim_bulk(self, first_byte: int, handler: BulkHandler) -> None:
        """As `claim`, for many datagrams at a time."""
        assert first_byte not in self._handlers.keys() | self._bulk_handlers.keys()
        self._bulk_handlers[first_byte] = handler
        if not self._offload:
            return
        with contextlib.suppress(OSError):
            self._socket.setsockopt(SOL_UDP, UDP_GRO, 1)
            self.segments_received = True

    def release(self, first_byte: int) -> None:
        """Datagrams that begin with this byte are dropped from now on."""
        self._handlers.pop(first_byte, None)
        self._bulk_handlers.pop(first_byte, None)

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
        try:
            self._socket.sendto(datagram, self._target(to))
            self.counters.sent += 1
        except OSError:
            self.counters.refused += 1

    def send_bulk(self, datagrams: memoryview, size: int, to: tuple[str, int]) -> bool:
        """Sends or loses datagrams of `size` bytes that lie behind each other, at most SEGMENTS_MAX and SEND_BYTES_MAX.
        False when the kernel has no room now: nothing was sent; wait with `writable`."""
        if self._socket.fileno() < 0:
            return True
        count = -(-len(datagrams) // size)
        if self._drop is not None:
            for at in range(0, len(datagrams), size):
                self.send(bytes(datagrams[at : at + size]), Address(*to))
            return True
        if count > 1 and not self.segments_sent:
            target, sendto, refused = self._target(to), self._socket.sendto, 0
            for at in range(0, len(datagrams), size):
                try:
                    sendto(datagrams[at : at + size], target)
                except OSError:
                    refused += 1
            self.counters.sent += count - refused
            self.counters.refused += refused
            return True
        try:
            cut = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", size))] if count > 1 else []
            self._socket.sendmsg([datagrams], cut, 0, self._target(to))
            self.counters.sent += count
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return False
            if count > 1 and error.errno in (errno.EIO, errno.EINVAL):  # this way out cannot cut
                self.segments_sent = False
                return self.send_bulk(datagrams, size, to)
            self.counters.refused += count
        return True

    async def writable(self) -> None:
        """Returns when the kernel has room."""
        if self._socket.fileno() < 0:
            return
        if self._room is None or self._room.done():
            self._room = self._loop.create_future()
            self._loop.add_writer(self._socket.fileno(), self._has_room)
        await asyncio.shield(self._room)

    def _has_room(self) -> None:
        self._loop.remove_writer(self._socket.fileno())
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _target(self, to: tuple[str, int]) -> tuple[str, int]:
        host, port = to
        is_mapped = self._socket.family == socket.AF_INET6 and ":" not in host
        return (f"::ffff:{host}" if is_mapped else host, port)

    def _drain(self) -> None:
        """Reads what is there; datagrams of one sender and size that follow each other are handed over together."""
        start = end = segment = taken = 0
        run_of: tuple[str, int] | None = None
        for _ in range(DRAIN_MAX):
            try:
                size, each, sender = self._receive(self._buffer[end:])
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                continue  # an ICMP error of an earlier send; the next call gives the next datagram
            if sender != run_of or each != segment or (end - start) % segment:
                self._split(self._buffer[start:end], segment, run_of)
                start, segment, run_of = end, each, sender
            end += size
            taken += size
            if end > len(self._buffer) - DATAGRAM_BYTES_MAX or not size:
                self._split(self._buffer[start:end], segment, run_of)
                start = end = 0
                run_of = None
            if taken >= DRAIN_BYTES_MAX:
                break
        self._split(self._buffer[start:end], segment, run_of)

    def _split(self, run: memoryview, segment: int, sender: tuple[str, int] | None) -> None:
        """By first byte: the kernel joins whatever is alike in size."""
        if sender is None:
            return
        if not run:
            self.counters.received += 1
            self.counters.unclaimed += 1
            return
        at = 0
        while at < len(run):
            first, end = run[at], at + segment
            while end < len(run) and run[end] == first:
                end += segment
            self._hand_over(run[at:end], segment, sender)
            at = end

    def _receive(self, into: memoryview) -> tuple[int, int, tuple[str, int]]:
        """Bytes read, size of each datagram in them, sender."""
        if not self.segments_received:
            size, sender = self._socket.recvfrom_into(into)
            return size, max(1, size), sender
        size, extras, _, sender = self._socket.recvmsg_into([into], 64)
        segment = size
        for level, kind, data in extras:
            if (level, kind) == (SOL_UDP, UDP_GRO):
                segment = int.from_bytes(data[:4], sys.byteorder)
        return size, max(1, segment), sender

    def _hand_over(self, datagrams: memoryview, segment: int, sender: tuple[str, int]) -> None:
        """All begin with the same byte."""
        self.counters.received += (count := -(-len(datagrams) // segment))
        if bulk := self._bulk_handlers.get(datagrams[0]):
            bulk(datagrams, segment, address(*sender[:2]))
        elif handler := self._handlers.get(datagrams[0]):
            for at in range(0, len(datagrams), segment):
                handler(bytes(datagrams[at : at + segment]), address(*sender[:2]))
        else:
            self.counters.unclaimed += count


def _has_option(bound: socket.socket, option: int) -> bool:
    try:
        bound.getsockopt(SOL_UDP, option)
    except OSError:
        return False
    return True


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

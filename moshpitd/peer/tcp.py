"""The plain TCP path for chunks: about twice as fast as gRPC's streams, which copy every chunk three times.

Knows sockets: who is let in, what a frame looks like, which connections are kept warm. Does not know groups or chunks;
a transfer over one of its links is transfers.py's. Everything but chunks stays on gRPC.

    dialler                                             dialled
       | connect; hello, signed hello, proof (conversation.py): once a connection
       |<---------------------------------------------------->|
       | TransferOpen: which group, signed with its token     |   <--+
       |----------------------------------------------------->|      | again for each group:
       | chunks to and fro, then an end mark each way         |      | connections stay warm
       |<---------------------------------------------------->|   ---+

A frame is its length in four bytes, big-endian, and the bytes that gRPC would send as a TransferRequest or
TransferResponse. An end mark is a frame of length 0. What is received goes from the kernel straight into the buffer
that the reduction reads; what is sent is handed to the kernel as views of where it lies.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import struct
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager

import numpy as np

from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.names import PeerId, short
from moshpitd.peer import wire
from moshpitd.peer.channels import PeerConfig
from moshpitd.peer.conversation import Introduction, answer_greeting, greet
from moshpitd.peer.links import Buffer, LinkBroken
from moshpitd.peer.v1 import peer_pb2

log = logging.getLogger("moshpitd.peer")

PURPOSE = "bulk-"
GREETING_BYTES_MAX = 1024
"""Of a frame from one that has not proved who it is."""
_LENGTH = struct.Struct(">I")
_END = _LENGTH.pack(0)
_BACKLOG = 256
_INFO_BYTES, _RTT_AT = 104, 68
"""Of Linux' struct tcp_info: as much of it as there has always been, and where tcpi_rtt lies."""


class BulkPortError(OSError):
    """The path's own port cannot be had."""


class Connection:
    """One proved connection; a link for one transfer after the other."""

    transport = "tcp"

    def __init__(self, sock: socket.socket, frame_bytes_max: int) -> None:
        self.peer = PeerId("")
        """Who the other proved to be."""
        self.round_trip_s = 0.0
        """As it was when the connection was made; 0: not known."""
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._frame_bytes_max = frame_bytes_max
        self._ends_awaited = 0
        """End marks of the transfer under way: theirs and ours."""
        self._unfilled = memoryview(b"")
        """What is to be received next."""
        self._filled: asyncio.Future[None] | None = None
        self._is_watched = False
        """Whether the loop tells us when there is something to read. It is asked to once for many frames, not for each
        piece that the kernel has of one."""

    async def read(self, bytes_max: int | None = None) -> Buffer | None:
        """The next frame; None for an end mark."""
        prefix = bytearray(_LENGTH.size)
        await self._fill(memoryview(prefix))
        (size,) = _LENGTH.unpack(prefix)
        if size > (limit := bytes_max or self._frame_bytes_max):
            raise RemoteProtocolError(f"a frame of {size} bytes, more than {limit}")
        if not size:
            return None
        frame = np.empty(size, np.uint8).data  # not cleared before: what comes covers it
        await self._fill(frame)
        return frame

    async def write(self, parts: Sequence[Buffer]) -> None:
        """One frame."""
        await self._send([_LENGTH.pack(sum(map(len, parts))), *parts])

    # ---- as a link

    def begin_transfer(self) -> None:
        """From here on it is in use until both have sent their end mark."""
        self._ends_awaited = 2

    @property
    def is_between_transfers(self) -> bool:
        return self._ends_awaited == 0

    async def frames(self) -> AsyncIterator[Buffer]:
        while (frame := await self.read()) is not None:
            yield frame
            await asyncio.sleep(0)  # one that sends without a pause would keep the loop
        self._unwatch()
        self._ends_awaited -= 1

    async def done_writing(self) -> None:
        await self._send([_END])
        self._ends_awaited -= 1

    @property
    def is_alive(self) -> bool:
        """Whether nothing came since the last transfer: no end of the connection, and nothing that does not belong."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        self._unwatch()
        self._sock.close()

    # ---- the socket

    async def _fill(self, view: memoryview) -> None:
        """Receive as much as the view holds. One call at a time."""
        self._unfilled = view
        self._filled = self._loop.create_future()
        self._receive()
        if not self._filled.done() and not self._is_watched:
            self._loop.add_reader(self._sock, self._receive)
            self._is_watched = True
        try:
            await self._filled
        finally:
            self._filled = None

    def _receive(self) -> None:
        """There may be something to read."""
        if self._filled is None or self._filled.done():
            self._unwatch()  # nobody waits for it now: the kernel keeps it, and the sender feels that
            return
        try:
            while self._unfilled:
                received = self._sock.recv_into(self._unfilled)
                if not received:
                    self._filled.set_exception(LinkBroken("connection closed"))
                    return
                self._unfilled = self._unfilled[received:]
        except BlockingIOError:
            return
        except OSError as error:
            self._filled.set_exception(LinkBroken(error.strerror or str(error)))
        else:
            self._filled.set_result(None)

    def _unwatch(self) -> None:
        if self._is_watched:
            self._is_watched = False
            self._loop.remove_reader(self._sock)

    async def _send(self, parts: Sequence[Buffer]) -> None:
        try:
            try:
                sent = self._sock.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            for part in parts:
                if sent < len(part):
                    await self._loop.sock_sendall(self._sock, memoryview(part)[sent:])
                sent = max(0, sent - len(part))
        except OSError as error:
            raise LinkBroken(error.strerror or str(error)) from error


class TcpPath:
    """The listening socket, and the connections that are kept warm between groups."""

    def __init__(self, listening: socket.socket, introduction: Introduction, config: PeerConfig) -> None:
        """Use `TcpPath.open`."""
        self.port: int = listening.getsockname()[1]
        self._listening = listening
        self._introduction = introduction
        self._config = config
        self._idle: OrderedDict[int, Connection] = OrderedDict()
        """Those we dialled, the longest idle first."""
        self._served: dict[PeerId, int] = {}
        self._greetings = 0
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def open(cls, host: str, port: int, *, introduction: Introduction, config: PeerConfig) -> TcpPath:
        """Take a TCP port (0: any free one, see `port`). Raises BulkPortError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise BulkPortError(error.errno, error.strerror) from error
        listening.setblocking(False)
        return cls(listening, introduction, config)

    def serve(self, handle: Callable[[Connection, Buffer], Awaitable[None]]) -> None:
        """Begin to answer. `handle` runs one transfer, given its opening; what it raises ends the connection."""
        self._spawn(self._accept(handle))

    async def close(self) -> None:
        """End everything."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self._idle.values():
            connection.close()
        self._listening.close()

    @asynccontextmanager
    async def dial(self, peer: PeerId, address: tuple[str, int]) -> AsyncIterator[Connection]:
        """A connection to the peer for one transfer: a warm one, or a new one. Raises LinkBroken where there is none to
        be had, and RemoteProtocolError where another answers."""
        connection = self._take_idle(peer) or await self._connect(peer, address)
        connection.begin_transfer()
        try:
            yield connection
        finally:
            if connection.is_between_transfers:
                self._idle[next(self._numbers)] = connection
                while len(self._idle) > self._config.idle_channels_max:
                    self._idle.popitem(last=False)[1].close()
            else:
                connection.close()

    def _take_idle(self, peer: PeerId) -> Connection | None:
        for number, connection in reversed(self._idle.items()):
            if connection.peer == peer:
                del self._idle[number]
                if connection.is_alive:
                    return connection
                connection.close()
                return self._take_idle(peer)
        return None

    async def _connect(self, peer: PeerId, address: tuple[str, int]) -> Connection:
        loop = asyncio.get_running_loop()
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(self._config.tcp_patience_s):
                family, kind, protocol, _, at = (await loop.getaddrinfo(*address, type=socket.SOCK_STREAM))[0]
                sock = _prepared(socket.socket(family, kind, protocol), self._config)
                began = loop.time()
                await loop.sock_connect(sock, at)
                connection = Connection(sock, self._config.message_bytes_max)
                connection.round_trip_s = _fitted(sock, self._config) or loop.time() - began
            async with asyncio.timeout(self._config.dial_timeout_s):
                await greet(
                    self._introduction,
                    PURPOSE,
                    lambda frame: connection.write([frame.SerializeToString()]),
                    lambda: _greeting(connection),
                    peer,
                )
        except BaseException as error:
            if sock is not None:
                sock.close()
            match error:
                case OSError():  # a timeout is one
                    raise LinkBroken(f"not reached: {error.strerror or 'no answer'}") from error
                case ValueError():  # a host that is none
                    raise LinkBroken(f"not reached: {error}") from error
                case _:
                    raise
        connection.peer = peer
        return connection

    # ---- being dialled

    async def _accept(self, handle: Callable[[Connection, Buffer], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listening)
            except OSError as error:  # out of descriptors, or the caller is gone already
                log.warning("cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(self._config.redial_pause_s)
                continue
            if self._greetings >= self._config.greetings_max:
                sock.close()
                continue
            connection = Connection(_prepared(sock, self._config), self._config.message_bytes_max)
            connection.round_trip_s = _fitted(sock, self._config)
            self._spawn(self._serve(connection, handle))

    async def _serve(self, connection: Connection, handle: Callable[[Connection, Buffer], Awaitable[None]]) -> None:
        try:
            peer = await self._greeted(connection)
            self._served[peer] = self._served.get(peer, 0) + 1
            try:
                while (opening := await connection.read(GREETING_BYTES_MAX)) is not None:
                    connection.begin_transfer()
                    await handle(connection, opening)
            finally:
                self._served[peer] -= 1
                if not self._served[peer]:
                    del self._served[peer]
        except (RemoteProtocolError, LinkBroken, TimeoutError) as wrong:
            log.debug("a TCP connection of %s: %s", short(connection.peer) or "a stranger", wrong)
        finally:
            connection.close()

    async def _greeted(self, connection: Connection) -> PeerId:
        async def read() -> peer_pb2.ConverseRequest:
            return wire.frame_from(peer_pb2.ConverseRequest, await _greeting(connection))

        def admit(who: PeerId) -> None:
            if sum(self._served.values()) >= self._config.conversations_max:
                raise RemoteProtocolError("too many connections here")
            if self._served.get(who, 0) >= self._config.connections_of_one_max:
                raise RemoteProtocolError("too many connections of yours here")

        self._greetings += 1
        try:
            async with asyncio.timeout(self._config.dial_timeout_s):
                connection.peer, _ = await answer_greeting(
                    self._introduction,
                    PURPOSE,
                    read,
                    lambda frame: connection.write([frame.SerializeToString()]),
                    admit,
                )
        finally:
            self._greetings -= 1
        return connection.peer

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _greeting(connection: Connection) -> bytes:
    frame = await connection.read(GREETING_BYTES_MAX)
    if frame is None:
        raise RemoteProtocolError("no hello")
    return bytes(frame)


def _prepared(sock: socket.socket, config: PeerConfig) -> socket.socket:
    """Never blocks, sends at once, and notices within some seconds that the other machine is gone."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = max(1, round(config.keepalive_s / 2))
    for option, value in (("TCP_KEEPIDLE", round(config.keepalive_s)), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", probes)):
        if hasattr(socket, option):  # not everywhere
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), max(1, value))
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1500 * config.keepalive_s))
    return sock


def _fitted(sock: socket.socket, config: PeerConfig) -> float:
    """Bound what is on its way to one that is near; returns the round trip in seconds as the kernel saw it, 0 where it
    does not tell.

    Left to itself the kernel takes megabytes from us, more than a busy receiver's kernel has room for: it drops some,
    and waits 0.2 s, then 0.4 s, then 0.8 s ... for them to come again. Over a short way so much is never needed.
    """
    if not hasattr(socket, "TCP_INFO"):
        return 0.0
    microseconds: int
    (microseconds,) = struct.unpack_from(
        "I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES), _RTT_AT
    )
    if microseconds < config.near_s * 1e6:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, config.near_bytes_max)
    return microseconds / 1e6

"""`moshpitd bench packet-loss --part loopback`: how fast one process tells another over loopback, and at what cost.

Sender and receiver are processes of their own. Over UDP they are the daemon's own socket and path: packets sealed and
checked one by one, at a rate that is fixed, so that what is lost is lost by ourselves; the receiver counts. Beside it
gRPC and plain TCP move as many bytes in pieces of 1 MiB, as fast as they can. Processor seconds are those of both
ends. What packets hold is not computed: that costs any transport the same.
"""

from __future__ import annotations

import asyncio
import importlib.util
import multiprocessing
import multiprocessing.connection
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace

import grpc
import grpc.aio
import numpy as np

from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.lossy_reduce import Burst, Phase
from moshpitd.averaging.messages import Address, Group, Member
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank
from moshpitd.averaging.partition import Piece
from moshpitd.averaging.ranges import Cut, Packets, encode_ranges, range_elements
from moshpitd.cli.failure import ExitCode, Failure
from moshpitd.directory import DatagramSocket
from moshpitd.directory.socket import RECEIVE_BUFFER_BYTES
from moshpitd.peer.datagrams import Frames, Integers
from moshpitd.peer.pace import PaceConfig
from moshpitd.peer.udp import UdpConfig, UdpPath

SESSION = Key(bytes(20))
PIECE_BYTES = 1 << 20
RANGES = 1024
"""Packets that are made at once."""
TIMEOUT_S = 120.0
TRIES = 3
"""Over UDP, of which the one that lost least is told: whatever else the machine does in between loses packets too."""
SMALL_BUFFER_BYTES = 212_992
"""What Linux gives who does not ask."""

Pipe = multiprocessing.connection.Connection
"""One end of each process."""


@dataclass(frozen=True, slots=True)
class Wire:
    """One way of moving bytes."""

    way: str
    asked_bytes_s: float
    """Payload a second that it was to send; 0: as fast as it can."""
    bytes_s: float
    """... that arrived, from the first to the last."""
    lost: float
    """Share of packets."""
    cpu_s_gb: float
    """Processor seconds of both ends by gigabyte sent."""
    receive_buffer_bytes: int = 0
    """As granted by the kernel; 0: not asked."""


@dataclass(frozen=True, slots=True)
class _Udp:
    """How to go over UDP."""

    bytes_s: float
    """0: as the pace finds."""
    offload: bool
    buffer_bytes: int = RECEIVE_BUFFER_BYTES


@dataclass(frozen=True, slots=True)
class _End:
    """What a process did."""

    packets: int
    began: float
    ended: float
    cpu_s: float
    granted_bytes: int = 0


def measure(size: int, say: Callable[[str], None]) -> list[Wire]:
    """Every way, one after another, with so many bytes. Raises Failure when a process dies."""
    wires: list[Wire] = []
    for name, how in (
        ("UDP", _Udp(200e6, offload=False)),
        ("UDP, GSO and GRO", _Udp(200e6, offload=True)),
        ("UDP, GSO and GRO", _Udp(400e6, offload=True)),
        ("UDP, GSO and GRO, at its own pace", _Udp(0.0, offload=True)),
        ("UDP, a buffer as small as usual", _Udp(200e6, offload=False, buffer_bytes=SMALL_BUFFER_BYTES)),
    ):
        say(f"loopback: {name}, {how.bytes_s / 1e6:.0f} MB/s")
        tries = [_udp(name, how, size) for _ in range(TRIES)]
        wires.append(min(tries, key=lambda wire: (wire.lost, -wire.bytes_s)))
    for name, sender, receiver in (
        ("gRPC", _send_grpc, _receive_grpc),
        ("plain TCP", _send_tcp, _receive_tcp),
    ):
        say(f"loopback: {name}")
        sent, received = _both(sender, receiver, size)
        wires.append(Wire(name, 0.0, size / (received.ended - sent.began), 0.0, _cpu(sent, received, size)))
    return wires


def _udp(name: str, how: _Udp, size: int) -> Wire:
    width = 4 * range_elements(codec_named("float32"), np.dtype(np.float32))
    packets = -(-size // (width * RANGES)) * RANGES
    sent, received = _both(_send_udp, _receive_udp, (how, packets))
    return Wire(
        name,
        how.bytes_s,
        received.packets * width / (received.ended - received.began),
        1 - received.packets / packets,
        _cpu(sent, received, packets * width),
        received.granted_bytes,
    )


def _cpu(sent: _End, received: _End, size: int) -> float:
    return (sent.cpu_s + received.cpu_s) / size * 1e9


def _both(
    sender: Callable[[Pipe, object], None], receiver: Callable[[Pipe, object], None], how: object
) -> tuple[_End, _End]:
    """Two processes: the receiver tells its port, is told when the sender is done, and says what came."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for work in (receiver, sender):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=work, args=(theirs, how), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        receiving, sending = pipes
        sending.send(_hear(receiving))
        sent = _hear(sending)
        receiving.send(None)
        received = _hear(receiving)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert isinstance(sent, _End) and isinstance(received, _End)
    return sent, received


def _hear(pipe: Pipe) -> object:
    try:
        if pipe.poll(TIMEOUT_S):
            return pipe.recv()
    except EOFError:
        pass
    raise Failure(ExitCode.FAILED, "a process of the loopback bench died or hangs: what it printed is above")


def _loop(work: Coroutine[object, object, None]) -> None:
    """On the loop that daemons use."""
    factory = None
    if importlib.util.find_spec("uvloop"):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work)


# ---- UDP


class _Inbox:
    """The packets of one stream, from member 0 to member 1."""

    def __init__(self, packets: int) -> None:
        self.expected = packets
        self.arrived = 0
        self.began = self.ended = 0.0
        self.is_over = asyncio.Event()
        coding = codec_named("float32").contribution
        elements = range_elements(codec_named("float32"), np.dtype(np.float32))
        values = np.random.default_rng(1).standard_normal(RANGES * elements).astype(np.float32)
        self._cut = Cut(Piece(0, 0, len(values), "float32", Rank(1)), 0, RANGES, elements)
        (self._packets,) = encode_ranges(coding, self._cut, values, 0, RANGES)
        self._next = 0

    def next_burst(self, session: Key, group_id: GroupId, rank: Rank) -> Burst | None:
        if rank == 0:
            return None
        if self._next == self.expected:
            self.is_over.set()  # who pulls again has put on the wire what it pulled before
            return None
        first = self._next
        self._next += RANGES
        self.began = self.began or time.monotonic()
        cut = replace(self._cut, first=first, piece=replace(self._cut.piece, start=first * self._cut.range_elements))
        made = Packets(np.arange(first, first + RANGES), self._packets.rows)
        return Burst(Phase.CONTRIBUTION, Rank(1), 0, self.expected, cut, lambda: [made], self._next == self.expected)

    def packets_expected(self, session: Key, group_id: GroupId, phase: Phase, sender: Rank) -> int:
        return self.expected

    def packets_received(
        self,
        session: Key,
        group_id: GroupId,
        phase: Phase,
        sender: Rank,
        sequences: Integers,
        offsets: Integers,
        rows: Frames,
    ) -> None:
        self.ended = time.monotonic()
        self.began = self.began or self.ended
        self.arrived += len(sequences)
        if self.arrived == self.expected:
            self.is_over.set()

    def stream_ended(self, session: Key, group_id: GroupId, phase: Phase, sender: Rank) -> None:
        self.is_over.set()

    def path_measured(self, session: Key, group_id: GroupId, rank: Rank, round_trip_s: float) -> None:
        pass

    def path_blocked(self, session: Key, group_id: GroupId, rank: Rank) -> None:
        raise AssertionError("no datagram passes over loopback")


def _send_udp(pipe: Pipe, how: object) -> None:
    _loop(_udp_end(pipe, how, Rank(0)))


def _receive_udp(pipe: Pipe, how: object) -> None:
    _loop(_udp_end(pipe, how, Rank(1)))


async def _udp_end(pipe: Pipe, how: object, rank: Rank) -> None:
    assert isinstance(how, tuple)
    chosen, packets = how
    assert isinstance(chosen, _Udp)
    opened = await DatagramSocket.open("127.0.0.1", 0, offload=chosen.offload)
    granted = opened.receive_buffer_bytes
    if chosen.buffer_bytes < RECEIVE_BUFFER_BYTES:
        with socket.socket(fileno=opened.fileno()) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, chosen.buffer_bytes // 2)  # the kernel doubles it
            granted = same.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
            same.detach()
    loop = asyncio.get_running_loop()
    if rank == 1:
        pipe.send(opened.address.port)
        address = ""
    else:
        address = f"127.0.0.1:{await loop.run_in_executor(None, pipe.recv)}"
    fixed = PaceConfig(first_bytes_s=chosen.bytes_s, min_bytes_s=chosen.bytes_s, max_bytes_s=chosen.bytes_s, growth=1.0)
    path = UdpPath(opened, UdpConfig(patience_s=30.0, pace=fixed if chosen.bytes_s else PaceConfig()))
    inbox = _Inbox(packets)
    path.serve(inbox)
    members = tuple(
        Member(PeerId(f"{n:064x}"), Incarnation(1), n, 1.0, Address(address if n == 1 else ""), n == 1)
        for n in range(2)
    )
    spans, token = (0, 0, packets), bytes(16)
    group = Group(GroupId(token), token, SESSION, 0, 0, 0, members[0].peer, members, spans, 1 << 20, TIMEOUT_S, (), ())
    path.open_group(SESSION, group, rank, "float32")
    cpu_s = time.process_time()
    if rank == 0:
        await asyncio.wait_for(inbox.is_over.wait(), TIMEOUT_S)
        pipe.send(_End(path.packets_sent, inbox.began, time.monotonic(), time.process_time() - cpu_s))
        await loop.run_in_executor(None, pipe.poll, TIMEOUT_S)  # stays to tell its last marks
    else:
        await asyncio.wait_for(inbox.is_over.wait(), TIMEOUT_S)
        await asyncio.sleep(0.2)  # what is still in the socket
        pipe.send(_End(inbox.arrived, inbox.began, inbox.ended, time.process_time() - cpu_s, granted))
        pipe.recv()
    await path.close()
    opened.close()


# ---- what it is compared with


def _send_grpc(pipe: Pipe, size: object) -> None:
    _loop(_grpc_sender(pipe, size))


def _receive_grpc(pipe: Pipe, size: object) -> None:
    _loop(_grpc_receiver(pipe, size))


OPTIONS = [("grpc.max_receive_message_length", PIECE_BYTES + 1024), ("grpc.http2.lookahead_bytes", 4 << 20)]


async def _grpc_sender(pipe: Pipe, size: object) -> None:
    assert isinstance(size, int)
    piece = bytes(PIECE_BYTES)
    port = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        call: grpc.aio.StreamUnaryCall[bytes, bytes] = channel.stream_unary("/bench/Take")()
        await channel.channel_ready()
        began, cpu_s = time.monotonic(), time.process_time()
        for _ in range(size // PIECE_BYTES):
            await call.write(piece)
        await call.done_writing()
        await call
        pipe.send(_End(0, began, time.monotonic(), time.process_time() - cpu_s))


async def _grpc_receiver(pipe: Pipe, size: object) -> None:
    ended: list[_End] = []

    async def take(requests: AsyncIterator[bytes], context: object) -> bytes:
        began, cpu_s = time.monotonic(), time.process_time()
        async for _ in requests:
            pass
        ended.append(_End(0, began, time.monotonic(), time.process_time() - cpu_s))
        return b""

    server = grpc.aio.server(options=OPTIONS)
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(take)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", {"Take": handler}),))
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
    pipe.send(ended[0])
    await server.stop(None)


def _send_tcp(pipe: Pipe, size: object) -> None:
    assert isinstance(size, int)
    piece = bytes(PIECE_BYTES)
    with socket.create_connection(("127.0.0.1", pipe.recv())) as connection:
        began, cpu_s = time.monotonic(), time.process_time()
        for _ in range(size // PIECE_BYTES):
            connection.sendall(piece)
        pipe.send(_End(0, began, time.monotonic(), time.process_time() - cpu_s))


def _receive_tcp(pipe: Pipe, size: object) -> None:
    assert isinstance(size, int)
    into = memoryview(bytearray(PIECE_BYTES))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pipe.send(listening.getsockname()[1])
        connection, _ = listening.accept()
        with connection:
            began, cpu_s, left = time.monotonic(), time.process_time(), size // PIECE_BYTES * PIECE_BYTES
            while left:
                left -= connection.recv_into(into)
            end = _End(0, began, time.monotonic(), time.process_time() - cpu_s)
    pipe.recv()
    pipe.send(end)

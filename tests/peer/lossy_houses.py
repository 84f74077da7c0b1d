"""Lossy rounds over real sockets: a UDP path and a machine for each member; messages and chunks are handed across.

Loss is the kernel's: a classic BPF program on the receiving socket, which needs no privileges.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.effects import CloseStreams, Compute, Effect, Log, OpenStreams, Send, Sendable
from moshpitd.averaging.lossy_reduce import Burst, LossyConfig, LossyReduce, Paths, Phase
from moshpitd.averaging.messages import Address, Group, RangesWanted
from moshpitd.averaging.names import GroupId, Key, Rank
from moshpitd.averaging.vector import Vector
from moshpitd.directory import DatagramSocket
from moshpitd.peer.datagrams import Frames, Integers
from moshpitd.peer.udp import UdpConfig, UdpPath
from tests.averaging.group_on_paper import Values, flat, group_of, number_of

SESSION = Key(bytes(20))
SO_ATTACH_FILTER = 26


def lose_incoming(fileno: int, share: float, *, first_byte: int | None = None) -> None:
    """From now on the kernel drops this share of the datagrams that arrive at this socket, each by its own dice; only
    of those that begin with this byte, if it is given."""
    random_word = 0xFFFFF000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM
    others_pass = [
        (0x30, 0, 0, 8),  # A = the byte after UDP's header
        (0x15, 0, 3, first_byte or 0),  # if A == first_byte, else keep
    ]
    program = [
        *(others_pass if first_byte is not None else []),
        (0x20, 0, 0, random_word),  # A = random
        (0x25, 0, 1, int((1 - share) * 0xFFFFFFFF)),  # if A > limit
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0x40000),  # keep
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    kept = ctypes.create_string_buffer(code)
    with socket.socket(fileno=os.dup(fileno)) as same:
        same.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(kept)))


@dataclass(eq=False)
class LossyHouse:
    """One member: what the driver and the doors do for it."""

    rank: Rank
    udp: UdpPath
    socket: DatagramSocket
    street: list[LossyHouse]
    machine: LossyReduce | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    log: list[str] = field(default_factory=list)
    codec: str = "float32"
    blocked: list[Rank] = field(default_factory=list)
    _timer: asyncio.TimerHandle | None = None
    _result: Vector | None = None

    def begin(self, group: Group, values: Vector, paths: Paths, config: LossyConfig, codec: str) -> None:
        self.ended.clear()
        self.codec = codec
        self._result = Vector.empty(values.layout)
        self.machine = LossyReduce(
            group,
            self.rank,
            values=values,
            result=self._result,
            codec=codec_named(codec),
            paths=paths,
            config=config,
            now=self.now,
        )
        self.feed(lambda machine: None)

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def values(self) -> Values:
        assert self._result is not None
        return flat(self._result)

    @property
    def result(self) -> bytes:
        assert self._result is not None
        return self._result.buffer.tobytes()

    def feed(self, put: Callable[[LossyReduce], None]) -> None:
        machine = self.machine
        assert machine is not None
        put(machine)
        while effects := machine.take_effects():
            for effect in effects:
                self._do(machine, effect)
        if machine.finished:
            self.ended.set()
        if self._timer is not None:
            self._timer.cancel()
        due = machine.next_deadline()
        loop = asyncio.get_running_loop()
        self._timer = None if due is None else loop.call_at(due, self.feed, lambda m: m.handle_timer(self.now))

    def _do(self, machine: LossyReduce, effect: Effect) -> None:
        loop = asyncio.get_running_loop()
        match effect:
            case OpenStreams(group=group, rank=rank):
                self.udp.open_group(SESSION, group, rank, self.codec)
            case CloseStreams(group_id=group_id):
                self.udp.close_group(group_id)
            case Sendable(group_id=group_id, rank=rank):
                self.udp.ring(group_id, rank)
                loop.call_soon(self._pull_chunks, rank)
            case Compute(job_id=job_id, job=job):
                value = job()
                loop.call_soon(self.feed, lambda m: m.compute_finished(job_id, value, self.now))
            case Send(peer=peer, message=message):
                assert isinstance(message, RangesWanted)
                if number_of(peer) >= len(self.street):
                    return  # it fell silent
                other = self.street[number_of(peer)]
                loop.call_soon(other.feed, lambda m: m.receive(message, self.rank, self.now))
            case Log(text=text):
                self.log.append(text)
            case _:
                raise AssertionError(effect)

    def _pull_chunks(self, rank: Rank) -> None:
        assert self.machine is not None
        while outgoing := self.machine.next_outgoing(rank):
            chunk = replace(outgoing.chunk, payload=bytes(outgoing.encode()))
            if rank >= len(self.street):
                continue
            put = partial(LossyReduce.chunk_received, chunk=chunk, sender=self.rank, now=self.now)
            asyncio.get_running_loop().call_soon(self.street[rank].feed, put)
        self.feed(lambda machine: machine.pulled_dry(self.now))

    # ---- the inbox of the UDP path

    def next_burst(self, session: Key, group_id: GroupId, rank: Rank) -> Burst | None:
        assert self.machine is not None
        burst = self.machine.next_burst(rank)
        if burst is None:
            self.feed(lambda machine: machine.pulled_dry(self.now))
        return burst

    def packets_expected(self, session: Key, group_id: GroupId, phase: Phase, sender: Rank) -> int:
        assert self.machine is not None
        return self.machine.packets_expected(phase, sender)

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
        self.feed(lambda machine: machine.packets_received(phase, sender, sequences, offsets, rows, self.now))

    def stream_ended(self, session: Key, group_id: GroupId, phase: Phase, sender: Rank) -> None:
        self.feed(lambda machine: machine.stream_ended(phase, sender, self.now))

    def path_measured(self, session: Key, group_id: GroupId, rank: Rank, round_trip_s: float) -> None:
        self.feed(lambda machine: machine.path_measured(rank, round_trip_s))

    def path_blocked(self, session: Key, group_id: GroupId, rank: Rank) -> None:
        self.blocked.append(rank)
        self.feed(lambda machine: machine.path_blocked(rank, self.now))


class Street:
    """Houses side by side on loopback; use as a context."""

    def __init__(
        self,
        n: int,
        *,
        loss: float = 0.0,
        offload: bool = True,
        config: UdpConfig | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.houses: list[LossyHouse] = []
        self.paths = [Paths() for _ in range(n)]
        self._n = n
        self._loss = loss
        self._offload = offload
        self._config = config or UdpConfig()
        self._host = host
        self._round = 0

    async def __aenter__(self) -> Street:
        for rank in range(self._n):
            opened = await DatagramSocket.open(self._host, 0, offload=self._offload)
            if self._loss:
                lose_incoming(opened.fileno(), self._loss)
            house = LossyHouse(Rank(rank), UdpPath(opened, self._config), opened, self.houses)
            house.udp.serve(house)
            self.houses.append(house)
        return self

    async def __aexit__(self, *_: object) -> None:
        for house in self.houses:
            if house.machine is not None and not house.machine.finished:
                house.machine.suspect(Rank(1 - min(1, house.rank)), "the test is over", house.now)
            await house.udp.close()
            house.socket.close()

    def group(self, values: Sequence[Vector], **how: object) -> Group:
        self._round += 1
        group = group_of(values, **how)  # type: ignore[arg-type]
        members = tuple(
            replace(member, address=Address(str(house.socket.address)))
            for member, house in zip(group.members, self.houses, strict=True)
        )
        number = self._round.to_bytes(16, "big")
        return replace(group, members=members, group_id=GroupId(number), token=number)

    async def round(
        self,
        values: Sequence[Vector],
        *,
        group: Group | None = None,
        codec: str = "float32",
        config: LossyConfig | None = None,
        limit_s: float = 20.0,
    ) -> list[LossyReduce]:
        """One round of all; the machines as they ended."""
        group = group or self.group(values)
        for house, vector, paths in zip(self.houses, values, self.paths, strict=True):
            house.begin(group, vector, paths, config or LossyConfig(), codec)
        async with asyncio.timeout(limit_s):
            for house in self.houses:
                await house.ended.wait()
        return [house.machine for house in self.houses if house.machine is not None]

"""The UDP path of lossy rounds: bursts of packets from the machine to the wire, and what arrives to the machine.

Knows handshakes, pace and loss reports between two members of a group. Does not know what packets hold, what is
missing or when a round ends: packets are pulled from and handed to the `PacketInbox`. Between two members pass

- HELLO, said by both until they hear that they were heard: then the other's group is open, its address is known (also
  that of one that nobody can dial), and datagrams of full length pass both ways. Where they do not in time, the path is
  blocked: `path_blocked`, and all goes over the reliable streams;
- data, at the pace of this path, and never twice;
- MARK, now and then: so many packets have I sent you so far. At the end of a phase until it was heard;
- REPORT, in answer: so many arrived. The pace is made from it (pace.py).

Everything is sealed under the group's token (datagrams.py). What is not, or comes twice, is dropped before any work and
counted in `refusals`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket as sockets
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.lossy_reduce import Burst, Phase
from moshpitd.averaging.messages import Group
from moshpitd.averaging.names import GroupId, Key, PeerId, Rank, short
from moshpitd.averaging.partition import known_rate
from moshpitd.averaging.ranges import PAYLOAD_BYTES_MAX
from moshpitd.peer.datagrams import (
    CONTROL,
    FIRST_BYTE,
    HEADER_BYTES,
    MAC_BYTES,
    Frames,
    Integers,
    Kind,
    Refusals,
    Seal,
    Stream,
    codec_byte,
    genuine,
    genuine_control,
    pack,
    pack_control,
    round_id,
    streams_in,
)
from moshpitd.peer.pace import Pace, PaceConfig

log = logging.getLogger("moshpitd.peer")

HostPort = tuple[str, int]
BATCH_BYTES_MAX = 64_000
BATCH_PACKETS_MAX = 64
"""One send: what the kernel cuts at once."""

MARKS_MAX = 64
"""Of one member, unanswered ones whose times are kept."""

HELLO = struct.Struct("<B")
"""Whether the sender has heard the receiver, and whether it knows to be heard by it: a bit each. Padded to the longest
payload."""
MARK = struct.Struct("<IB")
"""Packets sent so far in this round, and the phases that are over, a bit each."""
REPORT = struct.Struct("<IIB")
"""The mark's count, packets that have arrived, and the phases known to be over."""


class BulkSocket(Protocol):
    """What this needs of the daemon's one UDP socket."""

    def claim_bulk(self, first_byte: int, handler: Callable[[memoryview, int, HostPort], None]) -> None: ...
    def release(self, first_byte: int) -> None: ...
    def send_bulk(self, datagrams: memoryview, size: int, to: HostPort) -> bool: ...
    async def writable(self) -> None: ...


class PacketInbox(Protocol):
    """Where packets come from and go to. Called on the event loop; must not block."""

    def next_burst(self, session: Key, group_id: GroupId, rank: Rank) -> Burst | None:
        """Pull: the next packets for this member."""

    def packets_expected(self, session: Key, group_id: GroupId, phase: Phase, sender: Rank) -> int:
        """How many sequence numbers this member has for us."""

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
        """`rows` are valid during the call. May raise RemoteProtocolError."""

    def stream_ended(self, session: Key, group_id: GroupId, phase: Phase, sender: Rank) -> None:
        """This member sent its last packet of this phase."""

    def path_measured(self, session: Key, group_id: GroupId, rank: Rank, round_trip_s: float) -> None:
        """How long a datagram and its answer took, at best so far."""

    def path_blocked(self, session: Key, group_id: GroupId, rank: Rank) -> None:
        """No datagram passes between this member and us."""


@dataclass(frozen=True, slots=True)
class UdpConfig:
    """How the UDP path finds out what it can do."""

    hello_s: float = 0.01
    """Between the first hellos; longer from one to the next."""
    hello_max_s: float = 0.1
    """... up to this."""
    patience_s: float = 1.5
    """Who is not heard for so long cannot be reached by datagrams: a firewall, a small MTU. Members open a group about
    a round trip apart."""
    again_s: float = 600.0
    """For so long one that could not be reached is given `patience_again_s` only."""
    patience_again_s: float = 0.1
    window_bytes: int = 1 << 20
    """Sent to one member and not known to be read, by all its senders together: a quarter of its buffer, since
    the kernel counts its own part of each datagram."""
    unheard_s: float = 0.25
    """A report that is waited for so long was lost, and those after it."""
    pause_min_s: float = 0.001
    """The shortest pause of a paced sender: uvloop counts in milliseconds, what is less would spin. A burst's tokens
    make up for it."""
    mark_s: float = 0.01
    """So often a sender asks how much has arrived."""
    mark_again_s: float = 0.005
    """The end of a phase is told again after this, longer from one to the next, until it was heard."""
    ends_max: int = 20
    """... so often at most."""
    linger_s: float = 1.0
    """A group that is done still answers so long: others may not have heard its last word."""
    pace: PaceConfig = field(default_factory=PaceConfig)


@dataclass(eq=False)
class Member:
    """The path between us and one member of a group."""

    peer: PeerId
    seal: Seal
    pace: Pace
    address: HostPort | None = None
    is_heard: bool = False
    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    """Datagrams pass both ways: it has heard us, and we have heard so."""
    bell: asyncio.Event = field(default_factory=asyncio.Event)
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    seen: dict[Phase, bytearray] = field(default_factory=dict)
    newest: dict[Kind, int] = field(default_factory=dict)
    """Sequence numbers of control datagrams: an older one is a replay."""
    arrived: int = 0
    their_ends: int = 0
    """Phases, a bit each, that it told us are over."""
    sent: int = 0
    is_sending: bool = False
    """A burst is on its way out, though its first packet may have to wait for the pace."""
    ends: int = 0
    """Phases, a bit each, of which all is on the wire."""
    ends_heard: int = 0
    """... and that it knows are."""
    marked: tuple[int, int] = (0, 0)
    """Of its newest report: sent, arrived."""
    marks_at: dict[int, float] = field(default_factory=dict)
    """When we first asked how many of so many packets arrived; unanswered ones."""
    round_trip_s: float = math.inf
    asked: int = 0
    """Packets sent when it was last asked how much has arrived ..."""
    read: int = 0
    """... and those sent before the newest mark that it answered."""
    was_read: asyncio.Event = field(default_factory=asyncio.Event)
    waited: bool = False
    """Its pace held us up since the last mark: the rate is what limits."""


@dataclass(eq=False)
class Round:
    """A group whose packets travel here."""

    session: Key
    group: Group
    rank: Rank
    codec: int
    id: bytes
    seal: Seal
    members: dict[Rank, Member]
    packed: dict[int, tuple[list[Frames], int]] = field(default_factory=dict)
    """Averages as datagrams, by their first range, and how many members have yet to get them: all get the same."""
    next_control: int = 1
    """Of all control datagrams we send in this round: no nonce comes twice."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    is_closing: bool = False


class UdpPath:
    """All groups' packets of this daemon."""

    def __init__(self, socket: BulkSocket, config: UdpConfig | None = None) -> None:
        """The socket stays its owner's to close."""
        self.refusals = Refusals()
        self.packets_sent = 0
        self.packets_received = 0
        self._socket = socket
        self._config = config or UdpConfig()
        self._inbox: PacketInbox | None = None
        self._rounds: dict[bytes, Round] = {}
        self._by_group: dict[GroupId, Round] = {}
        self._paces: dict[PeerId, Pace] = {}
        """What was learnt of a path outlives the round."""
        self._blocked: dict[PeerId, float] = {}
        """Who could not be reached, and until when that is believed."""
        self._loop = asyncio.get_running_loop()

    def serve(self, inbox: PacketInbox) -> None:
        """Begin to answer."""
        self._inbox = inbox
        self._socket.claim_bulk(FIRST_BYTE, self._datagrams_received)

    async def close(self) -> None:
        """End everything."""
        if self._inbox is not None:
            self._socket.release(FIRST_BYTE)
        for each in list(self._rounds.values()):
            await self._end(each)

    def open_group(self, session: Key, group: Group, rank: Rank, codec: str) -> None:
        """Exchange packets with every member as soon as it is heard."""
        others = [Rank(r) for r in range(len(group.members)) if r != rank]
        members = {
            r: Member(group.members[r].peer, Seal(group.token, r), self._pace_of(group, rank, r)) for r in others
        }
        seal = Seal(group.token, rank)
        opened = Round(session, group, rank, codec_byte(codec), round_id(group.token), seal, members)
        self._rounds[opened.id] = self._by_group[group.group_id] = opened
        for r in others:
            self._spawn(opened, self._serve_member(opened, r))

    def close_group(self, group_id: GroupId) -> None:
        """The group is done: what is packed is still sent, and others are answered for a while."""
        closed = self._by_group.pop(group_id, None)
        if closed is None:
            return
        closed.is_closing = True
        for member in closed.members.values():
            member.bell.set()
        self._loop.call_later(self._config.linger_s, self._forget, closed)

    def ring(self, group_id: GroupId, rank: Rank) -> None:
        """A pull for this member would succeed."""
        if (rung := self._by_group.get(group_id)) and rank in rung.members:
            rung.members[rank].bell.set()

    def is_blocked(self, peer: PeerId) -> bool:
        """Whether datagrams to this peer were found not to arrive, lately."""
        return self._blocked.get(peer, 0.0) > self._loop.time()

    @property
    def peers_blocked(self) -> int:
        """To so many datagrams were found not to arrive, lately."""
        return sum(map(self.is_blocked, self._blocked))

    def pace(self, peer: PeerId) -> Pace | None:
        """What is known of the path to this peer."""
        return self._paces.get(peer)

    # ---- sending

    def _pace_of(self, group: Group, rank: Rank, other: Rank) -> Pace:
        peer, others = group.members[other].peer, len(group.members) - 1
        if peer not in self._paces:
            rates = [rate for rate in (group.members[rank].up_bytes_s, known_rate(group.members[other])) if rate > 0]
            self._paces[peer] = Pace(self._config.pace, min(rates, default=self._config.pace.first_bytes_s) / others)
        return self._paces[peer]

    async def _serve_member(self, opened: Round, rank: Rank) -> None:
        """From the first hello to the last mark."""
        member = opened.members[rank]
        assert self._inbox is not None
        if not await self._meet(opened, rank):
            if not self.is_blocked(member.peer):  # else it would never be given its whole time again
                self._blocked[member.peer] = self._loop.time() + self._config.again_s
            log.info("no datagram passes between %s and us: lossy rounds with it go over gRPC", short(member.peer))
            self._inbox.path_blocked(opened.session, opened.group.group_id, rank)
            return
        self._blocked.pop(member.peer, None)
        telling: asyncio.Task[None] | None = None
        while not opened.is_closing:
            burst = self._inbox.next_burst(opened.session, opened.group.group_id, rank)
            if burst is None:
                await member.bell.wait()
                member.bell.clear()
                continue
            frames = self._packed(opened, burst)
            member.is_sending = True
            if telling is None or telling.done():
                telling = self._spawn(opened, self._tell_marks(opened, member))
            for each in frames:
                await self._send_paced(opened, member, each)
            member.is_sending = False
            if burst.ends:
                member.ends |= 1 << burst.phase
                member.reported.set()

    def _packed(self, opened: Round, burst: Burst) -> list[Frames]:
        """All of it at once, for the values may change when the machine has committed; averages once for all."""
        is_average, first = burst.phase is Phase.AVERAGE, burst.cut.first
        frames, others = opened.packed.pop(first, ([], len(opened.members))) if is_average else ([], 0)
        frames = frames or [
            pack(
                Stream(
                    Kind(burst.phase),
                    opened.codec,
                    opened.rank,
                    opened.id,
                    burst.span,
                    packets.rows.shape[1],
                    burst.span_count,
                ),
                opened.seal,
                packets.numbers - burst.span_first,
                burst.cut.piece.start + (packets.numbers - burst.cut.first) * burst.cut.range_elements,
                packets.rows,
            )
            for packets in burst.encode()
        ]
        if is_average and others > 1:
            opened.packed[first] = frames, others - 1
        return frames

    async def _meet(self, opened: Round, rank: Rank) -> bool:
        """Say hello until it is heard; False when patience is over."""
        config, member = self._config, opened.members[rank]
        patience_s = config.patience_again_s if self.is_blocked(member.peer) else config.patience_s
        pause_s = config.hello_s
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                if member.address is None:
                    member.address = await self._resolve(opened.group, rank)
                while not member.is_open.is_set():
                    self._say_hello(opened, member)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(member.is_open.wait(), pause_s)
                    pause_s = min(1.5 * pause_s, config.hello_max_s)
        return member.is_open.is_set()

    async def _resolve(self, group: Group, rank: Rank) -> HostPort | None:
        """Where its datagrams go; None: it has to be heard first."""
        host, _, port = group.members[rank].address.rpartition(":")
        if not group.members[rank].dialable or not host:
            return None
        with suppress(OSError, ValueError):
            found = await self._loop.getaddrinfo(host.strip("[]"), int(port), type=sockets.SOCK_DGRAM)
            return str(found[0][4][0]), int(found[0][4][1])
        return None

    async def _send_paced(self, opened: Round, member: Member, frames: Frames) -> None:
        width = frames.shape[1]
        at_once = max(1, min(BATCH_PACKETS_MAX, BATCH_BYTES_MAX // width))
        whole = frames.reshape(-1).data
        for first in range(0, len(frames), at_once):
            batch = whole[first * width : (first + at_once) * width]
            await self._room(opened, member, width)
            while (delay := member.pace.delay(len(batch), self._loop.time())) > 0:
                member.waited = True
                await asyncio.sleep(max(delay, self._config.pause_min_s))
            assert member.address is not None
            while not self._socket.send_bulk(batch, width, member.address):
                await self._socket.writable()
            count = len(batch) // width
            member.sent += count
            self.packets_sent += count
            await asyncio.sleep(0)

    async def _room(self, opened: Round, member: Member, width: int) -> None:
        """Wait while the receiver may not have read what we sent: on a busy machine it would lose what its buffer has
        no room for. What its path holds comes on top. One that is not heard in time is believed to have read all."""
        config = self._config
        in_flight = member.pace.bytes_s * member.round_trip_s if math.isfinite(member.round_trip_s) else 0.0
        window = max(BATCH_PACKETS_MAX, int((config.window_bytes / len(opened.members) + in_flight) / width))
        if member.sent - member.asked >= window // 2:
            self._mark(opened, member)
        with suppress(TimeoutError):
            async with asyncio.timeout(config.unheard_s):
                while member.sent - member.read > window:
                    member.was_read.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(member.was_read.wait(), config.mark_s)
                        continue
                    self._mark(opened, member)
        if member.sent - member.read > window:
            member.read = member.sent

    def _mark(self, opened: Round, member: Member) -> None:
        member.asked = member.sent
        if member.sent not in member.marks_at and len(member.marks_at) < MARKS_MAX:
            member.marks_at[member.sent] = self._loop.time()
        self._say(opened, member, Kind.MARK, MARK.pack(member.sent, member.ends))

    async def _tell_marks(self, opened: Round, member: Member) -> None:
        """While packets go out, and until their end was heard."""
        config = self._config
        pause_s, ends_told = config.mark_again_s, 0
        while ends_told < config.ends_max:
            is_over = member.ends and member.ends & ~member.ends_heard
            if not is_over and not member.is_sending and member.ends and member.marked[0] == member.sent:
                return  # the next burst begins anew
            member.reported.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(member.reported.wait(), pause_s if is_over else config.mark_s)
            if member.ends & ~member.ends_heard:
                ends_told += 1
                pause_s = min(1.5 * pause_s, 0.1)
            self._mark(opened, member)

    def _say_hello(self, opened: Round, member: Member) -> None:
        bits = member.is_heard | member.is_open.is_set() << 1
        self._say(opened, member, Kind.HELLO, HELLO.pack(bits).ljust(PAYLOAD_BYTES_MAX, b"\0"))

    def _say(self, opened: Round, member: Member, kind: Kind, body: bytes) -> None:
        if member.address is None:
            return
        stream = Stream(kind, opened.codec, opened.rank, opened.id, 0, len(body), 0)
        datagram = pack_control(stream, opened.seal, opened.next_control, body)
        opened.next_control += 1
        self._socket.send_bulk(memoryview(datagram), len(datagram), member.address)

    # ---- receiving

    def _datagrams_received(self, datagrams: memoryview, size: int, sender: HostPort) -> None:
        whole = np.frombuffer(datagrams, np.uint8)
        alike = len(whole) // size * size
        for frames in (whole[:alike].reshape(-1, size), whole[alike:].reshape(1, -1)):
            if frames.size:
                for stream, same in streams_in(frames, self.refusals):
                    self._stream_received(stream, same, sender)

    def _stream_received(self, stream: Stream, frames: Frames, sender: HostPort) -> None:
        known = self._rounds.get(stream.round_id)
        member = known.members.get(Rank(stream.sender)) if known else None
        if known is None or member is None or stream.codec != known.codec:
            self.refusals.unknown += len(frames)
        elif stream.kind in CONTROL:
            for frame in frames:
                newest = member.newest.get(stream.kind, 0)
                if control := genuine_control(stream, frame, member.seal, newest, self.refusals):
                    member.newest[stream.kind] = control[0]
                    self._heard(member, sender)
                    self._control_received(known, Rank(stream.sender), stream.kind, control[1])
        elif known.is_closing:
            self.refusals.unknown += len(frames)
        else:
            self._data_received(known, stream, member, frames, sender)

    def _data_received(self, known: Round, stream: Stream, member: Member, frames: Frames, sender: HostPort) -> None:
        assert self._inbox is not None
        phase, rank, where = Phase(stream.kind), Rank(stream.sender), (known.session, known.group.group_id)
        if phase not in member.seen:
            member.seen[phase] = bytearray(self._inbox.packets_expected(*where, phase, rank))
        seen = member.seen[phase]
        span = known.rank if phase is Phase.CONTRIBUTION else rank
        if stream.count != len(seen) or stream.span != span:
            self.refusals.nonsense += len(frames)
            return
        sequences, offsets, rows = genuine(stream, frames, member.seal, seen, self.refusals)
        if not len(sequences):
            return
        self._heard(member, sender)
        member.arrived += len(sequences)
        self.packets_received += len(sequences)
        try:
            self._inbox.packets_received(*where, phase, rank, sequences, offsets, rows)
        except RemoteProtocolError as wrong:
            log.warning("%s sent nonsense: %s", short(member.peer), wrong)
            self.refusals.nonsense += len(sequences)

    def _heard(self, member: Member, sender: HostPort) -> None:
        """What is sealed comes from who has the token: that is where it can be reached."""
        member.address = sender
        member.is_heard = True

    def _control_received(self, known: Round, rank: Rank, kind: Kind, body: bytes) -> None:
        assert self._inbox is not None
        member = known.members[rank]
        try:
            if kind is Kind.HELLO:
                (bits,) = HELLO.unpack_from(body)
                if bits & 1:
                    member.is_open.set()
                if not bits & 2:
                    self._say_hello(known, member)
            elif kind is Kind.MARK:
                sent, ends = MARK.unpack(body)
                if not known.is_closing:
                    for phase in Phase:
                        if ends & ~member.their_ends & 1 << phase:
                            self._inbox.stream_ended(known.session, known.group.group_id, phase, rank)
                member.their_ends |= ends
                self._say(known, member, Kind.REPORT, REPORT.pack(sent, member.arrived, member.their_ends))
            else:
                member.is_open.set()
                sent, arrived, ends = REPORT.unpack(body)
                self._report_received(member, sent, arrived, ends)
                took_s = self._loop.time() - member.marks_at.pop(sent, -math.inf)
                if took_s < member.round_trip_s:
                    member.round_trip_s = took_s
                    self._inbox.path_measured(known.session, known.group.group_id, rank, took_s)
                member.marks_at = {asked: at for asked, at in member.marks_at.items() if asked > sent}
        except struct.error:
            self.refusals.nonsense += 1

    def _report_received(self, member: Member, sent: int, arrived: int, ends: int) -> None:
        if member.read < sent <= member.sent:
            member.read = sent
            member.was_read.set()
        before_sent, before_arrived = member.marked
        if before_sent <= sent <= member.sent and before_arrived <= arrived:
            if sent - before_sent >= self._config.pace.sent_min:
                member.pace.report(sent=sent - before_sent, heard=arrived - before_arrived, is_full=member.waited)
                member.waited = False
                member.marked = sent, arrived
            elif sent == member.sent:
                member.marked = sent, arrived
        if ends & ~member.ends_heard:
            member.ends_heard |= ends
            member.reported.set()

    # ---- ending

    def _forget(self, closed: Round) -> None:
        if self._rounds.get(closed.id) is closed:
            del self._rounds[closed.id]
        for task in closed.tasks:
            task.cancel()

    async def _end(self, ended: Round) -> None:
        self._by_group.pop(ended.group.group_id, None)
        tasks = list(ended.tasks)
        self._forget(ended)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, opened: Round, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        opened.tasks.add(task)
        task.add_done_callback(opened.tasks.discard)
        return task


assert HEADER_BYTES + PAYLOAD_BYTES_MAX + MAC_BYTES + 48 <= 1500, "a datagram fits an Ethernet frame over IPv6"

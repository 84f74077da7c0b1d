"""The chunks of groups: one transfer between each two members, over one or several links.

Knows who dials whom, over what, and who may speak for which member. Does not know what chunks mean: they are pulled
from and handed to the `ChunkInbox`. A link is gRPC's Transfer or a connection of the plain TCP path; both carry the
same frames.

Of two members the lower rank dials, unless only one can be dialled. It takes the TCP path where both offer it and it
can be reached, else gRPC; over a long way, where one connection does not fill the line, it opens several links.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol, cast

import grpc

from moshpitd.averaging.all_reduce import Outgoing
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.messages import Chunk, Group, Member
from moshpitd.averaging.names import GroupId, Key, PeerId, Rank, short
from moshpitd.identity import peer_id, verify
from moshpitd.peer import wire
from moshpitd.peer.channels import Channels, PeerConfig
from moshpitd.peer.conversation import Introduction
from moshpitd.peer.links import Buffer, DialledCall, Link, LinkBroken, ServedCall, TransferCall, TransferContext
from moshpitd.peer.tcp import Connection, TcpPath
from moshpitd.peer.v1 import peer_pb2

log = logging.getLogger("moshpitd.peer")

LINKS_MAX = 16
"""Between two members, whatever the dialler thinks."""


class ChunkInbox(Protocol):
    """Where chunks come from and go to. Called on the event loop; must not block."""

    def chunk_received(self, session: Key, group_id: GroupId, sender: Rank, chunk: Chunk) -> None:
        """May raise RemoteProtocolError."""

    def next_outgoing(self, session: Key, group_id: GroupId, rank: Rank) -> Outgoing | None:
        """Pull: the next chunk for this member."""

    def is_ahead(self, session: Key, group_id: GroupId, rank: Rank) -> bool:
        """Whether this member's next chunk had better stay where it is, until `read_on`."""

    def stream_opened(self, session: Key, group_id: GroupId, rank: Rank, transport: str) -> None:
        """Over what the chunks to and from this member travel."""

    def stream_lost(self, session: Key, group_id: GroupId, rank: Rank, why: str) -> None:
        """The transfer with this member broke before the group was closed."""


@dataclass(eq=False)
class Streams:
    """The transfers of one group."""

    session: Key
    group: Group
    rank: Rank
    bells: dict[Rank, asyncio.Event] = field(default_factory=dict)
    may_read: dict[Rank, asyncio.Event] = field(default_factory=dict)
    """Waited for by who reads from a member that is ahead."""
    served: set[tuple[Rank, int]] = field(default_factory=set)
    """Member and number of each link we serve: none twice."""
    is_closing: bool = False
    limits: list[tuple[asyncio.Timeout, float]] = field(default_factory=list)
    """Of the links that are open, and how long each may last from the closing on."""

    def limit(self, limit: asyncio.Timeout, linger_s: float) -> None:
        """This link ends `linger_s` after the group is done, whatever the other side does."""
        if self.is_closing:
            limit.reschedule(asyncio.get_running_loop().time() + linger_s)
        else:
            self.limits.append((limit, linger_s))

    def close(self) -> None:
        """The group is done."""
        self.is_closing = True
        for limit, linger_s in self.limits:
            with suppress(RuntimeError):  # it has ended already
                limit.reschedule(asyncio.get_running_loop().time() + linger_s)
        for bell in (*self.bells.values(), *self.may_read.values()):
            bell.set()


@dataclass(eq=False)
class Stranger:
    """A transfer that waits for its group."""

    group_id: GroupId
    may_go: asyncio.Event
    """The group is here, or somebody newer needs the place."""


class Transfers:
    """All groups' transfers of this daemon."""

    def __init__(
        self, introduction: Introduction, config: PeerConfig, channels: Channels, method: str, tcp: TcpPath | None
    ) -> None:
        """`method`: gRPC's. `tcp`: None where the path is not offered."""
        self._identity = introduction.identity
        self._swarm = introduction.swarm
        self._config = config
        self._channels = channels
        self._method = method
        self._tcp = tcp
        self._inbox: ChunkInbox | None = None
        self._streams: dict[GroupId, Streams] = {}
        self._strangers: dict[Stranger, None] = {}
        self._not_reached: dict[PeerId, float] = {}
        """Whose TCP path could not be reached, and when it is tried again."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False

    def serve(self, inbox: ChunkInbox) -> None:
        """Begin to answer."""
        self._inbox = inbox
        if self._tcp is not None:
            self._tcp.serve(self._serve_connection)

    async def close(self, grace_s: float) -> None:
        """End all transfers; what is on its way has `grace_s`."""
        self._leaving = True
        for group_id in list(self._streams):
            self.close_streams(group_id)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tcp is not None:
            await self._tcp.close()

    def open_streams(self, session: Key, group: Group, rank: Rank) -> None:
        """Connect with every member we exchange chunks with."""
        streams = Streams(session, group, rank)
        self._streams[group.group_id] = streams
        for other, member in enumerate(group.members):
            if other == rank:
                continue
            streams.bells[Rank(other)] = asyncio.Event()
            streams.may_read[Rank(other)] = asyncio.Event()
            if _dials(group.members[rank], rank, member, Rank(other)):
                self._spawn(self._dial(streams, Rank(other), 0, self._config.transport))
        for stranger in self._strangers:
            if stranger.group_id == group.group_id:
                stranger.may_go.set()

    def close_streams(self, group_id: GroupId) -> None:
        """The group is done: transfers end once what is on its way has been written."""
        streams = self._streams.pop(group_id, None)
        if streams is not None:
            streams.close()

    def ring(self, group_id: GroupId, rank: Rank) -> None:
        """A pull for this member would succeed."""
        streams = self._streams.get(group_id)
        if streams is not None and rank in streams.bells:
            streams.bells[rank].set()

    def read_on(self, group_id: GroupId, rank: Rank) -> None:
        """This member is no longer ahead."""
        streams = self._streams.get(group_id)
        if streams is not None and rank in streams.may_read:
            streams.may_read[rank].set()

    # ---- dialling

    async def _dial(self, streams: Streams, rank: Rank, number: int, transport: str) -> None:
        """One link to this member. The first one says whether there are to be more."""
        member = streams.group.members[rank]
        is_open = False
        try:
            async with self._link(member, number, transport) as (link, round_trip_s):
                await link.write([self._opening(streams, member, number)])
                is_open = True
                for further in range(1, self._links_wanted(round_trip_s) if not number else 0):
                    self._spawn(self._dial(streams, rank, further, link.transport))
                await self._exchange(streams, rank, link)
        except LinkBroken as broken:
            if is_open or not number:  # without a further one the first does it all
                self._broken(streams, rank, f"its stream broke ({broken})")
        except RemoteProtocolError as wrong:
            self._broken(streams, rank, str(wrong))

    @asynccontextmanager
    async def _link(self, member: Member, number: int, transport: str) -> AsyncIterator[tuple[Link, float]]:
        """A link to this member and its round trip in seconds, 0 where it is not known. Raises LinkBroken."""
        async with AsyncExitStack() as stack:
            if transport != "grpc" and self._tcp is not None and self._may_be_reached(member):
                host = member.address.rpartition(":")[0].strip("[]")
                try:
                    dialled = self._tcp.dial(member.peer, (host, member.bulk_port))
                    connection = await stack.enter_async_context(dialled)
                except (LinkBroken, RemoteProtocolError) as wrong:
                    if transport == "tcp":
                        raise LinkBroken(f"TCP port {member.bulk_port}: {wrong}") from wrong
                    log.info("%s: TCP port %d: %s; taking gRPC", short(member.peer), member.bulk_port, wrong)
                    self._not_reached[member.peer] = asyncio.get_running_loop().time() + self._config.tcp_again_s
                else:
                    yield connection, connection.round_trip_s
                    return
            if transport == "tcp":
                raise LinkBroken("it offers no TCP path, and this daemon was told to take no other (--transport tcp)")
            warm = await stack.enter_async_context(self._channels.use(member.address, number))
            call = cast(TransferCall, warm.channel.stream_stream(self._method)())
            stack.callback(call.cancel)
            yield DialledCall(call), warm.round_trip_s

    def _may_be_reached(self, member: Member) -> bool:
        now = asyncio.get_running_loop().time()
        self._not_reached = {peer: until for peer, until in self._not_reached.items() if until > now}
        is_worth_it = member.peer not in self._not_reached or self._config.transport == "tcp"
        return is_worth_it and 0 < member.bulk_port < 1 << 16

    def _links_wanted(self, round_trip_s: float) -> int:
        if self._config.links:
            return min(self._config.links, LINKS_MAX)
        return 1 if round_trip_s < self._config.far_s else self._config.links_far

    def _opening(self, streams: Streams, member: Member, number: int) -> bytes:
        group = streams.group
        signature = self._identity.sign("transfer", *self._signed(group, number, member.peer))
        opening = peer_pb2.TransferOpen(
            group_id=group.group_id,
            rank=streams.rank,
            public_key=self._identity.public_key,
            signature=signature,
            session=streams.session,
            link=number,
        )
        return peer_pb2.TransferRequest(open=opening).SerializeToString()

    def _signed(self, group: Group, number: int, to: PeerId) -> tuple[bytes, ...]:
        return self._swarm, group.group_id, group.token, to.encode(), number.to_bytes(4, "big")

    # ---- being dialled

    async def serve_call(self, requests: AsyncIterator[bytes], context: TransferContext) -> None:
        """A Transfer call of gRPC, to its end."""
        incoming = requests.__aiter__()
        try:
            async with asyncio.timeout(self._config.dial_timeout_s):
                first = await anext(incoming)
            if self._config.transport == "tcp":
                raise RemoteProtocolError("takes chunks over TCP only (--transport tcp)")
            streams, rank = await self._admit(first)
        except (RemoteProtocolError, StopAsyncIteration, TimeoutError) as wrong:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(wrong) or "no opening")
        try:
            await self._exchange(streams, rank, ServedCall(incoming, context))
        except RemoteProtocolError as wrong:
            self._broken(streams, rank, str(wrong))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(wrong))
        except LinkBroken as broken:
            await context.abort(grpc.StatusCode.CANCELLED, str(broken))
        except asyncio.CancelledError:
            self._broken(streams, rank, "its stream broke")
            raise

    async def _serve_connection(self, connection: Connection, opening: Buffer) -> None:
        """A transfer over the TCP path, to its end."""
        streams, rank = await self._admit(bytes(opening), connection.peer)
        try:
            await self._exchange(streams, rank, connection)
        except LinkBroken as broken:
            self._broken(streams, rank, f"its stream broke ({broken})")
            raise
        except RemoteProtocolError as wrong:
            self._broken(streams, rank, str(wrong))
            raise

    async def _admit(self, first: bytes, who: PeerId | None = None) -> tuple[Streams, Rank]:
        """Who opens which group. The opening may come before the Begin of that group: wait for it, bounded. `who`: what
        the connection proved."""
        opening = wire.frame_from(peer_pb2.TransferRequest, first).open
        group_id = GroupId(opening.group_id)
        if len(group_id) != 16:
            raise RemoteProtocolError("a transfer of no group")
        streams = self._streams.get(group_id) or await self._await_group(group_id)
        group = streams.group
        if opening.rank >= len(group.members) or opening.rank == streams.rank:
            raise RemoteProtocolError("a transfer of an impossible rank")
        peer = peer_id(opening.public_key)
        if group.members[opening.rank].peer != peer or who not in (peer, None):
            raise RemoteProtocolError("a transfer in another member's name")
        signed = self._signed(group, opening.link, self._identity.peer_id)
        if not verify(opening.public_key, opening.signature, "transfer", *signed):
            raise RemoteProtocolError("a transfer that is not signed")
        rank = Rank(opening.rank)
        if (rank, opening.link) in streams.served or opening.link >= LINKS_MAX:
            raise RemoteProtocolError("a second transfer of the same two")
        streams.served.add((rank, opening.link))
        return streams, rank

    async def _await_group(self, group_id: GroupId) -> Streams:
        if len(self._strangers) >= self._config.strangers_max:
            for oldest in [stranger for stranger in self._strangers if not stranger.may_go.is_set()][:1]:
                oldest.may_go.set()
        stranger = Stranger(group_id, asyncio.Event())
        self._strangers[stranger] = None
        with suppress(TimeoutError):
            try:
                async with asyncio.timeout(self._config.stranger_patience_s):
                    await stranger.may_go.wait()
            finally:
                del self._strangers[stranger]
        streams = self._streams.get(group_id)
        if streams is None:
            raise RemoteProtocolError("no such group here")
        return streams

    # ---- both ways

    async def _exchange(self, streams: Streams, rank: Rank, link: Link) -> None:
        """Chunks to and fro, until both sides ended it. Raises LinkBroken and RemoteProtocolError."""
        assert self._inbox is not None
        self._inbox.stream_opened(streams.session, streams.group.group_id, rank, link.transport)
        tasks = [
            asyncio.create_task(self._read_chunks(streams, rank, link)),
            asyncio.create_task(self._write_chunks(streams, rank, link)),
        ]
        try:
            async with asyncio.timeout(None) as limit:
                streams.limit(limit, self._config.linger_s)
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        except TimeoutError:
            raise LinkBroken("the other did not end it") from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read_chunks(self, streams: Streams, rank: Rank, link: Link) -> None:
        assert self._inbox is not None
        where = streams.session, streams.group.group_id
        may_read = streams.may_read[rank]
        async for frame in link.frames():
            self._inbox.chunk_received(*where, rank, wire.chunk_from(frame))
            del frame  # it would be kept while we wait
            while not streams.is_closing and self._inbox.is_ahead(*where, rank):
                may_read.clear()
                await may_read.wait()  # the transport fills up, and the sender feels that

    async def _write_chunks(self, streams: Streams, rank: Rank, link: Link) -> None:
        assert self._inbox is not None
        bell = streams.bells[rank]
        while not streams.is_closing:
            outgoing = self._inbox.next_outgoing(streams.session, streams.group.group_id, rank)
            if outgoing is None:
                await bell.wait()
                bell.clear()
                continue
            await link.write(wire.chunk_frame(outgoing.chunk, outgoing.encode()))
        await link.done_writing()

    def _broken(self, streams: Streams, rank: Rank, why: str) -> None:
        if not streams.is_closing and not self._leaving:
            assert self._inbox is not None
            self._inbox.stream_lost(streams.session, streams.group.group_id, rank, why)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _dials(us: Member, our_rank: Rank, them: Member, their_rank: Rank) -> bool:
    if us.dialable and them.dialable:
        return our_rank < their_rank
    return them.dialable  # two that nobody can dial have nothing to exchange: neither holds a span

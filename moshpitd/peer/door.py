"""The door to other daemons: conversations for messages, transfers for chunks, over gRPC.

Knows channels, hellos, streams and who dials whom. Does not know rounds: what arrives goes to the `Inbox`, which the
driver implements, and what leaves is asked of it. A peer's nonsense (RemoteProtocolError) is caught here and ends the
stream it came by, which costs that peer only.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from moshpitd.averaging.all_reduce import Outgoing
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.messages import Address, Chunk, Group, Member, Message
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank, short
from moshpitd.identity import Identity, peer_id, verify
from moshpitd.peer import channels, wire
from moshpitd.peer.channels import PeerConfig
from moshpitd.peer.conversation import Conversation, Frame, Introduction, proof_holds
from moshpitd.peer.v1 import peer_pb2

log = logging.getLogger("moshpitd.peer")

SERVICE = "moshpitd.peer.v1.PeerService"
_CONVERSE = f"/{SERVICE}/Converse"
_TRANSFER = f"/{SERVICE}/Transfer"


class Inbox(Protocol):
    """What the door hands inwards. Called on the event loop; must not block."""

    def message_received(self, session: Key, sender: PeerId, message: Message) -> None:
        """May raise RemoteProtocolError."""

    def peer_lost(self, peer: PeerId, why: str) -> None:
        """No conversation with this peer is left, or none could be had."""

    def chunk_received(self, session: Key, group_id: GroupId, sender: Rank, chunk: Chunk) -> None:
        """May raise RemoteProtocolError."""

    def next_outgoing(self, session: Key, group_id: GroupId, rank: Rank) -> Outgoing | None:
        """Pull: the next chunk for this member."""

    def stream_lost(self, session: Key, group_id: GroupId, rank: Rank, why: str) -> None:
        """The transfer with this member broke before the group was closed."""

    def dialable_found(self, *, dialable: bool) -> None:
        """Another peer tried to dial us."""


@dataclass
class Streams:
    """The transfers of one group."""

    session: Key
    group: Group
    rank: Rank
    bells: dict[Rank, asyncio.Event] = field(default_factory=dict)
    closing: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    served: set[Rank] = field(default_factory=set)
    """Members whose transfer we serve: one each."""


@dataclass(eq=False)
class Stranger:
    """A transfer that waits for its group."""

    group_id: GroupId
    may_go: asyncio.Event
    """The group is here, or somebody newer needs the place."""


@dataclass
class Warm:
    """A channel and how many streams use it."""

    channel: grpc.aio.Channel
    users: int = 0


class PeerDoor:
    """Everything between this daemon and the others but the directory."""

    def __init__(self, identity: Identity, swarm: bytes, config: PeerConfig) -> None:
        """Use `PeerDoor.open`."""
        self.port = 0
        self._identity = identity
        self._swarm = swarm
        self._config = config
        self._inbox: Inbox = _Nobody()
        self._introduction = Introduction(identity, swarm)
        self._server = channels.new_server(config)
        self._health = HealthServicer()
        self._channels: OrderedDict[str, Warm] = OrderedDict()
        """By address, the longest idle first."""
        self._conversations: dict[PeerId, list[Conversation]] = {}
        self._dialling: dict[PeerId, list[tuple[Key, Message]]] = {}
        self._streams: dict[GroupId, Streams] = {}
        self._strangers: dict[Stranger, None] = {}
        self._greetings = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._announced = Address("")
        self._dialable_known = False
        self._closing = False

    @classmethod
    async def open(cls, host: str, port: int, *, identity: Identity, swarm_id: bytes, config: PeerConfig) -> PeerDoor:
        """Take a TCP port (0: any free one, see `port`). Raises OSError, EADDRINUSE for a taken one."""
        door = cls(identity, swarm_id, config)
        handlers: dict[str, grpc.RpcMethodHandler[bytes, peer_pb2.ConverseResponse]] = {
            "Converse": grpc.stream_stream_rpc_method_handler(
                door._serve_conversation, response_serializer=peer_pb2.ConverseResponse.SerializeToString
            ),
            "Transfer": grpc.stream_stream_rpc_method_handler(door._serve_transfer),
        }
        door._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        add_HealthServicer_to_server(door._health, door._server)
        try:
            door.port = channels.listen(door._server, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(errno.EADDRNOTAVAIL, str(error)) from error
        if door.port == 0:
            raise OSError(errno.EADDRINUSE, "the port is taken")
        return door

    async def serve(self, inbox: Inbox) -> None:
        """Begin to answer; what arrives goes to the inbox."""
        self._inbox = inbox
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def announce_as(self, address: Address) -> None:
        """What others are told to dial; they will be asked to try."""
        self._announced = address

    async def close(self, grace_s: float = 1.0) -> None:
        """Say what is queued, end every stream, stop listening."""
        self._closing = True
        for group_id in list(self._streams):
            self.close_streams(group_id)
        for conversation in [c for several in self._conversations.values() for c in several]:
            conversation.end()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.stop(grace_s)
        for warm in self._channels.values():
            await warm.channel.close()

    # ---- messages

    def send(self, session: Key, peer: PeerId, address: str, message: Message) -> None:
        """Say it over an open conversation, else dial the address; without either it is not said."""
        if self._closing or peer == self._identity.peer_id:
            return
        conversation = self._conversation_with(peer)
        if conversation is not None:
            try:
                conversation.tell(session, message)
            except RemoteProtocolError as wrong:
                log.warning("%s", wrong)
                conversation.cut()
        elif peer in self._dialling:
            waiting = self._dialling[peer]
            if len(waiting) < self._config.outbox_max:
                waiting.append((session, message))
        elif address and len(self._dialling) < self._config.dialling_max:
            self._dialling[peer] = [(session, message)]
            self._spawn(self._dial(peer, address))

    def meet(self, peer: PeerId, address: str) -> None:
        """Have a conversation with this peer, for its own sake."""
        if self._conversation_with(peer) is not None or peer in self._dialling or peer == self._identity.peer_id:
            return
        if len(self._dialling) < self._config.dialling_max:
            self._dialling[peer] = []
            self._spawn(self._dial(peer, address))

    def heard_from(self) -> dict[PeerId, float]:
        """Seconds since each peer with an open conversation was last heard."""
        now = asyncio.get_running_loop().time()
        return {peer: now - max(c.heard_at for c in several) for peer, several in self._conversations.items()}

    def _conversation_with(self, peer: PeerId) -> Conversation | None:
        return next(iter(self._conversations.get(peer, ())), None)

    async def _dial(self, peer: PeerId, address: str) -> None:
        why = f"could not be dialled at {address}"
        try:
            why = await self._converse(peer, address)
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError, OSError) as error:
            refused = isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.FAILED_PRECONDITION
            detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            log.info("%s %s: %s", short(peer), why, detail or type(error).__name__)
            if refused:  # the other's own words for people; the transport's are too many
                why = f"{why}: {detail}"
        except RemoteProtocolError as wrong:
            why = f"{why}: {wrong}"
            log.warning("%s %s", short(peer), why)
        finally:
            self._dialling.pop(peer, None)
        if self._conversation_with(peer) is None and not self._closing:
            self._inbox.peer_lost(peer, why)

    async def _converse(self, peer: PeerId, address: str) -> str:
        """Dial, prove, converse to the end; returns why it ended."""
        async with self._channel(address) as channel:
            call = _converse(channel)
            try:
                async with asyncio.timeout(self._config.dial_timeout_s):
                    theirs = await self._hello(call, peer, address)
                conversation = self._conversation(peer, theirs, dialled_by_us=True, address=address)
                self._enter(conversation)
                try:
                    for session, message in self._dialling.pop(peer, []):
                        conversation.tell(session, message)
                    await conversation.run(_responses(call), call.write, self._hear)
                    return "ended the conversation"
                except grpc.aio.AioRpcError as error:
                    return f"connection lost ({error.code().name.lower()})"
                except asyncio.InvalidStateError:  # we wrote before we read that it hung up
                    return "ended the conversation"
                finally:
                    self._leave(conversation)
            finally:
                call.cancel()

    def _conversation(
        self, peer: PeerId, theirs: peer_pb2.Hello, *, dialled_by_us: bool, address: str = ""
    ) -> Conversation:
        return Conversation(
            peer,
            Incarnation(theirs.incarnation),
            dialled_by_us=dialled_by_us,
            outbox_max=self._config.outbox_max,
            outbox_bytes_max=self._config.outbox_bytes_max,
            address=address,
        )

    async def _hello(
        self,
        call: _ConverseCall,
        peer: PeerId | None,
        address: str,
    ) -> peer_pb2.Hello:
        """The dialler's half of the hello; returns the other's."""
        ours = self._introduction.hello(secrets.token_bytes(32))
        await call.write(peer_pb2.ConverseRequest(hello=ours))
        answer = await call.read()
        if not isinstance(answer, bytes):
            raise RemoteProtocolError(f"no hello from {address}: {await call.details()}")
        theirs = wire.frame_from(peer_pb2.ConverseResponse, answer).hello
        who = self._introduction.check(theirs)
        if not proof_holds(theirs.signature, "dialled", theirs, ours, theirs):
            raise RemoteProtocolError("its hello is not signed by its key")
        if peer is not None and who != peer:
            raise RemoteProtocolError(f"{short(who)} answers there")
        await call.write(
            peer_pb2.ConverseRequest(proof=peer_pb2.Proof(signature=self._introduction.sign("dialler", ours, theirs)))
        )
        return theirs

    async def _serve_conversation(
        self,
        requests: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext[bytes, peer_pb2.ConverseResponse],
    ) -> None:
        incoming = (wire.frame_from(peer_pb2.ConverseRequest, raw) async for raw in requests)
        self._greetings += 1
        try:
            async with asyncio.timeout(self._config.dial_timeout_s):
                if self._greetings > self._config.greetings_max:
                    raise RemoteProtocolError("too many callers here that have not said who they are")
                first = await anext(incoming)
                dialler = first.hello
                who = self._introduction.check(dialler)
                if sum(map(len, self._conversations.values())) >= self._config.conversations_max:
                    raise RemoteProtocolError("too many conversations here")
                if len(self._conversations.get(who, ())) >= self._config.conversations_of_one_max:
                    raise RemoteProtocolError("too many conversations of yours here")
                ours = self._introduction.hello(secrets.token_bytes(32))
                ours.signature = self._introduction.sign("dialled", dialler, ours)
                await context.write(peer_pb2.ConverseResponse(hello=ours))
                second = await anext(incoming)
            if not proof_holds(second.proof.signature, "dialler", dialler, dialler, ours):
                raise RemoteProtocolError("the proof is not signed by the hello's key")
        except (RemoteProtocolError, StopAsyncIteration, TimeoutError) as wrong:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(wrong) or "no hello")
        finally:
            self._greetings -= 1
        conversation = self._conversation(who, dialler, dialled_by_us=False)
        self._enter(conversation)
        why = "connection lost"
        try:
            await conversation.run(incoming, context.write, self._hear)
            why = "ended the conversation"
        except RemoteProtocolError as wrong:
            why = str(wrong)
            log.warning("%s: %s", short(who), wrong)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
        finally:
            self._leave(conversation)
            if self._conversation_with(who) is None and not self._closing:
                self._inbox.peer_lost(who, why)

    def _enter(self, conversation: Conversation) -> None:
        self._conversations.setdefault(conversation.peer, []).append(conversation)
        if not self._dialable_known and self._announced:
            self._dialable_known = True
            self._spawn(self._learn_dialable(conversation))

    def _leave(self, conversation: Conversation) -> None:
        several = self._conversations.get(conversation.peer, [])
        several.remove(conversation)
        if not several:
            del self._conversations[conversation.peer]

    def _hear(self, conversation: Conversation, frame: Frame) -> None:
        match frame.WhichOneof("frame"):
            case "envelope":
                session, message = wire.opened(frame.envelope)
                self._inbox.message_received(session, conversation.peer, message)
            case "dial_back_wanted":
                if not conversation.dials_back:
                    conversation.dials_back = True
                    self._spawn(self._try_dialling(conversation, frame.dial_back_wanted.address))
            case "dial_back_notice":
                if conversation.dial_back is not None and not conversation.dial_back.done():
                    conversation.dial_back.set_result(frame.dial_back_notice.reachable)
            case other:
                raise RemoteProtocolError(f"{other or 'an unknown frame'} in the middle of a conversation")

    # ---- can we be dialled?

    async def _learn_dialable(self, conversation: Conversation) -> None:
        """Ask the first peer we reach to dial us back; while it is in vain, others after a pause."""
        told = False
        for attempt in itertools.count():
            try:
                async with asyncio.timeout(3 * self._config.dial_timeout_s):
                    reachable = await conversation.want_dial_back(self._announced)
            except (TimeoutError, RemoteProtocolError):
                self._dialable_known = False
                return
            self._inbox.dialable_found(dialable=reachable)
            if reachable:
                return
            if not told:
                log.warning(
                    "%s could not dial us at %s: until somebody can, we join groups but do not lead or reduce",
                    short(conversation.peer),
                    self._announced,
                )
                told = True
            await asyncio.sleep(self._config.dialable_again_s)
            if not self._conversations:
                self._dialable_known = False
                return
            peers = sorted(self._conversations)
            conversation = self._conversations[peers[attempt % len(peers)]][0]

    async def _try_dialling(self, conversation: Conversation, address: str) -> None:
        """Whether the peer itself answers at the address it names."""
        channel = channels.dial(address, self._config)
        try:
            call = _converse(channel)
            try:
                async with asyncio.timeout(self._config.dial_timeout_s):
                    await call.write(peer_pb2.ConverseRequest(hello=self._introduction.hello(secrets.token_bytes(32))))
                    answer = await call.read()
            finally:
                call.cancel()
            hello = wire.frame_from(peer_pb2.ConverseResponse, answer).hello if isinstance(answer, bytes) else None
            reachable = hello is not None and peer_id(hello.public_key) == conversation.peer
        except (RemoteProtocolError, grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError, OSError):
            reachable = False
        finally:
            await channel.close()
            conversation.dials_back = False
        with suppress(RemoteProtocolError):  # it does not read: its next message ends the conversation
            conversation.answer_dial_back(address, reachable=reachable)

    # ---- chunks

    def open_streams(self, session: Key, group: Group, rank: Rank) -> None:
        """Connect with every member we exchange chunks with. Of two the lower rank dials, unless it must be dialled."""
        streams = Streams(session, group, rank)
        self._streams[group.group_id] = streams
        for other, member in enumerate(group.members):
            if other == rank:
                continue
            streams.bells[Rank(other)] = asyncio.Event()
            if self._dials(group.members[rank], rank, member, Rank(other)):
                task = self._spawn(self._dial_transfer(streams, Rank(other), member))
                streams.tasks.append(task)
        for stranger in self._strangers:
            if stranger.group_id == group.group_id:
                stranger.may_go.set()

    def close_streams(self, group_id: GroupId) -> None:
        """The group is done: transfers end once what is on its way has been written."""
        streams = self._streams.pop(group_id, None)
        if streams is not None:
            streams.closing = True
            for bell in streams.bells.values():
                bell.set()

    def ring(self, group_id: GroupId, rank: Rank) -> None:
        """A pull for this member would succeed."""
        streams = self._streams.get(group_id)
        if streams is not None and rank in streams.bells:
            streams.bells[rank].set()

    @staticmethod
    def _dials(us: Member, our_rank: Rank, them: Member, their_rank: Rank) -> bool:
        if us.dialable and them.dialable:
            return our_rank < their_rank
        return them.dialable  # two that nobody can dial have nothing to exchange: neither holds a span

    async def _dial_transfer(self, streams: Streams, rank: Rank, member: Member) -> None:
        group = streams.group
        signature = self._identity.sign("transfer", self._swarm, group.group_id, group.token, member.peer.encode())
        first = peer_pb2.TransferRequest(
            open=peer_pb2.TransferOpen(
                group_id=group.group_id,
                rank=streams.rank,
                public_key=self._identity.public_key,
                signature=signature,
                session=streams.session,
            )
        )
        async with self._channel(member.address) as channel:
            call = _transfer(channel)
            try:
                await call.write(first.SerializeToString())
                reader = asyncio.create_task(self._read_chunks(streams, rank, _frames(call)))
                writer = asyncio.create_task(self._write_chunks(streams, rank, call.write, call.done_writing))
                await self._both(reader, writer)
            except grpc.aio.AioRpcError as error:
                self._broken(streams, rank, f"its stream broke ({error.code().name.lower()})")
            except (RemoteProtocolError, asyncio.InvalidStateError) as wrong:
                self._broken(streams, rank, str(wrong))
            finally:
                call.cancel()

    async def _serve_transfer(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        incoming = requests.__aiter__()
        try:
            async with asyncio.timeout(self._config.dial_timeout_s):
                first = wire.frame_from(peer_pb2.TransferRequest, await anext(incoming)).open
            streams, rank = await self._admit_transfer(first)
        except (RemoteProtocolError, StopAsyncIteration, TimeoutError) as wrong:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(wrong) or "no opening")
        streams.served.add(rank)
        reader = asyncio.create_task(self._read_chunks(streams, rank, incoming))
        writer = asyncio.create_task(self._write_chunks(streams, rank, context.write, None))
        try:
            await self._both(reader, writer)
        except RemoteProtocolError as wrong:
            self._broken(streams, rank, str(wrong))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(wrong))
        except asyncio.CancelledError:
            self._broken(streams, rank, "its stream broke")
            raise

    @staticmethod
    async def _both(reader: asyncio.Task[None], writer: asyncio.Task[None]) -> None:
        """Until both ended well, or one failed."""
        try:
            await asyncio.wait([reader, writer], return_when=asyncio.FIRST_EXCEPTION)
            for task in (reader, writer):
                if task.done():
                    task.result()
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _admit_transfer(self, opening: peer_pb2.TransferOpen) -> tuple[Streams, Rank]:
        """Who opens which group. The opening may come before the Begin of that group: wait for it, bounded."""
        group_id = GroupId(opening.group_id)
        if len(group_id) != 16:
            raise RemoteProtocolError("a transfer of no group")
        streams = self._streams.get(group_id) or await self._await_group(group_id)
        group = streams.group
        if opening.rank >= len(group.members) or opening.rank == streams.rank:
            raise RemoteProtocolError("a transfer of an impossible rank")
        if group.members[opening.rank].peer != peer_id(opening.public_key):
            raise RemoteProtocolError("a transfer in another member's name")
        signed = (self._swarm, group.group_id, group.token, self._identity.peer_id.encode())
        if not verify(opening.public_key, opening.signature, "transfer", *signed):
            raise RemoteProtocolError("a transfer that is not signed")
        if opening.rank in streams.served:
            raise RemoteProtocolError("a second transfer of the same two")
        return streams, Rank(opening.rank)

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

    async def _read_chunks(self, streams: Streams, rank: Rank, frames: AsyncIterator[bytes]) -> None:
        async for frame in frames:
            chunk = wire.chunk_from(frame)
            self._inbox.chunk_received(streams.session, streams.group.group_id, rank, chunk)

    async def _write_chunks(self, streams: Streams, rank: Rank, write: _Write, done: _Done | None) -> None:
        bell = streams.bells[rank]
        while not streams.closing:
            outgoing = self._inbox.next_outgoing(streams.session, streams.group.group_id, rank)
            if outgoing is None:
                await bell.wait()
                bell.clear()
                continue
            await write(wire.chunk_frame(outgoing.chunk, outgoing.encode()))
        if done is not None:
            await done()

    def _broken(self, streams: Streams, rank: Rank, why: str) -> None:
        if not streams.closing and not self._closing:
            self._inbox.stream_lost(streams.session, streams.group.group_id, rank, why)

    # ---- small things

    @asynccontextmanager
    async def _channel(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """For as long as a stream uses it, and a while longer: whoever invents addresses must not fill our memory."""
        warm = self._channels.get(address)
        if warm is None:
            warm = self._channels[address] = Warm(channels.dial(address, self._config))
        warm.users += 1
        try:
            yield warm.channel
        finally:
            warm.users -= 1
            self._channels.move_to_end(address)
            idle = [name for name, one in self._channels.items() if not one.users]
            for name in idle[: max(0, len(idle) - self._config.idle_channels_max)]:
                await self._channels.pop(name).channel.close()

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Nobody:
    """The inbox before the driver serves: the server does not answer yet, so nothing arrives."""

    def message_received(self, session: Key, sender: PeerId, message: Message) -> None:
        raise RemoteProtocolError("this daemon is still starting")

    def peer_lost(self, peer: PeerId, why: str) -> None:
        pass

    def chunk_received(self, session: Key, group_id: GroupId, sender: Rank, chunk: Chunk) -> None:
        raise RemoteProtocolError("this daemon is still starting")

    def next_outgoing(self, session: Key, group_id: GroupId, rank: Rank) -> Outgoing | None:
        return None

    def stream_lost(self, session: Key, group_id: GroupId, rank: Rank, why: str) -> None:
        pass

    def dialable_found(self, *, dialable: bool) -> None:
        pass


_ConverseCall = grpc.aio.StreamStreamCall[peer_pb2.ConverseRequest, bytes]
_TransferCall = grpc.aio.StreamStreamCall[bytes, bytes]


def _converse(channel: grpc.aio.Channel) -> _ConverseCall:
    """What comes is read as bytes: gRPC would end the stream with a traceback for what is no protobuf."""
    to_bytes = peer_pb2.ConverseRequest.SerializeToString
    return cast(_ConverseCall, channel.stream_stream(_CONVERSE, request_serializer=to_bytes)())


async def _responses(call: _ConverseCall) -> AsyncIterator[Frame]:
    async for raw in _frames(call):
        yield wire.frame_from(peer_pb2.ConverseResponse, raw)


def _transfer(channel: grpc.aio.Channel) -> _TransferCall:
    """Frames travel as bytes: they are written and read by hand (wire.py)."""
    return cast(_TransferCall, channel.stream_stream(_TRANSFER)())


class _Write(Protocol):
    async def __call__(self, frame: bytes, /) -> None: ...


class _Done(Protocol):
    async def __call__(self) -> None: ...


async def _frames(call: _ConverseCall | _TransferCall) -> AsyncIterator[bytes]:
    """What the other side sends, to its clean end; an unclean one raises AioRpcError."""
    while (frame := await call.read()) is not grpc.aio.EOF:
        yield cast(bytes, frame)
    if await call.code() is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )

"""The door to other daemons: conversations for messages here, transfers for chunks in transfers.py.

Knows who is dialled, who is let in and whether we can be dialled ourselves. Does not know rounds: what arrives goes to
the `Inbox`, which the driver implements, and what leaves is asked of it. A peer's nonsense (RemoteProtocolError) is
caught here and ends the stream it came by, which costs that peer only.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from functools import partial
from typing import Protocol, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from moshpitd.averaging.all_reduce import Outgoing
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.messages import Address, Chunk, Group, Message
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank, short
from moshpitd.identity import Identity, peer_id
from moshpitd.peer import channels, wire
from moshpitd.peer.channels import PeerConfig
from moshpitd.peer.conversation import Conversation, Frame, Introduction, answer_greeting, greet
from moshpitd.peer.links import frames_of
from moshpitd.peer.tcp import TcpPath
from moshpitd.peer.transfers import ChunkInbox, Transfers
from moshpitd.peer.udp import UdpPath
from moshpitd.peer.v1 import peer_pb2

log = logging.getLogger("moshpitd.peer")

SERVICE = "moshpitd.peer.v1.PeerService"
_CONVERSE = f"/{SERVICE}/Converse"
_TRANSFER = f"/{SERVICE}/Transfer"


class Inbox(ChunkInbox, Protocol):
    """What the door hands inwards. Called on the event loop; must not block."""

    def message_received(self, session: Key, sender: PeerId, message: Message) -> None:
        """May raise RemoteProtocolError."""

    def peer_lost(self, peer: PeerId, why: str) -> None:
        """No conversation with this peer is left, or none could be had."""

    def dialable_found(self, *, dialable: bool) -> None:
        """Another peer tried to dial us."""


class PeerDoor:
    """Everything between this daemon and the others but the directory."""

    def __init__(self, introduction: Introduction, config: PeerConfig, tcp: TcpPath | None) -> None:
        """Use `PeerDoor.open`."""
        self.port = 0
        self._introduction = introduction
        self._identity = introduction.identity
        self._config = config
        self._inbox: Inbox = _Nobody()
        self._server = channels.new_server(config)
        self._health = HealthServicer()
        self._channels = channels.Channels(config)
        self._tcp = tcp
        self._transfers = Transfers(introduction, config, self._channels, _TRANSFER, tcp)
        self._udp: UdpPath | None = None
        self._conversations: dict[PeerId, list[Conversation]] = {}
        self._dialling: dict[PeerId, list[tuple[Key, Message]]] = {}
        self._greetings = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._announced = Address("")
        self._dialable_known = False
        self._closing = False

    @classmethod
    async def open(cls, host: str, port: int, *, identity: Identity, swarm_id: bytes, config: PeerConfig) -> PeerDoor:
        """Take a TCP port (0: any free one, see `port`) and, unless chunks are to travel by gRPC only, another for them
        (see `bulk_port`). Raises OSError, EADDRINUSE for a taken one."""
        introduction = Introduction(identity, swarm_id)
        tcp = None
        if config.transport != "grpc":
            tcp = TcpPath.open(host, config.bulk_port, introduction=introduction, config=config)
        door = cls(introduction, config, tcp)
        handlers: dict[str, grpc.RpcMethodHandler[bytes, peer_pb2.ConverseResponse]] = {
            "Converse": grpc.stream_stream_rpc_method_handler(
                door._serve_conversation, response_serializer=peer_pb2.ConverseResponse.SerializeToString
            ),
            "Transfer": grpc.stream_stream_rpc_method_handler(door._transfers.serve_call),
        }
        door._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        add_HealthServicer_to_server(door._health, door._server)
        try:
            door.port = channels.listen(door._server, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            await door._transfers.close(0.0)
            raise OSError(errno.EADDRNOTAVAIL, str(error)) from error
        if door.port == 0:
            await door._transfers.close(0.0)
            raise OSError(errno.EADDRINUSE, "the port is taken")
        return door

    @property
    def bulk_port(self) -> int:
        """Where the plain TCP path for chunks listens; 0: it is not offered."""
        return self._tcp.port if self._tcp is not None else 0

    async def serve(self, inbox: Inbox, udp: UdpPath | None = None) -> None:
        """Begin to answer; what arrives goes to the inbox. `udp`: the way of lossy rounds' packets, its owner's."""
        self._inbox = inbox
        self._udp = udp
        self._transfers.serve(inbox)
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def announce_as(self, address: Address) -> None:
        """What others are told to dial; they will be asked to try."""
        self._announced = address

    async def close(self, grace_s: float = 1.0) -> None:
        """Say what is queued, end every stream, stop listening."""
        self._closing = True
        for conversation in [c for several in self._conversations.values() for c in several]:
            conversation.end()
        await self._transfers.close(grace_s)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.stop(grace_s)
        await self._channels.close()

    # ---- chunks

    def open_streams(self, session: Key, group: Group, rank: Rank, lossy_codec: str = "") -> None:
        """Connect with every member we exchange chunks with, and for packets of this codec where it is said."""
        self._transfers.open_streams(session, group, rank)
        if lossy_codec:
            assert self._udp is not None
            self._udp.open_group(session, group, rank, lossy_codec)

    def close_streams(self, group_id: GroupId) -> None:
        """The group is done: transfers end once what is on its way has been written."""
        self._transfers.close_streams(group_id)
        if self._udp is not None:
            self._udp.close_group(group_id)

    def ring(self, group_id: GroupId, rank: Rank) -> None:
        """A pull for this member would succeed."""
        self._transfers.ring(group_id, rank)
        if self._udp is not None:
            self._udp.ring(group_id, rank)

    def read_on(self, group_id: GroupId, rank: Rank) -> None:
        """This member is no longer ahead."""
        self._transfers.read_on(group_id, rank)

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
        loop = asyncio.get_running_loop()
        async with self._channels.use(address) as warm:
            call = _converse(warm.channel)

            async def read() -> bytes:
                answer = await call.read()
                warm.round_trip_s = loop.time() - began
                if not isinstance(answer, bytes):
                    raise RemoteProtocolError(f"no hello from {address}: {await call.details()}")
                return answer

            try:
                async with asyncio.timeout(self._config.dial_timeout_s):
                    await call.wait_for_connection()
                    began = loop.time()
                    theirs = await greet(self._introduction, "", call.write, read, peer)
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

    async def _serve_conversation(
        self,
        requests: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext[bytes, peer_pb2.ConverseResponse],
    ) -> None:
        incoming = (wire.frame_from(peer_pb2.ConverseRequest, raw) async for raw in requests)

        def admit(who: PeerId) -> None:
            if sum(map(len, self._conversations.values())) >= self._config.conversations_max:
                raise RemoteProtocolError("too many conversations here")
            if len(self._conversations.get(who, ())) >= self._config.conversations_of_one_max:
                raise RemoteProtocolError("too many conversations of yours here")

        self._greetings += 1
        try:
            async with asyncio.timeout(self._config.dial_timeout_s):
                if self._greetings > self._config.greetings_max:
                    raise RemoteProtocolError("too many callers here that have not said who they are")
                read = partial(anext, incoming)
                who, dialler = await answer_greeting(self._introduction, "", read, context.write, admit)
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

    def is_ahead(self, session: Key, group_id: GroupId, rank: Rank) -> bool:
        return False

    def stream_opened(self, session: Key, group_id: GroupId, rank: Rank, transport: str) -> None:
        pass

    def stream_lost(self, session: Key, group_id: GroupId, rank: Rank, why: str) -> None:
        pass

    def dialable_found(self, *, dialable: bool) -> None:
        pass


_ConverseCall = grpc.aio.StreamStreamCall[peer_pb2.ConverseRequest, bytes]


def _converse(channel: grpc.aio.Channel) -> _ConverseCall:
    """What comes is read as bytes: gRPC would end the stream with a traceback for what is no protobuf."""
    to_bytes = peer_pb2.ConverseRequest.SerializeToString
    return cast(_ConverseCall, channel.stream_stream(_CONVERSE, request_serializer=to_bytes)())


async def _responses(call: _ConverseCall) -> AsyncIterator[Frame]:
    async for raw in frames_of(call):
        yield wire.frame_from(peer_pb2.ConverseResponse, raw)

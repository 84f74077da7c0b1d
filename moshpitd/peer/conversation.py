"""One conversation with one other daemon: a signed hello, then messages both ways.

Knows how each side proves who it is and what keeps a queue bounded. Does not know what messages mean.

    dialler                                  dialled
       | Hello(key, incarnation, nonce)         |
       |--------------------------------------->|
       |        Hello(key, ..., signature over both nonces and keys)
       |<---------------------------------------|
       | Proof(signature over the same)         |
       |--------------------------------------->|
       |  envelopes                  envelopes  |
       |<-------------------------------------->|
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from moshpitd import __version__
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.grid import PROTOCOL_VERSION
from moshpitd.averaging.messages import Message
from moshpitd.averaging.names import Incarnation, Key, PeerId, short
from moshpitd.identity import Identity, peer_id, verify
from moshpitd.peer import wire
from moshpitd.peer.v1 import peer_pb2

Frame = peer_pb2.ConverseRequest | peer_pb2.ConverseResponse


@dataclass(frozen=True, slots=True)
class Introduction:
    """Who we are, for every hello."""

    identity: Identity
    swarm: bytes

    def hello(self, nonce: bytes) -> peer_pb2.Hello:
        return peer_pb2.Hello(
            public_key=self.identity.public_key,
            incarnation=self.identity.incarnation,
            nonce=nonce,
            swarm=self.swarm,
            protocol_min=PROTOCOL_VERSION,
            protocol_max=PROTOCOL_VERSION,
            software=__version__,
        )

    def sign(self, role: str, dialler: peer_pb2.Hello, dialled: peer_pb2.Hello) -> bytes:
        return self.identity.sign(role, *_signed(dialler, dialled))

    def check(self, theirs: peer_pb2.Hello) -> PeerId:
        """Whom the hello names. Raises RemoteProtocolError in words for the other side's operator."""
        if theirs.swarm != self.swarm:
            raise RemoteProtocolError("another swarm: check --swarm on both sides")
        if not theirs.protocol_min <= PROTOCOL_VERSION <= theirs.protocol_max:
            raise RemoteProtocolError(
                f"protocol {theirs.protocol_min}..{theirs.protocol_max} (moshpitd {theirs.software[:40]}) "
                f"against {PROTOCOL_VERSION} (moshpitd {__version__}): update the older one"
            )
        if len(theirs.nonce) != 32 or len(theirs.public_key) != 32:
            raise RemoteProtocolError("a hello without a proper key and nonce")
        return peer_id(theirs.public_key)


async def greet(
    introduction: Introduction,
    purpose: str,
    write: Callable[[peer_pb2.ConverseRequest], Awaitable[None]],
    read: Callable[[], Awaitable[bytes]],
    expected: PeerId,
) -> peer_pb2.Hello:
    """The dialler's half of the hello; returns the other's. `purpose` keeps what is signed for one kind of connection
    from being used for another. Raises RemoteProtocolError, and what the transport raises."""
    ours = introduction.hello(secrets.token_bytes(32))
    await write(peer_pb2.ConverseRequest(hello=ours))
    theirs = wire.frame_from(peer_pb2.ConverseResponse, await read()).hello
    who = introduction.check(theirs)
    if not proof_holds(theirs.signature, f"{purpose}dialled", theirs, ours, theirs):
        raise RemoteProtocolError("its hello is not signed by its key")
    if who != expected:
        raise RemoteProtocolError(f"{short(who)} answers there")
    proof = peer_pb2.Proof(signature=introduction.sign(f"{purpose}dialler", ours, theirs))
    await write(peer_pb2.ConverseRequest(proof=proof))
    return theirs


async def answer_greeting(
    introduction: Introduction,
    purpose: str,
    read: Callable[[], Awaitable[peer_pb2.ConverseRequest]],
    write: Callable[[peer_pb2.ConverseResponse], Awaitable[object]],
    admit: Callable[[PeerId], None],
) -> tuple[PeerId, peer_pb2.Hello]:
    """The dialled one's half: whoever proved that it is who it says. `admit` may refuse the name it gives, before
    anything is signed. Raises RemoteProtocolError, and what the transport raises."""
    dialler = (await read()).hello
    who = introduction.check(dialler)
    admit(who)
    ours = introduction.hello(secrets.token_bytes(32))
    ours.signature = introduction.sign(f"{purpose}dialled", dialler, ours)
    await write(peer_pb2.ConverseResponse(hello=ours))
    proof = (await read()).proof
    if not proof_holds(proof.signature, f"{purpose}dialler", dialler, dialler, ours):
        raise RemoteProtocolError("the proof is not signed by the hello's key")
    return who, dialler


def _signed(dialler: peer_pb2.Hello, dialled: peer_pb2.Hello) -> tuple[bytes, ...]:
    return dialler.nonce, dialled.nonce, dialler.public_key, dialled.public_key, dialler.swarm


def proof_holds(
    signature: bytes, role: str, signer: peer_pb2.Hello, dialler: peer_pb2.Hello, dialled: peer_pb2.Hello
) -> bool:
    return verify(signer.public_key, signature, role, *_signed(dialler, dialled))


class Conversation:
    """An open conversation. `tell` queues; `run` writes and reads until either side ends it."""

    def __init__(
        self,
        peer: PeerId,
        incarnation: Incarnation,
        *,
        dialled_by_us: bool,
        outbox_max: int,
        outbox_bytes_max: int,
        address: str = "",
    ) -> None:
        self.peer = peer
        self.incarnation = incarnation
        self.dialled_by_us = dialled_by_us
        self.address = address
        self.heard_at = asyncio.get_running_loop().time()
        self.dial_back: asyncio.Future[bool] | None = None
        """The answer we wait for to our wish to be dialled."""
        self.dials_back = False
        """Whether we are dialling it because it wished so: one wish at a time."""
        self._outbox: asyncio.Queue[Frame | None] = asyncio.Queue(outbox_max)
        self._outbox_bytes = 0
        self._outbox_bytes_max = outbox_bytes_max
        self._tasks: list[asyncio.Task[None]] = []
        self._frame = peer_pb2.ConverseRequest if dialled_by_us else peer_pb2.ConverseResponse

    def tell(self, session: Key, message: Message) -> None:
        """Queue a message. Raises RemoteProtocolError when the other does not read."""
        self._put(self._frame(envelope=wire.envelope(session, message)))

    def want_dial_back(self, address: str) -> asyncio.Future[bool]:
        """Ask the other to dial us; the future says whether it could."""
        self.dial_back = asyncio.get_running_loop().create_future()
        self._put(self._frame(dial_back_wanted=peer_pb2.DialBackWanted(address=address)))
        return self.dial_back

    def answer_dial_back(self, address: str, *, reachable: bool) -> None:
        self._put(self._frame(dial_back_notice=peer_pb2.DialBackNotice(address=address, reachable=reachable)))

    def end(self) -> None:
        """Say everything that is queued, then end it."""
        if self._outbox.full():
            self._outbox.get_nowait()
        self._outbox.put_nowait(None)

    def cut(self) -> None:
        """End it at once: what is queued is lost."""
        for task in self._tasks:
            task.cancel()

    def _put(self, frame: Frame) -> None:
        size = frame.ByteSize()
        if self._outbox.full() or (self._outbox_bytes and self._outbox_bytes + size > self._outbox_bytes_max):
            raise RemoteProtocolError(f"{short(self.peer)} does not read its messages")
        self._outbox_bytes += size
        self._outbox.put_nowait(frame)

    async def run(
        self,
        incoming: AsyncIterator[Frame],
        write: Callable[..., Awaitable[object]],
        hear: Callable[[Conversation, Frame], None],
    ) -> None:
        """Until the other ends it, we `end` it, or it breaks (whatever the transport raises)."""
        loop = asyncio.get_running_loop()

        async def read() -> None:
            async for frame in incoming:
                self.heard_at = loop.time()
                hear(self, frame)

        reader = asyncio.create_task(read())
        writer = asyncio.create_task(self._write_all(write))
        self._tasks = [reader, writer]
        try:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reader, writer):
                task.cancel()
            ends = await asyncio.gather(reader, writer, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _write_all(self, write: Callable[..., Awaitable[object]]) -> None:
        while (frame := await self._outbox.get()) is not None:
            self._outbox_bytes -= frame.ByteSize()
            await write(frame)

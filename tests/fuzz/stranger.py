"""A peer of our own making that talks to real daemons over real sockets and keeps to no rule.

Knows the hello, because without a proved identity nothing is heard; everything after it is bytes. Does not know what is
sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import cast

import grpc
import grpc.aio

from moshpitd.averaging.grid import session_key
from moshpitd.averaging.names import Key
from moshpitd.identity import Identity
from moshpitd.peer.conversation import Introduction
from moshpitd.peer.door import SERVICE
from moshpitd.peer.tcp import PURPOSE
from moshpitd.peer.v1 import peer_pb2

Call = grpc.aio.StreamStreamCall[bytes, bytes]
HUNG_UP = (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError)
"""What gRPC raises where the other side ended a stream."""
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]


class Stranger:
    """An identity, and the daemon it molests."""

    def __init__(self, home: Path, address: str, bulk_port: int, swarm: str, session: str) -> None:
        self.identity = Identity.open(home)
        self.address = address
        self.bulk_port = bulk_port
        self.session: Key = session_key(swarm_id(swarm), session)
        self._introduction = Introduction(self.identity, swarm_id(swarm))

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        async with grpc.aio.insecure_channel(self.address, options=UNLIMITED) as channel:
            yield channel

    @asynccontextmanager
    async def conversation(self, channel: grpc.aio.Channel) -> AsyncIterator[Call]:
        """After hello and proof."""
        async with self.stream(channel, "Converse") as call:
            ours = self._introduction.hello(b"n" * 32)
            await call.write(peer_pb2.ConverseRequest(hello=ours).SerializeToString())
            answer = await call.read()
            assert isinstance(answer, bytes), await call.details()
            theirs = peer_pb2.ConverseResponse.FromString(answer).hello
            proof = peer_pb2.Proof(signature=self._introduction.sign("dialler", ours, theirs))
            await call.write(peer_pb2.ConverseRequest(proof=proof).SerializeToString())
            yield call

    @asynccontextmanager
    async def stream(self, channel: grpc.aio.Channel, method: str) -> AsyncIterator[Call]:
        call = cast(Call, channel.stream_stream(f"/{SERVICE}/{method}")())
        try:
            yield call
        finally:
            call.cancel()

    async def says(self, channel: grpc.aio.Channel, frames: list[bytes]) -> None:
        """A conversation of these frames; it may end before they are all said."""
        with suppress(*HUNG_UP):
            async with self.conversation(channel) as call:
                for frame in frames:
                    await call.write(frame)
                await call.done_writing()
                while isinstance(await call.read(), bytes):
                    pass

    async def transfers(self, channel: grpc.aio.Channel, frames: list[bytes]) -> None:
        with suppress(*HUNG_UP):
            async with self.stream(channel, "Transfer") as call:
                for frame in frames:
                    await call.write(frame)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """To the plain TCP path, before any hello."""
        reader, writer = await asyncio.open_connection(self.address.rpartition(":")[0], self.bulk_port)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def greets(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hello and proof of the plain TCP path."""
        ours = self._introduction.hello(b"n" * 32)
        writer.write(framed(peer_pb2.ConverseRequest(hello=ours).SerializeToString()))
        (size,) = struct.unpack(">I", await reader.readexactly(4))
        theirs = peer_pb2.ConverseResponse.FromString(await reader.readexactly(size)).hello
        proof = peer_pb2.Proof(signature=self._introduction.sign(f"{PURPOSE}dialler", ours, theirs))
        writer.write(framed(peer_pb2.ConverseRequest(proof=proof).SerializeToString()))

    def sends(self, datagrams: list[bytes]) -> None:
        host, _, port = self.address.rpartition(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            for datagram in datagrams:
                with suppress(OSError):
                    out.sendto(datagram[:60_000], (host, int(port)))


def swarm_id(swarm: str) -> bytes:
    """As the daemon makes it of its `--swarm`."""
    return hashlib.sha256(b"moshpitd swarm " + swarm.encode()).digest()


def framed(body: bytes) -> bytes:
    """As the plain TCP path has it."""
    return struct.pack(">I", len(body)) + body


def enveloped(envelope: peer_pb2.Envelope) -> bytes:
    return peer_pb2.ConverseRequest(envelope=envelope).SerializeToString()

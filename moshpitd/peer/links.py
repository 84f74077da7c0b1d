"""The seam that chunks travel through: a link is both directions of one transfer between two members.

Knows how gRPC's calls become links; the plain TCP path is in tcp.py. Does not know what frames hold, nor groups: what a
transfer is, is in transfers.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, cast

import grpc
import grpc.aio

Buffer = bytes | memoryview

TransferCall = grpc.aio.StreamStreamCall[bytes, bytes]
TransferContext = grpc.aio.ServicerContext[bytes, bytes]


class LinkBroken(Exception):
    """The transport failed; the message says how, to follow "its stream broke"."""


class Link(Protocol):
    """Both directions of one transfer. Every coroutine may raise LinkBroken."""

    @property
    def transport(self) -> str:
        """What a receipt calls it."""
        ...

    def frames(self) -> AsyncIterator[Buffer]:
        """What the other side sends, to its clean end. Each frame is a buffer of its own."""
        ...

    async def write(self, parts: Sequence[Buffer]) -> None:
        """Send one frame, given in parts; returns when the transport took it."""
        ...

    async def done_writing(self) -> None:
        """Say that nothing follows."""
        ...


class DialledCall:
    """A Transfer call of ours."""

    transport = "grpc"

    def __init__(self, call: TransferCall) -> None:
        self._call = call

    async def frames(self) -> AsyncIterator[Buffer]:
        try:
            async for frame in frames_of(self._call):
                yield frame
        except grpc.aio.AioRpcError as error:
            raise LinkBroken(_code(error)) from error

    async def write(self, parts: Sequence[Buffer]) -> None:
        try:
            await self._call.write(b"".join(parts))
        except grpc.aio.AioRpcError as error:
            raise LinkBroken(_code(error)) from error
        except asyncio.InvalidStateError as error:  # it ended before we read that it did
            raise LinkBroken("ended") from error

    async def done_writing(self) -> None:
        try:
            await self._call.done_writing()
        except asyncio.InvalidStateError as error:
            raise LinkBroken("ended") from error


class ServedCall:
    """A Transfer call to us; it ends when its handler does."""

    transport = "grpc"

    def __init__(self, requests: AsyncIterator[bytes], context: TransferContext) -> None:
        self._requests = requests
        self._context = context

    async def frames(self) -> AsyncIterator[Buffer]:
        async for frame in self._requests:
            yield frame

    async def write(self, parts: Sequence[Buffer]) -> None:
        await self._context.write(b"".join(parts))

    async def done_writing(self) -> None:
        pass


async def frames_of(call: grpc.aio.StreamStreamCall[Any, bytes]) -> AsyncIterator[bytes]:
    """What the other side sends, to its clean end; an unclean one raises AioRpcError."""
    while (frame := await call.read()) is not grpc.aio.EOF:
        yield cast(bytes, frame)
    if await call.code() is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )


def _code(error: grpc.aio.AioRpcError) -> str:
    return error.code().name.lower()

"""How a failed call is told to the trainer: the one place where errors become gRPC statuses.

Knows the errors a call may raise. Does not know calls. A status that we give carries the metadata `moshpitd-error`;
one without it was made by gRPC itself on either side, which is how a client tells a daemon that is leaving from one
that is gone.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from types import TracebackType
from typing import Generic, TypeVar

import grpc
import grpc.aio

from moshpitd.averaging.errors import (
    Exhausted,
    InvalidInput,
    NoGroup,
    Precondition,
    SessionError,
    SessionNotFound,
    Unavailable,
)

METADATA_KEY = "moshpitd-error"
MESSAGE_LENGTH_MAX = 2000
"""Statuses travel as HTTP headers, which gRPC caps at 8 KiB after percent-encoding."""

STATUSES: dict[type[SessionError], grpc.StatusCode] = {
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    SessionNotFound: grpc.StatusCode.NOT_FOUND,
    Precondition: grpc.StatusCode.FAILED_PRECONDITION,
    NoGroup: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SessionError: grpc.StatusCode.FAILED_PRECONDITION,
}

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

log = logging.getLogger(__name__)


class Answering(Generic[_Request, _Response]):
    """`async with Answering(context):` around all of a call; what is raised inside becomes its status.

    A call that holds much does its work in a method of its own inside: its frame, unlike the caller's, is cleared.
    """

    def __init__(self, context: grpc.aio.ServicerContext[_Request, _Response]) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if trace is not None:
            # gRPC keeps what aborts a call, in a circle with it: what the failed work held must not live on in frames.
            traceback.clear_frames(trace)
        match error:
            case None | asyncio.CancelledError() | grpc.aio.BaseError():
                return
            case SessionError():
                code = next(STATUSES[base] for base in type(error).__mro__ if base in STATUSES)
                text = str(error)
            case Exception():
                log.error("a call failed by a bug of ours", exc_info=error)
                code = grpc.StatusCode.INTERNAL
                text = f"a bug of moshpitd ({type(error).__name__}: {error}): please report it with the daemon's log"
            case _:
                return
        await self._context.abort(code, text[:MESSAGE_LENGTH_MAX], ((METADATA_KEY, type(error).__name__),))

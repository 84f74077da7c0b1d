"""The door to operators' machines: GET /healthz and GET /metrics, nothing else, in plain text.

Knows just enough HTTP for a probe and a scraper: one request a connection, bounded in bytes, time and number. Off
unless asked for. Read-only, so it carries no credentials; bind it where only operators reach it.
"""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus
from typing import Protocol

from moshpitd.telemetry.counters import Counters

REQUEST_BYTES_MAX = 8 << 10
REQUEST_TIMEOUT_S = 5.0
CONNECTIONS_MAX = 32


class Health(Protocol):
    """Whether the daemon is fit to take rounds."""

    @property
    def ready(self) -> bool: ...
    @property
    def waiting_for(self) -> str:
        """In words, while not ready."""
        ...


class HttpDoor:
    """Serves one daemon's health and counters."""

    def __init__(self, health: Health, counters: Counters) -> None:
        self._health = health
        self._counters = counters
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def open(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises OSError when it is taken."""
        assert self._server is None
        self._server = await asyncio.start_server(self._serve, host, port, limit=REQUEST_BYTES_MAX)
        bound: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return bound[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in self._open:
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                status, body = self._answer(head.split(b"\r\n", 1)[0].decode("latin-1"))
                writer.write(_response(status, body))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # Whoever sends no request in time, or none at all, gets no answer; TimeoutError is an OSError.
        finally:
            self._open.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, request_line: str) -> tuple[HTTPStatus, str]:
        match request_line.split(" "):
            case ["GET", "/healthz", _] if self._health.ready:
                return HTTPStatus.OK, "ready\n"
            case ["GET", "/healthz", _]:
                return HTTPStatus.SERVICE_UNAVAILABLE, f"waiting for {self._health.waiting_for}\n"
            case ["GET", "/metrics", _]:
                return HTTPStatus.OK, self._counters.text()
            case ["GET", _, _]:
                return HTTPStatus.NOT_FOUND, "there are /healthz and /metrics\n"
            case [_, _, _]:
                return HTTPStatus.METHOD_NOT_ALLOWED, "GET only\n"
            case _:
                return HTTPStatus.BAD_REQUEST, "not HTTP\n"


def _response(status: HTTPStatus, body: str) -> bytes:
    content = body.encode()
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    ).encode() + content

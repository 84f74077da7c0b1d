"""What operators see: health and numbers over HTTP, transitions in the log."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from moshpitd.telemetry import log
from moshpitd.telemetry.counters import Counters, Histogram
from moshpitd.telemetry.http import REQUEST_BYTES_MAX, HttpDoor
from moshpitd.telemetry.loop_lag import LoopLag

STALL_S = 0.1


@dataclass
class Health:
    """A daemon's."""

    ready: bool = False
    waiting_for: str = "anybody of --join to answer"


class Operator:
    """A daemon's door and somebody who knocks at it."""

    def __init__(self) -> None:
        self.health = Health()
        self.counters = Counters()
        self.door = HttpDoor(self.health, self.counters)
        self.port = 0

    async def send(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return answer

    async def get(self, path: str) -> str:
        return (await self.send(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())).decode()


@pytest.fixture
async def operator() -> AsyncIterator[Operator]:
    operator = Operator()
    operator.port = await operator.door.open("127.0.0.1", 0)
    yield operator
    await operator.door.close()


async def test_health_says_what_it_waits_for_until_it_is_ready(operator: Operator) -> None:
    waiting = await operator.get("/healthz")
    assert waiting.startswith("HTTP/1.1 503") and "anybody of --join to answer" in waiting
    operator.health.ready = True
    assert (await operator.get("/healthz")).startswith("HTTP/1.1 200")


async def test_counters_and_gauges_are_readable_by_prometheus(operator: Operator) -> None:
    operator.counters.add("averagings_total", outcome="complete")
    operator.counters.add("averagings_total", outcome="complete")
    operator.counters.add("averagings_total", outcome="partial")
    operator.counters.gauge("peers", lambda: 7)
    body = (await operator.get("/metrics")).partition("\r\n\r\n")[2]
    assert body.splitlines() == [
        "# TYPE moshpitd_peers gauge",
        "moshpitd_peers 7",
        "# TYPE moshpitd_averagings_total counter",
        'moshpitd_averagings_total{outcome="complete"} 2',
        'moshpitd_averagings_total{outcome="partial"} 1',
    ]


async def test_histograms_are_told_cumulatively(operator: Operator) -> None:
    operator.counters.histogram("wait_seconds", lambda: Histogram((0.5, 1.0), (3, 0, 2), 12.5))
    body = (await operator.get("/metrics")).partition("\r\n\r\n")[2]
    assert body.splitlines() == [
        "# TYPE moshpitd_wait_seconds histogram",
        'moshpitd_wait_seconds_bucket{le="0.5"} 3',
        'moshpitd_wait_seconds_bucket{le="1.0"} 3',
        'moshpitd_wait_seconds_bucket{le="+Inf"} 5',
        "moshpitd_wait_seconds_sum 12.5",
        "moshpitd_wait_seconds_count 5",
    ]


async def test_a_stalled_loop_is_seen_while_any_round_runs_and_only_then() -> None:
    lag = LoopLag()
    lag.begin("one round")
    lag.begin("another")
    lag.end("one round")
    await stall()
    seen = lag.read()
    assert late_by(seen, STALL_S / 2) == 1
    lag.end("another")
    await stall()
    assert lag.read() == seen


async def stall() -> None:
    """Keep the loop from coming round, then let it catch up."""
    asyncio.get_running_loop().call_soon(time.sleep, STALL_S)
    for _ in range(4):
        await asyncio.sleep(0)


def late_by(seen: Histogram, at_least_s: float) -> int:
    """How many values lie in the classes above this one."""
    return sum(count for bound, count in zip(seen.bounds, seen.counts[1:], strict=True) if bound >= at_least_s)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /healthz HTTP/1.1\r\n\r\n", b"405"),
        (b"\x00garbage\r\n\r\n", b"400"),
    ],
)
async def test_whatever_else_is_asked_is_refused(operator: Operator, request_: bytes, status: bytes) -> None:
    assert (await operator.send(request_)).split(b" ")[1] == status


async def test_an_endless_request_is_dropped_and_the_next_one_answered(operator: Operator) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", operator.port)
    writer.write(b"x" * (REQUEST_BYTES_MAX * 4))
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    assert "404" in await operator.get("/")


@pytest.fixture
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_an_event_is_one_line_with_time_level_and_room(root_logger: None) -> None:
    stream = io.StringIO()
    log.set_up("info", stream)
    logging.getLogger("moshpitd.driver").info("matching -> reducing: group of %d, rank %d", 4, 1)
    logging.getLogger("moshpitd.driver").debug("not shown")
    logging.getLogger("kademlia.network").info("not shown either")
    [line] = stream.getvalue().splitlines()
    assert line[10] == "T" and line[19] == "." and line[23] == "Z"
    assert line[25:] == "info driver: matching -> reducing: group of 4, rank 1"

"""A network in this process: whatever one daemon says to another passes a proxy, which may spoil it.

Every daemon has a place: one port number, on TCP and on UDP, that it announces and all others dial, and another for its
plain TCP path; what arrives there is carried to where the daemon really listens. Who dialled is found by asking the
kernel whose socket it is, so the weather is a matter of two daemons and a direction, whoever of them opened the
connection.

TCP loses nothing while the connection stands: what is blocked is held, as retransmission would hold it, and goes on
when the block is lifted. Datagrams are lost for good. Knows sockets, processes and time; does not know what the bytes
mean. All of it runs on one event loop in a thread of its own; the methods of `Network` may be called from any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

import psutil

HOST = "127.0.0.1"
READ_BYTES = 64 << 10
QUEUE_MAX = 64
"""Reads in flight in one direction of a connection: 4 MiB, then the sender feels it."""
DATAGRAM_BYTES_MAX = 65_535
DRAIN_MAX = 64
FLOWS_MAX = 1024
PORT_TRIES = 50
CALL_TIMEOUT_S = 10.0

Address = tuple[str, int]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Weather:
    """What one direction between two daemons does to bytes."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    """At most so much more, drawn for every read and datagram; TCP stays in order."""
    bytes_s: float = math.inf
    """Of one TCP connection."""
    blocked: bool = False
    """Nothing arrives."""
    loss: float = 0.0
    """The share of datagrams that never arrive."""
    cut_after: int | None = None
    """A TCP connection breaks, reset on both sides, once it carried so many bytes in this weather."""
    slow_close_s: float = 0.0
    """So long after one side closed the other hears of it."""


CLEAR = Weather()
BLOCKED = Weather(blocked=True, loss=1.0)


@dataclass(slots=True)
class Traffic:
    """What passed, by (from, to)."""

    tcp_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    datagrams: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Datagrams lost on purpose."""
    connections: Counter[tuple[str, str]] = field(default_factory=Counter)
    broken: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Connections reset or cut on purpose."""


class Network:
    """All places. Open from `with` to its end."""

    def __init__(self, seed: int) -> None:
        self.traffic = Traffic()
        self._rng = random.Random(seed)
        self._places: dict[str, _Place] = {}
        self._weather: dict[tuple[str, str], Weather] = {}
        self._changed = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(CALL_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_TIMEOUT_S)
        self._loop.close()

    def place(self, name: str) -> str:
        """HOST:PORT for a daemon to announce; nobody answers there before `move_in`."""

        def make() -> str:
            place = _Place(name, self)
            self._places[name] = place
            return f"{HOST}:{place.port}"

        return self._do(make)

    def bulk_port(self, name: str) -> int:
        """What it is to announce for its plain TCP path."""
        return self._places[name].bulk_port

    def expect(self, name: str, pid: int) -> None:
        """A daemon's process was started: what it dials is its own from now on."""
        self._do(lambda: self._places[name].expect(pid))

    def move_in(self, name: str, listens: str, bulk_port: int = 0) -> None:
        """It listens at HOST:PORT and, unless it offers no plain TCP path, at another port."""
        host, _, port = listens.rpartition(":")
        self._do(lambda: self._places[name].move_in((host, int(port)), (host, bulk_port) if bulk_port else None))

    def move_out(self, name: str) -> None:
        """It is gone: connections to it and from it end, as the kernel would end them."""
        self._do(lambda: self._places[name].move_out())

    def change(self, weather: Weather, sources: Collection[str], targets: Collection[str]) -> None:
        """From each of the sources to each of the targets."""

        def do() -> None:
            for source in sources:
                for target in targets:
                    if source != target:
                        self._weather[source, target] = weather
            self._weather_changed()

        self._do(do)

    def clear(self) -> None:
        """Fair weather everywhere."""

        def do() -> None:
            self._weather.clear()
            self._weather_changed()

        self._do(do)

    def reset(self, one: str, others: Collection[str]) -> int:
        """Reset all TCP connections between one daemon and these others, now; how many there were."""

        def do() -> int:
            ends = [{one, other} for other in others]
            links = [link for place in self._places.values() for link in place.links if link.ends in ends]
            for link in links:
                link.reset()
            return len(links)

        return self._do(do)

    def own_ports(self) -> set[int]:
        """Every local port of this process: a daemon talks to no other."""
        return {each.laddr.port for each in psutil.Process().net_connections("inet")}

    # ---- on the loop

    def weather(self, source: str, target: str) -> Weather:
        return self._weather.get((source, target), CLEAR)

    async def weather_changes(self, seconds: float | None) -> None:
        """Until it changes, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def late(self, weather: Weather) -> float:
        return weather.latency_s + (self._rng.random() * weather.jitter_s if weather.jitter_s else 0.0)

    def is_lost(self, weather: Weather) -> bool:
        return weather.blocked or (weather.loss > 0 and self._rng.random() < weather.loss)

    def owner_of(self, theirs: Address, ours: Address) -> str | None:
        """Which daemon's process holds the TCP socket at the other end."""
        for name, place in self._places.items():
            with contextlib.suppress(psutil.Error):
                if place.pid is not None:
                    for each in psutil.Process(place.pid).net_connections("tcp"):
                        if each.laddr.port == theirs[1] and each.raddr and each.raddr.port == ours[1]:
                            return name
        return None

    def sender_at(self, address: Address) -> str:
        """Which daemon's UDP socket this is; empty for a stranger."""
        return next((name for name, place in self._places.items() if place.listens == address), "")

    def _weather_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _close(self) -> None:
        for place in self._places.values():
            place.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _do(self, work: Callable[[], _T]) -> _T:
        """Run it on the loop."""
        done: Future[_T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # it belongs to the thread that asked
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return done.result(CALL_TIMEOUT_S)


class _Place:
    """One daemon's port, on TCP and UDP."""

    def __init__(self, name: str, network: Network) -> None:
        self.name = name
        self.pid: int | None = None
        self.listens: Address | None = None
        self._bulk_listens: Address | None = None
        self.links: set[_Link] = set()
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._flows: dict[Address, _Flow] = {}
        self._tcp, self._udp = _two_sockets()
        self.port: int = self._tcp.getsockname()[1]
        self._bulk = socket.create_server((HOST, 0))
        self._bulk.setblocking(False)
        self.bulk_port: int = self._bulk.getsockname()[1]
        self._accepting = [
            self._loop.create_task(self._accept(self._tcp, lambda: self.listens)),
            self._loop.create_task(self._accept(self._bulk, lambda: self._bulk_listens)),
        ]
        self._loop.add_reader(self._udp.fileno(), self._drain)

    def expect(self, pid: int) -> None:
        self.pid = pid

    def move_in(self, listens: Address, bulk_listens: Address | None) -> None:
        self._forget_flows()
        self.listens, self._bulk_listens = listens, bulk_listens

    def move_out(self) -> None:
        """Its sockets ended with its process; nothing is left to be delivered to it."""
        self.pid = self.listens = self._bulk_listens = None
        self._forget_flows()

    def close(self) -> None:
        for task in self._accepting:
            task.cancel()
        self._tcp.close()
        self._bulk.close()
        self._loop.remove_reader(self._udp.fileno())
        self._udp.close()
        self._forget_flows()

    def answer(self, datagram: bytes, client: Address) -> None:
        with contextlib.suppress(OSError):
            self._udp.sendto(datagram, client)

    def carry(self, source: str, target: str, datagram: bytes, send: Callable[[bytes], None]) -> None:
        """A datagram in this direction's weather."""
        weather, traffic = self._network.weather(source, target), self._network.traffic
        if self._network.is_lost(weather):
            traffic.lost[source, target] += 1
            return
        traffic.datagrams[source, target] += 1
        if late := self._network.late(weather):
            self._loop.call_later(late, send, datagram)
        else:
            send(datagram)

    async def _accept(self, listening: socket.socket, target: Callable[[], Address | None]) -> None:
        while True:
            accepted, theirs = await self._loop.sock_accept(listening)
            dialler = self._network.owner_of(theirs, listening.getsockname())
            listens = target()
            if dialler is None or listens is None:
                _close(accepted, reset=True)  # nobody at home, or a dialler that has died already
                continue
            self.links.add(_Link(accepted, listens, dialler, self, self._network))

    def _drain(self) -> None:
        for _ in range(DRAIN_MAX):
            try:
                datagram, client = self._udp.recvfrom(DATAGRAM_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                continue
            if self.listens is None:
                continue
            flow = self._flows.get(client)
            if flow is None:
                if len(self._flows) >= FLOWS_MAX:
                    self._forget_flows()
                flow = self._flows[client] = _Flow(self, self.listens, client)
            source = flow.source = flow.source or self._network.sender_at(client)
            self.carry(source, self.name, datagram, flow.send)

    def _forget_flows(self) -> None:
        for flow in self._flows.values():
            flow.close()
        self._flows.clear()


class _Flow:
    """Datagrams between one sender and a place: the daemon sees each sender at a port of its own."""

    def __init__(self, place: _Place, listens: Address, client: Address) -> None:
        self.source = ""
        self._place = place
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        # Connected: what others send to this port never gets in.
        self._socket.connect(listens)
        self._loop.add_reader(self._socket.fileno(), self._drain)

    def send(self, datagram: bytes) -> None:
        with contextlib.suppress(OSError):
            self._socket.send(datagram)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    def _drain(self) -> None:
        for _ in range(DRAIN_MAX):
            try:
                datagram = self._socket.recv(DATAGRAM_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                continue
            self._place.carry(self._place.name, self.source, datagram, self._answer)

    def _answer(self, datagram: bytes) -> None:
        self._place.answer(datagram, self._client)


class _Link:
    """One TCP connection, from the dialler's socket to the daemon's."""

    def __init__(
        self, accepted: socket.socket, listens: Address, dialler: str, place: _Place, network: Network
    ) -> None:
        self.ends = {dialler, place.name}
        self._place = place
        self._accepted = accepted
        self._dialler, self._dialled = dialler, place.name
        self._network = network
        self._broken = False
        self._towards = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.task = asyncio.get_running_loop().create_task(self._run(listens))
        self.task.add_done_callback(self._close)  # a task cancelled before its first step has no `finally`

    def reset(self) -> None:
        """Both ends are told at once."""
        if not self._broken:
            self._broken = True
            self._network.traffic.broken[self._dialler, self._dialled] += 1
            self.task.cancel()

    async def _run(self, listens: Address) -> None:
        self._network.traffic.connections[self._dialler, self._dialled] += 1
        try:
            for each in (self._towards, self._accepted):
                each.setblocking(False)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(self._towards, listens)
            async with asyncio.TaskGroup() as both:
                for source, into, names in (
                    (self._accepted, self._towards, (self._dialler, self._dialled)),
                    (self._towards, self._accepted, (self._dialled, self._dialler)),
                ):
                    pump = _Pump(source, into, *names, self)
                    both.create_task(pump.read())
                    both.create_task(pump.write())
        except* OSError:
            self._broken = True  # a process died, or nobody listens: both ends hear of it as the kernel would tell them

    def _close(self, task: asyncio.Task[None]) -> None:
        self._place.links.discard(self)
        for each in (self._towards, self._accepted):
            _close(each, reset=self._broken)


class _Pump:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, into: socket.socket, sender: str, receiver: str, link: _Link) -> None:
        self._source, self._into = source, into
        self._names = (sender, receiver)
        self._link = link
        self._network = link._network
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue(QUEUE_MAX)
        """When it is due; empty bytes end the direction, None resets the connection."""
        self._paced_until = 0.0
        self._cut: tuple[Weather, int] | None = None
        """The weather that cuts, and the bytes that may still pass in it."""

    async def read(self) -> None:
        due = 0.0
        data: bytes | None = None
        while data != b"":
            try:
                data = await self._loop.sock_recv(self._source, READ_BYTES)
            except OSError:
                data = None
            due = max(due, self._loop.time() + self._network.late(self._weather))
            await self._queue.put((due, data))
            if data is None:
                return

    async def write(self) -> None:
        gone = False
        while True:
            due, data = await self._queue.get()
            await self._wait(due, len(data or b""))
            if not data:
                await asyncio.sleep(self._weather.slow_close_s)
                if data is None:
                    raise ConnectionResetError
                with contextlib.suppress(OSError):
                    self._into.shutdown(socket.SHUT_WR)
                return
            if gone:
                continue  # the sender hears of it when, and if, the other direction carries it
            allowed = self._allowed()
            try:
                await self._send(data[:allowed])
            except OSError:
                gone = True
            if allowed is not None and len(data) > allowed:
                self._link.reset()
                return

    @property
    def _weather(self) -> Weather:
        return self._network.weather(*self._names)

    async def _send(self, data: bytes) -> None:
        self._network.traffic.tcp_bytes[self._names] += len(data)
        await self._loop.sock_sendall(self._into, data)
        if self._cut is not None:
            self._cut = (self._cut[0], self._cut[1] - len(data))

    async def _wait(self, due: float, size: int) -> None:
        """Until the delay is over, nothing blocks, and the line has had time for so many bytes."""
        begun = max(self._paced_until, self._loop.time())
        while True:
            weather = self._weather
            passes_at = max(due, begun + size / weather.bytes_s)
            if weather.blocked:
                await self._network.weather_changes(None)
            elif (left := passes_at - self._loop.time()) > 0:
                await self._network.weather_changes(left)
            else:
                self._paced_until = passes_at if weather.bytes_s < math.inf else 0.0
                return

    def _allowed(self) -> int | None:
        weather = self._weather
        if weather.cut_after is None:
            self._cut = None
            return None
        if self._cut is None or self._cut[0] is not weather:
            self._cut = (weather, weather.cut_after)
        return self._cut[1]


def _close(ending: socket.socket, *, reset: bool) -> None:
    if reset:
        with contextlib.suppress(OSError):
            ending.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ending.close()


def _two_sockets() -> tuple[socket.socket, socket.socket]:
    """TCP and UDP under one number."""
    for _ in range(PORT_TRIES):
        tcp = socket.create_server((HOST, 0))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.bind((HOST, tcp.getsockname()[1]))
        except OSError:
            tcp.close()
            udp.close()
            continue
        tcp.setblocking(False)
        udp.setblocking(False)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        return tcp, udp
    raise OSError("no port number is free on both TCP and UDP")

"""The composition root: builds the rooms, opens them in order, closes them in reverse, and minds signals.

    identity -> data directory's lock -> peer door (TCP) -> directory (UDP, same number) -> driver -> households
    -> local door -> HTTP

Knows every room's face and no room's inside. The only place that turns whatever stops a daemon from starting into a
message and an exit code.

    starting -> running -- SIGTERM, SIGINT --> draining -> closed, exit 0
                   |                              +-- a second signal --> exit now
                   +-- another daemon has our identity --> closed, exit 1
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import fcntl
import hashlib
import importlib.util
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import moshpitd
from moshpitd import allocator
from moshpitd.averaging.all_reduce import AllReduceConfig
from moshpitd.averaging.cohort import CohortConfig
from moshpitd.averaging.grid import format_sides
from moshpitd.averaging.household import HouseholdConfig
from moshpitd.averaging.lossy_reduce import LossyConfig
from moshpitd.averaging.matchmaking import MatchmakingConfig
from moshpitd.averaging.names import short
from moshpitd.averaging.session import SessionConfig
from moshpitd.config import Config, ConfigError, ConfigValue, Endpoint
from moshpitd.directory import Address, AddressError, DatagramSocket, Directory, DirectoryConfig, PortInUse, resolve
from moshpitd.driver import Driver, DriverConfig
from moshpitd.households import Households
from moshpitd.identity import Identity, IdentityError
from moshpitd.local.claim import ClaimError
from moshpitd.local.server import LocalConfig, LocalServer
from moshpitd.local.translate import DatagramLine
from moshpitd.peer.channels import PeerConfig
from moshpitd.peer.datagrams import Refusals
from moshpitd.peer.door import PeerDoor
from moshpitd.peer.tcp import BulkPortError
from moshpitd.peer.udp import UdpConfig, UdpPath
from moshpitd.telemetry import log as event_log
from moshpitd.telemetry.counters import Counters
from moshpitd.telemetry.http import HttpDoor

log = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
READY_PATIENCE_S = 2.0
"""After that, people are told what the daemon waits for."""
CLOSE_GRACE_S = 2.0
"""For answers that are on their way when the local door closes; rounds were drained before."""
IDLE_CHECK_S = 5.0
"""Free memory is kept for the next round, and given back when none ended for as long as this."""
PORT_TRIES = 20
"""With port 0, the TCP port the kernel gave may be taken on UDP: then another one is drawn."""
ROUTE_PROBES = (Address("192.0.2.1", 9), Address("2001:db8::1", 9))
"""Addresses of nobody (RFC 5737, RFC 3849): asked which of ours would be used to reach the world, never sent to."""


class StartError(Exception):
    """The daemon cannot start here; the message names the culprit and the way out."""


@dataclass(eq=False)
class Daemon:
    """A running daemon as its doors show it: `local.translate.DaemonInfo` and `telemetry.http.Health`."""

    identity: Identity
    config: Config
    listen_at: Endpoint
    announce_at: Endpoint
    directory: Directory
    driver: Driver
    udp: UdpPath
    bulk_port: int = 0
    version: str = moshpitd.__version__
    pid: int = field(default_factory=os.getpid)
    started_at: float = field(default_factory=time.monotonic)

    @property
    def ready(self) -> bool:
        return self.directory.is_ready and not self.driver.draining

    @property
    def waiting_for(self) -> str:
        if self.driver.draining:
            return "the running round to end, then it leaves"
        return self.directory.waiting_for() or ""

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    @property
    def swarm(self) -> str:
        return self.config.swarm

    @property
    def listen(self) -> str:
        return str(self.listen_at)

    @property
    def announce(self) -> str:
        return str(self.announce_at)

    @property
    def peers(self) -> int:
        return sum(neighbour.strikes == 0 for neighbour in self.directory.neighbours())

    @property
    def dialable(self) -> bool | None:
        """Whether other peers can dial us, as one of them told the driver."""
        return self.driver.dialable

    @property
    def up_bytes_s(self) -> float:
        return self.driver.link.up_bytes_s

    @property
    def down_bytes_s(self) -> float:
        return self.driver.link.down_bytes_s

    @property
    def datagrams(self) -> DatagramLine:
        udp = self.udp
        return DatagramLine(udp.packets_sent, udp.packets_received, udp.refusals.total, udp.peers_blocked)

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self.started_at

    @property
    def config_values(self) -> Sequence[ConfigValue]:
        return self.config.values


def start(config: Config) -> int:
    """Run a daemon to its end in this process, on a loop of its own; returns the exit code."""
    event_log.set_up(config.log_level, sys.stderr)
    allocator.keep_memory()
    try:
        with asyncio.Runner(loop_factory=_loop_factory(config)) as runner:
            return runner.run(run(config))
    except StartError as error:
        return _complain(error, EXIT_FAILED)


async def run(config: Config) -> int:
    """Run a daemon until it is told to leave; returns the exit code."""
    ending: asyncio.Future[Address | None] = asyncio.get_running_loop().create_future()
    """The address of a clone, or None for an ordinary goodbye."""

    def end(clone: Address | None = None) -> None:
        if not ending.done():
            ending.set_result(clone)

    with _signals(end):
        try:
            async with _rooms(config, on_clone=end) as (daemon, local):
                _say(
                    f"listening on {daemon.listen}, swarm {daemon.swarm}, socket {config.socket}, "
                    f"id {short(daemon.identity.peer_id)}"
                )
                beside = [
                    asyncio.create_task(_tell_readiness(daemon, local)),
                    asyncio.create_task(_give_memory_back(daemon.driver)),
                ]
                try:
                    clone = await ending
                finally:
                    for task in beside:
                        task.cancel()
                    await asyncio.wait(beside)
                await local.show_ready(False)
                if clone is not None:
                    return _complain(_clone_message(daemon, clone), EXIT_FAILED)
                log.info("draining: a running round has %g s", config.drain_timeout_s)
                await daemon.driver.drain(config.drain_timeout_s)
        except ConfigError as error:
            return _complain(error, EXIT_USAGE)
        except (StartError, IdentityError, ClaimError, PortInUse, AddressError) as error:
            return _complain(error, EXIT_FAILED)
    log.info("left")
    return EXIT_OK


@asynccontextmanager
async def _rooms(config: Config, on_clone: Callable[[Address], None]) -> AsyncIterator[tuple[Daemon, LocalServer]]:
    """All rooms, open; closed in reverse. Raises what the rooms raise and StartError."""
    directory_config = dataclasses.replace(
        config.room("directory", DirectoryConfig), remembered_file=config.data_dir / "peers"
    )
    local_config = dataclasses.replace(
        config.room("local", LocalConfig),
        vector_bytes_max=config.vector_bytes_max,
        shared_memory_dir=config.shared_memory_dir,
    )
    peer_config = dataclasses.replace(
        config.room("peer", PeerConfig), transport=config.transport, bulk_port=config.bulk_port
    )
    session_config = dataclasses.replace(
        config.room("session", SessionConfig),
        pin=format_sides(config.grid) if config.grid else "",
        group_size_max=config.group_size_max,
        cohort=config.room("cohort", CohortConfig),
        matchmaking=config.room("matchmaking", MatchmakingConfig),
        all_reduce=config.room("all_reduce", AllReduceConfig),
        lossy=config.room("lossy", LossyConfig),
    )
    swarm_id = hashlib.sha256(b"moshpitd swarm " + config.swarm.encode()).digest()
    counters = Counters()
    async with AsyncExitStack() as stack:
        identity = Identity.open(config.data_dir)
        stack.enter_context(_data_dir_lock(config.data_dir))
        peer_door, datagrams = await _open_ports(config, identity, swarm_id, peer_config)
        stack.push_async_callback(peer_door.close)
        stack.callback(datagrams.close)
        listen_at = Endpoint(config.listen.host, datagrams.address.port)
        announce_at = await _announced(config, listen_at)
        directory = await Directory.open(
            identity,
            swarm_id,
            datagrams,
            join=[str(one) for one in config.join],
            announced=None if config.announce is None else (await resolve(str(config.announce)))[0],
            config=directory_config,
            on_clone=on_clone,
        )
        stack.push_async_callback(directory.close)
        driver = Driver(
            identity=identity,
            swarm_id=swarm_id,
            directory=directory,
            peer_door=peer_door,
            announce=str(announce_at),
            announce_bulk_port=peer_door.bulk_port and (config.bulk_announce or peer_door.bulk_port),
            session_config=session_config,
            config=config.room("driver", DriverConfig),
        )
        stack.push_async_callback(driver.close)
        udp = UdpPath(datagrams, config.room("udp", UdpConfig))
        stack.push_async_callback(udp.close)
        udp.serve(driver)
        await peer_door.serve(driver, udp)
        daemon = Daemon(identity, config, listen_at, announce_at, directory, driver, udp, peer_door.bulk_port)
        households = Households(driver, config.room("household", HouseholdConfig))
        local = await LocalServer.open(config.socket, households, daemon, local_config)
        stack.push_async_callback(local.close, CLOSE_GRACE_S)
        if config.http is not None:
            counters.gauge("ready", lambda: daemon.ready)
            counters.gauge("peers", lambda: daemon.peers)
            counters.gauge("sessions", lambda: len(driver.sessions()))
            counters.gauge("tasks", lambda: len(asyncio.all_tasks()))
            counters.histogram("loop_lag_seconds", driver.loop_lag.read)
            counters.gauge("packets_sent", lambda: udp.packets_sent)
            counters.gauge("packets_received", lambda: udp.packets_received)
            counters.gauge("packet_peers_blocked", lambda: udp.peers_blocked)
            for refusal in dataclasses.fields(Refusals):
                counters.gauge(f"packets_{refusal.name}", partial(getattr, udp.refusals, refusal.name))
            http = HttpDoor(daemon, counters)
            try:
                port = await http.open(config.http.host, config.http.port)
            except OSError as error:
                raise StartError(f"--http {config.http}: {error.strerror}: choose another address, or off") from error
            stack.push_async_callback(http.close)
            log.info("health and metrics at http://%s", Endpoint(config.http.host, port))
        yield daemon, local


async def _open_ports(
    config: Config, identity: Identity, swarm_id: bytes, peer_config: PeerConfig
) -> tuple[PeerDoor, DatagramSocket]:
    """gRPC on TCP and datagrams on UDP under one number."""
    host, port = config.listen.host, config.listen.port
    await _check_listen(config.listen)
    for tries_left in reversed(range(PORT_TRIES)):
        try:
            door = await PeerDoor.open(host, port, identity=identity, swarm_id=swarm_id, config=peer_config)
        except BulkPortError as error:
            raise StartError(
                f"--bulk-port {peer_config.bulk_port}: {error.strerror}: choose another port, or 0 for a free one"
            ) from error
        except OSError as error:
            raise StartError(_port_message(config.listen, error)) from error
        try:
            return door, await DatagramSocket.open(host, door.port)
        except PortInUse:
            await door.close()
            if port or not tries_left:
                raise
        except OSError as error:
            await door.close()
            raise StartError(_port_message(config.listen, error)) from error
    raise AssertionError("unreachable")


async def _check_listen(listen: Endpoint) -> None:
    """Bind once ourselves: gRPC does not say whether a port is taken or an address is another machine's."""
    at = (await resolve(str(listen)))[0]
    with socket.socket(socket.AF_INET6 if ":" in at.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(at)
        except OSError as error:
            raise StartError(_port_message(listen, error)) from error


async def _announced(config: Config, listen_at: Endpoint) -> Endpoint:
    """What others are told to dial."""
    if config.announce is not None:
        return config.announce
    if not listen_at.is_wildcard:
        return listen_at
    targets: list[Address] = []
    for join in config.join:
        try:
            targets += await resolve(str(join))
        except AddressError as error:
            log.warning("%s", error)
    for target in (*targets, *ROUTE_PROBES):
        host = _own_address_towards(target, ipv6=listen_at.host == "::")
        if host is not None and not host.startswith("127.") and host != "::1":
            return Endpoint(host, listen_at.port)
    log.warning("this machine has no route to others, so it announces 127.0.0.1; give --announce HOST:PORT")
    return Endpoint("127.0.0.1", listen_at.port)


def _own_address_towards(target: Address, *, ipv6: bool) -> str | None:
    """Which of our addresses the kernel would use; connecting a UDP socket asks that and sends nothing."""
    family = socket.AF_INET6 if ":" in target.host else socket.AF_INET
    if family == socket.AF_INET6 and not ipv6:
        return None
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)
        except OSError:
            return None
        return str(probe.getsockname()[0])


async def _tell_readiness(daemon: Daemon, local: LocalServer) -> None:
    try:
        async with asyncio.timeout(READY_PATIENCE_S):
            await daemon.directory.wait_ready()
    except TimeoutError:
        _say(f"not ready: waiting for {daemon.waiting_for}")
        await daemon.directory.wait_ready()
    await local.show_ready(True)
    others = daemon.peers
    _say(f"ready, {others} other {'peer' if others == 1 else 'peers'}")


async def _give_memory_back(driver: Driver) -> None:
    """Once after each spell of rounds, when the last one is a while ago."""
    given_back_after = driver.rounds_ended
    seen = driver.rounds_ended
    while True:
        await asyncio.sleep(IDLE_CHECK_S)
        if driver.rounds_ended == seen and not driver.busy and given_back_after != seen:
            allocator.give_back()
            given_back_after = seen
        seen = driver.rounds_ended


@contextmanager
def _signals(end: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT end the daemon; the second one at once."""
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def receive(number: int) -> None:
        received.append(number)
        if len(received) > 1:
            # The trainers' and the others' connections end with the process; the locks too.
            log.warning("second signal: leaving now")
            os._exit(EXIT_FAILED)
        end()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, receive, number)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@contextmanager
def _data_dir_lock(data_dir: Path) -> Iterator[None]:
    """One daemon a data directory: two would be one peer. The lock dies with its process."""
    handle = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode("ascii", "replace").strip() or "unknown"
            raise StartError(
                f"data directory {data_dir} is used by the daemon with process id {holder}: "
                "give this one its own with --data-dir"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _loop_factory(config: Config) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed, unless chosen otherwise; None = asyncio's own."""
    if config.event_loop == "asyncio":
        return None
    if importlib.util.find_spec("uvloop") is None:
        if config.event_loop == "uvloop":
            raise StartError("--event-loop uvloop: uvloop is not installed; pip install uvloop, or choose asyncio")
        return None
    import uvloop

    return uvloop.new_event_loop


def _port_message(listen: Endpoint, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {listen.port} of {listen.host} is in use: stop its owner, or choose another port with "
            f"--listen {Endpoint(listen.host, 0)} (0 takes a free one)"
        )
    return f"--listen {listen}: {error.strerror or error}; name an address of this machine"


def _clone_message(daemon: Daemon, clone: Address) -> str:
    return (
        f"another daemon with this daemon's identity {short(daemon.identity.peer_id)} lives at {clone}: "
        f"{daemon.config.data_dir} was copied. Give each daemon a data directory of its own (--data-dir); delete "
        "identity.pem in one of them"
    )


def _say(line: str) -> None:
    """For who started the daemon; the event log goes to stderr."""
    print(line, flush=True)


def _complain(problem: Exception | str, code: int) -> int:
    print(f"Error: {problem}", file=sys.stderr, flush=True)
    return code

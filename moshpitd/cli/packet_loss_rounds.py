"""`moshpitd bench packet-loss`, the parts that need a network which loses packets: namespaces, and daemons in them.

Rounds: four daemons average, over datagrams and over gRPC, on links that lose nothing, a little and a lot. A round's
time is that of its slowest member, from a closed group to its result. Messages: plain TCP moves 1 MiB and waits for a
byte, on the same links. Drift: eight daemons average what moves by itself all the time. Trainers are threads that
stream their values, for which nothing is counted.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from moshpitd.cli.connection import Daemon
from moshpitd.cli.failure import ExitCode, Failure
from moshpitd.cli.forms import OUTCOMES
from moshpitd.cli.local_swarm import local_swarm
from moshpitd.cli.namespaces import Place, Rate, lose, shaped_net
from moshpitd.local.v1 import daemon_pb2 as pb

PEERS = 4
LOSSES = (0.0, 0.01, 0.05, 0.1)
MEGABYTES = (4, 64)
BUDGET_S = 90.0
"""No further round begins in a cell that has taken so long."""
AVERAGE_TIMEOUT_S = 60.0
SESSION_TIMEOUT_S = 7200.0
NEVER = 1 << 20
"""As `reliable_every`."""
STREAM_BYTES = 4 << 20
MESSAGES, MESSAGE_BYTES = 200, 1 << 20
DRIFT_PEERS, DRIFT_ELEMENTS, DRIFT_SETTLED = 8, 400_000, 12

Floats = npt.NDArray[np.float32]
Values = Literal["lossy", "reliable"]
TRANSPORTS: tuple[Values, ...] = ("lossy", "reliable")
WARM_UP: dict[Values, int] = {"lossy": 3, "reliable": 1}
"""Rounds that are not counted: rates, losses and deadlines are learnt in them."""


@dataclass(slots=True)
class RoundTimes:
    """Of one transport on one kind of links."""

    transport: Values
    megabytes: float
    loss: float
    """Of packets, on every link."""
    uplink_mbit: int
    """0: as fast as the machine."""
    seconds: list[float] = field(default_factory=list)
    """Of each round, of its slowest member."""
    packets: int = 0
    lost: int = 0
    """Of these; as the receipts have it, of reliable rounds not known."""
    repaired: int = 0
    """Ranges that were sent again over the reliable streams."""
    outcomes: dict[str, int] = field(default_factory=dict)
    """Of members' averagings: where much is lost reliable ones leave members out, which are then alone, or have no
    outcome in time (unknown)."""
    error: float = 0.0
    """Root of the mean square of what a result is off the exact mean, as a share of the values' spread."""

    def add(self, receipts: Sequence[pb.Receipt]) -> None:
        """Of all members of a round."""
        self.seconds.append(max(receipt.seconds.reduce for receipt in receipts))
        self.outcomes = dict(Counter(self.outcomes) + Counter(OUTCOMES[receipt.outcome] for receipt in receipts))
        for lossy in (each.lossy for receipt in receipts for each in receipt.rounds if each.HasField("lossy")):
            self.packets += sum(link.sent for link in lossy.links)
            self.lost += sum(link.lost for link in lossy.links)
            self.repaired += lossy.repaired

    def ms(self, share: float) -> float:
        """A percentile of the rounds' time; with few rounds that is their worst."""
        return 1e3 * float(np.percentile(self.seconds, 100 * share))


@dataclass(frozen=True, slots=True)
class MessageTimes:
    """1 MiB over plain TCP and a byte back."""

    loss: float
    seconds: list[float]

    def ms(self, share: float) -> float:
        return 1e3 * float(np.percentile(self.seconds, 100 * share))


@dataclass(frozen=True, slots=True)
class DaemonDrift:
    """How far daemons' results are apart, where every trainer's values move by 1 between two averagings."""

    loss: float
    drift: float
    """E |th_i - th_j|^2 an element over all pairs, in the mean of rounds."""
    rounds: int
    growth: float
    """Second half of the rounds by the first."""
    outcomes: dict[str, int]


@dataclass(slots=True)
class Net:
    """What was measured in namespaces."""

    rounds: list[RoundTimes] = field(default_factory=list)
    messages: list[MessageTimes] = field(default_factory=list)


def rounds(
    count: int,
    *,
    say: Callable[[str], None],
    megabytes: Sequence[int] = MEGABYTES,
    losses: Sequence[float] = LOSSES,
    transports: Sequence[Values] = TRANSPORTS,
    messages: int = MESSAGES,
) -> Net:
    """So many rounds of 4 MB for each kind of link, fewer of more. Raises NoNamespaces, Failure."""
    net = Net()
    with shaped_net([None, None], loss=0.0) as places:
        for loss in losses:
            say(f"plain TCP, {messages} messages at {loss:.0%} loss")
            lose(places, loss)
            net.messages.append(MessageTimes(loss, _messages(places, messages)))
    for size in megabytes:
        wanted = count if size == min(megabytes) else max(2, 3 * count * min(megabytes) // size)
        with shaped_net([None] * PEERS, loss=0.0) as places, _swarm(places) as sockets:
            for transport in transports:
                # Lossy rounds take turns: whatever else the machine does falls on all losses alike. TCP's connections
                # would remember what was lost before.
                for some in [losses] if transport == "lossy" else [[loss] for loss in losses]:
                    net.rounds += _cells(sockets, places, transport, size, some, 0, wanted, say)
        with shaped_net([Rate.GBIT_1] * PEERS) as places, _swarm(places) as sockets:
            for transport in transports:
                net.rounds += _cells(sockets, places, transport, size, [0.0], Rate.GBIT_1.mbit, wanted, say)
    return net


def _swarm(places: Sequence[Place]) -> contextlib.AbstractContextManager[list[Path]]:
    return local_swarm(PEERS, "--grid", str(PEERS), "--preset", "lan", "--transport", "grpc", places=places)


def drift(loss: float, count: int, *, seed: int, say: Callable[[str], None]) -> DaemonDrift:
    """Raises NoNamespaces, Failure."""
    say(f"drift: {DRIFT_PEERS} daemons, {count} rounds at {loss:.0%} loss")
    with (
        shaped_net([None] * DRIFT_PEERS, loss=loss) as places,
        local_swarm(DRIFT_PEERS, "--grid", str(DRIFT_PEERS), "--preset", "lan", places=places) as sockets,
        _Trainers(sockets, "drift", "lossy", DRIFT_ELEMENTS) as trainers,
    ):
        rng = np.random.default_rng(seed)
        held = [np.zeros(DRIFT_ELEMENTS, np.float32) for _ in sockets]
        apart: list[float] = []
        outcomes: Counter[str] = Counter()
        for _ in range(count):
            moved = [each + rng.standard_normal(len(each), np.float32) for each in held]
            held, receipts = trainers.average(moved)
            outcomes.update(OUTCOMES[receipt.outcome] for receipt in receipts)
            apart.append(float(2 * np.stack(held).var(axis=0, ddof=1).mean()))
    settled = apart[min(DRIFT_SETTLED, count // 2) :]
    half = len(settled) // 2
    growth = float(np.mean(settled[half:]) / np.mean(settled[:half])) if half and np.mean(settled[:half]) else 1.0
    return DaemonDrift(loss, float(np.mean(settled)), len(settled), growth, dict(outcomes))


def _cells(
    sockets: Sequence[Path],
    places: Sequence[Place],
    transport: Values,
    megabytes: int,
    losses: Sequence[float],
    uplink_mbit: int,
    count: int,
    say: Callable[[str], None],
) -> list[RoundTimes]:
    """A session for each loss; they take turns, a round each."""
    link = f"{uplink_mbit} Mbit/s" if uplink_mbit else "not shaped"
    say(f"rounds: {transport}, {megabytes} MB at {', '.join(f'{loss:.0%}' for loss in losses)} loss, {link}")
    elements = int(megabytes * 1e6) // 4
    values = [np.random.default_rng(rank).standard_normal(elements, np.float32) for rank in range(len(sockets))]
    mean = np.mean(values, axis=0)
    cells = [RoundTimes(transport, megabytes, loss, uplink_mbit) for loss in losses]
    with contextlib.ExitStack() as stack:
        trainers = [
            stack.enter_context(_Trainers(sockets, f"{transport} {megabytes} {loss:g}", transport, elements))
            for loss in losses
        ]
        began = time.monotonic()
        for number in range(WARM_UP[transport] + count):
            for cell, its in zip(cells, trainers, strict=True):
                if not uplink_mbit:
                    lose(places, cell.loss)
                results, receipts = its.average(values)
                if number == 0:
                    errors = [((result - mean) ** 2).mean() for result in results]
                    cell.error = float(np.sqrt(np.mean(errors)))
                if number >= WARM_UP[transport] or time.monotonic() - began > BUDGET_S:
                    cell.add(receipts)
            if time.monotonic() - began > BUDGET_S * len(cells):
                break
        if not uplink_mbit:
            lose(places, 0.0)  # for what follows, and so that sessions close at once
    return cells


# ---- trainers


class _Trainers:
    """One session at each daemon, for as long as the block lasts; all average at once."""

    def __init__(self, sockets: Sequence[Path], name: str, transport: Values, elements: int) -> None:
        self._request = pb.OpenSessionRequest(
            name=name,
            tensors=[pb.Tensor(name="model", shape=[elements], data_type=pb.DATA_TYPE_FLOAT32)],
            min_peers=len(sockets),
            joining=pb.JOINING_CONTRIBUTE,
            rounds=1,
            transport=transport,
            reliable_every=NEVER if transport == "lossy" else 0,
        )
        self._sockets = sockets
        self._pool = ThreadPoolExecutor(len(sockets))
        self._over = threading.Event()

    def __enter__(self) -> _Trainers:
        self._daemons = [Daemon(path) for path in self._sockets]
        self._sessions = [daemon.session(self._request, SESSION_TIMEOUT_S) for daemon in self._daemons]
        self._ids = [session.__enter__() for session in self._sessions]
        return self

    def __exit__(self, *_: object) -> None:
        for session in self._sessions:
            session.__exit__(None, None, None)
        for daemon in self._daemons:
            daemon.__exit__(None, None, None)
        self._pool.shutdown()

    def average(self, values: Sequence[Floats]) -> tuple[list[Floats], list[pb.Receipt]]:
        both = list(self._pool.map(self._average, self._daemons, self._ids, values))
        return [result for result, _ in both], [receipt for _, receipt in both]

    @staticmethod
    def _average(daemon: Daemon, session_id: str, values: Floats) -> tuple[Floats, pb.Receipt]:
        data = values.view(np.uint8).data

        def requests() -> Iterator[pb.AverageRequest]:
            yield pb.AverageRequest(start=pb.AverageStart(session_id=session_id, timeout_seconds=AVERAGE_TIMEOUT_S))
            for at in range(0, len(data), STREAM_BYTES):
                chunk = pb.VectorChunk(offset=at, data=bytes(data[at : at + STREAM_BYTES]))
                yield pb.AverageRequest(chunk=chunk)

        receipt, result = pb.Receipt(), bytearray(data)
        began = time.monotonic()
        try:
            with daemon.average(requests(), 2 * AVERAGE_TIMEOUT_S) as responses:
                for response in responses:
                    match response.WhichOneof("message"):
                        case "receipt":
                            receipt = response.receipt
                        case "chunk":
                            chunk = response.chunk
                            result[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data
        except Failure as failure:
            if failure.code is not ExitCode.NO_GROUP:
                raise
            receipt = pb.Receipt(why=str(failure), seconds=pb.Seconds(reduce=time.monotonic() - began))
        return np.frombuffer(result, np.float32), receipt


# ---- plain TCP


def _messages(places: Sequence[Place], count: int) -> list[float]:
    """How long each took. Between two processes in two places."""
    command = [sys.executable, "-m", "moshpitd.cli.packet_loss_rounds"]
    address = places[1].address
    with subprocess.Popen([*places[1].prefix, *command, address], stdout=subprocess.PIPE, text=True) as answering:
        assert answering.stdout is not None
        port = answering.stdout.readline().strip()
        done = subprocess.run(
            [*places[0].prefix, *command, address, port, str(count)], capture_output=True, text=True, check=False
        )
        answering.kill()
    if done.returncode or not done.stdout:
        raise Failure(ExitCode.FAILED, f"plain TCP between two namespaces failed: {done.stderr.strip()}")
    return [float(word) for word in done.stdout.split()]


def _answer(address: str) -> None:
    with socket.create_server((address, 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        connection, _ = listening.accept()
        with connection:
            into, got = memoryview(bytearray(MESSAGE_BYTES)), 0
            while size := connection.recv_into(into[got:]):
                got += size
                if got == MESSAGE_BYTES:
                    connection.sendall(b"!")
                    got = 0


def _ask(address: str, port: int, count: int) -> None:
    message = bytes(MESSAGE_BYTES)
    with socket.create_connection((address, port)) as connection:
        began = time.monotonic()
        for _ in range(count):
            sent_at = time.monotonic()
            connection.sendall(message)
            connection.recv(1)
            print(time.monotonic() - sent_at)
            if time.monotonic() - began > BUDGET_S:
                break


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _answer(sys.argv[1])
    else:
        _ask(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

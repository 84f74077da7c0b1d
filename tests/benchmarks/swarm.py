"""A swarm on this machine: daemons and trainers, each a process of its own, gone when the block ends.

Knows `moshpitd run`, the Python client and how to let all trainers call at the same moment, on this machine's loopback
or in network namespaces. Does not know what is measured. A trainer owns one float32 tensor; `Values` says what is in
it, so that every process can work out what an average of any of them must be without moving vectors around.

    parent -- Go(weight, ...) --> trainer -- session.average --> its daemon
           <-- Step(began, ended, receipt, crc) --
           -- Check({rank: weight}) --> compares its tensor with the float64 mean of these ranks' values
           <-- relative error --
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.synchronize
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import psutil

import moshpit_client
from moshpit_client import Receipt
from moshpitd.averaging.codecs import CHOICES, rules_of
from moshpitd.cli.namespaces import HERE, Place
from tests.benchmarks.figures import WrongResult

START_TIMEOUT_S = 60.0
STEP_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
LOG_LINES = 15
ERROR_MAX = 1e-6
"""Relative to the largest element of the exact mean."""
BLOCK = 1 << 20
"""Elements that are checked at once."""

Transport = Literal["grpc", "tcp"]
Hop = Literal["zero copy", "copied", "streamed"]
"""How a trainer's values come to its daemon: placed in shared memory, copied there and back, or streamed."""


class SwarmFailed(Exception):
    """A daemon or a trainer did not do its part; the message ends with the daemon's log."""


@dataclass(frozen=True, slots=True)
class Step:
    """One trainer's averaging. Moments are of the system's monotonic clock: comparable between processes."""

    began: float
    ended: float
    receipt: Receipt
    crc: int
    """Of the tensor afterwards."""


@dataclass(frozen=True, slots=True)
class Refused:
    """What a trainer was told instead of a result."""

    why: str


@dataclass(frozen=True, slots=True)
class Go:
    """Fill the tensor for this turn, then average when released."""

    turn: int
    weight: float


@dataclass(frozen=True, slots=True)
class CheckSpans:
    """Compare elements [start, stop) of the tensor with the mean over these ranks, equally weighted; for each span."""

    turn: int
    spans: tuple[tuple[int, int, frozenset[int]], ...]


@dataclass(frozen=True, slots=True)
class Check:
    """Compare the tensor with the mean over ranks, weighted."""

    turn: int
    weights: Mapping[int, float]


class Values:
    """What a trainer's tensor holds before the averaging, from the first element on: of both signs, different for every
    rank and turn."""

    def __init__(self, rank: int, turn: int) -> None:
        self._rng = np.random.default_rng([rank, turn])

    def fill(self, out: npt.NDArray[np.float32]) -> None:
        """Write the next elements."""
        self._rng.random(dtype=np.float32, out=out)
        out *= np.float32(2.0)
        out -= np.float32(1.0)


def means(turn: int, weights: Mapping[int, float], elements: int) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """What an averaging over these ranks must give, block by block with its first index."""
    everybody = {Values(rank, turn): weight / sum(weights.values()) for rank, weight in weights.items()}
    block = np.empty(BLOCK, np.float32)
    for start in range(0, elements, BLOCK):
        part = block[: min(BLOCK, elements - start)]
        exact = np.zeros(len(part), np.float64)
        for its, share in everybody.items():
            its.fill(part)
            exact += part * np.float64(share)
        yield start, exact


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running `moshpitd run`."""

    process: subprocess.Popen[bytes]
    socket: Path
    log: Path

    def cpu_seconds(self) -> float:
        """Used since its start, by program and kernel."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def private_bytes(self) -> int:
        """Resident, without what it shares with its trainers."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * sum(int(re.findall(rf"{kind}:\s+(\d+) kB", status)[0]) for kind in ("RssAnon", "RssFile"))

    def loop_lag(self) -> Counter[float]:
        """How often its event loop was late by at most so many seconds, but more than the next smaller number."""
        (where,) = re.findall(r"health and metrics at (http://\S+)", self.log.read_text())
        with urllib.request.urlopen(f"{where}/metrics", timeout=START_TIMEOUT_S) as answer:
            text = answer.read().decode()
        found = Counter[float]()
        before = 0
        for bound, so_far in re.findall(r'moshpitd_loop_lag_seconds_bucket{le="(\S+)"} (\d+)', text):
            found[float(bound)] += int(so_far) - before
            before = int(so_far)
        return found

    def failure(self, why: str) -> SwarmFailed:
        """An error that shows the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return SwarmFailed("\n".join([f"daemon {self.log.parent.name} {why}; its log ends:", *lines]))


class Swarm:
    """Made by `running`."""

    def __init__(
        self, home: Path, flags: Sequence[str], transport: Transport | None, places: Sequence[Place], metrics: bool
    ) -> None:
        self.daemons: list[Daemon] = []
        self.transport = transport
        self._home = home
        self._flags = [*flags, *(("--transport", transport) if transport else ())]
        self._places = places
        self._metrics = metrics

    def start(self) -> None:
        """Start daemons, the first before the others, and wait until each knows all of them."""
        joining: tuple[str, ...] = ()
        for place in self._places:
            self._start_one(place, joining)
            joining = joining or ("--join", self._status(self.daemons[0]).listen)
        others = len(self.daemons) - 1
        for daemon in self.daemons:
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                status = self._status(daemon)
                if status.ready and status.peers >= others:
                    break
                if time.monotonic() > deadline:
                    raise daemon.failure(f"knew {status.peers} of {others} peers after {START_TIMEOUT_S:g} s")
                time.sleep(0.05)

    def cpu_seconds(self) -> float:
        """Of all daemons so far."""
        return sum(daemon.cpu_seconds() for daemon in self.daemons)

    def _start_one(self, place: Place, joining: Sequence[str]) -> None:
        home = self._home / str(len(self.daemons))
        home.mkdir()
        socket, log = home / "s" / "sock", home / "log"
        command = [*place.prefix, sys.executable, "-m", "moshpitd", "run", "--swarm", "benchmark"]
        command += ["--listen", f"{place.address}:0", "--socket", str(socket), "--data-dir", str(home / "data")]
        command += ["--http", "127.0.0.1:0" if self._metrics else "off", *self._flags, *joining]
        # Variables of whoever measures must not change what is measured.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MOSHPITD_")}
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environ, start_new_session=True)
        self.daemons.append(Daemon(process, socket, log))

    @staticmethod
    def _status(daemon: Daemon) -> moshpit_client.Status:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if daemon.process.poll() is not None:
                raise daemon.failure(f"ended with exit code {daemon.process.returncode}")
            try:
                with moshpit_client.connect(daemon.socket) as connection:
                    return connection.status()
            except moshpit_client.DaemonUnreachable:
                if time.monotonic() > deadline:
                    raise daemon.failure(f"did not answer within {START_TIMEOUT_S:g} s") from None
                time.sleep(0.05)

    def stop(self) -> None:
        for daemon in self.daemons:
            daemon.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for daemon in self.daemons:
            try:
                daemon.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                daemon.process.kill()
                daemon.process.wait()


@contextlib.contextmanager
def running(
    count: int,
    *flags: str,
    transport: Transport | None = None,
    places: Sequence[Place] = (),
    metrics: bool = False,
) -> Iterator[Swarm]:
    """A swarm of so many daemons, started with these flags. Their logs are kept, and named, when the block fails.

    transport: which they must use; None leaves it to them. places: where they run, one a daemon. metrics: serve them.
    """
    home = Path(tempfile.mkdtemp(prefix="moshpit-"))
    swarm = Swarm(home, flags, transport, places or [HERE] * count, metrics)
    failed = False
    try:
        swarm.start()
        yield swarm
    except (SwarmFailed, WrongResult) as error:
        failed = True
        error.add_note(f"the daemons' logs: {home}/*/log")
        raise
    finally:
        swarm.stop()
        if not failed:
            shutil.rmtree(home)


@dataclass(frozen=True, slots=True)
class Training:
    """How the trainers of a swarm average."""

    elements: int
    rounds: int | None = None
    """Of an averaging; None for the exact mean."""
    codec: str = "float32"
    compressor: str = "dense"
    row: int = 0
    """The tensor's second side; 0: it has one only."""
    hop: Hop = "copied"
    name: str = "default"
    """Of their sessions: trainings of one swarm need different ones."""
    timeout_s: float = STEP_TIMEOUT_S
    """For one averaging."""

    @property
    def error_max(self) -> float:
        if self.codec == "float32":
            return ERROR_MAX
        return 1.5 * rules_of(self.codec).with_auto(CHOICES[-1]).precision  # of the largest mean, not the largest value


class Trainers:
    """One trainer a daemon, with an open session. Made by `training`."""

    def __init__(self, swarm: Swarm, how: Training) -> None:
        self.elements = how.elements
        self.peer_ids: tuple[str, ...] = ()
        self._how = how
        self._swarm = swarm
        self._turn = 0
        self._links: list[multiprocessing.connection.Connection[object, object]] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._release = context.Barrier(len(swarm.daemons) + 1)
        for rank, daemon in enumerate(swarm.daemons):
            ours, theirs = context.Pipe()
            arguments = (theirs, self._release, daemon.socket, rank, len(swarm.daemons), how)
            process = context.Process(target=_train, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._links.append(ours)
            self._processes.append(process)

    def open(self) -> None:
        """Wait until all sessions are open."""
        self.peer_ids = tuple(str(self._answer(rank)) for rank in range(len(self._links)))

    def step(self, weights: Sequence[float] | None = None) -> list[Step]:
        """All trainers average fresh values, released together. Raises WrongResult unless every peer's is complete."""
        self._turn += 1
        for rank, link in enumerate(self._links):
            link.send(Go(self._turn, weights[rank] if weights else 1.0))
        self._release.wait(self._how.timeout_s)
        steps: list[Step] = []
        for rank in range(len(self._links)):
            step = self._answer(rank)
            assert isinstance(step, Step)
            if step.receipt.outcome != "complete":
                raise WrongResult(f"trainer {rank}: {step.receipt.outcome}, not complete: {step.receipt.why}")
            used = {each.transport for each in step.receipt.rounds}
            if self._swarm.transport is not None and used != {self._swarm.transport}:
                raise WrongResult(f"trainer {rank}: its values travelled by {used}, not by {self._swarm.transport}")
            steps.append(step)
        return steps

    def step_as_it_comes(self, victim: int | None = None, meanwhile: Callable[[], None] = lambda: None) -> list[Step]:
        """The same with equal weights and any outcome, while something is done; without the victim's step."""
        self._turn += 1
        for link in self._links:
            link.send(Go(self._turn, 1.0))
        self._release.wait(self._how.timeout_s)
        meanwhile()
        steps: list[Step] = []
        for rank in range(len(self._links)):
            if rank != victim:
                step = self._answer(rank)
                assert isinstance(step, Step)
                steps.append(step)
        return steps

    def span_error(self, rank: int, receipt: Receipt) -> float:
        """How far this trainer's tensor is from what its receipt names, span by span; one round, equal weights."""
        (only,) = receipt.rounds
        ranks = {peer: index for index, peer in enumerate(self.peer_ids)}
        spans = tuple((s.start, s.stop, frozenset(ranks[peer] for peer in s.contributors)) for s in only.spans)
        self._links[rank].send(CheckSpans(self._turn, spans))
        found = self._answer(rank)
        assert isinstance(found, float)
        return found

    def error(self, rank: int, weights: Mapping[int, float]) -> float:
        """How far this trainer's tensor is from the mean over these ranks, which are to be weighted so."""
        self._links[rank].send(Check(self._turn, weights))
        found = self._answer(rank)
        assert isinstance(found, float)
        return found

    def check(self, steps: Sequence[Step], weights: Sequence[float]) -> float:
        """The largest error of an averaging of all with all. Raises WrongResult above ERROR_MAX or for other bits."""
        if len({step.crc for step in steps}) != 1:
            raise WrongResult(f"{len(steps)} peers hold {len({step.crc for step in steps})} different results")
        error = self.error(0, dict(enumerate(weights)))
        if not error <= self._how.error_max:
            raise WrongResult(f"the mean is off by {error:.2e} relative, {self._how.error_max:g} is allowed")
        return error

    def check_groups(self, steps: Sequence[Step]) -> None:
        """The same for an averaging of one round: each group's mean, and the same bits within it."""
        crcs: dict[str, set[int]] = {}
        for rank, step in enumerate(steps):
            (only,) = step.receipt.rounds
            crcs.setdefault(only.group_id, set()).add(step.crc)
            error = self.error(rank, {self.peer_ids.index(each.peer): each.weight for each in only.members})
            if not error <= self._how.error_max:
                raise WrongResult(f"trainer {rank} is off its group's mean by {error:.2e} relative")
        if any(len(each) > 1 for each in crcs.values()):
            raise WrongResult("members of one group hold different bits")

    def close(self) -> None:
        self._release.abort()
        for link in self._links:
            link.close()
        for process in self._processes:
            process.join(STOP_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()

    def _answer(self, rank: int) -> object:
        if not self._links[rank].poll(START_TIMEOUT_S + self._how.timeout_s):
            raise self._swarm.daemons[rank].failure("left its trainer without an answer")
        try:
            answer = self._links[rank].recv()
        except EOFError:
            raise self._swarm.daemons[rank].failure("lost its trainer") from None
        if isinstance(answer, Refused):
            raise self._swarm.daemons[rank].failure(f"told its trainer: {answer.why}")
        return answer


@contextlib.contextmanager
def training(swarm: Swarm, how: Training) -> Iterator[Trainers]:
    """A trainer for each daemon with one float32 tensor."""
    trainers = Trainers(swarm, how)
    try:
        trainers.open()
        yield trainers
    finally:
        trainers.close()


def _train(
    link: multiprocessing.connection.Connection[object, object],
    release: multiprocessing.synchronize.Barrier,
    socket: Path,
    rank: int,
    peers: int,
    how: Training,
) -> None:
    """A trainer's process, until its link is closed."""
    tensor = np.empty(how.elements, np.float32)
    shaped = tensor.reshape(-1, how.row) if how.row else tensor
    with contextlib.suppress(EOFError, OSError, threading.BrokenBarrierError), moshpit_client.connect(socket) as daemon:
        try:
            # Every averaging waits for all: what is measured is never a smaller swarm.
            with daemon.open_session(
                {"x": shaped},
                name=how.name,
                min_peers=peers,
                rounds=how.rounds or "auto",
                codec=how.codec,
                compressor=how.compressor,
                shared_memory=how.hop != "streamed",
            ) as session:
                if how.hop != "streamed":
                    _require_shared_memory(daemon, how)
                link.send(daemon.status().peer_id)
                while True:
                    match link.recv():
                        case Go(turn=turn, weight=weight):
                            if how.hop == "zero copy":
                                given = session.contribution()
                                tensor = given["x"].view(np.float32).reshape(-1)
                                Values(rank, turn).fill(tensor)
                                release.wait(how.timeout_s)
                                began = time.monotonic()
                                got, receipt = session.average_values(given, weight, how.timeout_s, copy=False)
                                ended = time.monotonic()
                                tensor = got["x"].view(np.float32).reshape(-1)
                            else:
                                Values(rank, turn).fill(tensor)
                                release.wait(how.timeout_s)
                                began = time.monotonic()
                                receipt = session.average(weight, how.timeout_s)
                                ended = time.monotonic()
                            link.send(Step(began, ended, receipt, zlib.crc32(tensor.view(np.uint8).data)))
                        case Check(turn=turn, weights=weights):
                            link.send(_error(tensor, turn, weights, [(0, len(tensor))]))
                        case CheckSpans(turn=turn, spans=spans):
                            by_ranks: dict[frozenset[int], list[tuple[int, int]]] = {}
                            for start, stop, ranks in spans:
                                by_ranks.setdefault(ranks, []).append((start, stop))
                            link.send(max(_error(tensor, turn, dict.fromkeys(r, 1.0), s) for r, s in by_ranks.items()))
        except moshpit_client.MoshpitError as error:
            link.send(Refused(str(error)))


def _require_shared_memory(daemon: moshpit_client.Daemon, how: Training) -> None:
    (session,) = (each for each in daemon.status().sessions if each.name == how.name)
    (trainer,) = session.trainers
    if trainer.transport != "shared-memory":
        raise moshpit_client.MoshpitError(f"no shared memory: {trainer.transport_why}")


def _error(
    tensor: npt.NDArray[np.float32], turn: int, weights: Mapping[int, float], spans: Sequence[tuple[int, int]]
) -> float:
    """How far the tensor is from the mean over these ranks within spans, relative to the mean's largest element."""
    worst = largest = 0.0
    for first, exact in means(turn, weights, len(tensor)):
        largest = max(largest, float(np.abs(exact).max()))
        off = np.abs(tensor[first : first + len(exact)] - exact)
        for start, stop in spans:
            part = off[max(0, start - first) : max(0, stop - first)]
            worst = max(worst, float(part.max(initial=0.0)))
    return worst / largest

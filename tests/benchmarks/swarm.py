"""A swarm on this machine: daemons and trainers, each a process of its own, gone when the block ends.

Knows `moshpitd run`, the Python client and how to let all trainers call at the same moment. Does not know what is
measured. A trainer owns one float32 tensor; `values` says what is in it, so that every process can work out what an
average of any of them must be without moving vectors around.

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
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import moshpit_client
from moshpit_client import Receipt
from tests.benchmarks.figures import WrongResult

START_TIMEOUT_S = 60.0
STEP_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
LOG_LINES = 15
ERROR_MAX = 1e-6
"""Relative to the largest element of the exact mean."""


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


def values(rank: int, turn: int, elements: int) -> npt.NDArray[np.float32]:
    """What a trainer's tensor holds before the averaging: of both signs, different for every rank and turn."""
    return np.random.default_rng([rank, turn]).random(elements, np.float32) * np.float32(2.0) - np.float32(1.0)


def mean(turn: int, weights: Mapping[int, float], elements: int) -> npt.NDArray[np.float64]:
    """What an averaging over these ranks must give."""
    exact = np.zeros(elements, np.float64)
    for rank, share in weights.items():
        exact += values(rank, turn, elements) * np.float64(share)
    exact /= sum(weights.values())
    return exact


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running `moshpitd run`."""

    process: subprocess.Popen[bytes]
    socket: Path
    log: Path

    def failure(self, why: str) -> SwarmFailed:
        """An error that shows the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return SwarmFailed("\n".join([f"daemon {self.socket.parent.name} {why}; its log ends:", *lines]))


class Swarm:
    """Made by `running`."""

    def __init__(self, home: Path, flags: Sequence[str]) -> None:
        self.daemons: list[Daemon] = []
        self._home = home
        self._flags = flags

    def start(self, count: int) -> None:
        """Start daemons, the first before the others, and wait until each knows all of them."""
        self._start_one([])
        first = self._status(self.daemons[0]).listen
        for _ in range(1, count):
            self._start_one(["--join", first])
        for daemon in self.daemons:
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                status = self._status(daemon)
                if status.ready and status.peers >= count - 1:
                    break
                if time.monotonic() > deadline:
                    raise daemon.failure(f"knew {status.peers} of {count - 1} peers after {START_TIMEOUT_S:g} s")
                time.sleep(0.05)

    def _start_one(self, more: Sequence[str]) -> None:
        home = self._home / str(len(self.daemons))
        home.mkdir()
        socket, log = home / "s" / "sock", home / "log"
        command = [sys.executable, "-m", "moshpitd", "run", "--swarm", "benchmark", "--listen", "127.0.0.1:0"]
        command += ["--socket", str(socket), "--data-dir", str(home / "data"), "--http", "off", *self._flags, *more]
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
def running(count: int, *flags: str) -> Iterator[Swarm]:
    """A swarm of so many daemons, started with these flags. Their logs are kept, and named, when the block fails."""
    home = Path(tempfile.mkdtemp(prefix="moshpit-"))
    swarm = Swarm(home, flags)
    failed = False
    try:
        swarm.start(count)
        yield swarm
    except (SwarmFailed, WrongResult) as error:
        failed = True
        error.add_note(f"the daemons' logs: {home}/*/log")
        raise
    finally:
        swarm.stop()
        if not failed:
            shutil.rmtree(home)


class Trainers:
    """One trainer a daemon, with an open session. Made by `training`."""

    def __init__(self, swarm: Swarm, elements: int, rounds: int | None) -> None:
        self.elements = elements
        self.peer_ids: tuple[str, ...] = ()
        self._swarm = swarm
        self._turn = 0
        self._links: list[multiprocessing.connection.Connection[object, object]] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._release = context.Barrier(len(swarm.daemons) + 1)
        for rank, daemon in enumerate(swarm.daemons):
            ours, theirs = context.Pipe()
            arguments = (theirs, self._release, daemon.socket, rank, elements, len(swarm.daemons), rounds)
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
        self._release.wait(STEP_TIMEOUT_S)
        steps: list[Step] = []
        for rank in range(len(self._links)):
            step = self._answer(rank)
            assert isinstance(step, Step)
            if step.receipt.outcome != "complete":
                raise WrongResult(f"trainer {rank}: {step.receipt.outcome}, not complete: {step.receipt.why}")
            steps.append(step)
        return steps

    def step_as_it_comes(self, victim: int | None = None, meanwhile: Callable[[], None] = lambda: None) -> list[Step]:
        """The same with equal weights and any outcome, while something is done; without the victim's step."""
        self._turn += 1
        for link in self._links:
            link.send(Go(self._turn, 1.0))
        self._release.wait(STEP_TIMEOUT_S)
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
        if not error <= ERROR_MAX:
            raise WrongResult(f"the mean is off by {error:.2e} relative, {ERROR_MAX:g} is allowed")
        return error

    def check_groups(self, steps: Sequence[Step]) -> None:
        """The same for an averaging of one round: each group's mean, and the same bits within it."""
        crcs: dict[str, set[int]] = {}
        for rank, step in enumerate(steps):
            (only,) = step.receipt.rounds
            crcs.setdefault(only.group_id, set()).add(step.crc)
            error = self.error(rank, {self.peer_ids.index(each.peer): each.weight for each in only.members})
            if not error <= ERROR_MAX:
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
        if not self._links[rank].poll(START_TIMEOUT_S + STEP_TIMEOUT_S):
            raise self._swarm.daemons[rank].failure("left its trainer without an answer")
        try:
            answer = self._links[rank].recv()
        except EOFError:
            raise self._swarm.daemons[rank].failure("lost its trainer") from None
        if isinstance(answer, Refused):
            raise self._swarm.daemons[rank].failure(f"told its trainer: {answer.why}")
        return answer


@contextlib.contextmanager
def training(swarm: Swarm, *, elements: int, rounds: int | None = None) -> Iterator[Trainers]:
    """A trainer for each daemon with one float32 tensor; `rounds` of an averaging, None for the exact mean."""
    trainers = Trainers(swarm, elements, rounds)
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
    elements: int,
    peers: int,
    rounds: int | None,
) -> None:
    """A trainer's process, until its link is closed."""
    tensor = values(rank, 0, elements)
    with contextlib.suppress(EOFError, OSError, threading.BrokenBarrierError), moshpit_client.connect(socket) as daemon:
        try:
            # Every averaging waits for all: what is measured is never a smaller swarm.
            options = {"x": tensor}
            with daemon.open_session(options, min_peers=peers, rounds="auto" if rounds is None else rounds) as session:
                link.send(daemon.status().peer_id)
                while True:
                    match link.recv():
                        case Go(turn=turn, weight=weight):
                            tensor[:] = values(rank, turn, elements)
                            release.wait(STEP_TIMEOUT_S)
                            began = time.monotonic()
                            receipt = session.average(weight=weight, timeout=STEP_TIMEOUT_S)
                            ended = time.monotonic()
                            link.send(Step(began, ended, receipt, zlib.crc32(tensor.view(np.uint8).data)))
                        case Check(turn=turn, weights=weights):
                            exact = mean(turn, weights, elements)
                            link.send(float(np.abs(tensor - exact).max() / np.abs(exact).max()))
                        case CheckSpans(turn=turn, spans=spans):
                            found = 0.0
                            for ranks in {each for _, _, each in spans}:
                                exact = mean(turn, dict.fromkeys(ranks, 1.0), elements)
                                for start, stop, each in spans:
                                    if each == ranks:
                                        found = max(found, float(np.abs(tensor[start:stop] - exact[start:stop]).max()))
                            link.send(found / float(np.abs(exact).max()))
        except moshpit_client.MoshpitError as error:
            link.send(Refused(str(error)))

"""Daemons as processes, and trainers that call them from threads.

Knows how to start, await, stop and kill daemons and what they printed. Does not know what a test wants to see.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

import moshpit_client

DEADLINE_S = 60.0
"""For everything that must happen; what takes longer on two busy cores hangs."""
Array = npt.NDArray[np.generic]

living: weakref.WeakSet[Swarm] = weakref.WeakSet()
"""Whose logs a failing test shows."""


def environment(**more: str) -> dict[str, str]:
    """Ours, without what configures a daemon."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOSHPITD_")}
    return {**kept, "COLUMNS": "200", "PYTHONUNBUFFERED": "1", **more}


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that nobody announces."""
    deadline = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        pause.wait(0.05)


class Process:
    """A process whose lines (stdout and stderr) can be waited for."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def says(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Wait for a line that matches, from line `after` on."""

        def find() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines[after:])), None)

        with self._news:
            self._news.wait_for(lambda: find() or self._ended, DEADLINE_S)
            found = find()
        assert found, (pattern, self.log)
        return found

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self) -> int:
        """Wait for its end; the exit code."""
        self._reader.join(DEADLINE_S)
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        """SIGKILL; returns when it is dead. Idempotent."""
        self.process.kill()
        self.process.wait()
        self._reader.join(DEADLINE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


class Peer(Process):
    """A daemon."""

    def __init__(
        self, home: Path, *flags: str, swarm: str, join: Sequence[str], launcher: Sequence[str] = ("moshpitd",)
    ) -> None:
        self.home = home
        self.socket = home / "s" / "s"
        self.data = home / "d"
        places = ["--socket", str(self.socket), "--data-dir", str(self.data), "--http", "off"]
        joins = [word for address in join for word in ("--join", address)]
        super().__init__(
            *launcher, "run", "--swarm", swarm, "--listen", "127.0.0.1:0", "--preset", "loopback", *places, *joins,
            *flags,
        )  # fmt: skip

    @property
    def address(self) -> str:
        return self.says(r"listening on ([^,]+), ")[1]

    def is_ready(self) -> Self:
        self.says("^ready, ")
        return self

    @functools.cached_property
    def id(self) -> str:
        return str(self.json("id")["peer_id"])

    def connect(self) -> moshpit_client.Daemon:
        return moshpit_client.connect(self.socket)

    def cli(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """`moshpitd WORDS --socket ...`"""
        return finish(self.cli_start(*words))

    def cli_start(self, *words: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "moshpitd", *map(str, words), "--socket", str(self.socket)],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def json(self, *words: str) -> dict[str, object]:
        done = self.cli(*words, "--json")
        assert done.returncode == 0, done
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return answer


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, complaint = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, complaint)


class Swarm:
    """Daemons that belong together. Leaving it kills them all, its trainers before."""

    def __init__(self, *flags: str, name: str = "test", launcher: Sequence[str] = ("moshpitd",)) -> None:
        """`launcher`: the module that is run in the place of moshpitd, and its arguments."""
        self.peers: list[Peer] = []
        self._launcher = launcher
        self._flags = flags
        self._name = name
        self._stack = contextlib.ExitStack()
        # Not tmp_path: a socket's path has at most 107 bytes.
        self._home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mosh")))
        living.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for peer in self.peers:
            peer.kill()
        living.discard(self)
        self._stack.close()

    def start(
        self, count: int = 1, *flags: str, join: Peer | None = None, swarm: str | None = None, home: Path | None = None
    ) -> list[Peer]:
        """Daemons that joined through `join` (the first one if not said) and are ready."""
        started: list[Peer] = []
        for _ in range(count):
            through = join or next((peer for peer in self.peers if peer.process.poll() is None), None)
            peer = Peer(
                home or self._home / str(len(self.peers)),
                *self._flags,
                *flags,
                swarm=swarm or self._name,
                join=[through.address] if through else [],
                launcher=self._launcher,
            )
            self.peers.append(peer)
            started.append(peer)
        return [peer.is_ready() for peer in started]


class Trainer:
    """A trainer's session at a daemon and the tensors in it."""

    def __init__(self, peer: Peer, tensors: Mapping[str, Array], **options: object) -> None:
        self.peer = peer
        self.tensors = dict(tensors)
        self.began_with = {name: np.array(tensor) for name, tensor in tensors.items()}
        self._daemon = peer.connect()
        self.session = self._daemon.open_session(self.tensors, **options)  # type: ignore[arg-type]

    def average(
        self,
        weight: float = 1.0,
        *,
        timeout: float = DEADLINE_S,
        epoch: int | None = None,
        progress: Callable[[moshpit_client.Progress], None] | None = None,
    ) -> Future[moshpit_client.Receipt]:
        return self.session.average_async(weight, timeout, epoch, progress)

    def is_untouched(self) -> bool:
        return all(np.array_equal(self.tensors[name], before) for name, before in self.began_with.items())

    def close(self) -> None:
        try:
            self.session.close()
        finally:
            self._daemon.close()


@contextlib.contextmanager
def trainers(
    peers: Sequence[Peer], tensors: Callable[[int], Mapping[str, Array]], **options: object
) -> Iterator[list[Trainer]]:
    """One trainer at each daemon; trainer i with tensors(i)."""
    with contextlib.ExitStack() as stack:
        there: list[Trainer] = []
        for index, peer in enumerate(peers):
            there.append(Trainer(peer, tensors(index), **options))
            stack.callback(there[-1].close)
        yield there
        # All at once: who closes last would otherwise see everybody else leave before.
        with ThreadPoolExecutor(len(there)) as pool:
            list(pool.map(Trainer.close, there))


def average_all(
    there: Sequence[Trainer], weights: Sequence[float] | None = None, **wish: object
) -> list[moshpit_client.Receipt]:
    """All of them at once; their receipts."""
    futures = [
        trainer.average(1.0 if weights is None else weights[index], **wish)  # type: ignore[arg-type]
        for index, trainer in enumerate(there)
    ]
    return [future.result(2 * DEADLINE_S) for future in futures]


def random_tensors(index: int, elements: int = 50_000, dtype: npt.DTypeLike = np.float32) -> dict[str, Array]:
    """Reproducible values of a trainer, of different sizes and signs."""
    rng = np.random.default_rng(index)
    return {"w": (rng.standard_normal(elements) * (1 + index)).astype(dtype)}


def mean(values: Sequence[Array], weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """The weighted mean, in float64."""
    total = sum(weight * value.astype(np.float64) for weight, value in zip(weights, values, strict=True))
    return np.asarray(total / sum(weights), np.float64)


def error(value: Array, expected: npt.NDArray[np.float64]) -> float:
    """The largest deviation, relative to the largest expected value."""
    return float(np.max(np.abs(value.astype(np.float64) - expected)) / np.max(np.abs(expected)))

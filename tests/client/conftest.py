"""A daemon in a process of its own: the real local door, a scripted driver."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0


class DaemonProcess:
    """`python -m tests.local.serve`; every line it prints is something that happened."""

    def __init__(self, path: Path, keepalive_s: float = 10.0, shared_memory_dir: str = "auto") -> None:
        self.path = path
        command = [sys.executable, "-m", "tests.local.serve", str(path), str(keepalive_s), shared_memory_dir]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.happened("serving")

    def happened(self, line: str, times: int = 1) -> None:
        """Wait until it did, so often."""
        with self._news:
            assert self._news.wait_for(lambda: self._lines.count(line) >= times, DEADLINE_S), (line, self._lines)

    def times(self, line: str) -> int:
        """How often it happened so far."""
        with self._news:
            return self._lines.count(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self._lines.append(line.strip())
                self._news.notify_all()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all tests of a module that leave it alive."""
    process = DaemonProcess(tmp_path_factory.mktemp("daemon") / "run" / "moshpitd.sock")
    yield process
    process.kill()


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon for one test."""
    process = DaemonProcess(tmp_path / "run" / "moshpitd.sock")
    yield process
    process.kill()

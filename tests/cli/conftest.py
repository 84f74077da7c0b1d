"""The command as a process of its own, as a shell runs it, and a fake daemon behind a real socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.fake_daemon import FakeDaemon

Moshpitd = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Short, because a Unix socket's path has 107 bytes and pytest's own directories may take them all."""
    with tempfile.TemporaryDirectory(prefix="mosh") as name:
        (Path(name) / "moshpitd").mkdir(mode=0o700)
        yield Path(name)


@pytest.fixture
def environment(runtime_dir: Path) -> dict[str, str]:
    """What a fresh login has: none of our variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOSHPITD_")}
    return {**kept, "XDG_RUNTIME_DIR": str(runtime_dir), "COLUMNS": "200"}


@pytest.fixture
def command() -> list[str]:
    return [sys.executable, "-m", "moshpitd"]


@pytest.fixture
def moshpitd(command: list[str], environment: dict[str, str]) -> Moshpitd:
    def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, arguments)],
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def fake_daemon(runtime_dir: Path) -> Iterator[FakeDaemon]:
    """Listens where the command looks when it is told nothing."""
    with FakeDaemon(runtime_dir / "moshpitd" / "moshpitd.sock") as daemon:
        yield daemon


@pytest.fixture
def as_json(moshpitd: Moshpitd) -> Callable[..., object]:
    """Run a verb that must succeed and read its JSON."""

    def run(*arguments: str | Path) -> object:
        done = moshpitd(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run

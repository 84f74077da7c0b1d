"""A swarm on this machine for the verbs that measure: daemons as processes, gone when the block ends.

Knows `moshpitd run` and what it prints. Does not know what is measured.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from moshpitd.cli.failure import ExitCode, Failure
from moshpitd.cli.namespaces import HERE, Place

BUSY = 2.0
"""Processes a core: beyond it sleeps end late, and nothing that sleeps can be measured."""
START_TIMEOUT_S = 60.0


def load_per_core() -> float:
    """In the mean of the last minute."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


@contextlib.contextmanager
def local_swarm(peers: int, *flags: str, places: Sequence[Place] = ()) -> Iterator[list[Path]]:
    """Daemons for as long as the block lasts, one a place; yields their sockets once all are ready. Raises Failure."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moshpitd-bench-")))
        sockets: list[Path] = []
        processes: list[subprocess.Popen[bytes]] = []
        first = ""
        for number, place in enumerate(places or [HERE] * peers):
            home = directory / str(number)
            home.mkdir()
            log = stack.enter_context((home / "log").open("w", encoding="utf-8"))
            socket = home / "s" / "s"
            command = [*place.prefix, sys.executable, "-m", "moshpitd", "run", "--swarm", "bench"]
            command += ["--listen", f"{place.address}:0"]
            command += ["--preset", "loopback", "--http", "off", "--socket", str(socket), "--data-dir", str(home / "d")]
            command += [*flags, *(("--join", first) if first else ())]
            clean = {name: value for name, value in os.environ.items() if not name.startswith("MOSHPITD_")}
            process = subprocess.Popen(command, env=clean, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            stack.callback(_stop, process)
            sockets.append(socket)
            if not first:
                first = _said(home / "log", r"listening on ([^,]+), ", process)
            processes.append(process)
        for number, process in enumerate(processes):
            _said(directory / str(number) / "log", r"^(ready), ", process)
        yield sockets


def _said(log: Path, pattern: str, process: subprocess.Popen[bytes]) -> str:
    """Wait for a line of a daemon's log. Raises Failure."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (found := re.search(pattern, log.read_text(encoding="utf-8"), re.MULTILINE)):
        if time.monotonic() > deadline or process.poll() is not None:
            last = log.read_text(encoding="utf-8").splitlines()[-5:]
            raise Failure(ExitCode.FAILED, "a daemon of the bench does not come up: " + " / ".join(last))
        time.sleep(0.05)
    return found[1]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

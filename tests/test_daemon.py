"""`moshpitd run` as a process: what it says, when it is ready, how it leaves, and what stops it from starting."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DEADLINE_S = 30


class Running:
    """A daemon in a process of its own; lines of its stdout can be waited for."""

    def __init__(self, home: Path, *flags: str) -> None:
        self.home = home
        self.socket = home / "s" / "moshpitd.sock"
        arguments = ["--swarm", "test", "--listen", "127.0.0.1:0", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moshpitd", "run", *arguments],
            env=environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def says(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches."""

        def find() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self._lines)), None)

        with self._news:
            assert self._news.wait_for(lambda: find() or self.process.poll() is not None, DEADLINE_S), self._lines
            found = find()
        assert found, (self._lines, self.process.stderr and self.process.stderr.read())
        return found

    @property
    def address(self) -> str:
        return self.says(r"listening on (\S+), swarm test, socket \S+, id [0-9a-f]{8}$")[1]

    def ends(self) -> tuple[int, str]:
        """Wait for its end; exit code and stderr."""
        assert self.process.stderr is not None
        complaint = self.process.stderr.read()
        return self.process.wait(DEADLINE_S), complaint

    def status(self) -> tuple[int, dict[str, object]]:
        done = subprocess.run(
            [sys.executable, "-m", "moshpitd", "status", "--json"],
            env=environment(self.home),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        return done.returncode, json.loads(done.stdout or "{}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self._lines.append(line.rstrip())
                self._news.notify_all()
        self.process.wait()
        with self._news:
            self._news.notify_all()


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOSHPITD_")}
    return {**kept, "MOSHPITD_SOCKET": str(home / "s" / "moshpitd.sock"), "MOSHPITD_DATA_DIR": str(home / "data")}


@pytest.fixture
def homes() -> Iterator[Callable[[], Path]]:
    """Directories with short names, for the sockets in them."""
    with tempfile.TemporaryDirectory(prefix="mosh") as root:
        names = iter("abcdef")
        yield lambda: Path(root) / next(names)


@pytest.fixture
def run(homes: Callable[[], Path]) -> Iterator[Callable[..., Running]]:
    daemons: list[Running] = []

    def start(*flags: str, home: Path | None = None) -> Running:
        daemons.append(Running(home or homes(), *flags))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.stop()


def test_it_says_where_it_listens_and_when_it_is_ready(run: Callable[..., Running]) -> None:
    daemon = run()
    assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", daemon.address)
    daemon.says("^ready, 0 other peers$")
    code, status = daemon.status()
    assert (code, status["ready"], status["listen"]) == (0, True, daemon.address)
    assert status["announce"] == daemon.address


def test_sigterm_drains_and_exits_0_and_gives_the_socket_back(run: Callable[..., Running]) -> None:
    daemon = run()
    daemon.says("^ready")
    daemon.process.send_signal(signal.SIGTERM)
    code, log = daemon.ends()
    assert code == 0, log
    assert not daemon.socket.exists()


def test_who_joins_nobody_keeps_trying_says_so_and_is_not_ready(run: Callable[..., Running]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        daemon = run("--join", f"127.0.0.1:{nobody.getsockname()[1]}")
        daemon.says(r"^not ready: waiting for 127\.0\.0\.1:\d+ ")
        code, status = daemon.status()
    assert code == 4 and status["ready"] is False and "127.0.0.1" in str(status["waiting_for"])
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.ends()[0] == 0


def test_two_daemons_see_each_other(run: Callable[..., Running]) -> None:
    first = run()
    second = run("--join", first.address)
    second.says("^ready, 1 other peer$")
    assert second.status()[1]["peers"] == 1


def test_it_keeps_its_identity_over_a_restart(run: Callable[..., Running], homes: Callable[[], Path]) -> None:
    home = homes()
    ids: list[str] = []
    for _ in range(2):
        daemon = run(home=home)
        ids.append(daemon.says("id ([0-9a-f]{8})$")[1])
        daemon.process.kill()
        daemon.process.wait()
    assert ids[0] == ids[1]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
def test_a_port_in_use_is_named_with_the_way_out(run: Callable[..., Running], kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", 0))
        if kind is socket.SOCK_STREAM:
            holder.listen()
        port = holder.getsockname()[1]
        code, complaint = run("--listen", f"127.0.0.1:{port}").ends()
    assert code == 1
    assert str(port) in complaint and "in use" in complaint and "--listen" in complaint
    assert "Traceback" not in complaint


def test_two_daemons_cannot_share_a_port(run: Callable[..., Running]) -> None:
    code, complaint = run("--listen", run().address).ends()
    assert code == 1 and "in use" in complaint


def test_a_socket_another_daemon_holds_is_named(run: Callable[..., Running]) -> None:
    first = run()
    first.says("listening")
    code, complaint = run("--socket", str(first.socket)).ends()
    assert code == 1
    assert str(first.socket) in complaint and str(first.process.pid) in complaint and "--socket" in complaint


def test_a_data_directory_another_daemon_uses_is_named(run: Callable[..., Running]) -> None:
    first = run()
    first.says("listening")
    code, complaint = run("--data-dir", str(first.home / "data")).ends()
    assert code == 1
    assert str(first.process.pid) in complaint and "--data-dir" in complaint


def test_a_cloned_data_directory_stops_the_daemon_and_names_the_other_address(
    run: Callable[..., Running], homes: Callable[[], Path]
) -> None:
    first = run()
    first.says("^ready")
    clone = homes()
    shutil.copytree(first.home / "data", clone / "data")
    second = run("--join", first.address, home=clone)
    code, complaint = second.ends()
    assert code == 1
    assert f"lives at {first.address}" in complaint and str(clone / "data") in complaint


def test_a_damaged_key_is_named(run: Callable[..., Running], homes: Callable[[], Path]) -> None:
    home = homes()
    (home / "data").mkdir(parents=True)
    key = home / "data" / "identity.pem"
    key.write_text("no key")
    key.chmod(0o600)
    code, complaint = run(home=home).ends()
    assert code == 1 and str(key) in complaint and "Traceback" not in complaint


def test_an_address_of_another_machine_cannot_be_listened_on(run: Callable[..., Running]) -> None:
    code, complaint = run("--listen", "192.0.2.1:0").ends()
    assert code == 1 and "--listen 192.0.2.1:0" in complaint and "Traceback" not in complaint


def test_health_is_served_over_http_when_asked_for(run: Callable[..., Running]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    daemon = run("--http", where)
    daemon.says("^ready")
    with urllib.request.urlopen(f"http://{where}/healthz", timeout=DEADLINE_S) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(f"http://{where}/metrics", timeout=DEADLINE_S) as answer:
        assert "moshpitd_ready 1" in answer.read().decode()


def test_either_event_loop_can_be_chosen(run: Callable[..., Running]) -> None:
    for loop in ("asyncio", "uvloop"):
        run("--event-loop", loop).says("^ready")

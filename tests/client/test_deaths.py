"""Either side dies, or forks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest

import moshpit_client
from tests.client.conftest import DEADLINE_S, ROOT, DaemonProcess


def test_the_daemon_dies_with_the_result_half_sent(mortal: DaemonProcess) -> None:
    values = np.arange(4_000_000, dtype=np.float32)
    w = values.copy()
    with moshpit_client.connect(mortal.path) as daemon, daemon.open_session({"w": w}, name="dies") as session:
        with pytest.raises(
            moshpit_client.DaemonUnreachable, match=f"{mortal.path} went away.*log.*open the session anew"
        ):
            session.average()
        np.testing.assert_array_equal(w, values)
        with pytest.raises(moshpit_client.DaemonUnreachable):
            session.average()
    np.testing.assert_array_equal(w, values)
    assert mortal.process.wait(DEADLINE_S) == -signal.SIGKILL


def test_the_daemon_dies_while_peers_are_waited_for(mortal: DaemonProcess) -> None:
    w = np.ones(3, np.float32)
    with moshpit_client.connect(mortal.path) as daemon, daemon.open_session({"w": w}, name="waits") as session:
        future = session.average_async()
        mortal.happened("waiting")
        mortal.kill()
        assert isinstance(future.exception(DEADLINE_S), moshpit_client.DaemonUnreachable)
    assert w.tolist() == [1, 1, 1]


def test_a_restarted_daemon_is_found_but_the_session_is_gone(mortal: DaemonProcess) -> None:
    w = np.ones(3, np.float32)
    with moshpit_client.connect(mortal.path) as daemon, daemon.open_session({"w": w}) as session:
        mortal.kill()
        again = DaemonProcess(mortal.path)
        try:
            with moshpit_client.connect(mortal.path) as reconnected:
                with reconnected.open_session({"w": w}) as other:
                    assert other.average().outcome == "complete"
                with pytest.raises((moshpit_client.NotFound, moshpit_client.DaemonUnreachable)):
                    session.average()
        finally:
            again.kill()
    assert w.tolist() == [2, 2, 2]


def test_a_leaving_daemon_says_so(mortal: DaemonProcess) -> None:
    with moshpit_client.connect(mortal.path) as daemon, daemon.open_session({"w": np.ones(3, np.float32)}):
        mortal.process.terminate()
        mortal.happened("closed default")
        mortal.happened("left")
        assert mortal.process.wait(DEADLINE_S) == 0
        with pytest.raises(moshpit_client.DaemonUnreachable):
            daemon.status()


def test_a_killed_trainer_closes_its_session(shared: DaemonProcess) -> None:
    with trainer(shared.path, "killed", "idle") as process:
        process.kill()
        shared.happened("closed killed")


def test_a_trainer_killed_while_averaging_ends_its_averaging_and_its_session(shared: DaemonProcess) -> None:
    """Its two calls break together: the averaging ends by being cancelled or by its session's close, whichever is
    first."""
    over, closed = shared.times("averaging over"), shared.times("closed waits")
    with trainer(shared.path, "waits", "averaging") as process:
        process.kill()
        shared.happened("averaging over", over + 1)
        shared.happened("closed waits", closed + 1)


def test_a_killed_trainer_whose_workers_live_on_closes_its_session(tmp_path: Path) -> None:
    """The workers hold the socket open, so only their silence tells."""
    daemon = DaemonProcess(tmp_path / "run" / "moshpitd.sock", keepalive_s=1.0)
    with trainer(daemon.path, "orphaned", "with-workers") as process:
        workers = psutil.Process(process.pid).children()
        process.kill()
        daemon.happened("closed orphaned")
        assert len(workers) == 1 and workers[0].is_running()
        workers[0].kill()
    daemon.kill()


def test_a_trainer_that_just_ends_closes_its_session_and_does_not_hang(shared: DaemonProcess) -> None:
    with trainer(shared.path, "ended", "leaving") as process:
        assert process.wait(DEADLINE_S) == 0
        shared.happened("closed ended")


@contextmanager
def trainer(path: Path, name: str, how: str) -> Iterator[subprocess.Popen[str]]:
    """A trainer process with its session open."""
    command = [sys.executable, "-m", "tests.client.trainer", str(path), name, how]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() in ("open", "waiting")
    yield process
    process.kill()
    process.wait()


def test_forked_workers_cannot_use_the_connection_and_do_not_harm_it(shared: DaemonProcess) -> None:
    w = np.ones(3, np.float32)
    closed = shared.times("closed forked")
    with moshpit_client.connect(shared.path) as daemon, daemon.open_session({"w": w}, name="forked") as session:
        for _ in range(3):
            assert worker_says(daemon, session) == ["WrongProcess", "WrongProcess", "closed"]
            assert session.average().outcome == "complete"
            w[:] = 1
        assert shared.times("closed forked") == closed, "a worker's end is not the session's"
    shared.happened("closed forked", closed + 1)


def worker_says(daemon: moshpit_client.Daemon, session: moshpit_client.Session) -> list[str]:
    """What a DataLoader's worker would see: forked, it inherits everything, tries it, lets go of it and ends."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sending, [daemon, session]))
    process.start()
    assert receiving.poll(DEADLINE_S)
    said: list[str] = receiving.recv()
    process.join(DEADLINE_S)
    assert process.exitcode == 0
    return said


def work(sending: Connection, inherited: list[moshpit_client.Daemon | moshpit_client.Session]) -> None:
    said: list[str] = []
    daemon, session = inherited
    assert isinstance(daemon, moshpit_client.Daemon) and isinstance(session, moshpit_client.Session)
    for use in (daemon.status, session.average):
        try:
            use()
        except moshpit_client.WrongProcess as error:
            assert str(os.getpid()) in str(error)
            said.append("WrongProcess")
    session.close()
    daemon.close()
    said.append("closed")
    inherited.clear()
    sending.send(said)


def test_signal_handlers_of_the_trainer_are_left_alone(shared: DaemonProcess) -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with moshpit_client.connect(shared.path) as daemon, daemon.open_session({"w": np.ones(3, np.float32)}) as session:
        session.average()
        assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before

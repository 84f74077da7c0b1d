"""Who may serve on a socket's path."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moshpitd.local.claim import ClaimError, SocketClaim, SocketTaken, UnsafeDirectory


def test_the_directory_is_made_and_nobody_else_can_enter_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "moshpitd" / "moshpitd.sock"
    claim = SocketClaim.take(path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    claim.release()


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(UnsafeDirectory, match=r"0755.*chmod 700"):
        SocketClaim.take(tmp_path / "x.sock")


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UnsafeDirectory, match="belongs to user"):
        SocketClaim.take(tmp_path / "x.sock")


def test_a_file_in_the_directorys_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnsafeDirectory, match="not a directory"):
        SocketClaim.take(tmp_path / "file" / "x.sock")


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClaimError, match="longer than 107 bytes"):
        SocketClaim.take(tmp_path / ("x" * 107))


def test_a_second_daemon_is_told_the_first_ones_process_id(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    first = SocketClaim.take(tmp_path / "x.sock")
    with pytest.raises(SocketTaken, match=f"process id {os.getpid()}.*--socket") as caught:
        SocketClaim.take(tmp_path / "x.sock")
    assert caught.value.pid == os.getpid()
    first.release()
    SocketClaim.take(tmp_path / "x.sock").release()


def test_the_socket_of_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "x.sock"
    take_and_die = (
        "import os, socket, sys; from pathlib import Path; from moshpitd.local.claim import SocketClaim;"
        "SocketClaim.take(Path(sys.argv[1])); socket.socket(socket.AF_UNIX).bind(sys.argv[1]); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", take_and_die, path], timeout=60).returncode == 9
    assert path.is_socket()
    claim = SocketClaim.take(path)
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
    claim.release()
    assert not path.exists()

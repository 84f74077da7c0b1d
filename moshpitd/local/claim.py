"""Claims the path of the daemon's socket: a directory nobody else can enter, and a lock beside the socket.

Knows files and modes. Does not know what is served there. The lock, not the socket, says who is the daemon of a path:
gRPC takes over a live socket without a word, and the socket of a killed daemon stays behind. A lock dies with its
process, so a socket without a held lock is stale and may be removed.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

PATH_BYTES_MAX = 107
"""sizeof(sun_path) less the terminating zero, on Linux."""


class ClaimError(Exception):
    """The socket's path cannot be ours; the message names why and the way out."""


class UnsafeDirectory(ClaimError):
    """Others may enter the socket's directory, or it is not a directory of ours."""


class SocketTaken(ClaimError):
    """Another daemon serves this path."""

    def __init__(self, path: Path, pid: int | None) -> None:
        holder = "another daemon" if pid is None else f"the daemon with process id {pid}"
        super().__init__(f"socket {path} is held by {holder}: stop it, or give this one another path with --socket")
        self.pid = pid


class SocketClaim:
    """The right to serve on a path, from `take` to `release`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @staticmethod
    def take(path: Path) -> SocketClaim:
        """Make the directory if needed, lock, remove a dead daemon's socket. Raises ClaimError."""
        if len(os.fsencode(path)) > PATH_BYTES_MAX:
            raise ClaimError(f"socket path {path} is longer than {PATH_BYTES_MAX} bytes: give a shorter one (--socket)")
        try:
            private_directory(path.parent, "--socket")
            lock = _lock(path)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ClaimError(f"socket {path}: {error.strerror}: give a path you may write to (--socket)") from error
        return SocketClaim(path, lock)

    def release(self) -> None:
        """Remove the socket and let the next daemon have the path. The lock file stays: removing it would race."""
        self.path.unlink(missing_ok=True)
        os.close(self._lock)


def private_directory(directory: Path, option: str) -> None:
    """Make the directory, or see that nobody else can enter it. Raises UnsafeDirectory, naming the option that gives
    another one, and OSError."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        found = directory.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise UnsafeDirectory(f"{directory} is not a directory: give another path ({option})") from None
        if found.st_uid != os.geteuid():
            raise UnsafeDirectory(
                f"directory {directory} belongs to user {found.st_uid}, not to you ({os.geteuid()}): "
                f"give a path in a directory of your own ({option})"
            ) from None
        if found.st_mode & 0o077:
            raise UnsafeDirectory(
                f"directory {directory} is open to others (mode {stat.S_IMODE(found.st_mode):04o}): "
                f"run `chmod 700 {directory}`, or give another path ({option})"
            ) from None


def _lock(path: Path) -> int:
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 32).strip()
        os.close(lock)
        raise SocketTaken(path, int(holder) if holder.isdigit() else None) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock

"""Shared memory with a trainer: a file that both map, for one session's contributions and results.

Knows files, locks and where each vector lies in one. Does not know calls, nor what is averaged. The layout is that of
`SharedMemory` in protos/moshpitd/local/v1; of what is in the mapping the daemon reads nothing but values.

    Offer: a file with a name -- accept: the trainer proved that it mapped the same file --> SharedBuffers, no name
             +-- withdraw: it cannot, or is gone --> removed

A file is passed by its name, because gRPC passes no descriptors, and loses it once both have mapped it: whichever side
is killed, the kernel frees the memory with the last of them. Only memfds can be sealed by the kernel, and these have no
names across containers; without its name nobody else can reach the file, and the trainer, who could still shrink it,
runs as our user and could as well kill us. A daemon killed while it offers leaves its file behind without the lock that
every offer holds: the next one removes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.vector import Layout, Vector
from moshpitd.local.claim import ClaimError, private_directory

DIRECTORY_DEFAULT = Path("/dev/shm")
AUTO, OFF = "auto", "off"
OPTION = "--shared-memory-dir"
PAGE_BYTES = 4096
PROOF_BYTES = 16
WORD_AT = PROOF_BYTES
TURN_AT = WORD_AT + 8
ALLOCATED_AT_ONCE = 4 << 20
"""The kernel clears what it allocates: this much stalls the event loop for a few milliseconds."""


class NoSharedMemory(Exception):
    """There is none; the message names why and, where there is one, the way out. The session streams."""


class SharedMemoryDirectory:
    """Where the files are made: a directory of this user's below the configured one."""

    def __init__(self, setting: str) -> None:
        """`setting`: a directory, AUTO for the system's, OFF for none."""
        self._parent = DIRECTORY_DEFAULT if setting == AUTO else None if setting == OFF else Path(setting)

    def sweep(self) -> None:
        """Remove what killed daemons left. What cannot be had is told to who makes an offer."""
        with contextlib.suppress(NoSharedMemory, OSError):
            _sweep(self._own())

    async def offer(self, layout: Layout, *, results: int, contributions: int = 1) -> Offer:
        """Make a file for vectors of this layout, wholly allocated: a page that is missing later kills who touches it.
        Raises NoSharedMemory."""
        directory = self._own()
        size = _place(layout, contributions + results)
        try:
            _sweep(directory)
            room = os.statvfs(directory)
            free = room.f_bavail * room.f_frsize
            if room.f_blocks and free < size:  # to find out by allocating would fill it to the brim
                raise OSError(errno.ENOSPC, f"only {free} bytes are free")
            path, file = _create(directory)
        except OSError as error:
            raise _no_room(size, directory, error) from error
        offer = Offer(path, file, layout, contributions, results, size)
        try:
            for start in range(0, size, ALLOCATED_AT_ONCE):
                os.posix_fallocate(file, start, min(ALLOCATED_AT_ONCE, size - start))
                await asyncio.sleep(0)
            os.pwrite(file, offer.proof, 0)
        except OSError as error:
            offer.withdraw()
            raise _no_room(size, directory, error) from error
        except asyncio.CancelledError:
            offer.withdraw()
            raise
        return offer

    def _own(self) -> Path:
        if self._parent is None:
            raise NoSharedMemory(f"switched off ({OPTION} {OFF})")
        if not self._parent.is_dir() or not hasattr(os, "posix_fallocate"):
            raise NoSharedMemory(f"there is no directory {self._parent} to share memory in: give one ({OPTION})")
        directory = self._parent / f"moshpitd-{os.geteuid()}"
        try:
            private_directory(directory, OPTION)
        except ClaimError as error:
            raise NoSharedMemory(str(error)) from error
        except OSError as error:
            raise NoSharedMemory(f"{directory}: {error.strerror}: give another directory ({OPTION})") from error
        return directory


class Offer:
    """A file that waits for its trainer, until `accept` or `withdraw`."""

    def __init__(
        self, path: Path, file: int, layout: Layout, contributions: int, results: int, file_bytes: int
    ) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self.proof = secrets.token_bytes(PROOF_BYTES)
        self._file: int | None = file
        self._layout = layout
        self._contributions = contributions
        self._results = results

    @property
    def contribution_offsets(self) -> Sequence[int]:
        return [_place(self._layout, number) for number in range(self._contributions)]

    @property
    def result_offsets(self) -> Sequence[int]:
        return [_place(self._layout, self._contributions + number) for number in range(self._results)]

    def accept(self, proof: bytes) -> SharedBuffers:
        """Map the file and take its name away. Raises NoSharedMemory."""
        assert self._file is not None
        try:
            if proof != self.proof:
                raise NoSharedMemory(
                    f"the trainer sees another file at {self.path}: let it and the daemon share that directory"
                )
            if (size := os.fstat(self._file).st_size) != self.file_bytes:
                raise NoSharedMemory(f"{self.path} has {size} bytes instead of {self.file_bytes}: something changed it")
            try:
                mapping = np.frombuffer(mmap.mmap(self._file, self.file_bytes), np.uint8)
            except OSError as error:
                raise NoSharedMemory(f"cannot map {self.path}: {error.strerror}") from error
        finally:
            self.withdraw()
        contributions, results = (
            tuple(Vector(self._layout, mapping[offset : offset + self._layout.byte_size]) for offset in offsets)
            for offsets in (self.contribution_offsets, self.result_offsets)
        )
        word, turn = (mapping[at : at + 8].view("<u8") for at in (WORD_AT, TURN_AT))
        return SharedBuffers(contributions, results, word, turn)

    def withdraw(self) -> None:
        """Remove the file; idempotent."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


@dataclass(eq=False, slots=True)
class SharedBuffers:
    """What a trainer and this daemon have mapped; unmapped when the last view of it is gone."""

    contributions: tuple[Vector, ...]
    """The trainer's by turns, where the daemon keeps the last one."""
    results: tuple[Vector, ...]
    """Two where an averaging has several rounds: they take turns."""
    word: npt.NDArray[np.uint64]
    """Names the valid result, for the trainer: 0 is none."""
    turn_word: npt.NDArray[np.uint64]
    """Names the contribution that the trainer writes next, from 0. What it says is `turn`: it is never read here."""
    turn: int = 0

    @property
    def contribution(self) -> Vector:
        """The trainer's: what it wrote when it calls, and writes next when it was answered."""
        return self.contributions[self.turn]

    def pass_turn(self, is_held: Callable[[Vector], bool]) -> None:
        """Let the trainer write next where nothing reads any more; with one buffer it finds out by its receipt."""
        free = (number for number, each in enumerate(self.contributions) if not is_held(each))
        self.turn = next(free, self.turn)
        self.turn_word[0] = self.turn

    def retract(self) -> None:
        """From now on no result is valid."""
        self.word[0] = 0

    def publish(self, vector: Vector) -> bool:
        """Make this the valid result; False when it lies elsewhere."""
        for number, result in enumerate(self.results, 1):
            if vector is result:
                self.word[0] = number
                return True
        return False


def _no_room(size: int, directory: Path, error: OSError) -> NoSharedMemory:
    return NoSharedMemory(
        f"{size} bytes are needed in {directory}: {error.strerror}: "
        f"make room there, or give another directory ({OPTION})"
    )


def _place(layout: Layout, number: int) -> int:
    """Where vector `number` begins, after a page of header: vectors begin at pages."""
    return PAGE_BYTES * (1 + number * -(-layout.byte_size // PAGE_BYTES))


def _create(directory: Path) -> tuple[Path, int]:
    """A new file, locked. Another daemon's sweep may come between the two: then it is not there any more."""
    while True:
        path = directory / f"{os.getpid()}-{secrets.token_hex(8)}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if _lock(file) and os.fstat(file).st_nlink:
            return path, file
        os.close(file)


def _sweep(directory: Path) -> None:
    """Remove the files that no living daemon holds locked."""
    for path in directory.iterdir():
        try:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if _lock(file):
            path.unlink(missing_ok=True)
        os.close(file)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

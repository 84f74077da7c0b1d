"""The daemon's shared memory in this process: where contributions are written and a result is read.

Knows the file that `SharedMemory` in daemon.proto describes. Does not know calls, nor when what may be written.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moshpit_client.v1 import daemon_pb2 as pb

PROOF_BYTES = 16
_POPULATE: int = getattr(mmap, "MAP_POPULATE", 0)
"""Linux: the first averaging is as fast as the others."""


class NotShared(Exception):
    """The file cannot be mapped here; the message says why."""


@dataclass(frozen=True, eq=False, slots=True)
class SharedBuffers:
    """A session's mapped file; unmapped when nothing in this process looks at it any more."""

    proof: bytes
    contributions: tuple[npt.NDArray[np.uint8], ...]
    results: tuple[npt.NDArray[np.uint8], ...]
    word: npt.NDArray[np.uint64]
    turn: npt.NDArray[np.uint64]

    @staticmethod
    def map(offer: pb.SharedMemory, vector_bytes: int) -> SharedBuffers:
        """Raises NotShared."""
        offsets = offer.contribution_offsets or [offer.contribution_offset]
        last = max((*offsets, *offer.result_offsets))
        if min(offsets) < PROOF_BYTES + 16 or last + vector_bytes > offer.file_bytes:
            raise NotShared(f"{offer.file_bytes} bytes are too few for what the daemon says is in them")
        try:
            file = os.open(offer.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                size = os.fstat(file).st_size
                # To touch pages behind the end would kill this process.
                if size != offer.file_bytes:
                    raise NotShared(f"{offer.path} has {size} bytes here, not {offer.file_bytes}")
                whole = np.frombuffer(mmap.mmap(file, size, mmap.MAP_SHARED | _POPULATE), np.uint8)
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            raise NotShared(f"{type(error).__name__}: {error}") from error
        contributions, results = (
            tuple(whole[offset : offset + vector_bytes] for offset in those)
            for those in (offsets, offer.result_offsets)
        )
        word, turn = (whole[at : at + 8].view("<u8") for at in (PROOF_BYTES, PROOF_BYTES + 8))
        return SharedBuffers(whole[:PROOF_BYTES].tobytes(), contributions, results, word, turn)

    @property
    def contribution(self) -> npt.NDArray[np.uint8]:
        """Where the next one is to be written: the daemon keeps the last one of a wait-avoiding session."""
        return self.contributions[int(self.turn[0]) % len(self.contributions)]

    def result(self) -> npt.NDArray[np.uint8] | None:
        """The packed vector that the daemon says is valid."""
        number = int(self.word[0])
        return self.results[number - 1] if 1 <= number <= len(self.results) else None

"""How this process keeps memory: warm while rounds run, given back while none do.

Rounds take and free the same large buffers again and again. By its defaults glibc hands each back to the kernel at once
and faults it in again page by page, a tenth of a round's processor time. Told to keep them it does not; so somebody has
to say when it may let go. Does nothing where the C library is another.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_GIB, _MIB = 1 << 30, 1 << 20


@cache
def _libc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def keep_memory() -> None:
    """Serve large buffers from one heap for all threads, and keep what is freed: with heaps of their own gRPC's threads
    kept half a gigabyte more. Once, at the start of the process."""
    gc.collect()
    gc.freeze()  # what is imported stays: no need to look through it again and again
    gc.set_threshold(20_000, 20, 20)
    libc = _libc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, _GIB)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _GIB - 1)
        libc.mallopt(_ARENA_MAX, 1)
        libc.mallopt(_TOP_PAD, 16 * _MIB)


def give_back() -> None:
    """Return all free memory to the kernel; takes some milliseconds."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)

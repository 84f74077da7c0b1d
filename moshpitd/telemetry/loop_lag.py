"""How late the event loop is while rounds run: what a stalled loop costs everybody it serves, as a histogram.

A timer that is due every few milliseconds tells how late it fires. It runs only while somebody named a round that
runs, so an idle daemon is not woken. Knows neither rounds nor what stalls the loop: names are begun and ended.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Hashable

from moshpitd.telemetry.counters import Histogram

INTERVAL_S = 0.005
BOUNDS_S = (
    0.001,
    0.002,
    0.003,
    0.004,
    0.006,
    0.008,
    0.01,
    0.0125,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.25,
    1.0,
)


class LoopLag:
    """One loop's; made anywhere, used on the loop."""

    def __init__(self) -> None:
        self._running: set[Hashable] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def begin(self, what: Hashable) -> None:
        """Measure, at least until this has ended."""
        self._running.add(what)
        if self._timer is None:
            self._arm()

    def end(self, what: Hashable) -> None:
        """Idempotent."""
        self._running.discard(what)
        if not self._running:
            self.close()

    def close(self) -> None:
        """Stop measuring, whatever has not ended."""
        self._running.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def read(self) -> Histogram:
        """All that was measured so far, in seconds."""
        return Histogram(BOUNDS_S, tuple(self._counts), self._sum_s)

    def _arm(self) -> None:
        # Not the loop's own clock: uvloop's stands still until the loop comes round, which is what is to be measured.
        self._due = time.monotonic() + INTERVAL_S
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._ring)

    def _ring(self) -> None:
        late_s = max(0.0, time.monotonic() - self._due)
        self._counts[bisect_left(BOUNDS_S, late_s)] += 1
        self._sum_s += late_s
        self._arm()

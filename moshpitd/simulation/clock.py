"""Virtual time: a heap of events, and a clock that only the heap moves."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

SPIN_MAX = 200_000
"""Events in one moment: more means that somebody's timer is always due."""


class Stuck(AssertionError):
    """Time stands still, or ran out, before what was waited for."""


class Clock:
    """Events in order of their moment; of one moment, in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        """How many happened."""
        self.after_event: Callable[[], None] | None = None
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._spun = 0

    def at(self, moment: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(moment, self.now), next(self._count), do))

    def run_until(self, done: Callable[[], bool], limit_s: float, standing: Callable[[], str] = str) -> None:
        """Raises Stuck when it is not done in that much virtual time; `standing` says how things stand then."""
        limit = self.now + limit_s
        while not done():
            if not self._heap or self._heap[0][0] > limit:
                raise Stuck(f"not done at {self.now:.3f}: {standing()}")
            self._next_event(standing)

    def run_for(self, seconds: float, standing: Callable[[], str] = str) -> None:
        limit = self.now + seconds
        while self._heap and self._heap[0][0] <= limit:
            self._next_event(standing)
        self.now = limit

    def _next_event(self, standing: Callable[[], str]) -> None:
        moment, _, do = heapq.heappop(self._heap)
        self._spun = self._spun + 1 if moment == self.now else 0
        if self._spun > SPIN_MAX:
            raise Stuck(f"the clock stands at {self.now}: {standing()}")
        self.now = moment
        self.events += 1
        do()
        if self.after_event:
            self.after_event()

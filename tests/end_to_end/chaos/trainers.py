"""Trainers that average again and again, and record what they gave and what they got.

Knows the client. Does not judge: each call goes to the oracle as it ended. A trainer whose daemon went away comes back
when that answers again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal

import numpy as np
import numpy.typing as npt

import moshpit_client
from tests.end_to_end.chaos.fleet import Fleet
from tests.end_to_end.chaos.oracle import Call

PAUSE_S = 0.2
"""What stands for training between two averagings: the cores are the trainers' too."""
COME_BACK_S = 0.1
END_S = 60.0


@dataclass(frozen=True, slots=True)
class Habits:
    """How all trainers of a run call."""

    elements: int = 300_001
    """Odd, so that spans and chunks end anywhere."""
    timeout_s: float = 10.0
    rounds: int | None = 1
    """None: as many as the plan has axes."""


@dataclass(slots=True)
class Desk:
    """Where all trainers leave their calls."""

    calls: SimpleQueue[Call] = field(default_factory=SimpleQueue)
    stopping: threading.Event = field(default_factory=threading.Event)


class Trainer:
    """One daemon's trainer, in a thread of its own."""

    def __init__(self, fleet: Fleet, index: int, *, seed: int, habits: Habits, desk: Desk) -> None:
        self.open_since: float | None = None
        """When the call began that is under way."""
        self.troubles = 0
        """Times its session could not be opened, or ended."""
        self._fleet = fleet
        self._index = index
        self._habits = habits
        self._desk = desk
        self._rng = np.random.default_rng([seed, index])
        self._thread = threading.Thread(target=self._run, name=f"trainer {index}", daemon=True)
        self._thread.start()

    def join(self) -> bool:
        """Wait for its end; whether it came."""
        self._thread.join(END_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._desk.stopping.is_set():
            try:
                with self._fleet.peers[self._index].connect() as daemon:
                    tensor = np.zeros(self._habits.elements, np.float32)
                    rounds: Literal["auto"] | int = self._habits.rounds or "auto"
                    # Every other trainer's values count at once when it comes back.
                    joining: Literal["receive", "contribute"] = "contribute" if self._index % 2 else "receive"
                    with daemon.open_session({"w": tensor}, rounds=rounds, joining=joining) as session:
                        while not self._desk.stopping.is_set() and self._average(session.average, tensor):
                            self._desk.stopping.wait(PAUSE_S * self._rng.random())
            except moshpit_client.MoshpitError:
                self.troubles += 1
                self._desk.stopping.wait(COME_BACK_S)

    def _average(self, average: Callable[..., moshpit_client.Receipt], tensor: npt.NDArray[np.float32]) -> bool:
        """One call; whether the session is still good."""
        gave = self._rng.standard_normal(len(tensor), np.float32)
        weight = float(self._rng.uniform(0.5, 2.0))
        tensor[:] = gave
        receipt: moshpit_client.Receipt | None = None
        error: moshpit_client.MoshpitError | None = None
        self.open_since = began = time.monotonic()
        try:
            receipt = average(weight=weight, timeout=self._habits.timeout_s)
        except moshpit_client.MoshpitError as raised:
            error = raised
        ended = time.monotonic()
        self._desk.calls.put(
            Call(
                peer=self._fleet.ids[self._index],
                began=began,
                ended=ended,
                timeout_s=self._habits.timeout_s,
                stood_still_s=self._fleet.stood_still_s(self._index, began, ended),
                weight=weight,
                gave=gave,
                holds=tensor.copy(),
                receipt=receipt,
                error=f"{type(error).__name__}: {error}" if error else "",
                rounds_of_all=self._habits.rounds is None,
            )
        )
        self.open_since = None
        return not isinstance(error, moshpit_client.DaemonUnreachable | moshpit_client.NotFound)

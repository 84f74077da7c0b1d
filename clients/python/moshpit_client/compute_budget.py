"""Compute budgets: a trainer begins no further micro-batch once its step took too long, so that nobody waits for it.

Knows a trainer's clock, the micro-batches of its step and tau. Does not know where tau comes from: the daemons find it
together, and each receipt tells it. Asking before a micro-batch reads a clock, no more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from moshpit_client.errors import InvalidInput
from moshpit_client.records import Record
from moshpit_client.v1 import daemon_pb2 as pb

_NORMALISATIONS = {
    pb.NORMALISE_UNSPECIFIED: "",
    pb.NORMALISE_FIXED: "fixed",
    pb.NORMALISE_COMPUTED: "computed",
}
_NUMBERS = {name: number for number, name in _NORMALISATIONS.items() if name}


@dataclass(frozen=True, slots=True)
class BudgetState(Record):
    """What the next step goes by, and how the last one went; in receipts and in the status of a session."""

    micro_batches: int
    """M: of a whole step."""
    normalise: str
    """fixed, computed, or empty while it is not said."""
    completed: int
    """Of the step that was averaged last."""
    tau_seconds: float
    """Once so much of the next step is over no micro-batch begins; 0: none."""
    state: str
    """Why tau is what it is."""
    epoch: int
    """The averaging from which the swarm's tau holds; 0 while there is none."""
    tables: int
    """The peers from whose latencies it was found."""
    expected_speedup: float
    expected_drop_rate: float
    speedup: float
    """As seen by this trainer; 0 while it cannot be told."""
    drop_rate: float
    """Of this trainer's own micro-batches, since there is a tau."""
    note: str
    """In whom the members of the last groups differed; empty when they did not."""


def read_budget(message: pb.ComputeBudget) -> BudgetState:
    return BudgetState(
        micro_batches=message.micro_batches,
        normalise=_NORMALISATIONS[message.normalise],
        completed=message.completed,
        tau_seconds=message.tau_seconds,
        state=message.state,
        epoch=message.epoch,
        tables=message.tables,
        expected_speedup=message.expected_speedup,
        expected_drop_rate=message.expected_drop_rate,
        speedup=message.speedup,
        drop_rate=message.drop_rate,
        note=message.note,
    )


def budget_request(
    session_id: str,
    micro_batches: int,
    normalise: str | None,
    tau: str | float,
    warm_up: int | None,
    learn: int | None,
    refresh_every: int,
) -> pb.SetComputeBudgetRequest:
    """Raises InvalidInput for what protobuf could not carry; the daemon checks the rest."""
    request = pb.SetComputeBudgetRequest(
        session_id=session_id,
        micro_batches=_whole("micro_batches", micro_batches, 1),
        normalise=normalise_number(normalise) if normalise is not None else pb.NORMALISE_UNSPECIFIED,
        warm_up=None if warm_up is None else _whole("warm_up", warm_up, 0),
        learn=None if learn is None else _whole("learn", learn, 2),
        refresh_every=_whole("refresh_every", refresh_every, 0),
    )
    match tau:
        case "auto":
            pass
        case "off":
            request.off = True
        case bool() | str():
            raise InvalidInput(f"tau={tau!r}: give 'auto', 'off', or seconds")
        case _:
            request.tau_seconds = float(tau)
    return request


def normalise_number(normalise: str) -> pb.Normalise.ValueType:
    if normalise not in _NUMBERS:
        raise InvalidInput(f"normalise={normalise!r}: give 'fixed' or 'computed'")
    return _NUMBERS[normalise]


def _whole(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 32:
        raise InvalidInput(f"{name}={value!r}: give a whole number of at least {least}")
    return value


class ComputeBudget:
    """Made by `Session.compute_budget`. One step at a time; each step is averaged before the next one is computed."""

    def __init__(
        self, state: BudgetState, request: pb.SetComputeBudgetRequest, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self._state = state
        self._request = request
        self._lock = threading.Lock()
        self._open: Step | None = None
        self._done: tuple[float, ...] | None = None
        """Latencies of the last finished step, until it is averaged."""
        self._offered = False
        """... and whether an averaging was begun with it: if that failed, the trainer may try again or go on."""

    def __repr__(self) -> str:
        return f"<moshpit_client.ComputeBudget of {self.micro_batches} micro-batches: {self._state.state}>"

    @property
    def micro_batches(self) -> int:
        """M: of a whole step."""
        return self._state.micro_batches

    @property
    def tau(self) -> float | None:
        """Seconds of a step after which no micro-batch begins; None: there is no such moment (yet)."""
        return self._state.tau_seconds or None

    @property
    def state(self) -> BudgetState:
        """As of the last receipt."""
        return self._state

    def step(self) -> Step:
        """The next step, as a context manager: ask its `proceed` before each micro-batch.

        Raises InvalidInput while another step is open, or when the last one was not averaged yet.
        """
        with self._lock:
            if self._open is not None:
                raise InvalidInput("a step of this compute budget is still open: one step at a time")
            if self._done is not None and not self._offered:
                raise InvalidInput("the last step was not averaged: call Session.average after each step")
            step = self._open = Step(self, self._state.micro_batches, self._state.tau_seconds or None, self._clock)
            return step

    # ---- for the session

    @property
    def request(self) -> pb.SetComputeBudgetRequest:
        return self._request

    def offer(self) -> tuple[float, ...]:
        """The latencies of the step to be averaged. Raises InvalidInput when there is none."""
        with self._lock:
            if self._open is not None:
                raise InvalidInput("a step is still open: leave its `with` block, then average")
            if self._done is None:
                raise InvalidInput(
                    "there is no step to be averaged: `with budget.step() as step`, and ask step.proceed()"
                )
            self._offered = True
            return self._done

    def averaged(self, seconds: tuple[float, ...], state: BudgetState) -> None:
        with self._lock:
            self._state = state
            if self._done is seconds:
                self._done = None

    def changed(self, state: BudgetState) -> None:
        self._state = state

    # ---- for its steps

    def finish(self, step: Step, seconds: tuple[float, ...] | None) -> None:
        """None: the step failed, or computed nothing, and does not count."""
        with self._lock:
            if self._open is step:
                self._open = None
            if seconds:
                self._done, self._offered = seconds, False


class Step:
    """A step, from `with` to the end of its block. A block left by an exception is not counted."""

    __slots__ = ("_budget", "_clock", "_entered", "_last", "_left", "_running", "_seconds", "_start", "_tau", "_whole")

    def __init__(self, budget: ComputeBudget, whole: int, tau: float | None, clock: Callable[[], float]) -> None:
        self._budget = budget
        self._whole = whole
        self._tau = tau
        self._clock = clock
        self._seconds: list[float] = []
        self._running = self._entered = self._left = False
        self._start = self._last = 0.0

    def __enter__(self) -> Step:
        self._entered = True
        self._start = self._last = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._seconds.append(self._clock() - self._last)
            self._running = False
        self._left = True
        self._budget.finish(self, tuple(self._seconds) if error is None else None)

    @property
    def completed(self) -> int:
        """Micro-batches that were begun, so far."""
        return len(self._seconds) + self._running

    def proceed(self) -> bool:
        """Ask before each micro-batch whether to compute it: False once tau is over or all M are done. The first one of
        a step is always computed. What was asked for with the answer True counts as completed."""
        now = self._clock()
        if self._left or not self._entered:
            raise InvalidInput("this step is not open: ask inside `with budget.step() as step`")
        if self._running:
            self._seconds.append(now - self._last)
            self._running = False
        if len(self._seconds) >= self._whole or (
            self._seconds and self._tau is not None and now - self._start > self._tau
        ):
            return False
        self._last, self._running = (now if self._seconds else self._start), True
        return True

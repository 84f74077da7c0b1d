"""A run: daemons, trainers, one injection after another, and the oracle that listens all the time.

Before each injection and after it the swarm must be whole: every daemon up, ready, knowing all others, and an averaging
that is complete at all trainers. Does not know how a fault is made nor what makes a receipt wrong.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty

from tests.end_to_end.chaos.fleet import Fleet
from tests.end_to_end.chaos.injector import Fault, injected, injections
from tests.end_to_end.chaos.oracle import Call, Oracle, Verdicts
from tests.end_to_end.chaos.proxies import Network
from tests.end_to_end.chaos.trainers import Desk, Habits, Trainer

RECOVERY_S = 60.0
"""Once faults stop, all must be whole again within this."""
POLL_S = 0.1
NEVER_EXPECTED = ("DaemonBug", "InvalidInput", "PreconditionFailed", "ResourceExhausted", "WrongProcess", "NotFound")
"""Errors that no fault of ours explains."""


@dataclass(frozen=True, slots=True)
class Course:
    """What is run."""

    name: str
    daemons: int
    flags: tuple[str, ...]
    habits: Habits


FLAT = Course("flat", 6, (), Habits(rounds=1))
"""One group, one round: every value is judged."""
GRID = Course("grid", 6, ("--grid", "2x3"), Habits(rounds=None))


@dataclass(slots=True)
class Row:
    """An injection and what came of it."""

    at_s: float
    faults: tuple[Fault, ...]
    outcomes: Counter[str] = field(default_factory=Counter)
    """Of the calls that ended from its begin until all was whole again."""
    whole_after_s: float = math.nan
    """From its end."""


class Trouble(Exception):
    """The oracle objects, or the swarm did not become whole. The message is for people."""


@dataclass(slots=True)
class Storm:
    """Made by `storm`."""

    fleet: Fleet
    trainers: list[Trainer]
    oracle: Oracle
    desk: Desk
    rows: list[Row] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    _complete: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    """By averaging: at whom it was complete, and when that call began."""

    @property
    def verdicts(self) -> Verdicts:
        return self.oracle.verdicts

    def inject(self, faults: tuple[Fault, ...], *, row: Row) -> None:
        """Do it, undo it, wait until all is whole. Raises Trouble."""
        self.rows.append(row)
        with contextlib.ExitStack() as stack:
            begun = time.monotonic()
            for fault in sorted(faults, key=lambda each: -each.seconds):
                stack.enter_context(injected(self.fleet, fault))
            while faults and (left := begun + max(f.seconds for f in faults) - time.monotonic()) > 0:
                self.listen(min(left, POLL_S))
        row.whole_after_s = self.become_whole()

    def become_whole(self) -> float:
        """Wait for it; the seconds it took. Raises Trouble."""
        since = time.monotonic()
        complaints: list[str] = ["not looked yet"]
        while complaints:
            self.listen(POLL_S)
            met = max((len([b for b in at.values() if b >= since]) for at in self._complete.values()), default=0)
            if met == len(self.trainers):
                complaints = self.fleet.complaints()
            else:
                complaints = [f"no averaging was complete at more than {met} of {len(self.trainers)} trainers"]
            if complaints and time.monotonic() > since + RECOVERY_S:
                raise Trouble(f"not whole {RECOVERY_S:g} s after the fault: {'; '.join(complaints)}")
        return time.monotonic() - since

    def listen(self, seconds: float) -> None:
        """Hear what trainers got, for so long, and judge. Raises Trouble."""
        until = time.monotonic() + seconds
        open_since = min((each for each in (t.open_since for t in self.trainers) if each is not None), default=until)
        horizon = min(open_since, time.monotonic())
        with contextlib.suppress(Empty):
            while (left := until - time.monotonic()) > 0:
                self._hear(self.desk.calls.get(timeout=left))
            while True:
                self._hear(self.desk.calls.get_nowait())
        self._judge(horizon)

    def end(self) -> None:
        """Stop all trainers and judge what is left. Raises Trouble."""
        self.desk.stopping.set()
        stuck = [index for index, trainer in enumerate(self.trainers) if not trainer.join()]
        self.listen(0.0)
        if stuck:
            raise Trouble(f"trainers {stuck} are stuck in their calls")
        self._judge(math.inf)

    def _hear(self, call: Call) -> None:
        kind = call.receipt.outcome if call.receipt else call.error.partition(":")[0]
        self.outcomes[kind] += 1
        if self.rows:
            self.rows[-1].outcomes[kind] += 1
        self.oracle.hear(call)
        if call.receipt and call.receipt.outcome == "complete":
            self._complete[call.receipt.epoch][call.peer] = call.began
            for old in [epoch for epoch in self._complete if epoch < call.receipt.epoch - 50]:
                del self._complete[old]
        if call.error.startswith(NEVER_EXPECTED):
            raise Trouble(f"{call.name}: no fault explains this error")

    def _judge(self, horizon: float) -> None:
        if objections := self.oracle.judge(horizon):
            raise Trouble("\n".join(map(str, objections[:20])))


@contextlib.contextmanager
def storm(course: Course, *, seed: int, logs: Path | None = None) -> Iterator[Storm]:
    """A whole swarm with its trainers at work; ended and judged when the block is left in peace.

    `logs`: where the daemons' logs go.
    """
    with Network(seed) as network, Fleet(network, *course.flags) as fleet:
        desk = Desk()
        try:
            fleet.launch(course.daemons)
            trainers = [Trainer(fleet, i, seed=seed, habits=course.habits, desk=desk) for i in range(course.daemons)]
            running = Storm(fleet, trainers, Oracle(fleet.ids), desk)
            running.become_whole()
            yield running
            running.end()
        except Trouble as trouble:
            trouble.add_note(f"the daemons' logs: {logs}")
            raise
        finally:
            desk.stopping.set()
            if logs is not None:
                fleet.save_logs(logs)


def weather_the_storm(
    course: Course, *, seed: int, seconds: float, tell: Callable[[Row], None], logs: Path | None = None
) -> Storm:
    """Inject for so long; what became of it. Raises Trouble, whose message says how to have it again."""
    begun = time.monotonic()
    with storm(course, seed=seed, logs=logs) as running:
        try:
            for faults in injections(seed, course.daemons):
                if time.monotonic() >= begun + seconds:
                    break
                row = Row(time.monotonic() - begun, faults)
                running.inject(faults, row=row)
                tell(row)
        except Trouble as trouble:
            if running.rows:
                done = " + ".join(map(str, running.rows[-1].faults))
                trouble.add_note(f"injection {len(running.rows)} of course {course.name}, seed {seed}: {done}")
            raise
    return running

"""What is done to the swarm: drawn from a seed alone, so that a run can be had again.

Knows which faults there are and how each begins and ends. Does not know what they ought to cause.

| fault      | what happens to the victim                                                                    |
|------------|-----------------------------------------------------------------------------------------------|
| kill       | SIGKILL, later started again on the same data directory                                       |
| pause      | SIGSTOP, later SIGCONT                                                                        |
| latency    | everything to it and from it is late, by an amount that varies                                |
| bandwidth  | its uplink carries little                                                                     |
| black hole | nothing gets to it or from it; connections stand                                              |
| one way    | nothing of what it says gets to some of the others, or nothing of what they say gets to it    |
| reset      | its connections are reset, again and again                                                    |
| cut        | connections break after so many of its bytes                                                  |
| slow close | SIGKILL, but the others hear of it only later                                                 |
| loss       | datagrams are lost, everybody's                                                               |
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from tests.end_to_end.chaos.fleet import Fleet, name_of
from tests.end_to_end.chaos.proxies import BLOCKED, Weather

MOMENT_S = 2.0
"""How long a fault that is to meet a running round waits for one."""
MOMENT_POLL_S = 0.002


class Kind(Enum):
    """See the table above."""

    KILL = "kill"
    PAUSE = "pause"
    LATENCY = "latency"
    BANDWIDTH = "bandwidth"
    BLACK_HOLE = "black hole"
    ONE_WAY = "one way"
    RESET = "reset"
    CUT = "cut"
    SLOW_CLOSE = "slow close"
    LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing done to one daemon."""

    kind: Kind
    victim: int
    others: tuple[int, ...]
    """Whom it does not reach, or who do not reach it (one way)."""
    seconds: float
    amount: float
    """From 0 to 1: how bad, by kind."""
    in_a_round: bool
    """Begins while the victim reduces."""
    reverse: bool
    """One way: it is the victim that hears nothing."""

    def __str__(self) -> str:
        whom = f"{self.kind.value} {self.victim}"
        if self.kind is Kind.ONE_WAY:
            arrow = "<-x-" if self.reverse else "-x->"
            whom += f" {arrow} {','.join(map(str, self.others))}"
        if self.kind in (Kind.LATENCY, Kind.BANDWIDTH, Kind.CUT, Kind.LOSS):
            whom += f" ({self.amount:.2f})"
        return f"{whom} {self.seconds:.1f} s{' in a round' if self.in_a_round else ''}"


def injections(seed: int, daemons: int, kinds: tuple[Kind, ...] = tuple(Kind)) -> Iterator[tuple[Fault, ...]]:
    """Without end: one fault, every third time two at once. All kinds come before one comes again."""
    rng = random.Random(seed)
    deck: list[Kind] = []

    def draw(kind: Kind, victim: int) -> Fault:
        rest = [index for index in range(daemons) if index != victim]
        return Fault(
            kind,
            victim,
            tuple(sorted(rng.sample(rest, rng.randint(1, len(rest))))),
            seconds=rng.uniform(0.3, 6.0),
            amount=rng.random(),
            in_a_round=rng.random() < 0.5,
            reverse=rng.random() < 0.5,
        )

    for number in range(1, 1 << 62):
        victims = rng.sample(range(daemons), 2)
        faults: list[Fault] = []
        for victim in victims[: 2 if number % 3 == 0 else 1]:
            deck = deck or rng.sample(kinds, len(kinds))
            faults.append(draw(deck.pop(), victim))
        yield tuple(faults)


@contextlib.contextmanager
def injected(fleet: Fleet, fault: Fault) -> Iterator[None]:
    """The fault, from here to the end of the block."""
    network = fleet.network
    victim, everybody = [name_of(fault.victim)], [name_of(index) for index in range(len(fleet.peers))]
    if fault.in_a_round:
        _await_round(fleet, fault.victim)
    match fault.kind:
        case Kind.KILL:
            fleet.kill(fault.victim)
            yield
            fleet.restart(fault.victim)
        case Kind.PAUSE:
            fleet.pause(fault.victim)
            yield
            fleet.resume(fault.victim)
        case Kind.SLOW_CLOSE:
            network.change(Weather(slow_close_s=1.0 + 2.0 * fault.amount), victim, everybody)
            fleet.kill(fault.victim)
            yield
            fleet.restart(fault.victim)
            network.change(Weather(), victim, everybody)
        case Kind.RESET:
            stopping = threading.Event()
            thread = threading.Thread(target=_keep_resetting, args=(fleet, fault.victim, stopping))
            thread.start()
            yield
            stopping.set()
            thread.join()
        case Kind.LATENCY:
            weather = Weather(latency_s=0.02 + 0.2 * fault.amount, jitter_s=0.1 * fault.amount)
            with _weather(fleet, weather, victim, everybody, both_ways=True):
                yield
        case Kind.BANDWIDTH:
            with _weather(fleet, Weather(bytes_s=100_000 + 2_000_000 * fault.amount), victim, everybody):
                yield
        case Kind.BLACK_HOLE:
            with _weather(fleet, BLOCKED, victim, everybody, both_ways=True):
                yield
        case Kind.ONE_WAY:
            others = [name_of(index) for index in fault.others]
            with _weather(fleet, BLOCKED, *((others, victim) if fault.reverse else (victim, others))):
                yield
        case Kind.CUT:
            with _weather(fleet, Weather(cut_after=int(fault.amount * 800_000)), victim, everybody):
                yield
        case Kind.LOSS:
            with _weather(fleet, Weather(loss=0.1 + 0.4 * fault.amount), everybody, everybody):
                yield
        case _:
            assert_never(fault.kind)


@contextlib.contextmanager
def _weather(
    fleet: Fleet, weather: Weather, sources: list[str], targets: list[str], *, both_ways: bool = False
) -> Iterator[None]:
    directions = [(sources, targets), (targets, sources)][: 2 if both_ways else 1]
    for here, there in directions:
        fleet.network.change(weather, here, there)
    yield
    for here, there in directions:
        fleet.network.change(Weather(), here, there)


def _keep_resetting(fleet: Fleet, victim: int, stopping: threading.Event) -> None:
    others = [name_of(index) for index in range(len(fleet.peers)) if index != victim]
    while True:
        fleet.network.reset(name_of(victim), others)
        if stopping.wait(0.3):
            return


def _await_round(fleet: Fleet, index: int) -> None:
    """Until it says that it reduces, or for a moment."""
    deadline = time.monotonic() + MOMENT_S
    seen = len(fleet.peers[index].lines)
    pause = threading.Event()
    while time.monotonic() < deadline:
        if any("reducing: group" in line for line in fleet.peers[index].lines[seen:]):
            return
        pause.wait(MOMENT_POLL_S)

"""Several ways to average the same vectors, taking turns in one run.

Knows who can take part, moshpitd over each transport and codec and the rivals, how to start them and how to let each
have its turn: A B C A B C, so that whatever else the machine does falls on all. All processes stay alive, only one
contestant works at a time. The first round of a turn is not counted, for anybody: caches are another's by then, and who
gives memory back when idle has to take it again. Does not know which figures are drawn from the samples.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from moshpitd.cli.namespaces import Place
from tests.benchmarks.rivals import Rival, RivalRound, Serving, Unavailable, serving
from tests.benchmarks.swarm import (
    Step,
    Swarm,
    Trainers,
    Training,
    Transport,
    running,
    training,
)

FAILURES_MAX = 3
"""A contestant whose round fails so often in a row, or in which not everybody met, is out."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one contestant."""

    data_s: float
    """The slowest peer's, from a group that is bound to the result."""
    whole_s: float
    """From the moment all callers were released to the last one's return."""
    cpu_s: float
    """Of those who average, all together; ours is that of the daemons."""
    matchmaking_s: float | None = None
    """The slowest peer's; None where it is not told."""
    hop_s: float | None = None
    """The slowest trainer's part outside its daemon."""


class Contestant(Protocol):
    """Somebody who averages."""

    name: str

    def open(self, megabytes: float) -> None:
        """From now on every peer has a vector of so many 1e6 bytes."""
        ...

    def round(self) -> Sample | None:
        """One averaging of fresh values; None when not everybody took part. Raises Unavailable."""
        ...

    def check(self) -> None:
        """Raises WrongResult unless the last round's result is right."""
        ...


class Ours:
    """Daemons of ours; contestants that differ in their codec share them."""

    def __init__(self, swarm: Swarm, name: str, *, group_size: int, rounds: int | None = 1, codec: str = "float32"):
        self.name = name
        self._swarm = swarm
        self._group_size = group_size
        self._rounds = rounds
        self._codec = codec
        self._open = ExitStack()
        self._trainers: Trainers | None = None
        self._last: list[Step] = []

    def beside(self, name: str, *, rounds: int | None) -> Ours:
        """Another contestant on the same daemons, with so many rounds an averaging."""
        return Ours(self._swarm, name, group_size=self._group_size, rounds=rounds, codec=self._codec)

    def open(self, megabytes: float) -> None:
        self.close()
        how = Training(int(megabytes * 1e6) // 4, self._rounds, self._codec, hop="zero copy", name=self.name)
        self._trainers = self._open.enter_context(training(self._swarm, how))

    def round(self) -> Sample | None:
        assert self._trainers is not None
        sample = self._step(self._trainers)
        if self._rounds == 1 and len(self._last[0].receipt.rounds[0].members) != self._group_size:
            # With one round an averaging the axis changes each time, and a 2x4 grid has groups of 2 and of 4.
            sample = self._step(self._trainers)
        return sample

    def _step(self, trainers: Trainers) -> Sample:
        before = self._swarm.cpu_seconds()
        steps = self._last = trainers.step()
        return Sample(
            data_s=max(step.receipt.seconds.reduce for step in steps),
            whole_s=max(step.ended for step in steps) - min(step.began for step in steps),
            cpu_s=self._swarm.cpu_seconds() - before,
            matchmaking_s=max(step.receipt.seconds.matchmaking for step in steps),
            hop_s=max(step.ended - step.began - step.receipt.seconds.total for step in steps),
        )

    def check(self) -> None:
        assert self._trainers is not None
        if self._rounds == 1:
            self._trainers.check_groups(self._last)
        else:
            self._trainers.check(self._last, [1.0] * len(self._last))

    def close(self) -> None:
        self._open.close()
        self._trainers = None


class Theirs:
    """A rival, who checks its results itself."""

    def __init__(self, rival: Serving) -> None:
        self.name = rival.rival.name
        self._rival = rival

    @property
    def version(self) -> str:
        return self._rival.version

    def open(self, megabytes: float) -> None:
        self._rival.open(megabytes)

    def round(self) -> Sample | None:
        found: RivalRound = self._rival.round()
        return Sample(found.data_s, found.whole_s, found.cpu_s) if found.is_whole else None

    def check(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Way:
    """How ours take part."""

    transport: Transport | None
    codec: str = "float32"

    @property
    def name(self) -> str:
        return f"moshpitd {self.transport or 'auto'}" + (f" {self.codec}" if self.codec != "float32" else "")


@contextlib.contextmanager
def contestants(
    peers: int,
    ways: Sequence[Way],
    rivals: Sequence[Rival],
    *,
    group_size: int | None = None,
    flags: Sequence[str] = (),
    places: Sequence[Place] = (),
) -> Iterator[tuple[list[Contestant], list[str]]]:
    """All that can take part here, and in words those that cannot."""
    with ExitStack() as stack:
        found: list[Contestant] = []
        missing: list[str] = []
        swarms: dict[Transport | None, Swarm] = {}
        for way in ways:
            if way.transport not in swarms:
                swarms[way.transport] = stack.enter_context(
                    running(peers, *flags, transport=way.transport, places=places)
                )
            ours = Ours(swarms[way.transport], way.name, group_size=group_size or peers, codec=way.codec)
            stack.callback(ours.close)
            found.append(ours)
        for rival in rivals:
            try:
                entered = serving(rival, peers=peers, group_size=group_size, places=places)
                found.append(Theirs(stack.enter_context(entered)))
            except Unavailable as error:
                missing.append(f"{rival.name}: {error}")
        yield found, list(dict.fromkeys(missing))


def take_turns(
    contesting: Sequence[Contestant], megabytes: float, *, turns: int, rounds: int
) -> tuple[dict[str, list[Sample]], list[str]]:
    """By name what each did in so many turns of so many rounds and one more; in words who dropped out."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    missing: list[str] = []
    still_in = list(contesting)

    def drop_out(contestant: Contestant, why: str) -> None:
        still_in.remove(contestant)
        samples.pop(contestant.name, None)
        missing.append(f"{contestant.name} at {megabytes:g} MB: {why}")

    for contestant in contesting:
        try:
            contestant.open(megabytes)
        except Unavailable as error:
            drop_out(contestant, str(error))
    for turn in range(turns):
        for contestant in list(still_in):
            try:
                _round(contestant)
                samples[contestant.name] += [_round(contestant) for _ in range(rounds)]
                if turn == 0:
                    contestant.check()
            except Unavailable as error:
                drop_out(contestant, str(error))
    return dict(samples), missing


def _round(contestant: Contestant) -> Sample:
    """The next one in which everybody takes part."""
    for _ in range(FAILURES_MAX):
        if (sample := contestant.round()) is not None:
            return sample
    raise Unavailable(f"in {FAILURES_MAX} rounds in a row not everybody took part")

"""Trainers that compute for drawn times, some of them late, and three ways of averaging: who waits for whom.

`wait-avoiding` runs WAGMA's versions, `group` synchronous groups of the same size, `global` one synchronous group of
all. What a run tells are step times: how long a version takes, how long a call holds its trainer up, how far the models
are apart meanwhile. Production machines, and the checkers for what they promise.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.cohort import WaitAvoidance, cohort_sides
from moshpitd.averaging.errors import SessionError
from moshpitd.averaging.grid import format_sides
from moshpitd.averaging.session import Call, SessionConfig
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.checkers import Bounds, Checker, Leaks, Liveness
from moshpitd.simulation.checkers.wait_avoidance import EqualAfterBarrier, OnceEach, Staleness, UntornPosts
from moshpitd.simulation.clock import Stuck
from moshpitd.simulation.network import Weather
from moshpitd.simulation.swarm import Ending, Peer, Swarm, options_for
from moshpitd.simulation.workloads import Report, packed, variance

Values = npt.NDArray[np.float32]
WAYS = ("wait-avoiding", "group", "global")


@dataclass(frozen=True, slots=True)
class Straggler:
    """In every step so many trainers, drawn anew, are late by so much."""

    count: int
    late_s: float


@dataclass(frozen=True, slots=True)
class StragglersOptions:
    """A swarm that trains."""

    averaging: str = "wait-avoiding"
    """One of WAYS."""
    peers: int = 8
    group_size: int = 2
    """S; `global` has no use for it."""
    barrier_every: int = 10
    """tau, of wait-avoiding only."""
    lockstep: bool = False
    steps: int = 100
    """Until a trainer has been through so many versions."""
    step_s: float = 0.1
    """What a step takes that is not late."""
    jitter: float = 0.0
    """... give or take this share of it."""
    stragglers: tuple[Straggler, ...] = ()
    late: float = 0.0
    """The chance of a step to be late by half a beat; trainers are then on the beat of `step_s` otherwise."""
    on_the_beat: bool = False
    noise: float = 1.0
    """Of each step, in every element: what a step of training does to a model here."""
    crash: float = 0.0
    """The chance of a daemon to die in a step."""
    elements: int = 64
    vector_bytes: float = 0.0
    seed: int = 0
    weather: Weather = field(default_factory=Weather)
    timeout_s: float = 60.0


@dataclass(slots=True)
class StepsReport(Report):
    """What came of it."""

    averaging: str = ""
    group_size: int = 0
    step_ms: float = 0.0
    """Virtual time by versions run."""
    own_step_ms: float = 0.0
    """Virtual time by the steps a trainer made itself: more than `step_ms` where late ones are skipped over."""
    computed_ms: float = 0.0
    """What the trainers computed in a step, on average."""
    call_ms_p50: float = 0.0
    """How long a call took its trainer."""
    call_ms_p99: float = 0.0
    steps_made: float = 0.0
    """By a trainer, on average."""
    versions: int = 0
    spread_mean: float = 0.0
    """Variance between peers at every beat between barriers, on average; in units of one step's noise."""
    staleness_max: int = 0
    staleness: dict[int, int] = field(default_factory=dict)
    """How many models in sums were so many versions old."""
    kinds: dict[str, int] = field(default_factory=dict)
    """How calls ended."""


class Trainer:
    """One trainer: computes, posts, goes on from what it gets. It writes into three buffers in turn."""

    def __init__(self, peer: Peer, held: Values, computes_s: Callable[[int], float]) -> None:
        self.peer = peer
        self.held = held
        self.steps = 0
        self.computed_s = 0.0
        self.calls_s: list[float] = []
        self.computes_s = computes_s
        self._buffers = [packed(np.full_like(held, np.nan)) for _ in range(3)]

    def begin_to_write(self) -> Vector:
        """The buffer that is its own now; until it is written whole, what lies there must reach nobody."""
        own = next(buffer for buffer in self._buffers if not self.peer.machine.holds(buffer))
        own.arrays()["w"][...] = np.nan
        return own


class Stragglers:
    """See StragglersOptions."""

    def __init__(self, options: StragglersOptions) -> None:
        self.options = options
        sides = cohort_sides(options.peers, options.group_size)
        chosen = WaitAvoidance(options.group_size, options.barrier_every, options.lockstep)
        self._avoidance = chosen if options.averaging == "wait-avoiding" else None
        grid = format_sides(sides if options.averaging == "group" else (options.peers,))
        flat = "" if options.averaging == "wait-avoiding" else grid
        config = SessionConfig(pin=flat, group_size_max=max(2, options.peers), chunk_bytes=1 << 14)
        self.report = StepsReport(
            "stragglers",
            options.seed,
            options.peers,
            grid=format_sides(sides) if self._avoidance else grid,
            averaging=options.averaging,
            group_size=options.peers if options.averaging == "global" else options.group_size,
        )
        self.swarm = Swarm(options.seed, options.weather, config)
        if options.vector_bytes:
            self.swarm.network.bytes_scale = options.vector_bytes / (4 * options.elements)
        self._liveness = Liveness()
        self.checkers: list[Checker] = [self._liveness, Bounds(), Leaks()]
        self._ages = Staleness(options.barrier_every)
        if self._avoidance:
            self.checkers += [self._ages, OnceEach(), EqualAfterBarrier(), UntornPosts()]
        self.swarm.observers += self.checkers
        self.trainers: list[Trainer] = []
        self._noise = np.random.default_rng([options.seed, 0xDA7A])
        self._over = False
        self._began_at = 0.0
        self._kinds: Counter[str] = Counter()
        self._staleness: Counter[int] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._versions = 0

    def run(self) -> StepsReport:
        options, swarm, report = self.options, self.swarm, self.report
        weather = swarm.weather
        swarm.weather = replace(weather, directory=(0.005, 0.005), stale_s=0.0, lost_writes=0.0)
        for number in range(options.peers):
            self._let_in(number)
        swarm.run_for(1.0)
        swarm.weather = weather
        try:
            self._first_averaging()
            self._began_at, self._versions = swarm.now, 0
            for trainer in self.trainers:
                self._compute(trainer)
            self._sample()
            swarm.run_until(lambda: self._over or len(swarm.living()) < 2, 1e4 * options.step_s * options.steps)
            self._tell()
            swarm.run_for(2 * options.timeout_s)
        except Stuck as stuck:
            self._liveness.complain(swarm.now, str(stuck))
        for checker in self.checkers:
            checker.finish(swarm)
            report.looked[checker.name] = checker.looked
            report.complaints += checker.complaints
        report.complaints += [f"protocol: {error}" for error in swarm.protocol_errors]
        if self._ages.untold:
            report.windows["age of a model untold"] = self._ages.untold
        report.messages_per_peer = sum(swarm.network.messages.values()) / len(swarm.peers)
        report.bytes_per_peer = sum(swarm.network.bytes.values()) / len(swarm.peers)
        report.virtual_s, report.events = swarm.now, swarm.clock.events
        return report

    def _let_in(self, number: int) -> None:
        options = self.options
        held = np.zeros(options.elements, np.float32)
        needed = max(options.group_size, 2) if options.crash else options.peers
        session = options_for(held, rounds=1, min_peers=needed, wait_avoidance=self._avoidance, joining="contribute")
        self.trainers.append(Trainer(self.swarm.open(f"p{number}", session), held, partial(self._computes_s, number)))

    def _first_averaging(self) -> None:
        """Everybody meets everybody once; no step is timed yet."""
        calls = {t.peer: (packed(t.held), Call(timeout_s=self.options.timeout_s)) for t in self.trainers}
        for ending in self.swarm.average(calls, apart_s=0.001).values():
            if ending.error is not None:
                raise Stuck(str(ending.error))

    # ---- one trainer

    def _computes_s(self, number: int, step: int) -> float:
        """The same draw for all in a step, whoever asks first."""
        options = self.options
        dice = random.Random(f"{options.seed} {step}")
        took_s = options.step_s * (1 + options.jitter * dice.uniform(-1, 1))
        for straggler in options.stragglers:
            if number in dice.sample(range(options.peers), straggler.count):
                took_s += straggler.late_s
        return took_s

    def _compute(self, trainer: Trainer) -> None:
        options, swarm = self.options, self.swarm
        vector = trainer.begin_to_write()
        took_s = trainer.computes_s(trainer.steps)
        if options.on_the_beat or options.late:
            beats = math.floor((swarm.now - self._began_at) / options.step_s + 0.5) + 1
            late = swarm.rng.random() < options.late
            moment = self._began_at + beats * options.step_s + swarm.rng.uniform(0, 0.01 * options.step_s)
            took_s = moment + (0.4 * options.step_s if late else 0.0) - swarm.now
        trainer.computed_s += took_s
        if swarm.rng.random() < options.crash and len(swarm.living()) > max(2, options.peers // 2):
            swarm.at(swarm.now + swarm.rng.uniform(0, took_s), lambda: swarm.kill(trainer.peer))
        swarm.at(swarm.now + took_s, partial(self._post, trainer, vector))

    def _post(self, trainer: Trainer, vector: Vector) -> None:
        if self._over or not trainer.peer.alive:
            return
        noise = self._noise.normal(size=len(trainer.held)) * self.options.noise
        vector.arrays()["w"][...] = trainer.held + noise.astype(np.float32)
        called_at = self.swarm.now
        trainer.peer.on_end = partial(self._ended, trainer, called_at)
        try:
            self.swarm.start(trainer.peer, vector, Call(timeout_s=self.options.timeout_s))
        except SessionError as error:
            self._liveness.complain(called_at, f"{trainer.peer.name}'s call was refused: {error}")

    def _ended(self, trainer: Trainer, called_at: float, ending: Ending) -> None:
        receipt = ending.receipt
        if receipt is None or ending.vector is None:
            self._kinds["failed"] += 1
        else:
            trainer.held = ending.values.astype(np.float32)
            self._outcomes[receipt.outcome.value] += 1
            self._kinds[receipt.version.kind if receipt.version else "synchronous"] += 1
            if receipt.version:
                self._staleness.update(receipt.version.version - line.posted for line in receipt.version.contributors)
        trainer.steps += 1
        trainer.calls_s.append(ending.at - called_at)
        number = receipt.version.version if receipt and receipt.version and not self.options.lockstep else trainer.steps
        self._versions = max(self._versions, number)
        if self._versions >= self.options.steps:
            self._over = True
        else:
            self._compute(trainer)

    # ---- what is told

    def _sample(self) -> None:
        """How far apart the models are, in the middle of each beat."""
        if not self._over:
            held = [trainer.held for trainer in self.trainers if trainer.peer.alive]
            self.report.spreads.append(variance(held))
            moment = self._began_at + (len(self.report.spreads) - 0.25) * self.options.step_s
            self.swarm.at(moment, self._sample)

    def _tell(self) -> None:
        report, trainers = self.report, self.trainers
        calls_ms = [1e3 * each for trainer in trainers for each in trainer.calls_s]
        steps = sum(trainer.steps for trainer in trainers)
        report.versions = self._versions
        report.step_ms = 1e3 * (self.swarm.now - self._began_at) / max(1, self._versions)
        report.own_step_ms = 1e3 * (self.swarm.now - self._began_at) * len(trainers) / max(1, steps)
        report.computed_ms = 1e3 * sum(trainer.computed_s for trainer in trainers) / max(1, steps)
        report.call_ms_p50, report.call_ms_p99 = (float(np.percentile(calls_ms, q)) for q in (50, 99))
        report.steps_made = steps / len(trainers)
        between = [spread for spread in report.spreads[1:] if spread > 1e-12]
        report.spread_mean = float(np.mean(between)) if between else 0.0
        report.staleness_max = max(self._staleness, default=0)
        report.staleness = dict(sorted(self._staleness.items()))
        report.kinds = dict(sorted(self._kinds.items()))
        report.outcomes = dict(sorted(self._outcomes.items()))
        report.averagings = self._versions

"""`moshpitd bench wait-avoiding`: daemons as processes, trainers as threads that sleep and average.

Each trainer is a client of its daemon's socket as any language could write one. It sleeps as long as its step is said
to take, adds noise to its model, and averages. The same sleeps are run through three ways of averaging: wait-avoiding,
in synchronous groups of the same size, and all together. What is told are step times, how long calls held trainers up,
how old models were, and how far apart.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.cohort import cohort_sides
from moshpitd.cli.connection import Daemon
from moshpitd.cli.failure import ExitCode, Failure
from moshpitd.cli.forms import KINDS, OUTCOMES
from moshpitd.cli.local_swarm import BUSY, load_per_core, local_swarm
from moshpitd.local.v1 import daemon_pb2 as pb

PARTS = ("exact", "late", "race", "spread")
STEP_S = 0.1
STRAGGLERS, LATE_S = 2, 0.32
"""So many of the trainers, drawn anew in each step, are late by so much."""
BEAT_S = 0.3
SLEEPER_S = 2.0
ELEMENTS = 256
NEVER = 1000
"""As tau: no barrier but the first."""
TRIALS = 10
AVERAGE_TIMEOUT_S = 60.0

SESSION_TIMEOUT_S = 3600.0

Floats = npt.NDArray[np.float32]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Way:
    """How trainers average."""

    group_size: int
    """S, or everybody."""
    barrier_every: int = 0
    """tau; 0: synchronous."""
    lockstep: bool = True


@dataclass(slots=True)
class Course:
    """What one trainer saw."""

    calls_s: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    """How calls ended: by kind of version, or by outcome where averagings are synchronous."""
    ages: Counter[int] = field(default_factory=Counter)
    """By versions, of the models in the sums that it saw."""
    waited_s: list[float] = field(default_factory=list)
    """Calls that were no barrier."""
    held: list[tuple[float, Floats]] = field(default_factory=list)
    """The model from each moment on."""
    version: int = 0
    began_at: float = 0.0
    ended_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Exact:
    """All punctual: one version an axis, then everybody holds the mean."""

    peers: int
    group_size: int
    versions: int
    trials: int
    punctual: int
    """Trials in which the machine let all trainers be: the others are not judged."""
    error_max: float | None
    """Largest deviation from the float64 mean, relative to the largest of its elements; None: no trial was punctual."""


@dataclass(frozen=True, slots=True)
class Late:
    """One trainer sleeps."""

    peers: int
    sleeper_seconds: float
    calls: int
    """Of the others."""
    call_ms_p50: float
    call_ms_p99: float
    call_ms_max: float
    sleeper_kinds: dict[str, int]
    staleness_max: int


@dataclass(frozen=True, slots=True)
class Race:
    """One way through a number of steps."""

    way: str
    step_ms: float
    """A version takes so long."""
    own_step_ms: float
    """A step that a trainer makes itself: more than `step_ms` where late ones skip some."""
    call_ms_p50: float
    call_ms_p99: float
    staleness_max: int
    kinds: dict[str, int]


@dataclass(frozen=True, slots=True)
class Spread:
    """How far apart the models are between barriers, in units of one step's noise."""

    late: float
    mean: float
    second_half_by_first: float
    """1 where it does not grow."""
    staleness_max: int
    kinds: dict[str, int]


@dataclass(slots=True)
class Figures:
    """What came of it; parts that were not asked for are empty."""

    exact: list[Exact] = field(default_factory=list)
    late: Late | None = None
    race: list[Race] = field(default_factory=list)
    """Two of eight late in each step."""
    punctual: list[Race] = field(default_factory=list)
    """The same without delays: what each way costs by itself."""
    speedup_global: float = 0.0
    """Step times: synchronous over all by wait-avoiding in lockstep, tau 10."""
    speedup_group: float = 0.0
    """... synchronous groups by the same."""
    spread: list[Spread] = field(default_factory=list)
    load_per_core: float = 0.0
    """At the end, in the mean of a minute. Far above 1 sleeps end late and nothing here means much."""


def run(*, parts: Sequence[str], steps: int, seed: int) -> Figures:
    """`steps` is rounded up to whole barriers of every tau. Raises Failure when the daemons do not come up."""
    steps = 20 * math.ceil(steps / 20)
    figures = Figures()
    if {"exact", "late", "race"} & set(parts):
        with local_swarm(8, "--grid", "8") as sockets:
            if "exact" in parts:
                figures.exact += [_exact(sockets[:4], 2, seed), _exact(sockets, 2, seed)]
            if "late" in parts:
                figures.late = _late(sockets, steps, seed)
            if "race" in parts:
                _race(figures, sockets, ["global", "tau 4", "tau 10", "tau 20", "tau 10, skipping"], steps, seed)
    if "race" in parts:
        with local_swarm(8, "--grid", "2x2x2") as sockets:
            _race(figures, sockets, ["group"], steps, seed)
        times = {race.way: race.step_ms for race in figures.race}
        figures.speedup_global = times["global"] / times["tau 10"]
        figures.speedup_group = times["group"] / times["tau 10"]
    if {"exact", "spread"} & set(parts):
        with local_swarm(16) as sockets:
            if "exact" in parts:
                figures.exact.append(_exact(sockets, 4, seed))
            if "spread" in parts:
                figures.spread = [_spread(sockets, late, steps, seed) for late in (0.0, 0.3, 0.6)]
    figures.load_per_core = load_per_core()
    return figures


# ---- the parts


def _exact(sockets: Sequence[Path], group_size: int, seed: int) -> Exact:
    peers = len(sockets)
    axes = len(cohort_sides(peers, group_size))
    _say(f"exact: {peers} trainers in groups of {group_size}")
    together = threading.Barrier(peers)
    drawn = np.random.default_rng([seed, peers]).standard_normal((TRIALS, peers, ELEMENTS)).astype(np.float32)

    def train(number: int, socket: Path) -> list[tuple[Floats, bool]]:
        with _Trainer(socket, f"exact-{peers}", peers, Way(group_size, NEVER)) as trainer:
            trainer.average(drawn[0, number])
            ends = []
            for trial in range(TRIALS):
                model, fresh = drawn[trial, number], True
                for _ in range(axes):
                    together.wait(AVERAGE_TIMEOUT_S)
                    time.sleep(2 * STEP_S)
                    model, receipt = trainer.average(model)
                    fresh = fresh and receipt.version.fresh and len(receipt.version.contributors) == group_size
                ends.append((model, fresh))
            together.wait(AVERAGE_TIMEOUT_S)
            return ends

    every = _in_parallel(train, sockets, together)
    means = drawn.mean(axis=1, dtype=np.float64)
    errors = [
        max(float(np.max(np.abs(ends[trial][0] - means[trial]))) for ends in every)
        / float(np.max(np.abs(means[trial])))
        for trial in range(TRIALS)
        if all(ends[trial][1] for ends in every)
    ]
    return Exact(peers, group_size, axes, TRIALS, len(errors), max(errors, default=None))


def _late(sockets: Sequence[Path], steps: int, seed: int) -> Late:
    peers = len(sockets)
    _say(f"late: one of {peers} sleeps {SLEEPER_S:g} s in each step")
    courses = _train_all(
        sockets,
        "late",
        Way(2, NEVER, lockstep=False),
        steps,
        lambda number, step: SLEEPER_S if number == 0 else STEP_S,
        seed,
    )
    calls_ms = 1e3 * np.concatenate([course.waited_s for course in courses[1:]])
    p50, p99 = (float(np.percentile(calls_ms, share)) for share in (50, 99))
    ages = max(max(course.ages, default=0) for course in courses)
    return Late(peers, SLEEPER_S, len(calls_ms), p50, p99, float(calls_ms.max()), dict(courses[0].kinds), ages)


def _race(figures: Figures, sockets: Sequence[Path], names: Sequence[str], steps: int, seed: int) -> None:
    peers = len(sockets)
    ways = {
        "global": Way(peers),
        "group": Way(2),
        "tau 4": Way(2, 4),
        "tau 10": Way(2, 10),
        "tau 20": Way(2, 20),
        "tau 10, skipping": Way(2, 10, lockstep=False),
    }

    def late_s(number: int, step: int) -> float:
        """The same draw for all in a step, whoever asks first."""
        dice = random.Random(f"{seed} {step}")
        return STEP_S + (LATE_S if number in dice.sample(range(peers), STRAGGLERS) else 0.0)

    for name in names:
        _say(f"race: {name}")
        figures.race.append(_raced(name, _train_all(sockets, f"race-{name}", ways[name], steps, late_s, seed)))
    for name in [name for name in names if name in ("global", "group", "tau 10")]:
        _say(f"race: {name}, without delays")
        courses = _train_all(sockets, f"punctual-{name}", ways[name], steps, lambda number, step: STEP_S, seed)
        figures.punctual.append(_raced(name, courses))


def _raced(name: str, courses: Sequence[Course]) -> Race:
    first = max(courses, key=lambda course: (course.version, -course.ended_at))
    took_ms = 1e3 * (first.ended_at - first.began_at)
    calls_ms = 1e3 * np.concatenate([course.calls_s for course in courses])
    return Race(
        name,
        step_ms=took_ms / first.version,
        own_step_ms=took_ms * len(courses) / len(calls_ms),
        call_ms_p50=float(np.percentile(calls_ms, 50)),
        call_ms_p99=float(np.percentile(calls_ms, 99)),
        staleness_max=max(max(course.ages, default=0) for course in courses),
        kinds=dict(sum((course.kinds for course in courses), Counter[str]())),
    )


def _spread(sockets: Sequence[Path], late: float, steps: int, seed: int) -> Spread:
    _say(f"spread: {len(sockets)} trainers, {late:.0%} of the steps late")
    way = Way(4, 10, lockstep=False)
    courses = _train_all(sockets, f"spread-{late:g}", way, steps, None, seed, late=late)
    began_at = max(course.began_at for course in courses)
    spreads = []
    for beat in range(1, int((min(course.ended_at for course in courses) - began_at) / BEAT_S)):
        moment = began_at + (beat + 0.75) * BEAT_S
        held = np.stack([_held_at(course, moment) for course in courses]).astype(np.float64)
        spreads.append(float(np.mean(np.var(held, axis=0))))
    between = [spread for spread in spreads if spread > 1e-12]
    half = len(between) // 2
    return Spread(
        late,
        float(np.mean(between)),
        float(np.mean(between[half:]) / np.mean(between[:half])),
        max(max(course.ages, default=0) for course in courses),
        dict(sum((course.kinds for course in courses), Counter[str]())),
    )


def _held_at(course: Course, moment: float) -> Floats:
    return next(model for since, model in reversed(course.held) if since <= moment)


# ---- trainers


def _train_all(
    sockets: Sequence[Path],
    name: str,
    way: Way,
    steps: int,
    takes_s: Callable[[int, int], float] | None,
    seed: int,
    *,
    late: float = 0.0,
) -> list[Course]:
    """Until somebody has been through so many versions, which is a barrier unless there are none. `takes_s`: how long a
    trainer's step is; None: all on a beat, some of them late by four tenths of it."""
    together, over = threading.Barrier(len(sockets)), threading.Event()

    def train(number: int, socket: Path) -> Course:
        course, dice = Course(), random.Random(f"{seed} {number}")
        noise = np.random.default_rng([seed, number])
        with _Trainer(socket, name, len(sockets), way) as trainer:
            held, _ = trainer.average(np.zeros(ELEMENTS, np.float32))
            together.wait(AVERAGE_TIMEOUT_S)
            course.began_at = time.perf_counter()
            course.held.append((course.began_at, held))
            while course.version < steps and not over.is_set():
                if takes_s is not None:
                    time.sleep(takes_s(number, len(course.calls_s)))
                else:
                    beat = math.floor((time.perf_counter() - course.began_at) / BEAT_S + 0.5) + 1
                    moment = course.began_at + (beat + (0.4 if dice.random() < late else 0.0)) * BEAT_S
                    time.sleep(max(0.0, moment - time.perf_counter()))
                model = held + noise.standard_normal(ELEMENTS).astype(np.float32)
                called_at = time.perf_counter()
                held, receipt = trainer.average(model)
                course.ended_at = time.perf_counter()
                course.held.append((course.ended_at, held))
                _note(course, receipt, course.ended_at - called_at, way)
            over.set()
            together.wait(AVERAGE_TIMEOUT_S)  # who closes first would be missed by the others
        return course

    return _in_parallel(train, sockets, together)


def _note(course: Course, receipt: pb.Receipt, took_s: float, way: Way) -> None:
    course.calls_s.append(took_s)
    course.version = len(course.calls_s)
    if not receipt.HasField("version"):
        course.kinds[OUTCOMES[receipt.outcome]] += 1
        return
    version = receipt.version
    course.kinds[KINDS[version.kind]] += 1
    course.ages.update(version.version - each.posted for each in version.contributors if each.HasField("posted"))
    if version.kind != pb.VERSION_KIND_BARRIER:
        course.waited_s.append(took_s)
    if not way.lockstep and way.barrier_every != NEVER:
        course.version = version.version


class _Trainer:
    """A session at a daemon, for as long as the block lasts."""

    def __init__(self, socket: Path, name: str, peers: int, way: Way) -> None:
        self._socket = socket
        self._request = pb.OpenSessionRequest(
            name=name,
            tensors=[pb.Tensor(name="model", shape=[ELEMENTS], data_type=pb.DATA_TYPE_FLOAT32)],
            min_peers=peers,
            joining=pb.JOINING_CONTRIBUTE,
            rounds=1,
        )
        if way.barrier_every:
            self._request.averaging = pb.AVERAGING_WAIT_AVOIDING
            self._request.group_size = way.group_size
            self._request.barrier_every = way.barrier_every
            self._request.lockstep = way.lockstep
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._daemon = self._stack.enter_context(Daemon(self._socket))
        self._session_id = self._stack.enter_context(self._daemon.session(self._request, SESSION_TIMEOUT_S))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def average(self, model: Floats) -> tuple[Floats, pb.Receipt]:
        start = pb.AverageStart(session_id=self._session_id, timeout_seconds=AVERAGE_TIMEOUT_S)
        requests = [
            pb.AverageRequest(start=start),
            pb.AverageRequest(chunk=pb.VectorChunk(offset=0, data=model.tobytes())),
        ]
        receipt, result = pb.Receipt(), b""
        with self._daemon.average(requests, 2 * AVERAGE_TIMEOUT_S) as responses:
            for response in responses:
                match response.WhichOneof("message"):
                    case "receipt":
                        receipt = response.receipt
                    case "chunk":
                        result += response.chunk.data
        return np.frombuffer(result, np.float32) if result else model, receipt


def _in_parallel(train: Callable[[int, Path], _T], sockets: Sequence[Path], together: threading.Barrier) -> list[_T]:
    """A thread each. The first one's failure ends all of them."""

    def attempt(number: int, socket: Path) -> _T:
        try:
            return train(number, socket)
        except BaseException:
            together.abort()
            raise

    with ThreadPoolExecutor(len(sockets)) as pool:
        trainings = [pool.submit(attempt, number, socket) for number, socket in enumerate(sockets)]
    failures = [training.exception() for training in trainings if training.exception()]
    for failure in sorted(failures, key=lambda failure: isinstance(failure, threading.BrokenBarrierError)):
        if isinstance(failure, threading.BrokenBarrierError):
            raise Failure(ExitCode.FAILED, "a trainer of the bench did not come: the machine hangs") from failure
        assert failure is not None
        raise failure
    return [training.result() for training in trainings]


# ---- what people read


def show(figures: Figures, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(figures)))
        return
    for exact in figures.exact:
        held = (
            f"off by at most {exact.error_max:.1g} of the largest element"
            if exact.error_max is not None
            else "not measured"
        )
        print(
            f"exact mean of {exact.peers} after {exact.versions} versions in groups of {exact.group_size}: {held} "
            f"({exact.punctual} of {exact.trials} trials were punctual)"
        )
    if late := figures.late:
        print(
            f"one of {late.peers} sleeps {late.sleeper_seconds:g} s: the calls of the others take "
            f"{late.call_ms_p50:.0f} ms, p99 {late.call_ms_p99:.0f} ms, at most {late.call_ms_max:.0f} ms"
        )
    for title, races in (
        (f"{STRAGGLERS} of 8 late by {LATE_S * 1e3:.0f} ms", figures.race),
        ("without delays", figures.punctual),
    ):
        for race in races:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(race.kinds.items()))
            print(
                f"{title}, {race.way}: {race.step_ms:.0f} ms a version, {race.own_step_ms:.0f} ms a step; "
                f"calls {race.call_ms_p50:.0f} ms, p99 {race.call_ms_p99:.0f} ms; "
                f"models at most {race.staleness_max} old; {kinds}"
            )
    if figures.race:
        print(
            f"wait-avoiding against all together {figures.speedup_global:.2f}x, against synchronous groups "
            f"{figures.speedup_group:.2f}x"
        )
    for spread in figures.spread:
        print(
            f"spread of 16, {spread.late:.0%} late: {spread.mean:.3f}, second half by first "
            f"{spread.second_half_by_first:.2f}; models at most {spread.staleness_max} old"
        )
    if figures.load_per_core > BUSY:
        print(f"This machine is busy ({figures.load_per_core:.1f} processes a core): sleeps end late, measure again.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

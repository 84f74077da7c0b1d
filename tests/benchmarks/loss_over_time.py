"""Loss against wall clock: eight trainers learn the demo's digits, two of them late in each step, in three ways.

Synchronous over all, in synchronous groups of two, and wait-avoiding. A step is one of SGD on the trainer's own shard,
stretched to 100 ms by sleeping, 420 ms for two trainers drawn anew in each step. Then the models are averaged. Every
way has as much time as the synchronous one took. Shards are shuffled, as where one data set is dealt out; and skewed as
in the demo, few classes in each: there a late step, which counts 1 / (S + 1), is missed more. The loss is over all
shards: of each trainer's own model, and of the mean of all models, which is what a barrier would give. A trainer's
model is noted when its call returns, and holds until the next one.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

import moshpit_client
from tests.benchmarks.figures import Figure, Goal, Measured, WrongResult
from tests.benchmarks.rivals import Unavailable
from tests.benchmarks.swarm import Swarm, running

EXAMPLE = Path(__file__).resolve().parents[2] / "clients" / "python" / "examples" / "demo_digits"
PEERS = 8
STEP_S, LATE_S, LATE = 0.1, 0.32, 2
STEPS, STEPS_QUICK = 120, 60
"""Of the synchronous run."""
SAMPLES = 120
"""Of a curve."""
SHARE_MAX = 0.7
TIMEOUT_S = 60.0
DATA_SEED = 1
WAYS: dict[str, tuple[str, dict[str, object]]] = {
    "synchronous": ("8", {"rounds": 1}),
    "groups": ("2x2x2", {"rounds": 1}),
    "wait-avoiding": ("8", {"averaging": "wait_avoiding", "group_size": 2, "barrier_every": 10}),
}
"""The grid of the daemons, and the options of a session."""

Floats = npt.NDArray[np.float32]


@dataclass(slots=True)
class Course:
    """One trainer's models, each from its moment on, in seconds after all began."""

    models: list[tuple[float, Floats]] = field(default_factory=list)
    steps: int = 0

    def at(self, moment: float) -> Floats:
        return next(model for since, model in reversed(self.models) if since <= moment)


@dataclass(frozen=True, slots=True)
class Curve:
    """Of one way."""

    seconds: tuple[float, ...]
    own: tuple[float, ...]
    """Loss of the trainers' own models, in the mean."""
    mean: tuple[float, ...]
    """Loss of the mean of their models."""
    steps: float
    """Made by a trainer, in the mean."""

    def reaches(self, loss: float, losses: Sequence[float]) -> float:
        """The moment from which on it is no more than this; infinite if it never is."""
        above = [second for second, each in zip(self.seconds, losses, strict=True) if each > loss]
        later = [second for second in self.seconds if not above or second > above[-1]]
        return later[0] if later else float("inf")


def measure(*, quick: bool) -> Measured:
    """Raises Unavailable without the demo's data set."""
    if not importlib.util.find_spec("sklearn"):
        raise Unavailable("loss_over_time: scikit-learn has the digits (pip install '.[demo]')")
    figures: list[Figure] = []
    details: dict[str, object] = {}
    for dealt, ways in (("shuffled", tuple(WAYS)), ("skewed", ("synchronous", "wait-avoiding"))):
        if quick and dealt == "skewed":
            continue
        curves = _learn(dealt, ways, STEPS_QUICK if quick else STEPS)
        details[dealt] = {name: asdict(curve) for name, curve in curves.items()}
        synchronous = curves["synchronous"]
        for name in ways[1:]:
            curve = curves[name]
            if not np.isfinite(curve.mean).all():
                raise WrongResult(f"the loss of the {name} run is no number")
            for kind, what in (("mean", "the mean of all models"), ("own", "trainers' own models")):
                target = getattr(synchronous, kind)[-1]
                share = curve.reaches(target, getattr(curve, kind)) / synchronous.seconds[-1]
                is_promised = (dealt, name, kind) == ("shuffled", "wait-avoiding", "mean")
                promised = (Goal.AT_MOST, SHARE_MAX) if is_promised else (None, None)
                note = f"loss {target:.3f}; {curve.steps:.0f} steps against {synchronous.steps:.0f}"
                title = f"{dealt} shards, {name}: has the synchronous run's final loss, {what}"
                if share <= 1:
                    figures.append(Figure("loss_over_time", title, share, "of its time", *promised, note))
                else:
                    note = f"not within its time; {note}"
                    figures.append(Figure("loss_over_time", title, 1.0, "of its time", *promised, note))
    return Measured(tuple(figures), details)


def _learn(dealt: str, ways: Sequence[str], steps: int) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    took_s = 0.0
    for name in ways:
        grid, options = WAYS[name]
        with running(PEERS, "--grid", grid) as swarm:
            courses = _train_all(swarm, dealt, options, steps if name == "synchronous" else None, took_s)
        took_s = took_s or min(course.models[-1][0] for course in courses)
        curves[name] = _curve(courses, took_s)
    return curves


def _train_all(swarm: Swarm, dealt: str, options: dict[str, object], steps: int | None, until_s: float) -> list[Course]:
    """So many steps, or for so long."""
    digits, network_of = _demo()
    shards, _ = digits.deal(PEERS, DATA_SEED)
    if dealt == "shuffled":
        everything = digits.together(shards)
        order = np.random.default_rng(DATA_SEED).permutation(len(everything.labels))
        hands = np.array_split(order, PEERS)
        shards = [digits.Digits(everything.pixels[hand], everything.labels[hand]) for hand in hands]
    together, over = threading.Barrier(PEERS), threading.Event()

    def train(number: int) -> Course:
        course, network = Course(), network_of.Network()
        draws = network_of.batches(shards[number].pixels, shards[number].labels, network_of.BATCH, number)
        chosen = {"min_peers": PEERS, "joining": "contribute", **options}
        with (
            moshpit_client.connect(swarm.daemons[number].socket) as daemon,
            daemon.open_session(network.parameters, **chosen) as session,  # type: ignore[arg-type]
        ):
            session.average(timeout=TIMEOUT_S)
            together.wait(TIMEOUT_S)
            began_at = time.perf_counter()
            course.models.append((0.0, network.vector()))
            while not over.is_set():
                began_step_at = time.perf_counter()
                network.step(*next(draws))
                late = number in random.Random(course.steps).sample(range(PEERS), LATE)
                time.sleep(max(0.0, began_step_at + STEP_S + late * LATE_S - time.perf_counter()))
                session.average(timeout=TIMEOUT_S)
                course.models.append((time.perf_counter() - began_at, network.vector()))
                course.steps += 1
                if course.steps == steps or (not steps and course.models[-1][0] >= until_s):
                    break
            over.set()  # nobody is left behind alone
            together.wait(TIMEOUT_S)
        return course

    with ThreadPoolExecutor(PEERS) as pool:
        return list(pool.map(train, range(PEERS)))


def _curve(courses: Sequence[Course], took_s: float) -> Curve:
    digits, network_of = _demo()
    everything = digits.together(digits.deal(PEERS, DATA_SEED)[0])

    def loss(model: Floats) -> float:
        return float(network_of.Network.from_vector(model).loss(everything.pixels, everything.labels))

    seconds = np.linspace(0.0, took_s, SAMPLES)
    own, mean = [], []
    for moment in seconds:
        models = [course.at(moment) for course in courses]
        own.append(float(np.mean([loss(model) for model in models])))
        mean.append(loss(np.mean(models, axis=0, dtype=np.float32)))
    steps = float(np.mean([course.steps for course in courses]))
    return Curve(tuple(seconds.tolist()), tuple(own), tuple(mean), steps)


def _demo() -> tuple[ModuleType, ModuleType]:
    """The demo's modules, which are no package: (digits, network)."""
    if str(EXAMPLE) not in sys.path:
        sys.path.append(str(EXAMPLE))
    return importlib.import_module("digits"), importlib.import_module("network")

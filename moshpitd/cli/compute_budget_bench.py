"""`moshpitd bench compute-budget`: daemons as processes, trainers as threads that sleep, learn and average.

Each trainer is a client of its daemon's socket as any language could write one. It has two sessions, one whose budget
is off and one that goes by the swarm's tau, and computes each step once for either, by turns: what else the machine
does slows both alike. The micro-batches of both take as long and hold the same samples; what differs is what is
dropped. The loss is that of a logistic regression, whose gradients are real.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.compute_budget import LEARN_DEFAULT, WARM_UP_DEFAULT, carried_out
from moshpitd.cli.connection import Daemon
from moshpitd.cli.failure import ExitCode, Failure
from moshpitd.cli.local_swarm import BUSY, load_per_core, local_swarm
from moshpitd.local.v1 import daemon_pb2 as pb
from moshpitd.simulation.compute_budget import authors_noise

MODES = ("off", "auto")
MICRO_BATCHES = 12
MICRO_BATCH_S = 0.01
FEATURES = 128
SAMPLES = 16
"""Of a micro-batch."""
LEARNING_RATE = 0.1
AVERAGE_TIMEOUT_S = 60.0

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class Course:
    """What one trainer saw in one of its sessions, step by step."""

    model: Floats = field(default_factory=lambda: np.zeros(FEATURES))
    took_s: list[float] = field(default_factory=list)
    """Each step, its averaging included."""
    computed_s: list[list[float]] = field(default_factory=list)
    """Of each completed micro-batch."""
    late_s: float = 0.0
    """The most by which a micro-batch began after tau."""
    exchange_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    budget: pb.ComputeBudget = field(default_factory=pb.ComputeBudget)
    """Of the last receipt."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of it."""

    peers: int
    steps: int
    tau_seconds: list[float]
    """At each peer."""
    tau_equal: bool
    tables: int
    exchange_seconds: float
    """Of a step beside its micro-batches, for him who came last, in the median."""
    expected_speedup: float
    """By the rule, from the measured steps."""
    expected_drop_rate: float
    carried_out_speedup: float
    """By the same noise, when micro-batches that were begun are finished."""
    speedup: float
    """Seen: micro-batches in a second, with tau against without."""
    drop_rate: float
    started_late_seconds: float
    """The most by which a micro-batch began after tau: what lies between two looks at the clock."""
    step_seconds: dict[str, float]
    """In the mean, without and with tau."""
    loss: dict[str, list[tuple[int, float]]]
    """(samples, loss), without and with."""
    loss_difference: float
    """The largest relative one at the same number of samples."""
    load_per_core: float
    """At the end, in the mean of a minute. Far above 1 sleeps end late and nothing here means much."""


def run(*, peers: int, steps: int, seed: int) -> Figures:
    """Both runs. Raises Failure when the daemons do not come up."""
    measured = WARM_UP_DEFAULT + LEARN_DEFAULT
    problem = Problem(seed)
    with local_swarm(peers) as sockets:
        _say(f"{peers} trainers, {measured + steps} steps without a tau and with")
        with ThreadPoolExecutor(peers) as pool:
            trainings = [
                pool.submit(_train, socket, number, peers, measured + steps, problem)
                for number, socket in enumerate(sockets)
            ]
            both = [training.result() for training in trainings]
    courses = {mode: [each[mode] for each in both] for mode in MODES}
    off, auto = courses["off"], courses["auto"]
    latencies = np.array([course.computed_s for course in off])[:, measured:].transpose(1, 0, 2)
    exchange_s = float(np.median(np.min([course.exchange_s for course in off], axis=0)))
    rates, means = {}, {}
    for mode, several in courses.items():
        # All end a step at the same moment but for some milliseconds, so the first one's time is everybody's.
        seconds = sum(several[0].took_s[measured:])
        completed = sum(len(step) for course in several for step in course.computed_s[measured:])
        rates[mode], means[mode] = completed / seconds, seconds / steps
    loss = {mode: _losses(several) for mode, several in courses.items()}
    samples, losses = (np.array(each) for each in zip(*loss["off"], strict=True))
    common = [(at, value) for at, value in loss["auto"] if at <= samples[-1]]
    told = auto[0].budget
    return Figures(
        peers=peers,
        steps=steps,
        tau_seconds=[course.budget.tau_seconds for course in auto],
        tau_equal=len({course.budget.tau_seconds for course in auto}) == 1 and told.tau_seconds > 0,
        tables=told.tables,
        exchange_seconds=exchange_s,
        expected_speedup=told.expected_speedup,
        expected_drop_rate=told.expected_drop_rate,
        carried_out_speedup=carried_out(list(latencies), told.tau_seconds or np.inf, exchange_s).speedup,
        speedup=rates["auto"] / rates["off"],
        drop_rate=1 - rates["auto"] * means["auto"] / (peers * MICRO_BATCHES),
        started_late_seconds=max(course.late_s for course in auto),
        step_seconds=means,
        loss=loss,
        loss_difference=max(abs(value / np.interp(at, samples, losses) - 1) for at, value in common),
        load_per_core=load_per_core(),
    )


def show(figures: Figures, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(figures)))
        return
    off, auto = figures.step_seconds["off"], figures.step_seconds["auto"]
    taus = f"{figures.tau_seconds[0] * 1e3:.4g} ms" + (
        ", the same at all peers" if figures.tau_equal else " and others"
    )
    print(f"tau {taus}, from the latencies of {figures.tables} peers")
    print(f"a step takes {auto * 1e3:.0f} ms instead of {off * 1e3:.0f}, {figures.drop_rate:.1%} dropped")
    print(
        f"effective speed-up {figures.speedup:.3f}; the rule expected {figures.expected_speedup:.3f}, and "
        f"{figures.carried_out_speedup:.3f} when micro-batches that were begun are finished"
    )
    print(f"loss against samples: apart by at most {figures.loss_difference:.1%}")
    if figures.load_per_core > BUSY:
        print(f"This machine is busy ({figures.load_per_core:.1f} processes a core): sleeps end late, measure again.")


def _losses(courses: list[Course]) -> list[tuple[int, float]]:
    """All trainers hold the same model: the loss of the first one, by what all of them computed."""
    completed = np.cumsum(np.sum([[len(step) for step in course.computed_s] for course in courses], axis=0))
    return [(int(count) * SAMPLES, loss) for count, loss in zip(completed, courses[0].losses, strict=True)]


class Problem:
    """Logistic regression with some labels flipped: convex, with noisy gradients."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._truth = np.random.default_rng(seed).normal(size=FEATURES) / 4
        self._held_out = self._draw(np.random.default_rng((seed, 1)), 2048)

    def _draw(self, rng: np.random.Generator, samples: int) -> tuple[Floats, Floats]:
        x = rng.normal(size=(samples, FEATURES))
        return x, np.where(rng.random(samples) < 1 / (1 + np.exp(-x @ self._truth)), 1.0, -1.0)

    def sleeps(self, trainer: int, steps: int) -> Floats:
        """How long each micro-batch of each step takes."""
        rng = np.random.default_rng((self._seed, 2, trainer))
        return MICRO_BATCH_S * (1.0 + authors_noise(rng, (steps, MICRO_BATCHES)))

    def gradient(self, model: Floats, trainer: int, step: int, micro_batch: int) -> Floats:
        x, y = self._draw(np.random.default_rng((self._seed, 3, trainer, step, micro_batch)), SAMPLES)
        pull: Floats = y / (1 + np.exp(y * (x @ model)))
        return -pull @ x / SAMPLES

    def loss(self, model: Floats) -> float:
        x, y = self._held_out
        return float(np.log1p(np.exp(-y * (x @ model))).mean())


def _train(socket: Path, number: int, peers: int, steps: int, problem: Problem) -> dict[str, Course]:
    courses = {mode: Course() for mode in MODES}
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(Daemon(socket))
        sessions: dict[str, str] = {}
        for mode in MODES:
            opening = pb.OpenSessionRequest(
                name=mode,
                tensors=[pb.Tensor(name="gradient", shape=[FEATURES], data_type=pb.DATA_TYPE_FLOAT64)],
                min_peers=peers,
                joining=pb.JOINING_CONTRIBUTE,
            )
            sessions[mode] = stack.enter_context(daemon.session(opening, AVERAGE_TIMEOUT_S * steps))
            daemon.set_compute_budget(
                pb.SetComputeBudgetRequest(
                    session_id=sessions[mode],
                    micro_batches=MICRO_BATCHES,
                    normalise=pb.NORMALISE_COMPUTED,
                    off=mode == "off",
                )
            )
        for step, sleeps in enumerate(problem.sleeps(number, steps)):
            for mode in MODES:
                course = courses[mode]
                start = time.perf_counter()
                gradient = _step(course, sleeps, partial(problem.gradient, course.model, number, step))
                computed_at = time.perf_counter()
                course.budget, mean = _average(daemon, sessions[mode], gradient, course.computed_s[-1])
                course.exchange_s.append(time.perf_counter() - computed_at)
                course.took_s.append(time.perf_counter() - start)
                course.model = course.model - LEARNING_RATE * mean
                course.losses.append(problem.loss(course.model) if number == 0 else 0.0)
    return courses


def _step(course: Course, sleeps: Floats, gradient_of: Callable[[int], Floats]) -> Floats:
    """The mean gradient over the micro-batches that tau leaves time for; the first one always is computed."""
    gradient, tau_s = np.zeros(FEATURES), course.budget.tau_seconds or np.inf
    computed_s: list[float] = []
    start = last = time.perf_counter()
    for micro_batch, sleep_s in enumerate(sleeps):
        if computed_s and last - start > tau_s:
            break
        began = time.perf_counter()
        if computed_s:
            course.late_s = max(course.late_s, began - start - tau_s)
        gradient += gradient_of(micro_batch)
        time.sleep(max(0.0, last + sleep_s - time.perf_counter()))
        now = time.perf_counter()
        computed_s.append(now - last)
        last = now
    course.computed_s.append(computed_s)
    return gradient / len(computed_s)


def _average(
    daemon: Daemon, session_id: str, gradient: Floats, computed_s: list[float]
) -> tuple[pb.ComputeBudget, Floats]:
    start = pb.AverageStart(session_id=session_id, timeout_seconds=AVERAGE_TIMEOUT_S, micro_batch_seconds=computed_s)
    requests = [
        pb.AverageRequest(start=start),
        pb.AverageRequest(chunk=pb.VectorChunk(offset=0, data=gradient.tobytes())),
    ]
    receipt, result = pb.Receipt(), b""
    with daemon.average(requests, 2 * AVERAGE_TIMEOUT_S) as responses:
        for response in responses:
            match response.WhichOneof("message"):
                case "receipt":
                    receipt = response.receipt
                case "chunk":
                    result += response.chunk.data
    if receipt.outcome != pb.OUTCOME_COMPLETE:
        raise Failure(ExitCode.FAILED, f"averaging {receipt.epoch} of the bench was not complete: {receipt.why}")
    return receipt.budget, np.frombuffer(result, np.float64)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

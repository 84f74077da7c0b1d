"""`moshpitd bench packet-loss --part training`: eight peers learn digits while packets are lost, each by itself.

Digits are scikit-learn's, 64 pixels to 512 hidden units to 10 classes; a step is one of SGD on a batch of each peer's
own shard. Two ways: *averaging*, in which all make their step and then average what they hold; and *owners*, in which
each member owns a span for good: gradients come in, the span goes out as absolute values. The control sends increments
of the span instead: what is lost of those is lost for ever. Knows the daemon's machines on paper
(simulation/lossy_rounds.py), so that the same batches meet every loss. Does not know daemons or time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.lossy_reduce import Part
from moshpitd.averaging.vector import Vector
from moshpitd.cli.failure import ExitCode, Failure
from moshpitd.simulation.lossy_rounds import LossyRounds

PEERS, HIDDEN, CLASSES, PIXELS, BATCH = 8, 512, 10, 64, 32
RATE = np.float32(0.2)
EVERY = 10
"""Steps between two looks."""

Tensors = Mapping[str, npt.NDArray[np.float32]]
Digits = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
"""Pixels (n, 64) between 0 and 1, labels (n,)."""


@dataclass(slots=True)
class Course:
    """One run."""

    way: str
    codec: str
    loss: float
    """Of packets."""
    losses: list[float] = field(default_factory=list)
    """Cross-entropy over all digits of the mean of all models, now and then."""
    own: list[float] = field(default_factory=list)
    """... of each peer's own model, in the mean."""
    apart: list[float] = field(default_factory=list)
    """E |th_i - th_j|^2 an element, over all pairs."""
    growth: float = 0.0
    """Of that: the last quarter's by the second quarter's."""
    off: float = 0.0
    """The final loss of peers' own models against that of the same run without lost packets, as a share of it."""
    perplexity_off: float = 0.0
    """The same of exp(loss)."""


WAYS = (("averaging", "float32"), ("owners", "float32"), ("owners", "flash4"))
INCREMENTS = "increments"


def train(losses: Sequence[float], *, steps: int, seed: int) -> list[Course]:
    """Every way at every loss, then the control where packets are lost at all. Raises Failure without scikit-learn."""
    digits = _digits(seed)
    runs = [(way, codec, loss) for way, codec in WAYS for loss in losses]
    runs += [(INCREMENTS, "float32", loss) for loss in losses if loss]
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # heard at the processes' start: they have the cores already
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        learning = [pool.submit(_course, digits, way, codec, loss, steps, seed) for way, codec, loss in runs]
        courses = [each.result() for each in learning]
    for course in courses:
        way = "owners" if course.way == INCREMENTS else course.way
        whole = next(c for c in courses if (c.way, c.codec, c.loss) == (way, course.codec, 0.0))
        course.off = course.own[-1] / whole.own[-1] - 1
        course.perplexity_off = float(np.exp(course.own[-1] - whole.own[-1])) - 1
    return courses


def _digits(seed: int) -> Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        way_out = "install it (pip install 'moshpitd[demo]'), or choose other parts with --part"
        raise Failure(ExitCode.FAILED, f"the digits are scikit-learn's, which is not installed: {way_out}") from error
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    return (pixels[order] / 16).astype(np.float32), labels[order].astype(np.int64)


def _course(digits: Digits, way: str, codec: str, loss: float, steps: int, seed: int) -> Course:
    course = Course(way, codec, loss)
    rng = np.random.default_rng([seed, 1])
    models = [Vector.of(_fresh(np.random.default_rng([seed, 2]))) for _ in range(PEERS)]
    layout = models[0].layout
    rounds = LossyRounds(layout, PEERS, loss, np.random.default_rng([seed, 3]), codec=codec)
    shards = list(zip(*(np.array_split(each, PEERS) for each in digits), strict=True))
    step_of = _averaging if way == "averaging" else _owners(increments=way == INCREMENTS)
    for step in range(steps):
        gradients: list[Vector] = []
        for model, (pixels, labels) in zip(models, shards, strict=True):
            batch = rng.integers(len(labels), size=BATCH)
            gradients.append(Vector.of(_gradient(_tensors(model), pixels[batch], labels[batch])))
        models = step_of(rounds, models, gradients)
        if step % EVERY == EVERY - 1:
            every = np.stack([model.elements(0, layout.elements) for model in models])
            mean = Vector(layout, every.mean(axis=0, dtype=np.float64).astype(np.float32).view(np.uint8))
            course.losses.append(_loss(_tensors(mean), *digits))
            course.own.append(float(np.mean([_loss(_tensors(model), *digits) for model in models])))
            course.apart.append(float(2 * every.var(axis=0, ddof=1).mean()))
    _, second, _, last = np.array_split(course.apart, 4)
    course.growth = float(last.mean() / second.mean()) if second.mean() else 0.0
    return course


# ---- the ways


def _averaging(rounds: LossyRounds, models: list[Vector], gradients: list[Vector]) -> list[Vector]:
    """Everybody makes its step, then all average what they hold."""
    layout = models[0].layout
    for model, gradient in zip(models, gradients, strict=True):
        held = model.elements(0, layout.elements)
        held -= RATE * gradient.elements(0, layout.elements)
    results = [Vector.empty(layout) for _ in models]
    rounds.play(models, results)
    return results


def _owners(*, increments: bool) -> Callable[[LossyRounds, list[Vector], list[Vector]], list[Vector]]:
    """Each owner makes the step of its span with the gradients that reached it, and tells the others.

    What an owner holds of its span is exact; what the others are told went through the codec."""
    owned: list[Vector] = []

    def step(rounds: LossyRounds, models: list[Vector], gradients: list[Vector]) -> list[Vector]:
        layout = models[0].layout
        owned[:] = owned or [Vector(layout, model.buffer.copy()) for model in models]
        means = [Vector.zeros(layout) for _ in models]
        rounds.play(gradients, means, part=Part.SCATTER)
        given: list[Vector] = []
        for rank, (model, mean) in enumerate(zip(models, means, strict=True)):
            start, stop = rounds.group.spans[rank : rank + 2]
            told = Vector.zeros(layout) if increments else Vector(layout, model.buffer.copy())
            if stop > start:
                move = -RATE * mean.elements(start, stop)
                mine = owned[rank].elements(start, stop)
                mine += move
                told.elements(start, stop)[:] = move if increments else mine
            given.append(told)
        results = [Vector.empty(layout) for _ in models]
        rounds.play(given, results, part=Part.GATHER)
        if increments:
            for model, result in zip(models, results, strict=True):
                moved = result.elements(0, layout.elements)
                moved += model.elements(0, layout.elements)
        return results

    return step


# ---- the network


def _fresh(rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    return {
        "hidden.bias": np.zeros(HIDDEN, np.float32),
        "hidden.weight": (rng.standard_normal((PIXELS, HIDDEN)) / np.sqrt(PIXELS)).astype(np.float32),
        "output.bias": np.zeros(CLASSES, np.float32),
        "output.weight": (rng.standard_normal((HIDDEN, CLASSES)) / np.sqrt(HIDDEN)).astype(np.float32),
    }


def _tensors(model: Vector) -> Tensors:
    return {name: values.astype(np.float32, copy=False) for name, values in model.arrays().items()}


def _forward(model: Tensors, pixels: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], ...]:
    hidden = np.tanh(pixels @ model["hidden.weight"] + model["hidden.bias"])
    scores = hidden @ model["output.weight"] + model["output.bias"]
    likely = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, likely / likely.sum(axis=1, keepdims=True)


def _gradient(
    model: Tensors, pixels: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.floating]]:
    hidden, off = _forward(model, pixels)
    off[np.arange(len(labels)), labels] -= 1
    off /= len(labels)
    by_hidden = (off @ model["output.weight"].T) * (1 - hidden**2)
    return {
        "hidden.bias": by_hidden.sum(axis=0),
        "hidden.weight": pixels.T @ by_hidden,
        "output.bias": off.sum(axis=0),
        "output.weight": hidden.T @ off,
    }


def _loss(model: Tensors, pixels: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    _, likely = _forward(model, pixels)
    return float(-np.log(likely[np.arange(len(labels)), labels] + 1e-12).mean())

"""Compressors through real daemons: a problem that tells them apart, round times on slow links, a network that learns.

Knows trainers that average gradients: all of a swarm in this process, a thread each. Does not know how rows are chosen.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

import moshpit_client
from moshpit_client import ArcTopK
from tests.benchmarks.figures import Figure, Goal, Measured, WrongResult
from tests.benchmarks.namespaces import Rate, shaped_net
from tests.benchmarks.rivals import Unavailable
from tests.benchmarks.swarm import Swarm, Training, running, training

Floats = npt.NDArray[np.floating]
PATIENCE_S = 300.0
"""For one averaging: a thousand follow each other, and a machine may stand still in one of them."""
Tensors = dict[str, npt.NDArray[np.float32]]


class Trainers:
    """One session a daemon; all average at once."""

    def __init__(self, sessions: Sequence[moshpit_client.Session], tensors: Sequence[Tensors]) -> None:
        self._sessions = sessions
        self._tensors = tensors
        self._pool = ThreadPoolExecutor(len(sessions))
        self.bytes_sent = 0
        self.notes: list[tuple[int, str]] = []
        """(step, what the compressor said)."""
        self._step = 0

    def mean(self, given: Sequence[Mapping[str, Floats]]) -> Tensors:
        """What everybody gets. Raises WrongResult when some get something else."""
        for tensors, values in zip(self._tensors, given, strict=True):
            for name, value in values.items():
                tensors[name][...] = value
        receipts = list(self._pool.map(lambda session: session.average(timeout=PATIENCE_S), self._sessions))
        for receipt in receipts:
            if receipt.outcome != "complete":
                raise WrongResult(f"step {self._step}: {receipt.outcome}: {receipt.why}")
        first = self._tensors[0]
        if any(not np.array_equal(first[name], other[name]) for other in self._tensors for name in first):
            raise WrongResult(f"step {self._step}: peers hold different results")
        self.bytes_sent += sum(receipt.bytes.sent for receipt in receipts)
        self.notes += [(self._step, note) for note in receipts[0].notes]
        self._step += 1
        return first


@contextlib.contextmanager
def averaging(swarm: Swarm, like: Mapping[str, Floats], **options: object) -> Iterator[Trainers]:
    """A trainer at each daemon of the swarm."""
    with contextlib.ExitStack() as stack:
        count = len(swarm.daemons)
        tensors = [{name: np.zeros(each.shape, np.float32) for name, each in like.items()} for _ in range(count)]
        sessions = [
            stack.enter_context(
                stack.enter_context(moshpit_client.connect(daemon.socket)).open_session(
                    its,
                    min_peers=count,
                    **options,  # type: ignore[arg-type]
                )
            )
            for daemon, its in zip(swarm.daemons, tensors, strict=True)
        ]
        yield Trainers(sessions, tensors)


# ---- the problem


CAMPS, BLOCKS, BLOCK, DRAWN = 10, 200, 10, 150
RATE, SHARE, RANK = 0.002, 0.05, 2
STEPS, STEPS_QUICK = 1000, 100
AT = 10
"""Distances are noted so often."""
STUCK_MIN, ARC_MAX, DENSE_MAX = 0.045, 0.004, 0.002
ROW = 128
"""Of the daemon's compressor: each block has one to itself."""
LINK_MEGABYTES, LINK_ROUNDS, LINK_ROUNDS_QUICK = 16.0, 4, 2
LINK_PEERS = 4
OVERHEAD_MAX = 1.25
"""Of what the bytes alone would take: the sketch costs a group more, and both stages a little of the machine."""


def measure_arc(*, quick: bool) -> Measured:
    """The authors' problem, and round times at 50 Mbit/s. Raises Unavailable."""
    steps = STEPS_QUICK if quick else STEPS
    courses: dict[str, list[float]] = {}
    with running(CAMPS) as swarm:
        like = {"w": np.zeros((BLOCKS, ROW))}
        plain = ArcTopK(ratio=SHARE, rank=RANK, feedback="ef21m", eta=0.5, warmup=0)
        with averaging(swarm, like, name="dense") as trainers:
            courses["dense"] = _descend(trainers, steps, _momentum())
        with averaging(swarm, like, name="arc", compressor=plain) as trainers:
            courses["ARC-Top-K"] = _descend(trainers, steps, lambda gradients: gradients)
            notes = trainers.notes
        with averaging(swarm, like, name="local") as trainers:
            courses["each its own top rows"] = _descend(trainers, steps, _local_rows())
    figures = [
        Figure("arc", "distance, dense", courses["dense"][-1], "", *_goal(quick, Goal.AT_MOST, DENSE_MAX)),
        Figure("arc", "distance, ARC-Top-K", courses["ARC-Top-K"][-1], "", *_goal(quick, Goal.AT_MOST, ARC_MAX)),
        Figure(
            "arc",
            "distance, each its own top rows",
            courses["each its own top rows"][-1],
            "",
            *_goal(quick, Goal.AT_LEAST, STUCK_MIN),
        ),
    ]
    if [step for step, _ in notes] != [0]:
        raise WrongResult(f"all was sent in steps {notes}, and should have been in the first only")
    details: dict[str, object] = {"every": AT, "distances": courses}
    missing: list[str] = []
    try:
        times = {name: _link_s(compressor, quick) for name, compressor in (("dense", "dense"), ("arc", _usual().name))}
    except Unavailable as error:
        missing.append(f"50 Mbit/s: {error}")
    else:
        formula = _usual().ratio + _usual().rank / ROW
        ratio = times["arc"] / times["dense"]
        note = f"{times['arc']:.2f} s against {times['dense']:.2f} s; mu + r/m is {formula:.3f}"
        what = f"50 Mbit/s, {LINK_MEGABYTES:g} MB: ARC by dense"
        figures.append(Figure("arc", what, ratio, "x", Goal.AT_MOST, OVERHEAD_MAX * formula, note))
        details["seconds at 50 Mbit/s"] = times
    return Measured(tuple(figures), details, tuple(missing))


def _goal(quick: bool, goal: Goal, target: float) -> tuple[Goal | None, float | None]:
    return (None, None) if quick else (goal, target)


def _usual() -> ArcTopK:
    return ArcTopK(ratio=0.2, rank=4, feedback="ef21m", eta=0.1, warmup=0)


def _descend(
    trainers: Trainers, steps: int, send: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> list[float]:
    """Distances to the optimum. Two camps of peers: 150 blocks that draw each camp its own way, and cancel; one that
    all share, which has to move because of them; 49 that nobody moves."""
    optimum = np.zeros((BLOCKS, BLOCK))
    optimum[DRAWN] = (1 - 500) / 26
    camp = np.repeat([1.0, -1.0], CAMPS // 2)[:, None, None]
    rng, w = np.random.default_rng(0), np.zeros((BLOCKS, BLOCK))
    distances = [float(np.linalg.norm(w - optimum))]
    for step in range(steps):
        gradients = 0.001 * rng.standard_normal((CAMPS, BLOCKS, BLOCK))
        off = w[:DRAWN] - camp * (100 + 5 * w[DRAWN])
        gradients[:, :DRAWN] += off / DRAWN
        gradients[:, DRAWN] += w[DRAWN] - 1 - 5 * (camp * off).sum(axis=1) / DRAWN
        given = np.zeros((CAMPS, BLOCKS, ROW))
        given[:, :, :BLOCK] = send(gradients)
        w = w - RATE * trainers.mean([{"w": one} for one in given])["w"][:, :BLOCK]
        if step % AT == AT - 1:
            distances.append(float(np.linalg.norm(w - optimum)))
    return distances


def _momentum() -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    h = np.zeros((CAMPS, BLOCKS, BLOCK))

    def send(gradients: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        h[:] = (h + gradients) / 2
        return h

    return send


def _local_rows() -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """EF21M with the largest rows of each peer's own: what the others could make of what it has sent so far."""
    h, own = np.zeros((CAMPS, BLOCKS, BLOCK)), np.zeros((CAMPS, BLOCKS, BLOCK))

    def send(gradients: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        h[:] = (h + gradients) / 2
        rows = np.argsort(-((h - own) ** 2).sum(axis=2), axis=1)[:, : round(SHARE * BLOCKS)]
        peers = np.arange(CAMPS)[:, None]
        own[peers, rows] = h[peers, rows]
        return own

    return send


def _link_s(compressor: str, quick: bool) -> float:
    """Median seconds of an averaging once it is under way. Raises Unavailable."""
    how = Training(int(LINK_MEGABYTES * 1e6) // (4 * ROW) * ROW, hop="zero copy", compressor=compressor, row=ROW)
    with (
        shaped_net([Rate.MBIT_50] * LINK_PEERS) as places,
        running(LINK_PEERS, places=places) as swarm,
        training(swarm, how) as trainers,
    ):
        trainers.step()  # all is sent
        counted = [trainers.step() for _ in range(LINK_ROUNDS_QUICK if quick else LINK_ROUNDS)]
    for steps in counted:
        if len({step.crc for step in steps}) > 1:
            raise WrongResult("peers hold different results")
        if notes := steps[0].receipt.notes:
            raise WrongResult(f"all was sent: {notes}")
    return statistics.median(max(step.receipt.seconds.total for step in steps) for steps in counted)


# ---- a network that learns


PEERS, HIDDEN, BATCH = 8, 256, 32
LEARNING_RATE = np.float32(0.3)
LEARNING_STEPS, LEARNING_STEPS_QUICK = 400, 60
OFF_MAX = 2.0
"""Percent of the final loss."""
WAYS: dict[str, dict[str, object]] = {
    "float32": {},
    "flash4 + EF14": {"codec": "flash4", "feedback": "ef14"},
    "ARC-Top-K + EF21M": {"compressor": ArcTopK(ratio=0.2, rank=4, feedback="ef21m", eta=0.5, warmup=0)},
}


def measure_training(*, quick: bool) -> Measured:
    """Digits, 64 pixels to 256 to 10 classes, by 8 daemons. Raises Unavailable."""
    shards = _shards()
    steps = LEARNING_STEPS_QUICK if quick else LEARNING_STEPS
    courses: dict[str, dict[str, object]] = {}
    figures: list[Figure] = []
    with running(PEERS) as swarm:
        for number, (name, options) in enumerate(WAYS.items()):
            network = _network()
            with averaging(swarm, network, name=f"way {number}", **options) as trainers:
                losses = _learn(trainers, network, shards, steps)
            courses[name] = {"losses": losses, "bytes_sent": trainers.bytes_sent, "notes": trainers.notes}
            figures.append(Figure("training", f"final loss, {name}", losses[-1], "", note=f"{steps} steps"))
    plain = courses["float32"]
    for name, course in list(courses.items())[1:]:
        off = 100 * abs(course["losses"][-1] / plain["losses"][-1] - 1)  # type: ignore[index]
        less = plain["bytes_sent"] / course["bytes_sent"]  # type: ignore[operator]
        figures.append(
            Figure("training", f"{name}: final loss off float32's", off, "%", *_goal(quick, Goal.AT_MOST, OFF_MAX))
        )
        figures.append(Figure("training", f"{name}: bytes, times fewer than float32", less, "x"))
    return Measured(tuple(figures), {"every": AT, "courses": courses})


def _shards() -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """scikit-learn's digits, sorted and dealt out so that every peer has some classes more than others."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise Unavailable("the digits are scikit-learn's: pip install 'moshpitd[demo]'") from error
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = np.argsort(labels + 4 * rng.random(len(labels)), kind="stable")[: len(labels) // PEERS * PEERS]
    return [((pixels[o] / 16).astype(np.float32), labels[o].astype(np.int64)) for o in np.split(order, PEERS)]


def _network() -> Tensors:
    rng = np.random.default_rng(0)
    return {
        "hidden.bias": np.zeros(HIDDEN, np.float32),
        "hidden.weight": rng.normal(0, 64**-0.5, (64, HIDDEN)).astype(np.float32),
        "output.bias": np.zeros(10, np.float32),
        "output.weight": rng.normal(0, HIDDEN**-0.5, (HIDDEN, 10)).astype(np.float32),
    }


def _learn(
    trainers: Trainers,
    network: Tensors,
    shards: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]],
    steps: int,
) -> list[float]:
    """The loss over all shards, every AT steps. All have the same network: what is averaged are gradients."""
    draws = [np.random.default_rng([1, peer]) for peer in range(PEERS)]
    everything = np.concatenate([pixels for pixels, _ in shards]), np.concatenate([labels for _, labels in shards])
    losses = [_loss(network, *everything)]
    for step in range(steps):
        gradients = []
        for (pixels, labels), draw in zip(shards, draws, strict=True):
            batch = draw.integers(len(labels), size=BATCH)
            gradients.append(_gradient(network, pixels[batch], labels[batch]))
        mean = trainers.mean(gradients)
        for name, values in network.items():
            values -= LEARNING_RATE * mean[name]
        if step % AT == AT - 1:
            losses.append(_loss(network, *everything))
    return losses


def _forward(network: Tensors, pixels: Floats) -> tuple[Floats, Floats]:
    hidden = np.tanh(pixels @ network["hidden.weight"] + network["hidden.bias"])
    scores = hidden @ network["output.weight"] + network["output.bias"]
    likely = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, likely / likely.sum(axis=1, keepdims=True)


def _gradient(network: Tensors, pixels: Floats, labels: npt.NDArray[np.int64]) -> dict[str, Floats]:
    hidden, by_score = _forward(network, pixels)
    by_score[np.arange(len(labels)), labels] -= 1
    by_score /= len(labels)
    by_hidden = (by_score @ network["output.weight"].T) * (1 - hidden**2)
    return {
        "hidden.bias": by_hidden.sum(axis=0),
        "hidden.weight": pixels.T @ by_hidden,
        "output.bias": by_score.sum(axis=0),
        "output.weight": hidden.T @ by_score,
    }


def _loss(network: Tensors, pixels: Floats, labels: npt.NDArray[np.int64]) -> float:
    _, likely = _forward(network, pixels)
    return float(-np.log(likely[np.arange(len(labels)), labels] + 1e-12).mean())

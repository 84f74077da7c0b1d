"""What lossy rounds are worth on paper: how far estimates lean and scatter, how far members drift apart.

Bias is judged by whole rounds of the daemon's reducer, drift by its jobs, which are what a round does to values; both
by sampling, so that each figure comes with what sampling alone would show. Does not know time or sockets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.lossy_reduce import Entry, apply_cut, estimate_cut
from moshpitd.averaging.names import Rank
from moshpitd.averaging.partition import Piece
from moshpitd.averaging.ranges import Cut, Slots, encode_ranges, range_elements
from moshpitd.averaging.unbiased import Form
from moshpitd.averaging.vector import Floats, Layout, TensorSpec, Vector
from moshpitd.averaging.weighted_mean import scaled_weights
from moshpitd.simulation.lossy_rounds import LossyRounds

FLOAT32 = codec_named("float32")
RANGES = 4096
"""Of one round: a trial each."""
MEMBERS = 8
SETTLED = 20
"""Rounds until what members began with no longer shows."""


@dataclass(frozen=True, slots=True)
class Bias:
    """Estimates of one owner, against the mean of all."""

    trials: int
    bias: float
    """The distance of their mean from it, by norm, as a share of it."""
    floor: float
    """What the noise of so many trials alone would show."""
    naive: float
    """Of the mean of what arrived."""
    noise: float
    """Root of the mean square of one estimate's error, as a share of the peers' spread."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far two members are apart: E |th_i - th_j|^2 an element, by the variance of what a step adds."""

    loss: float
    steps: int
    drift: float
    growth: float
    """What a straight line through it rises from first to last, as a share of it; 0: it does not grow."""
    growth_error: float
    """Standard error of that."""
    samples: list[float]
    """Means over equal stretches of all steps, for a picture."""


def bias(
    losses: Sequence[float], weights: Sequence[float], *, mean: float, spread: float, rounds: int, seed: int
) -> Bias:
    """Of owner 0, who hears the others over links that lose so much: what links lose is learnt on the way. Elements of
    a range are as many worlds, their values drawn once, normally; ranges are trials."""
    rng = np.random.default_rng(seed)
    members = len(weights)
    elements = range_elements(FLOAT32, np.dtype(np.float32))
    layout = Layout.of([TensorSpec("w", (RANGES * elements,), "float32")])
    by_link = np.zeros((members, members))
    by_link[1:, 0] = losses
    group = LossyRounds(
        layout, members, by_link, rng, weights=weights, one_owner=True, chunk_bytes=4 * RANGES * elements
    )
    world = (mean + spread * rng.standard_normal((members, elements))).astype(np.float32)
    values = [Vector.of({"w": np.tile(each, RANGES)}) for each in world]
    results = [Vector.empty(layout) for _ in range(members)]
    share = (np.asarray(weights) / math.fsum(weights))[:, None]
    # Sums, not products of matrices: those wake up a thread for every core.
    exact = (share * world).sum(axis=0)
    total, squares, naive = np.zeros(elements), np.zeros(elements), np.zeros(elements)
    for _ in range(rounds):
        group.play(values, results)
        estimates = results[0].elements(0, layout.elements).reshape(RANGES, elements).astype(np.float64)
        total += estimates.sum(axis=0)
        squares += ((estimates - exact) ** 2).sum(axis=0)
        arrived = np.vstack([np.ones(RANGES), rng.random((members - 1, RANGES)) >= np.asarray(losses)[:, None]])
        heard = arrived * share
        naive += ((heard / heard.sum(axis=0)).sum(axis=1)[:, None] * world).sum(axis=0)
    trials = rounds * RANGES
    size = float(np.linalg.norm(exact))
    return Bias(
        trials,
        float(np.linalg.norm(total / trials - exact)) / size,
        math.sqrt(float(squares.sum())) / trials / size,
        float(np.linalg.norm(naive / trials - exact)) / size,
        math.sqrt(float((squares / trials).mean() / world.var(axis=0, ddof=1).mean())),
    )


def least_noise(loss: float) -> float:
    """Of the best rule for equal links and weights there is, as `Bias.noise` counts: linear in what arrived, alike for
    all who were heard, without lean, and exact where all arrived or all hold the same.

    With r of m others heard such a rule is own (1/N - d_r) + heard mean (m/N + d_r), where d_m = 0 and d_r is 0 in the
    mean over r. Its variance is least where d_r = (l - c_r) / (1 + 1/r), c_r = (m/N) (1/r - 1/m), with l such that the
    mean is 0. Ours has all d_r = 0, which needs no knowledge of the loss. A range nobody was heard of is repaired.
    """
    m, n = MEMBERS - 1, MEMBERS
    r = np.arange(1, m + 1)
    chance = np.array([math.comb(m, k) * (1 - loss) ** k * loss ** (m - k) for k in r])
    c = m / n * (1 / r - 1 / m)
    moves = np.where(r < m, chance / (1 + 1 / r), 0.0)
    d = np.where(r < m, ((moves * c).sum() / moves.sum() - c) / (1 + 1 / r), 0.0)
    return math.sqrt(float((chance * (d**2 * (1 + 1 / r) + 2 * d * c + m / n * c)).sum()))


def drift_from_owner(loss: float, *, steps: int, seed: int, ranges: int = 64, increments: bool = False) -> Drift:
    """Two receivers of an owner that stays, whose values move by 1 a step. `increments`: the control, in which it
    sends how they moved."""
    rng = np.random.default_rng(seed)
    cut = _cut(ranges)
    size = cut.piece.stop
    owner = np.zeros(size, np.float32)
    held = [np.zeros(size, np.float32) for _ in range(2)]
    apart = np.empty(steps)
    for step in range(steps):
        moved = rng.standard_normal(size, np.float32)
        owner += moved
        slots = _slots(cut, moved if increments else owner)
        for receiver in range(2):
            arrived = rng.random(ranges) >= loss
            output = np.empty_like(owner)
            kept = np.zeros_like(owner) if increments else held[receiver]
            apply_cut(cut, slots, arrived, kept, output)
            held[receiver] = held[receiver] + output if increments else output
        apart[step] = float(((held[0] - held[1]) ** 2).mean())
    return _drift(loss, apart)


def drift_of_group(loss: float, *, steps: int, seed: int, ranges: int = 16) -> Drift:
    """Members that average all they have, each one's values moving by 1 a step. All spans are alike: one is looked
    at."""
    rng = np.random.default_rng(seed)
    cut = _cut(ranges)
    weight = scaled_weights([1.0] * MEMBERS)[0]
    held = np.zeros((MEMBERS, cut.piece.stop), np.float32)
    apart = np.empty(steps)
    everything = np.ones(ranges, np.bool_)
    for step in range(steps):
        held += rng.standard_normal(held.shape, np.float32)
        after = np.empty_like(held)
        arrived = rng.random((MEMBERS, ranges)) >= loss
        entries = [
            Entry(Rank(rank), rank, weight, loss, _slots(cut, held[rank]), arrived[rank]) for rank in range(1, MEMBERS)
        ]
        own = Entry(Rank(0), 0, weight, 0.0, None, everything)
        made = estimate_cut(cut, [own, *entries], held[0], after[0], FLOAT32.average, Form.DIFFERENCE)
        slots = Slots(cut, FLOAT32.average)
        for packets in made.packets:
            slots.put(packets)
        for rank in range(1, MEMBERS):
            apply_cut(cut, slots, (rng.random(ranges) >= loss) & made.known, held[rank], after[rank])
        held = after
        apart[step] = float(2 * held.var(axis=0, ddof=1).mean())
    return _drift(loss, apart)


def _cut(ranges: int) -> Cut:
    """Short ranges: all elements of one meet the same fate."""
    elements = 8
    return Cut(Piece(0, 0, ranges * elements, "float32", Rank(0)), 0, ranges, elements)


def _slots(cut: Cut, values: Floats) -> Slots:
    slots = Slots(cut, FLOAT32.contribution)
    for packets in encode_ranges(FLOAT32.contribution, cut, values, 0, cut.count):
        slots.put(packets)
    return slots


def _drift(loss: float, apart: npt.NDArray[np.float64]) -> Drift:
    settled = apart[SETTLED:]
    stretches = np.array([each.mean() for each in np.array_split(settled, 100)])
    at = np.linspace(-0.5, 0.5, len(stretches))
    rise = float((at * stretches).sum() / (at * at).sum())
    left = stretches - stretches.mean() - rise * at
    error = math.sqrt(float((left * left).sum()) / (len(at) - 2) / float((at * at).sum()))
    mean = float(settled.mean())
    return Drift(loss, len(apart), mean, rise / mean, error / mean, [float(each) for each in stretches])

"""What a compute budget is worth, on paper: latencies are drawn, tau is found by the swarm's rule and judged.

Knows the noise of DropCompute's authors. Does not know sessions: tau is found from the first steps, as a swarm would,
and judged on the others.

Two figures are told. The *expected* speed-up is the rule's own: it leaves out the micro-batches that would end after
tau and the time they take. Carried out, a trainer asks before each micro-batch and finishes the one it is in: it
computes more, and a step ends when the slowest of those ends. So less is gained, the more so the larger the swarm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.compute_budget import LEARN_DEFAULT, best_tau, carried_out, expected

Floats = npt.NDArray[np.float64]

PEERS_DEFAULT = 8
STEPS_JUDGED = 300
COLUMN = (2, 4, 8, 16, 32, 64, 100, 200)
NOISE_MEAN = 0.5
NOISE_MAX = 11.0
"""Of the authors' noise, in its means."""


@dataclass(frozen=True, slots=True)
class DropComputeOptions:
    """A swarm and its trainers."""

    peers: int = PEERS_DEFAULT
    micro_batches: int = 12
    """Of a step."""
    micro_batch_s: float = 0.01
    """Of a micro-batch without noise."""
    noise: float = NOISE_MEAN
    """What is added to it in the mean, in micro-batches."""
    exchange_s: float = 0.03
    """What a step takes beside its micro-batches: averaging, the optimizer."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Worth:
    """What a budget is worth to a swarm of so many."""

    peers: int
    tau_s: float
    """As learnt from 45 steps."""
    step_s: float
    """A step without a budget."""
    expected_speedup: float
    expected_drop_rate: float
    speedup: float
    """Carried out."""
    drop_rate: float
    best_speedup: float
    """Expected of the best tau for the steps that are judged: what 45 steps have not taught."""


def worth(options: DropComputeOptions, peers: int) -> Worth:
    """Draw steps, find tau, judge it."""
    rng = np.random.default_rng((options.seed, peers))
    shape = (LEARN_DEFAULT + STEPS_JUDGED, peers, options.micro_batches)
    extra = authors_noise(rng, shape) * (options.noise / NOISE_MEAN)
    steps = list(options.micro_batch_s * (1.0 + extra))
    learnt, judged = steps[:LEARN_DEFAULT], steps[LEARN_DEFAULT:]
    tau_s = best_tau(learnt, options.exchange_s).tau_s
    [speedup], [drop_rate] = expected(judged, np.array([tau_s]), options.exchange_s)
    real = carried_out(judged, tau_s, options.exchange_s)
    return Worth(
        peers=peers,
        tau_s=tau_s,
        step_s=float(np.mean([step.sum(axis=1).max() for step in judged])) + options.exchange_s,
        expected_speedup=float(speedup),
        expected_drop_rate=float(drop_rate),
        speedup=real.speedup,
        drop_rate=real.drop_rate,
        best_speedup=best_tau(judged, options.exchange_s).speedup,
    )


def authors_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """What the authors add to a micro-batch, in micro-batches: half of a bounded log-normal whose mean is about 1, its
    standard deviation about 1.2, one in a hundred above 6."""
    return NOISE_MEAN * np.minimum(np.exp(rng.normal(-0.5, 1.0, shape)), NOISE_MAX)

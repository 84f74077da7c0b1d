"""How long a warm swarm of 8 takes to form its groups, as the receipts of all peers and rounds tell it."""

from __future__ import annotations

from tests.benchmarks.figures import Figure, Goal, Measured, quantile
from tests.benchmarks.swarm import Training, running, training

PEERS = 8
AVERAGINGS = 50
AVERAGINGS_QUICK = 15
WARM_UP = 3
"""Averagings in which daemons still dial each other."""
ELEMENTS = 1024
TARGETS_MS = {0.5: 50.0, 0.99: 250.0}
PLANS: dict[str, tuple[str, ...]] = {"one group": (), "2x4": ("--grid", "2x4")}


def measure(*, quick: bool) -> Measured:
    """One flat group, then a grid of two rounds an averaging."""
    averagings = AVERAGINGS_QUICK if quick else AVERAGINGS
    figures: list[Figure] = []
    details: dict[str, object] = {}
    for name, flags in PLANS.items():
        with running(PEERS, *flags) as swarm, training(swarm, Training(ELEMENTS)) as trainers:
            matched_ms: list[float] = []
            whole_ms: list[float] = []
            for turn in range(WARM_UP + averagings):
                steps = trainers.step()
                trainers.check(steps, [1.0] * PEERS)
                if turn >= WARM_UP:
                    matched_ms += [1e3 * each.seconds.matchmaking for step in steps for each in step.receipt.rounds]
                    whole_ms.append(1e3 * (max(s.ended for s in steps) - min(s.began for s in steps)))
        for share, target in TARGETS_MS.items():
            note = f"{averagings} averagings, {len(matched_ms)} receipts' rounds"
            label = f"{name}: p{100 * share:g} of matchmaking"
            figures.append(Figure("matchmaking", label, quantile(matched_ms, share), "ms", Goal.AT_MOST, target, note))
        figures.append(Figure("matchmaking", f"{name}: median of a whole averaging", quantile(whole_ms, 0.5), "ms"))
        details[name] = {"matchmaking_ms": matched_ms, "averaging_ms": whole_ms}
    return Measured(tuple(figures), details)

"""A whole step, matching and data: 8 peers, 16 MB of float32, groups of 4, one round; beside hivemind's. And the
exact mean of all 8, in two rounds of one averaging.

Both are measured alike: every peer and every trainer has processes of its own, all are released at one moment, a step
lasts until the last of them has its result. Ours uses whichever transport it takes by itself; neither copies values to
and from arrays outside the memory it averages from (the local hop has a benchmark of its own). A 2x4 grid with one
round an averaging changes its axis every time: only the averagings in groups of 4 are compared.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict

from tests.benchmarks.contest import Ours, Way, contestants, take_turns
from tests.benchmarks.figures import Figure, Goal, Measured
from tests.benchmarks.rivals import HIVEMIND

PEERS = 8
GROUP_SIZE = 4
MEGABYTES = 16.0
TURNS, ROUNDS = 6, 3
TURNS_QUICK = 2
TIMES_FASTER = 5.0
EXACT = "moshpitd exact"


def measure(*, quick: bool) -> Measured:
    """Ours alone, and said so, where hivemind cannot be installed."""
    way = Way(None)
    with contestants(PEERS, (way,), (HIVEMIND,), group_size=GROUP_SIZE, flags=("--grid", "2x4")) as (found, missing):
        (one_round,) = (each for each in found if isinstance(each, Ours))
        exact = one_round.beside(EXACT, rounds=None)
        try:
            samples, dropped = take_turns(
                [*found, exact], MEGABYTES, turns=TURNS_QUICK if quick else TURNS, rounds=ROUNDS
            )
        finally:
            exact.close()
    whole = {name: [each.whole_s for each in its] for name, its in samples.items()}
    ours = statistics.median(whole[way.name])
    figures: list[Figure] = []
    if HIVEMIND.name in whole:
        theirs = statistics.median(whole[HIVEMIND.name])
        note = f"median of {len(whole[way.name])} steps in groups of {GROUP_SIZE} against {len(whole[HIVEMIND.name])}"
        name = "whole step, times faster than hivemind"
        figures.append(Figure("whole_step", name, theirs / ours, "x", Goal.AT_LEAST, TIMES_FASTER, note))
        name = "exact mean of 8 in two rounds, times faster than two steps of hivemind"
        figures.append(Figure("whole_step", name, 2 * theirs / statistics.median(whole[EXACT]), "x"))
    for name, each in whole.items():
        spread = f"{min(each):.3f} to {max(each):.3f}"
        what = "exact mean of 8, two rounds" if name == EXACT else f"{name}: median of a step"
        figures.append(Figure("whole_step", what, statistics.median(each), "s", note=spread))
    for what, parts in (
        ("matchmaking", [each.matchmaking_s for each in samples[way.name]]),
        ("reduce", [each.data_s for each in samples[way.name]]),
        ("trainer to daemon and back", [each.hop_s for each in samples[way.name]]),
    ):
        median = statistics.median(part for part in parts if part is not None)
        figures.append(Figure("whole_step", f"moshpitd: {what}, slowest peer, median", median, "s"))
    details = {name: [asdict(each) for each in its] for name, its in samples.items()}
    return Measured(tuple(figures), {"samples": details}, tuple(missing + dropped))

"""One group's all-reduce of float32: 2, 4 and 8 peers, 4 to 256 MB, beside torch.distributed's Gloo and hivemind.

What is compared is the same for all: the slowest peer's time from a group that is bound to its result. Ours is the
receipt's `reduce`, agreement on the result included; Gloo's is the `all_reduce` call; hivemind's is what follows its
matchmaking. Gloo does not divide by the number of peers, and nobody may die in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from tests.benchmarks.contest import Sample, Way, contestants, take_turns
from tests.benchmarks.figures import Figure, Goal, Measured
from tests.benchmarks.rivals import GLOO, HIVEMIND

WAYS = (Way("grpc"), Way("tcp"), Way("tcp", "bfloat16"))
PEERS, PEERS_QUICK = (2, 4, 8), (4,)
PLAN = {4.0: (3, 4), 16.0: (3, 3), 64.0: (5, 2), 256.0: (3, 1)}
"""Megabytes: (turns, counted rounds a turn)."""
PLAN_QUICK = {64.0: (3, 2)}
LARGE_PEERS_MAX = 4
"""256 MB on more of them do not fit beside the others in this memory."""
LARGE = 256.0
HEADLINE = (4, 64.0)
GOALS = {
    ("moshpitd grpc", "Gloo"): 0.5,
    ("moshpitd grpc", "hivemind"): 4.5,
    ("moshpitd tcp", "Gloo"): 0.95,
    ("moshpitd tcp", "hivemind"): 9.0,
    ("moshpitd tcp bfloat16", "Gloo"): 1.2,
}
"""Times faster, at HEADLINE."""


def measure(*, quick: bool) -> Measured:
    """Ours alone, and said so, where others cannot be installed."""
    figures: list[Figure] = []
    missing: list[str] = []
    details: dict[str, object] = {}
    for peers in PEERS_QUICK if quick else PEERS:
        with contestants(peers, WAYS, (GLOO, HIVEMIND)) as (contesting, absent):
            missing += absent
            for megabytes, (turns, rounds) in (PLAN_QUICK if quick else PLAN).items():
                if megabytes == LARGE and peers > LARGE_PEERS_MAX:
                    continue
                samples, dropped = take_turns(contesting, megabytes, turns=turns, rounds=rounds)
                missing += dropped
                figures += _figures(peers, megabytes, samples)
                details[f"{peers} peers, {megabytes:g} MB"] = {
                    name: [asdict(each) for each in its] for name, its in samples.items()
                }
    return Measured(tuple(figures), details, tuple(dict.fromkeys(missing)))


def _figures(peers: int, megabytes: float, samples: Mapping[str, Sequence[Sample]]) -> list[Figure]:
    """Every one of ours against every rival, then all medians; at HEADLINE also the processor time."""
    what = f"{peers} peers, {megabytes:g} MB"
    data = {name: statistics.median(each.data_s for each in its) for name, its in samples.items()}
    ours = [name for name in data if name.startswith("moshpitd")]
    figures: list[Figure] = []
    for name in ours:
        for rival in (GLOO.name, HIVEMIND.name):
            if rival not in data:
                continue
            target = GOALS.get((name, rival)) if (peers, megabytes) == HEADLINE else None
            note = f"medians of {len(samples[name])} and {len(samples[rival])} rounds, taking turns"
            goal = Goal.AT_LEAST if target else None
            ratio = data[rival] / data[name]
            figures.append(
                Figure("all_reduce", f"{what}: {name}, times faster than {rival}", ratio, "x", goal, target, note)
            )
    for name, median in data.items():
        each = [sample.data_s for sample in samples[name]]
        note = f"{min(each):.3f} to {max(each):.3f}"
        figures.append(Figure("all_reduce", f"{what}: {name}", median, "s", note=note))
    if (peers, megabytes) == HEADLINE:
        gigabytes = peers * megabytes / 1e3
        for name, its in samples.items():
            cpu = statistics.mean(sample.cpu_s for sample in its) / gigabytes
            note = "all peers' processor seconds of a step, by the bytes they average"
            figures.append(Figure("all_reduce", f"{what}: {name}, processor", cpu, "s/GB", note=note))
    return figures

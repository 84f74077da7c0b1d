"""A whole step, matching and data: 8 peers, 16 MB of float32, groups of 4, one round; beside hivemind's.

Both are measured alike: every peer and every trainer has processes of its own, all are released at one moment, a step
lasts until the last of them has its result. Blocks of both alternate in one run, so that whatever else the machine does
falls on both; only one of the two is running at any time. A 2x4 grid with one round an averaging changes its axis every
time: only the averagings in groups of 4 are compared.
"""

from __future__ import annotations

import statistics
from collections import defaultdict

from tests.benchmarks import hivemind_environment
from tests.benchmarks.figures import Figure, Goal, Measured
from tests.benchmarks.hivemind_environment import HivemindUnavailable
from tests.benchmarks.swarm import running, training

PEERS = 8
GROUP_SIZE = 4
MEGABYTES = 16.0
BLOCKS, STEPS = 3, 6
BLOCKS_QUICK, STEPS_QUICK = 1, 4
"""Steps: in groups of 4, a block."""
WARM_UP = 2
TIMES_FASTER = 3.0


def measure(*, quick: bool) -> Measured:
    """Ours alone, and said so, where hivemind cannot be installed."""
    blocks, steps = (BLOCKS_QUICK, STEPS_QUICK) if quick else (BLOCKS, STEPS)
    missing: list[str] = []
    environment = None
    try:
        environment = hivemind_environment.make_environment()
    except HivemindUnavailable as error:
        missing.append(f"hivemind: {error}")
    ours: dict[int, list[float]] = defaultdict(list)
    parts: dict[str, list[float]] = defaultdict(list)
    theirs: list[float] = []
    versions = ""
    for _ in range(blocks):
        _measure_ours(steps, ours, parts)
        if environment is None:
            continue
        try:
            report = hivemind_environment.measure(
                environment, peers=PEERS, group_size=GROUP_SIZE, megabytes=MEGABYTES, rounds=steps
            )
        except HivemindUnavailable as error:
            missing.append(f"hivemind: {error}")
            environment = None
            continue
        versions = f"hivemind {report.hivemind}, torch {report.torch}"
        theirs += [round_.seconds for round_ in report.whole_rounds()]
    mine = statistics.median(ours[GROUP_SIZE])
    figures = []
    if theirs:
        other = statistics.median(theirs)
        note = f"median of {len(ours[GROUP_SIZE])} steps in groups of {GROUP_SIZE} against {len(theirs)}, {versions}"
        name = "whole step, times faster than hivemind"
        figures.append(Figure("whole_step", name, other / mine, "x", Goal.AT_LEAST, TIMES_FASTER, note))
        figures.append(Figure("whole_step", "hivemind: median of a step", other, "s"))
    spread = f"{min(ours[GROUP_SIZE]):.3f} to {max(ours[GROUP_SIZE]):.3f}"
    figures.append(Figure("whole_step", "moshpitd: median of a step", mine, "s", note=spread))
    figures += [
        Figure("whole_step", f"moshpitd: {name}, median", statistics.median(samples), "s")
        for name, samples in parts.items()
    ]
    return Measured(tuple(figures), {"moshpitd_s": ours, "parts_s": parts, "hivemind_s": theirs}, tuple(missing))


def _measure_ours(steps: int, seconds: dict[int, list[float]], parts: dict[str, list[float]]) -> None:
    """One block: by size of group the seconds of each step; for groups of 4 also what the receipts say of them."""
    elements = int(MEGABYTES * 1e6) // 4
    with running(PEERS, "--grid", "2x4") as swarm, training(swarm, elements=elements, rounds=1) as trainers:
        for turn in range(WARM_UP + 2 * steps):
            taken = trainers.step()
            trainers.check_groups(taken)
            if turn < WARM_UP:
                continue
            (size,) = {len(step.receipt.rounds[0].members) for step in taken}
            seconds[size].append(max(step.ended for step in taken) - min(step.began for step in taken))
            if size == GROUP_SIZE:
                parts["matchmaking"] += [step.receipt.seconds.matchmaking for step in taken]
                parts["reduce"] += [step.receipt.seconds.reduce for step in taken]
                parts["trainer to daemon and back"] += [
                    step.ended - step.began - step.receipt.seconds.total for step in taken
                ]

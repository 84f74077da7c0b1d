"""What the way between a trainer and its daemon adds to a step, at 64 and 256 MB: values placed in shared memory and
read there, copied into it and back, or streamed over the socket.

Two peers, so that a daemon and its trainer have one of two cores to themselves. The step without the hop is the
receipt's `total`, by the daemon's own clock; the hop is what the trainer waited beyond it. The three take turns on the
same daemons. A memcpy of the same vector, between two arrays that were touched before, is the measure of a copy.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from contextlib import ExitStack

import numpy as np

from tests.benchmarks.figures import Figure, Goal, Measured
from tests.benchmarks.swarm import Hop, Training, running, training

PEERS = 2
MEGABYTES, MEGABYTES_QUICK = (64.0, 256.0), (256.0,)
TURNS, TURNS_QUICK = 6, 3
WARM_UP = 1
PERCENT_MAX: dict[Hop, float] = {"zero copy": 5.0, "copied": 15.0, "streamed": 150.0}
"""Of the step without it, at PROMISED_MB."""
PROMISED_MB = 256.0
COPIES = 9


def measure(*, quick: bool) -> Measured:
    """Whichever transport the daemons take by themselves."""
    figures: list[Figure] = []
    details: dict[str, object] = {}
    for megabytes in MEGABYTES_QUICK if quick else MEGABYTES:
        elements = int(megabytes * 1e6) // 4
        copy_s = memcpy_seconds(elements)
        added: dict[Hop, list[float]] = defaultdict(list)
        hop_s: dict[Hop, list[float]] = defaultdict(list)
        with running(PEERS) as swarm, ExitStack() as stack:
            ways = {
                hop: stack.enter_context(training(swarm, Training(elements, rounds=1, hop=hop, name=hop)))
                for hop in PERCENT_MAX
            }
            for turn in range(WARM_UP + (TURNS_QUICK if quick else TURNS)):
                for hop, trainers in ways.items():
                    steps = trainers.step()
                    if turn < WARM_UP:
                        trainers.check(steps, [1.0] * PEERS)
                        continue
                    # The worst of both: where one waits for the other's values, it is that one's hop that is long.
                    each = [(step.ended - step.began, step.receipt.seconds.total) for step in steps]
                    added[hop].append(max(100 * (whole - inside) / inside for whole, inside in each))
                    hop_s[hop].append(max(whole - inside for whole, inside in each))
        for hop, most in PERCENT_MAX.items():
            goal, target = (Goal.AT_MOST, most) if megabytes == PROMISED_MB else (None, None)
            seconds = statistics.median(hop_s[hop])
            note = f"{seconds:.4f} s, {seconds / copy_s:.1f} times a memcpy of the vector"
            median = statistics.median(added[hop])
            figures.append(
                Figure("local_hop", f"{megabytes:g} MB: {hop}, adds to the step", median, "%", goal, target, note)
            )
        note = f"{megabytes / 1e3 / copy_s:.1f} GB/s"
        figures.append(Figure("local_hop", f"{megabytes:g} MB: memcpy", copy_s, "s", note=note))
        details[f"{megabytes:g} MB"] = {"added_percent": added, "hop_s": hop_s, "memcpy_s": copy_s}
    return Measured(tuple(figures), details)


def memcpy_seconds(elements: int) -> float:
    """Of so many float32, warm, one core; the median."""
    source, target = np.ones(elements, np.float32), np.ones(elements, np.float32)
    taken: list[float] = []
    for _ in range(COPIES):
        began = time.perf_counter()
        np.copyto(target, source)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)

"""Averaging over links of known speed: how much of the line it uses, and what one slow peer of four costs.

Four peers in network namespaces whose uplinks are shaped. Plain sockets that move the same bytes all-to-all show, in
the same run, what the net allows. The share of a line counts the bytes that an all-reduce cannot do without, 2(n-1)/n
of the vector a peer, against the nominal rate.

With a slow uplink the first averaging of a daemon that knows no rates splits the vector equally; later ones may know
better. `best_time` is what the best split would take, by bisection: it shares nothing with the daemon's own.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict

from tests.benchmarks.contest import Sample, Way, contestants, take_turns
from tests.benchmarks.figures import Figure, Goal, Measured
from tests.benchmarks.namespaces import TCP_PAYLOAD, Rate, shaped_net
from tests.benchmarks.plain_tcp import PlainTcp, plain_tcp
from tests.benchmarks.swarm import Step, Training, Transport, running, training

PEERS = 4
WAYS = (Way("grpc"), Way("tcp"))
MEGABYTES = {Rate.MBIT_100: 16.0, Rate.GBIT_1: 64.0}
TURNS, ROUNDS, TURNS_QUICK, ROUNDS_QUICK = 3, 2, 1, 2
OF_PLAIN_MIN, OF_NOMINAL_MIN = 95.0, 92.0
SLOW_NET = (Rate.GBIT_1, Rate.GBIT_1, Rate.GBIT_1, Rate.MBIT_100)
SLOW = SLOW_NET.index(Rate.MBIT_100)
SLOW_MEGABYTES = 32.0
LEARNING, LEARNT = 4, 3
"""Rounds: after the first so many are not counted, then so many are."""
OF_BEST_MAX = 1.3


def measure(*, quick: bool) -> Measured:
    """Shares of two lines. Raises Unavailable."""
    figures: list[Figure] = []
    details: dict[str, object] = {}
    missing: list[str] = []
    for rate, megabytes in MEGABYTES.items():
        with (
            shaped_net([rate] * PEERS) as places,
            plain_tcp(places) as plain,
            contestants(PEERS, WAYS, (), places=places) as (contesting, absent),
        ):
            turns, rounds = (TURNS_QUICK, ROUNDS_QUICK) if quick else (TURNS, ROUNDS)
            samples, dropped = take_turns([*contesting, plain], megabytes, turns=turns, rounds=rounds)
        missing += absent + dropped
        details[f"{rate.mbit} Mbit/s"] = {name: [asdict(each) for each in its] for name, its in samples.items()}
        figures += _shares(rate, megabytes, samples)
    return Measured(tuple(figures), details, tuple(dict.fromkeys(missing)))


def _shares(rate: Rate, megabytes: float, samples: dict[str, list[Sample]]) -> list[Figure]:
    figures: list[Figure] = []
    line_s = 2 * (PEERS - 1) / PEERS * megabytes * 1e6 / rate.bytes_per_s
    seconds = {name: statistics.median(each.data_s for each in its) for name, its in samples.items()}
    for name, median in seconds.items():
        of_nominal, of_plain = 100 * line_s / median, 100 * seconds[PlainTcp.name] / median
        what, note = f"{rate.mbit} Mbit/s: {name}", f"{megabytes:g} MB, median {median:.3f} s"
        is_ours = name != PlainTcp.name
        goal, target = (Goal.AT_LEAST, OF_NOMINAL_MIN) if is_ours and rate == Rate.GBIT_1 else (None, None)
        figures.append(Figure("links", f"{what}, of the line", of_nominal, "%", goal, target, note))
        if is_ours:
            goal, target = (Goal.AT_LEAST, OF_PLAIN_MIN) if rate == Rate.MBIT_100 else (None, None)
            figures.append(Figure("links", f"{what}, of plain TCP", of_plain, "%", goal, target, note))
    return figures


def measure_slow_peer(*, quick: bool) -> Measured:
    """One uplink ten times slower than the others'. Raises Unavailable."""
    figures: list[Figure] = []
    details: dict[str, object] = {}
    best_s = best_time([rate.bytes_per_s * TCP_PAYLOAD for rate in SLOW_NET], SLOW_MEGABYTES * 1e6)
    for way in WAYS:
        slow, equal, learnt = _slow_rounds(way.transport, 1 if quick else LEARNT)
        equal_s = _seconds(equal)
        learnt_s = statistics.median(_seconds(each) for each in learnt)
        held = f"the slow one reduces {_span_of(slow, learnt[-1]):.1%}, at first {_span_of(slow, equal):.1%}"
        what = f"one slow peer of four, {way.name}"
        goal = (Goal.AT_MOST, OF_BEST_MAX)
        figures += [
            Figure(
                "slow_peer", f"{what}: rounds that know rates, by the best split", learnt_s / best_s, "x", *goal, held
            ),
            Figure("slow_peer", f"{what}: first round, by the best split", equal_s / best_s, "x"),
            Figure("slow_peer", f"{what}: first round, by those that know rates", equal_s / learnt_s, "x"),
        ]
        details[way.name] = {"first_s": equal_s, "later_s": [_seconds(each) for each in learnt], "best_s": best_s}
    figures.append(Figure("slow_peer", "best split, computed", best_s, "s", note=f"{SLOW_MEGABYTES:g} MB"))
    return Measured(tuple(figures), details)


def _slow_rounds(transport: Transport | None, counted: int) -> tuple[str, list[Step], list[list[Step]]]:
    """The slow peer, the first averaging of fresh daemons, and so many once they had time to learn."""
    how = Training(int(SLOW_MEGABYTES * 1e6) // 4, rounds=1, hop="zero copy")
    with (
        shaped_net(SLOW_NET) as places,
        running(PEERS, transport=transport, places=places) as swarm,
        training(swarm, how) as trainers,
    ):
        first = trainers.step()
        trainers.check_groups(first)
        for _ in range(LEARNING):
            trainers.step()
        learnt = [trainers.step() for _ in range(counted)]
        trainers.check_groups(learnt[-1])
        return trainers.peer_ids[SLOW], first, learnt


def _seconds(steps: Sequence[Step]) -> float:
    return max(step.receipt.seconds.reduce for step in steps)


def _span_of(peer: str, steps: Sequence[Step]) -> float:
    """The share of the vector that it reduces."""
    spans = steps[0].receipt.rounds[0].spans
    return sum(s.stop - s.start for s in spans if s.reducer == peer) / sum(s.stop - s.start for s in spans)


def best_time(uplinks: Sequence[float], size: float) -> float:
    """Seconds of an all-reduce of so many bytes over uplinks of so many bytes a second with the best spans.

    A peer with share f of the vector sends the rest to others and its average to each of them: (1 + (n-2) f) vectors.
    """
    low, high = size / min(uplinks), len(uplinks) * size / min(uplinks)
    for _ in range(60):
        middle = (low + high) / 2
        room = sum(min(1.0, (middle * rate / size - 1) / (len(uplinks) - 2)) for rate in uplinks)
        low, high = (low, middle) if room >= 1 else (middle, high)
    return high

"""A reducer is killed in the middle of the data of a round: what the survivors hold, and when; beside hivemind's.

Eight daemons in one group, 64 MB of float32 each. A clean round first, for the data time. Then SIGKILL to one daemon
in the midst of it. Every span must be averaged, the dead one's own values may be missing in some,
and where they are the receipt must say so: anything else is a wrong result, not a slow one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

from tests.benchmarks.figures import Figure, Goal, Measured, WrongResult
from tests.benchmarks.rivals import HivemindKill, Unavailable, measure_hivemind_kill
from tests.benchmarks.swarm import ERROR_MAX, START_TIMEOUT_S, Daemon, Step, Trainers, Training, running, training

PEERS = 8
MEGABYTES = 64.0
VICTIM = 3
MOMENTS, MOMENTS_QUICK = (0.2, 0.4, 0.6), (0.3,)
"""Of the clean data time, since the victim began to reduce: contributions travel first, averages towards the end."""
ROUNDS = 4
"""Clean ones before it."""
TRIES = 8
SECONDS_MORE_MAX = 2.0
"""Promised: from the kill, beyond the data time of a clean round."""


def measure(*, quick: bool) -> Measured:
    """Ours alone, and said so, where hivemind cannot be installed. Raises WrongResult."""
    kills = [_kill_ours(moment) for moment in (MOMENTS_QUICK if quick else MOMENTS)]
    after = [seconds for _, seconds, _ in kills]
    more = max(seconds - data for data, seconds, _ in kills)
    missing = ", ".join(f"{100 * share:.0f} %" for _, _, share in kills)
    note = f"worst of {len(kills)} kills, all spans averaged, same bits at all survivors"
    figures = [
        Figure(
            "failover",
            "last survivor, from the kill, less the data time",
            more,
            "s",
            Goal.AT_MOST,
            SECONDS_MORE_MAX,
            note,
        ),
        Figure(
            "failover",
            "last survivor, from the kill, median",
            statistics.median(after),
            "s",
            note=f"without the dead one's values: {missing} of the vector",
        ),
        Figure("failover", "data time of a clean round, median", statistics.median(k[0] for k in kills), "s"),
    ]
    absent: tuple[str, ...] = ()
    details: dict[str, object] = {"moshpitd_s": kills}
    try:
        theirs = measure_hivemind_kill(peers=PEERS, megabytes=MEGABYTES)
    except Unavailable as error:
        absent = (f"hivemind: {error}",)
    else:
        figures += _of_hivemind(theirs)
        details["hivemind"] = [repr(each) for each in theirs.survivors]
    return Measured(tuple(figures), details, absent)


def _kill_ours(moment: float) -> tuple[float, float, float]:
    """(data time of a clean round, seconds from the kill to the last survivor, share without the dead one's values)"""
    elements = int(MEGABYTES * 1e6) // 4
    with running(PEERS) as swarm, training(swarm, Training(elements, rounds=1)) as trainers:
        data_s = statistics.median(_clean_data_s(trainers) for _ in range(ROUNDS))
        victim = swarm.daemons[VICTIM]
        dead = trainers.peer_ids[VICTIM]
        began = len(victim.log.read_bytes())
        killed = 0.0

        def kill() -> None:
            nonlocal killed
            _await_reducing(victim, began)
            time.sleep(moment * data_s)
            victim.process.kill()
            killed = time.monotonic()

        steps = trainers.step_as_it_comes(VICTIM, kill)
        if len({step.crc for step in steps}) != 1:
            raise WrongResult("the survivors of a kill hold different bits")
        for step in steps:
            _check_receipt(step, dead, elements)
        error = trainers.span_error(0, steps[0].receipt)
        if not error <= ERROR_MAX:
            raise WrongResult(f"a survivor is off what its receipt names by {error:.2e} relative")
        without = sum(s.stop - s.start for s in steps[0].receipt.rounds[0].spans if dead not in s.contributors)
        return data_s, max(step.ended for step in steps) - killed, without / elements


def _clean_data_s(trainers: Trainers) -> float:
    """Of a round of all, tried until a busy machine lets all of them meet."""
    for _ in range(TRIES):
        steps = trainers.step_as_it_comes()
        if {step.receipt.outcome for step in steps} == {"complete"}:
            return max(step.receipt.seconds.reduce for step in steps)
    raise WrongResult(f"no averaging of {TRIES} was complete at all")


def _check_receipt(step: Step, dead: str, elements: int) -> None:
    """Everybody else is in every span; the dead one is named where it is not, and nowhere if it is in all."""
    (only,) = step.receipt.rounds
    everybody = {member.peer for member in only.members}
    absent = [everybody - set(span.contributors) for span in only.spans]
    if step.receipt.outcome not in ("partial", "complete") or sum(s.stop - s.start for s in only.spans) != elements:
        raise WrongResult(f"a survivor's round is {step.receipt.outcome}, and not all of it is averaged: {only.why}")
    if any(each - {dead} for each in absent):
        raise WrongResult("a survivor's values are missing in some span")
    if {dropped.peer for dropped in only.dropped} - {dead} or (any(absent) and step.receipt.outcome == "complete"):
        raise WrongResult(f"the receipt does not name the dead one, or others: {step.receipt.outcome}, {only.why}")


def _await_reducing(daemon: Daemon, after: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while b"reducing: group of" not in daemon.log.read_bytes()[after:]:
        if time.monotonic() > deadline:
            raise daemon.failure("did not begin to reduce")
        time.sleep(0.002)


def _of_hivemind(kill: HivemindKill) -> list[Figure]:
    """What its survivors are left with."""
    survivors = kill.survivors
    version = f"hivemind {kill.hivemind}, its defaults, {len(survivors)} survivors"
    failed = sum(each.failure is not None for each in survivors)
    different = len({each.crc for each in survivors})

    def share(parts: Iterable[float]) -> float:
        return 100 * statistics.mean(parts)

    last = max(each.seconds for each in survivors)
    return [
        Figure("failover", "hivemind: last survivor, from the kill", last, "s", note=version),
        Figure("failover", "hivemind: data time of a clean round", kill.data_seconds, "s"),
        Figure("failover", "hivemind: survivors whose step failed", failed, f"of {len(survivors)}"),
        Figure("failover", "hivemind: different results among survivors", different, "", note="ours: 1"),
        Figure(
            "failover",
            "hivemind: elements left as they were",
            share(each.own for each in survivors),
            "%",
            note="ours: 0",
        ),
        Figure(
            "failover", "hivemind: elements with the mean of all", share(each.mean_of_all for each in survivors), "%"
        ),
        Figure(
            "failover",
            "hivemind: elements with the mean of survivors",
            share(each.mean_of_survivors for each in survivors),
            "%",
        ),
        Figure("failover", "hivemind: elements with anything else", share(each.other for each in survivors), "%"),
    ]

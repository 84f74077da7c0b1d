"""What a daemon takes while rounds of 256 MB run: memory beyond what it shares with its trainer, and how late its event
loop is. And a 2 GB model among four daemons, under the name `huge`.

Memory is what the kernel calls anonymous and file-backed, watched from outside; the loop's lag is the daemon's own
histogram, so a quantile is the upper bound of its class. Trainers place their values in shared memory and read them
there.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
from collections import Counter
from collections.abc import Iterator

import psutil

from tests.benchmarks.figures import Figure, Goal, Measured
from tests.benchmarks.swarm import Step, Swarm, Training, Transport, running, training

MEGABYTES = 256.0
PEERS, PEERS_QUICK = (2, 4), (4,)
TRANSPORTS: tuple[Transport, ...] = ("grpc", "tcp")
ROUNDS, ROUNDS_QUICK = 6, 3
WATCH_S = 0.05
BEYOND_MB_MAX = 128.0
"""Promised: memory beyond the shared buffers and one span's accumulator."""
LAG_MS_MAX: dict[tuple[int, Transport], float] = {(2, "grpc"): 10, (2, "tcp"): 10, (4, "grpc"): 50, (4, "tcp"): 15}
HUGE_MEGABYTES = 2000.0
HUGE_PEERS = 4
HUGE_ROUNDS = 2
HUGE_TIMEOUT_S = 300.0


def measure(*, quick: bool) -> Measured:
    """With 2 and 4 daemons, over each transport."""
    figures: list[Figure] = []
    details: dict[str, object] = {}
    for transport in TRANSPORTS:
        for peers in PEERS_QUICK if quick else PEERS:
            how = Training(int(MEGABYTES * 1e6) // 4, rounds=1, hop="zero copy")
            with running(peers, transport=transport, metrics=True) as swarm, training(swarm, how) as trainers:
                trainers.check(trainers.step(), [1.0] * peers)
                before = _loop_lag(swarm)
                with _watching(swarm) as peaks:
                    for _ in range(ROUNDS_QUICK if quick else ROUNDS):
                        trainers.step()
                lag = _loop_lag(swarm)
                lag.subtract(before)
            what = f"{peers} daemons, {MEGABYTES:g} MB, {transport}"
            late_ms = 1e3 * _quantile(lag, 0.99)
            note = f"of {lag.total()} timers; half at most {1e3 * _quantile(lag, 0.5):g} ms"
            goal = Goal.AT_MOST
            figures += [
                _beyond(what, MEGABYTES, peers, max(peaks)),
                Figure(
                    "under_load",
                    f"{what}: event loop late, p99",
                    late_ms,
                    "ms",
                    goal,
                    LAG_MS_MAX[peers, transport],
                    note,
                ),
            ]
            details[what] = {"peak_mb": [peak / 1e6 for peak in peaks], "late_s": dict(sorted(lag.items()))}
    return Measured(tuple(figures), details)


def measure_huge(*, quick: bool) -> Measured:
    """2 GB a peer: contributions and results in shared memory, 16 GB of it. Says so where that does not fit."""
    needed = 2.2 * HUGE_PEERS * HUGE_MEGABYTES * 1e6
    room = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    free = min(psutil.virtual_memory().available, room.f_bavail * room.f_frsize if room else 0)
    if free < needed:
        what = f"{HUGE_MEGABYTES / 1e3:g} GB among {HUGE_PEERS}"
        return Measured((), missing=(f"{what}: needs {needed / 1e9:.0f} GB in /dev/shm, has {free / 1e9:.0f}",))
    how = Training(int(HUGE_MEGABYTES * 1e6) // 4, rounds=1, hop="zero copy", timeout_s=HUGE_TIMEOUT_S)
    with running(HUGE_PEERS) as swarm, training(swarm, how) as trainers, _watching(swarm) as peaks:
        rounds: list[list[Step]] = []
        for _ in range(1 if quick else HUGE_ROUNDS):
            rounds.append(trainers.step())
            trainers.check(rounds[-1], [1.0] * HUGE_PEERS)
    taken = [max(step.receipt.seconds.reduce for step in steps) for steps in rounds]
    what = f"{HUGE_PEERS} daemons, {HUGE_MEGABYTES / 1e3:g} GB, {rounds[0][0].receipt.rounds[0].transport}"
    per_s = HUGE_MEGABYTES / 1e3 / statistics.median(taken)
    figures = (
        _beyond(what, HUGE_MEGABYTES, HUGE_PEERS, max(peaks)),
        Figure("huge", f"{what}: round", statistics.median(taken), "s", note=f"{per_s:.2f} GB/s, exact, same bits"),
    )
    return Measured(figures, {"reduce_s": taken, "peak_mb": [peak / 1e6 for peak in peaks]})


def _beyond(what: str, megabytes: float, peers: int, peak: float) -> Figure:
    span_mb = megabytes / peers
    note = f"worst peak {peak / 1e6:.0f} MB, one span {span_mb:.0f} MB"
    name = f"{what}: memory beyond shared buffers and one span"
    benchmark = "huge" if megabytes == HUGE_MEGABYTES else "under_load"
    return Figure(benchmark, name, peak / 1e6 - span_mb, "MB", Goal.AT_MOST, BEYOND_MB_MAX, note)


@contextlib.contextmanager
def _watching(swarm: Swarm) -> Iterator[list[float]]:
    """The most memory of each daemon's own, in bytes, seen while the block runs."""
    peaks = [0.0] * len(swarm.daemons)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_S):
            for index, daemon in enumerate(swarm.daemons):
                with contextlib.suppress(OSError, IndexError):  # it died, which others notice
                    peaks[index] = max(peaks[index], daemon.private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


def _loop_lag(swarm: Swarm) -> Counter[float]:
    """Of all daemons together."""
    found = Counter[float]()
    for daemon in swarm.daemons:
        found.update(daemon.loop_lag())
    return found


def _quantile(lag: Counter[float], share: float) -> float:
    """The bound that at least this share does not exceed."""
    seen = 0
    for bound, count in sorted(lag.items()):
        seen += count
        if seen >= share * lag.total():
            return bound
    return float("inf")

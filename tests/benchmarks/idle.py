"""What a daemon costs while its trainer computes: memory, processor, and how soon `moshpitd status` answers."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from tests.benchmarks.figures import Figure, Goal, Measured, quantile
from tests.benchmarks.swarm import SwarmFailed, Training, running, training

PEERS = 4
SETTLE_S = 5.0
WATCH_S, WATCH_QUICK_S = 60.0, 30.0
STATUS_CALLS = 10
ELEMENTS = 1 << 16
MEGABYTES_MAX, CORE_PERCENT_MAX, STATUS_SECONDS_MAX = 100.0, 1.0, 0.3


def measure(*, quick: bool) -> Measured:
    """The worst of four daemons, each with one open session that averaged once."""
    watch_s = WATCH_QUICK_S if quick else WATCH_S
    with running(PEERS) as swarm, training(swarm, Training(ELEMENTS)) as trainers:
        trainers.check(trainers.step(), [1.0] * PEERS)
        time.sleep(SETTLE_S)  # what follows an averaging is not idleness
        processes = [psutil.Process(daemon.process.pid) for daemon in swarm.daemons]
        began, before = time.monotonic(), [_cpu_seconds(process) for process in processes]
        time.sleep(watch_s)
        watched = time.monotonic() - began
        busy = [100 * (_cpu_seconds(p) - b) / watched for p, b in zip(processes, before, strict=True)]
        megabytes = [process.memory_info().rss / 1e6 for process in processes]
        command = [sys.executable, "-m", "moshpitd", "status", "--socket", str(swarm.daemons[0].socket)]
        answers: list[float] = []
        for _ in range(STATUS_CALLS):
            began = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            answers.append(time.monotonic() - began)
            if done.returncode:
                raise SwarmFailed(f"moshpitd status: exit code {done.returncode}: {done.stderr.strip()}")
    status = quantile(answers, 0.5)
    return Measured(
        (
            Figure("idle", "resident memory", max(megabytes), "MB", Goal.AT_MOST, MEGABYTES_MAX, "worst of 4"),
            Figure("idle", f"share of a core over {watch_s:g} s", max(busy), "%", Goal.AT_MOST, CORE_PERCENT_MAX),
            Figure("idle", "moshpitd status, median of 10", status, "s", Goal.AT_MOST, STATUS_SECONDS_MAX),
        ),
        {"core_percent": busy, "megabytes": megabytes, "status_s": answers},
    )


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system

"""`make soak MINUTES=60`: a kill or a pause every 5 s, for long, while trainers average and the oracle listens.

Reports stuck calls, wrong receipts and growth. Growth is read off daemons that are paused but never killed, because a
killed one begins anew: medians of the first quarter against those of the last, after a minute of warming up. Does not
wait for the swarm to become whole between injections, only in the end.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from tests.end_to_end.chaos.fleet import Fleet
from tests.end_to_end.chaos.proxies import HOST
from tests.end_to_end.chaos.storm import Course, Storm, Trouble, storm
from tests.end_to_end.chaos.trainers import Habits

LOGS = Path(__file__).resolve().parents[3] / ".bench" / "soak"
EVERY_S = 5.0
SAMPLE_S = 5.0
SAMPLES_MIN = 8
WARM_UP_S = 60.0
UNDONE_S = (0.5, 3.0)
"""A paused or killed daemon comes back after a time between these."""
SPARED = 2
"""Daemons that are paused, never killed: their growth is what counts."""
SOAK = Course("soak", 6, ("--http", f"{HOST}:0"), Habits(rounds=1))
GROWTH_MAX = {"RSS, MB": 16.0, "descriptors": 8.0, "threads": 4.0, "tasks": 16.0}
"""Between medians of quarters; above it the soak fails."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A daemon at one moment, in the order of GROWTH_MAX."""

    at_s: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Growth:
    """One figure of one daemon."""

    daemon: int
    what: str
    medians: tuple[float, ...]
    """Of the four quarters."""
    largest: float

    @property
    def is_too_much(self) -> bool:
        return self.medians[-1] - self.medians[0] > GROWTH_MAX[self.what]


def main() -> int:
    """Parses the command line, soaks, reports; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.end_to_end.chaos.soak", description="Faults for long.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 132)
    try:
        return soak(console, seed=arguments.seed, seconds=60 * arguments.minutes)
    except Trouble as trouble:
        console.print(f"seed {arguments.seed}: {trouble}", style="bold red", markup=False)
        for note in getattr(trouble, "__notes__", ()):
            console.print(note, style="red", markup=False)
        return 1


def soak(console: Console, *, seed: int, seconds: float) -> int:
    samples: list[list[Sample]] = [[] for _ in range(SPARED)]
    begun = time.monotonic()
    with storm(SOAK, seed=seed, logs=LOGS) as running:
        kills, pauses = disturb(running, samples, seed=seed, until=begun + seconds)
        whole_after_s = running.become_whole()
    growths = [each for daemon in range(SPARED) for each in growth(daemon, samples[daemon], begun + WARM_UP_S)]
    title = f"{seconds / 60:.0f} minutes, seed {seed}: daemons that were never killed"
    table = Table(title=title, title_justify="left")
    for heading in ("daemon", "figure", "quarters", "", "", "", "largest", "allowed to grow", "verdict"):
        table.add_column(heading, justify="left" if heading in ("figure", "verdict") else "right")
    for each in growths:
        verdict = "[red]grows[/]" if each.is_too_much else "[green]steady[/]"
        figures = (f"{value:.1f}" for value in (*each.medians, each.largest, GROWTH_MAX[each.what]))
        table.add_row(str(each.daemon), each.what, *figures, verdict)
    console.print(table)
    verdicts = running.verdicts
    total = ", ".join(f"{count} {kind}" for kind, count in running.outcomes.most_common())
    console.print(
        f"{kills} kills, {pauses} pauses, {verdicts.calls} calls ({total}): {verdicts.values} results compared with "
        f"the mean that their receipts name, no objection; no call stuck, latest end {verdicts.latest_s:+.2f} s from "
        f"its deadline; whole {whole_after_s:.1f} s after the last of it.",
        markup=False,
    )
    return 1 if any(each.is_too_much for each in growths) else 0


def disturb(running: Storm, samples: Sequence[list[Sample]], *, seed: int, until: float) -> tuple[int, int]:
    """Kill or pause somebody every EVERY_S, undo it soon, sample between; (kills, pauses)."""
    rng = random.Random(seed)
    fleet = running.fleet
    kills = pauses = 0
    next_sample = time.monotonic()
    while (now := time.monotonic()) < until:
        victim = rng.randrange(len(fleet.peers))
        kill = victim >= SPARED and rng.random() < 0.5
        undo_at = now + rng.uniform(*UNDONE_S)
        if kill:
            fleet.kill(victim)
            kills += 1
        else:
            fleet.pause(victim)
            pauses += 1
        wait(running, undo_at)
        if kill:
            fleet.restart(victim)
        else:
            fleet.resume(victim)
        wait(running, now + EVERY_S)
        if time.monotonic() >= next_sample:
            next_sample = time.monotonic() + SAMPLE_S
            for daemon, series in enumerate(samples):
                series.append(sample(fleet, daemon))
    return kills, pauses


def wait(running: Storm, until: float) -> None:
    while (left := until - time.monotonic()) > 0:
        running.listen(min(left, 0.2))


def sample(fleet: Fleet, index: int) -> Sample:
    """What the kernel and the daemon itself say of it."""
    process = psutil.Process(fleet.peers[index].process.pid)
    with process.oneshot():
        kernel = (process.memory_info().rss / 1e6, float(process.num_fds()), float(process.num_threads()))
    return Sample(time.monotonic(), (*kernel, tasks(fleet, index, process)))


def tasks(fleet: Fleet, index: int, process: psutil.Process) -> float:
    """asyncio's tasks, from /metrics, at whatever port that got."""
    grpc_port = int(fleet.peers[index].address.rpartition(":")[2])
    listening = {each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    (port,) = listening - {grpc_port}
    connection = http.client.HTTPConnection(HOST, port, timeout=10.0)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return next(float(line.split()[1]) for line in lines if line.startswith("moshpitd_tasks "))


def growth(daemon: int, series: Sequence[Sample], warm_at: float) -> list[Growth]:
    """Quarter by quarter, once warm (all of it when that leaves too little)."""
    warm = [each for each in series if each.at_s >= warm_at]
    if len(warm) < SAMPLES_MIN:
        warm = list(series)
    borders = [len(warm) * quarter // 4 for quarter in range(5)]
    return [
        Growth(
            daemon,
            what,
            tuple(statistics.median(e.values[place] for e in warm[a:b]) for a, b in itertools.pairwise(borders)),
            max(each.values[place] for each in warm),
        )
        for place, what in enumerate(GROWTH_MAX)
    ]


if __name__ == "__main__":
    sys.exit(main())

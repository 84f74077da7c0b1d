"""What hivemind's survivors hold when a peer is killed in the middle of an all-reduce.

Knows hivemind and torch; does not know moshpitd. Runs as hivemind_round.py does, and prints one JSON object on its last
line:

    {"hivemind", "data_seconds", "survivors": [{"seconds", "failure", "own", "mean_of_all", "mean_of_survivors",
     "other", "crc"}]}

Peer i holds the number i in all its elements, so that each element tells what became of it. A peer is killed with all
it consists of: its averager's process, its DHT's process and that one's p2pd.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import hivemind
import hivemind_round
import torch

VICTIM = 3
MOMENT = 0.4
"""Of a clean round's data time, since the victim's group was assembled."""
MARKS = Path(tempfile.mkdtemp(prefix="hivemind-kill-"))
"""Where averagers' processes say that their group is assembled."""
STEP_TIMEOUT_S = 60.0


class MarkedAverager(hivemind_round.TimedAverager):
    """Touches a file of its process's when its group is assembled."""

    async def _aggregate_with_group(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        (MARKS / str(os.getpid())).touch()
        return await super()._aggregate_with_group(*args, **kwargs)


def descendants(pid: int) -> list[int]:
    """Of a process, itself included, by what the kernel lists."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += descendants(int(child))
    return found


def kill(averager: MarkedAverager, after: float) -> float:
    """Wait for its group, then so long, then kill all of it; the moment it was dead."""
    mark, until = MARKS / str(averager.pid), time.monotonic() + STEP_TIMEOUT_S
    while not mark.exists():
        if time.monotonic() > until:
            give_up(f"hivemind assembled no group with the victim within {STEP_TIMEOUT_S:g} s")
        time.sleep(0.002)
    time.sleep(after)
    for pid in [*descendants(averager.pid), *descendants(averager.dht.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return time.perf_counter()


def give_up(why: str) -> NoReturn:
    """Says why there is no report, and ends."""
    print(why, file=sys.stderr, flush=True)
    end(1)


def end(code: int) -> NoReturn:
    """At once: its shutdown would wait for the dead; and who reads our output waits for everybody who could write to
    it."""
    for pid in descendants(os.getpid())[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(code)


def share(values: torch.Tensor, number: float) -> float:
    """Of the elements, how many are this number up to rounding."""
    return float(torch.isclose(values, torch.tensor(number), rtol=0, atol=1e-4).double().mean())


def measure(peers: int, megabytes: float) -> dict[str, object]:
    """One clean round, one with a kill; the object described above."""
    elements = int(megabytes * 1e6) // 4
    settings = hivemind_round.Settings(min_matchmaking_time=5.0, request_timeout=3.0, step_timeout=STEP_TIMEOUT_S)
    hivemind_round.TimedAverager = MarkedAverager
    with (
        hivemind_round.dhts_of(peers) as dhts,
        hivemind_round.averagers_of(dhts, peers, elements, settings) as averagers,
        ThreadPoolExecutor(max_workers=peers + 1) as threads,
    ):
        clean = 0.0
        for _ in range(2):  # the first dials
            barrier = threading.Barrier(peers)
            steps = [threads.submit(hivemind_round.step_of, each, barrier, settings) for each in averagers]
            clean = max(step.result()[2].data_seconds or 0.0 for step in steps)
        for index, averager in enumerate(averagers):
            with averager.get_tensors() as (tensor,):
                tensor.fill_(float(index))
        for mark in MARKS.iterdir():
            mark.unlink()
        barrier = threading.Barrier(peers)
        steps = [threads.submit(hivemind_round.step_of, each, barrier, settings) for each in averagers]
        killed = threads.submit(kill, averagers[VICTIM], MOMENT * clean).result(timeout=STEP_TIMEOUT_S)
        survivors = []
        for index, averager in enumerate(averagers):
            if index == VICTIM:
                continue
            _, ended, seen = steps[index].result(timeout=2 * STEP_TIMEOUT_S)
            with averager.get_tensors() as (tensor,):
                values = tensor.clone()
            whole = sum(range(peers))
            counted = {
                "own": share(values, float(index)),
                "mean_of_all": share(values, whole / peers),
                "mean_of_survivors": share(values, (whole - VICTIM) / (peers - 1)),
            }
            survivors.append(
                {
                    "seconds": ended - killed,
                    "failure": seen.failure,
                    **counted,
                    "other": max(0.0, 1.0 - sum(counted.values())),
                    "crc": zlib.crc32(values.numpy().tobytes()),
                }
            )
        report = {"hivemind": hivemind.__version__, "data_seconds": clean, "survivors": survivors}
        print(json.dumps(report), flush=True)
        end(0)


def main() -> None:
    """Parses the command line, measures, prints the JSON."""
    parser = argparse.ArgumentParser(description="Kill one of hivemind's averagers in the middle of a round.")
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=64.0)
    arguments = parser.parse_args()
    measure(arguments.peers, arguments.megabytes)
    sys.exit("no report")


if __name__ == "__main__":
    main()

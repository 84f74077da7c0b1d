"""What one averaging costs under hivemind: several `DecentralizedAverager`s on loopback, one round after another.

Knows hivemind and torch; does not know moshpitd. It runs inside the environment that `hivemind_environment.py` makes,
as a subprocess, and prints one JSON object on its last line:

    {"hivemind", "torch", "peers", "group_size", "vector_bytes", "settings": {...},
     "rounds": [{"seconds", "data_seconds", "peer_seconds": [...], "group_sizes": [...], "failed": [...]}]}

The peers are made as hivemind's own benchmark_averaging.py makes them: one DHT with its own p2pd and one averager
process each, the initial group bits dealt out evenly so that every bucket starts full and, by hivemind's rule for the
next bits, stays full. Nothing is compressed, so the bytes on the wire are those of a float32 averaging elsewhere.

`seconds` runs from the barrier that releases all peers to the last `step` that returned: matchmaking and data.
`data_seconds` is the slowest peer's part of it between an assembled group and averaged tensors. A round in which a
peer failed or met fewer than a full group is reported with it, never left out: whoever compares decides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import hivemind
import torch


@dataclass(frozen=True)
class Settings:
    """hivemind's knobs, at the values that gave its fastest rounds without a failed one."""

    min_matchmaking_time: float
    """How long a leader waits for a group that is not full; a full one starts at once, so it is not paid here."""
    request_timeout: float
    """Must be smaller than min_matchmaking_time, or hivemind's matchmaking can deadlock."""
    step_timeout: float


@dataclass(frozen=True)
class PeerStep:
    """What one peer saw of one round; sizes and times are None where it failed."""

    seconds: float
    data_seconds: float | None
    group_size: int | None
    failure: str | None


class TimedAverager(hivemind.DecentralizedAverager):
    """An averager whose `step` also returns how long its all-reduce took. Runs in hivemind's averager process."""

    async def _aggregate_with_group(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        began = time.perf_counter()
        gathered = await super()._aggregate_with_group(*args, **kwargs)
        return {"group_size": len(gathered), "data_seconds": time.perf_counter() - began}


@contextlib.contextmanager
def averagers_of(peers: int, group_size: int, elements: int, settings: Settings) -> Iterator[list[TimedAverager]]:
    """Starts one DHT and one averager a peer; shuts all of them down in the end, whatever happened."""
    buckets = peers // group_size
    bits = int(math.log2(buckets))
    with contextlib.ExitStack() as stack:
        root = hivemind.DHT(start=True)
        stack.callback(root.shutdown)
        addresses = root.get_visible_maddrs()
        averagers = []
        for index in range(peers):
            dht = hivemind.DHT(initial_peers=addresses, start=True)
            stack.callback(dht.shutdown)
            averager = TimedAverager(
                [torch.full((elements,), float(index))],
                dht,
                prefix="benchmark",
                initial_group_bits=format(index % buckets, f"0{bits}b") if bits else "",
                target_group_size=group_size,
                min_matchmaking_time=settings.min_matchmaking_time,
                request_timeout=settings.request_timeout,
                start=True,
            )
            stack.callback(averager.shutdown)
            averagers.append(averager)
        yield averagers


def step_of(averager: TimedAverager, barrier: threading.Barrier, settings: Settings) -> tuple[float, float, PeerStep]:
    """One peer's round: the moments it began and ended, and what it saw."""
    barrier.wait(timeout=60)
    began = time.perf_counter()
    try:
        seen = averager.step(timeout=settings.step_timeout, allow_retries=False)
        failure = None if seen is not None else "step returned None"
    except Exception as error:  # hivemind raises whatever its averager process raised; here that is a measurement
        seen, failure = None, repr(error)
    ended = time.perf_counter()
    data_seconds = seen["data_seconds"] if seen else None
    group_size = seen["group_size"] if seen else None
    return began, ended, PeerStep(ended - began, data_seconds, group_size, failure)


def measure(peers: int, group_size: int, megabytes: float, rounds: int, settings: Settings) -> dict[str, object]:
    """Runs the rounds and returns the object described above."""
    elements = int(megabytes * 1e6) // 4
    report = []
    with (
        averagers_of(peers, group_size, elements, settings) as averagers,
        ThreadPoolExecutor(max_workers=peers) as threads,
    ):
        for number in range(rounds):
            barrier = threading.Barrier(peers)
            futures = [threads.submit(step_of, averager, barrier, settings) for averager in averagers]
            begins, ends, steps = zip(*(future.result() for future in futures), strict=True)
            report.append(
                {
                    "seconds": max(ends) - min(begins),
                    "data_seconds": max(step.data_seconds or 0.0 for step in steps),
                    "peer_seconds": [step.seconds for step in steps],
                    "group_sizes": [step.group_size for step in steps],
                    "failed": [step.failure for step in steps if step.failure],
                }
            )
            print(f"hivemind round {number}: {report[-1]['seconds']:.3f} s", file=sys.stderr, flush=True)
    return {
        "hivemind": hivemind.__version__,
        "torch": torch.__version__,
        "peers": peers,
        "group_size": group_size,
        "vector_bytes": elements * 4,
        "settings": asdict(settings),
        "rounds": report,
    }


def _power_of_two(text: str) -> int:
    """hivemind's group bits split the peers by halves, so only powers of two keep every bucket full."""
    number = int(text)
    if number < 1 or number & (number - 1):
        raise argparse.ArgumentTypeError(f"{number} is not a power of two, which hivemind's group bits need")
    return number


def main() -> None:
    """Parses the command line, measures, prints the JSON."""
    parser = argparse.ArgumentParser(description="Measure rounds of hivemind's DecentralizedAverager on loopback.")
    parser.add_argument("--peers", type=_power_of_two, default=8)
    parser.add_argument("--group-size", type=_power_of_two, default=4)
    parser.add_argument("--megabytes", type=float, default=16.0, help="float32 data a peer, in units of 1e6 bytes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--min-matchmaking-time", type=float, default=5.0)
    parser.add_argument("--request-timeout", type=float, default=3.0)
    parser.add_argument("--step-timeout", type=float, default=60.0)
    arguments = parser.parse_args()
    settings = Settings(arguments.min_matchmaking_time, arguments.request_timeout, arguments.step_timeout)
    report = measure(arguments.peers, arguments.group_size, arguments.megabytes, arguments.rounds, settings)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()

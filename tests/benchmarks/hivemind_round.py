"""What one averaging costs under hivemind: several `DecentralizedAverager`s on loopback, one round after another.

Knows hivemind and torch; does not know moshpitd. Runs in an environment of its own; rivals.py speaks to it.

The peers are made as hivemind's own benchmark_averaging.py makes them: one DHT with its own p2pd and one averager
process each, the initial group bits dealt out evenly so that every bucket starts full and, by hivemind's rule for the
next bits, stays full. Without `--compression` nothing is compressed, so the bytes on the wire are those of a float32
averaging elsewhere. With `--places` each peer's p2pd, through which all its traffic goes, runs in a network namespace.

`seconds` runs from the barrier that releases all peers to the last `step` that returned: matchmaking and data.
`data_seconds` is the slowest peer's part of it between an assembled group and averaged tensors. A round in which a
peer failed or met fewer than a full group is answered with `is_whole` false, never left out: whoever compares decides.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TextIO

import hivemind
import numpy as np
import torch
from hivemind.compression import CompressionBase, NoCompression, Uniform8BitQuantization, quantization

# See hivemind_codecs.py: without this its 8-bit codecs cannot decode.
quantization.int = lambda value: int(np.asarray(value).reshape(-1)[0])

COMPRESSIONS: dict[str, CompressionBase] = {"none": NoCompression(), "uniform8": Uniform8BitQuantization()}
LOSSY_ERROR_MAX = 0.05
"""Of what comes out of an 8-bit averaging, by norm."""


@dataclass(frozen=True)
class Settings:
    """hivemind's knobs, at the values that gave its fastest rounds without a failed one."""

    min_matchmaking_time: float
    """How long a leader waits for a group that is not full; a full one starts at once, so it is not paid here."""
    request_timeout: float
    """Must be smaller than min_matchmaking_time, or hivemind's matchmaking can deadlock."""
    step_timeout: float
    compression: str
    """One of COMPRESSIONS."""


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
def dhts_of(peers: int, places: list[tuple[str, str]]) -> Iterator[list[hivemind.DHT]]:
    """One a peer, in its (namespace, address) if there are any; shut down in the end, whatever happened."""
    with contextlib.ExitStack() as stack:
        dhts: list[hivemind.DHT] = []
        for index in range(peers):
            known = dhts[0].get_visible_maddrs() if dhts else []
            with inside(places[index][0]) if places else contextlib.nullcontext():
                here = {"host_maddrs": [f"/ip4/{places[index][1]}/tcp/0"]} if places else {}
                dhts.append(hivemind.DHT(initial_peers=known, start=True, **here))
            stack.callback(dhts[-1].shutdown)
        yield dhts


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Processes started here live in this network namespace; they talk to us through sockets of the file system."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(place: TextIO) -> None:
        if libc.setns(place.fileno(), 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), place.name)

    with open("/proc/self/ns/net") as ours, open(f"/var/run/netns/{namespace}") as theirs:
        enter(theirs)
        try:
            yield
        finally:
            enter(ours)


@contextlib.contextmanager
def averagers_of(
    dhts: list[hivemind.DHT], group_size: int, elements: int, settings: Settings
) -> Iterator[list[TimedAverager]]:
    """Starts one averager a peer; shuts all of them down in the end, whatever happened."""
    buckets = len(dhts) // group_size
    bits = int(math.log2(buckets))
    with contextlib.ExitStack() as stack:
        averagers = []
        for index, dht in enumerate(dhts):
            averager = TimedAverager(
                [torch.full((elements,), float(index))],
                dht,
                prefix=f"benchmark-{elements}",
                initial_group_bits=format(index % buckets, f"0{bits}b") if bits else "",
                target_group_size=group_size,
                min_matchmaking_time=settings.min_matchmaking_time,
                request_timeout=settings.request_timeout,
                compression=COMPRESSIONS[settings.compression],
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


class Peers:
    """All of them: answers what rivals.py asks."""

    def __init__(self, dhts: list[hivemind.DHT], group_size: int, settings: Settings) -> None:
        self._dhts = dhts
        self._group_size = group_size
        self._settings = settings
        self._open = contextlib.ExitStack()
        self._threads = ThreadPoolExecutor(max_workers=len(dhts))
        self._averagers: list[TimedAverager] = []

    def open(self, megabytes: float) -> dict[str, object]:
        """New averagers; the first round after it, in which they dial each other, is no one's measure."""
        self.close()
        elements = int(megabytes * 1e6) // 4
        entered = averagers_of(self._dhts, self._group_size, elements, self._settings)
        self._averagers = self._open.enter_context(entered)
        return {"version": f"hivemind {hivemind.__version__}, torch {torch.__version__}"}

    def fill(self) -> dict[str, object]:
        """Peer i's elements are all i; where they are compressed, normally distributed."""
        for index, averager in enumerate(self._averagers):
            with averager.get_tensors() as (tensor,):
                if self._settings.compression == "none":
                    tensor.fill_(float(index))
                else:
                    tensor.normal_(generator=torch.Generator().manual_seed(index))
        return {}

    def round(self) -> dict[str, object]:
        """One step of all."""
        barrier = threading.Barrier(len(self._averagers))
        futures = [self._threads.submit(step_of, each, barrier, self._settings) for each in self._averagers]
        begins, ends, steps = zip(*(future.result() for future in futures), strict=True)
        failed = [step.failure for step in steps if step.failure]
        is_whole = not failed and {step.group_size for step in steps} == {self._group_size}
        for failure in failed:
            print(failure, file=sys.stderr, flush=True)
        is_right = not is_whole or self._is_right()
        if self._settings.compression != "none":  # by its value alone nobody can tell a peer that was late
            is_whole, is_right = is_whole and is_right, True
        return {
            "seconds": max(ends) - min(begins),
            "data_seconds": max(step.data_seconds or 0.0 for step in steps),
            "is_whole": is_whole,
            "is_right": is_right,
        }

    def _is_right(self) -> bool:
        """Whether the first peer holds the mean of its group: of all, when that is one group."""
        if self._group_size != len(self._averagers):
            return True
        with self._averagers[0].get_tensors() as (tensor,):
            if self._settings.compression != "none":
                mean = torch.zeros_like(tensor)
                for index in range(len(self._averagers)):
                    mean += torch.randn(len(mean), generator=torch.Generator().manual_seed(index))
                mean /= len(self._averagers)
                error = float((tensor - mean).norm() / mean.norm())
                print(f"off by {error:.3g} of the mean's norm", file=sys.stderr, flush=True)
                return error < LOSSY_ERROR_MAX
            mean = (len(self._averagers) - 1) / 2
            return bool((tensor.min() - mean).abs() < 1e-4 and (tensor.max() - mean).abs() < 1e-4)

    def close(self) -> None:
        self._averagers = []
        self._open.close()


def _power_of_two(text: str) -> int:
    """hivemind's group bits split the peers by halves, so only powers of two keep every bucket full."""
    number = int(text)
    if number < 1 or number & (number - 1):
        raise argparse.ArgumentTypeError(f"{number} is not a power of two, which hivemind's group bits need")
    return number


def main() -> None:
    """Starts the peers, then answers line by line until its input ends."""
    parser = argparse.ArgumentParser(description="Measure rounds of hivemind's DecentralizedAverager on loopback.")
    parser.add_argument("--peers", type=_power_of_two, default=8)
    parser.add_argument("--group-size", type=_power_of_two, default=4)
    parser.add_argument("--min-matchmaking-time", type=float, default=5.0)
    parser.add_argument("--request-timeout", type=float, default=3.0)
    parser.add_argument("--step-timeout", type=float, default=60.0)
    parser.add_argument("--compression", choices=COMPRESSIONS, default="none")
    parser.add_argument("--places", default="", help="namespace:address of each peer, with commas")
    arguments = parser.parse_args()
    settings = Settings(
        arguments.min_matchmaking_time, arguments.request_timeout, arguments.step_timeout, arguments.compression
    )
    places = [tuple(place.split(":")) for place in arguments.places.split(",") if place]
    with (
        dhts_of(arguments.peers, places) as dhts,
        contextlib.closing(Peers(dhts, arguments.group_size, settings)) as peers,
    ):
        for line in sys.stdin:
            match json.loads(line):
                case {"do": "open", "megabytes": megabytes}:
                    answer = peers.open(megabytes)
                case {"do": "fill"}:
                    answer = peers.fill()
                case _:
                    answer = peers.round()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""How long announcing and looking up take over real sockets: 8, 24, 32 and 64 nodes, under loss and without.

All nodes live in this process, so the figures include every node's work on one core. What was promised is measured with
24 nodes under 3 % loss; `python -m tests.benchmarks.directory` any other number of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from moshpitd.averaging.names import key
from moshpitd.directory import Address, DatagramSocket, Directory, DirectoryConfig
from moshpitd.identity import Identity
from tests.benchmarks.figures import Figure, Goal, Measured

BODY = bytes(110)
NODES, LOSS, GROUP, SEED = 24, 0.03, 4, 1
KEYS, KEYS_QUICK = 60, 20
OTHERS, OTHERS_QUICK = (8, 32, 64), (8,)
"""Nodes, without loss."""
ANNOUNCE_P50_MS_MAX = 1500.0


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of a set of durations."""

    p50_ms: float
    p99_ms: float
    max_ms: float

    @staticmethod
    def of(seconds: list[float]) -> Quantiles:
        cuts = statistics.quantiles(seconds, n=100, method="inclusive")
        return Quantiles(round(cuts[49] * 1e3, 2), round(cuts[98] * 1e3, 2), round(max(seconds) * 1e3, 2))


@dataclass(frozen=True, slots=True)
class Observed:
    """What a run found."""

    nodes: int
    loss: float
    join_all_s: float
    announce: Quantiles
    look_up: Quantiles
    records_missed: int
    records_expected: int
    evictions: int
    silences: int
    requests: int
    retransmissions: int
    idle_core_share_per_node: float


def measure(*, quick: bool) -> Measured:
    """Announcing, looking up, and whether a lost datagram ever cost a neighbour."""
    keys = KEYS_QUICK if quick else KEYS
    found = asyncio.run(observe(NODES, LOSS, keys, GROUP, SEED, idle_s=1.0))
    note = f"{NODES} nodes, {LOSS:.0%} of datagrams dropped"
    figures: tuple[Figure, ...] = (
        Figure("directory", "announce, p50", found.announce.p50_ms, "ms", Goal.AT_MOST, ANNOUNCE_P50_MS_MAX, note),
        Figure("directory", "neighbours evicted", found.evictions, "", Goal.AT_MOST, 0),
        Figure("directory", "announce, p99", found.announce.p99_ms, "ms"),
        Figure("directory", "look up, p50", found.look_up.p50_ms, "ms"),
    )
    details: dict[str, object] = {note: asdict(found)}
    for nodes in OTHERS_QUICK if quick else OTHERS:
        found = asyncio.run(observe(nodes, 0.0, keys, GROUP, SEED, idle_s=1.0))
        details[f"{nodes} nodes"] = asdict(found)
        figures += (
            Figure("directory", f"{nodes} nodes: announce, p50", found.announce.p50_ms, "ms"),
            Figure("directory", f"{nodes} nodes: look up, p50", found.look_up.p50_ms, "ms"),
        )
    return Measured(figures, details)


async def observe(nodes: int, loss: float, keys: int, group: int, seed: int, idle_s: float) -> Observed:
    """Every key is announced by a whole group at once, then looked up by it one after another."""
    rng = random.Random(seed)
    is_lossy = False

    def drop(datagram: bytes, to: Address) -> bool:
        return is_lossy and rng.random() < loss

    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directories: list[Directory] = []
        begun = time.perf_counter()
        for index in range(nodes):
            socket = await DatagramSocket.open("127.0.0.1", 0, drop=drop)
            stack.callback(socket.close)
            if not directories:
                first = str(socket.address)
            directory = await Directory.open(
                Identity.open(scratch / str(index)),
                b"benchmark",
                socket,
                join=[first] if directories else [],
                config=DirectoryConfig(),
                rng=random.Random(seed + index),
            )
            stack.push_async_callback(directory.close)
            await directory.wait_ready()
            directories.append(directory)
        joined_s = time.perf_counter() - begun
        for _ in range(200):
            if all(len(directory.neighbours()) >= min(nodes, 21) - 1 for directory in directories):
                break
            await asyncio.sleep(0.05)

        before = resource.getrusage(resource.RUSAGE_SELF)
        await asyncio.sleep(idle_s)
        after = resource.getrusage(resource.RUSAGE_SELF)
        idle = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / idle_s / nodes

        is_lossy = True
        announced: list[float] = []
        looked_up: list[float] = []
        missed = 0

        async def announce(member: Directory, index: int) -> None:
            begun = time.perf_counter()
            await member.announce(key("benchmark", seed, index), "bench", BODY, 60.0, keep=False)
            announced.append(time.perf_counter() - begun)

        for index in range(keys):
            members = rng.sample(directories, min(group, nodes))
            await asyncio.gather(*(announce(member, index) for member in members))
            for member in members:
                begun = time.perf_counter()
                roster = await member.look_up(key("benchmark", seed, index), "bench")
                looked_up.append(time.perf_counter() - begun)
                missed += len(members) - len(roster)
        counters = [directory.counters for directory in directories]
        return Observed(
            nodes=nodes,
            loss=loss,
            join_all_s=round(joined_s, 2),
            announce=Quantiles.of(announced),
            look_up=Quantiles.of(looked_up),
            records_missed=missed,
            records_expected=keys * len(members) ** 2,
            evictions=sum(counter.evictions for counter in counters),
            silences=sum(counter.silences for counter in counters),
            requests=sum(counter.requests for counter in counters),
            retransmissions=sum(counter.retransmissions for counter in counters),
            idle_core_share_per_node=round(idle, 5),
        )


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--loss", type=float, default=LOSS, help="part of all datagrams that is dropped")
    parser.add_argument("--keys", type=int, default=KEYS)
    parser.add_argument("--group", type=int, default=GROUP, help="peers that announce under one key")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--idle", type=float, default=5.0, help="seconds to measure idleness for")
    parser.add_argument("--event-loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if arguments.event_loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        found = runner.run(
            observe(arguments.nodes, arguments.loss, arguments.keys, arguments.group, arguments.seed, arguments.idle)
        )
    if arguments.json:
        print(json.dumps(asdict(found)))
    else:
        for name, value in asdict(found).items():
            print(f"{name:26} {value}")


if __name__ == "__main__":
    main()

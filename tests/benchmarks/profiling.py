"""Where the time of one 64 MB round among four daemons goes, and what this machine's floor is.

`perf` samples the daemons while rounds run; every sample is one of `KINDS`, by the library it was in and, in the kernel
and the C library, by the function. Shares are of the daemons' processor seconds a round, which the kernel counts.
Without `perf` (or the right to use it) only the kernel's own split is told. Python functions are one kind: `py-spy` on
a daemon tells them apart.

The floor: what the same bytes take over plain sockets of four processes, which do nothing else, and what a copy and an
addition cost here.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from tests.benchmarks.figures import Figure, Measured
from tests.benchmarks.local_hop import memcpy_seconds
from tests.benchmarks.plain_tcp import plain_tcp
from tests.benchmarks.rivals import Unavailable
from tests.benchmarks.swarm import (
    HERE,
    START_TIMEOUT_S,
    Swarm,
    Training,
    Transport,
    running,
    training,
)

PEERS = 4
MEGABYTES = 64.0
WARM_UP = 3
ROUNDS, ROUNDS_QUICK = 20, 5
SAMPLES_PER_S = 997
TRANSPORTS: tuple[Transport, ...] = ("grpc", "tcp")
KINDS: tuple[tuple[str, str, str], ...] = (
    ("kernel: copying", r"kernel", r"copy|rep_movs|memcpy|iter_"),
    ("kernel: pages", r"kernel", r"clear_page|fault|folio|page|shmem|mmap|vma|zap_|unmap|memset|charge"),
    ("kernel: waiting and waking", r"kernel", r"futex|sched|switch|wake|idle|poll|epoll|select|eventfd|swait|timer"),
    ("kernel: TCP and the rest", r"kernel|vdso", r""),
    ("gRPC", r"cygrpc", r""),
    ("copying", r"libc[.-]", r"mem(move|cpy|set|cmp)"),
    ("allocating", r"libc[.-]", r"alloc|free|arena|sysmalloc|unlink_chunk|trim"),
    ("numpy", r"multiarray|_umath|ml_dtypes|openblas", r""),
    ("digests", r"xxhash|crypto|_hashlib|_sha|libz|zlib|_blake", r""),
    ("protobuf", r"_message|upb|protobuf", r""),
    ("event loop", r"uvloop|^loop\.|_asyncio", r""),
    ("Python", r"^(lib)?python", r""),
)
"""(kind, what the library's name has, what the function's has); the first that fits. Copies that gRPC's compiler made
inline count as gRPC."""
OTHER = "the rest"
ADDS = 9


def measure(*, quick: bool) -> Measured:
    """Seconds a round by kind, over each transport; then the floor."""
    figures: list[Figure] = []
    details: dict[str, object] = {}
    missing: list[str] = []
    for transport in TRANSPORTS:
        try:
            details[transport] = _profile(transport, ROUNDS_QUICK if quick else ROUNDS, figures)
        except Unavailable as error:
            missing.append(f"profile of {transport}: {error}")
    return Measured((*figures, *_floor(ROUNDS_QUICK if quick else ROUNDS)), details, tuple(missing))


def _profile(transport: Transport, rounds: int, figures: list[Figure]) -> dict[str, object]:
    """Adds its figures; returns the functions with the most samples."""
    how = Training(int(MEGABYTES * 1e6) // 4, rounds=1, hop="zero copy")
    with running(PEERS, transport=transport) as swarm, training(swarm, how) as trainers:
        for _ in range(WARM_UP):
            steps = trainers.step()
        trainers.check(steps, [1.0] * PEERS)
        before = _times(swarm)
        taken: list[float] = []
        with _sampling(swarm) as found:
            for _ in range(rounds):
                taken.append(max(step.receipt.seconds.reduce for step in trainers.step()))
        user_s, system_s = ((a - b) / rounds for a, b in zip(_times(swarm), before, strict=True))
    what = f"64 MB among {PEERS}, {transport}"
    cores = (user_s + system_s) / statistics.median(taken)
    figures += [
        Figure("profile", f"{what}: round", statistics.median(taken), "s", note=f"{cores:.2f} cores busy with daemons"),
        Figure("profile", f"{what}: all daemons, in programs", user_s, "cpu s"),
        Figure("profile", f"{what}: all daemons, in the kernel", system_s, "cpu s"),
    ]
    if not found:
        raise Unavailable("`perf` is not there or may not sample (kernel.perf_event_paranoid): no kinds, only sums")
    kinds = Counter[str]()
    for (library, function), count in found.items():
        kinds[_kind(library, function)] += count
    for kind, count in kinds.most_common():
        share = count / kinds.total()
        note = f"{share:.1%} of samples"
        figures.append(Figure("profile", f"{what}: {kind}", share * (user_s + system_s), "cpu s", note=note))
    top = [f"{count / kinds.total():.1%} {library} {function}" for (library, function), count in found.most_common(40)]
    return {"top": top, "rounds_s": taken}


def _kind(library: str, function: str) -> str:
    for kind, libraries, functions in KINDS:
        if re.search(libraries, library) and re.search(functions, function):
            return kind
    return OTHER


def _times(swarm: Swarm) -> tuple[float, float]:
    """(in programs, in the kernel): processor seconds of all daemons."""
    times = [psutil.Process(daemon.process.pid).cpu_times() for daemon in swarm.daemons]
    return sum(each.user for each in times), sum(each.system for each in times)


@contextlib.contextmanager
def _sampling(swarm: Swarm) -> Iterator[Counter[tuple[str, str]]]:
    """`perf` on the daemons while the block runs; afterwards its samples by (library, function), none where it cannot
    be had."""
    found = Counter[tuple[str, str]]()
    if shutil.which("perf") is None:
        yield found
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "samples")
        pids = ",".join(str(daemon.process.pid) for daemon in swarm.daemons)
        command = ["perf", "record", "-q", "-F", str(SAMPLES_PER_S), "-p", pids, "-o", str(file)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_TIMEOUT_S
        while process.poll() is None and not _has_begun(file) and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            yield found
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
        command = ["perf", "report", "-i", str(file), "--stdio", "-q", "--no-children", "--sort", "dso,sym"]
        command += ["-F", "sample,dso,sym", "-t", "|"]
        report = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout
        for count, library, function in re.findall(r"^\s*(\d+)\s*\|(.+?)\s*\|\[.\] (.+?)\s*$", report, re.MULTILINE):
            found[library, function] += int(count)


def _has_begun(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _floor(rounds: int) -> list[Figure]:
    """What the bytes, the additions and the copies of such a round cost here when nothing else is done."""
    elements = int(MEGABYTES * 1e6) // 4
    with plain_tcp([HERE] * PEERS) as plain:
        plain.open(MEGABYTES)
        samples = [plain.round() for _ in range(WARM_UP + rounds)][WARM_UP:]
    moved_gb = 2 * (PEERS - 1) * MEGABYTES / 1e3
    seconds = statistics.median(sample.data_s for sample in samples)
    cpu_s = statistics.median(sample.cpu_s for sample in samples)
    copy_s, add_s = memcpy_seconds(elements), _add_seconds(elements // PEERS)
    megabytes = MEGABYTES / PEERS
    what = f"floor: {PEERS} processes, all bytes of the round over plain sockets"
    return [
        Figure("profile", what, seconds, "s", note=f"{moved_gb / seconds:.2f} GB/s, all of them together"),
        Figure("profile", f"{what}, processor", cpu_s, "cpu s"),
        Figure(
            "profile", f"floor: memcpy of {MEGABYTES:g} MB", copy_s, "s", note=f"{MEGABYTES / 1e3 / copy_s:.1f} GB/s"
        ),
        Figure(
            "profile",
            f"floor: numpy adds {megabytes:g} MB in place",
            add_s,
            "s",
            note=f"{megabytes / 1e3 / add_s:.1f} GB/s",
        ),
    ]


def _add_seconds(elements: int) -> float:
    total, more = np.zeros(elements, np.float32), np.ones(elements, np.float32)
    taken: list[float] = []
    for _ in range(ADDS):
        began = time.perf_counter()
        np.add(total, more, out=total)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)

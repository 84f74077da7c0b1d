"""A network of this machine's own: one namespace a peer, each uplink shaped, gone when the block ends.

Knows `ip` and `tc`. Every namespace has one `eth0`, whose other end hangs on a bridge in a namespace apart, so that
nothing of it is seen outside; a token bucket on `eth0` is that peer's uplink, downlinks are as fast as the machine.
Needs root on Linux. Whatever still runs in a namespace when the block ends is killed; what a killed run left behind is
removed by the next.

    with shaped_net([Rate.MBIT_100] * 4) as places:
        running(4, places=places)
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from enum import Enum

from tests.benchmarks.rivals import Unavailable
from tests.benchmarks.swarm import Place

NAME = "moshpit-bench"
NETWORK = "10.77.0"
TCP_PAYLOAD = 0.956
"""Of what a line carries at an MTU of 1500: the rest is headers, and what the token bucket counts as such."""


class Rate(Enum):
    """An uplink: megabits a second, and how `tbf` gets there without bursts that hide it or queues that drop it."""

    MBIT_25 = (25, "16k", "256k")
    MBIT_50 = (50, "32k", "512k")
    MBIT_100 = (100, "32k", "512k")
    GBIT_1 = (1000, "512k", "4m")

    @property
    def mbit(self) -> int:
        return self.value[0]

    @property
    def bytes_per_s(self) -> float:
        """Nominal."""
        return self.mbit * 1e6 / 8


@contextlib.contextmanager
def shaped_net(uplinks: Sequence[Rate | None]) -> Iterator[list[Place]]:
    """So many places that see each other and nobody else; None: not shaped. Raises Unavailable, saying what it would
    need."""
    _require()
    _sweep()
    hub = f"{NAME}-{os.getpid()}-hub"
    names = [f"{NAME}-{os.getpid()}-{index}" for index in range(len(uplinks))]
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "hub", "type", "bridge")
        _ip("-n", hub, "link", "set", "hub", "up")
        places: list[Place] = []
        for index, (name, uplink) in enumerate(zip(names, uplinks, strict=True)):
            port, address = f"port{index}", f"{NETWORK}.{index + 1}"
            _ip("netns", "add", name)
            _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", hub, "link", "set", port, "master", "hub")
            _ip("-n", hub, "link", "set", port, "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up", "mtu", "1500")
            _ip("-n", name, "link", "set", "lo", "up")
            if uplink is not None:
                mbit, burst, limit = uplink.value
                shape = ("root", "tbf", "rate", f"{mbit}mbit", "burst", burst, "limit", limit)
                _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", *shape)
            places.append(Place(address, ("ip", "netns", "exec", name)))
        yield places
    finally:
        for name in (*names, hub):
            _remove(name)


def _require() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Unavailable("network namespaces and shaped links need root on Linux: run this benchmark as root")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise Unavailable(f"shaped links need {program!r}: install iproute2")


def _sweep() -> None:
    """Of runs that were killed themselves."""
    for name, pid in re.findall(rf"^({NAME}-(\d+)-\w+)", _ip("netns", "list"), re.MULTILINE):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            _remove(name)


def _remove(name: str) -> None:
    with contextlib.suppress(Unavailable):  # it was never made
        for pid in _ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", name)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout

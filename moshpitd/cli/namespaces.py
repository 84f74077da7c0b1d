"""A network of this machine's own: one namespace a peer, each uplink shaped, gone when the block ends.

Knows `ip`, `tc` and `iptables`. Every namespace has one `eth0`, whose other end hangs on a bridge in a namespace apart,
so that nothing of it is seen outside; a token bucket on `eth0` is that peer's uplink, downlinks are as fast as the
machine. Packets are lost on arrival, each by its own dice. Needs root on Linux. Whatever still runs in a namespace when
the block ends is killed; what a killed run left behind is removed by the next.

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
from dataclasses import dataclass
from enum import Enum

NAME = "moshpit-bench"
NETWORK = "10.77.0"
TCP_PAYLOAD = 0.956
"""Of what a line carries at an MTU of 1500: the rest is headers, and what the token bucket counts as such."""


class NoNamespaces(Exception):
    """This machine or its user cannot make them; the message says what it would need."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a daemon runs."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    """The words of a command line that bring its program there."""


HERE = Place()


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
def shaped_net(uplinks: Sequence[Rate | None], *, loss: float | None = None) -> Iterator[list[Place]]:
    """So many places that see each other and nobody else; None: not shaped. `loss`: the share of packets that do not
    arrive; given, also as 0, the kernel sends packet by packet, since one of its large ones would be lost as a whole.
    Raises NoNamespaces."""
    _require(("ip", "tc", *(("iptables",) if loss is not None else ())))
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
            place = Place(address, ("ip", "netns", "exec", name))
            if loss is not None:
                _ip("-n", name, "link", "set", "eth0", "gso_max_segs", "1")
            places.append(place)
        if loss:
            lose(places, loss)
        yield places
    finally:
        for name in (*names, hub):
            _remove(name)


def lose(places: Sequence[Place], loss: float) -> None:
    """From now on this share of the packets does not arrive, of a net that was made with a `loss`."""
    dice = ("-m", "statistic", "--mode", "random", "--probability", f"{loss:g}", "-j", "DROP")
    for place in places:
        _run(*place.prefix, "iptables", "-F", "INPUT")
        if loss:
            _run(*place.prefix, "iptables", "-A", "INPUT", "-i", "eth0", *dice)


def _require(programs: Sequence[str]) -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NoNamespaces("network namespaces and shaped links need root on Linux: run this benchmark as root")
    for program in programs:
        if shutil.which(program) is None:
            package = "iptables" if program == "iptables" else "iproute2"
            raise NoNamespaces(f"links that are shaped or lose packets need {program!r}: install {package}")


def _sweep() -> None:
    """Of runs that were killed themselves."""
    for name, pid in re.findall(rf"^({NAME}-(\d+)-\w+)", _ip("netns", "list"), re.MULTILINE):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            _remove(name)


def _remove(name: str) -> None:
    with contextlib.suppress(NoNamespaces):  # it was never made
        for pid in _ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", name)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNamespaces(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout

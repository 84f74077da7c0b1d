"""Real daemons that reach each other through a `Network` only, and may be killed, restarted and paused.

Knows processes and places. Does not know what is injected why.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import moshpit_client
from tests.end_to_end.chaos.proxies import Network
from tests.end_to_end.swarm import Peer, Swarm

CONFIG = "[session]\nchunk_bytes = 65536\n"
"""Small chunks, so that a small vector has many: a fault falls between two of them."""


class Fleet(Swarm):
    """Daemons 0, 1, ...: `peers[i]` is the process that is daemon i now."""

    def __init__(self, network: Network, *flags: str) -> None:
        super().__init__(*flags)
        self.network = network
        self.announced: list[str] = []
        self.ids: list[str] = []
        self.graves: list[Peer] = []
        """Processes that were killed, for their logs."""
        self._stops: list[list[tuple[float, float | None]]] = []
        """When each daemon stood still: from, to."""
        self._config = self._home / "config.toml"
        self._config.write_text(CONFIG)

    def launch(self, count: int) -> None:
        """Start so many, each joining through the first; all are ready."""
        for index in range(len(self.peers), len(self.peers) + count):
            self.announced.append(self.network.place(name_of(index)))
            self._stops.append([])
            self.peers.append(self._begin(index, self.announced[:1] if index else []))
            self._move_in(index)
            self.ids.append(self.status(index).peer_id)

    def kill(self, index: int) -> None:
        """SIGKILL; returns when it is dead."""
        self.peers[index].kill()
        self.network.move_out(name_of(index))

    def restart(self, index: int) -> None:
        """The same daemon again: its data directory, its place. Returns when it listens."""
        self.graves.append(self.peers[index])
        self.peers[index] = self._begin(index, [a for i, a in enumerate(self.announced) if i != index])
        self._move_in(index)

    def pause(self, index: int) -> None:
        """SIGSTOP."""
        self._stops[index].append((time.monotonic(), None))
        self.peers[index].signal(signal.SIGSTOP)

    def resume(self, index: int) -> None:
        """SIGCONT."""
        self.peers[index].signal(signal.SIGCONT)
        began, _ = self._stops[index].pop()
        self._stops[index].append((began, time.monotonic()))

    def stood_still_s(self, index: int, began: float, ended: float) -> float:
        """For how long of that time it was paused."""
        return sum(max(0.0, min(ended, to or ended) - max(began, since)) for since, to in list(self._stops[index]))

    def is_alive(self, index: int) -> bool:
        return self.peers[index].process.poll() is None

    def status(self, index: int) -> moshpit_client.Status:
        """Raises MoshpitError when it does not answer."""
        with self.peers[index].connect() as daemon:
            return daemon.status()

    def complaints(self) -> list[str]:
        """What is not as it must be in fair weather."""
        found: list[str] = []
        for index, peer in enumerate(self.peers):
            if not self.is_alive(index):
                found.append(f"daemon {index} ended by itself with exit code {peer.process.returncode}")
                continue
            try:
                status = self.status(index)
            except moshpit_client.MoshpitError as error:
                found.append(f"daemon {index} does not answer: {error}")
                continue
            if not status.ready:
                found.append(f"daemon {index} is not ready: {status.waiting_for}")
            elif status.peers < len(self.peers) - 1:
                found.append(f"daemon {index} knows {status.peers} of {len(self.peers) - 1} peers")
        return found

    def save_logs(self, directory: Path) -> None:
        """Of the living and the dead."""
        directory.mkdir(parents=True, exist_ok=True)
        for number, peer in enumerate([*self.graves, *self.peers]):
            (directory / f"{number:02}-{peer.home.name}.log").write_text(peer.log + "\n")

    def _begin(self, index: int, join: list[str]) -> Peer:
        transport = "grpc" if index % 3 == 2 else "auto"  # both ways are in every storm
        bulk = ("--transport", transport, "--bulk-announce", str(self.network.bulk_port(name_of(index))))
        flags = ("--announce", self.announced[index], *bulk, "--config", str(self._config), *self._flags)
        peer = Peer(self._home / str(index), *flags, swarm=self._name, join=join)
        self.network.expect(name_of(index), peer.process.pid)
        return peer

    def _move_in(self, index: int) -> None:
        address = self.peers[index].address
        self.network.move_in(name_of(index), address, self.status(index).bulk_port)
        self.peers[index].is_ready()


def name_of(index: int) -> str:
    """A daemon's place in the network."""
    return f"daemon {index}"

"""A connection to a daemon: which process it belongs to, and what its failures are called.

Knows forks: gRPC does not survive one, so a child (a DataLoader's worker, say) may hold what it inherited but not use
it. Does not know sessions.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from moshpit_client.calls import Calls
from moshpit_client.errors import MoshpitError, WrongProcess, from_status
from moshpit_client.v1 import daemon_pb2 as pb

ANSWER_SECONDS = 10.0
"""For calls that a healthy daemon answers at once."""

_kept: weakref.WeakSet[object] = weakref.WeakSet()
_inherited: list[object] = []


class Connection:
    """Raises DaemonUnreachable when nobody answers on the socket."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.pid = os.getpid()
        self.calls = Calls(socket)
        self._closed = False
        self._connected = False
        keep_in_children(self.calls.channel)
        try:
            with self.errors():
                self.calls.get_status(pb.GetStatusRequest(), timeout=ANSWER_SECONDS)
        except MoshpitError:
            self.close()
            raise
        self._connected = True

    @property
    def is_usable(self) -> bool:
        """False when closed, and in a forked child."""
        return not self._closed and self.pid == os.getpid()

    def require(self) -> None:
        """Raises WrongProcess in a forked child, MoshpitError when closed."""
        if self.pid != os.getpid():
            raise WrongProcess(
                f"this connection was made by process {self.pid} and cannot be used in its forked child {os.getpid()}: "
                "average in the parent, or call moshpit_client.connect() in the child"
            )
        if self._closed:
            raise MoshpitError("this connection is closed: call moshpit_client.connect() again")

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Around the calls: gRPC's errors come out as ours."""
        try:
            yield
        except grpc.RpcError as error:
            raise from_status(error, self.socket, connected=self._connected) from None

    def close(self) -> None:
        """Idempotent; nothing in a forked child."""
        if self.is_usable:
            self._closed = True
            self.calls.channel.close()


def keep_in_children(held: object) -> None:
    """Forked children never free this: freeing what is gRPC's would wait for threads that only the parent has."""
    _kept.add(held)


def _keep_what_was_inherited() -> None:
    _inherited.extend(_kept)


os.register_at_fork(after_in_child=_keep_what_was_inherited)

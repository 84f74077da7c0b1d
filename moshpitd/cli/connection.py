"""How a verb reaches its daemon: the socket, the stub, and what each gRPC status means to a shell.

Any other client could be in this place: only `moshpitd.local.v1` is spoken here. Synchronous gRPC, because a verb asks
one thing at a time and its start-up is most of what it takes.
"""

from __future__ import annotations

import contextlib
import socket
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from moshpitd.cli.failure import ExitCode, Failure
from moshpitd.local.v1 import daemon_pb2 as pb
from moshpitd.local.v1.daemon_pb2_grpc import DaemonServiceStub

ASK_TIMEOUT_S = 5.0
"""For what a daemon answers from memory."""
MESSAGE_BYTES_MAX = 8 << 20
"""The daemon sends at most half of that: chunks of 4 MiB, and as many receipts as fit."""


class Daemon:
    """A connection to the daemon behind a socket. Raises `Failure` for all that goes wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _knock(path)
        options = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)]
        self._channel = grpc.insecure_channel("unix:" + urllib.parse.quote(str(path.absolute())), options)
        self._stub = DaemonServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def status(self) -> pb.GetStatusResponse:
        with self._failures():
            return self._stub.GetStatus(pb.GetStatusRequest(), timeout=ASK_TIMEOUT_S)

    def peers(self) -> pb.ListPeersResponse:
        with self._failures():
            return self._stub.ListPeers(pb.ListPeersRequest(), timeout=ASK_TIMEOUT_S)

    def rounds(self, *, limit: int, epoch: int | None = None) -> pb.ListRoundsResponse:
        with self._failures():
            return self._stub.ListRounds(pb.ListRoundsRequest(limit=limit, epoch=epoch), timeout=ASK_TIMEOUT_S)

    def config(self) -> pb.GetConfigResponse:
        with self._failures():
            return self._stub.GetConfig(pb.GetConfigRequest(), timeout=ASK_TIMEOUT_S)

    def set_compute_budget(self, request: pb.SetComputeBudgetRequest) -> pb.ComputeBudget:
        with self._failures():
            return self._stub.SetComputeBudget(request, timeout=ASK_TIMEOUT_S).budget

    @contextlib.contextmanager
    def session(self, request: pb.OpenSessionRequest, timeout_s: float) -> Iterator[str]:
        """A session for as long as the block lasts; yields its id."""
        with self._failures():
            call = self._stub.OpenSession(request, timeout=timeout_s)
            try:
                yield next(call).session_id
            finally:
                call.cancel()

    @contextlib.contextmanager
    def average(
        self, requests: Iterable[pb.AverageRequest], timeout_s: float
    ) -> Iterator[Iterator[pb.AverageResponse]]:
        """An averaging's responses; cancelled when the block is left early."""
        with self._failures():
            call = self._stub.Average(iter(requests), timeout=timeout_s)
            try:
                yield call
            finally:
                # Since grpcio 1.83 an abandoned call is not cancelled by itself.
                call.cancel()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            raise self._failure(error.code(), error.details() or "") from error

    def _failure(self, status: grpc.StatusCode, details: str) -> Failure:
        match status:
            case grpc.StatusCode.UNAVAILABLE:
                # Said by the daemon, or by the transport because there is no daemon any more: knock again.
                _knock(self._path, gone=True)
                return Failure(ExitCode.NOT_HEALTHY, details)
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return Failure(ExitCode.NO_GROUP, details)
            case grpc.StatusCode.UNIMPLEMENTED:
                return Failure(ExitCode.FAILED, f"{self._path} is no moshpitd's socket, or an older one's: {details}")
            case grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
                return Failure(ExitCode.FAILED, f"the daemon failed, which is a bug of ours: {details}")
            case _:
                return Failure(ExitCode.FAILED, details)


def _knock(path: Path, *, gone: bool = False) -> None:
    """Raise `Failure` unless somebody listens. gRPC would say the same later and in worse words."""
    try:
        with socket.socket(socket.AF_UNIX) as knock:
            knock.settimeout(ASK_TIMEOUT_S)
            knock.connect(str(path))
    except OSError as error:
        if gone:
            problem = f"the daemon at {path} went away in the middle of the call; nothing was changed"
        elif isinstance(error, PermissionError):
            problem = f"the daemon's socket {path} belongs to another user"
        else:
            problem = f"no daemon at {path} ({error.strerror or error})"
        way_out = "start one with `moshpitd run --swarm NAME`, or name its socket with --socket or MOSHPITD_SOCKET"
        raise Failure(ExitCode.NOT_REACHABLE, f"{problem}: {way_out}") from error

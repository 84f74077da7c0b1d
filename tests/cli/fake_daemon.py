"""A daemon that says what a test wants it to, on a real Unix socket, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np

from moshpitd.local.v1 import daemon_pb2 as pb
from moshpitd.local.v1.daemon_pb2_grpc import DaemonServiceServicer, add_DaemonServiceServicer_to_server

OWN = "aa" * 32
OTHER = "bb" * 32
THIRD = "cc" * 32

Script = Callable[["FakeDaemon", bytes, grpc.ServicerContext], Iterator[pb.AverageResponse]]


def receipt(outcome: pb.Outcome.ValueType, *, epoch: int = 7) -> pb.Receipt:
    """A receipt of one round of three, one of whom died."""
    if outcome == pb.OUTCOME_ALONE:
        return pb.Receipt(outcome=outcome, epoch=epoch, session="default", why="nobody else is known")
    dropped = [pb.Dropped(peer=THIRD, why="stood still for 3 s")] if outcome == pb.OUTCOME_PARTIAL else []
    round_ = pb.Round(
        round=0,
        axis=1,
        outcome=outcome,
        group_id=b"\x01" * 32,
        digest=b"\x02" * 32,
        leader=OTHER,
        rank=0,
        codec="flash8",
        codec_why="auto: over the slowest line",
        bits_per_element=8.25,
        relative_error=0.0059,
        transport="grpc",
        members=[pb.Member(peer=peer, weight=2.0, coordinate=i) for i, peer in enumerate((OWN, OTHER, THIRD))],
        spans=[
            pb.Span(reducer=OWN, start=0, stop=4096, contributors=[OWN, OTHER, THIRD]),
            pb.Span(reducer=OTHER, start=4096, stop=10_000, contributors=[OWN, OTHER]),
        ],
        dropped=dropped,
        weight_after=2.0,
        seconds=pb.Seconds(matchmaking=0.01, reduce=0.2),
        bytes=pb.Traffic(sent=1_500_000, received=12),
    )
    return pb.Receipt(
        outcome=outcome,
        epoch=epoch,
        weight_total=6.0,
        peers=[OTHER, THIRD],
        digest=b"\x02" * 32,
        seconds=pb.Seconds(matchmaking=0.01, reduce=0.2, total=0.25),
        bytes=pb.Traffic(sent=1_500_000, received=12),
        grid="1x3",
        rounds=[round_],
        session="default",
    )


def answer(outcome: pb.Outcome.ValueType, result: Callable[[bytes], bytes] = lambda sent: sent) -> Script:
    """Say that it waits, then end with this outcome and, unless alone, with `result` of what was sent."""

    def script(daemon: FakeDaemon, sent: bytes, context: grpc.ServicerContext) -> Iterator[pb.AverageResponse]:
        yield pb.AverageResponse(progress=pb.Progress(text="2 of 3 peers here, waiting for 1 more", fraction=0.3))
        yield pb.AverageResponse(receipt=receipt(outcome))
        if outcome != pb.OUTCOME_ALONE:
            values = result(sent)
            for offset in range(0, len(values), 1000):
                chunk = pb.VectorChunk(offset=offset, data=values[offset : offset + 1000])
                yield pb.AverageResponse(chunk=chunk)

    return script


def refuse(code: grpc.StatusCode, details: str) -> Script:
    """End with a status."""

    def script(daemon: FakeDaemon, sent: bytes, context: grpc.ServicerContext) -> Iterator[pb.AverageResponse]:
        context.abort(code, details)
        yield from ()

    return script


def hang(daemon: FakeDaemon, sent: bytes, context: grpc.ServicerContext) -> Iterator[pb.AverageResponse]:
    """Say nothing until the caller leaves."""
    context.add_callback(daemon.left.set)
    daemon.reached.set()
    daemon.left.wait(30)
    yield from ()


def doubled(sent: bytes) -> bytes:
    return (np.frombuffer(sent, np.float32) * np.float32(2)).tobytes()


class FakeDaemon(DaemonServiceServicer):
    """Serves while the block lasts."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.ready = True
        self.script: Script = answer(pb.OUTCOME_COMPLETE)
        self.receipts: list[pb.Receipt] = []
        self.cohort: pb.Cohort | None = None
        """Of its session."""
        self.opened: list[pb.OpenSessionRequest] = []
        self.started: list[pb.AverageStart] = []
        self.sent: list[bytes] = []
        self.reached = threading.Event()
        """A hanging averaging has begun."""
        self.left = threading.Event()
        """Its caller went away."""
        self._sessions_end = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8))
        add_DaemonServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{socket}")

    def __enter__(self) -> FakeDaemon:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """As by SIGKILL: no goodbye, no socket."""
        self._server.stop(grace=None).wait(10)
        self._sessions_end.set()
        self.socket.unlink(missing_ok=True)

    def OpenSession(
        self, request: pb.OpenSessionRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.OpenSessionResponse]:
        self.opened.append(request)
        ended = threading.Event()
        context.add_callback(ended.set)
        yield pb.OpenSessionResponse(session_id="s1")
        while not ended.wait(0.05) and not self._sessions_end.is_set():
            pass

    def Average(
        self, request_iterator: Iterator[pb.AverageRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AverageResponse]:
        self.started.append(next(request_iterator).start)
        vector = b""
        for request in request_iterator:
            assert request.chunk.offset == len(vector)
            vector += request.chunk.data
        self.sent.append(vector)
        return self.script(self, vector, context)

    def CloseSession(self, request: pb.CloseSessionRequest, context: grpc.ServicerContext) -> pb.CloseSessionResponse:
        raise AssertionError("the command closes its session by leaving its call")

    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:
        session = pb.SessionStatus(
            name="default",
            state="matching",
            epoch=7,
            grid="1x3",
            cell=[0, 2],
            live_sessions=3,
            trainers=[
                pb.TrainerStatus(session_id="s1", state="averaging", transport="shared-memory"),
                pb.TrainerStatus(session_id="s2", state="waiting", transport="stream", transport_why="switched off"),
            ],
        )
        session.averagings["complete"] = 6
        if self.cohort is not None:
            session.cohort.CopyFrom(self.cohort)
        return pb.GetStatusResponse(
            ready=self.ready,
            peer_id=OWN,
            swarm="demo",
            listen="127.0.0.1:7600",
            announce="127.0.0.1:7600",
            peers=2,
            sessions=[session],
            waiting_for="" if self.ready else "anybody of --join to answer",
            version="0.1.0",
            pid=4711,
            uptime_seconds=61.5,
            bandwidth=pb.Bandwidth(up_bytes_s=1.25e7),
        )

    def ListPeers(self, request: pb.ListPeersRequest, context: grpc.ServicerContext) -> pb.ListPeersResponse:
        return pb.ListPeersResponse(
            peers=[
                pb.Peer(peer_id=OTHER, address="10.0.0.2:7600", state="live", sessions=["x"], seconds_since_heard=0.5),
                pb.Peer(peer_id=THIRD, state="suspect"),
            ]
        )

    def ListRounds(self, request: pb.ListRoundsRequest, context: grpc.ServicerContext) -> pb.ListRoundsResponse:
        found = [each for each in self.receipts if not request.HasField("epoch") or each.epoch == request.epoch]
        return pb.ListRoundsResponse(receipts=found[: request.limit or 20])

    def GetConfig(self, request: pb.GetConfigRequest, context: grpc.ServicerContext) -> pb.GetConfigResponse:
        return pb.GetConfigResponse(values=[pb.ConfigValue(name="swarm", value="demo", source="file")])

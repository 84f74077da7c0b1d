"""The local door: serves a daemon's trainers and operators on a Unix socket.

Knows calls: who holds which session open, whose turn it is, when a call has run out of time. Does not know what an
averaging is: it hands a vector down to the households and a result up. A session lives as long as its OpenSession call:

    OpenSession -> open -- CloseSession, the client's cancel or death, the daemon leaving --> closed

Averagings of a session take turns; a call whose client is gone detaches and leaves its round to those below.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moshpitd.averaging.errors import Exhausted, InvalidInput, NoGroup, Precondition, SessionNotFound, Unavailable
from moshpitd.averaging.posts import BUFFERS
from moshpitd.averaging.receipt import Receipt
from moshpitd.averaging.session import Call, SessionOptions
from moshpitd.averaging.shards import Half
from moshpitd.averaging.vector import Layout, Vector
from moshpitd.driver import Averaged, ProgressNote
from moshpitd.households import Households
from moshpitd.local import translate
from moshpitd.local.claim import ClaimError, SocketClaim
from moshpitd.local.shared_memory import AUTO, NoSharedMemory, Offer, SharedBuffers, SharedMemoryDirectory
from moshpitd.local.statuses import Answering
from moshpitd.local.transfer import (
    EVERYTHING,
    MESSAGE_BYTES_MAX,
    AverageContext,
    Intake,
    SharedTransfer,
    StreamTransfer,
    Transfer,
    pieces_of,
)
from moshpitd.local.translate import DaemonInfo, LocalHop
from moshpitd.local.v1 import daemon_pb2 as pb
from moshpitd.local.v1 import daemon_pb2_grpc as pb_grpc

FetchContext = grpc.aio.ServicerContext[pb.FetchFeedbackRequest, pb.FetchFeedbackResponse]
LoadContext = grpc.aio.ServicerContext[pb.LoadFeedbackRequest, pb.LoadFeedbackResponse]
SERVICE = pb.DESCRIPTOR.services_by_name["DaemonService"].full_name
TIMEOUT_MIN_S = 0.001
"""What a call has left whose values came in its last moment: zero is no timeout."""
ROUNDS_LISTED = 20
ROUNDS_LISTED_MAX = 1000
WHY_NOT_LENGTH_MAX = 300

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalConfig:
    """The door's limits."""

    vector_bytes_max: int = 4 << 30
    """Of one session's vector; the daemon holds a few copies of it while it averages."""
    calls_max: int = 256
    """Calls at once; every open session is one."""
    shared_memory_dir: str = AUTO
    """Where files shared with trainers are made: a directory, best of a memory file system, `auto` for /dev/shm, `off`.
    A session takes up to three times its vector there, a wait-avoiding one four times, instead of as much in the
    daemon's and the trainer's memory."""
    keepalive_s: float = 10.0
    """How often a silent client is pinged. A dead client is noticed at once by its closed socket, unless a child it
    forked holds the socket open; then by this."""
    keepalive_timeout_s: float = 20.0
    """How long an answer to a ping may take: a trainer halted in a debugger for longer loses its session."""


class LocalServer:
    """The served socket, from `open` to `close`."""

    def __init__(
        self, claim: SocketClaim, server: grpc.aio.Server, service: _DaemonService, health: health.aio.HealthServicer
    ) -> None:
        self._claim = claim
        self._server = server
        self._service = service
        self._health = health

    @staticmethod
    async def open(
        path: Path, households: Households, info: DaemonInfo, config: LocalConfig | None = None
    ) -> LocalServer:
        """Claim the path and serve on it. Raises ClaimError."""
        config = config or LocalConfig()
        server = grpc.aio.server(
            maximum_concurrent_rpcs=config.calls_max,
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
                ("grpc.keepalive_time_ms", round(config.keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", round(config.keepalive_timeout_s * 1000)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ],
        )
        service = _DaemonService(households, info, config)
        pb_grpc.add_DaemonServiceServicer_to_server(service, server)
        healths = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healths, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        claim = SocketClaim.take(path)
        try:
            server.add_insecure_port("unix:" + urllib.parse.quote(str(path)))
        except RuntimeError as error:
            claim.release()
            raise ClaimError(f"cannot serve on socket {path}: {error}: give another path (--socket)") from error
        local = LocalServer(claim, server, service, healths)
        await local.show_ready(info.ready)
        await server.start()
        return local

    async def show_ready(self, ready: bool) -> None:
        """What grpc.health.v1 answers from now on."""
        response = health_pb2.HealthCheckResponse
        for service in ("", SERVICE):
            await self._health.set(service, response.SERVING if ready else response.NOT_SERVING)

    async def close(self, grace_s: float) -> None:
        """Refuse new calls, end the sessions' streams, give running calls `grace_s`, give the path back."""
        await self._health.enter_graceful_shutdown()
        await self._service.leave(grace_s)
        await self._server.stop(grace_s)
        await self._service.finish(grace_s)
        self._claim.release()


@dataclass(eq=False, slots=True)
class _OpenSession:
    """A session as the door sees it."""

    session_id: str
    name: str
    layout: Layout
    offer: Offer | None = None
    """Shared memory that the trainer has not answered yet."""
    buffers: SharedBuffers | None = None
    why_stream: str = "the trainer has not mapped its shared memory yet"
    """While there are no buffers."""
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one averaging in progress. Others wait instead of being refused: the end of a cancelled call may
    reach us after the client's next one."""

    @property
    def hop(self) -> LocalHop:
        return LocalHop("stream", self.why_stream) if self.buffers is None else LocalHop("shared-memory")

    def stream(self, why: str) -> None:
        """There is no shared memory, or none any more to be had."""
        self.why_stream = why
        log.info("session %s streams its values: %s", self.name, why)

    @asynccontextmanager
    async def taking_turns(self, deadline: float) -> AsyncIterator[None]:
        async with _until(deadline, f"an earlier averaging of session {self.name!r} is still running: wait for it"):
            await self.turn.acquire()
        try:
            yield
        finally:
            self.turn.release()


class _DaemonService(pb_grpc.DaemonServiceServicer):
    """The calls. OpenSession and Average write to their context rather than being generators: a generator whose
    caller is cancelled is finished by the garbage collector, too late for a session that must be closed."""

    def __init__(self, households: Households, info: DaemonInfo, config: LocalConfig) -> None:
        self._households = households
        self._info = info
        self._config = config
        self._memory = SharedMemoryDirectory(config.shared_memory_dir)
        self._memory.sweep()
        self._sessions: dict[str, _OpenSession] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._streams: set[asyncio.Task[object]] = set()
        """Those that serve a session's stream."""

    async def OpenSession(  # type: ignore[override]
        self,
        request: pb.OpenSessionRequest,
        context: grpc.aio.ServicerContext[pb.OpenSessionRequest, pb.OpenSessionResponse],
    ) -> None:
        self._note_stream()
        async with Answering(context):
            await self._serve_session(request, context)

    async def _serve_session(
        self,
        request: pb.OpenSessionRequest,
        context: grpc.aio.ServicerContext[pb.OpenSessionRequest, pb.OpenSessionResponse],
    ) -> None:
        self._refuse_when_leaving()
        options = translate.session_options(request)
        size, limit = options.layout.byte_size, self._config.vector_bytes_max
        if size > limit:
            raise Exhausted(
                f"the tensors have {size} bytes, more than vector_bytes_max = {limit}: "
                "raise it in the daemon's configuration, or open several smaller sessions"
            )
        session = _OpenSession(await self._households.open_session(options), options.name, options.layout)
        self._sessions[session.session_id] = session
        try:
            first = pb.OpenSessionResponse(session_id=session.session_id)
            if request.shared_memory:
                await self._offer(session, options)
            else:
                session.stream("the trainer did not ask for shared memory")
            if session.offer is not None:
                first.shared_memory.CopyFrom(translate.offer_message(session.offer))
            await context.write(first)
            await session.closed.wait()
            self._refuse_when_leaving()
        finally:
            if session.offer is not None:
                session.offer.withdraw()
            del self._sessions[session.session_id]
            await self._close(session.session_id)

    async def AttachSharedMemory(
        self,
        request: pb.AttachSharedMemoryRequest,
        context: grpc.aio.ServicerContext[pb.AttachSharedMemoryRequest, pb.AttachSharedMemoryResponse],
    ) -> pb.AttachSharedMemoryResponse:
        async with Answering(context):
            session = self._session(request.session_id)
            offer, session.offer = session.offer, None
            if offer is None:
                raise Precondition("this session has no offer of shared memory to answer: stream the values")
            if request.why_not:
                offer.withdraw()
                session.stream(f"the trainer cannot share memory: {request.why_not[:WHY_NOT_LENGTH_MAX]}")
                return pb.AttachSharedMemoryResponse()
            try:
                session.buffers = offer.accept(request.proof)
            except NoSharedMemory as error:
                session.stream(str(error))
                raise Precondition(f"{error}; until then stream the values") from error
        return pb.AttachSharedMemoryResponse()

    async def CloseSession(
        self,
        request: pb.CloseSessionRequest,
        context: grpc.aio.ServicerContext[pb.CloseSessionRequest, pb.CloseSessionResponse],
    ) -> pb.CloseSessionResponse:
        async with Answering(context):
            session = self._session(request.session_id)
            await self._close(session.session_id)
            session.closed.set()
        return pb.CloseSessionResponse()

    async def SetComputeBudget(
        self,
        request: pb.SetComputeBudgetRequest,
        context: grpc.aio.ServicerContext[pb.SetComputeBudgetRequest, pb.SetComputeBudgetResponse],
    ) -> pb.SetComputeBudgetResponse:
        async with Answering(context):
            session = self._session(request.session_id)
            line = self._households.set_budget(session.session_id, translate.budget_options(request))
            return pb.SetComputeBudgetResponse(budget=translate.budget_message(line))

    async def Average(self, _requests: object, context: AverageContext) -> None:  # type: ignore[override]
        async with Answering(context):
            await self._serve_average(context)

    async def _serve_average(self, context: AverageContext) -> None:
        start = await context.read()
        if not isinstance(start, pb.AverageRequest) or start.WhichOneof("message") != "start":
            raise InvalidInput("the first message of an averaging must be `start`: this client has a bug")
        session = self._session(start.start.session_id)
        call = translate.average_call(start.start)
        deadline = asyncio.get_running_loop().time() + call.timeout_s
        self._refuse_when_leaving()
        transfer: Transfer = StreamTransfer(context)
        if start.start.shared_memory:
            if session.buffers is None:
                raise Precondition("this session has no shared memory: stream the values")
            transfer = SharedTransfer(session.buffers, transfer)
        async with session.taking_turns(deadline):
            await self._average(session, call, deadline, transfer, context)

    async def FetchFeedback(  # type: ignore[override]
        self, request: pb.FetchFeedbackRequest, context: FetchContext
    ) -> None:
        async with Answering(context):
            self._refuse_when_leaving()
            self._session(request.session_id)
            state = await self._households.save_feedback(request.session_id)
            await context.write(pb.FetchFeedbackResponse(arrays=translate.feedback_arrays(state.layout)))
            for offset, data in pieces_of(state):
                await context.write(pb.FetchFeedbackResponse(chunk=pb.VectorChunk(offset=offset, data=data)))

    async def LoadFeedback(self, _requests: object, context: LoadContext) -> pb.LoadFeedbackResponse:
        async with Answering(context):
            start = await context.read()
            if not isinstance(start, pb.LoadFeedbackRequest) or start.WhichOneof("message") != "start":
                raise InvalidInput("the first message must be `start`: this client has a bug")
            self._refuse_when_leaving()
            session_id = self._session(start.start.session_id).session_id
            layout, ours = translate.feedback_layout(start.start), await self._households.feedback_layout(session_id)
            if difference := ours.first_difference(layout):  # before memory is taken for it
                raise InvalidInput(
                    f"this feedback is of other tensors or another compressor than the session: {difference} "
                    "(here: the session)"
                )
            intake = Intake(layout)
            while isinstance(request := await context.read(), pb.LoadFeedbackRequest):
                if request.WhichOneof("message") != "chunk":
                    raise InvalidInput("after `start` only `chunk` messages may follow: this client has a bug")
                intake.accept(request.chunk.offset, request.chunk.data)
            await self._households.load_feedback(session_id, intake.finish())
        return pb.LoadFeedbackResponse()

    async def GetStatus(
        self,
        request: pb.GetStatusRequest,
        context: grpc.aio.ServicerContext[pb.GetStatusRequest, pb.GetStatusResponse],
    ) -> pb.GetStatusResponse:
        async with Answering(context):
            hops = {session.session_id: session.hop for session in self._sessions.values()}
            return translate.status_message(
                self._info, self._households.sessions(), hops, draining=self._households.draining
            )

    async def ListPeers(
        self,
        request: pb.ListPeersRequest,
        context: grpc.aio.ServicerContext[pb.ListPeersRequest, pb.ListPeersResponse],
    ) -> pb.ListPeersResponse:
        async with Answering(context):
            return translate.peers_message(self._households.peers())

    async def ListRounds(
        self,
        request: pb.ListRoundsRequest,
        context: grpc.aio.ServicerContext[pb.ListRoundsRequest, pb.ListRoundsResponse],
    ) -> pb.ListRoundsResponse:
        async with Answering(context):
            limit = min(request.limit or ROUNDS_LISTED, ROUNDS_LISTED_MAX)
            epoch = request.epoch if request.HasField("epoch") else None
            return translate.rounds_message(
                self._households.receipts(limit=limit, epoch=epoch), MESSAGE_BYTES_MAX - 1024
            )

    async def GetConfig(
        self,
        request: pb.GetConfigRequest,
        context: grpc.aio.ServicerContext[pb.GetConfigRequest, pb.GetConfigResponse],
    ) -> pb.GetConfigResponse:
        async with Answering(context):
            return translate.config_message(self._info.config_values)

    async def leave(self, timeout_s: float) -> None:
        """End the sessions' streams; from now on everything is refused."""
        self._leaving = True
        for session in self._sessions.values():
            session.closed.set()
        if self._streams:  # gRPC's stop does not wait for the status of a call that is just being aborted
            await asyncio.wait(self._streams, timeout=timeout_s)

    def _note_stream(self) -> None:
        # Not in the caller: a task in its own frame would live on with its exception, and with it what it serves.
        serving = asyncio.current_task()
        assert serving is not None
        self._streams.add(serving)
        serving.add_done_callback(self._streams.discard)

    async def finish(self, timeout_s: float) -> None:
        """Wait until all is closed that we told to close."""
        if self._closing:
            _, late = await asyncio.wait(self._closing, timeout=timeout_s)
            for task in late:
                task.cancel()

    async def _average(
        self, session: _OpenSession, call: Call, deadline: float, transfer: Transfer, context: AverageContext
    ) -> None:
        with self._households.coming(session.session_id):
            async with _until(deadline, "the values had not all arrived: give a longer timeout"):
                vector = await transfer.contribution(session.layout)
        left = deadline - asyncio.get_running_loop().time()
        call = dataclasses.replace(call, timeout_s=max(left, TIMEOUT_MIN_S))
        try:
            averaged = await self._telling_progress(session, call, vector, transfer, context)
        finally:
            # Before the trainer hears of the end: from then on it may write its next contribution.
            if session.buffers is not None:
                session.buffers.pass_turn(partial(self._households.holds, session.session_id))
        await context.write(pb.AverageResponse(receipt=translate.receipt_message(session.name, averaged.receipt)))
        if averaged.vector is not vector:
            await transfer.result(averaged.vector, _part_wanted(session.layout, call, averaged.receipt))

    async def _telling_progress(
        self, session: _OpenSession, call: Call, vector: Vector, transfer: Transfer, context: AverageContext
    ) -> Averaged:
        """The averaging, in a task of its own while its notes are written; a slow reader misses all but the newest."""
        notes: list[ProgressNote] = []
        news = asyncio.Event()

        def tell(note: ProgressNote) -> None:
            notes[:] = [note]
            news.set()

        averaging = asyncio.create_task(
            self._households.average(session.session_id, call, vector, tell, spares=transfer.spares)
        )
        averaging.add_done_callback(lambda _: news.set())
        try:
            while not averaging.done():
                await news.wait()
                news.clear()
                if notes and not averaging.done():
                    note = notes.pop()
                    await context.write(
                        pb.AverageResponse(progress=pb.Progress(text=note.text, fraction=note.fraction))
                    )
        finally:
            if averaging.cancel():
                # Only when we are cancelled ourselves: the driver detaches, and nobody else may leave before it has.
                await asyncio.wait([averaging])
        return averaging.result()

    async def _offer(self, session: _OpenSession, options: SessionOptions) -> None:
        try:
            session.offer = await self._memory.offer(
                options.layout,
                results=1 if options.rounds == 1 or options.wait_avoidance or options.shards else 2,
                contributions=BUFFERS if options.wait_avoidance else 1,
            )
        except NoSharedMemory as error:
            session.stream(str(error))

    async def _close(self, session_id: str) -> None:
        """Close it below, also when the caller of the call that wants it is cancelled meanwhile."""
        closing = asyncio.create_task(self._households.close_session(session_id))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await asyncio.shield(closing)

    def _session(self, session_id: str) -> _OpenSession:
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionNotFound(
                f"this daemon has no session {session_id!r}: it was closed, or the daemon was restarted; open it again"
            )
        return session

    def _refuse_when_leaving(self) -> None:
        if self._leaving or self._households.draining:
            raise Unavailable("the daemon is leaving and takes no new rounds: start it again and open the session anew")


def _part_wanted(layout: Layout, call: Call, receipt: Receipt) -> slice:
    """The bytes of the result that are the trainer's: of a reduce_scatter its shard, nothing else was written."""
    if call.half is not Half.REDUCE_SCATTER or receipt.shard is None:
        return EVERYTHING
    return slice(layout.byte_at(receipt.shard.start), layout.byte_at(receipt.shard.stop))


@asynccontextmanager
async def _until(deadline: float, complaint: str) -> AsyncIterator[None]:
    """Bound the block by a moment on the loop's clock. Raises NoGroup."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise NoGroup(f"time ran out: {complaint}") from None

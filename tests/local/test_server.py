"""What any client, in any language, sees of the local door: raw messages over a real socket."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from moshpitd.local.claim import SocketTaken
from moshpitd.local.server import SERVICE, LocalConfig, LocalServer
from moshpitd.local.v1 import daemon_pb2 as pb
from moshpitd.local.v1 import daemon_pb2_grpc as pb_grpc
from tests.local.scripted import ME, ScriptedDriver, ScriptedInfo

W = pb.Tensor(name="w", shape=[5], data_type=pb.DATA_TYPE_FLOAT32)
ONES = np.ones(5, np.float32).tobytes()
DEADLINE_S = 20


class Door:
    """A served socket, the driver behind it, and a client in front of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.driver = ScriptedDriver()
        self.info = ScriptedInfo()

    async def open(self, config: LocalConfig) -> None:
        self.server = await LocalServer.open(self.path, self.driver, self.info, config)  # type: ignore[arg-type]
        self.channel = self.connect()
        self.stub = pb_grpc.DaemonServiceStub(self.channel)

    def connect(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"unix:{self.path}", [("grpc.use_local_subchannel_pool", 1)])

    async def session(self, name: str = "") -> tuple[str, grpc.aio.UnaryStreamCall]:
        call = self.stub.OpenSession(pb.OpenSessionRequest(name=name, tensors=[W]))
        first = await call.read()
        return first.session_id, call

    async def average(self, *messages: pb.AverageRequest) -> list[pb.AverageResponse]:
        call = self.stub.Average(iter(messages), timeout=DEADLINE_S)
        try:
            return [response async for response in call]
        except grpc.aio.AioRpcError:
            # grpc.aio raises for a write that lost the race against the status; the status itself the call knows.
            raise grpc.aio.AioRpcError(
                await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
            ) from None


@pytest_asyncio.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    door = Door(tmp_path / "run" / "moshpitd.sock")
    await door.open(LocalConfig(vector_bytes_max=1 << 20))
    yield door
    await door.channel.close()
    await door.server.close(1.0)


def start(session_id: str, **wishes: float) -> pb.AverageRequest:
    return pb.AverageRequest(start=pb.AverageStart(session_id=session_id, **wishes))


def chunk(offset: int, data: bytes) -> pb.AverageRequest:
    return pb.AverageRequest(chunk=pb.VectorChunk(offset=offset, data=data))


async def test_a_call_brings_a_receipt_then_the_result_in_order(door: Door) -> None:
    session_id, _ = await door.session()
    receipt, result = await door.average(start(session_id, weight=3.0, epoch=7), chunk(0, ONES[:7]), chunk(7, ONES[7:]))
    assert receipt.receipt.outcome == pb.OUTCOME_COMPLETE
    assert receipt.receipt.session == "default"
    assert receipt.receipt.rounds[0].spans[0].stop == 5
    assert (np.frombuffer(result.chunk.data, np.float32) == 2).all()
    [call] = door.driver.calls
    assert (call.weight, call.epoch) == (3.0, 7)
    assert 0 < call.timeout_s < 60, "sending counts"


async def test_what_is_unset_has_the_documented_default(door: Door) -> None:
    session_id, _ = await door.session()
    await door.average(start(session_id), chunk(0, ONES))
    options = door.driver.opened[session_id]
    assert (options.name, options.codec, options.min_peers, options.joining) == ("default", "float32", 1, "receive")
    assert (door.driver.calls[0].weight, door.driver.calls[0].epoch) == (1.0, None)


async def test_trainers_that_mean_one_codec_open_the_same_session(door: Door) -> None:
    for number, written in enumerate((" w = flash8-8:128 , *=float32", "w=flash8,*=float32")):
        response = await anext(
            aiter(door.stub.OpenSession(pb.OpenSessionRequest(name=str(number), tensors=[W], codec=written)))
        )
        assert door.driver.opened[response.session_id].codec == "w=flash8,*=float32"


async def test_alone_brings_a_receipt_and_no_values(door: Door) -> None:
    session_id, _ = await door.session("alone")
    [receipt] = await door.average(start(session_id), chunk(0, ONES))
    assert receipt.receipt.outcome == pb.OUTCOME_ALONE


@pytest.mark.parametrize(
    ("request_", "code", "details"),
    [
        (pb.OpenSessionRequest(), "INVALID_ARGUMENT", "layout is empty"),
        (pb.OpenSessionRequest(tensors=[pb.Tensor(name="w", shape=[0], data_type=2)]), "INVALID_ARGUMENT", "empty"),
        (pb.OpenSessionRequest(tensors=[pb.Tensor(name="w", shape=[2])]), "INVALID_ARGUMENT", "'w' is of no given"),
        (pb.OpenSessionRequest(tensors=[pb.Tensor(name="w", data_type=99)]), "INVALID_ARGUMENT", "'w' is data type 99"),
        (pb.OpenSessionRequest(tensors=[W, W]), "INVALID_ARGUMENT", "'w' is named twice"),
        (pb.OpenSessionRequest(tensors=[pb.Tensor(shape=[2], data_type=2)]), "INVALID_ARGUMENT", "tensor name ''"),
        (pb.OpenSessionRequest(tensors=[pb.Tensor(name="w", shape=[-2], data_type=2)]), "INVALID_ARGUMENT", "shape"),
        (pb.OpenSessionRequest(tensors=[W], rounds=10**6), "INVALID_ARGUMENT", "rounds"),
        (pb.OpenSessionRequest(tensors=[W], codec="mp3"), "INVALID_ARGUMENT", "mp3"),
        (pb.OpenSessionRequest(tensors=[W], codec="b=float32"), "INVALID_ARGUMENT", "no codec for tensor 'w'"),
        (pb.OpenSessionRequest(tensors=[W], codec="*=flash8,w=float32"), "INVALID_ARGUMENT", "can never count"),
        (pb.OpenSessionRequest(tensors=[W], joining=9), "INVALID_ARGUMENT", "joining 9"),
        (pb.OpenSessionRequest(tensors=[W], averaging=9), "INVALID_ARGUMENT", "averaging 9"),
        (pb.OpenSessionRequest(tensors=[W], averaging=2, min_peers=2), "INVALID_ARGUMENT", "group size 0"),
        (pb.OpenSessionRequest(tensors=[W], lockstep=True), "INVALID_ARGUMENT", "lockstep True in a session that"),
        (pb.OpenSessionRequest(tensors=[W], barrier_every=4), "INVALID_ARGUMENT", "barrier_every 4 in a session that"),
        (pb.OpenSessionRequest(tensors=[W], lonely_wait_seconds=-1), "INVALID_ARGUMENT", "lonely wait"),
        (pb.OpenSessionRequest(tensors=[W], name="n" * 201), "INVALID_ARGUMENT", "session name 'nnn"),
        (pb.OpenSessionRequest(tensors=[W], name="taken"), "FAILED_PRECONDITION", "open already"),
        (
            pb.OpenSessionRequest(tensors=[pb.Tensor(name="w", shape=[1 << 40, 1 << 40], data_type=2)]),
            "RESOURCE_EXHAUSTED",
            "vector_bytes_max = 1048576",
        ),
    ],
)
async def test_a_session_that_cannot_be_is_refused(
    door: Door, request_: pb.OpenSessionRequest, code: str, details: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=details) as caught:
        [_ async for _ in door.stub.OpenSession(request_)]
    assert caught.value.code().name == code
    assert "moshpitd-error" in dict(caught.value.trailing_metadata())
    assert not door.driver.opened


@pytest.mark.parametrize(
    ("wishes", "chunks", "details"),
    [
        ({"weight": -1.0}, [ONES], "weight -1"),
        ({"weight": np.nan}, [ONES], "weight nan"),
        ({"weight": np.inf}, [ONES], "weight inf"),
        ({"timeout_seconds": 0.0}, [ONES], "timeout 0"),
        ({"timeout_seconds": np.inf}, [ONES], "timeout inf"),
        ({}, [], "ended after 0 of 20"),
        ({}, [ONES[:8]], "ended after 8 of 20"),
        ({}, [ONES, ONES], "has 20 bytes where 0 are left"),
        ({}, [np.array([1, 1, 1, np.nan, 1], np.float32).tobytes()], "tensor 'w' holds nan at element 3"),
        ({}, [np.array([-np.inf, 1, 1, 1, 1], np.float32).tobytes()], "tensor 'w' holds -infinity at element 0"),
    ],
)
async def test_a_wrong_call_never_reaches_the_driver(
    door: Door, wishes: dict[str, float], chunks: list[bytes], details: str
) -> None:
    session_id, _ = await door.session()
    offsets = np.cumsum([0, *map(len, chunks)]).tolist()
    with pytest.raises(grpc.aio.AioRpcError, match=details) as caught:
        await door.average(start(session_id, **wishes), *map(chunk, offsets, chunks))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert door.driver.calls == []
    assert len(await door.average(start(session_id), chunk(0, ONES))) == 2, "the session goes on"


@pytest.mark.parametrize("messages", [[], [chunk(0, ONES)], [pb.AverageRequest()]])
async def test_a_call_begins_with_start(door: Door, messages: list[pb.AverageRequest]) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="first message") as caught:
        await door.average(*messages)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_start_comes_once(door: Door) -> None:
    session_id, _ = await door.session()
    with pytest.raises(grpc.aio.AioRpcError, match="only `chunk` messages"):
        await door.average(start(session_id), start(session_id))


async def test_a_chunk_above_the_cap_is_refused(door: Door) -> None:
    session_id, _ = await door.session()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.average(start(session_id), chunk(0, bytes((4 << 20) + 2048)))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_values_that_never_come_run_into_the_callers_timeout(door: Door) -> None:
    session_id, _ = await door.session()
    call = door.stub.Average()
    await call.write(start(session_id, timeout_seconds=0.1))
    with pytest.raises(grpc.aio.AioRpcError, match="values had not all arrived") as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_averagings_of_a_session_take_turns(door: Door) -> None:
    session_id, _ = await door.session("waits")
    first = door.stub.Average(iter([start(session_id), chunk(0, ONES)]))
    await door.driver.happened("waiting")
    with pytest.raises(
        grpc.aio.AioRpcError, match="an earlier averaging of session 'waits' is still running"
    ) as caught:
        await door.average(start(session_id, timeout_seconds=0.1), chunk(0, ONES))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    first.cancel()


@pytest.mark.parametrize(
    ("name", "code", "details"),
    [
        ("nobody", "DEADLINE_EXCEEDED", "1 of 8 peers was here"),
        ("buggy", "INTERNAL", "two and two are five.*please report"),
    ],
)
async def test_the_drivers_errors_become_statuses(door: Door, name: str, code: str, details: str) -> None:
    session_id, _ = await door.session(name)
    with pytest.raises(grpc.aio.AioRpcError, match=details) as caught:
        await door.average(start(session_id), chunk(0, ONES))
    assert caught.value.code().name == code


async def test_unknown_sessions_are_not_found(door: Door) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=r"no session 's99'.*open it again") as caught:
        await door.average(start("s99"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.stub.CloseSession(pb.CloseSessionRequest(session_id="s99"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_progress_comes_while_waiting_and_a_cancelled_call_detaches(door: Door) -> None:
    session_id, _ = await door.session("waits")
    call = door.stub.Average(iter([start(session_id), chunk(0, ONES)]))
    note = await call.read()
    assert note.progress.text.startswith("1 of 2 peers here")
    assert note.progress.fraction == 0.5
    call.cancel()
    await door.driver.happened("detached")
    assert session_id in door.driver.opened, "the session outlives the call"


async def test_a_session_ends_with_its_stream(door: Door) -> None:
    _, stream = await door.session()
    stream.cancel()
    await door.driver.happened("closed default")


async def test_a_session_ends_with_its_clients_connection(door: Door) -> None:
    channel = door.connect()
    stream = pb_grpc.DaemonServiceStub(channel).OpenSession(pb.OpenSessionRequest(tensors=[W]))
    await stream.read()
    await channel.close()
    await door.driver.happened("closed default")


async def test_close_session_ends_the_stream_without_an_error(door: Door) -> None:
    session_id, stream = await door.session()
    await door.stub.CloseSession(pb.CloseSessionRequest(session_id=session_id))
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() == grpc.StatusCode.OK
    await door.driver.happened("closed default")


async def test_a_draining_daemon_refuses_new_work_and_says_so(door: Door) -> None:
    session_id, _ = await door.session()
    door.driver.draining = True
    for refused in (door.average(start(session_id), chunk(0, ONES)), door.session()):
        with pytest.raises(grpc.aio.AioRpcError, match="leaving") as caught:
            await refused
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert (await door.stub.GetStatus(pb.GetStatusRequest())).draining


async def test_a_leaving_daemon_ends_the_sessions_streams_and_gives_the_path_back(door: Door) -> None:
    _, stream = await door.session()
    async with asyncio.timeout(DEADLINE_S):
        await door.server.close(10.0)
    with pytest.raises(grpc.aio.AioRpcError, match="leaving") as caught:
        await stream.read()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    await door.driver.happened("closed default")
    assert not door.path.exists()
    await door.channel.close()
    await door.open(LocalConfig())


async def test_a_second_daemon_on_the_path_is_refused_and_the_first_goes_on(door: Door) -> None:
    with pytest.raises(SocketTaken, match=f"process id {os.getpid()}"):
        await LocalServer.open(door.path, door.driver, door.info)  # type: ignore[arg-type]
    assert (await door.stub.GetStatus(pb.GetStatusRequest())).ready


async def test_a_path_may_hold_any_character(tmp_path: Path) -> None:
    odd = Door(tmp_path / "a b#c%41?" / "ü.sock")
    await odd.open(LocalConfig())
    assert odd.path.is_socket()
    await odd.server.close(0.0)


async def test_operators_see_status_peers_rounds_and_configuration(door: Door) -> None:
    session_id, _ = await door.session("training")
    for _ in range(3):
        await door.average(start(session_id), chunk(0, ONES))
    status = await door.stub.GetStatus(pb.GetStatusRequest())
    assert (status.ready, status.peer_id, status.peers, status.pid) == (True, ME, 2, os.getpid())
    assert not status.HasField("dialable")
    assert (status.bandwidth.up_bytes_s, status.bandwidth.down_bytes_s) == (1.25e7, 0.0)
    assert (status.datagrams.sent, status.datagrams.received, status.datagrams.refused) == (7, 6, 1)
    [session] = status.sessions
    assert (session.name, session.vector_bytes, list(session.cell)) == ("training", 20, [1, 3])
    assert dict(session.averagings) == {"complete": 3}
    peers = (await door.stub.ListPeers(pb.ListPeersRequest())).peers
    assert [peer.state for peer in peers] == ["live", "suspect"]
    assert [peer.HasField("seconds_since_heard") for peer in peers] == [True, False]
    rounds = await door.stub.ListRounds(pb.ListRoundsRequest(limit=2, epoch=7))
    assert [receipt.session for receipt in rounds.receipts] == ["training"] * 2
    assert not (await door.stub.ListRounds(pb.ListRoundsRequest(epoch=8))).receipts
    values = (await door.stub.GetConfig(pb.GetConfigRequest())).values
    assert (values[0].name, values[0].value, values[0].source) == ("swarm", "test", "flag")


async def test_health_and_reflection_are_served(door: Door) -> None:
    health = health_pb2_grpc.HealthStub(door.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await door.server.show_ready(False)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    listing = reflection_pb2_grpc.ServerReflectionStub(door.channel).ServerReflectionInfo(iter([request]))
    async for page in listing:
        assert SERVICE in {service.name for service in page.list_services_response.service}

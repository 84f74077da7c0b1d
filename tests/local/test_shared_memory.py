"""Shared memory as any client sees it: a file, a proof, a word; and what becomes of the file."""

from __future__ import annotations

import asyncio
import mmap
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc.aio
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio

from moshpitd.averaging.vector import Layout, TensorSpec
from moshpitd.local.server import LocalConfig
from moshpitd.local.shared_memory import SharedMemoryDirectory
from moshpitd.local.v1 import daemon_pb2 as pb
from tests.local.test_server import DEADLINE_S, Door, chunk, start

ELEMENTS = 5000
W = pb.Tensor(name="w", shape=[ELEMENTS], data_type=pb.DATA_TYPE_FLOAT32)
ONES = np.ones(ELEMENTS, np.float32)
WAIT_AVOIDING = pb.OpenSessionRequest(averaging=pb.AVERAGING_WAIT_AVOIDING, group_size=2, barrier_every=10, min_peers=2)
OpenDoor = Callable[..., Awaitable[Door]]


class Trainer:
    """A session that asked for shared memory and what it was offered."""

    def __init__(self, door: Door, call: grpc.aio.UnaryStreamCall, first: pb.OpenSessionResponse) -> None:
        self.door = door
        self.call = call
        self.session_id = first.session_id
        self.offer = first.shared_memory if first.HasField("shared_memory") else None

    @staticmethod
    async def open(
        door: Door, name: str = "", *, rounds: int = 0, tensor: pb.Tensor = W, more: pb.OpenSessionRequest | None = None
    ) -> Trainer:
        request = pb.OpenSessionRequest(name=name, tensors=[tensor], rounds=rounds, shared_memory=True)
        request.MergeFrom(more or pb.OpenSessionRequest())
        call = door.stub.OpenSession(request)
        return Trainer(door, call, await call.read())

    def map(self) -> npt.NDArray[np.uint8]:
        assert self.offer is not None
        with open(self.offer.path, "r+b") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), self.offer.file_bytes), np.uint8)

    async def attach(self, *, proof: bytes = b"", why_not: str = "") -> None:
        request = pb.AttachSharedMemoryRequest(session_id=self.session_id, proof=proof, why_not=why_not)
        await self.door.stub.AttachSharedMemory(request, timeout=DEADLINE_S)

    async def hop(self) -> tuple[str, str]:
        status = await self.door.stub.GetStatus(pb.GetStatusRequest(), timeout=DEADLINE_S)
        [trainer] = [each for one in status.sessions for each in one.trainers if each.session_id == self.session_id]
        return trainer.transport, trainer.transport_why

    async def streams(self) -> None:
        """See that the session averages all the same."""
        receipt, result = await self.door.average(start(self.session_id), chunk(0, ONES.tobytes()))
        assert receipt.receipt.outcome == pb.OUTCOME_COMPLETE
        assert (np.frombuffer(result.chunk.data, np.float32) == 2).all()


def shared_start(session_id: str) -> pb.AverageRequest:
    return pb.AverageRequest(start=pb.AverageStart(session_id=session_id, shared_memory=True))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "memory").mkdir()
    return tmp_path / "memory"


@pytest_asyncio.fixture
async def open_door(tmp_path: Path, directory: Path) -> AsyncIterator[OpenDoor]:
    doors: list[Door] = []

    async def opened(setting: str = str(directory), vector_bytes_max: int = 1 << 20) -> Door:
        door = Door(tmp_path / f"run{len(doors)}" / "moshpitd.sock")
        await door.open(LocalConfig(shared_memory_dir=setting, vector_bytes_max=vector_bytes_max))
        doors.append(door)
        return door

    yield opened
    for door in doors:
        await door.channel.close()
        await door.server.close(1.0)


@pytest_asyncio.fixture
async def door(open_door: OpenDoor) -> Door:
    return await open_door()


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


async def test_values_go_in_and_come_back_where_the_offer_says(door: Door, directory: Path) -> None:
    trainer = await Trainer.open(door)
    assert trainer.offer is not None
    memory = trainer.map()
    proof = memory[:16].tobytes()
    word = memory[16:24].view("<u8")
    await trainer.attach(proof=proof)
    assert await trainer.hop() == ("shared-memory", "")
    assert files(directory) == [], "both have mapped it: no name is needed any more"

    contribution, first, second = (
        memory[offset : offset + ONES.nbytes].view(np.float32)
        for offset in (trainer.offer.contribution_offset, *trainer.offer.result_offsets)
    )
    for averaging, result in enumerate((second, first, second), 1):
        contribution[:] = averaging
        [receipt] = await door.average(shared_start(trainer.session_id))
        assert receipt.receipt.outcome == pb.OUTCOME_COMPLETE
        assert (result == 2 * averaging).all()
        assert (contribution == averaging).all()
        assert [first, second][word[0] - 1] is result


async def test_the_file_is_private_and_as_large_as_the_offer_says(door: Door) -> None:
    trainer = await Trainer.open(door, rounds=1)
    assert trainer.offer is not None
    found = os.stat(trainer.offer.path)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert stat.S_IMODE(os.stat(Path(trainer.offer.path).parent).st_mode) == 0o700
    assert found.st_size == trainer.offer.file_bytes
    assert found.st_blocks * 512 >= found.st_size, "all of it is allocated"
    assert len(trainer.offer.result_offsets) == 1, "one round needs no second buffer"


async def test_posts_of_a_wait_avoiding_session_take_turns(door: Door) -> None:
    """The daemon keeps the last one: the trainer never writes where that lies."""
    trainer = await Trainer.open(door, more=WAIT_AVOIDING)
    assert trainer.offer is not None
    memory = trainer.map()
    await trainer.attach(proof=memory[:16].tobytes())
    assert len(trainer.offer.contribution_offsets) == 3 and len(trainer.offer.result_offsets) == 1
    turn = memory[24:32].view("<u8")
    used = []
    for averaging in range(1, 6):
        at = trainer.offer.contribution_offsets[int(turn[0])]
        used.append(int(turn[0]))
        memory[at : at + ONES.nbytes].view(np.float32)[:] = averaging
        turn[0] = 77  # what a trainer writes there is not believed
        await door.average(shared_start(trainer.session_id))
        kept = trainer.offer.contribution_offsets[used[-1]]
        assert (memory[kept : kept + ONES.nbytes].view(np.float32) == averaging).all()
        assert turn[0] != used[-1], "the daemon keeps that one"
        result = trainer.offer.result_offsets[0]
        assert (memory[result : result + ONES.nbytes].view(np.float32) == 2 * averaging).all()


async def test_after_refused_values_the_trainer_writes_where_it_wrote(door: Door) -> None:
    trainer = await Trainer.open(door, more=WAIT_AVOIDING)
    assert trainer.offer is not None
    memory = trainer.map()
    await trainer.attach(proof=memory[:16].tobytes())
    at = trainer.offer.contribution_offsets[0]
    for value in (np.nan, 1.0):
        memory[at : at + ONES.nbytes].view(np.float32)[:] = value
        if np.isnan(value):
            with pytest.raises(grpc.aio.AioRpcError, match="holds nan"):
                await door.average(shared_start(trainer.session_id))
            assert memory[24] == 0
    await door.average(shared_start(trainer.session_id))
    assert len(door.driver.calls) == 1


async def test_who_does_not_ask_is_offered_nothing_and_streams(door: Door, directory: Path) -> None:
    call = door.stub.OpenSession(pb.OpenSessionRequest(tensors=[W]))
    trainer = Trainer(door, call, await call.read())
    assert trainer.offer is None
    assert files(directory) == []
    assert await trainer.hop() == ("stream", "the trainer did not ask for shared memory")
    await trainer.streams()


async def test_a_session_with_shared_memory_may_stream_too(door: Door) -> None:
    trainer = await Trainer.open(door)
    await trainer.attach(proof=trainer.map()[:16].tobytes())
    await trainer.streams()


async def test_a_result_that_lies_elsewhere_is_streamed_and_the_word_says_so(door: Door) -> None:
    trainer = await Trainer.open(door, "elsewhere")
    assert trainer.offer is not None
    memory = trainer.map()
    await trainer.attach(proof=memory[:16].tobytes())
    at = trainer.offer.contribution_offset
    memory[at : at + ONES.nbytes].view(np.float32)[:] = ONES
    _, result = await door.average(shared_start(trainer.session_id))
    assert (np.frombuffer(result.chunk.data, np.float32) == 2).all()
    assert memory[16:24].view("<u8")[0] == 0


async def test_what_is_not_finite_is_refused_by_name(door: Door) -> None:
    trainer = await Trainer.open(door)
    assert trainer.offer is not None
    memory = trainer.map()
    await trainer.attach(proof=memory[:16].tobytes())
    at = trainer.offer.contribution_offset
    memory[at : at + ONES.nbytes].view(np.float32)[4711] = np.nan
    with pytest.raises(grpc.aio.AioRpcError, match="tensor 'w' holds nan at element 4711"):
        await door.average(shared_start(trainer.session_id))
    assert door.driver.calls == []


async def test_whatever_a_trainer_writes_into_the_header_hurts_only_itself(door: Door) -> None:
    trainer = await Trainer.open(door)
    memory = trainer.map()
    await trainer.attach(proof=memory[:16].tobytes())
    memory[:4096] = 0xFF
    [receipt] = await door.average(shared_start(trainer.session_id))
    assert receipt.receipt.outcome == pb.OUTCOME_COMPLETE


async def test_a_trainer_that_cannot_map_says_why_and_streams(door: Door, directory: Path) -> None:
    trainer = await Trainer.open(door)
    await trainer.attach(why_not="Permission denied")
    assert files(directory) == []
    assert await trainer.hop() == ("stream", "the trainer cannot share memory: Permission denied")
    await trainer.streams()


@pytest.mark.parametrize("size", [0, 4096, 1 << 20])
async def test_a_file_whose_size_was_changed_is_not_used(door: Door, directory: Path, size: int) -> None:
    trainer = await Trainer.open(door)
    assert trainer.offer is not None
    proof = trainer.map()[:16].tobytes()
    os.truncate(trainer.offer.path, size)
    with pytest.raises(grpc.aio.AioRpcError, match=f"{size} bytes instead of") as caught:
        await trainer.attach(proof=proof)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert files(directory) == []
    transport, why = await trainer.hop()
    assert transport == "stream" and f"{size} bytes instead of" in why
    await trainer.streams()


async def test_a_trainer_that_sees_another_file_of_that_name_streams(door: Door) -> None:
    trainer = await Trainer.open(door)
    with pytest.raises(grpc.aio.AioRpcError, match="the trainer sees another file at"):
        await trainer.attach(proof=bytes(16))
    await trainer.streams()


async def test_shared_values_without_shared_memory_are_refused(door: Door) -> None:
    trainer = await Trainer.open(door)
    with pytest.raises(grpc.aio.AioRpcError, match="has no shared memory: stream"):
        await door.average(shared_start(trainer.session_id))
    await trainer.attach(why_not="no")
    for again in ({"why_not": "no"}, {"proof": bytes(16)}):
        with pytest.raises(grpc.aio.AioRpcError, match="no offer of shared memory to answer"):
            await trainer.attach(**again)


async def test_without_room_the_daemon_says_how_much_is_needed_and_where(open_door: OpenDoor, directory: Path) -> None:
    door = await open_door(vector_bytes_max=1 << 60)
    huge = pb.Tensor(name="w", shape=[1 << 50], data_type=pb.DATA_TYPE_FLOAT32)
    trainer = await Trainer.open(door, rounds=1, tensor=huge)
    assert trainer.offer is None
    transport, why = await trainer.hop()
    assert transport == "stream"
    assert why.startswith(f"{2 * (1 << 52) + 4096} bytes are needed in {directory}/moshpitd-{os.geteuid()}: only ")
    assert why.endswith("make room there, or give another directory (--shared-memory-dir)")
    assert files(directory) == []


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("off", "switched off (--shared-memory-dir off)"),
        ("/nowhere/at/all", "there is no directory /nowhere/at/all to share memory in: give one (--shared-memory-dir)"),
    ],
)
async def test_without_a_directory_the_daemon_serves_and_says_why(open_door: OpenDoor, setting: str, why: str) -> None:
    trainer = await Trainer.open(await open_door(setting))
    assert trainer.offer is None
    assert await trainer.hop() == ("stream", why)
    await trainer.streams()


async def test_a_directory_that_others_may_enter_is_not_used(door: Door, directory: Path) -> None:
    (directory / f"moshpitd-{os.geteuid()}").chmod(0o755)
    trainer = await Trainer.open(door)
    assert trainer.offer is None
    transport, why = await trainer.hop()
    assert transport == "stream" and "open to others" in why and "--shared-memory-dir" in why


async def test_a_trainer_that_leaves_without_an_answer_leaves_no_file(door: Door, directory: Path) -> None:
    trainer = await Trainer.open(door)
    assert len(files(directory)) == 1
    trainer.call.cancel()
    await door.driver.happened("closed default")
    assert files(directory) == []


async def test_what_nobody_holds_is_swept_and_what_another_daemon_offers_is_not(
    door: Door, open_door: OpenDoor, directory: Path
) -> None:
    offered = await Trainer.open(door)
    assert offered.offer is not None
    (stale := Path(offered.offer.path).with_name("of-an-older-run")).write_bytes(bytes(8192))
    await open_door()
    assert not stale.exists()
    await offered.attach(proof=offered.map()[:16].tobytes())
    stale.write_bytes(bytes(8192))
    await Trainer.open(door, "next")
    assert not stale.exists()


async def test_a_cancelled_offer_leaves_no_file(directory: Path) -> None:
    layout = Layout.of([TensorSpec("w", (8 << 20,), "float32")])
    offering = asyncio.create_task(SharedMemoryDirectory(str(directory)).offer(layout, results=1))
    await asyncio.sleep(0)
    assert len(files(directory)) == 1
    offering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await offering
    assert files(directory) == []

"""Transfers: chunks find their member, whatever carries them, and nobody speaks in another's name."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc.aio
import pytest

from moshpitd.averaging.messages import Group
from moshpitd.averaging.names import GroupId, Rank
from moshpitd.identity import Identity
from moshpitd.peer import wire
from moshpitd.peer.channels import PeerConfig
from moshpitd.peer.v1 import peer_pb2
from tests.peer.houses import CONFIG, DEADLINE_S, GROUP_ID, SESSION, SWARM, House, Houses, chunk, group_of, until

OTHER_GROUP_ID = GroupId(b"h" * 16)


def over(transport: str, **more: int | float) -> PeerConfig:
    return dataclasses.replace(CONFIG, transport=transport, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ours_over", "theirs_over", "expected"),
    [
        ("auto", "auto", "tcp"),
        ("tcp", "auto", "tcp"),
        ("auto", "tcp", "tcp"),
        ("grpc", "auto", "grpc"),
        ("auto", "grpc", "grpc"),
    ],
)
async def test_chunks_travel_both_ways_whoever_dialled(
    house: Houses, ours_over: str, theirs_over: str, expected: str
) -> None:
    ours, theirs = await house(config=over(ours_over)), await house(config=over(theirs_over))
    group = group_of(ours, theirs)
    ours.told.outgoing[Rank(1)] = [chunk(index, bytes([index]) * 1_000_000) for index in range(5)]
    theirs.told.outgoing[Rank(0)] = [chunk(9, b"")]
    ours.door.open_streams(SESSION, group, Rank(0))  # ours comes first and has to wait for theirs
    theirs.door.open_streams(SESSION, group, Rank(1))
    await until(lambda: len(theirs.told.chunks) == 5 and ours.told.chunks)
    assert [(rank, index) for rank, index, _ in theirs.told.chunks] == [(0, index) for index in range(5)]
    assert all(payload == bytes([index]) * 1_000_000 for _, index, payload in theirs.told.chunks)
    assert ours.told.chunks == [(1, 9, b"")]
    theirs.told.outgoing[Rank(0)] = [chunk(10, b"later")]
    theirs.door.ring(GROUP_ID, Rank(0))
    await until(lambda: len(ours.told.chunks) == 2)
    for each in (ours, theirs):
        each.door.close_streams(GROUP_ID)
    assert ours.told.transports == {Rank(1): expected} and theirs.told.transports == {Rank(0): expected}
    assert ours.told.streams_lost == theirs.told.streams_lost == []


@pytest.mark.parametrize("transport", ["grpc", "tcp"])
async def test_who_is_ahead_is_not_read_from_until_the_bell_rings(house: Houses, transport: str) -> None:
    ours, theirs = await house(config=over(transport)), await house(config=over(transport))
    ours.told.outgoing[Rank(1)] = [chunk(index, bytes(1_000_000)) for index in range(60)]
    theirs.told.outgoing[Rank(0)] = [chunk(9, b"the other way goes on")]
    theirs.told.chunks_wanted = 3
    for each, rank in ((ours, 0), (theirs, 1)):
        each.door.open_streams(SESSION, group_of(ours, theirs), Rank(rank))
    await until(lambda: len(theirs.told.chunks) == 3 and ours.told.chunks)
    theirs.told.chunks_wanted = 5
    theirs.door.read_on(GROUP_ID, Rank(0))
    await until(lambda: len(theirs.told.chunks) == 5)
    for _ in range(200):
        await asyncio.sleep(0)
    assert len(theirs.told.chunks) == 5
    assert ours.told.outgoing[Rank(1)], "the sender feels it: the rest was never pulled"
    theirs.told.chunks_wanted = 61
    theirs.door.read_on(GROUP_ID, Rank(0))
    await until(lambda: len(theirs.told.chunks) == 60)
    for each in (ours, theirs):
        each.door.close_streams(GROUP_ID)
    assert ours.told.streams_lost == theirs.told.streams_lost == []


@pytest.mark.parametrize("transport", ["grpc", "tcp"])
async def test_over_a_long_way_two_members_use_several_links(house: Houses, transport: str) -> None:
    ours = await house(config=over(transport, links=4))
    theirs = await house(config=over(transport))
    ours.told.outgoing[Rank(1)] = [chunk(index, bytes([index]) * 300_000) for index in range(40)]
    for each, rank in ((ours, 0), (theirs, 1)):
        each.door.open_streams(SESSION, group_of(ours, theirs), Rank(rank))
    await until(lambda: len(theirs.told.chunks) == 40)
    assert sorted(index for _, index, _ in theirs.told.chunks) == list(range(40))
    assert theirs.callers() == 4
    for each in (ours, theirs):
        each.door.close_streams(GROUP_ID)
    assert ours.told.streams_lost == theirs.told.streams_lost == []


async def test_a_tcp_port_that_cannot_be_reached_costs_one_try_and_not_the_round(house: Houses) -> None:
    ours, theirs = await house(), await house()
    with socket.socket() as behind_a_firewall:
        behind_a_firewall.bind(("127.0.0.1", 0))  # bound, not listening: it refuses
        group = group_of(ours, theirs, bulk_port=behind_a_firewall.getsockname()[1])
        ours.told.outgoing[Rank(1)] = [chunk(0, b"abc")]
        for each, rank in ((ours, 0), (theirs, 1)):
            each.door.open_streams(SESSION, group, Rank(rank))
        await until(lambda: theirs.told.chunks)
    assert ours.told.transports == {Rank(1): "grpc"}
    assert ours.told.streams_lost == theirs.told.streams_lost == []
    for each in (ours, theirs):
        each.door.close_streams(GROUP_ID)
    later = dataclasses.replace(group_of(ours, theirs), group_id=OTHER_GROUP_ID)
    for each, rank in ((ours, 0), (theirs, 1)):
        each.door.open_streams(SESSION, later, Rank(rank))
    await until(lambda: len(ours.told.opened) == 2)
    assert ours.told.transports == {Rank(1): "grpc"}  # though its port is right now


@pytest.mark.parametrize(
    ("ours_over", "theirs_over", "complaint"),
    [("tcp", "grpc", "--transport tcp"), ("grpc", "tcp", "failed_precondition")],
)
async def test_two_that_share_no_way_tell_which(
    house: Houses, ours_over: str, theirs_over: str, complaint: str
) -> None:
    ours, theirs = await house(config=over(ours_over)), await house(config=over(theirs_over))
    for each, rank in ((ours, 0), (theirs, 1)):
        each.door.open_streams(SESSION, group_of(ours, theirs), Rank(rank))
    await until(lambda: ours.told.streams_lost)
    assert ours.told.streams_lost[0][0] == 1 and complaint in ours.told.streams_lost[0][1]


@asynccontextmanager
async def transfer(at: House, opening: bytes) -> AsyncIterator[grpc.aio.StreamStreamCall[bytes, bytes]]:
    async with grpc.aio.insecure_channel(at.address) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
            "/moshpitd.peer.v1.PeerService/Transfer"
        )()
        try:
            await call.write(opening)
            yield call
        finally:
            call.cancel()


def opening_of(group: Group, signer: Identity, at: House, **change: object) -> bytes:
    honest = peer_pb2.TransferOpen(
        group_id=group.group_id,
        rank=0,
        public_key=signer.public_key,
        signature=signer.sign("transfer", SWARM, group.group_id, group.token, at.id.encode(), bytes(4)),
        session=SESSION,
    )
    for name, value in change.items():
        setattr(honest, name, value)
    return peer_pb2.TransferRequest(open=honest).SerializeToString()


async def ended(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> str:
    async with asyncio.timeout(DEADLINE_S):
        with suppress(grpc.aio.AioRpcError):
            while isinstance(await call.read(), bytes):
                pass
        return str(await call.details())


async def test_an_honest_opening_by_hand_is_welcome(house: Houses) -> None:
    ours, member = await house(), await house()
    group = group_of(member, ours)
    ours.told.outgoing[Rank(0)] = [chunk(3, b"abc")]
    ours.door.open_streams(SESSION, group, Rank(1))
    async with transfer(ours, opening_of(group, member.identity, ours)) as call, asyncio.timeout(DEADLINE_S):
        read = await call.read()
        assert isinstance(read, bytes) and bytes(wire.chunk_from(read).payload) == b"abc"


@pytest.mark.parametrize(
    ("forge", "complaint"),
    [
        (lambda g, member, liar, at: opening_of(g, liar, at), "another member's name"),
        (lambda g, member, liar, at: opening_of(g, liar, at, public_key=member.public_key), "not signed"),
        (lambda g, member, liar, at: opening_of(g, member, at, signature=b""), "not signed"),
        (
            lambda g, member, liar, at: opening_of(dataclasses.replace(g, token=b"?" * 16), member, at),
            "not signed",
        ),
        (lambda g, member, liar, at: opening_of(g, member, at, rank=1), "impossible rank"),
        (lambda g, member, liar, at: opening_of(g, member, at, rank=2), "impossible rank"),
        (lambda g, member, liar, at: opening_of(g, member, at, group_id=b"short"), "no group"),
        (lambda g, member, liar, at: opening_of(g, member, at, group_id=b"?" * 16), "no such group"),
        (lambda g, member, liar, at: b"\x00garbage", ""),
        (lambda g, member, liar, at: b"", ""),
    ],
    ids=["name", "key", "unsigned", "token", "our rank", "rank", "id", "unknown", "garbage", "empty"],
)
async def test_a_transfer_is_refused_to_whoever_is_not_that_member(
    house: Houses, tmp_path: Path, forge: Callable[[Group, Identity, Identity, House], bytes], complaint: str
) -> None:
    ours, member = await house(), await house()
    liar = Identity.open(tmp_path / "liar")
    group = group_of(member, ours)
    ours.told.outgoing[Rank(0)] = [chunk(3, b"secret")]
    ours.door.open_streams(SESSION, group, Rank(1))
    async with transfer(ours, forge(group, member.identity, liar, ours)) as call:
        assert complaint in await ended(call)
    assert len(ours.told.outgoing[Rank(0)]) == 1 and ours.told.chunks == []


async def test_a_transfer_that_is_never_opened_is_not_kept(house: Houses) -> None:
    ours = await house()
    async with grpc.aio.insecure_channel(ours.address) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
            "/moshpitd.peer.v1.PeerService/Transfer"
        )()
        try:
            assert await ended(call)
        finally:
            call.cancel()


async def test_garbage_instead_of_chunks_costs_its_sender_the_stream(house: Houses) -> None:
    ours, member = await house(), await house()
    group = group_of(member, ours)
    ours.door.open_streams(SESSION, group, Rank(1))
    async with transfer(ours, opening_of(group, member.identity, ours)) as call:
        await call.write(b"\x12\x03abc")
        assert "chunk" in await ended(call)
    await until(lambda: ours.told.streams_lost)
    assert ours.told.streams_lost[0][0] == 0

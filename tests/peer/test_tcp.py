"""The plain TCP path: who is let in, what a stranger costs, and that connections stay warm."""

from __future__ import annotations

import asyncio
import dataclasses
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.names import GroupId, Rank
from moshpitd.identity import Identity
from moshpitd.peer.channels import PeerConfig
from moshpitd.peer.conversation import Introduction
from moshpitd.peer.links import LinkBroken
from moshpitd.peer.tcp import PURPOSE, BulkPortError, Connection, TcpPath
from moshpitd.peer.v1 import peer_pb2
from tests.peer.houses import CONFIG, DEADLINE_S, SESSION, SWARM, House, Houses, chunk, group_of, until


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


@dataclasses.dataclass
class Caller:
    """Speaks the path's protocol by hand."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    identity: Identity

    def says(self, *bodies: bytes) -> None:
        for body in bodies:
            self.writer.write(frame(body))

    async def hears(self) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            (size,) = struct.unpack(">I", await self.reader.readexactly(4))
            return await self.reader.readexactly(size)

    async def is_hung_up(self) -> bool:
        async with asyncio.timeout(DEADLINE_S):
            try:
                while await self.reader.read(1 << 16):
                    pass
            except ConnectionResetError:
                pass
        return True

    async def introduces_itself(self, *, name: Identity | None = None, purpose: str = PURPOSE) -> None:
        """The hello and the proof; with another's name it has nothing but its own key to sign with."""
        introduction = Introduction(self.identity, SWARM)
        hello = introduction.hello(b"n" * 32)
        if name is not None:
            hello.public_key = name.public_key
        self.says(peer_pb2.ConverseRequest(hello=hello).SerializeToString())
        theirs = peer_pb2.ConverseResponse.FromString(await self.hears()).hello
        proof = peer_pb2.Proof(signature=introduction.sign(f"{purpose}dialler", hello, theirs))
        self.says(peer_pb2.ConverseRequest(proof=proof).SerializeToString())

    def opens(self, at: House, *, signer: Identity | None = None, token: bytes = b"t" * 16) -> None:
        """A transfer of the first member of the group."""
        signer = signer or self.identity
        signed = (SWARM, b"g" * 16, token, at.id.encode(), bytes(4))
        opening = peer_pb2.TransferOpen(
            group_id=b"g" * 16,
            rank=0,
            public_key=signer.public_key,
            signature=signer.sign("transfer", *signed),
            session=SESSION,
        )
        self.says(peer_pb2.TransferRequest(open=opening).SerializeToString())


@asynccontextmanager
async def calling(at: House, identity: Identity) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection("127.0.0.1", at.door.bulk_port)
    try:
        yield Caller(reader, writer, identity)
    finally:
        writer.close()


async def test_a_member_by_hand_is_welcome(house: Houses) -> None:
    """So what the strangers below leave out is what they are refused for."""
    ours, member = await house(), await house()
    ours.told.outgoing[Rank(0)] = [chunk(3, b"abc")]
    ours.door.open_streams(SESSION, group_of(member, ours), Rank(1))
    async with calling(ours, member.identity) as caller:
        await caller.introduces_itself()
        caller.opens(ours)
        assert (await caller.hears()).endswith(b"abc")


async def test_nobody_is_let_in_with_anothers_key(house: Houses, tmp_path: Path) -> None:
    ours, member = await house(), await house()
    liar = Identity.open(tmp_path / "liar")
    ours.told.outgoing[Rank(0)] = [chunk(3, b"secret")]
    ours.door.open_streams(SESSION, group_of(member, ours), Rank(1))
    async with calling(ours, liar) as caller:
        await caller.introduces_itself(name=member.identity)
        caller.opens(ours)
        assert await caller.is_hung_up()
    assert len(ours.told.outgoing[Rank(0)]) == 1


async def test_a_members_opening_overheard_is_worthless_on_anothers_connection(house: Houses, tmp_path: Path) -> None:
    ours, member = await house(), await house()
    liar = Identity.open(tmp_path / "liar")
    ours.told.outgoing[Rank(0)] = [chunk(3, b"secret")]
    ours.door.open_streams(SESSION, group_of(member, ours), Rank(1))
    async with calling(ours, liar) as caller:
        await caller.introduces_itself()
        caller.opens(ours, signer=member.identity)
        assert await caller.is_hung_up()
    assert len(ours.told.outgoing[Rank(0)]) == 1


async def test_a_member_without_the_groups_token_gets_nothing(house: Houses) -> None:
    ours, member = await house(), await house()
    ours.told.outgoing[Rank(0)] = [chunk(3, b"secret")]
    ours.door.open_streams(SESSION, group_of(member, ours), Rank(1))
    async with calling(ours, member.identity) as caller:
        await caller.introduces_itself()
        caller.opens(ours, token=b"?" * 16)
        assert await caller.is_hung_up()
    assert len(ours.told.outgoing[Rank(0)]) == 1


async def test_what_was_signed_for_a_conversation_opens_no_transfers(house: Houses) -> None:
    ours, member = await house(), await house()
    async with calling(ours, member.identity) as caller:
        await caller.introduces_itself(purpose="")
        assert await caller.is_hung_up()


@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HTTP/1.1\r\n\r\n", frame(b"\xff" * 40), frame(b""), struct.pack(">I", 1 << 31), frame(bytes(2000))],
    ids=["nothing", "another protocol", "garbage", "an end mark", "a frame without end", "a long hello"],
)
async def test_a_stranger_is_hung_up_on(house: Houses, said: bytes, tmp_path: Path) -> None:
    ours = await house()
    async with calling(ours, Identity.open(tmp_path / "stranger")) as caller:
        caller.writer.write(said)
        assert await caller.is_hung_up()
    await until(lambda: ours.callers() == 0)


async def test_garbage_instead_of_chunks_costs_its_sender_the_transfer(house: Houses) -> None:
    ours, member = await house(), await house()
    ours.door.open_streams(SESSION, group_of(member, ours), Rank(1))
    async with calling(ours, member.identity) as caller:
        await caller.introduces_itself()
        caller.opens(ours)
        caller.says(b"\x12\x03abc")
        assert await caller.is_hung_up()
    await until(lambda: ours.told.streams_lost)
    assert ours.told.streams_lost[0][0] == 0 and "chunk" in ours.told.streams_lost[0][1]


async def test_a_member_that_dies_is_told_at_once(house: Houses) -> None:
    ours, member = await house(), await house()
    ours.door.open_streams(SESSION, group_of(member, ours), Rank(1))
    async with calling(ours, member.identity) as caller:
        await caller.introduces_itself()
        caller.opens(ours)
        caller.writer.write(struct.pack(">I", 1000) + b"half a fra")
    await until(lambda: ours.told.streams_lost)
    assert ours.told.streams_lost == [(Rank(0), "its stream broke (connection closed)")]


# ---- the connections themselves


async def echo(link: Connection, opening: bytes | memoryview) -> None:
    """A transfer that sends back what it was opened with and all that follows."""
    await link.write([opening])
    async for frame in link.frames():
        await link.write([frame])
    await link.done_writing()


@asynccontextmanager
async def paths(tmp_path: Path) -> AsyncIterator[tuple[TcpPath, TcpPath, Identity]]:
    """Two daemons' paths, and the second one's identity."""
    identities = [Identity.open(tmp_path / name) for name in ("ours", "theirs")]
    ours, theirs = (
        TcpPath.open("127.0.0.1", 0, introduction=Introduction(each, SWARM), config=CONFIG) for each in identities
    )
    theirs.serve(echo)
    try:
        yield ours, theirs, identities[1]
    finally:
        await ours.close()
        await theirs.close()


async def exchange(ours: TcpPath, theirs: TcpPath, who: Identity, *frames: bytes) -> Connection:
    """One transfer of these frames; the connection that carried it."""
    async with asyncio.timeout(DEADLINE_S), ours.dial(who.peer_id, ("127.0.0.1", theirs.port)) as link:
        for each in frames:
            await link.write([each[:3], each[3:]])
        await link.done_writing()
        assert [bytes(each) async for each in link.frames()] == list(frames)
        return link


async def test_a_connection_serves_one_transfer_after_the_other(tmp_path: Path) -> None:
    async with paths(tmp_path) as (ours, theirs, who):
        first = await exchange(ours, theirs, who, b"opening", b"x" * 3_000_000, b"yz")
        assert await exchange(ours, theirs, who, b"opening", b"more") is first


async def test_a_transfer_that_broke_leaves_no_connection_behind(tmp_path: Path) -> None:
    async with paths(tmp_path) as (ours, theirs, who):
        with pytest.raises(RuntimeError):
            async with ours.dial(who.peer_id, ("127.0.0.1", theirs.port)) as broken:
                await broken.write([b"opening"])
                raise RuntimeError
        assert await exchange(ours, theirs, who, b"opening") is not broken


async def test_a_connection_that_died_while_it_was_idle_is_not_used(tmp_path: Path) -> None:
    """Its peer was restarted, say. To take it would accuse a living member."""
    async with paths(tmp_path) as (ours, theirs, who):
        first = await exchange(ours, theirs, who, b"opening")
        await theirs.close()
        again = TcpPath.open("127.0.0.1", theirs.port, introduction=Introduction(who, SWARM), config=CONFIG)
        again.serve(echo)
        try:
            assert await exchange(ours, again, who, b"opening") is not first
        finally:
            await again.close()


async def test_whoever_answers_there_must_be_the_one_that_was_dialled(tmp_path: Path) -> None:
    async with paths(tmp_path) as (ours, theirs, _):
        somebody = Identity.open(tmp_path / "somebody")
        with pytest.raises(RemoteProtocolError, match="answers there"):
            await exchange(ours, theirs, somebody, b"opening")


@pytest.mark.parametrize("host", ["", "127.0.0.1", "no such host.invalid", "a" * 300, "\0"])
async def test_an_address_where_nobody_is_breaks_nothing_but_the_link(tmp_path: Path, host: str) -> None:
    async with paths(tmp_path) as (ours, _, who):
        with pytest.raises(LinkBroken, match="not reached"):
            async with ours.dial(who.peer_id, (host, 1)):
                pass


# ---- in a door


async def test_a_member_that_never_ends_a_transfer_does_not_hold_it_open(house: Houses) -> None:
    ours, member = await house(config=dataclasses.replace(CONFIG, linger_s=0.1)), await house()
    ours.door.open_streams(SESSION, group_of(member, ours), Rank(1))
    async with calling(ours, member.identity) as caller:
        await caller.introduces_itself()
        caller.opens(ours)
        await until(lambda: ours.told.transports)
        ours.door.close_streams(GroupId(b"g" * 16))
        assert await caller.is_hung_up()
    assert ours.told.streams_lost == []


async def test_a_peer_has_only_so_many_connections(house: Houses) -> None:
    ours = await house(config=dataclasses.replace(CONFIG, connections_of_one_max=2))
    greedy = await house()
    async with calling(ours, greedy.identity) as one, calling(ours, greedy.identity) as two:
        for each in (one, two):
            await each.introduces_itself()
        await until(lambda: ours.callers() == 2)
        async with calling(ours, greedy.identity) as three:
            introduction = Introduction(greedy.identity, SWARM)
            three.says(peer_pb2.ConverseRequest(hello=introduction.hello(b"n" * 32)).SerializeToString())
            assert await three.is_hung_up()


async def test_a_taken_port_is_told_by_its_own_name(house: Houses, tmp_path: Path) -> None:
    ours = await house()
    introduction = Introduction(Identity.open(tmp_path / "other"), SWARM)
    with pytest.raises(BulkPortError):
        TcpPath.open("127.0.0.1", ours.door.bulk_port, introduction=introduction, config=PeerConfig())

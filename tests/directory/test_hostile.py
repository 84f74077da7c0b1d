"""Whatever anybody sends to the UDP port, the node lives on, and nothing unsigned enters a roster."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
import umsgpack

from moshpitd.averaging.names import key
from moshpitd.directory import Address
from moshpitd.directory.addresses import pack_nodes
from moshpitd.directory.protocol import HELLO_CONTEXT
from moshpitd.directory.records import Notary
from moshpitd.directory.shelf import ENTRY
from moshpitd.identity import Identity
from tests.directory.conftest import QUICK, Member, RawClient, Swarm, eventually, reads

HERE = key("here")
NODE = b"n" * 20


def request(message: object) -> bytes:
    return b"\0" + bytes(20) + umsgpack.packb(message)


BOMBS = {
    "empty request": b"\0",
    "no message": b"\0" + bytes(20),
    "nested lists": b"\0" + bytes(20) + b"\x91" * 1_000,
    "nested maps": b"\0" + bytes(20) + b"\x81\xc0" * 500,
    "a list of four billion": b"\0" + bytes(20) + b"\xdd\xff\xff\xff\xff",
    "a map of four billion": b"\0" + bytes(20) + b"\xdf\xff\xff\xff\xff",
    "bytes of four billion": b"\0" + bytes(20) + b"\xc6\xff\xff\xff\xff",
    "a moment beyond all calendars": b"\0" + bytes(20) + b"\xc7\x0c\xff" + b"\xff" * 12,
    "broken text": b"\0" + bytes(20) + b"\xa4\xff\xff\xff\xff",
    "a list as a key": b"\0" + bytes(20) + b"\x81\x91\x80\xc0",
    "too large": request(["announce", [NODE, HERE, bytes(2_000), 0, 0]]),
    "no list": request({"hello": 1}),
    "a name that is no text": request([b"hello", [NODE]]),
    "no arguments": request(["hello", []]),
    "a short node id": request(["find_node", [b"n", HERE]]),
    "a node id that is no bytes": request(["find_node", ["n" * 20, HERE]]),
    "a list for a target": request(["find_node", [NODE, [HERE]]]),
    "a short key": request(["look_up", [NODE, b"k", "lease", 0, 0, 0, 1]]),
    "no lanes": request(["look_up", [NODE, HERE, "lease", 0, 0, 0, 0]]),
    "a lane too many": request(["look_up", [NODE, HERE, "lease", 0, 0, 64, 65]]),
    "numbers that are none": request(["look_up", [NODE, HERE, "lease", None, "0", 0.5, 1]]),
    "too many arguments": request(["hello", [NODE, *range(50)]]),
    "an inner name": request(["__init__", [NODE]]),
    "an answer nobody asked for": b"\1" + bytes(20) + umsgpack.packb([NODE, True]),
}


class Liar(asyncio.DatagramProtocol):
    """A peer with a key of its own that answers requests as it likes."""

    def __init__(self, identity: Identity) -> None:
        self.entries: list[tuple[int, bytes]] = []
        self.nodes = b""
        self.left = 0
        self.proves = True
        self.greeted = 0
        self._identity = identity

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def introduce_to(self, member: Member) -> None:
        self.transport.sendto(request(["find_node", [self._identity.node_id, HERE]]), member.socket.address)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if data[0] != 0:
            return
        name, (asker, *args) = umsgpack.unpackb(data[21:])
        answer: list[object]
        match name:
            case "hello":
                self.greeted += 1
                incarnation = self._identity.incarnation
                parts = b"swarm", asker, args[1], incarnation.to_bytes(8, "big"), b""
                proof = self._identity.sign(HELLO_CONTEXT, *parts) if self.proves else bytes(64)
                answer = [self._identity.public_key, incarnation, b"", Address(*addr).pack(), b"", proof]
            case "find_node":
                answer = [self.nodes]
            case _:
                page = b"".join(ENTRY.pack(ttl_ms, len(raw)) + raw for ttl_ms, raw in self.entries)
                answer = [True, self.nodes, self._identity.incarnation, 1, self.left, 1, 1, page]
        self.transport.sendto(b"\1" + data[1:21] + umsgpack.packb([self._identity.node_id, *answer]), addr)


@pytest.fixture
async def liar(tmp_path: Path) -> AsyncIterator[Liar]:
    """Not yet introduced to anybody."""
    liar = Liar(Identity.open(tmp_path / "liar"))
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: liar, local_addr=("127.0.0.1", 0))
    yield liar
    transport.close()


async def lives(member: Member, client: RawClient) -> bool:
    return (await client.ask(member, "find_node", HERE))[0] == member.identity.node_id


@pytest.mark.parametrize("name", BOMBS)
async def test_a_hostile_datagram_costs_nothing(swarm: Swarm, raw_client: RawClient, name: str) -> None:
    one, other = await swarm.start_many(2)
    raw_client.send(one, BOMBS[name])
    assert await lives(one, raw_client)
    await other.directory.announce(HERE, "lease", b"", 30.0)
    assert len(await one.directory.look_up(HERE, "lease")) == 1


async def test_noise_and_mutated_requests_do_no_harm(swarm: Swarm, raw_client: RawClient) -> None:
    one, other = await swarm.start_many(2)
    rng = random.Random(1)
    good = [
        request(["find_node", [NODE, HERE]]),
        request(["hello", [NODE, bytes(8), bytes(16), b""]]),
        request(["look_up", [NODE, HERE, "lease", 0, 0, 0, 1]]),
        request(["announce", [NODE, HERE, bytes(240), 0, 0]]),
    ]
    for round_ in range(3_000):
        datagram = bytearray(rng.choice(good) if round_ % 2 else bytes([rng.randrange(3)]) + rng.randbytes(60))
        for _ in range(rng.randrange(1, 6)):
            datagram[rng.randrange(len(datagram))] = rng.randrange(256)
        raw_client.send(one, bytes(datagram[: rng.randrange(1, len(datagram) + 1)]))
        if round_ % 50 == 0:
            assert await lives(one, raw_client)
    assert one.directory.counters.malformed > 1_000
    await other.directory.announce(HERE, "lease", b"", 30.0)
    assert len(await one.directory.look_up(HERE, "lease")) == 1
    assert list(one.neighbours) == [other.identity.peer_id]


@pytest.mark.parametrize(
    "message",
    [
        ["store", [NODE, HERE, b"value"]],
        ["store", [NODE, HERE, ["list"]]],
        ["find_value", [NODE, HERE]],
        ["ping", [NODE]],
        ["stun", []],
    ],
)
async def test_the_packages_own_requests_are_not_answered(
    swarm: Swarm, raw_client: RawClient, message: list[object]
) -> None:
    member = await swarm.start("member")
    raw_client.send(member, b"\0" + b"i" * 20 + umsgpack.packb(message))
    assert await lives(member, raw_client)
    while not raw_client.inbox.empty():
        assert raw_client.inbox.get_nowait()[:21] != b"\1" + b"i" * 20
    assert member.directory.counters.malformed == 1


async def test_only_what_its_owner_signed_for_this_key_and_swarm_enters_a_roster(
    swarm: Swarm, raw_client: RawClient, tmp_path: Path
) -> None:
    members = await swarm.start_many(3)
    mallory = Identity.open(tmp_path / "mallory")
    genuine = Notary(b"swarm", QUICK).write(mallory, HERE, "lease", b"genuine", 30.0).raw
    forged = [
        genuine.replace(b"genuine", b"forgery"),
        genuine[:-64] + bytes(64),
        genuine[:-64],
        members[1].identity.public_key.join([genuine[:1], genuine[33:]]),
        Notary(b"other swarm", QUICK).write(mallory, HERE, "lease", b"other swarm", 30.0).raw,
        Notary(b"swarm", QUICK).write(mallory, key("elsewhere"), "lease", b"other key", 30.0).raw,
    ]
    for raw in forged:
        for member in members:
            assert (await raw_client.ask(member, "announce", HERE, raw, 0, 0))[1] is False
    for member in members:
        assert await member.directory.look_up(HERE, "lease") == ()
        assert member.directory.counters.records_refused == len(forged)
    for member in members:
        assert (await raw_client.ask(member, "announce", HERE, genuine, 0, 0))[1] is True
    assert [one.body for one in await members[0].directory.look_up(HERE, "lease")] == [b"genuine"]


async def test_an_older_record_played_again_changes_nothing(
    swarm: Swarm, raw_client: RawClient, tmp_path: Path
) -> None:
    one, other = await swarm.start_many(2)
    owner, notary = Identity.open(tmp_path / "owner"), Notary(b"swarm", QUICK)
    old, new = (notary.write(owner, HERE, "lease", body, 30.0) for body in (b"old", b"new"))
    gone = notary.write(owner, HERE, "lease", b"", 30.0, withdrawn=True)
    for member in (one, other):
        for record, taken in ((new, True), (old, False), (new, True), (gone, True), (new, False)):
            assert (await raw_client.ask(member, "announce", HERE, record.raw, 0, 0))[1] is taken
    assert await one.directory.look_up(HERE, "lease") == ()


async def test_a_holder_that_lies_is_not_believed(swarm: Swarm, liar: Liar, tmp_path: Path) -> None:
    victim, notary = Identity.open(tmp_path / "victim"), Notary(b"swarm", QUICK)
    real = notary.write(victim, HERE, "lease", b"real", 0.5).raw
    plan = notary.write(Identity.open(tmp_path / "other"), HERE, "plan", b"another kind", 30.0).raw
    liar.entries = [(10**9, real), (30_000, real.replace(b"real", b"fake")), (30_000, b"junk"), (30_000, plan)]
    honest = await swarm.start("honest")
    liar.introduce_to(honest)
    await eventually(lambda: len(honest.neighbours) == 1)
    (one,) = await honest.directory.look_up(HERE, "lease")
    assert one.body == b"real" and one.ttl_s <= 0.5, "a holder may not lengthen what was signed"
    assert honest.directory.counters.records_refused == 2
    await reads(honest, HERE, "lease", lambda roster: not roster)


async def test_a_holder_that_promises_endless_pages_is_left(swarm: Swarm, liar: Liar) -> None:
    liar.left = 10**9
    honest = await swarm.start("honest")
    liar.introduce_to(honest)
    await eventually(lambda: len(honest.neighbours) == 1)
    assert await honest.directory.look_up(HERE, "lease") == ()


async def test_invented_nodes_do_not_hold_up_a_look_up(swarm: Swarm, liar: Liar) -> None:
    one, other = await swarm.start_many(2)
    await other.directory.announce(HERE, "lease", b"", 30.0)
    nearest = [(HERE[:19] + bytes([number]), Address("127.0.0.1", 9)) for number in range(20)]
    liar.nodes = pack_nodes(iter(nearest))
    liar.introduce_to(one)
    await eventually(lambda: len(one.neighbours) == 2)
    assert len(await one.directory.look_up(HERE, "lease")) == 1
    assert len(one.neighbours) == 2


async def test_nobody_becomes_a_contact_without_the_key_of_its_id(swarm: Swarm, liar: Liar) -> None:
    liar.proves = False
    honest = await swarm.start("honest")
    liar.introduce_to(honest)
    await eventually(lambda: liar.greeted > 0)
    await eventually(lambda: honest.directory.counters.in_flight == 0)
    assert honest.neighbours == {}


async def test_a_flood_of_invented_senders_is_not_greeted_without_bound(swarm: Swarm, raw_client: RawClient) -> None:
    member = await swarm.start("member")
    for number in range(2_000):
        raw_client.send(member, b"\0" + bytes(20) + umsgpack.packb(["find_node", [number.to_bytes(20, "big"), HERE]]))
        if number % 50 == 0:
            assert await lives(member, raw_client)
    assert member.directory.counters.in_flight <= QUICK.meetings_max
    assert member.neighbours == {}
    await eventually(lambda: member.directory.counters.in_flight == 0)

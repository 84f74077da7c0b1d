"""The door to other daemons: who gets in, in whose name, and what nonsense costs whom."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio
import pytest

from moshpitd.averaging.messages import Address, Farewell, Heartbeat, PlanWanted
from moshpitd.identity import Identity
from moshpitd.peer import wire
from moshpitd.peer.conversation import Introduction
from moshpitd.peer.door import SERVICE
from moshpitd.peer.v1 import peer_pb2, peer_pb2_grpc
from tests.peer.houses import DEADLINE_S, GROUP_ID, SESSION, SWARM, House, Houses, Told, until


async def test_a_message_arrives_with_the_sender_that_its_channel_proved(house: Houses) -> None:
    ours, theirs = await house(), await house()
    ours.say(theirs, PlanWanted())
    await until(lambda: theirs.told.messages)
    theirs.say(ours, Farewell(), at="")  # back over the open conversation: no address is needed
    await until(lambda: ours.told.messages)
    assert theirs.told.messages == [(ours.id, PlanWanted())]
    assert ours.told.messages == [(theirs.id, Farewell())]
    assert ours.door.heard_from().keys() == {theirs.id}


async def test_messages_arrive_in_order_though_the_first_had_to_dial(house: Houses) -> None:
    ours, theirs = await house(), await house()
    said = [Heartbeat(GROUP_ID, number) for number in range(200)]
    for message in said:
        ours.say(theirs, message)
    await until(lambda: len(theirs.told.messages) == len(said))
    assert [message for _, message in theirs.told.messages] == said


async def test_both_dial_at_once_and_nothing_is_lost(house: Houses) -> None:
    ours, theirs = await house(), await house()
    for number in range(20):
        ours.say(theirs, Heartbeat(GROUP_ID, number))
        theirs.say(ours, Heartbeat(GROUP_ID, number))
    await until(lambda: len(theirs.told.messages) == 20 == len(ours.told.messages))
    assert ours.told.lost == theirs.told.lost == []


async def test_nobody_at_an_address_is_told_once(house: Houses) -> None:
    ours, gone = await house(), await house()
    await gone.door.close(0)
    ours.say(gone, PlanWanted())
    await until(lambda: ours.told.lost)
    ((peer, why),) = ours.told.lost
    assert peer == gone.id and gone.address in why


async def test_another_peer_at_the_address_is_found_out_and_hears_nothing(house: Houses) -> None:
    ours, expected, other = await house(), await house(), await house()
    ours.say(expected, PlanWanted(), at=other.address)
    await until(lambda: ours.told.lost)
    assert ours.told.lost == [(expected.id, f"could not be dialled at {other.address}: {other.id[:8]} answers there")]
    assert other.told.messages == []


async def test_daemons_of_other_swarms_do_not_talk_and_say_why(house: Houses) -> None:
    ours, theirs = await house(), await house(swarm=b"x" * 32)
    ours.say(theirs, PlanWanted())
    await until(lambda: ours.told.lost)
    assert "another swarm" in ours.told.lost[0][1]
    assert theirs.told.messages == []


async def test_nonsense_ends_the_conversation_of_its_sender_only(house: Houses) -> None:
    ours, liar, other = await house(), await house(), await house()
    ours.told.refuses = Farewell
    liar.say(ours, PlanWanted())
    other.say(ours, PlanWanted())
    await until(lambda: len(ours.told.messages) == 2)
    liar.say(ours, Farewell())
    await until(lambda: ours.told.lost and liar.told.lost)
    assert ours.told.lost == [(liar.id, "nonsense")]
    other.say(ours, Heartbeat(GROUP_ID, 1))
    await until(lambda: len(ours.told.messages) == 3)
    assert other.told.lost == []


async def test_one_that_leaves_is_missed_by_those_it_talked_to(house: Houses) -> None:
    ours, leaving = await house(), await house()
    ours.say(leaving, PlanWanted())
    await until(lambda: leaving.told.messages)
    leaving.say(ours, Farewell())
    await leaving.door.close()
    await until(lambda: ours.told.lost)
    assert ours.told.messages == [(leaving.id, Farewell())]
    assert leaving.told.lost == []


async def test_who_announces_its_address_learns_whether_it_can_be_dialled(house: Houses) -> None:
    ours, theirs, nowhere = await house(), await house(), await house()
    ours.door.announce_as(ours.address)
    nowhere.door.announce_as(Address("127.0.0.1:1"))
    for each in (ours, nowhere):
        each.say(theirs, PlanWanted())
        await until(lambda each=each: each.told.dialable)  # type: ignore[misc]
    assert (ours.told.dialable, nowhere.told.dialable) == ([True], [False])


# ---- forged conversations


Call = grpc.aio.StreamStreamCall[peer_pb2.ConverseRequest, peer_pb2.ConverseResponse]


class Forger:
    """Says hello by hand."""

    def __init__(self, call: Call, identity: Identity) -> None:
        self.call = call
        self.identity = identity
        self.introduction = Introduction(identity, SWARM)
        self.hello = self.introduction.hello(b"n" * 32)

    async def begin(self) -> peer_pb2.Hello:
        await self.call.write(peer_pb2.ConverseRequest(hello=self.hello))
        answer = await self.call.read()
        assert isinstance(answer, peer_pb2.ConverseResponse), await self.call.details()
        return answer.hello

    async def prove(self, signature: bytes) -> None:
        await self.call.write(peer_pb2.ConverseRequest(proof=peer_pb2.Proof(signature=signature)))

    async def speak(self) -> None:
        with suppress(grpc.aio.AioRpcError):  # the other may have hung up by now
            await self.call.write(peer_pb2.ConverseRequest(envelope=wire.envelope(SESSION, PlanWanted())))

    async def refused(self) -> str:
        """What the other said when it ended the call."""
        async with asyncio.timeout(DEADLINE_S):
            with suppress(grpc.aio.AioRpcError):
                while isinstance(await self.call.read(), peer_pb2.ConverseResponse):
                    pass
            assert await self.call.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
            return str(await self.call.details())


@asynccontextmanager
async def forger(at: House, tmp_path: Path) -> AsyncIterator[Forger]:
    async with grpc.aio.insecure_channel(at.address) as channel:
        call = peer_pb2_grpc.PeerServiceStub(channel).Converse()
        try:
            yield Forger(call, Identity.open(tmp_path / "forger"))
        finally:
            call.cancel()


async def test_an_honest_hello_is_welcome(house: Houses, tmp_path: Path) -> None:
    """So what the forgers below leave out is what they are refused for."""
    ours = await house()
    async with forger(ours, tmp_path) as honest:
        theirs = await honest.begin()
        await honest.prove(honest.introduction.sign("dialler", honest.hello, theirs))
        await honest.speak()
        await until(lambda: ours.told.messages)
    assert ours.told.messages == [(honest.identity.peer_id, PlanWanted())]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"swarm": b"x" * 32}, "another swarm"),
        ({"protocol_min": 2, "protocol_max": 7}, r"protocol 2\.\.7 .* against 1 .* update the older one"),
        ({"nonce": b""}, "without a proper key and nonce"),
        ({"public_key": b"k" * 31}, "without a proper key and nonce"),
    ],
    ids=["swarm", "version", "nonce", "key"],
)
async def test_a_hello_that_does_not_fit_is_refused_in_words(
    house: Houses, tmp_path: Path, change: dict[str, bytes | int], complaint: str
) -> None:
    ours = await house()
    async with forger(ours, tmp_path) as liar:
        for name, value in change.items():
            setattr(liar.hello, name, value)
        await liar.call.write(peer_pb2.ConverseRequest(hello=liar.hello))
        assert re.search(complaint, await liar.refused())
    assert ours.told == Told()


async def test_nobody_speaks_with_anothers_key(house: Houses, tmp_path: Path) -> None:
    ours, victim = await house(), await house()
    async with forger(ours, tmp_path) as liar:
        liar.hello.public_key = victim.identity.public_key
        theirs = await liar.begin()
        await liar.prove(liar.introduction.sign("dialler", liar.hello, theirs))
        assert "not signed by the hello's key" in await liar.refused()
    assert ours.told.messages == [] and ours.told.lost == []


async def test_a_proof_overheard_is_worthless_in_another_conversation(house: Houses, tmp_path: Path) -> None:
    ours = await house()
    async with forger(ours, tmp_path) as honest:
        theirs = await honest.begin()
        overheard = honest.introduction.sign("dialler", honest.hello, theirs)
        await honest.prove(overheard)
        await honest.speak()
        await until(lambda: ours.told.messages)
    async with forger(ours, tmp_path) as replayer:
        await replayer.begin()  # the same hello, nonce included
        await replayer.prove(overheard)
        assert "not signed by the hello's key" in await replayer.refused()
    assert len(ours.told.messages) == 1


async def test_the_answerers_own_signature_does_not_prove_the_dialler(house: Houses, tmp_path: Path) -> None:
    """A mirror: our own key, our own signature, sent back to us."""
    ours = await house()
    async with forger(ours, tmp_path) as mirror:
        mirror.hello.public_key = ours.identity.public_key
        theirs = await mirror.begin()
        await mirror.prove(theirs.signature)
        assert "not signed" in await mirror.refused()
    assert ours.told.messages == []


async def test_nothing_is_heard_before_the_proof(house: Houses, tmp_path: Path) -> None:
    ours = await house()
    async with forger(ours, tmp_path) as eager:
        await eager.speak()
        await eager.refused()
    async with forger(ours, tmp_path) as eager:
        await eager.begin()
        await eager.speak()
        await eager.refused()
    assert ours.told.messages == []


async def test_one_that_says_hello_and_falls_silent_is_not_kept(house: Houses, tmp_path: Path) -> None:
    ours = await house()
    async with forger(ours, tmp_path) as silent:
        await silent.begin()
        await silent.refused()
    assert ours.door.heard_from() == {}


async def test_a_second_hello_or_an_unknown_message_ends_a_conversation(house: Houses, tmp_path: Path) -> None:
    ours = await house()
    for frame in (
        peer_pb2.ConverseRequest(hello=peer_pb2.Hello()),
        peer_pb2.ConverseRequest(),
        peer_pb2.ConverseRequest(envelope=peer_pb2.Envelope(session=SESSION)),
    ):
        async with forger(ours, tmp_path) as odd:
            theirs = await odd.begin()
            await odd.prove(odd.introduction.sign("dialler", odd.hello, theirs))
            await odd.call.write(frame)
            assert await odd.refused()
    await until(lambda: len(ours.told.lost) == 3)  # told after the last word to the other side
    assert ours.told.messages == []


async def test_an_answerer_that_cannot_sign_for_its_key_is_not_believed(house: Houses, tmp_path: Path) -> None:
    ours, victim = await house(), await house()

    async def answer(
        requests: AsyncIterator[peer_pb2.ConverseRequest], context: object
    ) -> AsyncIterator[peer_pb2.ConverseResponse]:
        dialler = (await anext(requests)).hello
        imposter = Introduction(Identity.open(tmp_path / "imposter"), SWARM)
        hello = imposter.hello(b"n" * 32)
        hello.public_key = victim.identity.public_key
        hello.signature = imposter.sign("dialled", dialler, hello)
        yield peer_pb2.ConverseResponse(hello=hello)
        await anext(requests)

    handler = grpc.stream_stream_rpc_method_handler(
        answer, peer_pb2.ConverseRequest.FromString, peer_pb2.ConverseResponse.SerializeToString
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Converse": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        ours.say(victim, PlanWanted(), at=f"127.0.0.1:{port}")
        await until(lambda: ours.told.lost)
        assert "not signed by its key" in ours.told.lost[0][1]
    finally:
        await server.stop(None)

"""What hostile peers could do once. One test each, as small as it gets; docs/bugs.md has the row."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import grpc.aio
import numpy as np
import pytest

from moshpitd.averaging.all_reduce import AllReduce, AllReduceConfig
from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.effects import Send
from moshpitd.averaging.errors import InvalidInput, RemoteProtocolError
from moshpitd.averaging.grid import Plan, decider, grid_key
from moshpitd.averaging.messages import (
    Begin,
    Chunk,
    Closed,
    Hail,
    Holdings,
    Join,
    Lease,
    PlanNotice,
    PlanWanted,
    Ready,
    Suspect,
)
from moshpitd.averaging.names import GroupId, PeerId, Rank
from moshpitd.averaging.partition import ALIGNMENT
from moshpitd.averaging.receipt import Outcome
from moshpitd.averaging.session import Call as Wish
from moshpitd.averaging.session import State as SessionState
from moshpitd.averaging.vector import Vector
from moshpitd.identity import Identity
from moshpitd.peer import wire
from moshpitd.peer.channels import PeerConfig
from moshpitd.peer.door import PeerDoor
from moshpitd.peer.v1 import peer_pb2
from moshpitd.simulation.swarm import SWARM, Peer, Seals
from tests.averaging.group_on_paper import group_of
from tests.averaging.test_all_reduce import normal_vectors
from tests.averaging.test_matchmaking import ANN, BEN, CAT, LINE, join_of, table
from tests.averaging.test_membership import ME, Swarm, peer, plan_of, swarm_where_we_decide
from tests.fuzz.stranger import Call, Stranger, enveloped, swarm_id
from tests.fuzz.theatre import CONFIG, ELEMENTS, STRANGER, Theatre
from tests.peer.test_door import SESSION, Told, until

GROUP_ID = GroupId(b"g" * 16)
FLAT = replace(CONFIG, group_size_max=16)


# ---- whom nonsense is blamed on


def test_an_early_lie_is_not_blamed_on_the_leader_that_tells_of_the_group() -> None:
    """It raised out of whatever made the group known: the leader's Begin, or a timer."""
    theatre = Theatre(config=FLAT)
    victim, villain = theatre.honest[0].machine, theatre.villain.id
    lied: list[bool] = []

    def lie_before(peer: Peer, send: Send) -> bool:
        if isinstance(send.message, Begin) and send.peer == theatre.honest[0].id and peer is not theatre.villain:
            lied.append(True)
            victim.receive(Suspect(send.message.group.group_id, 0, Rank(99), "nonsense"), villain, theatre.now)
        return False

    theatre.swallow = lie_before
    for _ in range(6):
        endings = theatre.average_all([*theatre.honest, theatre.villain])
        assert all(ending.receipt is not None for ending in endings.values())
    assert lied and theatre.protocol_errors == []


def test_a_deferred_lie_is_not_blamed_on_who_tells_the_plan() -> None:
    """A join under a plan not known yet is looked at when the plan comes, from somebody else."""
    theatre = Theatre(config=FLAT)
    theatre.average_all([*theatre.honest, theatre.villain])
    victim, teller = theatre.honest[0], theatre.honest[1]
    lease = next(s.record for s in theatre.roster(victim.machine.key) if s.peer == teller.id)
    true = next(send.message for _, _, send in theatre.sent if isinstance(send.message, Join))
    assert isinstance(lease, Lease)
    plan = Plan(7, (5,), lease.terms, 0, tuple(sorted(theatre.peers)), teller.id)
    key = grid_key(SWARM, lease.terms, plan, k=9, j=0, axis=0, cell=plan.cells[victim.id])
    lie = replace(true, key=key, plan_version=7, plan=plan.digest[:8], k=9, j=0, passed_on=False)
    victim.machine.receive(lie, STRANGER, theatre.now)  # a join of somebody else
    victim.machine.receive(PlanNotice(plan, *Seals(teller.id).sign_plan(plan.body)), teller.id, theatre.now)
    assert victim.machine.load().deferred_joins == 0


# ---- numbers that break others


@pytest.mark.parametrize("weight", [-1.0, 1.7e308])
def test_a_join_with_an_impossible_weight_is_its_senders_fault(weight: float) -> None:
    """The group it got into was refused by all the others, or its weights added up to infinity."""
    seat = table(ANN)
    seat.seek()
    lie = join_of(BEN)
    with pytest.raises(RemoteProtocolError):
        seat.hear(replace(lie, applicant=replace(lie.applicant, weight=weight)), BEN)


def test_a_trainer_cannot_give_a_weight_that_adds_up_to_infinity() -> None:
    with pytest.raises(InvalidInput, match="at most"):
        Wish(weight=1e308).check()


@pytest.mark.parametrize("number", [(1 << 62) + 1, (1 << 64) - 1])
def test_counts_beyond_all_counting_are_refused_at_the_wire(number: int) -> None:
    """One more than the largest did not fit its field: our own next lease could not be written."""
    envelope = wire.envelope(SESSION, Closed(LINE, 1, 0, 0, 0.0, 1))
    envelope.closed.now_k = number
    with pytest.raises(RemoteProtocolError):
        wire.opened(envelope)


def test_one_lease_from_the_far_future_does_not_stop_planning() -> None:
    """The next plan was to begin after the fastest lease: never; and until then no other was made."""
    swarm = Swarm(limit=4)
    numbers = [n for n in range(1, 40) if decider(2, [ME, peer(n)]) == ME][:5]  # the next plan is ours to make
    for number in numbers:
        swarm.see(number, k=3)
    swarm.see(numbers[0], k=1 << 61)
    assert swarm.adopt(plan_of(4, (2, 2), without_me=True))
    notice = swarm.members.make_plan_if_due(3, 300)
    assert notice is not None and notice.plan.first_k <= 3 + 64 + 2


def test_a_plan_that_is_announced_and_never_shown_does_not_stop_planning() -> None:
    swarm = swarm_where_we_decide(4)
    liar = next(number for number in range(99) if peer(number) in swarm.members.others())
    swarm.see(liar, plan=plan_of(4, (4,), version=9))
    assert swarm.members.make_plan_if_due(0, 105) is None
    swarm.see(liar, plan=plan_of(4, (4,), version=10), now=109.0)  # a newer one buys no time
    assert swarm.members.make_plan_if_due(0, 111) is not None


def test_one_told_a_count_that_nobody_holds_stays_with_the_others() -> None:
    """It went on alone at that count for ever, for counts never go back."""
    theatre = Theatre(config=FLAT)
    theatre.average_all([*theatre.honest, theatre.villain])

    def lie_instead(peer: Peer, send: Send) -> bool:
        if isinstance(send.message, Join) and send.peer == theatre.villain.id:
            join = send.message
            closed = Closed(join.key, join.attempt, join.k, join.j, 0.0, 1 << 60)
            theatre.at(theatre.now, lambda: peer.machine.receive(closed, theatre.villain.id, theatre.now))
        return False

    theatre.swallow = lie_instead
    for _ in range(6):
        theatre.average_all([*theatre.honest, theatre.villain])
    theatre.swallow = None
    assert max(peer.machine.status(theatre.now).epoch for peer in theatre.honest) < 1000
    theatre.assert_it_recovers()


def test_those_far_behind_their_leader_are_led_all_the_same() -> None:
    """It forgot at once what it had just promised to keep: they waited for it until their time was over."""
    theatre = Theatre(config=FLAT, seed=16)  # the one ahead leads
    theatre.average_all([*theatre.honest, theatre.villain])
    ahead, *behind = theatre.honest
    vector = Vector.of({"w": np.ones(ELEMENTS, np.float32)})
    theatre.average({ahead: (vector, Wish(epoch=40, timeout_s=3.0))})
    endings = theatre.average({peer: (vector, Wish(epoch=5, timeout_s=20.0)) for peer in behind})
    assert {ending.told.outcome for ending in endings.values()} <= {Outcome.COMPLETE, Outcome.PARTIAL}, endings


# ---- what is kept


def test_joins_for_rounds_far_away_make_room_for_those_at_hand() -> None:
    """They took all the room there was, and who joined the round at hand was cut off for it."""
    theatre = Theatre(config=FLAT)
    theatre.average_all([*theatre.honest, theatre.villain])
    victim, honest = theatre.honest[0], theatre.honest[1]
    lease = next(s.record for s in theatre.roster(victim.machine.key) if s.peer == honest.id)
    true = next(s.message for _, _, s in theatre.sent if isinstance(s.message, Join))
    plan = next(s.message for _, _, s in theatre.sent if isinstance(s.message, PlanNotice)).plan
    assert isinstance(lease, Lease)

    def join(sender: PeerId, k: int) -> None:
        key = grid_key(SWARM, lease.terms, plan, k=k, j=0, axis=0, cell=plan.cells[victim.id])
        applicant = replace(true.applicant, peer=sender)
        message = replace(true, key=key, k=k, j=0, applicant=applicant, passed_on=False)
        victim.machine.receive(message, sender, theatre.now)

    for k in range(1000, 1200):
        join(STRANGER, k)
    victim.machine.take_effects()
    join(honest.id, 1)
    assert any(isinstance(e, Send) and e.peer == honest.id for e in victim.machine.take_effects())
    assert victim.machine.load().matchmakings <= 64


def test_a_chunk_larger_than_its_place_is_refused_when_it_comes() -> None:
    """Its size was looked at when all others were there; until then megabytes were kept for each."""
    machine = _reducer()
    with pytest.raises(RemoteProtocolError, match="instead of"):
        machine.chunk_received(Chunk(0, 0, bytes(4 << 20), is_average=False), Rank(1), 0.0)
    with pytest.raises(RemoteProtocolError, match="instead of"):
        machine.chunk_received(Chunk(0, 6, bytes(4 << 20), is_average=True), Rank(1), 0.0)


def test_a_frame_is_not_kept_alive_by_what_comes_before_its_payload() -> None:
    header = peer_pb2.Chunk(index=0, contributors=[1] * 100_000, payload=bytes(16))
    with pytest.raises(RemoteProtocolError, match="before its payload"):
        wire.chunk_from(peer_pb2.TransferRequest(chunk=header).SerializeToString())


def test_holdings_of_a_view_to_come_are_measured_before_they_are_kept() -> None:
    machine = _reducer()
    for views in ((-1,) * 100_000, (7,) * 8, (-2,) * 8):  # too many, made in a later view, no view at all
        with pytest.raises(RemoteProtocolError, match="holdings"):
            machine.receive(Holdings(machine.group.group_id, 6, views), Rank(1), 0.0)


def test_bytes_that_are_no_digest_are_refused_at_the_wire() -> None:
    with pytest.raises(RemoteProtocolError):
        wire.opened(wire.envelope(SESSION, Ready(GROUP_ID, 1, bytes(1 << 20))))


def test_early_messages_of_a_talker_crowd_out_only_its_own() -> None:
    """Sixteen invented groups took all the room there was."""
    theatre = Theatre(config=FLAT)
    victim = theatre.honest[0].machine
    theatre.run_for(1.0)
    theatre.start(theatre.honest[0], Vector.of({"w": np.ones(ELEMENTS, np.float32)}), Wish(timeout_s=20.0))
    theatre.run_until(lambda: victim.state is SessionState.MATCHING)
    for number in range(5_000):
        group_id = GroupId(number.to_bytes(16, "big"))
        victim.receive(Holdings(group_id, 1, (-1,) * 10_000), theatre.villain.id, theatre.now)
        victim.receive(Ready(group_id, 1, b""), theatre.villain.id, theatre.now)
    kept = victim.load().early_messages
    assert 0 < kept <= 16
    victim.receive(Ready(GROUP_ID, 0, b""), theatre.honest[1].id, theatre.now)
    assert victim.load().early_messages == kept + 1


def test_a_join_with_a_crowd_of_unreachables_is_refused() -> None:
    seat = table(ANN)
    with pytest.raises(RemoteProtocolError):
        seat.hear(join_of(BEN, unreachable=(CAT,) * 1000), BEN)


def test_one_that_calls_and_does_not_answer_is_tried_again_only_once() -> None:
    """It led everybody away from their leader for as long as it called."""
    seat = table(CAT)
    seat.seek()
    for tries in (1, 1, 0, 0):
        assert len(seat.said(Join, ANN)) == tries
        seat.machine.peer_lost(ANN, "did not answer", seat.now)
        seat.said_to()
        seat.hear(Hail(LINE, 4, 0), ANN)


# ---- at the door

CONFIG_OF_DOOR = PeerConfig(dial_timeout_s=2.0, strangers_max=8, idle_channels_max=4)


@dataclass
class House:
    """A door, what came in by it, a stranger before it, and what escaped to the loop."""

    door: PeerDoor
    told: Told
    stranger: Stranger
    escaped: list[str]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    escaped: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: escaped.append(str(context)))
    identity = Identity.open(tmp_path / "house")
    door = await PeerDoor.open("127.0.0.1", 0, identity=identity, swarm_id=swarm_id("test"), config=CONFIG_OF_DOOR)
    told = Told()
    await door.serve(told)
    stranger = Stranger(tmp_path / "stranger", f"127.0.0.1:{door.port}", door.bulk_port, "test", "any")
    stranger.session = SESSION
    yield House(door, told, stranger, escaped)
    await door.close(0.2)
    gc.collect()
    assert escaped == []


async def test_what_is_no_protobuf_is_refused_in_words(house: House) -> None:
    """gRPC ended the stream with a traceback in our log, and a reason that nobody understands."""
    async with house.stranger.channel() as channel, house.stranger.conversation(channel) as call:
        await call.write(b"\xff\xff\xff")
        assert "is no protobuf" in await _ended(call)
    await until(lambda: house.told.lost)
    assert "is no protobuf" in house.told.lost[0][1]


async def test_one_identity_does_not_take_everybodys_conversations(house: House) -> None:
    async with house.stranger.channel() as channel, AsyncExitStack() as stack:
        for _ in range(CONFIG_OF_DOOR.conversations_of_one_max):
            await stack.enter_async_context(house.stranger.conversation(channel))
        await until(house.door.heard_from)
        with pytest.raises(grpc.aio.AioRpcError, match="too many conversations of yours"):
            while True:  # the last of the others may still be on its way in
                await stack.enter_async_context(house.stranger.conversation(channel))


async def test_transfers_of_invented_groups_do_not_lock_out_the_true_one(house: House) -> None:
    """Sixty-four of them, by anybody, and every honest transfer that came before its group was refused for 15 s."""
    stranger = house.stranger
    openings = [peer_pb2.TransferOpen(group_id=number.to_bytes(16, "big")) for number in range(9)]
    async with stranger.channel() as channel, AsyncExitStack() as stack:
        calls = [await stack.enter_async_context(stranger.stream(channel, "Transfer")) for _ in openings]
        for call, opening in zip(calls, openings, strict=True):
            await call.write(peer_pb2.TransferRequest(open=opening).SerializeToString())
        ended = [asyncio.create_task(_ended(call)) for call in calls]
        done, _ = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED, timeout=10)
        assert len(done) == 1 and "no such group" in done.pop().result()
        assert not ended[-1].done(), "the oldest goes, not the newest"
        for task in ended:
            task.cancel()
        await asyncio.wait(ended)


async def test_one_wish_to_be_dialled_at_a_time(house: House) -> None:
    """Each was a task and a channel, for as long as the address kept silent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        wish = peer_pb2.ConverseRequest(dial_back_wanted=peer_pb2.DialBackWanted(address=address))
        before = len(asyncio.all_tasks())
        async with house.stranger.channel() as channel, house.stranger.conversation(channel) as call:
            for _ in range(200):
                await call.write(wish.SerializeToString())
            await call.write(enveloped(wire.envelope(SESSION, PlanWanted())))
            await until(lambda: house.told.messages)
            assert len(asyncio.all_tasks()) - before < 50


async def test_who_asks_much_and_reads_nothing_is_cut_off(house: House) -> None:
    """A small question has a large answer; a thousand of them waited for each that did not read."""
    large = Holdings(GROUP_ID, 1, (-1,) * 100_000)
    async with house.stranger.channel() as channel, house.stranger.conversation(channel):
        await until(house.door.heard_from)
        for _ in range(400):
            house.door.send(SESSION, house.stranger.identity.peer_id, "", large)
        await until(lambda: house.told.lost)


async def test_channels_to_invented_addresses_are_given_back(house: House) -> None:
    """One was kept for every address that anybody ever named."""
    for number in range(40):
        house.door.meet(PeerId(f"{number:064x}"), f"127.0.0.1:{1 + number}")
    await until(lambda: len(house.told.lost) == 40)
    gc.collect()
    assert sum(isinstance(one, grpc.aio.Channel) for one in gc.get_objects()) <= CONFIG_OF_DOOR.idle_channels_max + 1


async def _ended(call: Call) -> str:
    with suppress(grpc.aio.AioRpcError):
        await call.read()
    return str(await call.details())


def _reducer() -> AllReduce:
    """Rank 0 of three, with eight chunks."""
    values = normal_vectors(3, 8 * ALIGNMENT)
    return AllReduce(
        group_of(values),
        Rank(0),
        values=values[0],
        result=Vector.empty(values[0].layout),
        codec=codec_named("float32"),
        config=AllReduceConfig(),
        now=0.0,
    )

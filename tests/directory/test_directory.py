"""Members find each other, what they announce is found, and neither loss nor death nor splits undo it for long."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from moshpitd.averaging.names import key
from moshpitd.directory import Address, AddressError, DatagramSocket, Directory, DirectoryError
from moshpitd.directory.records import Notary
from moshpitd.directory.socket import Drop
from moshpitd.identity import Identity
from tests.directory.conftest import QUICK, Member, RawClient, Swarm, eventually, reads

HERE = key("here")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# -- announcing and looking up ---------------------------------------------------------------------------------------


async def test_what_is_announced_is_found_by_everybody_and_announcing_reads(swarm: Swarm) -> None:
    members = await swarm.start_many(5)
    for count, member in enumerate(members, start=1):
        roster = await member.directory.announce(HERE, "lease", member.at.encode(), 30.0)
        assert len(roster) == count
    for member in members:
        roster = await member.directory.look_up(HERE, "lease")
        assert {one.peer: one.body for one in roster} == {one.identity.peer_id: one.at.encode() for one in members}
        assert {one.incarnation for one in roster} == {one.identity.incarnation for one in members}
        assert [one.peer for one in roster] == sorted(one.peer for one in roster)
        assert all(0 < one.ttl_s <= 30.0 for one in roster)


async def test_keys_and_kinds_are_kept_apart(swarm: Swarm) -> None:
    one, other = await swarm.start_many(2)
    await one.directory.announce(HERE, "lease", b"lease", 30.0)
    await one.directory.announce(HERE, "plan", b"plan", 30.0)
    assert [item.body for item in await other.directory.look_up(HERE, "plan")] == [b"plan"]
    assert await other.directory.look_up(key("elsewhere"), "lease") == ()


async def test_of_one_peers_announcements_the_newest_wins_also_when_made_at_once(swarm: Swarm) -> None:
    one, other = await swarm.start_many(2)
    await asyncio.gather(*(one.directory.announce(HERE, "lease", b"%d" % count, 30.0) for count in range(10)))
    roster = await reads(other, HERE, "lease", lambda roster: bool(roster))
    assert [item.body for item in roster] == [b"9"]


async def test_alone_it_is_a_swarm_of_one(swarm: Swarm) -> None:
    alone = await swarm.start("alone")
    assert alone.directory.waiting_for() is None
    assert [one.body for one in await alone.directory.announce(HERE, "lease", b"me", 30.0)] == [b"me"]
    assert [one.body for one in await alone.directory.look_up(HERE, "lease")] == [b"me"]


async def test_a_record_is_kept_alive_until_withdrawn(swarm: Swarm) -> None:
    one, other = await swarm.start_many(2)
    (first,) = await one.directory.announce(HERE, "lease", b"here", 0.6)
    sequence = first.sequence
    for _ in range(3):
        (last,) = await reads(other, HERE, "lease", lambda roster: any(one.sequence > sequence for one in roster))  # noqa: B023
        sequence = last.sequence
    await one.directory.withdraw(HERE, "lease")
    assert await reads(other, HERE, "lease", lambda roster: not roster) == ()
    assert await one.directory.look_up(HERE, "lease") == ()
    (again,) = await one.directory.announce(HERE, "lease", b"back", 30.0)
    assert again.body == b"back" and again.sequence > last.sequence


async def test_a_record_that_is_not_kept_ends_with_its_ttl(swarm: Swarm) -> None:
    one, other = await swarm.start_many(2)
    await one.directory.announce(HERE, "lease", b"here", 0.3, keep=False)
    assert len(await other.directory.look_up(HERE, "lease")) == 1
    await reads(other, HERE, "lease", lambda roster: not roster)


async def test_records_of_a_dead_peer_expire(swarm: Swarm) -> None:
    one, other, third = await swarm.start_many(3)
    await one.directory.announce(HERE, "lease", b"here", 0.6)
    await one.stop()
    assert len(await other.directory.look_up(HERE, "lease")) == 1
    await reads(third, HERE, "lease", lambda roster: not roster)


async def test_an_announcement_from_before_the_swarm_was_found_reaches_it(swarm: Swarm, raw_client: RawClient) -> None:
    silent = await DatagramSocket.open("127.0.0.1", 0)
    early = await swarm.start("early", join=[str(silent.address)], ready=False)
    await early.directory.announce(HERE, "lease", b"early", 60.0)
    late = await swarm.start("late", join=[early.at])
    async with asyncio.timeout(20):
        while True:
            page = (await raw_client.ask(late, "look_up", HERE, "lease", 0, 0, 0, 1))[8]
            if isinstance(page, bytes) and b"early" in page:
                break
            await asyncio.sleep(0.01)
    silent.close()


async def test_oversized_bodies_are_refused_to_the_caller(swarm: Swarm) -> None:
    alone = await swarm.start("alone")
    with pytest.raises(DirectoryError, match="513 bytes"):
        await alone.directory.announce(HERE, "lease", bytes(513), 30.0)
    assert await alone.directory.look_up(HERE, "lease") == ()


async def test_the_largest_record_travels(swarm: Swarm) -> None:
    members = await swarm.start_many(10)
    for member in members:
        await member.directory.announce(HERE, "k" * 32, bytes(512), 30.0)
    assert len(await members[3].directory.look_up(HERE, "k" * 32)) == 10


async def test_a_roster_of_300_pages_under_1200_bytes_a_datagram(
    swarm: Swarm, raw_client: RawClient, tmp_path: Path
) -> None:
    largest = 0

    def measure(datagram: bytes, to: Address) -> bool:
        nonlocal largest
        largest = max(largest, len(datagram))
        return False

    members = await swarm.start_many(4, drop=measure)
    notary, peers = Notary(b"swarm", QUICK), set[str]()
    for number in range(300):
        identity = Identity.open(tmp_path / "crowd" / str(number))
        record = notary.write(identity, HERE, "lease", bytes(110), 600.0)
        peers.add(record.peer)
        for member in members[:3]:
            taken = (await raw_client.ask(member, "announce", HERE, record.raw, 0, 0))[1]
            assert taken is True
    for reader in members:
        roster = await reader.directory.look_up(HERE, "lease")
        assert {one.peer for one in roster} == peers
    assert 1_000 < largest <= 1_200
    before = members[3].directory.counters.requests
    await members[3].directory.look_up(HERE, "lease")
    assert members[3].directory.counters.requests - before == 3, "a second look asks each holder once, for news"


# -- loss, death, cancellation ---------------------------------------------------------------------------------------


async def test_one_lost_datagram_of_each_request_evicts_nobody(swarm: Swarm) -> None:
    transmissions: defaultdict[tuple[bytes, Address], int] = defaultdict(int)
    lossy = False

    def lose_the_first(datagram: bytes, to: Address) -> bool:
        if not lossy or datagram[0] != 0:
            return False
        transmissions[datagram, to] += 1
        return transmissions[datagram, to] == 1

    members = await swarm.start_many(4, drop=lose_the_first)
    lossy = True
    for member in members:
        await member.directory.announce(HERE, "lease", b"", 30.0)
    for member in members:
        assert len(await member.directory.look_up(HERE, "lease")) == 4
        assert len(member.neighbours) == 3
        assert member.directory.counters.evictions == 0
        assert all(one.strikes == 0 for one in member.directory.neighbours())
    assert sum(member.directory.counters.retransmissions for member in members) >= 24


async def test_the_dead_are_struck_out_and_nobody_waits_for_them(swarm: Swarm) -> None:
    *living, dead = await swarm.start_many(4)
    await dead.stop()
    await living[0].directory.announce(HERE, "lease", b"", 30.0)
    assert len(await living[1].directory.look_up(HERE, "lease")) == 1
    await eventually(lambda: all(dead.identity.peer_id not in member.neighbours for member in living))
    assert all(len(member.neighbours) == 2 for member in living)


async def test_a_short_outage_is_one_strike_however_many_requests_it_swallows(swarm: Swarm) -> None:
    cut = False
    config = replace(QUICK, mend_interval_s=600.0)
    one, other = await swarm.start_many(2, drop=lambda datagram, to: cut, config=config)
    cut = True
    await asyncio.gather(*(one.directory.look_up(key("key", number), "lease") for number in range(20)))
    assert [neighbour.strikes for neighbour in one.directory.neighbours()] == [1]
    cut = False
    await one.directory.look_up(HERE, "lease")
    await eventually(lambda: [neighbour.strikes for neighbour in one.directory.neighbours()] == [0])
    assert one.directory.counters.evictions == other.directory.counters.evictions == 0


async def test_a_cancelled_call_leaves_nothing_outstanding(swarm: Swarm) -> None:
    cut = False
    config = replace(QUICK, mend_interval_s=600.0)
    one, _, _ = await swarm.start_many(3, drop=lambda datagram, to: cut, config=config)
    idle = len(asyncio.all_tasks())
    cut = True
    calls = [asyncio.create_task(one.directory.announce(HERE, "lease", b"", 600.0)) for _ in range(5)]
    await eventually(lambda: one.directory.counters.in_flight > 0)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert all(call.cancelled() for call in calls)
    await eventually(lambda: one.directory.counters.in_flight == 0 and len(asyncio.all_tasks()) <= idle)
    cut = False
    assert len(await one.directory.look_up(HERE, "lease")) == 1


async def test_closing_in_the_middle_of_everything_leaves_nothing_behind(swarm: Swarm) -> None:
    before = len(asyncio.all_tasks())
    one, *others = await swarm.start_many(3)
    call = asyncio.create_task(one.directory.announce(HERE, "lease", b"", 30.0))
    await eventually(lambda: one.directory.counters.in_flight > 0 or call.done())
    for member in (one, *others):
        await member.stop()
    await asyncio.gather(call, return_exceptions=True)
    assert len(asyncio.all_tasks()) == before


# -- joining, splitting, restarting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["127.0.0.1", "localhost", "::", *(["::1"] if has_ipv6() else [])])
async def test_members_join_over_every_family(swarm: Swarm, listen: str) -> None:
    first = await swarm.start("first", listen=listen)
    port = first.socket.address.port
    host = "127.0.0.1" if listen == "::" else listen
    second = await swarm.start("second", listen=listen, join=[f"[{host}]:{port}" if ":" in host else f"{host}:{port}"])
    third = await swarm.start("third", listen=listen, join=[second.at.replace("[::]", "localhost")])
    await first.directory.announce(HERE, "lease", b"first", 30.0)
    roster = await reads(third, HERE, "lease", lambda roster: bool(roster))
    assert [one.body for one in roster] == [b"first"]
    await eventually(lambda: len(first.neighbours) == len(third.neighbours) == 2)


async def test_join_to_nobody_keeps_trying_and_says_so(swarm: Swarm) -> None:
    silent = await DatagramSocket.open("127.0.0.1", 0)
    lonely = await swarm.start("lonely", join=[str(silent.address), "no-such-host.invalid:1"], ready=False)
    await eventually(lambda: f"{silent.address} did not answer" in (lonely.directory.waiting_for() or ""))
    assert "no-such-host.invalid cannot be resolved" in (lonely.directory.waiting_for() or "")
    assert not lonely.directory.is_ready
    newcomer = await swarm.start("newcomer", join=[lonely.at])
    async with asyncio.timeout(20):
        await lonely.directory.wait_ready()
    assert lonely.directory.waiting_for() is None
    assert newcomer.identity.peer_id in lonely.neighbours
    silent.close()


async def test_another_swarm_at_the_joined_address_is_called_that(swarm: Swarm) -> None:
    theirs = await swarm.start("theirs", swarm=b"their swarm")
    ours = await swarm.start("ours", swarm=b"our swarm", join=[theirs.at], ready=False)
    await eventually(lambda: f"{theirs.at} belongs to another swarm" in (ours.directory.waiting_for() or ""))
    assert ours.neighbours == theirs.neighbours == {}


async def test_a_list_of_seeds_that_names_the_daemon_itself_does_not_hold_it_up(swarm: Swarm, tmp_path: Path) -> None:
    own = await DatagramSocket.open("127.0.0.1", 0)
    first = await Directory.open(Identity.open(tmp_path / "seed"), b"swarm", own, join=[str(own.address)], config=QUICK)
    async with asyncio.timeout(20):
        await first.wait_ready()
    assert first.neighbours() == []
    await first.close()
    own.close()


async def test_nonsense_in_join_is_refused_at_once(swarm: Swarm) -> None:
    with pytest.raises(AddressError, match="HOST:PORT"):
        await swarm.start("alone", join=["nonsense"])


async def test_the_first_member_may_leave_and_newcomers_join_through_any_other(swarm: Swarm) -> None:
    first, second, _third = await swarm.start_many(3)
    await first.stop()
    newcomer = await swarm.start("newcomer", join=[second.at])
    await eventually(lambda: len(newcomer.neighbours) == 2)


async def test_remembered_peers_are_found_again_without_join(swarm: Swarm) -> None:
    _, second, third = await swarm.start_many(3)
    await third.stop()
    again = await swarm.start("2")
    assert again.identity.peer_id == third.identity.peer_id
    assert second.identity.peer_id in again.neighbours


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"peers": [{"host": "name", "port": 1}]}', '{"peers": 3}', "[" * 9999]
)
async def test_a_broken_file_of_remembered_peers_is_no_obstacle(swarm: Swarm, tmp_path: Path, content: str) -> None:
    (tmp_path / "alone").mkdir(mode=0o700)
    (tmp_path / "alone" / "peers.json").write_text(content)
    alone = await swarm.start("alone")
    assert alone.directory.is_ready


async def test_a_split_swarm_mends(swarm: Swarm) -> None:
    is_split, side_of = False, dict[int, str]()

    def on(side: str) -> Drop:
        return lambda datagram, to: is_split and side_of.get(to.port, side) != side

    members: list[Member] = []
    for side in ("west", "east", "west", "east", "west", "east"):
        join = [members[0].at] if members else []
        members.append(await swarm.start(str(len(members)), join=join, drop=on(side)))
        side_of[members[-1].socket.address.port] = side
    west, east = members[0::2], members[1::2]
    await eventually(lambda: all(len(member.neighbours) == 5 for member in members))
    is_split = True
    await west[1].directory.announce(HERE, "lease", b"west", 3.0)
    await east[1].directory.announce(HERE, "lease", b"east", 3.0)
    await eventually(lambda: all(len(member.neighbours) == 2 for member in members))
    is_split = False
    await eventually(lambda: all(len(member.neighbours) == 5 for member in members))
    for member in members:
        await reads(member, HERE, "lease", lambda roster: {one.body for one in roster} == {b"west", b"east"})


async def test_two_swarms_that_never_met_become_one_over_a_join_address(swarm: Swarm) -> None:
    gate_is_shut = True
    west = [await swarm.start("w0")]
    west.append(await swarm.start("w1", join=[west[0].at]))
    # The east was started by a seed list that names a western member too, while that one could not be reached.
    shut = west[0].socket.address
    east = [await swarm.start("e0")]
    for name in ("e1", "e2"):
        drop: Drop = lambda datagram, to: gate_is_shut and to == shut  # noqa: E731
        east.append(await swarm.start(name, join=[east[0].at, west[0].at], drop=drop))
    await west[1].directory.announce(HERE, "lease", b"west", 30.0)
    assert await east[0].directory.look_up(HERE, "lease") == ()
    gate_is_shut = False
    await eventually(lambda: all(len(member.neighbours) == 4 for member in west + east))
    assert len(await east[0].directory.look_up(HERE, "lease")) == 1


async def test_a_cloned_data_directory_is_noticed_and_named(swarm: Swarm, tmp_path: Path) -> None:
    members = await swarm.start_many(3)
    shutil.copytree(tmp_path / "1", tmp_path / "clone")
    clone = await swarm.start("clone", join=[members[0].at])
    assert clone.identity.peer_id == members[1].identity.peer_id
    await eventually(lambda: members[1].socket.address in clone.clones)
    await eventually(lambda: clone.socket.address in members[1].clones)
    assert members[0].clones == members[2].clones == []


async def test_a_restart_at_another_port_is_no_clone(swarm: Swarm) -> None:
    members = await swarm.start_many(3)
    old = members[1]
    await old.directory.announce(HERE, "lease", b"before", 30.0)
    await old.stop()
    again = await swarm.start("1", join=[members[0].at])
    await again.directory.announce(HERE, "lease", b"after", 30.0)
    for member in (members[0], members[2], again):
        (one,) = await reads(member, HERE, "lease", lambda roster: [one.body for one in roster] == [b"after"])
        assert one.incarnation == again.identity.incarnation != old.identity.incarnation
    await eventually(
        lambda: all(member.neighbours[again.identity.peer_id] == again.socket.address for member in members[0::2])
    )
    # Its old address was asked and stayed silent: only an answer makes a clone.
    await eventually(lambda: again.directory.counters.silences > 0)
    assert [member.clones for member in (*members, again)] == [[]] * 4


async def test_others_are_sent_to_the_announced_address(swarm: Swarm) -> None:
    first = await swarm.start("first")
    outside = Address("127.0.0.1", 9)
    await swarm.start("behind", join=[first.at], announced=outside)
    asked: list[Address] = []

    def watch(datagram: bytes, to: Address) -> bool:
        asked.append(to)
        return False

    await swarm.start("third", join=[first.at], drop=watch)
    await eventually(lambda: outside in asked)


async def test_a_daemon_learns_where_others_hear_it(swarm: Swarm) -> None:
    first = await swarm.start("first", listen="0.0.0.0")
    second = await swarm.start("second", join=[f"127.0.0.1:{first.socket.address.port}"])
    await eventually(lambda: first.directory.seen_as() == Address("127.0.0.1", first.socket.address.port))
    assert second.directory.seen_as() == second.socket.address

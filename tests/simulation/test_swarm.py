"""The driver's twin: what a kill, a pause, a cut and a partition do to real sessions; and one seed is one story."""

from __future__ import annotations

import numpy as np

from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.messages import Message, Ready
from moshpitd.averaging.names import PeerId
from moshpitd.averaging.receipt import Outcome
from moshpitd.averaging.session import Call, SessionConfig
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.network import Weather
from moshpitd.simulation.swarm import Ending, Peer, Swarm, options_for

ELEMENTS = 8 * 4096


def swarm_of(n: int, seed: int = 0) -> tuple[Swarm, list[Peer]]:
    """n sessions that know each other and have a plan."""
    swarm = Swarm(seed, Weather(directory=(0.005, 0.005)), SessionConfig(chunk_bytes=1 << 14), keep_messages=True)
    options = options_for(np.zeros(ELEMENTS, np.float32), joining="contribute")
    peers = [swarm.open(f"p{number}", options) for number in range(n)]
    swarm.run_for(1.0)
    return swarm, peers


def calls(peers: list[Peer], timeout_s: float = 20.0) -> dict[Peer, tuple[Vector, Call]]:
    """Peer i gives i everywhere."""
    return {
        peer: (Vector.of({"w": np.full(ELEMENTS, number, np.float32)}), Call(timeout_s=timeout_s))
        for number, peer in enumerate(peers)
    }


def traced(seed: int) -> tuple[list[str], dict[Peer, Ending]]:
    swarm, peers = swarm_of(6, seed)
    lines: list[str] = []
    swarm.trace, swarm.trace_messages = lines.append, True
    swarm.at(swarm.now + 0.02, lambda: swarm.kill(peers[2]))
    return lines, swarm.average(calls(peers))


def test_one_seed_is_one_story_and_another_is_another() -> None:
    first, again, other = traced(1)[0], traced(1)[0], traced(2)[0]
    assert first == again and len(first) > 50
    assert first != other


def test_everybody_gets_the_mean_and_the_swarm_comes_to_rest() -> None:
    swarm, peers = swarm_of(4)
    endings = swarm.average(calls(peers))
    assert {ending.told.outcome for ending in endings.values()} == {Outcome.COMPLETE}
    assert all(np.array_equal(ending.values, np.full(ELEMENTS, 1.5)) for ending in endings.values())
    assert not any(peer.busy for peer in peers) and swarm.standing() == "" and swarm.protocol_errors == []


def test_the_killed_ends_nothing_and_the_others_name_it() -> None:
    swarm, peers = swarm_of(4)
    swarm.at(swarm.now + 0.015, lambda: swarm.kill(peers[3]))
    endings = swarm.average(calls(peers))
    assert set(endings) == set(peers[:3]) and swarm.living() == peers[:3]
    dropped = {line.peer for ending in endings.values() for r in ending.told.rounds for line in r.dropped}
    assert dropped <= {peers[3].id}


def test_who_stands_still_hears_everything_when_it_goes_on() -> None:
    swarm, peers = swarm_of(4)
    swarm.average(calls(peers))
    sleeper = peers[1]
    swarm.pause(sleeper)
    for peer, (vector, call) in calls(peers).items():
        swarm.start(peer, vector, call)
    swarm.run_for(2.0)
    assert sleeper.busy and len(sleeper.endings) == 1
    swarm.resume(sleeper)
    swarm.run_until(lambda: not sleeper.busy, limit_s=30.0)
    assert sleeper.stood_still_s == 2.0 and len(sleeper.endings) == 2


def test_messages_of_one_to_another_arrive_in_order_however_long_each_takes() -> None:
    swarm, (one, other) = swarm_of(2)
    swarm.weather = Weather(message=(0.0, 5.0))
    heard: list[Message] = []
    receive = other.machine.receive

    def listen(message: Message, sender: PeerId, now: float) -> None:
        heard.append(message)
        receive(message, sender, now)

    other.machine.receive = listen  # type: ignore[method-assign]
    before = len(swarm.sent)
    swarm.average(calls([one, other], timeout_s=60.0))
    swarm.run_for(60.0)
    said = [send.message for _, by, send in swarm.sent[before:] if by is one]
    assert len(said) > 5 and heard == said


def test_a_one_way_partition_holds_what_is_said_until_it_heals() -> None:
    swarm, peers = swarm_of(4)
    swarm.average(calls(peers))
    swarm.part(peers[:1], peers[1:], one_way=True)
    began = swarm.now
    swarm.at(began + 0.5, swarm.heal)
    endings = swarm.average(calls(peers))
    assert {ending.told.outcome for ending in endings.values()} == {Outcome.COMPLETE}
    assert min(ending.at for ending in endings.values()) > began + 0.5, "nobody can be done before all have heard p0"


def test_a_partition_for_good_leaves_two_halves_that_both_end() -> None:
    swarm, peers = swarm_of(4)
    swarm.average(calls(peers))
    swarm.part(peers[:2], peers[2:])
    endings = swarm.average(calls(peers))
    assert len(endings) == 4
    assert {ending.told.outcome for ending in endings.values()} <= {Outcome.PARTIAL, Outcome.ALONE}
    for half in (peers[:2], peers[2:]):
        met = {peer for one in half for peer in endings[one].told.peers}
        assert met <= {peer.id for peer in half}


def test_nonsense_costs_its_sender_the_connection_and_is_kept() -> None:
    swarm, (one, other, _) = swarm_of(3)
    lines: list[str] = []
    swarm.trace = lines.append
    receive = one.machine.receive

    def offended(message: Message, sender: PeerId, now: float) -> None:
        if isinstance(message, Ready) and sender == other.id and not swarm.protocol_errors:
            raise RemoteProtocolError("that is no digest")
        receive(message, sender, now)

    one.machine.receive = offended  # type: ignore[method-assign]
    endings = swarm.average(calls(swarm.living()))
    (error,) = swarm.protocol_errors
    assert error.endswith("p0 of p1: that is no digest")
    assert any("the connection of p0 and p1 breaks" in line for line in lines)
    assert len(endings) == 3, "the others do not pay for it with their calls"


def test_who_leaves_withdraws_its_lease() -> None:
    swarm, peers = swarm_of(3)
    key = peers[0].machine.key
    assert len(swarm.roster(key)) == 3
    swarm.close(peers[0])
    swarm.run_for(1.0)
    assert {sighting.peer for sighting in swarm.roster(key)} == {peer.id for peer in peers[1:]}


def test_a_daemon_that_restarts_is_the_same_peer_with_another_incarnation() -> None:
    swarm, peers = swarm_of(3)
    options = peers[0].machine.options
    swarm.kill(peers[0])
    again = swarm.open("p0", options, last_k=peers[0].machine.last_k)
    assert again.id == peers[0].id and again.incarnation != peers[0].incarnation
    swarm.run_for(1.0)
    endings = swarm.average(calls([again, *peers[1:]]))
    assert {ending.told.outcome for ending in endings.values()} <= {Outcome.COMPLETE, Outcome.PARTIAL}

"""The directory's twin: what is announced is seen late, old, or not at all."""

from __future__ import annotations

import random

from moshpitd.averaging.effects import Announce
from moshpitd.averaging.messages import Address, Presence
from moshpitd.averaging.names import Incarnation, Key, PeerId
from moshpitd.simulation.clock import Clock
from moshpitd.simulation.directory import RENEWALS, Directory
from moshpitd.simulation.network import Network, Weather

OWNER, READER, KEY = PeerId("owner"), PeerId("reader"), Key(b"k")
FIRST = Incarnation(1)
TTL_S = 60.0


class Town:
    """A directory with a clock, and one owner that is alive or not."""

    def __init__(self, weather: Weather | None = None) -> None:
        self.clock = Clock()
        self.network = Network(weather or Weather(), random.Random(4))
        self.directory = Directory(self.clock, self.network, random.Random(5))
        self.alive = True

    def announce(self, coordinate: int = 0, *, slot: str = "lease", owner: PeerId = OWNER) -> None:
        record = Presence(Address("owner:1"), True, coordinate)
        self.directory.store(owner, FIRST, Announce(KEY, record, TTL_S, slot), lambda: self.alive)

    def coordinates(self, *, incarnation: int = 1) -> list[int]:
        """What the reader finds that it has not found before."""
        found = self.directory.read(KEY, READER, Incarnation(incarnation))
        return [s.record.coordinate for s in found if isinstance(s.record, Presence)]


def test_a_record_is_brought_once_with_what_is_left_of_its_ttl() -> None:
    town = Town()
    town.announce(slot="presence")
    town.clock.run_for(10.0)
    (sighting,) = town.directory.read(KEY, READER, FIRST)
    assert (sighting.peer, sighting.incarnation, sighting.expires_at - town.clock.now) == (OWNER, FIRST, TTL_S - 10.0)
    assert town.directory.read(KEY, READER, FIRST) == []


def test_all_readers_are_brought_the_very_same_sighting() -> None:
    """4,096 peers that know each other are 16.8 million pairs: a copy each would not fit."""
    town = Town()
    town.announce()
    town.clock.run_for(1.0)
    (one,), (other,) = (town.directory.read(KEY, PeerId(reader), FIRST) for reader in ("one", "other"))
    assert one is other


def test_a_restarted_reader_has_seen_nothing() -> None:
    town = Town()
    town.announce()
    town.clock.run_for(0.1)
    assert (town.coordinates(), town.coordinates(), town.coordinates(incarnation=2)) == ([0], [], [0])


def test_a_stale_directory_shows_a_record_late_but_surely() -> None:
    town = Town(Weather(stale_s=5.0))
    for owner in range(50):
        town.announce(owner, owner=PeerId(f"owner {owner}"))
    town.clock.run_for(2.5)
    early = town.coordinates()
    assert 5 < len(early) < 45
    town.clock.run_for(2.5)
    assert sorted(early + town.coordinates()) == list(range(50))


def test_a_record_that_becomes_visible_after_its_successor_is_not_brought() -> None:
    town = Town(Weather(stale_s=5.0))
    for owner in range(50):
        town.announce(0, owner=PeerId(f"owner {owner}"))
        town.announce(1, owner=PeerId(f"owner {owner}"))
    town.clock.run_for(5.0)
    assert town.coordinates() == [1] * 50
    assert len(town.directory.everything(KEY)) == 50


def test_a_lost_write_is_mended_by_a_renewal() -> None:
    town = Town(Weather(lost_writes=0.5))
    for owner in range(100):
        town.announce(owner, owner=PeerId(f"owner {owner}"))
    town.clock.run_for(1.0)
    assert 30 < len(town.coordinates()) < 70
    town.clock.run_for(TTL_S)  # renewed RENEWALS times
    assert len(town.directory.everything(KEY)) > 100 * (1 - 2 * 0.5**RENEWALS)


def test_a_lease_is_renewed_while_its_owner_lives_and_runs_out_when_it_does_not() -> None:
    town = Town()
    town.announce()
    town.clock.run_for(3 * TTL_S)
    assert town.coordinates() == [0]
    town.alive = False
    town.clock.run_for(TTL_S - 1)
    assert town.directory.everything(KEY)
    town.clock.run_for(2.0)
    assert town.directory.everything(KEY) == []


def test_a_presence_is_not_renewed() -> None:
    town = Town()
    town.announce(slot="presence")
    town.clock.run_for(TTL_S)
    assert town.directory.everything(KEY) == [] and town.coordinates() == []


def test_who_withdraws_is_not_found() -> None:
    town = Town()
    town.announce()
    town.directory.withdraw(OWNER, KEY)
    town.clock.run_for(2 * TTL_S)
    assert town.coordinates() == [] and town.directory.everything(KEY) == []


def test_a_partition_hides_what_is_announced_behind_it_until_it_heals() -> None:
    town = Town()
    town.announce(1)
    town.clock.run_for(1.0)
    town.network.block([OWNER], [READER], town.clock.now)
    town.announce(2)
    town.clock.run_for(1.0)
    assert town.coordinates() == [1], "what was announced before stays visible"
    assert town.coordinates() == []
    town.network.heal()
    assert town.coordinates() == [2]


def test_a_story_may_hide_one_owner_from_one_reader() -> None:
    town = Town()
    town.directory.unseen.add((READER, OWNER))
    town.announce()
    town.clock.run_for(1.0)
    assert town.coordinates() == []
    town.directory.unseen.clear()
    assert town.coordinates() == [0]

"""Books merge, count down and page; the clock is a number."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moshpitd.averaging.names import PeerId, key
from moshpitd.directory import DirectoryConfig
from moshpitd.directory.records import Notary, Record
from moshpitd.directory.shelf import Book, Shelf, Verdict, unpack_entries
from moshpitd.identity import Identity

CONFIG = DirectoryConfig(records_per_key_max=50, records_per_peer_max=5, remember_s=600.0)
HERE = key("here")
NOTARY = Notary(b"swarm", CONFIG)
Write = Callable[..., Record]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Signs a record of the peer called by a number."""
    peers: dict[int, Identity] = {}

    def write(peer: int = 0, body: bytes = b"", ttl_s: float = 10.0, **options: bool) -> Record:
        if peer not in peers:
            peers[peer] = Identity.open(tmp_path / str(peer))
        return NOTARY.write(peers[peer], HERE, "lease", body, ttl_s, **options)

    return write


def bodies(book: Book, now: float) -> set[bytes]:
    return {one.body for one in book.roster(now)}


def test_a_key_holds_one_record_a_peer_and_the_newest_wins(write: Write) -> None:
    book = Book(CONFIG)
    old, new, other = write(1, b"old"), write(1, b"new"), write(2, b"other")
    for record in (new, other, old):
        book.put(record, 10.0, now=0.0)
    assert bodies(book, 0.0) == {b"new", b"other"}


def test_the_ttl_counts_from_first_sight_and_a_sequence_seen_never_extends(write: Write) -> None:
    book, record = Book(CONFIG), write(ttl_s=10.0)
    assert book.put(record, 10.0, now=100.0) is Verdict.TAKEN
    assert book.put(record, 10.0, now=109.0) is Verdict.KNOWN
    assert book.roster(109.0)[0].ttl_s == pytest.approx(1.0)
    assert book.roster(110.0) == ()


def test_a_holder_says_what_remains_but_cannot_say_more_than_was_signed(write: Write) -> None:
    book = Book(CONFIG)
    book.put(write(1, ttl_s=10.0), 3.0, now=0.0)
    book.put(write(2, ttl_s=10.0), 1e9, now=0.0)
    assert sorted(one.ttl_s for one in book.roster(0.0)) == [3.0, 10.0]


def test_a_replay_is_refused_before_and_after_expiry(write: Write) -> None:
    book = Book(CONFIG)
    first, second = write(body=b"first"), write(body=b"second")
    book.put(first, 10.0, now=0.0)
    book.put(second, 10.0, now=1.0)
    assert book.put(first, 10.0, now=2.0) is Verdict.STALE
    assert book.roster(50.0) == ()
    assert book.put(second, 10.0, now=51.0) is Verdict.STALE
    assert book.put(first, 10.0, now=52.0) is Verdict.STALE
    assert book.put(write(body=b"third"), 10.0, now=53.0) is Verdict.TAKEN
    assert bodies(book, 53.0) == {b"third"}


def test_a_withdrawal_hides_what_came_before_and_yields_to_what_comes_after(write: Write) -> None:
    book, before, withdrawal = Book(CONFIG), write(body=b"before"), write(withdrawn=True)
    book.put(before, 10.0, now=0.0)
    book.put(withdrawal, 10.0, now=1.0)
    book.put(before, 10.0, now=2.0)
    assert book.roster(2.0) == ()
    book.put(write(body=b"after"), 10.0, now=3.0)
    assert bodies(book, 3.0) == {b"after"}


def test_a_full_key_refuses_strangers_but_renews_its_own(write: Write) -> None:
    book = Book(CONFIG)
    for peer in range(50):
        assert book.put(write(peer), 10.0, now=0.0) is Verdict.TAKEN
    assert book.put(write(50), 10.0, now=0.0) is Verdict.FULL
    assert book.put(write(7, b"renewed"), 10.0, now=0.0) is Verdict.TAKEN
    assert book.put(write(50), 10.0, now=11.0) is Verdict.TAKEN


def test_one_peer_cannot_fill_a_node(tmp_path: Path) -> None:
    shelf, greedy, modest = Shelf(CONFIG), Identity.open(tmp_path / "g"), Identity.open(tmp_path / "m")

    def put(identity: Identity, number: int, now: float) -> Verdict:
        place = key("place", number)
        return shelf.put(place, NOTARY.write(identity, place, "lease", b"", 10.0), now)

    assert [put(greedy, number, 0.0) for number in range(7)] == [Verdict.TAKEN] * 5 + [Verdict.FULL] * 2
    assert put(greedy, 3, 0.0) is Verdict.TAKEN, "a renewal takes no room"
    assert put(modest, 6, 0.0) is Verdict.TAKEN
    assert put(greedy, 6, 20.0) is Verdict.TAKEN, "the expired make room"


def test_pages_hold_everything_once_and_a_second_read_only_news(write: Write) -> None:
    book = Book(CONFIG)
    for peer in range(20):
        book.put(write(peer, bytes(100)), 10.0, now=0.0)
    cursor, read = 0, []
    while True:
        page = book.page(cursor, lane=0, lanes=1, room_bytes=1000, now=0.0)
        assert len(page.pack()) <= 1000
        read += [raw for _, raw in unpack_entries(page.pack())]
        cursor = page.cursor
        if not page.left:
            break
    assert len(read) == len(set(read)) == 20
    renewed = write(3, b"renewed")
    book.put(renewed, 10.0, now=0.0)
    news = book.page(cursor, lane=0, lanes=1, room_bytes=1000, now=0.0)
    assert [raw for _, raw in news.entries] == [renewed.raw]


def test_lanes_part_a_book_without_gap_or_overlap(write: Write) -> None:
    book = Book(CONFIG)
    for peer in range(30):
        book.put(write(peer), 10.0, now=0.0)
    pages = [book.page(0, lane=lane, lanes=7, room_bytes=100_000, now=0.0) for lane in range(7)]
    read = [raw for page in pages for _, raw in page.entries]
    assert len(read) == len(set(read)) == 30


def test_tags_agree_exactly_when_books_do(write: Write) -> None:
    records = [write(peer) for peer in range(5)]
    one, other = Book(CONFIG), Book(CONFIG)
    for record in records:
        one.put(record, 10.0, now=0.0)
    for record in reversed(records):
        assert one.tag != other.tag
        other.put(record, 5.0, now=0.0)
    assert one.tag == other.tag
    assert other.roster(6.0) == () and other.tag == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_book_agrees_with_a_dumb_one(write: Write, seed: int) -> None:
    """The dumb one keeps every record it was ever offered, and thinks when asked."""
    rng = random.Random(seed)
    records = [write(peer, ttl_s=rng.uniform(1, 9)) for peer in range(4) for _ in range(6)]
    book, offered, now = Book(CONFIG), list[tuple[float, Record]](), 0.0
    for _ in range(60):
        now += rng.uniform(0, 2)
        record = rng.choice(records)
        book.put(record, record.ttl_s, now)
        offered.append((now, record))
        newest: dict[PeerId, tuple[int, float]] = {}
        for seen_at, one in offered:
            if one.peer not in newest or one.sequence > newest[one.peer][0]:
                newest[one.peer] = one.sequence, seen_at + one.ttl_s
        live = {(peer, sequence, until) for peer, (sequence, until) in newest.items() if until > now}
        assert {(one.peer, one.sequence) for one in book.roster(now)} == {(peer, seq) for peer, seq, _ in live}
        for announcement in book.roster(now):
            assert announcement.ttl_s == pytest.approx(newest[announcement.peer][1] - now)

"""Datagrams of lossy rounds: packed and read by hand; what is not whole, new and sealed is dropped and counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshpitd.averaging.ranges import PAYLOAD_BYTES_MAX
from moshpitd.peer.datagrams import (
    DATAGRAM_BYTES_MAX,
    FIRST_BYTE,
    HEADER_BYTES,
    Frames,
    Kind,
    Refusals,
    Seal,
    Stream,
    genuine,
    genuine_control,
    pack,
    pack_control,
    round_id,
    streams_in,
)

TOKEN = bytes(range(16))
SEAL = Seal(TOKEN, 3)
STREAM = Stream(Kind.AVERAGE, 7, 3, round_id(TOKEN), 3, 100, 50)
ROWS = np.random.default_rng(1).integers(0, 256, (8, 100), np.uint8)
SEQUENCES, OFFSETS = np.arange(4, 12), np.arange(4, 12) * 1000


def packed() -> Frames:
    return pack(STREAM, SEAL, SEQUENCES, OFFSETS, ROWS)


def read(frames: Frames, seen: bytearray | None = None, seal: Seal = SEAL) -> tuple[list[int], Refusals]:
    """Sequence numbers of what is taken, and what was refused."""
    refusals, taken = Refusals(), list[int]()
    seen = bytearray(50) if seen is None else seen
    for stream, same in streams_in(frames, refusals):
        if stream.round_id == STREAM.round_id and stream.kind is Kind.AVERAGE:
            sequences, _, _ = genuine(stream, same, seal, seen, refusals)
            taken += sequences.tolist()
        else:
            refusals.unknown += len(same)
    return taken, refusals


def test_what_was_packed_is_read() -> None:
    refusals = Refusals()
    ((stream, frames),) = streams_in(packed(), refusals)
    sequences, offsets, rows = genuine(stream, frames, SEAL, bytearray(50), refusals)
    assert stream == STREAM
    assert sequences.tolist() == SEQUENCES.tolist() and offsets.tolist() == OFFSETS.tolist()
    assert np.array_equal(rows, ROWS)
    assert refusals.total == 0
    assert (frames[:, 0] == FIRST_BYTE).all()


def test_the_longest_datagram_is_never_fragmented() -> None:
    assert DATAGRAM_BYTES_MAX + 40 + 8 <= 1500
    rows = np.zeros((1, PAYLOAD_BYTES_MAX), np.uint8)
    longest = pack(replace(STREAM, size=PAYLOAD_BYTES_MAX), SEAL, SEQUENCES[:1], OFFSETS[:1], rows)
    assert longest.shape == (1, DATAGRAM_BYTES_MAX)


def test_what_came_before_is_dropped_before_its_seal_is_looked_at() -> None:
    seen = bytearray(50)
    read(packed(), seen)
    again = packed()
    again[:, -1] ^= 1
    assert read(again, seen) == ([], Refusals(repeated=8))


def test_a_forgery_does_not_hide_what_is_genuine() -> None:
    seen, forged = bytearray(50), packed()
    forged[:, -1] ^= 1
    assert read(forged, seen) == ([], Refusals(forged=8))
    assert read(packed(), seen) == (SEQUENCES.tolist(), Refusals())


def test_another_round_another_sender_and_another_token_are_strangers() -> None:
    other = bytes(16)
    assert round_id(other) != round_id(TOKEN)
    assert read(packed(), seal=Seal(TOKEN, 2)) == ([], Refusals(forged=8))
    assert read(packed(), seal=Seal(other, 3)) == ([], Refusals(forged=8))
    of_other = pack(replace(STREAM, round_id=round_id(other)), Seal(other, 3), SEQUENCES, OFFSETS, ROWS)
    assert read(of_other) == ([], Refusals(unknown=8))


def test_damage_costs_no_cryptography_and_its_datagram_only() -> None:
    damaged = packed()
    damaged[2, HEADER_BYTES + 5] ^= 1
    taken, refusals = read(damaged)
    assert len(taken) == 7 and refusals == Refusals(damaged=1)


def test_streams_that_the_kernel_joined_are_told_apart() -> None:
    other = replace(STREAM, round_id=bytes(8))
    mixed = packed()
    mixed[1::2] = pack(other, SEAL, SEQUENCES, OFFSETS, ROWS)[1::2]
    taken, refusals = read(mixed)
    assert taken == SEQUENCES[::2].tolist() and refusals == Refusals(unknown=4)


@pytest.mark.parametrize("width", [1, HEADER_BYTES, HEADER_BYTES + 8, HEADER_BYTES + 107, DATAGRAM_BYTES_MAX + 1])
def test_truncated_and_overlong_datagrams_are_malformed(width: int) -> None:
    frames = np.zeros((3, width), np.uint8)
    given = packed()[:3, :width]
    frames[:, : given.shape[1]] = given
    assert read(frames) == ([], Refusals(malformed=3))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 7), st.lists(st.tuples(st.integers(0, HEADER_BYTES + 107), st.integers(1, 255)), min_size=1))
def test_no_change_of_any_byte_passes(row: int, changes: list[tuple[int, int]]) -> None:
    frames = packed()
    for at, bits in changes:
        frames[row, at] ^= bits
    taken, refusals = read(frames)
    expected = [s for n, s in enumerate(SEQUENCES.tolist()) if n != row]
    is_same = np.array_equal(frames, packed())
    assert sorted(taken) == (SEQUENCES.tolist() if is_same else expected)
    assert refusals.total == (0 if is_same else 1)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=1600), st.integers(1, 5))
def test_nonsense_is_counted_and_nothing_else(datagram: bytes, count: int) -> None:
    frames = np.frombuffer(datagram * count, np.uint8).reshape(count, -1)
    taken, refusals = read(frames)
    assert taken == [] and refusals.total == count


def test_an_older_control_datagram_is_a_replay() -> None:
    stream, refusals = Stream(Kind.MARK, 7, 3, round_id(TOKEN), 0, 5, 0), Refusals()
    datagram = np.frombuffer(pack_control(stream, SEAL, 9, b"hello"), np.uint8)
    assert genuine_control(stream, datagram, SEAL, 8, refusals) == (9, b"hello")
    assert genuine_control(stream, datagram, SEAL, 9, refusals) is None
    assert genuine_control(stream, datagram, Seal(TOKEN, 4), 0, refusals) is None
    assert (refusals.repeated, refusals.forged) == (1, 1)

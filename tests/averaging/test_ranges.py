"""Packet ranges: what one datagram holds can be decoded whatever became of the others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.names import Rank
from moshpitd.averaging.partition import Piece
from moshpitd.averaging.ranges import PAYLOAD_BYTES_MAX, Packets, Ranges, Slots, encode_ranges, range_elements
from moshpitd.averaging.vector import DTYPES

CODECS = ["float32", "float16", "bfloat16", "flash8", "flash4", "flash4-8", "flash3:32+spikes", "flash2", "flash5"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_a_range_fills_a_datagram_and_never_overfills_it(name: str, dtype: str) -> None:
    codec = codec_named(name)
    elements = range_elements(codec, DTYPES[dtype])
    sizes = [c.encoded_bytes(DTYPES[dtype], elements) for c in (codec.contribution, codec.average)]
    assert 0.9 * PAYLOAD_BYTES_MAX <= max(sizes) <= PAYLOAD_BYTES_MAX


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(CODECS), st.sampled_from(list(DTYPES)), st.integers(1, 12_000), st.integers(0, 99))
def test_every_packet_decodes_alone_to_what_the_coding_says(name: str, dtype: str, elements: int, seed: int) -> None:
    """Some of them, in any order: against the coding itself, range by range."""
    rng = np.random.default_rng(seed)
    codec, kind = codec_named(name), DTYPES[dtype]
    (cut,) = Ranges([Piece(0, 0, elements, dtype, Rank(0))], codec).cuts
    values = rng.standard_normal(elements).astype(kind)
    packets = encode_ranges(codec.contribution, cut, values, 0, cut.count)
    single = [Packets(each.numbers[[n]], each.rows[[n]]) for each in packets for n in range(len(each.numbers))]
    assert sorted(int(each.numbers[0]) for each in single) == list(range(cut.count))
    slots, arrived = Slots(cut, codec.contribution), rng.random(cut.count) < 0.7
    for n in rng.permutation(len(single)):
        if arrived[single[n].numbers[0]]:
            slots.put(single[n])
    decoded, refused = slots.decode(arrived)
    assert refused == {}
    for number in range(cut.count):
        start, stop = cut.elements(number)
        alone = codec.contribution.decode(bytes(codec.contribution.encode(values[start:stop])), kind, stop - start)
        assert np.array_equal(decoded[start:stop], alone if arrived[number] else np.zeros(stop - start, kind))


def test_ranges_are_numbered_over_the_whole_vector_and_cross_no_chunk() -> None:
    pieces = [Piece(0, 0, 1000, "float32", Rank(0)), Piece(1, 1000, 1700, "float32", Rank(1))]
    ranges = Ranges([*pieces, Piece(2, 1700, 1800, "float64", Rank(1))], codec_named("float32"))
    edges = [ranges.cut_of(number).elements(number) for number in range(ranges.total)]
    assert edges == [(0, 344), (344, 688), (688, 1000), (1000, 1344), (1344, 1688), (1688, 1700), (1700, 1800)]
    assert [ranges.span(Rank(rank)) for rank in (0, 1, 2)] == [(0, 3), (3, 7), (0, 0)]


@pytest.mark.parametrize("width", [0, 3, 1375, 1377])
def test_a_packet_of_another_size_is_refused(width: int) -> None:
    codec = codec_named("float32")
    (cut,) = Ranges([Piece(0, 0, 1000, "float32", Rank(0))], codec).cuts
    with pytest.raises(RemoteProtocolError, match="bytes"):
        Slots(cut, codec.contribution).put(Packets(np.array([1]), np.zeros((1, width), np.uint8)))


def test_a_code_that_is_none_costs_its_range_only() -> None:
    codec = codec_named("flash4")
    (cut,) = Ranges([Piece(0, 0, 6000, "float32", Rank(0))], codec).cuts
    values = np.linspace(1, 2, 6000, dtype=np.float32)
    first, *_ = encode_ranges(codec.contribution, cut, values, 0, cut.count)
    rows = first.rows.copy()
    rows[1, :2] = 0xFF, 0x7F  # an exponent that is none
    slots = Slots(cut, codec.contribution)
    slots.put(Packets(first.numbers, rows))
    decoded, refused = slots.decode(np.array([True, True, False]))
    assert list(refused) == [1]
    assert decoded[:2560].all() and not decoded[2560:].any()

"""Block-wise integers: as small as the formula says, as close as the table says, exact where that was promised."""

from __future__ import annotations

import itertools
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshpitd.averaging.all_reduce import Reduced, decode_average, reduce_chunk, scaled_weights
from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.codecs.flash import BLOCK, Flash
from moshpitd.averaging.codecs.planes import WIDTHS
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.names import Rank
from moshpitd.averaging.partition import Piece
from moshpitd.averaging.vector import DTYPES, LARGEST, Floats
from tests.averaging.codecs.test_planes import dumb_unpacked
from tests.fuzz.profile import tries

EVERY = [Flash(*parts) for parts in itertools.product(WIDTHS, (32, 128), (False, True))]
PLAIN = [coding for coding in EVERY if not coding.spikes]
CHUNK = 1 << 18

GAUSSIAN_DB = {
    32: {8: 46.7, 7: 40.7, 6: 34.6, 5: 28.4, 4: 22.1, 3: 15.5, 2: 8.1},
    128: {8: 44.6, 7: 38.6, 6: 32.5, 5: 26.3, 4: 20.0, 3: 13.4, 2: 6.0},
}
HEAVY_TAILED_ERROR = {8: 0.0100, 7: 0.0200, 6: 0.0403, 5: 0.0815, 4: 0.172, 3: 0.364, 2: 0.851}
"""t with three degrees of freedom, groups of 128."""
SPIKES_ERROR = {32: {2: 0.302, 3: 0.129, 4: 0.060}, 128: {2: 0.429, 3: 0.183, 4: 0.085}}


def normal(count: int = CHUNK, seed: int = 0, dtype: str = "float32") -> Floats:
    return np.random.default_rng(seed).standard_normal(count, np.float32).astype(DTYPES[dtype])


def there_and_back(coding: Flash, values: Floats) -> Floats:
    return coding.decode(coding.encode(values), values.dtype, len(values))


def relative_error(values: Floats, back: Floats) -> float:
    exact = values.astype(np.float64)
    return float(np.linalg.norm(back.astype(np.float64) - exact) / np.linalg.norm(exact))


def decibels(error: float) -> float:
    return -20 * math.log10(error)


def error_bound(coding: Flash, values: Floats) -> Floats:
    """Half a scale of each element's group, metadata rounded as badly as can be, and what dtypes round themselves."""
    exact = values.astype(np.float64)
    tail = -len(exact) % coding.group
    rows = np.pad(exact, (0, tail), "edge").reshape(-1, coding.group)
    low, high, top = rows.min(axis=1), rows.max(axis=1), (1 << coding.bits) - 1
    least = math.ldexp(1, max(-1022, math.frexp(np.abs(exact).max())[1] - 15) - 24)  # float16's smallest, in units
    slack = np.maximum(np.abs(low) * 2.0**-10, least)
    scale = (high / top - low / top + slack / top) * (1 + 2.0**-10) + least
    grain = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(values.dtype.name, 0.0) + 2.0**-22
    bound = scale / 2 + np.abs(rows).max(axis=1) * grain
    # A spike is a float16.
    spike = np.maximum(np.abs(low), np.abs(high)) * 2.0**-11 + least if coding.spikes else 0.0
    return np.repeat(np.maximum(bound, spike + np.abs(rows).max(axis=1) * grain), coding.group)[: len(exact)]


def assert_close(coding: Flash, values: Floats) -> None:
    back = there_and_back(coding, values)
    assert back.dtype == values.dtype
    error = np.abs(back.astype(np.float64) - values.astype(np.float64))
    smallest = {"float64": 2.0**-1074, "float16": 2.0**-24}.get(values.dtype.name, 2.0**-149)
    assert (error <= error_bound(coding, values) + smallest).all()


# ---- how many bytes


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_a_code_has_the_size_that_was_promised(coding: Flash) -> None:
    bits = coding.bits + (80 if coding.spikes else 32) / coding.group
    for elements in (1, 2, 31, 33, 127, 129, 4095, 4097, BLOCK - 1, BLOCK + 1, CHUNK, CHUNK - 12_345):
        values = normal(elements)
        size = coding.encoded_bytes(values.dtype, elements)
        assert len(coding.encode(values)) == size
        if elements >= BLOCK - 1:
            assert bits <= size * 8 / elements <= bits * 1.01
        whole_groups = -(-elements // coding.group) * coding.group
        assert size <= whole_groups * bits / 8 + 10


# ---- how close


@pytest.mark.parametrize("coding", PLAIN, ids=repr)
def test_the_error_on_normal_values_is_that_of_the_table(coding: Flash) -> None:
    values = normal(1 << 20)
    assert decibels(relative_error(values, there_and_back(coding, values))) == pytest.approx(
        GAUSSIAN_DB[coding.group][coding.bits], abs=0.2
    )


def test_the_error_on_heavy_tails_is_that_of_the_table() -> None:
    """Of a distribution without a fourth moment even millions of values give it to a tenth of a decibel only."""
    values = np.random.default_rng(0).standard_t(3, 1 << 22).astype(np.float32)
    for bits, error in HEAVY_TAILED_ERROR.items():
        found = relative_error(values, there_and_back(Flash(bits), values))
        assert decibels(found) == pytest.approx(decibels(error), abs=0.2), bits


@pytest.mark.parametrize("group", SPIKES_ERROR)
def test_the_error_with_spikes_reserved_is_that_of_the_table(group: int) -> None:
    values = normal(1 << 20)
    for bits, error in SPIKES_ERROR[group].items():
        found = relative_error(values, there_and_back(Flash(bits, group, spikes=True), values))
        assert found == pytest.approx(error, rel=0.05), bits


def test_two_codings_whatever_the_size_of_the_group() -> None:
    """SYSTEMS.md: the error of the mean of eight, by the bits of contributions and averages."""
    rows = [normal(seed=seed) for seed in range(8)]
    mean = np.mean([row.astype(np.float64) for row in rows], axis=0).astype(np.float32)
    for name, expected in {"flash8": 0.008, "flash4-8": 0.094, "flash4": 0.137}.items():
        codec = codec_named(name)
        piece = Piece(0, 0, CHUNK, "float32", Rank(0))
        weights = scaled_weights([1.0] * 8)
        codes = [None, *(codec.contribution.encode(row) for row in rows[1:])]
        kept, received = np.empty_like(mean), np.empty_like(mean)
        reduced = reduce_chunk(piece, list(zip(range(8), weights, codes, strict=True)), rows[0], kept, codec)
        assert isinstance(reduced, Reduced)
        assert decode_average(piece, reduced.code, codec.average, received) == reduced.checksum
        assert received.tobytes() == kept.tobytes()
        assert relative_error(mean, kept) == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_no_element_is_off_by_more_than_half_a_scale(coding: Flash) -> None:
    for values in (normal(70_001), normal(5000) + np.float32(3), normal(5000) * np.float32(1e-4) + np.float32(1)):
        assert_close(coding, values)


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_neither_tiny_nor_huge_values_lose_anything(coding: Flash) -> None:
    """float16 ends at 65,504 and at 6e-8; the chunk's power of two takes care of both."""
    usual = relative_error(normal(5000), there_and_back(coding, normal(5000)))
    for magnitude in (1e-44, 1e-38, 1e-30, 1e-26, 1e-12, 6e-8, 65_504, 1e30, 1e37, 8e37):
        values = (normal(5000) * magnitude).astype(np.float32)
        assert_close(coding, values)
        if magnitude > 1e-38:  # below, float32 itself has few bits left
            assert relative_error(values, there_and_back(coding, values)) == pytest.approx(usual, rel=0.02)


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_float64_keeps_its_range(coding: Flash) -> None:
    for magnitude in (5e-324, 1e-310, 1e-300, 1e-40, 1.0, 1e40, 1e300, 3e307):
        assert_close(coding, normal(5000, dtype="float64") * magnitude)


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_the_largest_values_of_a_dtype_saturate(coding: Flash) -> None:
    """A scale is rounded up: what is decoded must not become infinite for that."""
    for dtype, largest in LARGEST.items():
        values = (np.linspace(-1, 1, 1000) * largest).astype(DTYPES[dtype])
        values[500:] = largest
        assert np.isfinite(there_and_back(coding, values).astype(np.float64)).all()
        assert_close(coding, values)


def test_small_groups_beside_large_ones_keep_their_own_scale() -> None:
    values = normal(1280)
    values[128:256] *= np.float32(1e-6)
    back = there_and_back(Flash(8), values)
    assert relative_error(values[128:256], back[128:256]) < 0.01


def test_spike_reserving_keeps_an_outlier_and_what_is_beside_it() -> None:
    values = normal(1280)
    values[5], values[700] = 1000, -3000
    back = there_and_back(Flash(4, spikes=True), values)
    assert back[[5, 700]].tolist() == [1000, -3000]
    quiet = np.delete(values, [5, 700])
    assert relative_error(quiet, np.delete(back, [5, 700])) < 0.12
    assert relative_error(quiet, np.delete(there_and_back(Flash(4), values), [5, 700])) > 0.4


# ---- exact


def any_float32s(count: int, seed: int = 0) -> Floats:
    """Of all magnitudes, denormals included: random bits without infinities."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, 2 * count, np.uint32)
    values = bits.view(np.float32)
    return values[np.isfinite(values)][:count]


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_a_group_of_one_value_is_exact(coding: Flash) -> None:
    for value in any_float32s(100):
        values = np.full(coding.group * 2 + 3, value)
        assert there_and_back(coding, values).tobytes() == values.tobytes()


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_groups_of_one_value_are_exact_beside_others(coding: Flash) -> None:
    values = normal(coding.group * 200)
    rows = values.reshape(-1, coding.group)
    rows[::2] = any_float32s(200)[::2, None] * np.float32(2.0**-100)
    rows[4] = 0
    rows[6] = np.float32(1 + 2**-23)
    assert np.array_equal(there_and_back(coding, values).reshape(-1, coding.group)[::2], rows[::2])
    assert_close(coding, values)


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_a_group_of_one_element_is_exact(coding: Flash) -> None:
    for elements, dtype in itertools.product((1, 129), DTYPES):
        values = np.linspace(0.1, 77.7, elements, dtype=np.float32).astype(DTYPES[dtype])
        assert there_and_back(coding, values)[-1] == values[-1]


def test_zeros_are_zeros_and_a_spike_in_them_stays_alone() -> None:
    values = np.zeros(5000, np.float32)
    assert not there_and_back(Flash(2), values).any()
    values[777] = -0.25
    back = there_and_back(Flash(2, spikes=True), values)
    assert np.flatnonzero(back).tolist() == [777] and back[777] == -0.25


@pytest.mark.parametrize("elements", [2, 3])
@pytest.mark.parametrize("bits", WIDTHS)
def test_two_spikes_are_all_there_is_of_a_short_group(bits: int, elements: int) -> None:
    values = np.array([4, -2, 1][:elements], np.float32)
    assert there_and_back(Flash(bits, spikes=True), values).tolist() == values.tolist()


# ---- any values at all


def a_strange_vector(elements: int, seed: int, exponents: tuple[int, int], dtype: str) -> Floats:
    """Magnitudes spread over many powers of two, with runs of equal values, zeros and both signs."""
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.uniform(-1, 1, elements), rng.integers(min(exponents), max(exponents) + 1, elements))
    for _ in range(rng.integers(0, 4)):
        start, stop = sorted(rng.integers(0, elements + 1, 2))
        values[start:stop] = rng.choice([0.0, -0.0, 1.0, values[0]])
    return np.clip(values, -LARGEST[dtype], LARGEST[dtype]).astype(DTYPES[dtype])


@tries(200)
@given(
    coding=st.sampled_from(EVERY),
    elements=st.integers(1, 600),
    seed=st.integers(0, 1 << 32),
    exponents=st.tuples(st.integers(-160, 128), st.integers(-160, 128)),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_whatever_is_encoded_comes_back_close(
    coding: Flash, elements: int, seed: int, exponents: tuple[int, int], dtype: str
) -> None:
    values = a_strange_vector(elements, seed, exponents, dtype)
    assert_close(coding, values)


def dumb_decoded(coding: Flash, code: bytes, elements: int) -> list[float]:
    """Element by element in fractions, as flash.py describes it; rounded to float32 where it says so."""

    def rounded(value: Fraction) -> Fraction:
        return Fraction(float(np.float32(float(value))))  # float64 has more than twice float32's bits: rounds as once

    groups = -(-elements // coding.group)
    unit = Fraction(2) ** struct.unpack_from("<h", code)[0]
    fields = struct.unpack_from(f"<{(5 if coding.spikes else 2) * groups}H", code, 2)
    scales, minima = fields[:groups], fields[groups : 2 * groups]
    packed = code[2 + 2 * len(fields) :]
    count = -(-elements // 8) * 8
    codes = dumb_unpacked(packed, coding.bits, count)

    def half(bits: int) -> Fraction:
        return Fraction(struct.unpack("<e", bits.to_bytes(2, "little"))[0]) * unit

    values: list[float] = []
    for place in range(elements):
        group = place // coding.group
        if scales[group] >> 15:
            raw = (scales[group] & 0x7FFF) << 17 | minima[group] << 1 | codes[group * coding.group] & 1
            values.append(struct.unpack("<f", raw.to_bytes(4, "little"))[0])
        else:
            values.append(float(rounded(rounded(codes[place] * half(scales[group])) + half(minima[group]))))
    if coding.spikes:
        low, high, places = (fields[field * groups : (field + 1) * groups] for field in (2, 3, 4))
        for group, both in enumerate(places):
            if both & 0xFF != both >> 8:
                values[group * coding.group + (both & 0xFF)] = float(half(low[group]))
                values[group * coding.group + (both >> 8)] = float(half(high[group]))
    return values


@tries(60)
@given(
    coding=st.sampled_from(EVERY),
    elements=st.integers(1, 400),
    seed=st.integers(0, 1 << 32),
    exponents=st.tuples(st.integers(-60, 60), st.integers(-60, 60)),
)
def test_every_bit_is_that_of_the_dumb_decoder(
    coding: Flash, elements: int, seed: int, exponents: tuple[int, int]
) -> None:
    values = a_strange_vector(elements, seed, exponents, "float32")
    code = coding.encode(values)
    back = coding.decode(code, values.dtype, elements)
    assert back.tolist() == dumb_decoded(coding, bytes(code), elements)


# ---- from the wire


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_a_wrong_size_is_the_senders_fault(coding: Flash) -> None:
    code = bytes(coding.encode(normal(300)))
    for wrong in (b"", code[:-1], code + b"\0", code * 2):
        with pytest.raises(RemoteProtocolError, match=rf"^300 elements as {coding.bits}-bit codes have .* bytes, not"):
            coding.decode(wrong, DTYPES["float32"], 300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_code_that_anybody_takes(dtype: str, bad: float) -> None:
    values = normal(300, dtype=dtype)
    values[17] = bad
    for coding in EVERY:
        with pytest.raises(RemoteProtocolError, match="not finite"):
            there_and_back(coding, values)


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_metadata_that_is_not_finite_is_refused(coding: Flash) -> None:
    groups = 3
    good = bytes(coding.encode(normal(groups * coding.group)))
    scales, minima = 2, 2 + 2 * groups
    forged = {
        scales: (0x7C00, 0x7E00, 0x7FFF, 0xFFFF, 0xFFC0),
        minima + 2: (0x7C00, 0xFC00, 0x7E00, 0xFE01),
        0: (1010, 32_767, 0x8000),
    }
    if coding.spikes:
        forged |= {minima + 2 * groups: (0x7C00, 0xFE01), minima + 4 * groups: (0xFC00,)}
        forged |= {minima + 6 * groups: (coding.group, coding.group << 8, 0xFF00, 0x00FF)}
    for place, words in forged.items():
        for word in words:
            code = bytearray(good)
            struct.pack_into("<H", code, place, word)
            with pytest.raises(RemoteProtocolError):
                coding.decode(bytes(code), DTYPES["float32"], groups * coding.group)


@tries(200)
@given(
    coding=st.sampled_from(EVERY),
    elements=st.integers(1, 300),
    seed=st.integers(0, 1 << 32),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_any_bytes_are_finite_values_or_refused(coding: Flash, elements: int, seed: int, dtype: str) -> None:
    """A stranger's bytes never become an infinity inside of us, nor anything but the one error."""
    code = bytearray(np.random.default_rng(seed).bytes(coding.encoded_bytes(DTYPES[dtype], elements)))
    code[:2] = struct.pack("<h", seed % 2100 - 1050)
    try:
        values = coding.decode(bytes(code), DTYPES[dtype], elements)
    except RemoteProtocolError:
        return
    assert np.isfinite(values.astype(np.float64)).all()
    assert len(values) == elements and values.dtype == DTYPES[dtype]


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_a_view_at_an_odd_place_is_read_like_bytes(coding: Flash) -> None:
    """Payloads are cut out of frames where they lie."""
    values = normal(999)
    code = bytes(coding.encode(values))
    view = memoryview(b"x" + code)[1:]
    assert coding.decode(view, values.dtype, 999).tobytes() == coding.decode(code, values.dtype, 999).tobytes()


@pytest.mark.parametrize("coding", EVERY, ids=repr)
def test_encoding_leaves_the_values_alone_and_gives_the_same_bytes_again(coding: Flash) -> None:
    values = normal(70_001)
    values.flags.writeable = False
    assert bytes(coding.encode(values)) == bytes(coding.encode(values.copy()))


def test_a_second_trip_changes_little_more() -> None:
    values = normal()
    once = there_and_back(Flash(8), values)
    assert relative_error(once, there_and_back(Flash(8), once)) < 0.01

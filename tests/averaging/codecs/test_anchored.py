"""Differences to what all hold: the error is of the spread, never larger than without, and all decode the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshpitd.averaging.codecs import codec_named, rules_of
from moshpitd.averaging.codecs.codec import Codec
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.vector import DTYPES, LARGEST, Floats, Vector

ELEMENTS = 3000


def around(anchor: Floats, name: str = "flash4+anchored") -> Codec:
    return codec_named(name).of(0, len(anchor), Vector.of({"w": anchor}))


def through(codec: Codec, values: Floats) -> Floats:
    code = codec.contribution.encode(values)
    assert len(code) == codec.contribution.encoded_bytes(values.dtype, len(values))
    return codec.contribution.decode(code, values.dtype, len(values))


def off(values: Floats, back: Floats) -> float:
    exact = values.astype(np.float64)
    return float(np.linalg.norm(back.astype(np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_that_of_the_spread(dtype: str) -> None:
    rng = np.random.default_rng(0)
    anchor = rng.standard_normal(ELEMENTS).astype(DTYPES[dtype])
    values = (anchor.astype(np.float64) + 0.01 * rng.standard_normal(ELEMENTS)).astype(DTYPES[dtype])
    plain = off(values, through(codec_named("flash4"), values))
    anchored = off(values, through(around(anchor), values))
    rounding = {"bfloat16": 2**-9, "float16": 2**-12}.get(dtype, 0.0)
    assert 0.09 < plain < 0.11 and anchored < 0.0011 + rounding


def test_what_is_nearer_to_zero_than_to_the_anchor_travels_as_it_is() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal(ELEMENTS).astype(np.float32)
    code = around(values + 100).contribution.encode(values)
    assert bytes(code)[1:] == bytes(codec_named("flash4").contribution.encode(values))
    assert code[0] == 0 and around(values + 0.1).contribution.encode(values)[0] == 1


def test_one_byte_is_all_it_costs_and_nothing_where_there_is_no_anchor() -> None:
    codec = codec_named("flash4+anchored")
    plain = codec_named("flash4").average.encoded_bytes(DTYPES["float32"], 1000)
    assert codec.of(0, 1000).average.encoded_bytes(DTYPES["float32"], 1000) == plain
    assert around(np.zeros(1000, np.float32)).average.encoded_bytes(DTYPES["float32"], 1000) == plain + 1
    assert codec_named("flash8").of(0, 1000, Vector.of({"w": np.zeros(1000)})) == codec_named("flash8")


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_the_ends_of_a_dtype_values_saturate_and_stay_finite(dtype: str) -> None:
    largest = LARGEST[dtype]
    ends = np.array([largest, -largest, largest / 2, 0.0] * 64).astype(DTYPES[dtype])
    for anchor, values in ((ends, -ends), (-ends, ends), (ends, ends), (ends, (ends / 3).astype(ends.dtype))):
        back = through(around(anchor, "flash8+anchored"), values)
        assert np.isfinite(back.astype(np.float64)).all()
        assert np.abs(back.astype(np.float64) / largest - values.astype(np.float64) / largest).max() < 0.02


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_as_without_an_anchor(bad: float) -> None:
    values = np.ones(500, np.float32)
    values[77] = bad
    with pytest.raises(RemoteProtocolError, match="not finite"):
        through(around(np.ones(500, np.float32)), values)


@pytest.mark.parametrize("code", [b"", b"\2", b"\1", b"\0", b"\xff" * 60])
def test_a_code_that_is_none_is_refused(code: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        around(np.ones(100, np.float32)).average.decode(code, DTYPES["float32"], 100)


@given(
    scale=st.floats(1e-30, 1e30),
    distance=st.floats(0, 10),
    dtype=st.sampled_from(["float32", "float64"]),
    name=st.sampled_from(["flash8+anchored", "flash2:32+anchored", "flash3+spikes+anchored"]),
    seed=st.integers(0, 50),
)
@settings(deadline=None, max_examples=60)
def test_whatever_the_anchor_the_error_stays_within_what_the_codec_promises(
    scale: float, distance: float, dtype: str, name: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = (scale * rng.standard_normal(700)).astype(DTYPES[dtype])
    anchor = (values + distance * scale * rng.standard_normal(700)).astype(DTYPES[dtype])
    back = through(around(anchor, name), values)
    assert np.abs(back - values).max() <= codec_named(name).precision * np.abs(values).max()


def test_only_the_anchored_tensors_of_a_chunk_are_coded_around_it() -> None:
    rng = np.random.default_rng(2)
    given_ = {name: rng.standard_normal(1000).astype(np.float32) for name in ("a.w", "b.bias", "c.w")}
    anchor = Vector.of({name: values + np.float32(1e-3) for name, values in given_.items()})
    vector = Vector.of(given_)
    codec = rules_of("*.bias=flash8,*=flash4+anchored").over(vector.layout).of(0, 3000, anchor)
    values = vector.elements(0, 3000)
    back = through(codec, values)
    weights, bias = np.r_[0:1000, 2000:3000], slice(1000, 2000)
    assert off(values[weights], back[weights]) < 2e-4
    alone = codec_named("flash8")
    assert np.array_equal(back[bias], through(alone, values[bias]))

"""Values that travel as they are, or cast: the same for everybody, and never a surprise in size."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from moshpitd.averaging.codecs.cast import Cast
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.vector import DTYPES, Floats

WIRE_BYTES = {
    ("float32", "float64"): 8,
    ("float32", "float32"): 4,
    ("float32", "float16"): 2,
    ("float32", "bfloat16"): 2,
    ("float16", "float64"): 2,
    ("float16", "float32"): 2,
    ("float16", "float16"): 2,
    ("float16", "bfloat16"): 2,
    ("bfloat16", "float64"): 2,
    ("bfloat16", "float32"): 2,
    ("bfloat16", "float16"): 2,
    ("bfloat16", "bfloat16"): 2,
}
PAIRS = pytest.mark.parametrize(("codec", "dtype"), WIRE_BYTES)


def values_of(dtype: str, count: int = 1000) -> Floats:
    scales = np.logspace(-3, 3, count)
    return (np.random.default_rng(0).standard_normal(count) * scales).astype(DTYPES[dtype])


@PAIRS
def test_codes_have_the_size_that_was_promised(codec: str, dtype: str) -> None:
    for count in (0, 1, 4095, 4096):
        code = Cast(codec).encode(values_of(dtype, count))
        assert len(code) == Cast(codec).encoded_bytes(DTYPES[dtype], count) == count * WIRE_BYTES[codec, dtype]


@PAIRS
def test_a_code_decodes_to_its_own_dtype_and_a_second_trip_changes_nothing(codec: str, dtype: str) -> None:
    chosen = Cast(codec)
    values = values_of(dtype)
    once = chosen.decode(chosen.encode(values), values.dtype, len(values))
    assert once.dtype == values.dtype
    twice = chosen.decode(chosen.encode(once), values.dtype, len(values))
    assert twice.tobytes() == once.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_is_lossless_for_every_dtype(dtype: str) -> None:
    values = values_of(dtype)
    code = Cast("float32").encode(values)
    assert Cast("float32").decode(code, values.dtype, len(values)).tobytes() == values.tobytes()


@pytest.mark.parametrize(("codec", "dtype"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_what_is_as_narrow_already_travels_unchanged(codec: str, dtype: str) -> None:
    values = values_of(dtype)
    assert Cast(codec).encode(values) == values.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("codec", "half_step"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_casts_round_to_the_nearest(codec: str, half_step: float, dtype: str) -> None:
    values = values_of(dtype)
    back = Cast(codec).decode(Cast(codec).encode(values), values.dtype, len(values))
    assert np.all(np.abs(back - values) <= np.abs(values) * half_step + 2.0**-25)
    assert np.any(back != values)


def test_what_is_beyond_float16_saturates() -> None:
    """One large value must not end a round as an infinity."""
    values = np.array([65504, 65505, 1e6, -1e30, 3], np.float32)
    back = Cast("float16").decode(Cast("float16").encode(values), values.dtype, 5)
    assert back.tolist() == [65504, 65504, 65504, -65504, 3]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_beyond_bfloat16_saturates(dtype: str) -> None:
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    values = np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max, 3], DTYPES[dtype])
    back = Cast("bfloat16").decode(Cast("bfloat16").encode(values), values.dtype, 3)
    assert back.tolist() == [largest, -largest, 3]


@PAIRS
def test_nan_and_infinity_are_not_hidden_by_a_code(codec: str, dtype: str) -> None:
    """They are refused before; should one come through, the reducer has to see it."""
    values = np.array([1, np.nan, 2], DTYPES[dtype])
    back = Cast(codec).decode(Cast(codec).encode(values), values.dtype, 3)
    assert np.isnan(back).tolist() == [False, True, False]


@PAIRS
def test_a_wrong_size_is_the_senders_fault(codec: str, dtype: str) -> None:
    code = bytes(Cast(codec).encode(values_of(dtype, 10)))
    for wrong in (b"", code[:-1], code + b"\0", code * 2):
        with pytest.raises(RemoteProtocolError, match=r"^10 elements as .* have .* bytes, not"):
            Cast(codec).decode(wrong, DTYPES[dtype], 10)


@PAIRS
def test_a_view_at_an_odd_place_is_read_like_bytes(codec: str, dtype: str) -> None:
    """Payloads are cut out of frames where they lie."""
    values = values_of(dtype, 33)
    code = bytes(Cast(codec).encode(values))
    view = memoryview(b"x" + code)[1:]
    assert Cast(codec).decode(view, values.dtype, 33).tobytes() == Cast(codec).decode(code, values.dtype, 33).tobytes()

"""Sums travel exactly, in as few bytes as they need; what float64 cannot hold is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshpitd.averaging.codecs import INTEGERS
from moshpitd.averaging.codecs.integers import BLOCK, LARGEST
from moshpitd.averaging.errors import RemoteProtocolError

CODING = INTEGERS.contribution
FLOAT64 = np.dtype(np.float64)


@given(st.lists(st.integers(-LARGEST, LARGEST), min_size=1, max_size=3 * BLOCK + 7))
def test_every_integer_that_float64_holds_comes_back(integers: list[int]) -> None:
    values = np.array(integers, np.float64)
    code = bytes(CODING.encode(values))
    assert np.array_equal(CODING.decode(code, FLOAT64, len(values)), values)
    assert len(code) <= CODING.encoded_bytes(FLOAT64, len(values))


@pytest.mark.parametrize("width", range(1, 8))
def test_a_block_takes_what_its_largest_needs_to_the_last_value(width: int) -> None:
    edge = min(2 ** (8 * width - 1), LARGEST)
    for largest in (edge - 1, -edge):
        values = np.zeros(2 * BLOCK)
        values[BLOCK + 3] = largest
        code = CODING.encode(values)
        assert len(code) == 2 + BLOCK * (1 + width)
        assert np.array_equal(CODING.decode(code, FLOAT64, 2 * BLOCK), values)


def test_a_few_large_ones_do_not_widen_the_others() -> None:
    rng = np.random.default_rng(0)
    values = np.rint(rng.normal(0, 2**20, 64 * BLOCK))
    values[-5:] = 2.0**46
    assert len(CODING.encode(values)) < (3 * 64 + 5) * BLOCK
    assert np.array_equal(CODING.decode(CODING.encode(values), FLOAT64, 64 * BLOCK), values)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda code: code[:-1],
        lambda code: code + b"\0",
        lambda code: b"",
        lambda code: b"\x09" + code[1:],
        lambda code: b"\x00" + code[1:],
        lambda code: code[:1] + b"\xff" * (len(code) - 2) + b"\x7f",
    ],
    ids=["cut", "longer", "nothing", "too wide", "no width", "too large"],
)
def test_what_is_no_code_is_refused(spoil: object) -> None:
    assert callable(spoil)
    values = np.zeros(BLOCK)
    values[-1] = LARGEST
    with pytest.raises(RemoteProtocolError):
        CODING.decode(spoil(bytes(CODING.encode(values))), FLOAT64, BLOCK)


def test_only_float64_holds_sums() -> None:
    with pytest.raises(RemoteProtocolError):
        CODING.decode(CODING.encode(np.zeros(4)), np.dtype(np.float32), 4)

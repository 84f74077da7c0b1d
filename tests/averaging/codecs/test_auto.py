"""What `auto` picks: precision is given up only for time worth having, and never below flash4-8."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshpitd.averaging.codecs import CHOICES, choose

MBIT = 1e6 / 8
GBIT = 1e9 / 8
MB = 1_000_000


@pytest.mark.parametrize(
    ("megabytes", "rates", "codec"),
    [
        (1000, [0.0] * 4, "float32"),  # nobody knows yet
        (16, [100 * MBIT] * 4, "flash8"),
        (16, [100 * MBIT, 0.0, 10 * GBIT, 10 * GBIT], "flash8"),  # the slowest of those that are known
        (1000, [100 * MBIT] * 4, "flash4-8"),
        (64, [1 * GBIT] * 4, "flash8"),
        (1000, [10 * GBIT] * 4, "float32"),
        (1000, [3 * GBIT] * 2, "float32"),
        (1000, [2.5 * GBIT] * 2, "flash8"),
        (1000, [5.4 * GBIT] * 16, "float32"),
        (1000, [5 * GBIT] * 16, "flash8"),
        (1, [100 * MBIT] * 8, "float32"),  # 0.14 s, not worth a bit
    ],
)
def test_by_the_slowest_line_and_the_size(megabytes: int, rates: list[float], codec: str) -> None:
    choice = choose(megabytes * MB, megabytes * MB // 4, rates)
    assert choice.codec == codec
    assert choice.why.startswith("auto: ")


def test_the_reason_has_the_figures() -> None:
    why = choose(16 * MB, 4 * MB, [100 * MBIT] * 4).why
    assert why == "auto: over the slowest line, 12.5 MB/s, float32 takes about 1.9 s, flash8 0.51 s"


@given(
    elements=st.integers(1, 10**12),
    wide=st.sampled_from([2, 4, 8]),
    rates=st.lists(st.floats(0, 1e300), min_size=2, max_size=64),
)
def test_whatever_strangers_claim_of_their_lines(elements: int, wide: int, rates: list[float]) -> None:
    assert choose(elements * wide, elements, rates).codec in CHOICES


@given(megabytes=st.integers(1, 10_000), rate=st.floats(1e3, 1e11), factor=st.floats(1, 1e4))
def test_a_faster_line_never_costs_precision(megabytes: int, rate: float, factor: float) -> None:
    precise = {name: rank for rank, name in enumerate(CHOICES)}
    slow, fast = (choose(megabytes * MB, megabytes * MB // 4, [r] * 4).codec for r in (rate, rate * factor))
    assert precise[fast] <= precise[slow]

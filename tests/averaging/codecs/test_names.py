"""A codec by its name: one spelling for one meaning, and a way out for every other word."""

from __future__ import annotations

import itertools

import pytest

from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.codecs.flash import Flash
from moshpitd.averaging.compressors import DENSE, check_compressor
from moshpitd.averaging.errors import InvalidInput


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("flash8", "flash8"),
        ("flash8:128", "flash8"),
        ("flash8-8", "flash8"),
        ("flash4-8:128+spikes", "flash4-8+spikes"),
        ("flash3-3:32", "flash3:32"),
    ],
)
def test_names_that_mean_the_same_are_one(written: str, canonical: str) -> None:
    assert codec_named(written) == codec_named(canonical)
    assert codec_named(written).name == canonical


def test_every_width_for_each_half_both_groups_with_and_without_spikes() -> None:
    names = set()
    for bits, average_bits, group, spikes in itertools.product(range(2, 9), range(2, 9), (32, 128), (False, True)):
        codec = codec_named(f"flash{bits}-{average_bits}:{group}{'+spikes' if spikes else ''}")
        assert codec.contribution == Flash(bits, group, spikes)
        assert codec.average == Flash(average_bits, group, spikes)
        assert codec_named(codec.name) == codec
        names.add(codec.name)
    assert len(names) == 7 * 7 * 2 * 2


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("bfloat61", "bfloat16"),
        ("bf16", "bfloat16"),
        ("flash9", "flash8"),
        ("flash4-9", "flash4-8"),
        ("flash4:64+spikes", "flash4:32+spikes"),
        ("flash4:256", "flash4"),
        ("flash4:032", "flash4:32"),
        ("flash4_8", "flash4-8"),
        ("flash 8", "flash8"),
        ("Flash8", "flash8"),
        ("flash4+spike", "flash4+spikes"),
        ("flash8\n", "flash8"),
    ],
)
def test_another_name_is_refused_with_what_there_is_and_the_nearest(written: str, meant: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        codec_named(written)
    assert str(refused.value).startswith(f"unknown codec {written!r}: there are float32, float16, bfloat16 and flash<")
    assert f"did you mean {meant!r}?" in str(refused.value)


@pytest.mark.parametrize("name", ["", "mp3", "flash", "flash8" * 100_000, "flash8:" + "9" * 5000, "flash8:٣٢"])
def test_nonsense_is_refused_quickly_and_briefly(name: str) -> None:
    with pytest.raises(InvalidInput, match="unknown codec") as refused:
        codec_named(name)
    assert len(str(refused.value)) < 400


def test_an_unknown_compressor_is_refused_by_name() -> None:
    assert check_compressor(DENSE) == DENSE
    with pytest.raises(InvalidInput, match="unknown compressor 'zip'"):
        check_compressor("zip")

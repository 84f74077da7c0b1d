"""A codec for each tensor: which rule counts, one spelling for one meaning, and chunks of several codecs."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshpitd.averaging.codecs import codec_named, rules_of
from moshpitd.averaging.codecs.rules import TEXT_MAX
from moshpitd.averaging.errors import InvalidInput, RemoteProtocolError
from moshpitd.averaging.partition import ALIGNMENT, pieces_of
from moshpitd.averaging.vector import DTYPES, Layout, TensorSpec, Vector

CODECS = ("float32", "float16", "bfloat16", "flash8", "flash4-8", "flash3:32+spikes", "flash5+anchored")


def layout_of(*tensors: tuple[str, int, str]) -> Layout:
    return Layout.of(TensorSpec(name, (elements,), dtype) for name, elements, dtype in tensors)


def model(blocks: int = 3) -> Layout:
    """Weights and biases in turn, as in every model."""
    sizes = {"weight": 9000, "bias": 77}
    return layout_of(*((f"{i}.{kind}", size, "float32") for i in range(blocks) for kind, size in sizes.items()))


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("flash8:128", "flash8"),
        ("auto", "auto"),
        ("*=flash8-8", "flash8"),
        (" *.bias = float32 , *=flash4:128 ", "*.bias=float32,*=flash4"),
        ("size < 0400=float16,*=auto", "size<400=float16,*=auto"),
        ("a=b=float32,*=flash8+anchored+spikes", "a=b=float32,*=flash8+spikes+anchored"),
    ],
)
def test_what_means_the_same_is_written_alike(written: str, canonical: str) -> None:
    assert rules_of(written).name == canonical
    assert rules_of(canonical) == rules_of(written)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("*.bias=float32,*=flash9", "unknown codec 'flash9'.*did you mean 'flash8'"),
        ("*=flash8,*.bias=float32", r"'\*.bias=float32' can never count, '\*' comes before it"),
        ("a=float32,b=float16,a=flash8", "'a=flash8' can never count, 'a' comes before it"),
        ("size<10=float32,size<010=flash8", "can never count"),
        ("*.bias=float32,flash8", r"'flash8': write PATTERN=CODEC"),
        ("=flash8", "write PATTERN=CODEC"),
        ("a=float32,,*=flash8", "write PATTERN=CODEC"),
        ("a=,*=flash8", "unknown codec ''"),
        ("*=auto+anchored", "unknown codec 'auto"),
        (",".join(f"tensor.number.{i}=float32" for i in range(65)), "65 codec rules: at most 64"),
        ("x" * TEXT_MAX + "=float32", f"of {TEXT_MAX} characters"),
    ],
)
def test_what_cannot_be_meant_is_refused(written: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as refused:
        rules_of(written)
    assert len(str(refused.value)) < 500


def test_a_tensor_that_no_rule_fits_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"no codec for tensor '0.weight' float32\[9000\].*none of the rules"):
        rules_of("*.bias=float32,size<100=float32").check(model())
    rules_of("*.bias=float32,size<9001=float32").check(model())


def test_the_first_rule_that_fits_counts() -> None:
    layout = layout_of(("0.bias", 10, "float32"), ("0.weight", 5000, "float32"), ("norm", 10, "float32"))
    codec = rules_of("*.bias=float16,size<4096=float32,*=flash8").over(layout)
    assert [codec.of(at, at + 1).name for at in (0, 10, 5010)] == ["float16", "flash8", "float32"]


def test_auto_is_for_its_share_and_becomes_what_the_group_says() -> None:
    rules = rules_of("*.bias=float32,*=auto")
    layout = layout_of(("0.bias", 10, "float32"), ("0.weight", 5000, "float32"), ("half", 100, "float16"))
    assert rules.share_of_auto(layout) == (5000 * 4 + 100 * 2, 5100)
    assert rules_of("flash8").share_of_auto(layout) == (0, 0)
    assert rules.with_auto("flash4-8").name == "*.bias=float32,*=flash4-8"
    assert rules_of("auto").with_auto("flash8") == rules_of("flash8")


def test_chunks_stay_large_however_often_codecs_change() -> None:
    """A bias of 77 elements after each weight: chunks hold several tensors and codes of both codecs, no more bytes."""
    layout = model(40)
    codec = rules_of("*.bias=float32,*=flash4").over(layout)
    spans = (0, layout.elements)
    pieces = pieces_of(layout, spans, 1 << 18)
    assert len(pieces) == math.ceil(layout.elements / (1 << 16))
    sent = sum(
        codec.of(piece.start, piece.stop).contribution.encoded_bytes(DTYPES["float32"], piece.stop - piece.start)
        for piece in pieces
    )
    assert sent == pytest.approx(40 * (9000 * 4.25 / 8 + 77 * 4), rel=2e-3)
    assert rules_of(codec.name).wire_bytes(layout) == pytest.approx(2 * sent, rel=0.01)


@st.composite
def sessions(draw: st.DrawFn) -> tuple[Layout, str]:
    names = draw(st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=12, unique=True))
    sizes = st.one_of(st.integers(0, 300), st.integers(0, 9000))
    layout = [(name, draw(sizes), draw(st.sampled_from(list(DTYPES)))) for name in names]
    layout.append(("w", draw(st.integers(1, 9000)), draw(st.sampled_from(list(DTYPES)))))
    patterns = st.one_of(st.text("ab.?*", min_size=1, max_size=3), st.integers(0, 5000).map("size<{}".format))
    chosen = [p for p in draw(st.lists(patterns, max_size=4, unique=True)) if p != "*"]
    rules = [f"{pattern}={draw(st.sampled_from(CODECS))}" for pattern in (*chosen, "*")]
    return layout_of(*layout), ",".join(rules)


def dumb_codec_of(rules: str, spec: TensorSpec) -> str:
    for rule in rules.split(","):
        pattern, _, codec = rule.rpartition("=")
        if pattern.startswith("size<"):
            if spec.elements < int(pattern[5:]):
                return codec
        elif fnmatch.fnmatchcase(spec.name, pattern):
            return codec
    raise AssertionError(spec)


@given(session=sessions(), seed=st.integers(0, 99), boundaries=st.lists(st.integers(0, 40_000), max_size=3))
@settings(deadline=None, max_examples=60)
def test_whatever_the_rules_each_tensor_travels_by_its_own_codec(
    session: tuple[Layout, str], seed: int, boundaries: Sequence[int]
) -> None:
    layout, rules = session
    rng = np.random.default_rng(seed)
    vector, back = Vector.empty(layout), Vector.empty(layout)
    for _, view in vector.views():
        view[...] = rng.standard_normal(len(view)).astype(view.dtype)
    cuts = sorted(min(at, layout.elements) // ALIGNMENT * ALIGNMENT for at in boundaries)
    codec = rules_of(rules).over(layout)
    for piece in pieces_of(layout, (0, *cuts, layout.elements), 8 * ALIGNMENT):
        values = vector.elements(piece.start, piece.stop)
        for coding in (codec.of(piece.start, piece.stop).contribution, codec.of(piece.start, piece.stop).average):
            code = coding.encode(values)
            assert len(code) == coding.encoded_bytes(values.dtype, len(values))
            with pytest.raises(RemoteProtocolError):
                coding.decode(bytes(code)[:-1], values.dtype, len(values))
        back.elements(piece.start, piece.stop)[:] = coding.decode(bytes(code), values.dtype, len(values))
    for (spec, given_), (_, got) in zip(vector.views(), back.views(), strict=True):
        expected = codec_named(dumb_codec_of(rules, spec))
        if "flash" in expected.name:
            assert np.abs(got.astype(float) - given_).max(initial=0) <= expected.precision * 6
        else:
            alone = expected.average.decode(expected.average.encode(given_), given_.dtype, len(given_))
            assert np.array_equal(got, alone)

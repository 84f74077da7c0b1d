"""Named tensors become one vector, the same at every peer whatever the order they were named in."""

from __future__ import annotations

import random

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.vector import DTYPES, NAME_BYTES_MAX, Floats, Layout, Segment, TensorSpec, Vector
from moshpitd.averaging.vector import first_non_finite as scan

MIXED = (
    TensorSpec("bias", (3,), "bfloat16"),
    TensorSpec("weight", (4, 5), "float32"),
    TensorSpec("scale", (), "float64"),
    TensorSpec("half", (7,), "float16"),
    TensorSpec("anchor", (2,), "float32"),
    TensorSpec("nothing", (0, 9), "float32"),
)


def random_arrays(specs: tuple[TensorSpec, ...], seed: int = 0) -> dict[str, npt.NDArray[np.floating]]:
    rng = np.random.default_rng(seed)
    return {spec.name: np.asarray(rng.standard_normal(spec.shape)).astype(DTYPES[spec.dtype]) for spec in specs}


# ---- layouts


def test_segments_go_from_the_widest_dtype_to_the_narrowest_and_tensors_by_name() -> None:
    layout = Layout.of(MIXED)
    assert [spec.name for spec in layout.tensors] == ["scale", "anchor", "nothing", "weight", "half", "bias"]
    assert layout.segments == (
        Segment("float64", 0, 1, 0),
        Segment("float32", 1, 23, 8),
        Segment("float16", 23, 30, 96),
        Segment("bfloat16", 30, 33, 110),
    )
    assert (layout.elements, layout.byte_size) == (33, 116)


def test_the_order_of_naming_does_not_matter() -> None:
    shuffled = list(MIXED)
    random.Random(1).shuffle(shuffled)
    assert Layout.of(shuffled) == Layout.of(MIXED)
    assert Layout.of(shuffled).digest == Layout.of(MIXED).digest


def test_names_are_ordered_by_their_bytes() -> None:
    """So do safetensors, and every language: not by a locale, not by UTF-16."""
    names = ["b", "a", "a.10", "a.2", "Z", "é", "\U0001f600", "\uffee"]
    layout = Layout.of(TensorSpec(name, (1,), "float32") for name in names)
    assert [spec.name for spec in layout.tensors] == ["Z", "a", "a.10", "a.2", "b", "é", "\uffee", "\U0001f600"]


@pytest.mark.parametrize(
    "other",
    [
        TensorSpec("w", (2, 3), "float16"),
        TensorSpec("w", (3, 2), "float32"),
        TensorSpec("w", (6,), "float32"),
        TensorSpec("v", (2, 3), "float32"),
    ],
    ids=str,
)
def test_any_difference_changes_the_digest(other: TensorSpec) -> None:
    assert Layout.of([TensorSpec("w", (2, 3), "float32")]).digest != Layout.of([other]).digest


def test_a_name_that_looks_like_two_tensors_is_one() -> None:
    cunning = Layout.of([TensorSpec("a' float32 1\n'b", (1,), "float32")])
    plain = Layout.of([TensorSpec("a", (1,), "float32"), TensorSpec("b", (1,), "float32")])
    assert cunning.digest != plain.digest


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "the layout is empty"),
        ([TensorSpec("w", (0,), "float32")], "no elements"),
        ([TensorSpec("", (1,), "float32")], "must have 1 to"),
        ([TensorSpec("é" * (NAME_BYTES_MAX // 2 + 1), (1,), "float32")], "must have 1 to"),
        ([TensorSpec("w", (1,), "float32"), TensorSpec("w", (2,), "float32")], "'w' is named twice"),
        ([TensorSpec("steps", (1,), "int64")], "'steps' is int64.*leave it out or cast it"),
        ([TensorSpec("w", (1,), "complex64")], "complex64"),
        ([TensorSpec("w", (2, -1), "float32")], "impossible shape"),
        ([TensorSpec("w", (1,) * 33, "float32")], "impossible shape"),
    ],
)
def test_what_cannot_be_averaged_is_refused_by_name(tensors: list[TensorSpec], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Layout.of(tensors)


def test_the_first_difference_is_told_in_words() -> None:
    mine = Layout.of([TensorSpec("a", (1,), "float32"), TensorSpec("b", (2,), "float32")])

    def against(*tensors: TensorSpec) -> str | None:
        return mine.first_difference(Layout.of(tensors))

    assert against(*mine.tensors) is None
    assert against(mine.tensors[0]) == "tensor 'b' float32[2] is here but not there"
    assert against(*mine.tensors, TensorSpec("c", (3,), "float16")) == "tensor 'c' float16[3] is there but not here"
    changed = against(TensorSpec("a", (1,), "float64"), TensorSpec("b", (3,), "float32"))
    assert changed == "tensor 'a' float32[1] here is float64[1] there"


def test_every_element_belongs_to_its_tensor() -> None:
    layout = Layout.of(MIXED)
    owners = [layout.tensor_at(position).name for position in range(layout.elements)]
    assert owners == ["scale"] + ["anchor"] * 2 + ["weight"] * 20 + ["half"] * 7 + ["bias"] * 3
    with pytest.raises(IndexError):
        layout.tensor_at(layout.elements)


# ---- vectors


def test_packing_and_unpacking_changes_no_bit() -> None:
    arrays = random_arrays(MIXED)
    back = Vector.of(arrays).arrays()
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()


def test_strided_arrays_are_packed_by_value() -> None:
    square = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert np.array_equal(Vector.of({"t": square.T[::2]}).arrays()["t"], square.T[::2])


def test_a_view_of_elements_writes_through() -> None:
    vector = Vector.of({"a": np.zeros(3, np.float32), "b": np.zeros(4, np.float32)})
    vector.elements(2, 5)[...] = 7
    assert np.array_equal(vector.arrays()["a"], [0, 0, 7])
    assert np.array_equal(vector.arrays()["b"], [7, 7, 0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_segments_hold_their_tensors_one_after_the_other(seed: int) -> None:
    arrays = random_arrays(MIXED, seed)
    vector = Vector.of(arrays)
    for segment in vector.layout.segments:
        inside = [arrays[spec.name].reshape(-1) for spec in vector.layout.tensors if spec.dtype == segment.dtype]
        assert vector.elements(segment.start, segment.stop).tobytes() == np.concatenate(inside).tobytes()


# ---- NaN and infinity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_bad_value_is_found(dtype: str, bad: float) -> None:
    values: Floats = np.ones(1000, DTYPES[dtype])
    assert scan(values) is None
    values[[400, 900]] = bad
    assert scan(values) == 400


def test_infinities_that_cancel_are_still_found() -> None:
    assert scan(np.array([1, np.inf, -np.inf], np.float32)) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_finite_values_are_not_taken_for_infinity(dtype: str) -> None:
    largest = ml_dtypes.finfo(DTYPES[dtype]).max
    assert scan(np.full(100, largest, DTYPES[dtype])) is None

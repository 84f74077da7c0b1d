"""What is averaged: named tensors, packed into one vector that is a row of segments of equal dtype.

Knows the canonical order and where each tensor lies. Does not know weights, peers or how bytes travel.

The canonical order: segments by dtype, widest first (float64, float32, float16, bfloat16), inside a segment the tensors
by name. Widest first keeps every element aligned without padding, so that the packed bytes are the same for all.
Positions ("element 17") count elements over all segments in that order; for one dtype that is the order of names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np
import numpy.typing as npt

from moshpitd.averaging.errors import InvalidInput

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that can be averaged, widest first: the order of the segments."""

LARGEST: dict[str, float] = {
    "float64": float(np.finfo(np.float64).max),
    "float32": float(np.finfo(np.float32).max),
    "float16": 65504.0,
    "bfloat16": 2.0**128 - 2.0**120,
}
"""What does not fit a dtype saturates there instead of becoming infinite."""

NAME_BYTES_MAX = 1024
RANK_MAX = 32

Floats = npt.NDArray[np.floating]
"""A one-dimensional array of one of DTYPES."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, shape and dtype (a key of DTYPES)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of the vector with one dtype: elements [start, stop), bytes from byte_start."""

    dtype: str
    start: int
    stop: int
    byte_start: int


@dataclass(frozen=True)
class Layout:
    """The tensors of a session in canonical order. Raises InvalidInput for what cannot be averaged."""

    tensors: tuple[TensorSpec, ...]

    @staticmethod
    def of(tensors: Iterable[TensorSpec], *, name_bytes_max: int = NAME_BYTES_MAX) -> Layout:
        """Check the tensors, given in any order, and put them into canonical order."""
        order = list(DTYPES)
        specs = list(tensors)
        if not specs:
            raise InvalidInput("the layout is empty: name at least one tensor")
        seen: set[str] = set()
        for spec in specs:
            if not spec.name or len(spec.name.encode()) > name_bytes_max:
                raise InvalidInput(f"tensor name {spec.name[:40]!r}: must have 1 to {name_bytes_max} bytes")
            if spec.name in seen:
                raise InvalidInput(f"tensor {spec.name!r} is named twice")
            if spec.dtype not in DTYPES:
                raise InvalidInput(
                    f"tensor {spec.name!r} is {spec.dtype}: only {', '.join(order)} can be averaged; "
                    "leave it out or cast it"
                )
            if len(spec.shape) > RANK_MAX or any(side < 0 for side in spec.shape):
                raise InvalidInput(f"tensor {spec.name!r} has an impossible shape {list(spec.shape)}")
            seen.add(spec.name)
        layout = Layout(tuple(sorted(specs, key=lambda spec: (order.index(spec.dtype), spec.name.encode()))))
        if layout.elements == 0:
            raise InvalidInput("the layout is empty: its tensors have no elements")
        return layout

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        segments: list[Segment] = []
        start = byte_start = 0
        for dtype, numpy_dtype in DTYPES.items():
            count = sum(spec.elements for spec in self.tensors if spec.dtype == dtype)
            if count:
                segments.append(Segment(dtype, start, start + count, byte_start))
                start += count
                byte_start += count * numpy_dtype.itemsize
        return tuple(segments)

    @cached_property
    def elements(self) -> int:
        return sum(spec.elements for spec in self.tensors)

    @cached_property
    def byte_size(self) -> int:
        return sum(spec.elements * DTYPES[spec.dtype].itemsize for spec in self.tensors)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over the canonical description: equal exactly when two peers can average."""
        lines = "".join(f"{spec.name!r} {spec.dtype} {','.join(map(str, spec.shape))}\n" for spec in self.tensors)
        return hashlib.sha256(lines.encode()).digest()

    def first_difference(self, other: Layout) -> str | None:
        """What a person should look at first when two layouts do not match; None when they do."""
        mine = {spec.name: spec for spec in self.tensors}
        theirs = {spec.name: spec for spec in other.tensors}
        for name in sorted(mine.keys() | theirs.keys()):
            here, there = mine.get(name), theirs.get(name)
            if here == there:
                continue
            if there is None:
                return f"tensor {here} is here but not there"
            if here is None:
                return f"tensor {there} is there but not here"
            return f"tensor {here} here is {there.dtype}{list(there.shape)} there"
        return None

    def byte_at(self, position: int) -> int:
        """Where this element of the vector begins in its buffer; that of `elements` is its end."""
        for segment in self.segments:
            if position < segment.stop:
                return segment.byte_start + (position - segment.start) * DTYPES[segment.dtype].itemsize
        return self.byte_size

    def tensor_at(self, position: int) -> TensorSpec:
        """The tensor that holds this element of the vector."""
        end = 0
        for spec in self.tensors:
            end += spec.elements
            if position < end:
                return spec
        raise IndexError(position)


@dataclass(frozen=True)
class Vector:
    """A layout and its values: `buffer` is one-dimensional uint8, `layout.byte_size` long."""

    layout: Layout
    buffer: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        assert self.buffer.dtype == np.uint8 and self.buffer.shape == (self.layout.byte_size,)

    @staticmethod
    def empty(layout: Layout) -> Vector:
        return Vector(layout, np.empty(layout.byte_size, np.uint8))

    @staticmethod
    def zeros(layout: Layout) -> Vector:
        return Vector(layout, np.zeros(layout.byte_size, np.uint8))

    @staticmethod
    def of(arrays: dict[str, npt.NDArray[np.floating]]) -> Vector:
        """Pack named arrays (copies)."""
        layout = Layout.of(TensorSpec(name, array.shape, array.dtype.name) for name, array in arrays.items())
        vector = Vector.empty(layout)
        for spec, view in vector.views():
            view[...] = arrays[spec.name].reshape(-1)
        return vector

    def elements(self, start: int, stop: int) -> Floats:
        """The view of elements [start, stop), which must lie in one segment."""
        for segment in self.layout.segments:
            if segment.start <= start and stop <= segment.stop and start < stop:
                dtype = DTYPES[segment.dtype]
                first = segment.byte_start + (start - segment.start) * dtype.itemsize
                return self.buffer[first : first + (stop - start) * dtype.itemsize].view(dtype)
        raise AssertionError(f"elements {start}..{stop} cross a segment")

    def views(self) -> Iterator[tuple[TensorSpec, Floats]]:
        """Each tensor with the flat view of its values."""
        start = 0
        for spec in self.layout.tensors:
            empty = np.empty(0, DTYPES[spec.dtype])
            yield spec, self.elements(start, start + spec.elements) if spec.elements else empty
            start += spec.elements

    def arrays(self) -> dict[str, npt.NDArray[np.floating]]:
        return {spec.name: view.reshape(spec.shape) for spec, view in self.views()}


def first_non_finite(values: Floats) -> int | None:
    """The index of the first NaN or infinity, None where all is finite.

    Whatever is not finite shows in the smallest or the largest value, and looking for those costs less than anything
    else. For the narrow types, where it costs more, the sum tells; when it is not finite the exact scan runs, because
    a sum of large values may overflow.
    """
    if values.dtype.itemsize >= 4:
        if not len(values) or (math.isfinite(float(values.max())) and math.isfinite(float(values.min()))):
            return None
    else:
        with np.errstate(all="ignore"):
            if math.isfinite(float(np.sum(values, dtype=np.float32))):
                return None
    finite = np.isfinite(values)
    return None if finite.all() else int(np.argmin(finite))

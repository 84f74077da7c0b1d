"""The trainer's tensors: what they are, where they lie, and how they become the packed vector and back.

Knows numpy arrays and everything with `__dlpack__` on the CPU; never imports a framework. Does not know sessions or
calls. A tensor is looked at anew for every averaging: a framework may have given it other memory in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moshpit_client import dlpack
from moshpit_client.errors import InvalidInput
from moshpit_client.v1 import daemon_pb2 as pb

CHUNK_BYTES = 1 << 20
"""gRPC is fastest between 256 KiB and 1 MiB."""

DTYPES: dict[str, np.dtype[np.generic]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
"""The dtypes that can be averaged in the order of the packed vector, each as numpy holds it here."""


DATA_TYPES = {
    "float64": pb.DATA_TYPE_FLOAT64,
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "bfloat16": pb.DATA_TYPE_BFLOAT16,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def byte_size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    @property
    def message(self) -> pb.Tensor:
        return pb.Tensor(name=self.name, shape=self.shape, data_type=DATA_TYPES[self.dtype])


def read_spec(message: pb.Tensor) -> TensorSpec:
    dtype = next(name for name, data_type in DATA_TYPES.items() if data_type == message.data_type)
    return TensorSpec(message.name, tuple(message.shape), dtype)


@dataclass(frozen=True, slots=True)
class View:
    """A tensor's values where they lie."""

    spec: TensorSpec
    array: npt.NDArray[np.generic]
    """bfloat16 as uint16; any strides and byte order."""
    native: np.dtype[np.generic]
    """What a new array of this kind has for a dtype: that of ml_dtypes, if the trainer has bfloat16 from there."""
    immutable: bool
    owner: object
    """Keeps the memory."""


def view(name: str, tensor: object) -> View:
    """Raises InvalidInput, naming the tensor, for what cannot be averaged."""
    if isinstance(tensor, np.ndarray):
        return _of_array(name, tensor)
    if getattr(tensor, "requires_grad", False):
        tensor = tensor.detach()  # type: ignore[attr-defined]  # a torch parameter: same memory, without its graph
    export = getattr(tensor, "__dlpack__", None)
    if export is None or not callable(export):
        raise InvalidInput(
            f"tensor {name!r} is a {type(tensor).__name__}: give a numpy array, or a tensor with __dlpack__ on the CPU"
        )
    try:
        lent = dlpack.borrow(export)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"tensor {name!r} does not give access to its memory ({error}): give a dense tensor on the CPU"
        ) from error
    if lent.array is None:
        raise _not_a_float(name, lent.dtype)
    spec = TensorSpec(name, lent.shape, lent.dtype)
    as_numpy = _as_numpy(tensor)
    # DLPack before 1.0 cannot say that memory must not be written: then those without item assignment, and those whose
    # numpy view is read-only, are taken for immutable.
    immutable = lent.read_only or not hasattr(tensor, "__setitem__")
    immutable = immutable or (as_numpy is not None and not as_numpy.flags.writeable)
    native = lent.array.dtype if as_numpy is None else as_numpy.dtype
    return View(spec, lent.array, native, immutable, lent.owner)


def _of_array(name: str, array: npt.NDArray[np.generic]) -> View:
    dtype = array.dtype.name
    if dtype not in DTYPES:
        raise _not_a_float(name, dtype)
    raw = array.view(np.uint16) if dtype == "bfloat16" else array
    return View(TensorSpec(name, array.shape, dtype), raw, array.dtype, not array.flags.writeable, array)


def _as_numpy(tensor: object) -> npt.NDArray[np.generic] | None:
    if not hasattr(tensor, "__array__"):
        return None
    try:
        return np.asarray(tensor)
    except (TypeError, RuntimeError, ValueError):  # torch has no numpy dtype for bfloat16
        return None


def _not_a_float(name: str, dtype: str) -> InvalidInput:
    return InvalidInput(
        f"tensor {name!r} is {dtype}: only {', '.join(DTYPES)} can be averaged; leave it out or cast it"
    )


def canonical(specs: Mapping[str, TensorSpec]) -> list[TensorSpec]:
    """The order of the packed vector: by dtype, widest first, then by the bytes of the name."""
    order = list(DTYPES)
    return sorted(specs.values(), key=lambda spec: (order.index(spec.dtype), spec.name.encode()))


def pack(views: Sequence[View]) -> Iterator[bytes]:
    """The packed vector in chunks of CHUNK_BYTES, made as they are asked for: one copy of contiguous tensors."""
    pieces: list[memoryview] = []
    room = CHUNK_BYTES
    for each in views:
        raw = _bytes_of(each)
        while raw:
            pieces.append(raw[:room])
            room -= len(pieces[-1])
            raw = raw[len(pieces[-1]) :]
            if not room:
                yield b"".join(pieces)
                pieces, room = [], CHUNK_BYTES
    if pieces:
        yield b"".join(pieces)


def pack_into(packed: npt.NDArray[np.uint8], views: Sequence[View]) -> None:
    """The packed vector at once; a tensor that lies in its place already is not copied."""
    places = unpack(packed, [each.spec for each in views])
    for each in views:
        place = places[each.spec.name]
        if each.array.__array_interface__ != place.__array_interface__:
            np.copyto(place, each.array)


def unpack(packed: npt.NDArray[np.uint8], specs: Sequence[TensorSpec]) -> dict[str, npt.NDArray[np.generic]]:
    """Views of the packed vector by name; bfloat16 as uint16."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    start = 0
    for spec in specs:
        stop = start + spec.byte_size
        arrays[spec.name] = packed[start:stop].view(DTYPES[spec.dtype]).reshape(spec.shape)
        start = stop
    return arrays


def parts_of(specs: Sequence[TensorSpec], start: int, stop: int) -> dict[str, slice]:
    """What elements [start, stop) of the packed vector are of each tensor, flattened; others are left out."""
    parts: dict[str, slice] = {}
    first = 0
    for spec in specs:
        last = first + math.prod(spec.shape)
        if max(start, first) < min(stop, last):
            parts[spec.name] = slice(max(start, first) - first, min(stop, last) - first)
        first = last
    return parts


def byte_at(specs: Sequence[TensorSpec], position: int) -> int:
    """Where this element of the packed vector begins; that of the vector's end is its size."""
    start = 0
    for spec in specs:
        elements = math.prod(spec.shape)
        if position < elements:
            return start + position * DTYPES[spec.dtype].itemsize
        start, position = start + spec.byte_size, position - elements
    return start


def write_part(view: View, values: npt.NDArray[np.generic], part: slice) -> None:
    """Of the flattened tensor."""
    flat = view.array.reshape(-1) if view.array.flags.c_contiguous else view.array.flat
    flat[part] = values.reshape(-1)[part]


def add_change(view: View, before: npt.NDArray[np.generic], after: npt.NDArray[np.generic]) -> None:
    """Move the tensor as it is now by what lies between `before`, which is spoilt, and `after`, as `unpack` gives them.

    What it moved by itself since `before` is added to `after`, so one that did not move becomes `after` to the bit.
    16-bit types are added in float32 and rounded once.
    """
    match view.spec.dtype:
        case "bfloat16":
            moved = _bfloat16_values(view.array) - _bfloat16_values(before)
            np.copyto(view.array, _bfloat16_bits(_bfloat16_values(after) + moved))
        case "float16":
            moved = view.array.astype(np.float32) - before.astype(np.float32)
            np.copyto(view.array, after.astype(np.float32) + moved, casting="same_kind")
        case _:
            np.subtract(view.array, before, out=before)
            np.add(after, before, out=before)
            np.copyto(view.array, before)


def _bfloat16_values(bits: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounded to the nearest, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _bytes_of(view: View) -> memoryview:
    flat = np.ascontiguousarray(view.array, DTYPES[view.spec.dtype]).reshape(-1)
    return flat.view(np.uint8).data

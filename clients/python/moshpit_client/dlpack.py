"""Reads DLPack capsules: where a tensor of any framework lies in memory.

Knows the two structs of DLPack's C interface. Does not know frameworks. numpy.from_dlpack is not enough: it refuses
bfloat16 and hands out read-only arrays when the producer speaks DLPack before 1.0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HOST_MEMORY = {1: "CPU", 3: "pinned CUDA", 11: "pinned ROCm"}
"""DLDeviceType values that the CPU can read and write."""
_FLAG_READ_ONLY = 1
_KINDS = {0: "int", 1: "uint", 2: "float", 3: "opaque", 4: "bfloat", 5: "complex", 6: "bool"}
_RAW: dict[str, np.dtype[np.generic]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype = ctypes.c_int
_is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


@dataclass(frozen=True, slots=True)
class Lent:
    """A tensor's memory, as long as `owner` is referenced."""

    dtype: str
    """float32, bfloat16, int64, ..."""
    shape: tuple[int, ...]
    array: npt.NDArray[np.generic] | None
    """The values; bfloat16 as uint16. None for a dtype that cannot be averaged."""
    read_only: bool
    """True when the producer says so. Producers before DLPack 1.0 cannot."""
    owner: object


def borrow(export: Callable[..., object]) -> Lent:
    """Call a `__dlpack__`. Raises what it raises, and BufferError for memory that the CPU cannot reach."""
    try:
        capsule = export(max_version=(1, 0))
    except TypeError:  # from before DLPack 1.0
        capsule = export()
    # The capsule is read, not consumed: its own destructor then gives the memory back.
    if _is_valid(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_get_pointer(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise BufferError(f"it speaks DLPack {versioned.major}, this client DLPack 1")
        return _lend(versioned.tensor, bool(versioned.flags & _FLAG_READ_ONLY), capsule)
    return _lend(_Tensor.from_address(_get_pointer(capsule, b"dltensor")), False, capsule)


def _lend(tensor: _Tensor, read_only: bool, owner: object) -> Lent:
    if tensor.device_type not in HOST_MEMORY:
        raise BufferError(f"it lies on device type {tensor.device_type}, not in the CPU's memory")
    shape = tuple(tensor.shape[: tensor.ndim])
    dtype = "bool" if tensor.code == 6 else f"{_KINDS.get(tensor.code, f'type {tensor.code} of ')}{tensor.bits}"
    if dtype not in _RAW or tensor.lanes != 1:
        return Lent(dtype if tensor.lanes == 1 else f"{dtype}x{tensor.lanes}", shape, None, read_only, owner)
    raw = _RAW[dtype]
    if 0 in shape:
        return Lent(dtype, shape, np.empty(shape, raw), read_only, owner)
    strides = tensor.strides[: tensor.ndim] if tensor.strides else _packed(shape)
    reach = [(side - 1) * stride for side, stride in zip(shape, strides, strict=True)]
    first, last = sum(step for step in reach if step < 0), sum(step for step in reach if step > 0)
    start = tensor.data + tensor.byte_offset + first * raw.itemsize
    memory = (ctypes.c_ubyte * ((last - first + 1) * raw.itemsize)).from_address(start)
    array: npt.NDArray[np.generic] = np.ndarray(
        shape, raw, memory, -first * raw.itemsize, tuple(stride * raw.itemsize for stride in strides)
    )
    return Lent(dtype, shape, array, read_only, owner)


def _packed(shape: tuple[int, ...]) -> list[int]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides

"""Tensors of other frameworks, played by objects that lend numpy's memory as torch and JAX do."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

import moshpit_client
from moshpit_client import Daemon
from tests.client.conftest import DaemonProcess


@pytest.fixture
def daemon(shared: DaemonProcess) -> Iterator[Daemon]:
    with moshpit_client.connect(shared.path) as daemon:
        yield daemon


class Modern:
    """DLPack 1.0: says itself whether it may be written."""

    def __init__(self, array: npt.NDArray[np.generic]) -> None:
        self.array = array

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None) -> object:
        return self.array.__dlpack__(max_version=max_version)  # type: ignore[call-arg]

    def __setitem__(self, place: object, value: object) -> None:
        raise AssertionError("values are copied, not assigned")


class Old(Modern):
    """DLPack before 1.0, as most of torch's releases have it."""

    def __dlpack__(self) -> object:  # type: ignore[override]
        return self.array.__dlpack__()


class Frozen:
    """As JAX has it: numpy's view is read-only, item assignment exists only to explain that it does not."""

    def __init__(self, array: npt.NDArray[np.generic]) -> None:
        self.array = array

    def __dlpack__(self) -> object:
        return self.array.__dlpack__()

    def __array__(self, dtype: object = None, copy: object = None) -> npt.NDArray[np.generic]:
        view = self.array.view()
        view.flags.writeable = False
        return view

    def __setitem__(self, place: object, value: object) -> None:
        raise TypeError("arrays are immutable")


class Elsewhere(Modern):
    """On a GPU."""

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None) -> object:
        raise BufferError("it lies on cuda:0")


class Parameter(Modern):
    """As torch has it: its memory is lent by its detached twin only."""

    requires_grad = True

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None) -> object:
        raise BufferError("use detach()")

    def detach(self) -> Modern:
        return Modern(self.array)


class Brain(Old):
    """bfloat16, whose bits numpy holds as uint16: the lent struct is relabelled as torch would write it."""

    def __dlpack__(self) -> object:  # type: ignore[override]
        capsule = self.array.__dlpack__()
        get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
        get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        type_code = 8 + 8 + 4  # after data, device and ndim
        ctypes.c_uint8.from_address(get_pointer(capsule, b"dltensor") + type_code).value = 4
        return capsule


@pytest.mark.parametrize("kind", [Modern, Old, Parameter])
def test_lent_memory_is_averaged_in_place(daemon: Daemon, kind: type[Modern]) -> None:
    arrays = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "backwards": np.arange(5, dtype=np.float16)[::-1],
        "scalar": np.array(3, np.float32),
        "nothing": np.empty((3, 0), np.float32),
    }
    expected = {name: array + array for name, array in arrays.items()}
    with daemon.open_session({name: kind(array) for name, array in arrays.items()}) as session:
        session.average()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_bfloat16_is_averaged_in_place_though_numpy_does_not_know_it(daemon: Daemon) -> None:
    bits = np.array([0x3F80, 0x4000], np.uint16)  # 1, 2
    with daemon.open_session({"w": Brain(bits)}) as session:
        session.average()
    assert bits.tolist() == [0x4000, 0x4080]


def test_memory_is_looked_up_anew_at_every_averaging(daemon: Daemon) -> None:
    tensor = Modern(np.ones(3, np.float32))
    with daemon.open_session({"w": tensor}) as session:
        session.average()
        moved = tensor.array = np.full(3, 5, np.float32)
        session.average()
    assert moved.tolist() == [10, 10, 10]


def read_only() -> npt.NDArray[np.float32]:
    array = np.ones(3, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("tensor", [Modern(read_only()), Frozen(np.ones(3, np.float32))])
def test_immutable_tensors_are_never_written_but_can_be_averaged(daemon: Daemon, tensor: Modern | Frozen) -> None:
    with daemon.open_session({"w": tensor}) as session:
        with pytest.raises(moshpit_client.InvalidInput, match=r"tensor 'w' cannot be written.*average_values"):
            session.average()
        values, _ = session.average_values({"w": tensor})
    assert tensor.array.tolist() == [1, 1, 1]
    assert values["w"].dtype == np.float32 and values["w"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (Modern(np.arange(3)), "tensor 'w' is int64"),
        (Modern(np.ones(3, bool)), "tensor 'w' is bool"),
        (Modern(np.ones(3, complex)), "tensor 'w' is complex128"),
        (Elsewhere(np.ones(3)), r"tensor 'w' does not give access to its memory \(it lies on cuda:0\)"),
    ],
)
def test_what_cannot_be_lent_or_averaged_is_refused_by_name(daemon: Daemon, tensor: Modern, complaint: str) -> None:
    with pytest.raises(moshpit_client.InvalidInput, match=complaint):
        daemon.open_session({"w": tensor})

"""A trainer keeps training while its values are averaged, and adds the change when it likes. The daemon doubles."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import moshpit_client
from moshpit_client import Daemon, InvalidInput, MoshpitError
from tests.client.conftest import DEADLINE_S, DaemonProcess


@pytest.fixture
def daemon(shared: DaemonProcess) -> Iterator[Daemon]:
    with moshpit_client.connect(shared.path) as daemon:
        yield daemon


def ones(*shape: int) -> npt.NDArray[np.float32]:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_what_counts_are_the_values_of_the_call_and_what_is_added_is_the_change(
    daemon: Daemon, shared_memory: bool
) -> None:
    w = ones(3_000_001)
    with daemon.open_session({"w": w}, shared_memory=shared_memory) as session:
        for expected in (12, 34):
            pending = session.average_async(timeout=DEADLINE_S, apply="delta")
            w += 10
            before = w.copy()
            assert pending.result(DEADLINE_S).outcome == "complete"
            np.testing.assert_array_equal(w, before, "it changes only when the trainer says so")
            assert pending.apply() is pending.result()
            assert (w == expected).all()
            pending.apply()
            assert (w == expected).all(), "once"
        session.average(timeout=DEADLINE_S)
    assert (w == 68).all()


def test_tensors_of_all_kinds_move_by_the_change_rounded_once(daemon: Daemon) -> None:
    rng = np.random.default_rng(0)
    frame = rng.standard_normal((8, 9)).astype(np.float32)
    tensors = {
        "double": rng.standard_normal(100),
        "half": rng.standard_normal(1000).astype(np.float16),
        "brain": rng.standard_normal(1000).astype(ml_dtypes.bfloat16)[::2],
        "strided": frame[::2, 1::3],
        "big-endian": rng.standard_normal(5).astype(">f4"),
        "scalar": np.array(3.0, np.float32),
        "brain-scalar": np.array(3.0, ml_dtypes.bfloat16),
        "nothing": np.empty((0, 4), np.float32),
    }
    began = {name: array.astype(np.float64) for name, array in tensors.items()}
    with daemon.open_session(tensors) as session:
        pending = session.average_async(apply="delta")
        for array in tensors.values():
            array[...] = (array * array.dtype.type(1.25)).astype(array.dtype)
        moved = {name: array.astype(np.float64) - began[name] for name, array in tensors.items()}
        pending.apply(DEADLINE_S)
    for name, array in tensors.items():
        exact = 2 * began[name] + moved[name]
        rounding = {2: 2**-11 if array.dtype == np.float16 else 2**-8, 4: 2**-22, 8: 2**-51}[array.dtype.itemsize]
        np.testing.assert_allclose(array.astype(np.float64), exact, rtol=rounding, err_msg=name)


def test_tensors_that_did_not_move_become_the_result_to_the_bit(daemon: Daemon) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        dtype.__name__: (rng.standard_normal(10_000) * 1e3).astype(dtype)
        for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
    }
    expected = {name: array * array.dtype.type(2) for name, array in tensors.items()}
    with daemon.open_session(tensors) as session:
        session.average_async(apply="delta").apply(DEADLINE_S)
    for name, array in tensors.items():
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("sick", [np.nan, np.inf, -np.inf])
def test_what_became_sick_meanwhile_stays_so(daemon: Daemon, sick: float) -> None:
    tensors = {dtype.__name__: np.ones(3, dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)}
    with daemon.open_session(tensors) as session:
        pending = session.average_async(apply="delta")
        for array in tensors.values():
            array[1] = sick
        pending.apply(DEADLINE_S)
    for array in tensors.values():
        np.testing.assert_array_equal(array.astype(np.float64), [2, sick, 2])


def test_alone_there_is_nothing_to_apply(daemon: Daemon) -> None:
    w = ones(3)
    with daemon.open_session({"w": w}, name="alone") as session:
        assert session.average_async(apply="delta").result(DEADLINE_S).outcome == "alone"
        pending = session.average_async(apply="delta")
        assert pending.apply(DEADLINE_S).outcome == "alone"
    assert w.tolist() == [1, 1, 1]


def test_a_failure_leaves_the_tensors_and_the_session_goes_on(daemon: Daemon) -> None:
    w = ones(3)
    with daemon.open_session({"w": w}, name="nobody") as session:
        for _ in range(2):
            pending = session.average_async(apply="delta")
            w += 1
            with pytest.raises(moshpit_client.NoGroup):
                pending.apply(DEADLINE_S)
    assert w.tolist() == [3, 3, 3]


def test_an_averaging_that_was_not_applied_stands_in_the_way_of_the_next(daemon: Daemon) -> None:
    w = ones(3)
    with daemon.open_session({"w": w}) as session:
        pending = session.average_async(apply="delta")
        for again in (
            session.average,
            session.average_async,
            lambda: session.average_async(apply="delta"),
            lambda: session.average_values({"w": w}),
        ):
            with pytest.raises(MoshpitError, match=r"has not been applied: call apply\(\)"):
                again()
        pending.apply(DEADLINE_S)
        session.average()
    assert w.tolist() == [4, 4, 4]


def test_a_wait_that_is_too_short_changes_nothing(daemon: Daemon) -> None:
    w = ones(3)
    with daemon.open_session({"w": w}, name="waits") as session:
        pending = session.average_async(apply="delta")
        with pytest.raises(TimeoutError):
            pending.apply(0.01)
    assert w.tolist() == [1, 1, 1]


def test_a_change_may_be_applied_after_the_session_is_closed(daemon: Daemon) -> None:
    w = ones(3)
    with daemon.open_session({"w": w}) as session:
        pending = session.average_async(apply="delta")
        pending.result(DEADLINE_S)
    pending.apply()
    assert w.tolist() == [2, 2, 2]


def test_what_cannot_be_written_is_refused_by_name(daemon: Daemon) -> None:
    fixed, w = ones(3), ones(3)
    fixed.flags.writeable = False
    with daemon.open_session({"fixed": fixed, "w": w}) as session:
        with pytest.raises(InvalidInput, match=r"'fixed' cannot be written.*average_values"):
            session.average_async(apply="delta")
        with pytest.raises(InvalidInput, match="apply='later': give 'overwrite' or 'delta'"):
            session.average_async(apply="later")  # type: ignore[call-overload]
    with daemon.open_session({"w": w}) as session:
        pending = session.average_async(apply="delta")
        w.flags.writeable = False
        with pytest.raises(InvalidInput, match="'w' cannot be written any more"):
            pending.apply(DEADLINE_S)
        w.flags.writeable = True
        pending.apply()
    assert w.tolist() == [2, 2, 2]

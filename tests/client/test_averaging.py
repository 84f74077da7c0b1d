"""A trainer averages through the client: its arrays afterwards, its receipt, its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import moshpit_client
from moshpit_client import Daemon
from tests.client.conftest import DEADLINE_S, DaemonProcess


@pytest.fixture
def daemon(shared: DaemonProcess) -> Iterator[Daemon]:
    with moshpit_client.connect(shared.path) as daemon:
        yield daemon


def ones(*shape: int) -> npt.NDArray[np.float32]:
    return np.ones(shape, np.float32)


def test_arrays_are_averaged_in_place(daemon: Daemon) -> None:
    tensors = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "double": np.arange(4, dtype=np.float64),
        "half": np.arange(5, dtype=np.float16),
        "brain": np.arange(7).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3.0, np.float32),
        "nothing": np.empty((0, 4), np.float32),
    }
    expected = {name: array * array.dtype.type(2) for name, array in tensors.items()}
    with daemon.open_session(tensors) as session:
        assert session.average(weight=2.0, timeout=DEADLINE_S).outcome == "complete"
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_arrays_of_any_strides_and_byte_order_are_averaged_in_place(daemon: Daemon) -> None:
    frame = np.zeros((8, 8), np.float32)
    frame[::2, 1::3] = 1
    tensors = {
        "strided": frame[::2, 1::3],
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "backwards": np.arange(4, dtype=np.float64)[::-1],
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big-endian": np.arange(4, dtype=">f4"),
        "brain": np.arange(8).astype(ml_dtypes.bfloat16)[::2],
    }
    expected = {name: array + array for name, array in tensors.items()}
    with daemon.open_session(tensors) as session:
        session.average(timeout=DEADLINE_S)
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert frame.sum() == 2 * 4 * 3, "nothing beside the view was written"


def test_arrays_larger_than_a_message_are_averaged(daemon: Daemon) -> None:
    large, small = np.arange(3_000_001, dtype=np.float32), ones(3)
    with daemon.open_session({"large": large, "small": small}) as session:
        for _ in range(2):
            session.average(timeout=DEADLINE_S)
    np.testing.assert_array_equal(large, 4 * np.arange(3_000_001, dtype=np.float32))
    np.testing.assert_array_equal(small, [4, 4, 4])


def test_a_codec_for_each_tensor_is_a_mapping(daemon: Daemon) -> None:
    codecs = {"size<4": "float32", "large*": "flash4-8:128"}
    with daemon.open_session({"small": ones(3), "large.w": ones(4)}, name="coded", codec=codecs):
        (session,) = [each for each in daemon.status().sessions if each.name == "coded"]
        assert session.codec == "size<4=float32,large*=flash4-8"


@pytest.mark.parametrize(
    ("codecs", "why"),
    [
        ({}, "give a codec for each pattern"),
        ({"a,b": "float32"}, "'a,b': write [?] for the comma"),
        ({"*": "flash9"}, "unknown codec 'flash9'"),
        ({"*": "flash8", "w": "float32"}, "'w=float32' can never count"),
        ({"b": "float32"}, "no codec for tensor 'w'"),
    ],
)
def test_codecs_that_cannot_be_are_refused(daemon: Daemon, codecs: dict[str, str], why: str) -> None:
    with pytest.raises(moshpit_client.InvalidInput, match=why):
        daemon.open_session({"w": ones(3)}, codec=codecs)


def test_alone_leaves_the_arrays_and_is_no_error(daemon: Daemon) -> None:
    w = ones(3)
    with daemon.open_session({"w": w}, name="alone") as session:
        receipt = session.average()
        values, _ = session.average_values({"w": w})
    assert (receipt.outcome, receipt.why, receipt.digest, receipt.rounds) == ("alone", "nobody else", "", ())
    assert w.tolist() == values["w"].tolist() == [1, 1, 1]


def test_the_receipt_is_the_contracts_json(daemon: Daemon) -> None:
    with daemon.open_session({"w": ones(3)}, name="training") as session:
        receipt = session.average(weight=2.0)
    seconds = {"matchmaking": 0.25, "reduce": 0.5, "total": 0.75}
    assert json.loads(receipt.to_json()) == {
        "outcome": "complete",
        "epoch": 7,
        "joined": False,
        "weight_total": 4.0,
        "peers": ["2" * 64],
        "digest": "02" * 32,
        "seconds": seconds,
        "bytes": {"sent": 10, "received": 20},
        "rounds": [
            {
                "round": 0,
                "axis": 1,
                "outcome": "complete",
                "group_id": "01" * 16,
                "digest": "02" * 32,
                "leader": "2" * 64,
                "rank": 0,
                "codec": "float32",
                "stage": "dense",
                "codec_why": "auto: no member knows yet what its line carries",
                "bits_per_element": 32.0,
                "relative_error": 0.25,
                "transport_why": "lossy as asked for",
                "lossy": {
                    "estimator": "difference",
                    "links": [{"peer": "2" * 64, "sent": 40, "lost": 4, "blocked": False}],
                    "ranges": 80,
                    "repaired": 3,
                    "unrepaired": 1,
                    "stale": [[0, 2]],
                    "stale_elements": 2,
                    "deadline_s": 0.5,
                    "late": 6,
                    "duplicates": 5,
                },
                "transport": "grpc",
                "members": [
                    {"peer": "1" * 64, "weight": 2.0, "coordinate": 0},
                    {"peer": "2" * 64, "weight": 2.0, "coordinate": 1},
                ],
                "links": [{"peer": "2" * 64, "transport": "grpc"}],
                "spans": [{"reducer": "1" * 64, "start": 0, "stop": 3, "contributors": ["1" * 64, "2" * 64]}],
                "dropped": [{"peer": "3" * 64, "why": "its stream broke"}],
                "why": "one was dropped",
                "weight_after": 1.5,
                "seconds": seconds,
                "bytes": {"sent": 10, "received": 20},
            }
        ],
        "why": "",
        "grid": "2x4",
        "session": "training",
        "local": {"trainers": 1, "weight": 2.0},
        "budget": None,
        "version": None,
        "shard": None,
        "compressor": "dense",
        "notes": [],
    }
    assert daemon.rounds(limit=1, epoch=7) == [receipt]
    assert daemon.rounds(epoch=8) == []


def test_the_daemon_tells_of_itself(daemon: Daemon, shared: DaemonProcess) -> None:
    with daemon.open_session({"w": ones(3)}, name="training"):
        status = daemon.status()
    assert (status.ready, status.pid, status.peers, status.dialable) == (True, shared.process.pid, 2, None)
    [session] = [session for session in status.sessions if session.name == "training"]
    assert (session.vector_bytes, session.cell, session.averagings) == (12, (1, 3), {"complete": 3})
    assert json.loads(status.to_json())["sessions"][-1]["cell"] == [1, 3]
    assert [peer.seconds_since_heard for peer in daemon.peers()] == [0.5, None]
    assert daemon.config()[0].to_dict() == {"name": "swarm", "value": "test", "source": "flag"}


def test_average_async_gives_a_future(daemon: Daemon) -> None:
    w = ones(3)
    with daemon.open_session({"w": w}) as session:
        futures: list[Future[moshpit_client.Receipt]] = [session.average_async(weight=1.0) for _ in range(3)]
        assert [future.result(DEADLINE_S).outcome for future in futures] == ["complete"] * 3
    assert w.tolist() == [8, 8, 8]


def test_a_failed_average_async_fails_the_future(daemon: Daemon) -> None:
    with daemon.open_session({"w": ones(3)}, name="nobody") as session:
        error = session.average_async().exception(DEADLINE_S)
    assert isinstance(error, moshpit_client.NoGroup)


def test_progress_is_told_and_what_it_raises_ends_the_call(daemon: Daemon, shared: DaemonProcess) -> None:
    w = ones(3)

    def stop(progress: moshpit_client.Progress) -> None:
        raise InterruptedError(progress.text)

    detached = shared.times("detached")
    with daemon.open_session({"w": w}, name="waits") as session:
        with pytest.raises(InterruptedError, match="1 of 2 peers here"):
            session.average(progress=stop)
        shared.happened("detached", detached + 1)
    assert w.tolist() == [1, 1, 1]


def test_initial_peers_are_waited_for_once(daemon: Daemon) -> None:
    told: list[str] = []
    with daemon.open_session({"w": ones(3)}, name="gathers", initial_peers=daemon_looks_ahead(daemon)) as session:
        session.average(timeout=DEADLINE_S, progress=lambda progress: told.append(progress.text))
        waited = len(told)
        session.average(timeout=DEADLINE_S, progress=lambda progress: told.append(progress.text))
    assert waited >= 1 and "peers here, waiting for" in told[0]
    assert len(told) == waited


def daemon_looks_ahead(daemon: Daemon) -> int:
    """The session `gathers` shows one more live session at every look: how many it will show three looks from now."""
    with daemon.open_session({"w": ones(3)}, name="gathers"):
        return next(each.live_sessions for each in daemon.status().sessions if each.name == "gathers") + 3


def test_initial_peers_that_do_not_come_are_named(daemon: Daemon) -> None:
    with (
        daemon.open_session({"w": ones(3)}, initial_peers=9) as session,
        pytest.raises(moshpit_client.NoGroup, match=r"2 of 9 peers were here after 0\.1 s"),
    ):
        session.average(timeout=0.1)


def test_average_values_gives_new_arrays_and_leaves_the_old(daemon: Daemon) -> None:
    w = ones(3)
    w.flags.writeable = False
    x = np.ones(2, ml_dtypes.bfloat16)
    with daemon.open_session({"w": w, "x": x}) as session:
        values, receipt = session.average_values({"x": x, "w": w})
    assert receipt.outcome == "complete"
    assert values["w"].tolist() == [2, 2, 2]
    assert values["x"].dtype == ml_dtypes.bfloat16 and values["x"].tolist() == [2, 2]
    assert w.tolist() == [1, 1, 1] and x.tolist() == [1, 1]


def test_what_cannot_be_written_is_refused_by_name_with_the_way_out(daemon: Daemon) -> None:
    w = ones(3)
    w.flags.writeable = False
    with (
        daemon.open_session({"w": w, "x": ones(2)}) as session,
        pytest.raises(moshpit_client.InvalidInput, match=r"tensor 'w' cannot be written.*average_values"),
    ):
        session.average()


def test_a_tensor_that_changed_its_shape_is_refused_by_name(daemon: Daemon) -> None:
    with daemon.open_session({"w": ones(3)}) as session:
        with pytest.raises(moshpit_client.InvalidInput, match=r"'w' is float32\[4\] but was float32\[3\]"):
            session.average_values({"w": ones(4)})
        with pytest.raises(moshpit_client.InvalidInput, match="'w' is missing"):
            session.average_values({})
        with pytest.raises(moshpit_client.InvalidInput, match="'x' is not of this session"):
            session.average_values({"w": ones(3), "x": ones(3)})


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({}, "layout is empty"),
        ({"w": ones(3), "steps": np.arange(3)}, "tensor 'steps' is int64: only float64, float32"),
        ({"mask": np.ones(3, bool)}, "tensor 'mask' is bool"),
        ({"z": np.ones(3, complex)}, "tensor 'z' is complex128"),
        ({"list": [1.0, 2.0]}, "tensor 'list' is a list: give a numpy array"),
        ({"": ones(3)}, "tensor name ''"),
    ],
)
def test_what_cannot_be_averaged_is_refused_by_name_before_anything_is_sent(
    daemon: Daemon, shared: DaemonProcess, tensors: dict[str, object], complaint: str
) -> None:
    opened = shared.times("opened default")
    with pytest.raises(moshpit_client.InvalidInput, match=complaint):
        daemon.open_session(tensors)
    assert shared.times("opened default") == opened


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name_and_left_alone(daemon: Daemon, bad: float) -> None:
    fine, sick = ones(3), ones(2_000_000)
    sick[1_999_990] = bad
    with daemon.open_session({"fine": fine, "sick": sick}) as session:
        with pytest.raises(moshpit_client.InvalidInput, match=r"'sick' holds -?(nan|infinity) at element 1999990"):
            session.average()
        assert fine.tolist() == [1, 1, 1] and sick[0] == 1
        sick[1_999_990] = 1
        assert session.average().outcome == "complete", "the session goes on"


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_a_wrong_weight_is_refused(daemon: Daemon, weight: float) -> None:
    w = ones(3_000_000)
    with daemon.open_session({"w": w}) as session, pytest.raises(moshpit_client.InvalidInput, match="weight"):
        session.average(weight=weight)
    assert w[0] == 1


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nobody", moshpit_client.NoGroup, "1 of 8 peers was here: start the others"),
        ("buggy", moshpit_client.DaemonBug, "two and two are five"),
    ],
)
def test_the_daemons_errors_have_names(daemon: Daemon, name: str, error: type[Exception], message: str) -> None:
    w = ones(3)
    with daemon.open_session({"w": w}, name=name) as session, pytest.raises(error, match=message):
        session.average()
    assert w.tolist() == [1, 1, 1]


def test_a_taken_session_is_refused(daemon: Daemon) -> None:
    with pytest.raises(moshpit_client.PreconditionFailed, match="another name"):
        daemon.open_session({"w": ones(3)}, name="taken")


@pytest.mark.parametrize("wish", [{"min_peers": 0}, {"rounds": -1}, {"initial_peers": 0}, {"joining": "leave"}])
def test_options_that_make_no_sense_are_refused_by_name(daemon: Daemon, wish: dict[str, object]) -> None:
    with pytest.raises(moshpit_client.InvalidInput, match=next(iter(wish))):
        daemon.open_session({"w": ones(3)}, **wish)  # type: ignore[arg-type]


def test_what_is_closed_says_so(daemon: Daemon, shared: DaemonProcess) -> None:
    session = daemon.open_session({"w": ones(3)}, name="short")
    closed = shared.times("closed short")
    session.close()
    session.close()
    shared.happened("closed short", closed + 1)
    with pytest.raises(moshpit_client.MoshpitError, match="session 'short' is closed: open another"):
        session.average()
    with moshpit_client.connect(shared.path) as other:
        left_open = other.open_session({"w": ones(3)}, name="left open")
    shared.happened("closed left open")
    left_open.close()
    with pytest.raises(moshpit_client.MoshpitError, match="connection is closed"):
        left_open.average()


def test_the_socket_is_found_by_the_environment(shared: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSHPITD_SOCKET", str(shared.path))
    with moshpit_client.connect() as daemon:
        assert str(shared.path) in repr(daemon)


@pytest.mark.parametrize(("variable", "below"), [("XDG_RUNTIME_DIR", "moshpitd/moshpitd.sock"), ("TMPDIR", "")])
def test_without_a_daemon_the_error_names_the_socket_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str
) -> None:
    for name in ("MOSHPITD_SOCKET", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(moshpit_client.DaemonUnreachable, match=f"{tmp_path}.*{below}.*moshpitd run.*MOSHPITD_SOCKET"):
        moshpit_client.connect()

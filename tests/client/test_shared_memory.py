"""A trainer shares memory with a daemon in another process, until one of the two is gone."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import moshpit_client
from moshpit_client.shared_memory import NotShared, SharedBuffers
from moshpit_client.v1 import daemon_pb2 as pb
from tests.client.conftest import DEADLINE_S, DaemonProcess
from tests.client.test_deaths import trainer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "memory").mkdir()
    return tmp_path / "memory"


@pytest.fixture
def process(tmp_path: Path, directory: Path) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path / "run" / "moshpitd.sock", shared_memory_dir=str(directory))
    yield process
    process.kill()


@pytest.fixture
def daemon(process: DaemonProcess) -> Iterator[moshpit_client.Daemon]:
    with moshpit_client.connect(process.path) as daemon:
        yield daemon


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def hop(daemon: moshpit_client.Daemon) -> tuple[str, str]:
    [session] = daemon.status().sessions
    [trainer] = session.trainers
    return trainer.transport, trainer.transport_why


def mapped(process: DaemonProcess, directory: Path) -> bool:
    """Whether the daemon holds any of the memory."""
    return str(directory) in Path(f"/proc/{process.process.pid}/maps").read_text()


def test_memory_is_shared_without_being_asked_for(
    daemon: moshpit_client.Daemon, process: DaemonProcess, directory: Path
) -> None:
    tensors = {
        "strided": np.arange(12, dtype=np.float32)[::3],
        "double": np.arange(4, dtype=np.float64),
        "half": np.arange(5, dtype=">f2"),
        "brain": np.arange(7).astype(ml_dtypes.bfloat16),
        "nothing": np.empty((0, 4), np.float32),
    }
    expected = {name: array * 4 for name, array in tensors.items()}
    with daemon.open_session(tensors) as session:
        assert hop(daemon) == ("shared-memory", "")
        assert mapped(process, directory) and files(directory) == []
        for _ in range(2):
            assert session.average(timeout=DEADLINE_S).outcome == "complete"
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_it_can_be_declined(daemon: moshpit_client.Daemon) -> None:
    w = np.ones(3, np.float32)
    with daemon.open_session({"w": w}, shared_memory=False) as session:
        assert hop(daemon) == ("stream", "the trainer did not ask for shared memory")
        session.average(timeout=DEADLINE_S)
    assert w.tolist() == [2, 2, 2]


def test_nothing_is_copied_where_values_are_put_and_read_in_place(daemon: moshpit_client.Daemon) -> None:
    with daemon.open_session({"w": np.zeros((2, 3), np.float32)}, rounds=1) as session:
        given = session.contribution()
        given["w"][:] = 1
        result, _ = session.average_values(given, timeout=DEADLINE_S, copy=False)
        assert (result["w"] == 2).all() and (given["w"] == 1).all()
        assert not result["w"].flags.owndata
        kept, _ = session.average_values(result, timeout=DEADLINE_S)
        assert (kept["w"] == 4).all()
        assert (result["w"] == 4).all(), "a view of the result is one of the next result"
        session.average_values(kept, timeout=DEADLINE_S)
        assert (kept["w"] == 4).all(), "a copy is not"


def test_the_same_program_runs_where_values_are_streamed(daemon: moshpit_client.Daemon) -> None:
    with daemon.open_session({"w": np.zeros(3, np.float32)}, shared_memory=False) as session:
        given = session.contribution()
        given["w"][:] = 1
        assert np.shares_memory(session.contribution()["w"], given["w"])
        result, _ = session.average_values(given, timeout=DEADLINE_S, copy=False)
        assert result["w"].tolist() == [2, 2, 2]


def test_values_the_daemon_may_still_read_are_not_overwritten(daemon: moshpit_client.Daemon) -> None:
    with daemon.open_session({"w": np.zeros(3, np.float32)}) as session:
        shared = session.contribution()["w"]
        shared[:] = np.nan
        with pytest.raises(moshpit_client.InvalidInput, match="tensor 'w' holds nan at element 0"):
            session.average_values({"w": shared}, timeout=DEADLINE_S)
        ones = np.ones(3, np.float32)
        assert not np.shares_memory(session.contribution()["w"], shared)
        result, _ = session.average_values({"w": ones}, timeout=DEADLINE_S)
        assert result["w"].tolist() == [2, 2, 2]
        assert np.isnan(shared).all(), "that averaging was streamed"
        assert np.shares_memory(session.contribution()["w"], shared), "its receipt says that all before it is over"


def test_a_trainer_interrupted_while_averaging_streams_until_a_receipt(daemon: moshpit_client.Daemon) -> None:
    def interrupt(_: moshpit_client.Progress) -> None:
        raise KeyboardInterrupt

    with daemon.open_session({"w": np.zeros(3, np.float32)}, name="waits") as session:
        shared = session.contribution()["w"]
        shared[:] = 1
        with pytest.raises(KeyboardInterrupt):
            session.average_values({"w": shared}, timeout=DEADLINE_S, progress=interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.average_values({"w": np.full(3, 2, np.float32)}, timeout=DEADLINE_S, progress=interrupt)
        assert shared.tolist() == [1, 1, 1]


def test_alone_the_values_stay(daemon: moshpit_client.Daemon) -> None:
    w = np.ones(3, np.float32)
    with daemon.open_session({"w": w}, name="alone") as session:
        assert session.average(timeout=DEADLINE_S).outcome == "alone"
        given = session.contribution()
        given["w"][:] = 5
        assert session.average_values(given, timeout=DEADLINE_S, copy=False)[0]["w"].tolist() == [5, 5, 5]
    assert w.tolist() == [1, 1, 1]


def test_a_result_that_lies_elsewhere_is_taken_from_the_stream(daemon: moshpit_client.Daemon) -> None:
    w = np.ones(3, np.float32)
    with daemon.open_session({"w": w}, name="elsewhere") as session:
        for _ in range(2):
            session.average(timeout=DEADLINE_S)
    assert w.tolist() == [4, 4, 4]


def test_without_room_it_streams_and_says_how_much_is_needed(tmp_path: Path, directory: Path) -> None:
    """The daemon may write files of 1 MB: the kernel refuses the rest, as a full file system does."""
    process = DaemonProcess(tmp_path / "run" / "moshpitd.sock", shared_memory_dir=str(directory))
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    w = np.ones(1 << 20, np.float32)
    with moshpit_client.connect(process.path) as daemon, daemon.open_session({"w": w}) as session:
        transport, why = hop(daemon)
        assert transport == "stream"
        assert why.startswith(f"{3 * w.nbytes + 4096} bytes are needed in {directory}") and "make room" in why
        assert files(directory) == []
        session.average(timeout=DEADLINE_S)
    assert (w == 2).all()
    process.kill()


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        ("mmap.mmap", OSError(12, "Cannot allocate memory"), "OSError: [Errno 12] Cannot allocate memory"),
        ("os.open", FileNotFoundError(2, "No such file"), "FileNotFoundError: [Errno 2] No such file"),
        ("os.open", PermissionError(13, "Permission denied"), "PermissionError: [Errno 13] Permission denied"),
    ],
    ids=["without address space", "in another container", "as another user"],
)
def test_a_trainer_that_cannot_map_streams_and_the_daemon_says_why(
    daemon: moshpit_client.Daemon,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    error: OSError,
    why: str,
) -> None:
    def refuse(*_: object) -> None:
        raise error

    w = np.ones(3, np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        session = daemon.open_session({"w": w})
    with session:
        assert hop(daemon) == ("stream", f"the trainer cannot share memory: {why}")
        assert files(directory) == []
        session.average(timeout=DEADLINE_S)
    assert w.tolist() == [2, 2, 2]


@pytest.mark.parametrize("size", [0, 4096, 12289])
def test_a_file_of_another_size_than_announced_is_not_touched(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    offer = pb.SharedMemory(
        path=str(tmp_path / "file"), file_bytes=12288, contribution_offset=4096, result_offsets=[8192]
    )
    with pytest.raises(NotShared, match=f"has {size} bytes here, not 12288"):
        SharedBuffers.map(offer, 4096)


@pytest.mark.parametrize("offsets", [(4096, 8193), (12288, 4096), (0, 4096), (1 << 62, 4096)])
def test_vectors_outside_of_the_file_are_not_touched(tmp_path: Path, offsets: tuple[int, int]) -> None:
    (tmp_path / "file").write_bytes(bytes(12288))
    offer = pb.SharedMemory(
        path=str(tmp_path / "file"), file_bytes=12288, contribution_offset=offsets[0], result_offsets=[offsets[1]]
    )
    with pytest.raises(NotShared, match="too few"):
        SharedBuffers.map(offer, 4096)


def test_a_file_that_is_not_there_or_is_a_link_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(12288))
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("nothing", "link"):
        offer = pb.SharedMemory(
            path=str(tmp_path / name), file_bytes=12288, contribution_offset=4096, result_offsets=[8192]
        )
        with pytest.raises(NotShared, match=str(tmp_path / name)):
            SharedBuffers.map(offer, 4096)


def test_a_trainer_killed_while_the_daemon_reads_its_values_harms_nobody(
    process: DaemonProcess, daemon: moshpit_client.Daemon, directory: Path
) -> None:
    with trainer(process.path, "waits", "averaging") as killed:
        assert hop(daemon)[0] == "shared-memory"
        killed.kill()
        killed.wait()
        process.happened("values still begin with 1.0")
        process.happened("closed waits")
    until(lambda: not mapped(process, directory))
    assert files(directory) == []
    assert daemon.status().ready


def test_a_daemon_killed_while_the_trainer_holds_its_memory_harms_nobody(
    process: DaemonProcess, daemon: moshpit_client.Daemon, directory: Path
) -> None:
    with daemon.open_session({"w": np.zeros(5000, np.float32)}) as session:
        given = session.contribution()
        given["w"][:] = 1
        result, _ = session.average_values(given, timeout=DEADLINE_S, copy=False)
        process.kill()
        assert (given["w"] == 1).all() and (result["w"] == 2).all()
        given["w"][:] = 3
        with pytest.raises(moshpit_client.DaemonUnreachable):
            session.average_values(given, timeout=DEADLINE_S)
        assert (given["w"] == 3).all()
    assert files(directory) == []


def test_what_a_daemon_killed_in_the_middle_of_an_offer_leaves_is_removed_by_the_next(
    process: DaemonProcess, tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_first(offer: pb.SharedMemory, vector_bytes: int) -> SharedBuffers:
        process.kill()
        raise NotShared("the daemon is dead")

    monkeypatch.setattr(SharedBuffers, "map", kill_first)
    w = np.ones(3, np.float32)
    with moshpit_client.connect(process.path) as daemon, pytest.raises(moshpit_client.DaemonUnreachable):
        daemon.open_session({"w": w})
    assert len(files(directory)) == 1
    monkeypatch.undo()
    again = DaemonProcess(tmp_path / "run" / "moshpitd.sock", shared_memory_dir=str(directory))
    assert files(directory) == []
    with moshpit_client.connect(again.path) as daemon, daemon.open_session({"w": w}) as session:
        assert hop(daemon)[0] == "shared-memory"
        session.average(timeout=DEADLINE_S)
    assert w.tolist() == [2, 2, 2]
    again.kill()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that nobody announces."""
    deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.01)


def test_posts_take_turns_where_the_daemon_says(daemon: moshpit_client.Daemon) -> None:
    w = np.ones(3, np.float32)
    chosen = {"averaging": "wait_avoiding", "group_size": 2, "barrier_every": 10, "min_peers": 2}
    with daemon.open_session({"w": w}, **chosen) as session:  # type: ignore[arg-type]
        assert hop(daemon) == ("shared-memory", "")
        places = set()
        for averaging in range(1, 4):
            assert session.average(timeout=DEADLINE_S).outcome == "complete"
            assert w.tolist() == [2.0**averaging] * 3
            places.add(session.contribution()["w"].__array_interface__["data"][0])
        assert len(places) == 2, "the daemon keeps one of three at a time here"


def test_an_offer_whose_posts_are_not_in_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(16384))
    offer = pb.SharedMemory(
        path=str(tmp_path / "file"),
        file_bytes=16384,
        contribution_offset=4096,
        contribution_offsets=[4096, 8192, 16384],
        result_offsets=[12288],
    )
    with pytest.raises(NotShared, match="too few"):
        SharedBuffers.map(offer, 100)

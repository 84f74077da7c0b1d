"""`moshpitd average`: what goes to the daemon, what comes into the file, and that a file is whole or untouched."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moshpitd.local.v1 import daemon_pb2 as pb
from tests.cli.conftest import Moshpitd
from tests.cli.fake_daemon import OTHER, FakeDaemon, answer, doubled, hang, receipt, refuse


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    tensors = {"w": np.arange(600, dtype=np.float32).reshape(20, 30), "b": np.full(3, 0.5, np.float32)}
    save_file(tensors, path, metadata={"format": "pt", "step": "7"})
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A file that is there already, so that a test can see whether it was touched."""
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"as it was")
    return path


def assert_untouched(output: Path) -> None:
    assert output.read_bytes() == b"as it was"
    assert sorted(path.name for path in output.parent.iterdir()) == ["in.safetensors", "out.safetensors"]


def test_the_result_is_written_with_the_metadata_of_the_input(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path, output: Path
) -> None:
    fake_daemon.script = answer(pb.OUTCOME_COMPLETE, doubled)
    done = moshpitd("average", source, "-o", output)
    assert done.returncode == 0, done.stderr
    assert "complete: averaging 7 with 2 other peers" in done.stdout
    before, after = load_file(source), load_file(output)
    assert {name: (array * 2).tolist() for name, array in before.items()} == {
        name: array.tolist() for name, array in after.items()
    }
    with safe_open(output, framework="np") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}
    assert sorted(path.name for path in output.parent.iterdir()) == ["in.safetensors", "out.safetensors"]


def test_input_and_output_may_be_the_same_file(fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path) -> None:
    fake_daemon.script = answer(pb.OUTCOME_COMPLETE, doubled)
    assert moshpitd("average", source, "-o", source).returncode == 0
    assert load_file(source)["b"].tolist() == [1.0, 1.0, 1.0]


def test_every_dtype_travels_packed_widest_first_and_comes_back_as_it_was(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, tmp_path: Path
) -> None:
    tensors: dict[str, np.ndarray] = {
        "a": np.array([1.5, -2.0], np.float16),
        "b": np.array(3.25, np.float64),
        "c": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        "d": np.array([[7.0]], np.float32),
        "empty": np.zeros((0, 4), np.float16),
    }
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}, source)
    assert moshpitd("average", source, "-o", output).returncode == 0
    assert fake_daemon.sent == [b"".join(tensors[name].tobytes() for name in ("b", "d", "a", "c"))]
    [opened] = fake_daemon.opened
    described = {tensor.name: (list(tensor.shape), tensor.data_type) for tensor in opened.tensors}
    assert described["c"] == ([2, 3], pb.DATA_TYPE_BFLOAT16) and described["b"] == ([], pb.DATA_TYPE_FLOAT64)
    back = load_file(output)
    assert {name: (array.dtype, array.shape, array.tobytes()) for name, array in back.items()} == {
        name: (array.dtype, array.shape, array.tobytes()) for name, array in tensors.items()
    }


def test_what_is_asked_for_reaches_the_daemon(fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path) -> None:
    flags = "--weight 2.5 --rounds 1 --epoch 12 --min-peers 3 --codec float16 --name other --joining receive"
    assert moshpitd("average", source, *flags.split(), "--timeout", "20").returncode == 0
    [opened], [started] = fake_daemon.opened, fake_daemon.started
    assert (opened.name, opened.rounds, opened.codec, opened.min_peers) == ("other", 1, "float16", 3)
    assert (opened.joining, opened.lonely_wait_seconds) == (pb.JOINING_RECEIVE, 19.0)
    assert (started.session_id, started.weight, started.epoch, started.timeout_seconds) == ("s1", 2.5, 12, 20.0)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("arc", "a single averaging has no later"), ("dense:ef14", "open a session"), ("arcs", "did you mean 'arc'")],
)
def test_compressors_are_for_those_who_come_again(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path, name: str, complaint: str
) -> None:
    done = moshpitd("average", source, "--compressor", name)
    assert (done.returncode, fake_daemon.opened) == (2, [])
    assert complaint in " ".join(done.stderr.split())
    assert moshpitd("average", source, "--compressor", "dense").returncode == 0


def test_by_default_values_count_at_once_and_any_epoch_will_do(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path
) -> None:
    assert moshpitd("average", source).returncode == 0
    [opened], [started] = fake_daemon.opened, fake_daemon.started
    assert opened.joining == pb.JOINING_CONTRIBUTE and opened.rounds == 0
    assert not started.HasField("epoch") and started.weight == 1.0
    assert opened.lonely_wait_seconds == 59.0
    assert moshpitd("average", source, "--allow-alone").returncode == 0
    assert fake_daemon.opened[1].lonely_wait_seconds == 2.0


def test_the_receipt_is_the_contracts(fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path) -> None:
    fake_daemon.script = answer(pb.OUTCOME_PARTIAL)
    done = moshpitd("average", source, "--json")
    receipt = json.loads(done.stdout)
    assert done.returncode == 0
    assert (receipt["outcome"], receipt["epoch"], receipt["joined"]) == ("partial", 7, False)
    assert (receipt["weight_total"], receipt["peers"][0], receipt["digest"]) == (6.0, OTHER, "02" * 32)
    assert receipt["seconds"] == {"matchmaking": 0.01, "reduce": 0.2, "total": 0.25}
    assert receipt["bytes"] == {"sent": 1_500_000, "received": 12}
    [round_] = receipt["rounds"]
    assert {"round", "axis", "outcome", "group_id", "digest", "leader", "rank", "codec"} <= round_.keys()
    assert round_["members"][1] == {"peer": OTHER, "weight": 2.0, "coordinate": 1}
    assert {"reducer", "start", "stop", "contributors"} == round_["spans"][0].keys()
    assert round_["dropped"] == [{"peer": "cc" * 32, "why": "stood still for 3 s"}]


def test_off_a_terminal_progress_is_plain_lines_on_stderr(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path
) -> None:
    done = moshpitd("average", source, "--json")
    assert done.stderr == "2 of 3 peers here, waiting for 1 more\n"


def test_alone_exits_5_and_writes_nothing(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path, output: Path
) -> None:
    fake_daemon.script = answer(pb.OUTCOME_ALONE)
    done = moshpitd("average", source, "-o", output, "--json")
    assert done.returncode == 5 and "nobody else is known" in done.stderr
    assert json.loads(done.stdout)["outcome"] == "alone"
    assert_untouched(output)


def test_alone_when_allowed_writes_the_values_as_they_were(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path, output: Path
) -> None:
    fake_daemon.script = answer(pb.OUTCOME_ALONE)
    assert moshpitd("average", source, "-o", output, "--allow-alone").returncode == 0
    assert load_file(output)["w"].tolist() == load_file(source)["w"].tolist()


def test_alone_with_other_trainers_of_the_daemon_writes_their_mean_when_allowed(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path, output: Path
) -> None:
    def local_mean(daemon: FakeDaemon, sent: bytes, context: grpc.ServicerContext) -> Iterator[pb.AverageResponse]:
        alone = receipt(pb.OUTCOME_ALONE)
        alone.local.trainers = 3
        yield pb.AverageResponse(receipt=alone)
        yield pb.AverageResponse(chunk=pb.VectorChunk(offset=0, data=doubled(sent)))

    fake_daemon.script = local_mean
    assert moshpitd("average", source, "-o", output).returncode == 5
    assert_untouched(output)
    done = moshpitd("average", source, "-o", output, "--allow-alone")
    assert done.returncode == 0
    assert "alone: averaging 7 with 0 other peers and 2 other trainers of this daemon" in done.stdout
    assert load_file(output)["w"].tolist() == (2 * load_file(source)["w"]).tolist()


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, 5),
        (grpc.StatusCode.INVALID_ARGUMENT, 1),
        (grpc.StatusCode.FAILED_PRECONDITION, 1),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
        (grpc.StatusCode.INTERNAL, 1),
        (grpc.StatusCode.UNAVAILABLE, 4),
    ],
    ids=lambda value: str(value),
)
def test_a_refusal_becomes_an_exit_code_and_the_daemons_own_words(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path, output: Path, status: grpc.StatusCode, code: int
) -> None:
    fake_daemon.script = refuse(status, "3 of 8 peers were there")
    done = moshpitd("average", source, "-o", output)
    assert done.returncode == code and "3 of 8 peers were there" in done.stderr
    assert "Traceback" not in done.stderr
    assert_untouched(output)


def test_a_result_cut_short_is_not_written(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path, output: Path
) -> None:
    fake_daemon.script = answer(pb.OUTCOME_COMPLETE, lambda sent: sent[:-8])
    done = moshpitd("average", source, "-o", output)
    assert done.returncode == 1 and "2404 of 2412 bytes" in done.stderr
    assert_untouched(output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_tells_the_daemon_and_leaves_the_files_untouched(
    fake_daemon: FakeDaemon,
    command: list[str],
    environment: dict[str, str],
    source: Path,
    output: Path,
    number: signal.Signals,
) -> None:
    fake_daemon.script = hang
    arguments = [*command, "average", str(source), "-o", str(output)]
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert fake_daemon.reached.wait(30)
        process.send_signal(number)
        _, complaint = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: nothing was written" in complaint and "Traceback" not in complaint
    assert fake_daemon.left.wait(10)
    assert_untouched(output)


def test_a_daemon_that_dies_exits_3_and_leaves_the_files_untouched(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path, output: Path
) -> None:
    fake_daemon.script = hang

    def kill() -> None:
        fake_daemon.reached.wait(30)
        fake_daemon.die()

    killer = threading.Thread(target=kill)
    killer.start()
    done = moshpitd("average", source, "-o", output)
    killer.join(30)
    assert done.returncode == 3 and "went away in the middle" in done.stderr
    assert_untouched(output)


def test_no_daemon_exits_3(moshpitd: Moshpitd, source: Path, output: Path) -> None:
    assert moshpitd("average", source, "-o", output).returncode == 3
    assert_untouched(output)


def truncated(path: Path) -> str:
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    return "is truncated or damaged"


def not_safetensors(path: Path) -> str:
    path.write_bytes(b"PK\x03\x04 this was a zip once, or so")
    return "is not a safetensors file"


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return "is empty"


def absent(path: Path) -> str:
    path.unlink()
    return "No such file"


def without_tensors(path: Path) -> str:
    save_file({}, path)
    return "layout is empty"


def an_integer_tensor(path: Path) -> str:
    save_file({"w": np.ones(3, np.float32), "steps": np.ones(3, np.int64)}, path)
    return "tensor 'steps' is I64: only float64, float32, float16, bfloat16"


def a_nan(path: Path) -> str:
    values = np.ones((2, 3), np.float32)
    values[1, 2] = np.nan
    save_file({"a": np.ones(3, np.float32), "w": values}, path)
    return "tensor 'w' holds nan at [1, 2]: nothing was sent"


def an_infinity(path: Path) -> str:
    save_file({"w": np.array([1, np.inf], ml_dtypes.bfloat16)}, path)
    return "tensor 'w' holds inf at [1]: nothing was sent"


@pytest.mark.parametrize(
    "spoil",
    [truncated, not_safetensors, empty, absent, without_tensors, an_integer_tensor, a_nan, an_infinity],
)
def test_an_unfit_file_is_refused_by_name_before_anything_is_sent(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path, output: Path, spoil: object
) -> None:
    assert callable(spoil)
    complaint = spoil(source)
    done = moshpitd("average", source, "-o", output)
    assert done.returncode == 1, done.stderr
    assert str(source) in done.stderr and complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert fake_daemon.opened == []
    assert output.read_bytes() == b"as it was"


def test_an_output_nobody_can_write_is_found_out_before_the_averaging(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, source: Path, tmp_path: Path
) -> None:
    for output in (tmp_path / "absent" / "out.safetensors", tmp_path):
        done = moshpitd("average", source, "-o", output)
        assert done.returncode == 1 and "cannot be written" in done.stderr
    assert fake_daemon.opened == []

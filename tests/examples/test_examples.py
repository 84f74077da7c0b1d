"""The examples that users copy, run as they would run them, against real daemons in processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

EXAMPLES = Path(__file__).resolve().parents[2] / "clients" / "python" / "examples"
READY_DEADLINE_S = 60.0
EXAMPLE_TIMEOUT_S = 100.0
STEPS = 60
AVERAGINGS = 3

# What average.sh calls to train: adds this peer's own number to every weight.
TRAINER = """
import sys
from safetensors.numpy import load_file, save_file
save_file({name: values + float(sys.argv[1]) for name, values in load_file(sys.argv[2]).items()}, sys.argv[2])
"""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon that is ready, or about to be."""

    socket: Path
    log: Path
    process: subprocess.Popen[bytes]

    def environ(self) -> dict[str, str]:
        """For a program that is to find this daemon, and the command line that belongs to this interpreter."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return os.environ | {"MOSHPITD_SOCKET": str(self.socket), "PATH": path}

    def address_when_ready(self) -> str:
        """Where it listens, as soon as it says that it is ready."""
        deadline = time.monotonic() + READY_DEADLINE_S
        said = None
        while time.monotonic() < deadline and self.process.poll() is None:
            command = [sys.executable, "-m", "moshpitd", "status", "--json", "--socket", str(self.socket)]
            status = subprocess.run(command, capture_output=True, text=True, timeout=READY_DEADLINE_S)
            said = status.stdout + status.stderr
            if status.returncode == 0 and json.loads(status.stdout)["ready"]:
                return str(json.loads(status.stdout)["listen"])
        raise AssertionError(f"daemon not ready; status said {said!r}, its log: {self.log.read_text()}")


@pytest.fixture
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Two daemons that know each other."""
    # A short name: a Unix socket's path has at most 107 characters.
    directory = tmp_path_factory.mktemp("d")
    directory.chmod(0o700)
    daemons: list[Daemon] = []
    with ExitStack() as stack:
        for number in range(2):
            socket, log = directory / f"{number}.sock", directory / f"{number}.log"
            command = [sys.executable, "-m", "moshpitd", "run", "--swarm", "examples", "--listen", "127.0.0.1:0"]
            command += ["--socket", str(socket), "--data-dir", str(directory / f"{number}"), "--http", "off"]
            for first in daemons[:1]:
                command += ["--join", first.address_when_ready()]
            process = subprocess.Popen(command, stdout=stack.enter_context(log.open("wb")), stderr=subprocess.STDOUT)
            stack.enter_context(process)
            stack.callback(process.kill)  # runs before the wait at the end of `process`
            daemons.append(Daemon(socket, log, process))
        for daemon in daemons:
            daemon.address_when_ready()
        yield daemons


def run_beside_each(swarm: list[Daemon], commands: list[list[str]]) -> list[str]:
    """Runs one command beside each daemon, all at once; returns what each printed."""
    with ExitStack() as stack:
        running = []
        for daemon, command in zip(swarm, commands, strict=True):
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=daemon.environ()
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            running.append(process)
        printed = [process.communicate(timeout=EXAMPLE_TIMEOUT_S)[0] for process in running]
        assert [process.returncode for process in running] == [0] * len(running), "\n".join(printed)
    return printed


def test_the_pytorch_example_ends_with_the_same_parameters_on_all_peers(swarm: list[Daemon]) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, str(EXAMPLES / "torch_example.py"), "--peers", "2", "--steps", str(STEPS)]
    printed = run_beside_each(swarm, [[*command, "--every", str(STEPS // AVERAGINGS)]] * 2)
    for output in printed:
        assert output.count("complete with 1 others") == AVERAGINGS, output
    assert printed[0].splitlines()[-1] == printed[1].splitlines()[-1]


def test_the_shell_example_trains_every_peer_on_from_the_weighted_mean(swarm: list[Daemon], tmp_path: Path) -> None:
    trainer = tmp_path / "trainer.py"
    trainer.write_text(TRAINER)
    models = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
    commands = []
    for number, model in enumerate(models):
        save_file({"weights": np.zeros(1000, np.float32)}, model)
        commands.append([str(EXAMPLES / "average.sh"), "2", str(model), sys.executable, str(trainer), str(number)])
    run_beside_each(swarm, commands)
    # Each epoch adds 0 to one peer and 1 to the other, and the mean is taken: 0.5 after the first, 1 after the second.
    for model in models:
        np.testing.assert_allclose(load_file(model)["weights"], 1.0, rtol=1e-6)

"""Those we compare ourselves with, each in a virtual environment of its own.

Knows how to make an environment under `.bench/` from a pinned requirements file, how to start one of the scripts
beside this file in it (`gloo_round.py`, `hivemind_round.py` and so on), and the JSON lines they speak.
Imports neither hivemind nor torch: their pins (protobuf, numpy, grpcio) must never meet ours. What stands in the way,
a platform without a wheel, no registry within reach, a process that does not start, is raised as `Unavailable`, whose
message is meant for the report of whoever asked for a comparison.

    with serving(GLOO, peers=4) as rival:         # seconds when its environment is there, minutes when it is not
        rival.open(megabytes=64.0)
        rival.round().data_s
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import psutil

from moshpitd.cli.namespaces import Place
from tests.benchmarks.figures import WrongResult

BESIDE = Path(__file__).resolve().parent
CACHE_DIR = BESIDE.parent.parent / ".bench"
KILL_SCRIPT = BESIDE / "hivemind_kill.py"
CODECS_SCRIPT = BESIDE / "hivemind_codecs.py"
INSTALL_TIMEOUT_S = 900.0
START_TIMEOUT_S = 120.0
ROUND_TIMEOUT_S = 120.0
LAST_LINES = 6
"""How much of a failed command's output the reason quotes."""


class Unavailable(Exception):
    """The comparison cannot be made here; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Rival:
    """Whom to compare with."""

    name: str
    script: str
    """Answers {"do": "open", "megabytes"}, {"do": "fill"} and {"do": "round"} on its standard input, line by line."""
    requirements: str
    check: str
    """A program that fails where the installation cannot work."""
    pip_flags: tuple[str, ...] = ()
    platforms: tuple[tuple[str, str], ...] = ()
    """(system, machine) it exists for; empty: whatever has a wheel."""
    flags: tuple[str, ...] = ()
    """Of its script."""

    @property
    def package(self) -> str:
        """What is installed: rivals that differ in flags share an environment."""
        return Path(self.requirements).name.partition("_")[0]


GLOO = Rival(
    "Gloo",
    "gloo_round.py",
    "gloo_requirements.txt",
    "import sys, torch.distributed as d; sys.exit(0 if d.is_gloo_available() else 'this torch has no Gloo')",
)
HIVEMIND = Rival(
    "hivemind",
    "hivemind_round.py",
    "hivemind_requirements.txt",
    "import os, sys, hivemind; p2pd = os.path.join(hivemind.__path__[0], 'hivemind_cli', 'p2pd'); "
    "sys.exit(0 if os.access(p2pd, os.X_OK) else 'hivemind was installed without its p2pd')",
    ("--only-binary", "hivemind"),
    (("linux", "x86_64"),),
)


HIVEMIND_8BIT = replace(HIVEMIND, name="hivemind 8-bit", flags=("--compression", "uniform8"))
"""Its fastest 8-bit codec."""


@dataclass(frozen=True, slots=True)
class RivalRound:
    """One all-reduce of all peers."""

    data_s: float
    """The slowest peer's, from an assembled group to the result."""
    whole_s: float
    """From the moment all peers were released to the last one's return: matchmaking too, where there is any."""
    cpu_s: float
    """Of all its processes together, matchmaking included."""
    is_whole: bool
    """Whether every peer averaged in a full group."""


class Serving:
    """A rival's processes, alive. Made by `serving`."""

    def __init__(self, rival: Rival, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.rival = rival
        self.version = ""
        self._process = process
        self._errors = errors

    def open(self, megabytes: float) -> None:
        """Every peer has a float32 vector of so many 1e6 bytes from now on."""
        self.version = str(self._ask({"do": "open", "megabytes": megabytes}, START_TIMEOUT_S)["version"])

    def round(self) -> RivalRound:
        """All peers average fresh values."""
        self._ask({"do": "fill"}, ROUND_TIMEOUT_S)
        before = tree_cpu_seconds(self._process.pid)
        answer = self._ask({"do": "round"}, ROUND_TIMEOUT_S)
        cpu_s = tree_cpu_seconds(self._process.pid) - before
        if not answer["is_right"]:
            raise WrongResult(f"{self.rival.name} returned something else than the mean: this comparison is broken")
        data_s, whole_s = answer["data_seconds"], answer["seconds"]
        assert isinstance(data_s, float) and isinstance(whole_s, float)
        return RivalRound(data_s, whole_s, cpu_s, bool(answer["is_whole"]))

    def _ask(self, request: dict[str, object], timeout_s: float) -> dict[str, object]:
        """Its answer; when it does not come in time all of its processes are killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        guard = threading.Timer(timeout_s, _kill_group, [self._process])
        guard.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            guard.cancel()
        if not line:
            raise Unavailable(
                f"{self.rival.name} ended or hung in {request['do']!r}\n{_last_lines(self._errors)}"
            ) from None
        answer: dict[str, object] = json.loads(line)
        return answer


def tree_cpu_seconds(pid: int) -> float:
    """Of a process and all below it."""
    root = psutil.Process(pid)
    used = 0.0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used += times.user + times.system
    return used


@contextlib.contextmanager
def serving(
    rival: Rival, *, peers: int, group_size: int | None = None, places: Sequence[Place] = ()
) -> Iterator[Serving]:
    """So many peers of it, in groups of a size (all in one, unless said), in namespaces if there are places for them:
    then it must be hivemind. Raises Unavailable."""
    python = make_environment(rival)
    command = [str(python), str(BESIDE / rival.script), "--peers", str(peers), *rival.flags]
    if places:
        command += ["--places", ",".join(f"{place.prefix[-1]}:{place.address}" for place in places)]
    command += ["--group-size", str(group_size or peers)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environ(),
            start_new_session=True,
            text=True,
        )
        try:
            yield Serving(rival, process, errors)
        finally:
            _kill_group(process)  # also those of its processes that outlive it
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()


def make_environment(rival: Rival) -> Path:
    """Finds or makes its environment, checked to work; returns its Python. Raises Unavailable."""
    here = (sys.platform, platform.machine())
    if rival.platforms and here not in rival.platforms:
        there = ", ".join(" on ".join(each) for each in rival.platforms)
        raise Unavailable(f"{rival.name} exists for {there}, and this is {' on '.join(here)}")
    requirements = BESIDE / rival.requirements
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    home = CACHE_DIR / f"{rival.package}-{digest}"
    python = home / "bin" / "python"
    stamp = home / "checked"
    if not stamp.exists():
        # Without its stamp the directory is what an interrupted or failed installation left.
        shutil.rmtree(home, ignore_errors=True)
        CACHE_DIR.mkdir(parents=True, exist_ok=True)
        (CACHE_DIR / ".gitignore").write_text("*\n")
        _run([sys.executable, "-m", "venv", str(home)], "make a virtual environment", START_TIMEOUT_S)
        install = [str(python), "-m", "pip", "install", "--quiet", *rival.pip_flags, "-r", str(requirements)]
        _run(install, f"install {requirements.name} with pip", INSTALL_TIMEOUT_S)
        _run([str(python), "-c", rival.check], f"use {rival.name}", START_TIMEOUT_S)
        stamp.touch()
    return python


@dataclass(frozen=True, slots=True)
class HivemindSurvivor:
    """What one survivor of a kill in the middle of a round was left with."""

    seconds: float
    """From the kill to the end of its step."""
    failure: str | None
    own: float
    """The share of its elements that are still its own, averaged with nobody."""
    mean_of_all: float
    mean_of_survivors: float
    other: float
    crc: int


@dataclass(frozen=True, slots=True)
class HivemindKill:
    """A round in which one peer of all was killed, after a clean one."""

    hivemind: str
    data_seconds: float
    """Of the clean round."""
    survivors: tuple[HivemindSurvivor, ...]


def measure_hivemind_kill(*, peers: int, megabytes: float) -> HivemindKill:
    """Averages once in one group, then again with one peer killed in the middle of the data. Raises Unavailable."""
    command = [str(make_environment(HIVEMIND)), str(KILL_SCRIPT), "--peers", str(peers), "--megabytes", str(megabytes)]
    output = _run(command, "kill a peer in a round of hivemind", START_TIMEOUT_S + 2 * ROUND_TIMEOUT_S)
    raw = json.loads(output.splitlines()[-1])
    survivors = tuple(HivemindSurvivor(**each) for each in raw["survivors"])
    return HivemindKill(raw["hivemind"], raw["data_seconds"], survivors)


@dataclass(frozen=True, slots=True)
class HivemindCodec:
    """One of its codecs on normally distributed float32."""

    codec: str
    bits_per_element: float
    encode_gb_s: float
    """1e9 bytes of float32 a second, on one core; the fastest of all tries."""
    decode_gb_s: float
    relative_error: float


@dataclass(frozen=True, slots=True)
class HivemindCodecs:
    """What `measure_hivemind_codecs` found."""

    hivemind: str
    torch: str
    codecs: tuple[HivemindCodec, ...]
    missing: tuple[str, ...]
    """Codecs that need what is not installed."""


def measure_hivemind_codecs(*, seconds: float) -> HivemindCodecs:
    """Its codecs, each direction for so many seconds. Raises Unavailable."""
    command = [str(make_environment(HIVEMIND)), str(CODECS_SCRIPT), "--seconds", str(seconds)]
    raw = json.loads(_run(command, "measure hivemind's codecs", START_TIMEOUT_S + 20 * seconds).splitlines()[-1])
    codecs = tuple(HivemindCodec(**each) for each in raw["codecs"])
    return HivemindCodecs(raw["hivemind"], raw["torch"], codecs, tuple(raw["missing"]))


def _run(command: Sequence[str], purpose: str, timeout_s: float) -> str:
    """The command's standard output; every process it started is gone afterwards, hivemind's p2pd included."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=errors, env=_environ(), start_new_session=True)
        except OSError as error:
            raise Unavailable(f"could not {purpose}: {error}") from error
        try:
            # Only for the process: a pipe would stay open as long as a p2pd that outlives its parent.
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"could not {purpose}: not done after {timeout_s:.0f} s, given up") from None
        finally:
            _kill_group(process)
            process.wait()
        if process.returncode != 0:
            reason = _last_lines(errors) or _last_lines(output)
            raise Unavailable(f"could not {purpose}: exit code {process.returncode}\n{reason}")
        output.seek(0)
        return output.read()


def _environ() -> dict[str, str]:
    """Outside variables must not lead the other environment back into ours."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


def _kill_group(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_lines(file: IO[str]) -> str:
    file.seek(0)
    return "\n".join(f"    {line}" for line in file.read().strip().splitlines()[-LAST_LINES:])

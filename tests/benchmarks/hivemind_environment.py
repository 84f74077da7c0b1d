"""An environment of hivemind's own, and one measurement in it.

Knows how to make a virtual environment under `.bench/`, what hivemind needs to install and start, and how to run
`hivemind_round.py` in it as a subprocess. It imports neither hivemind nor torch: their pins (protobuf, numpy, grpcio)
must never meet ours. What stands in the way, a platform without a wheel, no registry within reach, a daemon that does
not start, is raised as `HivemindUnavailable`, whose message is meant for the report of whoever asked for a comparison.

    environment = make_environment(cache_dir)     # seconds when it is there, a minute or two when it is not
    report = measure(environment, peers=8, group_size=4, megabytes=16.0, rounds=10)

Run as a script it does both and prints the report as JSON; exit code 1 and the reason on stderr when it cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE_DIR = HERE.parent.parent / ".bench"
REQUIREMENTS = HERE / "hivemind_requirements.txt"
ROUND_SCRIPT = HERE / "hivemind_round.py"
KILL_SCRIPT = HERE / "hivemind_kill.py"
CODECS_SCRIPT = HERE / "hivemind_codecs.py"
INSTALL_TIMEOUT_S = 900
START_TIMEOUT_S = 120
ROUND_TIMEOUT_S = 60
LAST_LINES = 6
"""How much of a failed command's output the reason quotes."""


class HivemindUnavailable(Exception):
    """The comparison cannot be made here; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class HivemindEnvironment:
    """A virtual environment that has imported hivemind at least once."""

    python: Path


@dataclass(frozen=True, slots=True)
class HivemindRound:
    """One round of all peers."""

    seconds: float
    """From the moment all peers were released to the last one's return: matchmaking and data."""
    data_seconds: float
    """The slowest peer's part of it between an assembled group and averaged tensors."""
    group_sizes: tuple[int | None, ...]
    failed: tuple[str, ...]

    def whole(self, group_size: int) -> bool:
        """Whether every peer averaged in a full group."""
        return not self.failed and all(size == group_size for size in self.group_sizes)


@dataclass(frozen=True, slots=True)
class HivemindReport:
    """What `measure` found; `rounds` leaves out the first, in which hivemind dials its peers."""

    hivemind: str
    torch: str
    peers: int
    group_size: int
    vector_bytes: int
    warm_up_seconds: float
    rounds: tuple[HivemindRound, ...]

    def whole_rounds(self) -> tuple[HivemindRound, ...]:
        """The rounds to compare with."""
        return tuple(round_ for round_ in self.rounds if round_.whole(self.group_size))


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
    """What `measure_codecs` found."""

    hivemind: str
    torch: str
    codecs: tuple[HivemindCodec, ...]
    missing: tuple[str, ...]
    """Codecs that need what is not installed."""


def make_environment(cache_dir: Path = CACHE_DIR) -> HivemindEnvironment:
    """Finds or makes the environment under `cache_dir`, checked to import hivemind and to hold a runnable p2pd."""
    _refuse_unknown_platform()
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    home = cache_dir / f"hivemind-{digest}"
    python = home / "bin" / "python"
    stamp = home / "checked"
    if not stamp.exists():
        # Without its stamp the directory is what an interrupted or failed installation left.
        shutil.rmtree(home, ignore_errors=True)
        cache_dir.mkdir(parents=True, exist_ok=True)
        (cache_dir / ".gitignore").write_text("*\n")
        _run([sys.executable, "-m", "venv", str(home)], "make a virtual environment", START_TIMEOUT_S)
        install = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", "hivemind", "-r", str(REQUIREMENTS)]
        _run(install, f"install {REQUIREMENTS.name} with pip", INSTALL_TIMEOUT_S)
        p2pd = "os.access(os.path.join(hivemind.__path__[0], 'hivemind_cli', 'p2pd'), os.X_OK)"
        check = f"import os, sys, hivemind; sys.exit(0 if {p2pd} else 'hivemind was installed without its p2pd')"
        _run([str(python), "-c", check], "import hivemind", START_TIMEOUT_S)
        stamp.touch()
    return HivemindEnvironment(python)


def measure(
    environment: HivemindEnvironment,
    *,
    peers: int = 8,
    group_size: int = 4,
    megabytes: float = 16.0,
    rounds: int = 10,
) -> HivemindReport:
    """Averages `megabytes` (1e6 bytes) of float32 a peer, `rounds` times after one to warm up, in groups."""
    command = [str(environment.python), str(ROUND_SCRIPT), "--peers", str(peers), "--group-size", str(group_size)]
    command += ["--megabytes", str(megabytes), "--rounds", str(rounds + 1), "--step-timeout", str(ROUND_TIMEOUT_S)]
    # A step may time out in every round, and still there is a report that says so.
    timeout_s = START_TIMEOUT_S + (rounds + 1) * (ROUND_TIMEOUT_S + 5)
    output = _run(command, "run averaging rounds with hivemind", timeout_s)
    raw = json.loads(output.splitlines()[-1])
    measured = [
        HivemindRound(each["seconds"], each["data_seconds"], tuple(each["group_sizes"]), tuple(each["failed"]))
        for each in raw["rounds"]
    ]
    return HivemindReport(
        hivemind=raw["hivemind"],
        torch=raw["torch"],
        peers=raw["peers"],
        group_size=raw["group_size"],
        vector_bytes=raw["vector_bytes"],
        warm_up_seconds=measured[0].seconds,
        rounds=tuple(measured[1:]),
    )


def measure_kill(environment: HivemindEnvironment, *, peers: int, megabytes: float) -> HivemindKill:
    """Averages once in one group, then again with one peer killed in the middle of the data."""
    command = [str(environment.python), str(KILL_SCRIPT), "--peers", str(peers), "--megabytes", str(megabytes)]
    output = _run(command, "kill a peer in a round of hivemind", START_TIMEOUT_S + 4 * ROUND_TIMEOUT_S)
    raw = json.loads(output.splitlines()[-1])
    survivors = tuple(HivemindSurvivor(**each) for each in raw["survivors"])
    return HivemindKill(raw["hivemind"], raw["data_seconds"], survivors)


def measure_codecs(environment: HivemindEnvironment, *, seconds: float) -> HivemindCodecs:
    """Its codecs, each direction for so many seconds."""
    command = [str(environment.python), str(CODECS_SCRIPT), "--seconds", str(seconds)]
    raw = json.loads(_run(command, "measure hivemind's codecs", START_TIMEOUT_S + 20 * seconds).splitlines()[-1])
    codecs = tuple(HivemindCodec(**each) for each in raw["codecs"])
    return HivemindCodecs(raw["hivemind"], raw["torch"], codecs, tuple(raw["missing"]))


def _refuse_unknown_platform() -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise HivemindUnavailable(
            f"hivemind ships its p2pd for Linux on x86-64 only, and this is {sys.platform} on {platform.machine()}; "
            "run the comparison on such a machine"
        )


def _run(command: Sequence[str], purpose: str, timeout_s: float) -> str:
    """The command's standard output; every process it started is gone afterwards, hivemind's p2pd included."""
    # Outside variables must not lead the other environment back into ours.
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.TemporaryFile("w+") as output_file, tempfile.TemporaryFile("w+") as errors_file:
        try:
            process = subprocess.Popen(
                command, stdout=output_file, stderr=errors_file, env=environ, start_new_session=True
            )
        except OSError as error:
            raise HivemindUnavailable(f"could not {purpose}: {error}") from error
        try:
            # Only for the process: a pipe would stay open as long as a p2pd that outlives its parent.
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise HivemindUnavailable(f"could not {purpose}: not done after {timeout_s:.0f} s, given up") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output_file.seek(0)
        errors_file.seek(0)
        output, errors = output_file.read(), errors_file.read()
    if process.returncode != 0:
        last = "\n".join(f"    {line}" for line in (errors or output).strip().splitlines()[-LAST_LINES:])
        raise HivemindUnavailable(f"could not {purpose}: exit code {process.returncode}\n{last}")
    return output


def main() -> int:
    """Makes the environment, measures once, prints the report."""
    parser = argparse.ArgumentParser(description="Measure hivemind's averaging on loopback, in its own environment.")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR)
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--megabytes", type=float, default=16.0)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    try:
        report = measure(
            make_environment(arguments.cache_dir),
            peers=arguments.peers,
            group_size=arguments.group_size,
            megabytes=arguments.megabytes,
            rounds=arguments.rounds,
        )
    except HivemindUnavailable as error:
        print(f"no comparison with hivemind: {error}", file=sys.stderr)
        return 1
    whole = [round_.seconds for round_ in report.whole_rounds()]
    summary = {"median_seconds": statistics.median(whole) if whole else None, "whole_rounds": len(whole)}
    print(json.dumps(summary | dataclasses.asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make bench` = `python -m tests.benchmarks`: every figure that was promised, one benchmark after another.

Prints a table with target and measured value, ratios first, and writes `.bench/results.json`: machine, versions,
figures and the samples behind them. Speed never fails the command, a wrong result does (exit code 1), and so does a
daemon that dies; the benchmarks after it are measured all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from tests.benchmarks import codecs, directory, exactness, failover, idle, matchmaking, whole_step
from tests.benchmarks.figures import Figure, Measured, WrongResult
from tests.benchmarks.swarm import SwarmFailed

RESULTS = Path(__file__).resolve().parent.parent.parent / ".bench" / "results.json"
BENCHMARKS: dict[str, Callable[..., Measured]] = {
    "exactness": exactness.measure,
    "matchmaking": matchmaking.measure,
    "whole_step": whole_step.measure,
    "failover": failover.measure,
    "idle": idle.measure,
    "directory": directory.measure,
    "codecs": codecs.measure,
}
PLAIN_WIDTH = 132
PACKAGES = ("moshpitd", "moshpit_client", "grpcio", "protobuf", "numpy", "ml_dtypes", "kademlia", "uvloop")


def main() -> int:
    """Parses the command line, measures, reports; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure what was promised.")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="this benchmark; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: for a look, not for the record")
    parser.add_argument("--json", action="store_true", help="print what results.json holds instead of the table")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the swarm's processes end with us
    notes = Console(stderr=True)
    found: dict[str, Measured] = {}
    failures: dict[str, str] = {}
    load = os.getloadavg()[0]
    for name in arguments.only or BENCHMARKS:
        began = time.monotonic()
        notes.print(f"{name} ...", style="dim")
        try:
            found[name] = BENCHMARKS[name](quick=arguments.quick)
        except (WrongResult, SwarmFailed) as error:
            # The daemons' logs are named in a note.
            failures[name] = "\n".join([str(error), *getattr(error, "__notes__", ())])
            notes.print(f"{name}: {failures[name]}", style="red", markup=False)
        else:
            notes.print(f"{name}: {time.monotonic() - began:.0f} s", style="dim")
    report = {
        "machine": machine() | {"load_before": load},
        "versions": {"python": platform.python_version()} | {each: version(each) for each in PACKAGES},
        "quick": arguments.quick,
        "figures": [
            dataclasses.asdict(each) | {"goal": each.goal and each.goal.value, "reached": each.reached}
            for each in ordered(found.values())
        ],
        "missing": [each for measured in found.values() for each in measured.missing],
        "failures": failures,
        "details": {name: measured.details for name, measured in found.items()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(report))
    else:
        # A log or a pipe has no width of its own, and the table folds badly into the usual 80 columns.
        show(Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH), found.values(), report["missing"], failures)
    return 1 if failures else 0


def ordered(found: Collection[Measured]) -> list[Figure]:
    """Ratios first, then what has a target, then the rest; each as measured."""
    figures = [figure for measured in found for figure in measured.figures]
    return sorted(figures, key=lambda figure: (figure.unit != "x", figure.goal is None))


def show(console: Console, found: Collection[Measured], missing: Sequence[str], failures: dict[str, str]) -> None:
    """The table, and below it what is not in it."""
    table = Table(title=f"moshpitd on {machine()['processor']}, {os.cpu_count()} cores", title_justify="left")
    for heading in ("benchmark", "figure", "target", "measured", "", "note"):
        table.add_column(heading, justify="right" if heading in ("target", "measured") else "left", overflow="fold")
    for figure in ordered(found):
        target = f"{figure.goal.value} {figure.target:g} {figure.unit}" if figure.goal else ""
        verdict = {None: "", True: "[green]reached[/]", False: "[red]missed[/]"}[figure.reached]
        value = f"{figure.value:.3g} {figure.unit}"
        table.add_row(figure.benchmark, figure.name, target, value, verdict, figure.note)
    console.print(table)
    for reason in missing:
        console.print(f"not installed: {reason}", style="yellow", markup=False)
    for name, why in failures.items():
        console.print(f"WRONG: {name}: {why}", style="bold red", markup=False)
    console.print(f"written to {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        names = [line.partition(":")[2].strip() for line in described.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def version(package: str) -> str:
    """Of an installed distribution; empty when it is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())

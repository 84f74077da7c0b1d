"""`make bench` = `python -m tests.benchmarks`: every figure that was promised, one benchmark after another.

Prints a table with target and measured value, ratios first, and writes `.bench/results.json`: machine, versions,
figures and the samples behind them. Speed never fails the command, a wrong result does (exit code 1), and so does a
daemon that dies; the benchmarks after it are measured all the same. `--write-docs` writes docs/benchmarks.md and its
pictures from results.json; without `--only` it measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable

from rich.console import Console

from tests.benchmarks import (
    all_reduce,
    codec_links,
    codecs,
    compressors,
    directory,
    exactness,
    failover,
    idle,
    links,
    local_hop,
    loss_over_time,
    matchmaking,
    packet_loss,
    profiling,
    report,
    under_load,
    wait_avoiding,
    whole_step,
)
from tests.benchmarks.figures import Measured, WrongResult
from tests.benchmarks.rivals import Unavailable
from tests.benchmarks.swarm import SwarmFailed

BENCHMARKS: dict[str, Callable[..., Measured]] = {
    "exactness": exactness.measure,
    "all_reduce": all_reduce.measure,
    "whole_step": whole_step.measure,
    "local_hop": local_hop.measure,
    "links": links.measure,
    "slow_peer": links.measure_slow_peer,
    "under_load": under_load.measure,
    "matchmaking": matchmaking.measure,
    "failover": failover.measure,
    "idle": idle.measure,
    "directory": directory.measure,
    "codecs": codecs.measure,
    "codec_links": codec_links.measure,
    "wait_avoiding": wait_avoiding.measure,
    "loss_over_time": loss_over_time.measure,
}
BY_NAME_ONLY: dict[str, Callable[..., Measured]] = {
    "huge": under_load.measure_huge,
    "packet_loss": packet_loss.measure,
    "profile": profiling.measure,
    "arc": compressors.measure_arc,
    "training": compressors.measure_training,
}
"""They take minutes or need the machine's whole memory."""
PLAIN_WIDTH = 132


def main() -> int:
    """Parses the command line, measures, reports; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure what was promised.")
    everything = BENCHMARKS | BY_NAME_ONLY
    parser.add_argument("--only", choices=everything, action="append", help="this benchmark; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: for a look, not for the record")
    parser.add_argument("--json", action="store_true", help="print what results.json holds instead of the table")
    parser.add_argument("--write-docs", action="store_true", help="write docs/benchmarks.md from results.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the swarm's processes end with us
    notes = Console(stderr=True)
    records = report.load()
    measuring = arguments.only or ([] if arguments.write_docs else list(BENCHMARKS))
    for name in measuring:
        began, load = time.monotonic(), os.getloadavg()[0]
        notes.print(f"{name} ...", style="dim")
        measured, failure = Measured(()), ""
        try:
            measured = everything[name](quick=arguments.quick)
        except Unavailable as error:
            measured = Measured((), missing=(str(error),))
        except (WrongResult, SwarmFailed) as error:
            # The daemons' logs are named in a note.
            failure = "\n".join([str(error), *getattr(error, "__notes__", ())])
            notes.print(f"{name}: {failure}", style="red", markup=False)
        records[name] = report.record(began, load, quick=arguments.quick, measured=measured, failure=failure)
        records = {each: records[each] for each in everything if each in records}
        stored = report.store(records)  # at once: whoever stops the command keeps what there is
        notes.print(f"{name}: {time.monotonic() - began:.0f} s", style="dim")
    if arguments.write_docs:
        report.write_page(records)
    if not measuring:
        return 0
    if arguments.json:
        print(json.dumps(stored))
    else:
        # A log or a pipe has no width of its own, and the table folds badly into the usual 80 columns.
        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        report.show(console, {name: records[name] for name in measuring})
    return 1 if any(records[name].failure for name in measuring) else 0


if __name__ == "__main__":
    sys.exit(main())

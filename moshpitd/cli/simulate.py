"""`moshpitd simulate`: runs a workload of the simulation, one seed or many, and says what came of it.

The result depends on the options and the seed alone. How fast this machine was goes to stderr, never into the result.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from moshpitd.cli.failure import ExitCode, Failure
from moshpitd.cli.progress import Progress, progress
from moshpitd.cli.simulation_flags import Options
from moshpitd.simulation.stragglers import StepsReport, Stragglers, StragglersOptions
from moshpitd.simulation.workloads import AGREED, InStep, InStepOptions, Mixed, Report

PROCESSES = 2
"""For many seeds."""
GLANCE_EVENTS = 500
"""How many events pass between two looks at how far the run is."""


@dataclass(slots=True)
class Seeds:
    """What came of many runs that differ in their seed."""

    first: int
    count: int
    reports: list[Report] = field(default_factory=list)
    """In order of their seeds."""
    crashes: dict[int, str] = field(default_factory=dict)
    """Seeds whose run ended in an exception."""

    def failing(self) -> dict[int, str]:
        """The first complaint of each seed that has one."""
        complaints = {report.seed: report.complaints[0] for report in self.reports if report.complaints}
        return dict(sorted({**complaints, **self.crashes}.items()))


def run(options: Options, *, plot: Path | None = None, trace: Path | None = None) -> Report:
    """One seed, with a line of progress on stderr; `trace` gets everything that happened."""
    draw = _painter(plot) if plot else None  # before the work is done
    workload = _workload(options)
    with progress() as line, _written(trace) as write:
        if write:
            workload.swarm.trace, workload.swarm.trace_messages = write, True
        watch = _Watch(workload, line)
        workload.swarm.clock.after_event = watch.glance
        report = workload.run(watch.averaged) if isinstance(workload, InStep) else workload.run()
    _say(f"{report.events:,} events in {watch.took_s:.1f} s ({watch.rate:,.0f}/s), {report.virtual_s:.1f} s there")
    if draw and plot:
        assert isinstance(options, InStepOptions)
        try:
            draw(report, options, plot)
        except OSError as error:
            raise Failure(ExitCode.FAILED, f"--plot {plot}: {error.strerror or error}") from error
    return report


def run_seeds(options: Options, count: int) -> Seeds:
    """Seeds from the options' own on, in two processes."""
    result, done_by_seed, began = Seeds(options.seed, count), dict[int, Report](), time.monotonic()
    # Spawned: a forked process would share what this one has open.
    context = multiprocessing.get_context("spawn")
    with progress() as line, ProcessPoolExecutor(min(PROCESSES, count), mp_context=context) as pool:
        futures: dict[Future[Report], int] = {}
        for seed in range(options.seed, options.seed + count):
            futures[pool.submit(run_quietly, replace(options, seed=seed))] = seed
        try:
            for done, future in enumerate(as_completed(futures), 1):
                if error := future.exception():
                    result.crashes[futures[future]] = f"{type(error).__name__}: {error}"
                else:
                    done_by_seed[futures[future]] = future.result()
                bad = len(result.crashes) + sum(bool(report.complaints) for report in done_by_seed.values())
                line.show(f"{done} of {count} seeds, {bad} with a complaint", done / count)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl+C nothing more is begun
    result.reports = [report for _, report in sorted(done_by_seed.items())]
    events, took_s = sum(report.events for report in result.reports), time.monotonic() - began
    _say(f"{count} seeds, {events:,} events in {took_s:.1f} s ({events / took_s:,.0f}/s)")
    return result


def show(report: Report, options: Options, replay: str, *, as_json: bool) -> None:
    """Raises Failure when a checker complains."""
    if as_json:
        print(json.dumps({**report.as_json(), "options": asdict(options)}))
    else:
        from moshpitd.cli import simulation_tables

        if isinstance(report, StepsReport):
            simulation_tables.steps(report)
        else:
            simulation_tables.report(report, _rounds(options))
    if report.complaints:
        raise Failure(
            ExitCode.FAILED,
            f"seed {report.seed} breaks what must always hold: {report.complaints[0]}\n"
            f"Replay it at this commit: {replay} --trace trace.txt",
        )


def show_seeds(found: Seeds, options: Options, replay: Callable[[int], str], *, as_json: bool) -> None:
    """Raises Failure when a checker complains."""
    failing = found.failing()
    replays = {seed: replay(seed) for seed in failing}
    if as_json:
        bad = [{"seed": seed, "complaint": text, "replay": replays[seed]} for seed, text in failing.items()]
        reports = [report.as_json() for report in found.reports]
        print(json.dumps({"failing": bad, "reports": reports, "options": asdict(options)}))
    else:
        from moshpitd.cli import simulation_tables

        most = options.averagings_max if isinstance(options, InStepOptions) else None
        simulation_tables.seeds(found, most, replays)
    if failing:
        seed, complaint = next(iter(failing.items()))
        raise Failure(
            ExitCode.FAILED,
            f"{len(failing)} of {found.count} seeds break what must always hold, first {seed}: {complaint}\n"
            f"Replay it at this commit: {replays[seed]} --trace trace.txt",
        )


def _rounds(options: Options) -> int | None:
    return options.rounds if isinstance(options, InStepOptions) else None


def _painter(path: Path) -> Callable[[Report, InStepOptions, Path], None]:
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise Failure(ExitCode.USAGE, f"--plot {path}: end it in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise Failure(ExitCode.USAGE, f"--plot {path}: there is no directory {path.absolute().parent}")
    try:
        from moshpitd.cli.spread_plot import draw
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise Failure(ExitCode.USAGE, "--plot needs matplotlib: pip install 'moshpitd[demo]'") from error
    return draw


def run_quietly(options: Options) -> Report:
    """In a process of its own."""
    return _workload(options).run()


def _workload(options: Options) -> InStep | Mixed | Stragglers:
    match options:
        case InStepOptions():
            return InStep(options)
        case StragglersOptions():
            return Stragglers(options)
        case _:
            return Mixed(options)


class _Watch:
    """Says now and then how far a run is."""

    def __init__(self, workload: InStep | Mixed | Stragglers, line: Progress) -> None:
        self._swarm = workload.swarm
        self._in_step = isinstance(workload, InStep)
        self._line = line
        self._began = time.monotonic()
        self._spreads: list[float] = []
        self._next = GLANCE_EVENTS

    @property
    def took_s(self) -> float:
        return max(1e-6, time.monotonic() - self._began)

    @property
    def rate(self) -> float:
        """Events a second."""
        return self._swarm.clock.events / self.took_s

    def averaged(self, report: Report) -> None:
        self._spreads = report.spreads

    def glance(self) -> None:
        if self._swarm.clock.events < self._next:
            return
        self._next += GLANCE_EVENTS
        text = f"{self._swarm.now:.1f} s there, {self.rate:,.0f} events/s"
        if self._in_step:
            spread = f", spread {self._spreads[-1]:.1e}" if self._spreads else ""
            text = f"averaging {max(0, len(self._spreads) - 1)}{spread}, {text}"
        self._line.show(text, self._fraction())

    def _fraction(self) -> float:
        """Of the way to agreement, which is even on a log scale."""
        if len(self._spreads) < 2 or not self._spreads[0] > AGREED:
            return 0.0
        way = 1 - math.log(max(self._spreads[-1], AGREED) / AGREED) / math.log(self._spreads[0] / AGREED)
        return min(1.0, max(0.0, way))


@contextmanager
def _written(path: Path | None) -> Iterator[Callable[[str], None] | None]:
    if path is None:
        yield None
        return
    try:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            yield lambda text: print(text, file=file)
    except OSError as error:
        raise Failure(ExitCode.FAILED, f"--trace {path}: {error.strerror or error}") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

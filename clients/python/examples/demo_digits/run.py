"""The demo: eight daemons on a 2x4 grid, eight trainers with digits of their own, one model in the end.

    python run.py [--averagings 80] [--local-steps 5] [--picture demo_digits.png]

Knows how to start `moshpitd run` and trainer.py as processes, how to follow what the trainers print, and what to do
when one of them ends too early; what the results mean is outcome.py's, how they look picture.py's. Every process it
starts is gone when it ends, however it ends. Exit code 0 when all peers hold the same bits and the accuracy holds; else
1, and the logs of all processes are kept and named.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from digits import Digits, deal, train_alone, train_on_all
from outcome import Averaging, Outcome, spread
from picture import draw
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

PEERS = 8
GRID = "2x4"
DATA_SEED = 1
TERMINATE_TIMEOUT_S = 10.0
POLL_S = 0.2
PLAIN_EVERY = 10
"""Without a terminal, say how far the swarm is after so many averagings."""
LOG_LINES = 12
"""How much of the log of a failed process is shown."""


class DemoFailed(Exception):
    """The swarm did not come to its end; the message says which process, and where its log is."""


@dataclass(slots=True)
class Started:
    """A running process and its log."""

    name: str
    log: Path
    process: asyncio.subprocess.Process

    async def must_live(self) -> None:
        """Raises when the process ends; a daemon has no reason to before it is told."""
        await self.process.wait()
        raise self.failure("ended before it was told to")

    def failure(self, why: str) -> DemoFailed:
        """An error that shows the end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        code = self.process.returncode
        status = "" if code is None else f" (exit code {code})"
        return DemoFailed("\n".join([f"{self.name} {why}{status}; its log {self.log} ends:", *lines]))


@dataclass(slots=True)
class Processes:
    """Starts processes with a log each; all of them are gone when the block ends, the youngest told first."""

    logs: Path
    started: list[Started] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        living = [each.process for each in reversed(self.started) if each.process.returncode is None]
        for process in living:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        try:
            async with asyncio.timeout(TERMINATE_TIMEOUT_S):
                for process in living:
                    await process.wait()
        except TimeoutError:
            pass
        finally:
            for process in living:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    async def start(self, name: str, *arguments: str | Path, lines: bool = False) -> Started:
        """Starts `python *arguments`; `lines`: its standard output is ours to read, else it goes to the log too."""
        log = self.logs / f"{name}.log"
        # One thread each: eight times all cores' worth of BLAS threads would only be in each other's way.
        environ = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *map(str, arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if lines else output,
                stderr=output,
                env=environ,
                start_new_session=True,  # Ctrl-C is for us; we tell them
            )
        self.started.append(Started(name, log, process))
        return self.started[-1]


@dataclass(slots=True)
class Progress:
    """How far every peer is, as the terminal shows it."""

    total: int
    stage: str = "starting the daemons"
    seen: list[list[Averaging]] = field(default_factory=lambda: [[] for _ in range(PEERS)])

    def everywhere(self) -> int:
        """Averagings that all peers have behind them."""
        return min(len(each) for each in self.seen)

    def spread(self) -> tuple[float, float]:
        """Before and after the newest averaging that all peers have behind them."""
        newest = [each[self.everywhere() - 1] for each in self.seen]
        before = np.stack([each.before for each in newest]).astype(np.float64)
        after = np.stack([each.after for each in newest]).astype(np.float64)
        return spread(before), spread(after)

    def line(self) -> str:
        """The swarm in one line."""
        if not self.everywhere():
            return self.stage
        before, after = self.spread()
        return f"{self.stage}: averaging {self.everywhere()} of {self.total}, spread {before:.2e} -> {after:.2e}"

    def __rich__(self) -> Table:
        """The swarm as a table with a line a peer."""
        table = Table(title=self.line(), title_justify="left", title_style="bold", box=None, pad_edge=False)
        for heading in ("", "averagings", "", "loss on its shard", "last group", "outcome", "took"):
            table.add_column(heading, justify="left" if heading in ("", "averagings", "last group") else "right")
        for peer, seen in enumerate(self.seen):
            bar = ProgressBar(total=self.total, completed=len(seen), width=24)
            if not seen:
                table.add_row(f"peer {peer}", bar, f"0/{self.total}")
                continue
            last = seen[-1]
            table.add_row(
                f"peer {peer}",
                bar,
                f"{len(seen)}/{self.total}",
                f"{last.loss:.4f}",
                "alone" if last.axis is None else f"{last.members} on axis {last.axis}",
                last.outcome,
                f"{1000 * last.seconds:.0f} ms",
            )
        return table


@dataclass(frozen=True, slots=True)
class Scale:
    """How long the swarm trains."""

    averagings: int
    local_steps: int
    timeout: float
    """Seconds for everything between the first process and the last result."""


async def run_swarm(directory: Path, shards: list[Digits], scale: Scale, progress: Progress) -> None:
    """Starts daemons and trainers under `directory`, follows them to their end into `progress`."""
    try:
        async with asyncio.timeout(scale.timeout), Processes(directory) as processes, asyncio.TaskGroup() as tasks:
            first = await _start_daemon(processes, directory, 0, join=None)
            guards = [tasks.create_task(first.must_live())]
            address = await _listening(first, _socket(directory, 0))
            for peer in range(1, PEERS):
                daemon = await _start_daemon(processes, directory, peer, join=address)
                guards.append(tasks.create_task(daemon.must_live()))
            for peer, daemon in enumerate(processes.started[1:], start=1):
                await _listening(daemon, _socket(directory, peer))
            progress.stage = "training"
            follows = []
            for peer, shard in enumerate(shards):
                trainer = await _start_trainer(processes, directory, peer, shard, scale)
                follows.append(tasks.create_task(_follow(trainer, directory, peer, progress.seen[peer])))
            await asyncio.wait(follows)
            for guard in guards:
                guard.cancel()
            progress.stage = "stopping the daemons"
    except TimeoutError:
        counts = ", ".join(f"peer {peer}: {len(seen)}" for peer, seen in enumerate(progress.seen))
        raise DemoFailed(
            f"not done after {scale.timeout:.0f} s; averagings of {progress.total} behind them: {counts}; "
            f"the logs in {directory} tell what they waited for"
        ) from None
    except ExceptionGroup as group:
        failures, bugs = group.split(DemoFailed)
        if bugs is not None or failures is None:
            raise
        raise DemoFailed("\n".join(str(failure) for failure in failures.exceptions)) from None


def _socket(directory: Path, peer: int) -> Path:
    return directory / f"daemon-{peer}.sock"


async def _start_daemon(processes: Processes, directory: Path, peer: int, join: str | None) -> Started:
    return await processes.start(
        f"daemon-{peer}", "-m", "moshpitd", "run", "--swarm", "demo", "--listen", "127.0.0.1:0", "--grid", GRID,
        "--socket", _socket(directory, peer), "--data-dir", directory / f"daemon-{peer}", "--http", "off",
        *([] if join is None else ["--join", join]),
    )  # fmt: skip


async def _listening(daemon: Started, socket: Path) -> str:
    """The address on which the daemon listens, once it says that it is ready."""
    while True:
        status = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "moshpitd", "status", "--json", "--socket", str(socket),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            output, _ = await status.communicate()
        finally:
            if status.returncode is None:
                status.kill()
        if status.returncode == 0:
            said = json.loads(output)
            if said["ready"]:
                return str(said["listen"])
        await asyncio.sleep(POLL_S)


async def _start_trainer(processes: Processes, directory: Path, peer: int, shard: Digits, scale: Scale) -> Started:
    record, file = directory / f"parameters-{peer}", directory / f"shard-{peer}.npz"
    record.mkdir()
    np.savez(file, pixels=shard.pixels, labels=shard.labels)
    return await processes.start(
        f"trainer-{peer}", Path(__file__).with_name("trainer.py"), "--socket", _socket(directory, peer),
        "--shard", file, "--record", record, "--seed", str(peer), "--peers", str(PEERS),
        "--averagings", str(scale.averagings), "--local-steps", str(scale.local_steps),
        lines=True,
    )  # fmt: skip


async def _follow(trainer: Started, directory: Path, peer: int, seen: list[Averaging]) -> None:
    """Reads what a trainer prints until it has finished."""
    assert trainer.process.stdout is not None
    finished = False
    with trainer.log.open("ab") as log:
        async for line in trainer.process.stdout:
            log.write(line)
            said = json.loads(line)
            if said.pop("event") == "finished":
                finished = True
                continue
            before, after = np.load(directory / f"parameters-{peer}" / f"averaging-{said['number']:03}.npy")
            seen.append(Averaging(before=before, after=after, **said))
    if await trainer.process.wait() != 0 or not finished:
        raise trainer.failure("did not finish its training")


async def _show(console: Console, progress: Progress) -> None:
    """Without a terminal: a line now and then, until cancelled."""
    said = ""
    while True:
        done = progress.everywhere()
        line = progress.line() if done == progress.total or done % PLAIN_EVERY == 0 else said
        if line != said:
            console.print(line, highlight=False, soft_wrap=True)
            said = line
        await asyncio.sleep(POLL_S)


async def _run_shown(console: Console, directory: Path, shards: list[Digits], scale: Scale, progress: Progress) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    if console.is_terminal:
        with Live(progress, console=console, refresh_per_second=8):
            await run_swarm(directory, shards, scale, progress)
        return
    show = asyncio.create_task(_show(console, progress))
    try:
        await run_swarm(directory, shards, scale, progress)
    finally:
        show.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await show


def result_table(outcome: Outcome) -> Table:
    """What every peer learned from, and what came of it alone and in the swarm."""
    table = Table(title="What came of it", title_justify="left", title_style="bold")
    for heading in ("", "mostly sees", "loss", "alone", "in the swarm", "complete", "median"):
        table.add_column(heading, justify="left" if heading in ("", "mostly sees") else "right")
    for peer, seen in enumerate(outcome.averagings):
        counts = np.bincount(outcome.shards[peer].labels, minlength=10)
        common = [str(digit) for digit in np.argsort(-counts)[:3]]
        complete = sum(each.outcome == "complete" for each in seen)
        table.add_row(
            f"peer {peer}",
            ", ".join(common),
            f"{outcome.losses[peer][-1]:.3f}",
            f"{100 * outcome.lone_accuracies[peer]:.1f} %",
            f"{100 * outcome.accuracies[peer]:.1f} %",
            f"{complete}/{len(seen)}",
            f"{1000 * statistics.median(each.seconds for each in seen):.0f} ms",
        )
    all_data = f"{100 * outcome.all_data_accuracy:.1f} %"
    table.add_row("one process", "everything", f"{outcome.all_data.losses[-1]:.3f}", all_data, "", "", "")
    return table


def theory_lines(outcome: Outcome) -> Iterator[str]:
    """How much of the fresh drift outlived a round, against theory, for each way the swarm was cut into groups."""
    for groups in sorted({each.groups for each in outcome.rounds}, reverse=True):
        chosen = [each for each in outcome.rounds if each.groups == groups]
        drift = sum(each.drift for each in chosen)
        left, theory, random_seats = (
            sum(spreads) / drift
            for spreads in zip(*((each.after, each.theory, each.theory_random_seats) for each in chosen), strict=True)
        )
        yield (
            f"{len(chosen)} rounds in {groups} groups left {left:.3f} of the fresh drift "
            f"(theory {theory:.3f}; {random_seats:.3f} for random seats)"
        )


def main() -> int:
    """Runs the demo; returns its exit code."""
    parser = argparse.ArgumentParser(description="Train one model with eight daemons and eight trainers.")
    parser.add_argument("--averagings", type=int, default=80, help="Moshpit rounds in the training (%(default)s)")
    parser.add_argument("--local-steps", type=int, default=5, help="steps of SGD between two of them (%(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("demo_digits.png"), help="the PNG (%(default)s)")
    parser.add_argument("--timeout", type=float, default=110.0, help="seconds for the whole swarm (%(default)s)")
    arguments = parser.parse_args()
    scale = Scale(arguments.averagings, arguments.local_steps, arguments.timeout)
    console = Console()
    began = time.monotonic()
    shards, test = deal(PEERS, DATA_SEED)
    console.print(
        f"{PEERS} peers, {len(shards[0].labels)} digits each, few of them of the same kind; grid {GRID}; "
        f"{scale.averagings} averagings of one round, {scale.local_steps} local steps apart, then an exact one",
        highlight=False,
        soft_wrap=True,
    )
    # Short, private and new: a Unix socket's path has at most 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="moshpit-demo-"))
    progress = Progress(total=scale.averagings + 1)
    kept = f"logs and parameters of all processes are kept in {directory}"
    try:
        asyncio.run(_run_shown(console, directory, shards, scale, progress))
    except DemoFailed as failure:
        console.print(f"failed: {failure}", style="red", highlight=False, markup=False, soft_wrap=True)
        console.print(kept, highlight=False, soft_wrap=True)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print(f"interrupted; {kept}", highlight=False)
        return 1

    course = {"stretches": progress.total, "steps": scale.local_steps}
    outcome = Outcome(
        shards=shards,
        test=test,
        averagings=progress.seen,
        lone=[train_alone(shards, peer, **course, seed=peer) for peer in range(PEERS)],
        all_data=train_on_all(shards, **course, seed=PEERS),
    )
    console.print(result_table(outcome))
    for line in theory_lines(outcome):
        console.print(line, highlight=False, soft_wrap=True)
    outcomes = ", ".join(f"{count} {name}" for name, count in outcome.outcomes().most_common())
    seconds = time.monotonic() - began
    draw(outcome, arguments.picture, f"{PEERS} daemons on a {GRID} grid, {outcomes} averagings in {seconds:.0f} s")
    checks = outcome.checks()
    for check in checks:
        console.print(
            "[green]held  [/]" if check.held else "[red]BROKEN[/]", check.said, highlight=False, soft_wrap=True
        )
    console.print(
        f"picture: {arguments.picture} ({time.monotonic() - began:.0f} s in all)", highlight=False, soft_wrap=True
    )
    if not all(check.held for check in checks):
        console.print(kept, highlight=False, soft_wrap=True)
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a simulation found, as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moshpitd.cli.simulate import Seeds
from moshpitd.cli.tables import amount
from moshpitd.simulation.stragglers import StepsReport
from moshpitd.simulation.workloads import Report

COMPLAINTS_SHOWN = 20


def report(run: Report, rounds: int | None) -> None:
    """`rounds`: of each averaging, 0 for as many as the grid has axes; None where no spread was measured."""
    console = Console(highlight=False)
    console.print(f"[bold]{run.peers} peers, {run.workload}, grid {run.grid or '-'}, seed {run.seed}[/]")
    if rounds is not None:
        console.print(_spreads(run))
    facts = _facts()
    if rounds is not None:
        needed = run.rounds_to_agreement
        agreed = f"after {needed} round{'s' if needed != 1 else ''}" if needed is not None else "not reached"
        facts.add_row("agreement", f"{agreed} ({run.averagings} averagings of {rounds or 'auto'})")
    facts.add_row("round time", f"p50 {_time(run.round_s_p50)}, p99 {_time(run.round_s_p99)}")
    facts.add_row("per peer", f"{run.messages_per_peer:,.0f} messages, {amount(round(run.bytes_per_peer))} sent")
    facts.add_row("outcomes", _counts(run.outcomes))
    _more(facts, run.faults, run.dropped, run.windows, run.looked)
    console.print(facts)
    _verdict(console, run)


def steps(run: StepsReport) -> None:
    """What trainers with a pace of their own made of it."""
    console = Console(highlight=False)
    groups = f", groups of {run.group_size}" if run.averaging != "global" else ""
    console.print(f"[bold]{run.peers} peers, {run.averaging}{groups}, seed {run.seed}[/]")
    facts = _facts()
    facts.add_row("step", f"{run.step_ms:.0f} ms a version, {run.computed_ms:.0f} ms of it computed on average")
    facts.add_row(
        "own steps", f"{run.steps_made:.0f} a trainer in {run.versions} versions, {run.own_step_ms:.0f} ms each"
    )
    facts.add_row("a call takes", f"p50 {_time(run.call_ms_p50 / 1e3)}, p99 {_time(run.call_ms_p99 / 1e3)}")
    facts.add_row("spread", f"{_small(run.spread_mean)} between barriers, a step's noise being 1")
    if run.staleness:
        ages = ", ".join(f"{count:,} of {age}" for age, count in run.staleness.items())
        facts.add_row("age of models", f"{ages} versions, at most {run.staleness_max}")
    facts.add_row("calls", _counts(run.kinds))
    facts.add_row("outcomes", _counts(run.outcomes))
    facts.add_row("per peer", f"{run.messages_per_peer:,.0f} messages, {amount(round(run.bytes_per_peer))} sent")
    if run.windows:
        facts.add_row("not promised", _counts(run.windows))
    facts.add_row("checked", _counts(run.looked))
    console.print(facts)
    _verdict(console, run)


def _verdict(console: Console, run: Report) -> None:
    for complaint in run.complaints[:COMPLAINTS_SHOWN]:
        console.print(f"[red]complaint[/] {escape(complaint)}", soft_wrap=True)
    if len(run.complaints) > COMPLAINTS_SHOWN:
        console.print(f"... and {len(run.complaints) - COMPLAINTS_SHOWN} more")
    if not run.complaints:
        console.print("[green]no checker complains[/]")


def seeds(found: Seeds, rounds_max: int | None, replays: Mapping[int, str]) -> None:
    """`replays`: the command that shows each failing seed again. Who never agreed counts with `rounds_max`."""
    console, failing, reports = Console(highlight=False), found.failing(), found.reports
    facts = _facts()
    facts.add_row("seeds", f"{found.first} to {found.first + found.count - 1}, {len(failing)} failing")
    if rounds_max is not None and reports:
        needed = [run.rounds_to_agreement or rounds_max for run in reports]
        late = sum(run.rounds_to_agreement is None for run in reports)
        never = f", {late} not within {rounds_max}" if late else ""
        facts.add_row("rounds to agreement", f"mean {fmean(needed):.2f}, {min(needed)} to {max(needed)}{never}")
    if reports:
        slowest = max(run.round_s_p99 for run in reports)
        facts.add_row("round time", f"p50 {_time(fmean(run.round_s_p50 for run in reports))}, p99 {_time(slowest)}")
    facts.add_row("outcomes", _counts(_sum(run.outcomes for run in reports)))
    _more(
        facts,
        _sum(run.faults for run in reports),
        _sum(run.dropped for run in reports),
        _sum(run.windows for run in reports),
        _sum(run.looked for run in reports),
    )
    console.print(facts)
    for seed, complaint in failing.items():
        console.print(f"[red]seed {seed}[/] {escape(complaint)}\n    {escape(replays[seed])}", soft_wrap=True)
    if not failing:
        console.print("[green]no checker complains[/]")


def _spreads(run: Report) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("averaging", "spread", "factor", "theory's"):
        table.add_column(column, justify="right")
    table.add_row("at first", _small(run.spreads[0]) if run.spreads else "-")
    for k, ((before, after), theory) in enumerate(zip(pairwise(run.spreads), run.theory, strict=False)):
        table.add_row(str(k), _small(after), _small(after / before) if before else "-", _small(theory))
    return table


def _more(
    facts: Table,
    faults: Mapping[str, int],
    dropped: Mapping[str, int],
    windows: Mapping[str, int],
    looked: Mapping[str, int],
) -> None:
    if faults:
        facts.add_row("faults", _counts(faults))
    facts.add_row("dropped", "\n".join(f"{count:,} {escape(why)}" for why, count in dropped.items()) or "nobody")
    if windows:
        facts.add_row("not promised", _counts(windows))
    facts.add_row("checked", _counts(looked))


def _facts() -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    return facts


def _sum(each: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counts in each:
        total.update(counts)
    return dict(total.most_common())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {escape(name)}" for name, count in counts.items()) or "none"


def _small(value: float) -> str:
    return f"{value:.2e}" if 0 < value < 0.01 else f"{value:.3f}" if value else "0"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"

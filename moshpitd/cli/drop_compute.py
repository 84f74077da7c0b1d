"""`moshpitd simulate --drop-compute`: what a compute budget would be worth to a user's own swarm, before they try."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict

import click

from moshpitd.cli.simulation_flags import OF_DROP_COMPUTE, SimulationFlags, seconds
from moshpitd.simulation.compute_budget import COLUMN, PEERS_DEFAULT, DropComputeOptions, worth

KNOWN = {"drop_compute", "peers", "seed", "as_json"} | OF_DROP_COMPUTE


def read(flags: SimulationFlags, typed: Collection[str]) -> DropComputeOptions:
    """Raises click.UsageError that names the flag and the way out."""
    if strange := sorted(set(typed) - KNOWN):
        known = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(KNOWN - {"drop_compute", "as_json"}))
        raise click.UsageError(f"--{strange[0].replace('_', '-')} says nothing to --drop-compute: it knows {known}")
    peers = flags["peers"] if flags["peers"] is not None else PEERS_DEFAULT
    if peers > max(COLUMN):
        raise click.BadParameter(
            f"{peers} is more than {max(COLUMN)}, as far as this was compared", param_hint="'--peers'"
        )
    return DropComputeOptions(
        peers=peers,
        micro_batches=flags["micro_batches"],
        micro_batch_s=_duration("--micro-batch", flags["micro_batch"], above_zero=True),
        noise=flags["noise"],
        exchange_s=_duration("--exchange", flags["exchange"]),
        seed=flags["seed"],
    )


def _duration(flag: str, text: str, *, above_zero: bool = False) -> float:
    try:
        duration_s = seconds(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} {error}", param_hint=f"'{flag}'") from error
    if above_zero and not duration_s:
        raise click.BadParameter(f"{text!r} is no time: give more than 0", param_hint=f"'{flag}'")
    return duration_s


def show(options: DropComputeOptions, *, as_json: bool) -> None:
    """The swarm that was asked for, and smaller and larger ones beside it."""
    rows = [worth(options, peers) for peers in sorted({options.peers, *COLUMN})]
    if as_json:
        [own] = [row for row in rows if row.peers == options.peers]
        print(json.dumps({"options": asdict(options), **asdict(own), "column": [asdict(row) for row in rows]}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("peers", "step without", "tau", "speed-up", "dropped", "the rule expects", "and drops"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.peers),
            f"{row.step_s * 1e3:.4g} ms",
            f"{row.tau_s * 1e3:.4g} ms",
            f"{row.speedup:.3f}",
            f"{row.drop_rate:.1%}",
            f"{row.expected_speedup:.3f}",
            f"{row.expected_drop_rate:.1%}",
            style="bold" if row.peers == options.peers else "",
        )
    console = Console()
    console.print(table)
    console.print(
        "Speed-up: micro-batches in a second, against none dropped. A trainer finishes the micro-batch it is in; "
        "the rule, which finds tau, reckons as if it could stop there.",
        soft_wrap=True,
    )

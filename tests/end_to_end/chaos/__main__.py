"""`make chaos SEED=1 MINUTES=2`: half the time on a flat group, half on a grid.

Prints a table of what was done and what came of it. Exit code 1 with seed and complaint when the oracle
objects.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.end_to_end.chaos.storm import FLAT, GRID, Course, Row, Trouble, weather_the_storm

LOGS = Path(__file__).resolve().parents[3] / ".bench" / "chaos"
COURSES = {course.name: course for course in (FLAT, GRID)}


def main() -> int:
    """Parses the command line, runs the courses; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.end_to_end.chaos", description="Real daemons under faults.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--course", choices=COURSES, action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 132)
    courses = [COURSES[name] for name in arguments.course or COURSES]
    for course in courses:
        try:
            run(console, course, seed=arguments.seed, seconds=60 * arguments.minutes / len(courses))
        except Trouble as trouble:
            console.print(f"seed {arguments.seed}: {trouble}", style="bold red", markup=False)
            for note in getattr(trouble, "__notes__", ()):
                console.print(note, style="red", markup=False)
            again = f"make chaos SEED={arguments.seed} MINUTES={arguments.minutes:g}"
            console.print(f"again: {again}", style="red", markup=False)
            return 1
    return 0


def run(console: Console, course: Course, *, seed: int, seconds: float) -> None:
    """One course and its table, which shows what there is even when there is trouble."""
    table = Table(title=f"{course.name}: {course.daemons} daemons, seed {seed}", title_justify="left")
    for heading in ("at", "injection", "outcomes of the calls meanwhile", "whole after"):
        table.add_column(heading, justify="left" if heading[0] in "io" else "right", overflow="fold")
    shown: list[Row] = []

    def tell(row: Row) -> None:
        shown.append(row)
        if console.is_terminal:
            console.print(f"{row.at_s:6.1f} s  {describe(row)}", style="dim", markup=False)

    begun = time.monotonic()
    try:
        done = weather_the_storm(course, seed=seed, seconds=seconds, logs=LOGS / f"{course.name}-{seed}", tell=tell)
    finally:
        for row in shown:
            outcomes = ", ".join(f"{count} {kind}" for kind, count in row.outcomes.most_common())
            table.add_row(f"{row.at_s:.0f} s", describe(row), outcomes, f"{row.whole_after_s:.1f} s")
        console.print(table)
    verdicts = done.verdicts
    total = ", ".join(f"{count} {kind}" for kind, count in done.outcomes.most_common())
    console.print(
        f"{time.monotonic() - begun:.0f} s, {len(done.rows)} injections, {verdicts.calls} calls ({total}): "
        f"{verdicts.values} results compared with the mean that their receipts name, "
        f"{verdicts.unwitnessed} without a witness, {verdicts.whole_swarm} averagings of everybody; "
        f"latest end {verdicts.latest_s:+.2f} s from its deadline. No objection.",
        markup=False,
    )


def describe(row: Row) -> str:
    return " + ".join(map(str, row.faults))


if __name__ == "__main__":
    sys.exit(main())

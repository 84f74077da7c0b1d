"""Is the mean exact, and does every peer hold the same bits? Plans with and without doubled cells, unequal weights."""

from __future__ import annotations

from dataclasses import dataclass

from tests.benchmarks.figures import Figure, Goal, Measured, WrongResult
from tests.benchmarks.swarm import ERROR_MAX, Training, running, training

ELEMENTS = 300_001
"""Odd, so that spans and chunks end anywhere."""


@dataclass(frozen=True, slots=True)
class Case:
    """A swarm and the plan it must find."""

    peers: int
    flags: tuple[str, ...]
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.peers} daemons, {' '.join(self.flags) or 'default limit'}"


CASES = (
    Case(12, ("--group-size-max", "4"), 2),
    Case(7, ("--group-size-max", "4"), 2),
    Case(13, ("--group-size-max", "4"), 2),
    Case(7, (), 1),
    Case(8, ("--grid", "2x4"), 2),
)


def measure(*, quick: bool) -> Measured:
    """Raises WrongResult when a mean is off, bits differ, or the plan has other rounds than it must."""
    figures: list[Figure] = []
    for case in CASES:
        with running(case.peers, *case.flags) as swarm, training(swarm, Training(ELEMENTS)) as trainers:
            errors: list[float] = []
            grid = ""
            # The first averaging finds the swarm, the second is a warm one.
            for turn in range(1 if quick else 3):
                weights = [1.0 + (5 * rank + turn) % 7 for rank in range(case.peers)]
                steps = trainers.step(weights)
                grid = steps[0].receipt.grid
                rounds = {len(step.receipt.rounds) for step in steps}
                if rounds != {case.rounds}:
                    raise WrongResult(f"{case.name}: {sorted(rounds)} rounds on {grid} instead of {case.rounds}")
                errors.append(trainers.check(steps, weights))
        note = f"{grid}, {case.rounds} rounds, same bits"
        figures.append(Figure("exactness", case.name, max(errors), "rel. error", Goal.AT_MOST, ERROR_MAX, note))
    return Measured(tuple(figures))

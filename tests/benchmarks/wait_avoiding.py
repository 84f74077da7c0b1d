"""Wait-avoiding averaging beside synchronous averaging: what `moshpitd bench wait-avoiding` finds, with its targets."""

from __future__ import annotations

from dataclasses import asdict

from moshpitd.cli.failure import Failure
from moshpitd.cli.wait_avoiding_bench import PARTS, Race, run
from tests.benchmarks.figures import Figure, Goal, Measured, WrongResult
from tests.benchmarks.swarm import SwarmFailed

STEPS, STEPS_QUICK = 60, 20
ERROR_MAX = 1e-6
CALL_MS_MAX = 200.0
SPEEDUP_GLOBAL, SPEEDUP_GROUP = 1.6, 1.3
SPREADS = {0.0: 0.18, 0.3: 0.19, 0.6: 0.25}
"""By the share that is late, what the algorithm gives on paper."""


def measure(*, quick: bool) -> Measured:
    """Raises WrongResult when a mean is not exact that should be, or a model older than its barriers allow."""
    try:
        found = run(parts=PARTS, steps=STEPS_QUICK if quick else STEPS, seed=0)
    except Failure as failure:
        raise SwarmFailed(str(failure)) from failure
    figures: list[Figure] = []

    def tell(
        name: str, value: float, unit: str, goal: Goal | None = None, target: float | None = None, note: str = ""
    ) -> None:
        figures.append(Figure("wait_avoiding", name, value, unit, goal, target, note))

    for exact in found.exact:
        if exact.error_max is not None and exact.error_max > ERROR_MAX:
            raise WrongResult(f"{exact.peers} punctual trainers hold no exact mean: off by {exact.error_max:g}")
        name = f"exact mean of {exact.peers} after {exact.versions} versions in groups of {exact.group_size}"
        note = f"{exact.punctual} of {exact.trials} trials punctual"
        if exact.error_max is not None:
            tell(name, exact.error_max, "rel. error", Goal.AT_MOST, ERROR_MAX, note)
        else:
            tell(f"{name}: punctual trials", 0, "", Goal.AT_LEAST, 1, "the machine was too busy to be punctual")
    if late := found.late:
        name = f"one of {late.peers} sleeps {late.sleeper_seconds:g} s: the others' calls, p99"
        tell(name, late.call_ms_p99, "ms", Goal.AT_MOST, CALL_MS_MAX, f"median {late.call_ms_p50:.0f} ms")
    tell("2 of 8 late: times faster than all together", found.speedup_global, "x", Goal.AT_LEAST, SPEEDUP_GLOBAL)
    tell("2 of 8 late: times faster than synchronous groups", found.speedup_group, "x", Goal.AT_LEAST, SPEEDUP_GROUP)
    for title, races in (("2 of 8 late", found.race), ("without delays", found.punctual)):
        for race in races:
            tell(f"{title}, {race.way}: a version", race.step_ms, "ms", note=_note(race))
    for race in found.race:
        if race.way.startswith("tau "):
            tau = int(race.way.split()[1].rstrip(","))
            if race.staleness_max > tau:
                raise WrongResult(f"{race.way}: a model was {race.staleness_max} versions old")
            tell(f"2 of 8 late, {race.way}: oldest model", race.staleness_max, "versions", Goal.AT_MOST, tau)
    for spread in found.spread:
        name, note = f"spread of 16, {spread.late:.0%} late", f"on paper about {SPREADS[spread.late]}"
        tell(name, spread.mean, "of a step's noise", note=note)
        tell(f"{name}: second half by first", spread.second_half_by_first, "of it", note="1: it does not grow")
    return Measured(tuple(figures), asdict(found))


def _note(race: Race) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(race.kinds.items()))
    return f"calls {race.call_ms_p50:.0f} ms, p99 {race.call_ms_p99:.0f} ms; {kinds}"

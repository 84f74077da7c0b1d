"""What a benchmark hands back: figures with their targets, and the two ways in which it can fail.

Knows nothing of what is measured. Too slow is a figure below its target, never an error; a wrong result always is one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


class WrongResult(Exception):
    """Not the mean that should have come out, or not everybody took part. The message says who and by how much."""


class Goal(Enum):
    """On which side of its target a figure is good."""

    AT_MOST = "<="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number."""

    benchmark: str
    name: str
    value: float
    unit: str
    """Empty for a count; "x" for a ratio, which comes first in the report."""
    goal: Goal | None = None
    """None: told for context, nothing was promised."""
    target: float | None = None
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        match self.goal:
            case None:
                return None
            case Goal.AT_MOST:
                return self.target is not None and self.value <= self.target
            case Goal.AT_LEAST:
                return self.target is not None and self.value >= self.target


@dataclass(frozen=True, slots=True)
class Measured:
    """All that one benchmark found."""

    figures: tuple[Figure, ...]
    details: dict[str, object] = field(default_factory=dict)
    """For results.json: the samples behind the figures."""
    missing: tuple[str, ...] = ()
    """What could not be installed here, and why."""


def quantile(samples: Sequence[float], share: float) -> float:
    """The value that `share` of the samples do not exceed, interpolated."""
    return statistics.quantiles(samples, n=1000, method="inclusive")[round(share * 1000) - 1]

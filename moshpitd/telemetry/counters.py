"""What is counted, by name: the seam between rooms that count and whoever reads.

Knows numbers only. A counter grows; gauges and histograms are asked for when somebody reads. Does not know HTTP;
`text()` is the form that Prometheus reads, which is also good for people.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

PREFIX = "moshpitd_"
SERIES_MAX = 1000
"""Distinct names with labels; more is a bug of ours, never a peer's doing: labels come from closed sets."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often something was how large."""

    bounds: tuple[float, ...]
    """Ascending; the largest value each class takes."""
    counts: tuple[int, ...]
    """Of each class, and of one more for what is larger than all bounds."""
    total: float
    """The sum of all values."""


class Counters:
    """All numbers of one daemon."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], float] = {}
        self._gauges: dict[str, Callable[[], float]] = {}
        self._histograms: dict[str, Callable[[], Histogram]] = {}

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Let a counter grow; Prometheus wants its name to end in _total."""
        assert name.endswith("_total") and amount >= 0
        series = (name, _labels(labels))
        self._counts[series] = self._counts.get(series, 0.0) + amount
        assert len(self._counts) <= SERIES_MAX

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Have a number read at each reading."""
        self._gauges[name] = read

    def histogram(self, name: str, read: Callable[[], Histogram]) -> None:
        """Have a histogram read at each reading; its name ends in its unit."""
        self._histograms[name] = read

    def text(self) -> str:
        """Everything, in the Prometheus text format."""
        lines: list[str] = []
        for name, read in sorted(self._gauges.items()):
            lines += [f"# TYPE {PREFIX}{name} gauge", f"{PREFIX}{name} {read():.17g}"]
        for name, look in sorted(self._histograms.items()):
            seen = look()
            lines.append(f"# TYPE {PREFIX}{name} histogram")
            for bound, so_far in zip((*map(str, seen.bounds), "+Inf"), accumulate(seen.counts), strict=True):
                lines.append(f'{PREFIX}{name}_bucket{{le="{bound}"}} {so_far}')
            lines += [f"{PREFIX}{name}_sum {seen.total:.17g}", f"{PREFIX}{name}_count {sum(seen.counts)}"]
        last = ""
        for (name, labels), count in sorted(self._counts.items()):
            if name != last:
                lines.append(f"# TYPE {PREFIX}{name} counter")
            lines.append(f"{PREFIX}{name}{labels} {count:.17g}")
            last = name
        return "".join(line + "\n" for line in lines)


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    # From closed sets of plain words, so there is nothing to escape.
    assert all(value.isprintable() and not {'"', "\\"} & set(value) for value in labels.values())
    return "{" + ",".join(f'{key}="{value}"' for key, value in sorted(labels.items())) + "}"

"""What a trainer of compose.yaml tells the judge: one JSON file a rank, in a directory that both are given.

Knows neither numpy nor the client, so that the judge needs nothing but Python.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

RELATIVE_ERROR_MAX = 1e-6
"""Of the largest deviation to the largest value of the mean: some units in the last place of float32."""


@dataclass(frozen=True, slots=True)
class Averaging:
    """What one call gave."""

    outcome: str
    weight: float
    error: float
    """max |averaged - mean| / max |mean|, the mean in float64."""
    digest: str
    """The daemon's word for the bits of the vector."""
    bits: str
    """SHA-256 of the tensors as they stand in this process: the trainer's own word."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """What one trainer saw."""

    rank: int
    averagings: list[Averaging] = field(default_factory=list)
    failure: str = ""
    """The client's error, when it had one."""

    @classmethod
    def read(cls, directory: Path, rank: int) -> Result | None:
        """Read what `rank` wrote, None while it has not."""
        try:
            content = json.loads(_place(directory, rank).read_text())
        except FileNotFoundError:
            return None
        return cls(content["rank"], [Averaging(**each) for each in content["averagings"]], content["failure"])

    def write(self, directory: Path) -> None:
        """Write the file of this rank, whole or not at all."""
        place = _place(directory, self.rank)
        draft = place.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(place)

    def is_right(self) -> bool:
        """Whether nothing failed and every averaging was complete and exact."""
        return not self.failure and all(
            averaging.outcome == "complete" and averaging.error <= RELATIVE_ERROR_MAX for averaging in self.averagings
        )


def _place(directory: Path, rank: int) -> Path:
    return directory / f"rank{rank}.json"

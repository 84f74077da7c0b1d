"""What is sent of the values: compressors, as the daemon spells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moshpit_client.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class ArcTopK:
    """The largest rows of what has changed, the same at all peers; the rest is sent later."""

    ratio: float = 0.2
    """Share of the rows that is sent."""
    rank: int = 4
    """Numbers a row in the sketch by which rows are chosen."""
    feedback: Literal["ef21m", "ef14"] = "ef21m"
    """ef21m: for the same peers with the same weights each time; ef14: for those who come and go."""
    eta: float | None = None
    """Of ef21m's momentum, 0.1 if not given; 1 is none. Leave it out with ef14."""
    warmup: int = 1000
    """The swarm's averagings before this number send all."""

    @property
    def name(self) -> str:
        eta = self.eta if self.eta is not None else 0.1 if self.feedback == "ef21m" else 1
        return f"arc:{self.ratio!r},{self.rank},{self.feedback},{eta!r},{self.warmup}"


def spelled(compressor: str | ArcTopK, feedback: str | None) -> str:
    """As it stands in the request. Raises InvalidInput."""
    name = compressor.name if isinstance(compressor, ArcTopK) else compressor
    if feedback is None:
        return name
    if feedback != "ef14":
        raise InvalidInput(f"feedback={feedback!r}: a codec has ef14, or None; ef21m goes with compressor=ArcTopK(...)")
    if name not in ("dense", "dense:ef14"):
        raise InvalidInput(f"feedback={feedback!r} with compressor {name!r}: the compressor has its own")
    return "dense:ef14"

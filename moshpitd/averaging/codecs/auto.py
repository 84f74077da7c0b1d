"""`auto`: gives up precision only for time worth having.

Knows sizes, rates and what coding costs; does not know members. The leader of a group asks when it closes the group,
and tells the others what it is and why.

A round moves f = 2 (n-1)/n vectors each way over the slowest line, of b bytes a second, and under Flash each member
also codes: its contributions and its averages once, and decodes about twice as much. At the speeds promised for one
core, as if nothing of it overlapped with the wire:

    seconds = f * bytes on the wire / b  +  float32 bytes * (1 / 1.5 GB/s + 2 / 4 GB/s)

float32 while nobody knows a rate, while it takes no longer than WORTH_S, and where flash8 is not FASTER times as fast:
for large vectors above b = f * 0.35 GB/s, that is 2.8 Gbit/s for two members and 5.2 for sixteen. flash4-8 only where
flash8 would take longer than LONG_S: its contributions lose a tenth of their norm. Below that it never goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AUTO = "auto"
CODING_S_PER_BYTE = 1 / 1.5e9 + 2 / 4.0e9
BITS = {"float32": 32.0, "flash8": 8.25, "flash4-8": (4.25 + 8.25) / 2}
"""An element of float32; of flash4-8 the mean of both halves."""
CHOICES = tuple(BITS)
WORTH_S = 0.25
FASTER = 1.5
LONG_S = 5.0


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` is in one group."""

    codec: str
    why: str


def choose(vector_bytes: int, elements: int, rates_bytes_s: Sequence[float]) -> Choice:
    """`vector_bytes`, `elements`: of what `auto` is to be chosen for. `rates_bytes_s`: what each member's line carries;
    0: not known."""
    known = [rate for rate in rates_bytes_s if rate > 0]
    if not known:
        return Choice("float32", "auto: no member knows yet what its line carries")
    slowest, n = min(known), len(rates_bytes_s)

    def seconds(codec: str) -> float:
        wire = vector_bytes if codec == "float32" else elements * BITS[codec] / 8
        coding = 0.0 if codec == "float32" else 4 * elements * CODING_S_PER_BYTE
        return 2 * (n - 1) / n * wire / slowest + coding

    lossless, coarse = seconds("float32"), seconds("flash8")
    line = f"auto: over the slowest line, {slowest / 1e6:.3g} MB/s, float32 takes about {lossless:.2g} s"
    if lossless <= WORTH_S or lossless < FASTER * coarse:
        return Choice("float32", f"{line}, flash8 {coarse:.2g} s")
    if coarse <= LONG_S:
        return Choice("flash8", f"{line}, flash8 {coarse:.2g} s")
    return Choice("flash4-8", f"{line}, flash8 {coarse:.2g} s, flash4-8 {seconds('flash4-8'):.2g} s")

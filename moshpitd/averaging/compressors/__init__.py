"""Staged reductions. `dense` (one stage: the vector as it is) is the all-reduce itself; others come as stages."""

from __future__ import annotations

from moshpitd.averaging.errors import InvalidInput

DENSE = "dense"


def check_compressor(name: str) -> str:
    """Raises InvalidInput that lists what there is."""
    if name != DENSE:
        raise InvalidInput(f"unknown compressor {name!r}: there is {DENSE}")
    return name

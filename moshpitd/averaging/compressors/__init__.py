"""Staged reductions and error feedback. A compressor is chosen by name; its canonical spelling is one of the terms.

dense         the vector as it is
dense:ef14    ... and what a lossy codec leaves out is sent again next time
arc           ARC-Top-K with the authors' defaults, which are arc:0.2,4,ef21m,0.1,1000
arc:...       ratio, rank, feedback, eta, warm-up; what is left out at the end is as by default
"""

from __future__ import annotations

import difflib

from moshpitd.averaging.compressors.arc_top_k import ArcOptions, ArcTopK
from moshpitd.averaging.compressors.error_feedback import Dense
from moshpitd.averaging.compressors.stages import (
    Arrays,
    Compressor,
    Done,
    Job,
    Jobs,
    Operation,
    Run,
    Stage,
    Unsent,
    Wish,
)
from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.vector import Layout

DENSE = "dense"
DENSE_EF14 = "dense:ef14"
ARC = "arc"
ARC_FORM = "arc:RATIO,RANK,FEEDBACK,ETA,WARMUP"


def check_compressor(name: str) -> str:
    """The canonical spelling. Raises InvalidInput that says what there is, or what is wrong."""
    return name if name in (DENSE, DENSE_EF14) else _arc_options(name).name


def compressor_named(name: str, layout: Layout) -> Compressor:
    """A new one, for a session of this layout. Raises InvalidInput as above, and for a layout it can do nothing for."""
    if name in (DENSE, DENSE_EF14):
        return Dense(layout, feedback=name == DENSE_EF14)
    return ArcTopK(layout, _arc_options(name))


def _arc_options(name: str) -> ArcOptions:
    kind, _, rest = name.partition(":")
    if kind != ARC:
        close = difflib.get_close_matches(name, (DENSE, DENSE_EF14, ARC), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidInput(f"unknown compressor {name!r}: there are {DENSE}, {DENSE_EF14}, {ARC}, {ARC_FORM}{hint}")
    given = [part.strip() for part in rest.split(",")] if rest else []
    if len(given) > 5:
        raise InvalidInput(f"compressor {name!r}: at most {ARC_FORM}")
    base = ArcOptions(feedback="ef14", eta=1.0) if given[2:3] == ["ef14"] else ArcOptions()
    defaults = (base.ratio, base.rank, base.feedback, base.eta, base.warmup)
    ratio, rank, feedback, eta, warmup = (*given, *map(str, defaults[len(given) :]))
    try:
        options = ArcOptions(float(ratio), int(rank), feedback, float(eta), int(warmup))
    except ValueError:
        raise InvalidInput(f"compressor {name!r}: all of {ARC_FORM} but FEEDBACK are numbers") from None
    options.check()
    return options


__all__ = [
    "ARC",
    "DENSE",
    "DENSE_EF14",
    "ArcOptions",
    "Arrays",
    "Compressor",
    "Done",
    "Job",
    "Jobs",
    "Operation",
    "Run",
    "Stage",
    "Unsent",
    "Wish",
    "check_compressor",
    "compressor_named",
]

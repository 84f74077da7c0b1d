"""What codecs buy on links of known speed: round times of four peers by codec, beside hivemind's fastest 8-bit codec.

All in the same network namespaces with the same uplinks, taking turns. Ratios are to our own float32 over the same
path. Without shaping the same net shows where coding costs more than it saves.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict

from tests.benchmarks.contest import Sample, Way, contestants, take_turns
from tests.benchmarks.figures import Figure, Goal, Measured
from tests.benchmarks.namespaces import Rate, shaped_net
from tests.benchmarks.rivals import HIVEMIND_8BIT

PEERS = 4
MEGABYTES = 16.0
CODECS = ("float32", "bfloat16", "flash8", "flash4-8", "flash4", "auto")
WAYS = tuple(Way("tcp", codec) for codec in CODECS)
LINKS = (Rate.MBIT_25, Rate.MBIT_100, Rate.GBIT_1, None)
PROMISED = Rate.MBIT_100
FASTER_MIN = {"flash8": 3.5, "flash4-8": 4.7, "flash4": 6.5}
"""Times as fast as float32, at PROMISED."""
FASTER_THAN_RIVAL_MIN = {"flash4": 2.0}
"""Of equally many bits nobody can be twice as fast as one who fills the line: flash8 is told beside it."""
TURNS, ROUNDS, TURNS_QUICK, ROUNDS_QUICK = 3, 2, 1, 2


def measure(*, quick: bool) -> Measured:
    """Raises Unavailable."""
    figures: list[Figure] = []
    details: dict[str, object] = {}
    missing: list[str] = []
    for link in (PROMISED,) if quick else LINKS:
        rivals = (HIVEMIND_8BIT,) if link == PROMISED else ()
        with (
            shaped_net([link] * PEERS) as places,
            contestants(PEERS, WAYS, rivals, places=places) as (contesting, absent),
        ):
            turns, rounds = (TURNS_QUICK, ROUNDS_QUICK) if quick else (TURNS, ROUNDS)
            samples, dropped = take_turns(contesting, MEGABYTES, turns=turns, rounds=rounds)
        missing += absent + dropped
        what = f"{link.mbit} Mbit/s" if link else "not shaped"
        details[what] = {name: [asdict(each) for each in its] for name, its in samples.items()}
        figures += _figures(what, samples, promised=link == PROMISED)
    return Measured(tuple(figures), details, tuple(dict.fromkeys(missing)))


def _figures(what: str, samples: dict[str, list[Sample]], *, promised: bool) -> list[Figure]:
    figures: list[Figure] = []
    seconds = {name: statistics.median(each.data_s for each in its) for name, its in samples.items()}
    ours = {way.codec: seconds[way.name] for way in WAYS if way.name in seconds}
    for codec, median in ours.items():
        note = f"{MEGABYTES:g} MB, median {median:.3f} s"
        target = FASTER_MIN.get(codec) if promised else None
        goal = Goal.AT_LEAST if target else None
        if codec != "float32":
            ratio = ours["float32"] / median
            figures.append(
                Figure("codec_links", f"{what}: {codec}, times faster than float32", ratio, "x", goal, target, note)
            )
        if (theirs := seconds.get(HIVEMIND_8BIT.name)) is not None:
            target = FASTER_THAN_RIVAL_MIN.get(codec)
            name = f"{what}: {codec}, times faster than {HIVEMIND_8BIT.name}"
            goal = Goal.AT_LEAST if target else None
            figures.append(Figure("codec_links", name, theirs / median, "x", goal, target, note))
    figures += [Figure("codec_links", f"{what}: {name}", median, "s") for name, median in seconds.items()]
    return figures

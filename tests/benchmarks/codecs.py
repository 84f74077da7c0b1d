"""The codecs on one core and one chunk: speed, bits and error; beside hivemind's 8-bit codecs on the same values."""

from __future__ import annotations

import dataclasses

from moshpitd.averaging.codecs import codec_named
from moshpitd.cli import codec_bench
from tests.benchmarks.figures import Figure, Goal, Measured
from tests.benchmarks.rivals import Unavailable, measure_hivemind_codecs

SECONDS, SECONDS_QUICK = 1.0, 0.15
GB_S_MIN = {"flash8": (1.5, 4.0), "flash4": (1.5, 4.0), "flash8:32": (1.2, 3.5), "flash4:32": (1.2, 3.5)}
"""Of float32 a second, encoding and decoding."""
RIVAL = "Uniform8BitQuantization"
"""hivemind's fastest 8-bit codec."""


def measure(*, quick: bool) -> Measured:
    """Ours alone, and said so, where hivemind cannot be installed."""
    seconds = SECONDS_QUICK if quick else SECONDS
    ours = codec_bench.measure([codec_named(name) for name in codec_bench.USUAL], seconds=seconds)
    figures: list[Figure] = []
    for each in ours:
        encode_min, decode_min = GB_S_MIN.get(each.codec, (None, None))
        goal = Goal.AT_LEAST if encode_min else None
        name = each.codec if each.half == "both" else f"{each.codec}, {each.half}"
        note = f"{each.normal.bits_per_element:.2f} bits, error {each.normal.relative_error:.2g}"
        figures.append(Figure("codecs", f"{name}: encode", each.encode_gb_s, "GB/s", goal, encode_min, note))
        figures.append(Figure("codecs", f"{name}: decode", each.decode_gb_s, "GB/s", goal, decode_min, note))
    details: dict[str, object] = {"moshpitd": [dataclasses.asdict(each) for each in ours]}
    missing: list[str] = []
    try:
        report = measure_hivemind_codecs(seconds=seconds)
    except Unavailable as error:
        missing.append(f"hivemind: {error}")
    else:
        details["hivemind"] = dataclasses.asdict(report)
        missing += [f"hivemind's {each}" for each in report.missing]
        for theirs in report.codecs:
            note = f"{theirs.bits_per_element:.2f} bits, error {theirs.relative_error:.2g}, hivemind {report.hivemind}"
            figures.append(Figure("codecs", f"hivemind {theirs.codec}: encode", theirs.encode_gb_s, "GB/s", note=note))
            figures.append(Figure("codecs", f"hivemind {theirs.codec}: decode", theirs.decode_gb_s, "GB/s", note=note))
        mine = next(each for each in ours if each.codec == "flash8")
        rival = next(each for each in report.codecs if each.codec == RIVAL)
        times = {
            "encode, times faster": mine.encode_gb_s / rival.encode_gb_s,
            "decode, times faster": mine.decode_gb_s / rival.decode_gb_s,
            "error, times smaller": rival.relative_error / mine.normal.relative_error,
        }
        figures += [
            Figure("codecs", f"flash8 beside hivemind's uniform 8-bit: {name}", ratio, "x")
            for name, ratio in times.items()
        ]
    return Measured(tuple(figures), details, tuple(missing))

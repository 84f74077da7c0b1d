"""Codecs by their names.

    float32, float16, bfloat16                                       as they are, or cast
    flash<bits>[-<all-gather bits>][:<group>][+spikes][+anchored]    block-wise integers: flash8, flash4-8,
                                                                     flash3:32+spikes; of differences: flash4+anchored

`codec_named(...).name` is the canonical spelling: without what is the default, suffixes in this order.
"""

from __future__ import annotations

import difflib
import itertools
import re

from moshpitd.averaging.codecs.cast import Cast
from moshpitd.averaging.codecs.codec import Codec
from moshpitd.averaging.codecs.flash import GROUPS, Flash
from moshpitd.averaging.codecs.planes import WIDTHS
from moshpitd.averaging.errors import InvalidInput

_PRECISIONS = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7}
_CASTS = {name: Codec(name, Cast(name), Cast(name), precision) for name, precision in _PRECISIONS.items()}
_FLASH = re.compile(r"flash([2-8])(?:-([2-8]))?(?::([1-9][0-9]{0,8}))?((?:\+spikes|\+anchored){0,2})")
_SUFFIXES = ("+spikes", "+anchored")


def codec_named(name: str) -> Codec:
    """Raises InvalidInput that lists what there is."""
    if name in _CASTS:
        return _CASTS[name]
    parts = _FLASH.fullmatch(name)
    if parts and all(parts[4].count(suffix) <= 1 for suffix in _SUFFIXES):
        wished = int(parts[3] or GROUPS[0])
        group = min(GROUPS, key=lambda there: abs(there - wished))
        codec = _flash(int(parts[1]), int(parts[2] or parts[1]), group, *(suffix in parts[4] for suffix in _SUFFIXES))
        if group == wished:
            return codec
        close = [codec.name]
    else:
        every = itertools.product(WIDTHS, WIDTHS, GROUPS, (False, True), (False, True))
        flashes = (_flash(*parts).name for parts in every)
        close = difflib.get_close_matches(name[:40], [*_CASTS, *flashes], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InvalidInput(
        f"unknown codec {name[:40]!r}: there are {', '.join(_CASTS)} and "
        f"flash<bits>[-<all-gather bits>][:<group>][+spikes][+anchored] with 2 to 8 bits and groups of "
        f"{' or '.join(map(str, GROUPS))}, such as flash8 or flash4-8{hint}"
    )


def _flash(bits: int, average_bits: int, group: int, spikes: bool, anchored: bool) -> Codec:
    name = f"flash{bits}"
    if average_bits != bits:
        name += f"-{average_bits}"
    if group != GROUPS[0]:
        name += f":{group}"
    if spikes:
        name += "+spikes"
    if anchored:
        name += "+anchored"
    # Half a step of the range, which is twice the largest magnitude; a little more for what float16 rounds.
    precision = sum(1.01 / ((1 << width) - 1) for width in (bits, average_bits))
    return Codec(name, Flash(bits, group, spikes), Flash(average_bits, group, spikes), precision, anchored)

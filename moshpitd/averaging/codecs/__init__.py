"""Chunk <-> bytes. A codec is chosen by name; members of a group all use the same one (it is one of the terms)."""

from __future__ import annotations

import difflib

from moshpitd.averaging.codecs.cast import Cast
from moshpitd.averaging.codecs.codec import Codec
from moshpitd.averaging.errors import InvalidInput

_CODECS: dict[str, Codec] = {codec.name: codec for codec in (Cast("float32"), Cast("float16"), Cast("bfloat16"))}


def codec_named(name: str) -> Codec:
    """Raises InvalidInput that lists what there is."""
    codec = _CODECS.get(name)
    if codec is None:
        close = difflib.get_close_matches(name, _CODECS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidInput(f"unknown codec {name!r}: there are {', '.join(_CODECS)}{hint}")
    return codec


__all__ = ["Codec", "codec_named"]

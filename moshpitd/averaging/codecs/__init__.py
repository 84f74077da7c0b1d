"""Chunk <-> bytes. What a session names as its codec is one of the terms, so members of a group all use the same:
a codec by its name (names.py), a choice by tensor (rules.py), or `auto`, which the group's leader decides (auto.py).
`INTEGERS`, which nobody chooses, is for sums.
"""

from __future__ import annotations

from moshpitd.averaging.codecs.auto import AUTO, CHOICES, Choice, choose
from moshpitd.averaging.codecs.codec import Codec, VectorCodec
from moshpitd.averaging.codecs.coding import Coding
from moshpitd.averaging.codecs.integers import INTEGERS
from moshpitd.averaging.codecs.names import codec_named
from moshpitd.averaging.codecs.rules import Rules, rules_of

__all__ = [
    "AUTO",
    "CHOICES",
    "INTEGERS",
    "Choice",
    "Codec",
    "Coding",
    "Rules",
    "VectorCodec",
    "choose",
    "codec_named",
    "rules_of",
]

"""Sums that come out alike everywhere: a sketch as integers, and words that tell whether all mean the same.

Knows how numbers become integers under one scale, and what N peers can find out about one another from a sum alone.
Does not know what is sketched, nor how sums are made.

Floats do not add up to the same bits in every order; integers do. A peer multiplies its weighted sketch by 2^exponent,
rounds, and holds the integer in a float64, which is exact below 2^53. At most 2^38 a peer and 2^14 peers: no sum of any
of them, in whatever order and over however many axes, reaches 2^53, so none is ever rounded. The sketch only ranks
rows; a common divisor changes no ranking, so nothing is divided at all.

The exponent must be the same at all peers. Each adds, in the words beside its sketch, the magnitude that it found; the
mean magnitude gives the exponent of the next averaging, at everybody alike, also at one that was new in this one. Who
holds other things than the rest (another exponent, another history) is found by the words too: of N integers h with sum
S and sum of squares Q, N*Q == S*S exactly when all are equal.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

OWN_MAX = 2.0**38
"""Of one peer's integers."""
PEERS_MAX = 1 << 14
MAGNITUDE_BITS = 24
"""A usual peer's largest value takes so many bits: as fine as float32, and 2^14 times larger still fits."""
EXPONENT_MAX = 900
NAMES = 4
"""16 bits each: what a peer holds, as a hash."""
WORDS = 5 + 2 * NAMES

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Standing:
    """What one peer says of itself in its words."""

    holds: bytes | None
    """Hash of what all must have in common; None: nothing yet, its sketch is left out."""
    magnitude: int | None
    """Binary exponent of its largest weighted value; None when all are 0."""
    wants_dense: bool
    """Its sketch does not fit, or its state demands a dense stage."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """What the sum of all words says."""

    peers: int
    holders: int
    """Peers that hold something."""
    agreed: bool
    """They hold the same, and are at least half."""
    wants_dense: bool
    next_exponent: int | None
    """None: nobody had anything but zeros."""


def quantised(values: npt.NDArray[np.floating], exponent: int) -> tuple[Array, bool]:
    """Integers values * 2^exponent, and whether all fit; those that do not are 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.rint(np.ldexp(values.astype(np.float64), exponent))
        fits = np.abs(scaled) <= OWN_MAX
    if fits.all():
        return scaled, True
    return np.where(fits, scaled, 0.0), False


def magnitude_of(largest: float) -> int | None:
    """The binary exponent of a peer's largest value."""
    return max(-EXPONENT_MAX, min(EXPONENT_MAX, math.frexp(largest)[1])) if 0 < largest < math.inf else None


def words_of(standing: Standing) -> Array:
    """What this peer adds to the sum."""
    words = np.zeros(WORDS)
    words[0] = 1
    words[1] = standing.wants_dense
    if standing.magnitude is not None:
        words[2], words[3] = 1, standing.magnitude
    if standing.holds is not None:
        words[4] = 1
        names = np.frombuffer(hashlib.sha256(standing.holds).digest()[: 2 * NAMES], ">u2").astype(np.float64)
        words[5 : 5 + NAMES], words[5 + NAMES :] = names, names * names
    return words


def read_words(total: Array) -> Assembly:
    """What the sum of everybody's words says, to all alike."""
    peers, dense, sized, magnitudes, holders = (int(word) for word in total[:5])
    sums = [int(word) for word in total[5 : 5 + NAMES]]
    squares = [int(word) for word in total[5 + NAMES :]]
    same = all(holders * square == s * s for s, square in zip(sums, squares, strict=True))
    return Assembly(
        peers=peers,
        holders=holders,
        agreed=same and 2 * holders >= peers,
        wants_dense=dense > 0 or peers > PEERS_MAX,
        next_exponent=MAGNITUDE_BITS - magnitudes // sized if sized else None,
    )

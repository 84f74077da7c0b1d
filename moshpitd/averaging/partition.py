"""How a vector is cut: spans, by what each member's link can carry, and spans into chunks.

Pure arithmetic, the same at every member because spans travel in Begin and the rest follows from them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moshpitd.averaging.messages import Member
from moshpitd.averaging.names import Rank
from moshpitd.averaging.vector import DTYPES, Layout

ALIGNMENT = 4096
"""Spans and chunks start at multiples of this many elements of their segment."""
NOISE_FACTOR = 1.4
"""Measured rates count as up to so many times nearer to the group's median. Equal links are measured with some noise,
and water-filling amplifies it: rates that vary by 20 % make rounds of 4 members 22 % longer than equal spans would, of
16 members 41 %; drawn together, 1 % and 6 %. The price is paid by one truly slower link of 4: at worst, 1.6 times
slower, it makes the round 1.31 times as long as it could be, from 3 times on less than 1.17, at 10 times nothing."""
CHUNK_BYTES_MAX = 4 << 20
"""As much as any daemon takes at once."""
CHUNK_S = 0.01
CHUNKS_A_SPAN = 3
CHUNK_FACTOR_MAX = 4
RATIO_MAX = 1e6
"""Rates come from outside: no ratio of them may overflow."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One chunk of the vector: elements [start, stop) of one dtype, reduced by `reducer` unless a view differs."""

    index: int
    start: int
    stop: int
    dtype: str
    reducer: Rank

    @property
    def byte_size(self) -> int:
        return (self.stop - self.start) * DTYPES[self.dtype].itemsize


def fractions_by_rate(rates: Sequence[float]) -> list[float]:
    """Which share of the vector each of n members should reduce, so that the slowest link is done earliest.

    A member with share f moves 1 + (n-2)f vectors each way: its own contribution without its span, and its averages to
    the others. So (1 + (n-2) f_i) / b_i <= xi, with equality where f_i > 0: f_i = max(0, (xi*b_i - 1) / (n-2)), and
    sum f_i = 1 gives xi over the m fastest. Rate 0 means not allowed to hold a span. A member without weight sends no
    contribution, but receives what the others do, so that the slower of its directions is all the same bounded by this.
    """
    n = len(rates)
    able = sorted((rate for rate in rates if rate > 0), reverse=True)
    assert able, "somebody must be able to reduce"
    if n <= 2:
        return [1 / len(able) if rate > 0 else 0.0 for rate in rates]
    xi = (n - 2 + 1) / able[0]
    for m in range(2, len(able) + 1):
        candidate = (n - 2 + m) / sum(able[:m])
        if candidate * able[m - 1] < 1:
            break
        xi = candidate
    return [max(0.0, (xi * rate - 1) / (n - 2)) if rate > 0 else 0.0 for rate in rates]


def spans_of(layout: Layout, members: Sequence[Member]) -> tuple[int, ...]:
    """Element boundaries, one more than members: rank r reduces [b[r], b[r+1]). Those nobody can dial hold none.

    Boundaries are aligned inside their segment.
    """
    rates = relative_rates(members)
    boundaries = [0]
    reached = 0.0
    for fraction in fractions_by_rate(rates)[:-1]:
        reached += fraction
        boundaries.append(max(boundaries[-1], _aligned(layout, min(1.0, reached) * layout.elements)))
    last = max(rank for rank, rate in enumerate(rates) if rate > 0)
    boundaries = [layout.elements if rank > last else edge for rank, edge in enumerate(boundaries)]
    return (*boundaries, layout.elements)


def equal_spans(layout: Layout, members: Sequence[Member]) -> tuple[int, ...]:
    """Like `spans_of`, but whatever lines carry: who owns what does not change with a measurement."""
    able = sum(member.dialable for member in members)
    assert able, "somebody must be able to reduce"
    boundaries, reached = [0], 0
    for member in members:
        reached += member.dialable
        edge = layout.elements if reached == able else _aligned(layout, reached / able * layout.elements)
        boundaries.append(max(boundaries[-1], edge))
    return tuple(boundaries)


def relative_rates(members: Sequence[Member]) -> list[float]:
    """What each member's slower direction carries, in multiples of the median, and drawn towards it by NOISE_FACTOR.
    Unknown counts as 1; 0 for those that nobody can dial."""
    rates = [known_rate(member) for member in members]
    usual = statistics.median([rate for rate in rates if rate] or [1.0])
    return [_less_noise((rate or usual) / usual) if m.dialable else 0.0 for rate, m in zip(rates, members, strict=True)]


def known_rate(member: Member) -> float:
    """Of its slower direction, as far as they are known; 0: neither is."""
    return min((rate for rate in (member.up_bytes_s, member.down_bytes_s) if rate > 0), default=0.0)


def _less_noise(ratio: float) -> float:
    within = min(max(ratio, 1 / RATIO_MAX), RATIO_MAX)
    return max(1.0, within / NOISE_FACTOR) if within > 1 else min(1.0, within * NOISE_FACTOR)


def _aligned(layout: Layout, position: float) -> int:
    """The nearest multiple of ALIGNMENT from the start of the segment that holds the position."""
    for segment in layout.segments:
        if position <= segment.stop:
            offset = round((position - segment.start) / ALIGNMENT) * ALIGNMENT
            return min(segment.start + offset, segment.stop)
    return layout.elements


def chunk_bytes_of(layout: Layout, members: Sequence[Member], usual: int) -> int:
    """How many bytes of values go over the wire at once: `usual`, or twice or four times as many where every line
    carries them in CHUNK_S and every span still has CHUNKS_A_SPAN, so that sending, reducing and receiving overlap.

    What a chunk costs apart from its bytes is a quarter of a round's time on a fast network, and nothing on a slow one.
    """
    wanted = min(
        CHUNK_S * min(known_rate(member) for member in members),
        layout.byte_size / (CHUNKS_A_SPAN * sum(member.dialable for member in members)),
    )
    size = usual
    while size < CHUNK_FACTOR_MAX * usual and 2 * size <= min(wanted, CHUNK_BYTES_MAX):
        size *= 2
    return size


def pieces_of(layout: Layout, spans: Sequence[int], chunk_bytes: int) -> tuple[Piece, ...]:
    """The chunks of all spans in the order of the vector; none crosses a span or a segment."""
    pieces: list[Piece] = []
    for rank in range(len(spans) - 1):
        for segment in layout.segments:
            step = max(ALIGNMENT, chunk_bytes // DTYPES[segment.dtype].itemsize // ALIGNMENT * ALIGNMENT)
            start, stop = max(spans[rank], segment.start), min(spans[rank + 1], segment.stop)
            while start < stop:
                aligned = segment.start + ((start - segment.start) // ALIGNMENT) * ALIGNMENT + step
                end = min(aligned, stop)
                pieces.append(Piece(len(pieces), start, end, segment.dtype, Rank(rank)))
                start = end
    return tuple(pieces)

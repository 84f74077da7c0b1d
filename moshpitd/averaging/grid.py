"""The grid: terms, plans, cells, axes, keys, and the planner.

Knows how N sessions are laid out so that every cell is held and no group is too large, and how everybody computes the
same answer from the same plan. Does not know who is alive, what time it is, or how a plan travels.

Moshpit All-Reduce (Ryabinin et al., arXiv 2103.03239): peers that share all coordinates but one average together; the
axis moves with the round; with every cell held the mean is exact after as many rounds as there are axes. A cell held by
two does not break this when each carries its share of the cell's weight (`carried_weight`); a hole does. So a plan has
no more cells than sessions.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache, partial

from moshpitd.averaging.names import Key, PeerId, digest, key

Cell = tuple[int, ...]
"""A peer's place on the grid: one coordinate an axis."""

PROTOCOL_VERSION = 1
IN_STEP = "synchronous"
"""The way of averaging in which peers wait for each other."""
PLAN_VERSION_MAX = 1 << 31
WEIGHT_MAX = 1e30
"""Of a trainer. Sums of weights stay finite."""
CARRIED_WEIGHT_MAX = 1e3 * WEIGHT_MAX
AXES_MAX = 12
UNDECIDED = "not said yet"
"""The normalise of a session that meets nobody yet. Its lease has no terms, and differs from nobody's."""
OVERFULL = 1.25
"""A group with doubled cells may pass the size limit by this factor."""
FIRST_K_LEAD = 2
"""A new plan begins this many averagings after the current one, so that everybody has heard of it."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What two sessions must have in common to average. Their digest is in every lease and every grid key."""

    layout: bytes
    """Digest of the layout."""
    rounds: int
    """Rounds an averaging; 0 = as many as the plan has axes."""
    codec: str = "float32"
    compressor: str = "dense"
    normalise: str = "weights"
    transport: str = "reliable"
    protocol: int = PROTOCOL_VERSION
    averaging: str = IN_STEP
    """Whether peers wait for each other, and if not, how they do without."""

    @property
    def digest(self) -> bytes:
        # What came later is left out while it says nothing: who does not know of it still meets the others.
        told = [getattr(self, f.name) for f in fields(self)[1:] if f.name != "averaging" or self.averaging != IN_STEP]
        return digest("terms", self.layout, *map(str, told))

    def first_difference(self, other: Terms) -> str | None:
        """In words, the first term in which the other differs; the layout comes first."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return "the layout differs" if field.name == "layout" else f"{field.name} {mine!r} against {theirs!r}"
        return None


@dataclass(frozen=True)
class Plan:
    """A grid for a roster, from averaging `first_k` on. `signer` decided it."""

    version: int
    sides: tuple[int, ...]
    terms: bytes
    """Digest of the terms."""
    first_k: int
    roster: tuple[PeerId, ...]
    """The sessions it was made for, sorted."""
    signer: PeerId

    @cached_property
    def body(self) -> bytes:
        """What the signature covers."""
        return digest(
            "plan", self.version, self.grid, self.terms, self.first_k, roster_digest(self.roster), self.signer
        )

    @property
    def digest(self) -> bytes:
        return self.body

    @property
    def grid(self) -> str:
        return format_sides(self.sides)

    @cached_property
    def precedence(self) -> tuple[int, bytes]:
        """Of two plans the larger one counts."""
        return self.version, digest("signer", self.signer)

    @cached_property
    def cells(self) -> Mapping[PeerId, Cell]:
        """The cells of the roster: by position in the order of hash(plan digest, peer id)."""
        order = sorted(self.roster, key=lambda peer: digest(self.digest, peer))
        return dict(zip(order, cells_of(self.sides, len(order)), strict=True))

    @cached_property
    def lines(self) -> Mapping[tuple[int, Cell], tuple[PeerId, ...]]:
        """The roster by line: (axis, the coordinates on the other axes)."""
        lines: dict[tuple[int, Cell], list[PeerId]] = {}
        for peer, cell in self.cells.items():
            for axis in range(len(self.sides)):
                lines.setdefault((axis, line_of(cell, axis)), []).append(peer)
        return {line: tuple(peers) for line, peers in lines.items()}

    def axis(self, k: int, j: int, rounds: int) -> int:
        """Every stage of an averaging has `rounds` round numbers and goes along the same axes."""
        return (k * rounds + j % rounds) % len(self.sides)

    def is_well_formed(self) -> bool:
        """Whether a plan from outside can be meant seriously."""
        return (
            1 <= len(self.sides) <= AXES_MAX
            and all(side >= 1 for side in self.sides)
            and 1 <= math.prod(self.sides) <= len(self.roster)
            and 1 <= self.version <= PLAN_VERSION_MAX
            and self.first_k >= 0
            and list(self.roster) == sorted(set(self.roster))
        )


def roster_digest(roster: Sequence[PeerId]) -> bytes:
    return digest("roster", *roster)


def line_of(cell: Cell, axis: int) -> Cell:
    """A cell's coordinates without the axis': what the members of a line share."""
    return cell[:axis] + cell[axis + 1 :]


def session_key(swarm: bytes, name: str) -> Key:
    """Where all sessions of a swarm with this name announce themselves, whatever their terms."""
    return key("sessions", swarm, name)


def grid_key(swarm: bytes, terms: bytes, plan: Plan, *, k: int, j: int, axis: int, cell: Cell) -> Key:
    """Where the members of a cell's line announce themselves for round (k, j)."""
    return key("grid", swarm, terms, plan.digest, k, j, axis, *line_of(cell, axis))


@lru_cache(maxsize=1 << 14)
def leadership(grid_key: Key, peer: PeerId) -> bytes:
    """Candidates are ordered by this; the smallest live one leads."""
    return digest("leader", grid_key, peer)


@lru_cache(maxsize=1 << 14)
def _turn(version: int, peer: PeerId) -> bytes:
    return digest("decider", version, peer)


def decider(version: int, live: Iterable[PeerId]) -> PeerId:
    """Who makes the plan of this version."""
    return min(live, key=partial(_turn, version))


def carried_weight(weights: Sequence[float], coordinates: Sequence[int], rank: int) -> float:
    """The weight a member takes into the next round: W / (c * m).

    W is the group's weight, c the number of distinct coordinates, m the number of members that share this one's.
    Equals the mean weight on a line without doubles and conserves the swarm's sum of w*x.
    """
    sharing = Counter(coordinates)
    return math.fsum(weights) / (len(sharing) * sharing[coordinates[rank]])


# ---- the planner


def group_size_allowed(sides: tuple[int, ...], limit: int) -> int:
    """How large a group may grow under these sides before a new plan is due."""
    return limit if len(sides) == 1 else math.floor(limit * OVERFULL)


@lru_cache(maxsize=256)
def choose_sides(sessions: int, limit: int) -> tuple[int, ...]:
    """The grid for so many sessions: fewest axes, then the smallest largest group, then the most cells.

    One flat group while all fit. Where the limit cannot be kept (three sessions, groups of two) it is passed by as
    little as possible: exactness comes before size.
    """
    assert sessions >= 1
    assert limit >= 2
    if sessions <= limit:
        return (sessions,)
    fallback: tuple[tuple[int, int, int], tuple[int, ...]] = ((sessions, 1, -sessions), (sessions,))
    for axes in range(2, AXES_MAX + 1):
        best: tuple[tuple[int, int, int], tuple[int, ...]] | None = None
        for sides in itertools.combinations_with_replacement(range(2, min(limit, sessions) + 1), axes):
            cells = math.prod(sides)
            if not sessions / 2 <= cells <= sessions:
                continue
            largest = max(math.ceil(sessions * side / cells) for side in sides)
            rank = (largest, axes, -cells)
            fallback = min(fallback, (rank, sides))
            if largest <= group_size_allowed(sides, limit) and (best is None or (rank, sides) < best):
                best = (rank, sides)
        if best is not None:
            return best[1]
        if 2**axes > sessions:
            break
    return fallback[1]


@lru_cache(maxsize=64)
def cells_of(sides: tuple[int, ...], sessions: int) -> tuple[Cell, ...]:
    """A cell for each position of a roster: every cell once, then diagonal by diagonal once more.

    A diagonal (coordinates that add up to the same number modulo the longest side) meets no line twice and every
    longest line once. So no group is larger than ceil(sessions * longest side / cells), as the planner reckons; one
    after the other where the lines are emptiest can end above it (119 sessions on 4x5x5).
    """
    every = list(itertools.product(*(range(side) for side in sides)))
    diagonals = sorted(every, key=lambda cell: (sum(cell) % max(sides), cell))
    return tuple(itertools.islice(itertools.chain(every, itertools.cycle(diagonals)), sessions))


class Loads:
    """How many sessions hold each cell and stand on each line."""

    def __init__(self, sides: tuple[int, ...], cells: Iterable[Cell]) -> None:
        self._sides = sides
        self._every = list(itertools.product(*(range(side) for side in sides)))
        self._cells: Counter[Cell] = Counter()
        self._lines: Counter[tuple[int, Cell]] = Counter()
        for cell in cells:
            self.add(cell)

    def add(self, cell: Cell) -> None:
        self._cells[cell] += 1
        for axis in range(len(self._sides)):
            self._lines[axis, line_of(cell, axis)] += 1

    def holders(self, cell: Cell) -> int:
        return self._cells[cell]

    def emptiest(self, salt: bytes) -> Cell:
        """Where the next one should stand: an empty cell, else the emptiest lines.

        `salt` breaks ties, so that joiners who come at once do not all choose the same cell.
        """

        def burden(cell: Cell) -> tuple[int, int, int, bytes | Cell]:
            lines = [self._lines[axis, line_of(cell, axis)] for axis in range(len(self._sides))]
            return self._cells[cell], max(lines), sum(lines), digest(salt, *cell) if salt else cell

        return min(self._every, key=burden)

    def empty_cells(self) -> int:
        return sum(1 for cell in self._every if self._cells[cell] == 0)

    def largest_group(self) -> int:
        return max(self._lines.values(), default=0)


def new_plan_due(plan: Plan, held: Iterable[Cell], limit: int, *, pinned: bool) -> bool:
    """Whether the swarm outgrew its plan: a cell stands empty, or a group passes the limit.

    A flat group stays exact with empty places, and a pinned grid is the user's word: neither is replaced for holes.
    """
    if pinned:
        return False
    loads = Loads(plan.sides, held)
    overfull = loads.largest_group() > group_size_allowed(plan.sides, limit)
    return overfull or (len(plan.sides) > 1 and loads.empty_cells() > 0)


def parse_sides(text: str) -> tuple[int, ...]:
    """ "2x4" -> (2, 4). Raises ValueError that says what a grid looks like."""
    try:
        sides = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        sides = ()
    if not 1 <= len(sides) <= AXES_MAX or any(not 1 <= side <= 4096 for side in sides):
        raise ValueError(f"{text!r} is not a grid: write auto, or sides like 8, 4x4 or 2x3x4")
    return sides


def format_sides(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))

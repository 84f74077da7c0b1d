"""The cohort: who takes part between two barriers, where each stands, and who is out.

Knows members, cells on a grid of sides S, the line of each version, and suspects. Fixed when a barrier has committed:
matchmaking is waiting, so nothing is looked for until the next one. A suspicion is final here: who is out of a cohort
stays out of it, and comes back by the next barrier. Does not know versions under way, models or the trainer.

A member's cell is its rank in the barrier's group, written in the mixed radix of the sides. Version v averages along
axis v mod d. Where the sides' product is the number of members, the mean over punctual members is exact after d
versions; where no product fits, some lines are shorter, and a sum counts those that are in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations_with_replacement

from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.grid import AXES_MAX, Cell, line_of
from moshpitd.averaging.messages import Group, Member
from moshpitd.averaging.names import GroupId, Key, PeerId, Rank, digest
from moshpitd.averaging.partition import spans_of
from moshpitd.averaging.vector import Layout

COHORT_MAX = 64
"""Members of a barrier: one flat group, so that all of them commit the same bits or none does."""
BARRIER_EVERY_MAX = 1024


@dataclass(frozen=True, slots=True)
class WaitAvoidance:
    """How a session averages without waiting for anybody."""

    group_size: int
    """S: how many models a version adds up. Larger mixes faster and costs more bytes; never more than the cohort."""
    barrier_every: int
    """tau: every so many versions everybody waits for everybody. It bounds how old a model in a sum can be."""
    lockstep: bool = False
    """Each call is the next version, also a late one: between barriers all trainers make the same number of steps.
    Without it a late trainer goes on from where the others are."""

    def check(self, *, min_peers: int, rounds: int = 0, compressor: str = "dense") -> None:
        """Raises InvalidInput that names what is wrong."""
        if not 2 <= self.group_size <= COHORT_MAX:
            raise InvalidInput(f"group size {self.group_size}: a version adds up 2 to {COHORT_MAX} models")
        if not 1 <= self.barrier_every <= BARRIER_EVERY_MAX:
            raise InvalidInput(f"barrier every {self.barrier_every}: must be 1 to {BARRIER_EVERY_MAX} versions")
        if min_peers > COHORT_MAX:
            raise InvalidInput(f"min_peers {min_peers}: barriers of a wait-avoiding session take {COHORT_MAX} peers")
        if self.group_size > min_peers:
            raise InvalidInput(
                f"group size {self.group_size} is larger than the first cohort may be, min_peers {min_peers}: "
                "give as min_peers how many peers the first barrier needs, and a group size of at most that"
            )
        if rounds not in (0, 1):
            raise InvalidInput(f"rounds {rounds}: a version of a wait-avoiding session is one round along one axis")
        if compressor != "dense":
            raise InvalidInput(
                f"compressor {compressor!r} in a wait-avoiding session: it sums models of different ages, and error "
                "feedback needs gradients of one step; use a codec to send fewer bytes"
            )

    @property
    def term(self) -> str:
        """What two sessions must have in common."""
        lockstep = ", lockstep" if self.lockstep else ""
        return f"wait-avoiding, groups of {self.group_size}, barrier every {self.barrier_every}{lockstep}"


@dataclass(frozen=True, slots=True)
class CohortConfig:
    """The daemon's side of wait avoidance."""

    punctual_share: float = 0.25
    """A daemon that hears of a version holds its old model back for this share of its trainer's usual step, if the
    trainer is about to post: else nobody but the first would ever be fresh. 0: never, as in the paper. Eight
    punctual trainers on two busy cores: with 0.1 a third of their calls were fresh, with 0.25 nine of ten."""
    punctual_max_s: float = 0.05
    """... and never longer than this: the others wait meanwhile."""
    version_budget_s: float = 600.0
    """A version that takes longer is given up. Members that do not move are found out within seconds."""
    trainer_patience_s: float = 20.0
    """A barrier waits so long for a trainer that does not call while its daemon lives."""
    trainer_patience_factor: float = 4.0
    """... but not less than this many times its longest step of late."""


@dataclass(frozen=True, slots=True)
class CohortStatus:
    """What a wait-avoiding session says of its cohort."""

    cohort: bytes
    """Its id; empty while there is none."""
    members: int
    live: int
    version: int
    """The newest that ended here."""
    barrier: int
    """The version of the next barrier."""
    staleness_max: int
    """Of any model in any sum so far."""
    counts: dict[str, int] = field(default_factory=dict)
    """barrier, fresh, merge, alone: calls that ended so; passive: versions run without the trainer; skipped: versions
    our trainer takes no part in any more; activations: versions begun by our trainer."""


class Cohort:
    """The members of one barrier until the next. `me` is one of them."""

    def __init__(
        self, cohort_id: GroupId, group: Group, members: tuple[Member, ...], me: PeerId, group_size: int
    ) -> None:
        """`group`: the barrier's, `members`: those of it who committed, by rank."""
        self.id = cohort_id
        self.k = group.k
        self.members = members
        self.sides = cohort_sides(len(self.members), group_size)
        self.outcasts: dict[PeerId, str] = {}
        self._me = me
        self._token = group.token
        self._key = group.key
        self._ranks = {member.peer: Rank(rank) for rank, member in enumerate(self.members)}
        self.rank = self._ranks[me]
        cells = [self.cell(rank) for rank in range(len(self.members))]
        self._lines = tuple(
            tuple(Rank(r) for r, cell in enumerate(cells) if line_of(cell, axis) == line_of(cells[self.rank], axis))
            for axis in range(len(self.sides))
        )

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._ranks

    @property
    def live(self) -> list[Member]:
        return [member for member in self.members if member.peer not in self.outcasts]

    def cast_out(self, peer: PeerId, why: str) -> bool:
        """For good. False when it is known, or was never in."""
        if peer not in self._ranks or peer in self.outcasts:
            return False
        self.outcasts[peer] = why
        return True

    def neighbours(self) -> Iterator[Member]:
        """Whom we pass word to: those 1, 2, 4, ... places after us among the live. If everybody does so, all have it
        after log P hops, and every one from several sides."""
        ring = [member for member in self.members if member.peer not in self.outcasts or member.peer == self._me]
        at = next(place for place, member in enumerate(ring) if member.peer == self._me)
        step = 1
        while step < len(ring):
            yield ring[(at + step) % len(ring)]
            step *= 2

    def cell(self, rank: int) -> Cell:
        cell = []
        for side in self.sides:
            rank, coordinate = divmod(rank, side)
            cell.append(coordinate)
        return tuple(cell)

    def line(self, version: int) -> tuple[Rank, ...]:
        """Those who add up their models in this version, outcasts included: all compute the same."""
        return self._lines[version % len(self.sides)]

    def group_id(self, version: int) -> GroupId:
        return GroupId(digest("version", self.id, version, *self.line(version))[:16])

    def group(self, version: int, layout: Layout, *, chunk_bytes: int, budget_s: float) -> Group | None:
        """The group of a version without any matchmaking; None when nobody else of our line can be talked to."""
        line, axis = self.line(version), version % len(self.sides)
        members = tuple(replace(self.members[rank], coordinate=self.cell(rank)[axis], weight=1.0) for rank in line)
        others = [member for member in members if member.peer != self._me and member.peer not in self.outcasts]
        mine = next(member for member in members if member.peer == self._me)
        if not any(member.dialable or mine.dialable for member in others):
            return None
        return Group(
            group_id=self.group_id(version),
            token=digest("token", self._token, version)[:16],
            key=Key(self._key),
            k=version,
            j=0,
            axis=axis,
            leader=members[0].peer,
            members=members,
            spans=spans_of(layout, members),
            chunk_bytes=chunk_bytes,
            budget_s=budget_s,
            absent=(),
            arrival_offsets_s=(),
        )


@lru_cache(maxsize=256)
def cohort_sides(peers: int, group_size: int) -> tuple[int, ...]:
    """The sides of a cohort's grid: fewest axes, fewest empty cells, then the largest groups; the last is the smallest.

    12 in groups of 4 make 4x3, 6 make 3x2, 7 make 4x2 with one cell empty.
    """
    axes = 1
    while group_size**axes < peers:
        axes += 1
    assert axes <= AXES_MAX
    sides = range(1 if axes == 1 else 2, min(group_size, peers) + 1)
    fitting = (each for each in combinations_with_replacement(sides, axes) if math.prod(each) >= peers)
    best = min(fitting, key=lambda each: (math.prod(each), [-side for side in reversed(each)]))
    return best[::-1]

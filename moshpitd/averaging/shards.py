"""Owners that stay: gradients in, the mean of one's own shard out; one's shard of the parameters in, all shards out.

Knows the two halves, who owns what, and who takes part in a call. Does not know who is alive or waited for (matchmaking
does), rounds, packets or the clock. Every member of a group computes the same from the standings in it: nothing is
agreed on by messages, and no shard depends on a measurement.

A reduce_scatter makes equal shards for its members, in the order of their peer ids: as long as the same ones come they
stay the same. Who was expected and did not come is waited for, then the call fails for all and names it; who is dead,
or was missed twice, is no longer expected, and the next reduce_scatter makes shards without it.

| standing  | means                                                  | may call                                       |
|-----------|--------------------------------------------------------|------------------------------------------------|
| NEW       | `through` 0: it has not what the owners hold           | broadcast_shard: it receives. Where all are    |
|           |                                                        | new: anything, there is nothing to be missed   |
| CURRENT   | it was in all that the owners did so far               | either, like all the others                    |
| BEHIND    | the owners went on without it; what it owned is theirs | nothing: ShardsChanged, and it is NEW again    |

So nobody owns what it has not received, and an owner that stood still brings no old values back. New ones that call the
other half than the owners are put off to their next call. In a broadcast_shard nobody may be left who owns some part:
then the owner next to it gives its own values of it, so that all still hold the same, and the receipt says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from moshpitd.averaging.errors import InvalidInput, NoGroup, Precondition, ShardsChanged
from moshpitd.averaging.lossy_reduce import Part
from moshpitd.averaging.messages import Group, Member, Standing
from moshpitd.averaging.names import PeerId, digest, short
from moshpitd.averaging.partition import equal_spans
from moshpitd.averaging.receipt import ShardLine
from moshpitd.averaging.unbiased import Form
from moshpitd.averaging.vector import Layout

SHARDS_MAX = 64
"""Members of a group: one flat one, so that all owners hear of all."""
CALLS_A_STEP = 2
VERSION_BYTES = 8
NAMED_MAX = 4


class Half(Enum):
    """What a trainer calls for."""

    REDUCE_SCATTER = "reduce_scatter"
    BROADCAST_SHARD = "broadcast_shard"

    @property
    def part(self) -> Part:
        return Part.SCATTER if self is Half.REDUCE_SCATTER else Part.GATHER


@dataclass(frozen=True, slots=True)
class Sharding:
    """That a session has shards, and how means are estimated in it."""

    form: Form = Form.DIFFERENCE

    def check(self, *, min_peers: int, rounds: int, compressor: str, joining: str) -> None:
        """Raises InvalidInput that names what is wrong."""
        if min_peers > SHARDS_MAX:
            raise InvalidInput(f"min_peers {min_peers}: a session with shards takes {SHARDS_MAX} peers")
        if rounds not in (0, 1):
            raise InvalidInput(f"rounds {rounds} in a session with shards: each of its calls is one, of all peers")
        if compressor != "dense":
            raise InvalidInput(
                f"compressor {compressor!r} in a session with shards: owners need all of their shard each time; use a "
                "codec to send fewer bytes"
            )
        if joining != "receive":
            raise InvalidInput(
                f"joining {joining!r} in a session with shards: a newcomer calls broadcast_shard first and receives; "
                "leave it out"
            )

    @property
    def term(self) -> str:
        """What two sessions must have in common."""
        return "shards" if self.form is Form.DIFFERENCE else f"shards, {self.form.value}"

    def __str__(self) -> str:
        return self.term


@dataclass(frozen=True, slots=True)
class Muster:
    """Who takes part in a call, and how."""

    group: Group
    """Of them: by peer id, with the spans of this call."""
    half: Half
    makes_shards: bool
    """These spans are the shards from here on."""
    receives: bool
    """We are new: we get what the owners hold, and own nothing."""
    why: str
    """Which parts have lost their owner, in words."""


class Shards:
    """Of one trainer."""

    def __init__(self, me: PeerId, layout: Layout) -> None:
        self.shard: ShardLine | None = None
        """What we own."""
        self._me = me
        self._layout = layout
        self._through = 0

    def standing(self, half: Half) -> Standing:
        """What we bring to a group."""
        start, stop = (self.shard.start, self.shard.stop) if self.shard else (0, 0)
        return Standing(half.value, self._through, start, stop)

    def muster(self, group: Group, half: Half) -> Muster | None:
        """Who of the group takes part in this call of ours; None: we are new, and the owners call the other half.
        Raises NoGroup, Precondition, ShardsChanged."""
        if group.absent:
            named = _listed([f"{short(each.peer)} {each.why}" for each in group.absent])
            raise NoGroup(
                f"{named}. Nothing was changed: call {half.value} again, with a longer timeout if that one is slow. "
                "Who is found dead, or missed twice, is waited for no longer: then reduce_scatter makes new shards"
            )
        newest = max(member.standing.through for member in group.members)
        current = [member for member in group.members if member.standing.through == newest]
        is_current = any(member.peer == self._me for member in current)
        if not is_current and self._through:
            through, self._through, self.shard = self._through, 0, None
            raise ShardsChanged(
                f"{len(current)} peers went on without this one after averaging {through - 1}, to averaging "
                f"{newest - 1}, and what it owned has other owners. Call broadcast_shard: it brings their values; then "
                "reduce_scatter gives this peer a new shard"
            )
        if not is_current and half is Half.REDUCE_SCATTER:
            raise Precondition(
                f"this peer is new among {len(current)} that own shards, and has not what they hold: call "
                "broadcast_shard first, it brings the parameters"
            )
        theirs = {member.standing.half for member in current}
        if len(theirs) > 1 and is_current:
            callers = [
                f"{_listed([short(m.peer) for m in current if m.standing.half == called])} called {called}"
                for called in sorted(theirs)
            ]
            raise Precondition(f"{', '.join(callers)}: all trainers call the two by turns, alike")
        if theirs != {half.value}:
            return None
        new = [member for member in group.members if newest and not member.standing.through]
        receivers = [member for member in new if half is Half.BROADCAST_SHARD and member.standing.half == half.value]
        members = _in_order([*current, *receivers], half, newest)
        if len(members) > 1 and not any(member.dialable for member in members):
            raise NoGroup("nobody of those who own shards can be dialled: open a port of one of them (--announce)")
        if len(members) > 1 and half is Half.BROADCAST_SHARD and (kept := _spans_kept(self._layout, members, newest)):
            spans, orphans = kept
            return Muster(replace(group, members=members, spans=spans), half, False, not is_current, _told(orphans))
        spans = equal_spans(self._layout, members) if len(members) > 1 else (0, self._layout.elements)
        return Muster(replace(group, members=members, spans=spans), half, True, not is_current, "")

    def went_through(self, muster: Muster) -> None:
        """The call is done."""
        group = muster.group
        self._through = group.k + 1
        if muster.makes_shards:
            rank = group.rank_of(self._me)
            assert rank is not None
            self._own(group.spans[rank], group.spans[rank + 1], [member.peer for member in group.members], group.spans)

    def went_alone(self, half: Half, k: int) -> None:
        """Nobody else was there: a reduce_scatter makes all of it ours."""
        if half is Half.REDUCE_SCATTER or not self._through:
            self._own(0, self._layout.elements, [self._me], [self._layout.elements])
        self._through = max(self._through, k + 1)

    def line(self, before: ShardLine | None) -> ShardLine | None:
        """For the receipt of a call before which we owned that."""
        changed = (before and before.version) != (self.shard and self.shard.version)
        return replace(self.shard, changed=changed) if self.shard else None

    def _own(self, start: int, stop: int, peers: Sequence[PeerId], edges: Sequence[int]) -> None:
        self.shard = ShardLine(start, stop, digest("shards", *peers, *edges)[:VERSION_BYTES])


def _in_order(members: Sequence[Member], half: Half, newest: int) -> tuple[Member, ...]:
    """By peer id, whatever their places on the grid: these change with the plan. What owners give is not averaged; a
    weight of 0 says that what a member keeps of its own is worth nothing, so that nothing of it may be lost."""

    def weight(member: Member) -> float:
        if half is Half.REDUCE_SCATTER:
            return member.weight
        return 1.0 if newest and member.standing.through == newest else 0.0

    ordered = sorted(members, key=lambda member: member.peer)
    return tuple(replace(member, coordinate=at, weight=weight(member)) for at, member in enumerate(ordered))


Orphan = tuple[int, int, PeerId]
"""Elements [start, stop) without an owner, and who gives its own values of them."""


def _spans_kept(layout: Layout, members: Sequence[Member], newest: int) -> tuple[tuple[int, ...], list[Orphan]] | None:
    """The spans by what their owners hold. None where nobody owns anything."""
    owners = [m for m in members if m.standing.through == newest and m.standing.start < m.standing.stop and m.dialable]
    if not owners:
        return None
    edges, orphans = [0], list[Orphan]()
    for member in members:
        edge = edges[-1]
        if member not in owners:
            edges.append(edge)
            continue
        stop = min(max(edge, member.standing.stop), layout.elements)  # what others say may overlap
        if member.standing.start > edge:
            orphans.append((edge, member.standing.start, member.peer))
        if member is owners[-1] and stop < layout.elements:
            orphans.append((stop, layout.elements, member.peer))
            stop = layout.elements
        edges.append(stop)
    return tuple(edges), orphans


def _told(orphans: Sequence[Orphan]) -> str:
    return "; ".join(
        f"the owner of elements {start} to {stop} is gone: {short(peer)} gave its own values of them"
        for start, stop, peer in orphans
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return ", ".join(names[:NAMED_MAX]) + more

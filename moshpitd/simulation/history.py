"""What happened in each round: who put in what, who got what out, and what the receipts say.

Watches a swarm from outside the machines and hands each ended round to the checkers. Does not judge.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.messages import Group
from moshpitd.averaging.names import GroupId, PeerId, Rank
from moshpitd.averaging.receipt import Outcome, RoundReceipt
from moshpitd.averaging.session import Call
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.swarm import Ending, Observer, Peer

SUMMED = "sketch"
"""The stage whose rounds add up instead of averaging."""
KEPT_S = 600.0
"""How long what a group's members put in is remembered."""

Values = npt.NDArray[np.floating]


def flat(vector: Vector) -> Values:
    """All elements in the vector's order, copied; narrower dtypes are widened without loss."""
    parts = [vector.elements(s.start, s.stop) for s in vector.layout.segments]
    return np.concatenate(parts) if len(parts) > 1 else parts[0].copy()


@dataclass(slots=True)
class GroupRecord:
    """One group as its members began it."""

    group: Group
    began_at: float
    inputs: dict[PeerId, Values] = field(default_factory=dict)
    outputs: dict[PeerId, Values] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One committed round of one peer."""

    peer: Peer
    receipt: RoundReceipt
    group: GroupRecord
    output: Values
    at: float


class RoundWatcher(Observer):
    """An observer that is also shown every committed round, when its averaging has ended."""

    def round_ended(self, record: RoundRecord) -> None:
        """A peer's averaging ended; this was one of its rounds."""


class History(Observer):
    """Pairs receipts with the values they speak of."""

    def __init__(self, watchers: list[RoundWatcher]) -> None:
        self.watchers = watchers
        self._groups: OrderedDict[GroupId, GroupRecord] = OrderedDict()
        self._begun: defaultdict[Peer, list[GroupId]] = defaultdict(list)
        """In the averaging under way, the groups it began, in order."""

    def call_began(self, peer: Peer, call: Call, vector: Vector, now: float) -> None:
        self._begun[peer].clear()
        for watcher in self.watchers:
            watcher.call_began(peer, call, vector, now)

    def group_began(self, peer: Peer, group: Group, rank: Rank, values: Vector, now: float) -> None:
        record = self._groups.setdefault(group.group_id, GroupRecord(group, now))
        record.inputs[peer.id] = flat(values)
        self._begun[peer].append(group.group_id)
        while self._groups and next(iter(self._groups.values())).began_at < now - KEPT_S:
            self._groups.popitem(last=False)
        for watcher in self.watchers:
            watcher.group_began(peer, group, rank, values, now)

    def group_ended(self, peer: Peer, group_id: GroupId, result: Vector) -> None:
        if record := self._groups.get(group_id):
            record.outputs[peer.id] = flat(result)
        for watcher in self.watchers:
            watcher.group_ended(peer, group_id, result)

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        if ending.receipt is not None and ending.vector is not None:
            begun = [self._groups[group_id] for group_id in self._begun[peer] if group_id in self._groups]
            rounds = [receipt for receipt in ending.receipt.rounds if receipt.outcome is not Outcome.ALONE]
            for receipt in rounds:
                record = next(record for record in begun if _is_of(record.group, receipt))
                output = record.outputs[peer.id]
                if receipt is rounds[-1] and ending.receipt.compressor == "dense":
                    output = flat(ending.vector)  # what the trainer got, not what the machine says it had
                for watcher in self.watchers:
                    watcher.round_ended(RoundRecord(peer, receipt, record, output, ending.at))
        for watcher in self.watchers:
            watcher.call_ended(peer, ending)


def _is_of(group: Group, receipt: RoundReceipt) -> bool:
    members = tuple((member.peer, member.weight) for member in group.members)
    said = tuple((line.peer, line.weight) for line in receipt.members)
    return (group.k, group.leader, members) == (receipt.averaging, receipt.leader, said) and group.j == receipt.round

"""The sum of weight times value stays in a fault-free round, and with absences known before the group closed; in lossy
rounds only on average, which another checker judges."""

from __future__ import annotations

import numpy as np

from moshpitd.averaging.names import GroupId
from moshpitd.simulation.checkers.checker import Checker
from moshpitd.simulation.history import SUMMED, RoundRecord

TOLERANCE = 2e-6
"""Of the sum of the absolute values."""


class Conservation(Checker):
    """Adds up each group whose members all committed with everybody's contribution in every span."""

    name = "conservation"

    def __init__(self) -> None:
        super().__init__()
        self._rounds: dict[GroupId, list[RoundRecord]] = {}

    def round_ended(self, record: RoundRecord) -> None:
        if record.receipt.stage == SUMMED or record.receipt.lossy is not None:
            return
        group = record.group.group
        members = {member.peer for member in group.members if member.weight > 0}
        if any(set(span.contributors) != members for span in record.receipt.spans):
            return  # a fault within the group: mass is not promised
        rounds = self._rounds.setdefault(group.group_id, [])
        rounds.append(record)
        if len(rounds) < len(group.members):
            return
        del self._rounds[group.group_id]
        self.looked += 1
        weights = {member.peer: member.weight for member in group.members}
        inputs = record.group.inputs
        before = sum(weights[peer] * inputs[peer].astype(np.float64) for peer in weights)
        after = sum(r.receipt.weight_after * r.output.astype(np.float64) for r in rounds)
        size = sum(weights[peer] * np.abs(inputs[peer].astype(np.float64)) for peer in weights)
        worst = float(np.max(np.abs(after - before) / np.maximum(size, 1e-30)))
        mass = sum(r.receipt.weight_after for r in rounds)
        if not (worst <= TOLERANCE and abs(mass - sum(weights.values())) <= TOLERANCE * mass):
            self.complain(
                record.at,
                f"round {group.k}.{group.j} of {len(rounds)} changed the swarm's sum by {worst:.1e} of its size, "
                f"the weight from {sum(weights.values())} to {mass}",
            )

"""No queue grows above its limit."""

from __future__ import annotations

from moshpitd.averaging.messages import Group
from moshpitd.averaging.names import Rank
from moshpitd.averaging.session import EARLY_MESSAGES_MAX, MATCHMAKINGS_MAX, REDUCTIONS_MAX
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.checkers.checker import Checker
from moshpitd.simulation.swarm import Ending, Peer


class Bounds(Checker):
    """Looks at a session whenever a group begins or a call ends there."""

    name = "bounds"

    def group_began(self, peer: Peer, group: Group, rank: Rank, values: Vector, now: float) -> None:
        self._look(peer, now)

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        self._look(peer, ending.at)

    def _look(self, peer: Peer, now: float) -> None:
        self.looked += 1
        load = peer.machine.load()
        for what, size, limit in (
            ("matchmakings", load.matchmakings, MATCHMAKINGS_MAX),
            ("reductions", load.reductions, REDUCTIONS_MAX),
            ("early messages", load.early_messages, EARLY_MESSAGES_MAX),
            ("deferred joins", load.deferred_joins, MATCHMAKINGS_MAX),
        ):
            if size > limit:
                self.complain(now, f"{peer.name} keeps {size} {what}, its limit is {limit}")

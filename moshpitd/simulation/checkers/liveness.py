"""Every call ends by its deadline; and once faults stop, every round completes."""

from __future__ import annotations

from moshpitd.averaging.receipt import Outcome
from moshpitd.averaging.session import Call
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.checkers.checker import Checker
from moshpitd.simulation.swarm import Ending, Peer, Swarm

SLACK_S = 1e-6


class Liveness(Checker):
    """Time that a daemon itself stood still is not held against it."""

    name = "liveness"

    def __init__(self) -> None:
        super().__init__()
        self.calm_at: float | None = None
        """From when on whoever calls must find everybody, if somebody says so."""
        self._called_at: dict[Peer, float] = {}

    def call_began(self, peer: Peer, call: Call, vector: Vector, now: float) -> None:
        self._called_at[peer] = now

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        self.looked += 1
        if ending.at > peer.deadline + peer.stood_still_s + SLACK_S:
            self.complain(ending.at, f"{peer.name}'s call ended {ending.at - peer.deadline:.3f} s after its deadline")
        if self.calm_at is not None and self._called_at[peer] >= self.calm_at:
            if ending.receipt is None:
                self.complain(ending.at, f"{peer.name}'s call failed though all is calm: {ending.error}")
            elif ending.receipt.outcome is not Outcome.COMPLETE:
                outcome, why = ending.receipt.outcome.value, ending.receipt.why
                self.complain(ending.at, f"{peer.name}'s averaging {ending.receipt.epoch} is {outcome}: {why}")

    def finish(self, swarm: Swarm) -> None:
        for peer in swarm.living():
            if peer.busy and swarm.now > peer.deadline + peer.stood_still_s + SLACK_S and peer.frozen is None:
                self.complain(swarm.now, f"{peer.name} still waits, its deadline was {peer.deadline:.3f}")

"""What all checkers share: a list of complaints."""

from __future__ import annotations

from moshpitd.simulation.history import RoundWatcher
from moshpitd.simulation.swarm import Swarm

COMPLAINTS_MAX = 50
"""A run that is wrong once is wrong; more would only fill the screen."""


class Checker(RoundWatcher):
    """Watches; `finish` is called once, when everything is over."""

    name = "checker"

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.looked = 0
        """How many things were judged: a checker that saw nothing has shown nothing."""

    def complain(self, at: float, text: str) -> None:
        if len(self.complaints) < COMPLAINTS_MAX:
            self.complaints.append(f"{self.name}: at {at:.4f} s {text}")

    def finish(self, swarm: Swarm) -> None:
        """All trainers stopped a while ago."""

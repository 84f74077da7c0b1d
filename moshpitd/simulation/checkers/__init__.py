"""What must hold of every run, each in a small file; a checker complains and never mends.

Each is an observer of the swarm or of its rounds, and keeps its complaints as sentences that name who and when.
"""

from __future__ import annotations

from moshpitd.simulation.checkers.agreement import Agreement
from moshpitd.simulation.checkers.bounds import Bounds
from moshpitd.simulation.checkers.checker import Checker
from moshpitd.simulation.checkers.conservation import Conservation
from moshpitd.simulation.checkers.contraction import Contraction
from moshpitd.simulation.checkers.drift import Drift
from moshpitd.simulation.checkers.honest_receipts import HonestReceipts
from moshpitd.simulation.checkers.leaks import Leaks
from moshpitd.simulation.checkers.liveness import Liveness
from moshpitd.simulation.checkers.unbiasedness import Unbiasedness

__all__ = [
    "Agreement",
    "Bounds",
    "Checker",
    "Conservation",
    "Contraction",
    "Drift",
    "HonestReceipts",
    "Leaks",
    "Liveness",
    "Unbiasedness",
]

"""No timer, group, stream or buffer is left after a round."""

from __future__ import annotations

from moshpitd.simulation.checkers.checker import Checker
from moshpitd.simulation.swarm import Swarm


class Leaks(Checker):
    """Looks once, when all trainers have been silent for a while."""

    name = "leaks"

    def finish(self, swarm: Swarm) -> None:
        for peer in swarm.living():
            if peer.busy or peer.frozen is not None:
                continue
            self.looked += 1
            load = peer.machine.load()
            due = peer.machine.next_deadline()
            for what, left in (
                ("a timer", f"in {due - swarm.now:.1f} s" if due is not None else ""),
                ("streams of groups", ", ".join(group_id.hex()[:8] for group_id in peer.streams)),
                ("reductions that run", str(load.reductions_running or "")),
                ("early messages", str(load.early_messages or "")),
            ):
                if left:
                    self.complain(swarm.now, f"{peer.name} is idle and still has {what}: {left}")

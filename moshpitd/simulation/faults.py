"""Everything that may go wrong, at moments and to peers that dice choose.

Knows how to break a swarm and how to mend what it broke. Does not know what must hold nevertheless.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moshpitd.simulation.swarm import Peer, Swarm


@dataclass(frozen=True, slots=True)
class Odds:
    """How often each fault comes, relative to the others; 0: never."""

    kill: float = 2.0
    power_loss: float = 1.0
    pause: float = 3.0
    cut: float = 4.0
    partition: float = 1.0
    one_way: float = 1.0
    trainer_dies: float = 1.0
    leave: float = 1.0
    join: float = 2.0
    interval_s: float = 1.0
    """Mean time from one fault to the next."""
    lasts_s: tuple[float, float] = (0.2, 12.0)
    """How long a daemon stands still or a partition holds."""
    dead_share_max: float = 0.4
    """Of the peers that began: more are not killed."""


class Mischief:
    """Breaks one swarm until it is told to stop. `join` opens a new daemon or restarts a dead one."""

    def __init__(self, swarm: Swarm, odds: Odds, rng: random.Random, join: Callable[[Peer | None], None]) -> None:
        self.swarm = swarm
        self.counts: dict[str, int] = {}
        self._odds = odds
        self._rng = rng
        self._join = join
        self._dead: list[Peer] = []
        self._crowd = len(swarm.living())
        self._stopped = False
        self._parted = False
        self._wait()

    def stop(self) -> None:
        """No further fault; what stands still goes on, what is parted meets."""
        self._stopped = True
        for peer in self.swarm.living():
            self.swarm.resume(peer)
        if self._parted:
            self._heal()

    def _wait(self) -> None:
        self.swarm.at(self.swarm.now + self._rng.expovariate(1 / self._odds.interval_s), self._strike)

    def _strike(self) -> None:
        if self._stopped:
            return
        self._wait()
        odds = self._odds
        deeds: list[tuple[str, float, Callable[[], None]]] = [
            ("kill", odds.kill, self._kill),
            ("power loss", odds.power_loss, lambda: self._kill(silent=True)),
            ("pause", odds.pause, self._pause),
            ("cut", odds.cut, self._cut),
            ("partition", odds.partition, self._part),
            ("one-way partition", odds.one_way, lambda: self._part(one_way=True)),
            ("trainer dies", odds.trainer_dies, self._abandon),
            ("leave", odds.leave, self._leave),
            ("join", odds.join, self._let_in),
        ]
        ((name, _, deed),) = self._rng.choices(deeds, [weight for _, weight, _ in deeds])
        self.counts[name] = self.counts.get(name, 0) + 1
        deed()

    def _anybody(self) -> Peer:
        return self._rng.choice(self.swarm.living())

    def _may_lose_one(self) -> bool:
        return len(self.swarm.living()) > max(2, (1 - self._odds.dead_share_max) * self._crowd)

    def _kill(self, *, silent: bool = False) -> None:
        if self._may_lose_one():
            victim = self._anybody()
            self.swarm.kill(victim, silent=silent)
            self._dead.append(victim)

    def _leave(self) -> None:
        leaver = self._anybody()
        if self._may_lose_one() and leaver.frozen is None:
            self.swarm.close(leaver)
            self._dead.append(leaver)

    def _let_in(self) -> None:
        restarted = self._dead.pop(self._rng.randrange(len(self._dead))) if self._dead else None
        if restarted is None and len(self.swarm.living()) > 1.25 * self._crowd:
            return
        self._join(restarted)

    def _pause(self) -> None:
        peer = self._anybody()
        self.swarm.pause(peer)
        self.swarm.at(self.swarm.now + self._rng.uniform(*self._odds.lasts_s), lambda: self.swarm.resume(peer))

    def _cut(self) -> None:
        self.swarm.cut(self._anybody(), self._anybody())

    def _abandon(self) -> None:
        self.swarm.abandon(self._anybody())

    def _part(self, *, one_way: bool = False) -> None:
        living = self.swarm.living()
        if self._parted or len(living) < 2:
            return
        few = self._sample(living, self._rng.randint(1, max(1, len(living) // 3)))
        rest = [peer for peer in living if peer not in few]
        self._parted = True
        self.swarm.part(few, rest, one_way=one_way)
        self.swarm.at(self.swarm.now + self._rng.uniform(*self._odds.lasts_s), self._heal)

    def _heal(self) -> None:
        if self._parted:
            self._parted = False
            self.swarm.heal()

    def _sample(self, peers: Sequence[Peer], size: int) -> list[Peer]:
        return self._rng.sample(list(peers), min(size, len(peers)))

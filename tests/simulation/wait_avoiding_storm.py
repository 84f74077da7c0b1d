"""A swarm that avoids waiting while everything goes wrong: daemons die, stand still, are cut off, come and go; then all
is calm, and everybody must be in one cohort again.

Knows the dice of one seed and the checkers. Does not know what a complaint means.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np

from moshpitd.averaging.cohort import WaitAvoidance
from moshpitd.averaging.session import Call, SessionConfig
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.checkers import Bounds, Checker, Leaks, Liveness
from moshpitd.simulation.checkers.wait_avoidance import EqualAfterBarrier, OnceEach, Staleness, UntornPosts
from moshpitd.simulation.clock import Stuck
from moshpitd.simulation.faults import Mischief, Odds
from moshpitd.simulation.network import Weather
from moshpitd.simulation.swarm import Ending, Peer, Swarm, options_for

BEAT_S = 0.5
STORM_S = 30.0
CALM_S = 500.0
"""Longer than any barrier waits for a trainer that was late by what a storm lasts."""


@dataclass(slots=True)
class Found:
    """What came of one seed."""

    complaints: list[str]
    looked: dict[str, int]
    reunited_s: float
    """How long it took in the calm until everybody had been in two barriers with everybody."""


class Storm:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self._peers, self._tau, self._group_size = (
            dice.randint(4, 12),
            dice.choice([1, 2, 3, 5]),
            dice.choice([2, 2, 4]),
        )
        self._elements = dice.choice([5, 9000])
        weather = Weather(message=(0.0002, dice.choice([0.002, 0.05])), noticed=(0.001, dice.choice([0.05, 1.0])))
        self.swarm = Swarm(seed, weather, SessionConfig(chunk_bytes=1 << 14))
        self.checkers: list[Checker] = [
            Liveness(),
            Bounds(),
            Leaks(),
            Staleness(self._tau),
            OnceEach(),
            EqualAfterBarrier(),
            UntornPosts(),
        ]
        self.swarm.observers += self.checkers
        self._values = np.random.default_rng(seed)
        self._options = options_for(
            np.zeros(self._elements, np.float32),
            wait_avoidance=WaitAvoidance(self._group_size, self._tau, dice.random() < 0.5),
            min_peers=self._group_size,
            joining=dice.choice(["receive", "contribute"]),
        )
        self._hidden = seed % 2 == 1
        """One of four cannot be dialled."""
        self._opened = 0
        self._met: defaultdict[bytes, set[Peer]] = defaultdict(set)
        self._whole = 0

    def run(self) -> Found:
        swarm, complaints, reunited_s = self.swarm, list[str](), 0.0
        for _ in range(self._peers):
            self._let_in(None)
        mischief = Mischief(swarm, Odds(), self.dice, self._let_in)
        try:
            swarm.run_for(STORM_S)
            mischief.stop()
            for peer in swarm.living():
                peer.on_end = None
            swarm.run_for(90.0)  # calls end, and the leases of the dead run out
            reunited_s = self._reunite()
            for peer in swarm.living():
                peer.on_end = None
            swarm.run_for(CALM_S)
        except Stuck as stuck:
            complaints.append(f"stuck: {stuck}")
        for checker in self.checkers:
            checker.finish(swarm)
            complaints += checker.complaints
        complaints += [f"protocol: {error}" for error in swarm.protocol_errors]
        return Found(complaints, {checker.name: checker.looked for checker in self.checkers}, reunited_s)

    def _let_in(self, restarted: Peer | None) -> None:
        if restarted is None:
            dialable = not self._hidden or self._opened % 4 > 0
            peer = self.swarm.open(f"p{self._opened}", self._options, dialable=dialable)
            self._opened += 1
        else:
            last_k, dialable = restarted.machine.last_k, restarted.dialable
            peer = self.swarm.open(restarted.name, self._options, last_k=last_k, dialable=dialable)
        pace_s = self.dice.uniform(0.1, 1.0)
        draw = lambda: (self._model(), Call(timeout_s=self.dice.choice([5.0, 20.0])))  # noqa: E731
        self.swarm.train(peer, draw, pause=(pace_s / 2, pace_s))

    def _model(self) -> Vector:
        return Vector.of({"w": self._values.normal(size=self._elements).astype(np.float32)})

    def _reunite(self) -> float:
        """Trainers call on the beat, each when it is not in a call."""
        swarm, living = self.swarm, self.swarm.living()
        if len(living) < self._group_size:
            return 0.0
        began_at = swarm.now
        for peer in living:
            peer.on_end = partial(self._ended, peer, len(living))
            self._call(peer)
        swarm.run_until(lambda: self._whole >= 2, 200.0)
        return swarm.now - began_at

    def _ended(self, peer: Peer, everybody: int, ending: Ending) -> None:
        version = ending.receipt.version if ending.receipt else None
        if version is not None and version.kind == "barrier":
            self._met[version.cohort].add(peer)
            self._whole += len(self._met[version.cohort]) == everybody
        beat = (self.swarm.now // BEAT_S + 1) * BEAT_S
        self.swarm.at(beat + self.dice.uniform(0, 0.01), partial(self._call, peer))

    def _call(self, peer: Peer) -> None:
        if peer.on_end:
            self.swarm.start_if_alive(peer, self._model(), Call(timeout_s=30.0))

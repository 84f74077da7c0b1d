"""Sharded training between daemons whose kernels lose a tenth: it ends where unsharded training does, deaths or not."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

import moshpit_client
from tests.end_to_end.swarm import DEADLINE_S, Peer, Swarm

LOSSES = "tests.end_to_end.lossy_daemon"
SIDES = (64, 1024)
SAMPLES = 64
RATE = 0.5
Floats = npt.NDArray[np.float64]


@dataclass
class Problem:
    """Least squares: what each trainer has seen of one model, through noise of its own."""

    trainers: int
    inputs: list[Floats] = field(init=False)
    outputs: list[Floats] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(7)
        model = rng.standard_normal(SIDES)
        self.inputs = [rng.standard_normal((SAMPLES, SIDES[0])) for _ in range(self.trainers)]
        self.outputs = [x @ model + rng.standard_normal((SAMPLES, SIDES[1])) for x in self.inputs]

    def gradient(self, number: int, w: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        x, y = self.inputs[number], self.outputs[number]
        return (x.T @ (x @ w - y) / SAMPLES).astype(np.float32)

    def loss(self, w: npt.NDArray[np.floating], of: list[int]) -> float:
        return float(np.mean([np.mean((self.inputs[n] @ w - self.outputs[n]) ** 2) for n in of]))

    def unsharded(self, steps: int, of: list[int], w: npt.NDArray[np.floating] | None = None) -> Floats:
        """Gradient descent on all of it in one place."""
        w = np.zeros(SIDES) if w is None else w.astype(np.float64)
        for _ in range(steps):
            w = w - RATE * np.mean([self.gradient(n, w) for n in of], axis=0)
        return w


class Trainer:
    """One with a shard: its optimizer touches nothing else."""

    def __init__(self, problem: Problem, number: int, peer: Peer, **chosen: object) -> None:
        self.w = np.full(SIDES, number, np.float32)
        self.receipts: list[moshpit_client.Receipt] = []
        self._problem = problem
        self._number = number
        self._daemon = peer.connect()
        self.session = self._daemon.open_session({"w": self.w}, shards=True, **chosen)  # type: ignore[arg-type]

    def step(self) -> None:
        self.scatter()
        self.broadcast()

    def scatter(self) -> None:
        gradient = self._problem.gradient(self._number, self.w)
        self.receipts.append(self.session.reduce_scatter({"w": gradient}, timeout=DEADLINE_S))
        for name, part in self.session.shard.items():
            assert name == "w"
            self.w.reshape(-1)[part] -= RATE * gradient.reshape(-1)[part]

    def broadcast(self) -> None:
        self.receipts.append(self.session.broadcast_shard(timeout=DEADLINE_S))

    def close(self) -> None:
        self._daemon.close()


def together(trainers: list[Trainer], do: Callable[[Trainer], None]) -> None:
    with ThreadPoolExecutor(len(trainers)) as pool:
        list(pool.map(do, trainers))


def train(trainers: list[Trainer], steps: int) -> None:
    def work(trainer: Trainer) -> None:
        for _ in range(steps):
            trainer.step()

    together(trainers, work)


@pytest.mark.parametrize("transport", ["lossy", "reliable"])
def test_sharded_training_ends_where_unsharded_training_does(transport: str) -> None:
    problem = Problem(3)
    every = {"reliable_every": 10} if transport == "lossy" else {}
    with Swarm(launcher=(LOSSES, "0.1")) as swarm:
        peers = swarm.start(3)
        there = [
            Trainer(problem, n, peer, initial_peers=3, transport=transport, **every) for n, peer in enumerate(peers)
        ]
        together(there, Trainer.broadcast)
        assert all(np.array_equal(trainer.w, there[0].w) for trainer in there), "all begin with the same bits"
        began = there[0].w.copy()
        train(there, 20)
        losses = [problem.loss(trainer.w, [0, 1, 2]) for trainer in there]
        expected = problem.loss(problem.unsharded(20, [0, 1, 2], began), [0, 1, 2])
        assert max(losses) < 1.01 * expected, (losses, expected)
        assert all(np.array_equal(trainer.w, there[0].w) for trainer in there), "the 20th step is a reliable one"
        (digest,) = {trainer.receipts[-1].digest for trainer in there}
        assert digest
        assert len({receipt.shard.version for t in there for receipt in t.receipts if receipt.shard}) == 1
        rounds = [round_ for trainer in there for receipt in trainer.receipts for round_ in receipt.rounds]
        assert {round_.outcome for round_ in rounds} == {"complete"}, {round_.why for round_ in rounds}
        lossy = [round_.lossy for round_ in rounds if round_.lossy]
        assert len(lossy) == (3 * 2 * 18 if transport == "lossy" else 0)
        if transport == "lossy":
            links = [link for each in lossy for link in each.links]
            assert 0.05 < sum(link.lost for link in links) / sum(link.sent for link in links) < 0.15
            assert not any(link.blocked for link in links)
        for trainer in there:
            trainer.close()


def test_a_member_killed_in_the_middle_leaves_its_shard_to_the_others() -> None:
    problem = Problem(4)
    with Swarm(launcher=(LOSSES, "0.1")) as swarm:
        peers = swarm.start(4)
        there = [
            Trainer(problem, n, peer, initial_peers=4, min_peers=2, transport="lossy", reliable_every=5)
            for n, peer in enumerate(peers)
        ]
        together(there, Trainer.broadcast)
        train(there, 6)
        *left, victim = there
        together(there, Trainer.scatter)
        peers[3].kill()
        together(left, Trainer.broadcast)
        for trainer in left:
            assert trainer.receipts[-1].outcome == "partial"
            assert "the owner of elements" in trainer.receipts[-1].why
        train(left, 23)
        changed = [sum(bool(r.shard and r.shard.changed) for r in trainer.receipts) for trainer in left]
        assert changed == [2, 2, 2], "made at the beginning, and once anew"
        versions = [trainer.receipts[-1].shard for trainer in left]
        assert len({shard.version for shard in versions if shard}) == 1
        assert sum(shard.stop - shard.start for shard in versions if shard) == np.prod(SIDES)
        spread = max(float(np.abs(trainer.w - left[0].w).max()) for trainer in left)
        assert spread < 0.5, "apart by what the last lossy steps lost"
        expected = problem.loss(problem.unsharded(60, [0, 1, 2]), [0, 1, 2])
        assert max(problem.loss(trainer.w, [0, 1, 2]) for trainer in left) < 1.05 * expected
        assert victim.receipts[-1].shard is not None
        for trainer in left:
            trainer.close()

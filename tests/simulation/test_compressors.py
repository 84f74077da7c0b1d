"""Compressors under every fault: what is promised of them holds, and the judges of it can tell."""

from __future__ import annotations

import numpy as np
import pytest

from moshpitd.averaging.names import GroupId
from moshpitd.averaging.session import Call, SessionConfig
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.checkers import Agreement, Checker, HonestReceipts
from moshpitd.simulation.history import History
from moshpitd.simulation.network import Weather
from moshpitd.simulation.swarm import Ending, Peer, Swarm, options_for
from moshpitd.simulation.workloads import Mixed, MixedOptions

ARC = "arc:0.25,4,ef21m,1,0"


@pytest.mark.parametrize("compressor", ["arc:0.2,4,ef21m,0.1,2", "arc:0.2,4,ef14,1,0", "dense:ef14"])
@pytest.mark.parametrize("seed", [1, 2])
def test_everything_goes_wrong_that_may_and_what_compressors_promise_holds(compressor: str, seed: int) -> None:
    options = MixedOptions(seed=seed, peers=(6, 12), storm_s=10.0, settle_averagings=24, compressor=compressor)

    report = Mixed(options).run()

    assert report.complaints == []
    assert report.looked["honest receipts"] > 20
    assert report.outcomes["complete"] > 5


class Spoiled(History):
    """One number of what a peer made of a stage is not what it says."""

    def __init__(self, checker: Checker, stage: str) -> None:
        super().__init__([checker])
        self._stage = stage

    def group_ended(self, peer: Peer, group_id: GroupId, result: Vector) -> None:
        names = [spec.name for spec in result.layout.tensors]
        if peer.name == "p1" and self._stage in names:
            result = Vector(result.layout, result.buffer.copy())
            result.elements(0, 1)[0] += 1
        super().group_ended(peer, group_id, result)

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        if peer.name == "p1" and self._stage == "result" and ending.vector is not None:
            spoilt = ending.vector.buffer.copy()
            spoilt[0] += 1
            ending = Ending(ending.at, ending.receipt, ending.error, Vector(ending.vector.layout, spoilt))
        super().call_ended(peer, ending)


@pytest.mark.parametrize(
    ("checker", "stage", "complaint"),
    [
        (HonestReceipts, "", ""),
        (Agreement, "", ""),
        (HonestReceipts, "sketch", "is not the sum of 4"),
        (HonestReceipts, "rows", "away from the mean"),
        (Agreement, "result", "made other results"),
    ],
)
def test_a_spoilt_stage_is_noticed(checker: type[Checker], stage: str, complaint: str) -> None:
    judge = checker()
    swarm = Swarm(3, Weather(directory=(0.005, 0.005)), SessionConfig(chunk_bytes=1 << 14, group_size_max=4))
    swarm.observers.append(Spoiled(judge, stage))
    rng = np.random.default_rng(0)
    peers = [swarm.open(f"p{n}", options_for(np.zeros((64, 128), np.float32), compressor=ARC)) for n in range(4)]
    swarm.run_for(1.0)
    for _ in range(2):
        values = [Vector.of({"w": rng.normal(size=(64, 128)).astype(np.float32)}) for _ in peers]
        swarm.average({peer: (vector, Call(timeout_s=20.0)) for peer, vector in zip(peers, values, strict=True)})
    assert judge.looked >= 16
    assert bool(judge.complaints) == bool(stage)
    assert all(complaint in line for line in judge.complaints)

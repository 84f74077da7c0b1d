"""Compressors of a whole grid on paper: every stage goes through the real reduction, piece by piece, along every axis.

Knows who stands on which line and what each member carries. Does not know time: nobody is late and nothing is lost, but
for what a story hands in. Weights, order, spans, codes and sums are those of `all_reduce` and `partition`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from moshpitd.averaging.all_reduce import Reduced, decode_average, encode_noting_loss, reduce_chunk, scaled_weights
from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.compressors import Compressor, Done, Jobs, Operation, Run, Stage, Unsent
from moshpitd.averaging.grid import carried_weight, cells_of, line_of
from moshpitd.averaging.names import digest
from moshpitd.averaging.partition import pieces_of
from moshpitd.averaging.vector import Vector
from tests.averaging.group_on_paper import group_of


@dataclass(slots=True)
class Grid:
    """So many peers on the cells that the planner would give them."""

    sides: tuple[int, ...]
    peers: int
    codec: str = "float32"
    bytes_by_stage: dict[str, int] = field(default_factory=dict)
    """Payload that members sent one another, since the beginning."""
    stages: list[Stage] = field(default_factory=list)
    """What the first peer went through, since the beginning."""
    tamper: Callable[[list[Stage]], None] = lambda stages: None
    """Sees the stages of all before they are averaged."""

    def through_all_axes(
        self, stages: Sequence[Stage], weights: Sequence[float]
    ) -> tuple[list[Vector], list[list[Unsent]]]:
        """What everybody holds after the last round, and by peer what its codes left out in each round."""
        values = [stage.values for stage in stages]
        carried = list(weights)
        unsent: list[list[Unsent]] = [[] for _ in stages]
        cells = cells_of(self.sides, self.peers)
        codec = "float32" if stages[0].lossless else self.codec
        for axis in range(len(self.sides)):
            results: list[Vector] = list(values)
            left_out = [Vector(vector.layout, np.zeros_like(vector.buffer)) for vector in values]
            after = list(carried)
            for line in {line_of(cell, axis) for cell in cells}:
                members = sorted(
                    (p for p in range(self.peers) if line_of(cells[p], axis) == line), key=lambda p: (cells[p][axis], p)
                )
                coordinates = [cells[p][axis] for p in members]
                made = self._reduce(
                    [values[p] for p in members],
                    [carried[p] for p in members],
                    coordinates,
                    stages[0].operation(axis),
                    codec,
                    [left_out[p] for p in members],
                    stages[0].name,
                )
                for rank, p in enumerate(members):
                    results[p] = made[rank]
                    after[p] = carried_weight([carried[q] for q in members], coordinates, rank)
            for p in range(self.peers):
                unsent[p].append(Unsent(left_out[p], carried[p] / weights[p] if weights[p] else 0.0))
            values, carried = results, after
        self.carried = carried
        return values, unsent if codec != "float32" else [[] for _ in stages]

    def _reduce(
        self,
        values: Sequence[Vector],
        weights: Sequence[float],
        coordinates: Sequence[int],
        operation: Operation,
        codec_name: str,
        left_out: Sequence[Vector],
        stage: str,
    ) -> list[Vector]:
        """One group's all-reduce, as `AllReduce` does it when nothing goes wrong."""
        codec = codec_named(codec_name)
        group = group_of(values, weights=weights, coordinates=coordinates)
        scaled = scaled_weights(weights) if operation is Operation.MEAN else [1.0] * len(weights)
        results = [Vector.empty(vector.layout) for vector in values]
        sent = 0
        for piece in pieces_of(values[0].layout, group.spans, group.chunk_bytes):
            here = slice(piece.start, piece.stop)
            contributions = []
            for rank, vector in enumerate(values):
                if scaled[rank] == 0:
                    continue
                own = vector.elements(here.start, here.stop)
                if rank == piece.reducer:
                    contributions.append((coordinates[rank], scaled[rank], None))
                    continue
                code = encode_noting_loss(codec.contribution, own, left_out[rank].elements(here.start, here.stop))
                contributions.append((coordinates[rank], scaled[rank], bytes(code)))
                sent += len(code)
            own = values[piece.reducer].elements(here.start, here.stop)
            output = results[piece.reducer].elements(here.start, here.stop)
            mine = left_out[piece.reducer].elements(here.start, here.stop) if scaled[piece.reducer] > 0 else None
            reduced = reduce_chunk(piece, contributions, own, output, codec, operation, mine, scaled[piece.reducer])
            assert isinstance(reduced, Reduced)
            for rank, result in enumerate(results):
                if rank != piece.reducer:
                    sent += len(reduced.code)
                    checksum = decode_average(
                        piece, reduced.code, codec.average, result.elements(here.start, here.stop)
                    )
                    assert checksum == reduced.checksum
        self.bytes_by_stage[stage] = self.bytes_by_stage.get(stage, 0) + sent
        return results

    def average(
        self,
        compressors: Sequence[Compressor],
        values: Sequence[Vector],
        k: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> list[Vector]:
        """One averaging of all; jobs run in any order. Everybody must wish for the same stage at a time."""
        given = [vector.buffer.copy() for vector in values]
        weights = weights or [1.0] * self.peers
        rng = random.Random(seed)
        runs = [
            compressor.begin(vector, Vector.empty(vector.layout), weight=weight, k=k, seed=digest("averaging", k, seed))
            for compressor, vector, weight in zip(compressors, values, weights, strict=True)
        ]
        while True:
            stages = [stage for run in runs if (stage := until_a_stage(run, rng)) is not None]
            if not stages:
                break
            assert len(stages) == len(runs)
            assert len({(stage.name, stage.slot) for stage in stages}) == 1
            self.tamper(stages)
            self.stages.append(stages[0])
            if len({stage.agreement for stage in stages}) > 1:
                for run in runs:
                    run.disagreed("they chose different rows")
                continue
            results, unsent = self.through_all_axes(stages, weights)
            for run, result, lost in zip(runs, results, unsent, strict=True):
                run.averaged(result, lost, digest=digest(result.buffer.tobytes()))
        self.notes = [run.notes for run in runs]
        assert all(np.array_equal(vector.buffer, before) for vector, before in zip(values, given, strict=True))
        return [finished(run) for run in runs]

    notes: list[list[str]] = field(default_factory=list)
    """By peer, of the last averaging."""
    carried: list[float] = field(default_factory=list)
    """By peer, after the last stage."""


def until_a_stage(run: Run, rng: random.Random) -> Stage | None:
    """Run its jobs; None when it is done."""
    while isinstance(run.wish, Jobs):
        jobs = list(run.wish.jobs)
        rng.shuffle(jobs)
        for job in jobs:
            assert job.cost_bytes <= 4 << 20
            job.call()
        run.jobs_done()
    return run.wish if isinstance(run.wish, Stage) else None


def finished(run: Run) -> Vector:
    assert isinstance(run.wish, Done)
    return run.wish.values


def vectors(rows: np.ndarray) -> list[Vector]:
    """One float32 matrix named w for each of the first dimension."""
    return [Vector.of({"w": np.asarray(one, np.float32)}) for one in rows]


def matrix(vector: Vector) -> np.ndarray:
    return vector.arrays()["w"].astype(np.float64)

"""A group of lossy-reduce machines and a network that loses, doubles and reorders packets, on paper.

Knows a heap of things to come. Packets are pulled burst by burst and meet their fate one by one; a stream's end is told
several times, each of which may be lost. Messages and reliable chunks arrive, a little later. All chance is seeded.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.effects import CloseStreams, Compute, Effect, Log, OpenStreams, Send, Sendable
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.lossy_reduce import Form, LossyConfig, LossyReduce, Part, Paths, Phase, State
from moshpitd.averaging.messages import Chunk, Group, RangesWanted
from moshpitd.averaging.names import Rank
from moshpitd.averaging.ranges import Packets
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.packet_loss import LossModel, PacketLoss
from tests.averaging.group_on_paper import Values, flat, number_of, peer

ENDS = 8
"""So often is the end of a stream told."""


class LossyGroupOnPaper:
    """Members by rank; `run()` plays until nothing more is to come. `losses` by (sender, receiver), else `loss`."""

    def __init__(
        self,
        group: Group,
        values: Sequence[Vector],
        *,
        loss: float | LossModel = 0.0,
        losses: Mapping[tuple[int, int], float | LossModel] | None = None,
        seed: int = 0,
        codec: str = "float32",
        paths: Sequence[Paths] | None = None,
        part: Part = Part.BOTH,
        form: Form = Form.DIFFERENCE,
        is_reliable: bool = False,
        config: LossyConfig | None = None,
        doubled: float = 0.0,
        jitter_s: float = 0.0,
        reliable_s: float = 0.02,
    ) -> None:
        self.group = group
        self.now = 0.0
        self.log: list[str] = []
        self.blames: list[str] = []
        self.messages: list[tuple[int, int, RangesWanted]] = []
        self.packets = 0
        self.lost = 0
        self.ended_at: dict[int, float] = {}
        self.dead: set[int] = set()
        self.deaf_to: set[tuple[int, int]] = set()
        """(sender, receiver): the reliable streams between them bring nothing."""
        self._doubled = doubled
        self._jitter_s = jitter_s
        self._reliable_s = reliable_s
        self._rng = random.Random(seed)
        links = {(peer(one), peer(other)): _model(each) for (one, other), each in (losses or {}).items()}
        self._fates = PacketLoss(_model(loss), self._rng, links)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._given = [vector.buffer.copy() for vector in values]
        self._values = values
        self.results = [Vector.zeros(vector.layout) for vector in values]
        self.machines = [
            LossyReduce(
                group,
                Rank(rank),
                values=values[rank],
                result=self.results[rank],
                codec=codec_named(codec),
                paths=paths[rank] if paths else Paths(),
                config=config or LossyConfig(),
                now=0.0,
                part=part,
                form=form,
                is_reliable=is_reliable,
            )
            for rank in range(len(values))
        ]
        for rank in range(len(values)):
            self.at(self._rng.uniform(0, 0.002), partial(self._carry_out, rank))

    # ---- what a story does

    def at(self, moment: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (moment, next(self._order), what))

    def kill(self, rank: int, *, noticed_s: float | None = None) -> None:
        """From now on it does nothing; the others' doors notice after so long, or never."""
        self.dead.add(rank)
        if noticed_s is not None:
            for other in range(len(self.machines)):
                self.at(self.now + noticed_s, partial(self._suspect, other, rank))

    def tell_blocked(self, rank: int, other: int) -> None:
        """Its door found that no datagram passes."""
        self._put(rank, lambda machine: machine.path_blocked(Rank(other), self.now))

    def run(self) -> LossyGroupOnPaper:
        for _ in range(200_000):
            due = [
                (moment, rank)
                for rank, machine in enumerate(self.machines)
                if rank not in self.dead and (moment := machine.next_deadline()) is not None
            ]
            moment, rank = min(due, default=(np.inf, -1))
            if self._heap and self._heap[0][0] <= moment:
                self.now, _, what = heapq.heappop(self._heap)
                what()
            elif rank >= 0:
                self.now = max(self.now, moment)
                self.machines[rank].handle_timer(self.now)
                self._carry_out(rank)
            else:
                return self
        raise AssertionError("the story does not end")

    # ---- what a story looks at

    @property
    def committed(self) -> list[int]:
        return [rank for rank, machine in enumerate(self.machines) if machine.state is State.COMMITTED]

    def result(self, rank: int) -> Values:
        return flat(self.results[rank])

    @property
    def spread(self) -> float:
        """How far members are apart: E |th_i - th_j|^2 an element."""
        every = np.stack([self.result(rank) for rank in range(len(self.machines))])
        return float(2 * every.var(axis=0, ddof=1).mean())

    def check_promises(self) -> None:
        assert self.blames == []
        for vector, given in zip(self._values, self._given, strict=True):
            assert np.array_equal(vector.buffer, given), "what was given is not touched"
        for rank in self.committed:
            assert np.isfinite(self.result(rank)).all()
            for start, stop in self.machines[rank].stale():
                assert np.array_equal(self.result(rank)[start:stop], flat(self._values[rank])[start:stop])

    # ---- the network

    def _carry_out(self, rank: int) -> None:
        machine = self.machines[rank]
        while effects := machine.take_effects():
            for effect in effects:
                if rank not in self.dead:
                    self._do(rank, effect)
        if machine.finished:
            self.ended_at.setdefault(rank, self.now)

    def _do(self, rank: int, effect: Effect) -> None:
        match effect:
            case Send(peer=to_peer, message=message):
                assert isinstance(message, RangesWanted)
                self.messages.append((rank, number_of(to_peer), message))
                self._later(rank, number_of(to_peer), lambda to: to.receive(message, Rank(rank), self.now))
            case Sendable(rank=to):
                self.at(self.now, partial(self._pull_bursts, rank, to))
                self.at(self.now, partial(self._pull_chunks, rank, to))
            case Compute(job_id=job_id, job=job):
                self.at(self.now + self._rng.uniform(0, 0.003), partial(self._end_job, rank, job_id, job))
            case Log(text=text):
                self.log.append(f"{self.now:.3f} {rank}: {text}")
            case OpenStreams() | CloseStreams():
                pass
            case _:
                raise AssertionError(f"a lossy reduce may not wish {effect}")

    def _end_job(self, rank: int, job_id: int, job: Callable[[], object]) -> None:
        self._put(rank, lambda machine: machine.compute_finished(job_id, job(), self.now))

    def _pull_bursts(self, sender: int, receiver: Rank) -> None:
        if sender in self.dead:
            return
        burst = self.machines[sender].next_burst(receiver)
        if burst is None:
            self._put(sender, lambda machine: machine.pulled_dry(self.now))
            return
        moment = self.now + 0.001
        for packets in burst.encode():
            rows = packets.rows.copy()
            kept = [n for n in range(len(rows)) for _ in range(self._copies(sender, receiver))]
            self.packets += len(rows)
            self.lost += len(rows) - len(set(kept))
            groups = [[n] for n in kept] if self._jitter_s else [kept]
            for group in groups:
                if group:
                    some = Packets(packets.numbers[group], rows[group])
                    offsets = np.array([burst.cut.elements(int(number))[0] for number in some.numbers])
                    arrives = moment + self._rng.uniform(0, self._jitter_s)
                    sequences = some.numbers - burst.span_first
                    self.at(
                        arrives,
                        partial(self._arrive, sender, receiver, burst.phase, sequences, offsets, some.rows),
                    )
        if burst.ends:
            for number in range(ENDS):
                if self._arrives(sender, receiver):
                    moment_of_end = moment + 0.001 * number
                    self.at(moment_of_end, partial(self._end_stream, sender, receiver, burst.phase))
        self.at(moment, partial(self._pull_bursts, sender, receiver))

    def _copies(self, sender: int, receiver: int) -> int:
        return self._arrives(sender, receiver) + (self._rng.random() < self._doubled)

    def _arrives(self, sender: int, receiver: int) -> bool:
        return self._fates.arrives(peer(sender), peer(receiver))

    def _pull_chunks(self, sender: int, receiver: Rank) -> None:
        if sender in self.dead:
            return
        outgoing = self.machines[sender].next_outgoing(receiver)
        if outgoing is None:
            self._put(sender, lambda machine: machine.pulled_dry(self.now))
            return
        chunk: Chunk = replace(outgoing.chunk, payload=bytes(outgoing.encode()))
        self._later(sender, receiver, lambda to: to.chunk_received(chunk, Rank(sender), self.now))
        self.at(self.now, partial(self._pull_chunks, sender, receiver))

    def _later(self, sender: int, receiver: int, put: Callable[[LossyReduce], None]) -> None:
        if (sender, receiver) not in self.deaf_to:
            self.at(self.now + self._rng.uniform(0.5, 1.5) * self._reliable_s, partial(self._put, receiver, put))

    def _arrive(self, sender: int, receiver: int, phase: Phase, *what: np.ndarray) -> None:
        sequences, offsets, rows = what
        self._put(
            receiver, lambda machine: machine.packets_received(phase, Rank(sender), sequences, offsets, rows, self.now)
        )

    def _end_stream(self, sender: int, receiver: int, phase: Phase) -> None:
        self._put(receiver, lambda machine: machine.stream_ended(phase, Rank(sender), self.now))

    def _suspect(self, rank: int, dead: int) -> None:
        self._put(rank, lambda machine: machine.suspect(Rank(dead), "the connection broke", self.now))

    def _put(self, rank: int, put: Callable[[LossyReduce], None]) -> None:
        if rank in self.dead:
            return
        try:
            put(self.machines[rank])
        except RemoteProtocolError as wrong:
            self.blames.append(str(wrong))
        self._carry_out(rank)


def _model(loss: float | LossModel) -> LossModel:
    return loss if isinstance(loss, LossModel) else LossModel.even(loss)

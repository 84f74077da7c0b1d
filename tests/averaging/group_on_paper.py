"""A group of all-reduce machines and the network between them, on paper: no socket, no thread, no real clock.

Knows a heap of things to come. Every pair of members has two lanes in each direction, one for messages and one for
chunks; each keeps its order, and neither waits for the other. Two that nobody can dial have none. Chunks are pulled,
one on the way at a time. Jobs run here and end a little later. Delays, and how much of a dead member's last words still
arrives, come from a seed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.all_reduce import AllReduce, AllReduceConfig, State
from moshpitd.averaging.codecs import rules_of
from moshpitd.averaging.compressors import Operation
from moshpitd.averaging.effects import CloseStreams, Compute, Effect, Log, OpenStreams, Receivable, Send, Sendable
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.messages import Address, Chunk, Group, Member, ReductionMessage
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank
from moshpitd.averaging.partition import ALIGNMENT, spans_of
from moshpitd.averaging.vector import Vector

Values = npt.NDArray[np.float64]
Message = ReductionMessage | Chunk

LATENCY_S = (0.001, 0.05)


def peer(number: int) -> PeerId:
    """Ids in the order of their numbers, told apart by the digits that people see."""
    return PeerId(f"{number:08x}" + "0" * 56)


def number_of(peer: PeerId) -> int:
    return int(peer[:8], 16)


def group_of(
    values: Sequence[Vector],
    *,
    weights: Sequence[float] | None = None,
    coordinates: Sequence[int] | None = None,
    undialable: Sequence[int] = (),
    chunk_elements: int = ALIGNMENT,
    budget_s: float = 60.0,
) -> Group:
    """The group that a leader would close over members with these values, rank by rank."""
    n = len(values)
    members = tuple(
        Member(
            peer=peer(rank),
            incarnation=Incarnation(rank),
            coordinate=coordinates[rank] if coordinates else rank,
            weight=weights[rank] if weights else 1.0,
            address=Address(f"host{rank}:1"),
            dialable=rank not in undialable,
        )
        for rank in range(n)
    )
    return Group(
        group_id=GroupId(b"group of a story"),
        token=bytes(16),
        key=Key(bytes(20)),
        k=3,
        j=0,
        axis=0,
        leader=peer(0),
        members=members,
        spans=spans_of(values[0].layout, members),
        chunk_bytes=chunk_elements * 4,
        budget_s=budget_s,
        absent=(),
        arrival_offsets_s=(),
    )


@dataclass(frozen=True, slots=True)
class Blame:
    """One member said that another broke the protocol."""

    by: Rank
    of: Rank
    why: str


class GroupOnPaper:
    """Members by rank; `run()` plays until nothing more is to come.

    `fate` sees everything that leaves a member, before it is on its way; False loses it. It may kill.
    """

    def __init__(
        self,
        group: Group,
        values: Sequence[Vector],
        *,
        seed: int = 0,
        codec: str = "float32",
        config: AllReduceConfig | None = None,
        latency_s: tuple[float, float] = LATENCY_S,
        starts_s: Sequence[float] | None = None,
        operation: Operation = Operation.MEAN,
        unsent: Sequence[Vector] | None = None,
        anchor: Vector | None = None,
    ) -> None:
        self.group = group
        self.now = 0.0
        self.fate: Callable[[Rank, Rank, Message], bool] = lambda sender, receiver, message: True
        self.chunk_seconds: dict[Rank, float] = {}
        """Members with a slow uplink: how long each of their chunks takes."""
        self.blames: list[Blame] = []
        self.log: list[str] = []
        self.dead: set[Rank] = set()
        self.machines: dict[Rank, AllReduce] = {}
        self._given = [vector.buffer.copy() for vector in values]
        self._values = values
        self._results = [Vector.empty(vector.layout) for vector in values]
        self._codec = rules_of(codec).over(values[0].layout)
        self._anchor = anchor
        self._kept = [Vector.empty(vector.layout) for vector in values]
        self._config = config or AllReduceConfig()
        self._latency_s = latency_s
        self._operation = operation
        self._unsent = unsent
        self._rng = random.Random(seed)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._lanes: dict[tuple[Rank, Rank, bool], float] = {}
        """When the last thing in a lane arrives: (sender, receiver, whether chunks)."""
        self._pulling: set[tuple[Rank, Rank]] = set()
        self._awake_at = {Rank(r): starts_s[r] if starts_s else self.delay() for r in range(len(values))}
        """When a member starts, later until when it pauses: what is sent to it waits for that."""
        self._cut: dict[tuple[Rank, Rank, bool], float] = {}
        """What a dead member sent arrives until then."""
        for rank, moment in self._awake_at.items():
            self.at(moment, partial(self._start, rank))

    # ---- what a story does

    def at(self, moment: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (moment, next(self._order), what))

    def delay(self) -> float:
        return self._rng.uniform(*self._latency_s)

    def kill(self, number: int, *, noticed: bool = True) -> None:
        """From now on this member does nothing. `noticed`: its links break, and the others' doors see it."""
        rank = Rank(number)
        self.dead.add(rank)
        for other in self._others(rank):
            for chunks in (False, True):
                arrives = self._lanes.get((rank, other, chunks), self.now)
                self._cut[rank, other, chunks] = self._rng.uniform(self.now, max(self.now, arrives))
            if noticed:
                self.at(self.now + self.delay(), partial(self._lose, other, rank, "the connection broke"))

    def cut_link(self, one: int, other: int) -> None:
        """Both ends see the link between two living members break; nothing passes it any more."""
        for here, there in ((Rank(one), Rank(other)), (Rank(other), Rank(one))):
            for chunks in (False, True):
                self._cut[here, there, chunks] = self.now
            self.at(self.now + self.delay(), partial(self._lose, here, there, "the connection broke"))

    def pause(self, number: int, seconds: float) -> None:
        """This member's process stands still; what is sent to it waits."""
        self._awake_at[Rank(number)] = self.now + seconds

    def run(self, until: float = 1e6) -> None:
        for _ in range(1_000_000):
            moment, rank = self._next_timer()
            if self._heap and self._heap[0][0] <= moment:
                moment, _, what = heapq.heappop(self._heap)
                if moment > until:
                    return
                self.now = max(self.now, moment)
                what()
            elif rank is not None and moment <= until:
                self.now = max(self.now, moment)
                self.machines[rank].handle_timer(self.now)
                self._carry_out(rank)
            else:
                return
        raise AssertionError("the story does not end")

    # ---- what a story looks at

    @property
    def committed(self) -> list[Rank]:
        return self._in(State.COMMITTED)

    @property
    def failed(self) -> list[Rank]:
        return self._in(State.FAILED)

    def result(self, rank: int) -> bytes:
        return self._results[rank].buffer.tobytes()

    def result_arrays(self, rank: int) -> dict[str, npt.NDArray[np.floating]]:
        return self._results[rank].arrays()

    def kept(self, rank: int) -> bytes:
        """What this member would hold as the next anchor."""
        return self._kept[rank].buffer.tobytes()

    def untouched(self, rank: int) -> bool:
        return bool(np.array_equal(self._values[rank].buffer, self._given[rank]))

    def mean_by_receipt(self, rank: int) -> Values:
        """What this member's result ought to be, in float64, if its receipt tells the truth."""
        mean = np.full(self._values[0].layout.elements, np.nan)
        every = [flat(vector) for vector in self._values]
        for line in self.machines[Rank(rank)].span_lines():
            ranks = [number_of(contributor) for contributor in line.contributors]
            weights = np.array([self.group.members[r].weight for r in ranks])
            rows = np.stack([every[r][line.start : line.stop] for r in ranks])
            mean[line.start : line.stop] = weights @ rows / weights.sum()
        return mean

    def result_flat(self, rank: int) -> Values:
        return flat(self._results[rank])

    def check_promises(self, tolerance: float = 1e-6) -> None:
        """What holds whatever happened: same id, same bits; receipts tell the truth; nothing given is touched."""
        assert self.blames == []
        by_id: dict[bytes, Rank] = {}
        for rank in self.committed:
            machine = self.machines[rank]
            first = by_id.setdefault(machine.group_id, rank)
            assert self.result(rank) == self.result(first), f"{rank} and {first} differ under one group id"
            assert machine.digest == self.machines[first].digest
            assert machine.span_lines() == self.machines[first].span_lines()
            assert self.kept(rank) == self.result(rank)
            expected = self.mean_by_receipt(rank)
            scale = max(float(np.nanmax(np.abs(flat(vector)))) for vector in self._values)
            assert np.abs(self.result_flat(rank) - expected).max() <= tolerance * scale
        assert all(self.untouched(rank) for rank in range(len(self._values)))

    # ---- the network

    def _start(self, rank: Rank) -> None:
        if rank in self.dead:
            return
        self.machines[rank] = AllReduce(
            self.group,
            rank,
            values=self._values[rank],
            result=self._results[rank],
            codec=self._codec,
            config=self._config,
            now=self.now,
            operation=self._operation,
            unsent=self._unsent[rank] if self._unsent else None,
            anchor=self._anchor,
            kept=self._kept[rank],
        )
        self._carry_out(rank)

    def _when_able(self, rank: Rank, what: Callable[[AllReduce], None]) -> None:
        """Now, or when the member has started and is awake; never, when it is dead."""
        if rank in self.dead:
            return
        if self.now < self._awake_at[rank]:
            self.at(self._awake_at[rank], partial(self._when_able, rank, what))
            return
        what(self.machines[rank])
        self._carry_out(rank)

    def _carry_out(self, rank: Rank) -> None:
        while effects := self.machines[rank].take_effects():
            for effect in effects:
                if rank not in self.dead:
                    self._carry_out_one(rank, effect)

    def _carry_out_one(self, rank: Rank, effect: Effect) -> None:
        match effect:
            case Send(peer=to, message=message):
                assert isinstance(message, ReductionMessage)
                self._send(rank, Rank(number_of(to)), message)
            case Sendable(rank=to):
                self._pull(rank, to)
            case Receivable(rank=to):
                self._when_able(to, lambda _: self._pull(to, rank))
            case Compute(job_id=job_id, job=job):
                early = job() if self._rng.random() < 0.5 else None
                self.at(
                    self.now + self._rng.random() * self._latency_s[1], partial(self._end_job, rank, job_id, job, early)
                )
            case Log(text=text):
                self.log.append(f"{self.now:.3f} {rank}: {text}")
            case OpenStreams() | CloseStreams():
                pass
            case _:
                raise AssertionError(f"an all-reduce may not wish {effect}")

    def _end_job(self, rank: Rank, job_id: int, job: Callable[[], object], early: object) -> None:
        value = job() if early is None else early
        self._when_able(rank, lambda machine: machine.compute_finished(job_id, value, self.now))

    def _pull(self, sender: Rank, receiver: Rank) -> None:
        """The sender's door asks for a chunk unless one is still on its way."""
        if (sender, receiver) in self._pulling or sender in self.dead or sender not in self.machines:
            return
        reader = self.machines.get(receiver)
        if reader is not None and reader.is_ahead(sender, self.now):
            return
        outgoing = self.machines[sender].next_outgoing(receiver)
        if outgoing is not None:
            self._pulling.add((sender, receiver))
            self._send(sender, receiver, replace(outgoing.chunk, payload=outgoing.encode()))

    def _send(self, sender: Rank, receiver: Rank, message: Message) -> None:
        is_chunk = isinstance(message, Chunk)
        members = self.group.members
        assert members[sender].dialable or members[receiver].dialable, "two that nobody can dial cannot talk"
        arrives = self.fate(sender, receiver, message)
        lane = (sender, receiver, is_chunk)
        travel = self.chunk_seconds.get(sender, self.delay()) if is_chunk else self.delay()
        moment = max(self.now + travel, self._lanes.get(lane, 0.0) + 1e-6)
        self._lanes[lane] = moment
        self.at(moment, partial(self._arrive, sender, receiver, message, arrives=arrives))

    def _arrive(self, sender: Rank, receiver: Rank, message: Message, *, arrives: bool) -> None:
        lane = (sender, receiver, isinstance(message, Chunk))
        if arrives and self.now <= self._cut.get(lane, np.inf):
            self._when_able(receiver, lambda machine: self._deliver(machine, message, sender))
        if isinstance(message, Chunk):
            self._pulling.discard((sender, receiver))
            self._when_able(sender, lambda machine: self._pull(sender, receiver))

    def _deliver(self, machine: AllReduce, message: Message, sender: Rank) -> None:
        try:
            if isinstance(message, Chunk):
                machine.chunk_received(message, sender, self.now)
            else:
                machine.receive(message, sender, self.now)
        except RemoteProtocolError as wrong:
            self.blames.append(Blame(machine.rank, sender, str(wrong)))
            self._lose(machine.rank, sender, str(wrong))
            self._lose(sender, machine.rank, "it closed the connection")

    def _lose(self, rank: Rank, other: Rank, why: str) -> None:
        def lose(machine: AllReduce) -> None:
            if not machine.finished:
                machine.suspect(other, why, self.now)

        self._when_able(rank, lose)

    # ---- small things

    def _next_timer(self) -> tuple[float, Rank | None]:
        due: list[tuple[float, Rank]] = []
        for rank, machine in self.machines.items():
            deadline = machine.next_deadline()
            if rank not in self.dead and deadline is not None:
                due.append((max(deadline, self._awake_at[rank]), rank))
        return min(due, default=(np.inf, None))

    def _others(self, rank: Rank) -> list[Rank]:
        return [Rank(other) for other in range(len(self._values)) if other != rank]

    def _in(self, state: State) -> list[Rank]:
        return [rank for rank, machine in sorted(self.machines.items()) if machine.state is state]


def flat(vector: Vector) -> Values:
    """All values in the order of the vector, as float64."""
    return np.concatenate([view.astype(np.float64) for _, view in vector.views()])


def normal_vectors(count: int, elements: int = 10_000, *, seed: int = 0) -> list[Vector]:
    """One float32 tensor of independent normal values for each member."""
    rng = np.random.default_rng(seed)
    return [Vector.of({"w": rng.standard_normal(elements, np.float32)}) for _ in range(count)]

"""Lossy rounds of one group on paper, where only packets matter: the daemon's machines, and no time between them.

Knows which share of packets each link loses, each packet by itself. Everything that arrives does so at once, in the
order it was sent; reliable streams lose nothing. Paths are remembered from round to round. Does not know links' speed,
who else there is, or how a group is found: for that there is the swarm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.effects import Compute, Effect, Send
from moshpitd.averaging.lossy_reduce import LossyConfig, LossyReduce, Part, Paths
from moshpitd.averaging.messages import Address, Group, Member, RangesWanted
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank
from moshpitd.averaging.partition import spans_of
from moshpitd.averaging.unbiased import Form
from moshpitd.averaging.vector import Layout, Vector

CHUNK_BYTES = 1 << 20
BUDGET_S = 3600.0
TURNS_MAX = 10_000
"""Of one round: none takes more than some dozens."""


class LossyRounds:
    """A group that stays together, round after round."""

    def __init__(
        self,
        layout: Layout,
        members: int,
        loss: float | npt.NDArray[np.float64],
        rng: np.random.Generator,
        *,
        weights: Sequence[float] = (),
        one_owner: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
        codec: str = "float32",
    ) -> None:
        """`loss`: of all links, or by [sender, receiver]. `one_owner`: member 0 reduces all."""
        self.packets = 0
        self.lost = 0
        self.paths = [Paths() for _ in range(members)]
        self._loss = np.broadcast_to(np.asarray(loss, np.float64), (members, members))
        self._rng = rng
        self._codec = codec_named(codec)
        peers = [PeerId(f"{rank:08x}" + "0" * 56) for rank in range(members)]
        by_rank = tuple(
            Member(peer, Incarnation(1), rank, weights[rank] if weights else 1.0, Address(f"host{rank}:1"), True)
            for rank, peer in enumerate(peers)
        )
        spans = spans_of(layout, by_rank)
        self.group = Group(
            group_id=GroupId(bytes(16)),
            token=bytes(16),
            key=Key(bytes(20)),
            k=0,
            j=0,
            axis=0,
            leader=peers[0],
            members=by_rank,
            spans=(0, *([spans[-1]] * members)) if one_owner else spans,
            chunk_bytes=chunk_bytes,
            budget_s=BUDGET_S,
            absent=(),
            arrival_offsets_s=(),
        )

    def play(
        self,
        values: Sequence[Vector],
        results: Sequence[Vector],
        *,
        part: Part = Part.BOTH,
        form: Form = Form.DIFFERENCE,
    ) -> list[LossyReduce]:
        """One round; the machines as they ended."""
        machines = [
            LossyReduce(
                self.group,
                Rank(rank),
                values=given,
                result=result,
                codec=self._codec,
                paths=self.paths[rank],
                config=LossyConfig(),
                now=0.0,
                part=part,
                form=form,
            )
            for rank, (given, result) in enumerate(zip(values, results, strict=True))
        ]
        now = 0.0
        for _ in range(TURNS_MAX):
            if not self._turn(machines, now):
                due = [moment for machine in machines if (moment := machine.next_deadline()) is not None]
                if not due:
                    return machines
                now = max(now, min(due))
                for machine in machines:
                    machine.handle_timer(now)
        raise AssertionError("the round does not end")

    def _turn(self, machines: Sequence[LossyReduce], now: float) -> bool:
        """Everybody sends what it has and does what it wished; whether there was anything."""
        moved = False
        for rank, machine in enumerate(machines):
            while effects := machine.take_effects():
                moved = True
                for effect in effects:
                    _carry_out(machines, Rank(rank), effect, now)
            for other in range(len(machines)):
                if other != rank:
                    moved |= self._send(machines, Rank(rank), Rank(other), now)
        return moved

    def _send(self, machines: Sequence[LossyReduce], sender: Rank, receiver: Rank, now: float) -> bool:
        machine, other = machines[sender], machines[receiver]
        moved = False
        while (burst := machine.next_burst(receiver)) is not None:
            moved = True
            for packets in burst.encode():
                arrived = self._rng.random(len(packets.numbers)) >= self._loss[sender, receiver]
                self.packets += len(arrived)
                self.lost += int(np.count_nonzero(~arrived))
                if arrived.any():
                    numbers = packets.numbers[arrived]
                    offsets = burst.cut.piece.start + (numbers - burst.cut.first) * burst.cut.range_elements
                    sequences, rows = numbers - burst.span_first, packets.rows[arrived]
                    other.packets_received(burst.phase, sender, sequences, offsets, rows, now)
            if burst.ends:
                other.stream_ended(burst.phase, sender, now)
        while (outgoing := machine.next_outgoing(receiver)) is not None:
            moved = True
            chunk = replace(outgoing.chunk, payload=bytes(outgoing.encode()))
            other.chunk_received(chunk, sender, now)
        machine.pulled_dry(now)
        return moved


def _carry_out(machines: Sequence[LossyReduce], rank: Rank, effect: Effect, now: float) -> None:
    """What is not computed or said is the doors' business, and there are none."""
    match effect:
        case Compute(job_id=job_id, job=job):
            machines[rank].compute_finished(job_id, job(), now)
        case Send(peer=peer, message=RangesWanted() as wanted):
            machines[int(peer[:8], 16)].receive(wanted, rank, now)
        case _:
            pass

"""A swarm on paper with a villain in it: whatever a hostile peer puts on its wires, through the wire's own checks.

Knows what the doors do with what arrives: bytes are decoded by peer/wire.py, nonsense costs its sender the channel. The
villain is a real member whose machine does its honest part, while lies are told in its name; or a stranger with a
key of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from moshpitd.averaging.effects import Send
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.messages import Chunk, Lease, PlanNotice, Sighting
from moshpitd.averaging.names import Incarnation, Key, PeerId
from moshpitd.averaging.receipt import Outcome
from moshpitd.averaging.session import Call, SessionConfig
from moshpitd.averaging.vector import Vector
from moshpitd.peer import wire
from moshpitd.peer.v1 import peer_pb2
from moshpitd.simulation.checkers import Agreement, Bounds, HonestReceipts
from moshpitd.simulation.clock import Stuck
from moshpitd.simulation.history import History, RoundRecord, RoundWatcher
from moshpitd.simulation.swarm import Ending, Peer, Seals, Swarm, options_for
from tests.fuzz.nonsense import Changes, Overheard, change, damage, every_message

ELEMENTS = 2 * 4096 + 5
CONFIG = SessionConfig(chunk_bytes=1 << 14, group_size_max=4)
STRANGER = PeerId("5" * 64)
SESSION = Key(b"s" * 20)
MESSAGES_KEPT = 200
PLAN_NUMBER = 15
"""Some message, before any plan was told."""

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Lie:
    """One thing said to one peer."""

    after_ms: int
    victim: int
    by_stranger: bool
    base: int
    """Of which true message it is made; the larger ones are empty messages of every kind."""
    how: Changes
    damage: Changes = ()
    of_plan: bool = False
    """Made of the newest plan that was told, whatever `base` says."""


@dataclass(frozen=True, slots=True)
class Forgery:
    """One frame on a stream of the villain's group."""

    after_ms: int
    victim: int
    index: int
    is_average: bool
    payload: int
    how: Changes
    damage: Changes = ()


class Spared(RoundWatcher):
    """Judges the groups that had none but honest members."""

    def __init__(self, honest: set[PeerId]) -> None:
        self.checkers = [Agreement(), HonestReceipts(), Bounds()]
        self._honest = honest

    def round_ended(self, record: RoundRecord) -> None:
        if {member.peer for member in record.group.group.members} <= self._honest:
            for checker in self.checkers:
                checker.round_ended(record)

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        self.checkers[2].call_ended(peer, ending)

    @property
    def complaints(self) -> list[str]:
        return [complaint for checker in self.checkers for complaint in checker.complaints]


class Theatre(Swarm):
    """`count` honest sessions and one villain, who know each other."""

    def __init__(self, count: int = 4, *, seed: int = 0, config: SessionConfig = CONFIG) -> None:
        super().__init__(seed, config=config, keep_messages=True)
        options = options_for(np.zeros(ELEMENTS, np.float32))
        self.honest = [self.open(f"p{number}", options) for number in range(count)]
        self.villain = self.open("villain", options)
        self.spared = Spared({peer.id for peer in self.honest})
        self.observers.append(History([self.spared]))
        self.refused = 0
        self.taken = 0
        self._sequence = 1 << 60
        self._dice = np.random.default_rng(seed)
        self.run_for(1.0)

    # ---- acts

    def average_all(self, peers: Sequence[Peer], timeout_s: float = 8.0) -> dict[Peer, Ending]:
        """Each of these calls once, with values of its own; every call ends."""
        self.given = {peer: self._dice.normal(size=ELEMENTS).astype(np.float32) for peer in peers}
        calls = {peer: (Vector.of({"w": self.given[peer]}), Call(timeout_s=timeout_s)) for peer in peers}
        return self.average(calls, apart_s=0.003, limit_s=timeout_s + 1.0)

    def lie(self, lie: Lie) -> None:
        """Told when its time comes, made of what was said until then."""
        self.at(self.now + lie.after_ms / 1000, lambda: self._tell(lie))

    def forge(self, forgery: Forgery) -> None:
        self.at(self.now + forgery.after_ms / 1000, lambda: self._send_frame(forgery))

    def announce(self, lie: Lie) -> None:
        """Records are signed by who announces them; what they say is its own affair."""
        self.at(self.now + lie.after_ms / 1000, lambda: self._announce(lie))

    def hand(self, victim: Peer, sender: PeerId, envelope: bytes) -> bool:
        """What the victim's door does with an envelope; False when it was refused."""
        try:
            _, message = wire.opened(peer_pb2.Envelope.FromString(envelope))
        except (RemoteProtocolError, DecodeError):
            return self._refused(victim, sender)
        return self.put(victim, sender, lambda: victim.machine.receive(message, sender, self.now))

    def put(self, victim: Peer, sender: PeerId, what: Callable[[], None]) -> bool:
        fine: list[bool] = []

        def guarded() -> None:
            try:
                what()
                fine.append(True)
            except RemoteProtocolError:
                pass

        self._feed(victim, guarded)
        self.taken += len(fine)
        return bool(fine) or self._refused(victim, sender)

    # ---- what must hold

    def assert_nobody_else_was_harmed(self) -> None:
        assert self.spared.complaints == []
        for peer in self.honest:
            load = peer.machine.load()
            assert load.early_messages <= 1024 and load.deferred_joins <= 64 and load.matchmakings <= 64, load

    def assert_it_recovers(self) -> None:
        """The villain leaves. Once its leases ran out, the others' trainers, who call again and again, get the exact
        mean: all of them in one averaging."""
        self.kill(self.villain)
        self.run_for(100.0)
        self.given = {peer: self._dice.normal(size=ELEMENTS).astype(np.float32) for peer in self.honest}
        judged = {peer: len(peer.endings) for peer in self.honest}
        exact: Counter[int] = Counter()
        for peer in self.honest:
            vector = Vector.of({"w": self.given[peer]})
            self.train(peer, partial(_call_with, vector), pause=(0.005, 0.05))

        def all_exact() -> bool:
            """Whether there was one averaging that was exact for everybody."""
            for peer, count in judged.items():
                new = peer.endings[count:]
                judged[peer] += len(new)
                exact.update(ending.told.epoch for ending in new if self._is_exact(ending))
            return len(self.honest) in exact.values()

        try:
            self.run_until(all_exact, 120.0)
        except Stuck as stuck:
            last = [f"{p.name}: {p.endings[-1].receipt or p.endings[-1].error}" for p in self.honest]
            raise AssertionError("\n".join(last)) from stuck

    def _is_exact(self, ending: Ending) -> bool:
        if ending.receipt is None or ending.receipt.outcome is not Outcome.COMPLETE:
            return False
        expected = sum(given.astype(np.float64) for given in self.given.values()) / len(self.given)
        return bool(np.max(np.abs(ending.values - expected)) < 1e-5 * np.max(np.abs(expected)))

    # ---- machinery

    def _refused(self, victim: Peer, sender: PeerId) -> bool:
        """As the door does: the conversation ends, and its end is told."""
        self.refused += 1
        self._feed(victim, lambda: victim.machine.peer_lost(sender, "nonsense", self.now))
        return False

    def _tell(self, lie: Lie) -> None:
        victim = self.honest[lie.victim % len(self.honest)]
        sender = STRANGER if lie.by_stranger else self.villain.id
        envelope = self._plan() if lie.of_plan else self._base(lie.base)
        change(envelope, lie.how, self._overheard())
        if envelope.HasField("plan_notice") and not lie.damage:
            sign(envelope.plan_notice, sender)
        self.hand(victim, sender, damage(envelope.SerializeToString(), lie.damage))

    def _announce(self, lie: Lie) -> None:
        victim = self.honest[lie.victim % len(self.honest)]
        sender = STRANGER if lie.by_stranger else self.villain.id
        true = [s.record for s in self.roster(victim.machine.key) if isinstance(s.record, Lease)]
        lease = peer_pb2.Lease.FromString(wire.record_bytes(true[lie.base % len(true)]))
        change(lease, lie.how, self._overheard())
        try:
            record = wire.record_from("lease", damage(lease.SerializeToString(), lie.damage))
        except RemoteProtocolError:
            self.refused += 1
            return
        self._sequence += 1
        sighting = Sighting(sender, Incarnation(7), self._sequence, self.now, self.now + 20.0, record)
        self._feed(victim, lambda: victim.machine.roster_received(victim.machine.key, [sighting], self.now))
        self.taken += 1

    def _base(self, number: int) -> peer_pb2.Envelope:
        said = [send.message for _, _, send in self._recent()]
        empty = every_message()
        number %= 2 * len(said) + len(empty)
        if number < 2 * len(said):
            return wire.envelope(SESSION, said[-1 - number // 2])
        envelope = empty[number - 2 * len(said)]
        envelope.session = SESSION
        return envelope

    def _plan(self) -> peer_pb2.Envelope:
        told = (send.message for _, _, send in reversed(self.sent))
        plan = next((message for message in told if isinstance(message, PlanNotice)), None)
        return wire.envelope(SESSION, plan) if plan else self._base(PLAN_NUMBER)

    def _recent(self) -> list[tuple[float, Peer, Send]]:
        """What was said lately, one of each kind from each."""
        newest = {(peer, type(send.message)): (at, peer, send) for at, peer, send in self.sent[-MESSAGES_KEPT:]}
        return list(newest.values())

    def _overheard(self) -> Overheard:
        overheard = Overheard()
        for _, _, send in self._recent():
            overheard.listen(wire.envelope(SESSION, send.message))
        return overheard

    def _send_frame(self, forgery: Forgery) -> None:
        for group, rank in list(self.villain.streams.values()):
            victims = [p for p in self.honest if group.group_id in p.streams]
            if not victims:
                continue
            victim = victims[forgery.victim % len(victims)]
            frame = peer_pb2.TransferRequest(chunk=peer_pb2.Chunk(index=forgery.index, is_average=forgery.is_average))
            if forgery.is_average:
                frame.chunk.contributors.extend(range(len(group.members)))
            change(frame.chunk, forgery.how, Overheard())
            frame.chunk.payload = payload(forgery.payload)
            self.hand_frame(victim, group.group_id, rank, damage(frame.SerializeToString(), forgery.damage))

    def hand_frame(self, victim: Peer, group_id: bytes, rank: int, frame: bytes) -> bool:
        """What the victim's door does with a frame of a stream."""

        def read() -> None:
            chunk: Chunk = wire.chunk_from(frame)
            victim.machine.chunk_received(group_id, rank, chunk, self.now)  # type: ignore[arg-type]

        if not self.put(victim, self.villain.id, read):
            self._feed(victim, lambda: victim.machine.stream_lost(group_id, rank, "nonsense", self.now))  # type: ignore[arg-type]
            return False
        return True


def _call_with(vector: Vector) -> tuple[Vector, Call]:
    return vector, Call(timeout_s=30.0)


def sign(notice: peer_pb2.PlanNotice, signer: PeerId) -> None:
    """A plan that its signer may decide, whatever it says."""
    notice.plan.signer = signer
    try:
        _, message = wire.opened(peer_pb2.Envelope(session=SESSION, plan_notice=notice))
    except RemoteProtocolError:
        return
    assert isinstance(message, PlanNotice)
    notice.public_key, notice.signature = Seals(signer).sign_plan(message.plan.body)


def payload(number: int) -> bytes:
    """Of the right size or not, of sound values or not."""
    fitting = CONFIG.chunk_bytes
    values = (0.0, float("nan"), float("inf"), 3e38, -1e-45)
    match number % 8:
        case 0:
            return b""
        case 1:
            return bytes(3)
        case 2:
            return bytes(2 * fitting)
        case 3:
            return bytes(4 << 20)
        case _:
            sizes = (fitting, 5 * 4, 4096 * 4, fitting - 4)
            count = sizes[number // 8 % len(sizes)] // 4
            return np.full(count, values[number // 32 % len(values)], np.float32).tobytes()

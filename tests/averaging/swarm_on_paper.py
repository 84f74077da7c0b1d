"""A swarm without machines: real Session machines, a heap of events, and a clock that only the heap moves.

Carries out effects as the driver and the doors do: messages in order over channels that can be cut, chunks by pulling,
a directory whose answers take time and may be old, jobs inline. All that varies comes from one seed.
What an honest peer must never cause (RemoteProtocolError, a timer that spins) is raised or kept in `protocol_errors`.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.effects import (
    Announce,
    CloseStreams,
    Compute,
    Effect,
    Failed,
    Finished,
    Log,
    LookUp,
    OpenStreams,
    Progress,
    Send,
    Sendable,
    Withdraw,
)
from moshpitd.averaging.errors import RemoteProtocolError, SessionError
from moshpitd.averaging.messages import Address, Group, Record, Sighting
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank, digest
from moshpitd.averaging.receipt import Receipt
from moshpitd.averaging.session import Call, Session, SessionConfig, SessionOptions, Whereabouts
from moshpitd.averaging.vector import Vector

SWARM = b"a swarm on paper"
SPIN_MAX = 20_000
"""Events in one moment: more means that somebody's timer is always due."""
STRANGER_PATIENCE_S = 15.0
"""How long a stream waits for a group that the other end has not heard of."""

Span = tuple[float, float]
Array = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Weather:
    """How long things take: seconds, drawn evenly between the two."""

    message: Span = (0.0002, 0.002)
    dial: Span = (0.0005, 0.003)
    directory: Span = (0.001, 0.01)
    stale_s: float = 0.0
    """A record announced may stay unseen by a reader for up to this long."""
    noticed: Span = (0.001, 0.05)
    """Until the other end notices that a channel broke."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How one averaging ended for one trainer."""

    at: float
    receipt: Receipt | None
    error: SessionError | None
    vector: Vector | None

    @property
    def told(self) -> Receipt:
        assert self.receipt is not None, self.error
        return self.receipt

    @property
    def values(self) -> Array:
        assert self.vector is not None, self.error
        return next(iter(self.vector.arrays().values()))


@dataclass(eq=False)
class Peer:
    """One daemon with one session, and its trainer."""

    name: str
    id: PeerId
    incarnation: Incarnation
    machine: Session
    dialable: bool
    alive: bool = True
    died_at: float = 0.0
    endings: list[Ending] = field(default_factory=list)
    progress: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    on_end: Callable[[Ending], None] | None = None
    busy: bool = False
    deadline: float = 0.0
    """Of the last call."""
    due: float | None = None
    waiting: dict[str, Announce] = field(default_factory=dict)
    announcing: set[str] = field(default_factory=set)
    streams: dict[GroupId, tuple[Group, Rank]] = field(default_factory=dict)
    over: set[GroupId] = field(default_factory=set)

    def __repr__(self) -> str:
        return self.name


@dataclass(eq=False)
class Channel:
    """An open conversation of two; what one says arrives in order."""

    ends: frozenset[PeerId]
    is_open: bool = True
    last: dict[PeerId, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record in the directory, kept alive while its owner lives."""

    owner: Peer
    sequence: int
    record: Record
    ttl_s: float
    announced_at: float
    keep: bool


class Swarm:
    """Peers, channels, directory, clock."""

    def __init__(self, seed: int = 0, weather: Weather | None = None, config: SessionConfig | None = None) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.weather = weather or Weather()
        self.config = config or SessionConfig(chunk_bytes=1 << 14, group_size_max=4)
        self.peers: dict[PeerId, Peer] = {}
        self.protocol_errors: list[str] = []
        self.unreachable: set[tuple[PeerId, PeerId]] = set()
        """(from, to) that cannot be dialled."""
        self.unseen: set[tuple[PeerId, PeerId]] = set()
        """(reader, owner): whose records a reader does not find in the directory."""
        self.sent: list[tuple[float, Peer, Send]] = []
        self.trace: Callable[[str], None] | None = None
        self._seed = seed
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._spun = 0
        self._channels: dict[frozenset[PeerId], Channel] = {}
        self._directory: dict[Key, dict[PeerId, list[Entry]]] = {}
        self._pumping: set[tuple[GroupId, PeerId, PeerId]] = set()

    # ---- what a test does

    def open(
        self,
        name: str,
        options: SessionOptions,
        *,
        config: SessionConfig | None = None,
        last_k: int = -1,
        dialable: bool = True,
    ) -> Peer:
        """A daemon opens its session. A name seen before is that daemon, restarted."""
        peer_id = PeerId(digest("peer on paper", self._seed, name).hex())
        old = self.peers.get(peer_id)
        assert old is None or not old.alive, f"{name} is running"
        incarnation = Incarnation(self.rng.getrandbits(64))
        here = Whereabouts(SWARM, peer_id, incarnation, Address(f"{name}:1"), dialable)
        rng = random.Random(self.rng.getrandbits(64))
        machine = Session(options, config or self.config, here, Seals(peer_id), rng, last_k=last_k, now=self.now)
        peer = Peer(name, peer_id, incarnation, machine, dialable)
        self.peers[peer_id] = peer
        self._carry_out(peer)
        return peer

    def start(self, peer: Peer, vector: Vector, call: Call) -> None:
        """Its trainer calls. Raises the SessionError of a call that can never work."""
        assert not peer.busy
        peer.busy, peer.deadline = True, self.now + call.timeout_s
        try:
            self._feed(peer, lambda: peer.machine.start(call, vector, self.now))
        except SessionError:
            peer.busy = False
            raise

    def average(
        self, calls: Mapping[Peer, tuple[Vector, Call]], *, apart_s: float = 0.01, limit_s: float = 120.0
    ) -> dict[Peer, Ending]:
        """All call within `apart_s`; how it ended for each that lives to see it."""
        before = {peer: len(peer.endings) for peer in calls}
        for peer, (vector, call) in calls.items():
            self.at(
                self.now + self.rng.uniform(0, apart_s), lambda p=peer, v=vector, c=call: self._start_alive(p, v, c)
            )
        self.run_until(lambda: all(len(p.endings) > n or not p.alive for p, n in before.items()), limit_s)
        return {peer: peer.endings[n] for peer, n in before.items() if len(peer.endings) > n}

    def train(self, peer: Peer, draw: Callable[[], tuple[Vector, Call]], *, pause: Span) -> None:
        """Its trainer calls again and again and computes between, until it dies or `peer.on_end` is cleared."""

        def again(_: Ending | None = None) -> None:
            self.at(self._after(pause), lambda: peer.on_end and self._start_alive(peer, *draw()))

        peer.on_end = again
        again()

    def at(self, moment: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(moment, self.now), next(self._count), do))

    def run_until(self, done: Callable[[], bool], limit_s: float = 120.0) -> None:
        """Raises AssertionError when it is not done in that much virtual time."""
        limit = self.now + limit_s
        while not done():
            assert self._heap and self._heap[0][0] <= limit, f"not done at {self.now:.3f}: {self._standing()}"
            self._next_event()

    def run_for(self, seconds: float) -> None:
        limit = self.now + seconds
        while self._heap and self._heap[0][0] <= limit:
            self._next_event()
        self.now = limit

    def kill(self, peer: Peer) -> None:
        """SIGKILL: nothing is said; others notice broken channels, each in its time."""
        peer.alive, peer.busy, peer.died_at = False, False, self.now
        for channel in [c for c in self._channels.values() if peer.id in c.ends]:
            self._break(channel, "connection lost")
        for other in self.peers.values():
            for group, _ in list(other.streams.values()) if other.alive else ():
                rank = group.rank_of(peer.id)
                if rank is not None:
                    self._stream_lost(other, group, rank, "its stream broke")

    def close(self, peer: Peer) -> None:
        """The session closes and says so."""
        self._feed(peer, lambda: peer.machine.close(self.now))
        peer.alive, peer.died_at = False, self.now

    def abandon(self, peer: Peer) -> None:
        """Its trainer dies; the daemon lives."""
        self._feed(peer, lambda: peer.machine.abandon(self.now))

    def cut(self, one: Peer, other: Peer) -> None:
        """Their conversation breaks; both may dial again."""
        if channel := self._channels.get(frozenset((one.id, other.id))):
            self._break(channel, "connection lost")

    def roster(self, key: Key) -> list[Sighting]:
        """What the directory answers under a key."""
        return [s for entries in self._directory.get(key, {}).values() if (s := self._newest_seen(entries))]

    def living(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.alive]

    # ---- the clock

    def _next_event(self) -> None:
        moment, _, do = heapq.heappop(self._heap)
        self._spun = self._spun + 1 if moment == self.now else 0
        assert self._spun < SPIN_MAX, f"the clock stands at {self.now}: {self._standing()}"
        self.now = moment
        do()

    def _after(self, span: Span) -> float:
        return self.now + self.rng.uniform(*span)

    def _standing(self) -> str:
        return "; ".join(f"{p}: {p.machine.status(self.now)}" for p in self.living() if p.busy)

    # ---- the driver's twin

    def _start_alive(self, peer: Peer, vector: Vector, call: Call) -> None:
        if not peer.alive:
            return
        try:
            self.start(peer, vector, call)
        except SessionError as error:
            self._end(peer, Ending(self.now, None, error, None))

    def _feed(self, peer: Peer, put: Callable[[], None]) -> None:
        if not peer.alive:
            return
        try:
            put()
        finally:
            self._carry_out(peer)

    def _carry_out(self, peer: Peer) -> None:
        while effects := peer.machine.take_effects():
            for effect in effects:
                self._do(peer, effect)
        due = peer.machine.next_deadline()
        if due != peer.due:
            peer.due = due
            if due is not None:
                self.at(due, lambda: self._ring(peer, due))

    def _ring(self, peer: Peer, due: float) -> None:
        if peer.due == due:
            peer.due = None
            self._feed(peer, lambda: peer.machine.handle_timer(self.now))

    def _do(self, peer: Peer, effect: Effect) -> None:
        match effect:
            case Send():
                self.sent.append((self.now, peer, effect))
                self._send(peer, effect)
            case Announce():
                peer.waiting[effect.slot] = effect
                if effect.slot not in peer.announcing:
                    peer.announcing.add(effect.slot)
                    self._announce_waiting(peer, effect.slot)
            case LookUp(key=key):
                self.at(self._after(self.weather.directory), lambda: self._bring_roster(peer, key))
            case Withdraw(key=key):
                self._directory.get(key, {}).pop(peer.id, None)
            case OpenStreams(group=group, rank=rank):
                self._open_streams(peer, group, rank)
            case CloseStreams(group_id=group_id):
                peer.streams.pop(group_id, None)
                peer.over.add(group_id)
            case Sendable(group_id=group_id, rank=rank):
                self._pump(peer, group_id, rank)
            case Compute(group_id=group_id, job_id=job_id, job=job):
                peer.machine.compute_finished(group_id, job_id, job(), self.now)
            case Progress(text=text):
                peer.progress.append(text)
            case Finished(receipt=receipt):
                self._end(peer, Ending(self.now, receipt, None, peer.machine.result))
            case Failed(error=error):
                assert isinstance(error, SessionError)
                self._end(peer, Ending(self.now, None, error, None))
            case Log(text=text):
                peer.log.append(text)
                if self.trace:
                    self.trace(f"{self.now:9.4f} {peer.name:>4} {text}")

    def _end(self, peer: Peer, ending: Ending) -> None:
        peer.busy = False
        peer.endings.append(ending)
        if peer.on_end is not None:
            on_end = peer.on_end
            self.at(self.now, lambda: on_end(ending))

    # ---- channels

    def _send(self, peer: Peer, send: Send) -> None:
        assert send.peer != peer.id, f"{peer} speaks to itself: {send.message}"
        ends = frozenset((peer.id, send.peer))
        channel = self._channels.get(ends)
        other = self.peers.get(send.peer)
        moment = self._after(self.weather.message)
        if channel is None:
            if not send.address:
                return
            moment = self._after(self.weather.dial)
            if other is None or not other.alive or not other.dialable or (peer.id, send.peer) in self.unreachable:
                lost = "could not be dialled"
                self.at(moment, lambda: self._feed(peer, lambda: peer.machine.peer_lost(send.peer, lost, self.now)))
                return
            channel = self._channels[ends] = Channel(ends)
        if other is None or not other.alive:
            return
        moment = channel.last[other.id] = max(moment, channel.last.get(other.id, 0.0))
        self.at(moment, lambda: self._deliver(peer, other, channel, send))

    def _deliver(self, sender: Peer, receiver: Peer, channel: Channel, send: Send) -> None:
        if channel.is_open:
            self._hear(receiver, sender, lambda: receiver.machine.receive(send.message, sender.id, self.now))

    def _hear(self, receiver: Peer, sender: Peer, put: Callable[[], None]) -> None:
        """Nonsense costs its sender the channel."""
        try:
            self._feed(receiver, put)
        except RemoteProtocolError as wrong:
            self.protocol_errors.append(f"{self.now:.4f} {receiver} of {sender}: {wrong}")
            self.cut(receiver, sender)

    def _break(self, channel: Channel, why: str) -> None:
        """Closed for new messages now; what is on its way may still come until the end notices."""
        self._channels.pop(channel.ends, None)
        for peer_id in channel.ends:
            (other,) = channel.ends - {peer_id}
            self.at(self._after(self.weather.noticed), lambda p=peer_id, o=other: self._notice(channel, p, o, why))

    def _notice(self, channel: Channel, peer_id: PeerId, other: PeerId, why: str) -> None:
        channel.is_open = False
        peer = self.peers[peer_id]
        if channel.ends not in self._channels:
            self._feed(peer, lambda: peer.machine.peer_lost(other, why, self.now))

    # ---- chunk streams

    def _open_streams(self, peer: Peer, group: Group, rank: Rank) -> None:
        peer.streams[group.group_id] = (group, rank)
        for other_rank, member in enumerate(group.members):
            other = self.peers[member.peer]
            if other is peer:
                continue
            if not other.alive or group.group_id in other.over:
                self._stream_lost(peer, group, Rank(other_rank), "that group is over there")
            elif group.group_id in other.streams:
                self._pump(peer, group.group_id, Rank(other_rank))
                self._pump(other, group.group_id, rank)
            else:
                patience = self.now + STRANGER_PATIENCE_S
                self.at(patience, lambda o=other, r=other_rank: self._give_up_stranger(peer, group, o, Rank(r)))

    def _give_up_stranger(self, peer: Peer, group: Group, other: Peer, rank: Rank) -> None:
        if group.group_id not in other.streams and group.group_id not in other.over:
            self._stream_lost(peer, group, rank, "no such group there")

    def _stream_lost(self, peer: Peer, group: Group, rank: Rank, why: str) -> None:
        def lose() -> None:
            if group.group_id in peer.streams:
                self._feed(peer, lambda: peer.machine.stream_lost(group.group_id, rank, why, self.now))

        self.at(self._after(self.weather.noticed), lose)

    def _pump(self, peer: Peer, group_id: GroupId, rank: Rank) -> None:
        """One chunk at a time from this member to that: pull, carry, deliver, again."""
        group, our_rank = peer.streams.get(group_id, (None, None))
        if group is None or our_rank is None or not peer.alive:
            return
        other = self.peers[group.members[rank].peer]
        way = (group_id, peer.id, other.id)
        if way in self._pumping or group_id not in other.streams or not other.alive:
            return
        outgoing = peer.machine.next_outgoing(group_id, rank)
        if outgoing is None:
            return
        chunk = replace(outgoing.chunk, payload=outgoing.encode())
        self._pumping.add(way)

        def arrive() -> None:
            self._pumping.discard(way)
            if group_id in other.streams and peer.alive:
                put = other.machine.chunk_received
                self._hear(other, peer, lambda: put(group_id, our_rank, chunk, self.now))
            self._pump(peer, group_id, rank)

        self.at(self._after(self.weather.message), arrive)

    # ---- the directory

    def _announce_waiting(self, peer: Peer, slot: str) -> None:
        effect = peer.waiting.pop(slot, None)
        if effect is None:
            peer.announcing.discard(slot)
            return
        self.at(self._after(self.weather.directory), lambda: self._store(peer, effect))

    def _store(self, peer: Peer, effect: Announce) -> None:
        if not peer.alive:
            return
        sequence = next(self._count) << 20  # leaves room for the renewals
        entry = Entry(peer, sequence, effect.record, effect.ttl_s, self.now, effect.slot == "lease")
        entries = self._directory.setdefault(effect.key, {}).setdefault(peer.id, [])
        entries[:] = [*entries[-3:], entry]
        self.at(self._after(self.weather.directory), lambda: self._announced(peer, effect))

    def _announced(self, peer: Peer, effect: Announce) -> None:
        self._bring_roster(peer, effect.key)
        self._announce_waiting(peer, effect.slot)

    def _bring_roster(self, peer: Peer, key: Key) -> None:
        sightings = [s for s in self.roster(key) if (peer.id, s.peer) not in self.unseen]
        self._feed(peer, lambda: peer.machine.roster_received(key, sightings, self.now))

    def _newest_seen(self, entries: Iterable[Entry]) -> Sighting | None:
        age = self.rng.uniform(0, self.weather.stale_s)
        seen = [entry for entry in entries if entry.announced_at + age <= self.now]
        if not seen:
            return None
        entry = seen[-1]
        died_at = self.now if entry.owner.alive else entry.owner.died_at
        renewals = int((died_at - entry.announced_at) / (entry.ttl_s / 3)) if entry.keep else 0
        left = entry.announced_at + renewals * entry.ttl_s / 3 + entry.ttl_s - self.now
        if left <= 0:
            return None
        return Sighting(entry.owner.id, entry.owner.incarnation, entry.sequence + renewals, left, entry.record)


@dataclass(frozen=True, slots=True)
class Seals:
    """Signatures on paper: whoever knows the signer's id can forge them, and nobody does."""

    me: PeerId

    def sign_plan(self, body: bytes) -> tuple[bytes, bytes]:
        return self.me.encode(), digest("seal", self.me, body)

    def plan_is_genuine(self, signer: PeerId, body: bytes, public_key: bytes, signature: bytes) -> bool:
        return public_key == signer.encode() and signature == digest("seal", signer, body)


def options_for(array: Array, **chosen: object) -> SessionOptions:
    """Session options for a single tensor "w" of this shape and dtype."""
    return SessionOptions(Vector.of({"w": array}).layout, **chosen)  # type: ignore[arg-type]

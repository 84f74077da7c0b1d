"""Daemons on paper: real Session machines, and a driver that carries out their effects in virtual time.

Knows channels that can break, chunk streams that are pulled, packets that get lost, jobs that take a while, daemons
that die or stand still. What an honest peer must never cause (RemoteProtocolError) is kept in `protocol_errors`; a
clock that stands still is Stuck.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

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
    Receivable,
    Send,
    Sendable,
    Withdraw,
)
from moshpitd.averaging.errors import RemoteProtocolError, SessionError
from moshpitd.averaging.link import LinkRates
from moshpitd.averaging.lossy_reduce import LossyReduce, Phase
from moshpitd.averaging.machine import Machine, machine_for
from moshpitd.averaging.messages import (
    Address,
    Ahead,
    Begin,
    Bound,
    Chunk,
    Closed,
    Group,
    Heartbeat,
    Holdings,
    Join,
    Kept,
    Leave,
    Message,
    PlanNotice,
    Ready,
    Record,
    Redirect,
    Sighting,
    Suspect,
    View,
)
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank, digest, short
from moshpitd.averaging.ranges import Numbers, Rows
from moshpitd.averaging.receipt import Receipt
from moshpitd.averaging.session import Call, SessionConfig, SessionOptions, Whereabouts
from moshpitd.averaging.vector import Layout, TensorSpec, Vector
from moshpitd.simulation.clock import Clock
from moshpitd.simulation.directory import Directory
from moshpitd.simulation.network import Link, Network, Span, Weather
from moshpitd.simulation.packet_loss import LossModel, PacketLoss

SWARM = b"a swarm on paper"
STRANGER_PATIENCE_S = 15.0
"""How long a stream waits for a group that the other end has not heard of."""
DATAGRAM_PATIENCE_S = 1.5
"""How long a daemon says hello by datagrams before it holds the path for blocked."""
END_AGAIN_S = 0.005
"""From telling the end of a stream of packets to telling it again; up to ENDS_MAX times, until it was heard."""
ENDS_MAX = 20
MESSAGE_BYTES = 250.0
"""What a small message is taken to cost."""

Array = npt.NDArray[np.floating]


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
        return next(iter(self.vector.arrays().values())).reshape(-1)


@dataclass(eq=False)
class Peer:
    """One daemon with one session, and its trainer."""

    name: str
    id: PeerId
    incarnation: Incarnation
    machine: Machine
    dialable: bool
    alive: bool = True
    died_at: float = 0.0
    frozen: list[Callable[[], None]] | None = None
    """What happened to it while it stands still; None while it runs."""
    stood_still_s: float = 0.0
    """In the call under way."""
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
    _frozen_at: float = 0.0

    def __repr__(self) -> str:
        return self.name


@dataclass(eq=False)
class Channel:
    """An open conversation of two; what one says arrives in order."""

    ends: frozenset[PeerId]
    is_open: bool = True
    last: dict[PeerId, float] = field(default_factory=dict)


class Observer:
    """Who wants to see what happens. Every method may be left as it is."""

    def call_began(self, peer: Peer, call: Call, vector: Vector, now: float) -> None:
        """A trainer called."""

    def group_began(self, peer: Peer, group: Group, rank: Rank, values: Vector, now: float) -> None:
        """A member begins to reduce `values`, which are the machine's own: copy what is to be kept."""

    def group_ended(self, peer: Peer, group_id: GroupId, result: Vector) -> None:
        """A member committed; what it holds is the machine's own."""

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        """A trainer got its answer."""


class Swarm:
    """Peers, channels, directory, clock."""

    def __init__(
        self,
        seed: int = 0,
        weather: Weather | None = None,
        config: SessionConfig | None = None,
        *,
        keep_messages: bool = False,
    ) -> None:
        self.clock = Clock()
        self.rng = random.Random(seed)
        self.network = Network(weather or Weather(), self.rng)
        self.directory = Directory(self.clock, self.network, self.rng)
        self.config = config or SessionConfig(chunk_bytes=1 << 14, group_size_max=4)
        self.peers: dict[PeerId, Peer] = {}
        self.observers: list[Observer] = []
        self.protocol_errors: list[str] = []
        self.packets = PacketLoss(LossModel(), self.rng)
        """The fate of lossy rounds' packets."""
        self.no_datagrams: set[frozenset[PeerId]] = set()
        """Pairs between which none passes."""
        self.unreachable: set[tuple[PeerId, PeerId]] = set()
        """(from, to) that cannot be dialled."""
        self.swallow: Callable[[Peer, Send], bool] | None = None
        """For stories: whether this message gets lost on its way."""
        self.on_chunk: Callable[[Peer, Peer, Chunk], None] | None = None
        """For stories: sees each chunk that a stream brings, with who sent and who gets it."""
        self.sent: list[tuple[float, Peer, Send]] = []
        """All messages, for tests that ask for them."""
        self.trace: Callable[[str], None] | None = None
        self.trace_messages = False
        self._keep_messages = keep_messages
        self._seed = seed
        self._channels: dict[frozenset[PeerId], Channel] = {}
        self._held: defaultdict[tuple[PeerId, PeerId], list[Callable[[], None]]] = defaultdict(list)
        """What waits for a partition to heal."""
        self._pumping: set[tuple[GroupId, PeerId, PeerId]] = set()
        self._last_packets: dict[tuple[PeerId, PeerId], float] = {}
        """When those under way from one to another arrive."""
        self._torn: set[tuple[GroupId, frozenset[PeerId]]] = set()
        """Streams that broke."""

    @property
    def now(self) -> float:
        return self.clock.now

    @property
    def weather(self) -> Weather:
        return self.network.weather

    @weather.setter
    def weather(self, weather: Weather) -> None:
        self.network.weather = weather

    # ---- what a story does

    def open(
        self,
        name: str,
        options: SessionOptions,
        *,
        config: SessionConfig | None = None,
        last_k: int = -1,
        dialable: bool = True,
        link: Link | None = None,
    ) -> Peer:
        """A daemon opens its session. A name seen before is that daemon, restarted. Names have up to 8 characters."""
        assert len(name) <= 8, name
        # The first 8 characters are what logs show of an id.
        peer_id = PeerId((name.ljust(8, "-") + digest("peer on paper", self._seed, name).hex())[:64])
        old = self.peers.get(peer_id)
        assert old is None or not old.alive, f"{name} is running"
        incarnation = Incarnation(self.rng.getrandbits(64))
        here = Whereabouts(SWARM, peer_id, incarnation, Address(f"{name}:1"), dialable)
        rng = random.Random(self.rng.getrandbits(64))
        config = config or self.config
        machine = machine_for(options, config, here, Seals(peer_id), rng, LinkRates(), last_k=last_k, now=self.now)
        peer = Peer(name, peer_id, incarnation, machine, dialable)
        self.peers[peer_id] = peer
        if link:
            self.network.attach(peer_id, link)
        self.note(f"{name} opens its session")
        self._carry_out(peer)
        return peer

    def start(self, peer: Peer, vector: Vector, call: Call, *, spares: Sequence[Vector] = ()) -> None:
        """Its trainer calls. Raises the SessionError of a call that can never work."""
        assert not peer.busy
        peer.busy, peer.deadline, peer.stood_still_s = True, self.now + call.timeout_s, 0.0
        for observer in self.observers:
            observer.call_began(peer, call, vector, self.now)
        if peer.frozen is not None:
            peer.frozen.append(lambda: self._start_late(peer, vector, call))
            return
        try:
            self._feed(peer, lambda: peer.machine.start(call, vector, self.now, spares=spares))
        except SessionError:
            peer.busy = False
            raise

    def average(
        self, calls: Mapping[Peer, tuple[Vector, Call]], *, apart_s: float = 0.01, limit_s: float = 120.0
    ) -> dict[Peer, Ending]:
        """All call within `apart_s`; how it ended for each that lives to see it."""
        before = {peer: len(peer.endings) for peer in calls}
        for peer, (vector, call) in calls.items():
            self.at(self.now + self.rng.uniform(0, apart_s), partial(self.start_if_alive, peer, vector, call))
        return self.run_until_ended(before, limit_s)

    def run_until_ended(self, before: Mapping[Peer, int], limit_s: float) -> dict[Peer, Ending]:
        """Until each of these peers had one ending more than before, or died; those endings."""
        waited_for = list(before.items())

        def done() -> bool:
            while waited_for:
                peer, count = waited_for[-1]
                if len(peer.endings) == count and peer.alive:
                    return False
                waited_for.pop()
            return True

        self.run_until(done, limit_s)
        return {peer: peer.endings[n] for peer, n in before.items() if len(peer.endings) > n}

    def train(self, peer: Peer, draw: Callable[[], tuple[Vector, Call]], *, pause: Span) -> None:
        """Its trainer calls again and again and computes between, until it dies or `peer.on_end` is cleared."""

        def again(_: Ending | None = None) -> None:
            def call() -> None:
                if peer.on_end:
                    self.start_if_alive(peer, *draw())

            self.at(self._after(pause), call)

        peer.on_end = again
        again()

    def at(self, moment: float, do: Callable[[], None]) -> None:
        self.clock.at(moment, do)

    def run_until(self, done: Callable[[], bool], limit_s: float = 120.0) -> None:
        """Raises Stuck when it is not done in that much virtual time."""
        self.clock.run_until(done, limit_s, self.standing)

    def run_for(self, seconds: float) -> None:
        self.clock.run_for(seconds, self.standing)

    def kill(self, peer: Peer, *, silent: bool = False) -> None:
        """SIGKILL: nothing is said; others notice broken channels, each in its time. Silent, as a machine that loses
        its power: they notice only that nothing comes any more."""
        self.note(f"{peer.name} {'loses its power' if silent else 'is killed'}")
        peer.alive, peer.busy, peer.died_at, peer.frozen = False, False, self.now, None
        after_s = self.weather.keepalive_s if silent else 0.0
        for channel in [c for c in self._channels.values() if peer.id in c.ends]:
            self._break(channel, "connection lost", after_s)
        self._tear_streams(peer, None, "its stream broke", after_s)

    def close(self, peer: Peer) -> None:
        """The session closes and says so."""
        self.note(f"{peer.name} leaves")
        self._feed(peer, lambda: peer.machine.close(self.now))
        peer.alive, peer.died_at = False, self.now

    def abandon(self, peer: Peer) -> None:
        """Its trainer dies; the daemon lives."""
        self.note(f"{peer.name}'s trainer dies")
        self._feed(peer, lambda: peer.machine.abandon(self.now))

    def pause(self, peer: Peer) -> None:
        """SIGSTOP."""
        if peer.alive and peer.frozen is None:
            self.note(f"{peer.name} stands still")
            peer.frozen, peer._frozen_at = [], self.now

    def resume(self, peer: Peer) -> None:
        """SIGCONT: everything that came meanwhile is there at once, its timers first."""
        if not peer.alive or peer.frozen is None:
            return
        self.note(f"{peer.name} goes on")
        missed, peer.frozen = peer.frozen, None
        peer.stood_still_s += self.now - peer._frozen_at
        self._feed(peer, lambda: peer.machine.handle_timer(self.now))
        for put in missed:
            self._feed(peer, put)

    def part(self, senders: Iterable[Peer], receivers: Iterable[Peer], *, one_way: bool = False) -> None:
        """Nothing gets from these to those any more, and, unless one way, nothing back."""
        ones, others = [p.id for p in senders], [p.id for p in receivers]
        names = [", ".join(short(p).rstrip("-") for p in side) for side in (ones, others)]
        self.note(f"{names[0]} cannot reach {names[1]}" if one_way else f"{names[0]} and {names[1]} are parted")
        self.network.block(ones, others, self.now)
        if not one_way:
            self.network.block(others, ones, self.now)
        for channel in list(self._channels.values()):
            one, other = sorted(channel.ends)
            if not self.network.hears(one, other):
                self.at(self.now + self.weather.keepalive_s, partial(self._break_if_still_parted, channel))

    def heal(self) -> None:
        """All partitions end; what was held arrives."""
        self.note("the net heals")
        self.network.heal()
        held, self._held = self._held, defaultdict(list)
        for (sender, receiver), deliveries in held.items():
            moment = self.network.arrival(sender, receiver, MESSAGE_BYTES, self.weather.message, self.now)
            for deliver in deliveries:
                self.clock.at(moment, deliver)

    def cut(self, one: Peer, other: Peer) -> None:
        """Their conversation breaks; both may dial again."""
        if channel := self._channels.get(frozenset((one.id, other.id))):
            self.note(f"the connection of {one.name} and {other.name} breaks")
            self._break(channel, "connection lost")

    def living(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.alive]

    def note(self, text: str) -> None:
        """A line of the trace that is nobody's log."""
        if self.trace:
            self.trace(f"{self.now:9.4f} ** {text}")

    def standing(self) -> str:
        return "; ".join(f"{p}: {p.machine.status(self.now)}" for p in self.living() if p.busy)

    # ---- the driver's twin

    def _after(self, span: Span) -> float:
        return self.now + self.rng.uniform(*span)

    def start_if_alive(self, peer: Peer, vector: Vector, call: Call) -> None:
        if not peer.alive or peer.busy:
            return
        try:
            self.start(peer, vector, call)
        except SessionError as error:
            self._end(peer, Ending(self.now, None, error, None))

    def _start_late(self, peer: Peer, vector: Vector, call: Call) -> None:
        """Its daemon stood still when the trainer called."""
        try:
            peer.machine.start(replace(call, timeout_s=max(1e-3, peer.deadline - self.now)), vector, self.now)
        except SessionError as error:
            self._end(peer, Ending(self.now, None, error, None))

    def _feed(self, peer: Peer, put: Callable[[], None]) -> None:
        if not peer.alive:
            return
        if peer.frozen is not None:
            peer.frozen.append(put)
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
                self.clock.at(due, lambda: self._ring(peer, due))

    def _ring(self, peer: Peer, due: float) -> None:
        if peer.due == due and peer.frozen is None:
            peer.due = None
            self._feed(peer, lambda: peer.machine.handle_timer(self.now))

    def _do(self, peer: Peer, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(peer, effect)
            case Announce():
                peer.waiting[effect.slot] = effect
                if effect.slot not in peer.announcing:
                    peer.announcing.add(effect.slot)
                    self._announce_waiting(peer, effect.slot)
            case LookUp(key=key):
                self.clock.at(self._after(self.weather.directory), lambda: self._bring_roster(peer, key))
            case Withdraw(key=key):
                self.directory.withdraw(peer.id, key)
            case OpenStreams(group=group, rank=rank, lossy_codec=codec):
                values = peer.machine.contribution
                for observer in self.observers if values else ():
                    assert values is not None
                    observer.group_began(peer, group, rank, values, self.now)
                self._open_streams(peer, group, rank)
                if codec:
                    self._open_paths(peer, group, rank)
            case CloseStreams(group_id=group_id):
                peer.streams.pop(group_id, None)
                peer.over.add(group_id)
                result = peer.machine.result_of(group_id)
                for observer in self.observers if result else ():
                    assert result is not None
                    observer.group_ended(peer, group_id, result)
            case Sendable(group_id=group_id, rank=rank):
                self._pump(peer, group_id, rank)
                self.clock.at(self.now, partial(self._pump_packets, peer, group_id, rank))
            case Receivable(group_id=group_id, rank=rank):
                self._read_on(peer, group_id, rank)
            case Compute():
                self._compute(peer, effect)
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
                    self.trace(f"{self.now:9.4f} {peer.name}: {_named(text)}")

    def _end(self, peer: Peer, ending: Ending) -> None:
        peer.busy = False
        peer.endings.append(ending)
        for observer in self.observers:
            observer.call_ended(peer, ending)
        if peer.on_end is not None:
            on_end = peer.on_end
            self.clock.at(self.now, lambda: on_end(ending))

    def _compute(self, peer: Peer, effect: Compute) -> None:
        """A job in a thread reads its inputs at some moment before it ends."""
        early = (effect.job(),) if self.rng.random() < 0.5 else None
        took_s = effect.cost_bytes * self.network.bytes_scale / self.weather.compute_bytes_s

        def end() -> None:
            value = early[0] if early else effect.job()  # once: what a compressor writes is its state
            self._feed(peer, lambda: peer.machine.compute_finished(effect.group_id, effect.job_id, value, self.now))

        self.clock.at(self.now + took_s, end)

    # ---- channels

    def _send(self, peer: Peer, send: Send) -> None:
        assert send.peer != peer.id, f"{peer} speaks to itself: {send.message}"
        if self._keep_messages:
            self.sent.append((self.now, peer, send))
        other = self.peers.get(send.peer)
        if self.trace and self.trace_messages and not isinstance(send.message, Heartbeat):
            self.trace(f"{self.now:9.4f} {peer.name} -> {_named(short(send.peer))}: {_told(send.message)}")
        if self.swallow and self.swallow(peer, send):
            self.note(f"that {type(send.message).__name__} is lost")
            return
        ends = frozenset((peer.id, send.peer))
        channel = self._channels.get(ends)
        moment = self.network.arrival(peer.id, send.peer, MESSAGE_BYTES, self.weather.message, self.now)
        if channel is None:
            if not send.address:
                return
            moment += self.rng.uniform(*self.weather.dial)
            if why := self._why_unreachable(peer, other, send.peer):
                silent = other is None or not self.network.hears(peer.id, send.peer)
                late = self.now + self.weather.dial_timeout_s if silent else moment
                self.clock.at(late, lambda: self._feed(peer, lambda: peer.machine.peer_lost(send.peer, why, self.now)))
                return
            channel = self._channels[ends] = Channel(ends)
        if other is None or not other.alive:
            return
        moment = channel.last[other.id] = max(moment, channel.last.get(other.id, 0.0))
        self._carry(peer.id, other.id, moment, lambda: self._deliver(peer, other, channel, send))

    def _why_unreachable(self, peer: Peer, other: Peer | None, to: PeerId) -> str:
        gone = other is None or not other.alive or not other.dialable
        return "could not be dialled" if gone or (peer.id, to) in self.unreachable or not self.network.hears(
            peer.id, to
        ) else ""  # fmt: skip

    def _carry(self, sender: PeerId, receiver: PeerId, moment: float, deliver: Callable[[], None]) -> None:
        if self.network.blocked_since(sender, receiver) is not None:
            self._held[sender, receiver].append(deliver)
        else:
            self.clock.at(moment, deliver)

    def _deliver(self, sender: Peer, receiver: Peer, channel: Channel, send: Send) -> None:
        if channel.is_open:
            self._hear(receiver, sender, lambda: receiver.machine.receive(send.message, sender.id, self.now))

    def _hear(self, receiver: Peer, sender: Peer, put: Callable[[], None]) -> None:
        """Nonsense costs its sender the channel."""

        def guarded() -> None:
            try:
                put()
            except RemoteProtocolError as wrong:
                self.protocol_errors.append(f"{self.now:.4f} {receiver} of {sender}: {wrong}")
                self.cut(receiver, sender)

        self._feed(receiver, guarded)

    def _break_if_still_parted(self, channel: Channel) -> None:
        one, other = sorted(channel.ends)
        if self._channels.get(channel.ends) is channel and not self.network.hears(one, other):
            self._break(channel, "connection lost")
            self._tear_streams(self.peers[one], self.peers[other], "its stream broke", 0.0)

    def _break(self, channel: Channel, why: str, after_s: float = 0.0) -> None:
        """Closed for new messages now; what is on its way may still come until the end notices."""
        if not after_s:
            self._channels.pop(channel.ends, None)
        for peer_id in sorted(channel.ends):
            (other,) = channel.ends - {peer_id}
            moment = self._after(self.weather.noticed) + after_s
            self.clock.at(moment, partial(self._notice, channel, peer_id, other, why))

    def _notice(self, channel: Channel, peer_id: PeerId, other: PeerId, why: str) -> None:
        channel.is_open = False
        peer = self.peers[peer_id]
        if self._channels.get(channel.ends) is channel:
            del self._channels[channel.ends]
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
                self.at(patience, partial(self._give_up_stranger, peer, group, other, Rank(other_rank)))

    def _give_up_stranger(self, peer: Peer, group: Group, other: Peer, rank: Rank) -> None:
        if group.group_id not in other.streams and group.group_id not in other.over:
            self._stream_lost(peer, group, rank, "no such group there")

    def _tear_streams(self, peer: Peer, only: Peer | None, why: str, after_s: float) -> None:
        """All streams of this peer break, or those with `only`."""
        for other in [only] if only else list(self.peers.values()):
            if other is peer:
                continue
            for one, two in ((peer, other), (other, peer)):
                for group, _ in list(one.streams.values()) if one.alive else ():
                    rank = group.rank_of(two.id)
                    if rank is not None:
                        self._torn.add((group.group_id, frozenset((one.id, two.id))))
                        self._stream_lost(one, group, rank, why, after_s)

    def _stream_lost(self, peer: Peer, group: Group, rank: Rank, why: str, after_s: float = 0.0) -> None:
        def lose() -> None:
            if group.group_id in peer.streams:
                self._feed(peer, lambda: peer.machine.stream_lost(group.group_id, rank, why, self.now))

        self.clock.at(self._after(self.weather.noticed) + after_s, lose)

    def _pump(self, peer: Peer, group_id: GroupId, rank: Rank) -> None:
        """One chunk at a time from this member to that: pull, carry, deliver, again."""
        group, our_rank = peer.streams.get(group_id, (None, None))
        if group is None or our_rank is None or not peer.alive or peer.frozen is not None:
            return
        other = self.peers[group.members[rank].peer]
        way = (group_id, peer.id, other.id)
        if group_id in other.over and peer.machine.lossy(group_id):  # who has what it needs waits for nobody
            self._stream_lost(peer, group, rank, "its stream ended")
        if way in self._pumping or group_id not in other.streams or not other.alive:
            return
        if self._torn and (group_id, frozenset((peer.id, other.id))) in self._torn:
            return
        if other.machine.is_ahead(group_id, our_rank, self.now):
            return
        outgoing = peer.machine.next_outgoing(group_id, rank)
        if outgoing is None:
            self.clock.at(self.now, partial(self._feed_lossy, peer, group_id, LossyReduce.pulled_dry))
            return
        chunk = replace(outgoing.chunk, payload=outgoing.encode())
        self._pumping.add(way)

        def arrive() -> None:
            def take_in() -> None:
                self._pumping.discard(way)
                if group_id in other.streams and peer.alive:
                    if self.on_chunk:
                        self.on_chunk(peer, other, chunk)
                    other.machine.chunk_received(group_id, our_rank, chunk, self.now)
                # The window opens again only when the other end has read: no daemon that stands still is flooded.
                self.clock.at(self.now, lambda: self._pump(peer, group_id, rank))

            self._hear(other, peer, take_in)

        size = len(chunk.payload) * self.network.bytes_scale
        self._carry(
            peer.id, other.id, self.network.arrival(peer.id, other.id, size, self.weather.message, self.now), arrive
        )

    def _read_on(self, peer: Peer, group_id: GroupId, rank: Rank) -> None:
        group, our_rank = peer.streams.get(group_id, (None, None))
        if group is not None and our_rank is not None:
            self._pump(self.peers[group.members[rank].peer], group_id, our_rank)

    # ---- packets

    def _open_paths(self, peer: Peer, group: Group, rank: Rank) -> None:
        for other_rank, member in enumerate(group.members):
            if member.peer != peer.id:
                other = self.peers[member.peer]
                if group.group_id in other.streams:
                    self.clock.at(self.now, partial(self._pump_packets, other, group.group_id, rank))
                look = partial(self._look_at_path, peer, group, other, Rank(other_rank))
                self.at(self.now + DATAGRAM_PATIENCE_S, look)

    def _look_at_path(self, peer: Peer, group: Group, other: Peer, rank: Rank) -> None:
        heard = group.group_id in other.streams or group.group_id in other.over
        if not heard or not self._datagrams_pass(peer, other):
            self._feed_lossy(peer, group.group_id, lambda round_, now: round_.path_blocked(rank, now))

    def _datagrams_pass(self, one: Peer, other: Peer) -> bool:
        return self.network.hears(one.id, other.id) and frozenset((one.id, other.id)) not in self.no_datagrams

    def _feed_lossy(self, peer: Peer, group_id: GroupId, put: Callable[[LossyReduce, float], None]) -> None:
        self._feed(peer, lambda: peer.machine.feed_lossy(group_id, put, self.now))

    def _pump_packets(self, peer: Peer, group_id: GroupId, rank: Rank) -> None:
        """Burst by burst, as soon as the other end has said hello; nobody notices what gets lost."""
        group, our_rank = peer.streams.get(group_id, (None, None))
        round_ = peer.machine.lossy(group_id)
        if group is None or our_rank is None or round_ is None or not peer.alive:
            return
        other = self.peers[group.members[rank].peer]
        is_there = group_id in other.streams or group_id in other.over or not other.alive
        if peer.frozen is not None:
            peer.frozen.append(partial(self._pump_packets, peer, group_id, rank))
            return
        if not is_there or not self._datagrams_pass(peer, other):
            return
        burst = round_.next_burst(rank)
        if burst is None:
            self._feed_lossy(peer, group_id, LossyReduce.pulled_dry)
            return
        packets = burst.encode()
        size = sum(each.rows.size for each in packets) * self.network.bytes_scale
        moment = self.network.arrival(peer.id, other.id, size, self.weather.message, self.now, resent=False)
        way = (peer.id, other.id)  # packets overtake each other by little, and bursts do not
        moment = self._last_packets[way] = max(moment, self._last_packets.get(way, 0.0))
        for each in packets:
            kept = np.array([self.packets.arrives(peer.id, other.id) for _ in each.numbers], np.bool_)
            if kept.any():
                numbers, rows = each.numbers[kept], each.rows[kept]
                offsets = burst.cut.piece.start + (numbers - burst.cut.first) * burst.cut.range_elements
                arrived = (burst.phase, our_rank, numbers - burst.span_first, offsets, rows)
                self.at(moment, partial(self._packets_arrive, other, peer, group_id, arrived))
        if burst.ends:
            for told in range(ENDS_MAX):
                if self.packets.arrives(peer.id, other.id, later=told > 0):
                    ends = partial(self._stream_ends, other, group_id, burst.phase, our_rank)
                    self.at(moment + told * END_AGAIN_S, ends)
                    break
        self.clock.at(self.now, partial(self._pump_packets, peer, group_id, rank))

    def _packets_arrive(
        self, to: Peer, sender: Peer, group_id: GroupId, arrived: tuple[Phase, Rank, Numbers, Numbers, Rows]
    ) -> None:
        def put(round_: LossyReduce, now: float) -> None:
            round_.packets_received(*arrived, now)

        self._hear(to, sender, lambda: to.machine.feed_lossy(group_id, put, self.now))

    def _stream_ends(self, to: Peer, group_id: GroupId, phase: Phase, sender: Rank) -> None:
        self._feed_lossy(to, group_id, lambda round_, now: round_.stream_ended(phase, sender, now))

    # ---- the directory

    def _announce_waiting(self, peer: Peer, slot: str) -> None:
        effect = peer.waiting.pop(slot, None)
        if effect is None:
            peer.announcing.discard(slot)
            return
        self.clock.at(self._after(self.weather.directory), lambda: self._store(peer, effect))

    def _store(self, peer: Peer, effect: Announce) -> None:
        if not peer.alive:
            return
        self.directory.store(peer.id, peer.incarnation, effect, lambda: peer.alive)
        self.clock.at(self._after(self.weather.directory), lambda: self._announced(peer, effect))

    def _announced(self, peer: Peer, effect: Announce) -> None:
        self._bring_roster(peer, effect.key)
        self._announce_waiting(peer, effect.slot)

    def _bring_roster(self, peer: Peer, key: Key) -> None:
        if peer.alive:
            sightings = self.directory.read(key, peer.id, peer.incarnation)
            self._feed(peer, lambda: peer.machine.roster_received(key, sightings, self.now))

    def roster(self, key: Key) -> list[Sighting[Record]]:
        """What the directory answers under a key to one that never looked."""
        return self.directory.everything(key)


@dataclass(frozen=True, slots=True)
class Seals:
    """Signatures on paper: whoever knows the signer's id can forge them, and nobody does."""

    me: PeerId

    def sign_plan(self, body: bytes) -> tuple[bytes, bytes]:
        return self.me.encode(), digest("seal", self.me, body)

    def plan_is_genuine(self, signer: PeerId, body: bytes, public_key: bytes, signature: bytes) -> bool:
        return public_key == signer.encode() and signature == digest("seal", signer, body)


def options_for(array: Array, *, shape: tuple[int, ...] | None = None, **chosen: object) -> SessionOptions:
    """Session options for a single tensor "w" of this dtype, and of this shape or another."""
    spec = TensorSpec("w", shape or array.shape, array.dtype.name)
    return SessionOptions(Layout.of([spec]), **chosen)  # type: ignore[arg-type]


def _named(text: str) -> str:
    """A log line with peers called by their names."""
    return re.sub(r"\b([A-Za-z0-9]+)-+(?![A-Za-z0-9])", r"\1", text)


def _told(message: Message) -> str:
    """A message in a few words."""
    match message:
        case Join(k=k, j=j, applicant=applicant, passed_on=passed_on):
            who = f" for {_named(short(applicant.peer))}" if passed_on else ""
            return f"Join {k}.{j}{who}"
        case Begin(group=group):
            return "Begin " + " ".join(_named(short(member.peer)) for member in group.members)
        case Kept(leading=leading, present=present, expected=expected):
            return f"Kept, {present} of {expected} here" if leading else "Kept until one before us answers"
        case Leave(now_k=now_k, waiting=waiting) if now_k:
            return f"Leave, {'waits' if waiting else 'can be met'} in {now_k}"
        case Closed(k=k, j=j, now_k=now_k, waiting=waiting):
            return f"Closed {k}.{j}, {'waits' if waiting else 'can be met'} in {now_k}"
        case Bound(why=why):
            return f"Bound: {_named(why)}"
        case PlanNotice(plan=plan):
            return f"PlanNotice {plan.version}: {plan.grid} from {plan.first_k} on"
        case Ahead(k=k, j=j):
            return f"Ahead, comes to {k}.{j} next"
        case Redirect(leader=leader):
            return f"Redirect to {_named(short(leader))}"
        case View(number=number, live=live, why=why):
            return f"View {number} of ranks {' '.join(map(str, live))}: {_named(why)}"
        case Suspect(rank=rank, why=why):
            return f"Suspect rank {rank}: {_named(why)}"
        case Ready(view=view) | Holdings(view=view):
            return f"{type(message).__name__} in view {view}"
        case _:
            return type(message).__name__

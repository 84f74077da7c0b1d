"""Runs sessions on the real clock: feeds inputs, carries out effects, one timer a session.

Decides nothing. Everything that arrives (a trainer's call, a peer's message, a roster, a chunk, the end of a job, the
timer) is handed to the session's machine; then the machine's effects are carried out, until there are none left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import assert_never

from moshpitd.averaging.all_reduce import Outgoing
from moshpitd.averaging.announcements import Roster
from moshpitd.averaging.compute_budget import BudgetOptions
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
from moshpitd.averaging.errors import (
    Exhausted,
    NoGroup,
    Precondition,
    RemoteProtocolError,
    SessionError,
    SessionNotFound,
    Unavailable,
)
from moshpitd.averaging.link import LinkRates
from moshpitd.averaging.lossy_reduce import Burst, LossyReduce, Phase
from moshpitd.averaging.machine import Machine, machine_for
from moshpitd.averaging.messages import Address, Chunk, Message, Record, Sighting
from moshpitd.averaging.names import GroupId, Key, PeerId, Rank, short
from moshpitd.averaging.receipt import BudgetLine, Receipt
from moshpitd.averaging.session import Call, SessionConfig, SessionOptions, SessionStatus, Whereabouts
from moshpitd.averaging.vector import Layout, Vector
from moshpitd.directory import Directory, DirectoryError
from moshpitd.identity import Identity, peer_id, verify
from moshpitd.peer import wire
from moshpitd.peer.datagrams import Frames, Integers
from moshpitd.peer.door import PeerDoor
from moshpitd.telemetry.loop_lag import LoopLag

log = logging.getLogger("moshpitd.session")

NEIGHBOURS_ASKED = 3


@dataclass(frozen=True, slots=True)
class DriverConfig:
    """How machines are run."""

    inline_bytes_max: int = 8 << 20
    """Jobs that read no more than this run on the event loop, some milliseconds at most; larger ones in a thread, where
    numpy lets the loop go. Threads cost a tenth of a round's processor time on a machine that has no core to spare."""
    announce_interval_s: float = 0.5
    """In the long run a session's record is made known at most this often, the newest one. A trainer that averages
    faster than this would otherwise spend more on the directory than on averaging."""
    announce_burst: int = 6
    """So many may come without a pause: a session that opens, hears of a plan and ends its first averaging must be
    known at once, or newcomers would take a swarm that counts for one that begins."""
    threads: int = 2
    """For jobs. More than the machine has cores to spare only makes trainers slower."""
    dialable_patience_s: float = 3.0
    """How long the first session waits to hear whether others can dial us; without an answer we claim that they can."""
    sessions_max: int = 64
    receipts_max: int = 200
    """Receipts kept for `rounds` and `explain`."""


@dataclass(frozen=True, slots=True)
class ProgressNote:
    """What an averaging waits for, for people."""

    text: str
    fraction: float
    """From 0 to 1."""


@dataclass(frozen=True, slots=True)
class Averaged:
    """How an averaging ended. `vector` is the result; the caller's own vector when the outcome is alone."""

    receipt: Receipt
    vector: Vector


@dataclass(frozen=True, slots=True)
class SessionLine:
    """A session for `status`."""

    session_id: str
    options: SessionOptions
    status: SessionStatus


@dataclass(frozen=True, slots=True)
class PeerLine:
    """A known peer for `peers`."""

    peer: PeerId
    address: str
    state: str
    """live or suspect"""
    sessions: tuple[str, ...]
    heard_s_ago: float | None


class Driver:
    """The face to the local door; to the peer door it is the inbox. Its coroutines may raise a SessionError."""

    def __init__(
        self,
        *,
        identity: Identity,
        swarm_id: bytes,
        directory: Directory,
        peer_door: PeerDoor,
        announce: str,
        announce_bulk_port: int = 0,
        session_config: SessionConfig,
        config: DriverConfig | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._identity = identity
        self._directory = directory
        self._door = peer_door
        self._config = config or DriverConfig()
        self._session_config = session_config
        self._rng = rng or random.Random(random.SystemRandom().getrandbits(128))
        self._here = Whereabouts(
            swarm_id, identity.peer_id, identity.incarnation, Address(announce), True, announce_bulk_port
        )
        self._credentials = SigningCredentials(identity, swarm_id)
        self._pool = ThreadPoolExecutor(self._config.threads, thread_name_prefix="moshpitd-compute")
        self._running: dict[str, Running] = {}
        self._by_key: dict[Key, Running] = {}
        self._last_k: dict[tuple[str, bytes], int] = {}
        self._receipts: deque[tuple[str, Receipt]] = deque(maxlen=self._config.receipts_max)
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._opened = 0
        self._ended = 0
        self.link = LinkRates()
        """What the rounds of all sessions showed of this machine's line."""
        self.loop_lag = LoopLag()
        """Measured while rounds run."""
        self.dialable: bool | None = None
        """Whether another peer could dial us; None while nobody tried."""
        self._dialable_known = asyncio.Event()
        peer_door.announce_as(Address(announce))
        self.spawn(self._learn_dialable())

    # ---- the face to the local door

    async def open_session(self, options: SessionOptions) -> str:
        """Open a session; returns its id. Precondition when its name is taken on this daemon."""
        if self._draining:
            raise Unavailable("the daemon is leaving: no new sessions")
        await self._dialable_or_nobody_to_ask()
        if len(self._running) >= self._config.sessions_max:
            raise Exhausted(f"{len(self._running)} sessions are open on this daemon: close one first")
        taken = next((r for r in self._running.values() if r.machine.options.name == options.name), None)
        if taken is not None:
            raise Precondition(
                f"session {options.name!r} is just being closed on this daemon, its last averaging is finished for the "
                "others: try again in a moment, or give this one another name"
            )
        loop = asyncio.get_running_loop()
        last_k = self._last_k.get((options.name, options.layout.digest), -1)
        machine = machine_for(
            options,
            self._session_config,
            self._here,
            self._credentials,
            self._rng,
            self.link,
            last_k=last_k,
            now=loop.time(),
        )
        self._opened += 1
        running = Running(f"{options.name}-{self._opened}", machine, self)
        self._running[running.session_id] = running
        self._by_key[machine.key] = running
        running.carry_out()
        return running.session_id

    async def close_session(self, session_id: str) -> None:
        """Close; idempotent. A running round is finished for the others, then its result is discarded."""
        running = self._running.get(session_id)
        if running is None:
            return
        if running.ending is not None and not running.ending.done():
            running.feed(running.machine.abandon)
            await asyncio.wait([running.ending])
        if self._running.pop(session_id, None) is None:
            return  # closed meanwhile
        self._remember(running)
        running.feed(running.machine.close)
        running.stop()
        self._by_key.pop(running.machine.key, None)

    def set_budget(self, session_id: str, options: BudgetOptions) -> BudgetLine:
        """Give the session a compute budget, or change it; what its next step goes by."""
        running = self._running.get(session_id)
        if running is None:
            raise SessionNotFound(f"no session {session_id!r}: open one first (the daemon may have been restarted)")
        running.feed(partial(running.machine.set_budget, options))
        line = running.machine.status(asyncio.get_running_loop().time()).budget
        assert line is not None
        return line

    def weighed(self, session_id: str, call: Call) -> Call:
        """What a trainer's call weighs in this session."""
        running = self._running.get(session_id)
        if running is None:
            raise SessionNotFound(f"no session {session_id!r}: open one first (the daemon may have been restarted)")
        weighed = running.machine.weighed(call, asyncio.get_running_loop().time())
        running.carry_out()
        return weighed

    async def average(
        self,
        session_id: str,
        call: Call,
        vector: Vector,
        progress: Callable[[ProgressNote], None],
        spares: Sequence[Vector] = (),
    ) -> Averaged:
        """Average; the result lies in one of the spares, as far as they reach. Cancelling the caller detaches it: the
        round is finished for the others and discarded, and until it is over vector and spares are still in use."""
        if self._draining:
            raise Unavailable("the daemon is leaving: no new rounds")
        call.check()
        call = await self._once_ready(call, progress)
        running = self._running.get(session_id)
        if running is None:
            raise SessionNotFound(f"no session {session_id!r}: open one first (the daemon may have been restarted)")
        call = await self._once_free(running, call)
        async with running.still:
            pass
        ending = running.start(call, vector, progress, spares)
        try:
            return await asyncio.shield(ending)
        except asyncio.CancelledError:
            running.progress = None
            running.feed(running.machine.abandon)
            ending.add_done_callback(lambda done: done.exception())  # nobody asks for it any more
            raise

    def is_free(self, session_id: str, spare: Vector) -> bool:
        """Whether nothing that is still under way in this session may write to this buffer."""
        running = self._running.get(session_id)
        return running is not None and running.machine.is_free(spare)

    def holds(self, session_id: str, vector: Vector) -> bool:
        """Whether this buffer, written by the trainer for a call that has ended, may still be read: see `Machine`."""
        running = self._running.get(session_id)
        return running is not None and running.machine.holds(vector)

    async def run_jobs(self, jobs: Iterable[Callable[[], None]], total_bytes: int) -> None:
        """Do all, in any order: on the loop, with its turn between two, if they are little in all, else in threads."""
        if total_bytes <= self._config.inline_bytes_max:
            for job in jobs:
                job()
                await asyncio.sleep(0)
            return
        loop, left = asyncio.get_running_loop(), iter(jobs)

        async def work() -> None:
            for job in left:
                await loop.run_in_executor(self._pool, job)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._config.threads):
                group.create_task(work())

    async def feedback_layout(self, session_id: str) -> Layout:
        """Of the session's error feedback. Precondition where there is none."""
        async with self._still(session_id) as running:
            return running.machine.feedback_layout()

    async def save_feedback(self, session_id: str) -> Vector:
        """A copy of the session's error feedback, taken between averagings. Precondition where there is none."""
        async with self._still(session_id) as running:
            running.machine.feedback_layout()
            return await asyncio.get_running_loop().run_in_executor(self._pool, running.machine.save_feedback)

    async def load_feedback(self, session_id: str, state: Vector) -> None:
        """Go on from a saved one. InvalidInput where it is of other tensors or another compressor."""
        async with self._still(session_id) as running:
            loop = asyncio.get_running_loop()
            last_k = await loop.run_in_executor(self._pool, running.machine.load_feedback, state)
            running.feed(partial(running.machine.count_on_from, last_k))

    @contextlib.asynccontextmanager
    async def _still(self, session_id: str) -> AsyncIterator[Running]:
        """Between two averagings of the session: waits for the one under way."""
        running = self._running.get(session_id)
        if running is None:
            raise SessionNotFound(f"no session {session_id!r}: open one first (the daemon may have been restarted)")
        async with running.still:
            if running.ending is not None and not running.ending.done():
                await asyncio.wait([running.ending])
            yield running

    async def _once_ready(self, call: Call, progress: Callable[[ProgressNote], None]) -> Call:
        """Wait until the daemon found its swarm; returns the call with the time that is left."""
        if self._directory.is_ready:
            return call
        loop = asyncio.get_running_loop()
        began = loop.time()
        progress(ProgressNote(f"this daemon is not part of its swarm yet: {self._directory.waiting_for()}", 0.0))
        try:
            async with asyncio.timeout(call.timeout_s):
                await self._directory.wait_ready()
        except TimeoutError:
            raise Unavailable(f"the daemon is not part of its swarm: {self._directory.waiting_for()}") from None
        return replace(call, timeout_s=max(0.001, call.timeout_s - (loop.time() - began)))

    async def _once_free(self, running: Running, call: Call) -> Call:
        """A caller that detached waits until its last averaging has ended; returns the call with what time is left."""
        if running.ending is None or running.ending.done() or running.progress is not None:
            return call
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.wait([running.ending], timeout=call.timeout_s)
        if not running.ending.done():
            raise NoGroup("the averaging whose caller left is still being finished for the others: try again")
        return replace(call, timeout_s=max(0.001, call.timeout_s - (loop.time() - began)))

    def sessions(self) -> list[SessionLine]:
        """All of them as they are known. Being asked makes them look again: an idle one would not notice who came, and
        a trainer that waits for its initial peers asks until all are there."""
        for running in self._running.values():
            running.look_around()
        now = asyncio.get_running_loop().time()
        return [SessionLine(r.session_id, r.machine.options, r.machine.status(now)) for r in self._running.values()]

    def peers(self) -> list[PeerLine]:
        """Every peer the directory or a session knows."""
        heard = self._door.heard_from()
        lines: dict[PeerId, PeerLine] = {}
        for near in self._directory.neighbours():
            state = "suspect" if near.strikes else "live"
            lines[near.peer] = PeerLine(near.peer, str(near.address), state, (), near.heard_s_ago)
        for running in self._running.values():
            for peer, address, suspect in running.machine.known_peers():
                seen = lines.get(peer)
                lines[peer] = PeerLine(
                    peer,
                    address or (seen.address if seen else ""),
                    "suspect" if suspect else seen.state if seen else "live",
                    (*(seen.sessions if seen else ()), running.machine.options.name),
                    heard.get(peer, seen.heard_s_ago if seen else None),
                )
        return [lines[peer] for peer in sorted(lines)]

    def receipts(self, *, limit: int, epoch: int | None) -> list[tuple[str, Receipt]]:
        """(session name, receipt), newest first."""
        wanted = [entry for entry in self._receipts if epoch is None or entry[1].epoch == epoch]
        return wanted[::-1][:limit]

    @property
    def draining(self) -> bool:
        return self._draining

    async def drain(self, timeout_s: float) -> None:
        """Refuse new rounds, finish the running ones (at most timeout_s), close all sessions."""
        self._draining = True
        endings = [r.ending for r in self._running.values() if r.ending is not None and not r.ending.done()]
        if endings:
            await asyncio.wait(endings, timeout=timeout_s)
        for running in list(self._running.values()):
            running.feed(running.machine.close)
        withdrawals = [task for running in self._running.values() for task in running.withdrawals]
        if withdrawals:
            await asyncio.wait(withdrawals, timeout=1.0)

    async def close(self) -> None:
        """Stop everything."""
        self._draining = True
        self.loop_lag.close()
        for running in self._running.values():
            running.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.shutdown(wait=True)

    # ---- the inbox of the peer door

    def message_received(self, session: Key, sender: PeerId, message: Message) -> None:
        if running := self._by_key.get(session):
            running.feed(partial(running.machine.receive, message, sender))

    def peer_lost(self, peer: PeerId, why: str) -> None:
        log.debug("%s lost: %s", short(peer), why)
        for running in list(self._running.values()):
            running.feed(partial(running.machine.peer_lost, peer, why))

    def chunk_received(self, session: Key, group_id: GroupId, sender: Rank, chunk: Chunk) -> None:
        if running := self._by_key.get(session):
            running.feed(partial(running.machine.chunk_received, group_id, sender, chunk))

    def next_outgoing(self, session: Key, group_id: GroupId, rank: Rank) -> Outgoing | None:
        running = self._by_key.get(session)
        outgoing = running.machine.next_outgoing(group_id, rank) if running else None
        if outgoing is None:
            self._feed_lossy(session, group_id, LossyReduce.pulled_dry)
        return outgoing

    def next_burst(self, session: Key, group_id: GroupId, rank: Rank) -> Burst | None:
        running = self._by_key.get(session)
        round_ = running.machine.lossy(group_id) if running else None
        burst = round_.next_burst(rank) if round_ else None
        if burst is None:
            self._feed_lossy(session, group_id, LossyReduce.pulled_dry)
        return burst

    def packets_expected(self, session: Key, group_id: GroupId, phase: Phase, sender: Rank) -> int:
        running = self._by_key.get(session)
        round_ = running.machine.lossy(group_id) if running else None
        return round_.packets_expected(phase, sender) if round_ else 0

    def packets_received(
        self,
        session: Key,
        group_id: GroupId,
        phase: Phase,
        sender: Rank,
        sequences: Integers,
        offsets: Integers,
        rows: Frames,
    ) -> None:
        self._feed_lossy(
            session,
            group_id,
            lambda round_, now: round_.packets_received(phase, sender, sequences, offsets, rows, now),
        )

    def stream_ended(self, session: Key, group_id: GroupId, phase: Phase, sender: Rank) -> None:
        self._feed_lossy(session, group_id, lambda round_, now: round_.stream_ended(phase, sender, now))

    def path_measured(self, session: Key, group_id: GroupId, rank: Rank, round_trip_s: float) -> None:
        self._feed_lossy(session, group_id, lambda round_, _: round_.path_measured(rank, round_trip_s))

    def path_blocked(self, session: Key, group_id: GroupId, rank: Rank) -> None:
        self._feed_lossy(session, group_id, lambda round_, now: round_.path_blocked(rank, now))

    def _feed_lossy(self, session: Key, group_id: GroupId, put: Callable[[LossyReduce, float], None]) -> None:
        if running := self._by_key.get(session):
            running.feed(partial(running.machine.feed_lossy, group_id, put))

    def is_ahead(self, session: Key, group_id: GroupId, rank: Rank) -> bool:
        running = self._by_key.get(session)
        return running is not None and running.machine.is_ahead(group_id, rank, asyncio.get_running_loop().time())

    def stream_opened(self, session: Key, group_id: GroupId, rank: Rank, transport: str) -> None:
        if running := self._by_key.get(session):
            running.machine.stream_opened(group_id, rank, transport)

    def stream_lost(self, session: Key, group_id: GroupId, rank: Rank, why: str) -> None:
        if running := self._by_key.get(session):
            running.feed(partial(running.machine.stream_lost, group_id, rank, why))

    def dialable_found(self, *, dialable: bool) -> None:
        self.dialable = dialable
        self._dialable_known.set()
        self._here = replace(self._here, dialable=dialable)
        for running in self._running.values():
            running.feed(partial(running.machine.relocate, self._here))

    async def _learn_dialable(self) -> None:
        """Before anybody relies on our address: have a neighbour dial it. The door asks whoever converses first."""
        await self._directory.wait_ready()
        pause_s = self._config.dialable_patience_s
        while not self._dialable_known.is_set():
            for near in self._directory.neighbours()[:NEIGHBOURS_ASKED]:
                self._door.meet(near.peer, str(near.address))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._dialable_known.wait()
            pause_s = min(2 * pause_s, 60.0)

    async def _dialable_or_nobody_to_ask(self) -> None:
        if self._directory.is_ready and self._directory.neighbours():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.dialable_patience_s):
                    await self._dialable_known.wait()

    # ---- for the running sessions

    def finished(self, running: Running, receipt: Receipt) -> None:
        self._ended += 1
        self._receipts.append((running.machine.options.name, receipt))
        self._remember(running)

    def _remember(self, running: Running) -> None:
        """A layout's count goes on where it was, also in a later session."""
        options = running.machine.options
        self._last_k[options.name, options.layout.digest] = running.machine.last_k

    def compute(self, effect: Compute, done: Callable[[object], None]) -> None:
        """Run a job, inline or in a thread; `done` is called on the loop."""
        if max(effect.cost_bytes, effect.of_bytes) <= self._config.inline_bytes_max:
            done(effect.job())
            return
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, effect.job)
        future.add_done_callback(lambda ended: None if ended.cancelled() else done(ended.result()))

    @property
    def rounds_ended(self) -> int:
        """Averagings that came to an end so far."""
        return self._ended

    @property
    def busy(self) -> bool:
        """Whether a trainer waits for an averaging."""
        return any(r.ending is not None and not r.ending.done() for r in self._running.values())

    def announce_pause_s(self, announced_at: deque[float]) -> float:
        """How long the next announcement has to wait, given when the last ones were; drops those that count no more."""
        interval_s, burst = self._config.announce_interval_s, self._config.announce_burst
        now = asyncio.get_running_loop().time()
        while announced_at and announced_at[0] + burst * interval_s <= now:
            announced_at.popleft()
        return announced_at[0] + burst * interval_s - now if len(announced_at) >= burst else 0.0

    @property
    def directory(self) -> Directory:
        return self._directory

    @property
    def door(self) -> PeerDoor:
        return self._door

    def spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Running:
    """One session on the loop: its machine, its timer, its trainer's open call."""

    def __init__(self, session_id: str, machine: Machine, driver: Driver) -> None:
        self.session_id = session_id
        self.machine = machine
        self.ending: asyncio.Future[Averaged] | None = None
        self.progress: Callable[[ProgressNote], None] | None = None
        self.withdrawals: list[asyncio.Task[None]] = []
        self.still = asyncio.Lock()
        """Held while the error feedback is saved or loaded: no averaging begins."""
        self._driver = driver
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._carrying = False
        self._waiting: dict[str, Announce] = {}
        """Per slot the announcement to make when the one in flight is over: the newest wins."""
        self._announcing: set[str] = set()
        self._announced_at: defaultdict[str, deque[float]] = defaultdict(deque)
        """Per slot when the last ones were made."""
        self._looking_up: set[Key] = set()
        self._stopped = False

    def start(
        self, call: Call, vector: Vector, progress: Callable[[ProgressNote], None], spares: Sequence[Vector]
    ) -> asyncio.Future[Averaged]:
        """Raises the SessionError of a call that can never work."""
        if self.ending is not None and not self.ending.done():
            raise Precondition("an averaging of this session is still under way: await it first")
        ending: asyncio.Future[Averaged] = self._loop.create_future()
        self.ending, self.progress = ending, progress
        try:
            self.feed(partial(self.machine.start, call, vector, spares=spares))
        except SessionError:
            self.ending = None
            raise
        return ending

    def look_around(self) -> None:
        """See who else has this session open."""
        self._carry_out(LookUp(self.machine.key))

    def feed(self, put: Callable[[float], None]) -> None:
        """One input, then all that follows from it."""
        if self._stopped:
            return
        try:
            put(self._loop.time())
        finally:
            self.carry_out()

    def carry_out(self) -> None:
        """Effects until there are none: carrying one out may be an input itself."""
        if self._carrying:
            return
        self._carrying = True
        try:
            while effects := self.machine.take_effects():
                for effect in effects:
                    self._carry_out(effect)
        finally:
            self._carrying = False
        self._set_timer()

    def stop(self) -> None:
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        if self.ending is not None and not self.ending.done():
            self.ending.set_exception(Unavailable("the daemon is leaving"))

    def _set_timer(self) -> None:
        due = None if self._stopped else self.machine.next_deadline()
        if due == self._due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = None if due is None else self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = self._due = None
        self.feed(self.machine.handle_timer)

    def _carry_out(self, effect: Effect) -> None:
        door = self._driver.door
        match effect:
            case Send(peer=peer, address=address, message=message):
                door.send(self.machine.key, peer, address, message)
            case Announce():
                self._announce(effect)
            case LookUp(key=key):
                if key not in self._looking_up:
                    self._looking_up.add(key)
                    self._driver.spawn(self._look_up(key))
            case Withdraw(key=key):
                self._waiting.clear()
                kind = "lease" if key == self.machine.key else "presence"
                self.withdrawals.append(self._driver.spawn(self._withdraw(key, kind)))
            case OpenStreams(group=group, rank=rank, lossy_codec=codec):
                self._driver.loop_lag.begin(group.group_id)
                door.open_streams(self.machine.key, group, rank, codec)
            case CloseStreams(group_id=group_id):
                self._driver.loop_lag.end(group_id)
                door.close_streams(group_id)
            case Sendable(group_id=group_id, rank=rank):
                door.ring(group_id, rank)
            case Receivable(group_id=group_id, rank=rank):
                door.read_on(group_id, rank)
            case Compute(group_id=group_id, job_id=job_id):
                self._driver.compute(effect, partial(self._computed, group_id, job_id))
            case Progress(text=text, fraction=fraction):
                if self.progress is not None:
                    self.progress(ProgressNote(text, fraction))
            case Finished(receipt=receipt):
                self._driver.finished(self, receipt)
                if self.ending is not None and not self.ending.done():
                    self.ending.set_result(Averaged(receipt, self.machine.result))
            case Failed(error=error):
                if self.ending is not None and not self.ending.done():
                    self.ending.set_exception(error)
            case Log(text=text):
                log.info("%s: %s", self.machine.options.name, text)
            case _:
                assert_never(effect)

    def _computed(self, group_id: GroupId, job_id: int, value: object) -> None:
        self.feed(partial(self.machine.compute_finished, group_id, job_id, value))

    def _announce(self, effect: Announce) -> None:
        self._waiting[effect.slot] = effect
        if effect.slot not in self._announcing:
            self._announcing.add(effect.slot)
            self._driver.spawn(self._announce_all(effect.slot))

    async def _announce_all(self, slot: str) -> None:
        try:
            while slot in self._waiting:
                if (pause_s := self._driver.announce_pause_s(self._announced_at[slot])) > 0:
                    await asyncio.sleep(pause_s)
                effect = self._waiting.pop(slot, None)
                if effect is None:
                    return  # withdrawn meanwhile
                self._announced_at[slot].append(self._loop.time())
                kind, body = wire.record_kind(effect.record), wire.record_bytes(effect.record)
                try:
                    roster = await self._driver.directory.announce(
                        effect.key, kind, body, effect.ttl_s, keep=slot == "lease"
                    )
                except DirectoryError as error:
                    log.warning("%s: cannot announce: %s", self.machine.options.name, error)
                    return
                self._heard(effect.key, kind, roster)
        finally:
            self._announcing.discard(slot)

    async def _look_up(self, key: Key) -> None:
        kind = "lease" if key == self.machine.key else "presence"
        try:
            self._heard(key, kind, await self._driver.directory.look_up(key, kind))
        except DirectoryError as error:
            log.warning("%s: cannot look up: %s", self.machine.options.name, error)
        finally:
            self._looking_up.discard(key)

    async def _withdraw(self, key: Key, kind: str) -> None:
        try:
            await self._driver.directory.withdraw(key, kind)
        except DirectoryError as error:
            log.warning("%s: cannot withdraw: %s", self.machine.options.name, error)

    def _heard(self, key: Key, kind: str, roster: Roster) -> None:
        now, sightings = asyncio.get_running_loop().time(), list[Sighting[Record]]()
        for one in roster:
            try:
                record = wire.record_from(kind, one.body)
            except RemoteProtocolError as wrong:
                log.warning("%s announces nonsense: %s", short(one.peer), wrong)
                continue
            sightings.append(Sighting(one.peer, one.incarnation, one.sequence, now, now + one.ttl_s, record))
        self.feed(partial(self.machine.roster_received, key, sightings))


@dataclass(frozen=True, slots=True)
class SigningCredentials:
    """What machines need of keys: signs and checks plans of this swarm."""

    identity: Identity
    swarm: bytes

    def sign_plan(self, body: bytes) -> tuple[bytes, bytes]:
        return self.identity.public_key, self.identity.sign("plan", self.swarm, body)

    def plan_is_genuine(self, signer: PeerId, body: bytes, public_key: bytes, signature: bytes) -> bool:
        return peer_id(public_key) == signer and verify(public_key, signature, "plan", self.swarm, body)

"""One trainer's stay in a swarm in which nobody waits: cohorts, versions, activations, merges (WAGMA-SGD).

Knows how versions run: any trainer that posts version t activates it for all, and every daemon puts in its trainer's
last posted model, stale or not. A trainer that came in time gets sum / S; one that finds a sum with a stale model of
its own gets (sum + W') / (S + 1) and goes on from there. Every tau versions everybody waits for everybody: a barrier,
the mean over all. The barrier is one averaging of an ordinary flat Session, which brings all that finding peers needs,
and its group is the next cohort. Does not know sockets, threads, clocks, or how a barrier comes about.

| state     | means                                                  | left by                                         |
|-----------|--------------------------------------------------------|-------------------------------------------------|
| OUT       | in no cohort                                           | start() -> BARRIER                              |
| BARRIER   | our trainer waits in the barrier's averaging           | group -> COMPUTING; alone -> OUT; failed: back  |
| COMPUTING | our trainer computes, the daemon puts in its last post | start() -> CALLED; cast out -> OUT              |
| CALLED    | our trainer waits for a version, or for a merge        | served -> COMPUTING; barrier next -> BARRIER    |
| CLOSED    | the session left                                       | (none)                                          |

Versions are numbered through: barrier k is version k * tau, the cohort it makes runs the tau - 1 that follow. They run
one after the other, each once; any message of version t activates t. The group of a version needs no matchmaking: all
members compute the same one from the cohort, outcasts included, and whoever knows of an outcast suspects it at once, so
that the all-reduce's own agreement leaves it out.

A punctual trainer is seldom the first. So a daemon whose trainer is about to post holds its stale model back for a
moment (`CohortConfig.punctual_share`): without that only the first of a version would be fresh, the mean never exact.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import assert_never

from moshpitd.averaging.all_reduce import AllReduce, Outgoing
from moshpitd.averaging.all_reduce import State as ReductionState
from moshpitd.averaging.codecs import rules_of
from moshpitd.averaging.cohort import COHORT_MAX, Cohort, CohortStatus
from moshpitd.averaging.compute_budget import BudgetOptions
from moshpitd.averaging.effects import Compute, Effect, Failed, Finished, Log, OpenStreams, Send
from moshpitd.averaging.errors import InvalidInput, Precondition, RemoteProtocolError, SessionError, Unavailable
from moshpitd.averaging.grid import format_sides
from moshpitd.averaging.link import LinkRates
from moshpitd.averaging.lossy_reduce import LossyReduce
from moshpitd.averaging.membership import Credentials
from moshpitd.averaging.merge import PIECE_BYTES, merge_jobs
from moshpitd.averaging.messages import (
    Activation,
    Chunk,
    CohortMessage,
    Contributing,
    Farewell,
    Group,
    Heartbeat,
    Holdings,
    Member,
    Message,
    Outcast,
    Ready,
    Record,
    ReductionMessage,
    Sighting,
    Stranger,
    Suspect,
    View,
)
from moshpitd.averaging.names import GroupId, Key, PeerId, Rank, digest, short
from moshpitd.averaging.posts import Post, Posts
from moshpitd.averaging.receipt import (
    ContributorLine,
    LinkLine,
    LocalLine,
    MemberLine,
    Outcome,
    Receipt,
    RoundReceipt,
    VersionReceipt,
)
from moshpitd.averaging.session import (
    Call,
    Load,
    Session,
    SessionConfig,
    SessionOptions,
    SessionStatus,
    Whereabouts,
)
from moshpitd.averaging.vector import Layout, Vector

REDUCTIONS_KEPT = 4
"""Ended versions that still answer views."""
EARLY_OF_ONE_MAX = 16
"""Messages of one member about versions that have not begun here, or of a cohort that is about to."""
STEPS_REMEMBERED = 8


class State(Enum):
    """See the table above."""

    OUT = "out"
    BARRIER = "barrier"
    COMPUTING = "computing"
    CALLED = "called"
    CLOSED = "closed"


@dataclass(slots=True)
class Merge:
    """Jobs under way that make a late call's result."""

    id: GroupId
    sum: Sum
    output: Vector
    left: int


@dataclass(slots=True)
class Calling:
    """The call under way."""

    call: Call
    started_at: float
    deadline: float
    vector: Vector
    spares: list[Vector]
    fresh_in: int | None = None
    """The version that waits for nothing but its all-reduce, this call's model in it."""
    merge: Merge | None = None

    def spare(self) -> Vector:
        return self.spares.pop(0) if self.spares else Vector.empty(self.vector.layout)


@dataclass(slots=True)
class Running:
    """The version under way."""

    version: int
    reduction: AllReduce
    post: Post
    posted: int
    """As which version the model counts that we put in."""
    result: Vector
    began_at: float
    said: dict[PeerId, int] = field(default_factory=dict)
    """As which version the others' models count."""


@dataclass(frozen=True)
class Sum:
    """The newest version that ended here: the mean of those in it, and who they are."""

    version: int
    mean: Vector
    receipt: RoundReceipt
    contributors: tuple[ContributorLine, ...]

    def staleness_of(self, peer: PeerId) -> int:
        posted = next((line.posted for line in self.contributors if line.peer == peer), self.version)
        return self.version - posted


class WaitAvoiding:
    """The machine. Driven like a Session: commands, inputs, `handle_timer`, then `take_effects`."""

    def __init__(
        self,
        options: SessionOptions,
        config: SessionConfig,
        here: Whereabouts,
        credentials: Credentials,
        rng: random.Random,
        link: LinkRates,
        *,
        last_k: int,
        now: float,
    ) -> None:
        assert options.wait_avoidance is not None
        options.check()
        self._rules = rules_of(options.codec)
        self.options = replace(options, codec=self._rules.name)
        self._codec = self._rules.with_auto("float32").over(options.layout)
        self._codec_why = ""
        self.state = State.OUT
        self._avoidance = options.wait_avoidance
        self._config = config
        self._here = here
        flat = replace(config, pin="", group_size_max=COHORT_MAX)
        self._link = link
        self._barrier = Session(replace(options, rounds=1), flat, here, credentials, rng, link, last_k=last_k, now=now)
        self._barrier_group: Group | None = None
        """The last in which the barrier's machine began to reduce."""
        self._cohort: Cohort | None = None
        self._versions: dict[GroupId, int] = {}
        """By the ids of our groups, the versions of this cohort."""
        self._finished = 0
        """The newest version that ended here."""
        self._activated = 0
        """The newest that somebody began."""
        self._own = 0
        """Where our trainer stands."""
        self._hold_until = -math.inf
        """The next version waits so long for our trainer."""
        self._posts = Posts()
        self._calling: Calling | None = None
        self._running: Running | None = None
        self._reductions: dict[GroupId, AllReduce] = {}
        self._sum: Sum | None = None
        self._pool: list[Vector] = []
        """For the sums of versions without our trainer."""
        self._merges = 0
        self._lost: set[PeerId] = set()
        """Connections to them broke, and nothing came from them since."""
        self._leaving = ""
        """Why we leave this cohort as soon as the version under way has ended."""
        self._early: dict[PeerId, deque[ReductionMessage]] = {}
        self._early_words: dict[PeerId, deque[CohortMessage]] = {}
        """Of a cohort that we may be about to be in."""
        self._returned_at: float | None = None
        self._is_missed = False
        """A version ran without our trainer since its last call."""
        self._steps_s: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        """How long our trainer computed."""
        self._promised_until: float | None = None
        self._counts: Counter[str] = Counter()
        self._staleness_max = 0
        self._effects: list[Effect] = []
        self._result: Vector | None = None
        self._take_barrier_effects(now)

    # ---- commands

    def set_budget(self, options: BudgetOptions, now: float) -> None:
        """Refused: nobody waits here for whom a compute budget could save time. Raises InvalidInput."""
        options.check("wait_avoiding")

    def weighed(self, call: Call, now: float) -> Call:
        """All models weigh the same. Raises InvalidInput for a step under a compute budget."""
        if call.micro_batch_s:
            raise InvalidInput("latencies of micro-batches in a wait-avoiding session, which takes no compute budget")
        return call

    def start(self, call: Call, vector: Vector, now: float, *, spares: Sequence[Vector] = ()) -> None:
        """Post the vector and wait for what comes of it. It stays ours after the end too, until another one was posted
        and no version reads it any more: see `holds`. Raises a SessionError at once for what can never work."""
        call.check()
        if call.trainers != 1:
            raise InvalidInput(f"{call.trainers} trainers share this wait-avoiding session: it takes one a daemon")
        if call.weight != 1.0:
            raise InvalidInput(
                f"weight {call.weight}: models of a wait-avoiding session all weigh the same; leave it out"
            )
        if call.epoch is not None:
            raise InvalidInput(f"epoch {call.epoch}: versions of a wait-avoiding session are numbered by the daemons")
        if self.state is State.CLOSED:
            raise Unavailable("the session is closed")
        if self._calling is not None:
            raise Precondition("an averaging of this session is still under way: await it first")
        if difference := self.options.layout.first_difference(vector.layout):
            raise InvalidInput(f"the layout changed: {difference}; open another session for it")
        if self._returned_at is not None:
            self._steps_s.append(now - self._returned_at)
        free = [spare for spare in spares if not self.holds(spare)]
        self._calling = Calling(call, now, now + call.timeout_s, vector, free)
        # The newest from here on; as which version it counts is settled when the call is served.
        self._posts.post(vector, self._own)
        self._keep_promise(now)
        if self.state is State.OUT:
            try:
                self._become_barrier(now)
            except SessionError:
                self._calling = None
                raise
        else:
            self._become(State.CALLED)
        self._step(now)

    def abandon(self, now: float) -> None:
        """The trainer is gone, or no longer waits. Versions go on with its last post until the session is closed."""
        if self._calling is None:
            return
        self._promised_until = None
        self._barrier.promise(-math.inf, now)
        if self.state is State.BARRIER:
            self._barrier.abandon(now)
        elif self._calling.merge is None:
            self._fail(Unavailable("the trainer is gone"), now)
        self._step(now)

    def close(self, now: float) -> None:
        """Leave the swarm and the cohort, at once known to both."""
        if self.state is State.CLOSED:
            return
        self._barrier.close(now)
        self._take_barrier_effects(now)
        if self._calling is not None:
            self._fail(Unavailable("the session closed"), now)
        self.state = State.CLOSED
        self._cohort = None

    def relocate(self, here: Whereabouts, now: float) -> None:
        """Our address or dialability changed: the next cohort hears of it."""
        self._here = here
        self._barrier.relocate(here, now)
        self._step(now)

    # ---- inputs

    def receive(self, message: Message, sender: PeerId, now: float) -> None:
        """A message of the sender proved by its channel. Raises RemoteProtocolError for nonsense."""
        if self.state is State.CLOSED or sender == self._here.peer:
            return
        self._lost.discard(sender)
        match message:
            case Activation() | Contributing() | Outcast() | Stranger():
                self._receive_word(message, sender, now)
            case Ready() | Suspect() | View() | Holdings() | Heartbeat():
                self._receive_in_group(message, sender, now)
            case _:
                if isinstance(message, Farewell):
                    self._cast_out(sender, "left the swarm", now, flood=False)
                self._barrier.receive(message, sender, now)
        self._step(now)

    def peer_lost(self, peer: PeerId, why: str, now: float) -> None:
        """No channel to this peer could be had, or it broke. Between versions a connection may break and come back:
        only who cannot be reached again is out."""
        self._barrier.peer_lost(peer, why, now)
        cohort, running = self._cohort, self._running
        if cohort is not None and peer in cohort and peer not in cohort.outcasts:
            rank = running.reduction.group.rank_of(peer) if running else None
            if running and rank is not None and not running.reduction.finished:
                running.reduction.suspect(rank, why, now)
            elif peer in self._lost:
                self._cast_out(peer, why, now)
            else:
                self._lost.add(peer)
                member = next(member for member in cohort.live if member.peer == peer)
                self._tell_member(member, Activation(cohort.id, self._activated))
        self._step(now)

    def roster_received(self, key: Key, sightings: list[Sighting[Record]], now: float) -> None:
        self._barrier.roster_received(key, sightings, now)
        self._step(now)

    def chunk_received(self, group_id: GroupId, sender: Rank, chunk: Chunk, now: float) -> None:
        """A chunk of a group's stream. Raises RemoteProtocolError for nonsense."""
        if reduction := self._reductions.get(group_id):
            reduction.chunk_received(chunk, sender, now)
        else:
            self._barrier.chunk_received(group_id, sender, chunk, now)
        self._step(now)

    def stream_opened(self, group_id: GroupId, rank: Rank, transport: str) -> None:
        """Over what chunks travel between this member and us."""
        if reduction := self._reductions.get(group_id):
            reduction.transports[rank] = transport
        else:
            self._barrier.stream_opened(group_id, rank, transport)

    def stream_lost(self, group_id: GroupId, rank: Rank, why: str, now: float) -> None:
        """A group's stream to this member broke."""
        if reduction := self._reductions.get(group_id):
            reduction.suspect(rank, why, now)
        else:
            self._barrier.stream_lost(group_id, rank, why, now)
        self._step(now)

    def compute_finished(self, group_id: GroupId, job_id: int, value: object, now: float) -> None:
        calling = self._calling
        if reduction := self._reductions.get(group_id):
            reduction.compute_finished(job_id, value, now)
        elif calling and calling.merge and calling.merge.id == group_id:
            calling.merge.left -= 1
            if not calling.merge.left:
                self._finish_merge(calling, calling.merge, now)
        else:
            self._barrier.compute_finished(group_id, job_id, value, now)
        self._step(now)

    def next_outgoing(self, group_id: GroupId, rank: Rank) -> Outgoing | None:
        """Pull: the next chunk for this member of the group."""
        reduction = self._reductions.get(group_id)
        return reduction.next_outgoing(rank) if reduction else self._barrier.next_outgoing(group_id, rank)

    def is_ahead(self, group_id: GroupId, rank: Rank, now: float) -> bool:
        """Whether this member's next chunk had better stay where it is until the bell rings."""
        reduction = self._reductions.get(group_id)
        return reduction.is_ahead(rank, now) if reduction else self._barrier.is_ahead(group_id, rank, now)

    def lossy(self, group_id: GroupId) -> LossyReduce | None:
        """None: neither versions nor barriers lose anything."""
        return None

    def feed_lossy(self, group_id: GroupId, put: Callable[[LossyReduce, float], None], now: float) -> None:
        """Of no round of ours."""

    def handle_timer(self, now: float) -> None:
        if (due := self._barrier.next_deadline()) is not None and due <= now:
            self._barrier.handle_timer(now)
        for reduction in list(self._reductions.values()):
            if (due := reduction.next_deadline()) is not None and due <= now:
                reduction.handle_timer(now)
        if self._promised_until is not None and now >= self._promised_until:
            self._promised_until = None
            self._barrier.promise(-math.inf, now)
        if self._is_overdue(now):
            version = self._running.version if self._running else self._finished + 1
            self._finish_alone(f"version {version} had not ended when the caller's time was up", now)
        self._step(now)

    def _is_overdue(self, now: float) -> bool:
        """A merge is no matter of waiting, and its jobs write into the caller's buffer."""
        calling = self._calling
        return self.state is State.CALLED and calling is not None and not calling.merge and now >= calling.deadline

    def next_deadline(self) -> float | None:
        moments = [self._barrier.next_deadline(), self._promised_until]
        moments += [reduction.next_deadline() for reduction in self._reductions.values()]
        if self.state is State.CALLED and self._calling and not self._calling.merge:
            moments.append(self._calling.deadline)
        if self._is_held_back():
            moments.append(self._hold_until)
        return min((moment for moment in moments if moment is not None), default=None)

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    # ---- what the owner reads

    @property
    def key(self) -> Key:
        return self._barrier.key

    @property
    def last_k(self) -> int:
        """The last barrier we took part in; -1: none."""
        return self._barrier.last_k

    @property
    def result(self) -> Vector:
        """Of the call that just Finished. Only valid while its effect is being carried out."""
        assert self._result is not None
        return self._result

    @property
    def contribution(self) -> Vector | None:
        """What the reduction under way reads; unchanged until it has committed. None when there is none."""
        return self._running.post.vector if self._running else self._barrier.contribution

    def holds(self, vector: Vector) -> bool:
        """Whether this buffer must not be written to, because a version reads it, may yet read it, or writes to it."""
        newest = self._sum.mean if self._sum else None
        return not self.is_free(vector) or self._posts.holds(vector) or newest is vector

    def is_free(self, spare: Vector) -> bool:
        """Whether no job may still write to this buffer."""
        return self._barrier.is_free(spare) and not any(r.may_write_to(spare) for r in self._reductions.values())

    def result_of(self, group_id: GroupId) -> Vector | None:
        reduction = self._reductions.get(group_id)
        return reduction.result if reduction else self._barrier.result_of(group_id)

    def feedback_layout(self) -> Layout:
        return self._barrier.feedback_layout()

    def save_feedback(self) -> Vector:
        return self._barrier.save_feedback()

    def load_feedback(self, state: Vector) -> int:
        return self._barrier.load_feedback(state)

    def count_on_from(self, last_k: int, now: float) -> None:
        self._barrier.count_on_from(last_k, now)

    def status(self, now: float) -> SessionStatus:
        status, cohort = self._barrier.status(now), self._cohort
        summary = CohortStatus(
            cohort.id if cohort else b"",
            len(cohort.members) if cohort else 0,
            len(cohort.live) if cohort else 0,
            self._finished,
            self._barrier_version if cohort else 0,
            self._staleness_max,
            dict(self._counts),
        )
        status = replace(status, cohort=summary)
        if cohort is None or self.state is not State.CALLED:
            return status
        version = self._running.version if self._running else self._finished + 1
        return replace(
            status,
            state="reducing",
            waiting_for=f"version {version} of a cohort of {len(cohort.live)}",
            grid=format_sides(cohort.sides),
            cell=cohort.cell(cohort.rank),
        )

    def load(self) -> Load:
        """What is kept for others; every figure has a limit."""
        load = self._barrier.load()
        running = sum(not reduction.finished for reduction in self._reductions.values())
        early = sum(map(len, self._early.values())) + sum(map(len, self._early_words.values()))
        return Load(
            load.matchmakings,
            load.reductions + len(self._reductions),
            load.reductions_running + running,
            load.early_messages + early,
            load.deferred_joins,
        )

    def known_peers(self) -> list[tuple[PeerId, str, bool]]:
        """(peer, address, is suspect) of every session under our name."""
        outcasts = self._cohort.outcasts if self._cohort else {}
        return [(peer, where, suspect or peer in outcasts) for peer, where, suspect in self._barrier.known_peers()]

    # ---- one step: after every input, whatever became possible

    def _step(self, now: float) -> None:
        self._take_barrier_effects(now)
        while self._advance(now):
            self._take_barrier_effects(now)
        for reduction in self._reductions.values():
            self._effects += reduction.take_effects()
        over = [group_id for group_id, reduction in self._reductions.items() if reduction.finished and reduction.idle]
        for group_id in over[:-REDUCTIONS_KEPT]:
            del self._reductions[group_id]

    def _advance(self, now: float) -> bool:
        """One thing that can be done now; False when there is none."""
        running, calling = self._running, self._calling
        if running is not None:
            self._effects += running.reduction.take_effects()  # what it did comes before what follows from it
            if not (running.reduction.finished and running.reduction.idle):
                return False
            self._end_version(running, now)
        elif self._leaving:
            self._leave_cohort(now)
        elif self.state is State.CALLED and calling and calling.merge is None:
            self._serve(calling, now)
        elif self._is_pending() and now >= self._hold_until:
            self._counts["passive"] += 1
            self._is_missed = True
            self._begin_version(self._finished + 1, self._free_result(), now)
        else:
            return False
        return True

    def _is_pending(self) -> bool:
        """A version that somebody began has not begun here."""
        return (
            self.state in (State.COMPUTING, State.CALLED)
            and self._cohort is not None
            and self._running is None
            and self._finished + 1 < self._barrier_version
            and self._finished < self._activated
        )

    def _is_held_back(self) -> bool:
        return self._is_pending() and self._calling is None

    # ---- calls

    def _serve(self, calling: Calling, now: float) -> None:
        """No version is under way: take part in the next one, merge with one that was missed, or go to the barrier."""
        following = self._finished + 1
        newest = self._sum
        if self._avoidance.lockstep:
            ours = min(self._own + 1, following)
            late = ours < following
            to_barrier = ours == self._barrier_version
        else:
            ours = following
            late = newest is not None and newest.version > self._own
            # Who finds the others waiting there does not let them wait for another step of its own.
            to_barrier = ours == self._barrier_version and (not late or self._activated >= ours)
        assert self._posts.newest is not None
        if to_barrier:
            self._become_barrier_or_fail(now)
        elif late:
            self._own = self._posts.newest.version = ours if self._avoidance.lockstep else self._finished
            if newest is None:
                self._finish_alone("no version that was missed came to an end", now)
            else:
                self._begin_merge(calling, newest)
        else:
            self._own = self._posts.newest.version = following
            calling.fresh_in = following
            self._activate(following, now, ours=True)
            self._begin_version(following, calling.spare(), now)

    def _begin_merge(self, calling: Calling, newest: Sum) -> None:
        self._merges += 1
        output = calling.spare()
        merge_id = GroupId(digest("merge", self._here.peer, self._here.incarnation, self._merges)[:16])
        jobs = list(merge_jobs(newest.mean, newest.receipt.spans, calling.vector, output))
        calling.merge = Merge(merge_id, newest, output, len(jobs))
        for number, job in enumerate(jobs):
            self._effects.append(Compute(merge_id, number, job, 2 * PIECE_BYTES))

    def _finish_merge(self, calling: Calling, merge: Merge, now: float) -> None:
        missed = merge.sum
        receipt = missed.receipt
        self._finish("merge", missed, receipt.outcome, merge.output, receipt.why, now)

    def _finish_alone(self, why: str, now: float) -> None:
        assert self._calling is not None
        self._finish("alone", None, Outcome.ALONE, self._calling.vector, why, now)

    def _finish(self, kind: str, ended: Sum | None, outcome: Outcome, result: Vector, why: str, now: float) -> None:
        """The call returns what came of a version."""
        calling, cohort, me = self._calling, self._cohort, self._here.peer
        assert calling is not None
        told = ended.receipt if ended else None
        version = VersionReceipt(
            version=ended.version if ended else self._own,
            kind=kind,
            fresh=kind == "fresh",
            staleness=ended.staleness_of(me) if ended else 0,
            skipped=self._skipped(self._own),
            contributors=ended.contributors if ended else (),
            cohort=cohort.id if cohort else b"",
        )
        receipt = Receipt(
            outcome=outcome,
            epoch=version.version,
            joined=False,
            weight_total=float(len(version.contributors) + (kind != "fresh")),
            peers=tuple(sorted(line.peer for line in version.contributors if line.peer != me)),
            digest=told.digest if told else b"",
            why=why,
            seconds_matchmaking=0.0,
            seconds_reduce=told.seconds_reduce if told else 0.0,
            seconds_total=now - calling.started_at,
            bytes_sent=told.bytes_sent if told else 0,
            bytes_received=told.bytes_received if told else 0,
            grid=format_sides(cohort.sides) if cohort else "",
            rounds=(told,) if told else (),
            local=LocalLine(1, 1.0),
            version=version,
        )
        self._conclude(receipt, result, State.COMPUTING if cohort else State.OUT, now)

    def _conclude(self, receipt: Receipt, result: Vector, state: State, now: float) -> None:
        assert receipt.version is not None
        self._result = result
        self._calling = None
        self._counts[receipt.version.kind] += 1
        self._counts["skipped"] += receipt.version.skipped
        self._last_version = receipt.version.version
        self._is_missed = False
        self._returned_at = now
        self._become(state)
        self._keep_promise(now)
        self._effects.append(Finished(receipt))

    def _fail(self, error: SessionError, now: float) -> None:
        self._calling = None
        self._returned_at = now
        self._become(State.COMPUTING if self._cohort else State.OUT)
        self._effects += [Log(f"averaging failed: {error}"), Failed(error)]

    _last_version: int | None = None
    """Of the last call."""

    def _skipped(self, version: int) -> int:
        if self._avoidance.lockstep or self._last_version is None:
            return 0
        return max(0, version - self._last_version - 1)

    def _keep_promise(self, now: float) -> None:
        """A trainer that is at work is waited for at the barrier."""
        config = self._config.cohort
        longest = max(self._steps_s, default=0.0)
        self._promised_until = now + max(config.trainer_patience_s, config.trainer_patience_factor * longest)
        self._barrier.promise(self._promised_until, now)

    # ---- versions

    @property
    def _barrier_version(self) -> int:
        """Of the barrier that ends this cohort."""
        assert self._cohort is not None
        return (self._cohort.k + 1) * self._avoidance.barrier_every

    def _activate(self, version: int, now: float, *, ours: bool = False) -> None:
        """Somebody began this version: pass it on, once."""
        cohort = self._cohort
        assert cohort is not None
        if version <= self._activated:
            return
        self._activated = version
        self._counts["activations"] += ours
        if self._finished + 1 == version:
            self._hold_back(now)
        for member in cohort.neighbours():
            self._tell_member(member, Activation(cohort.id, version))

    def _hold_back(self, now: float) -> None:
        """Until when the next version waits for our trainer, which may be about to post."""
        config, steps = self._config.cohort, sorted(self._steps_s)
        self._hold_until = -math.inf
        if self._returned_at is None:
            return
        if not steps:  # its first step in our sight: nobody knows how long it takes
            self._hold_until = now + (config.punctual_max_s if config.punctual_share else 0.0)
            return
        usual = steps[(len(steps) - 1) // 2]
        patience = min(config.punctual_max_s, config.punctual_share * usual)
        expected = self._returned_at + usual
        if expected < now - patience:
            # Later than usual. So is whoever was the first, unless others have gone on without our trainer before.
            self._hold_until = -math.inf if self._is_missed else now + patience
        elif expected <= now + patience:
            self._hold_until = min(now, expected) + patience

    def _begin_version(self, version: int, result: Vector, now: float) -> None:
        cohort = self._cohort
        assert cohort is not None
        assert version == self._finished + 1, "versions run in order, each once"
        self._hold_until = -math.inf
        budget_s = self._config.cohort.version_budget_s
        group = cohort.group(version, self.options.layout, chunk_bytes=self._config.chunk_bytes, budget_s=budget_s)
        if group is None:
            self._finished = version
            if self._calling and self._calling.fresh_in == version:
                self._finish_alone(f"nobody else is on our line in version {version}", now)
            return
        post = self._posts.send()
        rank = group.rank_of(self._here.peer)
        assert rank is not None
        reduction = AllReduce(
            group,
            rank,
            values=post.vector,
            result=result,
            codec=self._codec,
            config=self._config.all_reduce,
            now=now,
        )
        self._reductions[group.group_id] = reduction
        self._running = Running(version, reduction, post, post.version, result, now)
        for member in group.members:
            if member.peer != self._here.peer and member.peer not in cohort.outcasts:
                self._tell_member(member, Contributing(cohort.id, version, post.version))
        for number, member in enumerate(group.members):
            if member.peer in cohort.outcasts:
                reduction.suspect(Rank(number), cohort.outcasts[member.peer], now)
        self._replay_early(self._running, now)

    def _replay_early(self, running: Running, now: float) -> None:
        group, early, self._early = running.reduction.group, self._early, {}
        for sender, kept in early.items():
            for message in kept:
                if self._versions.get(message.group_id, 0) > running.version:
                    self._early.setdefault(sender, deque(maxlen=EARLY_OF_ONE_MAX)).append(message)
                elif message.group_id == group.group_id and (rank := group.rank_of(sender)) is not None:
                    try:
                        running.reduction.receive(message, rank, now)
                    except RemoteProtocolError as wrong:  # not the fault of whose message is being received
                        running.reduction.suspect(rank, str(wrong), now)
        words, self._early_words = self._early_words, {}
        for sender, kept_words in words.items():
            for word in kept_words:
                if isinstance(word, Contributing) and word.version == running.version:
                    running.said[sender] = word.posted
                elif isinstance(word, Contributing) and word.version > running.version:
                    self._keep_word(word, sender)

    def _end_version(self, running: Running, now: float) -> None:
        """Its all-reduce came to an end, one way or another."""
        reduction, calling = running.reduction, self._calling
        self._running = None
        self._posts.sent()
        self._finished = running.version
        if self._activated > self._finished:
            self._hold_back(now)
        fresh = calling is not None and calling.fresh_in == running.version
        if reduction.state is ReductionState.COMMITTED:
            ended = self._sum_of(running, now)
            up, down = reduction.link_measures(now)
            self._link.learn(up=up, down=down)
            stale = [ended.version - line.posted for line in ended.contributors if line.posted >= 0]
            self._staleness_max = max(self._staleness_max, *stale)
            if fresh:
                self._finish("fresh", ended, ended.receipt.outcome, running.result, ended.receipt.why, now)
            elif any(vector is running.result for vector in self._pool):
                self._sum = ended
        elif reduction.rank not in reduction.live:
            self._leaving = self._leaving or reduction.why
        elif fresh:
            self._finish_alone(reduction.why, now)
        if not self._leaving:
            for line in reduction.dropped_lines():
                self._cast_out(line.peer, line.why, now)

    def _sum_of(self, running: Running, now: float) -> Sum:
        reduction, cohort = running.reduction, self._cohort
        assert cohort is not None
        group, spans = reduction.group, reduction.span_lines()
        here = {peer for span in spans for peer in span.contributors}
        said = {**running.said, self._here.peer: running.posted}
        contributors = tuple(ContributorLine(m.peer, said.get(m.peer, -1)) for m in group.members if m.peer in here)
        dropped = reduction.dropped_lines()
        receipt = RoundReceipt(
            averaging=running.version,
            round=0,
            axis=group.axis,
            outcome=Outcome.COMPLETE if reduction.is_complete else Outcome.PARTIAL,
            group_id=reduction.group_id,
            digest=reduction.digest,
            leader=group.leader,
            rank=reduction.rank,
            codec=self._codec.name,
            codec_why=self._codec_why,
            transport="+".join(sorted(set(reduction.transports.values()))),
            members=tuple(MemberLine(m.peer, m.weight, m.coordinate) for m in group.members),
            links=tuple(LinkLine(group.members[r].peer, name) for r, name in sorted(reduction.transports.items())),
            spans=spans,
            dropped=dropped,
            why=reduction.why or ", ".join(f"{short(line.peer)} {line.why}" for line in dropped),
            weight_after=1.0,
            seconds_matchmaking=0.0,
            seconds_reduce=now - running.began_at,
            bytes_sent=reduction.bytes_sent,
            bytes_received=reduction.bytes_received,
            bits_per_element=reduction.bits_per_element,
            relative_error=reduction.relative_error,
        )
        return Sum(running.version, running.result, receipt, contributors)

    def _free_result(self) -> Vector:
        """A buffer for a sum that nobody here waits for: not the newest sum, nor one that is being merged."""
        merging = self._calling.merge.sum.mean if self._calling and self._calling.merge else None
        for vector in self._pool:
            if vector is not merging and not self.holds(vector):
                return vector
        self._pool.append(Vector.empty(self.options.layout))
        return self._pool[-1]

    # ---- what the cohort says

    def _receive_word(self, word: CohortMessage, sender: PeerId, now: float) -> None:
        cohort = self._cohort
        if cohort is None or word.cohort != cohort.id:
            if self.state is State.BARRIER and not isinstance(word, Stranger):
                self._keep_word(word, sender)
            elif not isinstance(word, Stranger):
                self._tell(sender, "", Stranger(word.cohort))
            return
        if sender not in cohort:
            raise RemoteProtocolError(f"{short(sender)} speaks of a cohort that it is not in")
        if sender in cohort.outcasts:
            return
        match word:
            case Activation(version=version):
                self._check_version(version, sender)
                self._activate(version, now)
            case Contributing(version=version, posted=posted):
                self._check_version(version, sender)
                if posted > version:
                    raise RemoteProtocolError(f"{short(sender)} put a model of version {posted} into version {version}")
                if self._running and self._running.version == version:
                    self._running.said[sender] = posted
                elif version > self._finished:
                    self._keep_word(word, sender)
                self._activate(version, now)
            case Outcast(peer=peer, why=why):
                if peer == self._here.peer:
                    self._become_outcast(f"cast out, as {short(sender)} says: {why}", now)
                else:
                    self._cast_out(peer, why, now)
            case Stranger():
                self._cast_out(sender, "is in another cohort", now)
            case _:
                assert_never(word)

    def _keep_word(self, word: CohortMessage, sender: PeerId) -> None:
        if sender in self._early_words or len(self._early_words) < 2 * COHORT_MAX:
            self._early_words.setdefault(sender, deque(maxlen=EARLY_OF_ONE_MAX)).append(word)

    def _check_version(self, version: int, sender: PeerId) -> None:
        assert self._cohort is not None
        if version > self._barrier_version:
            raise RemoteProtocolError(f"{short(sender)} speaks of version {version} of a cohort that ends before")

    def _receive_in_group(self, message: ReductionMessage, sender: PeerId, now: float) -> None:
        if reduction := self._reductions.get(message.group_id):
            rank = reduction.group.rank_of(sender)
            if rank is None:
                raise RemoteProtocolError(f"{short(sender)} is not in the group it speaks to")
            reduction.receive(message, rank, now)
        elif (version := self._versions.get(message.group_id)) is None:
            self._barrier.receive(message, sender, now)
        elif version > self._finished and self._cohort and sender in self._cohort:
            self._early.setdefault(sender, deque(maxlen=EARLY_OF_ONE_MAX)).append(message)
            self._activate(version, now)

    def _cast_out(self, peer: PeerId, why: str, now: float, *, flood: bool = True) -> None:
        """For good, in this cohort: tell those who may not know, and do not wait for it."""
        cohort, running = self._cohort, self._running
        if cohort is None or peer == self._here.peer or not cohort.cast_out(peer, why):
            return
        self._effects.append(Log(f"cohort of {len(cohort.members)}: {short(peer)} is out: {why}"))
        for member in cohort.neighbours() if flood else ():
            self._tell_member(member, Outcast(cohort.id, peer, why))
        rank = running.reduction.group.rank_of(peer) if running else None
        if running and rank is not None and not running.reduction.finished:
            running.reduction.suspect(rank, why, now)
        if self.state is not State.BARRIER:
            self._barrier.peer_lost(peer, why, now)
        if len(cohort.live) == 1:
            self._become_outcast("everybody else of the cohort is gone", now)

    def _become_outcast(self, why: str, now: float) -> None:
        """The others go on without us: nothing of theirs is waited for."""
        self._leaving = why
        if self._running is not None:
            for number in range(len(self._running.reduction.group.members)):
                if number != self._running.reduction.rank:
                    self._running.reduction.suspect(Rank(number), why, now)

    def _leave_cohort(self, now: float) -> None:
        """Out until the next barrier. A caller that waits goes there at once."""
        assert self._running is None
        self._effects.append(Log(f"leaves its cohort: {self._leaving}"))
        self._drop_cohort()
        if self.state is State.COMPUTING:
            self._become(State.OUT)
        elif self.state is State.CALLED and self._calling and self._calling.merge is None:
            self._become_barrier_or_fail(now)

    def _drop_cohort(self) -> None:
        self._cohort, self._sum, self._leaving = None, None, ""
        self._versions.clear()
        self._early.clear()
        self._lost.clear()

    # ---- the barrier

    def _become_barrier(self, now: float) -> None:
        calling = self._calling
        assert calling is not None
        if self._cohort is not None:
            assert self._posts.newest is not None
            self._own = self._posts.newest.version = self._barrier_version
            self._activate(self._barrier_version, now, ours=True)
        left_s = max(1e-3, calling.deadline - now)
        self._become(State.BARRIER)
        self._barrier.start(replace(calling.call, timeout_s=left_s), calling.vector, now, spares=calling.spares)

    def _become_barrier_or_fail(self, now: float) -> None:
        try:
            self._become_barrier(now)
        except SessionError as error:
            self._fail(error, now)

    def _take_barrier_effects(self, now: float) -> None:
        while effects := self._barrier.take_effects():
            for effect in effects:
                match effect:
                    case OpenStreams(group=group):
                        self._barrier_group = group
                        self._effects.append(effect)
                    case Finished(receipt=receipt):
                        self._end_barrier(receipt, self._barrier.result, now)
                    case Failed(error=error):
                        assert isinstance(error, SessionError)
                        self._early_words.clear()
                        self._fail(error, now)
                    case _:
                        self._effects.append(effect)

    def _end_barrier(self, receipt: Receipt, result: Vector, now: float) -> None:
        """Whoever committed with us is the next cohort."""
        group, me, tau = self._barrier_group, self._here.peer, self._avoidance.barrier_every
        self._drop_cohort()
        early, self._early_words = self._early_words, {}
        if receipt.outcome is Outcome.ALONE:
            version = VersionReceipt(self._own, "alone", False, 0, 0, (), b"")
            self._conclude(replace(receipt, epoch=self._own, version=version), result, State.OUT, now)
            return
        assert group is not None
        assert self._posts.newest is not None
        members = self._barrier.survivors_of(group)
        cohort = Cohort(GroupId(receipt.rounds[-1].group_id), group, members, me, self._avoidance.group_size)
        number = receipt.epoch * tau
        contributors = tuple(ContributorLine(member.peer, number) for member in cohort.members if member.weight > 0)
        skipped = self._skipped(number)
        version = VersionReceipt(number, "barrier", not receipt.joined, 0, skipped, contributors, cohort.id)
        self._cohort = cohort
        # What `auto` was at the barrier it is until the next: all members know that alike. Versions have no anchors.
        self._codec = self._rules.with_auto(group.codec).over(self.options.layout)
        self._codec_why = group.codec_why
        self._finished = self._activated = self._own = number
        self._posts.newest.version = number
        if receipt.joined:  # what a newcomer brought along is in no mean, and must get into no sum
            self._posts.newest = Post(result, number)
        self._versions = {cohort.group_id(v): v for v in range(number + 1, number + tau)}
        self._effects.append(Log(f"cohort of {len(cohort.members)}, {format_sides(cohort.sides)}, from {number} on"))
        self._conclude(replace(receipt, epoch=number, version=version), result, State.COMPUTING, now)
        for sender, words in early.items():
            for word in words:
                with suppress(RemoteProtocolError):  # not the fault of whose message is being received
                    if word.cohort == cohort.id:
                        self._receive_word(word, sender, now)

    # ---- small things

    def _tell_member(self, member: Member, message: CohortMessage) -> None:
        """One that nobody can dial hears it where it dialled us before."""
        self._tell(member.peer, member.address if member.dialable else "", message)

    def _tell(self, peer: PeerId, address: str, message: Message) -> None:
        self._effects.append(Send(peer, address, message))

    def _become(self, state: State) -> None:
        assert self.state is not State.CLOSED
        self.state = state

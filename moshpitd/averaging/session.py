"""One trainer's stay: rounds, deadlines, retries, grid position, carried weight.

Knows how an averaging goes: gather, then for each round find the group and reduce, then account for it. It alone knows
what to do when something failed. Does not know sockets, threads, the clock or the directory; time, dice and peers are
handed in, wishes go out as effects.

| state     | means                                                   | left by                                        |
|-----------|---------------------------------------------------------|------------------------------------------------|
| IDLE      | the trainer computes; joins for us are kept             | start() -> GATHERING                           |
| GATHERING | waiting for peers, or for a plan                        | enough and planned -> COMPUTING or MATCHING;   |
|           |                                                         | time -> IDLE                                   |
| COMPUTING | jobs of the compressor run                              | the last -> MATCHING or IDLE                   |
| MATCHING  | finding the group of round (k, j)                       | group -> REDUCING; none -> next round or IDLE  |
| REDUCING  | the group's all-reduce runs                             | its end -> MATCHING (j + 1), COMPUTING or IDLE |
| CLOSED    | the session left                                        | (none)                                         |

What is averaged the session's compressor says (compressors/stages.py): a run an averaging, made of stages that each go
through R rounds along the same axes. The stage in slot s has the rounds s * R and following. A run is dropped when a
stage met nobody, or when the time is up between two stages: then the averaging ends alone, and nothing has changed.
With shards an averaging is one round of all peers, half an all-reduce; who takes part in it shards.py knows.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import chain
from typing import assert_never

from moshpitd.averaging.all_reduce import AllReduce, AllReduceConfig, Outgoing
from moshpitd.averaging.codecs import INTEGERS, Codec, Rules, VectorCodec, codec_named, rules_of
from moshpitd.averaging.cohort import CohortConfig, CohortStatus, WaitAvoidance
from moshpitd.averaging.compressors import (
    Done,
    Jobs,
    Run,
    Stage,
    Unsent,
    check_compressor,
    compressor_named,
)
from moshpitd.averaging.compressors.stages import FEEDBACK_NAME_BYTES_MAX
from moshpitd.averaging.compute_budget import SECONDS_MAX, BudgetKeeper, BudgetOptions
from moshpitd.averaging.effects import (
    Announce,
    Compute,
    Effect,
    Failed,
    Finished,
    Log,
    LookUp,
    Progress,
    Send,
    Withdraw,
)
from moshpitd.averaging.errors import (
    InvalidInput,
    NoGroup,
    Precondition,
    RemoteProtocolError,
    SessionError,
    Unavailable,
)
from moshpitd.averaging.grid import (
    IN_STEP,
    UNDECIDED,
    WEIGHT_MAX,
    Cell,
    Plan,
    Terms,
    carried_weight,
    grid_key,
    session_key,
)
from moshpitd.averaging.link import LinkRates
from moshpitd.averaging.lossy_reduce import LossyConfig, LossyReduce, Part, Paths
from moshpitd.averaging.matchmaking import (
    HAILED,
    Candidate,
    Matchmaking,
    MatchmakingConfig,
    Round,
    grace_from,
    join_is_sound,
)
from moshpitd.averaging.matchmaking import State as MatchmakingState
from moshpitd.averaging.membership import BEHIND_MAX, HOLES_TOLD_MAX, Credentials, Membership
from moshpitd.averaging.messages import (
    Activation,
    Address,
    Ahead,
    Begin,
    Begun,
    Bound,
    Chunk,
    Closed,
    Coming,
    Contributing,
    Farewell,
    Group,
    Hail,
    Heartbeat,
    Holdings,
    Join,
    Kept,
    Latencies,
    Lease,
    Leave,
    LossyMessage,
    Member,
    Message,
    Outcast,
    PlanNotice,
    PlanWanted,
    Presence,
    RangesWanted,
    Ready,
    Record,
    Redirect,
    ReductionMessage,
    Sighting,
    Stranger,
    Suspect,
    TermsNotice,
    TermsWanted,
    TooShort,
    View,
)
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank, digest, short
from moshpitd.averaging.receipt import (
    BudgetLine,
    DroppedLine,
    LinkLine,
    LocalLine,
    MemberLine,
    Outcome,
    Receipt,
    RoundReceipt,
    ShardLine,
)
from moshpitd.averaging.shards import CALLS_A_STEP, SHARDS_MAX, Half, Muster, Sharding, Shards
from moshpitd.averaging.transport import EVERYTHING_ARRIVES, LOSSY, Transport
from moshpitd.averaging.unbiased import Form
from moshpitd.averaging.vector import Layout, TensorSpec, Vector

Reduction = AllReduce | LossyReduce
"""What a group's values go through."""
NAME_DEFAULT = "default"
TIMEOUT_DEFAULT_S = 60.0
LONELY_WAIT_DEFAULT_S = 1.0
LONELY_HALVINGS_MAX = 5
STRANGE_FOR_S = 1.0
"""Who differs for so long is asked in what, to tell people."""
LOOK_AGAIN_S = 3.0
"""After an averaging in which somebody was missing: by then the others have ended theirs, and their leases say whether
they count as we do."""
MATCHMAKINGS_MAX = 64
REDUCTIONS_MAX = 16
EARLY_MESSAGES_MAX = 1024
"""Kept of groups we have not heard of."""
EARLY_OF_ONE_MAX = 16
"""... of one sender: who says more forgets only its own."""
EARLY_VIEWS_MAX = 1 << 13
"""... and in one message."""
TENSORS_TOLD_MAX = 4096
ANCHOR_TOLD_BYTES = 8
SETTLE_RESERVE_S = 0.5
"""A compressor with a state has so much of the caller's time for itself when the rounds are over..."""
SETTLE_SHARE = 0.1
"""... but at most this part of it."""
COUNT = TensorSpec("averagings", (2,), "float64")
"""Beside the compressor's state: how many averagings were counted."""
OWN_JOBS = GroupId(b"")
"""In the place of a group: the compressor's jobs."""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What a trainer chose when it opened its session."""

    layout: Layout
    name: str = NAME_DEFAULT
    rounds: int = 0
    """Rounds an averaging; 0 = auto, as many as the plan has axes."""
    codec: str = "float32"
    """As rules_of reads it."""
    compressor: str = "dense"
    min_peers: int = 1
    """Begin an averaging only when this many live sessions, ours included, are there. Without waiting: only the swarm's
    first barrier; later ones take whoever is alive, so that the death of one does not end the training of all."""
    joining: str = "receive"
    """receive: a newcomer's first averaging has weight 0; contribute: its values count at once."""
    lonely_wait_s: float = LONELY_WAIT_DEFAULT_S
    """How long an averaging looks for somebody while nobody else is known; then it ends alone, and the next one looks
    half as long."""
    wait_avoidance: WaitAvoidance | None = None
    """How versions run without waiting for anybody; None: averagings are synchronous."""
    transport: Transport = EVERYTHING_ARRIVES
    """Whether values must all arrive."""
    shards: Sharding | None = None
    """Owners that stay: calls are one half of an averaging each. None: whole averagings."""

    def check(self) -> None:
        """Raises InvalidInput that names what is wrong."""
        rules = rules_of(self.codec)
        rules.check(self.layout)
        compressor = check_compressor(self.compressor)
        compressor_named(compressor, self.layout)
        if compressor.startswith("arc") and (rules.by_tensor or rules.is_anchored):
            raise InvalidInput(
                f"codec {rules.name!r} with compressor {compressor!r}: what is sent are rows of all tensors, not the "
                "values of each; use one codec for all, without +anchored"
            )
        if "ef21m" in compressor and self.rounds:
            raise InvalidInput(
                f"compressor {compressor!r} with rounds {self.rounds}: ef21m needs the mean of all peers each time; "
                "use rounds auto (0), or ef14"
            )
        if not self.name or len(self.name) > 200:
            raise InvalidInput(f"session name {self.name[:40]!r}: must have 1 to 200 characters")
        if not 0 <= self.rounds <= 64:
            raise InvalidInput(f"rounds {self.rounds}: must be auto (0) or 1 to 64")
        if not 0 <= self.min_peers <= 8192:
            raise InvalidInput(f"min_peers {self.min_peers}: must be 0 to 8192")
        if self.joining not in ("receive", "contribute"):
            raise InvalidInput(f"joining {self.joining!r}: must be receive or contribute")
        if not 0 <= self.lonely_wait_s < math.inf:
            raise InvalidInput(f"lonely wait {self.lonely_wait_s}: must be a duration in seconds")
        self._check_transport(rules, compressor)
        if self.wait_avoidance:
            self.wait_avoidance.check(min_peers=self.min_peers, rounds=self.rounds, compressor=self.compressor)
            if compressor != "dense":
                raise InvalidInput(f"a wait-avoiding session averages whole models: not with compressor {compressor!r}")
            if self.shards:
                raise InvalidInput(
                    "shards in a wait-avoiding session: there nobody waits for an owner who is late; choose one of them"
                )
        if self.shards:
            self.shards.check(
                min_peers=self.min_peers, rounds=self.rounds, compressor=self.compressor, joining=self.joining
            )

    def _check_transport(self, rules: Rules, compressor: str) -> None:
        """Raises InvalidInput for what does not go with rounds that lose something."""
        self.transport.check()
        if not self.transport.may_lose and not self.shards:
            return
        way_out = f"transport {self.transport.name!r}" if self.transport.may_lose else "shards"
        if self.wait_avoidance:
            raise InvalidInput(
                f"{way_out} in a wait-avoiding session: its sums hold all of each model; leave the transport out"
            )
        if rules.is_anchored:
            raise InvalidInput(
                f"{way_out} with codec {rules.name!r}: differences are coded to an average that all hold alike, and "
                "after a lossy round they do not; use the codec without +anchored"
            )
        if rules.by_tensor:
            raise InvalidInput(
                f"{way_out} with codec {rules.name!r}: each packet is decoded alone, by one codec for all tensors"
            )
        if "ef21m" in compressor:
            raise InvalidInput(
                f"{way_out} with compressor {compressor!r}: ef21m goes on from a mean that all hold alike, and after a "
                "lossy round they do not; use ef14"
            )
        if "ef14" in compressor and rules.name != "float32":
            raise InvalidInput(
                f"{way_out} with codec {rules.name!r} and compressor {compressor!r}: ef14 sends again what the codec "
                "left out, and a lossy round does not know what of it arrived; use codec float32"
            )


@dataclass(frozen=True, slots=True)
class Call:
    """One averaging as its trainer asks for it."""

    weight: float = 1.0
    timeout_s: float = TIMEOUT_DEFAULT_S
    epoch: int | None = None
    """Meet only peers with the same number; None = the newest open averaging."""
    trainers: int = 1
    """Of this daemon, whose values these are the mean of; the weight is their sum."""
    micro_batch_s: tuple[tuple[float, ...], ...] = ()
    """With a compute budget: how long each completed micro-batch of this step took, for each of those trainers."""
    half: Half | None = None
    """In a session with shards: what is called for."""

    def check(self) -> None:
        """Raises InvalidInput that names what is wrong."""
        if not 0 <= self.weight <= WEIGHT_MAX:
            raise InvalidInput(f"weight {self.weight}: must be a finite number, 0 or more, at most {WEIGHT_MAX:g}")
        if not 0 < self.timeout_s < math.inf:
            raise InvalidInput(f"timeout {self.timeout_s}: must be a positive number of seconds")
        if self.epoch is not None and not 0 <= self.epoch < 1 << 62:
            raise InvalidInput(f"epoch {self.epoch}: must be 0 or more")
        for number, seconds in enumerate(chain.from_iterable(self.micro_batch_s)):
            if not 0 <= seconds <= SECONDS_MAX:
                raise InvalidInput(
                    f"latency {seconds} of micro-batch {number}: must be seconds, from 0 to {SECONDS_MAX:g}"
                )


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """The daemon's side of a session."""

    pin: str = ""
    """The pinned grid, "2x4"; empty: the planner chooses."""
    group_size_max: int = 16
    """Larger groups need fewer rounds but wait for more peers; a failure costs its group a chunk of time."""
    chunk_bytes: int = 1 << 20
    """What goes over the wire at once: large enough for the transport to be fast, small enough to overlap. On lines
    known to be fast it is up to four times as much."""
    lease_ttl_s: float = 60.0
    """How long a silent session counts as live. The directory renews a lease at a third of it."""
    presence_ttl_s: float = 30.0
    look_up_interval_s: float = 0.3
    """While peers or a plan are missing, how often to look. Halves the wait, doubles the traffic."""
    grace_factor: float = 8.0
    """A group stays open for median + factor * MAD of earlier arrival offsets."""
    grace_floor_s: float = 1.0
    """... but at least so long: less would shut out a busy machine's hiccup, more would wait for the dead."""
    epochs_ahead_max: int = 10_000
    """An epoch further above the swarm's is taken for a mistake."""
    matchmaking: MatchmakingConfig = field(default_factory=MatchmakingConfig)
    all_reduce: AllReduceConfig = field(default_factory=AllReduceConfig)
    lossy: LossyConfig = field(default_factory=LossyConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Who and where this daemon is."""

    swarm: bytes
    """Digest of the swarm's name."""
    peer: PeerId
    incarnation: Incarnation
    address: Address
    """What others dial; empty while nobody can."""
    dialable: bool
    bulk_port: int = 0
    """Of the plain TCP path for chunks; 0: not offered."""


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """What a session says of itself."""

    state: str
    """idle, gathering, computing, matching, reducing, closed"""
    waiting_for: str
    epoch: int
    grid: str
    cell: tuple[int, ...]
    live_sessions: int
    averagings: dict[str, int] = field(default_factory=dict)
    """Ended averagings by outcome: complete, partial, alone, failed."""
    differs: str = ""
    """In words, somebody with other terms under this session's name."""
    is_outvoted: bool = False
    """Most sessions of this name have other terms."""
    cohort: CohortStatus | None = None
    """Of a wait-avoiding session."""
    budget: BudgetLine | None = None
    """Of a session that has one."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a session keeps in memory."""

    matchmakings: int
    """At most MATCHMAKINGS_MAX."""
    reductions: int
    """At most REDUCTIONS_MAX."""
    reductions_running: int
    early_messages: int
    """Of groups not heard of yet: at most EARLY_MESSAGES_MAX."""
    deferred_joins: int
    """Under plans not known yet: at most MATCHMAKINGS_MAX."""


class State(Enum):
    """See the table above."""

    IDLE = "idle"
    GATHERING = "gathering"
    COMPUTING = "computing"
    MATCHING = "matching"
    REDUCING = "reducing"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Anchor:
    """The last average of an axis, as all members that committed it hold it."""

    digest: bytes
    values: Vector


@dataclass(slots=True)
class Course:
    """A stage on its way through its rounds."""

    stage: Stage
    rounds: int
    values: Vector
    """What the next round averages. The stage's own until a round committed."""
    spares: list[Vector]
    """Buffers for the next rounds' results."""
    weight: float
    """Carried into the next round."""
    first: int
    """The number of its first round."""
    done: int = 0
    """Rounds that are over."""
    changed: bool = False
    """Some round committed: `values` is no longer the stage's own."""
    whole: bool = True
    """Every round so far was complete."""
    unsent: list[Unsent] = field(default_factory=list)
    digest: bytes = b""
    """Of the last committed round."""
    result: Vector | None = None
    """What the round under way writes to."""
    left_out: Vector | None = None
    """... and what its codec lacks."""


@dataclass(slots=True)
class Averaging:
    """The averaging under way."""

    call: Call
    started_at: float
    deadline: float
    values: Vector
    """The trainer's own."""
    spares: list[Vector]
    """Buffers of its layout for results."""
    k: int
    weight: float
    """The call's, or 0."""
    joined: bool = False
    j: int = 0
    run: Run | None = None
    """None before it began, and after it was dropped."""
    course: Course | None = None
    into: Vector | None = None
    """The run's."""
    rounds_until: float = math.inf
    """The deadline, less what the compressor needs after the last round."""
    jobs: set[int] = field(default_factory=set)
    """The run's that are not done."""
    is_over: bool = False
    """The trainer is gone: no further round."""
    met: dict[int, set[PeerId]] = field(default_factory=dict)
    """By axis: who was in our groups so far, and comes to the next stage too."""
    ahead: dict[PeerId, int] = field(default_factory=dict)
    """Who does not come to the rounds before this one."""
    roster_seen: bool = False
    next_look_up: float = 0.0
    next_word: float = 0.0
    lonely_until: float = math.inf
    """If nobody else is known by then, there is nobody to wait for."""
    round_started_at: float = 0.0
    reduce_started_at: float = 0.0
    plan: Plan | None = None
    cell: Cell = ()
    """Ours in all rounds of this averaging, whatever is claimed meanwhile."""
    axis: int = 0
    matchmaking: Matchmaking | None = None
    reduction: Reduction | None = None
    rounds: list[RoundReceipt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    muster: Muster | None = None
    """In a session with shards: who takes part, once there is a group."""
    shard_before: ShardLine | None = None


class Session:
    """The machine. Drive it by its commands, `receive`, the other inputs and `handle_timer`; then `take_effects`."""

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
        """`link`: what is known of the daemon's line; all its sessions teach and ask the same one."""
        options.check()
        self._rules = rules_of(options.codec)
        self._compressor = compressor_named(options.compressor, options.layout)
        # Terms are compared as text.
        self.options = options = replace(options, codec=self._rules.name, compressor=self._compressor.name)
        self._auto_bytes, self._auto_elements = self._rules.share_of_auto(options.layout)
        self._wire_bytes = self._rules.wire_bytes(options.layout)
        self._codecs: dict[tuple[str, Layout], VectorCodec] = {}
        """By what `auto` is in a group, and what is averaged."""
        self._anchors: dict[int, Anchor] = {}
        """By axis; only where the codec asks for them. One vector each, and one more while a round writes it."""
        mode = options.wait_avoidance or options.shards
        averaging = mode.term if mode else IN_STEP
        self.terms = Terms(
            options.layout.digest,
            options.rounds,
            options.codec,
            options.compressor,
            transport=options.transport.term,
            averaging=averaging,
        )
        self.key = session_key(here.swarm, options.name)
        self.state = State.IDLE
        self.outcomes: dict[str, int] = {}
        self._config = config
        self._here = here
        self._rng = rng
        self._link = link
        self._members = Membership(
            here.peer,
            self.terms,
            pin=config.pin,
            group_size_max=config.group_size_max,
            min_peers=options.min_peers,
            credentials=credentials,
            now=now,
        )
        self._opened_at = now
        self._last_k = last_k
        self._next_k = last_k + 1
        self._current: Averaging | None = None
        self._matchmakings: dict[Key, Matchmaking] = {}
        self._reductions: dict[GroupId, Reduction] = {}
        self._paths = Paths()
        """What lossy rounds taught of the paths to us."""
        self._shards = Shards(here.peer, options.layout) if options.shards else None
        self._next_job = 0
        self._early: dict[PeerId, deque[ReductionMessage | LossyMessage]] = {}
        """Of groups we have not heard of yet."""
        self._offsets: deque[float] = deque(maxlen=128)
        self._grace_s: float | None = None
        self._deferred: dict[PeerId, Join] = {}
        """Under plans we do not know yet, the newest of each sender."""
        self._terms_asked_at = -math.inf
        self._lonely_calls = 0
        """Averagings in a row for which nobody else was there."""
        self._strange_since = math.inf
        """Since when somebody with other terms is known."""
        self._told_apart: tuple[PeerId, bytes, str] | None = None
        """Who has other terms under our name, the digest of those, and the first difference."""
        self._started_at = -math.inf
        self._periods_s: deque[float] = deque(maxlen=8)
        """From one call of our trainer to its next."""
        self._plans_asked = 0
        self._was_late = False
        """We came too late, by little: nobody may expect us next time, if we do not say so."""
        self._k_met: int | None = None
        """What the others counted when we first saw any."""
        self._looked_at = -math.inf
        """When the directory last told a call who is there."""
        self._promised_until = -math.inf
        """Our trainer is on its way, though it has not called."""
        self._look_again_at: float | None = None
        self._looked_again_at = -math.inf
        self._met_at_k = 0
        """The furthest averaging in which others, past one of ours, said that they can be met."""
        self._holes_told_at = -1
        """The averaging in which we told the next decider whom the plan has lost."""
        self._effects: list[Effect] = []
        self._presence_key: Key | None = None
        self._budget: BudgetKeeper | None = None
        self._announce_lease(now)

    # ---- commands

    def set_budget(self, options: BudgetOptions, now: float) -> None:
        """Give the session a compute budget, or change it. Raises InvalidInput and, while an averaging is under way,
        Precondition."""
        options.check("shards" if self._shards else IN_STEP)
        if self._budget is not None and options == self._budget.options:
            return
        if self._current is not None:
            raise Precondition("an averaging of this session is under way: set the compute budget before or after it")
        if self._budget is None:
            self._budget = BudgetKeeper(self._here.peer, options)
        else:
            self._budget.change(options)
        terms = replace(self.terms, normalise=options.term or UNDECIDED)
        if terms != self.terms and self.state is not State.CLOSED:
            self.terms = terms
            self._members.change_terms(terms)
            self._matchmakings.clear()
            self._deferred.clear()
            self._announce_lease(now)

    def weighed(self, call: Call, now: float) -> Call:
        """What a trainer's call weighs, whose weight is that of one micro-batch if there is a compute budget. Raises
        InvalidInput."""
        if self._budget is None:
            if call.micro_batch_s:
                raise InvalidInput("latencies of micro-batches without a compute budget: give the session one first")
            return call
        if self.terms.normalise == UNDECIDED:
            self.set_budget(replace(self._budget.options, normalise="fixed"), now)
        weighed = replace(call, weight=call.weight * self._budget.options.factor(call.micro_batch_s))
        weighed.check()
        return weighed

    def start(self, call: Call, vector: Vector, now: float, *, spares: Sequence[Vector] = ()) -> None:
        """Begin an averaging of the vector, which is ours and stays as it is until Finished or Failed. Results go into
        the spares as far as they reach. Raises a SessionError at once for what can never work."""
        call.check()
        if self.state is State.CLOSED:
            raise Unavailable("the session is closed")
        if self._current is not None:
            raise Precondition("an averaging of this session is still under way: await it first")
        if bool(call.micro_batch_s) != (self._budget is not None):
            raise InvalidInput("latencies of micro-batches and a compute budget go together: one of them is missing")
        self._check_half(call)
        assert vector.layout == self.options.layout
        k = self._choose_k(call)
        if self._budget is not None:
            self._budget.start(call.micro_batch_s)
        self._periods_s.append(now - self._started_at)
        self._started_at = now
        # A round that failed may still have a job under way, which writes into what was its spare.
        free = [spare for spare in spares if self.is_free(spare)]
        self._current = Averaging(call, now, now + call.timeout_s, vector, free, k, call.weight)
        # Half as long from one lonely call to the next: who is left alone does not come to a halt, and still looks.
        lonely_wait_s = self.options.lonely_wait_s / (1 << min(self._lonely_calls, LONELY_HALVINGS_MAX))
        self._current.lonely_until = now + min(lonely_wait_s, 0.9 * call.timeout_s)
        self._current.shard_before = self._shards.shard if self._shards else None
        settles = self._compressor.state_layout is not None
        settle_s = min(SETTLE_RESERVE_S, SETTLE_SHARE * call.timeout_s) if settles else 0.0
        self._current.rounds_until = self._current.deadline - settle_s
        # A newcomer looks first, at its first call; the others are warm.
        self._current.roster_seen = self._last_k >= 0 or now < self._looked_at + self._config.lease_ttl_s / 2
        self._become(State.GATHERING)
        if self._last_k < 0:
            self._announce_lease(now)
        self._begin_if_possible(now)

    def _check_half(self, call: Call) -> None:
        """Raises InvalidInput for a call that is not of this kind of session."""
        if call.half is None and self._shards is not None:
            raise InvalidInput("average in a session with shards: call reduce_scatter and broadcast_shard by turns")
        if call.half is not None and self._shards is None:
            raise InvalidInput(f"{call.half.value} in a session without shards: open it with shards, or call average")
        if call.half is not None and call.epoch is not None:
            raise InvalidInput(f"epoch {call.epoch}: calls of a session with shards are numbered by the daemons")
        if call.half is Half.BROADCAST_SHARD and call.weight != 1.0:
            raise InvalidInput(f"weight {call.weight}: what owners broadcast is not averaged; leave it out")

    def promise(self, until: float, now: float) -> None:
        """Our trainer will call, if nothing happens to it: until then others wait for it as long as they can."""
        self._promised_until = until
        for matchmaking in self._matchmakings.values():
            self._refresh(matchmaking, now)
        self._step(now)

    def abandon(self, now: float) -> None:
        """The trainer is gone. A closed group is served to its end, for the others; anything before is left."""
        current = self._current
        if current is None:
            return
        current.is_over = True
        if current.matchmaking and self.state is State.MATCHING:
            current.matchmaking.give_up("its trainer is gone", now)
        if self.state is State.MATCHING and current.course and current.course.changed and current.course.stage.fed:
            self._end_stage(now)  # others have what we sent of our offer: that must be remembered
        elif self.state in (State.GATHERING, State.MATCHING):
            self._fail(Unavailable("the trainer is gone"))

    def close(self, now: float) -> None:
        """Leave the swarm, at once known to it."""
        if self.state is State.CLOSED:
            return
        if self._current is not None:
            self._fail(Unavailable("the session closed"))
        for peer in self._members.everyone():
            self._tell(peer, "", Farewell())
        self._effects.append(Withdraw(self.key))
        if self._presence_key is not None:
            self._effects.append(Withdraw(self._presence_key))
        self._look_again_at = None
        self.state = State.CLOSED

    def relocate(self, here: Whereabouts, now: float) -> None:
        """Our address or dialability changed."""
        if here != self._here:
            self._here = here
            self._announce_lease(now)

    # ---- inputs

    def receive(self, message: Message, sender: PeerId, now: float) -> None:
        """A message of the sender proved by its channel. Raises RemoteProtocolError for nonsense."""
        if self.state is State.CLOSED or sender == self._here.peer:
            return
        if not isinstance(message, Farewell):
            self._members.heard(sender)
        match message:
            case Join():
                self._receive_join(message, sender, now)
            case Begin():
                self._receive_begin(message, sender, now)
            case Hail():
                self._receive_hail(message, sender, now)
            case Coming():
                self._receive_coming(message, sender, now)
            case Leave() | Kept() | Redirect() | TooShort() | Closed() | Begun() | Bound():
                self._pass_on(message.key, message, sender, now)
            case Ready() | Suspect() | View() | Holdings() | Heartbeat() | RangesWanted():
                self._receive_in_group(message, sender, now)
            case Ahead(k=k, j=j):
                self._receive_ahead(k, j, sender)
            case PlanWanted(missing=missing):
                for peer in missing[:HOLES_TOLD_MAX]:  # if it is gone, this finds out; if not, it is answered by a plan
                    self._tell(peer, self._members.address_of(peer), PlanWanted())
                self._answer_plan_wanted(sender, now)
            case PlanNotice():
                self._adopt(message, sender, now)
            case TermsWanted():
                if self.terms.normalise != UNDECIDED:
                    self._tell(sender, "", self._terms_notice())
            case TermsNotice():
                self._compare_terms(message, sender)
            case Farewell():
                self._members.left(sender)
                self._paths.forget([sender])
                self._peer_out(sender, "left the swarm", now)
            case Activation() | Contributing() | Outcast() | Stranger():
                return  # of a cohort, which only a wait-avoiding session has
            case Latencies():
                if self._budget is not None:
                    self._budget.receive(message, self._current.k if self._current else self._next_k)
            case _:
                assert_never(message)
        self._step(now)

    def peer_lost(self, peer: PeerId, why: str, now: float) -> None:
        """No channel to this peer could be had, or it broke."""
        self._members.suspect(peer)
        self._peer_out(peer, why, now)
        self._step(now)

    def roster_received(self, key: Key, sightings: list[Sighting[Record]], now: float) -> None:
        """What the directory knows under one of our keys."""
        if key == self.key:
            self._members.sighted(sightings, now)
            self._members.expire(now)
            if self._current:
                self._looked_at = now
                self._current.roster_seen = True
            self._roster_changed(now)
        elif matchmaking := self._matchmakings.get(key):
            self._refresh(matchmaking, now, sightings)
        self._step(now)

    def chunk_received(self, group_id: GroupId, sender: Rank, chunk: Chunk, now: float) -> None:
        """A chunk of a group's stream. Raises RemoteProtocolError for nonsense."""
        if reduction := self._reductions.get(group_id):
            reduction.chunk_received(chunk, sender, now)
            self._step(now)

    def stream_opened(self, group_id: GroupId, rank: Rank, transport: str) -> None:
        """Over what chunks travel between this member and us."""
        if reduction := self._reductions.get(group_id):
            reduction.transports[rank] = transport

    def stream_lost(self, group_id: GroupId, rank: Rank, why: str, now: float) -> None:
        """A group's stream to this member broke."""
        if reduction := self._reductions.get(group_id):
            reduction.suspect(rank, why, now)
            self._step(now)

    def compute_finished(self, group_id: GroupId, job_id: int, value: object, now: float) -> None:
        if group_id == OWN_JOBS:
            self._own_job_done(job_id, now)
            self._step(now)
        elif reduction := self._reductions.get(group_id):
            reduction.compute_finished(job_id, value, now)
            self._step(now)

    def next_outgoing(self, group_id: GroupId, rank: Rank) -> Outgoing | None:
        """Pull: the next chunk for this member of the group."""
        reduction = self._reductions.get(group_id)
        return reduction.next_outgoing(rank) if reduction else None

    def is_ahead(self, group_id: GroupId, rank: Rank, now: float) -> bool:
        """Whether this member's next chunk had better stay where it is until the bell rings."""
        reduction = self._reductions.get(group_id)
        return isinstance(reduction, AllReduce) and reduction.is_ahead(rank, now)

    def lossy(self, group_id: GroupId) -> LossyReduce | None:
        """A group's lossy round, for its packets: pulls go to it, and inputs by `feed_lossy`."""
        reduction = self._reductions.get(group_id)
        return reduction if isinstance(reduction, LossyReduce) else None

    def feed_lossy(self, group_id: GroupId, put: Callable[[LossyReduce, float], None], now: float) -> None:
        """What arrived of a group's packets, or became of their paths: `put` calls one of the round's inputs. Raises
        RemoteProtocolError for nonsense."""
        if (round_ := self.lossy(group_id)) is not None:
            put(round_, now)
            self._step(now)

    def handle_timer(self, now: float) -> None:
        for matchmaking in list(self._matchmakings.values()):
            if (due := matchmaking.next_deadline()) is not None and due <= now:
                matchmaking.handle_timer(now)
        for reduction in list(self._reductions.values()):
            if (due := reduction.next_deadline()) is not None and due <= now:
                reduction.handle_timer(now)
        if self._look_again_at is not None and now >= self._look_again_at:
            self._look_again_at = None
            self._effects.append(LookUp(self.key))
        self._step(now)

    def next_deadline(self) -> float | None:
        moments = [m.next_deadline() for m in self._matchmakings.values()]
        moments += [r.next_deadline() for r in self._reductions.values()]
        if self._current:
            moments.append(self._current.next_word)
            if self.state is State.GATHERING:
                moments.append(self._current.deadline)
            elif self.state is State.MATCHING:  # jobs end soon, and reductions know it too
                moments.append(self._current.rounds_until)
            if self.state is State.GATHERING:
                moments.append(self._current.next_look_up)
                if self._current.roster_seen and self._is_lonely():
                    moments.append(self._current.lonely_until)
        if self._look_again_at is not None:
            moments.append(self._look_again_at)
        return min((m for m in moments if m is not None), default=None)

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    # ---- what the owner reads

    @property
    def last_k(self) -> int:
        """The last averaging we took part in; -1: none."""
        return self._last_k

    @property
    def result(self) -> Vector:
        """The vector of the averaging that just Finished. Only valid while its effect is being carried out."""
        assert self._result is not None
        return self._result

    def is_free(self, spare: Vector) -> bool:
        """Whether no job of a round that failed may still write to this buffer."""
        return not any(reduction.may_write_to(spare) for reduction in self._reductions.values())

    @property
    def contribution(self) -> Vector | None:
        """What the reduction under way reads; unchanged until it has committed. None when there is none."""
        course = self._current.course if self._current else None
        return course.values if course else None

    def result_of(self, group_id: GroupId) -> Vector | None:
        """What a group's reduction that has just committed wrote; another round may soon write there."""
        reduction = self._reductions.get(group_id)
        return reduction.result if reduction else None

    def feedback_layout(self) -> Layout:
        """Of what `save_feedback` gives. Raises Precondition where there is none, or it is just being changed."""
        layout = self._compressor.state_layout
        if layout is None:
            raise Precondition(
                f"session {self.options.name!r} keeps no error feedback: its compressor is {self._compressor.name}; "
                "open it with another, dense:ef14 say, if its codec is lossy"
            )
        if self._current is not None:
            raise Precondition("an averaging of this session is under way and changes its feedback: await it first")
        return Layout.of([*layout.tensors, COUNT], name_bytes_max=FEEDBACK_NAME_BYTES_MAX)

    def save_feedback(self) -> Vector:
        """A copy of the error feedback and of how far we have counted; takes as long as copying it."""
        state = Vector.empty(self.feedback_layout())
        arrays = self._compressor.save()
        for spec, view in state.views():
            view[:] = arrays[spec.name] if spec.name in arrays else divmod(self._last_k + 1, 1 << 31)
        return state

    def load_feedback(self, state: Vector) -> int:
        """Go on from a saved one; gives the number of the last averaging that is in it, for `count_on_from`. Raises
        InvalidInput that names what does not fit; the feedback is then as before."""
        if difference := self.feedback_layout().first_difference(state.layout):
            raise InvalidInput(
                f"the saved feedback is not of this session's tensors and {self._compressor.name}: {difference}"
            )
        arrays = {spec.name: view for spec, view in state.views()}
        high, low = (float(part) for part in arrays.pop(COUNT.name))
        if not (0 <= high < 1 << 31 and 0 <= low < 1 << 31 and high == int(high) and low == int(low)):
            raise InvalidInput(f"the saved feedback's {COUNT.name!r} is not one that was saved")
        self._compressor.load(arrays)
        return (int(high) << 31) + int(low) - 1

    def count_on_from(self, last_k: int, now: float) -> None:
        """Averagings up to this one were taken part in, by an earlier session: we are no newcomer."""
        if last_k > self._last_k:
            self._last_k, self._next_k = last_k, max(self._next_k, last_k + 1)
            self._announce_lease(now)

    _result: Vector | None = None

    def holds(self, vector: Vector) -> bool:
        """Whether the trainer must not write here: into a contribution not before its call has ended."""
        return not self.is_free(vector) or self.contribution is vector

    def survivors_of(self, group: Group) -> tuple[Member, ...]:
        """Who committed with us in a group that has just ended."""
        return tuple(group.members[rank] for rank in self._reductions[group.group_id].survivors)

    def status(self, now: float) -> SessionStatus:
        plan = self._plan_in_force()
        return SessionStatus(
            self.state.value,
            self._waiting_for(now),
            self._current.k if self._current else self._next_k,
            plan.grid if plan else "",
            self._members.cell(plan, self._next_k) if plan else (),
            self._members.live_count(),
            dict(self.outcomes),
            differs=self._differs(),
            is_outvoted=self._members.majority_against_us() is not None,
            budget=self._budget_line(),
        )

    def load(self) -> Load:
        """What is kept for others and for rounds to come; every figure has a limit."""
        return Load(
            len(self._matchmakings),
            len(self._reductions),
            sum(not reduction.finished for reduction in self._reductions.values()),
            sum(len(waiting) for waiting in self._early.values()),
            len(self._deferred),
        )

    def known_peers(self) -> list[tuple[PeerId, str, bool]]:
        """(peer, address, is suspect) of every session under our name."""
        return [
            (peer, self._members.address_of(peer), self._members.is_suspect(peer))
            for peer in sorted(self._members.everyone())
        ]

    # ---- one step: after every input, whatever became possible

    def _step(self, now: float) -> None:
        current = self._current
        if current is not None:
            if self.state is State.GATHERING:
                self._begin_if_possible(now)
            elif self.state is State.MATCHING:
                self._look_at_matchmaking(now)
            elif self.state is State.REDUCING:
                self._look_at_reduction(now)
            self._say_what_is_waited_for(now)
        for matchmaking in self._matchmakings.values():
            self._effects += self._effects_of(matchmaking)
        for reduction in self._reductions.values():
            self._effects += reduction.take_effects()
        self._forget_old(now)

    def _forget_old(self, now: float) -> None:
        """What no late peer can still need."""
        for key in [key for key, m in self._matchmakings.items() if m.round.k < self._next_k - 2]:
            matchmaking = self._matchmakings[key]
            ours = self._current is not None and self._current.matchmaking is matchmaking
            if not ours and matchmaking.next_deadline() is None:  # else it leads those who are far behind us
                del self._matchmakings[key]
        if len(self._reductions) > 4:
            over = [group_id for group_id, r in self._reductions.items() if r.finished and r.idle]
            for group_id in over[:-4]:
                del self._reductions[group_id]

    # ---- counting

    def _choose_k(self, call: Call) -> int:
        swarm_k = self._members.current_k()
        if call.epoch is None:
            # Some may have fallen behind together: by leases alone they would meet in the others' past, for ever. One
            # step at most beyond what two leases hold, so that nobody can send us far ahead.
            return max(self._next_k, swarm_k, self._waited_in(), min(self._met_at_k, swarm_k + 1))
        newest = max(swarm_k, self._next_k)
        counting = self._last_k >= 0 or self._members.has_history(newest + 1)
        if counting and call.epoch > newest + self._config.epochs_ahead_max:
            raise Precondition(f"epoch {call.epoch} is far above the swarm's {newest}: check the number you pass")
        if call.epoch <= self._last_k:
            raise Precondition(f"epoch {call.epoch} is over: the next one of this session is {self._next_k}")
        if counting and call.epoch + 2 <= swarm_k:
            raise Precondition(f"epoch {call.epoch} is over: the swarm is at {swarm_k}; leave the epoch out to join it")
        return call.epoch

    # ---- gathering

    def _begin_if_possible(self, now: float) -> None:
        current = self._current
        assert current is not None
        if now >= current.deadline:
            self._fail(NoGroup(self._waiting_for(now)))
            return
        if conflict := self._members.pin_conflict():
            self._fail(Precondition(f"{conflict}: restart it with the swarm's grid, or with --grid auto"))
            return
        live = self._members.live_count()
        self._notice_cohort()
        if not current.roster_seen and now < current.started_at + 2.0:
            self._look_up_if_due(now)
            return
        if self._is_lonely() and now >= current.lonely_until:
            self._lonely_calls += 1
            self._finish_alone("nobody else is in this averaging", now)
            return
        if live > 1:  # we may have started before we knew what the swarm counts
            current.k = self._choose_k_again(current)
        plan = self._plan_in_force()
        if live < max(2, self._members.min_peers) or plan is None:
            self._make_plan_if_due(now)
            plan = self._plan_in_force()
        if live < max(2, self._members.min_peers) or plan is None:
            self._look_up_if_due(now)
            return
        if self._shards is not None and len(plan.sides) > 1:
            self._fail(Precondition(f"{live} peers opened this session: with shards it takes {SHARDS_MAX}"))
            return
        newcomer = self._last_k < 0 and self.options.joining == "receive" and self._shards is None
        current.joined = newcomer and self._members.has_history(current.k)
        current.weight = 0.0 if current.joined else current.call.weight
        self._begin_run(now)

    def _is_lonely(self) -> bool:
        """Nobody else is known, and nobody else is needed."""
        return self._members.live_count() == 1 and self._members.sessions_needed() <= 1

    def _notice_cohort(self) -> None:
        """Without waiting nobody needs `min_peers` any more once a barrier was passed: by us, or by the others while we
        looked on. What they hold when we meet them says nothing: all of them may be waiting for their first one too,
        with counts of trainers that came before."""
        if self.options.wait_avoidance is None:
            return
        if self._members.live_count() > 1:
            k = self._members.current_k()
            self._k_met = k if self._k_met is None else self._k_met
            if k > self._k_met:
                self._members.min_peers = 1
        if any(self.outcomes.get(outcome.value) for outcome in (Outcome.COMPLETE, Outcome.PARTIAL)):
            self._members.min_peers = 1

    def _choose_k_again(self, current: Averaging) -> int:
        if current.call.epoch is not None:
            return current.call.epoch
        plan, swarm_k = self._plan_in_force(), self._members.current_k()
        is_ours = self._last_k < 0 and plan is not None and self._here.peer in plan.roster
        if is_ours and plan and swarm_k <= plan.first_k + 1 and not self._members.all_past(plan.first_k):
            # Made for us among others, who expect us there; faster lines may be through already. Whether ours is over
            # its leader says. (Where all are through, it was made for us before we were restarted.)
            return max(self._next_k, plan.first_k)
        return max(current.k, self._next_k, swarm_k)

    def _look_up_if_due(self, now: float) -> None:
        current = self._current
        assert current is not None
        if now < current.next_look_up:
            return
        current.next_look_up = now + self._config.look_up_interval_s
        self._effects.append(LookUp(self.key))
        if self._plan_in_force() is None and self._members.live_count() >= max(2, self._members.sessions_needed()):
            holder = self._members.plan_teller(self._plans_asked)
            self._plans_asked += 1
            if holder != self._here.peer:
                self._tell(holder, self._members.address_of(holder), PlanWanted())

    def _plan_in_force(self) -> Plan | None:
        return self._members.plan_for(self._current.k if self._current else self._next_k)

    def _differs(self) -> str:
        """Who else has a session of our name open and is not met, and why."""
        stranger = self._members.stranger()
        if self._told_apart is None or stranger != self._told_apart[:2]:
            return ""
        peer, _, difference = self._told_apart
        return f"{short(peer)} has a session of this name too, but is not met: {difference}"

    def _waiting_for(self, now: float) -> str:
        current = self._current
        if current is None:
            return ""
        left = f"{current.deadline - now:.0f} s left" if now < current.deadline else "and time is up"
        if self.state is State.GATHERING and (differs := self._differs()):
            left += f"; {differs}"
        live, needed = self._members.live_count(), self._members.sessions_needed()
        match self.state:
            case State.GATHERING if live < needed:
                pin = f" (the pinned grid {self._config.pin} has {needed} cells)" if self._config.pin else ""
                return f"{live} of {needed} peers here, waiting for {needed - live} more{pin}, {left}"
            case State.GATHERING if live == 1:
                return f"nobody else here yet, {left}"
            case State.GATHERING if self._plan_in_force() is None:
                decider = self._members.unknown_plan_holder(now) or self._members.next_decider()
                return f"{live} peers here, waiting for the plan of {short(decider)}, {left}"
            case State.GATHERING:
                return f"looking who is there, {left}"
            case State.MATCHING if current.matchmaking:
                return f"round {current.j}: {current.matchmaking.waiting_for()}, {left}"
            case State.COMPUTING:
                return f"choosing what to send, {left}"
            case State.REDUCING if current.reduction:
                done = current.reduction.fraction_done()
                return f"round {current.j}: {done:.0%} of the averages here, {left}"
            case _:
                return ""

    def _say_what_is_waited_for(self, now: float) -> None:
        current = self._current
        if current is None or now < current.next_word:
            return
        current.next_word = now + 1.0
        fraction = 0.0
        if course := current.course:
            within = current.reduction.fraction_done() if current.reduction and self.state is State.REDUCING else 0.0
            stages = course.stage.slot + 1 + course.stage.more
            fraction = min(1.0, (course.stage.slot + (course.done + within) / course.rounds) / stages)
        if text := self._waiting_for(now):
            self._effects.append(Progress(text, fraction))

    # ---- terms

    def _roster_changed(self, now: float) -> None:
        """The leases we know changed: compare terms, renew plans and lines."""
        stranger = self._members.stranger()
        self._strange_since = min(self._strange_since, now) if stranger else math.inf
        if self._members.majority_against_us() and self._current and self.state is State.GATHERING:
            is_asked = True
        else:  # one that is a stranger for a moment only has changed its options just before us, or after
            is_known = self._told_apart is not None and self._told_apart[:2] == stranger
            is_asked = not is_known and now >= self._strange_since + STRANGE_FOR_S
        if stranger and is_asked and now >= self._terms_asked_at + 1.0:
            self._terms_asked_at = now
            self._tell(stranger[0], self._members.address_of(stranger[0]), TermsWanted())
        for holder in (self._members.unknown_plan_holder(now), self._members.strange_plan_holder()):
            if holder is not None:
                self._tell(holder, self._members.address_of(holder), PlanWanted())
        self._make_plan_if_due(now)
        for matchmaking in self._matchmakings.values():
            self._refresh(matchmaking, now)

    def _terms_notice(self) -> TermsNotice:
        tensors = self.options.layout.tensors[:TENSORS_TOLD_MAX]
        return TermsNotice(self.terms, tensors)

    def _compare_terms(self, notice: TermsNotice, sender: PeerId) -> None:
        difference = self.terms.first_difference(notice.terms)
        if difference is None:
            return
        if notice.terms.layout != self.terms.layout:
            theirs = Layout(notice.tensors)
            difference = self.options.layout.first_difference(theirs) or difference
        self._told_apart = sender, notice.terms.digest, difference
        if self._current is None or self.state is not State.GATHERING or self._members.majority_against_us() is None:
            return
        self._fail(
            Precondition(
                f"this session differs from most of the swarm ({short(sender)} among them): {difference}. "
                "Use the same tensors and options, or another session name"
            )
        )

    # ---- plans

    def _make_plan_if_due(self, now: float) -> None:
        k = self._current.k if self._current else self._next_k
        if notice := self._members.make_plan_if_due(k, now):
            plan = notice.plan
            self._log(
                f"plan {plan.version}: {plan.grid} for {len(plan.roster)} sessions from averaging {plan.first_k} on"
            )
            for peer in self._members.others():
                self._tell(peer, self._members.address_of(peer), notice)
            self._plan_changed(plan, now)
        elif k > self._holes_told_at and (holes := self._members.holes(k, now)):
            self._holes_told_at = k
            decider, missing = holes
            self._tell(decider, self._members.address_of(decider), PlanWanted(missing))

    def _answer_plan_wanted(self, sender: PeerId, now: float) -> None:
        self._make_plan_if_due(now)
        if self._members.newest_plan():
            self._tell_plans(sender, self._members.address_of(sender), self._next_k)
        else:
            self._effects.append(LookUp(self.key))  # somebody sees enough peers for a plan: look again

    def _tell_plans(self, peer: PeerId, address: str, k: int) -> None:
        """The plan that counts and the one to come: who knows only the latter has none for now."""
        for notice in self._members.plans_from(k):
            self._tell(peer, address, notice)

    def _adopt(self, notice: PlanNotice, sender: PeerId, now: float) -> None:
        if self._members.adopt(notice, now):
            plan = notice.plan
            self._log(f"plan {plan.version} of {short(plan.signer)}: {plan.grid} from averaging {plan.first_k} on")
            self._plan_changed(plan, now)
        elif self._members.is_outranked(notice.plan):
            self._tell_plans(sender, self._members.address_of(sender), notice.plan.first_k)

    def _plan_changed(self, plan: Plan, now: float) -> None:
        """Our lease names the new plan. An averaging that has not contributed yet starts again under it."""
        current = self._current
        if (
            current
            and self.state is State.MATCHING
            and current.j == 0
            and self._members.plan_for(current.k) is not current.plan
        ):
            assert current.matchmaking is not None
            current.matchmaking.give_up("a newer plan came", now)
            self._become(State.GATHERING)
        self._announce_lease(now)
        deferred, self._deferred = self._deferred, {}
        for sender, join in deferred.items():
            with suppress(RemoteProtocolError):  # not the fault of who told us the plan
                self._receive_join(join, sender, now)

    # ---- stages

    def _begin_run(self, now: float) -> None:
        current = self._current
        assert current is not None
        if current.into is None:
            current.into = current.spares.pop() if current.spares else Vector.empty(self.options.layout)
        current.spares = [spare for spare in current.spares if spare is not current.into]  # of a first try of this call
        current.course = None
        seed = digest("averaging", self.key, current.k)
        current.run = self._compressor.begin(
            current.values, current.into, weight=current.weight, k=current.k, seed=seed
        )
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        """Do what the compressor wishes next."""
        current = self._current
        assert current is not None
        assert current.run is not None
        match wish := current.run.wish:
            case Jobs(jobs=()):
                current.run.jobs_done()
                self._go_on(now)
            case Jobs(jobs=jobs):
                self._become(State.COMPUTING)
                of_bytes = sum(job.cost_bytes for job in jobs)
                for job in jobs:
                    self._next_job += 1
                    current.jobs.add(self._next_job)
                    self._effects.append(Compute(OWN_JOBS, self._next_job, job.call, job.cost_bytes, of_bytes))
            case Stage() if current.is_over or (current.course and now >= current.rounds_until):
                self._drop_run(f"time ran out before {wish.name} could be sent", now)
            case Stage():
                self._begin_stage(wish, now)
            case Done():
                self._finish(now)
            case _:
                assert_never(wish)

    def _own_job_done(self, job_id: int, now: float) -> None:
        current = self._current
        if current is None or job_id not in current.jobs:
            return  # of a run that was dropped with its session
        current.jobs.remove(job_id)
        if not current.jobs:
            assert current.run is not None
            current.run.jobs_done()
            self._go_on(now)

    def _begin_stage(self, stage: Stage, now: float) -> None:
        current = self._current
        assert current is not None
        before = current.j
        if stage.slot == 0:
            if self._members.plan_for(current.k) is None:  # another one came meanwhile, for later
                self._become(State.GATHERING)
                self._begin_if_possible(now)
                return
            if current.k != self._next_k:
                self._next_k = current.k
                self._announce_lease(now)
            current.plan = self._members.plan_for(current.k)
            assert current.plan is not None
            current.cell = self._members.cell(current.plan, current.k)
        assert current.plan is not None
        planned = self._rounds_planned(current.plan)
        is_ours = stage.values.layout == self.options.layout
        spares = current.spares if is_ours else []
        if stage.spare is not None:
            spares.append(stage.spare)
        current.course = Course(
            stage=stage,
            rounds=min(planned, len(current.plan.sides)) if stage.sums else planned,
            values=stage.values,
            spares=spares,
            weight=current.weight,
            first=stage.slot * planned,
        )
        current.j = current.course.first
        if before < current.j:
            self._tell_ahead(before, now)
        self._begin_round(now)

    def _end_stage(self, now: float) -> None:
        """Its rounds are over, or there is no time for more of them."""
        current = self._current
        assert current is not None
        course, run, plan = current.course, current.run, current.plan
        assert course is not None
        assert run is not None
        assert plan is not None
        current.j = course.first + self._rounds_planned(plan)
        current.matchmaking = current.reduction = None
        if not course.changed:
            self._drop_run("", now)
            return
        whole = course.whole and course.done == course.rounds
        run.averaged(course.values, course.unsent, whole=whole, digest=course.digest)
        self._go_on(now)

    def _disagree(self, why: str, now: float) -> None:
        """The members of our line, or some of them, do not agree on this stage: all leave it."""
        current = self._current
        assert current is not None
        course, run, plan, matchmaking = current.course, current.run, current.plan, current.matchmaking
        assert course is not None
        assert run is not None
        assert plan is not None
        before, current.j = current.j, course.first + self._rounds_planned(plan)
        self._log(f"round {current.k}.{before} {course.stage.name} left: {why}")
        self._tell_ahead(before, now)
        if matchmaking is not None and matchmaking.state is not MatchmakingState.BOUND:
            matchmaking.leave(why, now)
            self._effects += self._effects_of(matchmaking)
        current.matchmaking = None
        run.disagreed(why)
        self._go_on(now)

    def _drop_run(self, why: str, now: float) -> None:
        current = self._current
        assert current is not None
        assert current.run is not None
        current.notes = [*current.run.notes, *([why] if why else [])]
        current.run = None
        if current.course is None:
            self._fail(Unavailable("the trainer is gone"))
        else:
            self._finish(now)

    def _tell_ahead(self, before: int, now: float) -> None:
        """Our lines in the rounds from `before` to where we are now: we shall not come."""
        current = self._current
        assert current is not None
        assert current.plan is not None
        rounds = self._rounds_planned(current.plan)
        axes = {current.plan.axis(current.k, j, rounds) for j in range(before, current.j)}
        lines = {peer for axis in axes for peer in self._line(axis)}
        for peer in sorted(lines - {self._here.peer}):
            self._tell(peer, self._members.address_of(peer), Ahead(current.k, current.j))

    def _receive_ahead(self, k: int, j: int, sender: PeerId) -> None:
        current = self._current
        if current is None or current.plan is None or current.k != k:
            return
        if any(sender in self._line(axis) for axis in range(len(current.plan.sides))):
            current.ahead[sender] = j

    def _line(self, axis: int) -> set[PeerId]:
        """Ours; newcomers whose claims we have not heard of are of it once they were in its group."""
        current = self._current
        assert current is not None
        assert current.plan is not None
        return current.met.get(axis, set()).union(self._members.line(current.plan, axis, current.cell))

    def _left_by(self) -> PeerId | None:
        """One of our line that has left the stage under way, if all must agree on it."""
        current = self._current
        assert current is not None
        assert current.plan is not None
        assert current.course is not None
        if not current.course.stage.agreement:
            return None
        line = self._line(current.axis)
        beyond = current.course.first + self._rounds_planned(current.plan)
        return next((peer for peer in sorted(current.ahead) if peer in line and current.ahead[peer] >= beyond), None)

    # ---- rounds

    def _rounds_planned(self, plan: Plan) -> int:
        """Of each stage."""
        return self.options.rounds or len(plan.sides)

    def _begin_round(self, now: float) -> None:
        current = self._current
        assert current is not None
        plan, cell, course = current.plan, current.cell, current.course
        assert plan is not None
        assert course is not None
        current.axis = plan.axis(current.k, current.j, self._rounds_planned(plan))
        current.round_started_at = now
        matchmaking = self._matchmaking(plan, current.k, current.j, current.axis, cell)
        if matchmaking.state is not MatchmakingState.KEEPING:  # a first try of this round ended: its place is taken
            del self._matchmakings[matchmaking.round.key]
            matchmaking = self._matchmaking(plan, current.k, current.j, current.axis, cell)
        current.matchmaking = matchmaking
        current.reduction = None
        self._become(State.MATCHING)
        rounds_left = course.rounds - course.done + course.stage.more * self._rounds_planned(plan)
        wait_s = (current.rounds_until - now) / max(1, rounds_left)
        self._refresh(matchmaking, now)
        may_follow = current.j == 0 and current.call.epoch is None
        member = self._member(current.axis, cell[current.axis], course.weight, course.stage.agreement, now)
        matchmaking.seek(member, wait_s, now, may_follow=may_follow)
        self._announce_presence(matchmaking.round.key, cell[current.axis])
        self._look_at_matchmaking(now)

    def _member(self, axis: int, coordinate: int, weight: float, agreement: bytes, now: float) -> Member:
        here, link, anchor = self._here, self._link, self._anchors.get(axis)
        member = Member(
            here.peer,
            here.incarnation,
            coordinate,
            weight,
            here.address,
            here.dialable,
            link.up_bytes_s,
            link.down_bytes_s,
            bulk_port=here.bulk_port,
            anchor=anchor.digest[:ANCHOR_TOLD_BYTES] if anchor else b"",
            agreement=agreement,
        )
        if self._shards is not None:
            assert self._current is not None
            assert self._current.call.half is not None
            member = replace(member, standing=self._shards.standing(self._current.call.half))
        if self._budget:
            member = replace(member, budget=self._budget.budget)
        return replace(member, paths=self._paths.report(now)) if self.options.transport.may_lose else member

    def _matchmaking(self, plan: Plan, k: int, j: int, axis: int, cell: Cell) -> Matchmaking:
        key = grid_key(self._here.swarm, self.terms.digest, plan, k=k, j=j, axis=axis, cell=cell)
        known = self._matchmakings.get(key)
        if known is not None:
            return known
        round_ = Round(
            key,
            k,
            j,
            axis,
            plan.version,
            plan.digest[:8],
            self._here.peer,
            self._here.incarnation,
            cell,
            self._compressor.layout(k, j // self._rounds_planned(plan)),
            self._config.chunk_bytes,
            self._wire_bytes,
            self._auto_bytes,
            self._auto_elements,
            self.options.transport,
            CALLS_A_STEP if self._shards else 1,
        )
        matchmaking = Matchmaking(round_, self._config.matchmaking, self._rng)
        self._matchmakings[key] = matchmaking
        return matchmaking

    def _refresh(self, matchmaking: Matchmaking, now: float, presences: list[Sighting[Record]] | None = None) -> None:
        """Tell it who could lead and who is waited for, by what we know now."""
        round_ = matchmaking.round
        plan = self._members.plan_with(round_.plan)
        if plan is None:
            return
        line = self._members.line(plan, round_.axis, round_.cell)
        candidates = self._members.candidates(line)
        for sighting in presences or []:
            record = sighting.record
            known = sighting.peer in line or sighting.peer == self._here.peer or self._members.is_suspect(sighting.peer)
            if isinstance(record, Presence) and record.dialable and not known:
                candidates.append(Candidate(sighting.peer, record.address))
        if self._here.dialable:
            candidates.append(Candidate(self._here.peer, self._here.address))
        current = self._current
        expected = self._members.expected(plan, line, round_.k)
        if current and current.k == round_.k and not self._is_past(round_.k, round_.j):
            met = current.met.get(round_.axis, set()) - {self._here.peer}
            expected = tuple(sorted(met.union(expected)))
        if self._may_come_to(round_):
            expected = (*expected, self._here.peer)
        # About to seek counts: a group must not be closed without us in the moment before.
        here = round_.j if self.state in (State.MATCHING, State.COMPUTING) else round_.j - 1
        coming = current is not None and current.k == round_.k and current.j <= here
        coming = coming or (now < self._promised_until and current is None and not self._is_past(round_.k, round_.j))
        # An owner who lives is waited for as long as callers can.
        grace_s = math.inf if self._shards else self._grace_s
        matchmaking.update(candidates, expected, grace_s, now, coming=coming, others=line)

    def _is_past(self, k: int, j: int) -> bool:
        """Whether our trainer will not come to this round any more."""
        current = self._current
        return (k, j) < ((current.k, current.j) if current else (self._next_k, 0))

    def _can_be_met(self) -> tuple[int, bool]:
        """The averaging in which one that is behind can meet us, and whether we wait there now."""
        current = self._current
        if current is None:
            return self._next_k, False
        if current.j == 0 and self.state is not State.REDUCING:
            return current.k, True
        return current.k + 1, False

    def _effects_of(self, matchmaking: Matchmaking) -> list[Effect]:
        """A matchmaking says that its round is over; where we can be met since then, only we know."""
        effects: list[Effect] = []
        for effect in matchmaking.take_effects():
            if isinstance(effect, Send) and isinstance(effect.message, Closed) and self._is_past(*_round_of(effect)):
                if self._current and self._current.k == effect.message.k:
                    effects.append(replace(effect, message=Ahead(self._current.k, self._current.j)))
                now_k, waiting = self._can_be_met()
                if now_k >= effect.message.now_k:
                    effect = replace(effect, message=replace(effect.message, now_k=now_k, waiting=waiting))
            effects.append(effect)
        return effects

    def _may_come_to(self, round_: Round) -> bool:
        """Whether those who wait here should wait for our own trainer."""
        if self._is_past(round_.k, round_.j):
            return False
        if self._current is not None:
            return True
        regular = self._last_k >= 0 or not self._members.has_history(round_.k)
        return regular and round_.k <= max(self._last_k, 0) + 2

    def _learn_grace(self, offsets_s: Sequence[float]) -> None:
        self._offsets.extend(offsets_s)
        if len(self._offsets) >= 4:
            factor, floor_s = self._config.grace_factor, self._config.grace_floor_s
            self._grace_s = grace_from(list(self._offsets), factor=factor, floor_s=floor_s)

    def _receive_join(self, join: Join, sender: PeerId, now: float) -> None:
        if self._members.lags_behind(join.applicant.peer, join.k) and now >= self._looked_again_at + 1.0:
            self._looked_again_at = now  # while our trainer computes for long, others go on unseen
            self._effects.append(LookUp(self.key))
        plan = self._members.plan_with(join.plan)
        in_force = self._members.plan_for(join.k)
        ours = in_force.version if in_force else 0
        if ours > join.plan_version or (ours == join.plan_version and plan is None):
            # Of two plans of one version it may be ours that loses: then we learn theirs below.
            self._tell_plans(sender, join.applicant.address if sender == join.applicant.peer else "", join.k)
        if ours > join.plan_version:
            return
        if plan is None:
            if join_is_sound(join) and (sender in self._deferred or len(self._deferred) < MATCHMAKINGS_MAX):
                self._deferred[sender] = join
            self._tell(sender, "", PlanWanted())
            return
        if not self._is_of_our_line(plan, join.key, join.k, join.j):
            return  # it takes us for a member of another line; its patience will tell it
        if join.key not in self._matchmakings and join.k <= self._last_k:
            answer = Closed(join.key, join.attempt, join.k, join.j, 0.0, *self._can_be_met())
            self._tell(join.applicant.peer, join.applicant.address, answer)
            return
        matchmaking = self._early_matchmaking(plan, join.key, join.k, join.j, now)
        if matchmaking is None:
            return
        matchmaking.receive(join, sender, now)
        current = self._current
        if current and self.state is State.MATCHING and current.j == 0 and current.call.epoch is None:
            assert current.matchmaking is not None
            if (waited_in := self._waited_in()) > current.k:
                current.matchmaking.go_on_to(waited_in, now)

    def _receive_coming(self, coming: Coming, sender: PeerId, now: float) -> None:
        plan = self._members.plan_for(coming.k)
        if (
            plan is not None
            and not self._is_past(coming.k, coming.j)
            and self._is_of_our_line(plan, coming.key, coming.k, coming.j)
            and self._members.keeps_promises(sender)
            and (matchmaking := self._early_matchmaking(plan, coming.key, coming.k, coming.j, now))
        ):
            matchmaking.receive(coming, sender, now)

    def _is_of_our_line(self, plan: Plan, key: Key, k: int, j: int) -> bool:
        """Whether this is the key under which we ourselves should be met in that round."""
        rounds, cell = self._rounds_planned(plan), self._members.cell(plan, k)
        axis = plan.axis(k, j, rounds)
        return j < rounds * self._compressor.slots and key == grid_key(
            self._here.swarm, self.terms.digest, plan, k=k, j=j, axis=axis, cell=cell
        )

    def _early_matchmaking(self, plan: Plan, key: Key, k: int, j: int, now: float) -> Matchmaking | None:
        """That of a round of our line, perhaps before our trainer is there; None while there is no room for it."""
        if key not in self._matchmakings:
            if len(self._matchmakings) >= MATCHMAKINGS_MAX and not self._make_room(k):
                return None
            axis, cell = plan.axis(k, j, self._rounds_planned(plan)), self._members.cell(plan, k)
            self._refresh(self._matchmaking(plan, k, j, axis, cell), now)
        return self._matchmakings[key]

    def _waited_in(self) -> int:
        """The latest averaging in whose first round two others wait for us; -1: none.

        Those that wait in a later averaging than ours have given us up in this one; a lease says less, it also names
        what somebody takes part in next.
        """
        waiting: dict[int, set[PeerId]] = {}
        for matchmaking in self._matchmakings.values():
            if matchmaking.round.j == 0 and matchmaking.state is MatchmakingState.KEEPING:
                waiting.setdefault(matchmaking.round.k, set()).update(matchmaking.applicants())
        return max((k for k, peers in waiting.items() if len(peers) > 1), default=-1)

    def _receive_begin(self, begin: Begin, sender: PeerId, now: float) -> None:
        group = begin.group
        matchmaking = self._matchmakings.get(group.key)
        if matchmaking and matchmaking.group is None and group.group_id in self._reductions:
            # A second try of one epoch: that group has had other values of ours, with another weight.
            self._tell(sender, "", Bound(group.key, group.group_id, "left that group"))
            matchmaking.give_up(f"averaging {group.k} closed before, and left us out", now)
        else:
            self._pass_on(group.key, begin, sender, now)

    def _make_room(self, k: int) -> bool:
        """For a round of averaging k, at the cost of one that is farther from where we are."""
        kept = [m for m in self._matchmakings.values() if m.state is MatchmakingState.KEEPING]
        farthest = max(kept, key=lambda m: abs(m.round.k - self._next_k), default=None)
        if farthest is None or abs(farthest.round.k - self._next_k) <= abs(k - self._next_k):
            return False
        del self._matchmakings[farthest.round.key]
        return True

    def _pass_on(
        self,
        key: Key,
        message: Hail | Leave | Kept | Redirect | TooShort | Closed | Begin | Begun | Bound,
        sender: PeerId,
        now: float,
    ) -> None:
        if matchmaking := self._matchmakings.get(key):
            matchmaking.receive(message, sender, now)
        elif isinstance(message, Begin):
            self._tell(sender, "", Bound(key, message.group.group_id, "does not take part in this round"))

    def _receive_hail(self, hail: Hail, sender: PeerId, now: float) -> None:
        matchmaking = self._matchmakings.get(hail.key)
        if self._is_past(hail.k, hail.j) and (matchmaking is None or matchmaking.group is None):
            if self._current and self._current.k == hail.k:
                self._tell(sender, self._members.address_of(sender), Ahead(hail.k, self._current.j))
            self._tell(
                sender,
                self._members.address_of(sender),
                Leave(hail.key, HAILED, *self._can_be_met()),
            )
        elif (self._current and self._current.k == hail.k and self._current.j < hail.j) or (
            self._current is None and now < self._promised_until and not self._is_past(hail.k, hail.j)
        ):
            self._tell(sender, self._members.address_of(sender), Coming(hail.key, hail.k, hail.j))
        elif matchmaking is not None:
            matchmaking.receive(hail, sender, now)

    def _look_at_matchmaking(self, now: float) -> None:
        current = self._current
        assert current is not None
        matchmaking = current.matchmaking
        assert matchmaking is not None
        self._effects += self._effects_of(matchmaking)  # what it did comes before what follows from it
        if matchmaking.state is MatchmakingState.BOUND:
            assert matchmaking.group is not None
            self._begin_reduction(matchmaking, now)
        elif leaver := self._left_by():
            self._disagree(f"{short(leaver)} sends all", now)
        elif matchmaking.state is MatchmakingState.ENDED:
            self._round_without_group(matchmaking, now)
        elif now >= current.rounds_until:
            matchmaking.give_up("time ran out in matchmaking", now)
            self._round_without_group(matchmaking, now)

    def _round_without_group(self, matchmaking: Matchmaking, now: float) -> None:
        current = self._current
        assert current is not None
        for peer in matchmaking.missed:
            self._members.missed(peer)
        late = matchmaking.now_k is not None and matchmaking.now_k > current.k
        grace_s = self._grace_s or self._config.grace_floor_s
        self._was_late = self._was_late or (late and current.j == 0 and matchmaking.late_by_s < grace_s)
        if late and current.j == 0:
            assert matchmaking.now_k is not None
            # k never goes back: one that lies must not send us where nobody is. Leases bring the rest of the way.
            now_k = min(matchmaking.now_k, max(current.k + 1, self._members.current_k() + BEHIND_MAX))
            self._next_k = max(self._next_k, now_k)
            self._members.heard_over(now_k - 1)
            # A newcomer cannot know what is open: the next one then. Others follow where they are waited for, and when
            # the next one is closer than this one: who is a step behind would otherwise stay so for ever.
            nearer = matchmaking.late_by_s > min(self._periods_s) / 2
            nearer = nearer or self._shards is not None  # a group has all owners: this one is not missed there
            follows = current.call.epoch is None and (self._last_k < 0 or matchmaking.they_wait or nearer)
            if follows and now < current.rounds_until:
                self._follow_to(self._next_k, now)
                return
        self._met_at_k = max(self._met_at_k, matchmaking.now_k or 0)
        current.rounds.append(self._receipt_alone(matchmaking, matchmaking.why, now))
        self._next_round(now, over=late and current.j == 0)

    def _follow_to(self, k: int, now: float) -> None:
        """Our call goes on in a later averaging."""
        current = self._current
        assert current is not None
        current.k = k
        self._become(State.GATHERING)
        current.next_look_up = now
        for kept in self._matchmakings.values():
            self._refresh(kept, now)  # those that wait for us in rounds we shall not come to
        self._begin_if_possible(now)

    def _begin_reduction(self, matchmaking: Matchmaking, now: float) -> None:
        current = self._current
        group = matchmaking.group
        assert current is not None
        assert group is not None
        rank = group.rank_of(self._here.peer)
        assert rank is not None
        self._was_late = False
        self._learn_grace(group.arrival_offsets_s)
        current.met.setdefault(group.axis, set()).update(member.peer for member in group.members)
        self._met_at_k = max(self._met_at_k, group.now_k)
        for absent in group.absent:
            self._members.missed(absent.peer)
        self._tell_latencies(group)
        if len(self._reductions) >= REDUCTIONS_MAX:
            self._reductions.pop(next(iter(self._reductions)))
        current.reduce_started_at = now
        self._become(State.REDUCING)
        course = current.course
        assert course is not None
        if len({member.agreement for member in group.members}) > 1:
            why = "the group's members did not choose the same rows"
            current.rounds.append(self._receipt_alone(matchmaking, why, now, group))
            self._disagree(why, now)
            return
        if self._shards is not None:
            if not self._muster(self._shards, matchmaking, group, now):
                return
            assert current.muster is not None
            group = current.muster.group
            rank = group.rank_of(self._here.peer)
            assert rank is not None
        stage = course.stage
        lossless = INTEGERS if stage.sums else codec_named("float32") if stage.lossless else None
        codec = lossless or self._codec_in(group, stage.values.layout)
        is_reliable = not group.transport or lossless is not None
        course.result = course.spares.pop() if course.spares else Vector.empty(stage.values.layout)
        is_lossy = stage.fed and codec.name != "float32"
        course.left_out = Vector.zeros(stage.values.layout) if is_lossy else None
        self._kept = Vector.empty(self.options.layout) if self._rules.is_anchored else None
        if is_reliable and current.muster is None:
            current.reduction = AllReduce(
                group,
                rank,
                values=course.values,
                result=course.result,
                codec=codec,
                config=self._config.all_reduce,
                now=now,
                deadline=current.rounds_until,
                operation=stage.operation(course.done),
                unsent=course.left_out,
                anchor=self._anchors[group.axis].values if group.anchor else None,
                kept=self._kept,
            )
        else:
            assert isinstance(codec, Codec)
            current.reduction = LossyReduce(
                group,
                rank,
                values=course.values,
                result=course.result,
                codec=codec,
                paths=self._paths,
                config=self._config.lossy,
                now=now,
                deadline=current.rounds_until,
                part=current.muster.half.part if current.muster else Part.BOTH,
                form=self.options.shards.form if self.options.shards else Form.DIFFERENCE,
                is_reliable=is_reliable,
            )
        self._reductions[group.group_id] = current.reduction
        self._replay_early(current.reduction, now)
        self._look_at_reduction(now)

    def _muster(self, shards: Shards, matchmaking: Matchmaking, group: Group, now: float) -> bool:
        """Whether the group's call goes on with us in it. All its members decide alike: from the group."""
        current = self._current
        assert current is not None
        assert current.call.half is not None
        self._last_k, self._next_k = current.k, current.k + 1  # another try under its key would get the same group
        try:
            current.muster = shards.muster(group, current.call.half)
        except SessionError as wrong:
            self._fail(wrong)
            self._announce_lease(now)
            self._announce_next_presence()
            return False
        if current.muster is None:
            self._log(f"averaging {current.k}: the owners call the other half, their next one is ours")
            self._follow_to(self._next_k, now)
            return False
        if len(current.muster.group.members) == 1:
            why = "nobody else in the group owns a shard" if len(group.members) > 1 else "nobody else came"
            current.rounds.append(self._receipt_alone(matchmaking, why, now, group))
            self._finish_alone(why, now)
            return False
        current.joined = current.muster.receives
        return True

    def _tell_latencies(self, group: Group) -> None:
        """As soon as the group is known: before our Ready, so that whoever commits has them."""
        if self._budget is not None:
            told = self._budget.group_formed(group.k, group.members, turns=self._turns())
            for member in group.members:
                if member.peer != self._here.peer:
                    for latencies in told:
                        self._tell(member.peer, member.address, latencies)

    def _turns(self) -> int:
        """Averagings in which every axis has its turn."""
        assert self._current is not None
        assert self._current.plan is not None
        plan = self._current.plan
        return math.ceil(len(plan.sides) / self._rounds_planned(plan))

    _kept: Vector | None = None
    """Where the round under way writes its averages for the next one's anchor. Not used twice: jobs of a round that
    failed may still write to theirs."""

    def _codec_in(self, group: Group, layout: Layout) -> VectorCodec:
        key = group.codec, layout
        if key not in self._codecs:
            self._codecs[key] = self._rules.with_auto(group.codec).over(layout)
        return self._codecs[key]

    def _codec_why(self, group: Group) -> str:
        """What a person should know of how values travelled in this group."""
        reasons = [group.codec_why] if group.codec_why else []
        if self._rules.is_anchored:
            lacking = sum(not member.anchor for member in group.members)
            if group.anchor:
                reasons.append("anchored: differences to the last average of this axis were coded")
            elif lacking:
                reasons.append(f"plain: {lacking} of {len(group.members)} members have no last average of this axis")
            else:
                reasons.append("plain: the members have different last averages of this axis")
        return "; ".join(reasons)

    def _receive_in_group(self, message: ReductionMessage | LossyMessage, sender: PeerId, now: float) -> None:
        reduction = self._reductions.get(message.group_id)
        if reduction is None:
            self._keep_early(message, sender)
            return
        rank = reduction.group.rank_of(sender)
        if rank is None:
            raise RemoteProtocolError(f"{short(sender)} is not in the group it speaks to")
        reduction.receive(message, rank, now)

    def _replay_early(self, reduction: Reduction, now: float) -> None:
        early, self._early = self._early, {}
        for number, member in enumerate(reduction.group.members):
            for message in early.get(member.peer, ()):
                if message.group_id == reduction.group.group_id:
                    try:
                        reduction.receive(message, Rank(number), now)
                    except RemoteProtocolError as wrong:  # not the fault of who told us of the group
                        reduction.suspect(Rank(number), str(wrong), now)

    def _keep_early(self, message: ReductionMessage | LossyMessage, sender: PeerId) -> None:
        if self.state is not State.MATCHING:
            return  # no group that we do not know yet can have us in it
        if isinstance(message, Heartbeat) or (isinstance(message, Holdings) and len(message.views) > EARLY_VIEWS_MAX):
            return
        if sender in self._early or len(self._early) < EARLY_MESSAGES_MAX // EARLY_OF_ONE_MAX:
            self._early.setdefault(sender, deque(maxlen=EARLY_OF_ONE_MAX)).append(message)

    def _look_at_reduction(self, now: float) -> None:
        current = self._current
        assert current is not None
        reduction, matchmaking = current.reduction, current.matchmaking
        assert reduction is not None
        assert matchmaking is not None
        self._effects += reduction.take_effects()  # what it did comes before what follows from it
        for peer, why in matchmaking.declined:
            rank = reduction.group.rank_of(peer)
            if rank is not None:
                reduction.suspect(rank, why, now)
        matchmaking.declined.clear()
        if not reduction.finished:
            return
        course = current.course
        assert course is not None
        assert course.result is not None
        if reduction.result is not None:
            group = reduction.group
            if self._shards is not None:
                assert current.muster is not None
                self._shards.went_through(current.muster)
            if isinstance(reduction, AllReduce):
                up, down = reduction.link_measures(now)
                self._link.learn(up=up, down=down)
            weights = [member.weight for member in group.members]
            coordinates = [member.coordinate for member in group.members]
            if course.left_out is not None:
                begun = current.weight
                course.unsent.append(Unsent(course.left_out, course.weight / begun if begun else 0.0))
            if course.changed:
                course.spares.append(course.values)
            course.values, course.changed, course.digest = course.result, True, reduction.digest
            if self._kept is not None:
                assert current.plan is not None
                axes = range(len(current.plan.sides))
                self._anchors = {axis: held for axis, held in self._anchors.items() if axis in axes}
                self._anchors[group.axis] = Anchor(reduction.digest, self._kept)
            receipt = self._receipt_of(reduction, carried_weight(weights, coordinates, reduction.rank), now)
            course.weight = receipt.weight_after
        else:
            if reduction.idle:
                course.spares.append(course.result)
            receipt = self._receipt_of(reduction, course.weight, now)
        current.rounds.append(receipt)
        course.result = course.left_out = self._kept = None
        self._next_round(now)

    def _next_round(self, now: float, *, over: bool = False) -> None:
        current = self._current
        assert current is not None
        course = current.course
        assert course is not None
        current.j += 1
        course.done += 1
        course.whole = course.whole and current.rounds[-1].outcome is Outcome.COMPLETE
        if over or current.is_over or course.done == course.rounds or now >= current.rounds_until:
            self._end_stage(now)
        else:
            self._begin_round(now)

    # ---- the end

    def _finish(self, now: float) -> None:
        """With the run's result; with what the trainer gave when there is none."""
        current = self._current
        assert current is not None
        assert current.plan is not None
        course = current.course
        assert course is not None
        # Of the stage that the result is of: what came before only chose what to send.
        last = [r for r in current.rounds if r.round >= course.first]
        reductions = [r for r in last if r.outcome is not Outcome.ALONE] if current.run else []
        met = sorted({m.peer for r in reductions for m in r.members} - {self._here.peer})
        if not reductions:
            outcome = Outcome.ALONE
        elif len(last) == course.rounds and course.whole:
            outcome = Outcome.COMPLETE
        else:
            outcome = Outcome.PARTIAL
        if outcome is Outcome.ALONE and any(_weighs_nothing(r) for r in last):
            # They did meet, and all fail alike: another try under the same key would be answered with the old group.
            self._last_k, self._next_k = current.k, current.k + 1
            self._fail(InvalidInput("all weights in this averaging are 0: give at least one peer a positive weight"))
            return
        if outcome is Outcome.ALONE and self._shards is not None:
            self._fail(NoGroup(f"{'; '.join(r.why for r in last)}. Nothing was changed: call again"))
            self._announce_lease(now)
            return
        notes = tuple(current.run.notes if current.run else current.notes)
        reasons = [f"round {r.round}: {r.why}" for r in current.rounds if r.why and outcome is not Outcome.COMPLETE]
        if len(last) < course.rounds and outcome is Outcome.PARTIAL:
            reasons.append(f"time for {len(last)} of {course.rounds} rounds")
        if not current.run:
            reasons += notes
        receipt = Receipt(
            outcome=outcome,
            epoch=current.k,
            joined=current.joined,
            weight_total=self._weight_total(reductions) if reductions else current.call.weight,
            peers=tuple(met),
            digest=reductions[-1].digest if reductions else b"",
            why="; ".join(reasons),
            seconds_matchmaking=math.fsum(r.seconds_matchmaking for r in current.rounds),
            seconds_reduce=math.fsum(r.seconds_reduce for r in current.rounds),
            seconds_total=now - current.started_at,
            bytes_sent=sum(r.bytes_sent for r in current.rounds),
            bytes_received=sum(r.bytes_received for r in current.rounds),
            grid=current.plan.grid,
            rounds=tuple(current.rounds),
            local=LocalLine(current.call.trainers, 0.0 if current.joined else current.call.weight),
            compressor=self.options.compressor,
            notes=notes,
        )
        self._conclude(receipt, now)

    def _weight_total(self, reductions: Sequence[RoundReceipt]) -> float:
        """The weight behind the result: the last group's, times the lines that earlier rounds brought into it.

        A member of the last group stands for its line of each earlier axis, with that line's weight divided by the
        coordinates there; so the sum over the swarm is the last group's weight times those sides.
        """
        last = reductions[-1]
        weights = {member.peer: member.weight for member in last.members}
        everywhere = set.intersection(*(set(span.contributors) for span in last.spans)) if last.spans else set()
        present = math.fsum(weight for peer, weight in weights.items() if peer in everywhere)
        earlier = {r.axis: r for r in reductions if r.axis != last.axis}
        return present * math.prod(len({m.coordinate for m in r.members}) for r in earlier.values())

    def _finish_alone(self, why: str, now: float) -> None:
        current = self._current
        assert current is not None
        receipt = Receipt(
            outcome=Outcome.ALONE,
            epoch=current.k,
            joined=False,
            weight_total=current.call.weight,
            peers=(),
            digest=b"",
            why=why,
            seconds_matchmaking=now - current.started_at,
            seconds_reduce=0.0,
            seconds_total=now - current.started_at,
            bytes_sent=0,
            bytes_received=0,
            grid="",
            rounds=(),
            local=LocalLine(current.call.trainers, current.call.weight),
            compressor=self.options.compressor,
        )
        self._conclude(receipt, now)

    def _conclude(self, receipt: Receipt, now: float) -> None:
        current = self._current
        assert current is not None
        for peer in receipt.peers:
            self._members.took_part(peer, current.k)
        newest = self._members.newest_plan()
        if receipt.outcome is not Outcome.ALONE:
            self._lonely_calls = 0
            self._last_k, self._next_k = current.k, current.k + 1
        elif any(len(r.members) > 1 for r in current.rounds):
            # A group was closed with us in it: another try under its key would be answered with that same group.
            self._next_k = current.k + 1
        elif newest and newest.plan.first_k > self._next_k and self._members.live_count() > 1:
            # Nobody of our lines is left, so k stands still here: meet the others where the next plan begins.
            self._next_k = newest.plan.first_k
        if self._shards is not None:
            assert current.call.half is not None
            if receipt.outcome is Outcome.ALONE:
                self._shards.went_alone(current.call.half, current.k)
            receipt = replace(receipt, shard=self._shards.line(current.shard_before))
        if self._budget is not None:
            if receipt.outcome is Outcome.ALONE:
                self._budget.interrupted()
            else:
                self._budget.averaged(current.k, turns=self._turns(), exchange_s=receipt.seconds_total, now=now)
            receipt = replace(receipt, budget=self._budget_line())
        self._result = current.run.wish.values if current.run and isinstance(current.run.wish, Done) else current.values
        self._current = None
        self._early.clear()
        self._become(State.IDLE)
        self._count(receipt.outcome.value)
        why = f": {receipt.why}" if receipt.why else ""
        self._log(f"averaging {receipt.epoch} {receipt.outcome.value} in {receipt.seconds_total:.3f} s{why}")
        self._effects.append(Finished(receipt))
        for matchmaking in self._matchmakings.values():
            self._refresh(matchmaking, now)  # those that wait for us in a round we are past
        if receipt.outcome is not Outcome.COMPLETE:
            self._look_again_at = now + LOOK_AGAIN_S
        self._announce_lease(now)
        self._make_plan_if_due(now)
        self._announce_next_presence()

    def _budget_line(self) -> BudgetLine | None:
        return self._budget.line(self._next_k) if self._budget else None

    def _fail(self, error: SessionError) -> None:
        if self._budget is not None:
            self._budget.interrupted()
        self._current = None
        self._early.clear()
        self._become(State.IDLE)
        self._count("failed")
        self._log(f"averaging failed: {error}")
        self._effects.append(Failed(error))

    def _count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def _receipt_of(self, reduction: Reduction, weight_after: float, now: float) -> RoundReceipt:
        current = self._current
        assert current is not None
        group = reduction.group
        committed = reduction.result is not None
        lossy = reduction.lossy_line() if isinstance(reduction, LossyReduce) and not reduction.is_reliable else None
        links = dict(reduction.transports)
        if isinstance(reduction, LossyReduce):
            links |= dict.fromkeys(reduction.by_packets, "udp")
        dropped = [DroppedLine(absent.peer, absent.why) for absent in group.absent]
        dropped += reduction.dropped_lines()
        without_owner = current.muster.why if current.muster else ""
        stage = current.course.stage.name if current.course else "dense"
        whole = reduction.is_complete and not group.absent and not without_owner
        outcome = Outcome.ALONE if not committed else Outcome.COMPLETE if whole else Outcome.PARTIAL
        reasons = [f"{short(line.peer)} {line.why}" for line in dropped] + ([without_owner] if without_owner else [])
        why = reduction.why or ", ".join(reasons)
        return RoundReceipt(
            averaging=current.k,
            round=current.j,
            axis=group.axis,
            outcome=outcome,
            group_id=reduction.group_id if committed else b"",
            digest=reduction.digest if committed else b"",
            leader=group.leader,
            rank=reduction.rank,
            codec=reduction.codec_name,
            transport=LOSSY if lossy else "+".join(sorted(set(links.values()))),
            members=tuple(MemberLine(m.peer, m.weight, m.coordinate) for m in group.members),
            links=tuple(LinkLine(group.members[other].peer, name) for other, name in sorted(links.items())),
            spans=reduction.span_lines() if committed else (),
            dropped=tuple(dropped),
            why=why,
            weight_after=weight_after,
            seconds_matchmaking=current.reduce_started_at - current.round_started_at,
            seconds_reduce=now - current.reduce_started_at,
            bytes_sent=reduction.bytes_sent,
            bytes_received=reduction.bytes_received,
            codec_why=self._codec_why(group),
            bits_per_element=reduction.bits_per_element,
            relative_error=reduction.relative_error,
            stage=current.muster.half.value if current.muster else stage,
            transport_why=self._transport_why(reduction, current.course),
            lossy=lossy,
        )

    def _transport_why(self, reduction: Reduction, course: Course | None) -> str:
        """What a person should know of why values were lost in this group, or were not."""
        group = reduction.group
        if isinstance(reduction, LossyReduce) and reduction.averages_reliable:
            return f"{group.transport_why}; the averages came over TCP, because the members' weights differ"
        if isinstance(reduction, AllReduce) and group.transport and course:
            return f"reliable: the {course.stage.name} must arrive whole"
        return group.transport_why

    def _receipt_alone(
        self, matchmaking: Matchmaking, why: str, now: float, group: Group | None = None
    ) -> RoundReceipt:
        """`group`: one that came together and averaged nothing."""
        current = self._current
        assert current is not None
        course = current.course
        assert course is not None
        me = self._here.peer
        mine = MemberLine(me, course.weight, matchmaking.round.cell[current.axis])
        members = [MemberLine(m.peer, m.weight, m.coordinate) for m in group.members] if group else [mine]
        return RoundReceipt(
            averaging=matchmaking.round.k,
            round=current.j,
            axis=current.axis,
            outcome=Outcome.ALONE,
            group_id=b"",
            digest=b"",
            leader=group.leader if group else me,
            rank=(group.rank_of(me) or 0) if group else 0,
            codec=self.options.codec,
            transport="",
            members=tuple(members),
            links=(),
            spans=(),
            dropped=(),
            why=why,
            weight_after=course.weight,
            seconds_matchmaking=now - current.round_started_at,
            seconds_reduce=0.0,
            bytes_sent=0,
            bytes_received=0,
            stage=course.stage.name,
        )

    # ---- what is announced

    def _announce_lease(self, now: float) -> None:
        if self.state is State.CLOSED:
            return
        newest = self._members.newest_plan()
        k = self._current.k if self._current else self._next_k
        # A joiner's cell is told under the plan that counts now: a newer one may be known before it begins.
        plan = self._plan_in_force() or (newest.plan if newest else None)
        claim, claim_k = self._members.claim_under(plan, k) if plan else ((), 0)
        lease = Lease(
            terms=b"" if self.terms.normalise == UNDECIDED else self.terms.digest,
            address=self._here.address,
            dialable=self._here.dialable,
            k=k,
            last_k=self._last_k,
            plan_version=newest.plan.version if newest else 0,
            plan=plan.digest[:8] if plan else b"",
            claim=claim,
            claim_k=claim_k,
            pin=self._config.pin,
            group_size_max=self._config.group_size_max,
            up_bytes_s=self._link.up_bytes_s,
            down_bytes_s=self._link.down_bytes_s,
            open_s=now - self._opened_at,
            bulk_port=self._here.bulk_port,
        )
        self._effects.append(Announce(self.key, lease, self._config.lease_ttl_s, "lease"))

    def _announce_presence(self, key: Key, coordinate: int) -> None:
        if key == self._presence_key:
            return
        self._presence_key = key
        presence = Presence(self._here.address, self._here.dialable, coordinate)
        self._effects.append(Announce(key, presence, self._config.presence_ttl_s, "presence"))

    def _announce_next_presence(self) -> None:
        """While the trainer computes: where we shall be in the next averaging."""
        k, plan = self._next_k, self._members.plan_for(self._next_k)
        if plan is None:
            return
        axis, cell = plan.axis(k, 0, self._rounds_planned(plan)), self._members.cell(plan, k)
        key = grid_key(self._here.swarm, self.terms.digest, plan, k=k, j=0, axis=axis, cell=cell)
        self._announce_presence(key, cell[axis])
        if self._was_late:
            self._was_late = False
            for peer in self._members.line(plan, axis, cell):
                self._tell(peer, self._members.address_of(peer), Coming(key, k, 0))

    # ---- small things

    def _peer_out(self, peer: PeerId, why: str, now: float) -> None:
        for matchmaking in list(self._matchmakings.values()):
            matchmaking.peer_lost(peer, why, now)
            self._refresh(matchmaking, now)
        for reduction in list(self._reductions.values()):
            rank = reduction.group.rank_of(peer)
            if rank is not None and not reduction.finished:
                reduction.suspect(rank, why, now)
        self._make_plan_if_due(now)

    def _tell(self, peer: PeerId, address: str, message: Message) -> None:
        self._effects.append(Send(peer, address, message))

    def _become(self, state: State) -> None:
        assert self.state is not State.CLOSED
        self.state = state

    def _log(self, text: str) -> None:
        self._effects.append(Log(text))


def _round_of(closed: Send) -> tuple[int, int]:
    assert isinstance(closed.message, Closed)
    return closed.message.k, closed.message.j


def _weighs_nothing(receipt: RoundReceipt) -> bool:
    return len(receipt.members) > 1 and all(member.weight == 0 for member in receipt.members)

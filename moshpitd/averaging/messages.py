"""What peers tell each other, and what they announce.

Frozen data only; the doors translate each to its wire. A message never names its sender: the channel proves it.
Durations are in seconds from the moment of sending; no message carries a moment of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NewType, TypeVar

from moshpitd.averaging.grid import Cell, Plan, Terms
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank
from moshpitd.averaging.vector import TensorSpec

Address = NewType("Address", str)
"""HOST:PORT where a daemon's gRPC listens; empty for one that nobody can dial."""


# ---- what is announced in the directory


@dataclass(frozen=True, slots=True)
class Lease:
    """A session says that it is there. Announced under the session key."""

    terms: bytes
    """Digest of the terms."""
    address: Address
    dialable: bool
    k: int
    """The averaging it is in or takes part in next."""
    last_k: int
    """The last averaging it took part in; -1: none yet (a newcomer)."""
    plan_version: int
    """Of the newest plan it knows; 0: none."""
    plan: bytes
    """First 8 bytes of the digest of the plan in force for k: a newer one may be known before it begins."""
    claim: Cell
    """A joiner's cell under the plan in force; empty for members of its roster."""
    claim_k: int
    """The averaging from which the claim holds: of two claims the older one wins."""
    pin: str
    """The grid its daemon was told to use, "2x4"; empty for auto."""
    group_size_max: int
    up_bytes_s: float
    """Measured rates of its link; 0: not known."""
    down_bytes_s: float
    open_s: float
    """How long the session has been open: of two that disagree the later one is told."""
    bulk_port: int = 0
    """TCP port of its plain path for chunks, at the address's host; 0 where it offers none."""


@dataclass(frozen=True, slots=True)
class Presence:
    """A session will be at a round. Announced under the round's grid key."""

    address: Address
    dialable: bool
    coordinate: int


Record = Lease | Presence
R_co = TypeVar("R_co", bound=Record, covariant=True)


@dataclass(frozen=True, slots=True)
class Sighting(Generic[R_co]):
    """One verified record of a roster, as a directory door hands it up. Moments are those of our own clock."""

    peer: PeerId
    incarnation: Incarnation
    sequence: int
    """Of two records of one peer the higher one counts."""
    seen_at: float
    expires_at: float
    record: R_co


# ---- compute budgets


@dataclass(frozen=True, slots=True, order=True)
class Budget:
    """What steps go by: after `tau_s` no micro-batch begins. Of two the larger one counts, field by field: the newer,
    then the one found from more. The default is none."""

    k: int = 0
    """It was found for the averagings from here on."""
    tables: int = 0
    """From the latencies of so many peers."""
    tau_s: float = 0.0
    speedup: float = 0.0
    """Expected: micro-batches in a second, against those without a budget."""
    drop_rate: float = 0.0
    """Expected: the share of the micro-batches that is dropped."""


@dataclass(frozen=True, slots=True)
class Table:
    """How long the micro-batches of one peer's trainers took, step by step, while nothing was dropped."""

    peer: PeerId
    steps: tuple[int, ...]
    """The averagings that those steps ended in, ascending; more than once for more than one trainer."""
    seconds: tuple[float, ...]
    """Step by step, M for each."""
    exchange_s: tuple[float, ...]
    """For each step how long its averaging took, from this trainer's call; 0: not known (yet)."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """What the sender knows of everybody's latencies. Told to the members of each group once a window has ended; over
    a grid it reaches everybody when every axis had its turn."""

    window: int
    """The last averaging of the window in which they were measured."""
    tables: tuple[Table, ...]


# ---- groups


@dataclass(frozen=True, slots=True)
class PathReport:
    """What a member knows of the paths of datagrams to it, from earlier lossy rounds."""

    packets: int = 0
    """On which the rest rests; 0: it knows nothing."""
    loss: float = 0.0
    """On the worst of them: the share that was lost."""
    round_trip_s: float = 0.0
    """Of the longest; 0: not known."""
    blocked: tuple[PeerId, ...] = ()
    """Between whom and it no datagram passed of late; some of them where they are many."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a member of a session with shards calls for, and what it owns. The default: the session has no shards."""

    half: str = ""
    """reduce_scatter or broadcast_shard."""
    through: int = 0
    """It took part in all that the owners did before averaging `through`; 0: it is new among them."""
    start: int = 0
    """Its shard: elements [start, stop) of the vector."""
    stop: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a line, as it applied."""

    peer: PeerId
    incarnation: Incarnation
    coordinate: int
    """On the round's axis."""
    weight: float
    address: Address
    dialable: bool
    up_bytes_s: float = 0.0
    down_bytes_s: float = 0.0
    bulk_port: int = 0
    """See Lease."""
    anchor: bytes = b""
    """First 8 bytes of the digest of the last average it has of this axis; empty: it has none, or the codec asks for
    none."""
    budget: Budget = Budget()
    """What its steps go by."""
    agreement: bytes = b""
    """What it brings to a stage that its members must agree on, as a hash; empty: nothing."""
    paths: PathReport = PathReport()
    """How datagrams reach it; of sessions whose rounds may be lossy."""
    standing: Standing = Standing()


@dataclass(frozen=True, slots=True)
class Absent:
    """Somebody who was expected and is not in the group."""

    peer: PeerId
    why: str


@dataclass(frozen=True)
class Group:
    """All that passes from matchmaking to the all-reduce: who, how, until when."""

    group_id: GroupId
    token: bytes
    """128 random bits, known to members only."""
    key: Key
    k: int
    j: int
    axis: int
    leader: PeerId
    members: tuple[Member, ...]
    """By rank: sorted by coordinate, then peer id."""
    spans: tuple[int, ...]
    """Element boundaries: rank r reduces [spans[r], spans[r+1])."""
    chunk_bytes: int
    budget_s: float
    """What the most hurried member's caller still has."""
    absent: tuple[Absent, ...]
    arrival_offsets_s: tuple[float, ...]
    """How long after the first arrival each of the members came: everybody learns the same grace from it."""
    now_k: int = 0
    """The furthest averaging in which others of the line, past this one, said that they can be met; 0: nobody did."""
    codec: str = ""
    """What `auto` is in this group; empty where the terms have none."""
    codec_why: str = ""
    """... in words."""
    transport: str = ""
    """lossy: values travel as datagrams that are not sent again; empty: all of them arrive."""
    transport_why: str = ""
    """... in words, where there was a choice."""

    @property
    def anchor(self) -> bytes:
        """Of the average that all members hold; empty where they do not hold the same one."""
        anchors = {member.anchor for member in self.members}
        return anchors.pop() if len(anchors) == 1 else b""

    def rank_of(self, peer: PeerId) -> Rank | None:
        for rank, member in enumerate(self.members):
            if member.peer == peer:
                return Rank(rank)
        return None


# ---- matchmaking


@dataclass(frozen=True, slots=True)
class Join:
    """Let me into the group of this key. Repeated while waiting; the same attempt is the same join."""

    key: Key
    plan_version: int
    plan: bytes
    """First 8 bytes of the plan's digest."""
    k: int
    j: int
    attempt: int
    applicant: Member
    cell: Cell
    wait_s: float
    """How long the applicant's caller will still wait for this round."""
    unreachable: tuple[PeerId, ...]
    """Candidates before the receiver that the applicant could not reach."""
    passed_on: bool
    """True when the receiver is asked by another than the applicant: dial it."""


@dataclass(frozen=True, slots=True)
class Leave:
    """I no longer wait with you; or, in answer to a Hail, I am past this round."""

    key: Key
    attempt: int
    now_k: int = 0
    """In answer to a Hail: the averaging in which I can be met."""
    waiting: bool = False
    """... and I wait there now."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Your join is here. From a leader: wait for Begin. From another: I am still trying a smaller candidate."""

    key: Key
    attempt: int
    leading: bool
    patience_s: float
    """How long the receiver should wait before it thinks of another way."""
    present: int
    expected: int


@dataclass(frozen=True, slots=True)
class Redirect:
    """Somebody I heard from in this round leads."""

    key: Key
    attempt: int
    leader: PeerId
    address: Address


@dataclass(frozen=True, slots=True)
class TooShort:
    """Your caller's time does not suffice for the data."""

    key: Key
    attempt: int
    wait_s: float
    needed_s: float


@dataclass(frozen=True, slots=True)
class Closed:
    """The round is over, says its leader."""

    key: Key
    attempt: int
    k: int
    j: int
    closed_s_ago: float
    now_k: int
    """The averaging in which the sender can be met."""
    waiting: bool = False
    """... and it waits there now."""


@dataclass(frozen=True, slots=True)
class Begin:
    """The group is closed; this is it."""

    group: Group


@dataclass(frozen=True, slots=True)
class Begun:
    """I am bound to your group."""

    key: Key
    group_id: GroupId


@dataclass(frozen=True, slots=True)
class Bound:
    """I will not be in your group."""

    key: Key
    group_id: GroupId
    why: str


@dataclass(frozen=True, slots=True)
class Hail:
    """I lead and miss you. If it cannot be delivered, your daemon is dead and nobody waits for you. Who is past the
    round answers Leave; who is in a closed group of it, Closed; who is in an earlier round of that averaging, Coming;
    whose trainer still computes, nothing."""

    key: Key
    k: int
    j: int


@dataclass(frozen=True, slots=True)
class Coming:
    """Wait for me. In answer to a Hail: I am in an earlier round of this averaging. Unasked: I came too late in the one
    before, by little, so that nobody expects me."""

    key: Key
    k: int
    j: int


@dataclass(frozen=True, slots=True)
class Ahead:
    """Do not wait for me in the rounds of averaging k before j: I shall not come to them. Told to the lines of rounds
    that are left out, and to who calls us there; who waits in a stage that all must agree on then leaves it too."""

    k: int
    j: int


# ---- the all-reduce of a group


@dataclass(frozen=True, slots=True)
class Ready:
    """In this view I hold every average; this is their digest."""

    group_id: GroupId
    view: int
    digest: bytes
    heard_bytes: int = 0
    """What had come from the receiver of this message when its last contribution was here: its uplink, as seen from the
    only place where it can be seen; 0: it owed none."""
    heard_s: float = 0.0
    """... and how long after the round began here."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """This member does not go on; to the lowest live rank, which opens a view without it."""

    group_id: GroupId
    view: int
    rank: Rank
    why: str


@dataclass(frozen=True, slots=True)
class View:
    """From here on only these count; the higher number wins. Told by its author, or passed on."""

    group_id: GroupId
    number: int
    """Modulo the size of the group it is the author's rank: no two authors use the same number."""
    author: Rank
    live: tuple[Rank, ...]
    why: str
    """Why the others are out, in words."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """In answer to a view: for each chunk the view in which the average I hold was made; -1: I hold none."""

    group_id: GroupId
    view: int
    views: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Once a second, to all: how many bytes of this round I have moved, in and out."""

    group_id: GroupId
    moved: int


# ---- lossy rounds


@dataclass(frozen=True, slots=True)
class RangesWanted:
    """To a contributor: nothing arrived of these ranges from anybody; send yours again, over the group's streams. Or,
    in a reduce-scatter, that nothing more is wanted: it may go."""

    group_id: GroupId
    ranges: tuple[int, ...]
    """Numbers of packet ranges, all of the sender's span; none: nothing arrived from you, send all."""
    enough: bool = False
    """The sender's span is made: nothing of it is wanted any more."""


# ---- plans and terms


@dataclass(frozen=True, slots=True)
class PlanWanted:
    """Which plan do you go by? To the next decider also: the plan I know has holes."""

    missing: tuple[PeerId, ...] = ()
    """Of the plan's roster, those I could not reach. The decider finds out for itself."""


@dataclass(frozen=True, slots=True)
class PlanNotice:
    """The newest plan I know, signed by its decider."""

    plan: Plan
    public_key: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class TermsWanted:
    """What are your terms and your layout?"""


@dataclass(frozen=True, slots=True)
class TermsNotice:
    """My terms, and my layout (cut after the first 4,096 tensors)."""

    terms: Terms
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Farewell:
    """This session closes, or the daemon leaves: do not expect it any more."""


# ---- cohorts


@dataclass(frozen=True, slots=True)
class Activation:
    """This version runs now: put in the last model you have. Each daemon passes it on once."""

    cohort: GroupId
    version: int


@dataclass(frozen=True, slots=True)
class Contributing:
    """To the members of a version's group: the model we put in was posted as version `posted`. Activates it too."""

    cohort: GroupId
    version: int
    posted: int


@dataclass(frozen=True, slots=True)
class Outcast:
    """This member is out of the cohort for good. Each daemon passes it on once."""

    cohort: GroupId
    peer: PeerId
    why: str


@dataclass(frozen=True, slots=True)
class Stranger:
    """In answer to a message of a cohort: we are not in it, or not any more."""

    cohort: GroupId


MatchmakingMessage = Hail | Coming | Join | Leave | Kept | Redirect | TooShort | Closed | Begin | Begun | Bound
ReductionMessage = Ready | Suspect | View | Holdings | Heartbeat
SessionMessage = Ahead | PlanWanted | PlanNotice | TermsWanted | TermsNotice | Farewell | Latencies
LossyMessage = RangesWanted
CohortMessage = Activation | Contributing | Outcast | Stranger
Message = MatchmakingMessage | ReductionMessage | LossyMessage | SessionMessage | CohortMessage


# ---- bulk data


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contribution to, or an average of, one chunk of the vector. Goes over the group's streams."""

    index: int
    view: int
    payload: bytes | memoryview
    is_average: bool
    decoded: bool = False
    """The payload is the average itself, not its code: re-served after a view change."""
    contributors: tuple[Rank, ...] = ()
    """Of an average: whose values are in it."""
    made_in: int = 0
    """Of an average: the view in which it was reduced."""

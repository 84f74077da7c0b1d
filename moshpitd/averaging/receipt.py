"""What every result carries: who contributed what, with which weight, and who was dropped and why.

Pure data. Positions count elements of the vector. CONTRACT fields first; more may come.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moshpitd.averaging.names import PeerId


class Outcome(Enum):
    """How well it went. None of these is an error."""

    COMPLETE = "complete"
    """Every live, expected session of the line gave every span, in every round, and Ready came from all. In a lossy
    round: everybody was heard; which parts of it were lost is told beside it."""
    PARTIAL = "partial"
    """Anything less with at least one other."""
    ALONE = "alone"
    """Nobody else."""


@dataclass(frozen=True, slots=True)
class MemberLine:
    """A member of the round's group and the weight it carried into the round."""

    peer: PeerId
    weight: float
    coordinate: int = 0


@dataclass(frozen=True, slots=True)
class LinkLine:
    """Over what values travelled between another member and us: grpc, tcp or udp."""

    peer: PeerId
    transport: str


@dataclass(frozen=True, slots=True)
class SpanLine:
    """Elements [start, stop) of the vector: who reduced them, whose values are in them."""

    reducer: PeerId
    start: int
    stop: int
    contributors: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class DroppedLine:
    """Who was left out of a round, and why, in words for a person."""

    peer: PeerId
    why: str


@dataclass(frozen=True, slots=True)
class LostLine:
    """What was lost on the way from one member to us."""

    peer: PeerId
    sent: int
    """Packets that it had for us."""
    lost: int
    blocked: bool
    """No datagram passed between the two: all travelled over the reliable streams."""


STALE_TOLD_MAX = 64
"""Stretches of a receipt; where there are more, the largest ones are told."""


@dataclass(frozen=True, slots=True)
class LossyLine:
    """What a lossy round lost, as this peer saw it. Ranges are what one packet holds."""

    estimator: str
    """How the mean is estimated where not all arrived: difference or horvitz-thompson."""
    links: tuple[LostLine, ...]
    ranges: int
    """Of the whole vector."""
    repaired: int
    """Ranges of our span that nobody's packet brought, and that were sent again over the reliable streams."""
    unrepaired: int
    """... and that were not: everybody kept its own values of them."""
    stale: tuple[tuple[int, int], ...]
    """Elements [start, stop) of which no average came: they kept our own values. At most STALE_TOLD_MAX."""
    stale_elements: int
    """All of them."""
    deadline_s: float
    """So long after the beginning our span would have been closed, whoever was missing: learnt from earlier rounds."""
    late: int
    """Packets that came after that."""
    duplicates: int


@dataclass(frozen=True, slots=True)
class RoundReceipt:
    """One round (k, j) as this peer saw it."""

    averaging: int
    round: int
    axis: int
    outcome: Outcome
    group_id: bytes
    """hash(group id, survivors): same id, same bits. Empty when alone."""
    digest: bytes
    """Over the decoded averages: equal exactly where the bits are, in whatever group. Empty when alone."""
    leader: PeerId
    rank: int
    codec: str
    """As it was in this round."""
    transport: str
    """Over what chunks travelled: grpc, tcp, or both joined by a plus; lossy: packets, not sent again."""
    members: tuple[MemberLine, ...]
    links: tuple[LinkLine, ...]
    spans: tuple[SpanLine, ...]
    dropped: tuple[DroppedLine, ...]
    why: str
    """Why the round was not complete, in words; empty when it was."""
    weight_after: float
    """The weight this member carries into the next round: W / (c * m)."""
    seconds_matchmaking: float
    seconds_reduce: float
    bytes_sent: int
    bytes_received: int
    codec_why: str = ""
    """Why that codec, where it was chosen for this round; whether differences to an earlier average were coded."""
    bits_per_element: float = 0.0
    """Of what this peer sent; 0: nothing."""
    relative_error: float = 0.0
    """Of its contribution as others decode it, by norm, measured on some of the chunks."""
    stage: str = "dense"
    """What was averaged: the values themselves, or what a compressor made of them (sketch, rows). With shards which
    half it was: reduce_scatter, broadcast_shard."""
    transport_why: str = ""
    """Why lossy or not, where there was a choice."""
    lossy: LossyLine | None = None
    """Of a lossy round: what was lost."""


@dataclass(frozen=True, slots=True)
class ContributorLine:
    """Whose model is in a version's sum, and as which version it was posted; -1: it did not say."""

    peer: PeerId
    posted: int


@dataclass(frozen=True, slots=True)
class VersionReceipt:
    """What became of one call of a wait-avoiding session."""

    version: int
    """Whose sum the result is made of."""
    kind: str
    """barrier: the mean over the whole cohort; fresh: sum / S, this call's model in it; merge: (sum + this call's
    model) / (S + 1); alone: this call's model as it was."""
    fresh: bool
    """This call's model is in the sum."""
    staleness: int
    """So many versions behind was the model that the daemon put in for this trainer; 0 when it put in none."""
    skipped: int
    """Versions since the last call that this trainer takes no part in any more."""
    contributors: tuple[ContributorLine, ...]
    cohort: bytes
    """Its id; empty when there is none."""


@dataclass(frozen=True, slots=True)
class ShardLine:
    """What one peer owns: elements [start, stop) of the vector."""

    start: int
    stop: int
    version: bytes
    """Of who owns what: the same at all owners, another as soon as anybody's shard is."""
    changed: bool = False
    """By this call: what the optimizer keeps of these elements is elsewhere."""


@dataclass(frozen=True, slots=True)
class LocalLine:
    """Who stands behind this peer's contribution."""

    trainers: int
    """Of this daemon, averaged before anything travelled."""
    weight: float
    """That of the trainer whose receipt it is; in the daemon's own records their sum. 0 for who only received."""


@dataclass(frozen=True, slots=True)
class BudgetLine:
    """A session's compute budget after an averaging, and what came of it."""

    micro_batches: int
    """M: of a whole step."""
    normalise: str
    """fixed or computed; empty while the trainer has not said."""
    completed: int
    """Of this averaging's step."""
    tau_s: float
    """For the next step: after it no micro-batch begins. 0: none."""
    state: str
    """Why tau is what it is, in words."""
    k: int
    """The averaging from which the swarm's tau holds; 0 while there is none."""
    tables: int
    """The peers from whose latencies it was found."""
    expected_speedup: float
    """By the rule; 0 while there is no tau of the swarm."""
    expected_drop_rate: float
    speedup: float
    """Seen here: micro-batches in a second with a tau against without; 0 while either is missing."""
    drop_rate: float
    """Seen here: the share of our own micro-batches dropped since there is a tau."""
    note: str
    """In whom the group's members differed, in words; empty when they did not."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """One averaging of one trainer."""

    outcome: Outcome
    epoch: int
    """k: the number of this averaging."""
    joined: bool
    """True when this call was a newcomer's first: it gave weight 0 and received."""
    weight_total: float
    """The weight behind the result: of the last round's contributors, times the cells they stand for."""
    peers: tuple[PeerId, ...]
    """Everybody met in any round, without oneself."""
    digest: bytes
    """Of the result; equal at all peers of a fault-free averaging under float32. Empty when alone."""
    why: str
    seconds_matchmaking: float
    seconds_reduce: float
    seconds_total: float
    bytes_sent: int
    bytes_received: int
    grid: str
    """The plan's sides, "2x4"."""
    rounds: tuple[RoundReceipt, ...]
    local: LocalLine
    version: VersionReceipt | None = None
    """Of a wait-avoiding session only."""
    budget: BudgetLine | None = None
    """Of a session with a compute budget."""
    compressor: str = "dense"
    notes: tuple[str, ...] = ()
    """What the compressor has to say: why all was sent where rows should have been."""
    shard: ShardLine | None = None
    """Of a session with shards, and only of an owner."""

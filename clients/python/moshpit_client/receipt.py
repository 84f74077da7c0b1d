"""The account of an averaging: who took part, with which weight, who was left out and why.

Knows the receipt's message and its JSON; field names are those of the JSON. Ids and digests are hexadecimal. Positions
count elements of the packed vector.
"""

from __future__ import annotations

from dataclasses import dataclass

from moshpit_client.compute_budget import BudgetState, read_budget
from moshpit_client.records import Record
from moshpit_client.v1 import daemon_pb2 as pb


@dataclass(frozen=True, slots=True)
class Seconds(Record):
    """Where the time went."""

    matchmaking: float
    reduce: float
    total: float
    """From the call to the result."""


@dataclass(frozen=True, slots=True)
class Traffic(Record):
    """Bytes that travelled between this peer and others."""

    sent: int
    received: int


@dataclass(frozen=True, slots=True)
class Member(Record):
    """A member of a round's group."""

    peer: str
    weight: float
    """What it carried into the round."""
    coordinate: int
    """On the round's axis."""


@dataclass(frozen=True, slots=True)
class Link(Record):
    """Over what chunks travelled between another member and this peer."""

    peer: str
    transport: str
    """grpc, tcp or udp"""


@dataclass(frozen=True, slots=True)
class Span(Record):
    """Elements [start, stop) of the vector: who reduced them, whose values are in them."""

    reducer: str
    start: int
    stop: int
    contributors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dropped(Record):
    """Who was left out of a round, and why."""

    peer: str
    why: str


@dataclass(frozen=True, slots=True)
class LostOnLink(Record):
    """What was lost on the way from another member to this peer."""

    peer: str
    sent: int
    """Packets that it had for this peer."""
    lost: int
    blocked: bool
    """No datagram passed between the two: all travelled over the reliable streams."""


@dataclass(frozen=True, slots=True)
class Lossy(Record):
    """What a lossy round lost, as this peer saw it. Ranges are what one packet holds."""

    estimator: str
    """difference or horvitz-thompson"""
    links: tuple[LostOnLink, ...]
    ranges: int
    """Of the whole vector."""
    repaired: int
    """Ranges of this peer's span that nobody's packet brought, and that were sent again over the reliable streams."""
    unrepaired: int
    """... and that were not: everybody kept its own values of them."""
    stale: tuple[tuple[int, int], ...]
    """Elements [start, stop) of which no average came: they kept this peer's own values. The largest 64."""
    stale_elements: int
    """Of all such stretches."""
    deadline_s: float
    """So long after the beginning this peer's span would have been closed, whoever was missing."""
    late: int
    """Packets that came after that."""
    duplicates: int


@dataclass(frozen=True, slots=True)
class Round(Record):
    """One round of an averaging."""

    round: int
    axis: int
    outcome: str
    """complete, partial or alone"""
    group_id: str
    """Same id, same bits."""
    digest: str
    leader: str
    rank: int
    codec: str
    """As it was in this round."""
    stage: str
    """What was averaged: dense, the values themselves, or what a compressor made of them: sketch, rows"""
    transport: str
    """grpc, tcp, or both joined by a plus; lossy: packets that are not sent again"""
    members: tuple[Member, ...]
    links: tuple[Link, ...]
    spans: tuple[Span, ...]
    dropped: tuple[Dropped, ...]
    why: str
    """Why it was not complete; empty when it was."""
    weight_after: float
    """What was carried into the next round."""
    seconds: Seconds
    bytes: Traffic
    codec_why: str
    """Why that codec, where it was chosen for this round; whether differences to an earlier average were coded."""
    bits_per_element: float
    """Of what this peer sent; 0 when it sent nothing."""
    relative_error: float
    """Of this peer's contribution as others decode it, by norm; measured on some of the chunks."""
    transport_why: str = ""
    """Why lossy or not, where there was a choice."""
    lossy: Lossy | None = None
    """Of a lossy round."""


@dataclass(frozen=True, slots=True)
class Local(Record):
    """Who stands behind this peer's contribution."""

    trainers: int
    """Of this daemon, averaged before anything travelled."""
    weight: float
    """One's own among them; 0 for who only received. In `Daemon.rounds`, one receipt an averaging, their sum."""


@dataclass(frozen=True, slots=True)
class Contributor(Record):
    """Whose model is in a version's sum."""

    peer: str
    posted: int | None
    """As which version it was posted; None: it did not say."""


@dataclass(frozen=True, slots=True)
class Version(Record):
    """What became of a call of a wait-avoiding session."""

    version: int
    """Whose sum the result is made of."""
    kind: str
    """barrier: the mean over the cohort, for which all waited; fresh: sum / S; merge: (sum + this call's model) /
    (S + 1); alone: this call's model as it was"""
    fresh: bool
    """This call's model is in the sum."""
    staleness: int
    """So many versions old was the model that the daemon put in for this trainer; 0 when it put in none."""
    skipped: int
    """Versions since the last call that this trainer takes no part in any more."""
    contributors: tuple[Contributor, ...]
    cohort: str
    """Its id; empty when there is none."""


@dataclass(frozen=True, slots=True)
class Shard(Record):
    """What this peer owns: elements [start, stop) of the vector. `Session.shard` says it tensor by tensor."""

    start: int
    stop: int
    version: str
    """Of who owns what: the same at all owners, another as soon as anybody's shard is."""
    changed: bool
    """By this call: what the optimizer keeps of these elements may be with another peer."""


@dataclass(frozen=True, slots=True)
class Receipt(Record):
    """One averaging."""

    outcome: str
    """complete, partial or alone. When alone the tensors are as they were, or, with other trainers of the same daemon
    (`local`), their mean."""
    epoch: int
    """The number of this averaging in the swarm."""
    joined: bool
    """A newcomer's first averaging: it gave no weight and received the swarm's mean."""
    weight_total: float
    """The weight behind the result."""
    peers: tuple[str, ...]
    """Everybody met in any round, without oneself."""
    digest: str
    """Of the result; empty when alone."""
    seconds: Seconds
    bytes: Traffic
    rounds: tuple[Round, ...]
    why: str
    """Why it was not complete; empty when it was."""
    grid: str
    """2x4, say."""
    session: str
    """The session's name."""
    compressor: str
    notes: tuple[str, ...]
    """What the compressor has to say: why all was sent where rows should have been."""
    local: Local
    budget: BudgetState | None = None
    """Of a session with a compute budget."""
    version: Version | None = None
    """Of a wait-avoiding session."""
    shard: Shard | None = None
    """Of a session with shards, unless this peer owns nothing yet."""

    @property
    def fresh(self) -> bool:
        """Whether the values of this call are in what others get too: always, but for late ones when wait-avoiding."""
        return self.version is None or self.version.fresh

    @property
    def staleness(self) -> int:
        """Versions by which the model was old that the daemon put in for this trainer; 0 unless wait-avoiding."""
        return self.version.staleness if self.version else 0


_KINDS = {
    pb.VERSION_KIND_BARRIER: "barrier",
    pb.VERSION_KIND_FRESH: "fresh",
    pb.VERSION_KIND_MERGE: "merge",
    pb.VERSION_KIND_ALONE: "alone",
}
_OUTCOMES = {pb.OUTCOME_COMPLETE: "complete", pb.OUTCOME_PARTIAL: "partial", pb.OUTCOME_ALONE: "alone"}


def read_receipt(message: pb.Receipt) -> Receipt:
    return Receipt(
        outcome=_OUTCOMES[message.outcome],
        epoch=message.epoch,
        joined=message.joined,
        weight_total=message.weight_total,
        peers=tuple(message.peers),
        digest=message.digest.hex(),
        seconds=_seconds(message.seconds),
        bytes=_traffic(message.bytes),
        rounds=tuple(map(_round, message.rounds)),
        why=message.why,
        grid=message.grid,
        session=message.session,
        compressor=message.compressor,
        notes=tuple(message.notes),
        local=Local(message.local.trainers, message.local.weight),
        budget=read_budget(message.budget) if message.HasField("budget") else None,
        version=_version(message.version) if message.HasField("version") else None,
        shard=_shard(message.shard) if message.HasField("shard") else None,
    )


def _shard(message: pb.Shard) -> Shard:
    return Shard(message.start, message.stop, message.version.hex(), message.changed)


def _version(message: pb.Version) -> Version:
    return Version(
        version=message.version,
        kind=_KINDS[message.kind],
        fresh=message.fresh,
        staleness=message.staleness,
        skipped=message.skipped,
        contributors=tuple(
            Contributor(each.peer, each.posted if each.HasField("posted") else None) for each in message.contributors
        ),
        cohort=message.cohort.hex(),
    )


def _round(message: pb.Round) -> Round:
    return Round(
        round=message.round,
        axis=message.axis,
        outcome=_OUTCOMES[message.outcome],
        group_id=message.group_id.hex(),
        digest=message.digest.hex(),
        leader=message.leader,
        rank=message.rank,
        codec=message.codec,
        stage=message.stage,
        transport=message.transport,
        members=tuple(Member(member.peer, member.weight, member.coordinate) for member in message.members),
        links=tuple(Link(link.peer, link.transport) for link in message.links),
        spans=tuple(Span(span.reducer, span.start, span.stop, tuple(span.contributors)) for span in message.spans),
        dropped=tuple(Dropped(dropped.peer, dropped.why) for dropped in message.dropped),
        why=message.why,
        weight_after=message.weight_after,
        seconds=_seconds(message.seconds),
        bytes=_traffic(message.bytes),
        codec_why=message.codec_why,
        bits_per_element=message.bits_per_element,
        relative_error=message.relative_error,
        transport_why=message.transport_why,
        lossy=_lossy(message.lossy) if message.HasField("lossy") else None,
    )


def _lossy(message: pb.Lossy) -> Lossy:
    return Lossy(
        estimator=message.estimator,
        links=tuple(LostOnLink(link.peer, link.sent, link.lost, link.blocked) for link in message.links),
        ranges=message.ranges,
        repaired=message.repaired,
        unrepaired=message.unrepaired,
        stale=tuple((stretch.start, stretch.stop) for stretch in message.stale),
        stale_elements=message.stale_elements,
        deadline_s=message.deadline_s,
        late=message.late,
        duplicates=message.duplicates,
    )


def _seconds(message: pb.Seconds) -> Seconds:
    return Seconds(message.matchmaking, message.reduce, message.total)


def _traffic(message: pb.Traffic) -> Traffic:
    return Traffic(message.sent, message.received)

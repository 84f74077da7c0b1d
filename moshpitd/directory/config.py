"""The directory's limits and intervals, each with what it trades."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DirectoryConfig:
    """Defaults fit loopback, a LAN and the open internet alike."""

    retransmit_s: float = 0.35
    """Silence after which a request is sent again, with the same id. Shorter heals loss sooner and wastes datagrams on
    links with a longer round trip; above the round trip of almost every link on earth."""
    tries: int = 4
    """Times a request is sent before its peer counts as silent, after tries x retransmit_s = 1.4 s. At 3 % loss a live
    peer seems silent once in 80,000 requests (0.06^4)."""
    strikes: int = 3
    """Silent requests, one after another, before a peer leaves the routing table. More keeps the dead longer in the
    way, fewer forgets the living after a short outage."""
    bucket: int = 20
    """Kademlia's k: contacts a bucket of the routing table holds, and nodes asked when looking around. In a swarm up to
    this size everybody knows everybody. More finds peers in fewer hops, and greets more."""
    replicas: int = 8
    """Nodes that hold a key. A read returns once a majority of them answered, so that it meets every write that reached
    a majority; more survive churn better and cost a datagram and a signature check each."""
    linger_s: float = 0.02
    """Once a majority answered, the rest has as long again as the majority took, at least this, before an answer is
    given without them. They are still told in the background. Longer reads more completely, and waits for every lost
    datagram."""
    datagram_bytes_max: int = 1_200
    """Every datagram fits every path's MTU unfragmented: a fragment lost is the datagram lost."""
    body_bytes_max: int = 512
    """So that a record (119 bytes more, and its kind) and a list of replicas fit one datagram."""
    kind_bytes_max: int = 32
    ttl_s_max: float = 3_600.0
    """The longest a record may live after its owner's death."""
    remember_s: float = 600.0
    """How long a holder knows the sequence of an expired record, so that a replay of it is refused. Costs 100 bytes
    each."""
    records_per_key_max: int = 8_192
    records_per_peer_max: int = 1_024
    """Of one peer, over all keys and kinds, on one node: a single identity cannot fill a node."""
    records_max: int = 65_536
    """On one node, over all: 60 MiB at the very worst."""
    views_max: int = 256
    """Keys whose rosters we remember, so that a second look costs only what changed."""
    republish_part: float = 3.0
    """Live records are announced anew each ttl / this: two lost republications in a row do not lose the record."""
    republish_retry_s: float = 1.0
    """Until the next try when fewer than a majority took the record."""
    mend_interval_s: float = 60.0
    """Each time all --join addresses and one remembered peer are contacted again: how long a split swarm stays
    split."""
    crawl_pause_s: float = 1.0
    """Between two looks around after new contacts: a growing swarm is met in batches."""
    join_retry_s: float = 1.0
    """Between tries while nobody answers, growing to join_retry_s_max."""
    join_retry_s_max: float = 5.0
    remembered_file: Path | None = None
    """Where addresses of peers outlive the daemon; None remembers nobody."""
    remembered_max: int = 64
    contacts_per_crawl_max: int = 64
    """Nodes asked in one crawl: bounds what lying node lists can make us send."""
    meetings_max: int = 64
    """Strangers greeted at once: a flood of invented senders makes us send no more than that."""
    meet_again_s: float = 5.0
    """A silent stranger is not greeted again before."""
    calls_max: int = 1_024
    """Requests in flight; beyond it a peer counts as silent at once."""

    def __post_init__(self) -> None:
        """Our own mistakes only: the command line checks what people write."""
        assert self.tries > 0 and self.strikes > 0 and self.replicas > 0 and self.retransmit_s > 0
        assert self.datagram_bytes_max >= self.body_bytes_max + self.kind_bytes_max + 39 * self.replicas + 245
        assert self.datagram_bytes_max >= 39 * self.bucket + 100

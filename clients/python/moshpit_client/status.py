"""What the daemon says of itself, its sessions, its peers and its configuration. Knows those messages, no calls."""

from __future__ import annotations

from dataclasses import dataclass

from moshpit_client.compute_budget import BudgetState, read_budget
from moshpit_client.records import Record
from moshpit_client.v1 import daemon_pb2 as pb


@dataclass(frozen=True, slots=True)
class TrainerStatus(Record):
    """One of the trainers that share a session of the daemon."""

    session_id: str
    state: str
    """computing, waiting (for the daemon's other trainers) or averaging"""
    transport: str
    """How values travel between trainer and daemon: shared-memory or stream."""
    transport_why: str
    """Why they are streamed; empty otherwise."""


@dataclass(frozen=True, slots=True)
class Cohort(Record):
    """Of a wait-avoiding session: who takes part between two barriers."""

    cohort: str
    """Its id; empty while there is none."""
    members: int
    """Who committed the barrier that made it."""
    live: int
    """... and is not out since."""
    version: int
    """The newest that ended here."""
    barrier: int
    """The version of the next barrier; 0 while there is no cohort."""
    staleness_max: int
    """Of any model in any sum so far, in versions."""
    counts: dict[str, int]
    """barrier, fresh, merge, alone: calls that ended so; passive: versions run without the trainer; skipped: versions
    it takes no part in any more; activations: versions it began"""


@dataclass(frozen=True, slots=True)
class SessionStatus(Record):
    """A session of the daemon, shared by its trainers."""

    name: str
    state: str
    """idle, gathering, matching, reducing or closing"""
    waiting_for: str
    epoch: int
    """The number of the averaging it is in or takes part in next."""
    grid: str
    cell: tuple[int, ...]
    live_sessions: int
    """Of the same terms in the swarm, this one included."""
    vector_bytes: int
    averagings: dict[str, int]
    """Ended ones by outcome."""
    codec: str
    transport: str
    """reliable, lossy or auto: whether values must arrive; and how often it averages reliably where that was said"""
    trainers: tuple[TrainerStatus, ...]
    differs: str
    """Who has a session of this name with other tensors or options, and the first difference; empty: nobody."""
    is_outvoted: bool
    """Most sessions of this name have other tensors or options than this one."""
    budget: BudgetState | None = None
    """Of a session with a compute budget."""
    cohort: Cohort | None = None
    """Of a wait-avoiding session."""


@dataclass(frozen=True, slots=True)
class Bandwidth(Record):
    """A daemon's line to the others, as its rounds showed it."""

    up_bytes_s: float
    """0 while no round showed it."""
    down_bytes_s: float
    """0 also while it was never the obstacle."""


@dataclass(frozen=True, slots=True)
class Datagrams(Record):
    """Packets of lossy rounds, since the daemon was started."""

    sent: int
    received: int
    refused: int
    """Dropped before any work: damaged, forged, repeated, or of no round that was open."""
    peers_blocked: int
    """Between whom and the daemon none passed, lately."""


@dataclass(frozen=True, slots=True)
class Status(Record):
    """How the daemon is doing."""

    ready: bool
    """Part of its swarm, taking rounds."""
    peer_id: str
    swarm: str
    listen: str
    announce: str
    bulk_port: int
    """Of the plain TCP path for chunks; 0 where it is not offered."""
    peers: int
    """Other daemons known to be alive."""
    sessions: tuple[SessionStatus, ...]
    waiting_for: str
    """What it waits for while not ready."""
    version: str
    pid: int
    uptime_seconds: float
    draining: bool
    dialable: bool | None
    """Whether other peers can dial it; None while unknown."""
    bandwidth: Bandwidth
    datagrams: Datagrams


@dataclass(frozen=True, slots=True)
class Peer(Record):
    """Another daemon."""

    peer_id: str
    address: str
    """Empty when it cannot be dialled."""
    state: str
    """live or suspect"""
    sessions: tuple[str, ...]
    seconds_since_heard: float | None


@dataclass(frozen=True, slots=True)
class ConfigValue(Record):
    """A setting in force."""

    name: str
    value: str
    source: str
    """flag, environment, file or default"""


def read_status(message: pb.GetStatusResponse) -> Status:
    return Status(
        ready=message.ready,
        peer_id=message.peer_id,
        swarm=message.swarm,
        listen=message.listen,
        announce=message.announce,
        bulk_port=message.bulk_port,
        peers=message.peers,
        sessions=tuple(map(_session, message.sessions)),
        waiting_for=message.waiting_for,
        version=message.version,
        pid=message.pid,
        uptime_seconds=message.uptime_seconds,
        draining=message.draining,
        dialable=message.dialable if message.HasField("dialable") else None,
        bandwidth=Bandwidth(message.bandwidth.up_bytes_s, message.bandwidth.down_bytes_s),
        datagrams=Datagrams(
            message.datagrams.sent,
            message.datagrams.received,
            message.datagrams.refused,
            message.datagrams.peers_blocked,
        ),
    )


def _session(message: pb.SessionStatus) -> SessionStatus:
    return SessionStatus(
        name=message.name,
        state=message.state,
        waiting_for=message.waiting_for,
        epoch=message.epoch,
        grid=message.grid,
        cell=tuple(message.cell),
        live_sessions=message.live_sessions,
        vector_bytes=message.vector_bytes,
        averagings=dict(message.averagings),
        codec=message.codec,
        transport=message.transport,
        trainers=tuple(map(_trainer, message.trainers)),
        differs=message.differs,
        is_outvoted=message.is_outvoted,
        budget=read_budget(message.budget) if message.HasField("budget") else None,
        cohort=_cohort(message.cohort) if message.HasField("cohort") else None,
    )


def _cohort(message: pb.Cohort) -> Cohort:
    return Cohort(
        cohort=message.cohort.hex(),
        members=message.members,
        live=message.live,
        version=message.version,
        barrier=message.barrier,
        staleness_max=message.staleness_max,
        counts=dict(message.counts),
    )


def _trainer(message: pb.TrainerStatus) -> TrainerStatus:
    return TrainerStatus(message.session_id, message.state, message.transport, message.transport_why)


def read_peer(message: pb.Peer) -> Peer:
    heard = message.seconds_since_heard if message.HasField("seconds_since_heard") else None
    return Peer(message.peer_id, message.address, message.state, tuple(message.sessions), heard)


def read_config_value(message: pb.ConfigValue) -> ConfigValue:
    return ConfigValue(message.name, message.value, message.source)

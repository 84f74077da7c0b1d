"""Between the daemon's vocabulary and the local API's messages: the one place that knows both.

Knows every field of either. Does not know calls, statuses or streams. What comes in is checked by the rules of
what it becomes, before a byte of a vector is read; what it means for the swarm is checked by the driver.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from moshpitd.averaging.codecs import rules_of
from moshpitd.averaging.cohort import CohortStatus, WaitAvoidance
from moshpitd.averaging.compressors.stages import FEEDBACK_NAME_BYTES_MAX
from moshpitd.averaging.compute_budget import LEARN_DEFAULT, WARM_UP_DEFAULT, BudgetOptions
from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.receipt import BudgetLine, LossyLine, Outcome, Receipt, RoundReceipt, ShardLine, VersionReceipt
from moshpitd.averaging.session import (
    LONELY_WAIT_DEFAULT_S,
    NAME_DEFAULT,
    TIMEOUT_DEFAULT_S,
    Call,
    SessionOptions,
)
from moshpitd.averaging.shards import Half, Sharding
from moshpitd.averaging.transport import RELIABLE, Transport
from moshpitd.averaging.unbiased import Form
from moshpitd.averaging.vector import Layout, TensorSpec
from moshpitd.driver import PeerLine
from moshpitd.households import HouseholdLine, TrainerLine
from moshpitd.local.shared_memory import Offer
from moshpitd.local.v1 import daemon_pb2 as pb

_DTYPES = {
    pb.DATA_TYPE_UNSPECIFIED: "of no given type",
    pb.DATA_TYPE_FLOAT64: "float64",
    pb.DATA_TYPE_FLOAT32: "float32",
    pb.DATA_TYPE_FLOAT16: "float16",
    pb.DATA_TYPE_BFLOAT16: "bfloat16",
}
_JOININGS = {
    pb.JOINING_UNSPECIFIED: "receive",
    pb.JOINING_RECEIVE: "receive",
    pb.JOINING_CONTRIBUTE: "contribute",
}
_KINDS = {
    "barrier": pb.VERSION_KIND_BARRIER,
    "fresh": pb.VERSION_KIND_FRESH,
    "merge": pb.VERSION_KIND_MERGE,
    "alone": pb.VERSION_KIND_ALONE,
}
_OUTCOMES = {
    Outcome.COMPLETE: pb.OUTCOME_COMPLETE,
    Outcome.PARTIAL: pb.OUTCOME_PARTIAL,
    Outcome.ALONE: pb.OUTCOME_ALONE,
}


_NORMALISATIONS = {
    pb.NORMALISE_UNSPECIFIED: "",
    pb.NORMALISE_FIXED: "fixed",
    pb.NORMALISE_COMPUTED: "computed",
}
_HALVES = {
    pb.HALF_UNSPECIFIED: None,
    pb.HALF_REDUCE_SCATTER: Half.REDUCE_SCATTER,
    pb.HALF_BROADCAST_SHARD: Half.BROADCAST_SHARD,
}
_NORMALISE_NUMBERS = {name: number for number, name in _NORMALISATIONS.items()}


@dataclass(frozen=True, slots=True)
class LocalHop:
    """How a session's values travel between trainer and daemon."""

    transport: Literal["shared-memory", "stream"]
    why: str = ""
    """Why they are streamed, in words."""


class ConfigLine(Protocol):
    """A setting in force; name, value and where it came from, for people."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> str: ...
    @property
    def source(self) -> str: ...


@dataclass(frozen=True, slots=True)
class DatagramLine:
    """Packets of lossy rounds, since the daemon was started."""

    sent: int = 0
    received: int = 0
    refused: int = 0
    peers_blocked: int = 0
    """Between whom and us none passed, lately."""


class DaemonInfo(Protocol):
    """What the daemon as a whole says of itself; read at every GetStatus and GetConfig."""

    @property
    def ready(self) -> bool:
        """Part of its swarm, taking rounds."""
        ...

    @property
    def waiting_for(self) -> str:
        """What it waits for while not ready, in words."""
        ...

    @property
    def peer_id(self) -> str: ...
    @property
    def swarm(self) -> str: ...
    @property
    def listen(self) -> str:
        """HOST:PORT with the real port."""
        ...

    @property
    def announce(self) -> str:
        """HOST:PORT that others dial; empty when there is none."""
        ...

    @property
    def peers(self) -> int:
        """Other daemons known to be alive."""
        ...

    @property
    def version(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def uptime_s(self) -> float: ...
    @property
    def dialable(self) -> bool | None:
        """Whether other peers can dial us; None while unknown."""
        ...

    @property
    def bulk_port(self) -> int:
        """TCP port of the plain path for chunks; 0 where it is not offered."""
        ...

    @property
    def up_bytes_s(self) -> float:
        """What its line carried in rounds; 0 while not known."""
        ...

    @property
    def down_bytes_s(self) -> float: ...
    @property
    def datagrams(self) -> DatagramLine: ...
    @property
    def config_values(self) -> Sequence[ConfigLine]:
        """Every setting, in the order of the documentation."""
        ...


def session_options(request: pb.OpenSessionRequest) -> SessionOptions:
    """Raises InvalidInput."""
    if request.joining not in _JOININGS:
        raise InvalidInput(f"joining {request.joining} is unknown: give receive or contribute")
    options = SessionOptions(
        layout=Layout.of(_specs(request.tensors)),
        name=request.name or NAME_DEFAULT,
        rounds=request.rounds,
        codec=rules_of(request.codec or "float32").name,  # trainers that mean the same share a session
        compressor=request.compressor or "dense",
        min_peers=max(1, request.min_peers),
        joining=_JOININGS[request.joining],
        lonely_wait_s=request.lonely_wait_seconds or LONELY_WAIT_DEFAULT_S,
        wait_avoidance=_wait_avoidance(request),
        transport=Transport(request.transport or RELIABLE, request.reliable_every),
        shards=_sharding(request),
    )
    options.check()
    return options


def _wait_avoidance(request: pb.OpenSessionRequest) -> WaitAvoidance | None:
    """Raises InvalidInput for what has a meaning in a wait-avoiding session only."""
    match request.averaging:
        case pb.AVERAGING_WAIT_AVOIDING:
            return WaitAvoidance(request.group_size, request.barrier_every, request.lockstep)
        case pb.AVERAGING_UNSPECIFIED | pb.AVERAGING_IN_STEP:
            for name in ("group_size", "barrier_every", "lockstep"):
                if given := getattr(request, name):
                    raise InvalidInput(
                        f"{name} {given} in a session that averages in step: it belongs to wait-avoiding ones, leave "
                        "it out or ask for wait avoidance (groups on a grid: the daemon's --group-size-max)"
                    )
            return None
        case other:
            raise InvalidInput(f"averaging {other} is unknown: give in step or wait-avoiding")


def _sharding(request: pb.OpenSessionRequest) -> Sharding | None:
    """Raises InvalidInput."""
    if not request.shards:
        if request.estimator:
            raise InvalidInput(f"estimator {request.estimator!r} in a session without shards: leave it out")
        return None
    try:
        return Sharding(Form(request.estimator or Form.DIFFERENCE.value))
    except ValueError:
        known = " or ".join(form.value for form in Form)
        raise InvalidInput(f"estimator {request.estimator!r} is unknown: give {known}") from None


def _specs(tensors: Iterable[pb.Tensor]) -> Iterator[TensorSpec]:
    for tensor in tensors:
        data_type = _DTYPES.get(tensor.data_type, f"data type {tensor.data_type}")
        yield TensorSpec(tensor.name, tuple(tensor.shape), data_type)


def feedback_layout(start: pb.LoadFeedbackStart) -> Layout:
    """Raises InvalidInput."""
    return Layout.of(_specs(start.arrays), name_bytes_max=FEEDBACK_NAME_BYTES_MAX)


def feedback_arrays(layout: Layout) -> pb.FeedbackArrays:
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    return pb.FeedbackArrays(
        arrays=[pb.Tensor(name=spec.name, shape=spec.shape, data_type=kinds[spec.dtype]) for spec in layout.tensors]
    )


def offer_message(offer: Offer) -> pb.SharedMemory:
    return pb.SharedMemory(
        path=str(offer.path),
        file_bytes=offer.file_bytes,
        contribution_offset=offer.contribution_offsets[0],
        contribution_offsets=offer.contribution_offsets if len(offer.contribution_offsets) > 1 else (),
        result_offsets=offer.result_offsets,
    )


def average_call(start: pb.AverageStart) -> Call:
    """Raises InvalidInput."""
    if start.half not in _HALVES:
        raise InvalidInput(f"half {start.half} is unknown: give reduce_scatter or broadcast_shard")
    call = Call(
        weight=start.weight if start.HasField("weight") else 1.0,
        timeout_s=start.timeout_seconds if start.HasField("timeout_seconds") else TIMEOUT_DEFAULT_S,
        epoch=start.epoch if start.HasField("epoch") else None,
        micro_batch_s=(tuple(start.micro_batch_seconds),) if start.micro_batch_seconds else (),
        half=_HALVES[start.half],
    )
    call.check()
    return call


def budget_options(request: pb.SetComputeBudgetRequest) -> BudgetOptions:
    """Raises InvalidInput."""
    if request.normalise not in _NORMALISATIONS:
        raise InvalidInput(f"normalise {request.normalise} is unknown: give fixed or computed")
    options = BudgetOptions(
        micro_batches=request.micro_batches,
        normalise=_NORMALISATIONS[request.normalise],
        tau_s=request.tau_seconds if request.HasField("tau_seconds") else None,
        off=request.off,
        warm_up=request.warm_up if request.HasField("warm_up") else WARM_UP_DEFAULT,
        learn=request.learn if request.HasField("learn") else LEARN_DEFAULT,
        refresh_every=request.refresh_every,
    )
    options.check()
    return options


def budget_message(line: BudgetLine | None) -> pb.ComputeBudget | None:
    """None, which protobuf takes for a field that is not set, of a session without one."""
    if line is None:
        return None
    return pb.ComputeBudget(
        micro_batches=line.micro_batches,
        normalise=_NORMALISE_NUMBERS[line.normalise],
        tau_seconds=line.tau_s,
        state=line.state,
        epoch=line.k,
        tables=line.tables,
        expected_speedup=line.expected_speedup,
        expected_drop_rate=line.expected_drop_rate,
        speedup=line.speedup,
        drop_rate=line.drop_rate,
        completed=line.completed,
        note=line.note,
    )


def receipt_message(session: str, receipt: Receipt) -> pb.Receipt:
    return pb.Receipt(
        outcome=_OUTCOMES[receipt.outcome],
        epoch=receipt.epoch,
        joined=receipt.joined,
        weight_total=receipt.weight_total,
        peers=receipt.peers,
        digest=receipt.digest,
        why=receipt.why,
        seconds=pb.Seconds(
            matchmaking=receipt.seconds_matchmaking, reduce=receipt.seconds_reduce, total=receipt.seconds_total
        ),
        bytes=pb.Traffic(sent=receipt.bytes_sent, received=receipt.bytes_received),
        grid=receipt.grid,
        rounds=map(_round_message, receipt.rounds),
        session=session,
        compressor=receipt.compressor,
        notes=receipt.notes,
        local=pb.Local(trainers=receipt.local.trainers, weight=receipt.local.weight),
        budget=budget_message(receipt.budget),
        version=_version_message(receipt.version),
        shard=_shard_message(receipt.shard),
    )


def _shard_message(line: ShardLine | None) -> pb.Shard | None:
    if line is None:
        return None
    return pb.Shard(start=line.start, stop=line.stop, version=line.version, changed=line.changed)


def _version_message(version: VersionReceipt | None) -> pb.Version | None:
    if version is None:
        return None
    return pb.Version(
        version=version.version,
        kind=_KINDS[version.kind],
        fresh=version.fresh,
        staleness=version.staleness,
        skipped=version.skipped,
        contributors=[
            pb.Contributor(peer=line.peer, posted=line.posted if line.posted >= 0 else None)
            for line in version.contributors
        ],
        cohort=version.cohort,
    )


def _round_message(round_: RoundReceipt) -> pb.Round:
    return pb.Round(
        round=round_.round,
        axis=round_.axis,
        outcome=_OUTCOMES[round_.outcome],
        group_id=round_.group_id,
        digest=round_.digest,
        leader=round_.leader,
        rank=round_.rank,
        codec=round_.codec,
        transport=round_.transport,
        stage=round_.stage,
        members=[pb.Member(peer=line.peer, weight=line.weight, coordinate=line.coordinate) for line in round_.members],
        links=[pb.Link(peer=line.peer, transport=line.transport) for line in round_.links],
        spans=[
            pb.Span(reducer=line.reducer, start=line.start, stop=line.stop, contributors=line.contributors)
            for line in round_.spans
        ],
        dropped=[pb.Dropped(peer=line.peer, why=line.why) for line in round_.dropped],
        why=round_.why,
        weight_after=round_.weight_after,
        seconds=pb.Seconds(
            matchmaking=round_.seconds_matchmaking,
            reduce=round_.seconds_reduce,
            total=round_.seconds_matchmaking + round_.seconds_reduce,
        ),
        bytes=pb.Traffic(sent=round_.bytes_sent, received=round_.bytes_received),
        codec_why=round_.codec_why,
        bits_per_element=round_.bits_per_element,
        relative_error=round_.relative_error,
        transport_why=round_.transport_why,
        lossy=_lossy_message(round_.lossy),
    )


def _lossy_message(line: LossyLine | None) -> pb.Lossy | None:
    if line is None:
        return None
    return pb.Lossy(
        estimator=line.estimator,
        links=[
            pb.LostOnLink(peer=each.peer, sent=each.sent, lost=each.lost, blocked=each.blocked) for each in line.links
        ],
        ranges=line.ranges,
        repaired=line.repaired,
        unrepaired=line.unrepaired,
        stale=[pb.Stretch(start=start, stop=stop) for start, stop in line.stale],
        stale_elements=line.stale_elements,
        deadline_s=line.deadline_s,
        late=line.late,
        duplicates=line.duplicates,
    )


def rounds_message(receipts: Iterable[tuple[str, Receipt]], bytes_max: int) -> pb.ListRoundsResponse:
    """Newest first, as many as fit."""
    response = pb.ListRoundsResponse()
    size = 0
    for session, receipt in receipts:
        message = receipt_message(session, receipt)
        size += message.ByteSize() + 16
        if size > bytes_max:
            break
        response.receipts.append(message)
    return response


def status_message(
    info: DaemonInfo, sessions: Iterable[HouseholdLine], hops: Mapping[str, LocalHop], *, draining: bool
) -> pb.GetStatusResponse:
    """`hops`: by trainer."""
    return pb.GetStatusResponse(
        ready=info.ready,
        peer_id=info.peer_id,
        swarm=info.swarm,
        listen=info.listen,
        announce=info.announce,
        peers=info.peers,
        sessions=[_session_message(line, hops) for line in sessions],
        waiting_for=info.waiting_for,
        version=info.version,
        pid=info.pid,
        uptime_seconds=info.uptime_s,
        draining=draining,
        dialable=info.dialable,
        bulk_port=info.bulk_port,
        bandwidth=pb.Bandwidth(up_bytes_s=info.up_bytes_s, down_bytes_s=info.down_bytes_s),
        datagrams=pb.Datagrams(
            sent=info.datagrams.sent,
            received=info.datagrams.received,
            refused=info.datagrams.refused,
            peers_blocked=info.datagrams.peers_blocked,
        ),
    )


_NO_HOP = LocalHop("stream", "it is just being opened or closed")


def _session_message(line: HouseholdLine, hops: Mapping[str, LocalHop]) -> pb.SessionStatus:
    return pb.SessionStatus(
        name=line.options.name,
        state=line.status.state,
        waiting_for=line.status.waiting_for,
        epoch=line.status.epoch,
        grid=line.status.grid,
        cell=line.status.cell,
        live_sessions=line.status.live_sessions,
        differs=line.status.differs,
        is_outvoted=line.status.is_outvoted,
        vector_bytes=line.options.layout.byte_size,
        averagings=line.status.averagings,
        codec=line.options.codec,
        budget=budget_message(line.status.budget),
        compressor=line.options.compressor,
        trainers=[_trainer_message(trainer, hops.get(trainer.session_id, _NO_HOP)) for trainer in line.trainers],
        cohort=_cohort_message(line.status.cohort),
        transport=line.options.transport.term,
    )


def _cohort_message(cohort: CohortStatus | None) -> pb.Cohort | None:
    if cohort is None:
        return None
    return pb.Cohort(
        cohort=cohort.cohort,
        members=cohort.members,
        live=cohort.live,
        version=cohort.version,
        barrier=cohort.barrier,
        staleness_max=cohort.staleness_max,
        counts=cohort.counts,
    )


def _trainer_message(line: TrainerLine, hop: LocalHop) -> pb.TrainerStatus:
    return pb.TrainerStatus(
        session_id=line.session_id, state=line.state, transport=hop.transport, transport_why=hop.why
    )


def peers_message(peers: Iterable[PeerLine]) -> pb.ListPeersResponse:
    return pb.ListPeersResponse(
        peers=[
            pb.Peer(
                peer_id=line.peer,
                address=line.address,
                state=line.state,
                sessions=line.sessions,
                seconds_since_heard=line.heard_s_ago,
            )
            for line in peers
        ]
    )


def config_message(values: Iterable[ConfigLine]) -> pb.GetConfigResponse:
    return pb.GetConfigResponse(
        values=[pb.ConfigValue(name=line.name, value=line.value, source=line.source) for line in values]
    )

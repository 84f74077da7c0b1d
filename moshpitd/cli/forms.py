"""The JSON forms of what the daemon says: the public ones, CONTRACT's names, one function a message.

Written out instead of taken from protobuf's own JSON, whose 64-bit numbers are strings and whose names are its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from moshpitd.local.v1 import daemon_pb2 as pb

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

OUTCOMES = {
    pb.OUTCOME_COMPLETE: "complete",
    pb.OUTCOME_PARTIAL: "partial",
    pb.OUTCOME_ALONE: "alone",
    pb.OUTCOME_UNSPECIFIED: "unknown",
}
NORMALISATIONS = {
    pb.NORMALISE_FIXED: "fixed",
    pb.NORMALISE_COMPUTED: "computed",
    pb.NORMALISE_UNSPECIFIED: "",
}

KINDS = {
    pb.VERSION_KIND_BARRIER: "barrier",
    pb.VERSION_KIND_FRESH: "fresh",
    pb.VERSION_KIND_MERGE: "merge",
    pb.VERSION_KIND_ALONE: "alone",
    pb.VERSION_KIND_UNSPECIFIED: "unknown",
}


def status(message: pb.GetStatusResponse) -> Json:
    return {
        "ready": message.ready,
        "waiting_for": message.waiting_for,
        "peer_id": message.peer_id,
        "swarm": message.swarm,
        "listen": message.listen,
        "announce": message.announce,
        "dialable": message.dialable if message.HasField("dialable") else None,
        "bulk_port": message.bulk_port,
        "peers": message.peers,
        "bandwidth": {
            "up_bytes_s": message.bandwidth.up_bytes_s,
            "down_bytes_s": message.bandwidth.down_bytes_s,
        },
        "datagrams": {
            "sent": message.datagrams.sent,
            "received": message.datagrams.received,
            "refused": message.datagrams.refused,
            "peers_blocked": message.datagrams.peers_blocked,
        },
        "sessions": [
            {
                "name": session.name,
                "state": session.state,
                "waiting_for": session.waiting_for,
                "epoch": session.epoch,
                "grid": session.grid,
                "cell": list(session.cell),
                "live_sessions": session.live_sessions,
                "differs": session.differs,
                "is_outvoted": session.is_outvoted,
                "vector_bytes": session.vector_bytes,
                "averagings": dict(session.averagings),
                "codec": session.codec,
                "compressor": session.compressor,
                "transport": session.transport,
                "trainers": [
                    {
                        "session_id": trainer.session_id,
                        "state": trainer.state,
                        "transport": trainer.transport,
                        "transport_why": trainer.transport_why,
                    }
                    for trainer in session.trainers
                ],
                "budget": budget(session.budget) if session.HasField("budget") else None,
                "cohort": _cohort(session.cohort) if session.HasField("cohort") else None,
            }
            for session in message.sessions
        ],
        "draining": message.draining,
        "version": message.version,
        "pid": message.pid,
        "uptime_seconds": message.uptime_seconds,
    }


def _cohort(message: pb.Cohort) -> Json:
    return {
        "cohort": message.cohort.hex(),
        "members": message.members,
        "live": message.live,
        "version": message.version,
        "barrier": message.barrier,
        "staleness_max": message.staleness_max,
        "counts": dict(message.counts),
    }


def peers(messages: Iterable[pb.Peer]) -> Json:
    return [
        {
            "peer_id": peer.peer_id,
            "address": peer.address,
            "state": peer.state,
            "sessions": _texts(peer.sessions),
            "seconds_since_heard": peer.seconds_since_heard if peer.HasField("seconds_since_heard") else None,
        }
        for peer in messages
    ]


def config(messages: Iterable[tuple[str, str, str]]) -> Json:
    """Of (name, value, source)."""
    return {name: {"value": value, "source": source} for name, value, source in messages}


def receipt(message: pb.Receipt) -> Json:
    return {
        "outcome": OUTCOMES[message.outcome],
        "why": message.why,
        "epoch": message.epoch,
        "session": message.session,
        "joined": message.joined,
        "weight_total": message.weight_total,
        "peers": _texts(message.peers),
        "digest": message.digest.hex(),
        "grid": message.grid,
        "compressor": message.compressor,
        "notes": _texts(message.notes),
        "local": {"trainers": message.local.trainers, "weight": message.local.weight},
        "seconds": _seconds(message.seconds),
        "bytes": _traffic(message.bytes),
        "rounds": [_round(round_) for round_ in message.rounds],
        "budget": budget(message.budget) if message.HasField("budget") else None,
        "version": _version(message.version) if message.HasField("version") else None,
        "shard": _shard(message.shard) if message.HasField("shard") else None,
    }


def _shard(message: pb.Shard) -> Json:
    return {
        "start": message.start,
        "stop": message.stop,
        "version": message.version.hex(),
        "changed": message.changed,
    }


def budget(message: pb.ComputeBudget) -> Json:
    return {
        "micro_batches": message.micro_batches,
        "normalise": NORMALISATIONS[message.normalise],
        "completed": message.completed,
        "tau_seconds": message.tau_seconds,
        "state": message.state,
        "epoch": message.epoch,
        "tables": message.tables,
        "expected_speedup": message.expected_speedup,
        "expected_drop_rate": message.expected_drop_rate,
        "speedup": message.speedup,
        "drop_rate": message.drop_rate,
        "note": message.note,
    }


def _version(message: pb.Version) -> Json:
    return {
        "version": message.version,
        "kind": KINDS[message.kind],
        "fresh": message.fresh,
        "staleness": message.staleness,
        "skipped": message.skipped,
        "contributors": [
            {"peer": each.peer, "posted": each.posted if each.HasField("posted") else None}
            for each in message.contributors
        ],
        "cohort": message.cohort.hex(),
    }


def _round(message: pb.Round) -> Json:
    return {
        "round": message.round,
        "axis": message.axis,
        "outcome": OUTCOMES[message.outcome],
        "why": message.why,
        "group_id": message.group_id.hex(),
        "digest": message.digest.hex(),
        "leader": message.leader,
        "rank": message.rank,
        "codec": message.codec,
        "codec_why": message.codec_why,
        "bits_per_element": message.bits_per_element,
        "relative_error": message.relative_error,
        "stage": message.stage,
        "transport": message.transport,
        "transport_why": message.transport_why,
        "lossy": _lossy(message.lossy) if message.HasField("lossy") else None,
        "members": [
            {"peer": member.peer, "weight": member.weight, "coordinate": member.coordinate}
            for member in message.members
        ],
        "spans": [
            {
                "reducer": span.reducer,
                "start": span.start,
                "stop": span.stop,
                "contributors": _texts(span.contributors),
            }
            for span in message.spans
        ],
        "links": [{"peer": link.peer, "transport": link.transport} for link in message.links],
        "dropped": [{"peer": dropped.peer, "why": dropped.why} for dropped in message.dropped],
        "weight_after": message.weight_after,
        "seconds": _seconds(message.seconds),
        "bytes": _traffic(message.bytes),
    }


def _lossy(message: pb.Lossy) -> Json:
    return {
        "estimator": message.estimator,
        "links": [
            {"peer": link.peer, "sent": link.sent, "lost": link.lost, "blocked": link.blocked} for link in message.links
        ],
        "ranges": message.ranges,
        "repaired": message.repaired,
        "unrepaired": message.unrepaired,
        "stale": [[stretch.start, stretch.stop] for stretch in message.stale],
        "stale_elements": message.stale_elements,
        "deadline_s": message.deadline_s,
        "late": message.late,
        "duplicates": message.duplicates,
    }


def _seconds(message: pb.Seconds) -> Json:
    return {"matchmaking": message.matchmaking, "reduce": message.reduce, "total": message.total}


def _traffic(message: pb.Traffic) -> Json:
    return {"sent": message.sent, "received": message.received}


def _texts(values: Iterable[str]) -> list[Json]:
    return list(values)

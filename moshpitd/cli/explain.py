"""An averaging told in plain sentences: who met, who reduced what, who was dropped and why, times and bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from moshpitd.averaging.names import PeerId, short
from moshpitd.cli.forms import KINDS, NORMALISATIONS, OUTCOMES
from moshpitd.cli.tables import amount, budget
from moshpitd.local.v1 import daemon_pb2 as pb


def read_round(text: str) -> tuple[int | None, int | None]:
    """(epoch, round) of "7", "7.1" or "last"; None = the newest epoch, all its rounds. Raises ValueError."""
    if text == "last":
        return None, None
    match = re.fullmatch(r"(\d{1,18})(?:\.(\d{1,3}))?", text)
    if not match:
        raise ValueError(f"{text!r} is no round: write its epoch, as in 7, epoch.round, as in 7.1, or last")
    return int(match[1]), int(match[2]) if match[2] else None


def sentences(receipt: pb.Receipt, only_round: int | None, own: str) -> Iterator[str]:
    """The averaging as the peer `own` saw it; one of its rounds or all."""
    if only_round is None:
        yield from _averaging(receipt)
        if receipt.HasField("version"):
            yield from _version(receipt.version, own)
    for round_ in receipt.rounds:
        if only_round in (None, round_.round):
            yield from _round(receipt, round_, own)


def _averaging(receipt: pb.Receipt) -> Iterator[str]:
    name = f"Averaging {receipt.epoch} of session {receipt.session!r}"
    met = f"this peer and {len(receipt.peers)} {'other' if len(receipt.peers) == 1 else 'others'}"
    grid = f" on a grid of {receipt.grid}" if receipt.grid else ""
    match OUTCOMES[receipt.outcome]:
        case "alone" if receipt.local.trainers > 1:
            yield f"{name} found no other peer.{_because(receipt.why)}"
        case "alone":
            yield f"{name} found nobody else; the values are unchanged.{_because(receipt.why)}"
        case outcome:
            weight = f"total weight {receipt.weight_total:g}"
            yield f"{name} was {outcome}: {met} met{grid}, {weight}.{_because(receipt.why)}"
    if receipt.local.trainers > 1:
        yield (
            f"{receipt.local.trainers} trainers of this daemon were averaged first, as one peer with weight "
            f"{receipt.local.weight:g}; each got the result."
        )
    if receipt.compressor not in ("", "dense"):
        stages = list(dict.fromkeys(round_.stage for round_ in receipt.rounds))
        said = f" {'; '.join(receipt.notes)}." if receipt.notes else ""
        yield f"Compressor {receipt.compressor} went through {', then '.join(stages) or 'nothing'}.{said}"
    if receipt.joined:
        received = "what the owners of shards hold" if _is_broadcast(receipt.rounds) else "the swarm's mean"
        yield f"This peer was new, so it gave no weight and received {received}."
    if receipt.HasField("shard"):
        anew = "; the shards were made anew in this call" if receipt.shard.changed else ""
        yield f"This peer owns elements {receipt.shard.start:,} to {receipt.shard.stop:,}{anew}."
    if receipt.HasField("budget"):
        line = receipt.budget
        yield (
            f"Its step completed {line.completed} of {line.micro_batches} micro-batches, normalised as "
            f"{NORMALISATIONS[line.normalise]}. The next step's compute budget: {budget(line)}."
            + (f" {line.note}." if line.note else "")
        )
    seconds = receipt.seconds
    yield (
        f"It took {seconds.total:.3f} s: {seconds.matchmaking:.3f} s to find the groups, {seconds.reduce:.3f} s to "
        f"exchange and reduce. {amount(receipt.bytes.sent)} went out, {amount(receipt.bytes.received)} came in."
    )


def _version(version: pb.Version, own: str) -> Iterator[str]:
    others = len(version.contributors)
    match KINDS[version.kind]:
        case "barrier":
            yield f"Version {version.version} was a barrier: all waited for all, {others} models make the mean."
        case "fresh":
            yield f"Version {version.version} is the mean of {others} models, the posted one among them."
        case "merge":
            yield (
                f"The trainer came late for version {version.version}: its result is the sum of that one's {others} "
                f"models and the posted one, divided by {others + 1}."
            )
            if version.staleness:
                yield f"Its daemon had put in a model {_count(version.staleness, 'version')} old meanwhile."
        case _:
            yield f"Nobody else was in version {version.version}: the result is the posted model."
    if version.skipped:
        yield f"The trainer takes no part any more in {_count(version.skipped, 'version')} that it missed."
    for each in version.contributors:
        if not each.HasField("posted"):
            yield f"  The model of {_who(each.peer, own)} is in it, which did not say how old it is."
        elif each.posted < version.version:
            yield f"  The model of {_who(each.peer, own)} was posted for version {each.posted}."


def _round(receipt: pb.Receipt, round_: pb.Round, own: str) -> Iterator[str]:
    name = f"Round {receipt.epoch}.{round_.round}"
    if not round_.group_id:
        together = "nobody else came" if len(round_.members) < 2 else f"{len(round_.members)} met and averaged nothing"
        yield f"{name}{_of(round_)}, along axis {round_.axis}: {together}.{_because(round_.why)}"
        return
    members = [
        f"{_who(member.peer, own)} with weight {member.weight:g}"
        + (", leading" if member.peer == round_.leader else "")
        for member in round_.members
    ]
    yield (
        f"{name}{_of(round_)}, along axis {round_.axis}, {OUTCOMES[round_.outcome]}: a group of {len(members)} met: "
        f"{'; '.join(members)}.{_because(round_.why)}"
    )
    everybody = {member.peer for member in round_.members}
    for span in round_.spans:
        if _is_broadcast([round_]):
            yield f"  {_who(span.reducer, own)} gave elements {span.start:,} to {span.stop:,}."
            continue
        missing = sorted(everybody - set(span.contributors))
        share = f"without {', '.join(_who(peer, own) for peer in missing)}" if missing else "from all members"
        yield f"  {_who(span.reducer, own)} reduced elements {span.start:,} to {span.stop:,}, {share}."
    for dropped in round_.dropped:
        yield f"  {_who(dropped.peer, own)} was dropped: {dropped.why}."
    by = "lossy packets" if round_.HasField("lossy") else round_.transport
    yield (
        f"  It took {round_.seconds.matchmaking:.3f} s to match and {round_.seconds.reduce:.3f} s to reduce by "
        f"{by} in {_coded(round_)}; {amount(round_.bytes.sent)} out, "
        f"{amount(round_.bytes.received)} in. Weight {round_.weight_after:g} goes on."
    )
    if round_.transport_why:
        yield f"  Why this way: {round_.transport_why}."
    if round_.HasField("lossy"):
        yield from _lossy(round_, own)
        return
    if round_.digest:  # each holds its own shard after a reduce_scatter
        yield f"  Whoever shows group id {round_.group_id.hex()} holds the same bits, digest {round_.digest.hex()}."


def _is_broadcast(rounds: Iterable[pb.Round]) -> bool:
    return any(round_.stage == "broadcast_shard" for round_ in rounds)


def _lossy(round_: pb.Round, own: str) -> Iterator[str]:
    """What was lost, what became of it, and who holds what now."""
    lossy = round_.lossy
    for link in lossy.links:
        if link.blocked:
            yield f"  No datagram passed between {_who(link.peer, own)} and this peer: reliable streams carried all."
        elif link.lost:
            share = f"{link.lost:,} of {link.sent:,} packets from {_who(link.peer, own)} ({link.lost / link.sent:.1%})"
            yield f"  Lost on the way: {share}."
    if lossy.repaired:
        ranges = _count(lossy.repaired, "range")
        yield f"  {ranges} of this peer's span that no packet had brought came again, over reliable streams."
    if lossy.unrepaired:
        ranges = _count(lossy.unrepaired, "range")
        yield f"  {ranges} of this peer's span did not come at all: there everybody kept its own values."
    if lossy.stale_elements:
        share = f" ({lossy.stale_elements / round_.spans[-1].stop:.1%} of all)" if round_.spans else ""
        yield (
            f"  No average came of {lossy.stale_elements:,} elements{share}: there this peer kept its own values. The "
            "next averaging makes up for it."
        )
    if lossy.late:
        yield f"  {_count(lossy.late, 'packet')} came too late, after {lossy.deadline_s:.2f} s."
    if not any(link.lost or link.blocked for link in lossy.links):
        yield "  Nothing on its way to this peer was lost."
    yield "  Members of a lossy round may differ where one of them missed a packet, so there is no digest."


def _coded(round_: pb.Round) -> str:
    why = f" ({round_.codec_why})" if round_.codec_why else ""
    lost = f", off by {round_.relative_error:.1g} of its norm" if round_.relative_error else ""
    return f"{round_.codec}{why}, {round_.bits_per_element:.3g} bits an element{lost}"


def _of(round_: pb.Round) -> str:
    """What was averaged, if not the values themselves."""
    return f", for the {round_.stage}" if round_.stage not in ("", "dense") else ""


def _who(peer: str, own: str) -> str:
    return "this peer" if peer == own else short(PeerId(peer))


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _because(why: str) -> str:
    return f" Why: {why}." if why else ""

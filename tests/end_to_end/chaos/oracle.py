"""Judges what trainers gave and got by the receipts they were handed. Pure: no clock, no socket, no daemon.

A call's weight is unique among its peer's calls, so a receipt's member line says which call it means. From there every
committed value is worked out anew in float64: the inputs of a first round are what trainers gave, those of a later
round are results of the round before, whose receipts their owners hold. Where such an owner died with its receipt the
value is not judged, only counted as `unwitnessed`; one-round averagings are always judged whole.

| what is claimed                                    | objected to when                                               |
|----------------------------------------------------|----------------------------------------------------------------|
| the call ends by its deadline                      | it took longer than timeout + slack + its daemon's standstill  |
| an error, or `alone`, leaves the tensors           | a byte differs                                                 |
| the result is the mean of whom its spans name      | it is not, or one of them never gave that weight               |
| same group id, same bits                           | digests, contributors or bytes differ                          |
| same digest, same bits                             | bytes differ                                                   |
| complete: everybody in, in every round             | anybody dropped, missing in a span, or a round not complete    |
| complete at everybody, all rounds of the grid      | the result is not the mean of all, or not everywhere the same  |
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moshpit_client.receipt import Receipt, Round

Floats = npt.NDArray[np.float32]
Exact = npt.NDArray[np.float64]

TOLERANCE = 2e-6
"""Of a round, relative to the largest value of the mean: float32 roundings of a handful of terms, each a few times as
large. A contribution too many, too few or of another call is a million times further off."""
WINDOW_S = 20.0
"""Calls that ended so long before anything still of interest began are forgotten."""
DEADLINE_SLACK_S = 3.0
"""For two busy cores and the way from the daemon to the trainer."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One averaging of one trainer, from outside."""

    peer: str
    began: float
    ended: float
    timeout_s: float
    stood_still_s: float
    """Of that time its own daemon was stopped."""
    weight: float
    """Unique among the calls of this peer."""
    gave: Floats
    holds: Floats
    """What its tensors held afterwards."""
    receipt: Receipt | None
    error: str = ""
    """Instead of a receipt."""
    rounds_of_all: bool = False
    """Asked for as many rounds as the plan has axes."""

    @property
    def name(self) -> str:
        what = f"averaging {self.receipt.epoch} ({self.receipt.outcome})" if self.receipt else f"failed: {self.error}"
        return f"{self.peer[:8]} {what} at {self.began:.1f}..{self.ended:.1f}"


@dataclass(frozen=True, slots=True)
class Objection:
    """What is wrong, and whose call shows it."""

    call: str
    what: str

    def __str__(self) -> str:
        return f"{self.call}: {self.what}"


@dataclass(slots=True)
class Verdicts:
    """What was judged so far."""

    calls: int = 0
    values: int = 0
    """Committed vectors compared with their mean, whole."""
    unwitnessed: int = 0
    """Committed vectors of later rounds for which somebody's earlier receipt was lost."""
    whole_swarm: int = 0
    """Averagings complete at everybody, compared with the mean of all."""
    latest_s: float = -math.inf
    """The largest time past a deadline, the standstill of its daemon taken off."""


class Oracle:
    """Hear calls as they end; judge those whose contributors have all ended; object."""

    def __init__(self, everybody: Iterable[str]) -> None:
        self.verdicts = Verdicts()
        self._everybody = frozenset(everybody)
        self._waiting: list[Call] = []
        self._known: list[Call] = []
        self._prints: dict[Call, bytes] = {}

    def hear(self, call: Call) -> None:
        """A call has ended."""
        self._waiting.append(call)
        self._known.append(call)

    def judge(self, open_since: float) -> list[Objection]:
        """Judge every call that ended before `open_since`, when the oldest unfinished call began (inf: there is none).

        Whoever contributed to a result was called before it ended, so by then all contributions are known.
        """
        ready = [call for call in self._waiting if call.ended < open_since]
        self._waiting = [call for call in self._waiting if call.ended >= open_since]
        hearing = Hearing(self._known, self._everybody, self.verdicts, self._prints)
        found = [objection for call in ready for objection in hearing.of_one(call)]
        found += hearing.of_groups(ready)
        found += hearing.of_averagings(ready)
        # Whoever shares an averaging with a call overlaps it; what ended well before all that is open or waits is of no
        oldest = min([call.began for call in self._waiting] + [open_since])
        kept_from = min(oldest, max((call.ended for call in self._known), default=0.0)) - WINDOW_S
        self._known = [call for call in self._known if call.ended >= kept_from]
        self._prints = {call: self._prints[call] for call in self._known if call in self._prints}
        return found


@dataclass(slots=True)
class Hearing:
    """One sitting: calls side by side, values worked out once."""

    calls: Sequence[Call]
    everybody: frozenset[str]
    verdicts: Verdicts
    prints: dict[Call, bytes] = field(default_factory=dict)
    """Digests of what calls hold."""
    _of_peer: dict[str, list[Call]] = field(init=False)
    _means: dict[tuple[str, int], Exact | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._of_peer = defaultdict(list)
        for call in self.calls:
            self._of_peer[call.peer].append(call)

    # ---- one call

    def of_one(self, call: Call) -> Iterator[Objection]:
        self.verdicts.calls += 1
        late = call.ended - call.began - call.timeout_s - call.stood_still_s
        self.verdicts.latest_s = max(self.verdicts.latest_s, late)
        complaints = [f"ended {late:.1f} s after its deadline"] if late > DEADLINE_SLACK_S else []
        receipt = call.receipt
        unchanged = np.array_equal(bits(call.gave), bits(call.holds))
        if (receipt is None or receipt.outcome == "alone") and not unchanged:
            complaints.append("its tensors were changed all the same")
        if receipt is not None:
            complaints += self._of_receipt(call, receipt)
        for what in complaints:
            yield Objection(call.name, what)

    def _of_receipt(self, call: Call, receipt: Receipt) -> Iterator[str]:
        committed = [each for each in receipt.rounds if each.outcome != "alone"]
        met = {member.peer for each in committed for member in each.members} - {call.peer}
        lines = [what for each in receipt.rounds for what in of_round(call, each)]
        yield from lines
        if receipt.outcome == "alone":
            if committed:
                yield "says alone, but a round was committed"
            return
        if not committed:
            yield f"says {receipt.outcome}, but no round was committed"
            return
        if set(receipt.peers) != met:
            yield f"met {sorted(p[:8] for p in met)} by its rounds, {sorted(p[:8] for p in receipt.peers)} by its word"
        whole = all(each.outcome == "complete" for each in receipt.rounds)
        if receipt.outcome == "complete" and not whole:
            yield "says complete, but a round is not"
        if receipt.outcome == "partial" and not receipt.why:
            yield "is partial without a reason"
        own = next((m.weight for m in receipt.rounds[0].members if m.peer == call.peer), None)
        if own != (0.0 if receipt.joined else call.weight):
            yield f"gave weight {call.weight}, its receipt says {own}"
        if lines:
            return  # no mean can be worked out from that
        try:
            expected = self._value_after(call, receipt, len(receipt.rounds))
        except Unaccountable as error:
            yield str(error)
            return
        if expected is None:
            self.verdicts.unwitnessed += 1
            return
        self.verdicts.values += 1
        scale = float(np.max(np.abs(expected)))
        wrong = ~(np.abs(call.holds.astype(np.float64) - expected) <= TOLERANCE * len(committed) * scale)
        if wrong.any():
            first, count = int(np.argmax(wrong)), int(wrong.sum())
            yield (
                f"holds {call.holds[first]!r} at element {first} ({count} of {len(wrong)} are wrong), "
                f"the mean that its receipt names is {expected[first]!r}"
            )

    # ---- what a value must be

    def _value_after(self, call: Call, receipt: Receipt, rounds: int) -> Exact | None:
        """What this peer must hold after so many rounds; None when nobody can tell."""
        for each in reversed(receipt.rounds[:rounds]):
            if any(of_round(call, each)):
                return None  # it is objected to where its owner's call is judged
            if each.outcome != "alone":
                return self._mean(each, receipt.epoch, receipt.rounds.index(each))
        return call.gave.astype(np.float64)

    def _mean(self, of: Round, epoch: int, j: int) -> Exact | None:
        key = (of.group_id, j)
        if key not in self._means:
            self._means[key] = self._worked_out(of, epoch, j)
        return self._means[key]

    def _worked_out(self, of: Round, epoch: int, j: int) -> Exact | None:
        weights = {member.peer: member.weight for member in of.members}
        parts: list[Exact] = []
        for span in of.spans:
            total = np.zeros(span.stop - span.start)
            for peer in span.contributors:
                value = self._value_before(peer, weights[peer], epoch, j)
                if value is None:
                    return None
                total += weights[peer] * value[span.start : span.stop]
            parts.append(total / math.fsum(weights[peer] for peer in span.contributors))
        return np.concatenate(parts)

    def _value_before(self, peer: str, weight: float, epoch: int, j: int) -> Exact | None:
        """What this peer brought into round j."""
        if j == 0:
            for call in self._of_peer[peer]:
                if call.weight == weight:
                    return call.gave.astype(np.float64)
            raise Unaccountable(f"names a contribution of {peer[:8]} with weight {weight}, which it never gave")
        for call in self._of_peer[peer]:
            receipt = call.receipt
            is_of_this = receipt is not None and receipt.epoch == epoch and len(receipt.rounds) >= j
            if receipt is not None and is_of_this and receipt.rounds[j - 1].weight_after == weight:
                return self._value_after(call, receipt, j)
        return None

    # ---- many calls

    def of_groups(self, ready: Sequence[Call]) -> Iterator[Objection]:
        """Same group id, same bits; same digest, same bits."""
        groups = {each.group_id for call in ready for each in committed_rounds(call)}
        digests = {call.receipt.digest for call in ready if call.receipt and call.receipt.digest}
        seen: dict[str, tuple[object, Call]] = {}
        bytes_of: dict[str, tuple[bytes, Call]] = {}
        for call in self.calls:
            last = None
            for each in committed_rounds(call):
                last = each
                if each.group_id not in groups:
                    continue
                told = (each.digest, elementwise(each), tuple(each.members), each.axis)
                before, other = seen.setdefault(each.group_id, (told, call))
                if before != told:
                    yield Objection(call.name, f"round {each.round}: group {each.group_id} is another at {other.name}")
            if last is None or call.receipt is None:
                continue
            if call.receipt.digest != last.digest:
                yield Objection(call.name, "its digest is not that of its last round")
            for key in {last.group_id, last.digest} & (groups | digests):
                held, other = bytes_of.setdefault(key, (self._print(call), call))
                if held != self._print(call):
                    yield Objection(call.name, f"holds other bits than {other.name}, under the same {key}")

    def _print(self, call: Call) -> bytes:
        if call not in self.prints:
            self.prints[call] = hashlib.sha256(bits(call.holds).data).digest()
        return self.prints[call]

    def of_averagings(self, ready: Sequence[Call]) -> Iterator[Objection]:
        """Where everybody was in and all is complete, the result is the mean of all, bit for bit the same."""
        ended = defaultdict(list)
        for call in self.calls:
            if call.receipt is not None and call.receipt.outcome == "complete" and call.rounds_of_all:
                ended[call.receipt.epoch].append(call)
        for epoch in sorted({call.receipt.epoch for call in ready if call.receipt is not None}):
            calls = ended[epoch]
            grids = {call.receipt.grid for call in calls if call.receipt is not None}
            if {call.peer for call in calls} != self.everybody or len(calls) != len(self.everybody) or len(grids) != 1:
                continue
            self.verdicts.whole_swarm += 1
            weights = [0.0 if call.receipt is None or call.receipt.joined else call.weight for call in calls]
            exact = sum(w * c.gave.astype(np.float64) for w, c in zip(weights, calls, strict=True)) / sum(weights)
            scale = float(np.max(np.abs(exact)))
            for call in calls:
                off = float(np.max(np.abs(call.holds - exact))) / scale
                if not off <= 4 * TOLERANCE:
                    yield Objection(call.name, f"complete at all {len(calls)}, but off the mean of all by {off:.1e}")
            if len({bits(call.holds).tobytes() for call in calls}) != 1:
                yield Objection(calls[0].name, f"complete at all {len(calls)}, but not everywhere the same bits")


class Unaccountable(Exception):
    """A receipt names what nobody did."""


def of_round(call: Call, each: Round) -> Iterator[str]:
    """What a round's own lines must say."""
    name = f"round {each.round}"
    weights = {member.peer: member.weight for member in each.members}
    if call.peer not in weights:
        yield f"{name}: its own peer is no member"
    if len(weights) != len(each.members):
        yield f"{name}: a member is named twice"
    if each.outcome == "alone":
        if each.spans or each.group_id or each.digest:
            yield f"{name}: says alone, but has a result"
        return
    if len(weights) < 2:
        yield f"{name}: says {each.outcome} with nobody else"
    end = 0
    for span in each.spans:
        if span.start != end or span.stop <= span.start:
            yield f"{name}: spans leave a gap or overlap at element {end}"
        end = span.stop
        if not span.contributors or any(weights.get(peer, 0.0) <= 0 for peer in span.contributors):
            yield f"{name}: elements {span.start} to {span.stop} come from nobody, or from no member with any weight"
        if len(set(span.contributors)) != len(span.contributors):
            yield f"{name}: a contributor of elements {span.start} to {span.stop} counts twice"
    if end != len(call.gave):
        yield f"{name}: spans end at {end} of {len(call.gave)}"
    giving = {peer for peer, weight in weights.items() if weight > 0}
    lacking = {peer for span in each.spans for peer in giving - set(span.contributors)}
    if each.outcome == "complete" and (each.dropped or lacking or each.why):
        names = sorted(peer[:8] for peer in lacking | {dropped.peer for dropped in each.dropped})
        yield f"{name}: says complete without {', '.join(names) or each.why}"
    if each.outcome == "partial" and not each.why:
        yield f"{name}: is partial without a reason"


def elementwise(each: Round) -> tuple[tuple[int, int, tuple[str, ...]], ...]:
    """Who is in which elements, however the spans are cut among reducers."""
    lines: list[tuple[int, int, tuple[str, ...]]] = []
    for span in each.spans:
        if lines and lines[-1][1] == span.start and lines[-1][2] == span.contributors:
            lines[-1] = (lines[-1][0], span.stop, span.contributors)
        else:
            lines.append((span.start, span.stop, span.contributors))
    return tuple(lines)


def committed_rounds(call: Call) -> list[Round]:
    return [each for each in call.receipt.rounds if each.outcome != "alone"] if call.receipt else []


def bits(values: Floats) -> npt.NDArray[np.uint8]:
    """NaN and the two zeros included."""
    return np.ascontiguousarray(values).view(np.uint8)

"""From a Group and a vector to the averaged vector over paths that lose packets: nothing is sent twice, nobody waits.

Knows packet ranges, who owes which, and when to go on without. Does not know datagrams, how long a wait was good for
last time (`losses.py` does), how the group was found, or the clock.

Members send the owner of each span their packets of it. The owner closes its span when all packets are here, when all
senders said that they are through, or at a deadline learnt from recent rounds; estimates each range from what arrived
(`unbiased.py`) and sends the result, absolute values, to all. Who misses a range keeps its own values of it, and the
next round heals that: so members differ by a bounded drift, and there is no digest to agree on, nobody to wait for at
the end. Increments would drift for ever.

| state      | means                                                    | left by                               |
|------------|----------------------------------------------------------|---------------------------------------|
| EXCHANGING | packets go to and fro                                    | all spans over, all sent -> COMMITTED |
| COMMITTED  | the result stands; what is missing in it kept our values | (none)                                |
| FAILED     | alone, out of time, nobody has weight; values untouched  | (none)                                |

A range of which nothing arrived from anybody is asked for again, once, over the reliable streams (`RangesWanted`); so
is everything of a member whose every packet is lost while its messages come. Where the door finds that no datagram
passes between two, all they have for each other goes over those streams. What even so does not come stays as it was and
is told: it is never zero.

In groups that change, members go on with one carried weight, which cannot say which ranges somebody missed: where
weights differ the averages travel over the reliable streams. Owners that stay (shards.py) use each half alone:
`Part.SCATTER` for gradients, `Part.GATHER` for what their owner made of them; also where nothing may be lost. Then
everything travels over the reliable streams and is waited for until the caller's time is up: means are exact, and after
a gather all hold the same bits and the same digest.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import partial

import numpy as np

from moshpitd.averaging.all_reduce import Outgoing, checksums
from moshpitd.averaging.codecs import Codec, Coding
from moshpitd.averaging.effects import CloseStreams, Compute, Effect, Log, OpenStreams, Send, Sendable
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.losses import Deadline, LinkLosses
from moshpitd.averaging.messages import Chunk, Group, LossyMessage, PathReport, RangesWanted, ReductionMessage
from moshpitd.averaging.names import PeerId, Rank, digest, short
from moshpitd.averaging.partition import pieces_of
from moshpitd.averaging.ranges import (
    Cut,
    Numbers,
    Packets,
    Ranges,
    Rows,
    Slots,
    encode_ranges,
    non_finite_ranges,
    payload_bytes,
)
from moshpitd.averaging.receipt import STALE_TOLD_MAX, DroppedLine, LossyLine, LostLine, SpanLine
from moshpitd.averaging.transport import BLOCKED_TOLD_MAX
from moshpitd.averaging.unbiased import Flags, Form, Heard, estimate
from moshpitd.averaging.vector import DTYPES, Floats, Vector, first_non_finite
from moshpitd.averaging.weighted_mean import scaled_weights

LAST_JOBS_SHARE = 0.1
BLOCKED_PACKETS = 10
"""So many packets in a row are not lost by chance where others get through: 1 in 1,000 at half lost."""


@dataclass(frozen=True, slots=True)
class LossyConfig:
    """When a lossy round goes on without what may be lost. How long it waits for it is learnt: see DeadlineConfig."""

    reorder_s: float = 0.005
    """A sender said it is through: packets that others overtook may still come for so long."""
    repair_s: float = 2.0
    """Ranges asked for over the reliable streams are waited for so long; where packets are lost those are slow ..."""
    repair_more_s: float = 0.02
    """... and so long when each came from somebody: who is late by chance is as good as lost, the estimate does not
    lean for it. Waiting for all would cost most rounds a retransmission of somebody's."""
    left_s: float = 0.25
    """One that left, or whose connection broke, may have done all it owed us: its last packets, and the word that they
    were the last, are waited for so long."""
    last_jobs_s: float = 0.5
    """So long before the caller's time is up, or a tenth of it, nothing is waited for any more but our own jobs."""
    again_s: float = 600.0
    """A path on which no datagram passed is believed to be blocked for so long."""
    still_s: float = 5.0
    """Averages that come over the reliable streams are waited for as long as they move: never longer than this without
    any, once our own span is closed."""


class Phase(IntEnum):
    """What a packet holds."""

    CONTRIBUTION = 0
    AVERAGE = 1


class Part(Enum):
    """Which halves of an all-reduce are done."""

    BOTH = "all-reduce"
    SCATTER = "reduce-scatter"
    """Each owner's result holds the estimate of its own span; nothing else of it is written."""
    GATHER = "all-gather"
    """Owners give their values of their spans as they are."""


class State(Enum):
    """See the table above."""

    EXCHANGING = "exchanging"
    COMMITTED = "committed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Paths:
    """What is known of the paths to others; one a session, outlives its rounds."""

    losses: LinkLosses = field(default_factory=LinkLosses)
    scatter: Deadline = field(default_factory=Deadline)
    gather: Deadline = field(default_factory=Deadline)
    round_trips_s: dict[PeerId, float] = field(default_factory=dict)
    blocked: dict[PeerId, float] = field(default_factory=dict)
    """Between whom and us no datagram passed, and until when that is believed."""

    def report(self, now: float) -> PathReport:
        """What the leader of our next group should know."""
        for peer in [peer for peer, until in self.blocked.items() if until <= now]:
            del self.blocked[peer]
        return PathReport(
            packets=self.losses.packets,
            loss=self.losses.worst,
            round_trip_s=max(self.round_trips_s.values(), default=0.0),
            blocked=tuple(sorted(self.blocked)[:BLOCKED_TOLD_MAX]),
        )

    def forget(self, peers: Iterable[PeerId]) -> None:
        """They left for good."""
        peers = list(peers)
        self.losses.forget(peers)
        for peer in peers:
            self.round_trips_s.pop(peer, None)
            self.blocked.pop(peer, None)


@dataclass(frozen=True, slots=True)
class Burst:
    """Packets to put on the wire, of one cut: `encode()` makes them (a chunk of work). Numbers count over the vector,
    so that sequence numbers are those less `span_first`, of `span_count`."""

    phase: Phase
    span: Rank
    """Whose span it is."""
    span_first: int
    span_count: int
    cut: Cut
    encode: Callable[[], list[Packets]]
    ends: bool
    """Nothing follows for this member in this phase."""


@dataclass(frozen=True, slots=True)
class LinkLoss:
    """What a round showed of one link to us."""

    rank: Rank
    sent: int
    """Packets, of both halves."""
    lost: int
    is_blocked: bool
    """Nothing came over UDP, everything was asked for again."""


class LossyReduce:
    """One member's part in one group. `values` is read until the commit, `result` written; they must not overlap."""

    def __init__(
        self,
        group: Group,
        rank: Rank,
        *,
        values: Vector,
        result: Vector,
        codec: Codec,
        paths: Paths,
        config: LossyConfig,
        now: float,
        deadline: float = math.inf,
        part: Part = Part.BOTH,
        form: Form = Form.DIFFERENCE,
        is_reliable: bool = False,
    ) -> None:
        """`deadline`: when our own caller's time is up. `is_reliable`: nothing is lost, the reliable streams carry all;
        of one half only, both together are an AllReduce."""
        assert part is not Part.BOTH or not is_reliable
        self.group = group
        self.rank = rank
        self.state = State.EXCHANGING
        self.why = ""
        self.form = form
        self.is_reliable = is_reliable
        self.bytes_sent = 0
        self.bytes_received = 0
        self.duplicates = 0
        """Packets that came again: ignored."""
        self.late = 0
        """Packets that came when their span was closed: ignored."""
        self.repaired = 0
        """Ranges of our span of which nothing had arrived, and that were repaired."""
        self.unrepaired = 0
        """... and that were not: nobody has an average of them."""
        self.transports: dict[Rank, str] = {}
        """Over what reliable chunks travel between each member and us, as its door tells."""
        self._values = values
        self._result = result
        self._codec = codec
        self._paths = paths
        self._config = config
        self._part = part
        self._effects: list[Effect] = []
        self._began = now

        n = len(group.members)
        self._weights = scaled_weights([member.weight for member in group.members])
        contributors = [Rank(r) for r in range(n) if self._weights[r] > 0]
        self._live = {Rank(r) for r in range(n)}
        self._dropped: dict[Rank, str] = {}
        self._leaving: dict[Rank, tuple[float, str]] = {}
        """Who left, as the door found out: until when what they owe us may come, and why they are dropped then."""
        self._ranges = Ranges(pieces_of(values.layout, group.spans, group.chunk_bytes), codec)
        self._own = [cut for cut in self._ranges.cuts if cut.piece.reducer == rank]
        self._own_first, own_stop = self._ranges.span(rank)
        self._left_to_make = {cut.first for cut in self._own}
        """Own cuts without an average, by their first range."""
        self._making: set[int] = set()
        self._has_averages = part is not Part.SCATTER
        self.averages_reliable = part is Part.BOTH and len({self._weights[r] for r in contributors}) > 1
        """The averages travel over the reliable streams, because weights differ."""

        self._contributions: dict[Rank, Inbound] = {}
        if part is not Part.GATHER:
            for r in contributors:
                if r != rank and self._own:
                    self._contributions[r] = Inbound(self._ranges, codec.contribution, self._own_first, own_stop)
        self._averages: dict[Rank, Inbound] = {}
        if self._has_averages:
            for r in self._others():
                first, stop = self._ranges.span(r)
                if stop > first:
                    self._averages[r] = Inbound(self._ranges, codec.average, first, stop)
        # What a newcomer keeps of its own is worth nothing: it gets all.
        is_new = [self._has_averages and weight <= 0 for weight in self._weights]
        self._need_all = {Rank(r) for r in range(n) if self.averages_reliable or is_new[r]}
        """To whom averages travel over the reliable streams."""
        for stream in self._averages.values():
            stream.is_reliable = is_reliable or rank in self._need_all
        for stream in self._contributions.values():
            stream.is_reliable = is_reliable
        self._is_closed = False
        """Of our span nothing is waited for but repairs."""
        self._blocked: set[Rank] = set(self._others()) if is_reliable else set()
        """Whose packets do not arrive, by what we see ..."""
        self._cut_off: set[Rank] = set(self._blocked)
        """... or by what our door sees: what we have for them goes over the reliable streams too."""
        self._repair_until = math.inf
        self._stale: list[tuple[int, int]] = []
        self._checksums: dict[int, bytes] = {}
        """Of our result, where all hold the same, by the first range of each cut."""

        self._bursts: dict[Rank, deque[Burst]] = {r: deque() for r in self._others()}
        self._reliable: dict[Rank, deque[Outgoing]] = {r: deque() for r in self._others()}
        self._pulls = self._pulls_seen = 0
        self._moved_at = now
        """Since when nothing of ours was pulled: once all else is done, one that takes nothing is not waited for."""
        self._in_hand: set[tuple[Rank, bool]] = set()
        """Whose door pulled something, a burst or not, and may not have put it on the wire."""
        self._resent: set[Rank] = set(self._blocked)
        self._jobs: dict[int, Callable[[object], None]] = {}
        self._next_job = 0
        self._elements_sent = 0

        scatter_bytes = sum(stream.size for stream in self._contributions.values())
        gather_bytes = sum(stream.size for stream in self._averages.values())
        self._sizes = scatter_bytes, gather_bytes
        self._close_at = math.inf if is_reliable else now + paths.scatter.seconds(scatter_bytes)
        self._closed_at = self._gather_until = math.inf
        """The others close their spans by `_close_at` too, as far as we can know."""
        self._may_ask: set[Rank] = set()
        """Owners that may want ranges of ours again: in a scatter nothing else tells that they are done."""
        self._may_ask_until = math.inf
        self._is_enough_told = False
        if part is Part.SCATTER and not is_reliable and self._weights[rank] > 0:
            self._may_ask = {r for r in self._others() if group.spans[r] < group.spans[r + 1]}
        self._deadline = min(now + group.budget_s, deadline)
        self._last_call = self._deadline - min(config.last_jobs_s, LAST_JOBS_SHARE * (self._deadline - now))
        """What is not here by then is not waited for: it is time for the last jobs."""
        self._is_out_of_time = False
        self._emit(OpenStreams(group, rank, "" if is_reliable else codec.name))
        halves = "" if part is Part.BOTH else f", {part.value}"
        kind = "reliable" if is_reliable else "lossy"
        self._log(f"reducing, {kind}{halves}: group of {n}, rank {rank}, {self._ranges.total} packet ranges")
        if part is not Part.GATHER and not contributors:
            self._become_failed("nobody in the group has any weight")
            return
        if part is not Part.GATHER and self._weights[rank] > 0:
            self._queue_contributions()
        for other in self._others():  # as the header says, so that both ends know it
            one, two = group.members[rank], group.members[other]
            if two.peer in one.paths.blocked or one.peer in two.paths.blocked:
                self._cut_path(other)
        if part is Part.GATHER:
            for cut in self._own:
                self._give(cut)
        self._go_on(now)

    # ---- what the owner reads

    @property
    def result(self) -> Vector | None:
        """The averages, and our own values where none came, once committed."""
        return self._result if self.state is State.COMMITTED else None

    @property
    def codec_name(self) -> str:
        return self._codec.name

    @property
    def digest(self) -> bytes:
        """None where what members hold may differ."""
        if not self._same_at_all:
            return b""
        return digest("averages", self.codec_name, *(self._checksums[first] for first in sorted(self._checksums)))

    @property
    def bits_per_element(self) -> float:
        """Of what we sent; 0 while that is nothing."""
        return 8 * self.bytes_sent / self._elements_sent if self._elements_sent else 0.0

    @property
    def relative_error(self) -> float:
        """Not measured."""
        return 0.0

    @property
    def finished(self) -> bool:
        return self.state is not State.EXCHANGING

    @property
    def idle(self) -> bool:
        """No job of ours runs any more: buffers may go."""
        return not self._jobs

    def may_write_to(self, vector: Vector) -> bool:
        """Whether it is our result and not yet let go."""
        return vector is self._result and not (self.finished and self.idle)

    @property
    def live(self) -> tuple[Rank, ...]:
        return tuple(sorted(self._live))

    @property
    def survivors(self) -> tuple[Rank, ...]:
        """Who was there to the end, ourselves among them; nobody before that."""
        return self.live if self.state is State.COMMITTED else ()

    @property
    def group_id(self) -> bytes:
        """One id at all members, though their bits may differ: a lossy round has no digest."""
        if self._same_at_all:
            return digest("group", self.group.group_id, *self.live)[:16]
        return digest("lossy group", self.group.group_id)[:16]

    @property
    def _same_at_all(self) -> bool:
        """A gather that lost nothing: everybody holds what the owners gave."""
        return self.is_reliable and self._has_averages and self.state is State.COMMITTED and not self._stale

    @property
    def is_complete(self) -> bool:
        """Everybody was heard, and every range of our own span has an average."""
        kept_back = self.is_reliable and self._stale
        return self.state is State.COMMITTED and not (self.why or self._dropped or self.unrepaired or kept_back)

    def stale(self) -> list[tuple[int, int]]:
        """Elements [start, stop) that kept our own values; to be asked when it has committed."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(self._stale):
            if merged and merged[-1][1] == start:
                start, _ = merged.pop()
            merged.append((start, stop))
        return merged

    def link_losses(self) -> list[LinkLoss]:
        """What was lost on the way to us, by member."""
        lines: list[LinkLoss] = []
        for rank in [] if self.is_reliable else self._others():
            streams = [stream for stream in self._streams_of(rank) if not stream.is_reliable]
            if rank in self._blocked:
                lines.append(LinkLoss(rank, 0, 0, is_blocked=True))
            elif streams:
                sent, lost = sum(stream.total for stream in streams), sum(stream.lost_on_the_way for stream in streams)
                lines.append(LinkLoss(rank, sent, lost, is_blocked=False))
        return lines

    @property
    def by_packets(self) -> list[Rank]:
        """With whom values travelled as packets."""
        return [rank for rank in self._others() if rank not in self._blocked]

    def lossy_line(self) -> LossyLine:
        """For the receipt."""
        stale = self.stale()
        told = sorted(sorted(stale, key=lambda run: run[0] - run[1])[:STALE_TOLD_MAX])
        return LossyLine(
            estimator=self.form.value,
            links=tuple(
                LostLine(self.group.members[line.rank].peer, line.sent, line.lost, line.is_blocked)
                for line in self.link_losses()
            ),
            ranges=self._ranges.total,
            repaired=self.repaired,
            unrepaired=self.unrepaired,
            stale=tuple(told),
            stale_elements=sum(stop - start for start, stop in stale),
            deadline_s=self._close_at - self._began,
            late=self.late,
            duplicates=self.duplicates,
        )

    def span_lines(self) -> tuple[SpanLine, ...]:
        """By span, who reduced it; of our own, from whom anything came. What others heard only they know."""
        peers = [member.peer for member in self.group.members]
        lines: list[SpanLine] = []
        for rank, peer in enumerate(peers):
            start, stop = self.group.spans[rank], self.group.spans[rank + 1]
            heard = [
                r
                for r in range(len(peers))
                if self._weights[r] > 0 and r not in self._dropped and (rank != self.rank or self._came_from(r))
            ]
            if self._part is Part.GATHER:
                heard = [rank]
            if stop > start:
                lines.append(SpanLine(peer, start, stop, tuple(peers[r] for r in heard)))
        return tuple(lines)

    def dropped_lines(self) -> tuple[DroppedLine, ...]:
        return tuple(DroppedLine(self.group.members[rank].peer, why) for rank, why in sorted(self._dropped.items()))

    def fraction_done(self) -> float:
        streams = [*self._contributions.values(), *self._averages.values()]
        total = sum(stream.total for stream in streams)
        return sum(stream.total - stream.lost for stream in streams) / max(1, total)

    def packets_expected(self, phase: Phase, sender: Rank) -> int:
        """How many sequence numbers this member has for us in this phase."""
        stream = self._stream(phase, sender)
        return stream.total if stream else 0

    # ---- inputs

    def receive(self, message: LossyMessage | ReductionMessage, sender: Rank, now: float) -> None:
        """A message of the sender proved by its channel. Raises RemoteProtocolError for nonsense."""
        if not isinstance(message, RangesWanted):
            raise RemoteProtocolError(f"{self._name(sender)} takes a lossy round for a reliable one")
        if message.enough:
            self._may_ask.discard(sender)
            self._go_on(now)
            return
        first, stop = self._ranges.span(sender)
        numbers = message.ranges or tuple(range(first, stop))
        if list(numbers) != sorted(set(numbers)) or not all(first <= number < stop for number in numbers):
            raise RemoteProtocolError(f"{self._name(sender)} wants ranges that are not its own")
        if self.finished or self._part is Part.GATHER or self._weights[self.rank] <= 0:
            return
        if sender in self._leaving or (sender in self._resent and sender in self._blocked):
            return  # nobody waits for it, or all of it is on its way
        if sender in self._resent:
            raise RemoteProtocolError(f"{self._name(sender)} wants ranges a second time")
        self._resent.add(sender)
        for run in _runs(numbers):
            self._resend(sender, run)
        self._emit(Sendable(self.group.group_id, sender))

    def packets_received(
        self, phase: Phase, sender: Rank, sequences: Numbers, offsets: Numbers, rows: Rows, now: float
    ) -> None:
        """Packets of equal size, by their sequence numbers in the sender's stream; `offsets`: the first element of
        each. `rows` is copied. Raises RemoteProtocolError for nonsense."""
        stream = self._stream(phase, sender)
        if stream is None or not len(sequences):
            return
        if int(sequences.min()) < 0 or int(sequences.max()) >= stream.total:
            raise RemoteProtocolError(f"{self._name(sender)} sent packet {int(sequences.max())} of {stream.total}")
        self.bytes_received += rows.size
        if self.finished or sender not in self._live:
            return
        stream.last_at = now
        if stream.is_over:
            self.late += len(sequences)
            stream.late += len(sequences)
            return
        numbers = sequences + stream.first
        while len(numbers):
            cut = self._ranges.cut_of(int(numbers[0]))
            here = (numbers >= cut.first) & (numbers < cut.stop)
            if not np.array_equal(offsets[here], cut.piece.start + (numbers[here] - cut.first) * cut.range_elements):
                raise RemoteProtocolError(f"{self._name(sender)} cuts the vector otherwise")
            self.duplicates += stream.put(cut, Packets(numbers[here], rows[here]))
            self._look_at(phase, cut, stream)
            numbers, offsets, rows = numbers[~here], offsets[~here], rows[~here]
        self._go_on(now)

    def stream_ended(self, phase: Phase, sender: Rank, now: float) -> None:
        """The sender put its last packet of this phase on the wire. Told more than once, since it may be lost."""
        stream = self._stream(phase, sender)
        if stream is not None and stream.ended_at is None:
            stream.ended_at = now
            self._go_on(now)

    def chunk_received(self, chunk: Chunk, sender: Rank, now: float) -> None:
        """Ranges over the reliable streams, as many as the payload holds from number `chunk.index` on. Raises
        RemoteProtocolError for nonsense."""
        phase = Phase.AVERAGE if chunk.is_average else Phase.CONTRIBUTION
        stream = self._stream(phase, sender)
        if stream is None or not stream.first <= chunk.index < stream.first + stream.total:
            raise RemoteProtocolError(f"{self._name(sender)} sent ranges that are not its to send")
        self.bytes_received += len(chunk.payload)
        if self.finished or sender not in self._live:
            return
        if stream.is_reliable:
            stream.last_at = now
        cut = self._ranges.cut_of(chunk.index)
        for packets in _packets_from(chunk.payload, cut, chunk.index, stream.coding):
            if phase is Phase.AVERAGE and stream.is_over:
                self.late += len(packets.numbers)
            else:
                stream.put(cut, packets, repaired=True)
        if not stream.is_reliable and self._is_closed and self._wanted() and not self._lacks_all():
            self._repair_until = min(self._repair_until, now + self._config.repair_more_s)
        self._look_at(phase, cut, stream)
        self._go_on(now)

    def compute_finished(self, job_id: int, value: object, now: float) -> None:
        """The value of a job asked for by a Compute effect."""
        then = self._jobs.pop(job_id)
        if not self.finished:
            then(value)
            self._go_on(now)

    def suspect(self, rank: Rank, why: str, now: float) -> None:
        """This member does not go on, as the door found out. It may be through and have left."""
        if self.finished or rank not in self._live or rank == self.rank or rank in self._leaving:
            return
        self._leaving[rank] = now + self._config.left_s, why
        self._bursts[rank].clear()
        self._reliable[rank].clear()
        self._in_hand -= {(rank, False), (rank, True)}
        for stream in self._streams_of(rank):
            stream.wanted[:] = False
        self._go_on(now)

    def _drop(self, rank: Rank, why: str, now: float) -> None:
        """What it owes us will not come."""
        self._live.discard(rank)
        self._dropped[rank] = why
        self._log(f"goes on without {self._name(rank)}: {why}")
        if self._live == {self.rank}:
            self._become_failed("everybody else is gone")
            return
        for cut in self._own:
            self._make_if_exact(cut)

    def handle_timer(self, now: float) -> None:
        if not self.finished:
            self._go_on(now)

    def next_deadline(self) -> float | None:
        if self.finished:
            return None
        moments = [self._deadline if self._is_out_of_time else self._last_call]
        if not self._is_closed:
            moments.append(min(self._close_at, self._scatter_through_at()))
        elif self._wanted():
            moments.append(self._repair_until)
        for stream in self._averages.values():
            if not stream.is_over:
                moments.append(min(self._through_at(stream), self._given_up_at(stream)))
        moments += [until for rank, (until, _) in self._leaving.items() if self._owes(rank)]
        moments.append(self._moved_at + self._config.still_s)
        if self._is_closed and self._asking():
            moments.append(self._may_ask_until)
        return min(moments, default=None)

    def next_burst(self, rank: Rank) -> Burst | None:
        """The next packets for this member; None until the bell rings."""
        burst = self._bursts[rank].popleft() if self._bursts[rank] else None
        self._in_hand.discard((rank, True))
        if burst is not None:
            self._pulls += 1
            self._in_hand.add((rank, True))
            coding = self._codec.average if burst.phase is Phase.AVERAGE else self._codec.contribution
            self.bytes_sent += _coded_bytes(coding, burst.cut)
            self._elements_sent += burst.cut.piece.stop - burst.cut.piece.start
        return burst

    def next_outgoing(self, rank: Rank) -> Outgoing | None:
        """The next ranges for this member over the reliable streams; None until the bell rings."""
        outgoing = self._reliable[rank].popleft() if self._reliable[rank] else None
        self._in_hand.discard((rank, False))
        if outgoing is None:
            return None
        self._pulls += 1
        self._in_hand.add((rank, False))
        return Outgoing(outgoing.chunk, partial(self._counted, outgoing))

    def pulled_dry(self, now: float) -> None:
        """A pull brought nothing: the door is done with what it pulled before, which may have been the last."""
        self._go_on(now)

    def path_measured(self, rank: Rank, round_trip_s: float) -> None:
        """How long a datagram and its answer took, at best."""
        self._paths.round_trips_s[self.group.members[rank].peer] = round_trip_s

    def path_blocked(self, rank: Rank, now: float) -> None:
        """No datagram passes between this member and us: from here on everything goes over the reliable streams."""
        if self.finished or rank in self._cut_off or rank not in self._live:
            return
        self._log(f"no datagram passes between {self._name(rank)} and us: the reliable streams carry all")
        self._cut_path(rank)
        self._go_on(now)

    def _cut_path(self, rank: Rank) -> None:
        self._cut_off.add(rank)
        self._blocked.add(rank)
        for stream in self._streams_of(rank):
            stream.is_reliable = True
        bursts, self._bursts[rank] = self._bursts[rank], deque()
        self._resent.add(rank)
        self._in_hand.discard((rank, True))
        for burst in bursts:
            if burst.phase is Phase.AVERAGE:
                self._reliable[rank].extend(_chunks_of(burst.encode()))
            else:
                self._resend(rank, range(burst.cut.first, burst.cut.stop))
        self._emit(Sendable(self.group.group_id, rank))

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    # ---- what is over, and what follows

    def _go_on(self, now: float) -> None:
        """Everything that a packet, a job or a moment may have brought about."""
        if self.finished:
            return
        if now >= self._deadline:
            self._become_failed("time ran out before what had come was worked off")
            return
        self._is_out_of_time = is_out_of_time = now >= self._last_call
        for rank, (until, why) in list(self._leaving.items()):
            if rank in self._live and now >= until and self._owes(rank):
                self._drop(rank, why, now)
                if self.finished:
                    return
        if not self._is_closed and (is_out_of_time or now >= min(self._close_at, self._scatter_through_at())):
            self._close(now)
        if self._is_closed and (is_out_of_time or now >= self._repair_until):
            self._give_up_repair()
        if self._is_closed:
            self._make_what_can_be()
        for rank, stream in self._averages.items():
            is_late = is_out_of_time or now >= min(self._through_at(stream), self._given_up_at(stream))
            if not stream.is_over and (is_late or rank not in self._live):
                stream.is_over = True
                for cut in self._ranges.cuts:
                    if cut.piece.reducer == rank:
                        self._apply(cut, stream)
        is_done = not self._left_to_make and not self._jobs and all(s.is_over for s in self._averages.values())
        if is_done and self._part is Part.SCATTER:
            self._tell_enough()
            if is_out_of_time or now >= self._may_ask_until:
                self._may_ask.clear()
            is_done = not self._asking()
        is_sent = not any(self._has_more_for(rank) for rank in self._others())
        if not is_done or self._pulls > self._pulls_seen:
            self._pulls_seen, self._moved_at = self._pulls, now
        is_stuck = now >= self._moved_at + self._config.still_s
        if is_done and (is_sent or is_stuck or is_out_of_time):
            self._become_committed(now)

    def _has_more_for(self, rank: Rank) -> bool:
        """Whether something of ours is not on the wire that it may be waiting for."""
        streams = self._streams_of(rank)
        if (
            rank in self._blocked
            and streams
            and all(stream.is_over and stream.lost == stream.total for stream in streams)
        ):
            return False  # nothing came of it either way
        in_hand = {(rank, False), (rank, True)} & self._in_hand
        return bool(in_hand or self._bursts[rank] or self._reliable[rank])

    def _asking(self) -> set[Rank]:
        """Who may still want ranges again."""
        return (self._may_ask & self._live).difference(self._leaving)

    def _tell_enough(self) -> None:
        if not self._is_enough_told and not self.is_reliable:
            self._is_enough_told = True
            for rank in sorted(self._contributions.keys() & self._live):
                self._tell(rank, RangesWanted(self.group.group_id, (), enough=True))

    def _owes(self, rank: Rank) -> bool:
        """Whether it has something for us that is waited for."""
        return rank in self._live and any(
            stream.lost and not stream.is_over and (stream.ended_at is None or stream.is_reliable)
            for stream in self._streams_of(rank)
        )

    def _scatter_through_at(self) -> float:
        """When nothing more of our span is to come, as far as its senders said."""
        live = (stream for rank, stream in self._contributions.items() if rank in self._live)
        return max((self._through_at(stream) for stream in live), default=-math.inf)

    def _through_at(self, stream: Inbound) -> float:
        """When nothing more of it is to come, as far as its sender said."""
        if not stream.lost:
            return -math.inf
        return math.inf if stream.ended_at is None or stream.is_reliable else stream.ended_at + self._config.reorder_s

    def _given_up_at(self, stream: Inbound) -> float:
        """When averages that do not come are no longer waited for."""
        if stream.is_hopeless:
            return -math.inf
        if self.is_reliable:
            return math.inf  # our caller's time is what there is
        if not stream.is_reliable:
            # An owner that nothing came of may wait for what it asked for again.
            is_silent = stream.ended_at is None and stream.lost == stream.total
            return self._gather_until + (self._config.repair_s + self._config.left_s if is_silent else 0.0)
        if not self._is_closed:
            return math.inf
        return max(self._closed_at, stream.last_at or -math.inf) + self._config.still_s

    def _close(self, now: float) -> None:
        """Our span: from here on only repairs count."""
        self._is_closed = True
        self._closed_at = now
        self._gather_until = self._close_at + self._paths.gather.seconds(self._sizes[1])
        self._may_ask_until = max(now, self._close_at) + self._config.repair_s + self._config.left_s
        heard = {rank: stream for rank, stream in self._contributions.items() if rank in self._live}
        for rank, stream in heard.items():
            stream.is_over = True
            if rank in self._leaving:
                continue  # what it has not sent it will not send
            if rank in self._blocked:
                stream.want(np.ones(stream.total, np.bool_))  # it comes unasked, unless its door has not found out
            if stream.lost == stream.total and stream.total >= BLOCKED_PACKETS:
                self._blocked.add(rank)
                stream.want(np.ones(stream.total, np.bool_))
                self._log(f"no packet of {self._name(rank)} arrived: asks for all over the reliable streams")
                self._tell(rank, RangesWanted(self.group.group_id, ()))
            elif rank not in self._blocked:
                self._paths.losses.learn(self.group.members[rank].peer, sent=stream.total, lost=stream.lost)
        gone = self._blocked.union(self._leaving)
        usual = {rank: stream for rank, stream in heard.items() if rank not in gone}
        if usual:
            empty = ~np.any([stream.arrived for stream in usual.values()], axis=0)
            if empty.any():
                numbers = tuple(int(number) for number in np.flatnonzero(empty) + self._own_first)
                for rank, stream in usual.items():
                    stream.want(empty)
                    self._tell(rank, RangesWanted(self.group.group_id, numbers))
        if self._wanted():
            self._repair_until = now + self._config.repair_s

    def _wanted(self) -> bool:
        return any(stream.wanted.any() for rank, stream in self._contributions.items() if rank in self._live)

    def _lacks_all(self) -> bool:
        """Whether something is wanted that nobody has sent again so far, or everything of somebody."""
        streams = [stream for rank, stream in self._contributions.items() if rank in self._live]
        wanted = np.any([stream.wanted for stream in streams], axis=0)
        arrived = np.any([stream.arrived for stream in streams], axis=0)
        return bool(self._blocked) or bool((wanted & ~arrived).any())

    def _give_up_repair(self) -> None:
        lacks = self._wanted() and self._lacks_all()
        for rank, stream in self._contributions.items():
            if stream.wanted.any() and rank in self._live and lacks:
                self._log(f"{self._name(rank)} did not send {int(stream.wanted.sum())} ranges again in time")
                if stream.lost == stream.total and rank in self._averages:
                    self._averages[rank].is_hopeless = True
            stream.wanted[:] = False

    def _make_what_can_be(self) -> None:
        if not self._left_to_make:  # asked with every packet
            return
        live = (stream for rank, stream in self._contributions.items() if rank in self._live)
        wanting = [stream for stream in live if stream.wanted.any()]
        for cut in self._own:
            at = slice(cut.first - self._own_first, cut.stop - self._own_first)
            if not any(stream.wanted[at].any() for stream in wanting):
                self._make(cut)

    def _look_at(self, phase: Phase, cut: Cut, stream: Inbound) -> None:
        """Packets of this cut came."""
        if phase is Phase.CONTRIBUTION:
            self._make_if_exact(cut)
        elif cut.first in stream.slots and stream.left(cut) == 0:
            self._apply(cut, stream)

    def _become_committed(self, now: float) -> None:
        assert self.state is State.EXCHANGING
        self.state = State.COMMITTED
        for deadline, streams, since, size in (
            (self._paths.scatter, self._contributions, self._began, self._sizes[0]),
            (self._paths.gather, self._averages, self._closed_at, self._sizes[1]),
        ):
            last = [s.last_at for s in streams.values() if s.last_at is not None and not s.is_reliable]
            if last:
                deadline.learn(max(0.0, max(last) - since), size)
        self._account(now)
        lost = sum(line.lost for line in self.link_losses())
        sent = sum(line.sent for line in self.link_losses())
        self._log(f"reducing -> committed: {lost} of {sent} packets lost, {self.repaired} ranges repaired")
        self._release()

    def _account(self, now: float) -> None:
        """Who was not heard at all, and between whom and us no datagram passes."""
        for half, what in ((self._contributions, "nothing of its values"), (self._averages, "no average of its span")):
            for rank, stream in half.items():
                every = self._streams_of(rank)
                is_chance = sum(each.total for each in every) < BLOCKED_PACKETS or any(e.arrived.any() for e in every)
                if stream.total and stream.lost == stream.total and (stream.ended_at is None or not is_chance):
                    self._dropped.setdefault(rank, f"{what} came in time")
        for rank in [] if self.is_reliable else self._others():  # no packet was tried there
            peer, streams = self.group.members[rank].peer, self._streams_of(rank)
            if rank not in self._blocked:
                if any(stream.arrived.any() and not stream.is_reliable for stream in streams):
                    self._paths.blocked.pop(peer, None)
            # Else it stood still, or is dead; and where packets came after all, we stood still.
            elif any(stream.repaired.any() for stream in streams) and not any(stream.late for stream in streams):
                self._paths.blocked.setdefault(peer, now + self._config.again_s)
        streams = [*self._contributions.values(), *self._averages.values()]
        if self._is_out_of_time and any(stream.lost for stream in streams):
            self.why = self.why or "the time was over before all was here"

    def _become_failed(self, why: str) -> None:
        assert self.state is State.EXCHANGING
        self.state = State.FAILED
        self.why = why
        self._log(f"reducing -> failed: {why}")
        self._release()

    def _release(self) -> None:
        for stream in (*self._contributions.values(), *self._averages.values()):
            stream.slots.clear()
        for rank in self._others():
            self._bursts[rank].clear()
            self._reliable[rank].clear()
        self._emit(CloseStreams(self.group.group_id))

    # ---- averages of our span

    def _make_if_exact(self, cut: Cut) -> None:
        """All of it is here: no need to know who will be heard of the rest."""
        streams = [stream for rank, stream in self._contributions.items() if rank in self._live]
        if self._part is not Part.GATHER and all(stream.left(cut) == 0 for stream in streams):
            self._make(cut)

    def _make(self, cut: Cut) -> None:
        if cut.first not in self._left_to_make or cut.first in self._making or self._part is Part.GATHER:
            return
        self._making.add(cut.first)
        at = slice(cut.first - self._own_first, cut.stop - self._own_first)
        senders = [
            rank for rank, stream in self._contributions.items() if rank in self._live or stream.arrived[at].any()
        ]
        if self._is_closed:  # those who never came are not lossy, they are absent
            senders = [rank for rank in senders if self._contributions[rank].arrived.any() or rank not in self._blocked]
        peers = [self.group.members[rank].peer for rank in senders]
        entries: list[Entry] = []
        for rank in sorted([*senders, self.rank]):
            coordinate = self.group.members[rank].coordinate
            if rank == self.rank:
                entries.append(Entry(rank, coordinate, self._weights[rank], 0.0, None, np.ones(cut.count, np.bool_)))
                continue
            stream = self._contributions[rank]
            slots = stream.slots.pop(cut.first, None) or Slots(cut, stream.coding)
            loss, arrived = self._paths.losses.of(self.group.members[rank].peer, peers), stream.arrived[at].copy()
            entries.append(Entry(rank, coordinate, self._weights[rank], loss, slots, arrived))
        empty = self._contributions and not np.any([e.arrived for e in entries if e.slots], axis=0).all()
        if self._contributions and not self.is_reliable:
            self.repaired += int(np.any([s.repaired[at] for s in self._contributions.values()], axis=0).sum())
        if empty:
            self._log(f"ranges {cut.first}..{cut.stop} lack what nobody could send again")
        piece = cut.piece
        job = partial(
            estimate_cut,
            cut,
            entries,
            self._values.elements(piece.start, piece.stop),
            self._result.elements(piece.start, piece.stop),
            self._codec.average if self._has_averages else None,
            self.form,
        )
        self._compute(job, piece.byte_size * len(entries), partial(self._made, cut, entries))

    def _made(self, cut: Cut, entries: Sequence[Entry], value: object) -> None:
        assert isinstance(value, Estimated)
        for place, why in value.refused:
            self._dropped.setdefault(entries[place].rank, why)
            self._log(f"ignores what {self._name(entries[place].rank)} sent: {why}")
        self.unrepaired += int(np.count_nonzero(~value.known))
        self._note_what_is_here(cut, value.known)
        self._left_to_make.discard(cut.first)
        self._publish(cut, value.packets)

    def _give(self, cut: Cut) -> None:
        """Our values of our own span are the averages."""
        piece = cut.piece
        values, output = self._values.elements(piece.start, piece.stop), self._result.elements(piece.start, piece.stop)
        self._making.add(cut.first)
        job = partial(code_cut, cut, values, output, self._codec.average)
        self._compute(job, piece.byte_size, partial(self._made, cut, ()))

    def _publish(self, cut: Cut, packets: list[Packets]) -> None:
        if not self._has_averages:
            return
        first, stop = self._ranges.span(self.rank)
        for rank in self._others():
            if rank not in self._live or rank in self._leaving:
                continue
            if rank in self._need_all or rank in self._blocked:
                self._reliable[rank].extend(_chunks_of(packets))
            else:
                self._bursts[rank].append(
                    Burst(Phase.AVERAGE, self.rank, first, stop - first, cut, lambda: packets, not self._left_to_make)
                )
            self._emit(Sendable(self.group.group_id, rank))

    # ---- what we send of ours

    def _queue_contributions(self) -> None:
        for rank in self._others():
            cuts = [cut for cut in self._ranges.cuts if cut.piece.reducer == rank]
            first, stop = self._ranges.span(rank)
            if self.is_reliable:
                self._resend(rank, range(first, stop))
                self._emit(Sendable(self.group.group_id, rank))
                continue
            for cut in cuts:
                encode = partial(self._encode, cut, cut.first, cut.stop)
                self._bursts[rank].append(
                    Burst(Phase.CONTRIBUTION, rank, first, stop - first, cut, encode, cut is cuts[-1])
                )
            if cuts:
                self._emit(Sendable(self.group.group_id, rank))

    def _encode(self, cut: Cut, first: int, stop: int) -> list[Packets]:
        values = self._values.elements(cut.piece.start, cut.piece.stop)
        return encode_ranges(self._codec.contribution, cut, values, first, stop)

    def _resend(self, rank: Rank, run: range) -> None:
        """A run of ranges, cut by cut."""
        start = run.start
        while start < run.stop:
            cut = self._ranges.cut_of(start)
            stop = min(run.stop, cut.stop)
            encode = partial(self._encode_joined, cut, start, stop)
            self._reliable[rank].append(Outgoing(Chunk(start, 0, b"", is_average=False), encode))
            start = stop

    def _counted(self, outgoing: Outgoing) -> bytes | memoryview:
        code = outgoing.encode()
        cut = self._ranges.cut_of(outgoing.chunk.index)
        self.bytes_sent += len(code)
        self._elements_sent += (
            len(code)
            * cut.range_elements
            // payload_bytes(
                self._codec.average if outgoing.chunk.is_average else self._codec.contribution, cut, cut.first
            )
        )
        return code

    def _encode_joined(self, cut: Cut, first: int, stop: int) -> bytes:
        return b"".join(packets.rows.tobytes() for packets in self._encode(cut, first, stop))

    # ---- averages of others

    def _apply(self, cut: Cut, stream: Inbound) -> None:
        """Write what is here of this cut to the result, and our own values where nothing is."""
        if cut.first in stream.applied:
            return
        stream.applied.add(cut.first)
        at = slice(cut.first - stream.first, cut.stop - stream.first)
        piece = cut.piece
        job = partial(
            apply_cut,
            cut,
            stream.slots.pop(cut.first, None),
            stream.arrived[at].copy(),
            self._values.elements(piece.start, piece.stop),
            self._result.elements(piece.start, piece.stop),
        )
        self._compute(job, piece.byte_size, partial(self._applied, cut))

    def _applied(self, cut: Cut, value: object) -> None:
        assert isinstance(value, Applied)
        for why in value.refused:
            self._dropped.setdefault(cut.piece.reducer, why)
        self._note_what_is_here(cut, value.known)

    def _note_what_is_here(self, cut: Cut, known: Flags) -> None:
        if self.is_reliable and self._has_averages:
            self._checksums[cut.first] = checksums(self._result.elements(cut.piece.start, cut.piece.stop))
        for run in _runs(int(number) + cut.first for number in np.flatnonzero(~known)):
            self._stale.append((cut.elements(run.start)[0], cut.elements(run.stop - 1)[1]))

    # ---- small things

    def _stream(self, phase: Phase, sender: Rank) -> Inbound | None:
        return (self._averages if phase is Phase.AVERAGE else self._contributions).get(sender)

    def _streams_of(self, rank: Rank) -> list[Inbound]:
        return [streams[rank] for streams in (self._contributions, self._averages) if rank in streams]

    def _came_from(self, rank: int) -> bool:
        if rank == self.rank:
            return True
        stream = self._contributions.get(Rank(rank))
        return stream is not None and bool(stream.arrived.any())

    def _others(self) -> list[Rank]:
        return [Rank(r) for r in range(len(self.group.members)) if r != self.rank]

    def _compute(self, job: Callable[[], object], cost_bytes: int, then: Callable[[object], None]) -> None:
        self._next_job += 1
        self._jobs[self._next_job] = then
        self._emit(Compute(self.group.group_id, self._next_job, job, cost_bytes))

    def _tell(self, rank: Rank, message: LossyMessage) -> None:
        member = self.group.members[rank]
        self._emit(Send(member.peer, member.address if member.dialable else "", message))

    def _name(self, rank: Rank) -> str:
        return short(self.group.members[rank].peer)

    def _log(self, text: str) -> None:
        self._emit(Log(f"round {self.group.k}.{self.group.j} {text}"))

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)


class Inbound:
    """The packets of one span from one sender."""

    def __init__(self, ranges: Ranges, coding: Coding, first: int, stop: int) -> None:
        self.coding = coding
        self.first = first
        self.total = self.lost = stop - first
        """Packets, and how many of them are not here so far."""
        self.size = sum(_coded_bytes(coding, cut) for cut in ranges.cuts if first <= cut.first < stop)
        self.arrived: Flags = np.zeros(self.total, np.bool_)
        self.repaired: Flags = np.zeros(self.total, np.bool_)
        """What came over the reliable streams."""
        self.wanted: Flags = np.zeros(self.total, np.bool_)
        """What was asked for over the reliable streams and is not here."""
        self.slots: dict[int, Slots] = {}
        """By the first range of their cut; decoded ones are gone."""
        self.applied: set[int] = set()
        self.late = 0
        """Packets that came when it was over."""
        self.is_over = False
        self.is_hopeless = False
        """Its sender did not answer when it was asked: what is not here will not come."""
        self.is_reliable = False
        """It comes over the reliable streams: its end on UDP says nothing."""
        self.ended_at: float | None = None
        self.last_at: float | None = None

    @property
    def lost_on_the_way(self) -> int:
        """Not here, or only because it was sent again."""
        return self.lost + int(np.count_nonzero(self.repaired))

    def left(self, cut: Cut) -> int:
        """Of this cut not here."""
        return cut.count - int(np.count_nonzero(self.arrived[cut.first - self.first : cut.stop - self.first]))

    def want(self, ranges: Flags) -> None:
        self.wanted |= ranges & ~self.arrived

    def put(self, cut: Cut, packets: Packets, *, repaired: bool = False) -> int:
        """How many of them were here already. What was not asked for does not come over the reliable streams."""
        at = packets.numbers - self.first
        fresh = ~self.arrived[at]
        if repaired and not self.is_reliable and self.is_over:
            fresh &= self.wanted[at]
        if fresh.any():
            slots = self.slots.get(cut.first) or self.slots.setdefault(cut.first, Slots(cut, self.coding))
            slots.put(packets if fresh.all() else Packets(packets.numbers[fresh], packets.rows[fresh]))
            self.lost -= int(np.count_nonzero(fresh))
            self.arrived[at[fresh]] = True
            self.wanted[at[fresh]] = False
            self.repaired[at[fresh]] |= repaired
        return int(len(fresh) - np.count_nonzero(fresh))


# ---- jobs: pure, run wherever the driver likes


@dataclass(frozen=True, slots=True)
class Entry:
    """One member's part in a cut: `slots` None: our own values."""

    rank: Rank
    coordinate: int
    weight: float
    loss: float
    slots: Slots | None
    arrived: Flags


@dataclass(frozen=True, slots=True)
class Estimated:
    """The averages' packets, which ranges have one, and which entries sent what cannot be averaged."""

    packets: list[Packets]
    known: Flags
    refused: list[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Applied:
    """Which ranges were written, and why some were not though they arrived."""

    known: Flags
    refused: list[str]


def estimate_cut(
    cut: Cut, entries: Sequence[Entry], own: Floats, output: Floats, coding: Coding | None, form: Form
) -> Estimated:
    """Estimate a cut from what arrived of it; `output` gets what the code of the averages decodes to (the averages
    themselves where `coding` is None: they are not sent), and our own values where there is none."""
    members: list[Heard] = []
    refused: list[tuple[int, str]] = []
    me = next(place for place, entry in enumerate(entries) if entry.slots is None)
    for place, entry in enumerate(entries):
        values, arrived = own, entry.arrived
        if entry.slots is not None:
            values, arrived, why = _finite(cut, entry.slots, entry.arrived)
            if why:
                refused.append((place, why))
        members.append(Heard(entry.coordinate, entry.weight, entry.loss, values, arrived))
    total, known = estimate(members, me, range_elements=cut.range_elements, form=form)
    with np.errstate(over="ignore"):
        average = total if total.dtype == own.dtype else total.astype(own.dtype)
    if coding is None:
        output[:] = average
        return Estimated([], known, refused)
    coded = code_cut(cut, average, output, coding, known)
    _write_ranges(cut, output, own, ~known)
    return Estimated(coded.packets, known, refused)


def code_cut(cut: Cut, values: Floats, output: Floats, coding: Coding, known: Flags | None = None) -> Estimated:
    """The packets of a cut's known ranges; `output` gets what they decode to."""
    packets = encode_ranges(coding, cut, values, cut.first, cut.stop)
    slots = Slots(cut, coding)
    for each in packets:
        slots.put(each)
    everything = np.ones(cut.count, np.bool_)
    output[:], _ = slots.decode(everything)
    if known is None or known.all():
        return Estimated(packets, everything, [])
    chosen = [(each, known[each.numbers - cut.first]) for each in packets]
    return Estimated([Packets(e.numbers[is_in], e.rows[is_in]) for e, is_in in chosen if is_in.any()], known, [])


def apply_cut(cut: Cut, slots: Slots | None, arrived: Flags, own: Floats, output: Floats) -> Applied:
    """Averages where they arrived, our own values elsewhere."""
    output[:] = own
    if slots is None:
        return Applied(np.zeros(cut.count, np.bool_), [])
    values, known, why = _finite(cut, slots, arrived)
    _write_ranges(cut, output, values, known)
    return Applied(known, [why] if why else [])


def _finite(cut: Cut, slots: Slots, arrived: Flags) -> tuple[Floats, Flags, str]:
    """What was decoded, which ranges of it count, and why others do not."""
    values, refused = slots.decode(arrived)
    reasons = list(refused.values())[:1]
    bad = list(refused)
    if first_non_finite(values) is not None:
        not_finite = non_finite_ranges(values, cut)
        reasons.append(f"sent values that are not finite in range {int(not_finite[0])}")
        bad += [int(number) for number in not_finite]
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    if not bad:
        return values, arrived, ""
    arrived = arrived.copy()
    arrived[np.array(bad) - cut.first] = False
    return values, arrived, "; ".join(reasons)


def _write_ranges(cut: Cut, target: Floats, source: Floats, chosen: Flags) -> None:
    for run in _runs(int(place) for place in np.flatnonzero(chosen)):
        at = slice(run.start * cut.range_elements, run.stop * cut.range_elements)
        target[at] = source[at]


# ---- runs of ranges on the reliable streams


def _runs(numbers: Iterable[int]) -> list[range]:
    """Ascending numbers as runs without gaps."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _chunks_of(packets: Sequence[Packets]) -> list[Outgoing]:
    """Averages of one cut as chunks: one for each run."""
    numbers = [int(number) for each in packets for number in each.numbers]
    rows = [row for each in packets for row in each.rows]
    chunks: list[Outgoing] = []
    at = 0
    for run in _runs(numbers):
        payload = b"".join(row.tobytes() for row in rows[at : at + len(run)])
        chunks.append(Outgoing(Chunk(run.start, 0, b"", is_average=True), partial(bytes, payload)))
        at += len(run)
    return chunks


def _coded_bytes(coding: Coding, cut: Cut) -> int:
    """About: codes of ranges have each their own metadata."""
    return coding.encoded_bytes(DTYPES[cut.piece.dtype], cut.piece.stop - cut.piece.start)


def _packets_from(payload: bytes | memoryview, cut: Cut, first: int, coding: Coding) -> list[Packets]:
    """The inverse: as many ranges of this cut, from `first` on, as the payload holds."""
    width = payload_bytes(coding, cut, cut.first)
    count = min(len(payload) // width, cut.stop - first)
    whole = np.frombuffer(payload, np.uint8)
    packets: list[Packets] = []
    if count:
        packets.append(Packets(np.arange(first, first + count), whole[: count * width].reshape(count, width)))
    if rest := len(payload) - count * width:
        if first + count != cut.stop - 1 or payload_bytes(coding, cut, first + count) != rest:
            raise RemoteProtocolError(f"ranges from {first} on with {len(payload)} bytes")
        packets.append(Packets(np.arange(cut.stop - 1, cut.stop), whole[count * width :].reshape(1, rest)))
    if not packets:
        raise RemoteProtocolError(f"no range from {first} on")
    return packets

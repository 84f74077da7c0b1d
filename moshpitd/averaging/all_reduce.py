"""From a Group and a vector to the averaged vector: reduce-scatter, all-gather, agreement.

Knows chunks, views and who owes what. Does not know how the group was found, what a round is part of, or the clock.

Each piece of the vector has an owner, at first the reducer of its span. Members send the owner their contribution; when
all of them are there the owner reduces, in the order of rank and never of arrival, encodes the average once and sends
the same bytes to all, keeping what those bytes decode to. Who holds every average says Ready with a digest over the
decoded averages, and commits when every live member said the same.

| state      | means                                              | left by                                           |
|------------|----------------------------------------------------|---------------------------------------------------|
| EXCHANGING | chunks go to and fro                               | the last average -> READY; a higher view          |
| AGREEING   | a view came; Holdings of its live members awaited  | the last of them -> EXCHANGING; a higher view     |
| READY      | every average is here                              | Ready from all -> COMMITTED; a higher view        |
| COMMITTED  | the result stands; still answers views             | (none)                                            |
| FAILED     | left out, alone, or out of time; values untouched  | (none)                                            |

When a member fails, a view without it opens (PROTOCOL.md, Commit and failover): members tell what they hold, what
anybody holds is served again as it is, and only what nobody holds is reduced again. Contributions never change before
the commit, so one that arrived counts in every view. What a committed member holds, all live members of its view hold:
a later view re-serves exactly those values.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import assert_never

import numpy as np
from xxhash import xxh3_64_digest

from moshpitd.averaging.codecs import Codec, Coding, VectorCodec
from moshpitd.averaging.compressors.stages import Operation
from moshpitd.averaging.effects import CloseStreams, Compute, Effect, Log, OpenStreams, Receivable, Send, Sendable
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.link import Arrival, Measure, Transfers
from moshpitd.averaging.messages import (
    Chunk,
    Group,
    Heartbeat,
    Holdings,
    LossyMessage,
    RangesWanted,
    Ready,
    ReductionMessage,
    Suspect,
    View,
)
from moshpitd.averaging.names import Rank, digest, short
from moshpitd.averaging.partition import ALIGNMENT, Piece, pieces_of
from moshpitd.averaging.receipt import DroppedLine, SpanLine
from moshpitd.averaging.vector import DTYPES, Floats, Vector, first_non_finite
from moshpitd.averaging.weighted_mean import scaled_weights, weighted_mean, weighted_sum

NOT_HELD = -1
MEASURED_EVERY = 16
"""Of so many contributed chunks the first is decoded again, for the receipt: a twentieth of what coding them takes."""


@dataclass(frozen=True, slots=True)
class AllReduceConfig:
    """When a silent member is given up, and when a quick one is held up."""

    heartbeat_s: float = 1.0
    """Each live member tells all others this often how far it is. Shorter finds the dead sooner and costs messages."""
    beats_missed_max: int = 3
    """A member whose progress stands still for so many heartbeats is suspected (if it owes us something)."""
    slowest_chunk_factor: float = 4.0
    """... but not before this many times its slowest chunk so far: a slow link that moves is waited for."""
    ahead_bytes_max: int = 8 << 20
    """A member of whose contributions more than this waits here for those of others is ahead: its next chunks had
    better stay where they are. Less would make a quick member wait for a slow one's every hiccup."""


class State(Enum):
    """See the table above."""

    EXCHANGING = "exchanging"
    AGREEING = "agreeing"
    READY = "ready"
    COMMITTED = "committed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A chunk to put on the wire: `encode()` makes its payload (at most a chunk of work)."""

    chunk: Chunk
    """Without its payload."""
    encode: Callable[[], bytes | memoryview]


class AllReduce:
    """One member's part in one group. `values` is read until the commit, `result` written; they must not overlap."""

    def __init__(
        self,
        group: Group,
        rank: Rank,
        *,
        values: Vector,
        result: Vector,
        codec: VectorCodec,
        config: AllReduceConfig,
        now: float,
        deadline: float = math.inf,
        operation: Operation = Operation.MEAN,
        unsent: Vector | None = None,
        anchor: Vector | None = None,
        kept: Vector | None = None,
    ) -> None:
        """`deadline`: when our own caller's time is up; the group's budget may end a message's way later. `operation`:
        what is made of the contributions; in sums everybody counts, whatever it weighs. `unsent`: zeros, where what a
        lossy codec leaves out is written: of what we contribute to others, and of the averages we make, these times
        the group's weight by ours, so that we alone can make up for them. `anchor`: what all members hold alike, to
        which the codec codes differences. `kept`: where the averages are written a second time, an anchor if we
        commit."""
        self.group = group
        self.rank = rank
        self.state = State.EXCHANGING
        self.why = ""
        """Why it failed, or why the commit is not complete."""
        self.bytes_sent = 0
        self.bytes_received = 0
        self.elements_sent = 0
        self.transports: dict[Rank, str] = {}
        """Over what chunks travel between each member and us, as its door tells."""
        self._values = values
        self._result = result
        self._config = config
        self._kept = kept
        self._losses: list[Loss] = []
        """Of some contributions."""
        self._effects: list[Effect] = []

        n = len(group.members)
        self._operation = operation
        self._unsent = unsent
        is_mean = operation is Operation.MEAN
        self._weights = scaled_weights([member.weight for member in group.members]) if is_mean else (1.0,) * n
        self._contributors = tuple(Rank(r) for r in range(n) if self._weights[r] > 0)
        self._pieces = pieces_of(values.layout, group.spans, group.chunk_bytes)
        self._codec_name = codec.name
        self._codecs = [codec.of(piece.start, piece.stop, anchor) for piece in self._pieces]
        self._view = 0
        self._opened: View | None = None
        """The view we are in, for those who may have missed it."""
        self._live: tuple[Rank, ...] = tuple(Rank(r) for r in range(n))
        self._committed: tuple[Rank, ...] = ()
        self._dropped: dict[Rank, str] = {}
        self._suspected: dict[Rank, str] = {}
        self._still: set[Rank] = set()
        """Suspected for no progress only: with another view it may move again."""
        self._asked: Rank | None = None
        """Who owes us a view without those we suspect."""

        count = len(self._pieces)
        self._owner: list[Rank] = [piece.reducer for piece in self._pieces]
        self._made_in = [NOT_HELD] * count
        self._able: dict[int, list[Rank]] = {}
        """Who could reduce, by view: tells who made a piece that another served."""
        self._checksum = [b""] * count
        self._present: list[tuple[Rank, ...]] = [()] * count
        self._missing = count
        self._inbox: list[dict[Rank, bytes | memoryview]] = [{} for _ in range(count)]
        self._waiting_bytes = [0] * n
        """Of each member's contributions those that wait here for others. In the first view, as is ..."""
        self._brought = [0] * n
        """... how many each has brought."""
        self._ahead: set[Rank] = set()
        """Whose next chunks the door was told to leave where they are."""
        self._reducing: set[int] = set()
        """Pieces whose reduction or decoding runs; no piece twice at a time."""
        self._jobs: dict[int, Callable[[object], None]] = {}
        self._next_job = 0
        self._contributions_sent = 0
        self._encoded: dict[int, tuple[bytes | memoryview, int]] = {}
        """The code of an average made here, and how many members still have to be sent it."""
        self._contribute: list[deque[int]] = [deque() for _ in range(n)]
        self._contributed: list[set[int]] = [set() for _ in range(n)]
        self._publish: list[deque[int]] = [deque() for _ in range(n)]
        self._ready: dict[Rank, bytes] = {}
        self._told_ready = {rank}
        self._holdings: dict[Rank, tuple[int, ...]] = {}
        self._early: list[tuple[Rank, ReductionMessage | Chunk]] = []
        """Of a view we have not heard of yet."""
        self._digest = b""
        owed = sum(piece.reducer == rank for piece in self._pieces)
        self._transfers = Transfers([owed if r in self._contributors else 0 for r in range(n)], now)

        self._deadline = min(now + group.budget_s, deadline)
        self._next_beat = now + config.heartbeat_s
        self._beats = [Progress(now) for _ in range(n)]
        self._emit(OpenStreams(group, rank))
        self._log(f"reducing: group of {n}, rank {rank}, {count} chunks")
        if not self._contributors:
            self._become_failed("nobody in the group has any weight")
            return
        self._queue_contributions(range(count))
        for index in range(count):
            self._reduce_if_complete(index)
        self._become_ready_if_done(now)

    # ---- what the owner reads

    @property
    def result(self) -> Vector | None:
        """The averages, once committed."""
        return self._result if self.state is State.COMMITTED else None

    @property
    def codec_name(self) -> str:
        return self._codec_name

    @property
    def live(self) -> tuple[Rank, ...]:
        return self._live

    @property
    def _heard(self) -> list[Rank]:
        """Who of the live can talk with us, and we ourselves: two that nobody can dial do not hear each other."""
        members = self.group.members
        if members[self.rank].dialable:
            return list(self._live)
        return [r for r in self._live if r == self.rank or members[r].dialable]

    @property
    def finished(self) -> bool:
        return self.state in (State.COMMITTED, State.FAILED)

    @property
    def idle(self) -> bool:
        """No job of ours runs any more: buffers may go."""
        return not self._jobs

    def may_write_to(self, vector: Vector) -> bool:
        """Whether it is our result and not yet let go."""
        return vector is self._result and not (self.finished and self.idle)

    @property
    def digest(self) -> bytes:
        """Over the decoded averages; the same at every member that committed under `group_id`."""
        return self._digest

    @property
    def group_id(self) -> bytes:
        """hash(group id, survivors): same id, same bits."""
        return digest("group", self.group.group_id, *self._committed)[:16]

    @property
    def survivors(self) -> tuple[Rank, ...]:
        """Who committed with us, ourselves among them; nobody before that."""
        return self._committed

    @property
    def is_complete(self) -> bool:
        """Everybody contributed everything and confirmed."""
        return (
            self.state is State.COMMITTED
            and not self.why
            and len(self._committed) == len(self.group.members)
            and all(present == self._contributors for present in self._present)
        )

    def span_lines(self) -> tuple[SpanLine, ...]:
        """Neighbouring pieces with the same reducer and contributors, as one line each."""
        lines: list[SpanLine] = []
        peers = [member.peer for member in self.group.members]
        for piece in self._pieces:
            reducer = peers[self._maker(piece.index)]
            contributors = tuple(peers[rank] for rank in self._present[piece.index])
            last = lines[-1] if lines else None
            if last and last.stop == piece.start and (last.reducer, last.contributors) == (reducer, contributors):
                lines[-1] = SpanLine(reducer, last.start, piece.stop, contributors)
            else:
                lines.append(SpanLine(reducer, piece.start, piece.stop, contributors))
        return tuple(lines)

    def dropped_lines(self) -> tuple[DroppedLine, ...]:
        return tuple(DroppedLine(self.group.members[rank].peer, why) for rank, why in sorted(self._dropped.items()))

    @property
    def bits_per_element(self) -> float:
        """Of what we sent; 0 while that is nothing."""
        return 8 * self.bytes_sent / self.elements_sent if self.elements_sent else 0.0

    @property
    def relative_error(self) -> float:
        """Of our contributions as others decode them, against what was put in, by norm; of some of the chunks."""
        off, norm = (math.fsum(parts) for parts in zip(*self._losses, strict=True)) if self._losses else (0.0, 0.0)
        return math.sqrt(off / norm) if norm else 0.0

    def link_measures(self, now: float) -> tuple[Measure | None, Measure | None]:
        """What this round showed of our own line, (up, down); to be asked when it has committed."""
        members = self.group.members
        contributed, averaged = [0] * len(members), [0] * len(members)
        for piece, codec in zip(self._pieces, self._codecs, strict=True):
            dtype, elements = DTYPES[piece.dtype], piece.stop - piece.start
            contributed[piece.reducer] += codec.contribution.encoded_bytes(dtype, elements)
            averaged[piece.reducer] += codec.average.encoded_bytes(dtype, elements)
        whole, others = sum(contributed), len(members) - 1
        # A contribution without its own span, and the averages of that span for all others.
        loads = [whole - own + others * average for own, average in zip(contributed, averaged, strict=True)]
        explained_s = [
            load / member.up_bytes_s if member.up_bytes_s > 0 else math.inf
            for load, member in zip(loads, members, strict=True)
        ]
        return self._transfers.up(), self._transfers.down(explained_s, now)

    @property
    def waiting_bytes(self) -> int:
        """Of contributions of others that wait for more before they can be averaged."""
        return sum(len(payload) for inbox in self._inbox for payload in inbox.values())

    def fraction_done(self) -> float:
        return 1 - self._missing / max(1, len(self._pieces))

    # ---- inputs

    def receive(self, message: ReductionMessage | LossyMessage, sender: Rank, now: float) -> None:
        """A message of the sender proved by its channel. Raises RemoteProtocolError for nonsense."""
        beat = self._beats[sender]
        beat.heard(now)
        match message:
            case Heartbeat(moved=moved):
                beat.moved(moved, now)
                if self.state in (State.READY, State.COMMITTED) and {sender} <= self._ready.keys() & self._told_ready:
                    # Ready, it still waits, for our word perhaps: one is lost with its connection, or for want of one.
                    self._tell(sender, self._ready_for(sender))
            case Suspect(view=view, rank=rank, why=why):
                self._check_rank(rank)
                if view == self._view and sender in self._live and rank != sender:
                    self.suspect(rank, why, now, asked=True)
                elif view < self._view and self._opened and {sender, self.rank} <= set(self._live):
                    self._tell(sender, self._opened)  # the author of our view did not live to tell it
            case View():
                self._receive_view(message, sender, now)
            case Holdings(view=view, views=views):
                if len(views) != len(self._pieces):
                    raise RemoteProtocolError(f"holdings of {len(views)} chunks, there are {len(self._pieces)}")
                if not all(NOT_HELD <= made_in < view for made_in in views):
                    raise RemoteProtocolError(f"holdings in view {view} of what was made later")
                if view > self._view:
                    self._keep_early(message, sender)
                elif view == self._view and sender in self._live:
                    self._holdings[sender] = views
                    self._assign_if_agreed(now)
            case Ready(view=view, digest=their_digest, heard_bytes=heard_bytes, heard_s=heard_s):
                if 0 <= heard_bytes <= self.bytes_sent and heard_s >= 0:
                    self._transfers.report(sender, Arrival(heard_bytes, heard_s))
                if view > self._view:
                    self._keep_early(message, sender)
                elif view == self._view and sender in self._live:
                    self._ready[sender] = their_digest
                    self._commit_if_all_ready()
            case RangesWanted():
                raise RemoteProtocolError(f"{self._name(sender)} takes a reliable round for a lossy one")
            case _:
                assert_never(message)

    def chunk_received(self, chunk: Chunk, sender: Rank, now: float) -> None:
        """A chunk of the sender's stream. Raises RemoteProtocolError for nonsense."""
        if not 0 <= chunk.index < len(self._pieces):
            raise RemoteProtocolError(f"chunk {chunk.index} of {len(self._pieces)}")
        if len(chunk.payload) > (size := self._payload_bytes(chunk)):  # it may be kept for long
            raise RemoteProtocolError(f"chunk {chunk.index} with {len(chunk.payload)} bytes instead of {size}")
        self.bytes_received += len(chunk.payload)
        beat = self._beats[sender]
        beat.heard(now)
        beat.chunk(now)
        if self._view == 0:
            self._transfers.chunk(sender, len(chunk.payload))
        if self.finished or sender not in self._live:
            return
        if chunk.view > self._view or self.state is State.AGREEING:
            self._keep_early(chunk, sender)  # who owns what is not settled here yet
        elif chunk.is_average:
            self._average_received(chunk, sender)
        else:
            self._contribution_received(chunk, sender, now)

    def compute_finished(self, job_id: int, value: object, now: float) -> None:
        """The value of a job asked for by a Compute effect."""
        then = self._jobs.pop(job_id)
        if not self.finished:
            then(value)
            self._assign_if_agreed(now)
            self._become_ready_if_done(now)
            self._seek_view(now)

    def suspect(self, rank: Rank, why: str, now: float, *, asked: bool = False) -> None:
        """This member does not go on, as the door or a timer found out, or another member that needs it `asked`."""
        if self.state is State.FAILED:
            return
        if self.state is State.READY and not asked and not self._owes(rank):
            return  # it said all we need of it, and may have committed and left
        self._accuse(rank, why)
        self._seek_view(now)

    def handle_timer(self, now: float) -> None:
        if self.finished:
            return
        if now >= self._deadline:
            self._out_of_time(now)
        elif now >= self._next_beat:
            self._beat(now)

    def next_deadline(self) -> float | None:
        return None if self.finished else min(self._deadline, self._next_beat)

    def next_outgoing(self, rank: Rank) -> Outgoing | None:
        """The next chunk for this member, averages first; None until the bell rings."""
        if self.finished or rank not in self._live:
            return None
        if self._publish[rank]:
            return self._outgoing_average(self._publish[rank].popleft())
        while self._contribute[rank]:
            index = self._contribute[rank].popleft()
            if index not in self._contributed[rank]:
                self._contributed[rank].add(index)
                return self._outgoing_contribution(index)
        return None

    def is_ahead(self, rank: Rank, now: float) -> bool:
        """Whether the next chunk of this member had better stay where it is until the bell (Receivable) rings: it would
        wait here for others. The one that has brought least never is, so that somebody always goes on."""
        if not self._is_ahead(rank):
            return False
        self._ahead.add(rank)
        self._beats[rank].held_up(now)
        self._transfers.held_up(rank, now)
        return True

    def take_effects(self) -> list[Effect]:
        for rank in [rank for rank in self._ahead if not self._is_ahead(rank)]:
            self._ahead.discard(rank)
            self._emit(Receivable(self.group.group_id, rank))
        effects, self._effects = self._effects, []
        return effects

    # ---- chunks

    def _is_ahead(self, rank: Rank) -> bool:
        if self._view or self.state is not State.EXCHANGING:
            return False
        if self._waiting_bytes[rank] <= self._config.ahead_bytes_max:
            return False
        others = (r for r in self._contributors if r in self._live and r not in (self.rank, rank))
        return any(self._brought[r] < self._brought[rank] for r in others)

    def _outgoing_contribution(self, index: int) -> Outgoing:
        piece = self._pieces[index]
        values = self._values.elements(piece.start, piece.stop)
        coding = self._codecs[index].contribution
        self.elements_sent += len(values)
        encode = partial(coding.encode, values)
        unsent = self._unsent.elements(piece.start, piece.stop) if self._unsent is not None else None
        is_measured = self._contributions_sent % MEASURED_EVERY == 0
        self._contributions_sent += 1
        if unsent is not None or is_measured:
            encode = partial(encode_noting_loss, coding, values, unsent, self._losses.append if is_measured else None)
        return Outgoing(Chunk(index, self._view, b"", is_average=False), partial(self._counted, encode))

    def _counted(self, encode: Callable[[], bytes | memoryview]) -> bytes | memoryview:
        """How large a code is may be known only when it is made."""
        code = encode()
        self.bytes_sent += len(code)
        return code

    def _outgoing_average(self, index: int) -> Outgoing:
        piece = self._pieces[index]
        made_here = self._encoded.get(index)
        self.elements_sent += piece.stop - piece.start
        header = partial(
            Chunk,
            index,
            self._view,
            b"",
            is_average=True,
            contributors=self._present[index],
            made_in=self._made_in[index],
        )
        if made_here is None:
            values = self._result.elements(piece.start, piece.stop)
            self.bytes_sent += values.nbytes
            return Outgoing(header(decoded=True), lambda: values.view(np.uint8).data)
        code, left = made_here
        self.bytes_sent += len(code)
        if left > 1:
            self._encoded[index] = (code, left - 1)
        else:
            del self._encoded[index]
        return Outgoing(header(), lambda: code)

    def _payload_bytes(self, chunk: Chunk) -> int:
        piece = self._pieces[chunk.index]
        if chunk.is_average and chunk.decoded:
            return piece.byte_size
        codec = self._codecs[chunk.index]
        coding = codec.average if chunk.is_average else codec.contribution
        return coding.encoded_bytes(DTYPES[piece.dtype], piece.stop - piece.start)

    def _contribution_received(self, chunk: Chunk, sender: Rank, now: float) -> None:
        index = chunk.index
        if self._owner[index] != self.rank or self._made_in[index] != NOT_HELD:
            return  # of an older view: somebody else's piece now, or reduced already
        if sender not in self._contributors:
            raise RemoteProtocolError(f"{self._name(sender)} joined with weight 0 but sent a contribution")
        if sender not in self._inbox[index] and self._view == 0:
            self._transfers.contribution(sender, now)
            self._waiting_bytes[sender] += len(chunk.payload)
            self._brought[sender] += 1
        self._inbox[index].setdefault(sender, chunk.payload)
        self._reduce_if_complete(index)

    def _reduce_if_complete(self, index: int) -> None:
        """Once every live contributor's chunk is here: one job reduces, encodes and decodes."""
        if self._owner[index] != self.rank or self._made_in[index] != NOT_HELD or index in self._reducing:
            return
        if self.state is not State.EXCHANGING:
            return
        inbox = self._inbox[index]
        waited_for = [rank for rank in self._contributors if rank in self._live and rank != self.rank]
        if any(rank not in inbox for rank in waited_for):
            return
        # One that arrived counts even if its sender died since.
        present = tuple(rank for rank in self._contributors if rank == self.rank or rank in inbox)
        if not present:
            return  # all who had weight are gone; the time will run out
        for rank, payload in inbox.items():
            self._waiting_bytes[rank] -= len(payload)
        piece = self._pieces[index]
        job = partial(
            reduce_chunk,
            piece,
            [
                (self.group.members[r].coordinate, self._weights[r], None if r == self.rank else inbox[r])
                for r in present
            ],
            self._values.elements(piece.start, piece.stop),
            self._result.elements(piece.start, piece.stop),
            self._codecs[index],
            self._operation,
            self._unsent.elements(piece.start, piece.stop) if self._unsent and self._weights[self.rank] > 0 else None,
            self._weights[self.rank],
        )
        self._compute(index, job, piece.byte_size * len(present), partial(self._reduced, index, present, self._view))

    def _reduced(self, index: int, present: tuple[Rank, ...], view: int, value: object) -> None:
        assert isinstance(value, Reduced | Spoilt)
        if isinstance(value, Spoilt):
            culprit = present[value.position]
            self._inbox[index].pop(culprit, None)
            self._accuse(culprit, value.why)
            return
        if view != self._view:
            return  # made in a view that is over; the new one decides about this piece
        self._hold(index, made_in=view, present=present, checksum=value.checksum)
        self._inbox[index].clear()
        others = [rank for rank in self._live if rank != self.rank]
        if others:
            self._encoded[index] = (value.code, len(others))
            for rank in others:
                self._publish[rank].append(index)
                self._emit(Sendable(self.group.group_id, rank))

    def _average_received(self, chunk: Chunk, sender: Rank) -> None:
        index = chunk.index
        if chunk.view < self._view or self._made_in[index] != NOT_HELD or index in self._reducing:
            return
        if self._owner[index] != sender:
            raise RemoteProtocolError(
                f"{self._name(sender)} sent the average of chunk {index}, which is not its to send"
            )
        if not chunk.contributors or list(chunk.contributors) != sorted(
            set(chunk.contributors) & set(self._contributors)
        ):
            raise RemoteProtocolError(f"an average of chunk {index} by impossible contributors")
        if not 0 <= chunk.made_in <= self._view:
            raise RemoteProtocolError(f"an average of chunk {index} made in view {chunk.made_in}")
        piece = self._pieces[index]
        job = partial(
            decode_average,
            piece,
            chunk.payload,
            None if chunk.decoded else self._codecs[index].average,
            self._result.elements(piece.start, piece.stop),
        )
        self._compute(index, job, piece.byte_size, partial(self._decoded, chunk, sender, self._view))

    def _decoded(self, chunk: Chunk, sender: Rank, view: int, value: object) -> None:
        assert isinstance(value, bytes | str)
        if isinstance(value, str):
            self._accuse(sender, value)
        elif view == self._view:
            self._hold(chunk.index, made_in=chunk.made_in, present=chunk.contributors, checksum=value)

    def _hold(self, index: int, *, made_in: int, present: tuple[Rank, ...], checksum: bytes) -> None:
        assert self._made_in[index] == NOT_HELD
        self._made_in[index] = made_in
        self._present[index] = present
        self._checksum[index] = checksum
        self._missing -= 1

    def _compute(self, index: int, job: Callable[[], object], cost_bytes: int, then: Callable[[object], None]) -> None:
        self._reducing.add(index)
        self._next_job += 1

        def done(value: object) -> None:
            self._reducing.discard(index)
            then(value)

        self._jobs[self._next_job] = done
        if self._kept is not None:
            piece = self._pieces[index]
            output, copy = (each.elements(piece.start, piece.stop) for each in (self._result, self._kept))
            job = partial(keeping, job, output, copy)
        self._emit(Compute(self.group.group_id, self._next_job, job, cost_bytes))

    def _queue_contributions(self, indices: Iterable[int]) -> None:
        """Line up what we owe the owners, per owner in the order of the vector."""
        if self.rank not in self._contributors:
            return
        rung: set[Rank] = set()
        for index in indices:
            owner = self._owner[index]
            if owner != self.rank and index not in self._contributed[owner]:
                self._contribute[owner].append(index)
                rung.add(owner)
        for rank in sorted(rung):
            self._emit(Sendable(self.group.group_id, rank))

    # ---- commit

    def _become_ready_if_done(self, now: float) -> None:
        if self.state is not State.EXCHANGING or self._missing or self._jobs:
            return
        self.state = State.READY
        self._digest = digest("averages", self._codec_name, b"".join(self._checksum))
        self._ready[self.rank] = self._digest
        self._commit_if_all_ready()

    def _commit_if_all_ready(self) -> None:
        if self.state is not State.READY:
            return
        self._vouch()
        if any(rank not in self._ready for rank in self._heard):
            return
        differing = [rank for rank in self._heard if self._ready[rank] != self._digest]
        if differing:
            names = ", ".join(self._name(rank) for rank in differing)
            self._become_failed(f"agreement failed: {names} hold other averages than we do")
        else:
            self._become_committed()

    def _vouch(self) -> None:
        """Say Ready to whom it can be said: two that nobody can dial do not hear each other, so to one of them our
        Ready also stands for the others of its kind, and waits for theirs."""
        if self._told_ready.issuperset(self._live):
            return
        mute = {rank for rank in self._live if not self.group.members[rank].dialable and rank != self.rank}
        silent = {rank for rank in mute if self._ready.get(rank) != self._digest}
        for rank in self._heard:
            if rank not in self._told_ready and not (rank in mute and silent - {rank}):
                self._told_ready.add(rank)
                self._tell(rank, self._ready_for(rank))

    def _ready_for(self, rank: Rank) -> Ready:
        heard = self._transfers.heard_of(rank)
        return Ready(self.group.group_id, self._view, self._digest, heard.size, heard.seconds)

    def _become_committed(self) -> None:
        assert self.state is State.READY
        self.state = State.COMMITTED
        self._committed = self._live
        self._log(f"reducing -> committed: {len(self._live)} of {len(self.group.members)} members" + self._because())
        self._release()

    def _become_failed(self, why: str) -> None:
        assert not self.finished
        self.state = State.FAILED
        self.why = why
        self._log(f"reducing -> failed: {why}")
        self._release()

    def _release(self) -> None:
        self._inbox = [{} for _ in self._pieces]
        self._encoded.clear()
        self._early.clear()
        self._emit(CloseStreams(self.group.group_id))

    def _out_of_time(self, now: float) -> None:
        if self.state is State.READY:
            unconfirmed = [rank for rank in self._heard if rank not in self._ready]
            self.why = f"unconfirmed: {', '.join(self._name(rank) for rank in unconfirmed)}"
            self._become_committed()
            return
        owing = [rank for rank in self._live if rank != self.rank and self._owes(rank)]
        for rank in owing:
            self._dropped.setdefault(rank, "had not finished when time ran out")
        names = ", ".join(self._name(rank) for rank in owing) or "nobody in particular"
        self._become_failed(
            f"time ran out with {self._missing} of {len(self._pieces)} chunks missing; waited for {names}"
        )

    # ---- progress of others

    def _beat(self, now: float) -> None:
        asleep = now - self._next_beat > self._config.heartbeat_s
        self._next_beat = now + self._config.heartbeat_s
        self._tell_live(Heartbeat(self.group.group_id, self.bytes_sent + self.bytes_received))
        if asleep:  # our own process stood still: nobody else is to blame for the silence
            for beat in self._beats:
                beat.restart(now)
            return
        owing = [rank for rank in self._live if rank != self.rank and self._owes(rank)]
        for rank in owing:
            if self._opened and self.state is State.AGREEING:
                self._tell(rank, self._opened)  # its author may have died before it told everybody
            if (silent := now - self._beats[rank].heard_at) >= self._patience(rank):
                self._accuse(rank, f"not heard from for {silent:.1f} s")
        # One that stands still may itself wait for another: those that are known to be gone must fall first.
        if self.state is State.EXCHANGING and self._suspected.keys().isdisjoint(self._live):
            for rank in owing:
                factor = 1 if self._owes_contribution(rank) and self._view == 0 else 2
                if rank in self._ahead:
                    self._beats[rank].held_up(now)
                elif (still := now - self._beats[rank].moved_at) >= factor * self._patience(rank):
                    self._accuse(rank, f"made no progress for {still:.1f} s")
                    self._still.add(rank)
        self._seek_view(now)

    def _patience(self, rank: Rank) -> float:
        return max(
            self._config.beats_missed_max * self._config.heartbeat_s,
            self._config.slowest_chunk_factor * self._beats[rank].slowest_chunk_s,
        )

    def _owes(self, rank: Rank) -> bool:
        if rank == self._asked:
            return not self.finished
        match self.state:
            case State.EXCHANGING:
                return self._owes_contribution(rank) or self._owes_average(rank)
            case State.AGREEING:
                return rank in self._heard and rank not in self._holdings
            case State.READY:
                return rank in self._heard and rank not in self._ready
            case State.COMMITTED | State.FAILED:
                return False

    def _owes_contribution(self, rank: Rank) -> bool:
        return rank in self._contributors and any(
            owner == self.rank and made == NOT_HELD and rank not in inbox
            for owner, made, inbox in zip(self._owner, self._made_in, self._inbox, strict=True)
        )

    def _owes_average(self, rank: Rank) -> bool:
        return any(owner == rank and made == NOT_HELD for owner, made in zip(self._owner, self._made_in, strict=True))

    # ---- views

    def _accuse(self, rank: Rank, why: str) -> None:
        """The next `_seek_view` is to leave this member out."""
        if rank in self._live and rank != self.rank and rank not in self._suspected:
            self._suspected[rank] = why
            self._log(f"suspects {self._name(rank)}: {why}")

    def _seek_view(self, now: float) -> None:
        """Open a view without those we suspect, or ask the one who speaks for the rest to open it."""
        out = [rank for rank in self._live if rank in self._suspected]
        if not out or self.rank not in self._live or self.state is State.FAILED:
            return
        if (speaker := self._speaker()) != self.rank:
            if speaker != self._asked:
                self._asked = speaker
                self._beats[speaker].restart(now)  # it may have committed long ago: from now on it owes us an answer
            for rank in out:
                self._tell(speaker, Suspect(self.group.group_id, self._view, rank, self._suspected[rank]))
            return
        live = tuple(rank for rank in self._heard if rank not in self._suspected)
        reasons = "; ".join(f"{self._name(rank)} {self._suspected[rank]}" for rank in out)
        n = len(self.group.members)
        # No two authors use the same number, so that Holdings and Ready tell which of two crossing views they mean.
        number = (self._view // n + 1) * n + self.rank
        view = View(self.group.group_id, number, self.rank, live, reasons)
        self._tell_live(view)
        self._enter_view(view, now)

    def _speaker(self) -> Rank:
        """Who opens views among those who go on: the lowest whom all of them hear."""
        return self._lowest_dialable(rank for rank in self._heard if rank not in self._suspected)

    def _lowest_dialable(self, ranks: Iterable[Rank]) -> Rank:
        """The lowest of all where there is none."""
        return min(ranks, key=lambda rank: (not self.group.members[rank].dialable, rank))

    def _receive_view(self, view: View, sender: Rank, now: float) -> None:
        """Of its author, or passed on by another member of it."""
        n, live = len(self.group.members), set(view.live)
        if (
            not live <= set(range(n))
            or len(live) < len(view.live)
            or sender not in live
            or view.author != self._lowest_dialable(live)
            or (len(live) > 1 and not self.group.members[view.author].dialable)
        ):
            raise RemoteProtocolError(f"{self._name(sender)} opened an impossible view")
        if view.number % n != view.author or not 1 <= view.number // n <= n - len(live):
            raise RemoteProtocolError(f"{self._name(sender)} opened view {view.number} for {len(live)} of {n}")
        if view.number <= self._view or self.state is State.FAILED:
            return
        if live <= set(self._live):  # else its author has not heard of those who are out here: they stay out
            self._enter_view(view, now)

    def _enter_view(self, view: View, now: float) -> None:
        for rank in self._live:
            if rank not in view.live:
                self._dropped[rank] = self._suspected.get(rank) or self._reason_in(view, rank)
        self._view, self._opened = view.number, view
        self._live = tuple(sorted(view.live))
        self._able[self._view] = [rank for rank in self._live if self.group.members[rank].dialable]
        self._asked = None
        for rank in self._still & set(self._live):
            del self._suspected[rank]
        self._still.clear()
        self._log(f"view {view.number}: {len(self._live)} of {len(self.group.members)} go on; {view.why}")
        if self.state is State.COMMITTED:  # nothing to take back: say what we hold, for those who still need it
            self._tell_live(Holdings(self.group.group_id, self._view, tuple(self._made_in)))
            self._tell_live(Ready(self.group.group_id, self._view, self._digest))
            return
        if self.rank not in self._live:
            self._become_failed(f"left out by {self._name(view.author)}: {view.why}")
            return
        self.state = State.AGREEING
        self._ready.clear()
        self._told_ready = {self.rank}
        self._holdings.clear()
        for queue in (*self._publish, *self._contribute):
            queue.clear()
        for beat in self._beats:
            beat.restart(now)
        self._holdings[self.rank] = tuple(self._made_in)
        self._tell_live(Holdings(self.group.group_id, self._view, self._holdings[self.rank]))
        self._replay_early(now)
        self._assign_if_agreed(now)

    def _assign_if_agreed(self, now: float) -> None:
        """Every live member's holdings are known: all compute the same owners from them.

        Those that nobody can dial are served, but serve nobody, for they do not reach each other. Nothing is lost by
        it: had anyone committed, all live members would hold everything.
        """
        if self.state is not State.AGREEING or any(rank not in self._holdings for rank in self._heard):
            return
        if self._jobs:  # a job of the old view may still write into the result
            return
        mine = self._holdings[self.rank]
        assert mine == tuple(self._made_in)
        if self._live == (self.rank,) and self._missing:
            self._become_failed("everybody else is gone")
            return
        able = self._able[self._view] or [self.rank]
        again: list[int] = []
        self._encoded.clear()
        for index in range(len(self._pieces)):
            best = max(self._holdings[rank][index] for rank in able)
            if mine[index] not in (best, NOT_HELD):
                self._made_in[index] = NOT_HELD
                self._missing += 1
            if best == NOT_HELD:
                self._owner[index] = self._owner_among(able, index)
                again.append(index)
                continue
            holders = [rank for rank in able if self._holdings[rank][index] == best]
            self._owner[index] = server = holders[index % len(holders)]
            if server == self.rank:
                for rank in self._live:
                    if self._holdings[rank][index] != best:
                        self._publish[rank].append(index)
        if again and not any(rank in self._live for rank in self._contributors):
            self._become_failed("nobody left has any weight")
            return
        self.state = State.EXCHANGING
        for rank in self._live:
            if self._publish[rank]:
                self._emit(Sendable(self.group.group_id, rank))
        self._queue_contributions(again)
        for index in again:
            self._reduce_if_complete(index)
        self._replay_early(now)
        self._become_ready_if_done(now)

    def _owner_among(self, able: Sequence[Rank], index: int) -> Rank:
        """Who reduces what nobody holds: the span's reducer while it lives, else the next able one, counted from a
        place that differs from piece to piece.

        A function of the survivors alone, because members may have skipped different views; and whoever owned a piece
        keeps it until it dies, because contributions are sent to an owner once.
        """
        reducer, n = self._pieces[index].reducer, len(self.group.members)
        return min(able, key=lambda rank: (rank != reducer, (rank - index) % n))

    def _maker(self, index: int) -> Rank:
        """Who reduced a piece that we hold. All who go on were in the view it was made in."""
        able = self._able.get(self._made_in[index])
        return self._owner_among(able, index) if able else self._pieces[index].reducer

    def _replay_early(self, now: float) -> None:
        waiting, self._early = self._early, []
        for sender, item in waiting:
            if sender not in self._live or self.finished:
                continue
            try:
                if isinstance(item, Chunk):
                    self.bytes_received -= len(item.payload)
                    self.chunk_received(item, sender, now)
                else:
                    self.receive(item, sender, now)
            except RemoteProtocolError as wrong:  # not the fault of whose message is being received
                self._accuse(sender, str(wrong))

    def _keep_early(self, item: ReductionMessage | Chunk, sender: Rank) -> None:
        """Until we are in its view. A member sends every chunk twice at most, and few messages."""
        limit = 2 * len(self._pieces) + 16
        if sum(1 for rank, _ in self._early if rank == sender) >= limit:  # it has gone through many views without us
            self._early = [(r, kept) for r, kept in self._early if r != sender or _view_of(kept) >= _view_of(item)]
        if sum(1 for rank, _ in self._early if rank == sender) >= limit:
            raise RemoteProtocolError(f"{self._name(sender)} sent too much of views to come")
        self._early.append((sender, item))

    # ---- small things

    def _check_rank(self, rank: Rank) -> None:
        if not 0 <= rank < len(self.group.members):
            raise RemoteProtocolError(f"rank {rank} in a group of {len(self.group.members)}")

    def _tell_live(self, message: ReductionMessage) -> None:
        for rank in self._heard:
            if rank != self.rank:
                self._tell(rank, message)

    def _tell(self, rank: Rank, message: ReductionMessage) -> None:
        member = self.group.members[rank]
        self._emit(Send(member.peer, member.address if member.dialable else "", message))

    def _name(self, rank: Rank) -> str:
        return short(self.group.members[rank].peer)

    def _reason_in(self, view: View, rank: Rank) -> str:
        """What a view says of this member only; see `_seek_view` for how it lists its reasons."""
        name = f"{self._name(rank)} "
        return next((part[len(name) :] for part in view.why.split("; ") if part.startswith(name)), view.why)

    def _because(self) -> str:
        return f" ({self.why})" if self.why else ""

    def _log(self, text: str) -> None:
        self._emit(Log(f"round {self.group.k}.{self.group.j} {text}"))

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)


def _view_of(item: ReductionMessage | Chunk) -> int:
    match item:
        case View(number=number):
            return number
        case Heartbeat():
            return -1
        case _:
            return item.view


class Progress:
    """What we know of a member's progress."""

    def __init__(self, now: float) -> None:
        self.heard_at = now
        self.moved_at = now
        self.slowest_chunk_s = 0.0
        self._moved = 0
        self._chunk_at: float | None = None

    def heard(self, now: float) -> None:
        self.heard_at = now

    def moved(self, total: int, now: float) -> None:
        if total > self._moved:
            self._moved, self.moved_at = total, now

    def chunk(self, now: float) -> None:
        if self._chunk_at is not None:
            self.slowest_chunk_s = max(self.slowest_chunk_s, now - self._chunk_at)
        self._chunk_at = self.moved_at = now

    def held_up(self, now: float) -> None:
        """We keep it from moving."""
        self.moved_at = now
        self._chunk_at = None

    def restart(self, now: float) -> None:
        self.heard_at = now
        self.held_up(now)


# ---- jobs: pure, run wherever the driver likes


@dataclass(frozen=True, slots=True)
class Reduced:
    """An average: its code for the others, the checksum of what the code decodes to."""

    code: bytes | memoryview
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Spoilt:
    """A contribution that cannot be averaged: which of those given, and why."""

    position: int
    why: str


def reduce_chunk(
    piece: Piece,
    contributions: Sequence[tuple[int, float, bytes | memoryview | None]],
    own: Floats,
    output: Floats,
    codec: Codec,
    operation: Operation = Operation.MEAN,
    left_out: Floats | None = None,
    own_weight: float = 0.0,
) -> Reduced | Spoilt:
    """The weighted mean of the contributions (or their sum), written decoded to `output`.

    `contributions`: (coordinate, scaled weight, code or None for one's own), by rank. In a sum all weights are 1; of
    cells, the first present of each coordinate counts, for the others hold the same. What the code lacks is written to
    `left_out`, times the sum of the weights by `own_weight`.
    """
    dtype = DTYPES[piece.dtype]
    elements = piece.stop - piece.start
    decoded: list[Floats] = []
    for position, (_, _, code) in enumerate(contributions):
        try:
            decoded.append(own if code is None else codec.contribution.decode(code, dtype, elements))
        except RemoteProtocolError as wrong:
            return Spoilt(position, str(wrong))
    parts = [
        (coordinate, weight, values) for (coordinate, weight, _), values in zip(contributions, decoded, strict=True)
    ]
    if operation is Operation.MEAN:
        total = weighted_mean(parts)
    else:
        total = weighted_sum(parts, one_a_coordinate=operation is Operation.SUM_OF_CELLS)
    # Weights are positive, so what is not finite anywhere is not finite in the sum: one look for all.
    is_finite = first_non_finite(total) is None
    if not is_finite:
        for position, values in enumerate(decoded):
            bad = first_non_finite(values)
            if bad is not None and contributions[position][2] is not None:
                return Spoilt(position, f"sent {values[bad]} for element {piece.start + bad}")
    with np.errstate(over="ignore"):
        average = total if total.dtype == dtype else total.astype(dtype)
    code = codec.average.encode(average)
    # If not, our own values are to blame: there may be no code for that, and the others refuse what there is.
    output[:] = codec.average.decode(code, dtype, elements) if is_finite else average
    if left_out is not None:
        lacking = np.subtract(average, output, dtype=total.dtype)
        weights = math.fsum(weight for _, weight, _ in contributions)
        np.multiply(lacking, total.dtype.type(weights / own_weight), out=left_out, casting="same_kind")
    return Reduced(code, checksums(output))


Loss = tuple[float, float]
"""Squares of the norms of what a code lacks, and of the values."""


def encode_noting_loss(
    coding: Coding, values: Floats, left_out: Floats | None, tell: Callable[[Loss], None] | None = None
) -> bytes | memoryview:
    """The code of a contribution; what its decoding lacks is written to `left_out`, and how much it is, told."""
    code = coding.encode(values)
    if first_non_finite(values) is not None:
        return code  # it will be refused
    lacking = np.subtract(values, coding.decode(code, values.dtype, len(values)), out=left_out)
    if tell is not None:
        tell((_squared_norm(lacking), _squared_norm(values)))
    return code


def _squared_norm(values: Floats) -> float:
    wide = values if values.dtype.itemsize >= 4 else values.astype(np.float32)
    squared = float(np.vdot(wide, wide))
    if 0 < squared < math.inf:
        return squared
    return float(np.square(values, dtype=np.float64).sum())  # too large or small for float32, or nothing


def keeping(job: Callable[[], object], output: Floats, copy: Floats) -> object:
    """The job, and then a copy of what it wrote."""
    value = job()
    copy[:] = output
    return value


def decode_average(piece: Piece, payload: bytes | memoryview, coding: Coding | None, output: Floats) -> bytes | str:
    """Write an average to `output`; the checksum of the values, or why it is refused. `coding` None: sent decoded."""
    elements = piece.stop - piece.start
    if coding is None and len(payload) != output.nbytes:
        return f"served chunk {piece.index} with {len(payload)} bytes instead of {output.nbytes}"
    try:
        values = (
            np.frombuffer(payload, output.dtype) if coding is None else coding.decode(payload, output.dtype, elements)
        )
    except RemoteProtocolError as wrong:
        return str(wrong)
    bad = first_non_finite(values)
    if bad is not None:
        return f"sent an average with {values[bad]} at element {piece.start + bad}"
    output[:] = values
    return checksums(output)


def checksums(values: Floats) -> bytes:
    """An XXH3-64 for each ALIGNMENT elements. Chunks start at multiples of it, so however a vector is cut into chunks,
    equal values give equal checksums: groups of different sizes can be compared."""
    raw = values.view(np.uint8).data
    step = ALIGNMENT * values.dtype.itemsize
    return b"".join(xxh3_64_digest(raw[at : at + step]) for at in range(0, len(raw), step))

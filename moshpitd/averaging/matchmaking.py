"""From a grid key to a Group: finds the members of one round's line.

Knows candidates, leaders, joins, patience and grace. Does not know tensors, sockets, plans, or why the trainer asks.

Candidates of a key are ordered by hash(key, peer id); the smallest live one leads. Everybody joins the first two at
once; the leader closes the group when all who are expected are there, at the grace, or when the time is up.

| state    | means                                               | left by                                             |
|----------|-----------------------------------------------------|-----------------------------------------------------|
| KEEPING  | no trainer here yet; early joins are kept, even led | seek() -> APPLYING or LEADING                       |
| APPLYING | our join is out, nobody leads us yet                | Kept by a leader -> WAITING; nobody left -> LEADING |
| WAITING  | a leader keeps our join                             | Begin -> BOUND; the leader falls -> APPLYING        |
| LEADING  | no live candidate is before us                      | everybody here, grace or time -> BOUND or ENDED;    |
|          |                                                     | one before us turns up -> APPLYING                  |
| BOUND    | the group is closed and we are in it                | (none; answers late joins)                          |
| ENDED    | no group for us, `why` says why                     | (none; answers late joins)                          |

One that is bound sends Bound to any other Begin of the key. Two groups for one key cannot be excluded, because views
differ; nobody is ever in both, and receipts tell.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import assert_never

from moshpitd.averaging.codecs import CHOICES, Choice, choose
from moshpitd.averaging.effects import Effect, Log, Send
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.grid import AXES_MAX, CARRIED_WEIGHT_MAX, Cell, leadership
from moshpitd.averaging.messages import (
    Absent,
    Address,
    Begin,
    Begun,
    Bound,
    Closed,
    Coming,
    Group,
    Hail,
    Join,
    Kept,
    Leave,
    MatchmakingMessage,
    Member,
    Message,
    Redirect,
    Standing,
    TooShort,
)
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, Rank, short
from moshpitd.averaging.partition import CHUNK_BYTES_MAX, chunk_bytes_of, known_rate, spans_of
from moshpitd.averaging.ranges import PAYLOAD_BYTES_MAX
from moshpitd.averaging.transport import (
    EVERYTHING_ARRIVES,
    LOSSY,
    MEMBERS_MAX,
    Transport,
    choose_transport,
    report_is_sound,
)
from moshpitd.averaging.vector import Layout

AGREEMENT_BYTES_MAX = 32
APPLICANTS_MAX = 4096
"""Joins kept for one key."""
RESERVE_SHARE = 0.2
"""At most this part of what a caller waits is kept in reserve."""
UNREACHABLE_TOLD_MAX = 64
"""In a join, the first of those its sender could not reach."""
CALLERS_MAX = 64
"""Of those who say that they lead and whom nobody else told us of."""
RATE_DOUBT = 8.0
"""A round moves one to two vectors over each line, and what was measured may be four times too low: rounds in which the
machine stood still leave that of it."""
HAILED = 0
"""The attempt number in an answer to a Hail; joins count from 1."""


@dataclass(frozen=True, slots=True)
class MatchmakingConfig:
    """How long to wait for whom."""

    join_patience_s: float = 2.0
    """A candidate that does not answer a join for so long is given up. Shorter finds the next leader sooner; longer
    forgives a busy machine."""
    patience_growth: float = 0.5
    """Patience grows by this factor with each place in the order, so that those behind wait for those before."""
    rejoin_s: float = 1.0
    """A kept join is repeated this often: it heals a lost Begin, and shows that both are alive."""
    hail_after_s: float = 0.3
    """A leader that misses somebody for so long calls it, and so learns whether its daemon lives. Sooner finds the
    dead faster; later spares messages when trainers are just a little apart."""
    lone_wait_s: float = 1.0
    """One that came alone waits so long for others on its line that nobody expects: what we know of them may be old."""
    reserve_s: float = 0.5
    """A group is closed so long before its first caller's time is up, and the time for the data before that: less would
    begin groups that cannot end in time."""
    coming_patience_s: float = 3.0
    """One that said that it comes from an earlier round is believed for so long; it is asked again meanwhile."""
    late_window_s: float = 0.25
    """Late arrivals are kept so long for a second group before they are told that the round is closed."""
    begin_tries: int = 3
    """How often Begin is sent to a member that does not acknowledge it, rejoin_s apart."""
    rate_assumed_bytes_s: float = 1e9
    """For the estimate of the data time while no rate was measured."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One who could lead."""

    peer: PeerId
    address: Address


@dataclass(frozen=True)
class Round:
    """Which round is matched, and where we stand in it."""

    key: Key
    k: int
    j: int
    axis: int
    plan_version: int
    plan: bytes
    """First 8 bytes of the plan's digest."""
    me: PeerId
    incarnation: Incarnation
    cell: Cell
    layout: Layout
    chunk_bytes: int
    wire_bytes: int
    """The vector coded twice, as contributions and as averages: about what a member sends, and gets."""
    auto_bytes: int = 0
    """Of the vector, what travels by the codec `auto`; 0: the terms say how everything does."""
    auto_elements: int = 0
    transport: Transport = EVERYTHING_ARRIVES
    calls_a_step: int = 1
    """Averagings that belong together: all of them are reliable, or none."""

    @property
    def step(self) -> int:
        """The very first averaging is before the first step of several."""
        return (self.k + 1 - self.calls_a_step) // self.calls_a_step


class State(Enum):
    """See the table above."""

    KEEPING = "keeping"
    APPLYING = "applying"
    WAITING = "waiting"
    LEADING = "leading"
    BOUND = "bound"
    ENDED = "ended"


@dataclass(slots=True)
class Application:
    """A join that is kept here."""

    member: Member
    attempt: int
    arrived_at: float
    wait_until: float

    def close_by(self, data_time_s: float, reserve_s: float) -> float:
        """When its group must be closed, so that there is time for the data and for agreeing on it. However slow its
        line is said to be, half of its time is for the others to come."""
        wait_s = self.wait_until - self.arrived_at
        return self.wait_until - min(data_time_s, wait_s / 2) - min(reserve_s, RESERVE_SHARE * wait_s)


class Matchmaking:
    """One daemon's part in finding the group of one key."""

    def __init__(self, round_: Round, config: MatchmakingConfig, rng: random.Random) -> None:
        self.round = round_
        self.state = State.KEEPING
        self.group: Group | None = None
        """Ours, once BOUND."""
        self.why = ""
        """Why there is none, once ENDED."""
        self.now_k: int | None = None
        """Where those who are past this round can be met, once they told us."""
        self.they_wait = False
        """... and they wait there now."""
        self.late_by_s = 0.0
        """How much too late we came, when a group was closed without us."""
        self.missed: tuple[PeerId, ...] = ()
        """Who was expected when we found nobody."""
        self.declined: list[tuple[PeerId, str]] = []
        """Members that answered our Begin with Bound; the owner takes them out."""
        self._config = config
        self._rng = rng
        self._effects: list[Effect] = []
        self._candidates: list[Candidate] = []
        self._expected: tuple[PeerId, ...] = ()
        self._line: Collection[PeerId] = ()
        self._promised: set[PeerId] = set()
        """Those who said, unasked, that they are coming."""
        self._grace_s: float | None = None
        self._coming = False
        self._given_up: dict[PeerId, str] = {}
        self._heard_leading: dict[PeerId, Address] = {}

        self._applications: dict[PeerId, Application] = {}
        self._parked: dict[PeerId, Join] = {}
        self._first_arrival: float | None = None
        self._closed_at: float | None = None
        self._closed: list[Group] = []
        """The groups closed here, ours or not."""
        self._late: dict[PeerId, Application] = {}
        self._late_until = 0.0
        self._hail_at: float | None = None
        self._hailed: set[PeerId] = set()
        self._coming_until: dict[PeerId, float] = {}
        """Called, and still in an earlier round: waited for, slow as it may be."""
        self._excused: set[PeerId] = set()
        """Called, but past this round, as they told us."""
        self._gone_on_k = 0
        """Where the furthest of those can be met."""
        self._gone_on_wait = False
        """... and wait there now."""
        self._may_follow = False
        """Our caller named no averaging: it may as well go on to a later one."""
        self._callers: dict[PeerId, Candidate] = {}
        """Those that said they lead, whether our owner knows them or not."""
        self._forgiven: set[PeerId] = set()
        """Callers that we had given up, and tried once more."""
        self._turned_away = False
        """Somebody waited here in vain for a second member: the next one waits for the grace only."""
        self._unacknowledged: dict[PeerId, int] = {}
        self._next_begin = 0.0

        self._mine: Member | None = None
        self._wait_until = 0.0
        self._attempt = 0
        self._target: Candidate | None = None
        self._standby: Candidate | None = None
        self._patience_until = 0.0
        self._next_join = 0.0
        self._present = self._awaited = 0

    # ---- commands

    def update(
        self,
        candidates: list[Candidate],
        expected: tuple[PeerId, ...],
        grace_s: float | None,
        now: float,
        *,
        coming: bool = False,
        others: Collection[PeerId] = (),
    ) -> None:
        """Who could lead (in any order, ourselves only if dialable), who is waited for, how long after the first.
        `coming`: our own trainer is in an earlier round of this averaging. `others`: of our line, though they can
        neither be dialled nor are expected."""
        self._order_candidates(candidates)
        self._line = others
        self._expected = expected
        self._coming = coming
        self._grace_s = grace_s
        self._settle(now)

    def seek(self, mine: Member, wait_s: float, now: float, *, may_follow: bool = False) -> None:
        """Our trainer is here; it waits so long for this round. `may_follow`: if all others are past it and wait in a
        later averaging, it goes there rather than into a group of those left behind."""
        assert self.state is State.KEEPING
        self._mine = mine
        self._may_follow = may_follow
        self._wait_until = now + wait_s
        if self._closed:
            assert self._closed_at is not None
            self.now_k, self.late_by_s = self.round.k + 1, now - self._closed_at
            self._become_ended(f"averaging {self.round.k} closed {now - self._closed_at:.1f} s ago without us", now)
            return
        self.state = State.APPLYING
        self._settle(now)

    def give_up(self, why: str, now: float) -> None:
        """Our trainer's time for this round is over."""
        if self.state in (State.APPLYING, State.WAITING, State.LEADING):
            self._become_ended(why, now)

    def leave(self, why: str, now: float) -> None:
        """Our trainer goes on elsewhere in this averaging; who applied here is told that this round is over."""
        if self.state is State.LEADING:
            applications = list(self._applications.values())
            self._applications.clear()
            self._turn_away(applications, why, now)
        else:
            self.give_up(why, now)

    def go_on_to(self, k: int, now: float) -> None:
        """Others wait in a later averaging: leave this round for it, and send there who applied here."""
        if self.state not in (State.APPLYING, State.WAITING, State.LEADING):
            return
        self._hear_of_later(k, waiting=True)
        applications = list(self._applications.values())
        if self.state is State.LEADING:
            self._applications.clear()
            self._turn_away(applications, f"others wait in averaging {k}", now)
        else:
            self.now_k, self.they_wait = k, True
            self._become_ended(f"others wait in averaging {k}", now)

    # ---- inputs

    def receive(self, message: MatchmakingMessage, sender: PeerId, now: float) -> None:
        """A message of the sender proved by its channel. Raises RemoteProtocolError for nonsense."""
        match message:
            case Join():
                self._receive_join(message, sender, now)
            case Hail():
                self._receive_hail(sender, now)
            case Coming():
                if sender in self._hailed:
                    self._coming_until[sender] = now + self._config.coming_patience_s
                elif sender in self._line:
                    self._promised.add(sender)
            case Leave():
                self._part_with(sender)
                if message.attempt == HAILED and sender in self._hailed:
                    self._excused.add(sender)
                    self._hear_of_later(message.now_k, message.waiting)
                    self._close_if_due(now)
            case Kept():
                self._receive_kept(message, sender, now)
            case Redirect():
                if message.attempt == self._attempt and self._is_seeking_with(sender):
                    self._follow(Candidate(message.leader, message.address), now)
            case TooShort():
                if message.attempt == self._attempt and self._is_seeking_with(sender):
                    self._become_ended(
                        f"{short(sender)} expects the data to take {message.needed_s:.1f} s, "
                        f"our caller waits only {message.wait_s:.1f} s: give it a longer timeout",
                        now,
                    )
            case Closed():
                if message.attempt == self._attempt and self._is_seeking_with(sender):
                    self.now_k, self.they_wait = message.now_k, message.waiting
                    self.late_by_s = message.closed_s_ago
                    self._become_ended(f"averaging {message.k} closed {message.closed_s_ago:.1f} s ago", now)
                elif message.attempt == HAILED and sender in self._hailed and self._leads_nobody():
                    self.now_k, self.they_wait = message.now_k, message.waiting
                    self.late_by_s = message.closed_s_ago
                    self._become_ended(f"averaging {message.k} closed {message.closed_s_ago:.1f} s ago without us", now)
            case Begin(group=group):
                self._receive_begin(group, sender, now)
            case Begun(group_id=group_id):
                if any(group.group_id == group_id for group in self._closed):
                    self._unacknowledged.pop(sender, None)
            case Bound(group_id=group_id, why=why):
                if self.group and self.group.group_id == group_id:
                    self._unacknowledged.pop(sender, None)
                    self.declined.append((sender, why))
            case _:
                assert_never(message)

    def peer_lost(self, peer: PeerId, why: str, now: float) -> None:
        """No channel to this peer, or its channel broke."""
        self._part_with(peer)
        self._unacknowledged.pop(peer, None)
        self._give_up_candidate(peer, why, now)

    def handle_timer(self, now: float) -> None:
        seeking = self.state in (State.APPLYING, State.WAITING, State.LEADING)
        if seeking and now >= self._wait_until:
            self._become_ended("time ran out in matchmaking", now)
        elif self._target and self.state in (State.APPLYING, State.WAITING):
            if now >= self._patience_until:
                self._say(self._target, Leave(self.round.key, self._attempt))
                self._give_up_candidate(self._target.peer, "did not answer", now)
            elif now >= self._next_join:
                self._send_join(self._target, now)
        self._close_if_due(now)
        self._hail_if_due(now)
        self._close_late_if_due(now)
        self._repeat_begin_if_due(now)

    def next_deadline(self) -> float | None:
        moments: list[float] = []
        if self.state in (State.APPLYING, State.WAITING, State.LEADING):
            moments.append(self._wait_until)
        if self._target and self.state in (State.APPLYING, State.WAITING):
            moments += [self._patience_until, self._next_join]
        if self._applications and not self._closed and self._leads():
            moments.append(self._closing_at())
            if self._hail_at is not None:
                moments.append(self._hail_at)
        if self._late:
            moments.append(self._late_until)
        if self._unacknowledged:
            moments.append(self._next_begin)
        return min(moments, default=None)

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    # ---- what the owner reads

    def applicants(self) -> set[PeerId]:
        """Others whose joins are kept here."""
        return {*self._applications, *self._parked} - {self.round.me}

    def waiting_for(self) -> str:
        """In words, for the trainer."""
        match self.state:
            case State.LEADING:
                missing = [short(peer) for peer in self._missing()]
                here = len(self._applications)
                names = ", ".join(missing[:4]) or "nobody"
                return f"{here} of {here + len(missing)} of the group here, waiting for {names}"
            case State.WAITING if self._target:
                return f"{self._present} of {self._awaited} of the group here, {short(self._target.peer)} leads"
            case State.APPLYING if self._target:
                return f"asking {short(self._target.peer)} for the group"
            case _:
                return ""

    # ---- seeking

    def _settle(self, now: float) -> None:
        """After anything that may change who leads: apply to the first candidate, or lead."""
        if self._leads():
            for peer, join in list(self._parked.items()):
                del self._parked[peer]
                self._admit(join, now)
        elif self.state is State.LEADING:
            self._become_applicant_again()
        if self.state is State.APPLYING and (self._target is None or self._target.peer in self._given_up):
            self._apply_to_next(now)
        self._close_if_due(now)

    def _order_candidates(self, candidates: list[Candidate]) -> None:
        every = {**self._callers, **{candidate.peer: candidate for candidate in candidates}}
        self._candidates = sorted(every.values(), key=lambda c: leadership(self.round.key, c.peer))

    def _apply_to_next(self, now: float) -> None:
        before = self._before_us()
        if before:
            self._apply(before[0], before[1] if len(before) > 1 else None, now)
        elif self._is_candidate():
            self._become_leading(now)
        else:
            self._become_ended("nobody in the group can be dialled", now)

    def _apply(self, target: Candidate, standby: Candidate | None, now: float) -> None:
        self._attempt += 1
        self._target, self._standby = target, standby
        place = len(self._given_up)
        self._patience_until = now + self._config.join_patience_s * (1 + self._config.patience_growth * place)
        self._send_join(target, now)
        if standby:
            self._send_join(standby, now)

    def _follow(self, leader: Candidate, now: float) -> None:
        if leader.peer == self.round.me or leader.peer in self._given_up:
            return
        if self.state is State.WAITING:
            # Who led us met one before it and leads no more. Only ever upwards: redirects cannot go in circles.
            assert self._target is not None
            if leadership(self.round.key, leader.peer) >= leadership(self.round.key, self._target.peer):
                return
            self._say(self._target, Leave(self.round.key, self._attempt))
            self.state = State.APPLYING
        if self._target is None or self._target.peer != leader.peer:
            self._apply(leader, None, now)

    def _send_join(self, to: Candidate, now: float) -> None:
        assert self._mine is not None
        self._next_join = now + self._config.rejoin_s
        unreachable = tuple(c.peer for c in self._candidates if c.peer in self._given_up)[:UNREACHABLE_TOLD_MAX]
        self._say(
            to,
            Join(
                self.round.key,
                self.round.plan_version,
                self.round.plan,
                self.round.k,
                self.round.j,
                self._attempt,
                self._mine,
                self.round.cell,
                max(0.0, self._wait_until - now),
                unreachable,
                passed_on=False,
            ),
        )

    def _receive_kept(self, kept: Kept, sender: PeerId, now: float) -> None:
        if kept.attempt != self._attempt or self._target is None or not self._is_asked(sender):
            return
        if kept.leading and self.state is State.APPLYING:
            # The first two were asked together: whoever leads, the other is left.
            for asked in (self._target, self._standby):
                if asked and asked.peer != sender:
                    self._say(asked, Leave(self.round.key, self._attempt))
            if self._standby and self._standby.peer == sender:
                self._target = self._standby
            self._standby = None
            self.state = State.WAITING
            self._heard_leading[sender] = self._target.address
            self._log(f"waiting: {short(sender)} leads")
            for peer, join in list(self._parked.items()):
                del self._parked[peer]
                self._answer(join, Redirect(self.round.key, join.attempt, sender, self._target.address))
            for application in self._applications.values():  # we led until we heard of one before us
                to = Candidate(application.member.peer, application.member.address)
                self._say(to, Redirect(self.round.key, application.attempt, sender, self._target.address))
            self._applications.clear()
        if sender == self._target.peer:
            self._present, self._awaited = kept.present, kept.expected
            self._patience_until = now + max(kept.patience_s, self._config.rejoin_s + self._config.join_patience_s)

    def _give_up_candidate(self, peer: PeerId, why: str, now: float) -> None:
        self._heard_leading.pop(peer, None)
        if peer in self._given_up:
            return
        self._given_up[peer] = why
        if self._standby and self._standby.peer == peer:
            self._standby = None
        if self._target and self._target.peer == peer:
            self._target = None
            if self.state in (State.APPLYING, State.WAITING):
                self._log(f"gives up {short(peer)}: {why}")
                if self._standby:
                    self._say(self._standby, Leave(self.round.key, self._attempt))
                self.state = State.APPLYING
        self._settle(now)

    def _receive_begin(self, group: Group, sender: PeerId, now: float) -> None:
        rank = group.rank_of(self.round.me)
        if (
            rank is None
            or (group.rank_of(sender) is None and sender != group.leader)
            or (group.k, group.j, group.axis) != (self.round.k, self.round.j, self.round.axis)
            or not is_sound(group, self.round.layout)
            or group.codec not in (CHOICES if self.round.auto_elements else ("",))
            or group.transport not in (("", LOSSY) if self.round.transport.may_lose else ("",))
        ):
            raise RemoteProtocolError(f"{short(sender)} began an impossible group")
        leader = self._address_of(sender)
        if group.members[rank].incarnation != self.round.incarnation:
            self._say(leader, Bound(self.round.key, group.group_id, "was started anew since it joined"))
        elif self.group is not None and self.group.group_id == group.group_id:
            self._say(leader, Begun(self.round.key, group.group_id))
        elif self._mine is not None and group.members[rank].anchor != self._mine.anchor:
            self._say(leader, Bound(self.round.key, group.group_id, "holds another anchor by now"))
        elif self.state in (State.APPLYING, State.WAITING, State.LEADING):
            self._say(leader, Begun(self.round.key, group.group_id))
            for asked in (self._target, self._standby):
                if asked and asked.peer not in (sender, group.leader):
                    self._say(asked, Leave(self.round.key, self._attempt))
            self._become_bound(group, now)
        else:
            why = "in another group" if self.group else self.why or "its trainer is not here"
            self._say(leader, Bound(self.round.key, group.group_id, why))

    # ---- leading

    def _receive_join(self, join: Join, sender: PeerId, now: float) -> None:
        applicant = join.applicant.peer
        if (sender != applicant) != join.passed_on or applicant == self.round.me or not join_is_sound(join):
            raise RemoteProtocolError(f"{short(sender)} sent a join of {short(applicant)}")
        if self._closed or self.group:
            self._answer_late(join, now)
        elif self._leads():
            self._admit(join, now)
        else:
            self._send_on(join, now)

    def _send_on(self, join: Join, now: float) -> None:
        """Somebody before us may lead: say who, or keep the join until we know."""
        first = self._before_us()[0] if self._before_us() else None
        leader = first if first and first.peer in self._heard_leading else None
        if self.state is State.WAITING and self._target:
            leader = self._target
        if len(self._parked) >= APPLICANTS_MAX:
            return
        if leader and leader.peer not in join.unreachable:
            self._answer(join, Redirect(self.round.key, join.attempt, leader.peer, leader.address))
            return
        if join.passed_on:
            return  # one hop only
        self._parked[join.applicant.peer] = join
        if first and first.peer in join.unreachable:
            self._say(first, replace(join, passed_on=True))
        patience = max(self._patience_until - now, 0) if self._target else 0.0
        self._answer(
            join,
            Kept(
                self.round.key,
                join.attempt,
                leading=False,
                patience_s=patience or self._config.join_patience_s,
                present=len(self._parked),
                expected=len(self._expected),
            ),
        )

    def _admit(self, join: Join, now: float) -> None:
        if join.wait_s < self._data_time_min_s(join.applicant):
            needed = self._data_time_s(join.applicant)
            self._answer(join, TooShort(self.round.key, join.attempt, join.wait_s, needed))
            return
        if len(self._applications) >= APPLICANTS_MAX:
            return
        self._file(join.applicant, join.attempt, join.wait_s, now)
        self._answer(join, self._kept(join.attempt))
        self._close_if_due(now)

    def _file(self, member: Member, attempt: int, wait_s: float, now: float) -> None:
        known = self._applications.get(member.peer)
        if known and known.member.incarnation == member.incarnation:
            known.attempt, known.wait_until, known.member = attempt, now + wait_s, member
            return
        self._applications[member.peer] = Application(member, attempt, now, now + wait_s)
        if self._first_arrival is None:
            self._first_arrival = now
            self._hail_at = now + self._config.hail_after_s

    def _part_with(self, peer: PeerId) -> None:
        self._applications.pop(peer, None)
        self._parked.pop(peer, None)
        self._late.pop(peer, None)
        if not self._applications:
            self._first_arrival = self._hail_at = None

    def _kept(self, attempt: int) -> Kept:
        here = len(self._applications)
        missing = len(self._missing())
        patience = self._config.rejoin_s + self._config.join_patience_s
        return Kept(self.round.key, attempt, leading=True, patience_s=patience, present=here, expected=here + missing)

    def _closing_at(self) -> float:
        """When the group closes at the latest, as things stand."""
        assert self._first_arrival is not None
        latest = min(self._close_by(application) for application in self._applications.values())
        missing = self._missing()
        if not missing:
            return min(latest, self._first_arrival + self._config.lone_wait_s)
        own_trainer = self.round.me in self._expected or self.round.me in self._applications
        if len(self._applications) < 2 and own_trainer and not self._turned_away:
            return latest  # no group yet: its caller said how long it waits, and Hail finds out the dead
        if self._coming and self.state is State.KEEPING:
            return latest  # we shall be there as soon as the round before is over
        grace_s = self._grace_s
        if grace_s is None:  # nobody knows yet how far apart trainers arrive
            grace_s = max(0.0, latest - self._first_arrival) / 2
        on_their_way = max((self._coming_until.get(peer, 0.0) for peer in missing), default=0.0)
        return min(latest, max(self._first_arrival + grace_s, on_their_way))

    def _close_if_due(self, now: float) -> None:
        if self._closed or self.group or not self._applications or not self._leads():
            return
        missing = self._missing()
        if now < self._closing_at() and (missing or (len(self._applications) < 2 and self._others())):
            return
        absent = tuple(Absent(peer, "was expected but did not come in time") for peer in missing)
        applications = sorted(self._applications.values(), key=lambda a: (a.arrived_at, a.member.peer))
        if not missing and self._may_follow and self._gone_on_wait and self.state is State.LEADING:
            self._applications.clear()
            self._turn_away(applications, f"the others are in averaging {self._gone_on_k}", now)
            return
        hopeless = [application for application in applications if self._is_hopeless(application, now)]
        if hopeless:  # the others go without it
            for application in hopeless:
                del self._applications[application.member.peer]
            self._first_arrival = min((a.arrived_at for a in self._applications.values()), default=None)
            self._turn_away(hopeless, "time ran out in matchmaking", now)
            self._close_if_due(now)
            return
        self._applications.clear()
        self._first_arrival = self._hail_at = None
        self._close(applications, absent, now)

    def _hail_if_due(self, now: float) -> None:
        """Call those we miss; the driver tells us of those it cannot reach, and nobody waits for the dead."""
        if self._hail_at is None or now < self._hail_at or self._closed or self.group or not self._leads():
            return
        self._hail_at = now + self._config.rejoin_s
        missing = set(self._missing() or self._others()) - {self.round.me}
        for peer in sorted(missing):  # one that cannot be dialled hears it where it dialled us before
            self._hailed.add(peer)
            self._say(self._address_of(peer), Hail(self.round.key, self.round.k, self.round.j))

    def _receive_hail(self, sender: PeerId, now: float) -> None:
        """It leads and misses us. One that just joined may be before all we know of."""
        caller = self._address_of(sender)
        if self._closed or self.group:
            # Who leads a round whose group it is in has lost Begin with the leader that sent it.
            group = next((g for g in (self.group, *self._closed) if g and g.rank_of(sender) is not None), None)
            self._say(caller, Begin(group) if group else self._closed_answer(HAILED, now))
            return
        if sender in self._given_up:
            if sender in self._forgiven:
                return  # it calls and does not answer
            self._forgiven.add(sender)
            del self._given_up[sender]
        if len(self._callers) >= CALLERS_MAX and sender not in self._callers:
            return
        self._callers[sender] = caller
        self._order_candidates(self._candidates)
        ours = self._target and leadership(self.round.key, self._target.peer)
        if self.state in (State.APPLYING, State.WAITING) and ours and leadership(self.round.key, sender) < ours:
            self._follow(caller, now)
        self._settle(now)

    def _close(self, applications: list[Application], absent: tuple[Absent, ...], now: float) -> None:
        members = sorted((a.member for a in applications), key=lambda m: (m.coordinate, m.peer))
        if len(members) < 2 or not any(member.dialable for member in members):
            why = "nobody else came" if len(members) < 2 else "nobody in the group can be dialled"
            self.missed = tuple(one.peer for one in absent)
            self._turned_away = True
            self._turn_away(applications, why, now)
            return
        self._closed_at = now
        first = applications[0].arrived_at
        auto = self._choose_codec(members) if self.round.auto_elements else None
        ranges = self.round.wire_bytes // (2 * PAYLOAD_BYTES_MAX) + 1
        transport = choose_transport(self.round.transport, members, k=self.round.step, ranges=ranges)
        group = Group(
            group_id=GroupId(self._rng.randbytes(16)),
            token=self._rng.randbytes(16),
            key=self.round.key,
            k=self.round.k,
            j=self.round.j,
            axis=self.round.axis,
            leader=self.round.me,
            members=tuple(members),
            spans=spans_of(self.round.layout, members),
            chunk_bytes=chunk_bytes_of(self.round.layout, members, self.round.chunk_bytes),
            budget_s=min(a.wait_until for a in applications) - now,
            absent=absent,
            arrival_offsets_s=tuple(a.arrived_at - first for a in applications),
            now_k=self._gone_on_k,
            codec=auto.codec if auto else "",
            codec_why=auto.why if auto else "",
            transport=LOSSY if transport.is_lossy else "",
            transport_why=transport.why,
        )
        self._closed.append(group)
        self._log(f"closed a group of {len(members)}" + (f", {len(absent)} expected did not come" if absent else ""))
        for member in members:
            if member.peer != self.round.me:
                self._unacknowledged[member.peer] = 1
                self._say(Candidate(member.peer, member.address), Begin(group))
        self._next_begin = now + self._config.rejoin_s
        if group.rank_of(self.round.me) is not None:
            self._become_bound(group, now)

    def _choose_codec(self, members: Sequence[Member]) -> Choice:
        return choose(self.round.auto_bytes, self.round.auto_elements, [known_rate(member) for member in members])

    def _turn_away(self, applications: list[Application], why: str, now: float) -> None:
        """No group for these: each ends alone."""
        for application in applications:
            if application.member.peer == self.round.me:
                self.now_k, self.they_wait = self._gone_on_k or None, self._gone_on_wait
                self._become_ended(why, now)
            else:
                to = Candidate(application.member.peer, application.member.address)
                k, j, now_k = self.round.k, self.round.j, max(self.round.k, self._gone_on_k)
                self._say(to, Closed(self.round.key, application.attempt, k, j, 0.0, now_k, self._gone_on_wait))

    def _answer_late(self, join: Join, now: float) -> None:
        for group in (self.group, *self._closed):
            if group is None:
                continue
            rank = group.rank_of(join.applicant.peer)
            if rank is not None and group.members[rank].incarnation == join.applicant.incarnation:
                self._answer(join, Begin(group))
                return
        if self._closed and len(self._late) < APPLICANTS_MAX:
            if not self._late:
                self._late_until = now + self._config.late_window_s
            self._late[join.applicant.peer] = Application(join.applicant, join.attempt, now, now + join.wait_s)
            late = len(self._late)
            self._answer(join, replace(self._kept(join.attempt), present=late, expected=late))
            return
        self._answer(join, self._closed_answer(join.attempt, now))

    def _close_late_if_due(self, now: float) -> None:
        """Late arrivals under the key get a second group among themselves; a single one is told that it is late."""
        if not self._late or now < self._late_until:
            return
        late = sorted(self._late.values(), key=lambda a: (a.arrived_at, a.member.peer))
        late = [application for application in late if not self._is_hopeless(application, now)]
        self._late.clear()
        if len(late) > 1 and any(a.member.dialable for a in late):
            closed_at = self._closed_at
            earlier = {member.peer for group in self._closed for member in group.members}
            self._close(late, tuple(Absent(peer, "was in an earlier group") for peer in sorted(earlier)), now)
            self._closed_at = closed_at
            return
        for application in late:
            to = Candidate(application.member.peer, application.member.address)
            self._say(to, self._closed_answer(application.attempt, now))

    def _closed_answer(self, attempt: int, now: float) -> Closed:
        since = now - (self._closed_at if self._closed_at is not None else now)
        return Closed(self.round.key, attempt, self.round.k, self.round.j, since, self.round.k + 1)

    def _repeat_begin_if_due(self, now: float) -> None:
        if not self._unacknowledged or now < self._next_begin:
            return
        self._next_begin = now + self._config.rejoin_s
        for peer, tries in list(self._unacknowledged.items()):
            if tries >= self._config.begin_tries:
                del self._unacknowledged[peer]
                continue
            self._unacknowledged[peer] = tries + 1
            for group in self._closed:
                rank = group.rank_of(peer)
                if rank is not None:
                    self._say(Candidate(peer, group.members[rank].address), Begin(group))

    # ---- transitions

    def _become_leading(self, now: float) -> None:
        assert self.state is State.APPLYING
        assert self._mine is not None
        self.state = State.LEADING
        self._target = self._standby = None
        self._log("leads")
        self._file(self._mine, 0, max(0.0, self._wait_until - now), now)
        self._settle(now)

    def _become_applicant_again(self) -> None:
        """One before us turned up. Who applied here is sent on when that one says that it leads, not before."""
        assert self.state is State.LEADING
        self.state = State.APPLYING
        self._target = self._standby = None
        self._applications.pop(self.round.me, None)
        self._log("leads no more")

    def _become_bound(self, group: Group, now: float) -> None:
        assert self.state in (State.APPLYING, State.WAITING, State.LEADING)
        self.state = State.BOUND
        self.group = group
        self._closed_at = now if self._closed_at is None else self._closed_at
        self._target = self._standby = None
        self._part_with_applicants(now)

    def _become_ended(self, why: str, now: float) -> None:
        assert self.state in (State.KEEPING, State.APPLYING, State.WAITING, State.LEADING)
        for asked in (self._target, self._standby):
            if asked:
                self._say(asked, Leave(self.round.key, self._attempt))
        self.state = State.ENDED
        self.why = why
        self._target = self._standby = None
        self._part_with(self.round.me)
        self._log(f"ended: {why}")
        if not self._closed and self._applications:
            self._close_if_due(now)

    def _part_with_applicants(self, now: float) -> None:
        """We lead nobody any more: those still kept here look elsewhere."""
        if self._closed:
            return
        for application in self._applications.values():
            if application.member.peer != self.round.me:
                to = Candidate(application.member.peer, application.member.address)
                self._say(to, self._closed_answer(application.attempt, now))
        self._applications.clear()
        for join in self._parked.values():
            self._answer_late(join, now)
        self._parked.clear()

    # ---- small things

    def _is_candidate(self) -> bool:
        return any(candidate.peer == self.round.me for candidate in self._candidates)

    def _before_us(self) -> list[Candidate]:
        """Live candidates before ourselves."""
        mine = leadership(self.round.key, self.round.me) if self._is_candidate() else b"\xff" * 33
        return [
            candidate
            for candidate in self._candidates
            if candidate.peer not in self._given_up and leadership(self.round.key, candidate.peer) < mine
        ]

    def _leads(self) -> bool:
        return self._is_candidate() and self.state is not State.WAITING and not self._before_us()

    def _missing(self) -> list[PeerId]:
        expected = [*self._expected, *sorted(self._promised.difference(self._expected))]
        return [peer for peer in expected if peer not in self._applications and peer not in self._excused]

    def _hear_of_later(self, k: int, waiting: bool) -> None:
        if k >= self._gone_on_k:
            self._gone_on_wait = waiting or (self._gone_on_wait and k == self._gone_on_k)
            self._gone_on_k = k

    def _others(self) -> list[PeerId]:
        """Those of our line who might come, expected or not."""
        silent = {self.round.me, *self._applications, *self._given_up, *self._excused}
        line = dict.fromkeys([*(candidate.peer for candidate in self._candidates), *self._line])
        return [peer for peer in line if peer not in silent]

    def _leads_nobody(self) -> bool:
        return self.state is State.LEADING and self._applications.keys() <= {self.round.me}

    def _is_asked(self, peer: PeerId) -> bool:
        return any(asked is not None and asked.peer == peer for asked in (self._target, self._standby))

    def _is_seeking_with(self, peer: PeerId) -> bool:
        return self.state in (State.APPLYING, State.WAITING) and self._is_asked(peer)

    def _data_time_s(self, member: Member) -> float:
        """What the data of a round should take this member over its slower direction."""
        return self.round.wire_bytes / (known_rate(member) or self._config.rate_assumed_bytes_s)

    def _data_time_min_s(self, member: Member) -> float:
        """What it takes if the rate was measured too low: only who cannot do it even so is refused. A rate is measured
        in rounds only, so one that is refused for its rate cannot show a better one."""
        return self._data_time_s(member) / RATE_DOUBT

    def _is_hopeless(self, application: Application, now: float) -> bool:
        """Its caller is about to give up, or has."""
        return application.wait_until - self._data_time_min_s(application.member) <= now

    def _close_by(self, application: Application) -> float:
        return application.close_by(self._data_time_s(application.member), self._config.reserve_s)

    def _address_of(self, peer: PeerId) -> Candidate:
        known = next((c for c in (self._target, self._standby, *self._candidates) if c and c.peer == peer), None)
        return known or Candidate(peer, Address(""))

    def _answer(self, join: Join, message: Message) -> None:
        self._say(Candidate(join.applicant.peer, join.applicant.address), message)

    def _say(self, to: Candidate, message: Message) -> None:
        self._effects.append(Send(to.peer, to.address, message))

    def _log(self, text: str) -> None:
        self._effects.append(Log(f"round {self.round.k}.{self.round.j} matching: {text}"))


def join_is_sound(join: Join) -> bool:
    """Whether one that joins can be a member: a group with an impossible member is refused by all the others."""
    return (
        0 <= join.applicant.weight <= CARRIED_WEIGHT_MAX
        and len(join.unreachable) <= UNREACHABLE_TOLD_MAX
        and len(join.cell) <= AXES_MAX
        and len(join.applicant.agreement) <= AGREEMENT_BYTES_MAX
        and report_is_sound(join.applicant.paths)
        and standing_is_sound(join.applicant.standing, join.k)
    )


def is_sound(group: Group, layout: Layout) -> bool:
    """Whether a group from outside hangs together: ordered members, spans that cover the vector, a sane budget."""
    order = [(member.coordinate, member.peer) for member in group.members]
    return (
        2 <= len(group.members) <= APPLICANTS_MAX
        and order == sorted(set(order))
        and len({member.peer for member in group.members}) == len(group.members)
        and all(0 <= member.weight <= CARRIED_WEIGHT_MAX for member in group.members)
        and len(group.spans) == len(group.members) + 1
        and group.spans[0] == 0
        and group.spans[-1] == layout.elements
        and list(group.spans) == sorted(group.spans)
        and all(
            group.members[rank].dialable or group.spans[rank] == group.spans[rank + 1]
            for rank in range(len(group.members))
        )
        and 0 < group.budget_s < float("inf")
        and 4096 <= group.chunk_bytes <= CHUNK_BYTES_MAX
        and all(report_is_sound(member.paths) for member in group.members)
        and all(standing_is_sound(member.standing, group.k) for member in group.members)
        and (not group.transport or len(group.members) <= MEMBERS_MAX)
    )


def standing_is_sound(standing: Standing, k: int) -> bool:
    """Whether one who comes to averaging k can own that: nobody took part in what is yet to come."""
    return 0 <= standing.through <= k + 1 and 0 <= standing.start <= standing.stop


def grace_from(offsets_s: list[float], *, factor: float, floor_s: float) -> float:
    """How long after the first arrival a group stays open: median + factor * MAD of earlier ones, at least floor."""
    ordered = sorted(offsets_s)
    median = ordered[len(ordered) // 2]
    deviations = sorted(abs(offset - median) for offset in ordered)
    return max(floor_s, median + factor * deviations[len(deviations) // 2])


__all__ = [
    "Candidate",
    "Matchmaking",
    "MatchmakingConfig",
    "Rank",
    "Round",
    "State",
    "grace_from",
    "is_sound",
    "join_is_sound",
]

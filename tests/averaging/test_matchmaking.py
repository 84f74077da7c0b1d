"""The seven rules of matchmaking, each by the message sequence it answers. The test plays everybody else."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pytest

from moshpitd.averaging.effects import Send
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.grid import leadership
from moshpitd.averaging.matchmaking import (
    HAILED,
    Candidate,
    Matchmaking,
    MatchmakingConfig,
    Round,
    State,
    grace_from,
    is_sound,
)
from moshpitd.averaging.messages import (
    Address,
    Begin,
    Begun,
    Bound,
    Closed,
    Group,
    Hail,
    Join,
    Kept,
    Leave,
    MatchmakingMessage,
    Member,
    Redirect,
    Standing,
    TooShort,
)
from moshpitd.averaging.names import GroupId, Incarnation, Key, PeerId, digest, key, short
from moshpitd.averaging.partition import spans_of
from moshpitd.averaging.vector import Vector

LAYOUT = Vector.of({"w": np.zeros(3 * 4096, np.float32)}).layout
LINE = key("a line on paper")
ANN, BEN, CAT, DAN, EVA = sorted((PeerId(digest(n).hex()) for n in "abcde"), key=lambda p: leadership(LINE, p))
"""In the order in which they lead."""
CONFIG = MatchmakingConfig()
M = TypeVar("M", bound=MatchmakingMessage)


def incarnation_of(peer: PeerId) -> Incarnation:
    return Incarnation(int(peer[:12], 16))


def candidate(peer: PeerId) -> Candidate:
    return Candidate(peer, Address(f"{short(peer)}:1"))


def member(peer: PeerId, *, dialable: bool = True, weight: float = 1.0) -> Member:
    coordinate = [ANN, BEN, CAT, DAN, EVA].index(peer)
    address = candidate(peer).address if dialable else Address("")
    return Member(peer, incarnation_of(peer), coordinate, weight, address, dialable)


def round_of(me: PeerId, k: int = 4) -> Round:
    return Round(LINE, k, 1, 0, 1, b"theplan!", me, incarnation_of(me), (0, 0), LAYOUT, 1 << 14, 2 * LAYOUT.byte_size)


def join_of(peer: PeerId, *, attempt: int = 1, wait_s: float = 20.0, unreachable: tuple[PeerId, ...] = ()) -> Join:
    return Join(LINE, 1, b"theplan!", 4, 1, attempt, member(peer), (0, 0), wait_s, unreachable, passed_on=False)


def group_of(*peers: PeerId, leader: PeerId | None = None, group_id: bytes = b"g" * 16) -> Group:
    members = tuple(sorted((member(peer) for peer in peers), key=lambda m: (m.coordinate, m.peer)))
    return Group(
        GroupId(group_id),
        b"t" * 16,
        LINE,
        4,
        1,
        0,
        leader or peers[0],
        members,
        spans_of(LAYOUT, members),
        1 << 14,
        10.0,
        (),
        tuple(0.0 for _ in peers),
    )


@dataclass
class Table:
    """One machine under test, what it said, and the time."""

    machine: Matchmaking
    now: float = 0.0

    def said(self, kind: type[M], to: PeerId | None = None) -> list[M]:
        """Since the last look, of this kind; whatever else was said is forgotten."""
        sends = [effect for effect in self.machine.take_effects() if isinstance(effect, Send)]
        return [s.message for s in sends if isinstance(s.message, kind) and to in (None, s.peer)]

    def said_to(self) -> list[tuple[PeerId, type]]:
        return [(e.peer, type(e.message)) for e in self.machine.take_effects() if isinstance(e, Send)]

    def hear(self, message: MatchmakingMessage, sender: PeerId) -> None:
        self.machine.receive(message, sender, self.now)

    def seek(self, *, wait_s: float = 20.0) -> None:
        self.machine.seek(member(self.machine.round.me), wait_s, self.now)

    def wait_until(self, done: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Let the machine's own timers ring, one after another."""
        limit = self.now + limit_s
        while not done():
            due = self.machine.next_deadline()
            assert due is not None and due <= limit, f"nothing more happens after {self.now}"
            self.now = max(self.now, due)
            self.machine.handle_timer(self.now)

    def wait(self, seconds: float) -> None:
        limit = self.now + seconds
        while (due := self.machine.next_deadline()) is not None and due <= limit:
            self.now = max(self.now, due)
            self.machine.handle_timer(self.now)
        self.now = limit


def table(
    me: PeerId,
    *,
    candidates: tuple[PeerId, ...] = (ANN, BEN, CAT, DAN, EVA),
    expected: tuple[PeerId, ...] = (ANN, BEN, CAT),
    grace_s: float | None = 1.0,
) -> Table:
    machine = Matchmaking(round_of(me), CONFIG, random.Random(7))
    machine.update([candidate(peer) for peer in candidates], expected, grace_s, 0.0)
    return Table(machine)


def waiting_with(leader: PeerId, me: PeerId) -> Table:
    """A machine whose join the leader keeps."""
    seat = table(me)
    seat.seek()
    seat.hear(Kept(LINE, seat.said(Join, leader)[0].attempt, True, 3.0, 2, 3), leader)
    assert seat.machine.state is State.WAITING
    seat.said_to()
    return seat


# ---- 1. bound when it answers Begin; one live join


def test_1_nothing_is_sent_to_a_group_before_begin_is_answered() -> None:
    seat = waiting_with(ANN, CAT)
    assert seat.machine.group is None

    seat.hear(Begin(group_of(ANN, CAT)), ANN)

    assert seat.machine.state is State.BOUND
    assert seat.said(Begun, ANN) == [Begun(LINE, GroupId(b"g" * 16))]


def test_1_a_bound_peer_answers_any_other_begin_with_bound() -> None:
    seat = waiting_with(ANN, CAT)
    first, second = group_of(ANN, CAT), group_of(BEN, CAT, group_id=b"h" * 16)
    seat.hear(Begin(first), ANN)
    seat.said_to()

    seat.hear(Begin(second), BEN)

    (answer,) = seat.said(Bound, BEN)
    assert answer.group_id == second.group_id
    assert answer.why == "in another group"
    assert seat.machine.group == first, "nobody is ever in two groups of one key"


def test_1_a_begin_that_comes_after_giving_up_is_answered_with_bound() -> None:
    seat = waiting_with(ANN, CAT)
    seat.machine.give_up("its trainer is gone", seat.now)
    seat.said_to()

    seat.hear(Begin(group_of(ANN, CAT)), ANN)

    (answer,) = seat.said(Bound, ANN)
    assert "trainer is gone" in answer.why


def test_1_the_leader_hands_on_who_declined() -> None:
    seat = table(ANN, expected=(ANN, BEN))
    seat.seek()
    seat.hear(join_of(BEN), BEN)
    group = seat.said(Begin, BEN)[0].group

    seat.hear(Bound(LINE, group.group_id, "in another group"), BEN)

    assert seat.machine.declined == [(BEN, "in another group")]


def test_1_a_lost_begin_heals_when_the_join_is_repeated() -> None:
    seat = waiting_with(ANN, CAT)
    seat.wait(CONFIG.rejoin_s)
    (again,) = seat.said(Join, ANN)

    leader = table(ANN, expected=(ANN, CAT))
    leader.seek()
    leader.hear(replace(again), CAT)
    (lost,) = leader.said(Begin, CAT)
    leader.hear(again, CAT)

    assert leader.said(Begin, CAT) == [lost], "the very same group"


def test_1_a_begin_that_nobody_acknowledges_is_said_three_times() -> None:
    seat = table(ANN, expected=(ANN, BEN))
    seat.seek()
    seat.hear(join_of(BEN), BEN)

    seat.wait(10 * CONFIG.rejoin_s)

    assert len(seat.said(Begin, BEN)) == CONFIG.begin_tries


def test_1_an_acknowledged_begin_is_not_repeated() -> None:
    seat = table(ANN, expected=(ANN, BEN))
    seat.seek()
    seat.hear(join_of(BEN), BEN)
    (begin,) = seat.said(Begin, BEN)

    seat.hear(Begun(LINE, begin.group.group_id), BEN)
    seat.wait(10 * CONFIG.rejoin_s)

    assert seat.said(Begin, BEN) == []


def test_1_answers_to_an_earlier_attempt_are_void() -> None:
    seat = table(CAT)
    seat.seek()
    (first,) = seat.said(Join, ANN)
    seat.machine.peer_lost(ANN, "connection lost", seat.now)
    (second,) = seat.said(Join, BEN)
    assert second.attempt > first.attempt

    seat.hear(Kept(LINE, first.attempt, True, 3.0, 1, 3), BEN)
    seat.hear(Closed(LINE, first.attempt, 4, 1, 0.1, 5), BEN)

    assert seat.machine.state is State.APPLYING


# ---- 2. late joins


def test_2_a_fellow_members_late_join_is_answered_with_the_group_itself() -> None:
    seat = waiting_with(ANN, BEN)
    group = group_of(ANN, BEN, CAT)
    seat.hear(Begin(group), ANN)
    seat.said_to()

    seat.hear(join_of(CAT), CAT)

    assert seat.said(Begin, CAT) == [Begin(group)]


def test_2_a_strangers_late_join_is_answered_with_closed() -> None:
    seat = waiting_with(ANN, BEN)
    seat.hear(Begin(group_of(ANN, BEN, CAT)), ANN)
    seat.said_to()
    seat.wait(0.4)

    seat.hear(join_of(DAN, attempt=3), DAN)

    (answer,) = seat.said(Closed, DAN)
    assert (answer.k, answer.j, answer.attempt, answer.now_k) == (4, 1, 3, 5)
    assert answer.closed_s_ago == pytest.approx(0.4)


def test_2_a_member_that_restarted_is_a_stranger() -> None:
    seat = waiting_with(ANN, BEN)
    seat.hear(Begin(group_of(ANN, BEN, CAT)), ANN)
    seat.said_to()
    reborn = replace(join_of(CAT), applicant=replace(member(CAT), incarnation=Incarnation(1)))

    seat.hear(reborn, CAT)

    assert seat.said_to() == [(CAT, Closed)]


def test_2_one_told_closed_ends_with_the_reason_and_what_is_open_now() -> None:
    seat = waiting_with(ANN, CAT)

    seat.hear(Closed(LINE, 1, 4, 1, 0.3, 5), ANN)

    assert seat.machine.state is State.ENDED
    assert seat.machine.why == "averaging 4 closed 0.3 s ago"
    assert seat.machine.now_k == 5


def test_2_only_the_one_that_was_asked_may_say_closed() -> None:
    seat = waiting_with(ANN, CAT)

    seat.hear(Closed(LINE, 1, 4, 1, 0.3, 5), EVA)

    assert seat.machine.state is State.WAITING


# ---- 3. redirects and parking


def test_3_a_follower_redirects_to_the_leader_it_heard_from() -> None:
    seat = waiting_with(ANN, BEN)

    seat.hear(join_of(CAT, attempt=2), CAT)

    (answer,) = seat.said(Redirect, CAT)
    assert (answer.leader, answer.address, answer.attempt) == (ANN, candidate(ANN).address, 2)


def test_3_one_that_heard_nothing_yet_parks_the_join_and_says_for_how_long() -> None:
    seat = table(BEN)
    seat.seek()
    seat.said_to()

    seat.hear(join_of(CAT), CAT)

    (answer,) = seat.said(Kept, CAT)
    assert not answer.leading
    assert 0 < answer.patience_s <= CONFIG.join_patience_s


def test_3_a_parked_join_is_redirected_when_the_smaller_one_answers() -> None:
    seat = table(BEN)
    seat.seek()
    attempt = seat.said(Join, ANN)[0].attempt
    seat.hear(join_of(CAT), CAT)
    seat.said_to()

    seat.hear(Kept(LINE, attempt, True, 3.0, 1, 3), ANN)

    (answer,) = seat.said(Redirect, CAT)
    assert answer.leader == ANN


def test_3_a_parked_join_is_admitted_when_the_smaller_one_is_given_up() -> None:
    seat = table(BEN)
    seat.seek()
    seat.hear(join_of(CAT), CAT)
    seat.said_to()

    seat.machine.peer_lost(ANN, "could not be dialled", seat.now)

    (answer,) = seat.said(Kept, CAT)
    assert answer.leading
    assert seat.machine.state is State.LEADING


def test_3_patience_grows_with_each_candidate_given_up() -> None:
    seat = table(DAN)
    seat.seek()
    lost: list[float] = []
    for asked in (ANN, BEN, CAT):
        before = seat.now
        seat.wait_until(lambda asked=asked: (asked, Leave) in seat.said_to())
        lost.append(seat.now - before)

    assert lost == sorted(lost)
    assert lost[0] == pytest.approx(CONFIG.join_patience_s)
    assert lost[1] == pytest.approx(CONFIG.join_patience_s * (1 + CONFIG.patience_growth))
    assert seat.machine.state is State.LEADING, "nobody before it is left"


def test_3_a_redirect_is_followed() -> None:
    seat = table(DAN, candidates=(CAT, DAN))
    seat.seek()
    attempt = seat.said(Join, CAT)[0].attempt

    seat.hear(Redirect(LINE, attempt, ANN, candidate(ANN).address), CAT)

    assert len(seat.said(Join, ANN)) == 1


def test_3_a_redirect_to_one_given_up_or_to_oneself_is_not_followed() -> None:
    seat = table(CAT)
    seat.seek()
    seat.machine.peer_lost(ANN, "connection lost", seat.now)
    attempt = seat.said(Join, BEN)[0].attempt

    seat.hear(Redirect(LINE, attempt, ANN, candidate(ANN).address), BEN)
    seat.hear(Redirect(LINE, attempt, CAT, candidate(CAT).address), BEN)

    assert seat.said(Join) == []


def test_3_who_led_and_meets_one_before_it_sends_its_applicants_on_once_that_one_leads() -> None:
    seat = table(BEN, candidates=(BEN, CAT))
    seat.seek()
    seat.hear(join_of(CAT), CAT)
    seat.said_to()

    seat.machine.update([candidate(p) for p in (ANN, BEN, CAT)], (ANN, BEN, CAT), 1.0, seat.now)
    (join,) = seat.said(Join, ANN)
    seat.hear(Kept(LINE, join.attempt, True, 3.0, 1, 3), ANN)

    (redirect,) = seat.said(Redirect, CAT)
    assert redirect.leader == ANN
    assert seat.machine.state is State.WAITING


def test_3_a_leader_that_nobody_knew_hails_who_it_misses_and_they_turn_to_it() -> None:
    """One that just joined the line may be first in the order, while nobody has its lease yet."""
    newcomer = table(ANN, expected=(BEN,))
    newcomer.seek()
    newcomer.wait(CONFIG.hail_after_s)
    (hail,) = newcomer.said(Hail, BEN)
    ben = table(BEN, candidates=(BEN, CAT), expected=(BEN, CAT))
    ben.seek()
    assert ben.machine.state is State.LEADING

    ben.hear(hail, ANN)

    assert len(ben.said(Join, ANN)) == 1
    assert ben.machine.state is State.APPLYING


def test_3_a_leader_that_nobody_knew_is_told_when_the_round_is_over() -> None:
    ben = waiting_with(ANN, BEN)
    ben.hear(Begin(group_of(ANN, BEN, CAT)), ANN)
    ben.said_to()
    ben.hear(Hail(LINE, 4, 1), DAN)
    (answer,) = ben.said(Closed, DAN)
    newcomer = table(ANN, expected=(BEN,))
    newcomer.seek()
    newcomer.wait(CONFIG.hail_after_s)

    newcomer.hear(answer, BEN)

    assert newcomer.machine.state is State.ENDED
    assert newcomer.machine.now_k == 5


def test_3_one_that_is_past_the_round_says_so_to_a_hail_and_is_not_waited_for() -> None:
    seat = table(ANN, expected=(ANN, BEN, CAT), grace_s=10.0)
    seat.seek()
    seat.hear(join_of(BEN), BEN)
    seat.wait(CONFIG.hail_after_s)
    assert len(seat.said(Hail, CAT)) == 1

    seat.hear(Leave(LINE, HAILED), CAT)
    seat.wait_until(lambda: seat.machine.group is not None, limit_s=1.5)

    assert seat.machine.group is not None
    assert [m.peer for m in seat.machine.group.members] == [ANN, BEN]


def test_3_a_leader_whose_whole_line_went_on_goes_on_after_it() -> None:
    seat = table(ANN, expected=(BEN, CAT))
    seat.seek()
    seat.wait(CONFIG.hail_after_s)
    seat.hear(Leave(LINE, HAILED, now_k=9), BEN)
    assert seat.machine.state is State.LEADING

    seat.hear(Leave(LINE, HAILED, now_k=12), CAT)
    seat.hear(Leave(LINE, HAILED, now_k=12), DAN)  # was not called, so it does not matter
    for other in (DAN, EVA):
        seat.machine.peer_lost(other, "could not be dialled", seat.now)

    assert seat.machine.state is State.ENDED
    assert seat.machine.now_k == 12


def test_3_a_lone_applicant_waits_a_little_for_those_that_nobody_expects() -> None:
    """The leader's trainer was away for long: what it knows of the others is old."""
    seat = table(ANN, expected=())
    seat.hear(join_of(BEN), BEN)
    assert seat.machine.group is None and not seat.said(Closed)
    seat.wait(CONFIG.lone_wait_s / 2)
    assert not seat.said(Closed)

    seat.hear(join_of(CAT), CAT)

    assert len(seat.said(Begin)) == 2


def test_3_a_lone_applicant_that_stays_alone_is_told_soon() -> None:
    seat = table(ANN, expected=())
    seat.hear(join_of(BEN), BEN)
    seat.wait(CONFIG.lone_wait_s)
    (told,) = seat.said(Closed, BEN)
    assert told.now_k == 4


# ---- 4. one-way links


def test_4_who_cannot_reach_the_leader_says_so_to_the_next() -> None:
    seat = table(CAT)
    seat.seek()
    seat.said_to()

    seat.machine.peer_lost(ANN, "could not be dialled", seat.now)

    (join,) = seat.said(Join, BEN)
    assert join.unreachable == (ANN,)


def test_4_the_next_passes_the_join_on_once_and_the_leader_dials() -> None:
    ben = waiting_with(ANN, BEN)
    ben.hear(join_of(CAT, unreachable=(ANN,)), CAT)
    (passed,) = ben.said(Join, ANN)
    assert passed.passed_on
    ann = table(ANN, expected=(ANN, BEN, CAT))
    ann.seek()

    ann.hear(passed, BEN)

    sends = [e for e in ann.machine.take_effects() if isinstance(e, Send) and isinstance(e.message, Kept)]
    assert [(s.peer, s.address) for s in sends] == [(CAT, candidate(CAT).address)], "the leader dials the applicant"


def test_4_a_join_is_passed_on_one_hop_only() -> None:
    seat = waiting_with(ANN, BEN)

    seat.hear(replace(join_of(CAT, unreachable=(ANN,)), passed_on=True), DAN)

    assert seat.said(Join) == []


def test_4_a_join_in_anothers_name_that_is_not_passed_on_is_nonsense() -> None:
    seat = table(ANN)

    with pytest.raises(RemoteProtocolError, match="sent a join of"):
        seat.hear(join_of(CAT), BEN)


def test_4_the_leader_that_dials_in_ends_the_search() -> None:
    seat = table(CAT)
    seat.seek()
    seat.machine.peer_lost(ANN, "could not be dialled", seat.now)
    seat.said_to()

    seat.hear(Begin(group_of(ANN, BEN, CAT)), ANN)

    assert seat.machine.state is State.BOUND
    assert (ANN, Begun) in seat.said_to()


# ---- 5. when a group closes


def test_5_it_closes_at_once_when_all_expected_are_here() -> None:
    seat = table(ANN)
    seat.seek()
    seat.hear(join_of(BEN), BEN)
    assert seat.machine.group is None

    seat.hear(join_of(CAT), CAT)

    assert seat.machine.group is not None
    assert [m.peer for m in seat.machine.group.members] == [ANN, BEN, CAT]
    assert seat.machine.group.absent == ()


def test_5_others_are_welcome_but_not_waited_for() -> None:
    seat = table(ANN, expected=(ANN, BEN))
    seat.seek()
    seat.hear(join_of(EVA), EVA)
    assert seat.machine.group is None

    seat.hear(join_of(BEN), BEN)

    assert seat.machine.group is not None
    assert [m.peer for m in seat.machine.group.members] == [ANN, BEN, EVA]


def test_5_it_closes_at_the_grace_without_the_missing_and_names_them() -> None:
    seat = table(ANN, grace_s=1.5)
    seat.seek()
    seat.wait(0.2)
    seat.hear(join_of(BEN), BEN)

    seat.wait_until(lambda: seat.machine.group is not None)

    assert seat.now == pytest.approx(1.5)
    assert seat.machine.group is not None
    assert [(a.peer, a.why) for a in seat.machine.group.absent] == [(CAT, "was expected but did not come in time")]


def test_5_begin_carries_the_arrivals_so_that_all_learn_the_same_grace() -> None:
    seat = table(ANN)
    seat.seek()
    seat.wait(0.2)
    seat.hear(join_of(BEN), BEN)
    seat.wait(0.3)
    seat.hear(join_of(CAT), CAT)

    assert seat.said(Begin, CAT)[0].group.arrival_offsets_s == pytest.approx((0.0, 0.2, 0.5))


def test_5_the_grace_is_median_plus_factor_times_mad_and_never_below_the_floor() -> None:
    offsets = [0.0, 1.0, 1.2, 1.4, 9.0]

    assert grace_from(offsets, factor=4.0, floor_s=0.5) == pytest.approx(1.2 + 4 * 0.2)
    assert grace_from([0.0, 0.001, 0.002], factor=8.0, floor_s=0.5) == 0.5


def test_5_without_earlier_arrivals_half_of_the_callers_time_is_waited() -> None:
    seat = table(ANN, grace_s=None)
    seat.seek(wait_s=10.0)
    seat.hear(join_of(BEN, wait_s=10.0), BEN)

    seat.wait_until(lambda: seat.machine.group is not None)

    assert seat.now == pytest.approx((10.0 - CONFIG.reserve_s) / 2, abs=0.01)


def test_5_one_alone_waits_for_a_second_to_the_deadline() -> None:
    """A group of one is none: its caller said how long to wait, and the grace is not meant to cut that short."""
    seat = table(ANN, grace_s=1.0)
    seat.seek(wait_s=10.0)
    seat.wait(8.0)
    assert seat.machine.state is State.LEADING

    seat.hear(join_of(BEN), BEN)
    seat.wait_until(lambda: seat.machine.group is not None, limit_s=1.0)

    assert seat.machine.group is not None


def test_5_nobody_at_the_deadline_ends_it_and_says_who_was_missed() -> None:
    seat = table(ANN, grace_s=1.0)
    seat.seek(wait_s=10.0)

    seat.wait_until(lambda: seat.machine.state is State.ENDED)

    assert seat.now == pytest.approx(10.0 - CONFIG.reserve_s, abs=0.01)
    assert seat.machine.why == "nobody else came"
    assert set(seat.machine.missed) == {BEN, CAT}


def test_5_a_leader_hails_whom_it_misses_and_does_not_wait_for_the_dead() -> None:
    seat = table(ANN, grace_s=10.0)
    seat.seek()
    seat.hear(join_of(BEN), BEN)
    seat.wait(CONFIG.hail_after_s)
    assert len(seat.said(Hail, CAT)) == 1

    seat.machine.peer_lost(CAT, "could not be dialled", seat.now)
    seat.machine.update([candidate(p) for p in (ANN, BEN)], (ANN, BEN), 10.0, seat.now)

    assert seat.machine.group is not None, "the owner no longer expects it, so all are here"


def test_5_the_first_two_are_asked_together_and_the_second_is_left_when_the_first_leads() -> None:
    seat = table(CAT)
    seat.seek()
    joins = [e for e in seat.machine.take_effects() if isinstance(e, Send) and isinstance(e.message, Join)]
    assert [(s.peer, s.address) for s in joins] == [(p, candidate(p).address) for p in (ANN, BEN)]

    seat.hear(Kept(LINE, joins[0].message.attempt, True, 3.0, 1, 3), ANN)  # type: ignore[union-attr]

    assert seat.said_to() == [(BEN, Leave)]
    assert seat.machine.state is State.WAITING


def test_5_when_the_second_leads_the_first_is_left() -> None:
    seat = table(CAT)
    seat.seek()
    (join,) = seat.said(Join, BEN)

    seat.hear(Kept(LINE, join.attempt, True, 3.0, 1, 3), BEN)

    assert seat.said_to() == [(ANN, Leave)]
    assert "leads" in seat.machine.waiting_for()


def test_5_one_that_leaves_is_not_in_the_group() -> None:
    seat = table(ANN, expected=(ANN, BEN))
    seat.seek()
    seat.hear(join_of(EVA), EVA)

    seat.hear(Leave(LINE, 1), EVA)
    seat.hear(join_of(BEN), BEN)

    assert seat.machine.group is not None
    assert [m.peer for m in seat.machine.group.members] == [ANN, BEN]


# ---- 6. budgets


def test_6_one_whose_time_is_too_short_for_the_data_is_told_both_numbers() -> None:
    seat = table(ANN)
    seat.seek()
    slow = replace(member(BEN), up_bytes_s=1000.0, down_bytes_s=1e9)

    seat.hear(replace(join_of(BEN, wait_s=5.0), applicant=slow), BEN)

    (answer,) = seat.said(TooShort, BEN)
    assert answer.wait_s == 5.0
    assert answer.needed_s == pytest.approx(2 * LAYOUT.byte_size / 1000.0)


def test_6_a_rate_measured_too_low_refuses_nobody_and_leaves_time_for_the_others() -> None:
    """Only in a group could it show a better one."""
    seat = table(ANN, grace_s=60.0)
    seat.seek()
    slow = replace(member(BEN), up_bytes_s=LAYOUT.byte_size / 10, down_bytes_s=0.0)  # as if it took 20 s

    seat.hear(replace(join_of(BEN, wait_s=10.0), applicant=slow), BEN)

    assert not seat.said(TooShort, BEN)
    seat.wait_until(lambda: seat.machine.group is not None)
    assert seat.now == pytest.approx(5.0 - CONFIG.reserve_s)


def test_6_one_whose_time_is_over_does_not_draw_others_into_a_group_without_time() -> None:
    """Its Leave is still on the way when the next one comes."""
    seat = table(ANN, expected=(ANN, CAT), grace_s=60.0)
    seat.hear(join_of(BEN, wait_s=5.0), BEN)
    seat.now = 5.0

    seat.seek()

    assert seat.machine.state is State.LEADING
    assert len(seat.said(Closed, BEN)) == 1
    seat.hear(join_of(CAT), CAT)
    assert seat.machine.group is not None
    assert [m.peer for m in seat.machine.group.members] == [ANN, CAT]


def test_6_the_one_that_is_told_ends_with_both_numbers() -> None:
    seat = waiting_with(ANN, CAT)

    seat.hear(TooShort(LINE, 1, 5.0, 98.3), ANN)

    assert seat.machine.state is State.ENDED
    assert "98.3 s" in seat.machine.why
    assert "5.0 s" in seat.machine.why
    assert "longer timeout" in seat.machine.why


def test_6_the_groups_budget_is_the_smallest_of_its_members() -> None:
    seat = table(ANN)
    seat.seek(wait_s=30.0)
    seat.hear(join_of(BEN, wait_s=7.0), BEN)
    seat.wait(0.5)

    seat.hear(join_of(CAT, wait_s=20.0), CAT)

    assert seat.machine.group is not None
    assert seat.machine.group.budget_s == pytest.approx(6.5)


def test_6_it_closes_while_the_most_hurried_still_has_time_for_the_data() -> None:
    seat = table(ANN, grace_s=60.0)
    seat.seek(wait_s=60.0)
    rate = LAYOUT.byte_size  # so that the data takes 2 s
    hurried = replace(member(BEN), up_bytes_s=float(rate), down_bytes_s=float(rate))
    seat.hear(replace(join_of(BEN, wait_s=5.0), applicant=hurried), BEN)

    seat.wait_until(lambda: seat.machine.group is not None)

    assert seat.now == pytest.approx(3.0 - CONFIG.reserve_s)


# ---- 7. begin, second groups, who leads


@pytest.mark.parametrize(
    "spoil",
    [
        lambda g: replace(g, members=g.members[::-1]),
        lambda g: replace(g, members=(*g.members[:1], *g.members[:1])),
        lambda g: replace(g, members=g.members[:1], spans=(0, LAYOUT.elements)),
        lambda g: replace(g, spans=g.spans[:-1]),
        lambda g: replace(g, spans=(0, *g.spans[1:-1], LAYOUT.elements + 1)),
        lambda g: replace(g, spans=(1, *g.spans[1:])),
        lambda g: replace(g, spans=(0, LAYOUT.elements + 5, 4096, LAYOUT.elements)),
        lambda g: replace(g, budget_s=0.0),
        lambda g: replace(g, budget_s=float("inf")),
        lambda g: replace(g, chunk_bytes=64 << 20),
        lambda g: replace(g, chunk_bytes=1),
        lambda g: replace(g, members=(replace(g.members[0], weight=-1.0), *g.members[1:])),
        lambda g: replace(g, members=(replace(g.members[0], weight=float("nan")), *g.members[1:])),
        lambda g: replace(g, members=(replace(g.members[0], dialable=False), *g.members[1:])),
        lambda g: replace(g, members=(replace(g.members[0], standing=Standing(through=g.k + 2)), *g.members[1:])),
        lambda g: replace(g, members=(replace(g.members[0], standing=Standing(start=2, stop=1)), *g.members[1:])),
    ],
)
def test_7_an_impossible_group_is_refused(spoil: Callable[[Group], Group]) -> None:
    group = group_of(ANN, BEN, CAT)
    assert is_sound(group, LAYOUT)
    impossible = spoil(group)
    assert not is_sound(impossible, LAYOUT)
    seat = waiting_with(ANN, CAT)

    with pytest.raises(RemoteProtocolError, match="began an impossible group"):
        seat.hear(Begin(impossible), ANN)

    assert seat.machine.state is State.WAITING


@pytest.mark.parametrize(
    "spoil",
    [
        lambda g: replace(g, k=5),
        lambda g: replace(g, j=0),
        lambda g: replace(g, axis=1),
        lambda g: group_of(ANN, BEN),
        lambda g: replace(g, codec="flash8"),
    ],
    ids=["k", "j", "axis", "without us", "a codec that is not among the terms"],
)
def test_7_a_group_of_another_round_or_without_us_is_refused(spoil: Callable[[Group], Group]) -> None:
    seat = waiting_with(ANN, CAT)

    with pytest.raises(RemoteProtocolError, match="began an impossible group"):
        seat.hear(Begin(spoil(group_of(ANN, BEN, CAT))), ANN)


def test_7_a_group_with_an_earlier_start_of_ours_is_declined() -> None:
    """The leader kept a join that we sent before we were killed: honest, but not ours any more."""
    seat = waiting_with(ANN, CAT)
    group = group_of(ANN, BEN, CAT)

    earlier = replace(group.members[2], incarnation=Incarnation(1))
    seat.hear(Begin(replace(group, members=(*group.members[:2], earlier))), ANN)

    (answer,) = seat.said(Bound, ANN)
    assert "started anew" in answer.why
    assert seat.machine.group is None


def test_7_a_group_with_another_anchor_than_ours_is_declined() -> None:
    seat = waiting_with(ANN, CAT)
    group = group_of(ANN, BEN, CAT)

    seat.hear(Begin(replace(group, members=tuple(replace(m, anchor=b"earlier.") for m in group.members))), ANN)

    (answer,) = seat.said(Bound, ANN)
    assert "another anchor" in answer.why
    assert seat.machine.group is None


def test_7_a_group_is_anchored_where_all_hold_the_same() -> None:
    group = group_of(ANN, BEN, CAT)
    assert group.anchor == b""
    alike = tuple(replace(m, anchor=b"12345678") for m in group.members)
    assert replace(group, members=alike).anchor == b"12345678"
    assert replace(group, members=(replace(alike[0], anchor=b""), *alike[1:])).anchor == b""
    assert replace(group, members=(replace(alike[0], anchor=b"87654321"), *alike[1:])).anchor == b""


def test_7_the_leader_says_what_auto_is() -> None:
    slow = replace(round_of(ANN), auto_bytes=64_000_000, auto_elements=16_000_000)
    seat = Table(Matchmaking(slow, CONFIG, random.Random(0)))
    seat.machine.update([candidate(ANN), candidate(BEN)], (ANN, BEN), 1.0, 0.0)
    seat.seek()
    line = replace(member(BEN), up_bytes_s=12.5e6, down_bytes_s=12.5e6)
    seat.hear(replace(join_of(BEN), applicant=line), BEN)

    (begin,) = seat.said(Begin, BEN)

    assert begin.group.codec == "flash8"
    assert begin.group.codec_why.startswith("auto: over the slowest line, 12.5 MB/s")


def test_7_where_the_terms_say_auto_no_other_codec_than_its_choices_is_taken() -> None:
    for codec, taken in (("flash4-8", True), ("flash2", False), ("", False)):
        seat = Table(Matchmaking(replace(round_of(CAT), auto_bytes=8, auto_elements=2), CONFIG, random.Random(0)))
        seat.machine.update([candidate(ANN)], (ANN, BEN, CAT), 1.0, 0.0)
        seat.seek()
        begin = Begin(replace(group_of(ANN, BEN, CAT), codec=codec))
        if taken:
            seat.hear(begin, ANN)
            assert seat.machine.group == begin.group
        else:
            with pytest.raises(RemoteProtocolError, match="impossible group"):
                seat.hear(begin, ANN)


def test_7_a_stranger_cannot_begin_a_group() -> None:
    seat = waiting_with(ANN, CAT)

    with pytest.raises(RemoteProtocolError, match="began an impossible group"):
        seat.hear(Begin(group_of(ANN, BEN, CAT)), EVA)


def test_7_what_a_leader_begins_is_sound() -> None:
    seat = table(ANN)
    seat.seek()
    seat.hear(replace(join_of(BEN), applicant=member(BEN, dialable=False)), BEN)
    seat.hear(join_of(CAT), CAT)

    (begin,) = seat.said(Begin, CAT)

    group = begin.group
    assert is_sound(group, LAYOUT)
    assert (group.leader, group.k, group.j, group.axis, group.key) == (ANN, 4, 1, 0, LINE)
    assert group.spans[1] == group.spans[2], "one that nobody can dial holds no span"
    assert len(group.group_id) == len(group.token) == 16


def test_7_late_arrivals_get_a_second_group_from_the_same_leader() -> None:
    seat = table(ANN, expected=(ANN, BEN))
    seat.seek()
    seat.hear(join_of(BEN), BEN)
    (first,) = seat.said(Begin, BEN)
    seat.wait(0.1)

    seat.hear(join_of(CAT), CAT)
    seat.hear(join_of(DAN), DAN)
    seat.wait(CONFIG.late_window_s)

    begins = [e for e in seat.machine.take_effects() if isinstance(e, Send) and isinstance(e.message, Begin)]
    late = {s.peer: s.message.group for s in begins if s.peer in (CAT, DAN)}  # type: ignore[union-attr]
    assert set(late) == {CAT, DAN}
    assert late[CAT] == late[DAN]
    assert [m.peer for m in late[CAT].members] == [CAT, DAN]
    assert late[CAT].leader == ANN
    assert late[CAT].group_id != first.group.group_id
    member_seat = waiting_with(ANN, CAT)
    member_seat.hear(Begin(late[CAT]), ANN)
    assert member_seat.machine.state is State.BOUND, "though its leader is no member"


def test_7_a_single_late_arrival_is_told_that_it_is_late() -> None:
    seat = table(ANN, expected=(ANN, BEN))
    seat.seek()
    seat.hear(join_of(BEN), BEN)
    seat.said_to()

    seat.hear(join_of(CAT), CAT)
    seat.wait(CONFIG.late_window_s)

    (answer,) = seat.said(Closed, CAT)
    assert answer.closed_s_ago == pytest.approx(CONFIG.late_window_s)
    assert answer.now_k == 5


def test_7_a_leader_without_its_trainer_keeps_joins_and_closes_the_group_without_itself() -> None:
    seat = table(ANN, expected=(BEN, CAT))
    assert seat.machine.state is State.KEEPING
    seat.hear(join_of(BEN), BEN)
    assert seat.said(Kept, BEN)[0].leading

    seat.hear(join_of(CAT), CAT)

    (begin,) = seat.said(Begin, CAT)
    assert [m.peer for m in begin.group.members] == [BEN, CAT]
    assert seat.machine.group is None
    seat.wait(0.3)
    seat.seek()
    assert seat.machine.state is State.ENDED
    assert seat.machine.why == "averaging 4 closed 0.3 s ago without us"


def test_7_a_leader_waits_for_its_own_trainer_as_for_any_expected_member() -> None:
    seat = table(ANN, expected=(ANN, BEN), grace_s=5.0)
    seat.hear(join_of(BEN), BEN)
    seat.wait(2.0)

    seat.seek()

    assert seat.machine.group is not None
    assert [m.peer for m in seat.machine.group.members] == [ANN, BEN]


def test_7_when_the_leader_dies_the_next_leads() -> None:
    seat = waiting_with(ANN, BEN)

    seat.machine.peer_lost(ANN, "connection lost", seat.now)
    seat.hear(join_of(CAT), CAT)

    assert seat.machine.state is State.LEADING
    assert seat.said(Kept, CAT)[0].leading


def test_7_a_leader_that_falls_silent_is_left_and_the_next_leads() -> None:
    seat = waiting_with(ANN, BEN)

    seat.wait_until(lambda: seat.machine.state is State.LEADING, limit_s=10.0)

    assert (ANN, Leave) in seat.said_to()


def test_7_those_that_waited_with_a_leader_that_leaves_are_told() -> None:
    seat = table(ANN)
    seat.seek()
    seat.hear(join_of(CAT, attempt=2), CAT)
    seat.said_to()

    seat.hear(Begin(group_of(BEN, ANN, leader=BEN)), BEN)

    assert [(c.attempt, c.k) for c in seat.said(Closed, CAT)] == [(2, 4)]


def test_7_a_leader_that_ended_alone_still_leads_those_who_come() -> None:
    """Its k stands: who comes next is no late one of a group that never was."""
    seat = table(ANN, expected=(BEN, CAT))
    seat.seek(wait_s=2.0)
    seat.wait_until(lambda: seat.machine.state is State.ENDED)
    seat.said_to()

    seat.hear(join_of(BEN), BEN)
    seat.hear(join_of(CAT), CAT)

    (begin,) = seat.said(Begin, CAT)
    assert [m.peer for m in begin.group.members] == [BEN, CAT]


def test_7_where_nobody_can_be_dialled_it_ends_and_says_why() -> None:
    seat = table(CAT, candidates=())

    seat.seek()

    assert seat.machine.state is State.ENDED
    assert seat.machine.why == "nobody in the group can be dialled"


def test_7_when_the_last_dialable_one_dies_the_others_end_and_say_why() -> None:
    seat = table(CAT, candidates=(ANN,))
    seat.seek()

    seat.machine.peer_lost(ANN, "connection lost", seat.now)

    assert seat.machine.state is State.ENDED
    assert seat.machine.why == "nobody in the group can be dialled"


def test_7_time_runs_out_and_whoever_was_asked_is_left() -> None:
    seat = waiting_with(ANN, CAT)

    def still_alive() -> bool:
        seat.hear(Kept(LINE, 1, True, 3.0, 1, 3), ANN)
        return seat.machine.state is State.ENDED

    seat.wait_until(still_alive)

    assert seat.now == pytest.approx(20.0)
    assert seat.machine.why == "time ran out in matchmaking"
    assert (ANN, Leave) in seat.said_to()


def test_7_no_timer_of_a_finished_matchmaking_is_left() -> None:
    seat = waiting_with(ANN, CAT)

    seat.hear(Begin(group_of(ANN, CAT)), ANN)

    assert seat.machine.next_deadline() is None


def test_candidates_are_ordered_by_the_hash_of_key_and_peer() -> None:
    other_line = Key(b"another line of 20 by")
    orders = [sorted((ANN, BEN, CAT, DAN, EVA), key=lambda p, k=k: leadership(k, p)) for k in (LINE, other_line)]

    assert orders[0] == [ANN, BEN, CAT, DAN, EVA]
    assert orders[0] != orders[1], "the work of leading goes round"

"""The seven rules of matchmaking, each by the message sequence it answers, played by hand."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from moshpitd.averaging.effects import Send
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.grid import leadership
from moshpitd.averaging.matchmaking import Candidate, Matchmaking, MatchmakingConfig, Round, State, grace_from, is_sound
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
    Message,
    Redirect,
    TooShort,
)
from moshpitd.averaging.names import Incarnation, PeerId, key
from moshpitd.averaging.vector import Layout, TensorSpec

KEY = key("a round")
LAYOUT = Layout.of([TensorSpec("w", (10_000,), "float32")])
CONFIG = MatchmakingConfig()
ORDER = sorted((PeerId(f"{digit:064x}") for digit in range(1, 7)), key=lambda peer: leadership(KEY, peer))
"""Peers in the order in which they would lead."""
FIRST, SECOND, THIRD, FOURTH, FIFTH, SIXTH = ORDER


class Table:
    """Matchmakings around one table; messages lie on it until they are handed over."""

    def __init__(self, *peers: PeerId, expected: Iterable[PeerId] = (), grace_s: float | None = None) -> None:
        self.now = 100.0
        self.machines: dict[PeerId, Matchmaking] = {}
        self.mail: list[tuple[PeerId, PeerId, Message]] = []
        for peer in peers:
            at = Round(KEY, 3, 0, 0, 1, b"planplan", peer, Incarnation(7), (0,), LAYOUT, 1 << 20)
            self.machines[peer] = Matchmaking(at, CONFIG, random.Random(peer))
        for peer in peers:
            self.tell(peer, peers, expected or peers, grace_s)

    def tell(
        self, peer: PeerId, candidates: Iterable[PeerId], expected: Iterable[PeerId], grace_s: float | None = None
    ) -> None:
        self.machines[peer].update(
            [Candidate(one, address(one)) for one in candidates], tuple(expected), grace_s, self.now
        )
        self.collect(peer)

    def seek(self, *peers: PeerId, wait_s: float = 20.0, dialable: bool = True) -> None:
        for peer in peers:
            self.machines[peer].seek(member(peer, dialable=dialable), wait_s, self.now)
            self.collect(peer)

    def collect(self, peer: PeerId) -> None:
        for effect in self.machines[peer].take_effects():
            if isinstance(effect, Send):
                self.mail.append((peer, effect.peer, effect.message))

    def say(self, sender: PeerId, to: PeerId, message: MatchmakingMessage) -> None:
        self.machines[to].receive(message, sender, self.now)
        self.collect(to)

    def hand_over(self, *, lose: type[Message] | None = None) -> None:
        """Deliver what lies on the table until there is nothing left; `lose` one kind."""
        while self.mail:
            sender, to, message = self.mail.pop(0)
            if to in self.machines and not (lose is not None and isinstance(message, lose)):
                self.machines[to].receive(message, sender, self.now)
                self.collect(to)

    def lost(self, at: PeerId, peer: PeerId) -> None:
        self.machines[at].peer_lost(peer, "connection lost", self.now)
        self.collect(at)

    def advance(self, seconds: float) -> None:
        """Let time pass; what falls due happens at its moment, its mail stays on the table."""
        end = self.now + seconds
        while True:
            due = [(d, peer) for peer, m in self.machines.items() if (d := m.next_deadline()) is not None and d <= end]
            if not due:
                break
            moment, peer = min(due)
            self.now = max(self.now, moment)
            self.machines[peer].handle_timer(self.now)
            self.collect(peer)
        self.now = end

    def sent(self, sender: PeerId, to: PeerId) -> list[Message]:
        return [message for one, other, message in self.mail if (one, other) == (sender, to)]

    def group(self, peer: PeerId) -> Group:
        found = self.machines[peer].group
        assert found is not None, f"{self.machines[peer].state}: {self.machines[peer].why}"
        return found

    def state(self, peer: PeerId) -> State:
        return self.machines[peer].state


def address(peer: PeerId) -> Address:
    return Address(f"host-{peer[-1]}:7600")


def member(peer: PeerId, *, dialable: bool = True) -> Member:
    return Member(peer, Incarnation(7), ORDER.index(peer), 1.0, address(peer), dialable)


def join(peer: PeerId, *, wait_s: float = 20.0, attempt: int = 1, unreachable: tuple[PeerId, ...] = ()) -> Join:
    return Join(KEY, 1, b"planplan", 3, 0, attempt, member(peer), (0,), wait_s, unreachable, passed_on=False)


def members_of(group: Group) -> set[PeerId]:
    return {one.peer for one in group.members}


# ---- the ordinary way


def test_all_who_are_expected_meet_at_once_and_agree_on_the_group() -> None:
    table = Table(FIRST, SECOND, THIRD, FOURTH)
    table.seek(FOURTH, THIRD, SECOND, FIRST)
    table.hand_over()
    groups = [table.group(peer) for peer in ORDER[:4]]
    assert all(group == groups[0] for group in groups)
    assert groups[0].leader == FIRST
    assert members_of(groups[0]) == set(ORDER[:4])
    assert is_sound(groups[0], LAYOUT)
    assert table.now == 100.0, "nobody waited"


def test_the_first_two_candidates_are_asked_together_and_the_second_is_left_again() -> None:
    table = Table(FIRST, SECOND, THIRD)
    table.seek(THIRD)
    assert [type(message) for message in table.sent(THIRD, FIRST)] == [Join]
    assert [type(message) for message in table.sent(THIRD, SECOND)] == [Join]
    table.say(FIRST, THIRD, Kept(KEY, 1, leading=True, patience_s=3.0, present=1, expected=3))
    assert table.state(THIRD) is State.WAITING
    assert Leave(KEY, 1) in table.sent(THIRD, SECOND)


# ---- rule 1: bound when it answers Begin, to one group only


def test_rule_1_one_that_is_bound_answers_any_other_begin_with_bound() -> None:
    table = Table(FIRST, SECOND, THIRD)
    table.seek(FIRST, SECOND, THIRD)
    table.hand_over()
    ours = table.group(THIRD)
    rival = replace(ours, group_id=b"r" * 16, leader=SECOND)
    table.say(SECOND, THIRD, Begin(rival))
    assert table.group(THIRD) == ours
    [answer] = [message for message in table.sent(THIRD, SECOND) if isinstance(message, Bound)]
    assert answer.group_id == b"r" * 16


def test_rule_1_a_lost_begin_is_healed() -> None:
    table = Table(FIRST, SECOND)
    table.seek(FIRST, SECOND)
    table.hand_over(lose=Begin)
    assert table.state(FIRST) is State.BOUND
    assert table.state(SECOND) is State.WAITING
    table.advance(CONFIG.rejoin_s + 0.1)
    table.hand_over()
    assert table.group(SECOND) == table.group(FIRST)


def test_rule_1_a_member_that_is_bound_elsewhere_is_named_to_the_leader() -> None:
    table = Table(FIRST, SECOND, THIRD)
    table.seek(FIRST, SECOND, THIRD)
    table.hand_over()
    group = table.group(FIRST)
    table.say(THIRD, FIRST, Bound(KEY, group.group_id, "in another group"))
    assert table.machines[FIRST].declined == [(THIRD, "in another group")]


# ---- rule 2: what a member of a closed group answers


def test_rule_2_a_fellow_members_join_is_answered_with_the_group() -> None:
    table = Table(FIRST, SECOND, THIRD)
    table.seek(FIRST, SECOND, THIRD)
    table.hand_over()
    table.say(THIRD, SECOND, join(THIRD, attempt=9))
    assert Begin(table.group(SECOND)) in table.sent(SECOND, THIRD)


def test_rule_2_anyone_elses_join_is_answered_with_closed() -> None:
    table = Table(FIRST, SECOND)
    table.seek(FIRST, SECOND)
    table.hand_over()
    table.now += 0.4
    table.say(SIXTH, SECOND, join(SIXTH))
    [closed] = [message for message in table.sent(SECOND, SIXTH) if isinstance(message, Closed)]
    assert (closed.k, closed.j, closed.now_k) == (3, 0, 4)
    assert closed.closed_s_ago == pytest.approx(0.4)


# ---- rule 3: redirects name only the living, joins are parked meanwhile


def test_rule_3_a_join_is_parked_until_the_smaller_candidate_is_heard_from() -> None:
    table = Table(SECOND, THIRD)
    for peer in (SECOND, THIRD):
        table.tell(peer, (FIRST, SECOND, THIRD), (FIRST, SECOND, THIRD))
    table.seek(SECOND)
    table.say(THIRD, SECOND, join(THIRD))
    [parked] = table.sent(SECOND, THIRD)
    assert isinstance(parked, Kept)
    assert not parked.leading
    assert 0 < parked.patience_s <= CONFIG.join_patience_s
    table.say(FIRST, SECOND, Kept(KEY, 1, leading=True, patience_s=3.0, present=2, expected=3))
    assert Redirect(KEY, 1, FIRST, address(FIRST)) in table.sent(SECOND, THIRD)


def test_rule_3_when_the_smaller_one_is_dead_the_parked_join_is_led() -> None:
    table = Table(SECOND, THIRD)
    for peer in (SECOND, THIRD):
        table.tell(peer, (FIRST, SECOND, THIRD), (SECOND, THIRD))
    table.seek(SECOND, THIRD)
    table.hand_over()
    assert table.state(SECOND) is State.APPLYING, "FIRST has not answered yet"
    table.lost(SECOND, FIRST)
    table.lost(THIRD, FIRST)
    table.hand_over()
    assert members_of(table.group(THIRD)) == {SECOND, THIRD}
    assert table.group(THIRD).leader == SECOND


def test_rule_3_one_that_never_answers_is_given_up_and_patience_grows() -> None:
    table = Table(THIRD)
    table.tell(THIRD, (FIRST, SECOND, THIRD), (THIRD,))
    table.seek(THIRD)
    table.mail.clear()
    table.advance(CONFIG.join_patience_s + 0.01)
    assert any(isinstance(message, Leave) for message in table.sent(THIRD, FIRST))
    asked = [message for message in table.sent(THIRD, SECOND) if isinstance(message, Join)]
    assert asked[-1].unreachable == (FIRST,)
    table.advance(CONFIG.join_patience_s)
    assert table.state(THIRD) is State.APPLYING, "the second one gets more patience than the first"
    table.advance(CONFIG.join_patience_s)
    assert table.state(THIRD) is not State.APPLYING


# ---- rule 4: who cannot reach the leader is passed on, and dialled


def test_rule_4_a_join_that_cannot_reach_the_leader_is_passed_on_and_the_leader_dials() -> None:
    table = Table(FIRST, SECOND, THIRD)
    table.seek(FIRST)
    table.lost(THIRD, FIRST)
    table.seek(THIRD, SECOND)
    table.hand_over()
    groups = {members_of_or_none(table, peer) for peer in (FIRST, SECOND, THIRD)}
    assert groups == {frozenset((FIRST, SECOND, THIRD))}


def members_of_or_none(table: Table, peer: PeerId) -> frozenset[PeerId] | None:
    group = table.machines[peer].group
    return frozenset(members_of(group)) if group else None


def test_rule_4_it_is_passed_on_by_one_hop_only() -> None:
    table = Table(SECOND)
    table.tell(SECOND, (FIRST, SECOND), (FIRST, SECOND))
    table.say(THIRD, SECOND, join(THIRD, unreachable=(FIRST,)))
    [passed] = [message for message in table.sent(SECOND, FIRST) if isinstance(message, Join)]
    assert passed.passed_on
    assert passed.applicant.peer == THIRD
    table.mail.clear()
    table.say(FOURTH, SECOND, replace(join(FIFTH, unreachable=(FIRST,)), passed_on=True))
    assert not table.sent(SECOND, FIRST)


# ---- rule 5: who is waited for, and how long


def test_rule_5_others_are_welcome_but_not_waited_for() -> None:
    table = Table(FIRST, SECOND, THIRD, expected=(FIRST, SECOND))
    table.seek(THIRD)
    table.hand_over()
    table.seek(FIRST, SECOND)
    table.hand_over()
    assert members_of(table.group(FIRST)) == {FIRST, SECOND, THIRD}
    assert not table.group(FIRST).absent


def test_rule_5_the_group_closes_at_the_grace_and_says_who_was_missing() -> None:
    table = Table(FIRST, SECOND, THIRD, grace_s=1.5)
    table.seek(FIRST, SECOND)
    table.hand_over()
    table.advance(1.4)
    table.hand_over()
    assert table.state(FIRST) is State.LEADING
    table.advance(0.2)
    table.hand_over()
    assert members_of(table.group(SECOND)) == {FIRST, SECOND}
    assert [absent.peer for absent in table.group(SECOND).absent] == [THIRD]


def test_rule_5_nobody_waits_for_a_dead_daemon() -> None:
    table = Table(FIRST, SECOND, THIRD)
    table.seek(FIRST, SECOND)
    table.hand_over()
    table.advance(CONFIG.hail_after_s + 0.01)
    assert any(isinstance(message, Hail) for message in table.sent(FIRST, THIRD))
    table.lost(FIRST, THIRD)  # the dial failed
    table.tell(FIRST, (FIRST, SECOND), (FIRST, SECOND))  # so its owner takes it from the expected
    table.hand_over()
    assert members_of(table.group(FIRST)) == {FIRST, SECOND}
    assert not table.group(FIRST).absent


def test_rule_5_leading_is_the_daemons_work_also_without_its_trainer() -> None:
    table = Table(FIRST, SECOND, THIRD, grace_s=1.0)
    table.seek(SECOND, THIRD)
    table.hand_over()
    assert table.state(FIRST) is State.KEEPING
    table.advance(1.1)
    table.hand_over()
    group = table.group(SECOND)
    assert group.leader == FIRST
    assert members_of(group) == {SECOND, THIRD}
    table.seek(FIRST)
    assert table.state(FIRST) is State.ENDED
    assert "closed" in table.machines[FIRST].why


def test_rule_5_the_grace_is_median_plus_mad_of_earlier_arrivals() -> None:
    assert grace_from([0.0, 0.1, 0.2, 0.3, 5.0], factor=4.0, floor_s=0.0) == pytest.approx(0.2 + 4.0 * 0.1)
    assert grace_from([0.0, 0.0, 0.01], factor=4.0, floor_s=1.0) == 1.0


def test_rule_5_a_leader_that_falls_silent_is_replaced() -> None:
    table = Table(FIRST, SECOND, THIRD)
    table.seek(SECOND, THIRD)
    table.hand_over()
    assert table.state(THIRD) is State.WAITING
    for peer in (SECOND, THIRD):
        table.lost(peer, FIRST)
        table.tell(peer, (SECOND, THIRD), (SECOND, THIRD))
    del table.machines[FIRST]
    table.hand_over()
    assert table.group(THIRD).leader == SECOND
    assert members_of(table.group(THIRD)) == {SECOND, THIRD}


# ---- rule 6: budgets


def test_rule_6_a_budget_too_short_for_the_data_is_told_both_numbers() -> None:
    table = Table(FIRST, SECOND)
    slow = replace(join(SECOND, wait_s=1.0), applicant=replace(member(SECOND), up_bytes_s=2e4, down_bytes_s=1e6))
    table.say(SECOND, FIRST, slow)
    [answer] = [message for message in table.sent(FIRST, SECOND) if isinstance(message, TooShort)]
    assert answer.wait_s == 1.0
    assert answer.needed_s == pytest.approx(2 * 40_000 / 2e4)
    table.seek(SECOND)
    table.say(FIRST, SECOND, replace(answer, attempt=1))
    assert table.state(SECOND) is State.ENDED
    assert "4.0 s" in table.machines[SECOND].why
    assert "1.0 s" in table.machines[SECOND].why


def test_rule_6_the_groups_budget_is_the_smallest_of_those_admitted() -> None:
    table = Table(FIRST, SECOND, THIRD)
    table.seek(FIRST, wait_s=30.0)
    table.seek(SECOND, wait_s=8.0)
    table.seek(THIRD, wait_s=12.0)
    table.hand_over()
    assert table.group(FIRST).budget_s == pytest.approx(8.0)


# ---- rule 7: what Begin says, and late arrivals


def test_rule_7_late_arrivals_get_a_second_group_from_the_same_leader() -> None:
    table = Table(FIRST, SECOND)
    table.seek(FIRST, SECOND)
    table.hand_over()
    first_group = table.group(FIRST)
    for late in (THIRD, FOURTH):
        table.say(late, FIRST, join(late))
    table.advance(CONFIG.late_window_s + 0.01)
    [begin] = [message for message in table.sent(FIRST, THIRD) if isinstance(message, Begin)]
    assert members_of(begin.group) == {THIRD, FOURTH}
    assert begin.group.leader == FIRST
    assert begin.group.group_id != first_group.group_id
    assert table.group(FIRST) == first_group


def test_rule_7_a_single_late_arrival_is_told_that_it_is_late() -> None:
    table = Table(FIRST, SECOND)
    table.seek(FIRST, SECOND)
    table.hand_over()
    table.say(THIRD, FIRST, join(THIRD))
    table.advance(CONFIG.late_window_s + 0.01)
    assert any(isinstance(message, Closed) for message in table.sent(FIRST, THIRD))


def test_rule_7_begin_carries_everybodys_arrival() -> None:
    table = Table(FIRST, SECOND, THIRD)
    table.seek(FIRST)
    table.advance(0.2)
    table.seek(SECOND)
    table.hand_over()
    table.advance(0.3)
    table.seek(THIRD)
    table.hand_over()
    assert table.group(SECOND).arrival_offsets_s == pytest.approx((0.0, 0.2, 0.5))


@pytest.mark.parametrize(
    "broken",
    [
        {"members": (member(SECOND), member(FIRST))},
        {"members": (member(FIRST), member(FIRST))},
        {"members": (member(SECOND),)},
        {"spans": (0, 5, 10_000, 10_000)},
        {"spans": (0, 4096, 9_999)},
        {"spans": (0, 20_000, 10_000)},
        {"budget_s": 0.0},
        {"chunk_bytes": 1 << 30},
        {"members": (replace(member(FIRST), weight=-1.0), member(SECOND))},
        {"members": (replace(member(FIRST), dialable=False), member(SECOND))},
    ],
)
def test_rule_7_an_impossible_group_is_refused(broken: dict[str, object]) -> None:
    table = Table(FIRST, SECOND)
    table.seek(FIRST, SECOND)
    table.hand_over()
    sound = table.group(FIRST)
    assert is_sound(sound, LAYOUT)
    fresh = Table(SECOND)
    fresh.tell(SECOND, (FIRST, SECOND), (FIRST, SECOND))
    fresh.seek(SECOND)
    with pytest.raises(RemoteProtocolError, match="impossible group"):
        fresh.say(FIRST, SECOND, Begin(replace(sound, **broken)))
    assert fresh.state(SECOND) is not State.BOUND


def test_rule_7_a_begin_for_another_incarnation_of_us_is_refused() -> None:
    table = Table(FIRST, SECOND)
    table.seek(FIRST, SECOND)
    table.hand_over()
    group = table.group(FIRST)
    ghost = tuple(replace(one, incarnation=Incarnation(8)) for one in group.members)
    fresh = Table(SECOND)
    fresh.seek(SECOND)
    with pytest.raises(RemoteProtocolError):
        fresh.say(FIRST, SECOND, Begin(replace(group, members=ghost)))


# ---- who cannot be dialled


def test_the_undialable_join_but_never_lead() -> None:
    table = Table(FIRST, SECOND, THIRD)
    for peer in (FIRST, SECOND, THIRD):
        table.tell(peer, (SECOND, THIRD), (FIRST, SECOND, THIRD))
    table.seek(FIRST, dialable=False)
    table.seek(SECOND, THIRD)
    table.hand_over()
    group = table.group(FIRST)
    assert group.leader == SECOND
    rank = group.rank_of(FIRST)
    assert rank is not None
    assert group.spans[rank] == group.spans[rank + 1], "nobody can dial it, so it reduces nothing"


def test_where_nobody_can_be_dialled_it_ends_and_says_why() -> None:
    table = Table(FIRST)
    table.tell(FIRST, (), (FIRST, SECOND))
    table.seek(FIRST, dialable=False)
    assert table.state(FIRST) is State.ENDED
    assert table.machines[FIRST].why == "nobody in the group can be dialled"


def test_a_trainer_whose_time_is_over_leaves_and_says_so() -> None:
    table = Table(SECOND)
    table.tell(SECOND, (FIRST, SECOND), (FIRST, SECOND))
    table.seek(SECOND, wait_s=1.0)
    table.mail.clear()
    table.advance(1.1)
    assert table.state(SECOND) is State.ENDED
    assert any(isinstance(message, Leave) for message in table.sent(SECOND, FIRST))


def test_a_begun_group_is_not_begun_forever() -> None:
    table = Table(FIRST, SECOND)
    table.seek(FIRST, SECOND)
    table.hand_over(lose=Begun)
    table.advance(20.0)
    begins = [message for message in table.sent(FIRST, SECOND) if isinstance(message, Begin)]
    assert len(begins) == CONFIG.begin_tries - 1

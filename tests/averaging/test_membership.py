"""What a session believes of its swarm from the leases it saw: who is there, how far, under which plan, where."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field

import pytest

from moshpitd.averaging.grid import FIRST_K_LEAD, Cell, Plan, Terms, decider, line_of
from moshpitd.averaging.membership import BEHIND_MAX, LEASES_MAX, MISSES_MAX, UNSEEN_S, Membership, pin_of
from moshpitd.averaging.messages import Address, Lease, PlanNotice, Presence, Sighting
from moshpitd.averaging.names import Incarnation, PeerId, digest

TERMS = Terms(b"layout", 0)
OTHER_TERMS = Terms(b"other layout", 0)


def peer(number: int) -> PeerId:
    return PeerId(digest("peer", number).hex())


ME = peer(0)


@dataclass
class Notary:
    """Signs with the name itself; whoever's word is `false` has forged it."""

    name: PeerId

    def sign_plan(self, body: bytes) -> tuple[bytes, bytes]:
        return self.name.encode(), body

    def plan_is_genuine(self, signer: PeerId, body: bytes, public_key: bytes, signature: bytes) -> bool:
        return public_key == signer.encode() and signature == body


@dataclass
class Swarm:
    """One session's view, fed by hand. Others are called by numbers from 1."""

    pin: str = ""
    limit: int = 16
    min_peers: int = 1
    members: Membership = field(init=False)
    sequences: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.members = Membership(
            ME,
            TERMS,
            pin=self.pin,
            group_size_max=self.limit,
            min_peers=self.min_peers,
            credentials=Notary(ME),
            now=100.0,
        )

    def see(
        self,
        number: int,
        *,
        now: float = 100.0,
        k: int = 0,
        last_k: int = -1,
        terms: Terms = TERMS,
        plan: Plan | None = None,
        claim: Cell = (),
        claim_k: int = 0,
        pin: str = "",
        dialable: bool = True,
        open_s: float = 0.0,
        ttl_s: float = 60.0,
        sequence: int | None = None,
    ) -> int:
        """A lease arrives; its sequence number."""
        lease = Lease(
            terms=terms.digest,
            address=Address(f"host{number}:1"),
            dialable=dialable,
            k=k,
            last_k=last_k,
            plan_version=plan.version if plan else 0,
            plan=plan.digest[:8] if plan else b"",
            claim=claim,
            claim_k=claim_k,
            pin=pin,
            group_size_max=16,
            up_bytes_s=0.0,
            down_bytes_s=0.0,
            open_s=open_s,
        )
        sequence = next(self.sequences) if sequence is None else sequence
        self.members.sighted([Sighting(peer(number), Incarnation(1), sequence, now, now + ttl_s, lease)], now)
        return sequence

    def see_all(self, count: int, **lease: int) -> None:
        for number in range(1, count):
            self.see(number, **lease)  # type: ignore[arg-type]

    def adopt(self, plan: Plan, now: float = 100.0) -> bool:
        return self.members.adopt(signed(plan), now)


def signed(plan: Plan) -> PlanNotice:
    return PlanNotice(plan, *Notary(plan.signer).sign_plan(plan.body))


def plan_of(
    sessions: int,
    sides: tuple[int, ...],
    *,
    version: int = 1,
    first_k: int = 0,
    without_me: bool = False,
    signer: int = 1,
) -> Plan:
    numbers = range(1, sessions + 1) if without_me else range(sessions)
    return Plan(version, sides, TERMS.digest, first_k, tuple(sorted(map(peer, numbers))), peer(signer))


# ---- who is there


def test_a_lease_counts_from_when_it_was_seen_until_its_time_is_over() -> None:
    swarm = Swarm()
    swarm.see(1, ttl_s=10)
    swarm.see(2, ttl_s=30)
    swarm.members.expire(109.9)
    assert swarm.members.live_count() == 3
    swarm.members.expire(110)
    assert set(swarm.members.others()) == {peer(2)}


def test_a_lease_seen_again_lives_no_longer() -> None:
    swarm = Swarm()
    sequence = swarm.see(1, ttl_s=10)
    swarm.see(1, now=109, ttl_s=10, sequence=sequence)
    swarm.members.expire(112)
    assert swarm.members.others() == {}


def test_of_two_leases_of_one_peer_the_higher_sequence_counts_in_any_order() -> None:
    for order in ((1, 2), (2, 1)):
        swarm = Swarm()
        for sequence in order:
            swarm.see(1, k=sequence * 10, sequence=sequence)
        assert swarm.members.others()[peer(1)].record.k == 20


def test_we_are_not_among_the_others_and_a_presence_is_no_lease() -> None:
    swarm = Swarm()
    swarm.see(0)
    presence = Presence(Address("host:1"), dialable=True, coordinate=0)
    swarm.members.sighted([Sighting(peer(1), Incarnation(1), 1, 100, 160, presence)], 100)
    assert swarm.members.everyone() == []


def test_a_flood_of_leases_is_bounded_and_does_not_push_out_the_known() -> None:
    swarm = Swarm()
    for number in range(1, LEASES_MAX + 10):
        swarm.see(number)
    assert len(swarm.members.everyone()) == LEASES_MAX
    swarm.see(1, k=7)
    assert swarm.members.others()[peer(1)].record.k == 7


def test_a_suspect_is_out_until_something_newer_of_it_is_seen() -> None:
    swarm = Swarm()
    sequence = swarm.see(1)
    swarm.members.suspect(peer(1))
    swarm.see(1, sequence=sequence)
    assert swarm.members.is_suspect(peer(1))
    assert swarm.members.others() == {}
    swarm.see(1, sequence=sequence + 1)
    assert not swarm.members.is_suspect(peer(1))
    assert set(swarm.members.others()) == {peer(1)}


def test_a_suspect_that_speaks_is_none() -> None:
    swarm = Swarm()
    swarm.see(1)
    swarm.members.suspect(peer(1))
    swarm.members.heard(peer(1))
    assert set(swarm.members.others()) == {peer(1)}


def test_one_that_said_farewell_is_out_although_its_record_is_still_around() -> None:
    swarm = Swarm()
    sequence = swarm.see(1)
    swarm.members.left(peer(1))
    swarm.see(1, sequence=sequence)
    assert swarm.members.others() == {}


def test_only_the_dialable_have_an_address_and_can_lead() -> None:
    swarm = Swarm()
    swarm.see(1)
    swarm.see(2, dialable=False)
    assert swarm.members.address_of(peer(1)) == "host1:1"
    assert swarm.members.address_of(peer(2)) == swarm.members.address_of(peer(3)) == ""
    assert [candidate.peer for candidate in swarm.members.candidates(swarm.members.others())] == [peer(1)]


# ---- counting


@pytest.mark.parametrize(
    ("held", "k"),
    [
        ([], 0),
        ([5], 5),
        ([5, 5], 5),
        ([5, 4], 4),
        ([4, 5, 5], 5),
        ([1, 2, 3], 2),
        ([7, 7, 10**9], 7),
        ([0, 0, 0, 9, 9], 9),
    ],
)
def test_k_is_the_largest_that_two_sessions_hold(held: list[int], k: int) -> None:
    """As good as the maximum, and one typo or liar does not move it."""
    swarm = Swarm()
    for number, lease_k in enumerate(held, start=1):
        swarm.see(number, k=lease_k)
    assert swarm.members.current_k() == k


def test_suspects_and_strangers_do_not_count() -> None:
    swarm = Swarm()
    swarm.see(1, k=3)
    swarm.see(2, k=9)
    swarm.see(3, k=9, terms=OTHER_TERMS)
    swarm.see(4, k=9)
    swarm.members.suspect(peer(4))
    assert swarm.members.current_k() == 3


def test_a_swarm_has_a_history_once_somebody_took_part_before() -> None:
    swarm = Swarm()
    swarm.see(1, k=5, last_k=-1)
    assert not swarm.members.has_history(5)
    swarm.see(2, k=5, last_k=5)
    assert not swarm.members.has_history(5)
    swarm.see(3, k=5, last_k=4)
    assert swarm.members.has_history(5)


def test_whom_we_met_took_part_although_its_lease_does_not_say_so_yet() -> None:
    swarm = Swarm()
    swarm.see(1, k=4)
    swarm.members.took_part(peer(1), 6)
    assert swarm.members.current_k() == 6 and swarm.members.has_history(7) and not swarm.members.has_history(6)


# ---- terms


def test_the_one_that_differs_from_most_is_told() -> None:
    swarm = Swarm()
    swarm.see(1)
    for number in (2, 3, 4):
        swarm.see(number, terms=OTHER_TERMS)
    assert swarm.members.majority_against_us() in {peer(2), peer(3), peer(4)}


def test_the_majority_is_not_told() -> None:
    swarm = Swarm()
    swarm.see(1)
    swarm.see(2, terms=OTHER_TERMS)
    assert swarm.members.majority_against_us() is None


def test_of_two_equal_camps_the_later_joiner_is_told() -> None:
    for open_s, told in ((50.0, True), (-50.0, False)):
        swarm = Swarm()
        swarm.see(1, terms=OTHER_TERMS, open_s=open_s)
        assert (swarm.members.majority_against_us() is not None) == told


def test_a_camp_is_as_old_as_its_oldest_session() -> None:
    swarm = Swarm()
    swarm.see(1, open_s=80.0)
    swarm.see(2, terms=OTHER_TERMS, open_s=50.0)
    swarm.see(3, terms=OTHER_TERMS)
    assert swarm.members.majority_against_us() is None


def test_the_dead_are_no_majority_and_speak_for_none() -> None:
    swarm = Swarm()
    for number in range(1, 9):
        swarm.see(number, terms=OTHER_TERMS)
    for number in range(3, 9):
        swarm.members.suspect(peer(number))
    assert swarm.members.majority_against_us() in {peer(1), peer(2)}
    swarm.members.suspect(peer(1))
    swarm.members.suspect(peer(2))
    assert swarm.members.majority_against_us() is None


# ---- the first plan


def swarm_where_we_decide(
    sessions: int, *, version: int = 1, limit: int = 16, pin: str = "", min_peers: int = 1
) -> Swarm:
    """With as many others as make `sessions`, chosen so that the next plan is ours to make."""
    swarm = Swarm(limit=limit, pin=pin, min_peers=min_peers)
    others = (n for n in itertools.count(1) if decider(version, [ME, peer(n)]) == ME)
    for number in itertools.islice(others, sessions - 1):
        swarm.see(number, pin=pin)
    return swarm


def test_who_decides_makes_the_first_plan_and_it_holds_at_once() -> None:
    swarm = swarm_where_we_decide(12, limit=4)
    notice = swarm.members.make_plan_if_due(3, 100)
    assert notice is not None
    assert (notice.plan.version, notice.plan.sides, notice.plan.first_k) == (1, (3, 4), 0)
    assert notice.plan.signer == ME
    assert notice.plan.roster == tuple(sorted([ME, *swarm.members.others()]))
    assert swarm.members.plan_for(0) == notice.plan
    assert Swarm().members.adopt(notice, 100)


def test_nobody_else_makes_it() -> None:
    swarm = Swarm()
    number = next(n for n in itertools.count(1) if decider(1, [ME, peer(n)]) != ME)
    swarm.see(number)
    assert swarm.members.next_decider() == peer(number)
    assert swarm.members.make_plan_if_due(0, 100) is None


def test_the_first_plan_waits_for_min_peers() -> None:
    swarm = swarm_where_we_decide(4, min_peers=5)
    assert swarm.members.sessions_needed() == 5
    assert swarm.members.make_plan_if_due(0, 100) is None
    assert swarm_where_we_decide(5, min_peers=5).members.make_plan_if_due(0, 100) is not None


def test_nobody_plans_for_itself_alone() -> None:
    assert Swarm().members.make_plan_if_due(0, 100) is None


def test_strangers_and_suspects_are_in_no_roster() -> None:
    swarm = swarm_where_we_decide(4)
    suspect = min(swarm.members.others())
    swarm.members.suspect(suspect)
    swarm.see(1000, terms=OTHER_TERMS)
    notice = swarm.members.make_plan_if_due(0, 100)
    assert notice is not None
    assert len(notice.plan.roster) == 3
    assert suspect not in notice.plan.roster


# ---- plans that follow


def test_a_plan_that_is_outgrown_is_replaced_two_averagings_from_now() -> None:
    swarm = swarm_where_we_decide(4, version=2, limit=4)
    roster = tuple(sorted([ME, *swarm.members.others()]))
    assert swarm.adopt(Plan(1, (4,), TERMS.digest, 0, roster, roster[0]))
    assert swarm.members.make_plan_if_due(7, 100) is None
    plan = swarm.members.plan_for(7)
    assert plan is not None
    joiner = next(n for n in itertools.count(2000) if decider(2, [ME, peer(n)]) == ME)
    swarm.see(joiner, k=9, plan=plan, claim=(0,))
    notice = swarm.members.make_plan_if_due(7, 100)
    assert notice is not None
    assert (notice.plan.version, notice.plan.sides) == (2, (2, 2))
    assert notice.plan.first_k == 9 + FIRST_K_LEAD
    assert swarm.members.plan_for(10) == plan
    assert swarm.members.plan_for(11) == notice.plan
    assert swarm.members.plans_from(10) == [signed(plan), notice]
    assert swarm.members.make_plan_if_due(8, 100) is None


def test_a_dead_holder_of_a_cell_makes_a_new_plan_due() -> None:
    swarm = swarm_where_we_decide(6, version=2, limit=4)
    roster = tuple(sorted([ME, *swarm.members.others()]))
    swarm.adopt(Plan(1, (2, 3), TERMS.digest, 0, roster, roster[0]))
    assert swarm.members.make_plan_if_due(4, 100) is None
    swarm.members.suspect(min(swarm.members.others()))
    notice = swarm.members.make_plan_if_due(4, 100)
    assert notice is not None
    assert notice.plan.sides == (2, 2)
    assert len(notice.plan.roster) == 5


def test_who_was_not_seen_yet_is_believed_to_be_there_for_a_while() -> None:
    """Rosters come piecemeal: a plan made by one who saw more is no reason for another plan."""
    swarm = swarm_where_we_decide(5, version=2, limit=4)
    roster = tuple(sorted([ME, *swarm.members.others(), peer(5000)]))
    swarm.adopt(Plan(1, (2, 3), TERMS.digest, 0, roster, roster[0]))
    assert swarm.members.make_plan_if_due(4, 101) is None
    assert swarm.members.make_plan_if_due(4, 100 + UNSEEN_S) is not None


def test_who_notices_a_hole_tells_the_decider() -> None:
    numbers = [n for n in range(1, 40) if decider(2, [ME, peer(n)]) != ME][:5]
    swarm = Swarm(limit=4)
    for number in numbers:
        swarm.see(number)
    roster = tuple(sorted([ME, *map(peer, numbers)]))
    swarm.adopt(Plan(1, (2, 3), TERMS.digest, 0, roster, roster[0]))
    assert swarm.members.holes(4, 100) is None
    dead = next(p for p in roster if p not in (ME, swarm.members.next_decider()))
    swarm.members.suspect(dead)
    assert swarm.members.holes(4, 100) == (swarm.members.next_decider(), (dead,))
    assert swarm.members.make_plan_if_due(4, 100) is None


def test_who_goes_by_a_newer_plan_is_asked_for_it() -> None:
    swarm = swarm_where_we_decide(4)
    assert swarm.members.unknown_plan_holder(100) is None
    newer = plan_of(4, (4,), version=3)
    swarm.see(77, plan=newer)
    assert swarm.members.unknown_plan_holder(100) == swarm.members.strange_plan_holder() == peer(77)
    assert swarm.members.make_plan_if_due(0, 100) is None
    assert swarm.adopt(newer)
    assert swarm.members.unknown_plan_holder(100) is swarm.members.strange_plan_holder() is None


# ---- plans from outside


def test_a_plan_is_taken_once() -> None:
    swarm = Swarm()
    plan = plan_of(4, (2, 2))
    assert swarm.adopt(plan)
    assert not swarm.adopt(plan)
    assert swarm.members.newest_plan() == signed(plan)
    assert swarm.members.plan_with(plan.digest[:8]) == plan
    assert swarm.members.plan_with(b"12345678") is None


def test_forged_foreign_and_impossible_plans_are_not_taken() -> None:
    swarm = Swarm()
    plan = plan_of(4, (2, 2))
    forged = PlanNotice(dataclasses.replace(plan, first_k=1), *Notary(plan.signer).sign_plan(plan.body))
    assert not swarm.members.adopt(forged, 100)
    in_anothers_name = PlanNotice(plan, *Notary(peer(9)).sign_plan(plan.body))
    assert not swarm.members.adopt(in_anothers_name, 100)
    assert not swarm.adopt(dataclasses.replace(plan, terms=OTHER_TERMS.digest))
    assert not swarm.adopt(dataclasses.replace(plan, sides=(3, 2)))
    assert swarm.members.newest_plan() is None


def test_of_two_plans_of_one_version_all_take_the_same_in_any_order() -> None:
    rivals = [plan_of(4, (2, 2), signer=number) for number in (1, 2, 3)]
    chosen = set()
    for order in itertools.permutations(rivals):
        swarm = Swarm()
        for plan in order:
            swarm.adopt(plan)
        newest = swarm.members.newest_plan()
        assert newest is not None
        chosen.add(newest.plan.digest)
        losers = [plan for plan in rivals if plan != newest.plan]
        assert all(swarm.members.is_outranked(plan) for plan in losers)
        assert not swarm.members.is_outranked(newest.plan)
    assert len(chosen) == 1


def test_plans_in_any_order_leave_the_same_ones_in_force() -> None:
    plans = [plan_of(8, (2, 4), version=v, first_k=k) for v, k in ((1, 0), (2, 6), (3, 6), (4, 9))]
    in_force = set()
    for order in itertools.permutations(plans):
        swarm = Swarm()
        for plan in order:
            swarm.adopt(plan)
        in_force.add(tuple(plan.version for k in range(12) if (plan := swarm.members.plan_for(k))))
    assert in_force == {(1,) * 6 + (3,) * 3 + (4,) * 3}


def test_before_its_first_k_a_plan_is_not_in_force() -> None:
    swarm = Swarm()
    swarm.adopt(plan_of(4, (4,), first_k=5))
    assert swarm.members.plan_for(4) is None
    assert swarm.members.plan_for(5) is not None


# ---- pins


def test_a_pinned_grid_waits_until_it_can_be_filled() -> None:
    swarm = swarm_where_we_decide(7, pin="2x4")
    assert swarm.members.sessions_needed() == 8
    assert swarm.members.make_plan_if_due(0, 100) is None
    notice = swarm_where_we_decide(8, pin="2x4").members.make_plan_if_due(0, 100)
    assert notice is not None
    assert notice.plan.sides == (2, 4)


def test_a_pinned_plan_is_not_replaced() -> None:
    swarm = swarm_where_we_decide(8, version=2, pin="2x4", limit=4)
    roster = tuple(sorted([ME, *swarm.members.others()]))
    swarm.adopt(Plan(1, (2, 4), TERMS.digest, 0, roster, roster[0]))
    swarm.members.suspect(min(swarm.members.others()))
    assert swarm.members.make_plan_if_due(4, 100) is None


def test_the_pin_of_most_is_in_force_and_the_others_are_told() -> None:
    swarm = Swarm(pin="4x4")
    swarm.see(1, pin="2x8")
    swarm.see(2, pin="2x8")
    assert swarm.members.sessions_needed() == 16
    assert swarm.members.pin_conflict() == "this daemon is pinned to --grid 4x4, but most of the swarm to 2x8"


def test_those_without_a_pin_go_by_the_others() -> None:
    swarm = Swarm()
    swarm.see(1, pin="2x3")
    assert swarm.members.sessions_needed() == 6
    assert swarm.members.pin_conflict() is None


def test_a_pin_that_is_no_grid_is_ignored() -> None:
    swarm = Swarm()
    for number in (1, 2, 3):
        swarm.see(number, pin="999999x999999")
    assert swarm.members.sessions_needed() == 1


def test_equal_pins_are_decided_alike_by_all() -> None:
    ours = Swarm(pin="2x2")
    ours.see(1, pin="4")
    theirs = Swarm(pin="4")
    theirs.see(1, pin="2x2")
    assert (ours.members.pin_conflict() is None) != (theirs.members.pin_conflict() is None)


def test_how_a_lease_spells_a_pin() -> None:
    assert (pin_of(None), pin_of((2, 4))) == ("", "2x4")


# ---- cells


def test_members_of_the_roster_stand_where_the_plan_puts_them() -> None:
    swarm = Swarm()
    plan = plan_of(6, (2, 3))
    swarm.adopt(plan)
    swarm.see_all(6)
    assert swarm.members.cell(plan, 3) == plan.cells[ME]
    assert swarm.members.claim_under(plan, 3) == ((), 0)
    assert all(swarm.members.cell_of(peer(number), plan) == plan.cells[peer(number)] for number in range(1, 6))


def test_a_joiner_claims_the_emptiest_cell_and_keeps_it() -> None:
    swarm = Swarm()
    plan = plan_of(5, (2, 2), without_me=True)
    swarm.adopt(plan)
    for number in range(1, 6):
        swarm.see(number, plan=plan)
    doubled = next(cell for cell in plan.cells.values() if list(plan.cells.values()).count(cell) == 2)
    opposite = (1 - doubled[0], 1 - doubled[1])
    assert swarm.members.cell(plan, 3) == opposite
    assert swarm.members.claim_under(plan, 8) == (opposite, 3)


def test_a_joiner_goes_where_a_dead_member_stood() -> None:
    swarm = Swarm()
    plan = plan_of(6, (2, 3), without_me=True)
    swarm.adopt(plan)
    for number in range(1, 7):
        swarm.see(number, plan=plan)
    swarm.members.suspect(peer(4))
    assert swarm.members.cell(plan, 3) == plan.cells[peer(4)]


def test_of_two_claims_to_an_empty_cell_the_older_wins_and_the_other_moves() -> None:
    plan = plan_of(6, (2, 3), without_me=True)

    def claim_against(claim_k: int, dead: int) -> Cell:
        swarm = Swarm()
        swarm.adopt(plan)
        for number in range(1, 7):
            swarm.see(number, plan=plan)
        for number in range(1, dead + 1):
            swarm.members.suspect(peer(number))
        mine = swarm.members.cell(plan, 5)
        swarm.see(50, plan=plan, claim=mine, claim_k=claim_k)
        return (-1,) if swarm.members.cell(plan, 5) == mine else swarm.members.cell(plan, 5)

    assert claim_against(9, dead=2) == (-1,)
    assert claim_against(1, dead=2) in {plan.cells[peer(1)], plan.cells[peer(2)]}


def test_of_two_claims_of_one_averaging_exactly_one_gives_way() -> None:
    plan = Plan(1, (2, 2), TERMS.digest, 0, tuple(sorted(map(peer, range(10, 14)))), peer(10))
    empty = sorted(plan.roster)[:2]

    def moves(me: int, rival: int) -> bool:
        members = Membership(
            peer(me), TERMS, pin="", group_size_max=16, min_peers=1, credentials=Notary(peer(me)), now=100
        )
        swarm = Swarm()
        swarm.members = members
        swarm.adopt(plan)
        for number in range(10, 14):
            swarm.see(number, plan=plan)
        for gone in empty:
            members.suspect(gone)
        mine = members.cell(plan, 5)
        swarm.see(rival, plan=plan, claim=mine, claim_k=5)
        return members.cell(plan, 5) != mine

    for one, other in itertools.combinations(range(20, 26), 2):
        assert moves(one, other) != moves(other, one)


def test_impossible_claims_and_claims_under_other_plans_give_no_cell() -> None:
    swarm = Swarm()
    plan = plan_of(4, (2, 2))
    swarm.adopt(plan)
    for number, claim in ((10, (2, 0)), (11, (0,)), (12, (-1, 0)), (13, ())):
        swarm.see(number, plan=plan, claim=claim)
        assert swarm.members.cell_of(peer(number), plan) is None
    swarm.see(14, plan=plan_of(4, (2, 2), version=2), claim=(1, 1))
    assert swarm.members.cell_of(peer(14), plan) is None
    swarm.see(15, plan=plan, claim=(1, 1))
    assert swarm.members.cell_of(peer(15), plan) == (1, 1)


# ---- lines


def test_a_line_is_who_shares_all_other_coordinates() -> None:
    swarm = Swarm()
    plan = plan_of(12, (3, 4))
    swarm.adopt(plan)
    swarm.see_all(12)
    for axis in (0, 1):
        line = swarm.members.line(plan, axis, plan.cells[ME])
        assert set(line) == {
            other
            for other, cell in plan.cells.items()
            if other != ME and line_of(cell, axis) == line_of(plan.cells[ME], axis)
        }
        assert len(line) == plan.sides[axis] - 1


def expected_of(swarm: Swarm, plan: Plan, k: int) -> set[PeerId]:
    line = swarm.members.line(plan, 0, plan.cells[ME])
    return set(swarm.members.expected(plan, line, k))


def test_at_the_very_first_averaging_everybody_is_expected() -> None:
    swarm = Swarm()
    plan = plan_of(4, (4,))
    swarm.adopt(plan)
    swarm.see_all(4)
    swarm.see(9, plan=plan, claim=(0,))
    assert expected_of(swarm, plan, 0) == {peer(1), peer(2), peer(3), peer(9)}


@pytest.mark.parametrize(
    ("k", "last_k", "expected"),
    [
        (7, 6, True),
        (7, 5, True),
        (7, 4, False),
        (7 - BEHIND_MAX, 6 - BEHIND_MAX, True),
        (6 - BEHIND_MAX, 5 - BEHIND_MAX, False),
    ],
)
def test_expected_is_who_took_part_in_one_of_the_last_two(k: int, last_k: int, expected: bool) -> None:
    swarm = Swarm()
    plan = plan_of(4, (4,))
    swarm.adopt(plan)
    k, last_k = k + 100, last_k + 100
    swarm.see(1, k=107, last_k=106)
    swarm.see(2, k=k, last_k=last_k)
    assert (peer(2) in expected_of(swarm, plan, 107)) == expected


def test_a_joiner_that_never_took_part_is_welcome_but_not_waited_for() -> None:
    swarm = Swarm()
    plan = plan_of(4, (4,))
    swarm.adopt(plan)
    swarm.see(1, k=7, last_k=6)
    swarm.see(9, k=7, plan=plan, claim=(2,))
    assert expected_of(swarm, plan, 7) == {peer(1)}


def test_who_was_missing_twice_running_is_not_expected_until_it_comes_again() -> None:
    swarm = Swarm()
    plan = plan_of(4, (4,))
    swarm.adopt(plan)
    swarm.see_all(4, k=7, last_k=6)
    for _ in range(MISSES_MAX):
        assert peer(1) in expected_of(swarm, plan, 7)
        swarm.members.missed(peer(1))
    assert peer(1) not in expected_of(swarm, plan, 7)
    swarm.see(1, k=7, last_k=6)
    assert peer(1) not in expected_of(swarm, plan, 7)
    swarm.members.took_part(peer(1), 7)
    assert peer(1) in expected_of(swarm, plan, 7)


def test_a_suspect_is_neither_expected_nor_a_candidate() -> None:
    swarm = Swarm()
    plan = plan_of(4, (4,))
    swarm.adopt(plan)
    swarm.see_all(4, k=7, last_k=6)
    swarm.members.suspect(peer(2))
    assert expected_of(swarm, plan, 7) == {peer(1), peer(3)}


def test_every_session_has_a_cell_and_every_cell_a_session_in_a_swarm_of_any_size() -> None:
    for sessions in range(2, 40):
        swarm = swarm_where_we_decide(sessions, limit=4)
        notice = swarm.members.make_plan_if_due(0, 100)
        assert notice is not None
        held = {swarm.members.cell(notice.plan, 0)}
        held |= {cell for other in swarm.members.others() if (cell := swarm.members.cell_of(other, notice.plan))}
        assert len(held) == math.prod(notice.plan.sides)


def test_a_lease_that_tells_old_counts_takes_back_nothing() -> None:
    """Found by the demo: averagings faster than announcements, and a leader that closed without one it had just met."""
    swarm = Swarm()
    swarm.see(1, k=1, last_k=0)
    swarm.members.took_part(peer(1), 20)
    swarm.see(1, k=3, last_k=2)
    assert swarm.members.current_k() == 20
    plan = Plan(1, (2,), TERMS.digest, 0, tuple(sorted((ME, peer(1)))), peer(1))
    line = swarm.members.line(plan, 0, plan.cells[ME])
    assert swarm.members.expected(plan, line, 21) == (peer(1),)

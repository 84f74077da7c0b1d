"""Who is there: leases, suspects, plans, cells. What a session believes of its swarm, and what follows from it.

Knows records and their age, which plan counts, who stands where, who is expected, whose turn it is to decide. Does not
know rounds, groups or the trainer. Every answer is a function of what was seen; nothing here is sent.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from moshpitd.averaging.grid import (
    FIRST_K_LEAD,
    PLAN_VERSION_MAX,
    Cell,
    Loads,
    Plan,
    Terms,
    choose_sides,
    decider,
    format_sides,
    line_of,
    new_plan_due,
    parse_sides,
)
from moshpitd.averaging.matchmaking import Candidate
from moshpitd.averaging.messages import Lease, PlanNotice, Record, Sighting
from moshpitd.averaging.names import PeerId, digest

MISSES_MAX = 2
"""Who was expected and missing in this many averagings running is not expected any more."""
PROMISES_MAX = 6
"""... and after this many not even when it says that it is coming."""
BEHIND_MAX = 64
"""Nor is one whose own count is so far behind. Leases lag: of trainers that average in milliseconds by dozens."""
PLANS_KEPT = 4
PLANS_MET_MAX = 1024
HOLES_TOLD_MAX = 64
UNSEEN_S = 60.0
"""Who stands in a plan's roster but was never seen here is believed to be there for so long: rosters come piecemeal,
and a plan made by one who saw more is no reason for another plan."""
LEASES_MAX = 8192
T = TypeVar("T")
PLAN_PATIENCE_S = 10.0
"""Who announces a plan newer than ours is believed for so long without showing it: then the swarm plans without it."""


class Credentials(Protocol):
    """Signs for ourselves and checks others; handed in, so that the rooms stay free of keys."""

    def sign_plan(self, body: bytes) -> tuple[bytes, bytes]:
        """(public key, signature)"""
        ...

    def plan_is_genuine(self, signer: PeerId, body: bytes, public_key: bytes, signature: bytes) -> bool: ...


Known = Sighting[Lease]
"""The newest lease of one peer, as it was seen: a simulated swarm shares it among all who see it."""


@dataclass(slots=True)
class Mark:
    """What we know of one peer beyond its lease. Few have one: those we met or missed since."""

    misses: int = 0
    """Of averagings in which it was expected, running."""
    k: int = -1
    last_k: int = -1
    """As in its lease, where that is older."""


class Membership:
    """The swarm as one session sees it. `me` is never among the others."""

    def __init__(
        self,
        me: PeerId,
        terms: Terms,
        *,
        pin: str,
        group_size_max: int,
        min_peers: int,
        credentials: Credentials,
        now: float,
    ) -> None:
        self._me = me
        self._terms = terms.digest
        self._pin = pin
        self._limit = group_size_max
        self.min_peers = min_peers
        self._credentials = credentials
        self._opened_at = now
        self._heard_over = -1
        self._others: dict[PeerId, Known] = {}
        """The live, unsuspected ones with our terms."""
        self._aside: dict[PeerId, Known] = {}
        """Everybody else we know: suspects, and those with other terms."""
        self._suspects: set[PeerId] = set()
        self._marks: dict[PeerId, Mark] = {}
        self._ahead: dict[PeerId, float] = {}
        """Those whose lease named a plan newer than ours when it came, and since when they do."""
        self._crowd = 0
        """Counts how often somebody came into or left `_others`: what depends only on who is there is kept so long."""
        self._told = 0
        """Counts how often what we know of anybody may have changed."""
        self._kept: dict[str, tuple[tuple[int, ...], object]] = {}
        """Answers that cost a look at everybody, with the counts for which they hold."""
        self._gone: set[PeerId] = set()
        """Those whose leases ran out here."""
        self._plans: list[PlanNotice] = []
        """By version; each begins later than the one before."""
        self._plans_seen_at: dict[bytes, float] = {}
        self._plans_met: set[bytes] = set()
        """First 8 bytes of the digests of all plans that were told us, taken or not."""
        self._claims: dict[bytes, tuple[Cell, int]] = {}
        """Our own places as a joiner: by plan digest the cell and the averaging from which it holds. A plan is known
        before it begins, so there may be one under the plan in force and one under the next."""

    # ---- inputs

    def sighted(self, sightings: Sequence[Sighting[Record]], now: float) -> None:
        """Verified leases of other sessions under our session key. In a large swarm most time is spent here."""
        others, aside, marks, ahead = self._others, self._aside, self._marks, self._ahead
        terms, version = self._terms, self._version()
        for sighting in cast("Sequence[Known]", sightings):
            peer, lease = sighting.peer, sighting.record
            known = others.get(peer) or aside.get(peer)
            if not isinstance(lease, Lease) or (known is not None and sighting.sequence <= known.sequence):
                continue
            if known is None:
                if peer == self._me or len(others) + len(aside) >= LEASES_MAX:
                    continue
                self._gone.discard(peer)
            elif lease.k < known.record.k or lease.last_k < known.record.last_k or peer in marks:
                self._compare(known, sighting)
            if lease.plan_version > version:
                if known is None or known.record.plan_version <= version:
                    ahead[peer] = now
            elif ahead:
                ahead.pop(peer, None)
            if lease.terms == terms and not (aside and peer in aside):
                others[peer] = sighting
                self._crowd += known is None
            else:
                self._suspects.discard(peer)
                self._place(sighting)
        self._told += bool(sightings)

    def _compare(self, known: Known, sighting: Known) -> None:
        """Its new lease was announced a while ago; we may have met it since. Counts never go back."""
        before, lease = self._mark(known.peer), sighting.record
        k, last_k = self._counts(known)
        mark = Mark(before.misses if last_k >= lease.last_k else 0)
        if known.incarnation == sighting.incarnation and known.record.terms == lease.terms:
            mark.k, mark.last_k = k, last_k
        self._marks[known.peer] = mark
        if not mark.misses and mark.k <= lease.k and mark.last_k <= lease.last_k:
            del self._marks[known.peer]

    def _place(self, known: Known) -> None:
        """Count it in or out, after what we know of it changed."""
        counts = known.peer not in self._suspects and known.record.terms == self._terms
        self._crowd += counts != (known.peer in self._others)
        (self._aside if counts else self._others).pop(known.peer, None)
        (self._others if counts else self._aside)[known.peer] = known

    def change_terms(self, terms: Terms) -> None:
        """Ours are others now: so are those who count, and no plan holds any more."""
        self._terms = terms.digest
        for known in [*self._others.values(), *self._aside.values()]:
            self._place(known)
        self._plans.clear()
        self._plans_seen_at.clear()
        self._claims.clear()
        self._told += 1

    def expire(self, now: float) -> None:
        for known in [k for there in (self._others, self._aside) for k in there.values() if k.expires_at <= now]:
            self._crowd += known.peer in self._others
            for kept in (self._others, self._aside, self._marks, self._ahead):
                kept.pop(known.peer, None)
            self._suspects.discard(known.peer)
            self._gone.add(known.peer)

    def suspect(self, peer: PeerId) -> None:
        """It did not answer: not expected and no leader until a newer record of it is seen."""
        if known := self._known(peer):
            self._suspects.add(peer)
            self._place(known)

    def heard(self, peer: PeerId) -> None:
        """It spoke to us over a proved channel: whatever we suspected, it is there."""
        if peer in self._suspects:
            self._suspects.remove(peer)
            self._place(self._aside[peer])

    def took_part(self, peer: PeerId, k: int) -> None:
        """We met it in averaging k."""
        if self._known(peer):
            mark = self._mark(peer)
            mark.misses, mark.k, mark.last_k = 0, max(mark.k, k), max(mark.last_k, k)
            self._told += 1

    def missed(self, peer: PeerId) -> None:
        """It was expected and did not come."""
        if self._known(peer):
            self._mark(peer).misses += 1

    def keeps_promises(self, peer: PeerId) -> bool:
        """Whether one that nobody expects is believed that it is coming."""
        mark = self._marks.get(peer)
        return peer in self._others and (mark is None or mark.misses < PROMISES_MAX)

    def lags_behind(self, peer: PeerId, k: int) -> bool:
        """Whether what we know of this peer, now seen in averaging k, is old."""
        known = self._known(peer)
        return known is None or self._counts(known)[0] + 1 < k

    def left(self, peer: PeerId) -> None:
        """It said farewell. Its record may still be around: a newer one is needed to believe in it again."""
        self.suspect(peer)
        if self._known(peer):
            self._mark(peer).misses = MISSES_MAX

    # ---- who is there

    def others(self) -> Mapping[PeerId, Known]:
        """Live, unsuspected sessions with our terms."""
        return self._others

    def everyone(self) -> list[PeerId]:
        """All known sessions of this name, whatever their terms."""
        return [*self._others, *self._aside]

    def is_suspect(self, peer: PeerId) -> bool:
        return peer in self._suspects

    def live_count(self) -> int:
        return 1 + len(self._others)

    def address_of(self, peer: PeerId) -> str:
        known = self._known(peer)
        return known.record.address if known and known.record.dialable else ""

    def _known(self, peer: PeerId) -> Known | None:
        return self._others.get(peer) or self._aside.get(peer)

    def _mark(self, peer: PeerId) -> Mark:
        return self._marks.setdefault(peer, Mark())

    def _counts(self, known: Known) -> tuple[int, int]:
        """The averaging it is in or takes part in next, and the last one it took part in, as far as we know."""
        lease, mark = known.record, self._marks.get(known.peer)
        return (max(lease.k, mark.k), max(lease.last_k, mark.last_k)) if mark else (lease.k, lease.last_k)

    def stranger(self) -> tuple[PeerId, bytes] | None:
        """A live session of our name with other terms, and the digest of those; of most's, if most are against us."""
        peer = self.majority_against_us() or min((known.peer for known in self._strangers()), default=None)
        return (peer, self._aside[peer].record.terms) if peer else None

    def _strangers(self) -> list[Known]:
        return [known for peer, known in self._aside.items() if peer not in self._suspects and known.record.terms]

    def majority_against_us(self) -> PeerId | None:
        """Somebody whose terms most live sessions share, when ours are not among them; the later joiner loses a tie."""
        strangers = self._strangers()
        if not strangers:
            return None
        camps = Counter(known.record.terms for known in strangers)
        ours, largest = self.live_count(), max(camps.values())
        if largest < ours:
            return None
        camp = min(terms for terms, count in camps.items() if count == largest)
        theirs = [known for known in strangers if known.record.terms == camp]
        spokesman = min((known.peer for known in theirs), key=lambda peer: digest("spokesman", peer, self._me))
        if largest > ours:
            return spokesman
        allies = [_opened_at(known) for known in self._others.values()]
        we_are_later = min([self._opened_at, *allies]) >= min(map(_opened_at, theirs))
        return spokesman if we_are_later else None

    def _keep(self, name: str, find: Callable[[], T], *counts: int) -> T:
        """The answer found before, while these counts are as they were then."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != counts:
            kept = self._kept[name] = (counts, find())
        return cast(T, kept[1])

    # ---- counting

    def current_k(self) -> int:
        """The largest k that two live sessions hold; that of the only one; 0 when nobody is there."""
        return self._keep("k", self._find_current_k, self._crowd, self._told)

    def _find_current_k(self) -> int:
        held = heapq.nlargest(2, self._each_k())
        return held[-1] if held else 0

    def all_past(self, k: int) -> bool:
        """Whether everybody else took part in this averaging, or a later one."""
        return bool(self._others) and all(self._counts(one)[1] >= k for one in self._others.values())

    def _each_k(self) -> list[int]:
        """Where everybody is."""
        marks = self._marks
        return [self._counts(one)[0] if peer in marks else one.record.k for peer, one in self._others.items()]

    def has_history(self, before: int) -> bool:
        """Whether somebody else took part in an averaging before this one."""

        def find() -> bool:
            marks = self._marks
            every = (self._counts(one)[1] if peer in marks else one.record.last_k for peer, one in self._others.items())
            return any(0 <= last_k < before for last_k in every)

        heard_over = 0 <= self._heard_over < before
        return heard_over or (before > 0 and self._keep("history", find, self._crowd, self._told, before))

    def heard_over(self, k: int) -> None:
        """A leader told us that averaging k is over: whatever older leases say, this swarm already counts."""
        self._heard_over = max(self._heard_over, k)

    # ---- plans

    def _version(self) -> int:
        """Of the newest plan that we know; 0: none."""
        return self._plans[-1].plan.version if self._plans else 0

    def newest_plan(self) -> PlanNotice | None:
        return self._plans[-1] if self._plans else None

    def plan_for(self, k: int) -> Plan | None:
        """The plan in force for averaging k."""
        due = [notice.plan for notice in self._plans if notice.plan.first_k <= k]
        return due[-1] if due else None

    def plans_from(self, k: int) -> list[PlanNotice]:
        """The plan in force for averaging k and those that follow it."""
        in_force = self.plan_for(k)
        return [notice for notice in self._plans if in_force is None or notice.plan.version >= in_force.version]

    def plan_with(self, prefix: bytes) -> Plan | None:
        return next((notice.plan for notice in self._plans if notice.plan.digest[:8] == prefix), None)

    def adopt(self, notice: PlanNotice, now: float) -> bool:
        """Take a plan from outside; False when it changes nothing, or is not to be taken seriously.

        Plans may come in any order: an older one still counts until the newer one begins.
        """
        plan = notice.plan
        if plan.terms != self._terms or not plan.is_well_formed():
            return False
        if len(self._plans_met) >= PLANS_MET_MAX:
            self._plans_met.clear()
        self._plans_met.add(plan.digest[:8])
        rival = next((n for n in self._plans if n.plan.version == plan.version), None)
        if rival and plan.precedence <= rival.plan.precedence:
            return False
        if not self._credentials.plan_is_genuine(plan.signer, plan.body, notice.public_key, notice.signature):
            return False
        every = sorted([*(n for n in self._plans if n is not rival), notice], key=lambda n: n.plan.version)
        # Of two plans of one version, and of two that would begin at once, only the newer one is ever in force.
        counting = [n for i, n in enumerate(every) if all(n.plan.first_k < m.plan.first_k for m in every[i + 1 :])]
        self._plans = counting[-PLANS_KEPT:]
        self._plans_seen_at = {n.plan.digest: self._plans_seen_at.get(n.plan.digest, now) for n in self._plans}
        return notice in self._plans

    def unknown_plan_holder(self, now: float) -> PeerId | None:
        """Somebody who announces a plan newer than ours, and may yet tell us."""
        version, newer = self._version(), list[tuple[bool, int, PeerId]]()
        for peer, since in self._ahead.items():
            known = self._others.get(peer)
            if known and known.record.plan_version > version and now < since + PLAN_PATIENCE_S:
                # Who cannot be dialled may never hear our question.
                newer.append((not known.record.dialable, -known.record.plan_version, peer))
        return min(newer)[-1] if newer else None

    def plan_teller(self, attempt: int) -> PeerId:
        """Whom to ask for a plan while we have none, at each attempt another one; the next to decide if nobody says
        that it has one."""
        having = sorted(p for p, k in self._others.items() if k.record.plan_version and k.record.dialable)
        return having[attempt % len(having)] if having else self.next_decider()

    def strange_plan_holder(self) -> PeerId | None:
        """Somebody who goes by a plan that we never heard of: of two plans of one version one must go."""
        return self._keep("strange", self._find_strange_plan_holder, self._crowd, self._told, len(self._plans_met))

    def _find_strange_plan_holder(self) -> PeerId | None:
        strange = {known.record.plan for known in self._others.values()} - self._plans_met - {b""}
        if not strange:
            return None
        holders = ((not k.record.dialable, p) for p, k in self._others.items() if k.record.plan in strange)
        return min(holders)[1]

    def is_outranked(self, plan: Plan) -> bool:
        """Whether we go by another plan instead of this one."""
        return plan.terms == self._terms and any(
            notice.plan.version == plan.version and notice.plan.precedence > plan.precedence for notice in self._plans
        )

    def next_decider(self) -> PeerId:
        version = self._version()
        return self._keep("decider", lambda: decider(version + 1, [self._me, *self._others]), self._crowd, version)

    def make_plan_if_due(self, k: int, now: float) -> PlanNotice | None:
        """A new plan when one is needed and it is ours to make. `k`: the averaging we are in or take part in next."""
        newest = self.newest_plan()
        if self.next_decider() != self._me or self.unknown_plan_holder(now) is not None:
            return None
        if newest and newest.plan.version >= PLAN_VERSION_MAX:
            return None
        others = self._others
        roster = tuple(sorted([self._me, *others]))
        pin = self._pin_in_force()
        if newest is None:
            if len(roster) < max(2, self.sessions_needed()):
                return None
        else:
            held = [*self._cells_held(newest.plan).values(), *self._cells_unseen(newest.plan, now)]
            if newest.plan.first_k > k or not new_plan_due(newest.plan, held, self._limit, pinned=bool(pin)):
                return None
        sides = parse_sides(pin) if pin else choose_sides(len(roster), self._limit)
        if math.prod(sides) > len(roster) or (
            newest and newest.plan.sides == sides and set(newest.plan.roster) == set(roster)
        ):
            return None
        # The fastest, not one that is where nobody can be: the plan would never begin, and no other be made.
        reached = max(k, self.current_k()) + BEHIND_MAX
        current = max([k, *(theirs for theirs in self._each_k() if theirs <= reached)])
        plan = Plan(
            version=newest.plan.version + 1 if newest else 1,
            sides=sides,
            terms=self._terms,
            # Without any plan nobody can be in an averaging: the first one holds at once.
            first_k=current + FIRST_K_LEAD if newest else 0,
            roster=roster,
            signer=self._me,
        )
        public_key, signature = self._credentials.sign_plan(plan.body)
        notice = PlanNotice(plan, public_key, signature)
        adopted = self.adopt(notice, now)
        assert adopted
        return notice

    def holes(self, k: int, now: float) -> tuple[PeerId, tuple[PeerId, ...]] | None:
        """When a new plan is due for those we could not reach, and another's to make: the decider, and who is missing.

        Only those on a dead peer's lines notice at once; everybody else believes its lease until it runs out.
        """
        newest, decides = self.newest_plan(), self.next_decider()
        if newest is None or decides == self._me or newest.plan.first_k > k:
            return None
        missing = sorted(peer for peer in self._suspects if peer in newest.plan.cells)
        if not missing:
            return None
        held = [*self._cells_held(newest.plan).values(), *self._cells_unseen(newest.plan, now)]
        if not new_plan_due(newest.plan, held, self._limit, pinned=bool(self._pin_in_force())):
            return None
        return decides, tuple(missing[:HOLES_TOLD_MAX])

    def sessions_needed(self) -> int:
        """How many sessions must be there before there can be a first plan."""
        pin = self._pin_in_force()
        return max(self.min_peers, math.prod(parse_sides(pin)) if pin else 1)

    def pin_conflict(self) -> str | None:
        """In words, when our daemon's pinned grid is not the one most others are pinned to."""
        in_force = self._pin_in_force()
        if self._pin and in_force != self._pin:
            return f"this daemon is pinned to --grid {self._pin}, but most of the swarm to {in_force}"
        return None

    def _pin_in_force(self) -> str:
        return self._keep("pin", self._find_pin_in_force, self._crowd, self._told)

    def _find_pin_in_force(self) -> str:
        pins = Counter(known.record.pin for known in self._others.values() if known.record.pin)
        if self._pin:
            pins[self._pin] += 1
        valid = [pin for pin in pins if _is_grid(pin)]
        return min(valid, key=lambda pin: (-pins[pin], pin), default="")

    # ---- cells

    def cell(self, plan: Plan, k: int) -> Cell:
        """Our own cell: by the plan's roster, else claimed as a joiner where the grid is emptiest."""
        if self._me in plan.cells:
            return plan.cells[self._me]
        if plan.digest not in self._claims or self._claim_is_lost(plan):
            held = self._cells_held(plan, without_us=True)
            cell = Loads(plan.sides, held.values()).emptiest(digest("claim", plan.digest, self._me))
            known = [notice.plan.digest for notice in self._plans]
            self._claims = {plan: claim for plan, claim in self._claims.items() if plan in known}
            self._claims[plan.digest] = (cell, k)
        return self._claims[plan.digest][0]

    def claim_under(self, plan: Plan, k: int) -> tuple[Cell, int]:
        """What our lease says of our cell: the one we claim as a joiner and the averaging from which it holds."""
        if self._me in plan.cells:
            return (), 0
        self.cell(plan, k)
        return self._claims[plan.digest]

    def _claim_is_lost(self, plan: Plan) -> bool:
        """Another joiner claimed our cell before us, and there is an emptier one."""
        mine, since = self._claims[plan.digest]
        rivals = [
            (known.record.claim_k, digest("claim", plan.digest, peer))
            for peer, known in self._others.items()
            if known.record.claim == mine and known.record.plan == plan.digest[:8] and peer not in plan.cells
        ]
        if not rivals or min(rivals) > (since, digest("claim", plan.digest, self._me)):
            return False
        loads = Loads(plan.sides, self._cells_held(plan, without_us=True).values())
        return loads.holders(loads.emptiest(b"")) < loads.holders(mine)

    def cell_of(self, peer: PeerId, plan: Plan) -> Cell | None:
        """Where another session stands under the plan; None while it has no cell."""
        if peer in plan.cells:
            return plan.cells[peer]
        known = self._known(peer)
        if known and known.record.plan == plan.digest[:8] and _fits(known.record.claim, plan.sides):
            return known.record.claim
        return None

    def _cells_held(self, plan: Plan, *, without_us: bool = False) -> dict[PeerId, Cell]:
        held = {peer: cell for peer in self._others if (cell := self.cell_of(peer, plan)) is not None}
        if not without_us and self._me in plan.cells:
            held[self._me] = plan.cells[self._me]
        elif not without_us and plan.digest in self._claims:
            held[self._me] = self._claims[plan.digest][0]
        return held

    def _cells_unseen(self, plan: Plan, now: float) -> list[Cell]:
        """Of those in the plan's roster who have not shown up here yet, for a while."""
        if now >= self._plans_seen_at[plan.digest] + UNSEEN_S:
            return []
        return [
            cell
            for peer, cell in plan.cells.items()
            if peer != self._me and not self._known(peer) and peer not in self._gone
        ]

    # ---- lines

    def line(self, plan: Plan, axis: int, cell: Cell) -> dict[PeerId, Known]:
        """The other live sessions on this cell's line."""
        wanted, others = line_of(cell, axis), self._others
        line = {peer: others[peer] for peer in plan.lines.get((axis, wanted), ()) if peer in others}
        for peer in self._keep("joiners", lambda: [p for p in others if p not in plan.cells], self._crowd, id(plan)):
            if (theirs := self.cell_of(peer, plan)) is not None and line_of(theirs, axis) == wanted:
                line[peer] = others[peer]
        return line

    def candidates(self, line: dict[PeerId, Known]) -> list[Candidate]:
        return [Candidate(peer, known.record.address) for peer, known in line.items() if known.record.dialable]

    def expected(self, plan: Plan, line: dict[PeerId, Known], k: int) -> tuple[PeerId, ...]:
        """Who of the line is waited for: whoever takes part regularly, and at the very first everybody.

        Leases lag: one whose first averaging just ended may still look like a newcomer. So those for whom the plan was
        made are expected until they were missed; of joiners only those that took part before.
        """

        def takes_part(known: Known) -> bool:
            theirs, last = self._counts(known)
            # It took part in one of the last two averagings and is not past this one, as far as we know.
            keeps_up = last + 2 >= theirs and k - BEHIND_MAX <= theirs <= k
            return known.peer in plan.cells if last < 0 else keeps_up

        marks = self._marks
        every = [known for peer, known in line.items() if peer not in marks or marks[peer].misses < MISSES_MAX]
        regular = [known for known in every if takes_part(known)]
        first = len(regular) < len(every) and not self.has_history(k)
        return tuple(sorted(known.peer for known in (every if first else regular)))


def _opened_at(known: Known) -> float:
    return known.seen_at - known.record.open_s


def _fits(cell: Cell, sides: tuple[int, ...]) -> bool:
    return len(cell) == len(sides) and all(0 <= c < side for c, side in zip(cell, sides, strict=True))


def _is_grid(text: str) -> bool:
    try:
        parse_sides(text)
    except ValueError:
        return False
    return True


def pin_of(sides: Iterable[int] | None) -> str:
    """How a lease spells a pinned grid; empty for auto."""
    return format_sides(tuple(sides)) if sides else ""

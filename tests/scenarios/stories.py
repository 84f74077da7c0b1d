"""The stories: what a protocol of many daemons has to live through, each told with as few peers as it needs.

A story reads top-down: what befalls the peers, then what must come of it. The cast is named in the order in which it
leads, where that matters. `tests/scenarios/golden` holds what happened; `python -m tests.scenarios NAME` tells one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from moshpitd.averaging.grid import Cell
from moshpitd.averaging.messages import Begin, Begun, Bound, Closed, Coming, Join, Ready, Redirect, View
from moshpitd.averaging.receipt import Outcome
from moshpitd.simulation.network import Link, Weather
from moshpitd.simulation.swarm import Peer
from tests.scenarios.stage import BEGINS_AT, Scene, Stage, Story

COMPLETE, PARTIAL, ALONE = Outcome.COMPLETE, Outcome.PARTIAL, Outcome.ALONE
STORIES: dict[str, Story] = {}
Play = TypeVar("Play", bound=Callable[[Stage], None])


def story(scene: Scene) -> Callable[[Play], Play]:
    """Enter a story into the book; its docstring says what happens and what must come of it."""

    def enter(play: Play) -> Play:
        STORIES[play.__name__] = Story(play.__name__, inspect.getdoc(play) or "", scene, play)
        return play

    return enter


# ---- deaths


@story(Scene(seed=7, leads_in=1))
def dead_leader(stage: Stage) -> None:
    """Ann leads and keeps the joins of ben and cat, while dan's trainer still computes. Then her daemon is killed.
    Ben is next in the order: the three meet at him at once, and nobody is missed, for the dead are not expected.
    """
    ann, ben, cat, dan = stage.cast
    for peer, after_s in ((ann, 0.0), (ben, 0.01), (cat, 0.02), (dan, 0.6)):
        stage.call(peer, after_s=after_s)
    stage.swarm.at(stage.now + 0.2, lambda: stage.swarm.kill(ann))

    receipts = stage.ended(ben, cat, dan)

    for peer, receipt in receipts.items():
        assert receipt.outcome is COMPLETE
        assert receipt.rounds[0].leader == ben.id
        assert stage.holds(peer, stage.mean(ben, cat, dan))
    assert stage.now < BEGINS_AT + 1.0


@story(Scene(seed=7, leads_in=1))
def leader_without_power(stage: Stage) -> None:
    """As before, but ann's machine loses its power: no connection breaks, she only falls silent.
    Patience finds it out. Those who give her up first wait at ben, until he has given her up too, and leads.
    """
    ann, ben, cat, dan = stage.cast
    for peer, after_s in ((ann, 0.0), (ben, 0.01), (cat, 0.02), (dan, 0.6)):
        stage.call(peer, after_s=after_s)
    stage.swarm.at(stage.now + 0.2, lambda: stage.swarm.kill(ann, silent=True))

    receipts = stage.ended(ben, cat, dan)

    assert {receipt.rounds[0].leader for receipt in receipts.values()} == {ben.id}
    assert all(stage.holds(peer, stage.mean(ben, cat, dan)) for peer in receipts)
    assert stage.now < BEGINS_AT + 10.0


REDUCER = Scene(seed=5, leads_in=1, chunks=8, show_chunks=True)
"""Two chunks a span: there is a middle."""


@story(REDUCER)
def reducer_dead_before_its_span(stage: Stage) -> None:
    """Dan is killed when he begins to reduce, before anything of his has left. His span is reduced by another.
    The receipts name him: his contribution is missing everywhere, and only his. All hold the same bits.
    """
    ann, ben, cat, dan = stage.cast
    stage.when(lambda: stage.state(dan) == "reducing", lambda: stage.swarm.kill(dan))

    receipts = stage.average(*stage.cast)

    others = (ann, ben, cat)
    assert len({receipt.rounds[0].group_id for receipt in receipts.values()}) == 1
    for peer in others:
        (one,) = receipts[peer].rounds
        assert one.outcome is PARTIAL
        assert [line.peer for line in one.dropped] == [dan.id]
        assert dan.id not in {span.reducer for span in one.spans}
        assert stage.holds(peer, stage.mean(*others))


@story(REDUCER)
def reducer_dead_in_the_middle(stage: Stage) -> None:
    """Dan has reduced the first chunk of his span and ann holds it; then he is killed. That average is served again
    as it is, with his contribution in it; the rest of his span is reduced again by another.
    """
    ann, ben, cat, dan = stage.cast
    stage.when_chunk(
        lambda sender, receiver, chunk: sender is dan and receiver is ann and chunk.is_average,
        lambda: stage.swarm.kill(dan),
    )

    receipts = stage.average(*stage.cast)

    digests = {receipt.rounds[0].digest for receipt in receipts.values()}
    assert len(digests) == 1, "the same bits"
    for peer in (ann, ben, cat):
        (one,) = receipts[peer].rounds
        assert one.outcome is PARTIAL
        assert [line.peer for line in one.dropped] == [dan.id]
        saved = [span for span in one.spans if span.reducer == dan.id]
        assert saved and all(set(span.contributors) == {p.id for p in stage.cast} for span in saved)
        lost = {span.reducer for span in one.spans if set(span.contributors) != {p.id for p in stage.cast}}
        assert dan.id not in lost


@story(REDUCER)
def reducer_dead_at_the_end(stage: Stage) -> None:
    """Dan's whole span has reached everybody; he is killed before he says Ready. Nothing has to be reduced again:
    everybody's contribution is in every span, and partial says only that dan did not confirm.
    """
    ann, ben, cat, dan = stage.cast
    for peer in (ann, ben, cat):
        stage.lose(Ready, dan, peer)
    stage.when(stage.has_sent(Ready, dan), lambda: stage.swarm.kill(dan))

    receipts = stage.average(*stage.cast)

    for peer in (ann, ben, cat):
        (one,) = receipts[peer].rounds
        assert one.outcome is PARTIAL
        assert [line.peer for line in one.dropped] == [dan.id]
        assert all(set(span.contributors) == {p.id for p in stage.cast} for span in one.spans)
        assert stage.holds(peer, stage.mean(*stage.cast))


@story(REDUCER)
def reducer_dead_after_its_word(stage: Stage) -> None:
    """Dan has said Ready to all and is killed. He is not needed any more, and nobody is told of a fault:
    whoever has the word of all commits.
    """
    ann, ben, cat, dan = stage.cast
    said = [stage.has_sent(Ready, dan, peer) for peer in (ann, ben, cat)]
    # A message that is under way when its connection breaks may be lost with it, so a little later.
    stage.when(
        lambda: all(condition() for condition in said),
        lambda: stage.swarm.at(stage.now + 0.0025, lambda: stage.swarm.kill(dan)),
    )

    receipts = stage.average(*stage.cast)

    for peer in (ann, ben, cat):
        assert receipts[peer].outcome is COMPLETE
        assert stage.holds(peer, stage.mean(*stage.cast))
    assert stage.sent(View) == []


@story(REDUCER)
def those_who_wait_for_the_dead(stage: Stage) -> None:
    """Dan's machine loses its power in the middle of his span, and nothing breaks: the others only hear no more of him.
    Each of them makes no progress either, waiting for him. He alone is left out, and nobody is blamed for waiting.
    """
    ann, ben, cat, dan = stage.cast
    stage.when_chunk(
        lambda sender, receiver, chunk: sender is dan and receiver is ann and chunk.is_average,
        lambda: stage.swarm.kill(dan, silent=True),
    )

    receipts = stage.average(*stage.cast)

    assert len({receipt.rounds[0].digest for receipt in receipts.values()}) == 1
    for peer in (ann, ben, cat):
        assert [line.peer for line in receipts[peer].rounds[0].dropped] == [dan.id]
    assert stage.now < BEGINS_AT + 6.0


@story(Scene(seed=7, leads_in=1, weather=replace(Weather(), message=(0.2, 0.2))))
def far_callers_deadline(stage: Stage) -> None:
    """Messages take a fifth of a second. Dan stands still once the group has begun, and the callers have two seconds:
    too little to find out what is the matter with him. The budget reaches each of them late, but no call may end a
    message's way after its own deadline. Values stay as they were, and the reason is told.
    """
    ann, ben, cat, dan = stage.cast
    stage.when(stage.has_sent(Begun, dan), lambda: stage.swarm.pause(dan))
    for number, peer in enumerate(stage.cast):
        stage.call(peer, after_s=number / 1000, timeout_s=2.0)

    receipts = stage.ended(ann, ben, cat)

    for peer, receipt in receipts.items():
        assert peer.endings[-1].at <= peer.deadline + 1e-6
        assert receipt.outcome is ALONE
        assert "time ran out" in receipt.why
        assert stage.holds(peer, stage.held[peer.name])
    stage.swarm.resume(dan)


@story(Scene(seed=7, leads_in=1))
def contributor_wakes_after_the_commit(stage: Stage) -> None:
    """Dan's daemon stands still when his group has just begun, for ten seconds. The others wait a few heartbeats, go on
    without him and commit; what had left him already counts, and the receipts say where. He wakes, learns that he was
    left out, keeps his values, and is in time for the next.
    """
    ann, ben, cat, dan = stage.cast
    others = (ann, ben, cat)
    stage.when(stage.has_sent(Begun, dan), lambda: stage.swarm.pause(dan))
    for number, peer in enumerate(stage.cast):
        stage.call(peer, after_s=number / 1000)
    receipts = stage.ended(*others)
    stage.swarm.run_for(BEGINS_AT + 10.0 - stage.now)
    stage.swarm.resume(dan)
    stage.swarm.run_until(lambda: len(dan.endings) == 2)

    with_him = [{dan.id in span.contributors for span in receipts[peer].rounds[0].spans} for peer in others]
    assert with_him == 3 * [{True, False}]
    assert {receipt.outcome for receipt in receipts.values()} == {PARTIAL}
    assert len({receipt.digest for receipt in receipts.values()}) == 1
    assert dan.endings[-1].told.outcome is ALONE
    assert "left out" in dan.endings[-1].told.why
    assert stage.holds(dan, stage.held["dan"])
    receipts = stage.average(*stage.cast)
    assert {receipt.outcome for receipt in receipts.values()} == {COMPLETE}
    assert all(stage.holds(peer, stage.mean(*stage.cast)) for peer in stage.cast)


# ---- the five sequences behind the rules of matchmaking


@story(Scene(seed=7, leads_in=1))
def lost_begin(stage: Stage) -> None:
    """Ann closes the group, but her Begin to cat is lost. Cat sends nothing before it is bound; its repeated join is
    answered with the very same group, and all four meet in it.
    """
    ann, _, cat, _ = stage.cast
    stage.lose(Begin, ann, cat)

    receipts = stage.average(*stage.cast)

    begins = {send.message.group.group_id for send in stage.sent(Begin, ann, cat)}
    assert len(begins) == 1
    assert len(stage.sent(Begin, ann, cat)) >= 2
    assert {receipt.outcome for receipt in receipts.values()} == {COMPLETE}
    assert all(stage.holds(peer, stage.mean(*stage.cast)) for peer in stage.cast)


@story(Scene(seed=7, leads_in=1))
def cut_join(stage: Stage) -> None:
    """Ann keeps cat's join; then their connection breaks, though both live. Cat cannot know what became of its join: it
    goes to ben, and ben sends it back. It ends up in one group and never in two.
    """
    ann, _, cat, dan = stage.cast
    for number, peer in enumerate(stage.cast):
        stage.call(peer, after_s=0.6 if peer is dan else number / 1000)
    stage.swarm.at(stage.now + 0.2, lambda: stage.swarm.cut(ann, cat))

    receipts = stage.ended(*stage.cast)

    groups = {send.message.group.group_id: send.message.group for send in stage.sent(Begin)}
    assert sum(group.rank_of(cat.id) is not None for group in groups.values()) <= 1
    assert {receipt.outcome for receipt in receipts.values()} == {COMPLETE}
    assert all(stage.holds(peer, stage.mean(*stage.cast)) for peer in stage.cast)


@story(Scene(seed=7, leads_in=1))
def redirect_to_the_dead(stage: Stage) -> None:
    """Ben waits with ann, who loses her power. Cat comes and asks both: ben sends it to ann, from whom he heard in this
    round. Both give her up, each in its time; cat is not sent in a circle, and they meet at ben.
    """
    ann, ben, cat, dan = stage.cast
    for peer, after_s in ((ann, 0.0), (ben, 0.001), (cat, 0.3), (dan, 0.31)):
        if peer is not ann:
            stage.call(peer, after_s=after_s)
    stage.call(ann)
    stage.swarm.at(stage.now + 0.2, lambda: stage.swarm.kill(ann, silent=True))

    receipts = stage.ended(ben, cat, dan)

    assert stage.sent(Redirect, ben, cat)
    assert {receipt.rounds[0].leader for receipt in receipts.values()} == {ben.id}
    assert all(stage.holds(peer, stage.mean(ben, cat, dan)) for peer in (ben, cat, dan))
    assert stage.now < BEGINS_AT + 10.0


@story(Scene(seed=9, leads_in=0, met=False))
def one_way_link(stage: Stage) -> None:
    """Cat cannot dial ann, though ann can dial cat. Cat says so in its join to ben, ben passes the join on, one hop,
    and ann dials. Nobody is left out.
    """
    ann, ben, cat, _ = stage.cast
    stage.swarm.unreachable.add((cat.id, ann.id))

    receipts = stage.average(*stage.cast)

    passed = [send for send in stage.sent(Join, ben, ann) if send.message.passed_on]
    assert [send.message.applicant.peer for send in passed] == [cat.id]
    assert {receipt.outcome for receipt in receipts.values()} == {COMPLETE}
    assert all(stage.holds(peer, stage.mean(*stage.cast)) for peer in stage.cast)


@story(Scene(seed=7, leads_in=1))
def late_leaders_trainer(stage: Stage) -> None:
    """Ann leads, and her trainer is late. Her daemon keeps the joins and closes the group without her. Her trainer then
    ends alone and is told why; it is in time for the next averaging.
    """
    ann, ben, cat, dan = stage.cast
    others = (ben, cat, dan)
    receipts = stage.average(*others)

    assert {receipt.rounds[0].leader for receipt in receipts.values()} == {ann.id}
    assert all(stage.holds(peer, stage.mean(*others)) for peer in others)
    (late,) = stage.average(ann).values()
    assert late.outcome is ALONE
    assert "averaging 1 closed" in late.why
    receipts = stage.average(*stage.cast)
    assert {(receipt.epoch, receipt.outcome) for receipt in receipts.values()} == {(2, COMPLETE)}


# ---- plans, splits, crowds


@story(Scene(seed=1, acquainted=False, met=False))
def two_plans_of_one_version(stage: Stage) -> None:
    """Ann and ben find each other, cat and dan find each other: each two make a plan, both of version 1. Then they find
    the other two. One of the plans outranks the other, everybody ends up under it, and the mean is that of all.
    """
    swarm = stage.swarm
    ann, ben, cat, dan = [stage.open(name) for name in ("ann", "ben", "cat", "dan")]
    stage.hide((ann, ben), (cat, dan))
    swarm.run_for(0.5)
    for number, peer in enumerate(stage.cast):
        stage.call(peer, after_s=number / 1000)
    receipts = stage.ended(*stage.cast)
    assert all(stage.holds(peer, stage.mean(ann, ben)) for peer in (ann, ben))
    assert all(stage.holds(peer, stage.mean(cat, dan)) for peer in (cat, dan))
    assert [plan.version for plan in stage.plans()] == [1, 1]

    stage.show()
    for _ in range(3):
        swarm.run_for(20.0)  # leases are renewed
        receipts = stage.average(*stage.cast)
        if all(stage.holds(peer, stage.mean(*stage.cast)) for peer in stage.cast):
            break

    assert {receipt.outcome for receipt in receipts.values()} == {COMPLETE}
    assert all(stage.holds(peer, stage.mean(*stage.cast)) for peer in stage.cast)


@story(Scene(seed=0))
def split_swarm_that_heals(stage: Stage) -> None:
    """Ann and ben cannot hear cat and dan. Each half averages by itself, and its receipts say so. The net heals, and
    within a few averagings all four are exact again.
    """
    ann, ben, cat, dan = stage.cast
    stage.swarm.part((ann, ben), (cat, dan))
    receipts = stage.average(*stage.cast)
    assert all(receipt.outcome is PARTIAL for receipt in receipts.values())
    assert all(stage.holds(peer, stage.mean(ann, ben)) for peer in (ann, ben))
    assert all(stage.holds(peer, stage.mean(cat, dan)) for peer in (cat, dan))

    stage.swarm.run_for(12.0)
    stage.swarm.heal()
    stage.swarm.run_for(1.0)
    for _ in range(4):
        receipts = stage.average(*stage.cast)
        if all(stage.holds(peer, stage.mean(*stage.cast)) for peer in stage.cast):
            break
        stage.swarm.run_for(0.5)

    assert {receipt.outcome for receipt in receipts.values()} == {COMPLETE}
    assert all(stage.holds(peer, stage.mean(*stage.cast)) for peer in stage.cast)


@story(Scene(seed=0, cast="ann ben cat", group_size_max=3, show_messages=False))
def joiner_during_a_plan_change(stage: Stage) -> None:
    """Three are a group of three. Dan joins: a fourth is too many, and a plan of 2x2 is made that begins two averagings
    later. Eva joins before it begins. Until then the old plan counts, from then on the new one; soon all are exact.
    """
    for peer in list(stage.cast):
        stage.train(peer)
    stage.swarm.run_for(0.1)
    stage.train(stage.open("dan", joining="contribute"))
    stage.when(lambda: len(stage.plans()) > 1, lambda: stage.train(stage.open("eva", joining="contribute")))
    stage.swarm.run_for(2.3)
    last = stage.stop_training()

    first_k = stage.plans()[-1].first_k
    told = [ending.told for peer in stage.cast for ending in peer.endings]
    assert {receipt.grid for receipt in told if receipt.epoch < first_k} == {"3"}
    assert {receipt.grid for receipt in told if receipt.epoch >= first_k} == {"2x2"}
    assert len(last) == 5
    assert {(receipt.epoch, receipt.outcome) for receipt in last.values()} == {(max(r.epoch for r in told), COMPLETE)}
    assert all(stage.holds(peer, stage.mean(*stage.cast)) for peer in stage.cast)


@story(Scene(seed=0, cast="ann ben cat dan", grid="2x2", rounds=1))
def burst(stage: Stage) -> None:
    """A grid of 2x2, one round an averaging. In one averaging two of four are absent at once; the two that are there go
    on. Two clean averagings later, as many as the grid has axes, all four hold the same.
    """
    present = stage.cast[:2]
    for averaging, peers in enumerate((stage.cast, present, stage.cast, stage.cast)):
        before = _variance(stage)
        receipts = stage.average(*peers, epoch=averaging + 1)
        for peer in receipts:
            stage.held[peer.name] = float(peer.endings[-1].values[0])
        clean = len(peers) == 4
        stage.contraction.in_step(stage.now, before, _variance(stage), axes=2, clean=clean, full=True)

    assert {receipt.outcome for receipt in receipts.values()} == {COMPLETE}
    assert len(set(stage.held.values()) - {16.0}) == 1


def _variance(stage: Stage) -> float:
    return float(np.var([stage.held[peer.name] for peer in stage.cast]))


# ---- found by the simulator


@story(Scene(seed=3))
def halves_one_averaging_apart(stage: Stage) -> None:
    """Parted, ann and ben average twice, cat and dan once, and the directory shows neither half the other's count. They
    hear each other again, and their trainers run free. Who is past a round says where it can be met, and whether it
    waits there: those behind follow, and soon all four meet in one averaging. Once each half went on by itself.
    """
    ann, ben, cat, dan = stage.cast
    stage.hide((ann, ben), (cat, dan))
    stage.swarm.part((ann, ben), (cat, dan))
    stage.average(*stage.cast)
    stage.average(ann, ben)
    stage.swarm.heal()
    for peer in stage.cast:
        stage.train(peer)

    stage.swarm.run_until(lambda: all(stage.holds(peer, stage.mean(*stage.cast)) for peer in stage.cast), limit_s=8.0)

    assert len({peer.endings[-1].told.epoch for peer in stage.cast}) == 1
    assert any(send.message.waiting for send in stage.sent(Closed))
    stage.stop_training()


@story(Scene(seed=7, leads_in=1))
def late_arrivals_second_group(stage: Stage) -> None:
    """Ann closes with dan at the grace; ben and cat come together just after and get a second group from her. It is
    partial: ann and dan were expected there and are named. Once it called itself complete.
    """
    ann, ben, cat, dan = stage.cast
    for number, peer in enumerate((ann, dan)):
        stage.call(peer, after_s=number / 1000)
    closed = stage.has_sent(Begin, ann, dan)
    stage.when(closed, lambda: [stage.call(peer, after_s=0.01) for peer in (ben, cat)])

    receipts = stage.ended(*stage.cast)

    assert all(stage.holds(peer, stage.mean(ben, cat)) for peer in (ben, cat))
    for peer in (ben, cat):
        (one,) = receipts[peer].rounds
        assert one.leader == ann.id
        assert one.outcome is PARTIAL
        assert {line.peer for line in one.dropped} == {ann.id, dan.id}
        assert "earlier group" in one.why


@story(Scene(seed=7, leads_in=1, weather=replace(Weather(), noticed=(0.4, 0.5))))
def join_sent_before_a_restart(stage: Stage) -> None:
    """Cat's daemon is killed after ann kept its join, and starts anew at once. Ann begins a group with the cat that she
    knew. The new one declines by Bound: it is not that member. Ann is honest, and the others go on. Once cat called it
    nonsense and broke off with ann.
    """
    ann, ben, cat, dan = stage.cast
    for peer, after_s in ((ann, 0.0), (ben, 0.01), (cat, 0.02), (dan, 0.3)):
        stage.call(peer, after_s=after_s)

    def restart() -> None:
        stage.swarm.kill(cat)
        again = stage.open("cat", last_k=0)
        for other in (ann, ben):
            stage.lose(Join, again, other, times=10)
        stage.call(again, after_s=0.05)

    stage.swarm.at(stage.now + 0.2, restart)

    receipts = stage.ended(ann, ben, dan)

    declined = [send.message.why for send in stage.sent(Bound, cat, ann)]
    assert declined == ["was started anew since it joined"]
    for peer in (ann, ben, dan):
        assert stage.holds(peer, stage.mean(ann, ben, dan))
        assert [line.peer for line in receipts[peer].rounds[0].dropped] == [cat.id]


@story(Scene(seed=0, cast="ann ben cat dan eva", grid="2x2"))
def leader_still_in_the_round_before(stage: Stage) -> None:
    """Five on 2x2: two share a cell. The third on their line leads the second round, and is held up in the first by its
    neighbour, which stands still for longer than the grace. The two wait: who is coming is waited for, and once it has
    come the group is closed with it. Once it closed the group without itself in the very moment in which it came.
    """
    (plan,) = stage.plans()
    by_cell: dict[Cell, list[Peer]] = {}
    for peer in stage.cast:
        by_cell.setdefault(plan.cells[peer.id], []).append(peer)
    pair = next(peers for peers in by_cell.values() if len(peers) == 2)
    row, column = plan.cells[pair[0].id]
    (leader,), (neighbour,) = by_cell[row, 1 - column], by_cell[1 - row, 1 - column]
    stage.when(stage.has_sent(Begun, neighbour, leader), lambda: stage.swarm.pause(neighbour))
    stage.swarm.at(stage.now + 1.7, lambda: stage.swarm.resume(neighbour))

    receipts = stage.average(*stage.cast)

    second = receipts[leader].rounds[1]
    assert second.leader == leader.id
    assert {member.peer for member in second.members} == {leader.id, *(peer.id for peer in pair)}
    assert {receipts[peer].rounds[1].group_id for peer in pair} == {second.group_id}


@story(Scene(seed=6, leads_in=100, cast="ann ben cat"))
def lone_applicant_at_an_idle_leader(stage: Stage) -> None:
    """Ann leads while her trainer computes for long, and knows the others only as they were a hundred averagings ago:
    she expects nobody. Ben comes alone. He is not turned away at once: ann waits a second, cat comes, and the two meet.
    Once she turned away each of them, for ever.
    """
    ann, ben, cat = stage.cast
    stage.hide((ann,), (ben, cat))
    stage.call(ben, epoch=100)
    stage.call(cat, epoch=100, after_s=0.7)

    receipts = stage.ended(ben, cat)

    for peer in (ben, cat):
        assert receipts[peer].epoch == 100
        assert receipts[peer].rounds[0].leader == ann.id
        assert stage.holds(peer, stage.mean(ben, cat))


@story(Scene(seed=7, leads_in=1))
def begin_lost_with_its_leader(stage: Stage) -> None:
    """Ann begins the group and is killed before ben hears of it. He is next in the order, leads and calls the others.
    They are in a group that he is in, too, and tell him of it: ann's share is lost, not his. Once they told him that
    the averaging is closed.
    """
    ann, ben, cat, dan = stage.cast
    stage.lose(Begin, ann, ben)
    stage.when(stage.has_sent(Begun, cat, ann), lambda: stage.swarm.kill(ann))
    for number, peer in enumerate(stage.cast):
        stage.call(peer, after_s=number / 1000)

    receipts = stage.ended(ben, cat, dan)

    for peer, receipt in receipts.items():
        assert receipt.outcome is PARTIAL
        assert [line.peer for line in receipt.rounds[0].dropped] == [ann.id]
        assert stage.holds(peer, stage.mean(ben, cat, dan))


@story(Scene(seed=2, grid="2x2"))
def slow_line_in_the_round_before(stage: Stage) -> None:
    """A grid of 2x2. One row has slow uplinks: its first round takes seconds, longer than the grace of the second, in
    which the others already wait. Asked, the slow ones say that they are coming, so the columns wait for them, and all
    hold the mean of all. Once nobody waited, and the two rows never mixed.
    """
    (plan,) = stage.plans()
    for _ in range(3):
        stage.average(*stage.cast)
    first_axis = plan.axis(4, 0, 2)
    slow = [peer for peer in stage.cast if plan.cells[peer.id][1 - first_axis] == 0]
    for peer in slow:
        stage.swarm.network.attach(peer.id, Link("slow", up_bytes_s=1e4))

    receipts = stage.average(*stage.cast)

    assert min(receipts[peer].rounds[0].seconds_reduce for peer in slow) > 2.0
    for peer, receipt in receipts.items():
        assert receipt.outcome is COMPLETE
        assert stage.holds(peer, stage.mean(*stage.cast))
    assert stage.sent(Coming)


@story(Scene(seed=2, cast="ann ben cat"))
def late_by_a_hair(stage: Stage) -> None:
    """Cat's trainer stays away for three averagings, so nobody expects it any more. Back, it always calls 20 ms after
    the others, whose group has begun by then. Told so, it asks to be expected next time, and there all three meet. Once
    it was late for ever.
    """
    ann, ben, cat = stage.cast
    for _ in range(3):
        stage.average(ann, ben)
    outcomes = []
    for _ in range(3):
        stage.swarm.run_for(1.0)
        stage.call(ann)
        stage.call(ben, after_s=0.001)
        stage.call(cat, after_s=0.02)
        receipts = stage.ended(ann, ben, cat)
        outcomes.append(receipts[cat].outcome)

    assert outcomes == [ALONE, ALONE, COMPLETE], "it does not know how they count; it is late; it is waited for"
    assert {receipt.outcome for receipt in receipts.values()} == {COMPLETE}
    assert all(stage.holds(peer, stage.mean(ann, ben, cat)) for peer in receipts)


@story(Scene(seed=0, cast="ann ben cat dan", acquainted=False, met=False, show_messages=False))
def plan_of_one_that_cannot_be_dialled(stage: Stage) -> None:
    """Ann, ben and cat have a plan; ann, the first of those who say so, cannot be dialled. Dan joins and needs it. He
    asks those who can hear him, and averages at once. Once he asked ann only, for ever.
    """
    for name in ("ann", "ben", "cat"):
        stage.train(stage.open(name, dialable=name != "ann"))
    stage.swarm.run_for(5.0)
    dan = stage.open("dan")
    began = stage.now
    stage.train(dan)
    stage.swarm.run_until(lambda: bool(dan.endings))

    assert dan.endings[0].told.outcome is COMPLETE
    assert stage.now < began + 3.0
    stage.stop_training()


@story(Scene(seed=7, leads_in=1))
def one_step_behind(stage: Stage) -> None:
    """Ann's trainer skips an averaging, in which her daemon leads the others, and the directory does not tell her how
    they count since. When all call again, she asks for the one that was closed a whole step ago; the next one is
    nearer, so she goes on to it in the same call, and all four meet. Once she ended alone and stayed behind for ever.
    """
    ann, *others = stage.cast
    stage.hide((ann,), others)
    stage.average(*others)
    stage.swarm.run_for(10.0)

    receipts = stage.average(*stage.cast)

    assert {receipt.epoch for receipt in receipts.values()} == {2}
    assert {receipt.outcome for receipt in receipts.values()} == {COMPLETE}
    assert all(stage.holds(peer, stage.mean(*stage.cast)) for peer in receipts)


# ---- compressors


ARC = Scene(seed=2, leads_in=1, chunks=8, compressor="arc:0.25,4,ef21m,1,0", show_messages=False)
"""Averaging 0 has sent all. Of 256 rows 64 are sent, two eighths."""


@story(replace(ARC, grid="2x2", leads_in=None))
def the_largest_rows(stage: Stage) -> None:
    """Four on a 2x2 grid hold twice what they held before. Their sketches are added up along both axes, so that all
    choose the same rows; then those go along both axes. A quarter of the matrix is the new mean, exactly and at all,
    the rest still the old one, until the next averaging sends the next quarter.
    """
    before = stage.cast[0].endings[-1].values
    for name in stage.held:
        stage.held[name] *= 2

    receipts = stage.average(*stage.cast)

    for peer, receipt in receipts.items():
        assert receipt.outcome is COMPLETE
        assert not receipt.notes
        assert [one.stage for one in receipt.rounds] == ["sketch", "sketch", "rows", "rows"]
        new = peer.endings[-1].values
        assert np.array_equal(new, stage.cast[0].endings[-1].values)
        changed = new != before
        assert changed.mean() == 0.25
        assert np.allclose(new[changed], 2 * before[changed], rtol=1e-6)

    for _ in range(3):
        stage.average(*stage.cast)
    assert all(np.allclose(peer.endings[-1].values, 2 * before, rtol=1e-6) for peer in stage.cast)


@story(ARC)
def one_less_means_all_is_sent(stage: Stage) -> None:
    """Dan's daemon is killed while everybody computes. What the others hold of EF21M was a mean of four: the words in
    the sketch's sum tell all three alike that it is of three now, and they send all, once. Then rows again.
    """
    ann, ben, cat, dan = stage.cast
    stage.swarm.kill(dan)
    stage.swarm.run_for(0.5)

    receipts = stage.average(ann, ben, cat)

    for peer, receipt in receipts.items():
        assert receipt.outcome is COMPLETE
        assert receipt.notes == ("sent dense: membership changed",)
        assert [one.stage for one in receipt.rounds] == ["sketch", "dense"]
        assert np.array_equal(peer.endings[-1].values, ann.endings[-1].values)
    given = [stage.held[peer.name] * side for peer, side in ((ann, 1.0), (ben, 1.0), (cat, 2.0**-7))]
    assert np.isclose(ann.endings[-1].values[0], sum(given) / 3, rtol=1e-6)
    again = stage.average(ann, ben, cat)
    assert all(not receipt.notes and receipt.rounds[-1].stage == "rows" for receipt in again.values())


@story(ARC)
def dead_between_the_stages(stage: Stage) -> None:
    """Dan's sketch is in the sum when his daemon is killed; the rows that all have chosen go without him. The receipts
    say who is missing, and the next averaging sends all: nobody takes what it holds for a mean of four any more.
    """
    ann, ben, cat, dan = stage.cast
    stage.when(lambda: stage.state(dan) == "matching" and bool(stage.began(dan)), lambda: stage.swarm.kill(dan))

    receipts = stage.average(*stage.cast)

    for peer in (ann, ben, cat):
        sketch, rows = receipts[peer].rounds
        assert (sketch.stage, sketch.outcome) == ("sketch", COMPLETE)
        assert dan.id in {line.peer for line in sketch.members}
        assert (rows.stage, rows.outcome) == ("rows", PARTIAL)
        assert receipts[peer].outcome is PARTIAL
        assert all(dan.id not in span.contributors for span in rows.spans)
        assert np.array_equal(peer.endings[-1].values, ann.endings[-1].values)
    again = stage.average(ann, ben, cat)
    assert all(receipt.rounds[-1].stage == "dense" and receipt.notes for receipt in again.values())


@story(replace(ARC, grid="2x2", leads_in=None, compressor="arc:0.25,4,ef14,1,0", show_messages=True))
def two_choices_of_rows(stage: Stage) -> None:
    """Dan stands still when the first axis of the sketch is done, and misses the second: he and ann, who waited for
    him, know the sum of their own line only, the other two that of all. So cat and ann come with other choices of rows.
    The hashes in their group's header show it before any row is sent: they leave the stage, and tell those that they
    would have met on the other axis; who hears it follows, dan as well when he wakes. All send all, nobody misses it.
    """
    stage.held.update(ann=8, ben=1, cat=4, dan=16)
    dan = stage.cast[3]
    stage.when(
        lambda: stage.state(dan) == "matching" and bool(stage.began(dan)),
        lambda: (stage.swarm.pause(dan), stage.swarm.at(stage.now + 4.5, lambda: stage.swarm.resume(dan))),
    )

    receipts = stage.average(*stage.cast)

    for receipt in receipts.values():
        rows = [one for one in receipt.rounds if one.stage == "rows"]
        assert all(one.outcome is ALONE and not one.spans for one in rows), "no row was averaged"
        assert [one.outcome for one in receipt.rounds if one.stage == "dense"] == [COMPLETE, COMPLETE]
        assert receipt.outcome is COMPLETE
        assert len(receipt.notes) == 1
    said = {
        peer.name: receipt.notes[0].removeprefix("sent dense: ").replace("-", "") for peer, receipt in receipts.items()
    }
    different = "the group's members did not choose the same rows"
    assert said == {"ann": different, "cat": different, "ben": "cat sends all", "dan": "ben sends all"}
    values = [peer.endings[-1].values for peer in stage.cast]
    assert all(np.array_equal(one, values[0]) for one in values)

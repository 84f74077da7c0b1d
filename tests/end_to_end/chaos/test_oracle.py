"""The oracle believes an honest averaging and objects to every kind of falsified one, naming the call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moshpit_client.receipt import Dropped, Local, Member, Receipt, Round, Seconds, Span, Traffic
from tests.end_to_end.chaos.oracle import DEADLINE_SLACK_S, Call, Floats, Objection, Oracle

ELEMENTS = 101
PEERS = tuple(f"{letter * 8}-peer" for letter in "abcd")
WEIGHTS = dict(zip(PEERS, (1.0, 2.5, 0.5, 1.25), strict=True))
NO_TIME, NO_BYTES = Seconds(0.0, 0.0, 0.0), Traffic(0, 0)


def given(peer: str) -> Floats:
    return np.random.default_rng(PEERS.index(peer)).standard_normal(ELEMENTS, np.float32)


def mean(values: dict[str, Floats], weights: dict[str, float]) -> Floats:
    total = sum(weights[peer] * values[peer].astype(np.float64) for peer in values)
    return np.asarray(total / sum(weights[peer] for peer in values), np.float32)


def round_of(
    peers: tuple[str, ...],
    weights: dict[str, float],
    *,
    number: int = 0,
    contributors: tuple[str, ...] | None = None,
    group: str = "group",
) -> Round:
    """A committed round of these members, all of one cell each; without some contributors in its second half."""
    present = contributors or peers
    half = ELEMENTS // 2
    whole = present == peers
    return Round(
        round=number,
        axis=number,
        outcome="complete" if whole else "partial",
        group_id=f"{group}-{number}",
        digest=f"bits of {group}-{number}",
        leader=peers[0],
        rank=0,
        codec="float32",
        stage="dense",
        codec_why="",
        bits_per_element=32.0,
        relative_error=0.0,
        transport="grpc",
        members=tuple(Member(peer, weights[peer], place) for place, peer in enumerate(peers)),
        links=(),
        spans=(Span(peers[0], 0, half, peers), Span(peers[1], half, ELEMENTS, present)),
        dropped=tuple(Dropped(peer, "died") for peer in peers if peer not in present),
        why="" if whole else "somebody died",
        weight_after=sum(weights[peer] for peer in peers) / len(peers),
        seconds=NO_TIME,
        bytes=NO_BYTES,
    )


def call_of(peer: str, holds: Floats, rounds: tuple[Round, ...]) -> Call:
    receipt = Receipt(
        outcome="complete" if all(each.outcome == "complete" for each in rounds) else "partial",
        epoch=7,
        joined=False,
        weight_total=0.0,
        peers=tuple(sorted({member.peer for each in rounds for member in each.members} - {peer})),
        digest=rounds[-1].digest,
        seconds=NO_TIME,
        bytes=NO_BYTES,
        rounds=rounds,
        why="; ".join(each.why for each in rounds if each.why),
        grid="4",
        session="default",
        local=Local(1, WEIGHTS[peer]),
        compressor="dense",
        notes=(),
    )
    return Call(peer, 0.0, 1.0, 10.0, 0.0, WEIGHTS[peer], given(peer), holds, receipt, rounds_of_all=True)


def one_round(contributors: tuple[str, ...] = PEERS) -> list[Call]:
    """All four averaged once; in the second half only these are in."""
    values = {peer: given(peer) for peer in PEERS}
    result = mean(values, WEIGHTS)
    half = ELEMENTS // 2
    result[half:] = mean({peer: values[peer] for peer in contributors}, WEIGHTS)[half:]
    return [
        call_of(peer, result.copy(), (round_of(PEERS, WEIGHTS, contributors=contributors),)) for peer in contributors
    ] + [failed(peer) for peer in PEERS if peer not in contributors]


def failed(peer: str) -> Call:
    return Call(peer, 0.0, 0.5, 10.0, 0.0, WEIGHTS[peer], given(peer), given(peer), None, "DaemonUnreachable: gone")


def two_rounds() -> list[Call]:
    """A 2x2 grid: (a b) (c d), then (a c) (b d)."""
    values = {peer: given(peer) for peer in PEERS}
    a, b, c, d = PEERS
    first = {peer: round_of(line, WEIGHTS, group=line[0]) for line in ((a, b), (c, d)) for peer in line}
    after = {peer: mean({p: values[p] for p in line}, WEIGHTS) for line in ((a, b), (c, d)) for peer in line}
    carried = {peer: first[peer].weight_after for peer in PEERS}
    # The two columns have the same bits: what they average is the same.
    result = mean({a: after[a], c: after[c]}, carried)
    second = {
        peer: replace(round_of(line, carried, number=1, group=line[0]), digest="bits of all")
        for line in ((a, c), (b, d))
        for peer in line
    }
    return [call_of(peer, result.copy(), (first[peer], second[peer])) for peer in PEERS]


def objections(calls: list[Call]) -> list[Objection]:
    oracle = Oracle(PEERS)
    for call in calls:
        oracle.hear(call)
    return oracle.judge(math.inf)


@pytest.mark.parametrize("calls", [one_round(), one_round(PEERS[:3]), two_rounds()], ids=["whole", "partial", "grid"])
def test_honest_averagings_are_believed_and_counted(calls: list[Call]) -> None:
    oracle = Oracle(PEERS)
    for call in calls:
        oracle.hear(call)
    assert oracle.judge(math.inf) == []
    assert oracle.verdicts.calls == 4
    assert oracle.verdicts.values == sum(call.receipt is not None for call in calls)
    assert oracle.verdicts.whole_swarm == all(call.receipt is not None for call in calls)
    assert oracle.verdicts.unwitnessed == 0


def on_receipt(change: Callable[[Receipt], Receipt]) -> Callable[[Call], Call]:
    return lambda call: replace(call, receipt=change(call.receipt))  # type: ignore[arg-type]


def on_round(change: Callable[[Round], Round]) -> Callable[[Call], Call]:
    return on_receipt(lambda receipt: replace(receipt, rounds=(change(receipt.rounds[0]), *receipt.rounds[1:])))


def one_bit(values: Floats) -> Floats:
    changed = values.copy()
    changed.view(np.uint32)[3] ^= 1
    return changed


FORGERIES: dict[str, tuple[Callable[[Call], Call], str]] = {
    "another value": (lambda call: replace(call, holds=call.holds + np.float32(0.001)), "the mean that its receipt"),
    "not a number": (lambda call: replace(call, holds=call.holds * np.float32(np.nan)), "the mean that its receipt"),
    "one bit": (lambda call: replace(call, holds=one_bit(call.holds)), "holds other bits"),
    "a contributor left unnamed": (
        on_round(lambda r: replace(r, spans=(replace(r.spans[0], contributors=PEERS[1:]), r.spans[1]))),
        "complete without aaaaaaaa",
    ),
    "a contributor twice": (
        on_round(lambda r: replace(r, spans=(replace(r.spans[0], contributors=(PEERS[0], *PEERS)), r.spans[1]))),
        "counts twice",
    ),
    "a contributor from nowhere": (
        on_round(lambda r: replace(r, spans=(replace(r.spans[0], contributors=("stranger",)), r.spans[1]))),
        "from no member",
    ),
    "a weight it never gave": (
        on_round(lambda r: replace(r, members=(*r.members[:3], replace(r.members[3], weight=9.0)))),
        "which it never gave",
    ),
    "its own weight": (lambda call: replace(call, weight=3.5), "its receipt says 1.0"),
    "a gap": (on_round(lambda r: replace(r, spans=(r.spans[0], replace(r.spans[1], start=60)))), "gap or overlap"),
    "too short": (on_round(lambda r: replace(r, spans=r.spans[:1])), "spans end at 50 of 101"),
    "another digest": (on_round(lambda r: replace(r, digest="other")), "is another at"),
    "complete, but somebody dropped": (
        on_round(lambda r: replace(r, dropped=(Dropped(PEERS[3], "died"),))),
        "complete without dddddddd",
    ),
    "complete, but a round is not": (
        on_round(lambda r: replace(r, outcome="partial", why="died")),
        "says complete, but a round is not",
    ),
    "alone, but changed": (on_receipt(lambda r: replace(r, outcome="alone", rounds=())), "changed all the same"),
    "alone, but committed": (on_receipt(lambda r: replace(r, outcome="alone")), "a round was committed"),
    "partial for no reason": (on_receipt(lambda r: replace(r, outcome="partial")), "partial without a reason"),
    "peers it did not meet": (on_receipt(lambda r: replace(r, peers=(*r.peers, "stranger"))), "by its word"),
    "an error, but changed": (
        lambda call: replace(call, receipt=None, error="NoGroup: nobody"),
        "changed all the same",
    ),
    "late": (lambda call: replace(call, ended=call.began + 10.1 + DEADLINE_SLACK_S), "after its deadline"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forgery_is_objected_to_and_named(forgery: str) -> None:
    change, complaint = FORGERIES[forgery]
    calls = one_round()
    found = objections([change(calls[0]), *calls[1:]])
    assert any(complaint in objection.what for objection in found), found
    if forgery != "its own weight":  # then the others name what it denies
        assert any(objection.call.startswith("aaaaaaaa") for objection in found)


def test_a_result_with_a_contributor_of_another_call_is_no_mean_of_this_one() -> None:
    """The dead one's earlier values with its later weight, say."""
    calls = one_round(PEERS[:3])
    calls[3] = replace(calls[3], gave=given(PEERS[0]), holds=given(PEERS[0]))
    assert {objection.call[:8] for objection in objections(calls)} == {peer[:8] for peer in PEERS[:3]}


def test_a_wrong_second_round_is_found_by_the_first_rounds_of_others() -> None:
    calls = two_rounds()
    wrong = [replace(calls[index], holds=calls[index].holds + np.float32(0.01)) for index in (0, 2)]
    found = objections([wrong[0], calls[1], wrong[1], calls[3]])
    assert sum("the mean that its receipt names" in objection.what for objection in found) == 2
    assert any("off the mean of all" in objection.what for objection in found)


def test_a_later_round_whose_witness_died_is_not_judged_but_counted() -> None:
    oracle = Oracle(PEERS)
    for call in two_rounds()[:2]:
        oracle.hear(call)
    assert oracle.judge(math.inf) == []
    assert (oracle.verdicts.values, oracle.verdicts.unwitnessed) == (0, 2)


def test_a_paused_daemon_is_excused_for_as_long_as_it_stood_still() -> None:
    calls = one_round()
    calls[0] = replace(calls[0], ended=18.0, stood_still_s=8.0)
    assert objections(calls) == []


def test_a_call_is_judged_only_when_everybody_who_may_be_in_it_has_ended() -> None:
    oracle = Oracle(PEERS)
    calls = one_round()
    oracle.hear(replace(calls[0], holds=calls[0].holds + np.float32(1)))
    assert oracle.judge(open_since=0.5) == []
    for call in calls[1:]:
        oracle.hear(call)
    assert oracle.judge(math.inf)

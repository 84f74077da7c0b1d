"""What is believed of a line: what rounds show of it, on paper, and how the newest word weighs against the last."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from moshpitd.averaging.link import BYTES_MIN, SECONDS_MIN, Arrival, LinkRates, Measure, Transfers
from moshpitd.averaging.messages import Ready
from moshpitd.averaging.names import Rank
from moshpitd.averaging.partition import ALIGNMENT, NOISE_FACTOR
from tests.averaging.group_on_paper import GroupOnPaper, group_of, normal_vectors

MB = 1_000_000
UNKNOWN = [math.inf] * 4


def exactly(rate: float) -> Measure:
    return Measure(rate, at_least=False)


def at_least(rate: float) -> Measure:
    return Measure(rate, at_least=True)


def link_that_learnt(*ups: Measure | None, downs: Sequence[Measure] = ()) -> LinkRates:
    link = LinkRates()
    for up in ups:
        link.learn(up=up, down=None)
    for down in downs:
        link.learn(up=None, down=down)
    return link


# ---- what is believed


def test_the_first_word_is_believed_and_none_changes_nothing() -> None:
    assert link_that_learnt().up_bytes_s == link_that_learnt(None).up_bytes_s == 0.0
    assert link_that_learnt(exactly(5.0), None).up_bytes_s == 5.0
    assert link_that_learnt(at_least(5.0)).up_bytes_s == 5.0


@pytest.mark.parametrize("times", [10.0, 0.1])
def test_a_line_that_changes_tenfold_is_known_well_enough_after_three_rounds(times: float) -> None:
    link = link_that_learnt(exactly(MB), *[exactly(times * MB)] * 3)
    assert abs(math.log(link.up_bytes_s / (times * MB))) < math.log(NOISE_FACTOR)


def test_the_noise_of_single_rounds_is_almost_halved() -> None:
    dice, link = random.Random(0), LinkRates()
    told = [dice.lognormvariate(0, 0.3) for _ in range(2000)]
    believed = []
    for rate in told:
        link.learn(up=exactly(rate), down=None)
        believed.append(math.log(link.up_bytes_s))
    assert math.sqrt(sum(b * b for b in believed) / len(believed)) == pytest.approx(0.3 / math.sqrt(3), rel=0.1)


def test_what_a_line_carries_at_least_only_raises() -> None:
    assert link_that_learnt(exactly(5.0), at_least(1.0)).up_bytes_s == 5.0
    assert 5.0 < link_that_learnt(exactly(5.0), at_least(50.0)).up_bytes_s < 50.0


def test_a_downlink_that_was_never_the_obstacle_stays_unknown() -> None:
    assert link_that_learnt(downs=[at_least(5.0)] * 3).down_bytes_s == 0.0
    healed = link_that_learnt(downs=[exactly(1.0), *[at_least(10.0)] * 5])
    assert healed.down_bytes_s > 8.0, "a wrong low word heals"


# ---- the uplink, from what receivers say


def up_by(*reports: tuple[float, float]) -> Measure | None:
    """Each receiver: bytes, seconds."""
    transfers = Transfers([0] * len(reports), now=0.0)
    for receiver, (size, seconds) in enumerate(reports):
        transfers.report(receiver, Arrival(int(size), seconds))
    return transfers.up()


def test_an_uplink_carries_what_all_receivers_got_until_the_last_had_its_part() -> None:
    assert up_by((MB, 1.0), (MB, 1.0), (MB, 1.0)) == exactly(3 * MB)
    # Sharing 1 MB/s, one with a span three times as large is through when the other has long been.
    assert up_by((MB, 2.0), (3 * MB, 4.0)) == exactly(MB)


def test_receivers_behind_slow_lines_do_not_make_ours_slow() -> None:
    measured = up_by((MB, 1.0), (MB, 1.0), (MB, 30.0))
    assert measured == exactly(2 * MB)


def test_one_that_says_it_had_everything_at_once_is_outvoted() -> None:
    measured = up_by((MB, 0.0), (MB, 1.0), (MB, 1.0))
    assert measured == exactly(3 * MB)


def test_small_or_short_transfers_say_little() -> None:
    assert up_by() is None
    assert up_by((BYTES_MIN - 1, 1.0)) is None
    assert up_by((MB, SECONDS_MIN / 10)) == at_least(MB / SECONDS_MIN)


# ---- the downlink, from who is through when


def down_by(*through_s: float, explained_s: Sequence[float] = UNKNOWN, ended_s: float | None = None) -> Measure | None:
    """Members after the first send it one contribution of a megabyte each, through at these moments."""
    transfers = Transfers([0, *[1] * len(through_s)], now=100.0)
    for sender, seconds in sorted(enumerate(through_s, start=1), key=lambda one: one[1]):
        transfers.chunk(sender, MB)
        transfers.contribution(sender, 100.0 + seconds)
    return transfers.down(explained_s, 100.0 + (ended_s or max(through_s)))


def test_a_downlink_is_known_where_most_come_later_than_their_uplinks_explain() -> None:
    assert down_by(3.0, 3.0, 3.0, explained_s=[math.inf, 0.5, 0.5, 0.5]) == exactly(MB)


def test_a_downlink_that_waits_for_slow_uplinks_tells_what_it_carries_at_least() -> None:
    assert down_by(1.0, 1.0, 1.0, explained_s=[math.inf, 0.9, 0.9, 0.9]) == at_least(3 * MB)
    assert down_by(1.0, 1.0, 1.0) == at_least(3 * MB), "nor where nothing is known of the uplinks"


def test_one_sender_that_stood_still_accuses_no_downlink() -> None:
    assert down_by(1.0, 1.0, 9.0, explained_s=[math.inf, 0.9, 0.9, 0.9]) == at_least(2 * MB)
    assert down_by(9.0, explained_s=[math.inf, 0.9]) == at_least(MB / 9)


# ---- in a round


def rounds_line(
    *, weights: Sequence[float] | None = None, spanless: bool = False, chunk_s: float = 0.05, seed: int = 0
) -> GroupOnPaper:
    """Four members with 64 chunks; the last one's chunks take long, and it goes to three at a time."""
    values = normal_vectors(4, 64 * ALIGNMENT)
    group = group_of(values, weights=weights)
    if spanless:
        cut = ALIGNMENT * 21
        group = replace(group, spans=(0, cut, 2 * cut, 64 * ALIGNMENT, 64 * ALIGNMENT))
    paper = GroupOnPaper(group, values, latency_s=(0.001, 0.002), starts_s=[0.0] * 4, seed=seed)
    paper.chunk_seconds[Rank(3)] = chunk_s
    return paper


def ups(paper: GroupOnPaper) -> list[float]:
    measures = [paper.machines[rank].link_measures(paper.now)[0] for rank in sorted(paper.machines)]
    return [measure.bytes_s if measure else 0.0 for measure in measures]


@pytest.mark.parametrize("spanless", [False, True])
def test_members_learn_their_uplinks_whoever_sets_the_pace_and_whoever_holds_a_span(spanless: bool) -> None:
    paper = rounds_line(spanless=spanless)
    paper.run()
    assert len(paper.committed) == 4
    *fast, slow = ups(paper)
    assert slow == pytest.approx(3 * ALIGNMENT * 4 / 0.05, rel=0.1)
    assert min(fast) > 8 * slow


def test_one_without_weight_sends_no_contributions_and_learns_nothing() -> None:
    paper = rounds_line(weights=[1.0, 1.0, 1.0, 0.0])
    paper.run()
    assert len(paper.committed) == 4
    *fast, silent = ups(paper)
    assert silent == 0.0 < min(fast)


@pytest.mark.parametrize("seed", range(5))
def test_a_death_in_the_round_does_not_make_the_survivors_lines_slow(seed: int) -> None:
    paper = rounds_line(chunk_s=0.0015, seed=seed)
    paper.at(0.01, lambda: paper.kill(2))
    paper.run()
    assert paper.committed == [0, 1, 3]
    undisturbed = rounds_line(chunk_s=0.0015, seed=seed)
    undisturbed.run()
    assert all(rate == 0 or rate > min(ups(undisturbed)) / 3 for rate in ups(paper))


def test_a_receiver_that_heard_more_than_was_sent_is_not_believed() -> None:
    paper = rounds_line()
    paper.run(until=0.5)
    machine = paper.machines[Rank(3)]
    machine.receive(Ready(paper.group.group_id, 0, b"", 1 << 40, 0.5), Rank(0), paper.now)
    assert machine.link_measures(paper.now)[0] is None
    machine.receive(Ready(paper.group.group_id, 0, b"", 300_000, 0.5), Rank(1), paper.now)
    assert machine.link_measures(paper.now)[0] == exactly(600_000.0)

"""Lossy rounds on paper: what is lost costs a little accuracy, never time, never a zero, never a growing drift."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moshpitd.averaging.codecs import codec_named
from moshpitd.averaging.errors import RemoteProtocolError
from moshpitd.averaging.losses import Deadline, DeadlineConfig
from moshpitd.averaging.lossy_reduce import (
    Entry,
    Form,
    LossyConfig,
    LossyReduce,
    Part,
    Paths,
    Phase,
    State,
    apply_cut,
    estimate_cut,
)
from moshpitd.averaging.messages import Chunk, Group, RangesWanted
from moshpitd.averaging.names import Rank
from moshpitd.averaging.partition import Piece
from moshpitd.averaging.ranges import Cut, Ranges, Slots, encode_ranges
from moshpitd.averaging.vector import DTYPES, Vector
from tests.averaging.group_on_paper import GroupOnPaper, flat, group_of, normal_vectors
from tests.averaging.lossy_on_paper import LossyGroupOnPaper

FLOAT32 = codec_named("float32")


def hurried() -> Paths:
    """Nothing is known, and little patience."""
    return Paths(scatter=Deadline(DeadlineConfig(first_s=0.2)), gather=Deadline(DeadlineConfig(first_s=0.2)))


def paths_of(n: int) -> list[Paths]:
    return [hurried() for _ in range(n)]


# ---- nothing is lost


@pytest.mark.parametrize("codec", ["float32", "float16", "flash4", "flash4-8"])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.0, 2.5]])
def test_without_loss_it_is_the_reliable_path_to_the_bit(codec: str, weights: list[float] | None) -> None:
    """Codes of ranges have scales of their own, so under block-wise codecs only the members agree."""
    values = normal_vectors(4, 30_000)
    group = group_of(values, weights=weights, coordinates=[0, 0, 1, 2])
    lossy = LossyGroupOnPaper(group, values, codec=codec, jitter_s=0.004).run()
    assert lossy.committed == [0, 1, 2, 3]
    assert all(machine.is_complete for machine in lossy.machines)
    lossy.check_promises()
    assert len({result.buffer.tobytes() for result in lossy.results}) == 1
    if not codec.startswith("flash"):
        reliable = GroupOnPaper(group, values, codec=codec)
        reliable.run()
        assert lossy.results[0].buffer.tobytes() == reliable.result(0)


def test_every_dtype_travels_in_one_vector() -> None:
    rng = np.random.default_rng(1)
    values = [Vector.of({dtype: rng.standard_normal(5001).astype(DTYPES[dtype]) for dtype in DTYPES}) for _ in range(3)]
    paper = LossyGroupOnPaper(group_of(values), values, loss=0.2).run()
    paper.check_promises()
    reliable = GroupOnPaper(group_of(values), values)
    reliable.run()
    assert np.abs(paper.result(0) - reliable.result_flat(0)).mean() < 0.3


def test_doubled_and_reordered_packets_change_nothing() -> None:
    values = normal_vectors(5, 40_000)
    group = group_of(values)
    plain = LossyGroupOnPaper(group, values).run()
    mixed = LossyGroupOnPaper(group, values, doubled=0.5, jitter_s=0.004, seed=9).run()
    assert sum(machine.duplicates + machine.late for machine in mixed.machines) > 100
    assert [r.buffer.tobytes() for r in mixed.results] == [r.buffer.tobytes() for r in plain.results]


# ---- something is lost


@pytest.mark.parametrize("loss", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(4))
def test_a_lossy_round_ends_soon_and_keeps_its_promises(loss: float, seed: int) -> None:
    values = normal_vectors(6, 50_000, seed=seed)
    paper = LossyGroupOnPaper(group_of(values), values, loss=loss, seed=seed).run()
    paper.check_promises()
    assert paper.committed == list(range(6))
    assert paper.lost > 0
    assert paper.now < 0.2, "nobody waited for a deadline"
    lines = [line for machine in paper.machines for line in machine.link_losses()]
    assert sum(line.lost for line in lines) == paper.lost and sum(line.sent for line in lines) == paper.packets
    for machine in paper.machines:
        share = sum(stop - start for start, stop in machine.stale()) / 50_000
        assert share == pytest.approx(loss * 5 / 6, abs=0.13)


def test_the_mean_of_all_members_is_kept_on_average() -> None:
    """Mass is conserved in expectation: over many rounds the error of the sum is a matter of noise alone."""
    off = []
    for seed in range(30):
        values = normal_vectors(4, 20_000, seed=seed)
        paper = LossyGroupOnPaper(group_of(values), values, loss=0.2, seed=seed).run()
        before = np.mean([flat(vector) for vector in values], axis=0)
        after = np.mean([paper.result(rank) for rank in range(4)], axis=0)
        off.append(float((after - before).mean()))
    assert abs(np.mean(off)) < 4 * np.std(off) / np.sqrt(len(off)) + 1e-9
    assert abs(np.mean(off)) < 0.002


def test_a_range_that_nobody_was_heard_of_is_repaired_exactly() -> None:
    """Two members at .4: of each range there is one packet, so two fifths of them are asked for again."""
    values = normal_vectors(2, 80_000)
    paper = LossyGroupOnPaper(group_of(values), values, losses={(1, 0): 0.4}, seed=2).run()
    paper.check_promises()
    assert paper.machines[0].repaired > 5 and paper.machines[0].unrepaired == 0
    assert [(sender, receiver) for sender, receiver, _ in paper.messages] == [(0, 1)], "asked once"
    reliable = GroupOnPaper(group_of(values), values)
    reliable.run()
    span = slice(0, paper.group.spans[1])
    assert np.array_equal(paper.result(0)[span], reliable.result_flat(0)[span])


def test_a_repair_waits_for_the_first_to_answer_and_not_for_the_last() -> None:
    """Where packets are lost somebody's answer is always late: over gRPC a loss costs a fifth of a second."""
    values = normal_vectors(4, 160_000)
    paper = LossyGroupOnPaper(group_of(values), values, losses={(r, 0): 0.3 for r in (1, 2, 3)}, seed=2)
    paper.deaf_to = {(2, 0), (3, 0)}
    paper.run().check_promises()
    assert paper.machines[0].repaired and paper.machines[0].unrepaired == 0
    assert paper.machines[0].is_complete
    assert max(paper.ended_at.values()) < 0.5 * LossyConfig().repair_s


def test_what_nobody_can_send_again_keeps_its_values_and_is_told() -> None:
    values = normal_vectors(2, 80_000)
    paper = LossyGroupOnPaper(
        group_of(values), values, losses={(1, 0): 0.4}, seed=2, config=LossyConfig(repair_s=0.3), paths=paths_of(2)
    )
    paper.deaf_to.add((1, 0))
    paper.run()
    paper.check_promises()
    assert paper.machines[0].unrepaired > 5
    assert not paper.machines[0].is_complete
    assert (paper.result(0) != 0).all()
    own = [(start, stop) for start, stop in paper.machines[0].stale() if stop < paper.group.spans[1]]
    assert len(own) > 5
    for start, stop in own:
        assert any(first <= start and stop <= last for first, last in paper.machines[1].stale()), "nobody has it"


def test_a_blocked_path_is_found_out_and_everything_goes_over_the_reliable_streams() -> None:
    values = normal_vectors(3, 30_000)
    blocked = {(0, 1): 1.0, (1, 0): 1.0}
    paper = LossyGroupOnPaper(group_of(values), values, losses=blocked, paths=paths_of(3)).run()
    paper.check_promises()
    assert [line.is_blocked for line in paper.machines[0].link_losses()] == [True, False]
    assert [line.is_blocked for line in paper.machines[2].link_losses()] == [False, False]
    reliable = GroupOnPaper(group_of(values), values)
    reliable.run()
    assert {result.buffer.tobytes() for result in paper.results} == {reliable.result(0)}


def test_a_door_that_knows_the_path_to_be_blocked_spares_the_deadline() -> None:
    values = normal_vectors(3, 30_000)
    blocked = {(0, 1): 1.0, (1, 0): 1.0}
    paper = LossyGroupOnPaper(group_of(values), values, losses=blocked)
    for one, other in blocked:
        paper.tell_blocked(one, other)
    paper.run()
    paper.check_promises()
    assert paper.now < 0.3
    reliable = GroupOnPaper(group_of(values), values)
    reliable.run()
    assert {result.buffer.tobytes() for result in paper.results} == {reliable.result(0)}


def test_unequal_weights_send_their_averages_over_the_reliable_streams() -> None:
    """A carried weight cannot say which ranges were missed: all get all averages, and the same."""
    values = normal_vectors(4, 30_000)
    paper = LossyGroupOnPaper(group_of(values, weights=[1, 2, 3, 4]), values, loss=0.2).run()
    paper.check_promises()
    assert all(machine.averages_reliable for machine in paper.machines)
    assert len({result.buffer.tobytes() for result in paper.results}) == 1
    exact = np.average([flat(vector) for vector in values], axis=0, weights=[1, 2, 3, 4])
    assert 0 < np.abs(paper.result(0) - exact).mean() < 0.3


# ---- deaths and deadlines


def test_a_dead_owner_leaves_its_span_as_it_was_and_the_rest_goes_on() -> None:
    values = normal_vectors(4, 40_000)
    paper = LossyGroupOnPaper(group_of(values), values, loss=0.1)
    paper.kill(2, noticed_s=0.05)
    paper.run()
    paper.check_promises()
    assert paper.committed == [0, 1, 3]
    for rank in (0, 1, 3):
        machine = paper.machines[rank]
        assert machine.dropped_lines()[0].why == "the connection broke"
        start, stop = paper.group.spans[2:4]
        assert any(first <= start and stop <= last for first, last in machine.stale())
    # Their own spans are the mean of the three who live, not of four.
    living = np.mean([flat(values[rank]) for rank in (0, 1, 3)], axis=0)
    span = slice(paper.group.spans[0], paper.group.spans[1])
    assert np.abs(paper.result(0)[span] - living[span]).mean() < 0.2


def test_one_that_dies_unnoticed_costs_a_deadline_and_not_the_round() -> None:
    values = normal_vectors(4, 40_000)
    paper = LossyGroupOnPaper(group_of(values), values, loss=0.1, paths=paths_of(4), config=LossyConfig(repair_s=0.1))
    paper.kill(1)
    paper.run()
    paper.check_promises()
    assert paper.committed == [0, 2, 3]
    assert paper.now < 1.0


def test_alone_it_fails_and_touches_nothing() -> None:
    values = normal_vectors(2, 10_000)
    paper = LossyGroupOnPaper(group_of(values), values)
    paper.kill(1, noticed_s=0.01)
    paper.run()
    assert paper.machines[0].state is State.FAILED
    assert paper.machines[0].why == "everybody else is gone"


def test_a_callers_time_ends_the_round_with_what_there_is() -> None:
    values = normal_vectors(3, 20_000)
    group = group_of(values, budget_s=0.5)
    paper = LossyGroupOnPaper(group, values)
    paper.kill(2)
    paper.run()
    assert paper.committed == [0, 1]
    assert paper.now == pytest.approx(0.5, abs=0.05)


def test_deadlines_are_learnt_from_rounds_and_the_next_is_short() -> None:
    values = normal_vectors(4, 20_000)
    paths = [Paths() for _ in range(4)]
    for seed in range(10):
        LossyGroupOnPaper(group_of(values), values, loss=0.1, paths=paths, seed=seed).run()
    paper = LossyGroupOnPaper(group_of(values), values, loss=0.4, paths=paths, seed=6, config=LossyConfig(repair_s=0.1))
    paper.kill(3)
    paper.run()
    assert paper.committed == [0, 1, 2]
    assert paper.now < 0.8, "with nothing learnt it would be five seconds"
    assert paths[0].losses.typical > 0.05


# ---- halves alone: owners that stay


def test_a_reduce_scatter_gives_each_owner_its_shard() -> None:
    values = normal_vectors(4, 40_000)
    group = group_of(values, weights=[1, 2, 3, 4])
    paper = LossyGroupOnPaper(group, values, part=Part.SCATTER, form=Form.TOTAL).run()
    exact = np.average([flat(vector) for vector in values], axis=0, weights=[1, 2, 3, 4])
    for rank in range(4):
        span = slice(group.spans[rank], group.spans[rank + 1])
        assert np.abs(paper.result(rank)[span] - exact[span]).max() < 1e-6
        assert paper.machines[rank].state is State.COMMITTED
        assert paper.machines[rank].stale() == []


def test_a_gather_gives_all_what_the_owners_hold() -> None:
    values = normal_vectors(4, 40_000)
    group = group_of(values, weights=[1, 2, 3, 4])
    paper = LossyGroupOnPaper(group, values, part=Part.GATHER).run()
    expected = np.concatenate([flat(values[r])[group.spans[r] : group.spans[r + 1]] for r in range(4)])
    assert all(np.array_equal(paper.result(rank), expected) for rank in range(4))
    lossy = LossyGroupOnPaper(group, values, part=Part.GATHER, loss=0.3).run()
    lossy.check_promises()
    for rank in range(4):
        took = lossy.result(rank) == expected
        assert took.mean() == pytest.approx(1 - 0.3 * 3 / 4, abs=0.08)
        assert (took | (lossy.result(rank) == flat(values[rank]))).all()


# ---- nonsense


def test_nonsense_is_refused_by_name() -> None:
    values = normal_vectors(2, 20_000)
    paper = LossyGroupOnPaper(group_of(values), values)
    machine = paper.machines[0]
    rows = np.zeros((1, 1376), np.uint8)

    def packet(sequence: int, offset: int, phase: Phase = Phase.CONTRIBUTION, width: int = 1376) -> None:
        machine.packets_received(phase, Rank(1), np.array([sequence]), np.array([offset]), rows[:, :width], 0.0)

    with pytest.raises(RemoteProtocolError, match="packet 9999 of"):
        packet(9999, 0)
    with pytest.raises(RemoteProtocolError, match="otherwise"):
        packet(1, 345)
    with pytest.raises(RemoteProtocolError, match="bytes"):
        packet(1, 344, width=1375)
    with pytest.raises(RemoteProtocolError, match="not its own"):
        machine.receive(RangesWanted(paper.group.group_id, (0,)), Rank(1), 0.0)
    with pytest.raises(RemoteProtocolError, match="not its to send"):
        machine.chunk_received(Chunk(9999, 0, b"", is_average=False), Rank(1), 0.0)
    with pytest.raises(RemoteProtocolError):
        machine.chunk_received(Chunk(0, 0, b"\0" * 7, is_average=False), Rank(1), 0.0)
    with pytest.raises(RemoteProtocolError, match="second time"):
        for _ in range(2):
            machine.receive(RangesWanted(paper.group.group_id, ()), Rank(1), 0.0)


def test_values_that_are_not_finite_cost_their_ranges_and_are_named() -> None:
    values = normal_vectors(3, 30_000)
    values[2].elements(100, 101)[:] = np.nan
    paper = LossyGroupOnPaper(group_of(values), values).run()
    assert paper.committed == [0, 1, 2]
    assert np.isfinite(paper.result(0)).all()
    assert "not finite" in paper.machines[0].dropped_lines()[0].why
    exact = np.mean([flat(vector) for vector in values], axis=0)
    assert np.abs(paper.result(0) - exact)[344:].max() < 1e-6, "other ranges of that member count"


# ---- drift


def cut_of(ranges: int, elements: int = 344) -> Cut:
    return Ranges([Piece(0, 0, ranges * elements, "float32", Rank(0))], FLOAT32).cuts[0]


def slots_of(cut: Cut, values: np.ndarray) -> Slots:
    slots = Slots(cut, FLOAT32.contribution)
    for packets in encode_ranges(FLOAT32.contribution, cut, values, 0, cut.count):
        slots.put(packets)
    return slots


def drift_of_fixed_owner(
    loss: float, *, steps: int, ranges: int = 64, increments: bool = False, seed: int = 1
) -> np.ndarray:
    """|th_i - th_j|^2 an element and step, for two receivers of an owner whose values move by 1 a step."""
    rng = np.random.default_rng(seed)
    cut = cut_of(ranges)
    size = cut.piece.stop
    owner = np.zeros(size, np.float32)
    held = [np.zeros(size, np.float32) for _ in range(2)]
    apart = np.empty(steps)
    for step in range(steps):
        moved = rng.standard_normal(ranges, np.float32).repeat(cut.range_elements)
        owner += moved
        for receiver in range(2):
            arrived = rng.random(ranges) >= loss
            if increments:
                held[receiver] += moved * arrived.repeat(cut.range_elements)
                continue
            output = np.empty_like(owner)
            apply_cut(cut, slots_of(cut, owner), arrived, held[receiver], output)
            held[receiver] = output
        apart[step] = float(((held[0] - held[1])[:: cut.range_elements] ** 2).mean())
    return apart


@pytest.mark.parametrize(("loss", "drift"), [(0.1, 0.202), (0.2, 0.417), (0.4, 0.952)])
def test_drift_from_a_fixed_owner_is_bounded(loss: float, drift: float) -> None:
    """E |th_i - th_j|^2 = 2p / (1 - p^2) s^2."""
    apart = drift_of_fixed_owner(loss, steps=3000)[20:]
    assert apart.mean() == pytest.approx(drift, rel=0.05)
    assert apart[: len(apart) // 2].mean() == pytest.approx(apart[len(apart) // 2 :].mean(), rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("loss", "drift"), [(0.1, 0.202), (0.2, 0.417), (0.4, 0.952)])
def test_drift_does_not_grow_over_a_hundred_thousand_steps(loss: float, drift: float) -> None:
    apart = drift_of_fixed_owner(loss, steps=100_000, ranges=16)[20:]
    assert apart.mean() == pytest.approx(drift, rel=0.05)
    slope = np.polyfit(np.arange(len(apart)), apart, 1)[0]
    assert abs(slope * len(apart)) < 0.05 * drift


def test_increments_diverge() -> None:
    """The control: what is lost of a sum of increments is lost for ever."""
    apart = drift_of_fixed_owner(0.1, steps=1000, increments=True)
    assert apart[-100:].mean() > 5 * apart[100:200].mean() > 25 * 0.202


@pytest.mark.parametrize(("loss", "drift"), [(0.05, 0.082), (0.1, 0.174), (0.2, 0.398), (0.4, 1.12)])
def test_drift_of_a_group_that_averages_is_bounded(loss: float, drift: float) -> None:
    """One group of 8, each member's values moving by 1 a round, through the real jobs."""
    n, ranges, rounds = 8, 16, 90
    rng = np.random.default_rng(2)
    cut = cut_of(ranges)
    held = np.zeros((n, n, cut.piece.stop), np.float32)  # member, owner of the span, element
    apart: list[float] = []
    for _ in range(rounds):
        held += rng.standard_normal(held.shape, np.float32)
        after = np.empty_like(held)
        for owner in range(n):
            entries = [
                Entry(
                    Rank(rank),
                    rank,
                    1 / 16,
                    loss,
                    None if rank == owner else slots_of(cut, held[rank, owner]),
                    rng.random(ranges) >= (0 if rank == owner else loss),
                )
                for rank in range(n)
            ]
            made = estimate_cut(cut, entries, held[owner, owner], after[owner, owner], FLOAT32.average, Form.DIFFERENCE)
            for rank in range(n):
                if rank != owner:
                    slots = Slots(cut, FLOAT32.average)
                    for packets in made.packets:
                        slots.put(packets)
                    arrived = (rng.random(ranges) >= loss) & made.known
                    apply_cut(cut, slots, arrived, held[rank, owner], after[rank, owner])
        held = after
        apart.append(float(2 * held.var(axis=0, ddof=1).mean()))
    assert np.mean(apart[20:]) == pytest.approx(drift, rel=0.05)
    assert np.mean(apart[20:55]) == pytest.approx(np.mean(apart[55:]), rel=0.1)


def test_whole_machines_drift_as_the_table_says() -> None:
    """The same law through packets, deadlines and repairs, for some rounds."""
    rng, dice = np.random.default_rng(3), random.Random(3)
    held = [np.zeros(60_000, np.float32) for _ in range(8)]
    paths = [Paths() for _ in range(8)]
    group: Group | None = None
    apart: list[float] = []
    for _ in range(9):
        vectors = [Vector.of({"w": each + rng.standard_normal(60_000, np.float32)}) for each in held]
        group = group or group_of(vectors)
        paper = LossyGroupOnPaper(group, vectors, loss=0.2, paths=paths, seed=dice.getrandbits(32)).run()
        paper.check_promises()
        held = [result.arrays()["w"].copy() for result in paper.results]
        apart.append(paper.spread)
    assert np.mean(apart[3:]) == pytest.approx(0.398, rel=0.1)


def test_the_face_of_a_machine_that_ended_is_quiet() -> None:
    values = normal_vectors(2, 10_000)
    paper = LossyGroupOnPaper(group_of(values), values).run()
    machine: LossyReduce = paper.machines[0]
    assert machine.finished and machine.idle and machine.next_deadline() is None
    assert machine.next_burst(Rank(1)) is None and machine.next_outgoing(Rank(1)) is None
    machine.stream_ended(Phase.AVERAGE, Rank(1), 1.0)
    machine.suspect(Rank(1), "gone", 1.0)
    machine.receive(RangesWanted(paper.group.group_id, ()), Rank(1), 1.0)
    assert machine.take_effects() == []
    assert machine.survivors == (0, 1)

"""What a session may hold and how it goes on: dtypes, codecs, epochs, newcomers, names."""

from __future__ import annotations

import time
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

import moshpit_client
from tests.end_to_end.swarm import (
    Array,
    Peer,
    Swarm,
    Trainer,
    average_all,
    error,
    mean,
    random_tensors,
    trainers,
)

WEIGHTS = [1.0, 2.0, 3.0, 6.0]


@pytest.fixture(scope="module")
def four() -> Iterator[list[Peer]]:
    with Swarm() as swarm:
        yield swarm.start(4)


def mixed(index: int) -> dict[str, Array]:
    rng = np.random.default_rng(index)
    return {
        "half": rng.standard_normal(5001).astype(np.float16),
        "brain": rng.standard_normal(70_001).astype(ml_dtypes.bfloat16),
        "single": rng.standard_normal((97, 211)).astype(np.float32),
        "double": rng.standard_normal(1003),
        "scalar": np.array(index, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }


ROUNDING = {"float64": 1e-15, "float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}
"""Half a unit in the last place of the largest value, at most."""


def test_all_dtypes_travel_together_each_at_its_own_precision(four: list[Peer]) -> None:
    with trainers(four, mixed, name="mixed", min_peers=4) as there:
        receipts = average_all(there, WEIGHTS)
        assert {receipt.outcome for receipt in receipts} == {"complete"}
        for name in there[0].tensors.keys() - {"none"}:
            expected = mean([trainer.began_with[name] for trainer in there], WEIGHTS)
            result = there[0].tensors[name]
            assert error(result, expected) <= ROUNDING[result.dtype.name], name
            assert len({trainer.tensors[name].tobytes() for trainer in there}) == 1
        assert there[0].tensors["none"].shape == (0, 4)


def test_wide_values_keep_their_precision_beside_narrow_ones(four: list[Peer]) -> None:
    def tensors(index: int) -> dict[str, Array]:
        return {"w": np.array([1 + index * 1e-12]), "n": np.array([index], np.float32)}

    with trainers(four, tensors, name="wide", min_peers=4) as there:
        average_all(there)
        assert abs(there[0].tensors["w"][0] - (1 + 1.5e-12)) < 1e-15


@pytest.mark.parametrize(
    ("codec", "precision", "bits"),
    [("float16", 2**-10, 16), ("bfloat16", 2**-7, 16), ("flash8", 0.05, 8.25), ("flash4-8", 0.5, (4.25 + 8.25) / 2)],
)
def test_a_narrow_codec_costs_precision_and_saves_bytes_but_never_costs_equality(
    four: list[Peer], codec: str, precision: float, bits: float
) -> None:
    def tensors(index: int) -> dict[str, Array]:
        return {"w": np.random.default_rng(index).standard_normal(200_000).astype(np.float32)}

    with trainers(four, tensors, name=codec, min_peers=4, codec=codec) as there:
        receipts = average_all(there, WEIGHTS)
        expected = mean([trainer.began_with["w"] for trainer in there], WEIGHTS)
        assert 0 < error(there[0].tensors["w"], expected) < precision
        assert len({trainer.tensors["w"].tobytes() for trainer in there}) == 1
    assert {receipt.digest for receipt in receipts} == {receipts[0].digest}
    assert receipts[0].rounds[0].codec == codec
    whole = 200_000 * 4 * 2 * 3 / 4  # a contribution to each other and an average from each, a quarter each
    # Of all: how much each receives depends on its span, and spans on what lines were measured to carry.
    received = sum(receipt.bytes.received for receipt in receipts) / len(receipts)
    assert received == pytest.approx(whole * bits / 32, rel=0.05)


def test_four_bits_around_the_last_average_lose_less_than_eight_without(four: list[Peer]) -> None:
    """Parameters: members near each other. Biases travel as they are."""

    def tensors(index: int) -> dict[str, Array]:
        rng = np.random.default_rng(index)
        return {
            "w": (np.arange(200_000) % 977 + rng.standard_normal(200_000)).astype(np.float32),
            "w.bias": rng.standard_normal(100).astype(np.float32),
        }

    off: dict[str, float] = {}
    for codec in ("flash8", "flash4+anchored"):
        codecs = {"*.bias": "float32", "*": codec}
        with trainers(four, tensors, name=codec, min_peers=4, codec=codecs) as there:
            average_all(there, WEIGHTS)
            for number, trainer in enumerate(there):
                trainer.tensors["w"] += np.random.default_rng(number).standard_normal(200_000).astype(np.float32)
                trainer.tensors["w.bias"] += number
            before = [{name: array.copy() for name, array in trainer.tensors.items()} for trainer in there]
            receipts = average_all(there, WEIGHTS)
            off[codec] = error(there[0].tensors["w"], mean([each["w"] for each in before], WEIGHTS))
            assert error(there[0].tensors["w.bias"], mean([each["w.bias"] for each in before], WEIGHTS)) < 1e-6
            assert len({trainer.tensors["w"].tobytes() for trainer in there}) == 1
        (round_,) = receipts[0].rounds
        assert round_.codec == f"*.bias=float32,*={codec}"
        assert round_.codec_why.startswith("anchored" if "anchored" in codec else "")
        assert round_.bits_per_element == pytest.approx(8.25 if codec == "flash8" else 4.25, rel=0.05)
        assert 0 < round_.relative_error < 0.004
    assert off["flash4+anchored"] < off["flash8"] / 2


def test_auto_says_what_it_is_in_each_round_and_why(four: list[Peer]) -> None:
    with trainers(four, random_tensors, name="auto", min_peers=4, codec="auto") as there:
        receipts = average_all(there)
    (round_,) = receipts[0].rounds
    assert round_.codec == "float32" and round_.bits_per_element == 32.0
    assert round_.codec_why.startswith("auto: ")


def test_epochs_given_are_the_count_and_the_past_is_refused(four: list[Peer]) -> None:
    with trainers(four, random_tensors, name="epochs", min_peers=4) as there:
        assert {receipt.epoch for receipt in average_all(there, epoch=7)} == {7}
        assert {receipt.epoch for receipt in average_all(there)} == {8}
        with pytest.raises(moshpit_client.PreconditionFailed, match="epoch 8 is over"):
            there[0].average(epoch=8).result(30)
        with pytest.raises(moshpit_client.PreconditionFailed, match=r"epoch 90000\d* is far above the swarm's 9"):
            there[0].average(epoch=900001).result(30)
        assert {receipt.epoch for receipt in average_all(there, epoch=12)} == {12}


def test_sessions_of_other_names_never_meet(four: list[Peer]) -> None:
    with (
        trainers(four[:2], lambda i: {"w": np.full(3, i, np.float32)}, name="one", min_peers=2) as one,
        trainers(four[2:], lambda i: {"w": np.full(3, 10 + i, np.float32)}, name="other", min_peers=2) as other,
    ):
        average_all([*one, *other])
        assert [trainer.tensors["w"][0] for trainer in (*one, *other)] == [0.5, 0.5, 10.5, 10.5]


def test_two_sessions_of_one_daemon_average_at_once(four: list[Peer]) -> None:
    with (
        trainers(four, random_tensors, name="left", min_peers=4) as left,
        trainers(four, lambda i: random_tensors(50 + i), name="right", min_peers=4) as right,
    ):
        receipts = average_all([*left, *right])
        assert {receipt.outcome for receipt in receipts} == {"complete"}
        for there in (left, right):
            expected = mean([trainer.began_with["w"] for trainer in there], [1.0] * 4)
            assert max(error(trainer.tensors["w"], expected) for trainer in there) < 1e-6


def test_weight_zero_receives_and_does_not_count(four: list[Peer]) -> None:
    with trainers(four, random_tensors, name="observer", min_peers=4) as there:
        receipts = average_all(there, [0.0, 1.0, 1.0, 2.0])
        expected = mean([trainer.began_with["w"] for trainer in there], [0.0, 1.0, 1.0, 2.0])
        assert max(error(trainer.tensors["w"], expected) for trainer in there) < 1e-6
    observer = there[0].peer.id
    assert {receipt.outcome for receipt in receipts} == {"complete"}
    assert all(observer not in span.contributors for span in receipts[1].rounds[0].spans)


def test_weights_that_are_all_zero_are_refused_to_everybody(four: list[Peer]) -> None:
    with trainers(four, random_tensors, name="weightless", min_peers=4) as there:
        futures = [trainer.average(0.0, timeout=20) for trainer in there]
        for trainer, future in zip(there, futures, strict=True):
            with pytest.raises(moshpit_client.MoshpitError, match="weight"):
                future.result(60)
            assert trainer.is_untouched()
        assert {receipt.outcome for receipt in average_all(there)} == {"complete"}


def average_with_newcomer(there: list[Trainer], newcomer: Trainer) -> list[moshpit_client.Receipt]:
    """The others go on without it until they hear of it; what they hold is their mean already."""
    last = newcomer.average()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        receipts = average_all(there)
        if newcomer.peer.id in receipts[0].peers:
            return [*receipts, last.result(60)]
    raise AssertionError("it was never met")


def test_a_late_joiner_receives_first_and_counts_from_then_on(four: list[Peer]) -> None:
    early, late = four[:3], four[3]
    with trainers(early, random_tensors, name="late", min_peers=3) as there:
        average_all(there)
        mean_of_three = there[0].tensors["w"].copy()
        joiner = Trainer(late, {"w": np.full(50_000, 1e6, np.float32)}, name="late")
        try:
            receipts = average_with_newcomer(there, joiner)
            assert [receipt.joined for receipt in receipts] == [False, False, False, True]
            assert np.allclose(joiner.tensors["w"], mean_of_three, rtol=1e-5, atol=1e-6)
            assert joiner.tensors["w"].tobytes() == there[0].tensors["w"].tobytes()
            joiner.tensors["w"][:] = np.float32(4) * mean_of_three.astype(np.float32)
            receipts = average_all([*there, joiner])
            assert not any(receipt.joined for receipt in receipts)
            assert np.allclose(there[0].tensors["w"], 1.75 * mean_of_three.astype(np.float64), rtol=1e-5, atol=1e-6)
        finally:
            joiner.close()


def test_a_late_joiner_that_contributes_counts_at_once(four: list[Peer]) -> None:
    with trainers(four[:3], lambda i: {"w": np.zeros(10, np.float32)}, name="eager", min_peers=3) as there:
        average_all(there)
        joiner = Trainer(four[3], {"w": np.full(10, 4, np.float32)}, name="eager", joining="contribute")
        try:
            receipts = average_with_newcomer(there, joiner)
            assert not any(receipt.joined for receipt in receipts)
            assert [trainer.tensors["w"][0] for trainer in there] == [1.0] * 3
        finally:
            joiner.close()


def test_receipts_tell_who_reduced_what_and_agree_with_each_other(four: list[Peer]) -> None:
    with trainers(four, random_tensors, name="receipts", min_peers=4) as there:
        receipts = average_all(there, WEIGHTS)
    ids = sorted(peer.id for peer in four)
    groups = {(r.rounds[0].group_id, r.rounds[0].digest, r.rounds[0].leader, r.rounds[0].members) for r in receipts}
    assert len(groups) == 1
    assert len({round_.spans for receipt in receipts for round_ in receipt.rounds}) == 1
    round_ = receipts[0].rounds[0]
    assert sorted(member.peer for member in round_.members) == ids
    assert sorted(member.weight for member in round_.members) == sorted(WEIGHTS)
    assert round_.spans[0].start == 0 and round_.spans[-1].stop == 50_000
    assert all(left.stop == right.start for left, right in zip(round_.spans, round_.spans[1:], strict=False))
    assert all(sorted(span.contributors) == ids for span in round_.spans)
    assert sorted(receipt.rounds[0].rank for receipt in receipts) == [0, 1, 2, 3]
    assert all(receipt.seconds.total > 0 and receipt.bytes.sent > 0 for receipt in receipts)
    for peer, receipt in zip(four, receipts, strict=True):
        assert sorted((*receipt.peers, peer.id)) == ids


def test_a_trainer_that_keeps_training_adds_what_the_averaging_changed(four: list[Peer]) -> None:
    with trainers(four, mixed, name="delta", min_peers=4) as there:
        for averaging in range(2):
            before = [{name: np.array(tensor) for name, tensor in trainer.tensors.items()} for trainer in there]
            pending = [trainer.session.average_async(timeout=60.0, apply="delta") for trainer in there]
            for tensor in there[0].tensors.values():
                tensor[...] = (tensor * 0.5).astype(tensor.dtype)  # a large step, at once
            assert {delta.result(60).outcome for delta in pending} == {"complete"}
            assert np.array_equal(there[1].tensors["single"], before[1]["single"]), "nothing changes by itself"
            assert {delta.apply().outcome for delta in pending} == {"complete"}
            assert len({there[i].tensors[name].tobytes() for i in (1, 2, 3) for name in ("brain",)}) == 1
            for name in there[0].tensors.keys() - {"none"}:
                result, moved = there[1].tensors[name], there[0].tensors[name]
                assert (
                    error(result, mean([values[name] for values in before], [1.0] * 4)) <= ROUNDING[result.dtype.name]
                )
                expected = result.astype(np.float64) - before[0][name].astype(np.float64) / 2
                assert error(moved, expected) <= 2 * ROUNDING[result.dtype.name], name
            for index, trainer in enumerate(there):
                for name, tensor in trainer.tensors.items():
                    tensor[...] = mixed(10 * averaging + index)[name]


def test_progress_says_how_many_are_missing(four: list[Peer]) -> None:
    said: list[str] = []
    with trainers(four[:2], random_tensors, name="missing", min_peers=3) as there:
        futures = [trainer.average(timeout=3, progress=lambda note: said.append(note.text)) for trainer in there]
        for trainer, future in zip(there, futures, strict=True):
            with pytest.raises(moshpit_client.NoGroup, match="2 of 3 peers here, waiting for 1 more"):
                future.result(60)
            assert trainer.is_untouched()
    assert any(text.startswith("2 of 3 peers here, waiting for 1 more, ") for text in said), said


def test_trainers_that_differ_and_wait_for_initial_peers_are_told_so_before_their_time_is_up(four: list[Peer]) -> None:
    codecs = ["flash8", "flash4", "flash4"]
    there = [
        Trainer(peer, {"w": np.ones(1000, np.float32)}, name="differ", initial_peers=3, codec=codec)
        for peer, codec in zip(four, codecs, strict=False)
    ]
    futures = [trainer.average(timeout=6.0) for trainer in there]
    with pytest.raises(moshpit_client.PreconditionFailed, match=r"codec 'flash8.*' against 'flash4.*'"):
        futures[0].result()
    for future in futures[1:]:
        with pytest.raises(
            moshpit_client.MoshpitError, match=r"2 of 3 peers were here.*codec 'flash4.*' against 'flash8"
        ):
            future.result()
    for trainer in there:
        trainer.close()

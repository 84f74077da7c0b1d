"""Several trainers at one daemon: averaged in memory first, one peer to the swarm, a result for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import pytest

import moshpit_client
from tests.end_to_end.swarm import (
    DEADLINE_S,
    Array,
    Peer,
    Process,
    Swarm,
    Trainer,
    average_all,
    error,
    mean,
    random_tensors,
    trainers,
    until,
)

WEIGHTS = [1.0, 2.0, 3.0, 6.0, 0.5, 0.0, 4.0, 1.5]
VECTOR_BYTES = 200_000
"""Of random_tensors."""


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration with which no trainer is left out because this machine is busy."""
    file = tmp_path_factory.mktemp("config") / "patient.toml"
    file.write_text("[household]\ngrace_floor_s = 15.0\n")
    return str(file)


@pytest.fixture(scope="module")
def two(patient: str) -> Iterator[list[Peer]]:
    with Swarm("--config", patient) as swarm:
        yield swarm.start(2)


@pytest.fixture(scope="module")
def lonely(patient: str) -> Iterator[Peer]:
    """Nobody else is in its swarm."""
    with Swarm("--config", patient, name="lonely") as swarm:
        yield swarm.start()[0]


def session_of(peer: Peer) -> Mapping[str, object]:
    sessions = peer.json("status")["sessions"]
    assert isinstance(sessions, list)
    [session] = sessions
    return session


def test_eight_trainers_of_two_daemons_hold_their_mean_for_the_price_of_two(two: list[Peer]) -> None:
    with trainers(two, random_tensors, name="pair", min_peers=2) as there:
        alone = average_all(there)
    with trainers([two[0]] * 4 + [two[1]] * 4, random_tensors, name="eight", min_peers=2) as there:
        receipts = average_all(there, WEIGHTS)
        assert {receipt.outcome for receipt in receipts} == {"complete"}
        expected = mean([trainer.began_with["w"] for trainer in there], WEIGHTS)
        assert error(there[0].tensors["w"], expected) < 1e-6
        assert len({trainer.tensors["w"].tobytes() for trainer in there}) == 1
        assert [len(session["trainers"]) for session in map(session_of, two)] == [4, 4]  # type: ignore[arg-type]
    assert [(receipt.local.trainers, receipt.local.weight) for receipt in receipts] == [
        (4, weight) for weight in WEIGHTS
    ]
    assert {receipt.weight_total for receipt in receipts} == {sum(WEIGHTS)}
    assert {receipt.bytes for receipt in receipts} <= {receipt.bytes for receipt in alone}, (
        "as if one trainer were there"
    )
    for peer, weight in zip(two, (sum(WEIGHTS[:4]), sum(WEIGHTS[4:])), strict=True):
        with peer.connect() as daemon:
            records = [receipt for receipt in daemon.rounds() if receipt.session == "eight"]
        assert [record.local for record in records] == [moshpit_client.Local(4, weight)], "one receipt an averaging"
    told = two[0].cli("explain", "last").stdout
    assert "4 trainers of this daemon were averaged first, as one peer with weight 12" in told


def test_all_dtypes_and_both_ways_between_trainer_and_daemon_go_together(two: list[Peer]) -> None:
    def mixed(index: int) -> dict[str, Array]:
        rng = np.random.default_rng(index)
        return {
            "brain": rng.standard_normal(70_001).astype(ml_dtypes.bfloat16),
            "single": rng.standard_normal((97, 211)).astype(np.float32),
            "double": rng.standard_normal(1003),
        }

    options = {"name": "mixed", "min_peers": 2}
    with (
        trainers([two[0]] * 2, mixed, **options) as sharing,
        trainers([two[0]] * 2, lambda i: mixed(2 + i), shared_memory=False, **options) as streaming,
        trainers(two[1:], lambda i: mixed(4 + i), **options) as others,
    ):
        there = [*sharing, *streaming, *others]
        for averaging in range(3):
            before = [{name: np.array(tensor) for name, tensor in trainer.tensors.items()} for trainer in there]
            receipts = average_all(there)
            assert [receipt.local.trainers for receipt in receipts] == [4] * 4 + [1]
            for name, precision in (("brain", 2**-7), ("single", 1e-6), ("double", 1e-15)):
                expected = mean([values[name] for values in before], [1.0] * 5)
                assert error(there[0].tensors[name], expected) <= precision, name
                assert len({trainer.tensors[name].tobytes() for trainer in there}) == 1
            for index, trainer in enumerate(there):
                for name, tensor in trainer.tensors.items():
                    tensor[...] = mixed(10 * averaging + index)[name]


def test_trainers_of_the_only_daemon_get_their_mean_and_are_told_that_nobody_else_was_there(lonely: Peer) -> None:
    with trainers([lonely] * 8, random_tensors, name="eight", lonely_wait=0.1) as there:
        receipts = average_all(there, WEIGHTS)
        assert {(receipt.outcome, receipt.local.trainers) for receipt in receipts} == {("alone", 8)}
        assert {(receipt.weight_total, receipt.digest, receipt.bytes.sent) for receipt in receipts} == {
            (sum(WEIGHTS), "", 0)
        }
        expected = mean([trainer.began_with["w"] for trainer in there], WEIGHTS)
        assert error(there[0].tensors["w"], expected) < 1e-6
        assert len({trainer.tensors["w"].tobytes() for trainer in there}) == 1
    told = lonely.cli("explain", "last").stdout
    assert "found no other peer" in told and "8 trainers of this daemon" in told and "unchanged" not in told


def test_without_any_weight_values_stay_as_they_are(lonely: Peer) -> None:
    with trainers([lonely] * 2, random_tensors, name="weightless", lonely_wait=0.1) as there:
        assert {receipt.outcome for receipt in average_all(there, [0.0, 0.0])} == {"alone"}
        assert all(trainer.is_untouched() for trainer in there)


def test_a_newcomer_receives_the_mean_of_the_settled(lonely: Peer) -> None:
    with trainers([lonely] * 2, random_tensors, name="newcomer", lonely_wait=0.1) as there:
        average_all(there)
        settled = there[0].tensors["w"].copy()
        late = Trainer(lonely, random_tensors(7), name="newcomer", lonely_wait=0.1)
        try:
            receipts = average_all([*there, late])
            assert [receipt.joined for receipt in receipts] == [False, False, True]
            assert [receipt.local.weight for receipt in receipts] == [1.0, 1.0, 0.0]
            assert np.array_equal(late.tensors["w"], settled)
            late.tensors["w"][:] = 0
            assert not any(receipt.joined for receipt in average_all([*there, late]))
            assert np.allclose(late.tensors["w"], settled * 2 / 3, rtol=1e-6)
        finally:
            late.close()


def test_a_killed_trainer_costs_the_others_nothing(two: list[Peer]) -> None:
    with trainers([two[0], two[0], two[1]], random_tensors, name="mortal", min_peers=2) as there:
        victim = Process("tests.end_to_end.trainer", str(two[0].socket), "mortal", "50000", "2")
        victim.says("^open")
        until(lambda: [each["state"] for each in session_of(two[0])["trainers"]][2] == "waiting")  # type: ignore[attr-defined]
        victim.kill()
        until(lambda: len(session_of(two[0])["trainers"]) == 2)  # type: ignore[arg-type]
        receipts = average_all(there)
        assert {(receipt.outcome, receipt.joined) for receipt in receipts} == {("complete", False)}
        assert [receipt.local.trainers for receipt in receipts] == [2, 2, 1]
        expected = mean([trainer.began_with["w"] for trainer in there], [1.0] * 3)
        assert max(error(trainer.tensors["w"], expected) for trainer in there) < 1e-6


def test_a_trainer_killed_in_the_averaging_leaves_the_others_their_result(two: list[Peer]) -> None:
    """Its values count: they were in memory when it began."""
    with trainers([two[0]], random_tensors, name="sudden", min_peers=2) as there:
        victim = Process("tests.end_to_end.trainer", str(two[0].socket), "sudden", "50000", "2")
        victim.says("^open")
        first = there[0].average()  # waits for a second daemon
        until(lambda: all(each["state"] == "averaging" for each in session_of(two[0])["trainers"]))  # type: ignore[attr-defined]
        victim.kill()
        with trainers(two[1:], lambda i: random_tensors(1 + i), name="sudden", min_peers=2) as others:
            [receipt] = average_all(others)
            assert (receipt.outcome, first.result(DEADLINE_S).local.trainers) == ("complete", 2)
            expected = mean(
                [there[0].began_with["w"], np.ones(50_000, np.float32), others[0].began_with["w"]], [1.0] * 3
            )
            assert error(others[0].tensors["w"], expected) < 1e-6
            assert np.array_equal(there[0].tensors["w"], others[0].tensors["w"])


@pytest.mark.parametrize("shared_memory", [True, False])
def test_what_is_not_finite_is_refused_to_its_trainer_only(lonely: Peer, shared_memory: bool) -> None:
    options = {"name": "finite", "lonely_wait": 0.1, "shared_memory": shared_memory}
    with trainers([lonely] * 3, random_tensors, **options) as there:
        there[1].tensors["w"][4711] = np.nan
        futures = [trainer.average() for trainer in there]
        with pytest.raises(moshpit_client.InvalidInput, match="tensor 'w' holds nan at element 4711"):
            futures[1].result(DEADLINE_S)
        assert [futures[index].result(DEADLINE_S).local.trainers for index in (0, 2)] == [2, 2]
        expected = mean([there[index].began_with["w"] for index in (0, 2)], [1.0] * 2)
        assert error(there[0].tensors["w"], expected) < 1e-6


def test_who_gives_up_before_the_beginning_is_out(lonely: Peer) -> None:
    def give_up(progress: moshpit_client.Progress) -> None:
        raise InterruptedError(progress.text)

    with trainers([lonely] * 3, random_tensors, name="fickle", lonely_wait=0.1) as there:
        with pytest.raises(InterruptedError, match="1 of 3 trainers of this daemon here, waiting for 2 more"):
            there[0].average(progress=give_up).result(DEADLINE_S)
        receipts = average_all(there)
        assert {receipt.local.trainers for receipt in receipts} == {3}
        expected = mean([trainer.began_with["w"] for trainer in there], [1.0] * 3)
        assert max(error(trainer.tensors["w"], expected) for trainer in there) < 1e-6


def test_epochs_of_one_household_do_not_mix(lonely: Peer) -> None:
    with trainers([lonely] * 4, random_tensors, name="epochs", lonely_wait=0.1) as there:
        futures = [trainer.average(epoch=7 + index // 2) for index, trainer in enumerate(there)]
        assert [futures[index].result(DEADLINE_S).epoch for index in (0, 1)] == [7, 7]
        again = [trainer.average(epoch=8) for trainer in there[:2]]
        receipts = [future.result(DEADLINE_S) for future in (*again, *futures[2:])]
        assert {(receipt.epoch, receipt.local.trainers) for receipt in receipts} == {(8, 4)}


@pytest.mark.parametrize(
    ("tensors", "options", "difference"),
    [
        ({"w": np.zeros(3, np.float64)}, {}, r"tensor 'w' float64\[3\] here is float32\[3\] there"),
        ({"w": np.zeros(3, np.float32)}, {"rounds": 1}, "rounds is 1 here and 0 there"),
        ({"w": np.zeros(3, np.float32)}, {"codec": "bfloat16"}, "codec is bfloat16 here and float32 there"),
    ],
)
def test_another_session_of_the_same_name_is_refused_with_the_first_difference(
    lonely: Peer, tensors: dict[str, Array], options: dict[str, object], difference: str
) -> None:
    with (
        trainers([lonely], lambda i: {"w": np.zeros(3, np.float32)}, name="taken"),
        pytest.raises(moshpit_client.PreconditionFailed, match=f"session 'taken' is open.*{difference}.*another name"),
    ):
        Trainer(lonely, tensors, name="taken", **options)


def test_a_session_lives_until_its_last_trainer_leaves(lonely: Peer) -> None:
    first, second = (Trainer(lonely, random_tensors(index), name="lasting", lonely_wait=0.1) for index in range(2))
    try:
        first.close()
        assert len(session_of(lonely)["trainers"]) == 1  # type: ignore[arg-type]
        [receipt] = average_all([second])
        assert (receipt.outcome, receipt.local.trainers) == ("alone", 1)
        assert second.is_untouched()
    finally:
        second.close()
    until(lambda: lonely.json("status")["sessions"] == [])

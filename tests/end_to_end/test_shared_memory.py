"""The local hop of real swarms: daemons reduce from the trainers' shared memory and into it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.swarm import DEADLINE_S, Peer, Swarm, Trainer, average_all, error, mean, random_tensors, trainers


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mosh") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def four(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Peer]]:
    """The last of them shares no memory."""
    patient = tmp_path_factory.mktemp("config") / "patient.toml"  # no trainer is left out because this machine is busy
    patient.write_text("[household]\ngrace_floor_s = 15.0\n")
    with Swarm("--grid", "2x2", "--config", str(patient)) as swarm:
        yield [
            *swarm.start(3, "--shared-memory-dir", str(directory)),
            *swarm.start(1, "--shared-memory-dir", "off"),
        ]


def hop(trainer: Trainer) -> tuple[object, object]:
    sessions = trainer.peer.json("status")["sessions"]
    assert isinstance(sessions, list)
    [session] = sessions
    [own] = session["trainers"]
    return own["transport"], own["transport_why"]


def test_the_bits_are_the_same_whatever_way_they_took(four: list[Peer], directory: Path) -> None:
    with trainers(four, random_tensors, name="both", min_peers=4) as there:
        assert [hop(trainer) for trainer in there] == [("shared-memory", "")] * 3 + [
            ("stream", "switched off (--shared-memory-dir off)")
        ]
        assert not [path for path in directory.rglob("*") if path.is_file()]
        for averaging in range(3):
            values = [trainer.tensors["w"].copy() for trainer in there]
            receipts = average_all(there)
            assert {(receipt.outcome, len(receipt.rounds)) for receipt in receipts} == {("complete", 2)}
            assert len({trainer.tensors["w"].tobytes() for trainer in there}) == 1
            assert error(there[0].tensors["w"], mean(values, [1.0] * 4)) < 1e-6
            for index, trainer in enumerate(there):
                trainer.tensors["w"][:] = random_tensors(10 * averaging + index)["w"]


def test_the_daemon_reduces_from_the_contribution_and_into_what_the_trainer_reads(four: list[Peer]) -> None:
    with trainers(four, random_tensors, name="in-place", min_peers=4) as there, ThreadPoolExecutor(4) as pool:
        for averaging in range(3):
            given = [trainer.session.contribution() for trainer in there]
            for index, arrays in enumerate(given):
                arrays["w"][:] = random_tensors(10 * averaging + index)["w"]
            before = [arrays["w"].copy() for arrays in given]

            def average(trainer: Trainer, arrays: dict[str, np.ndarray]) -> np.ndarray:
                result, receipt = trainer.session.average_values(arrays, timeout=DEADLINE_S, copy=False)
                assert receipt.outcome == "complete"
                return result["w"]

            results = list(pool.map(average, there, given))
            assert len({result.tobytes() for result in results}) == 1
            assert error(results[0], mean(before, [1.0] * 4)) < 1e-6
            for arrays, values in zip(given, before, strict=True):
                np.testing.assert_array_equal(arrays["w"], values, "a contribution stays as it is")
            for trainer in there:
                trainer.session.contribution()["w"][:] = 0
            assert np.any(results[0]), "the result is not where the contribution is"


def test_trainers_of_one_daemon_find_the_result_each_in_its_own_memory(four: list[Peer]) -> None:
    places = [four[0], four[0], four[0], four[1], four[2], four[3], four[3]]
    weights = [1.0, 2.0, 3.0, 1.0, 5.0, 2.0, 0.5]
    with (
        trainers(places, random_tensors, name="households", min_peers=4) as there,
        ThreadPoolExecutor(len(places)) as pool,
    ):
        for averaging in range(3):
            given = [trainer.session.contribution() for trainer in there]
            for index, arrays in enumerate(given):
                arrays["w"][:] = random_tensors(10 * averaging + index)["w"]
            before = [arrays["w"].copy() for arrays in given]

            def average(trainer: Trainer, arrays: dict[str, np.ndarray], weight: float) -> tuple[np.ndarray, int]:
                result, receipt = trainer.session.average_values(arrays, weight, DEADLINE_S, copy=False)
                assert (receipt.outcome, len(receipt.rounds)) == ("complete", 2)
                return result["w"], receipt.local.trainers

            results, trainers_of = zip(*pool.map(average, there, given, weights), strict=True)
            assert trainers_of == (3, 3, 3, 1, 1, 2, 2)
            assert len({result.tobytes() for result in results}) == 1
            assert error(results[0], mean(before, weights)) < 1e-6
            for arrays, values in zip(given, before, strict=True):
                np.testing.assert_array_equal(arrays["w"], values, "a contribution stays as it is")
            results[0][:] = 0
            assert all(result.any() for result in results[1:]), "nobody looks into another's memory"

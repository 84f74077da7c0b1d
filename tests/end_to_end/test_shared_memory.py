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
def four(directory: Path) -> Iterator[list[Peer]]:
    """The last of them shares no memory."""
    with Swarm("--grid", "2x2") as swarm:
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

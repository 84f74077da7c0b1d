"""Compressors through real daemons: rows that all choose alike, and feedback that outlives trainers and daemons."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import moshpit_client
from moshpit_client import ArcTopK
from tests.end_to_end.swarm import DEADLINE_S, Array, Peer, Process, Swarm, Trainer, average_all, trainers, until

ROWS, ROW = 256, 128
SHAPE = (512, 64)
"""ROWS rows of ROW elements as the compressor reads them."""
ARC = ArcTopK(ratio=0.125, rank=4, feedback="ef21m", eta=0.5, warmup=0)
CHOSEN = ROWS // 8


@pytest.fixture(scope="module")
def four() -> Iterator[list[Peer]]:
    with Swarm() as swarm:
        yield swarm.start(4)


def zeros(_: int) -> dict[str, Array]:
    return {"w": np.zeros(SHAPE, np.float32), "bias": np.zeros(100, np.float32)}


def draw(step: int, index: int) -> npt.NDArray[np.float32]:
    """Rows of very different size: which count is no close call."""
    rng = np.random.default_rng([step, index])
    size = np.random.default_rng([step, 99]).permutation(ROWS) + 1.0
    return ((1.0 + 0.2 * rng.standard_normal((ROWS, ROW))) * 10 / size[:, None]).astype(np.float32)


class Twin:
    """EF21M in float64 with all peers in one place. Which rows were chosen it takes from what has changed."""

    def __init__(self, peers: int) -> None:
        self.momentum = np.zeros((peers, ROWS, ROW))
        self.own = np.zeros((peers, ROWS, ROW))
        self.mean = np.zeros((ROWS, ROW))
        self.started = False

    def step(self, given: Sequence[npt.NDArray[np.float32]], result: Array, *, dense: bool) -> npt.NDArray[np.bool_]:
        """Which rows were chosen; asserts that the result is as it must be."""
        x = np.stack(given).astype(np.float64)
        self.momentum = self.momentum + 0.5 * (x - self.momentum) if self.started else x
        got = result.astype(np.float64).reshape(ROWS, ROW)
        offer = self.momentum - self.own
        chosen = np.ones(ROWS, bool)
        if not dense:
            chosen = np.abs(got - self.mean).max(axis=1) > 1e-4
            assert 0 < chosen.sum() <= CHOSEN
            energy = (offer.mean(axis=0) ** 2).sum(axis=1)
            best = np.sort(energy)[-CHOSEN:].sum()
            assert energy[chosen].sum() > 0.9 * best, "a few numbers a row find nearly the largest"
        self.own[:, chosen] += offer[:, chosen]
        self.mean[chosen] += offer[:, chosen].mean(axis=0)
        self.started = True
        assert np.abs(got - self.mean).max() < 1e-3
        return chosen


def step(
    there: Sequence[Trainer], twin: Twin, number: int, back: Trainer | None = None
) -> list[moshpit_client.Receipt]:
    """One averaging of new values, which the twin makes too. `back`: one that was away, whom nobody waits for."""
    given = [draw(number, index) for index in range(len(there))]
    for index, trainer in enumerate(there):
        trainer.tensors["w"][:] = given[index].reshape(SHAPE)
        trainer.tensors["bias"][:] = index
    early = back.average() if back else None
    until(lambda: back is None or state_of(back) == "matching")
    receipts = average_all([trainer for trainer in there if trainer is not back])
    receipts += [early.result(DEADLINE_S)] if early else []
    assert {receipt.outcome for receipt in receipts} == {"complete"}, [receipt.why for receipt in receipts]
    assert len({trainer.tensors["w"].tobytes() for trainer in there}) == 1
    assert np.allclose(there[0].tensors["bias"], (len(there) - 1) / 2), "what is too small for rows goes dense"
    assert len({receipt.notes for receipt in receipts}) == 1, "all see alike why"
    twin.step(given, there[0].tensors["w"], dense=bool(receipts[0].notes))
    return receipts


def state_of(trainer: Trainer) -> str:
    with trainer.peer.connect() as daemon:
        return daemon.status().sessions[0].state


@pytest.mark.parametrize("grid", ["auto", "2x2"])
def test_everybody_gets_the_largest_rows_of_what_changed(grid: str) -> None:
    with Swarm("--grid", grid) as swarm, trainers(swarm.start(4), zeros, min_peers=4, compressor=ARC) as there:
        twin = Twin(4)
        averagings = [step(there, twin, number) for number in range(5)]
        rounds = 1 if grid == "auto" else 2
        assert averagings[0][0].notes == ("sent dense: nobody goes on from an earlier averaging",)
        for receipt in (receipts[0] for receipts in averagings[1:]):
            assert receipt.notes == ()
            assert receipt.compressor == "arc:0.125,4,ef21m,0.5,0"
            assert [each.stage for each in receipt.rounds] == ["sketch"] * rounds + ["rows"] * rounds
            assert [each.codec for each in receipt.rounds] == ["integers"] * rounds + ["float32"] * rounds
        dense, rows, sketch = (
            sum(each.bytes.sent for receipt in receipts for each in receipt.rounds if each.stage == stage)
            for receipts, stage in ((averagings[0], "dense"), (averagings[-1], "rows"), (averagings[-1], "sketch"))
        )
        assert rows * (ROWS * ROW + 100) == dense * (CHOSEN * ROW + 100), (
            "what is sent of rows is their values, no more"
        )
        assert sketch < dense * 1.1 * ARC.rank / ROW
        said = there[0].peer.cli("explain", "last").stdout
        assert "arc:0.125,4,ef21m,0.5,0 went through sketch, then rows" in said


def test_feedback_outlives_a_trainer_and_a_daemon(tmp_path: Path) -> None:
    with Swarm() as swarm:
        peers = swarm.start(3)
        there = [Trainer(peer, zeros(0), min_peers=3, compressor=ARC) for peer in peers]
        twin = Twin(3)
        for number in range(3):
            step(there, twin, number)
        states = [trainer.session.feedback_state() for trainer in there]
        np.savez(tmp_path / "state.npz", **states[1])
        assert {"averagings", "bond", "mean/w", "momentum/w", "own/w"} == states[0].keys()

        there[1].close()
        doomed = Process("tests.end_to_end.trainer_that_restores", str(peers[1].socket), str(tmp_path / "state.npz"))
        doomed.says("^restored")
        doomed.signal(signal.SIGKILL)
        doomed.ends()
        doomed.kill()
        there[1] = Trainer(peers[1], zeros(0), min_peers=3, compressor=ARC)
        there[1].session.load_feedback_state(dict(np.load(tmp_path / "state.npz")))
        assert step(there, twin, 3, back=there[1])[0].notes == (), "the trainer's death cost nothing"

        saved = there[2].session.feedback_state()
        peers[2].kill()
        (peers[2],) = swarm.start(1, home=peers[2].home)
        there[2] = Trainer(peers[2], zeros(0), min_peers=3, compressor=ARC)
        there[2].session.load_feedback_state(saved)
        receipt = step(there, twin, 4, back=there[2])[2]
        assert receipt.notes == (), "nor did the daemon's"
        assert receipt.epoch == 4 and not receipt.joined
        for trainer in there:
            trainer.close()


def test_feedback_of_a_lossy_codec_brings_back_what_it_left_out(four: list[Peer]) -> None:
    def tensors(index: int) -> dict[str, Array]:
        return {"w": np.zeros(20_000, np.float32)}

    values = [np.random.default_rng(i).standard_normal(20_000).astype(np.float32) for i in range(4)]
    expected = np.mean(values, axis=0)
    with trainers(four, tensors, name="ef14", min_peers=4, codec="flash3", feedback="ef14") as there:
        total = np.zeros(20_000)
        for count in range(1, 9):
            for trainer, value in zip(there, values, strict=True):
                trainer.tensors["w"][:] = value
            assert average_all(there)[0].compressor == "dense:ef14"
            assert len({trainer.tensors["w"].tobytes() for trainer in there}) == 1
            total += there[0].tensors["w"]
            if count == 1:
                once = float(np.abs(total - expected).max())
        assert float(np.abs(total / 8 - expected).max()) < once / 4, "what was left out once came later"
        kept_back = np.mean([trainer.session.feedback_state()["error/w"] for trainer in there], axis=0)
        assert np.allclose(total + kept_back, 8 * expected, atol=1e-4), "and nothing is lost"


@pytest.mark.parametrize(
    ("options", "tensors", "complaint"),
    [
        ({"compressor": ARC}, {"b": np.zeros(5000, np.float32)}, "no tensor has two dimensions"),
        ({"compressor": ArcTopK(ratio=1.5)}, zeros(0), r"ratio 1\.5"),
        ({"compressor": ArcTopK(rank=0)}, zeros(0), "rank 0"),
        ({"compressor": "ark"}, zeros(0), "did you mean 'arc'"),
        ({"compressor": ARC, "rounds": 1}, zeros(0), "use rounds auto"),
        ({"compressor": ARC, "feedback": "ef14"}, zeros(0), "the compressor has its own"),
        ({"codec": "flash4", "feedback": "ef21"}, zeros(0), "a codec has ef14"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    four: list[Peer], options: dict[str, object], tensors: dict[str, Array], complaint: str
) -> None:
    with four[0].connect() as daemon, pytest.raises(moshpit_client.InvalidInput, match=complaint):
        daemon.open_session(tensors, name="nonsense", **options)  # type: ignore[arg-type]


def test_feedback_of_other_tensors_or_of_none_is_refused_by_name(four: list[Peer]) -> None:
    with four[0].connect() as daemon:
        with daemon.open_session(zeros(0), name="a", compressor=ARC) as session:
            state = session.feedback_state()
            wrong = {**state, "mean/w": state["mean/w"][:-1]}
            with pytest.raises(moshpit_client.InvalidInput, match="mean/w"):
                session.load_feedback_state(wrong)
            with pytest.raises(moshpit_client.InvalidInput, match="own/w"):
                session.load_feedback_state({name: a for name, a in state.items() if name != "own/w"})
            with pytest.raises(moshpit_client.InvalidInput, match="nan"):
                session.load_feedback_state({**state, "mean/w": np.full_like(state["mean/w"], np.nan)})
            session.load_feedback_state(state)
        with daemon.open_session({"w": np.zeros(9, np.float32)}, name="b") as session:
            with pytest.raises(moshpit_client.PreconditionFailed, match="keeps no error feedback"):
                session.feedback_state()
            with pytest.raises(moshpit_client.PreconditionFailed, match="keeps no error feedback"):
                session.load_feedback_state(state)


def test_members_of_different_compressors_refuse_each_other_by_name(four: list[Peer]) -> None:
    ours, other = [Trainer(peer, zeros(0), name="terms", min_peers=3, compressor=ARC) for peer in four[:2]], four[2]
    try:
        odd = Trainer(other, zeros(0), name="terms", min_peers=3, compressor=ArcTopK(ratio=0.25, warmup=0))
        waiting = [trainer.average(timeout=20) for trainer in ours]
        with pytest.raises(moshpit_client.PreconditionFailed, match=r"compressor 'arc:0\.25,.* against 'arc:0\.125,"):
            odd.average(timeout=20).result(60)
        odd.close()
        assert all(not future.done() for future in waiting)
    finally:
        for trainer in ours:
            trainer.close()

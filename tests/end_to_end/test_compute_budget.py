"""Real daemons on a grid find one tau for their trainers, and what was dropped is accounted for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import moshpit_client
from moshpit_client import ComputeBudget, Receipt
from tests.end_to_end.swarm import Array, Swarm, Trainer, trainers

M = 4
QUICK = {"micro_batches": M, "warm_up": 1, "learn": 4}
"""A tau after five averagings."""
NAP_S = 0.002


def gradients(index: int) -> dict[str, Array]:
    return {"gradient": np.zeros(5000, np.float32)}


def step(trainer: Trainer, budget: ComputeBudget, normalise: str, *, naps: Sequence[int]) -> Receipt:
    """One step whose micro-batches have the gradient 1 and take so many naps; then the averaging."""
    gradient = trainer.tensors["gradient"]
    gradient[:] = 0
    with budget.step() as step:
        for nap in naps:
            if not step.proceed():
                break
            gradient += 1
            threading.Event().wait(nap * NAP_S)
    gradient /= M if normalise == "fixed" else step.completed
    return trainer.session.average(timeout=60.0, normalise=normalise)  # type: ignore[arg-type]


def test_all_daemons_of_a_grid_go_by_one_tau_and_weigh_what_was_completed() -> None:
    with (
        Swarm() as swarm,
        trainers(swarm.start(4, "--grid", "2x2"), gradients, min_peers=4) as there,
        ThreadPoolExecutor(4) as pool,
    ):
        budgets = [trainer.session.compute_budget(**QUICK) for trainer in there]  # type: ignore[arg-type]

        def average_all(slowest: int) -> list[Receipt]:
            """One of the four takes long for its later micro-batches."""
            steps = [
                pool.submit(
                    step, trainer, budget, "computed", naps=[1, 1, *([25, 25] if number == slowest else [1, 1])]
                )
                for number, (trainer, budget) in enumerate(zip(there, budgets, strict=True))
            ]
            return [each.result(90) for each in steps]

        for number in range(5):
            assert [budget.tau for budget in budgets] == [None] * 4
            receipts = average_all(slowest=number % 4)
            assert {float(trainer.tensors["gradient"][0]) for trainer in there} == {1.0}, "nothing was dropped yet"
        states = [receipt.budget for receipt in receipts]
        assert {(state.epoch, state.tables) for state in states if state} == {(5, 4)}
        assert len({state.tau_seconds for state in states if state}) == 1
        assert 2 * NAP_S <= (budgets[0].tau or 0) < 30 * NAP_S, "before the second long one begins"

        receipts = average_all(slowest=3)
        completed = [state.completed for receipt in receipts if (state := receipt.budget)]
        assert completed[3] < M
        for trainer, receipt in zip(there, receipts, strict=True):
            assert trainer.tensors["gradient"][0] == 1.0, "the mean over what was computed"
            assert receipt.weight_total == pytest.approx(sum(completed))
            assert receipt.budget is not None and receipt.budget.note == ""
            [own] = [each for each in receipt.rounds[0].members if each.peer == trainer.peer.id]
            assert own.weight == completed[there.index(trainer)]

        told = there[3].peer.cli("explain", "last").stdout
        assert f"completed {completed[3]} of 4 micro-batches, normalised as computed" in told
        assert "found from 4 peers" in told
        status = there[3].peer.cli("status").stdout
        assert "compute budget of default: tau " in status and "in force since averaging 5" in status
        assert there[3].peer.json("status")["sessions"][0]["budget"]["tau_seconds"] == budgets[3].tau


def test_members_that_normalise_otherwise_are_refused_by_name() -> None:
    with Swarm() as swarm, trainers(swarm.start(3), gradients) as there, ThreadPoolExecutor(3) as pool:
        budgets = [trainer.session.compute_budget(**QUICK) for trainer in there]  # type: ignore[arg-type]
        both = [pool.submit(step, there[n], budgets[n], "computed", naps=[1]) for n in (0, 1)]
        assert {each.result(90).outcome for each in both} == {"complete"}
        with pytest.raises(moshpit_client.PreconditionFailed, match=r"normalise 'fixed of 4.*against 'computed of 4"):
            step(there[2], budgets[2], "fixed", naps=[1])


def test_two_trainers_of_one_daemon_share_a_budget_and_count_each_for_itself() -> None:
    with Swarm() as swarm, ThreadPoolExecutor(3) as pool:
        first, second = swarm.start(2)
        with trainers([first, first, second], gradients, joining="contribute", min_peers=2) as there:
            budgets = [
                trainer.session.compute_budget(M, normalise="computed", tau=0.5 * NAP_S, warm_up=0, learn=2)
                for trainer in there
            ]
            with pytest.raises(moshpit_client.PreconditionFailed, match="another trainer of this daemon gave session"):
                there[0].session.compute_budget(M + 1, normalise="computed", tau=0.5 * NAP_S)
            steps = [
                pool.submit(step, trainer, budget, "computed", naps=naps)
                for trainer, budget, naps in zip(there, budgets, ([1] * M, [0, 0, 1, 0], [1]), strict=True)
            ]
            receipts = [each.result(90) for each in steps]
            completed = [receipt.budget.completed for receipt in receipts if receipt.budget]
            assert completed[0] == completed[2] == 1 and 1 <= completed[1] <= 3
            for receipt in receipts:
                assert receipt.weight_total == pytest.approx(sum(completed))
                weights = {member.peer: member.weight for member in receipt.rounds[0].members}
                assert weights == {first.id: completed[0] + completed[1], second.id: 1}
            assert [receipt.local.weight for receipt in receipts] == completed

"""Compute budgets on the command line: what they would be worth, how a running one is told, what the bench learns."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moshpitd.cli.compute_budget_bench import FEATURES, Problem
from moshpitd.cli.explain import sentences
from moshpitd.cli.forms import receipt as receipt_form
from moshpitd.cli.tables import budget
from moshpitd.local.v1 import daemon_pb2 as pb
from tests.cli.conftest import Moshpitd
from tests.cli.fake_daemon import OWN, receipt

BUDGET = pb.ComputeBudget(
    micro_batches=12,
    normalise=pb.NORMALISE_COMPUTED,
    tau_seconds=0.16,
    state="in force since averaging 50",
    epoch=50,
    tables=8,
    expected_speedup=1.103,
    expected_drop_rate=0.11,
    speedup=1.07,
    drop_rate=0.05,
    completed=10,
    note="1 of 8 members did not go by the newest tau yet",
)


def test_simulate_tells_what_a_budget_is_worth_to_ones_own_swarm_and_to_others(moshpitd: Moshpitd) -> None:
    done = moshpitd("simulate", "--drop-compute", "--peers", "6", "--exchange", "30ms", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["peers"], told["options"]["exchange_s"]) == (6, 0.03)
    column = {row["peers"]: row for row in told["column"]}
    assert sorted(column) == [2, 4, 6, 8, 16, 32, 64, 100, 200]
    assert column[8]["expected_speedup"] == pytest.approx(1.103, abs=0.02)
    assert column[200]["expected_speedup"] == pytest.approx(1.33, abs=0.04)
    for row in column.values():
        assert 1 < row["speedup"] < row["expected_speedup"] > 0.99 * row["best_speedup"]
    assert moshpitd("simulate", "--drop-compute", "--peers", "6", "--exchange", "30ms", "--json").stdout == done.stdout
    table = moshpitd("simulate", "--drop-compute").stdout
    assert "the rule expects" in table and "finishes the micro-batch it is in" in table


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--drop-compute --absent 0.1", "--absent says nothing to --drop-compute: it knows --exchange"),
        ("--noise 0.1", "--noise says something with --drop-compute only"),
        ("--drop-compute --exchange soon", "'soon' is no duration"),
        ("--drop-compute --micro-batch 0", "'0' is no time"),
        ("--drop-compute --micro-batches 1", "--micro-batches"),
        ("--drop-compute --peers 201", "201 is more than 200"),
    ],
)
def test_flags_that_make_no_sense_are_refused_by_name(moshpitd: Moshpitd, flags: str, complaint: str) -> None:
    done = moshpitd("simulate", *flags.split())
    assert done.returncode == 2
    assert complaint in " ".join(done.stderr.split())


def test_a_budget_is_explained_in_words_and_told_in_json() -> None:
    message = receipt(pb.OUTCOME_COMPLETE)
    message.budget.CopyFrom(BUDGET)
    told = "\n".join(sentences(message, None, OWN))
    assert "completed 10 of 12 micro-batches, normalised as computed" in told
    assert "tau 160 ms, in force since averaging 50; found from 8 peers, expected 1.103 times as fast" in told
    assert "1 of 8 members did not go by the newest tau yet." in told
    form = receipt_form(message)
    assert isinstance(form, dict) and isinstance(form["budget"], dict)
    assert (form["budget"]["tau_seconds"], form["budget"]["normalise"]) == (0.16, "computed")
    assert receipt_form(receipt(pb.OUTCOME_COMPLETE))["budget"] is None  # type: ignore[index, call-overload]
    assert (
        budget(pb.ComputeBudget(state="off: nothing is dropped"))
        == "no tau, off: nothing is dropped; 0.0% dropped here"
    )


def test_what_the_benchs_trainers_learn_can_be_learnt() -> None:
    problem, model = Problem(0), np.zeros(FEATURES)
    for step in range(300):
        model = model - 0.1 * problem.gradient(model, 0, step, 0)
    assert problem.loss(np.zeros(FEATURES)) == pytest.approx(np.log(2))
    assert problem.loss(model) < 0.55
    assert np.array_equal(problem.gradient(model, 1, 2, 3), problem.gradient(model, 1, 2, 3))

"""Whole swarms of lossy sessions in the simulator: nothing else goes wrong, or everything does."""

from __future__ import annotations

import pytest

from moshpitd.averaging.transport import Transport
from moshpitd.simulation.packet_loss import LossModel
from moshpitd.simulation.workloads import InStep, InStepOptions, Mixed, MixedOptions, Report

LOSSY = Transport("lossy")


def in_step(loss: LossModel, **chosen: object) -> Report:
    options = InStepOptions(peers=6, elements=6 * 4096, packet_loss=loss, **({"transport": LOSSY} | chosen))  # type: ignore[arg-type]
    return InStep(options).run()


@pytest.mark.parametrize("loss", [LossModel.even(0.1), LossModel.even(0.4), LossModel.bursts(0.1, length=8)])
def test_trainers_that_go_on_do_not_drift_apart_and_estimates_do_not_lean(loss: LossModel) -> None:
    report = in_step(loss, update=1.0, averagings_max=70, transport=Transport("lossy", every=1000))
    assert report.complaints == []
    assert report.looked["drift"] == 70
    assert report.looked["unbiasedness"] > 400
    assert report.outcomes["complete"] >= 415


def test_without_further_steps_all_agree_though_a_fifth_is_lost() -> None:
    report = in_step(LossModel.even(0.2), averagings_max=40)
    assert report.complaints == []
    assert report.rounds_to_agreement is not None


def test_auto_is_reliable_where_nothing_is_lost() -> None:
    report = in_step(LossModel(), transport=Transport("auto"), averagings_max=4)
    assert (report.complaints, report.spreads[-1] < 1e-9) == ([], True)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_what_may_go_wrong_goes_wrong(seed: int) -> None:
    """Seed 2: a call's time was over while jobs ran; 3: a receipt named one that never began the group."""
    report = Mixed(MixedOptions(seed=seed, peers=(16, 16), transport=LOSSY)).run()
    assert report.complaints == []

"""What the benchmarks measure with is right itself: the best split, and the records that figures are kept in."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from moshpitd.cli.packet_loss_bench import BiasOf, Figures
from moshpitd.cli.packet_loss_rounds import Net, RoundTimes
from moshpitd.simulation.lossy_figures import Bias
from tests.benchmarks import packet_loss, report
from tests.benchmarks.figures import Figure, Goal, Measured, WrongResult
from tests.benchmarks.links import best_time


@pytest.mark.parametrize("uplinks", [(1.0, 1.0, 1.0), (10.0, 10.0, 10.0, 1.0), (5.0, 3.0, 2.0), (4.0, 4.0, 1.5, 1.0)])
def test_no_split_on_a_fine_lattice_is_faster_than_the_best(uplinks: tuple[float, ...]) -> None:
    steps = 40
    n = len(uplinks)
    lattice = [each for each in product(range(steps + 1), repeat=n - 1) if sum(each) <= steps]
    found = min(
        max((1 + (n - 2) * part / steps) / rate for part, rate in zip((*some, steps - sum(some)), uplinks, strict=True))
        for some in lattice
    )
    best = best_time(uplinks, 1.0)
    assert best <= found * (1 + 1e-9)
    assert best == pytest.approx(found, rel=(n - 2) / steps)


def test_records_come_back_as_they_were_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "kept" / "results.json")
    assert report.load() == {}
    figures = (Figure("b", "fast", 2.0, "x", Goal.AT_LEAST, 1.5, "why"), Figure("b", "told", 1.0, "s"))
    kept = {"b": report.record(0.0, 0.5, quick=True, measured=Measured(figures, {"samples": [1.0]}, ("no root",)))}
    report.store(kept)
    assert report.load() == kept


def test_records_of_other_versions_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    report.store({"b": report.record(0.0, 0.5, quick=True, measured=Measured(()))})
    monkeypatch.setattr(report, "versions", lambda: {"moshpitd": "another"})
    assert report.load() == {}


def test_lossy_rounds_are_judged_beside_those_without_loss_and_beside_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [
        RoundTimes("lossy", 4, 0.0, 0, [0.1, 0.1]),
        RoundTimes("lossy", 4, 0.05, 0, [0.1, 0.11]),
        RoundTimes("lossy", 4, 0.1, 0, [0.12, 0.12]),
        RoundTimes("reliable", 4, 0.05, 0, [0.5, 0.9]),
        RoundTimes("lossy", 4, 0.0, 1000, [0.2]),
        RoundTimes("reliable", 4, 0.0, 1000, [0.1]),
    ]
    found = Figures(net=Net(cells), bias=[BiasOf("10% lost", Bias(10, 0.001, 0.001, 0.02, 0.1))])
    monkeypatch.setattr(packet_loss, "run", lambda **how: found)
    judged = {each.name: each for each in packet_loss.measure(quick=True).figures if each.unit == "x"}
    assert judged["4 MB, 10% lost: p99 by that without loss"].value == pytest.approx(1.2)
    assert judged["4 MB, 5% lost: p99, times faster than gRPC's"].reached
    assert judged["4 MB, 1000 Mbit/s: throughput by gRPC's"].reached is False
    assert judged["10% lost: the naive mean leans more"].reached


def test_an_estimate_that_leans_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Figures(bias=[BiasOf("10% lost", Bias(10, 0.02, 0.001, 0.02, 0.1))])
    monkeypatch.setattr(packet_loss, "run", lambda **how: found)
    with pytest.raises(WrongResult, match="10% lost: estimates lean by"):
        packet_loss.measure(quick=True)

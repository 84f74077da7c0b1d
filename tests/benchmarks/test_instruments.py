"""What the benchmarks measure with is right itself: the best split, and the records that figures are kept in."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.benchmarks import report
from tests.benchmarks.figures import Figure, Goal, Measured
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

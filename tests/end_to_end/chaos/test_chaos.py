"""A short storm with a fixed seed: what every commit must weather. `make chaos` runs longer ones with any seed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.end_to_end.chaos.injector import Kind, injections
from tests.end_to_end.chaos.storm import FLAT, GRID, Course, Row, weather_the_storm

SEED = 1


@pytest.mark.timeout(240)
@pytest.mark.parametrize("course", [FLAT, GRID], ids=lambda course: course.name)
def test_no_fault_makes_a_call_late_or_a_receipt_wrong(course: Course, tmp_path: Path) -> None:
    told: list[Row] = []
    storm = weather_the_storm(course, seed=SEED, seconds=50, logs=tmp_path, tell=told.append)
    assert storm.rows == told and len(told) >= 3
    assert storm.verdicts.calls == sum(storm.outcomes.values())
    assert storm.verdicts.values > 50
    if course is FLAT:
        assert storm.verdicts.unwitnessed == 0
    else:
        assert storm.verdicts.whole_swarm > 5


def test_injections_replay_from_their_seed_and_deal_every_kind() -> None:
    first, again, other = (list(itertools.islice(injections(seed, 6), 30)) for seed in (1, 1, 2))
    assert first == again != other
    faults = [fault for each in first for fault in each]
    assert {fault.kind for fault in faults[: len(Kind)]} == set(Kind)
    assert all(fault.victim not in fault.others and len(fault.others) >= 1 for fault in faults)
    assert {len(each) for each in first} == {1, 2}

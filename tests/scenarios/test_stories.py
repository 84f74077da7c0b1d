"""Every story makes its point, as it did when its trace was last read by a person, and under any hash seed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.scenarios.__main__ import GOLDEN
from tests.scenarios.stories import STORIES, Story

AGAIN = "`python -m tests.scenarios --write {0}` writes it anew; read the difference before you commit it"


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_the_story_makes_its_point_and_leaves_the_trace_that_was_read(story: Story) -> None:
    golden = (GOLDEN / f"{story.name}.txt").read_text()

    told = story.told()

    assert told.splitlines() == golden.splitlines(), f"another trace: {AGAIN.format(story.name)}"
    assert told == golden


def test_every_golden_trace_belongs_to_a_story() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(STORIES)


@pytest.mark.parametrize("hash_seed", ["1", "20001"])
def test_traces_do_not_depend_on_the_order_of_sets(hash_seed: str) -> None:
    check = subprocess.run(
        [sys.executable, "-m", "tests.scenarios", "--check"],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (check.returncode, check.stdout + check.stderr) == (0, "")

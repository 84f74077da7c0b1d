"""The judge of the container swarm, run as it runs there: a process, a directory of result files, an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

JUDGE = Path(__file__).parents[2] / "docker" / "judge.py"


def averaging(**changed: object) -> dict[str, object]:
    right = {"outcome": "complete", "weight": 1.0, "error": 5e-8, "digest": "d0", "bits": "b0", "seconds": 0.1}
    return right | changed


def judge(directory: Path, results: dict[int, dict[str, object]]) -> tuple[int, str]:
    for rank, result in results.items():
        content = {"rank": rank, "averagings": [averaging(), averaging(digest="d1", bits="b1")], "failure": ""} | result
        (directory / f"rank{rank}.json").write_text(json.dumps(content))
    environment = {"MOSHPIT_PEERS": "3", "MOSHPIT_RESULTS": str(directory), "MOSHPIT_DEADLINE_S": "0"}
    done = subprocess.run(
        [sys.executable, JUDGE], env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert not done.stderr
    return done.returncode, done.stdout


def test_three_ranks_complete_exact_and_alike_are_right(tmp_path: Path) -> None:
    code, said = judge(tmp_path, {0: {}, 1: {}, 2: {}})
    assert code == 0
    assert "right: 3 ranks" in said


@pytest.mark.parametrize(
    ("last", "complaint"),
    [
        ({"outcome": "partial"}, "rank 2, step 1: the outcome is partial, not complete"),
        ({"error": 2e-6}, "rank 2, step 1: 2.0e-06 off the exact mean, allowed 1e-06"),
        ({"error": float("nan")}, "rank 2, step 1: nan off the exact mean, allowed 1e-06"),
        ({"digest": "other"}, "step 1: the receipts' digests differ between ranks"),
        ({"bits": "other"}, "step 1: the trainers hold different bits"),
    ],
)
def test_one_wrong_averaging_of_one_rank_is_found_and_named(
    tmp_path: Path, last: dict[str, object], complaint: str
) -> None:
    wrong = averaging(**({"digest": "d1", "bits": "b1"} | last))
    code, said = judge(tmp_path, {0: {}, 1: {}, 2: {"averagings": [averaging(), wrong]}})
    assert code == 1
    assert f"wrong: {complaint}\n" in said


def test_a_trainer_whose_client_failed_is_quoted(tmp_path: Path) -> None:
    code, said = judge(tmp_path, {0: {}, 1: {}, 2: {"failure": "Unreachable: no daemon there"}})
    assert code == 1
    assert "wrong: rank 2: Unreachable: no daemon there\n" in said


def test_a_swarm_that_never_averaged_is_not_right(tmp_path: Path) -> None:
    code, said = judge(tmp_path, {rank: {"averagings": []} for rank in range(3)})
    assert code == 1
    assert "wrong: rank 0 never averaged\n" in said


def test_a_result_missing_at_the_deadline_is_told_apart(tmp_path: Path) -> None:
    code, said = judge(tmp_path, {0: {}, 2: {}})
    assert code == 5
    assert "wrong: rank 1 left no result\n" in said

"""`moshpitd bench wait-avoiding`: what it tells people and programs."""

from __future__ import annotations

import json

import pytest

from moshpitd.cli.wait_avoiding_bench import Exact, Figures, Late, Race, Spread, show
from tests.cli.conftest import Moshpitd

FIGURES = Figures(
    exact=[Exact(8, 2, 3, 10, 9, 7e-8), Exact(16, 4, 2, 10, 0, None)],
    late=Late(8, 2.0, 400, 12.0, 40.0, 60.0, {"merge": 5}, 9),
    race=[Race("tau 10", 251.0, 251.0, 5.0, 900.0, 7, {"merge": 200, "fresh": 100})],
    punctual=[Race("group", 110.0, 110.0, 9.0, 20.0, 0, {"complete": 320})],
    speedup_global=1.72,
    speedup_group=1.41,
    spread=[Spread(0.3, 0.19, 1.02, 4, {"fresh": 9})],
)


def test_figures_are_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    show(FIGURES, as_json=False)
    told = capsys.readouterr().out
    for sentence in (
        "exact mean of 8 after 3 versions in groups of 2: off by at most 7e-08 of the largest element (9 of 10 trials",
        "exact mean of 16 after 2 versions in groups of 4: not measured (0 of 10",
        "one of 8 sleeps 2 s: the calls of the others take 12 ms, p99 40 ms",
        "2 of 8 late by 320 ms, tau 10: 251 ms a version",
        "without delays, group: 110 ms",
        "against all together 1.72x, against synchronous groups 1.41x",
        "spread of 16, 30% late: 0.190, second half by first 1.02",
    ):
        assert sentence in told
    assert "busy" not in told


def test_programs_get_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    show(FIGURES, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["speedup_global"], told["race"][0]["kinds"]) == (1.72, {"merge": 200, "fresh": 100})
    assert told["exact"][1]["error_max"] is None, "what was not measured is no number, in JSON too"


def test_parts_that_do_not_exist_are_refused(moshpitd: Moshpitd) -> None:
    done = moshpitd("bench", "wait-avoiding", "--part", "race", "--part", "all")
    assert done.returncode == 2 and "'all' is not one of" in done.stderr

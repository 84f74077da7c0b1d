"""A failing test shows what its daemons said."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.end_to_end.swarm import Swarm, living

LINES_SHOWN = 60


@pytest.fixture
def swarm() -> Iterator[Swarm]:
    """An empty swarm of one test."""
    with Swarm() as mortal:
        yield mortal


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for each in list(living):
            for number, peer in enumerate(each.peers):
                shown = peer.lines[-LINES_SHOWN:]
                report.sections.append((f"daemon {number} (exit code {peer.process.poll()})", "\n".join(shown)))
    return report

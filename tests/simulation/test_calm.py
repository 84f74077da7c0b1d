"""What counts as an averaging of everybody after the storm, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moshpitd.averaging.receipt import Outcome
from moshpitd.averaging.session import Call, SessionConfig
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.swarm import Ending, Peer, Swarm, options_for
from moshpitd.simulation.workloads import UNDIALABLE, Calm

ELEMENTS = 5
Story = dict[Peer, Ending]


def met() -> tuple[Calm, Story]:
    """Four that met in one averaging, and the judge of it, who has heard nothing yet."""
    swarm = Swarm(3, config=SessionConfig(chunk_bytes=1 << 14, group_size_max=4))
    options = options_for(np.zeros(ELEMENTS, np.float32), joining="contribute")
    peers = [swarm.open(f"p{number}", options) for number in range(4)]
    swarm.run_for(1.0)
    given = {peer: np.full(ELEMENTS, number, np.float32) for number, peer in enumerate(peers)}
    endings = swarm.average({peer: (Vector.of({"w": values}), Call()) for peer, values in given.items()})
    return Calm(given, exact=True), endings


def tell(calm: Calm, story: Story, later: int = 0) -> None:
    for peer, ending in story.items():
        receipt = ending.receipt and replace(ending.receipt, epoch=ending.receipt.epoch + later)
        calm.call_ended(peer, replace(ending, receipt=receipt))


def about_one(change: Callable[[Ending], Ending]) -> Callable[[Story], Story]:
    def falsify(story: Story) -> Story:
        first, *_ = story
        return {**story, first: change(story[first])}

    return falsify


def off(ending: Ending) -> Ending:
    return replace(ending, vector=Vector.of({"w": np.full(ELEMENTS, 9, np.float32)}))


def holed(ending: Ending) -> Ending:
    rounds = tuple(replace(each, members=each.members[1:]) for each in ending.told.rounds)
    return replace(off(ending), receipt=replace(ending.told, rounds=rounds))


def undialable(ending: Ending) -> Ending:
    rounds = tuple(replace(each, why=UNDIALABLE, outcome=Outcome.ALONE) for each in ending.told.rounds)
    return replace(ending, receipt=replace(ending.told, outcome=Outcome.ALONE, rounds=rounds))


def test_two_in_a_row_in_which_everybody_met_are_two() -> None:
    calm, story = met()
    tell(calm, story)
    assert (calm.whole, calm.last, calm.wrong, calm.grid) == (1, 1, "", "4")
    tell(calm, story, later=1)
    assert (calm.whole, calm.last) == (2, 2)
    tell(calm, story, later=5)
    assert (calm.whole, calm.last) == (1, 6), "some between were not whole"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda e: replace(e, receipt=None), False),
        (lambda e: replace(e, receipt=replace(e.told, outcome=Outcome.PARTIAL, why="somebody is missing")), False),
        (lambda e: replace(e, receipt=replace(e.told, joined=True)), False),
        (lambda e: replace(e, receipt=replace(e.told, grid="2x2")), False),
        (holed, False),
        (off, True),
    ],
    ids=["failed", "partial", "joined", "under another plan", "a cell that nobody holds", "not the mean"],
)
def test_it_is_not_whole_when_one_of_them_tells_otherwise(change: Callable[[Ending], Ending], wrong: bool) -> None:
    calm, story = met()
    tell(calm, about_one(change)(story))
    assert calm.whole == 0
    assert bool(calm.wrong) == wrong


def test_who_nobody_can_dial_is_excused_only_as_long_as_it_is_so() -> None:
    calm, story = met()
    tell(calm, about_one(undialable)(story))
    assert calm.whole == 1
    first, *others = story
    tell(calm, story, later=1)
    assert calm.whole == 2
    tell(calm, {peer: story[peer] for peer in others}, later=2)
    assert calm.whole == 2 and calm.last == 3, f"{first.name} is missed again"

"""Codecs as sessions agree on them: by tensor, around earlier averages, or by what their lines carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moshpitd.averaging.cohort import WaitAvoidance
from moshpitd.averaging.errors import InvalidInput, Precondition
from moshpitd.averaging.messages import Chunk
from moshpitd.averaging.receipt import Outcome, RoundReceipt
from moshpitd.averaging.session import Call, SessionConfig, SessionOptions
from moshpitd.averaging.vector import Layout, TensorSpec, Vector
from moshpitd.simulation.checkers import Agreement, Checker, HonestReceipts
from moshpitd.simulation.history import History
from moshpitd.simulation.network import Link, Weather
from moshpitd.simulation.swarm import Ending, Peer, Swarm

Arrays = dict[str, npt.NDArray[np.floating]]
MIXED = "*.bias=float32,*=flash4+anchored"
PLAIN = "plain: {} of {} members have no last average of this axis"
ANCHORED = "anchored: differences to the last average of this axis were coded"
EVERYBODY = 99


@dataclass
class Story:
    """Trainers of one model: each goes on from what it was given, 1 % of the norm away, and averages."""

    swarm: Swarm
    codec: str
    link: Link | None = None
    weight_elements: int = 5000
    avoidance: WaitAvoidance | None = None
    min_peers: int = 1
    peers: list[Peer] = field(default_factory=list)
    checkers: tuple[Checker, ...] = field(default_factory=lambda: (Agreement(), HonestReceipts()))

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(7)
        sizes = {"weight": self.weight_elements, "bias": 77}
        self._centre: Arrays = {
            f"{block}.{kind}": self._rng.standard_normal(size) for block in range(4) for kind, size in sizes.items()
        }
        self._held: dict[Peer, Arrays] = {}
        if self.checkers:  # they know no versions
            self.swarm.observers.append(History(list(self.checkers)))

    def join(self, count: int) -> list[Peer]:
        layout = Vector.of({name: array.astype(np.float32) for name, array in self._centre.items()}).layout
        options = SessionOptions(
            layout, codec=self.codec, joining="contribute", wait_avoidance=self.avoidance, min_peers=self.min_peers
        )
        came = [self.swarm.open(f"p{len(self.peers) + n}", options, link=self.link) for n in range(count)]
        self.peers += came
        self.swarm.run_for(2.0)
        return came

    def average(self, peers: Sequence[Peer] | None = None) -> dict[Peer, Ending]:
        calls = {
            peer: (self._near(self._held.get(peer, self._centre)), Call(timeout_s=60.0))
            for peer in (self.peers if peers is None else peers)
        }
        endings = self.swarm.average(calls)
        for peer, ending in endings.items():
            if ending.vector is not None:
                self._held[peer] = {name: array.copy() for name, array in ending.vector.arrays().items()}
        assert [complaint for checker in self.checkers for complaint in checker.complaints] == []
        assert all(checker.looked for checker in self.checkers)
        return endings

    def _near(self, arrays: Arrays) -> Vector:
        moved = {name: array + 0.01 * self._rng.standard_normal(array.shape) for name, array in arrays.items()}
        return Vector.of({name: array.astype(np.float32) for name, array in moved.items()})


def story_of(
    n: int, codec: str, *, group_size_max: int = EVERYBODY, link: Link | None = None, weight_elements: int = 5000
) -> Story:
    config = SessionConfig(chunk_bytes=1 << 15, group_size_max=group_size_max)
    story = Story(Swarm(3, Weather(directory=(0.005, 0.005), stale_s=0.0), config), codec, link, weight_elements)
    story.join(n)
    return story


def rounds_of(endings: dict[Peer, Ending]) -> list[RoundReceipt]:
    return [round_ for ending in endings.values() for round_ in ending.told.rounds]


def whys(endings: dict[Peer, Ending]) -> set[str]:
    return {round_.codec_why for round_ in rounds_of(endings)}


# ---- by tensor


def test_each_tensor_travels_by_its_own_codec_and_the_receipt_says_what_that_cost() -> None:
    story = story_of(4, "*.bias=float32,*=flash8")
    endings = story.average()
    for round_ in rounds_of(endings):
        assert round_.codec == "*.bias=float32,*=flash8" and round_.codec_why == ""
        assert round_.bits_per_element == pytest.approx((5000 * 8.25 + 77 * 32) / 5077, rel=0.03)
        assert 0.004 < round_.relative_error < 0.007


def test_rules_that_mean_the_same_meet_and_others_are_told_both_spellings() -> None:
    story = story_of(2, "*.bias=float32,*=flash8")
    layout = story.peers[0].machine.options.layout
    same = story.swarm.open("same", SessionOptions(layout, codec=" *.bias = float32, * = flash8-8:128"))
    odd = story.swarm.open("odd", SessionOptions(layout, codec="*.bias=float32,*=flash4-8"))
    story.swarm.run_for(1.0)
    endings = story.average([*story.peers, same, odd])
    error = endings.pop(odd).error
    assert isinstance(error, Precondition)
    assert "codec '*.bias=float32,*=flash4-8' against '*.bias=float32,*=flash8'" in str(error)
    assert {ending.told.outcome for ending in endings.values()} == {Outcome.COMPLETE}


def test_a_tensor_without_a_codec_is_refused_when_the_session_opens() -> None:
    with pytest.raises(InvalidInput, match=r"no codec for tensor '0.weight' float32\[5000\]"):
        story_of(1, "*.bias=float32")


# ---- around earlier averages


@pytest.mark.parametrize(("n", "limit", "axes"), [(4, EVERYBODY, 1), (6, 3, 2), (8, 2, 3)])
def test_from_the_second_averaging_on_the_error_is_that_of_the_spread(n: int, limit: int, axes: int) -> None:
    story = story_of(n, MIXED, group_size_max=limit)
    first = rounds_of(story.average())
    assert len(first) == n * axes and not any(round_.codec_why == ANCHORED for round_ in first)
    assert min(round_.relative_error for round_ in first if round_.round == 0) > 0.05
    for _ in range(3):
        endings = story.average()
        assert {ending.told.outcome for ending in endings.values()} == {Outcome.COMPLETE}
        assert whys(endings) == {ANCHORED}
        # What coarse rounds left the members apart by shrinks too: a 16th of the spread each time.
    assert max(round_.relative_error for round_ in rounds_of(endings)) < 0.005


def test_who_is_new_costs_one_plain_round_and_those_who_stay_go_on_anchored() -> None:
    story = story_of(3, MIXED)
    story.average()
    assert whys(story.average()) == {ANCHORED}
    story.join(1)
    assert whys(story.average()) == {PLAIN.format(1, 4)}
    assert whys(story.average()) == {ANCHORED}


def test_who_missed_an_averaging_holds_another_and_all_are_told() -> None:
    story = story_of(4, MIXED)
    story.average()
    story.average(story.peers[:3])
    assert "plain: the members have different last averages of this axis" in whys(story.average())
    assert whys(story.average()) == {ANCHORED}


def test_survivors_of_a_partial_round_are_anchored_to_it() -> None:
    story = story_of(4, MIXED)
    story.average()
    victim = story.peers.pop()

    def kill_once(sender: Peer, receiver: Peer, chunk: Chunk) -> None:
        if victim in (sender, receiver) and victim.alive:
            story.swarm.at(story.swarm.now, lambda: story.swarm.kill(victim) if victim.alive else None)

    story.swarm.on_chunk = kill_once
    partial = story.average([*story.peers, victim])
    assert {ending.told.outcome for ending in partial.values()} == {Outcome.PARTIAL}
    assert whys(partial) == {ANCHORED} and all(round_.dropped for round_ in rounds_of(partial))
    assert whys(story.average()) == {ANCHORED}


def test_sessions_without_anchors_keep_none_and_say_nothing() -> None:
    story = story_of(3, "flash4")
    story.average()
    assert whys(story.average()) == {""}
    assert all(round_.relative_error > 0.01 for round_ in rounds_of(story.average()))


# ---- by what lines carry


def test_while_nobody_knows_a_line_auto_is_lossless_and_says_why() -> None:
    story = story_of(3, "*.bias=float16,*=auto")
    for round_ in rounds_of(story.average()):
        assert round_.codec == "*.bias=float16,*=float32"
        assert round_.codec_why == "auto: no member knows yet what its line carries"


@pytest.mark.parametrize(("up_bytes_s", "codec"), [(1e6, "flash8"), (1e5, "flash4-8"), (1e9, "float32")])
def test_from_the_second_averaging_on_auto_goes_by_what_lines_showed(up_bytes_s: float, codec: str) -> None:
    """1.6 MB of weights."""
    link = Link(up_bytes_s=up_bytes_s)
    story = story_of(4, "*.bias=float32,*=auto", link=link, weight_elements=100_000)
    assert {round_.codec for round_ in rounds_of(story.average())} == {"*.bias=float32,*=float32"}
    for _ in range(2):
        endings = story.average()
        assert {round_.codec for round_ in rounds_of(endings)} == {f"*.bias=float32,*={codec}"}
        (why,) = whys(endings)
        assert why.startswith("auto: over the slowest line, ") and "float32 takes about" in why


# ---- without waiting


@pytest.mark.parametrize(
    ("codec", "in_versions", "why"),
    [
        (MIXED, MIXED, ""),
        ("*.bias=float16,*=auto", "*.bias=float16,*=float32", "auto: no member knows yet what its line carries"),
    ],
)
def test_versions_travel_as_their_barrier_did_and_without_anchors(codec: str, in_versions: str, why: str) -> None:
    swarm = Swarm(3, Weather(directory=(0.005, 0.005), stale_s=0.0), SessionConfig(chunk_bytes=1 << 15))
    story = Story(swarm, codec, avoidance=WaitAvoidance(2, 4, False), min_peers=4, checkers=())
    story.join(4)
    story.average()
    for _ in range(3):
        story.swarm.run_for(1.0)
        endings = story.average()
        assert {ending.told.version.kind for ending in endings.values() if ending.told.version} == {"fresh"}
        assert {(round_.codec, round_.codec_why) for round_ in rounds_of(endings)} == {(in_versions, why)}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"compressor": "arc:0.2,4,ef14", "wait_avoidance": WaitAvoidance(2, 4), "min_peers": 4}, "wait-avoiding"),
        ({"compressor": "arc:0.2,4,ef14", "codec": "*.b=float32,*=flash8"}, "one codec for all"),
        ({"compressor": "arc:0.2,4,ef14", "codec": "flash4+anchored"}, "without .anchored"),
        ({"compressor": "arc:0.2,4,ef21m", "rounds": 1}, "rounds auto"),
    ],
    ids=["versions", "codecs by tensor", "anchors", "one round"],
)
def test_what_does_not_go_with_a_compressor_is_refused_by_name(options: dict[str, Any], complaint: str) -> None:
    layout = Layout.of([TensorSpec("w", (300, 128), "float32")])
    with pytest.raises(InvalidInput, match=complaint):
        SessionOptions(layout, **options).check()


def test_auto_goes_with_a_compressor() -> None:
    SessionOptions(
        Layout.of([TensorSpec("w", (300, 128), "float32")]), compressor="arc:0.2,4,ef14", codec="auto"
    ).check()

"""Sessions whose rounds may be lossy, on paper: who chooses, what is told, what is refused, who waits for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from moshpitd.averaging.cohort import WaitAvoidance
from moshpitd.averaging.errors import InvalidInput, Precondition
from moshpitd.averaging.messages import Group
from moshpitd.averaging.names import Rank
from moshpitd.averaging.receipt import Outcome, RoundReceipt
from moshpitd.averaging.session import Call, SessionConfig, SessionOptions
from moshpitd.averaging.transport import Transport
from moshpitd.averaging.vector import Layout, TensorSpec, Vector
from moshpitd.simulation.checkers import Agreement, Checker, HonestReceipts, Unbiasedness
from moshpitd.simulation.history import History
from moshpitd.simulation.packet_loss import LossModel, PacketLoss
from moshpitd.simulation.swarm import Ending, Observer, Peer, Swarm

ELEMENTS = 60_000
LAYOUT = Layout.of([TensorSpec("w", (ELEMENTS // 100, 100), "float32")])
LOSSY = Transport("lossy")
Values = npt.NDArray[np.float32]


@dataclass
class Story:
    """Peers of one session on lossy paths."""

    loss: float | LossModel = 0.0
    seed: int = 1
    size: int = 4
    swarm: Swarm = field(init=False)
    peers: list[Peer] = field(default_factory=list)
    checkers: tuple[Checker, ...] = field(default_factory=lambda: (Agreement(), HonestReceipts(), Unbiasedness()))

    def __post_init__(self) -> None:
        self.swarm = Swarm(self.seed, config=SessionConfig(chunk_bytes=1 << 14, group_size_max=self.size))
        model = self.loss if isinstance(self.loss, LossModel) else LossModel.even(self.loss)
        self.swarm.packets = PacketLoss(model, self.swarm.rng)
        self.swarm.observers.append(History(list(self.checkers)))
        self._rng = np.random.default_rng(self.seed)

    def join(self, count: int, *, joining: str = "contribute", **chosen: object) -> list[Peer]:
        chosen.setdefault("transport", LOSSY)
        options = SessionOptions(LAYOUT, joining=joining, **chosen)  # type: ignore[arg-type]
        came = [self.swarm.open(f"p{len(self.peers) + n}", options) for n in range(count)]
        self.peers += came
        self.swarm.run_for(2.0)
        return came

    def average(
        self, peers: Sequence[Peer] | None = None, weights: Sequence[float] | None = None, timeout_s: float = 60.0
    ) -> dict[Peer, Ending]:
        peers = self.peers if peers is None else list(peers)
        self.given = {peer: self._rng.standard_normal(LAYOUT.tensors[0].shape).astype(np.float32) for peer in peers}
        calls = {
            peer: (Vector.of({"w": self.given[peer]}), Call(weights[n] if weights else 1.0, timeout_s))
            for n, peer in enumerate(peers)
        }
        endings = self.swarm.average(calls)
        assert [complaint for checker in self.checkers for complaint in checker.complaints] == []
        assert self.swarm.protocol_errors == []
        return endings


def rounds(endings: dict[Peer, Ending]) -> list[RoundReceipt]:
    return [round_ for ending in endings.values() for round_ in ending.told.rounds]


def test_without_loss_all_hold_the_exact_mean() -> None:
    story = Story()
    story.join(4)
    endings = story.average()
    first, *others = [ending.values for ending in endings.values()]
    assert all(np.array_equal(first, other) for other in others)
    mean = np.mean([values.astype(np.float64).reshape(-1) for values in story.given.values()], axis=0)
    assert np.abs(first - mean).max() < 1e-6
    for round_ in rounds(endings):
        assert (round_.transport, round_.outcome, round_.digest) == ("lossy", Outcome.COMPLETE, b"")
        assert round_.transport_why.startswith("lossy as asked for")
        assert round_.lossy is not None
        assert (round_.lossy.estimator, round_.lossy.stale_elements, round_.lossy.unrepaired) == ("difference", 0, 0)
        assert {line.transport for line in round_.links} == {"udp"}


def test_what_is_lost_is_told_and_slows_nobody() -> None:
    story = Story(loss=0.1)
    story.join(4)
    took: list[float] = []
    for _ in range(6):
        endings = story.average()
        took.append(max(round_.seconds_reduce for round_ in rounds(endings)))
        for round_ in rounds(endings):
            assert round_.outcome is Outcome.COMPLETE
            assert round_.lossy is not None
            lost = sum(line.lost for line in round_.lossy.links) / sum(line.sent for line in round_.lossy.links)
            assert 0.02 < lost < 0.25
            assert round_.lossy.stale_elements > 0
            assert round_.lossy.unrepaired == 0
    assert max(took[1:]) < 0.3, "no round waits for what is lost"


def test_every_so_many_averagings_is_reliable_and_all_hold_the_same() -> None:
    story = Story(loss=0.2)
    story.join(3, transport=Transport("lossy", every=3))
    for number in range(6):
        endings = story.average()
        is_reliable = number % 3 == 2
        same = len({ending.values.tobytes() for ending in endings.values()}) == 1
        assert same == is_reliable
        for round_ in rounds(endings):
            assert (round_.lossy is None) == is_reliable
            if is_reliable:
                assert "one of every 3, as asked for" in round_.transport_why
                assert round_.digest


def test_the_loss_chooses_how_often_and_the_receipt_says_so() -> None:
    story = Story(loss=0.3)
    story.join(4)
    story.average()
    told = {round_.transport_why for round_ in rounds(story.average())}
    assert len(told) == 1
    assert "a range is missed up to" in told.pop()


def test_lines_of_a_grid_all_take_the_same_averagings_for_reliable() -> None:
    story = Story(loss=0.1, size=3)
    story.join(9, transport=Transport("lossy", every=2))
    story.average()
    endings = story.average()
    assert len({ending.values.tobytes() for ending in endings.values()}) == 1
    assert all(len(ending.told.rounds) == 2 for ending in endings.values())


def test_datagrams_that_reach_nobody_cost_one_slow_round_and_no_hang() -> None:
    story = Story()
    story.join(3)
    story.swarm.no_datagrams = {frozenset((a.id, b.id)) for a in story.peers for b in story.peers if a is not b}
    endings = story.average()
    assert len({ending.values.tobytes() for ending in endings.values()}) == 1
    for round_ in rounds(endings):
        assert round_.outcome is Outcome.COMPLETE
        assert round_.lossy is not None
        assert all(line.blocked for line in round_.lossy.links)
        assert "udp" not in {line.transport for line in round_.links}
        assert round_.seconds_reduce < 10
    for round_ in rounds(story.average()):
        assert round_.lossy is None
        assert round_.transport_why.startswith("reliable: no datagram passes between 3 of 3 pairs of members")
    story.swarm.no_datagrams.clear()
    story.swarm.run_for(700.0)
    assert all(round_.lossy for round_ in rounds(story.average())), "after some minutes it is tried again"


def test_one_member_behind_a_firewall_does_not_make_the_others_reliable() -> None:
    story = Story(loss=0.05)
    story.join(4)
    outside = story.peers[0]
    story.swarm.no_datagrams = {frozenset((outside.id, peer.id)) for peer in story.peers[1:]}
    for _ in range(3):
        endings = story.average()
        for peer, ending in endings.items():
            for round_ in ending.told.rounds:
                assert round_.outcome is Outcome.COMPLETE, round_.why
                assert round_.lossy is not None
                blocked = {line.peer for line in round_.lossy.links if line.blocked}
                assert blocked == ({p.id for p in story.peers[1:]} if peer is outside else {outside.id})


def test_auto_measures_and_then_takes_what_is_faster() -> None:
    for loss, is_lossy, why in ((0.0, False, "which slows nobody"), (0.05, True, "would be waited for")):
        story = Story(loss=loss)
        story.join(3, transport=Transport("auto"))
        first, second = rounds(story.average()), rounds(story.average())
        assert all(round_.lossy and "to measure the paths" in round_.transport_why for round_ in first)
        for round_ in second:
            assert (round_.lossy is not None) == is_lossy
            assert why in round_.transport_why, round_.transport_why
            assert "of the packets are lost on the worst path" in round_.transport_why


def test_a_newcomer_gets_all_of_the_mean() -> None:
    """What it would keep of its own is worth nothing."""
    story = Story(loss=0.2, size=8)
    story.join(3)
    story.average()
    (newcomer,) = story.join(1, joining="receive")
    for _ in range(4):
        endings = story.average()
        met = [round_ for round_ in endings[newcomer].told.rounds if round_.outcome is not Outcome.ALONE]
        if met:
            break
    assert endings[newcomer].told.joined
    assert [round_.lossy.stale_elements for round_ in met if round_.lossy] == [0]
    assert any(round_.lossy and round_.lossy.stale_elements for round_ in rounds(endings)), "others take the loss"


def test_where_weights_differ_the_averages_are_not_lost_and_the_receipt_says_why() -> None:
    story = Story(loss=0.2)
    story.join(3)
    endings = story.average(weights=[1.0, 2.0, 5.0])
    assert len({ending.values.tobytes() for ending in endings.values()}) == 1
    for round_ in rounds(endings):
        assert round_.lossy is not None
        assert "because the members' weights differ" in round_.transport_why


def test_a_sketch_is_reliable_by_itself_and_the_rows_are_not() -> None:
    story = Story(loss=0.1)
    story.checkers = ()
    story.swarm.observers.clear()
    story.join(4, compressor="arc:0.25,4,ef14,1,0")
    for _ in range(3):
        endings = story.average()
    stages = {(round_.stage, round_.lossy is not None) for round_ in rounds(endings)}
    assert stages == {("sketch", False), ("rows", True)}
    why = next(round_.transport_why for round_ in rounds(endings) if round_.stage == "sketch")
    assert why == "reliable: the sketch must arrive whole"


def test_one_that_dies_is_told_and_costs_no_more_than_patience() -> None:
    story = Story(loss=0.1)
    story.join(4)
    story.average()
    victim, *others = story.peers
    story.swarm.at(story.swarm.now + 0.05, lambda: story.swarm.kill(victim))
    endings = story.average()
    for other in others:
        assert endings[other].told.outcome in (Outcome.PARTIAL, Outcome.COMPLETE)
    for round_ in rounds({peer: story.average(others)[peer] for peer in others}):
        assert round_.outcome is Outcome.COMPLETE


def test_one_that_stands_still_in_its_round_is_waited_for_no_longer_than_rounds_taught() -> None:
    story = Story(loss=0.05)
    story.join(4)
    for _ in range(8):
        story.average()
    sleeper, *others = story.peers
    story.swarm.observers.append(Sleepy(story.swarm, sleeper))
    story.swarm.at(story.swarm.now + 20.0, lambda: story.swarm.resume(sleeper))
    endings = story.average()
    for other in others:
        told = endings[other].told
        assert (told.outcome, told.seconds_reduce < 5.0) == (Outcome.PARTIAL, True)
        assert f"{sleeper.id[:8]} nothing of its values came in time" in told.why
    assert not any(round_.transport_why.startswith("reliable: no datagram") for round_ in rounds(story.average()))


class Sleepy(Observer):
    """Stands still as soon as its group begins, once."""

    def __init__(self, swarm: Swarm, peer: Peer) -> None:
        self._swarm, self._peer = swarm, peer
        self._slept = False

    def group_began(self, peer: Peer, group: Group, rank: Rank, values: Vector, now: float) -> None:
        if peer is self._peer and not self._slept:
            self._slept = True
            self._swarm.at(now, lambda: self._swarm.pause(peer))


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({"transport": Transport("udp")}, "transport 'udp': give reliable, lossy or auto"),
        ({"transport": Transport("reliable", every=4)}, "all its averagings are"),
        ({"transport": Transport("lossy", every=-1)}, "must be auto"),
        ({"codec": "flash4+anchored"}, "use the codec without [+]anchored"),
        ({"codec": "*.bias=float32,*=flash8"}, "one codec for all tensors"),
        ({"compressor": "arc:0.2,4,ef21m,0.1,0"}, "ef21m goes on from a mean that all hold alike.*use ef14"),
        ({"compressor": "dense:ef14", "codec": "flash8"}, "ef14 sends again what the codec left out"),
        ({"wait_avoidance": WaitAvoidance(2, 4), "min_peers": 2}, "in a wait-avoiding session"),
    ],
)
def test_what_does_not_go_with_loss_is_refused_by_name(chosen: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        SessionOptions(LAYOUT, **({"transport": LOSSY} | chosen)).check()  # type: ignore[arg-type]


def test_one_that_averages_reliably_is_told_that_the_others_do_not() -> None:
    story = Story()
    story.join(2)
    (odd,) = story.join(1, transport=Transport())
    with pytest.raises(Precondition, match="transport 'reliable' against 'lossy'"):
        error = story.average([odd], timeout_s=5.0)[odd].error
        assert error is not None
        raise error

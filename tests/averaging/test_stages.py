"""A session drives its compressor on paper: stages, what they have in common, what is left of them when trainers go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from moshpitd.averaging.errors import InvalidInput, Precondition
from moshpitd.averaging.receipt import Outcome
from moshpitd.averaging.session import Call, SessionConfig, SessionOptions
from moshpitd.averaging.vector import Layout, TensorSpec, Vector
from moshpitd.simulation.network import Link, Weather
from moshpitd.simulation.swarm import Array, Ending, Peer, Swarm, options_for

SHAPE = (64, 128)
ARC = "arc:0.25,4,ef21m,1,0"
EF14 = "arc:0.25,4,ef14,1,0"


def swarm_of(n: int, compressor: str, *, pin: str = "", codec: str = "float32", link: Link | None = None) -> Swarm:
    weather = Weather(directory=(0.005, 0.005), stale_s=0.0)
    swarm = Swarm(1, weather, SessionConfig(chunk_bytes=1 << 14, group_size_max=4, pin=pin), keep_messages=True)
    options = options_for(np.zeros(SHAPE, np.float32), compressor=compressor, codec=codec)
    for number in range(n):
        swarm.open(f"p{number}", options, link=link)
    swarm.run_for(1.0)
    return swarm


def peers_of(swarm: Swarm) -> list[Peer]:
    return list(swarm.peers.values())


def average(
    swarm: Swarm, given: Sequence[Array], weights: Sequence[float] | None = None, *, first: Peer | None = None
) -> list[Ending]:
    """`first`: one that nobody expects, and so must not come late."""
    calls = [
        (peer, Vector.of({"w": values}), Call(weight=weights[i] if weights else 1.0, timeout_s=20.0))
        for i, (peer, values) in enumerate(zip(swarm.living(), given, strict=True))
    ]
    for peer, vector, call in sorted(calls, key=lambda one: one[0] is not first):
        swarm.start(peer, vector, call)
        if peer is first:
            swarm.run_until(lambda: first.machine.status(swarm.now).state == "matching")
        swarm.run_for(0.1 if peer is first else 0.001)
    swarm.run_until(lambda: not any(peer.busy for peer, _, _ in calls))
    return [peer.endings[-1] for peer, _, _ in calls]


def draw(seed: int, n: int) -> list[Array]:
    size = np.random.default_rng(seed).permutation(64)[:, None] + 1.0
    return [(np.random.default_rng([seed, i]).normal(size=SHAPE) / size).astype(np.float32) for i in range(n)]


@pytest.mark.parametrize(("pin", "peers"), [("", 4), ("2x2", 4), ("2x2", 5), ("2x2x2", 8), ("2x2x2", 9)])
def test_all_hold_the_same_after_every_averaging_on_any_grid(pin: str, peers: int) -> None:
    swarm = swarm_of(peers, ARC, pin=pin)
    for k in range(4):
        endings = average(swarm, draw(k, peers))
        assert {ending.told.outcome for ending in endings} == {Outcome.COMPLETE}
        assert len({ending.values.tobytes() for ending in endings}) == 1
        stages = [each.stage for each in endings[0].told.rounds]
        assert stages[-1] == ("rows" if k else "dense")
        assert [each.round // (len(stages) // 2) for each in endings[0].told.rounds][-1] == (1 if k else 2)


@pytest.mark.parametrize("compressor", [ARC, "arc:0.25,4,ef14,1,5", "dense:ef14", "dense"])
def test_results_go_to_the_spares_and_the_trainers_own_values_stay(compressor: str) -> None:
    swarm = swarm_of(4, compressor, pin="2x2")
    layout = Layout.of([TensorSpec("w", SHAPE, "float32")])
    for k in range(3):
        given = draw(k, 4)
        vectors = [Vector.of({"w": values}) for values in given]
        spares = [[Vector.empty(layout), Vector.empty(layout)] for _ in range(4)]
        for peer, vector, two in zip(peers_of(swarm), vectors, spares, strict=True):
            swarm.start(peer, vector, Call(timeout_s=20.0), spares=two)
        swarm.run_until(lambda k=k: all(len(peer.endings) > k for peer in peers_of(swarm)))  # type: ignore[misc]
        for peer, two in zip(peers_of(swarm), spares, strict=True):
            result = peer.endings[-1].vector
            assert any(result is spare for spare in two), (
                "else it would have to be streamed to a trainer that shares memory"
            )
        assert all(np.array_equal(vector.arrays()["w"], g) for vector, g in zip(vectors, given, strict=True))


@pytest.mark.parametrize("compressor", ["dense:ef14", EF14])
@pytest.mark.parametrize("pin", ["", "2x2"])
def test_what_came_out_and_what_is_kept_back_is_all_that_was_put_in(compressor: str, pin: str) -> None:
    swarm = swarm_of(4, compressor, pin=pin, codec="flash4")
    weights = [1.0, 2.0, 0.5, 3.0]
    put_in, came_out = np.zeros(SHAPE), np.zeros(SHAPE)
    for k in range(4):
        given = draw(k, 4)
        put_in += np.average(given, axis=0, weights=weights)
        came_out += np.average([e.values.reshape(SHAPE) for e in average(swarm, given, weights)], axis=0)
    kept_back = [peer.machine.save_feedback().arrays()["error/w"].reshape(SHAPE) for peer in peers_of(swarm)]
    assert np.abs(kept_back).max() > 1e-3
    assert np.allclose(came_out + np.average(kept_back, axis=0, weights=weights), put_in, atol=1e-3)


def notes(endings: Sequence[Ending]) -> set[tuple[str, ...]]:
    return {ending.told.notes for ending in endings}


def test_a_newcomer_and_another_weight_each_cost_one_dense_averaging() -> None:
    swarm = swarm_of(3, ARC)
    average(swarm, draw(0, 3))
    assert notes(average(swarm, draw(1, 3))) == {()}
    swarm.run_for(2.0)
    new = swarm.open("new", options_for(np.zeros(SHAPE, np.float32), compressor=ARC))
    swarm.run_for(1.0)
    joining = average(swarm, draw(2, 4), first=new)
    swarm.run_for(2.0)
    assert notes(joining) == {("sent dense: membership changed",)}
    assert joining[-1].told.joined
    # It gave weight 0 in that one: from the next on it counts as much as the others, which is another change.
    assert notes(average(swarm, draw(3, 4), first=new)) == {
        ("sent dense: somebody's sketch or weight does not fit the last averaging's",)
    }
    assert notes(average(swarm, draw(4, 4), first=new)) == {()}
    assert len(notes(average(swarm, draw(5, 4), [1.0, 1.0, 2.0, 1.0], first=new))) == 1
    assert notes(average(swarm, draw(6, 4), [1.0, 1.0, 2.0, 1.0], first=new)) == {()}


def test_saved_feedback_goes_on_in_another_session_as_if_nothing_had_been() -> None:
    swarm, twin = (swarm_of(3, ARC) for _ in range(2))
    for k in range(3):
        average(swarm, draw(k, 3))
        average(twin, draw(k, 3))
    first, *others = peers_of(swarm)
    state = first.machine.save_feedback()
    swarm.kill(first)
    swarm.run_for(2.0)
    back = swarm.open(first.name, options_for(np.zeros(SHAPE, np.float32), compressor=ARC))
    back.machine.count_on_from(back.machine.load_feedback(state), swarm.now)
    swarm.run_for(1.0)
    average(swarm, draw(3, 3), first=back)
    expected = average(twin, draw(3, 3))
    for peer in (back, *others):
        ending = peer.endings[-1]
        assert (ending.told.outcome, ending.told.notes, ending.told.joined) == (Outcome.COMPLETE, (), False)
        assert np.array_equal(ending.values, expected[0].values)


def test_feedback_stays_still_while_it_is_saved_and_fits_or_is_refused() -> None:
    swarm = swarm_of(2, ARC)
    peer, other = peers_of(swarm)
    average(swarm, draw(0, 2))
    swarm.start(peer, Vector.of({"w": draw(1, 1)[0]}), Call(timeout_s=5.0))
    with pytest.raises(Precondition, match="under way"):
        peer.machine.save_feedback()
    swarm.run_until(lambda: not peer.busy)
    state = peer.machine.save_feedback().arrays()
    before = other.machine.save_feedback().buffer.copy()
    for wrong, complaint in (
        ({**state, "own/w": state["own/w"][:-1]}, "own/w"),
        ({name: array for name, array in state.items() if name != "bond"}, "bond"),
        ({**state, "bond": np.full_like(state["bond"], 0.5)}, "bond"),
        ({**state, "averagings": np.array([0.0, -1.0])}, "averagings"),
    ):
        with pytest.raises(InvalidInput, match=complaint):
            other.machine.load_feedback(Vector.of(wrong))
        assert np.array_equal(other.machine.save_feedback().buffer, before)
    with pytest.raises(Precondition, match="keeps no error feedback"):
        peers_of(swarm_of(1, "dense"))[0].machine.save_feedback()


def waits_after(peer: Peer, ended: int, commits: int) -> bool:
    """For its next group, with so many commits behind it."""
    committed = sum("-> committed" in line for line in peer.log[ended:])
    return committed == commits and peer.machine.status(0.0).state == "matching"


@pytest.mark.parametrize(("commits", "is_settled"), [(1, False), (3, True)], ids=["in the sketch", "in the rows"])
def test_a_trainer_that_dies_after_its_rows_went_out_has_not_kept_them_back_too(commits: int, is_settled: bool) -> None:
    """Else they would be sent twice. One that dies before has sent nothing, and all is as it was."""
    swarm = swarm_of(4, EF14, pin="2x2")
    average(swarm, draw(0, 4))  # all is sent: the scale is not known yet
    average(swarm, draw(1, 4))
    peer = peers_of(swarm)[0]
    before = peer.machine.save_feedback().arrays()["error/w"].copy()
    given = draw(2, 4)
    for each, values in zip(peers_of(swarm), given, strict=True):
        swarm.start(each, Vector.of({"w": values}), Call(timeout_s=5.0))
    swarm.run_until(partial(waits_after, peer, len(peer.log), commits))
    swarm.abandon(peer)
    swarm.run_until(lambda: not any(each.busy for each in peers_of(swarm)))
    after = peer.machine.save_feedback().arrays()["error/w"]
    if is_settled:
        kept = np.isclose(after, before + given[0].reshape(-1), atol=1e-6).reshape(SHAPE).all(axis=1)
        gone = ~after.reshape(SHAPE).any(axis=1)
        assert (kept | gone).all()
        assert gone.sum() == SHAPE[0] // 4
    else:
        assert np.array_equal(after, before)


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ({"compressor": "arc", "rounds": 1}, "use rounds auto"),
        ({"compressor": "arc:2"}, "ratio 2"),
        ({"compressor": "arcs"}, "did you mean 'arc'"),
        ({"compressor": "arc", "layout": Layout.of([TensorSpec("w", (9000,), "float32")])}, "two dimensions"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(chosen: dict[str, object], complaint: str) -> None:
    options = SessionOptions(Layout.of([TensorSpec("w", SHAPE, "float32")]))
    with pytest.raises(InvalidInput, match=complaint):
        replace(options, **chosen).check()  # type: ignore[arg-type]

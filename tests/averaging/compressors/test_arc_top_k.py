"""ARC-Top-K against its paper's recurrences, figures and promises, every stage through the real reduction."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from moshpitd.averaging.compressors import Arrays, Stage, check_compressor, compressor_named
from moshpitd.averaging.compressors.arc_top_k import ArcOptions, ArcTopK, choose_rows, directions, squared_norms
from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.vector import Layout, TensorSpec, Vector
from tests.averaging.compressors.grid_on_paper import Grid, matrix, until_a_stage, vectors

EF14 = ArcOptions(feedback="ef14", eta=1.0, warmup=0)
EF21M = ArcOptions(warmup=0)


def swarm(peers: int, options: ArcOptions, values: list[Vector], *, row: int = 128) -> list[ArcTopK]:
    return [ArcTopK(values[0].layout, options, row=row, small=1) for _ in range(peers)]


def tuned(grid: Grid, arcs: list[ArcTopK], shape: tuple[int, ...], size: float = 1.0) -> None:
    """One averaging in which they learn the scale of the sketch, and EF14 leaves nothing behind."""
    rng = np.random.default_rng(99)
    grid.average(arcs, vectors(size * rng.standard_normal((grid.peers, *shape))), k=0)
    assert all("dense" in note for notes in grid.notes for note in notes)


def residual(chosen: np.ndarray, mean: np.ndarray) -> float:
    return float(((chosen - mean) ** 2).sum() / (mean**2).sum())


def largest_rows(norms: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-norms, kind="stable")[:count]


# ---- what comes out


def test_the_result_is_the_mean_of_the_rows_that_all_chose() -> None:
    """mean_i C_i = C(mean), and nothing elsewhere."""
    rng = np.random.default_rng(1)
    values = vectors(rng.standard_normal((6, 256, 128)))
    grid = Grid((2, 3), 6)
    arcs = swarm(6, EF14, values)
    tuned(grid, arcs, (256, 128))
    results = [matrix(result) for result in grid.average(arcs, values, k=1)]
    mean = np.mean([matrix(value) for value in values], axis=0)
    rows = np.flatnonzero(results[0].any(axis=1))
    assert len(rows) == math.ceil(0.2 * 256)
    assert np.abs(results[0][rows] - mean[rows]).max() < 1e-6
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("sides", "peers", "rounds"), [((3,), 3, 400), ((2, 2), 5, 300), ((2, 2, 2), 9, 200), ((2, 2), 13, 100)]
)
def test_a_thousand_random_rounds_choose_the_same_rows_everywhere(
    sides: tuple[int, ...], peers: int, rounds: int
) -> None:
    """Any weights, doubled and tripled cells, sizes that wander over ten orders of magnitude."""
    rng = np.random.default_rng(peers)
    layout = vectors(np.zeros((1, 24, 8)))[0].layout
    arcs = [ArcTopK(layout, ArcOptions(0.2, 2, "ef14", 1.0, 0), row=8, small=1) for _ in range(peers)]
    grid, agreements, denied = Grid(sides, peers), set(), 0
    weights = [float(weight) for weight in rng.uniform(0.1, 10, peers)]

    def alike(stages: list[Stage]) -> None:
        if stages[0].name == "rows":
            assert len({stage.agreement for stage in stages}) == 1
            agreements.add(stages[0].agreement)

    grid.tamper = alike
    size = 1.0
    for k in range(rounds):
        size = float(np.clip(size * math.exp(rng.normal()), 1e-5, 1e5))
        grid.average(arcs, vectors(size * rng.standard_normal((peers, 24, 8))), k, weights, seed=k)
        denied += any(grid.notes[0])
    assert len(agreements) > 0.9 * rounds
    assert denied == 1  # the first one, for want of a scale


def test_all_rows_without_momentum_are_the_dense_average() -> None:
    rng = np.random.default_rng(3)
    grid = Grid((2, 2), 5)
    options = ArcOptions(ratio=1.0, eta=1.0, warmup=0)
    arcs = swarm(5, options, vectors(np.zeros((1, 60, 128))))
    weights = [1.0, 2.0, 0.5, 1.0, 3.0]
    for k in range(4):
        given = rng.standard_normal((5, 60, 128))
        results = grid.average(arcs, vectors(given), k, weights)
        expected = np.average(given, axis=0, weights=weights)
        assert max(np.abs(matrix(result) - expected).max() for result in results) < 1e-5
    assert grid.notes == [[]] * 5


def test_small_tensors_go_dense_beside_the_rows_and_every_dtype_keeps_its_own() -> None:
    rng = np.random.default_rng(4)
    shapes = {"a": (70, 30), "b": (300,), "c": (33, 40), "d": (1, 1), "e": (2000,)}
    dtypes = dict(zip(shapes, (np.float32, np.float32, np.float64, np.float16, np.float64), strict=True))
    given = [{n: rng.standard_normal(s).astype(dtypes[n]) for n, s in shapes.items()} for _ in range(4)]
    values = [Vector.of(arrays) for arrays in given]
    grid = Grid((2, 2), 4)
    arcs = [ArcTopK(values[0].layout, EF14) for _ in range(4)]
    for k in range(2):
        result = grid.average(arcs, values, k)[2].arrays()
        for name in ("b", "d", "e"):
            expected = np.mean([arrays[name].astype(np.float64) for arrays in given], axis=0)
            assert result[name].dtype == dtypes[name]
            assert np.abs(result[name] - expected).max() < 2e-3
    rows = sum(-(-math.prod(shapes[name]) // 128) for name in ("a", "c"))
    whole = np.concatenate([np.pad(result[n].ravel(), (0, -result[n].size % 128)).reshape(-1, 128) for n in ("a", "c")])
    assert np.count_nonzero(whole.any(axis=1)) == math.ceil(0.2 * rows)


# ---- what goes over the wire


def test_the_second_stage_costs_its_rows_and_nothing_else() -> None:
    """4 K m bytes, times the 2 (n-1)/n each way of the transport, summed over the members; no index is sent."""
    peers, n = 4, 256
    values = vectors(np.random.default_rng(5).standard_normal((peers, n, 128)))
    grid = Grid((peers,), peers)
    arcs = swarm(peers, EF14, values)
    tuned(grid, arcs, (n, 128))
    grid.bytes_by_stage.clear()
    grid.average(arcs, values, k=1)
    factor = 2 * (peers - 1)
    assert grid.bytes_by_stage["rows"] == 4 * math.ceil(0.2 * n) * 128 * factor
    words = grid.bytes_by_stage["sketch"] // factor - 8 * n * 4
    assert 0 < words < 200
    assert {spec.dtype for stage in grid.stages for spec in stage.values.layout.tensors} <= {"float32", "float64"}


# ---- the figures of the paper's kind


def figures(make: Callable[[np.random.Generator], np.ndarray], options: ArcOptions, seeds: int) -> tuple[float, ...]:
    """Residuals of (ARC, exact top rows of the mean, random rows, each peer's own top rows), by seed on average."""
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        peers = make(rng)
        values, n = vectors(peers), peers.shape[1]
        count = math.ceil(options.ratio * n)
        grid = Grid((8,), 8)
        arcs = swarm(8, options, values)
        tuned(grid, arcs, peers.shape[1:], float(np.abs(peers).max()))
        arc = matrix(grid.average(arcs, values, k=1, seed=seed)[0])
        mean = peers.mean(axis=0)
        local = np.zeros_like(mean)
        for own in peers:
            rows = largest_rows((own**2).sum(axis=1), count)
            local[rows] += own[rows] / 8
        exact, at_random = np.zeros_like(mean), np.zeros_like(mean)
        rows = largest_rows((mean**2).sum(axis=1), count)
        exact[rows] = mean[rows]
        rows = rng.permutation(n)[:count]
        at_random[rows] = mean[rows]
        found.append([residual(result, mean) for result in (arc, exact, at_random, local)])
    return tuple(float(figure) for figure in np.mean(found, axis=0))


@pytest.mark.parametrize(("rank", "expected"), [(1, 0.134), (4, 0.049)])
def test_power_law_rows(rank: int, expected: float) -> None:
    """Row j of 256 has a norm that falls like 1/j: then the exact top 13 leave .043 and random ones .95, as they
    should; the peers differ by a tenth. Averaged over 60 draws."""

    def make(rng: np.random.Generator) -> np.ndarray:
        norms = (1 / np.arange(1, 257))[:, None] / np.sqrt(128)
        return norms * (rng.standard_normal((256, 128)) + 0.1 * rng.standard_normal((8, 256, 128)))

    arc, exact, at_random, _ = figures(make, ArcOptions(0.05, rank, "ef14", 1.0, 0), 60)
    assert arc == pytest.approx(expected, rel=0.1)
    assert exact == pytest.approx(0.043, rel=0.1)
    assert at_random == pytest.approx(0.95, rel=0.1)


def test_peers_that_cancel_each_other() -> None:
    """Forty rows in which all agree hold all but .0001 of the mean; in the others each peer has ten times larger
    values, which its neighbour has with the other sign. Every peer's own top rows are those."""

    def make(rng: np.random.Generator) -> np.ndarray:
        mean = rng.standard_normal((256, 128)) / np.sqrt(128)
        mean[40:] *= np.sqrt(1e-4 * 40 / 216)
        noise = 10 * rng.standard_normal((4, 216, 128)) / np.sqrt(128)
        peers = np.repeat(mean[None], 8, axis=0)
        peers[0::2, 40:] += noise
        peers[1::2, 40:] -= noise
        return peers

    arc, _, _, local = figures(make, ArcOptions(0.2, 4, "ef14", 1.0, 0), 20)
    assert arc == pytest.approx(1e-4, rel=0.1)
    assert local == pytest.approx(1.02, rel=0.1)


# ---- error feedback


@pytest.mark.parametrize("sides", [(5,), (2, 2)])
def test_ef21m_is_the_recurrence_of_the_paper(sides: tuple[int, ...]) -> None:
    """Twenty steps beside a plain one in float64, told only which rows were chosen; g = mean g_i throughout."""
    rng = np.random.default_rng(6)
    grid = Grid(sides, 5)
    weights = [1.0, 2.0, 1.0, 0.5, 1.5]
    arcs = swarm(5, EF21M, vectors(np.zeros((1, 64, 128))))
    h = own = g = np.zeros((5, 64, 128))
    previous = np.zeros((64, 128))
    for k in range(20):
        given = rng.standard_normal((5, 64, 128)).astype(np.float32)
        results = [matrix(result) for result in grid.average(arcs, vectors(given), k, weights)]
        assert all(np.array_equal(result, results[0]) for result in results)
        if k == 0:
            h = own = given.astype(np.float64)
            g = np.average(own, axis=0, weights=weights)
        else:
            h = 0.9 * h + 0.1 * given
            rows = np.flatnonzero((results[0] != previous).any(axis=1))
            assert len(rows) == math.ceil(0.2 * 64)
            sent = np.zeros_like(h)
            sent[:, rows] = (h - own)[:, rows]
            own, g = own + sent, g + np.average(sent, axis=0, weights=weights)
        assert np.abs(results[0] - g).max() < 1e-5
        assert_g_is_the_mean(arcs, weights)
        previous = results[0]
    assert grid.notes == [[]] * 5


def assert_g_is_the_mean(arcs: list[ArcTopK], weights: list[float]) -> None:
    states = [arc.save() for arc in arcs]
    mean = np.average([state["own/w"] for state in states], axis=0, weights=weights)
    assert max(np.abs(state["mean/w"] - mean).max() for state in states) < 1e-5


def test_ef14_sends_later_what_it_did_not_send() -> None:
    """What came out and what is still kept back are, weighted, all that ever went in."""
    rng = np.random.default_rng(7)
    grid = Grid((2, 2), 4)
    weights = [1.0, 2.0, 1.0, 4.0]
    arcs = swarm(4, EF14, vectors(np.zeros((1, 40, 128))))
    put_in, came_out = np.zeros((40, 128)), np.zeros((40, 128))
    for k in range(15):
        given = rng.standard_normal((4, 40, 128))
        put_in += np.average(given, axis=0, weights=weights)
        came_out += matrix(grid.average(arcs, vectors(given), k, weights)[0])
    kept_back = np.average([arc.save()["error/w"].reshape(40, 128) for arc in arcs], axis=0, weights=weights)
    assert np.abs(put_in - came_out - kept_back).max() < 1e-4
    assert np.abs(kept_back).max() > 1


@pytest.mark.parametrize("options", [EF14, EF21M], ids=["ef14", "ef21m"])
def test_rows_under_a_lossy_codec_keep_their_books(options: ArcOptions) -> None:
    """What bfloat16 drops of the rows counts as not sent."""
    rng = np.random.default_rng(19)
    grid = Grid((4,), 4, codec="bfloat16")
    weights = [1.0, 2.0, 1.0, 4.0]
    arcs = swarm(4, options, vectors(np.zeros((1, 64, 128))))
    put_in, came_out = np.zeros((64, 128)), np.zeros((64, 128))
    for k in range(10):
        given = rng.standard_normal((4, 64, 128)).astype(np.float32)
        put_in += np.average(given.astype(np.float64), axis=0, weights=weights)
        came_out += matrix(grid.average(arcs, vectors(given), k, weights)[0])
        if options is EF21M:
            assert_g_is_the_mean(arcs, weights)
        else:
            kept_back = [arc.save()["error/w"].reshape(64, 128) for arc in arcs]
            assert np.abs(put_in - came_out - np.average(kept_back, axis=0, weights=weights)).max() < 1e-4
    assert grid.stages[-1].name == "rows"


def test_a_newcomer_breaks_ef21m_and_one_dense_stage_repairs_it() -> None:
    rng = np.random.default_rng(8)

    def step(peers: list[ArcTopK], k: int, weights: list[float] | None = None) -> list[str]:
        grid = Grid((len(peers),), len(peers))
        grid.average(peers, vectors(rng.standard_normal((len(peers), 32, 128))), k, weights)
        assert all(notes == grid.notes[0] for notes in grid.notes)
        assert_g_is_the_mean(peers, weights or [1.0] * len(peers))
        return grid.notes[0]

    arcs = swarm(4, EF21M, vectors(np.zeros((1, 32, 128))))
    assert step(arcs, 0)
    assert [step(arcs, k) for k in (1, 2)] == [[], []]
    newcomer = swarm(1, EF21M, vectors(np.zeros((1, 32, 128))))
    assert "membership" in step(arcs + newcomer, 3)[0]
    assert step(arcs + newcomer, 4) == []
    assert "membership" in step(arcs, 5)[0]  # it left
    assert step(arcs, 6) == []
    assert "weight" in step(arcs, 7, [1.0, 1.0, 2.0, 1.0])[0]
    assert step(arcs, 8, [1.0, 1.0, 2.0, 1.0]) == []
    assert (
        "same averaging" in step([*arcs[:3], *newcomer], 9, [1.0, 1.0, 2.0, 1.0])[0]
    )  # one for one: the count is equal


def test_g_would_not_be_the_mean_without_that_stage() -> None:
    """The negative control: a peer's state is replaced behind everybody's back."""
    grid, arcs = Grid((3,), 3), swarm(3, EF21M, vectors(np.zeros((1, 32, 128))))
    rng = np.random.default_rng(9)
    for k in range(2):
        grid.average(arcs, vectors(rng.standard_normal((3, 32, 128))), k)
    state = arcs[1].save()
    arcs[1].load(state | {"own/w": state["own/w"] + 1})
    grid.average(arcs, vectors(rng.standard_normal((3, 32, 128))), 2)
    assert grid.notes == [[]] * 3
    with pytest.raises(AssertionError):
        assert_g_is_the_mean(arcs, [1.0] * 3)


def test_under_ef14_a_newcomer_disturbs_nobody() -> None:
    rng = np.random.default_rng(10)
    grid, arcs = Grid((4,), 4), swarm(4, EF14, vectors(np.zeros((1, 32, 128))))
    tuned(grid, arcs, (32, 128))
    arcs[2] = swarm(1, EF14, vectors(np.zeros((1, 32, 128))))[0]
    for k in (1, 2):
        grid.average(arcs, vectors(rng.standard_normal((4, 32, 128))), k)
        assert grid.notes == [[]] * 4


# ---- when it must be dense


def test_the_first_averagings_of_a_swarm_are_plainly_dense() -> None:
    values = vectors(np.random.default_rng(11).standard_normal((3, 32, 128)))
    grid = Grid((3,), 3)
    arcs = swarm(3, ArcOptions(warmup=5), values)
    results = [matrix(grid.average(arcs, values, k)[0]) for k in range(5)]
    assert [stage.name for stage in grid.stages] == ["dense"] * 5
    mean = np.mean([matrix(value) for value in values], axis=0)
    assert all(np.abs(result - mean).max() < 1e-6 for result in results)
    grid.average(arcs, values, 5)
    assert [stage.name for stage in grid.stages[5:]] == ["sketch", "dense"]
    grid.average(arcs, values, 6)
    assert [stage.name for stage in grid.stages[7:]] == ["sketch", "rows"]


def test_a_sketch_that_overflows_falls_back_for_everybody_and_learns() -> None:
    rng = np.random.default_rng(12)
    grid, arcs = Grid((2, 2), 4), swarm(4, EF14, vectors(np.zeros((1, 32, 128))))
    tuned(grid, arcs, (32, 128))
    given = rng.standard_normal((4, 32, 128))
    given[3] *= 1e7  # of one peer only
    result = matrix(grid.average(arcs, vectors(given), 1)[0])
    assert all("does not fit" in notes[0] for notes in grid.notes)
    assert np.abs(result - given.mean(axis=0)).max() < 1
    grid.average(arcs, vectors(1e7 * rng.standard_normal((4, 32, 128))), 2)
    grid.average(arcs, vectors(1e7 * rng.standard_normal((4, 32, 128))), 3)
    assert grid.notes == [[]] * 4


def test_peers_that_chose_differently_send_dense_and_say_so() -> None:
    """A reducer that gave one of them another sketch: never garbage."""
    rng = np.random.default_rng(13)
    grid, arcs = Grid((4,), 4), swarm(4, EF21M, vectors(np.zeros((1, 64, 128))))
    grid.average(arcs, vectors(rng.standard_normal((4, 64, 128))), 0)
    given = rng.standard_normal((4, 64, 128))

    class Lied(Grid):
        def through_all_axes(
            self, stages: list[Stage], weights: list[float]
        ) -> tuple[list[Vector], list[list[Vector]]]:
            results, unsent = super().through_all_axes(stages, weights)
            if stages[0].name == "sketch":
                results[2].arrays()["sketch"][::2] *= 2
            return results, unsent

    grid = Lied((4,), 4)
    results = grid.average(arcs, vectors(given), 1)
    assert [stage.name for stage in grid.stages] == ["sketch", "rows", "dense"]
    assert grid.notes == [["sent dense: they chose different rows"]] * 4
    assert len({result.buffer.tobytes() for result in results}) == 1
    assert_g_is_the_mean(arcs, [1.0] * 4)
    grid = Grid((4,), 4)
    grid.average(arcs, vectors(given), 2)
    assert grid.notes == [[]] * 4


def test_after_a_stage_that_was_not_whole_ef21m_starts_again() -> None:
    rng = np.random.default_rng(14)
    layout = vectors(np.zeros((1, 32, 128)))[0].layout
    arc, names = ArcTopK(layout, EF21M), []
    for k, whole in enumerate((True, True, False, True, True)):
        value = vectors(rng.standard_normal((1, 32, 128)))[0]
        run = arc.begin(value, Vector.empty(layout), weight=1.0, k=k, seed=b"")
        while (stage := until_a_stage(run, random.Random(k))) is not None:
            last = stage.name
            run.averaged(stage.values, whole=whole)
        names.append(last)
    assert names == ["dense", "rows", "rows", "dense", "rows"]


# ---- abort, checkpoint, bad input


@pytest.mark.parametrize("options", [EF14, EF21M], ids=["ef14", "ef21m"])
def test_a_run_that_is_dropped_leaves_no_trace(options: ArcOptions) -> None:
    rng = np.random.default_rng(15)
    grid, arcs = Grid((1,), 1), swarm(1, options, vectors(np.zeros((1, 32, 128))))
    for k in range(3):
        grid.average(arcs, vectors(rng.standard_normal((1, 32, 128))), k)
    before = arcs[0].save()
    value = vectors(rng.standard_normal((1, 32, 128)))[0]
    run = arcs[0].begin(value, Vector.empty(value.layout), weight=1.0, k=3, seed=b"")
    stages = []
    while (stage := until_a_stage(run, random.Random(0))) is not None:
        assert not run.committed
        assert same(arcs[0].save(), before)
        stages.append(stage.name)
        if stage.name == "rows":
            break
        run.averaged(stage.values)
    assert stages == ["sketch", "rows"]
    run = arcs[0].begin(value, Vector.empty(value.layout), weight=1.0, k=3, seed=b"")
    assert same(arcs[0].save(), before)


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("options", [EF14, EF21M], ids=["ef14", "ef21m"])
def test_a_restart_from_a_checkpoint_loses_nothing(options: ArcOptions) -> None:
    rng = np.random.default_rng(16)
    grid, arcs = Grid((2, 2), 4), swarm(4, options, vectors(np.zeros((1, 32, 128))))
    for k in range(3):
        grid.average(arcs, vectors(rng.standard_normal((4, 32, 128))), k)
    again = swarm(4, options, vectors(np.zeros((1, 32, 128))))
    for old, new in zip(arcs, again, strict=True):
        new.load(old.save())
    for k in (3, 4):
        values = vectors(rng.standard_normal((4, 32, 128)))
        expected = grid.average(arcs, values, k)
        assert grid.notes == [[]] * 4
        results = grid.average(again, values, k)
        assert grid.notes == [[]] * 4
        assert all(np.array_equal(a.buffer, b.buffer) for a, b in zip(results, expected, strict=True))


def test_a_state_of_another_layout_is_refused_and_changes_nothing() -> None:
    arc, other = (swarm(1, EF21M, vectors(np.zeros((1, n, 128))))[0] for n in (32, 33))
    before = arc.save()
    for wrong in (
        other.save(),
        {},
        before | {"bond": np.zeros(3)},
        before | {"bond": before["bond"] + 300},
        before | {"own/w": before["own/w"] * np.nan},
    ):
        with pytest.raises(InvalidInput, match="saved feedback"):
            arc.load(wrong)
        assert same(arc.save(), before)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("arc", "arc:0.2,4,ef21m,0.1,1000"),
        ("arc:.2,4", "arc:0.2,4,ef21m,0.1,1000"),
        ("arc:1,1,ef14", "arc:1,1,ef14,1,1000"),
        ("arc:0.05, 2, ef21m, 0.5, 0", "arc:0.05,2,ef21m,0.5,0"),
        ("dense", "dense"),
        ("dense:ef14", "dense:ef14"),
    ],
)
def test_one_meaning_has_one_spelling(name: str, canonical: str) -> None:
    assert check_compressor(name) == canonical
    assert check_compressor(canonical) == canonical
    assert compressor_named(name, vectors(np.zeros((1, 32, 128)))[0].layout).name == canonical


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("zip", "there are dense, dense:ef14, arc"),
        ("dens", "did you mean 'dense'"),
        ("arc:0", "ratio"),
        ("arc:1.5", "ratio"),
        ("arc:nan", "ratio"),
        ("arc:0.2,0", "rank"),
        ("arc:0.2,33", "rank"),
        ("arc:0.2,4,ef99", "ef14 and ef21m"),
        ("arc:0.2,4,ef14,0.1", "momentum"),
        ("arc:0.2,4,ef21m,0", "eta"),
        ("arc:0.2,4,ef21m,0.1,-1", "warmup"),
        ("arc:much", "numbers"),
        ("arc:0.2,4,ef21m,0.1,10,7", "at most"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_reason(name: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        check_compressor(name)


def test_a_layout_with_nothing_to_compress_is_refused() -> None:
    layout = Layout.of((TensorSpec("bias", (5000,), "float32"), TensorSpec("tiny", (2, 2), "float32")))
    with pytest.raises(InvalidInput, match="nothing to compress"):
        compressor_named("arc", layout)


# ---- the small parts


def test_directions_are_nearly_normal_and_pinned_for_all_time() -> None:
    v = directions(b"seed", 128, 32)
    assert hashlib.sha256(v.tobytes()).hexdigest()[:16] == "a3ae2cc001a5e24b"
    assert abs(v.mean()) < 0.05
    assert abs(v.std() - 1) < 0.05
    assert not np.array_equal(v, directions(b"another", 128, 32))


def test_of_equal_rows_the_first_are_chosen() -> None:
    rng = np.random.default_rng(17)
    for _ in range(200):
        norms = rng.integers(0, 4, 30).astype(np.float64)
        chosen = np.empty(int(rng.integers(1, 31)), np.int64)
        choose_rows(norms, chosen)
        assert chosen.tolist() == sorted(sorted(range(30), key=lambda row: (-norms[row], row))[: len(chosen)])


def test_norms_are_added_up_one_rounding_at_a_time() -> None:
    rows = np.rint(np.random.default_rng(18).standard_normal((500, 7)) * 2.0**40)
    norms = np.empty(500)
    squared_norms(rows, norms)
    for row, norm in zip(rows.tolist(), norms.tolist(), strict=True):
        total = 0.0
        for value in row:
            total += value * value
        assert norm == total


# ---- a whole problem


def test_the_synthetic_problem_where_local_top_rows_get_stuck() -> None:
    """Ten peers in two camps; ten numbers s that all share, 150 blocks n_b of ten that draw each camp its own way:

        loss of a peer = |s - 1|^2 / 2 + 1/150 sum_b |n_b - c (100 + 5 s)|^2 / 2,   c = +1 in one camp, -1 in the other

    so that the blocks' gradients are large, differ, and cancel, while s has to go to (1 - 500) / 26. 2,000 numbers as
    200 blocks of ten, gradient noise of .001, ratio .05, rank 2. This is the authors' problem; their v = v/2 + g with
    rate .001 is EF21M's h with eta .5 and rate .002. Distances to the optimum after 1,000 steps: .001 dense (the floor
    of the noise), .003 ARC; every peer's own top rows stop at .058 (three draws on average, a tenth apart).
    """
    optimum = np.zeros((200, 10))
    optimum[150] = (1 - 500) / 26
    camp = np.repeat([1.0, -1.0], 5)[:, None, None]

    def distance(seed: int, step: Callable[[np.ndarray, int], np.ndarray]) -> float:
        rng, w = np.random.default_rng(seed), np.zeros((200, 10))
        for k in range(1000):
            gradients = 0.001 * rng.standard_normal((10, 200, 10))
            off = w[:150] - camp * (100 + 5 * w[150])
            gradients[:, :150] += off / 150
            gradients[:, 150] += w[150] - 1 - 5 * (camp * off).sum(axis=1) / 150
            w = w - 0.002 * step(gradients, k)
        return float(np.linalg.norm(w - optimum))

    h = own = np.zeros((10, 200, 10))

    def dense(given: np.ndarray, k: int) -> np.ndarray:
        nonlocal h
        h = (h + given) / 2
        return h.mean(axis=0)

    def local(given: np.ndarray, k: int) -> np.ndarray:
        nonlocal h, own
        if k == 0:
            h = own = np.zeros_like(given)
        h, own = (h + given) / 2, own.copy()
        rows = np.argsort(-((h - own) ** 2).sum(axis=2), axis=1)[:, :10]
        own[np.arange(10)[:, None], rows] = h[np.arange(10)[:, None], rows]
        return own.mean(axis=0)

    grid = Grid((10,), 10)
    arcs = swarm(10, ArcOptions(0.05, 2, "ef21m", 0.5, 0), vectors(np.zeros((1, 200, 10))), row=10)

    def arc(given: np.ndarray, k: int) -> np.ndarray:
        return matrix(grid.average(arcs, vectors(given), k)[0])

    assert distance(0, dense) == pytest.approx(0.001, abs=0.0005)
    assert np.mean([distance(seed, local) for seed in range(3)]) == pytest.approx(0.058, rel=0.1)
    assert distance(0, arc) == pytest.approx(0.003, abs=0.0005)

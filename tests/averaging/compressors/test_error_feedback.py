"""What a codec leaves out comes later: on a whole grid, and in the machines that move it."""

from __future__ import annotations

import numpy as np
import pytest

from moshpitd.averaging.compressors import Operation, compressor_named
from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.names import Rank
from moshpitd.averaging.vector import Layout, TensorSpec, Vector
from tests.averaging.compressors.grid_on_paper import Grid, matrix, vectors
from tests.averaging.group_on_paper import GroupOnPaper, group_of, normal_vectors, number_of

GRIDS = [((5,), 5), ((2, 3), 6), ((2, 2), 7)]


@pytest.mark.parametrize("codec", ["bfloat16", "float16"])
@pytest.mark.parametrize(("sides", "peers"), GRIDS)
def test_what_the_codec_drops_is_not_lost(sides: tuple[int, ...], peers: int, codec: str) -> None:
    """Whatever the grid and the weights: what came out so far and what is still kept back are all that was put in.

    Weighted as it is carried: members of different lines differ in bits under a lossy codec.
    """
    rng = np.random.default_rng(peers)
    weights = [1.0 + peer % 3 for peer in range(peers)]
    grid = Grid(sides, peers, codec)
    compressors = [compressor_named("dense:ef14", vectors(np.zeros((1, 3, 9000)))[0].layout) for _ in range(peers)]
    put_in, came_out, without = (np.zeros((3, 9000)) for _ in range(3))
    values = vectors(1.5 * rng.standard_normal((peers, 3, 9000)))  # the same each time: so is what is lost
    for k in range(40):
        put_in += np.average([matrix(value) for value in values], axis=0, weights=weights)
        results = [matrix(result) for result in grid.average(compressors, values, k, weights)]
        came_out += np.average(results, axis=0, weights=grid.carried)
        plain = [compressor_named("dense", values[0].layout) for _ in values]
        results = [matrix(result) for result in grid.average(plain, values, k, weights)]
        without += np.average(results, axis=0, weights=grid.carried)
    kept_back = np.average(
        [compressor.save()["error/w"].reshape(3, 9000) for compressor in compressors], axis=0, weights=weights
    )
    assert np.abs(put_in - came_out - kept_back).max() < 1e-4
    assert np.abs(put_in - came_out).mean() < np.abs(put_in - without).mean() / 3


def test_a_lossless_codec_leaves_nothing_to_feed_back() -> None:
    values = normal_vectors(3, 5000)
    grid = Grid((3,), 3)
    compressors = [compressor_named("dense:ef14", values[0].layout) for _ in values]
    plain = [compressor_named("dense", values[0].layout) for _ in values]
    for k in range(2):
        fed = grid.average(compressors, values, k)
        assert [f.buffer.tobytes() for f in fed] == [p.buffer.tobytes() for p in grid.average(plain, values, k)]
    assert not any(compressor.save()["error/w"].any() for compressor in compressors)


def test_feedback_is_kept_wider_than_a_narrow_tensor() -> None:
    """A float16 tensor cannot carry its value and what was left out: the rest of both is kept in float32."""
    values = [Vector.of({"w": np.full(500, 1.0, np.float16)}) for _ in range(2)]
    compressors = [compressor_named("dense:ef14", values[0].layout) for _ in range(2)]
    state = {"error/w": np.full(500, 1e-4, np.float32)}
    for compressor in compressors:
        compressor.load(state)
    Grid((2,), 2).average(compressors, values, 0)
    assert all(np.allclose(compressor.save()["error/w"], 1e-4, rtol=1e-3) for compressor in compressors)
    total = 0.0
    for k in range(40):
        total += float(Grid((2,), 2).average(compressors, values, k + 1)[0].arrays()["w"][0]) - 1.0
    assert total + float(compressors[0].save()["error/w"][0]) == pytest.approx(1e-4, rel=1e-2)


def test_a_plain_session_has_no_state_to_restore() -> None:
    layout = Layout.of([TensorSpec("w", (5,), "float32")])
    plain = compressor_named("dense", layout)
    plain.load(plain.save())
    with pytest.raises(InvalidInput, match="error/w"):
        plain.load(compressor_named("dense:ef14", layout).save())


# ---- the same in the machines of a group


def test_a_group_notes_what_it_left_out_of_what_it_sent() -> None:
    values = normal_vectors(4, 30_000)
    unsent = [Vector(vector.layout, np.zeros_like(vector.buffer)) for vector in values]
    weights = [1.0, 2.0, 3.0, 2.0]
    group = group_of(values, weights=weights)
    paper = GroupOnPaper(group, values, codec="bfloat16", unsent=unsent)
    paper.run()
    assert len(paper.committed) == 4
    arrays = [vector.arrays()["w"].astype(np.float64) for vector in values]
    lost = [vector.arrays()["w"].astype(np.float64) for vector in unsent]
    expected = np.average(arrays, axis=0, weights=weights)
    result = paper.result_arrays(0)["w"].astype(np.float64)
    assert np.abs(result - expected).max() > 1e-3
    assert np.abs(result + np.average(lost, axis=0, weights=weights) - expected).max() < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_a_group_adds_up_whatever_its_members_weigh(seed: int) -> None:
    rows = np.rint(np.random.default_rng(seed).standard_normal((4, 9000)) * 2.0**38)
    values = [Vector.of({"q": row}) for row in rows]
    paper = GroupOnPaper(group_of(values, weights=[0.0, 2.0, 0.0, 7.0]), values, seed=seed, operation=Operation.SUM)
    paper.run()
    assert len(paper.committed) == 4
    assert all(np.array_equal(paper.result_arrays(rank)["q"], rows.sum(axis=0)) for rank in range(4))


def test_who_shares_a_dead_members_cell_stands_in_for_it() -> None:
    line, other = (np.rint(np.random.default_rng(seed).standard_normal(9000) * 2.0**38) for seed in (1, 2))
    values = [Vector.of({"q": row}) for row in (line, line, other, other)]
    for seed in range(5):
        group = group_of(values, coordinates=[0, 0, 1, 1])
        paper = GroupOnPaper(group, values, seed=seed, operation=Operation.SUM_OF_CELLS)
        paper.at(0.06, lambda paper=paper: paper.kill(0))
        paper.run()
        assert paper.committed == [Rank(1), Rank(2), Rank(3)]
        assert {number_of(dropped.peer) for dropped in paper.machines[Rank(1)].dropped_lines()} == {0}
        assert all(np.array_equal(paper.result_arrays(rank)["q"], line + other) for rank in paper.committed)

"""`moshpitd average`: files in, files out, by processes of their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.end_to_end.swarm import Array, Peer, Swarm, average_all, error, finish, mean, trainers


@pytest.fixture(scope="module")
def four() -> Iterator[list[Peer]]:
    with Swarm() as swarm:
        yield swarm.start(4)


@pytest.fixture(scope="module")
def lonely() -> Iterator[Peer]:
    with Swarm() as swarm:
        yield swarm.start()[0]


def tensors(index: int) -> dict[str, Array]:
    rng = np.random.default_rng(index)
    return {
        "layer.w": rng.standard_normal((300, 41)).astype(np.float32),
        "layer.b": rng.standard_normal(41),
        "embedding": rng.standard_normal(10_000).astype(ml_dtypes.bfloat16),
    }


def files(tmp_path: Path, count: int) -> list[Path]:
    paths = [tmp_path / f"{index}.safetensors" for index in range(count)]
    for index, path in enumerate(paths):
        save_file(tensors(index), path, metadata={"format": "np", "index": str(index)})
    return paths


def average(
    peers: list[Peer], paths: list[Path], *words: str, weights: list[float] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Every peer's file at once, each to its own .out"""
    started = [
        peer.cli_start(
            "average", path, "-o", path.with_suffix(".out"), "--weight", str(weights[i] if weights else 1), *words
        )
        for i, (peer, path) in enumerate(zip(peers, paths, strict=True))
    ]
    return [finish(process) for process in started]


def test_four_files_become_their_weighted_mean(four: list[Peer], tmp_path: Path) -> None:
    paths, weights = files(tmp_path, 4), [1.0, 2.0, 3.0, 4.0]
    before = [path.read_bytes() for path in paths]
    done = average(four, paths, "--min-peers", "4", "--json", weights=weights)
    assert [each.returncode for each in done] == [0] * 4, done
    results = [load_file(path.with_suffix(".out")) for path in paths]
    for name, precision in (("layer.w", 1e-6), ("layer.b", 1e-15), ("embedding", 2**-8)):
        expected = mean([tensors(index)[name] for index in range(4)], weights)
        assert error(results[0][name], expected) < precision
        assert len({result[name].tobytes() for result in results}) == 1
        assert results[0][name].dtype == tensors(0)[name].dtype and results[0][name].shape == tensors(0)[name].shape
    assert [path.read_bytes() for path in paths] == before
    receipts = [json.loads(each.stdout) for each in done]
    assert {receipt["digest"] for receipt in receipts} == {receipts[0]["digest"]} != {""}
    assert {receipt["outcome"] for receipt in receipts} == {"complete"}
    assert {receipt["weight_total"] for receipt in receipts} == {10.0}


def test_the_receipt_has_what_the_contract_lists(four: list[Peer], tmp_path: Path) -> None:
    done = average(four, files(tmp_path, 4), "--min-peers", "4", "--json", "--name", "listed")
    assert [each.returncode for each in done] == [0] * 4, done
    for peer, each in zip(four, done, strict=True):
        receipt = json.loads(each.stdout)
        assert receipt.keys() >= {
            *("outcome", "epoch", "joined", "weight_total", "peers", "digest", "seconds", "bytes", "rounds")
        }
        assert receipt["seconds"].keys() >= {"matchmaking", "reduce", "total"}
        assert receipt["bytes"].keys() >= {"sent", "received"}
        assert receipt["joined"] is False and receipt["epoch"] == 0
        assert sorted(receipt["peers"]) == sorted(other.id for other in four if other is not peer)
        (round_,) = receipt["rounds"]
        assert round_.keys() >= {
            *(
                "round",
                "axis",
                "outcome",
                "group_id",
                "digest",
                "leader",
                "rank",
                "codec",
                "members",
                "spans",
                "dropped",
            )
        }
        assert round_["members"][0].keys() >= {"peer", "weight"}
        assert round_["dropped"] == [] and round_["codec"] == "float32"
        edges = [(span["start"], span["stop"]) for span in round_["spans"]]
        assert edges[0][0] == 0 and edges[-1][1] == 300 * 41 + 41 + 10_000
        assert [stop for _, stop in edges[:-1]] == [start for start, _ in edges[1:]]
        assert all(len(span["contributors"]) == 4 for span in round_["spans"])


def test_without_json_a_person_is_told_in_one_line(four: list[Peer], tmp_path: Path) -> None:
    done = average(four[:2], files(tmp_path, 2), "--min-peers", "2", "--name", "told")
    assert [each.returncode for each in done] == [0, 0], done
    for each, path in zip(done, files(tmp_path, 2), strict=True):
        assert each.stdout.startswith("complete: averaging 0 with 1 other peer in ")
        assert each.stdout.rstrip().endswith(f"-> {path.with_suffix('.out')}")


def test_in_place_the_file_is_replaced(four: list[Peer], tmp_path: Path) -> None:
    paths = files(tmp_path, 2)
    started = [
        peer.cli_start("average", path, "-o", path, "--min-peers", "2", "--name", "place")
        for peer, path in zip(four, paths, strict=False)
    ]
    assert [finish(process).returncode for process in started] == [0, 0]
    expected = mean([tensors(index)["layer.w"] for index in range(2)], [1, 1])
    assert all(error(load_file(path)["layer.w"], expected) < 1e-6 for path in paths)
    assert sorted(tmp_path.iterdir()) == paths


def test_alone_exits_5_says_so_and_writes_nothing(lonely: Peer, tmp_path: Path) -> None:
    (path,) = files(tmp_path, 1)
    (done,) = average([lonely], [path], "--timeout", "2")
    assert done.returncode == 5
    assert "nobody else" in done.stderr and "--allow-alone" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_alone_when_allowed_exits_0_and_copies_the_values(lonely: Peer, tmp_path: Path) -> None:
    (path,) = files(tmp_path, 1)
    (done,) = average([lonely], [path], "--timeout", "10", "--allow-alone", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["outcome"] == "alone"
    copied = load_file(path.with_suffix(".out"))
    assert all(copied[name].tobytes() == value.tobytes() for name, value in tensors(0).items())


def test_too_few_peers_exit_5_name_the_numbers_and_write_nothing(four: list[Peer], tmp_path: Path) -> None:
    paths = files(tmp_path, 2)
    done = average(four[:2], paths, "--min-peers", "3", "--timeout", "3", "--name", "few")
    assert [each.returncode for each in done] == [5, 5]
    assert all("of 3 peers here" in each.stderr and "Traceback" not in each.stderr for each in done), done
    assert sorted(tmp_path.iterdir()) == paths


def test_one_that_differs_is_told_the_first_difference_and_the_others_average(four: list[Peer], tmp_path: Path) -> None:
    (path,) = files(tmp_path, 1)
    before = path.read_bytes()
    with trainers(four[:3], lambda i: {**tensors(i), "layer.b": np.ones(40)}, name="differ", min_peers=3) as there:
        odd = four[3].cli("average", path, "-o", path.with_suffix(".out"), "--min-peers", "3", "--name", "differ")
        assert odd.returncode == 1, odd
        assert "this session differs from most of the swarm" in odd.stderr
        assert "tensor 'layer.b' float64[41] here is float64[40] there" in odd.stderr
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
        assert {(receipt.outcome, len(receipt.peers)) for receipt in average_all(there)} == {("complete", 2)}


@pytest.mark.parametrize("words", [["--codec", "float16"], ["--rounds", "1"]], ids=["codec", "rounds"])
def test_other_options_than_the_others_are_named(four: list[Peer], tmp_path: Path, words: list[str]) -> None:
    (path,) = files(tmp_path, 1)
    name = f"options{words[0]}"
    with trainers(four[:3], tensors, name=name, min_peers=3):
        odd = four[3].cli("average", path, "-o", path, "--min-peers", "3", "--name", name, *words)
    assert odd.returncode == 1, odd
    assert words[0].removeprefix("--") in odd.stderr and words[1] in odd.stderr, odd.stderr


def test_files_that_cannot_be_averaged_are_refused_before_anybody_hears_of_them(
    four: list[Peer], tmp_path: Path
) -> None:
    integers, nans, truncated = (tmp_path / f"{name}.safetensors" for name in ("integers", "nans", "truncated"))
    save_file({"count": np.arange(3)}, integers)
    save_file({"w": np.array([1, np.nan], np.float32)}, nans)
    save_file({"w": np.ones(100, np.float32)}, truncated)
    truncated.write_bytes(truncated.read_bytes()[:-1])
    for path, culprit in ((integers, "count"), (nans, "'w'"), (truncated, str(truncated))):
        done = four[0].cli("average", path, "-o", tmp_path / "out", "--name", "unfit")
        assert done.returncode == 1 and culprit in done.stderr and "Traceback" not in done.stderr, done
    assert not (tmp_path / "out").exists()
    assert "unfit" not in four[0].log

"""`moshpitd simulate`: what it prints, how it exits, and that a seed is a seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from moshpitd.cli import simulate
from moshpitd.cli.simulation_flags import Options
from moshpitd.cli.verbs import main
from moshpitd.simulation.workloads import InStepOptions, Report
from tests.cli.conftest import Moshpitd

STORMY = (
    "--peers 12 --absent 0.05 --crash 0.03 --pause 0.05 --burst 1:0.2 --partition 2:0.3:2:one-way --join 3:2 "
    "--leave 4:1 --slow-trainers 0.1 --directory-delay 5ms..50ms --stale 0.5 --lost-writes 0.1 --loss 0.01 "
    "--delay 1ms..20ms --link slow:2:up=1MB,down=5MB,delay=40ms,loss=0.01 --vector-bytes 1MB --timeout 20 "
    "--averagings-max 6 --seed 5"
)


def test_packets_are_lost_and_judged(moshpitd: Moshpitd) -> None:
    words = ("--peers", "4", "--transport", "lossy", "--packet-loss", "0.1:4", "--averagings-max", "12")
    done = moshpitd("simulate", *words, "--update", "0.5", "--reliable-every", "6")
    assert done.returncode == 0, done.stdout
    assert "12 drift" in done.stdout
    assert "unbiasedness" in done.stdout
    for strange, why in (
        (("--packet-loss", "0.1"), "nothing travels as packets"),
        (("--transport", "lossy", "--packet-loss", "2"), "is no loss"),
        (("--reliable-every", "3"), "all its averagings are"),
    ):
        refused = moshpitd("simulate", *strange)
        assert (refused.returncode, why in refused.stderr) == (2, True), refused.stderr


def test_a_swarm_in_step_agrees_exactly_and_says_what_it_took(moshpitd: Moshpitd) -> None:
    done = moshpitd("simulate", "--peers", "16", "--grid", "4x4", "--seed", "3")
    assert done.returncode == 0, done.stderr
    for part in (
        "16 peers, in step, grid 4x4, seed 3",
        "theory's",
        "after 2 rounds",
        "round time",
        "messages",
        "32 complete",
        "32 honest receipts",
        "no checker complains",
    ):
        assert part in done.stdout
    assert "events in" in done.stderr and "events in" not in done.stdout


def test_its_json_holds_the_figures_and_the_options(moshpitd: Moshpitd) -> None:
    done = moshpitd("simulate", "--peers", "16", "--grid", "4x4", "--rounds", "auto", "--seed", "3", "--json")
    told = json.loads(done.stdout)
    assert (told["peers"], told["grid"], told["rounds_to_agreement"], told["averagings"]) == (16, "4x4", 2, 1)
    assert (told["spreads"][-1], told["theory"], told["complaints"]) == (0.0, [0.0], [])
    assert told["options"]["rounds"] == 0 and told["looked"]["agreement"] == 32


@pytest.mark.parametrize("flags", [STORMY, "--workload mixed --peers 8 --seed 4"], ids=["in step", "mixed"])
def test_the_same_seed_gives_the_same_bytes_whatever_python_hashes(
    moshpitd: Moshpitd, tmp_path: Path, flags: str
) -> None:
    told, traces = [], []
    for seed in ("1", "2"):
        trace = tmp_path / f"{seed}.txt"
        done = moshpitd("simulate", *flags.split(), "--json", "--trace", trace, PYTHONHASHSEED=seed)
        assert done.returncode in (0, 1), done.stderr
        told.append(done.stdout)
        traces.append(trace.read_bytes())
    assert told[0] == told[1] and json.loads(told[0])["events"] > 500
    assert traces[0] == traces[1] and b"-> p1: " in traces[0] and len(traces[0].splitlines()) > 500


def test_stragglers_are_drawn_before_anybody_tries(moshpitd: Moshpitd) -> None:
    flags = ["simulate", "--averaging", "wait-avoiding", "--lockstep", "--straggler", "2:320ms", "--steps", "30"]
    done = moshpitd(*flags)
    assert done.returncode == 0, done.stderr
    for part in (
        "8 peers, wait-avoiding, groups of 2",
        "ms a version",
        "age of models",
        "merge",
        "no checker complains",
    ):
        assert part in done.stdout
    told = json.loads(moshpitd(*flags, "--json").stdout)
    assert 200 < told["step_ms"] < 300 and told["staleness_max"] <= 10 and told["complaints"] == []


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--straggler 2:320ms", "say with --averaging who waits for whom"),
        ("--averaging group --grid 4x4", "--grid: means nothing to trainers with a pace of their own"),
        ("--averaging group --group-size 9", "9 is more than --peers 8"),
        ("--averaging wait-avoiding --peers 65", "a barrier takes 64 peers at most"),
        ("--averaging global --straggler 2x", "is not of the form COUNT:LATE"),
        ("--averaging global --straggler 9:1s", "9 are more than --peers 8"),
    ],
)
def test_what_stragglers_cannot_be_is_said(flags: str, why: str) -> None:
    done = CliRunner().invoke(main, ["simulate", *flags.split()])
    assert done.exit_code == 2 and why in done.stderr


def test_many_seeds_run_in_processes_and_are_summed_up(moshpitd: Moshpitd) -> None:
    flags = ["simulate", "--peers", "8", "--grid", "2x4", "--seed", "10", "--seeds", "4"]
    done = moshpitd(*flags)
    assert done.returncode == 0, done.stderr
    assert "10 to 13, 0 failing" in done.stdout and "mean 2.00, 2 to 2" in done.stdout
    told = json.loads(moshpitd(*flags, "--json").stdout)
    assert [report["seed"] for report in told["reports"]] == [10, 11, 12, 13] and told["failing"] == []
    alone = json.loads(moshpitd("simulate", "--peers", "8", "--grid", "2x4", "--seed", "12", "--json").stdout)
    assert told["reports"][2] == {name: value for name, value in alone.items() if name != "options"}


def test_the_plot_is_a_picture(moshpitd: Moshpitd, tmp_path: Path) -> None:
    picture = tmp_path / "spread.png"
    done = moshpitd("simulate", "--peers", "16", "--grid", "4x4", "--burst", "0:0.1", "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_without_matplotlib_a_plot_is_refused_before_the_work_and_says_the_way_out(
    moshpitd: Moshpitd, tmp_path: Path
) -> None:
    (tmp_path / "matplotlib.py").write_text('raise ModuleNotFoundError("none here", name="matplotlib")\n')
    done = moshpitd("simulate", "--plot", tmp_path / "x.png", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "pip install 'moshpitd[demo]'" in done.stderr
    assert "events" not in done.stderr


def test_a_complaint_exits_1_and_names_the_seed_and_the_command_that_replays_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(options: Options, *, plot: Path | None = None, trace: Path | None = None) -> Report:
        assert isinstance(options, InStepOptions)
        complaint = "agreement: at 1.0 s p1 and p2 hold other bits"
        return Report("in step", options.seed, options.peers, "4x4", [1.0], complaints=[complaint])

    monkeypatch.setattr(simulate, "run", run)
    typed = ["simulate", "--peers", "16", "--link", "slow:2:up=1MB,loss=0.01", "--link", "far:1:delay=9ms"]
    done = CliRunner().invoke(main, [*typed, "--absent", "0.01", "--seed", "7", "--json"])
    assert done.exit_code == 1
    assert "seed 7 breaks what must always hold: agreement: at 1.0 s p1 and p2 hold other bits" in done.stderr
    again = "--peers 16 --link slow:2:up=1MB,loss=0.01 --link far:1:delay=9ms --absent 0.01 --seed 7"
    assert f"moshpitd simulate {again} --trace trace.txt" in done.stderr
    assert json.loads(done.stdout)["complaints"]


def test_of_many_seeds_each_failing_one_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_seeds(options: Options, count: int) -> simulate.Seeds:
        bad = Report("in step", 5, 16, complaints=["leaks: at 2.0 s p1 is idle"])
        return simulate.Seeds(4, count, [Report("in step", 4, 16), bad], crashes={6: "AssertionError: ours"})

    monkeypatch.setattr(simulate, "run_seeds", run_seeds)
    done = CliRunner().invoke(main, ["simulate", "--absent", "0.5", "--seed", "4", "--seeds", "3"])
    assert done.exit_code == 1
    for part in (
        "seed 5 leaks: at 2.0 s p1 is idle\n    moshpitd simulate --absent 0.5 --seed 5",
        "seed 6 AssertionError: ours\n    moshpitd simulate --absent 0.5 --seed 6",
    ):
        assert part in done.stdout
    assert "2 of 3 seeds break what must always hold, first 5" in done.stderr


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("--grid 8x8 --peers 10", "'8x8' has 64 cells, and a plan needs a peer for each"),
        ("--grid 8by8", "'8by8' is no grid: write auto, or sides"),
        ("--grid 1", "'1' has one cell only: nobody would meet"),
        ("--rounds 0", "'0' is neither auto nor a number from 1 to 64"),
        ("--link slow", "'slow' is not of the form NAME:COUNT:up=1MB"),
        ("--link slow:two", "has 'two' for COUNT"),
        ("--link slow:2:upp=1MB", "says 'upp', which no link has: did you mean up?"),
        ("--link slow:2:up=fast", "'fast' is no amount of bytes"),
        ("--link slow:2:loss=1", "'1' is no loss"),
        ("--link a:9:delay=1ms --link b:9", "together they have 2 more peers than the swarm"),
        ("--burst 1:2", "'1:2' has '2' for a share"),
        ("--burst 60:0.1", "averaging 60 never comes: they count from 0 to 49"),
        ("--partition 1:0.1", "is not of the form K:SHARE:SECONDS"),
        ("--partition 1:0.1:3:oneway", "ends in 'oneway'"),
        ("--join 1:0", "has '0' for N"),
        ("--delay 20ms..5ms", "ends before it begins"),
        ("--delay quick", "is no duration: write 5ms or 0.005"),
        ("--vector-bytes 64Mb", "is no amount of bytes: write 64MB"),
        ("--absent 1.5", "1.5 is not in the range 0<=x<=1"),
        ("--abscent 0.1", "'--absent'"),
        ("--plot x.jpg", "end it in .png, .svg or .pdf"),
        ("--plot nowhere/x.png", "there is no directory"),
        ("--seeds 2 --trace t.txt", "--plot and --trace show one run: leave out --seeds"),
        ("--compressor arc", "--compressor is for --workload mixed"),
        ("--workload mixed --compressor arcs", "did you mean 'arc'"),
        ("--workload mixed --absent 0.1", "--absent: the mixed workload draws its faults, links and sizes from --seed"),
    ],
)
def test_wrong_usage_exits_2_and_names_what_is_wrong(typed: str, complaint: str) -> None:
    done = CliRunner().invoke(main, ["simulate", *typed.split()])
    assert done.exit_code == 2
    assert complaint in done.stderr


def test_a_trace_that_cannot_be_written_is_a_failure_that_names_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["simulate", "--trace", str(tmp_path / "no" / "t.txt")])
    assert done.exit_code == 1 and "t.txt: No such file or directory" in done.stderr

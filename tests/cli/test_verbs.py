"""What each verb prints and how it exits."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import moshpitd as package
from moshpitd.local.v1 import daemon_pb2 as pb
from tests.cli.conftest import Moshpitd
from tests.cli.fake_daemon import OTHER, OWN, THIRD, FakeDaemon, receipt


def test_status_of_a_ready_daemon(fake_daemon: FakeDaemon, as_json: Callable[..., object]) -> None:
    status = as_json("status")
    assert isinstance(status, dict)
    assert (status["ready"], status["peer_id"], status["swarm"]) == (True, OWN, "demo")
    assert (status["listen"], status["peers"], status["dialable"]) == ("127.0.0.1:7600", 2, None)
    assert status["bandwidth"] == {"up_bytes_s": 1.25e7, "down_bytes_s": 0.0}
    [session] = status["sessions"]
    assert (session["name"], session["cell"], session["averagings"]) == ("default", [0, 2], {"complete": 6})
    assert [trainer["transport"] for trainer in session["trainers"]] == ["shared-memory", "stream"]


def test_status_counts_trainers_by_the_way_their_values_take(fake_daemon: FakeDaemon, moshpitd: Moshpitd) -> None:
    assert "1 shared-memory, 1 stream: switched off" in " ".join(moshpitd("status", COLUMNS="400").stdout.split())


def test_status_tells_people_what_the_line_carries(fake_daemon: FakeDaemon, moshpitd: Moshpitd) -> None:
    assert "12.5 MB/s out, not known in" in moshpitd("status").stdout


def test_a_daemon_that_is_not_ready_exits_4_and_says_what_it_waits_for(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd
) -> None:
    fake_daemon.ready = False
    done = moshpitd("status")
    assert done.returncode == 4
    assert "not ready: waiting for anybody of --join to answer" in done.stdout
    done = moshpitd("status", "--json")
    assert done.returncode == 4 and json.loads(done.stdout)["ready"] is False


@pytest.mark.parametrize(
    "verb", [["status"], ["peers"], ["rounds"], ["explain", "last"], ["id"], ["config", "show"]], ids=" ".join
)
def test_no_daemon_exits_3_and_names_the_socket_and_the_way_out(moshpitd: Moshpitd, verb: list[str]) -> None:
    done = moshpitd(*verb)
    assert done.returncode == 3
    assert "moshpitd.sock (No such file or directory)" in done.stderr and "moshpitd run" in done.stderr
    assert done.stdout == ""


def test_a_socket_nobody_listens_at_any_more_exits_3(moshpitd: Moshpitd, fake_daemon: FakeDaemon) -> None:
    fake_daemon.die()
    fake_daemon.socket.touch()
    done = moshpitd("status")
    assert done.returncode == 3 and "Connection refused" in done.stderr


def test_the_socket_may_be_named_by_flag_and_by_variable(
    moshpitd: Moshpitd, fake_daemon: FakeDaemon, tmp_path: Path
) -> None:
    elsewhere = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert moshpitd("id", **elsewhere).returncode == 3
    assert moshpitd("id", "--socket", fake_daemon.socket, **elsewhere).stdout == f"{OWN}\n"
    assert moshpitd("id", MOSHPITD_SOCKET=str(fake_daemon.socket), **elsewhere).stdout == f"{OWN}\n"


def test_peers_are_listed(fake_daemon: FakeDaemon, moshpitd: Moshpitd, as_json: Callable[..., object]) -> None:
    listed = as_json("peers")
    assert isinstance(listed, dict)
    first, second = listed["peers"]
    assert (first["peer_id"], first["address"], first["seconds_since_heard"]) == (OTHER, "10.0.0.2:7600", 0.5)
    assert (second["peer_id"], second["state"], second["seconds_since_heard"]) == (THIRD, "suspect", None)
    table = moshpitd("peers").stdout
    assert "0.5 s ago" in table and "cannot be dialled" in table


def test_rounds_lists_averagings_newest_first(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, as_json: Callable[..., object]
) -> None:
    fake_daemon.receipts = [receipt(pb.OUTCOME_PARTIAL, epoch=8), receipt(pb.OUTCOME_COMPLETE, epoch=7)]
    listed = as_json("rounds")
    assert isinstance(listed, dict)
    assert [each["epoch"] for each in listed["averagings"]] == [8, 7]
    table = moshpitd("rounds").stdout
    assert "8.0" in table and "partial" in table and "1.5 MB" in table
    only = as_json("rounds", "--limit", "1")
    assert isinstance(only, dict) and len(only["averagings"]) == 1


def test_explain_tells_who_met_who_reduced_what_and_who_was_dropped(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd
) -> None:
    fake_daemon.receipts = [receipt(pb.OUTCOME_PARTIAL)]
    told = moshpitd("explain", "7").stdout
    for part in (
        "Averaging 7 of session 'default' was partial: this peer and 2 others met on a grid of 1x3, total weight 6.",
        "0.010 s to find the groups, 0.200 s to exchange and reduce. 1.5 MB went out, 12 B came in.",
        "bbbbbbbb with weight 2, leading",
        "this peer reduced elements 0 to 4,096, from all members.",
        "bbbbbbbb reduced elements 4,096 to 10,000, without cccccccc.",
        "cccccccc was dropped: stood still for 3 s.",
        "by grpc in flash8 (auto: over the slowest line), 8.25 bits an element, off by 0.006 of its norm;",
        "01" * 32,
    ):
        assert part in told


def test_explain_tells_what_a_compressor_made_of_it(fake_daemon: FakeDaemon, moshpitd: Moshpitd) -> None:
    told = receipt(pb.OUTCOME_COMPLETE)
    told.compressor = "arc:0.2,4,ef21m,0.1,0"
    told.notes.append("sent dense: membership changed")
    told.rounds[0].stage = "sketch"
    left = told.rounds.add(round=3, axis=1, outcome=pb.OUTCOME_ALONE, stage="rows", why="not the same rows")
    left.members.extend(told.rounds[0].members)
    fake_daemon.receipts = [told]
    said = moshpitd("explain", "last").stdout
    assert "arc:0.2,4,ef21m,0.1,0 went through sketch, then rows. sent dense: membership changed." in said
    assert "for the sketch, along axis" in said
    assert f"for the rows, along axis 1: {len(left.members)} met and averaged nothing. Why: not the same rows." in said


def test_explain_tells_who_gave_which_shard(fake_daemon: FakeDaemon, moshpitd: Moshpitd) -> None:
    told = receipt(pb.OUTCOME_COMPLETE)
    told.joined = True
    told.shard.MergeFrom(pb.Shard(start=0, stop=5000, version=b"version!", changed=True))
    told.rounds[0].stage = "broadcast_shard"
    fake_daemon.receipts = [told]
    said = moshpitd("explain", "last").stdout
    assert "received what the owners of shards hold" in said
    assert "This peer owns elements 0 to 5,000; the shards were made anew in this call." in said
    span = told.rounds[0].spans[0]
    assert f"gave elements {span.start:,} to {span.stop:,}." in said
    assert "reduced elements" not in said
    listed = json.loads(moshpitd("rounds", "--json").stdout)
    (shard,) = [each["shard"] for each in listed["averagings"]]
    assert shard == {"start": 0, "stop": 5000, "version": b"version!".hex(), "changed": True}


def test_explain_tells_what_was_lost_and_what_became_of_it(fake_daemon: FakeDaemon, moshpitd: Moshpitd) -> None:
    told = receipt(pb.OUTCOME_COMPLETE)
    (round_,) = told.rounds
    round_.transport, round_.transport_why = "lossy", "lossy as asked for; one of every 16, as asked for"
    round_.lossy.MergeFrom(
        pb.Lossy(
            estimator="difference",
            links=[pb.LostOnLink(peer=OTHER, sent=1200, lost=120), pb.LostOnLink(peer=THIRD, blocked=True)],
            repaired=2,
            unrepaired=1,
            stale_elements=500,
            late=3,
            deadline_s=0.25,
        )
    )
    fake_daemon.receipts = [told]
    said = moshpitd("explain", "last").stdout
    for part in (
        "to reduce by lossy packets in flash8",
        "Why this way: lossy as asked for; one of every 16, as asked for.",
        "Lost on the way: 120 of 1,200 packets from bbbbbbbb (10.0%).",
        "No datagram passed between cccccccc and this peer: reliable streams carried all.",
        "2 ranges of this peer's span that no packet had brought came again, over reliable streams.",
        "1 range of this peer's span did not come at all: there everybody kept its own values.",
        "No average came of 500 elements (5.0% of all): there this peer kept its own values.",
        "3 packets came too late, after 0.25 s.",
        "so there is no digest",
    ):
        assert part in said
    assert "holds the same bits" not in said


def test_explain_can_tell_one_round_or_the_last_averaging(fake_daemon: FakeDaemon, moshpitd: Moshpitd) -> None:
    fake_daemon.receipts = [receipt(pb.OUTCOME_ALONE, epoch=9), receipt(pb.OUTCOME_COMPLETE)]
    assert moshpitd("explain", "7.0").stdout.startswith("Round 7.0, along axis 1, complete")
    assert "found nobody else; the values are unchanged. Why: nobody else" in moshpitd("explain", "last").stdout


def test_explain_of_an_averaging_nobody_remembers_says_which_are(fake_daemon: FakeDaemon, moshpitd: Moshpitd) -> None:
    fake_daemon.receipts = [receipt(pb.OUTCOME_COMPLETE, epoch=9), receipt(pb.OUTCOME_COMPLETE, epoch=5)]
    done = moshpitd("explain", "12")
    assert done.returncode == 1 and "knows no averaging 12; it remembers 5 to 9" in done.stderr
    assert moshpitd("explain", "9.3").returncode == 1
    assert moshpitd("explain", "twelve").returncode == 2


def test_id_and_version(fake_daemon: FakeDaemon, moshpitd: Moshpitd, as_json: Callable[..., object]) -> None:
    assert as_json("id") == {"peer_id": OWN}
    assert as_json("version") == {"version": package.__version__}
    assert moshpitd("version").stdout == f"{package.__version__}\n"


def test_config_show_asks_the_running_daemon(fake_daemon: FakeDaemon, as_json: Callable[..., object]) -> None:
    assert as_json("config", "show") == {"swarm": {"value": "demo", "source": "file"}}


def test_config_show_offline_is_what_run_would_use(moshpitd: Moshpitd) -> None:
    done = moshpitd("config", "show", "--offline", "--json", MOSHPITD_SWARM="s", MOSHPITD_GRID="2x4")
    shown = json.loads(done.stdout)
    assert shown["swarm"] == {"value": "s", "source": "environment"}
    assert shown["listen"] == {"value": "0.0.0.0:7600", "source": "default"}
    assert json.loads(moshpitd("config", "show", "--swarm", "t", "--json").stdout)["swarm"]["source"] == "flag"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["run", "--swram", "x"], "'--swarm'"),
        (["average", "x.safetensors", "--min-peer", "2"], "'--min-peers'"),
        (["status", "--jason"], "'--json'"),
    ],
)
def test_an_unknown_flag_exits_2_and_suggests_the_one_that_was_meant(
    moshpitd: Moshpitd, typed: list[str], meant: str
) -> None:
    done = moshpitd(*typed)
    assert done.returncode == 2 and meant in done.stderr


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        (["run"], "--swarm NAME"),
        (["run", "--swarm", "s", "--listen", "localhost"], "--listen: 'localhost' has no port"),
        (["run", "--swarm", "s", "--join", "::1:7600"], "--join: '::1:7600' is an IPv6 address without brackets"),
        (["run", "--swarm", "s", "--config", "absent.toml"], "absent.toml: No such file"),
        (["average", "x", "--weight", "-1"], "'-1' is no weight"),
        (["average", "x", "--weight", "nan"], "'nan' is no weight"),
        (["average", "x", "--timeout", "0"], "'0' is no timeout"),
        (["average", "x", "--rounds", "some"], "'some' is neither auto nor a number"),
        (["average"], "IN.safetensors"),
        (["fly"], "fly"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_2_and_names_what_is_wrong(moshpitd: Moshpitd, typed: list[str], complaint: str) -> None:
    done = moshpitd(*typed)
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr


def test_an_unknown_variable_stops_run_with_a_suggestion(moshpitd: Moshpitd) -> None:
    done = moshpitd("run", "--swarm", "s", MOSHPITD_JION="host:1")
    assert done.returncode == 2 and "did you mean MOSHPITD_JOIN?" in done.stderr


def test_verbs_that_scripts_call_often_load_neither_numpy_nor_rich_nor_kademlia(
    fake_daemon: FakeDaemon, command: list[str], environment: dict[str, str]
) -> None:
    timed = [command[0], "-X", "importtime", *command[1:], "status", "--json"]
    done = subprocess.run(timed, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "grpc" in loaded and not loaded & {"numpy", "rich", "kademlia", "safetensors", "cryptography", "uvloop"}


def test_status_of_a_session_that_avoids_waiting(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, as_json: Callable[..., object]
) -> None:
    counts = {"fresh": 14, "merge": 2, "barrier": 1, "activations": 5, "passive": 3, "skipped": 1}
    fake_daemon.cohort = pb.Cohort(
        cohort=b"\x05", members=8, live=7, version=17, barrier=20, staleness_max=3, counts=counts
    )
    shown = " ".join(moshpitd("status", COLUMNS="400").stdout.split())
    assert (
        "default: version 17 of a cohort of 7 (it began with 8), barrier at 20; 14 fresh, 2 merged, 1 barrier" in shown
    )
    assert "5 begun by this trainer, 3 run without it, 1 skipped; models at most 3 versions old" in shown
    status = as_json("status")
    assert isinstance(status, dict)
    cohort = status["sessions"][0]["cohort"]
    assert (cohort["cohort"], cohort["live"], cohort["barrier"], cohort["counts"]) == ("05", 7, 20, counts)
    fake_daemon.cohort = pb.Cohort(members=0)
    assert "in no cohort until the next barrier" in moshpitd("status", COLUMNS="400").stdout


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (
            {"kind": pb.VERSION_KIND_MERGE, "staleness": 2, "skipped": 1},
            ("came late for version 7", "divided by 3", "2 versions old", "no part any more in 1 version"),
        ),
        ({"kind": pb.VERSION_KIND_FRESH, "fresh": True}, ("Version 7 is the mean of 2 models, the posted one",)),
        ({"kind": pb.VERSION_KIND_BARRIER, "fresh": True}, ("Version 7 was a barrier", "2 models make the mean")),
        ({"kind": pb.VERSION_KIND_ALONE}, ("Nobody else was in version 7",)),
    ],
)
def test_explain_tells_what_became_of_a_version(
    fake_daemon: FakeDaemon, moshpitd: Moshpitd, version: dict[str, object], told: tuple[str, ...]
) -> None:
    shown = receipt(pb.OUTCOME_COMPLETE)
    contributors = [pb.Contributor(peer=OWN, posted=5), pb.Contributor(peer=OTHER)]
    shown.version.CopyFrom(pb.Version(version=7, contributors=contributors, **version))  # type: ignore[arg-type]
    fake_daemon.receipts = [shown]
    text = " ".join(moshpitd("explain", "last", COLUMNS="400").stdout.split())
    for sentence in (*told, "The model of this peer was posted for version 5.", "did not say how old it is"):
        assert sentence in text

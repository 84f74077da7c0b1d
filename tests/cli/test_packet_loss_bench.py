"""`moshpitd bench packet-loss`: what it tells people and programs, and its parts in small."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pytest

from moshpitd.cli import packet_loss_bench, packet_loss_rounds, packet_loss_training, packet_loss_wire
from moshpitd.cli.namespaces import NoNamespaces
from moshpitd.cli.packet_loss_bench import BiasOf, DriftOf, Figures, show
from moshpitd.cli.packet_loss_rounds import DaemonDrift, MessageTimes, Net, RoundTimes
from moshpitd.cli.packet_loss_training import Course
from moshpitd.cli.packet_loss_wire import Wire
from moshpitd.simulation.lossy_figures import Bias, Drift
from tests.cli.conftest import Moshpitd

FIGURES = Figures(
    bias=[BiasOf("10% lost on all links", Bias(4096, 0.0011, 0.0014, 0.024, 0.12))],
    least_noise={0.1: 0.1197},
    drift=[DriftOf("owner", 0.202, Drift(0.1, 100_000, 0.2011, -0.003, 0.004, [0.2, 0.202]))],
    daemons_drift=DaemonDrift(0.1, 0.173, 48, 1.01, {"complete": 384}),
    net=Net(
        [RoundTimes("lossy", 4.0, 0.1, 0, [0.2, 0.3], 1000, 100, 6, {"complete": 8}, 0.3)],
        [MessageTimes(0.1, [0.1, 0.9])],
    ),
    training=[Course("owners", "flash4", 0.1, [0.5, 0.139], [0.5, 0.139], [0.0], 1.0, 0.004, 0.0005)],
    loopback=[Wire("UDP", 200e6, 199e6, 0.0, 8.1, 212_992), Wire("gRPC", 0.0, 1.2e9, 0.0, 0.9)],
    missing=["network namespaces need root"],
)


def test_figures_are_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    show(FIGURES, as_json=False)
    told = capsys.readouterr().out
    for sentence in (
        "10% lost on all links: off by 0.0011 of the mean (chance alone 0.0014, the naive mean 0.024); one estimate is "
        "0.120 of the spread off",
        "10% lost: no unbiased rule is less than 0.120 of the spread off",
        "drift, owner, 10% lost: 0.201 (expected 0.202); over 100000 steps it grows by -0.3% (+-0.4%)",
        "drift, 8 daemons, 10% lost: 0.173 (expected 0.174)",
        "training, owners, flash4, 10% lost: loss 0.1390 (+0.40%, perplexity +0.05%)",
        "loopback, UDP at 200 MB/s: 199 MB/s, 0.00% lost, 8.10 processor seconds a GB",
        "its receive buffer had 212992 of 4194304 bytes",
        "loopback, gRPC: 1200 MB/s",
        "plain TCP, 1 MiB, 10% lost: 500.0 ms, p99 892 ms (2 messages)",
        "rounds, lossy, 4 MB, 10% lost, not shaped: 250 ms, p99 299 ms (2 rounds; 8 complete); 10.00% of packets lost",
        "not measured: network namespaces need root",
    ):
        assert sentence in told
    assert "busy" not in told


def test_programs_get_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    show(FIGURES, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["bias"][0]["found"]["naive"] == 0.024
    assert told["net"]["rounds"][0]["seconds"] == [0.2, 0.3]


def test_bias_is_measured_and_the_naive_mean_leans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packet_loss_bench, "BIAS_ROUNDS", 4)
    figures = packet_loss_bench.run(parts=["bias"], rounds=2, steps=40, seed=3)
    assert len(figures.bias) == 9 and figures.drift == figures.training == figures.loopback == []
    for found in (each.found for each in figures.bias):
        assert found.bias < 1.5 * found.floor
        assert found.naive > 6 * found.bias


def test_parts_that_do_not_exist_are_refused(moshpitd: Moshpitd) -> None:
    done = moshpitd("bench", "packet-loss", "--part", "bias", "--part", "all")
    assert done.returncode == 2 and "'all' is not one of" in done.stderr


def test_without_namespaces_the_rest_is_measured_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Net:
        raise NoNamespaces("run this as root")

    monkeypatch.setattr(packet_loss_rounds, "rounds", refuse)
    figures = packet_loss_bench.run(parts=["rounds"], rounds=2, steps=40, seed=0)
    assert figures.missing == ["run this as root"] and figures.net == Net()


def test_peers_learn_at_any_loss_and_increments_drift_apart() -> None:
    courses = packet_loss_training.train([0.0, 0.3], steps=40, seed=0)
    by_run = {(course.way, course.codec, course.loss): course for course in courses}
    assert len(by_run) == 7
    for course in courses:
        assert course.losses[-1] < 0.6 * course.losses[0]
    lossless = by_run["owners", "float32", 0.0]
    lossy, control = by_run["owners", "float32", 0.3], by_run["increments", "float32", 0.3]
    assert max(lossless.apart) < 1e-12
    assert control.growth > 1.3 > lossy.growth
    assert control.apart[-1] > 20 * lossy.apart[-1]
    assert abs(lossy.off) < 0.05 < control.off


def test_what_loopback_carries_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packet_loss_wire, "TRIES", 1)
    wires = packet_loss_wire.measure(2_000_000, lambda text: None)
    assert [wire.way for wire in wires][-2:] == ["gRPC", "plain TCP"]
    assert all(wire.bytes_s > 0 and wire.cpu_s_gb > 0 and 0 <= wire.lost < 1 for wire in wires)
    assert wires[0].receive_buffer_bytes > wires[4].receive_buffer_bytes == packet_loss_wire.SMALL_BUFFER_BYTES // 2


def test_daemons_average_while_the_network_loses_packets() -> None:
    """Where namespaces can be made; anywhere else this says so, as the verb does."""
    with suppress(NoNamespaces):
        net = packet_loss_rounds.rounds(
            2, say=lambda text: None, megabytes=(1,), losses=(0.1,), transports=("lossy",), messages=2
        )
        lossy = net.rounds[0]
        assert (lossy.transport, lossy.loss, len(lossy.seconds)) == ("lossy", 0.1, 2)
        assert lossy.lost / lossy.packets == pytest.approx(0.1, abs=0.03)
        assert lossy.outcomes == {"complete": 8}
        assert lossy.error < 0.5
        assert [len(message.seconds) for message in net.messages] == [2]
        assert all(np.isfinite(cell.ms(0.99)) for cell in net.rounds)

"""Lossy rounds: what `moshpitd bench packet-loss` finds, with the figures that were promised of it."""

from __future__ import annotations

from dataclasses import asdict

from moshpitd.cli.failure import Failure
from moshpitd.cli.packet_loss_bench import OF_GROUP, PARTS, Figures, run
from moshpitd.cli.packet_loss_rounds import RoundTimes
from moshpitd.cli.packet_loss_training import INCREMENTS
from tests.benchmarks.figures import Figure, Goal, Measured, WrongResult
from tests.benchmarks.swarm import SwarmFailed

ROUNDS, ROUNDS_QUICK = 100, 10
STEPS, STEPS_QUICK = 300, 60
NAIVE_MIN = 6.0
CHANCE_MAX = 1.5
"""Of what chance alone shows: what is more is a lean."""
LEAN_MAX, NOISE_MAX = 0.01, 0.3
DRIFT_OFF_MAX, SIGMAS_MAX = 5.0, 4.0
FLAT_MAX, FASTER_MIN, OF_GRPC_MIN = 1.3, 5.0, 0.8
OFF_MAX = 1.0
RATES = {"UDP": 200.0, "UDP, GSO and GRO": 400.0}
"""MB a second that nothing may be lost at."""


def measure(*, quick: bool) -> Measured:
    """Raises WrongResult where an estimate leans or members drift apart for ever."""
    try:
        found = run(
            parts=PARTS, rounds=ROUNDS_QUICK if quick else ROUNDS, steps=STEPS_QUICK if quick else STEPS, seed=0
        )
    except Failure as failure:
        raise SwarmFailed(str(failure)) from failure
    figures = [*_bias(found), *_drift(found), *_rounds(found), *_training(found), *_loopback(found)]
    return Measured(tuple(figures), asdict(found), tuple(dict.fromkeys(found.missing)))


def _tell(
    name: str, value: float, unit: str, goal: Goal | None = None, target: float | None = None, note: str = ""
) -> Figure:
    return Figure("packet_loss", name, value, unit, goal, target, note)


def _bias(found: Figures) -> list[Figure]:
    told: list[Figure] = []
    for each in found.bias:
        bias = each.found
        if bias.bias > 2 * CHANCE_MAX * bias.floor:
            raise WrongResult(f"{each.what}: estimates lean by {bias.bias:.2g}, chance alone shows {bias.floor:.2g}")
        if each.what.startswith("parameters"):
            told.append(
                _tell(f"{each.what}: error of one estimate", bias.noise, "of the spread", Goal.AT_MOST, NOISE_MAX)
            )
            continue
        note = f"of the mean: {bias.bias:.2g}; chance alone {bias.floor:.2g}, the naive mean {bias.naive:.2g}"
        told.append(_tell(f"{each.what}: lean", bias.bias / bias.floor, "of chance", Goal.AT_MOST, CHANCE_MAX, note))
        told.append(_tell(f"{each.what}: lean", bias.bias, "of the mean", Goal.AT_MOST, LEAN_MAX))
        told.append(
            _tell(f"{each.what}: the naive mean leans more", bias.naive / bias.bias, "x", Goal.AT_LEAST, NAIVE_MIN)
        )
    return told


def _drift(found: Figures) -> list[Figure]:
    told: list[Figure] = []
    for each in found.drift:
        drift = each.found
        what = f"drift, {each.what}, {drift.loss:.0%} lost"
        if not each.expected:
            told.append(_tell(f"{what}: grows by", drift.growth, "of it", note=f"the control, {drift.steps} steps"))
            continue
        if abs(drift.growth) > 0.1:
            raise WrongResult(f"{what} grows by {drift.growth:.0%}")
        off = 100 * abs(drift.drift / each.expected - 1)
        note = f"{drift.drift:.3f}, table {each.expected:.3f}"
        told.append(_tell(f"{what}: off the table", off, "%", Goal.AT_MOST, DRIFT_OFF_MAX, note))
        sigmas = abs(drift.growth / drift.growth_error)
        note = f"{drift.growth:+.2%} over {drift.steps} steps"
        told.append(_tell(f"{what}: slope", sigmas, "standard errors", Goal.AT_MOST, SIGMAS_MAX, note))
    if daemons := found.daemons_drift:
        off = 100 * abs(daemons.drift / OF_GROUP[daemons.loss] - 1)
        note = f"{daemons.drift:.3f}; second half of {daemons.rounds} rounds by the first {daemons.growth:.2f}"
        name = f"drift, 8 daemons, {daemons.loss:.0%} lost: off the table"
        told.append(_tell(name, off, "%", Goal.AT_MOST, DRIFT_OFF_MAX, note))
    return told


def _rounds(found: Figures) -> list[Figure]:
    told: list[Figure] = []
    cells = {(c.transport, c.megabytes, c.loss, c.uplink_mbit): c for c in found.net.rounds}
    for (transport, megabytes, loss, mbit), cell in cells.items():
        link = f"{mbit} Mbit/s" if mbit else f"{loss:.0%} lost"
        what = f"{megabytes:g} MB, {link}"
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(cell.outcomes.items()))
        note = f"p99 {cell.ms(0.99):.0f} ms; {len(cell.seconds)} rounds; {kinds}"
        told.append(_tell(f"{what}: a {transport} round", cell.ms(0.5), "ms", note=note))
        if transport != "lossy":
            continue
        if not mbit and loss == max(each.loss for each in found.net.rounds):
            calm = cells[transport, megabytes, 0.0, 0]
            name, goal = f"{what}: p99 by that without loss", (Goal.AT_MOST, FLAT_MAX)
            told.append(_tell(name, cell.ms(0.99) / calm.ms(0.99), "x", *goal, _both(cell, calm, 0.99)))
        beside = cells.get(("reliable", megabytes, loss, mbit))
        if beside is None:
            continue
        if mbit:
            ratio, both = beside.ms(0.5) / cell.ms(0.5), _both(cell, beside, 0.5)
            told.append(_tell(f"{what}: throughput by gRPC's", ratio, "x", Goal.AT_LEAST, OF_GRPC_MIN, both))
            continue
        is_promised = loss == 0.05
        told.append(
            _tell(
                f"{what}: p99, times faster than gRPC's",
                beside.ms(0.99) / cell.ms(0.99),
                "x",
                Goal.AT_LEAST if is_promised else None,
                FASTER_MIN if is_promised else None,
                _both(cell, beside, 0.99),
            )
        )
    for message in found.net.messages:
        note = f"median {message.ms(0.5):.1f} ms; {len(message.seconds)} messages"
        told.append(_tell(f"1 MiB over plain TCP, {message.loss:.0%} lost: p99", message.ms(0.99), "ms", note=note))
    return told


def _both(one: RoundTimes, other: RoundTimes, share: float) -> str:
    return f"{one.ms(share):.0f} against {other.ms(share):.0f} ms"


def _training(found: Figures) -> list[Figure]:
    told: list[Figure] = []
    for course in found.training:
        if not course.loss:
            continue
        is_promised = course.loss == 0.1 and course.way != INCREMENTS
        told.append(
            _tell(
                f"training, {course.way}, {course.codec}, {course.loss:.0%} lost: loss off that without",
                100 * abs(course.off),
                "%",
                Goal.AT_MOST if is_promised else None,
                OFF_MAX if is_promised else None,
                f"{course.own[-1]:.4f}; drift, last quarter by second {course.growth:.2f}",
            )
        )
    return told


def _loopback(found: Figures) -> list[Figure]:
    told: list[Figure] = []
    for wire in found.loopback:
        megabytes_s = wire.asked_bytes_s / 1e6
        what = f"loopback, {wire.way}" + (f", {megabytes_s:.0f} MB/s asked" if megabytes_s else "")
        is_promised = RATES.get(wire.way) == megabytes_s
        note = f"receive buffer {wire.receive_buffer_bytes} bytes" if wire.receive_buffer_bytes else ""
        goal = (Goal.AT_LEAST, 0.95 * megabytes_s) if is_promised else (None, None)
        told.append(_tell(f"{what}: arrives", wire.bytes_s / 1e6, "MB/s", *goal, note))
        if wire.receive_buffer_bytes:
            lost = (Goal.AT_MOST, 0.0) if is_promised else (None, None)
            told.append(_tell(f"{what}: lost", 100 * wire.lost, "%", *lost))
        told.append(_tell(f"{what}: processor", wire.cpu_s_gb, "s/GB"))
    return told

"""`moshpitd bench packet-loss`: what rounds are worth and how long they take where packets are lost.

bias and drift are sampled on paper with the daemon's own machines (simulation/lossy_figures.py), drift on daemons too;
peers that learn are in packet_loss_training.py, daemons in a network that loses packets in packet_loss_rounds.py, and
what one process tells another over loopback in packet_loss_wire.py. This file puts the parts together and tells them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from moshpitd.cli import packet_loss_rounds, packet_loss_training, packet_loss_wire
from moshpitd.cli.local_swarm import BUSY, load_per_core
from moshpitd.cli.namespaces import NoNamespaces
from moshpitd.cli.packet_loss_rounds import DaemonDrift, Net, RoundTimes
from moshpitd.cli.packet_loss_training import INCREMENTS, Course
from moshpitd.cli.packet_loss_wire import Wire
from moshpitd.directory.socket import RECEIVE_BUFFER_BYTES
from moshpitd.simulation.lossy_figures import Bias, Drift, bias, drift_from_owner, drift_of_group, least_noise

PARTS = ("bias", "drift", "rounds", "training", "loopback")
LOSSES = (0.1, 0.2, 0.4)
EQUAL = (1.0,) * 8
UNEQUAL_LINKS = (0.02,) * 5 + (0.5,) * 2
UNEQUAL_WEIGHTS = (3.0, 1.0, 30.0, 7.0, 2.0, 14.0, 9.0, 21.0)
FROM_OWNER = {loss: 2 * loss / (1 - loss**2) for loss in LOSSES}
OF_GROUP = {0.05: 0.082, 0.1: 0.174, 0.2: 0.398, 0.4: 1.12}
"""E |th_i - th_j|^2 by the variance of a step: two receivers of an owner that stays, in closed form; members of a group
of 8 that average, as others simulated it."""
DRIFT_STEPS, GROUP_STEPS, CONTROL_STEPS = 100_000, 10_000, 2000
BIAS_ROUNDS = 25
DAEMONS_LOSS, DAEMONS_ROUNDS = 0.1, 60
TRAINING_LOSSES = (0.0, 0.1, 0.2, 0.4)
LOOPBACK_BYTES = 400_000_000


@dataclass(frozen=True, slots=True)
class BiasOf:
    """One kind of links and weights."""

    what: str
    found: Bias


@dataclass(frozen=True, slots=True)
class DriftOf:
    """One kind of owners."""

    what: str
    expected: float
    """0: it grows."""
    found: Drift


@dataclass(slots=True)
class Figures:
    """What came of it; parts that were not asked for are empty."""

    bias: list[BiasOf] = field(default_factory=list)
    least_noise: dict[float, float] = field(default_factory=dict)
    """By loss: of the best unbiased rule there is."""
    drift: list[DriftOf] = field(default_factory=list)
    daemons_drift: DaemonDrift | None = None
    net: Net = field(default_factory=Net)
    training: list[Course] = field(default_factory=list)
    loopback: list[Wire] = field(default_factory=list)
    buffer_asked_bytes: int = RECEIVE_BUFFER_BYTES
    missing: list[str] = field(default_factory=list)
    """What this machine or its user cannot measure, and why."""
    load_per_core: float = 0.0
    """Before it began, in the mean of a minute: others' work. Far above 0 times mean little."""


def run(*, parts: Sequence[str], rounds: int, steps: int, seed: int) -> Figures:
    """`rounds` of 4 MB on each kind of link; `steps` of peers that learn. Raises Failure."""
    figures = Figures(load_per_core=load_per_core())
    if "bias" in parts:
        _bias(figures, seed)
    if "drift" in parts:
        _drift(figures, seed)
    if "training" in parts:
        _say(f"training: {packet_loss_training.PEERS} peers, {steps} steps, on paper")
        figures.training = packet_loss_training.train(TRAINING_LOSSES, steps=steps, seed=seed)
    if "loopback" in parts:
        figures.loopback = packet_loss_wire.measure(LOOPBACK_BYTES, _say)
    try:
        if "drift" in parts:
            figures.daemons_drift = packet_loss_rounds.drift(DAEMONS_LOSS, DAEMONS_ROUNDS, seed=seed, say=_say)
        if "rounds" in parts:
            figures.net = packet_loss_rounds.rounds(rounds, say=_say)
    except NoNamespaces as error:
        figures.missing.append(str(error))
    return figures


def _bias(figures: Figures, seed: int) -> None:
    for what, losses, weights in (
        *((f"{loss:.0%} lost on all links", (loss,) * 7, EQUAL) for loss in LOSSES),
        ("2% lost on five links, 50% on two", UNEQUAL_LINKS, EQUAL),
        ("20% lost on all links, weights 1 to 30", (0.2,) * 7, UNEQUAL_WEIGHTS),
        ("2% lost on five links, 50% on two, weights 1 to 30", UNEQUAL_LINKS, UNEQUAL_WEIGHTS),
    ):
        _say(f"bias: {what}")
        found = bias(losses, weights, mean=0.5, spread=1.0, rounds=BIAS_ROUNDS, seed=seed)
        figures.bias.append(BiasOf(what, found))
    for loss in LOSSES:
        what = f"parameters 1% apart, {loss:.0%} lost"
        figures.bias.append(
            BiasOf(what, bias((loss,) * 7, EQUAL, mean=1.0, spread=0.01, rounds=BIAS_ROUNDS, seed=seed))
        )
        figures.least_noise[loss] = least_noise(loss)


def _drift(figures: Figures, seed: int) -> None:
    for loss, expected in FROM_OWNER.items():
        _say(f"drift: two receivers of an owner that stays, {DRIFT_STEPS} steps at {loss:.0%} loss")
        figures.drift.append(DriftOf("owner", expected, drift_from_owner(loss, steps=DRIFT_STEPS, seed=seed)))
    for loss, expected in OF_GROUP.items():
        _say(f"drift: a group of 8 that averages, {GROUP_STEPS} steps at {loss:.0%} loss")
        figures.drift.append(DriftOf("group", expected, drift_of_group(loss, steps=GROUP_STEPS, seed=seed)))
    control = drift_from_owner(LOSSES[0], steps=CONTROL_STEPS, seed=seed, increments=True)
    figures.drift.append(DriftOf(INCREMENTS, 0.0, control))


# ---- what people read


def show(figures: Figures, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(figures)))
        return
    for each in figures.bias:
        found = each.found
        print(
            f"{each.what}: off by {found.bias:.2g} of the mean (chance alone {found.floor:.2g}, the naive mean "
            f"{found.naive:.2g}); one estimate is {found.noise:.3f} of the spread off"
        )
    for loss, least in figures.least_noise.items():
        print(f"{loss:.0%} lost: no unbiased rule is less than {least:.3f} of the spread off")
    for drift in figures.drift:
        found_drift = drift.found
        expected = f"expected {drift.expected:.3f}" if drift.expected else "the control"
        print(
            f"drift, {drift.what}, {found_drift.loss:.0%} lost: {found_drift.drift:.3f} ({expected}); over "
            f"{found_drift.steps} steps it grows by {found_drift.growth:+.1%} (+-{found_drift.growth_error:.1%})"
        )
    if daemons := figures.daemons_drift:
        print(
            f"drift, 8 daemons, {daemons.loss:.0%} lost: {daemons.drift:.3f} (expected {OF_GROUP[daemons.loss]:.3f}); "
            f"second half of {daemons.rounds} rounds by the first {daemons.growth:.2f}"
        )
    for course in figures.training:
        print(
            f"training, {course.way}, {course.codec}, {course.loss:.0%} lost: loss {course.own[-1]:.4f} "
            f"({course.off:+.2%}, perplexity {course.perplexity_off:+.2%})"
        )
    for wire in figures.loopback:
        asked = f" at {wire.asked_bytes_s / 1e6:.0f} MB/s" if wire.asked_bytes_s else ""
        print(
            f"loopback, {wire.way}{asked}: {wire.bytes_s / 1e6:.0f} MB/s, {wire.lost:.2%} lost, "
            f"{wire.cpu_s_gb:.2f} processor seconds a GB"
        )
        if 0 < wire.receive_buffer_bytes < figures.buffer_asked_bytes:
            print(f"  its receive buffer had {wire.receive_buffer_bytes} of {figures.buffer_asked_bytes} bytes")
    for message in figures.net.messages:
        print(
            f"plain TCP, 1 MiB, {message.loss:.0%} lost: {message.ms(0.5):.1f} ms, p99 {message.ms(0.99):.0f} ms "
            f"({len(message.seconds)} messages)"
        )
    for each_cell in figures.net.rounds:
        print(_told(each_cell))
    for why in figures.missing:
        print(f"not measured: {why}")
    if figures.load_per_core > BUSY:
        print(f"This machine is busy ({figures.load_per_core:.1f} processes a core): times mean little, measure again.")


def _told(cell: RoundTimes) -> str:
    link = f"{cell.uplink_mbit} Mbit/s" if cell.uplink_mbit else "not shaped"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(cell.outcomes.items()))
    lost = ""
    if cell.lost:
        repaired = cell.repaired / len(cell.seconds)
        lost = f"; {cell.lost / cell.packets:.2%} of packets lost, {repaired:.1f} ranges a round repaired"
    return (
        f"rounds, {cell.transport}, {cell.megabytes:g} MB, {cell.loss:.0%} lost, {link}: {cell.ms(0.5):.0f} ms, p99 "
        f"{cell.ms(0.99):.0f} ms ({len(cell.seconds)} rounds; {kinds}){lost}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

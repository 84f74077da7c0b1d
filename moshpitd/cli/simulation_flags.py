"""Reads the flags of `moshpitd simulate` into the options of a workload.

Knows how links, bursts, partitions, amounts and durations are written, and which flags belong to which workload. Does
not know what a workload does with its options.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, TypeVar

import click

from moshpitd.averaging.cohort import COHORT_MAX
from moshpitd.averaging.compressors import check_compressor
from moshpitd.averaging.errors import InvalidInput
from moshpitd.averaging.grid import parse_sides
from moshpitd.averaging.transport import Transport
from moshpitd.simulation.network import Link, Span, Weather
from moshpitd.simulation.packet_loss import LossModel
from moshpitd.simulation.stragglers import Straggler, StragglersOptions
from moshpitd.simulation.workloads import (
    NOTHING_LOST,
    Absence,
    Crowd,
    InStepOptions,
    LinkClass,
    MixedOptions,
    Parting,
)

Options = InStepOptions | MixedOptions | StragglersOptions

PEERS_DEFAULT = 16
STRAGGLERS_PEERS_DEFAULT = 8
OF_MIXED = {
    *("workload", "compressor", "peers", "seed", "seeds", "trace", "as_json"),
    *("transport", "reliable_every", "packet_loss"),
}
"""The flags that say something to the mixed workload; the rest it draws from the seed."""
OF_STRAGGLERS = {
    "averaging",
    "straggler",
    "step",
    "jitter",
    "steps",
    "group_size",
    "barrier_every",
    "lockstep",
}
"""Those that only trainers with a pace of their own understand ..."""
OF_ALL = {"peers", "seed", "seeds", "vector_bytes", "delay", "crash", "timeout", "trace", "as_json"}
"""... and those that they share with swarms in step."""
OF_DROP_COMPUTE = {"micro_batches", "micro_batch", "noise", "exchange"}
"""The flags that say something to `--drop-compute` only."""
LOSSY_BYTES = 1e6
"""Where packets may be lost: a vector large enough that each reducer has some."""
CHUNK_ELEMENTS = 4096
"""Spans begin at multiples of this, so a vector on paper needs as many for each reducer."""

_Read = TypeVar("_Read")


class SimulationFlags(TypedDict):
    """What was typed after `moshpitd simulate`, as click hands it over."""

    workload: str
    averaging: str | None
    straggler: tuple[str, ...]
    step: str
    jitter: float
    steps: int
    group_size: int
    barrier_every: int
    lockstep: bool
    compressor: str
    transport: str
    reliable_every: int
    packet_loss: str | None
    update: float
    peers: int | None
    grid: str
    group_size_max: int
    rounds: str
    averagings_max: int
    seed: int
    seeds: int
    vector_bytes: str | None
    delay: str | None
    loss: float
    link: tuple[str, ...]
    absent: float
    crash: float
    pause: float
    pause_seconds: float
    burst: tuple[str, ...]
    partition: tuple[str, ...]
    slow_trainers: float
    slow_seconds: float
    join: tuple[str, ...]
    leave: tuple[str, ...]
    directory_delay: str | None
    stale: float
    lost_writes: float
    timeout: float
    drop_compute: bool
    micro_batches: int
    micro_batch: str
    noise: float
    exchange: str
    plot: Path | None
    trace: Path | None
    as_json: bool


def read(flags: SimulationFlags, typed: Collection[str]) -> Options:
    """`typed`: the flags that were given. Raises click.UsageError that names the flag and the way out."""
    if lone := sorted(OF_DROP_COMPUTE.intersection(typed)):
        raise click.UsageError(f"--{lone[0].replace('_', '-')} says something with --drop-compute only")
    if flags["seeds"] > 1 and (flags["plot"] or flags["trace"]):
        raise click.UsageError("--plot and --trace show one run: leave out --seeds")
    if flags["averaging"] is not None:
        return _stragglers(flags["averaging"], flags, typed)
    if strange := sorted(OF_STRAGGLERS & set(typed)):
        raise click.UsageError(f"{_spelt(strange)}: say with --averaging who waits for whom")
    if flags["workload"] == "mixed":
        return _mixed(flags, typed)
    return _in_step(flags)


def _stragglers(averaging: str, flags: SimulationFlags, typed: Collection[str]) -> StragglersOptions:
    strange = sorted(set(typed) - OF_STRAGGLERS - OF_ALL)
    if strange:
        raise click.UsageError(f"{_spelt(strange)}: means nothing to trainers with a pace of their own (--averaging)")
    peers = flags["peers"] or STRAGGLERS_PEERS_DEFAULT
    if averaging != "global" and flags["group_size"] > peers:
        raise click.BadParameter(f"{flags['group_size']} is more than --peers {peers}", param_hint="'--group-size'")
    if averaging == "wait-avoiding" and peers > COHORT_MAX:
        raise click.BadParameter(f"a barrier takes {COHORT_MAX} peers at most", param_hint="'--peers'")
    options = StragglersOptions(
        averaging=averaging,
        peers=peers,
        group_size=flags["group_size"],
        barrier_every=flags["barrier_every"],
        lockstep=flags["lockstep"],
        steps=flags["steps"],
        step_s=_read("--step", flags["step"], seconds),
        jitter=flags["jitter"],
        stragglers=_each("--straggler", flags["straggler"], _straggler),
        crash=flags["crash"],
        seed=flags["seed"],
        weather=_weather(flags),
        timeout_s=flags["timeout"],
    )
    for straggler in options.stragglers:
        if straggler.count > peers:
            raise click.BadParameter(f"{straggler.count} are more than --peers {peers}", param_hint="'--straggler'")
    if flags["vector_bytes"] is None:
        return options
    size = _read("--vector-bytes", flags["vector_bytes"], amount)
    chunks = peers if averaging == "global" else flags["group_size"]
    return replace(options, vector_bytes=size, elements=max(1, min(math.ceil(size / 4), CHUNK_ELEMENTS * chunks)))


def _spelt(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _mixed(flags: SimulationFlags, typed: Collection[str]) -> MixedOptions:
    strange = _spelt(sorted(name for name in typed if name not in OF_MIXED))
    if strange:
        raise click.UsageError(
            f"{strange}: the mixed workload draws its faults, links and sizes from --seed; "
            "--workload in-step takes them from you"
        )
    transport, packet_loss = _transport(flags)
    try:
        compressor = check_compressor(flags["compressor"])
        options = MixedOptions(flags["seed"], compressor=compressor, transport=transport, packet_loss=packet_loss)
    except InvalidInput as error:
        raise click.BadParameter(str(error), param_hint="'--compressor'") from error
    peers = flags["peers"]
    return replace(options, peers=(peers, peers)) if peers else options


def _in_step(flags: SimulationFlags) -> InStepOptions:
    if flags["compressor"] != "dense":
        raise click.UsageError("--compressor is for --workload mixed: in step the exact mean is what is measured")
    peers = flags["peers"] or PEERS_DEFAULT
    sides = _read("--grid", flags["grid"], _grid)
    if sides and math.prod(sides) > peers:
        raise click.BadParameter(
            f"{flags['grid']!r} has {math.prod(sides)} cells, and a plan needs a peer for each: "
            f"--peers {math.prod(sides)} or a smaller grid",
            param_hint="'--grid'",
        )
    joiners = _each("--join", flags["join"], _crowd)
    transport, packet_loss = _transport(flags)
    options = InStepOptions(
        peers=peers,
        grid="x".join(map(str, sides)),
        group_size_max=flags["group_size_max"],
        rounds=_read("--rounds", flags["rounds"], _rounds),
        averagings_max=flags["averagings_max"],
        seed=flags["seed"],
        classes=_classes(flags, peers + sum(crowd.count for crowd in joiners)),
        weather=_weather(flags),
        timeout_s=flags["timeout"],
        absent=flags["absent"],
        crash=flags["crash"],
        pause=flags["pause"],
        pause_s=flags["pause_seconds"],
        bursts=_each("--burst", flags["burst"], _burst),
        partings=_each("--partition", flags["partition"], _parting),
        joiners=joiners,
        leavers=_each("--leave", flags["leave"], _crowd),
        slow_trainers=flags["slow_trainers"],
        slow_s=flags["slow_seconds"],
        transport=transport,
        packet_loss=packet_loss or NOTHING_LOST,
        update=flags["update"],
    )
    if transport.may_lose:  # each reducer has packets
        options = replace(options, elements=_elements(LOSSY_BYTES, options, sides))
    dates = (
        *(("--burst", burst.at) for burst in options.bursts),
        *(("--partition", parting.at) for parting in options.partings),
        *(("--join", crowd.at) for crowd in options.joiners),
        *(("--leave", crowd.at) for crowd in options.leavers),
    )
    for flag, at in dates:
        if at >= options.averagings_max:
            last = options.averagings_max - 1
            raise click.BadParameter(
                f"averaging {at} never comes: they count from 0 to {last} (--averagings-max)", param_hint=f"'{flag}'"
            )
    if flags["vector_bytes"] is None:
        return options
    size = _read("--vector-bytes", flags["vector_bytes"], amount)
    return replace(options, vector_bytes=size, elements=_elements(size, options, sides))


def _transport(flags: SimulationFlags) -> tuple[Transport, LossModel | None]:
    """What sessions ask for, and what becomes of their packets."""
    transport = Transport(flags["transport"], flags["reliable_every"])
    try:
        transport.check()
    except InvalidInput as error:
        raise click.BadParameter(str(error), param_hint="'--transport'") from error
    if flags["packet_loss"] is None:
        return transport, None
    if not transport.may_lose:
        raise click.UsageError("--packet-loss: with --transport reliable nothing travels as packets; say lossy or auto")
    return transport, _read("--packet-loss", flags["packet_loss"], _packet_loss)


def _weather(flags: SimulationFlags) -> Weather:
    weather = Weather(stale_s=flags["stale"], lost_writes=flags["lost_writes"])
    if flags["delay"] is not None:
        weather = replace(weather, message=_read("--delay", flags["delay"], _span))
    if flags["directory_delay"] is not None:
        weather = replace(weather, directory=_read("--directory-delay", flags["directory_delay"], _span))
    return weather


def _classes(flags: SimulationFlags, peers: int) -> tuple[LinkClass, ...]:
    """Both ends of a message add their losses, so each has half of what --loss says."""
    classes = list(_each("--link", flags["link"], _link))
    rest = peers - sum(each.count for each in classes)
    if rest < 0:
        raise click.BadParameter(f"together they have {-rest} more peers than the swarm", param_hint="'--link'")
    if not flags["loss"]:
        return tuple(classes)
    half = flags["loss"] / 2
    classes = [LinkClass(replace(c.link, loss=c.link.loss or half), c.count) for c in classes]
    return (*classes, LinkClass(Link(loss=half), rest))


def _elements(size: float, options: InStepOptions, sides: tuple[int, ...]) -> int:
    """Chunks enough that every reducer has its share and they overlap, few enough for many peers."""
    largest = max(sides) if sides else min(options.peers, options.group_size_max * 5 // 4)
    chunks = 4 if options.peers <= 64 else 2 if options.peers <= 256 else 1
    return max(1, min(math.ceil(size / 4), CHUNK_ELEMENTS * largest * chunks))


# ---- how things are written


def seconds(text: str) -> float:
    """ "5ms", "2s" or "0.5"."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(|s|ms|us)", text.strip())
    if not match:
        raise ValueError("is no duration: write 5ms or 0.005")
    return float(match[1]) * {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}[match[2]]


def amount(text: str) -> float:
    """Bytes: "64MB", "64MiB" or a number."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(|B|kB|KB|MB|GB|KiB|MiB|GiB)", text.strip())
    if not match or not float(match[1]):
        raise ValueError("is no amount of bytes: write 64MB, 64MiB or a number above 0")
    factors = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    return float(match[1]) * factors[match[2].upper()]


def _grid(text: str) -> tuple[int, ...]:
    """Empty: auto."""
    if text == "auto":
        return ()
    try:
        sides = parse_sides(text)
    except ValueError as error:
        raise ValueError("is no grid: write auto, or sides like 8, 4x4 or 2x3x4") from error
    if math.prod(sides) < 2:
        raise ValueError("has one cell only: nobody would meet")
    return sides


def _rounds(text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise ValueError("is neither auto nor a number from 1 to 64")
    return int(text)


def _span(text: str) -> Span:
    low, dots, high = text.partition("..")
    ends = seconds(low), seconds(high if dots else low)
    if ends[0] > ends[1]:
        raise ValueError("ends before it begins: write the shorter one first, 5ms..20ms")
    return ends


def _link(text: str) -> LinkClass:
    name, count, terms = _parts(text, 2, 3, "NAME:COUNT:up=1MB,down=5MB,delay=40ms,loss=0.01")
    given: dict[str, float] = {}
    readers: dict[str, Callable[[str], float]] = {"up": amount, "down": amount, "delay": seconds, "loss": _loss}
    for term in terms.split(",") if terms else ():
        key, _, value = term.partition("=")
        if key not in readers:
            near = difflib.get_close_matches(key, readers, 1)
            meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(readers)}"
            raise ValueError(f"says {key!r}, which no link has: {meant}")
        try:
            given[key] = readers[key](value)
        except ValueError as error:
            raise ValueError(f"says {term!r}, and {value!r} {error}") from error
    link = Link(name, given.get("delay", 0.0), given.get("up", 0.0), given.get("down", 0.0), given.get("loss", 0.0))
    return LinkClass(link, _count(count, "COUNT", least=1))


def _straggler(text: str) -> Straggler:
    count, late, _ = _parts(text, 2, 2, "COUNT:LATE, as in 2:320ms")
    return Straggler(_count(count, "COUNT", least=1), seconds(late))


def _burst(text: str) -> Absence:
    at, share, _ = _parts(text, 2, 2, "K:SHARE, as in 0:0.1")
    return Absence(_count(at, "K"), _share(share))


def _parting(text: str) -> Parting:
    shape = "K:SHARE:SECONDS or K:SHARE:SECONDS:one-way, as in 2:0.3:5"
    at, share, rest = _parts(text, 3, 4, shape)
    lasts, _, way = rest.partition(":")
    if way not in ("", "one-way"):
        raise ValueError(f"ends in {way!r}: write {shape}")
    return Parting(_count(at, "K"), _share(share), seconds(lasts), one_way=way == "one-way")


def _crowd(text: str) -> Crowd:
    at, count, _ = _parts(text, 2, 2, "K:N, as in 3:2")
    return Crowd(_count(at, "K"), _count(count, "N", least=1))


def _parts(text: str, least: int, most: int, shape: str) -> tuple[str, str, str]:
    """The first, the second, the rest."""
    parts = text.split(":")
    if not least <= len(parts) <= most or not all(parts):
        raise ValueError(f"is not of the form {shape}")
    return parts[0], parts[1], ":".join(parts[2:])


def _count(text: str, what: str, *, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"has {text!r} for {what}: write a whole number from {least} up")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError(f"has {text!r} for a share: write a number from 0 to 1")
    return share


def _packet_loss(text: str) -> LossModel:
    """ "0.1", or "0.1:8" for bursts of eight packets."""
    share, colon, length = text.partition(":")
    loss = _loss(share)
    if not colon:
        return LossModel.even(loss)
    if not length.isdecimal() or not int(length):
        raise ValueError("is no loss: write a share, and with a colon how many packets a burst takes, as in 0.1:8")
    return LossModel.bursts(loss, length=float(length))


def _loss(text: str) -> float:
    try:
        loss = float(text)
    except ValueError:
        loss = math.nan
    if not 0 <= loss < 1:
        raise ValueError("is no loss: write a share from 0 to below 1")
    return loss


def _each(flag: str, texts: Iterable[str], reader: Callable[[str], _Read]) -> tuple[_Read, ...]:
    return tuple(_read(flag, text, reader) for text in texts)


def _read(flag: str, text: str, reader: Callable[[str], _Read]) -> _Read:
    try:
        return reader(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} {error}", param_hint=f"'{flag}'") from error

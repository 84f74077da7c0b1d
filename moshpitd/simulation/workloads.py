"""What the trainers of a simulated swarm do, and what comes of it.

`InStep`: everybody averages, all at once, again and again; the spread over all peers is measured after each averaging.
`Mixed`: everybody trains at its own pace while everything goes wrong that may; then all is calm and must be exact.
Both run the production machines and all checkers. Same options and seed, same result, to the byte.
"""

from __future__ import annotations

import gc
import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.all_reduce import AllReduceConfig
from moshpitd.averaging.grid import parse_sides
from moshpitd.averaging.receipt import Outcome, Receipt
from moshpitd.averaging.session import Call, SessionConfig
from moshpitd.averaging.transport import EVERYTHING_ARRIVES, Transport
from moshpitd.averaging.vector import Vector
from moshpitd.simulation.checkers import (
    Agreement,
    Bounds,
    Checker,
    Conservation,
    Contraction,
    Drift,
    HonestReceipts,
    Leaks,
    Liveness,
    Unbiasedness,
)
from moshpitd.simulation.checkers.unbiasedness import LEAN_MAX, LEAN_MAX_IN_BURSTS
from moshpitd.simulation.clock import Stuck
from moshpitd.simulation.faults import Mischief, Odds
from moshpitd.simulation.history import History
from moshpitd.simulation.network import Link, Weather
from moshpitd.simulation.packet_loss import LossModel, PacketLoss
from moshpitd.simulation.swarm import Ending, Observer, Peer, Swarm, options_for

AGREED = 1e-9
"""Variance over all peers below which a swarm of N(0, 1) values has agreed."""
UNDIALABLE = "nobody in the group can be dialled"
STEP_S = 10.0
"""How long a step of training takes, calm averaging included: longer than the slowest links need."""
STAGES = 3
"""... and so many times longer where a compressor has stages: on three axes they are nine rounds."""
NOTHING_LOST = LossModel()
Values = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LinkClass:
    """Some peers with the same line."""

    link: Link
    count: int


@dataclass(frozen=True, slots=True)
class Absence:
    """A share of the peers does not come to one averaging."""

    at: int
    share: float


@dataclass(frozen=True, slots=True)
class Parting:
    """A share of the peers is cut off from the others before averaging `at`, for so many seconds."""

    at: int
    share: float
    lasts_s: float
    one_way: bool = False


@dataclass(frozen=True, slots=True)
class Crowd:
    """So many peers come, or leave, before averaging `at`."""

    at: int
    count: int


@dataclass(frozen=True, slots=True)
class InStepOptions:
    """A swarm that averages in step."""

    peers: int = 16
    grid: str = ""
    """Pinned, "4x4"; empty: the planner chooses."""
    group_size_max: int = 16
    rounds: int = 1
    """Of an averaging; 0: as many as the grid has axes."""
    averagings_max: int = 50
    seed: int = 0
    elements: int = 4
    vector_bytes: float = 0.0
    """What the vector is taken to weigh on the links; 0: what it does."""
    classes: tuple[LinkClass, ...] = ()
    """The first peers get these lines, the others `weather` only."""
    weather: Weather = field(default_factory=Weather)
    timeout_s: float = 60.0
    absent: float = 0.0
    """The chance of each peer to miss an averaging."""
    crash: float = 0.0
    """The chance of each daemon to die in an averaging, at any moment of it."""
    pause: float = 0.0
    """The chance of each daemon to stand still within an averaging."""
    pause_s: float = 5.0
    bursts: tuple[Absence, ...] = ()
    partings: tuple[Parting, ...] = ()
    joiners: tuple[Crowd, ...] = ()
    leavers: tuple[Crowd, ...] = ()
    slow_trainers: float = 0.0
    """The share of trainers that call late, by up to `slow_s`."""
    slow_s: float = 2.0
    apart_s: float = 0.01
    """How far apart the others call."""
    transport: Transport = EVERYTHING_ARRIVES
    packet_loss: LossModel = NOTHING_LOST
    """What becomes of lossy rounds' packets."""
    update: float = 0.0
    """Standard deviation of what each trainer adds to its values before each averaging: with some of it swarms drift,
    without they agree."""


@dataclass(slots=True)
class Report:
    """What came of a run."""

    workload: str
    seed: int
    peers: int
    grid: str = ""
    spreads: list[float] = field(default_factory=list)
    """Variance over all living peers: at first, then after each averaging."""
    theory: list[float] = field(default_factory=list)
    """The factor by which it should fall in each."""
    rounds_to_agreement: int | None = None
    """Until the averaging whose end finds everybody agreed."""
    averagings: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    round_s_p50: float = 0.0
    round_s_p99: float = 0.0
    messages_per_peer: float = 0.0
    bytes_per_peer: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)
    """Why, and how often."""
    faults: dict[str, int] = field(default_factory=dict)
    looked: dict[str, int] = field(default_factory=dict)
    """How many things each checker judged."""
    complaints: list[str] = field(default_factory=list)
    windows: dict[str, int] = field(default_factory=dict)
    """How often something happened that is not promised against."""
    virtual_s: float = 0.0
    events: int = 0

    def as_json(self) -> dict[str, object]:
        return asdict(self)


class Tally(Observer):
    """Counts outcomes, times and reasons."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.windows: Counter[str] = Counter()
        self.round_s: list[float] = []
        self._survivors: dict[tuple[object, ...], set[bytes]] = {}
        """Of a group that lost somebody: the ids under which its members committed."""

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        if ending.receipt is None:
            self.outcomes["failed"] += 1
            self.dropped[_reason(str(ending.error))] += 1
            return
        self.outcomes[ending.receipt.outcome.value] += 1
        for receipt in ending.receipt.rounds:
            self.round_s.append(receipt.seconds_matchmaking + receipt.seconds_reduce)
            self.dropped.update(_reason(line.why) for line in receipt.dropped)
            if "unconfirmed" in receipt.why:
                self.windows["committed unconfirmed"] += 1
            if receipt.outcome is Outcome.ALONE and len(receipt.members) > 1:
                self.windows["aborted after the group began"] += 1
            elif receipt.group_id and receipt.outcome is not Outcome.COMPLETE:
                begun = (receipt.averaging, receipt.round, receipt.leader, receipt.members)
                ids = self._survivors.setdefault(begun, set())
                if ids and receipt.group_id not in ids:
                    self.windows["committed with other survivors"] += 1
                ids.add(receipt.group_id)


def _reason(why: str) -> str:
    """Without names and numbers, so that like goes to like."""
    words = [word for word in why.split() if not any(c.isdigit() for c in word) and "-" not in word]
    return " ".join(words)[:60].rstrip(":;, ")


class Run:
    """What both workloads share: a swarm, its checkers, its report."""

    def __init__(self, seed: int, config: SessionConfig, weather: Weather, report: Report) -> None:
        self.swarm = Swarm(seed, weather, config)
        self.report = report
        self.contraction, self.liveness = Contraction(), Liveness()
        self.checkers: list[Checker] = [
            Agreement(),
            HonestReceipts(),
            Conservation(),
            Bounds(),
            Leaks(),
            self.liveness,
            self.contraction,
        ]
        self.drift = Drift()
        self.tally = Tally()
        self.history = History(list(self.checkers))
        self.swarm.observers += [self.history, self.tally]
        self.rng = random.Random(seed ^ 0x5EED)
        self.values_of = np.random.default_rng([seed, 0xDA7A])

    def let_lose(self, loss: LossModel) -> None:
        """Packets are lost, and nothing else: then members must not drift apart, nor estimates lean."""
        self.swarm.packets = PacketLoss(loss, self.swarm.rng)
        unbiasedness = Unbiasedness(LEAN_MAX_IN_BURSTS if loss.to_bad else LEAN_MAX)
        self.checkers += [self.drift, unbiasedness]
        self.history.watchers.append(unbiasedness)

    def finish(self, *, settle_s: float = 40.0) -> Report:
        """Let everything come to rest, then look a last time."""
        swarm, report = self.swarm, self.report
        try:
            swarm.run_for(settle_s)
        except Stuck as stuck:
            self.liveness.complain(swarm.now, str(stuck))
        for checker in self.checkers:
            checker.finish(swarm)
            report.looked[checker.name] = checker.looked
            report.complaints += checker.complaints
        report.complaints += [f"protocol: {error}" for error in swarm.protocol_errors]
        report.outcomes = dict(sorted(self.tally.outcomes.items()))
        report.dropped = dict(self.tally.dropped.most_common(12))
        report.windows = dict(sorted(self.tally.windows.items()))
        if self.tally.round_s:
            report.round_s_p50, report.round_s_p99 = (float(np.percentile(self.tally.round_s, q)) for q in (50, 99))
        report.messages_per_peer = sum(swarm.network.messages.values()) / max(1, len(swarm.peers))
        report.bytes_per_peer = sum(swarm.network.bytes.values()) / max(1, len(swarm.peers))
        report.virtual_s, report.events = swarm.now, swarm.clock.events
        return report


def packed(values: Values, shape: tuple[int, ...] | None = None) -> Vector:
    return Vector.of({"w": values.reshape(shape or values.shape)})


def variance(held: Sequence[Values]) -> float:
    """Over the peers, the mean of all elements."""
    return float(np.mean(np.var(np.stack(held).astype(np.float64), axis=0))) if held else 0.0


@contextmanager
def _without_cycle_search() -> Iterator[None]:
    """A large swarm is many objects and hardly a cycle: to look for some again and again takes a third of the time."""
    searched = gc.isenabled()
    gc.collect()  # a swarm that is over is one large cycle
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()


class InStep:
    """See InStepOptions. `progress` is called after each averaging with the report so far."""

    def __init__(self, options: InStepOptions) -> None:
        self.options = options
        config = SessionConfig(pin=options.grid, group_size_max=options.group_size_max, chunk_bytes=1 << 14)
        self._run = Run(options.seed, config, options.weather, Report("in step", options.seed, options.peers))
        self.swarm = self._run.swarm
        self._held: dict[Peer, Values] = {}
        self._opened = 0
        self._clean = 0
        """Averagings in a row in which nobody was absent and nothing failed."""
        if options.transport.may_lose:
            self._run.let_lose(options.packet_loss)
        self._lines = [c.link for c in options.classes for _ in range(c.count)]
        if options.vector_bytes:
            self.swarm.network.bytes_scale = options.vector_bytes / (4 * options.elements)

    @_without_cycle_search()
    def run(self, progress: Callable[[Report], None] = lambda report: None) -> Report:
        options, report, swarm = self.options, self._run.report, self.swarm
        weather = swarm.weather
        swarm.weather = replace(weather, directory=(0.005, 0.005), stale_s=0.0, lost_writes=0.0)
        self._let_in(options.peers)
        swarm.run_for(1.0)  # all announced at one moment and hear of all the others at the next
        swarm.weather = weather
        report.spreads.append(self._spread())
        try:
            for k in range(options.averagings_max):
                self._averaging(k)
                progress(report)
                agreed = report.rounds_to_agreement is not None and not self._more_to_come(k)
                if agreed or len(swarm.living()) < 2:
                    break
        except Stuck as stuck:
            self._run.liveness.complain(swarm.now, str(stuck))
        return self._run.finish()

    def _more_to_come(self, k: int) -> bool:
        return bool(self.options.update) or any(at > k for at in self._appointments())

    def _appointments(self) -> list[int]:
        """Before which averagings something special happens."""
        options = self.options
        return [
            *(burst.at for burst in options.bursts),
            *(parting.at for parting in options.partings),
            *(crowd.at for crowd in (*options.joiners, *options.leavers)),
        ]

    def _averaging(self, k: int) -> None:
        options, report, swarm, rng = self.options, self._run.report, self.swarm, self._run.rng
        clean = self._change_the_crowd(k)
        living = swarm.living()
        absent = {peer for peer in living if rng.random() < options.absent}
        for burst in options.bursts:
            if burst.at == k:
                absent |= set(rng.sample(living, round(burst.share * len(living))))
        present = [peer for peer in living if peer not in absent]
        for peer in present:
            if rng.random() < options.crash:
                clean = False
                swarm.at(swarm.now + rng.uniform(0, 0.1), lambda p=peer: self._crash(p))  # type: ignore[misc]
            elif rng.random() < options.pause:
                clean = False
                at = swarm.now + rng.uniform(0, 0.1)
                swarm.at(at, lambda p=peer: swarm.pause(p))  # type: ignore[misc]
                swarm.at(at + rng.uniform(0, options.pause_s), lambda p=peer: swarm.resume(p))  # type: ignore[misc]
        if options.update:
            for peer in living:
                step = self._run.values_of.normal(scale=options.update, size=options.elements)
                self._held[peer] = (self._held[peer] + step).astype(np.float32)
        before = report.spreads[-1] if clean and not options.update else self._spread()
        plan_of = present[0].machine if present else None
        endings = self._average(present, k)
        for peer, ending in endings.items():
            if ending.receipt is not None and ending.vector is not None:
                self._held[peer] = ending.values.astype(np.float32)
        after = self._spread()
        report.averagings += 1
        report.spreads.append(after)
        report.grid = plan_of.status(swarm.now).grid if plan_of else report.grid
        sides = parse_sides(report.grid) if report.grid else (1,)
        rounds = options.rounds or len(sides)
        full = math.prod(sides) == len(living) == len(swarm.living()) and not options.transport.may_lose
        if options.update:
            self._run.drift.in_step(swarm.now, 2 * after, options.update**2)
        self._clean = self._clean + 1 if clean and not absent else 0
        report.theory.append(self._factor(k, sides, full=full))
        if report.rounds_to_agreement is None and after < AGREED and len(swarm.living()) > 1:
            report.rounds_to_agreement = report.averagings * rounds
        complete = all(e.receipt and e.receipt.outcome is Outcome.COMPLETE for e in endings.values())
        self._run.contraction.in_step(
            swarm.now, before, after, axes=math.ceil(len(sides) / rounds), clean=clean and not absent, full=full
        )
        if clean and not absent and not complete and k > 0 and not self._recently_changed(k):
            why = next((e.receipt.why for e in endings.values() if e.receipt and e.receipt.why), "a call failed")
            self._run.liveness.complain(swarm.now, f"averaging {k} had no fault and is not complete: {why}")

    def _factor(self, k: int, sides: tuple[int, ...], *, full: bool) -> float:
        """By what the variance should fall in averaging k: 0 once every axis had its clean round, on a full grid or
        with the weights that one averaging carries; else p + (1 - p) / M a round, p the share that is absent."""
        options = self.options
        rounds = options.rounds or len(sides)
        if self._clean and (rounds >= len(sides) or (full and self._clean * rounds >= len(sides))):
            return 0.0
        here = 1.0 - options.absent
        for burst in options.bursts:
            here *= 1.0 - burst.share if burst.at == k else 1.0
        taken = [sides[(k * rounds + j) % len(sides)] for j in range(rounds)]
        return math.prod(1 - here + here / side for side in taken)

    def _recently_changed(self, k: int) -> bool:
        """After a fault or a change of the crowd the plan may still have to follow."""
        options = self.options
        if options.absent or options.crash or options.pause or options.slow_trainers:
            return True
        return any(at <= k for at in self._appointments())

    def _average(self, present: Sequence[Peer], k: int) -> dict[Peer, Ending]:
        options, swarm, rng = self.options, self.swarm, self._run.rng
        call = Call(timeout_s=options.timeout_s, epoch=k)
        before = {peer: len(peer.endings) for peer in present}
        for peer in present:
            slow = rng.random() < options.slow_trainers
            moment = swarm.now + rng.uniform(0, options.slow_s if slow else options.apart_s)
            swarm.at(moment, partial(swarm.start_if_alive, peer, packed(self._held[peer]), call))
        limit = 2 * options.timeout_s + options.pause_s + options.slow_s
        return {peer: ending for peer, ending in swarm.run_until_ended(before, limit).items() if peer.alive}

    def _change_the_crowd(self, k: int) -> bool:
        """Joiners, leavers, partitions that begin now; True when there are none."""
        options, swarm, rng = self.options, self.swarm, self._run.rng
        clean = True
        for crowd in options.joiners:
            if crowd.at == k:
                clean = False
                self._let_in(crowd.count)
                swarm.run_for(0.5)
        for crowd in options.leavers:
            if crowd.at == k:
                clean = False
                for peer in rng.sample(swarm.living(), min(crowd.count, len(swarm.living()) - 1)):
                    swarm.close(peer)
                    del self._held[peer]
        for parting in options.partings:
            if parting.at == k:
                clean = False
                living = swarm.living()
                few = rng.sample(living, max(1, round(parting.share * len(living))))
                swarm.part(few, [peer for peer in living if peer not in few], one_way=parting.one_way)
                swarm.at(swarm.now + parting.lasts_s, swarm.heal)
        return clean and not swarm.network.is_parted

    def _crash(self, peer: Peer) -> None:
        if peer.alive:
            self.swarm.kill(peer)
            self._held.pop(peer, None)

    def _let_in(self, count: int) -> None:
        options = self.options
        for _ in range(count):
            number = self._opened
            self._opened += 1
            link = self._lines[number] if number < len(self._lines) else None
            held = self._run.values_of.normal(size=options.elements).astype(np.float32)
            session = options_for(held, rounds=options.rounds, joining="contribute", transport=options.transport)
            self._held[self.swarm.open(f"p{number}", session, link=link)] = held

    def _spread(self) -> float:
        return variance([self._held[peer] for peer in self.swarm.living()])


@dataclass(frozen=True, slots=True)
class MixedOptions:
    """A swarm that trains while everything goes wrong. What is not given is drawn from the seed."""

    seed: int = 0
    peers: tuple[int, int] = (16, 64)
    storm_s: float = 20.0
    """How long faults come."""
    odds: Odds = field(default_factory=Odds)
    settle_averagings: int = 16
    """After the faults: within so many everybody must meet everybody."""
    calm_averagings: int = 2
    """... and must then do so this often."""
    compressor: str = "dense"
    transport: Transport = EVERYTHING_ARRIVES
    packet_loss: LossModel | None = None
    """What becomes of lossy rounds' packets; None: drawn, and between some pairs none passes."""


class Calm(Observer):
    """After the storm: which averagings were whole, everybody in them and everybody with the mean of all.

    Who is on a line that nobody can dial is excused, as long as it is: it ends alone and does not count on by itself.
    """

    def __init__(self, given: Mapping[Peer, Values], *, exact: bool, same: bool = False) -> None:
        """`exact`: everybody must get the mean; `same`: at least the same bits."""
        self.whole = 0
        """So many in a row."""
        self.wrong = ""
        """An averaging of everybody that did not end with the mean; where that is not promised, with the same."""
        self.grid = ""
        self._mean = np.mean(np.stack(list(given.values())).astype(np.float64), axis=0)
        self._exact = exact
        self._same = same
        self._everybody = set(given)
        self._excused: set[Peer] = set()
        """By their last call."""
        self._ended: defaultdict[int, dict[Peer, str]] = defaultdict(dict)
        """By averaging: who ended it, and what was odd."""
        self._grids: defaultdict[int, set[str]] = defaultdict(set)
        self._holed: set[int] = set()
        """Those with a cell that nobody holds, until the next plan."""
        self._tripled: set[int] = set()
        """Those with a cell that three hold: their thirds of its weight do not add up to the same bits as the whole."""
        self._held: defaultdict[int, set[bytes]] = defaultdict(set)
        self._farthest: dict[int, float] = {}
        """... and how far from the mean a value was."""
        self._whole_last = -2

    @property
    def last(self) -> int:
        """How many averagings there were in the calm."""
        return max(self._ended) - min(self._ended) + 1 if self._ended else 0

    def call_ended(self, peer: Peer, ending: Ending) -> None:
        receipt = ending.receipt
        if receipt is None:
            return
        if any(UNDIALABLE in each.why for each in receipt.rounds):
            self._excused.add(peer)
            return
        self._excused.discard(peer)
        odd = "" if receipt.outcome is Outcome.COMPLETE and not receipt.joined else receipt.why or "joined"
        self._ended[receipt.epoch][peer] = odd
        self._grids[receipt.epoch].add(receipt.grid)
        sides = parse_sides(receipt.grid) if receipt.grid else ()
        if any(len({line.coordinate for line in each.members}) < sides[each.axis] for each in receipt.rounds):
            self._holed.add(receipt.epoch)
        if any(max(Counter(line.coordinate for line in each.members).values()) > 2 for each in receipt.rounds):
            self._tripled.add(receipt.epoch)
        if not odd:
            assert ending.vector is not None
            self._held[receipt.epoch].add(hashlib.sha256(ending.vector.buffer.tobytes()).digest())
            away = float(np.max(np.abs(ending.values - self._mean)))
            self._farthest[receipt.epoch] = max(away, self._farthest.get(receipt.epoch, 0.0))
        met = self._ended[receipt.epoch]
        if self._everybody - self._excused <= met.keys() and not any(met.values()):
            self._everybody_met(receipt)

    def _everybody_met(self, receipt: Receipt) -> None:
        if len(self._grids[receipt.epoch]) > 1 or receipt.epoch == self._whole_last:
            return
        worst = self._farthest[receipt.epoch]
        if self._same and len(self._held[receipt.epoch]) > 1 and not self._excused:
            if receipt.epoch not in self._holed | self._tripled:
                self.wrong = "a whole averaging did not end with the same at all"
                return
            if receipt.epoch in self._holed:
                return
        if self._exact and worst > 1e-5 and not self._excused:
            if receipt.epoch not in self._holed:
                self.wrong = f"a whole averaging is {worst:.1e} away from the mean"
            return
        self.whole = self.whole + 1 if receipt.epoch == self._whole_last + 1 else 1
        self._whole_last, self.grid = receipt.epoch, receipt.grid

    def why_not(self) -> str:
        """What was odd in the last averaging that most have ended."""
        if not self._ended:
            return "no averaging ended"
        k = max(self._ended, key=lambda k: (len(self._ended[k]), k))
        odd = {peer.name: why for peer, why in self._ended[k].items() if why}
        absent = sorted(peer.name for peer in self._everybody - self._excused - self._ended[k].keys())
        said = "; ".join(f"{name} in {k}: {why}" for name, why in list(odd.items())[:3])
        holed = f", {k} has a cell that nobody holds" if k in self._holed else ""
        return (said or f"{', '.join(absent) or 'nobody'} not in {k}") + holed


class Mixed:
    """See MixedOptions."""

    def __init__(self, options: MixedOptions) -> None:
        dice = random.Random(options.seed)
        self.options = options
        self._peers = dice.randint(*options.peers)
        far = dice.choice([0.0, 0.0, 0.01, 0.05])
        weather = Weather(
            message=(0.0002, dice.choice([0.002, 0.05])),
            dial=(0.0005, dice.choice([0.003, 0.2])),
            directory=(0.001, dice.choice([0.01, 0.5])),
            stale_s=dice.choice([0.0, 1.0]),
            lost_writes=dice.choice([0.0, 0.1]),
            noticed=(0.001, dice.choice([0.05, 1.0])),
        )
        config = SessionConfig(
            group_size_max=dice.choice([4, 8, 16]),
            chunk_bytes=1 << 14,
            all_reduce=AllReduceConfig(ahead_bytes_max=1 << 15),
        )
        self._elements = dice.choice([1, 3 * 4096, 6 * 4096 + 17])
        self._rounds = dice.choice([0, 0, 1])
        self._shape: tuple[int, ...] = (self._elements,)
        self._is_dense = options.compressor == "dense"
        self._is_exact = self._is_dense and not options.transport.may_lose
        self._step_s = STEP_S if options.compressor.startswith("dense") else STAGES * STEP_S
        if not self._is_dense:
            self._elements = dice.choice([40 * 96, 6 * 4096 + 512])
            self._shape = (self._elements // 32, 32)
            self._rounds = 0 if "ef21m" in options.compressor else self._rounds
        self._joining = dice.choice(["receive", "contribute"])
        self._undialable = dice.choice([0.0, 0.0, 0.3])
        self._links = [
            Link("near"),
            Link("far", delay_s=far),
            Link("slow", delay_s=far, up_bytes_s=dice.choice([2e5, 2e6])),
            Link("lossy", loss=0.02),
        ]
        self._dice = dice
        self._run = Run(options.seed, config, weather, Report("mixed faults", options.seed, self._peers))
        self.swarm = self._run.swarm
        self._opened = 0
        self._walled = 0.0
        """The share of pairs between which no datagram passes."""
        if options.transport.may_lose:
            even, bursts = LossModel.even(dice.choice([0.0, 0.01, 0.1, 0.3])), LossModel.bursts(0.1, length=8)
            drawn = dice.choice([even, even, bursts])
            self._walled = dice.choice([0.0, 0.0, 0.1, 1.0])
            self.swarm.packets = PacketLoss(options.packet_loss or drawn, self.swarm.rng)

    @_without_cycle_search()
    def run(self) -> Report:
        swarm, options, report = self.swarm, self.options, self._run.report
        for _ in range(self._peers):
            self._let_in(None)
        mischief = Mischief(swarm, options.odds, self._dice, self._let_in)
        try:
            swarm.run_for(options.storm_s)
            mischief.stop()
            report.faults = dict(sorted(mischief.counts.items()))
            for peer in swarm.living():
                peer.on_end = None
            swarm.note("the storm is over")
            swarm.run_for(80.0)  # calls end, and the leases of the dead run out
            self._settle()
        except Stuck as stuck:
            self._run.liveness.complain(swarm.now, str(stuck))
        return self._run.finish()

    def _settle(self) -> None:
        """From now on nothing fails, and trainers call in step, whoever is back by then: soon everybody must meet
        everybody, exactly, and go on to do so."""
        swarm, rng, options = self.swarm, self._run.values_of, self.options
        given = {peer: rng.normal(size=self._elements).astype(np.float32) for peer in swarm.living()}
        is_same = not self._rounds and not self._is_dense and not options.transport.may_lose
        calm = Calm(given, exact=not self._rounds and self._is_exact, same=is_same)
        swarm.observers.append(calm)
        for peer, values in given.items():
            self._call_in_step(peer, packed(values, self._shape))
        try:
            swarm.run_until(
                lambda: calm.whole >= options.calm_averagings or calm.last > options.settle_averagings,
                3 * self._step_s * options.settle_averagings,
            )
        finally:
            swarm.observers.remove(calm)
            for peer in given:
                peer.on_end = None
        self._run.report.grid = calm.grid
        if calm.wrong:
            self._run.contraction.complain(swarm.now, calm.wrong)
        if calm.whole < options.calm_averagings:
            self._run.liveness.complain(swarm.now, f"still not exact after {calm.last} calm: {calm.why_not()}")

    def _call_in_step(self, peer: Peer, vector: Vector) -> None:
        """At the beginning of every step at which it is not in a call."""

        def again(_: Ending | None = None) -> None:
            moment = (math.floor(self.swarm.now / self._step_s) + 1) * self._step_s + self._dice.uniform(0.0, 0.01)
            self.swarm.at(moment, call)

        def call() -> None:
            if peer.on_end:
                self.swarm.start_if_alive(peer, vector, Call(timeout_s=2 * self._step_s))

        peer.on_end = again
        again()

    def _let_in(self, restarted: Peer | None) -> None:
        dice, swarm = self._dice, self.swarm
        options = options_for(
            np.zeros(self._elements, np.float32),
            shape=self._shape,
            rounds=self._rounds,
            joining=self._joining,
            compressor=self.options.compressor,
            transport=self.options.transport,
        )
        if restarted is not None:
            name, last_k, dialable = restarted.name, restarted.machine.last_k, restarted.dialable
            peer = swarm.open(name, options, last_k=last_k, dialable=dialable, link=swarm.network.link_of(restarted.id))
        else:
            name, dialable = f"p{self._opened}", dice.random() >= self._undialable
            self._opened += 1
            peer = swarm.open(name, options, dialable=dialable, link=dice.choice(self._links))
            for other in swarm.peers.values() if self._walled else ():
                if other is not peer and dice.random() < self._walled:
                    swarm.no_datagrams.add(frozenset((peer.id, other.id)))
        pace = dice.uniform(0.5, 1.5)
        own = None if self._is_dense else dice.choice([1.0, 2.5])

        def draw() -> tuple[Vector, Call]:
            values = self._run.values_of.normal(size=self._elements).astype(np.float32)
            weight = dice.choice([0.0, 1.0, 1.0, 2.5])
            if own is not None and dice.random() < 0.9:  # what a compressor holds may depend on it
                weight = own
            return packed(values, self._shape), Call(weight=weight, timeout_s=dice.choice([5.0, 20.0]))

        swarm.train(peer, draw, pause=(0.5 * pace, pace))

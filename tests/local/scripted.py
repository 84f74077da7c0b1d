"""A driver and a daemon's account of itself that do what the session's name says.

A result is twice the contribution, in the spares by turns. Session names: `elsewhere` has its result in no spare,
`alone` ends alone, `nobody` finds no group, `taken` is taken, `waits` tells what it waits for, waits until it is
cancelled or its session is closed and then looks at its values, `buggy` has a bug, `dies` kills the whole process with
the result half sent, `gathers` sees one more live session at every look. A session with a compute budget is told a tau
of 20 ms, or the one by hand, after its first averaging.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moshpitd.averaging.compute_budget import BudgetOptions
from moshpitd.averaging.errors import NoGroup, Precondition, ShardsChanged
from moshpitd.averaging.names import PeerId
from moshpitd.averaging.receipt import (
    BudgetLine,
    DroppedLine,
    LinkLine,
    LocalLine,
    LossyLine,
    LostLine,
    MemberLine,
    Outcome,
    Receipt,
    RoundReceipt,
    ShardLine,
    SpanLine,
)
from moshpitd.averaging.session import Call, SessionOptions, SessionStatus
from moshpitd.averaging.shards import Half
from moshpitd.averaging.vector import Vector
from moshpitd.driver import Averaged, PeerLine, ProgressNote
from moshpitd.households import HouseholdLine, TrainerLine
from moshpitd.local.translate import DatagramLine

ME, OTHER, LOST = (PeerId(digit * 64) for digit in "123")
DATAGRAMS = DatagramLine(sent=7, received=6, refused=1)
LOST_SOME = LossyLine(
    estimator="difference",
    links=(LostLine(OTHER, sent=40, lost=4, blocked=False),),
    ranges=80,
    repaired=3,
    unrepaired=1,
    stale=((0, 2),),
    stale_elements=2,
    deadline_s=0.5,
    late=6,
    duplicates=5,
)


@dataclass(frozen=True)
class Setting:
    """A line of `config show`."""

    name: str
    value: str
    source: str


@dataclass
class ScriptedInfo:
    """Its fields are those of `moshpitd.local.translate.DaemonInfo`."""

    ready: bool = True
    waiting_for: str = ""
    peer_id: str = ME
    swarm: str = "test"
    listen: str = "127.0.0.1:7600"
    announce: str = ""
    peers: int = 2
    version: str = "0.0.0"
    pid: int = field(default_factory=os.getpid)
    uptime_s: float = 1.5
    dialable: bool | None = None
    bulk_port: int = 7601
    up_bytes_s: float = 1.25e7
    down_bytes_s: float = 0.0
    datagrams: DatagramLine = DATAGRAMS
    config_values: tuple[Setting, ...] = (Setting("swarm", "test", "flag"), Setting("grid", "auto", "default"))


def receipt(outcome: Outcome, vector: Vector, weight: float) -> Receipt:
    alone = outcome is Outcome.ALONE
    line = RoundReceipt(
        averaging=7,
        round=0,
        axis=1,
        outcome=outcome,
        group_id=b"\x01" * 16,
        digest=b"\x02" * 32,
        leader=OTHER,
        rank=0,
        codec="float32",
        codec_why="auto: no member knows yet what its line carries",
        bits_per_element=32.0,
        relative_error=0.25,
        transport_why="lossy as asked for",
        lossy=LOST_SOME,
        transport="grpc",
        members=(MemberLine(ME, weight), MemberLine(OTHER, 2.0, 1)),
        links=(LinkLine(OTHER, "grpc"),),
        spans=(SpanLine(ME, 0, vector.layout.elements, (ME, OTHER)),),
        dropped=(DroppedLine(LOST, "its stream broke"),),
        why="one was dropped",
        weight_after=1.5,
        seconds_matchmaking=0.25,
        seconds_reduce=0.5,
        bytes_sent=10,
        bytes_received=20,
    )
    return Receipt(
        outcome=outcome,
        epoch=7,
        joined=False,
        weight_total=weight + 2.0,
        peers=() if alone else (OTHER,),
        digest=b"" if alone else b"\x02" * 32,
        why="nobody else" if alone else "",
        seconds_matchmaking=0.25,
        seconds_reduce=0.5,
        seconds_total=0.75,
        bytes_sent=10,
        bytes_received=20,
        grid="2x4",
        rounds=() if alone else (line,),
        local=LocalLine(1, weight),
    )


def budget_line(options: BudgetOptions, *, tau_s: float, completed: int = 0) -> BudgetLine:
    return BudgetLine(
        micro_batches=options.micro_batches,
        normalise=options.normalise,
        completed=completed,
        tau_s=tau_s,
        state="in force since averaging 7",
        k=7,
        tables=2,
        expected_speedup=1.25,
        expected_drop_rate=0.125,
        speedup=1.5,
        drop_rate=0.25,
        note="1 of 2 members did not go by the newest tau yet",
    )


class ScriptedDriver:
    """Its methods are those of `moshpitd.households.Households`, each trainer in a household of its own. `tell` hears
    of everything that happens, one line each."""

    def __init__(self, tell: Callable[[str], None] = lambda line: None) -> None:
        self.draining = False
        self.opened: dict[str, SessionOptions] = {}
        self.calls: list[Call] = []
        self.budgets: dict[str, BudgetOptions] = {}
        self._closed: dict[str, asyncio.Event] = {}
        self._finished: list[tuple[str, Receipt]] = []
        self._ids = itertools.count(1)
        self._looks = itertools.count(1)
        self._happened: list[str] = []
        self._news = asyncio.Condition()
        self._tell = tell
        self._posted: Vector | None = None
        """What a wait-avoiding session was given last, and keeps."""

    async def open_session(self, options: SessionOptions) -> str:
        if options.name == "taken":
            raise Precondition("session 'taken' is open already: give another name")
        session_id = f"s{next(self._ids)}"
        self.opened[session_id] = options
        self._closed[session_id] = asyncio.Event()
        await self._note(f"opened {options.name}")
        return session_id

    async def close_session(self, session_id: str) -> None:
        if options := self.opened.pop(session_id, None):
            self._closed.pop(session_id).set()
            await self._note(f"closed {options.name}")

    def set_budget(self, session_id: str, options: BudgetOptions) -> BudgetLine:
        self.budgets[session_id] = options
        self._tell(f"budget of {options.micro_batches} {options.normalise or 'undecided'}")
        return budget_line(options, tau_s=options.tau_s or 0.0)

    async def average(
        self,
        session_id: str,
        call: Call,
        vector: Vector,
        progress: Callable[[ProgressNote], None],
        spares: Sequence[Vector] = (),
    ) -> Averaged:
        options = self.opened[session_id]
        self.calls.append(call)
        if call.micro_batch_s:
            self._tell(f"completed {len(call.micro_batch_s[0])}, weight {call.weight:g}")
        if options.wait_avoidance:
            self._posted = vector
        if call.half is not None:
            self._tell(f"{call.half.value} of weight {call.weight:g}")
        match options.name:
            case "nobody":
                raise NoGroup("1 of 8 peers was here: start the others")
            case "replaced":
                raise ShardsChanged("2 peers went on without this one: call broadcast_shard")
            case "buggy":
                raise AssertionError("two and two are five")
            case "waits":
                progress(ProgressNote("1 of 2 peers here, waiting for 1 more, 9 s left", 0.5))
                await self._note("waiting")
                try:
                    await self._closed[session_id].wait()
                except asyncio.CancelledError:
                    await self._note("detached")
                    raise
                finally:
                    await self._note(f"values still begin with {float(vector.elements(0, 1)[0])}")
                    await self._note("averaging over")
                raise Precondition("the session was closed")
        outcome = Outcome.ALONE if options.name == "alone" else Outcome.COMPLETE
        done = receipt(outcome, vector, call.weight)
        if budget := self.budgets.get(session_id):
            line = budget_line(budget, tau_s=budget.tau_s or 0.02, completed=sum(map(len, call.micro_batch_s)))
            done = replace(done, budget=line)
        self._finished.insert(0, (options.name, done))
        if options.shards:
            quarter = vector.layout.elements // 4
            done = replace(done, shard=ShardLine(quarter, 2 * quarter, b"version!", changed=len(self.calls) == 1))
        if outcome is Outcome.ALONE:
            return Averaged(done, vector)
        if options.name == "dies":
            return Averaged(done, Vector(vector.layout, _double(vector, Vector.empty(vector.layout)).view(_Dying)))
        offered = spares and options.name != "elsewhere"
        spare = spares[len(self.calls) % len(spares)] if offered else Vector.empty(vector.layout)
        _double(vector, spare)
        if call.half is Half.REDUCE_SCATTER and done.shard:  # nothing was written elsewhere
            spare.buffer[: vector.layout.byte_at(done.shard.start)] = 0xFF
            spare.buffer[vector.layout.byte_at(done.shard.stop) :] = 0xFF
        return Averaged(done, spare)

    @contextlib.contextmanager
    def coming(self, session_id: str) -> Iterator[None]:
        yield

    def holds(self, session_id: str, vector: Vector) -> bool:
        return vector is self._posted

    def sessions(self) -> list[HouseholdLine]:
        live = next(self._looks)
        return [
            HouseholdLine(
                options,
                SessionStatus("idle", "", 7, "2x4", (1, 3), live if options.name == "gathers" else 2, {"complete": 3}),
                (TrainerLine(session_id, "computing"),),
            )
            for session_id, options in self.opened.items()
        ]

    def peers(self) -> list[PeerLine]:
        return [
            PeerLine(OTHER, "192.0.2.7:7600", "live", ("default",), 0.5),
            PeerLine(LOST, "", "suspect", (), None),
        ]

    def receipts(self, *, limit: int, epoch: int | None) -> list[tuple[str, Receipt]]:
        return [line for line in self._finished if epoch in (None, line[1].epoch)][:limit]

    async def happened(self, line: str) -> None:
        """Wait until it did."""
        async with self._news, asyncio.timeout(20):
            await self._news.wait_for(lambda: line in self._happened)

    async def _note(self, line: str) -> None:
        self._tell(line)
        async with self._news:
            self._happened.append(line)
            self._news.notify_all()


def _double(vector: Vector, result: Vector) -> npt.NDArray[np.uint8]:
    for segment in vector.layout.segments:
        values = vector.elements(segment.start, segment.stop)
        result.elements(segment.start, segment.stop)[:] = values * values.dtype.type(2)
    return result.buffer


class _Dying(np.ndarray):
    """A result whose third chunk is never read."""

    @property
    def data(self) -> _DyingBytes:  # type: ignore[override]
        return _DyingBytes(self.tobytes())


class _DyingBytes(bytes):
    def __getitem__(self, place: slice) -> bytes:  # type: ignore[override]
        if place.start >= 2 << 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(place)

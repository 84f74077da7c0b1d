"""Runs households on the real clock: the trainers of a daemon that open the same session are one peer to the swarm.

Knows whose values lie where: merges those of a household's callers into one buffer, averages that, and hands the result
to each. Decides nothing: who averages together, and when, is the machine's word (`averaging/household.py`). A trainer
that is the only caller pays nothing: its own vector goes to the driver, and the result to where the driver left it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import assert_never

from moshpitd.averaging.compute_budget import BudgetOptions
from moshpitd.averaging.errors import Precondition, SessionError, SessionNotFound, Unavailable
from moshpitd.averaging.household import Abandon, Average, Household, HouseholdConfig, Refuse, State, Tell
from moshpitd.averaging.receipt import BudgetLine, LocalLine, Outcome, Receipt
from moshpitd.averaging.session import Call, SessionOptions, SessionStatus
from moshpitd.averaging.vector import Layout, Vector
from moshpitd.averaging.weighted_mean import copy_jobs, mean_jobs
from moshpitd.driver import Averaged, Driver, PeerLine, ProgressNote

TIMEOUT_MIN_S = 0.001
"""What an averaging has left whose time went by while values were merged: zero is no timeout."""


@dataclass(frozen=True, slots=True)
class TrainerLine:
    """A trainer for `status`."""

    session_id: str
    state: str
    """computing, waiting, averaging"""


@dataclass(frozen=True, slots=True)
class HouseholdLine:
    """A session and its trainers for `status`."""

    options: SessionOptions
    status: SessionStatus
    trainers: tuple[TrainerLine, ...]
    """In the order in which they came."""


class Households:
    """The face to the local door. Its coroutines may raise a SessionError; ids are those of trainers."""

    def __init__(self, driver: Driver, config: HouseholdConfig | None = None) -> None:
        self._driver = driver
        self._config = config or HouseholdConfig()
        self._homes: dict[str, _Home] = {}
        """By the session's name."""
        self._home_of: dict[str, _Home] = {}
        """By trainer."""
        self._numbers = itertools.count(1)

    async def open_session(self, options: SessionOptions) -> str:
        """Open a session, or join that of other trainers; returns the trainer's id. Precondition when it differs."""
        home = self._homes.get(options.name)
        if home is None:
            home = self._homes[options.name] = _Home(self._driver, options, self._config)
        elif options.shards or home.options.shards:
            raise Precondition(
                f"session {options.name!r} has a trainer on this daemon, and a session with shards takes one a daemon, "
                "which owns a shard: start another daemon for this trainer, or give its session another name"
            )
        elif options.wait_avoidance or home.options.wait_avoidance:
            raise Precondition(
                f"session {options.name!r} has a trainer on this daemon, and a wait-avoiding session takes one a "
                "daemon, which puts in that trainer's last model while it computes: start another daemon for this "
                "trainer, or give its session another name"
            )
        elif difference := _first_difference(options, home.options):
            raise Precondition(
                f"session {options.name!r} is open on this daemon with other tensors or options: {difference}. "
                "Use the same to be averaged with its trainers, or give this session another name"
            )
        trainer = f"{options.name}-{next(self._numbers)}"
        self._home_of[trainer] = home
        home.feed(partial(home.machine.enter, trainer))
        try:
            await asyncio.shield(home.opening)
        except (SessionError, asyncio.CancelledError):
            await self.close_session(trainer)
            raise
        return trainer

    async def close_session(self, session_id: str) -> None:
        """The trainer leaves; idempotent. With the last one the session closes: a running round is finished for the
        others, then its result is discarded."""
        home = self._home_of.pop(session_id, None)
        if home is None:
            return
        home.budgets.pop(session_id, None)
        home.feed(partial(home.machine.leave, session_id))
        if not home.machine.trainers:
            del self._homes[home.options.name]
            await home.close()

    @contextmanager
    def coming(self, session_id: str) -> Iterator[None]:
        """While its values are on their way: the others wait for this trainer, and no longer if the block fails."""
        home = self._home(session_id)
        home.feed(partial(home.machine.expect, session_id))
        arrived = False
        try:
            yield
            arrived = True
        finally:
            if not arrived:
                home.feed(partial(home.machine.excuse, session_id))

    async def average(
        self,
        session_id: str,
        call: Call,
        vector: Vector,
        progress: Callable[[ProgressNote], None],
        spares: Sequence[Vector] = (),
    ) -> Averaged:
        """Average, together with those of the household who call in time. The result lies in one of the spares as far
        as they reach, and is the caller's own vector when nothing was averaged. Cancelling the caller detaches it: once
        the averaging has begun it is finished for the others, and until it is over vector and spares are in use."""
        call.check()
        if self._driver.draining:
            raise Unavailable("the daemon is leaving: no new rounds")
        home = self._home(session_id)
        call = self._driver.weighed(home.session_id, call)
        return await home.average(session_id, call, _Caller(vector, progress, tuple(spares)))

    def set_budget(self, session_id: str, options: BudgetOptions) -> BudgetLine:
        """Give the trainer's session a compute budget, or change it. Precondition when other trainers of this daemon
        gave it another one."""
        home = self._home(session_id)
        for trainer, theirs in home.budgets.items():
            if not options.normalise:  # what was not said by one was said by another
                options = replace(options, normalise=theirs.normalise)
            if trainer != session_id and replace(theirs, normalise=theirs.normalise or options.normalise) != options:
                raise Precondition(
                    f"another trainer of this daemon gave session {home.options.name!r} another compute budget: "
                    f"{theirs} there, {options} here. Give the same, or this session another name"
                )
        line = self._driver.set_budget(home.session_id, options)
        home.budgets[session_id] = options
        return line

    def holds(self, session_id: str, vector: Vector) -> bool:
        """Whether the trainer, none of whose calls is under way, must not write into this buffer all the same."""
        home = self._home_of.get(session_id)
        return home is not None and self._driver.holds(home.session_id, vector)

    async def feedback_layout(self, session_id: str) -> Layout:
        """Of the error feedback of the trainer's session, which all its trainers here share."""
        return await self._driver.feedback_layout(self._home(session_id).session_id)

    async def save_feedback(self, session_id: str) -> Vector:
        """See the driver."""
        return await self._driver.save_feedback(self._home(session_id).session_id)

    async def load_feedback(self, session_id: str, state: Vector) -> None:
        """See the driver."""
        await self._driver.load_feedback(self._home(session_id).session_id, state)

    def sessions(self) -> list[HouseholdLine]:
        """All of them; being asked makes them look again who is there."""
        lines = {line.session_id: line for line in self._driver.sessions()}
        return [
            HouseholdLine(home.options, home.status(line.status), home.trainer_lines())
            for home in self._homes.values()
            if (line := lines.get(home.session_id))
        ]

    def peers(self) -> list[PeerLine]:
        return self._driver.peers()

    def receipts(self, *, limit: int, epoch: int | None) -> list[tuple[str, Receipt]]:
        """(session name, receipt), newest first; one an averaging, however many trainers were in it."""
        return self._driver.receipts(limit=limit, epoch=epoch)

    @property
    def draining(self) -> bool:
        return self._driver.draining

    def _home(self, session_id: str) -> _Home:
        home = self._home_of.get(session_id)
        if home is None:
            raise SessionNotFound(f"no session {session_id!r}: open one first (the daemon may have been restarted)")
        return home


@dataclass(eq=False, slots=True)
class _Caller:
    """A trainer's open call."""

    vector: Vector
    progress: Callable[[ProgressNote], None]
    spares: tuple[Vector, ...]
    ending: asyncio.Future[Averaged] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done also when its trainer has left: then nobody wants the result."""

    def end(self, averaged: Averaged) -> None:
        if not self.ending.done():
            self.ending.set_result(averaged)

    def fail(self, error: BaseException) -> None:
        if not self.ending.done():
            self.ending.set_exception(error)


class _Home:
    """One household on the loop: its machine, its timer, its callers, the averaging under way."""

    def __init__(self, driver: Driver, options: SessionOptions, config: HouseholdConfig) -> None:
        self.options = options
        self.machine = Household(newcomers_receive=options.joining == "receive", config=config)
        self.opening = asyncio.create_task(driver.open_session(options))
        self._driver = driver
        self._loop = asyncio.get_running_loop()
        self.budgets: dict[str, BudgetOptions] = {}
        """What each trainer that wants a compute budget asked for."""
        self._callers: dict[str, _Caller] = {}
        """Of each trainer the one call that waits for its end."""
        self._averaging: asyncio.Task[list[Averaged]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._merged: Vector | None = None
        """Where the callers' mean is made: kept, because fresh memory is the slowest part of a large one."""

    @property
    def session_id(self) -> str:
        """The driver's; empty while it is being opened."""
        return self.opening.result() if self.opening.done() and not self.opening.exception() else ""

    def status(self, status: SessionStatus) -> SessionStatus:
        if self.machine.state is State.GATHERING:
            return replace(status, state="gathering", waiting_for=self.machine.waiting_for(self._loop.time()))
        return status

    def trainer_lines(self) -> tuple[TrainerLine, ...]:
        return tuple(TrainerLine(trainer, self.machine.does(trainer)) for trainer in self.machine.trainers)

    async def average(self, trainer: str, call: Call, caller: _Caller) -> Averaged:
        if trainer in self._callers:
            raise Precondition("an averaging of this session is still under way: await it first")
        self._callers[trainer] = caller
        try:
            self.feed(partial(self.machine.ask, trainer, call))
            return await caller.ending
        except asyncio.CancelledError:
            self.feed(partial(self.machine.withdraw, trainer))
            raise
        finally:
            del self._callers[trainer]

    async def close(self) -> None:
        """The last trainer left."""
        assert not self.machine.trainers
        with contextlib.suppress(SessionError):
            await self.opening
            await self._driver.close_session(self.session_id)
        if self._averaging is not None:
            self._averaging.cancel()
            await asyncio.wait([self._averaging])
        if self._timer is not None:
            self._timer.cancel()

    def feed(self, put: Callable[[float], None]) -> None:
        """One input, then all that follows from it."""
        put(self._loop.time())
        for effect in self.machine.take_effects():
            match effect:
                case Average():
                    callers = [self._callers[share.trainer] for share in effect.shares]
                    self._averaging = asyncio.create_task(self._average(effect, callers))
                    self._averaging.add_done_callback(partial(self._ended, callers))
                case Abandon():
                    if self._averaging is not None:
                        self._averaging.cancel()
                case Refuse(trainer=trainer, error=error):
                    if trainer in self._callers:
                        self._callers[trainer].fail(error)
                case Tell(trainer=trainer, text=text):
                    self._callers[trainer].progress(ProgressNote(text, 0.0))
                case _:
                    assert_never(effect)
        if self._timer is not None:
            self._timer.cancel()
        due = self.machine.next_deadline()
        self._timer = None if due is None else self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.feed(self.machine.handle_timer)

    def _ended(self, callers: Sequence[_Caller], averaging: asyncio.Task[list[Averaged]]) -> None:
        failure = Unavailable("nobody waits for it any more") if averaging.cancelled() else averaging.exception()
        if failure is not None:
            # What ended without a receipt may still be served to other peers: its values must stay as they are.
            self._merged = None
            self.feed(partial(self.machine.failed, failure))
            return
        endings = averaging.result()
        delivered = endings[0].vector is not callers[0].vector
        self.feed(partial(self.machine.ended, delivered=delivered))
        for caller, averaged in zip(callers, endings, strict=True):
            caller.end(averaged)

    async def _average(self, effect: Average, callers: Sequence[_Caller]) -> list[Averaged]:
        """What each of them gets."""
        call, shares = effect.call, effect.shares
        if len(callers) == 1:
            only = callers[0]
            if len(self.machine.trainers) == 1:
                self._merged = None
            averaged = await self._driver.average(self.session_id, call, only.vector, only.progress, only.spares)
            results = [averaged.vector]
        else:
            averaged, results = await self._average_mean(call, [share.weight for share in shares], callers)
        receipt = averaged.receipt
        return [
            Averaged(
                replace(
                    receipt,
                    joined=receipt.joined or share.joined,
                    local=LocalLine(len(shares), 0.0 if receipt.joined else share.weight),
                    budget=receipt.budget and replace(receipt.budget, completed=share.completed),
                ),
                result,
            )
            for share, result in zip(shares, results, strict=True)
        ]

    async def _average_mean(
        self, call: Call, weights: Sequence[float], callers: Sequence[_Caller]
    ) -> tuple[Averaged, list[Vector]]:
        deadline = self._loop.time() + call.timeout_s

        def tell(note: ProgressNote) -> None:
            for caller in callers:
                if not caller.ending.done():
                    caller.progress(note)

        mean = callers[0].vector  # whatever it is, without weight it counts nowhere
        if any(weights):
            mean = self._merged = self._merged or Vector.empty(self.options.layout)
            vectors = [caller.vector for caller in callers]
            await self._driver.run_jobs(mean_jobs(vectors, weights, mean), len(callers) * mean.layout.byte_size)
        call = replace(call, timeout_s=max(TIMEOUT_MIN_S, deadline - self._loop.time()))
        spares = next((caller.spares for caller in callers if caller.spares), ())
        averaged = await self._driver.average(self.session_id, call, mean, tell, spares)
        if averaged.receipt.outcome is Outcome.ALONE and not any(weights):
            return averaged, [caller.vector for caller in callers]
        return averaged, await self._hand_out(averaged.vector, callers, spares)

    async def _hand_out(self, result: Vector, callers: Sequence[_Caller], spares: Sequence[Vector]) -> list[Vector]:
        """To each caller where it can take it: into its own buffers, if nothing else may write there, else as a vector
        that nobody will write to."""
        is_lent = result is self._merged or any(result is spare for spare in spares)
        results: list[Vector] = []
        copies: list[Vector] = []
        for caller in callers:
            target: Vector | None = None
            if not caller.ending.done() and not any(result is spare for spare in caller.spares):
                target = next((s for s in caller.spares if self._driver.is_free(self.session_id, s)), None)
                if target is None and is_lent:
                    target = Vector.empty(result.layout)
            results.append(target or result)
            copies += [target] if target else []
        jobs = itertools.chain.from_iterable(copy_jobs(result, target) for target in copies)
        await self._driver.run_jobs(jobs, len(copies) * result.layout.byte_size)
        return results


def _first_difference(ours: SessionOptions, theirs: SessionOptions) -> str | None:
    """In words; None where there is none."""
    if difference := ours.layout.first_difference(theirs.layout):
        return difference
    for option in fields(SessionOptions):
        here, there = getattr(ours, option.name), getattr(theirs, option.name)
        if here != there:
            return f"{option.name} is {here} here and {there} there"
    return None

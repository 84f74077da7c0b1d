"""Households over a driver that these tests play: whose buffers are read and written, and what becomes of failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from moshpitd.averaging.cohort import WaitAvoidance
from moshpitd.averaging.errors import InvalidInput, Precondition, SessionNotFound, Unavailable
from moshpitd.averaging.receipt import Outcome
from moshpitd.averaging.session import Call, SessionOptions
from moshpitd.averaging.vector import Vector
from moshpitd.driver import Averaged, ProgressNote
from moshpitd.households import Households
from tests.local.scripted import receipt

LAYOUT = Vector.of({"w": np.zeros(5, np.float32)}).layout


def vector(value: float) -> Vector:
    return Vector.of({"w": np.full(5, value, np.float32)})


def value(held: Vector) -> float:
    [only] = set(held.arrays()["w"].tolist())
    return float(only)


@dataclass(eq=False)
class Asked:
    """An averaging that the driver was asked for."""

    call: Call
    vector: Vector
    spares: Sequence[Vector]
    progress: Callable[[ProgressNote], None]
    ending: asyncio.Future[Averaged] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def complete(self, result: float, *, elsewhere: bool = False) -> None:
        target = Vector.empty(LAYOUT) if elsewhere or not self.spares else self.spares[-1]
        target.buffer[:] = vector(result).buffer
        self.ending.set_result(Averaged(receipt(Outcome.COMPLETE, target, self.call.weight), target))


class Driver:
    """Its methods are those of `moshpitd.driver.Driver` that households call."""

    draining = False

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.open = 0
        self.busy: list[Vector] = []
        """Spares that a job may still write to."""
        self.refusal: Exception | None = None
        self._news = asyncio.Condition()

    async def open_session(self, options: SessionOptions) -> str:
        await asyncio.sleep(0)
        if self.refusal:
            raise self.refusal
        self.open += 1
        return "the session"

    async def close_session(self, session_id: str) -> None:
        self.open -= 1

    def weighed(self, session_id: str, call: Call) -> Call:
        """Without a compute budget a call weighs what it says."""
        return call

    async def average(
        self,
        session_id: str,
        call: Call,
        vector: Vector,
        progress: Callable[[ProgressNote], None],
        spares: Sequence[Vector] = (),
    ) -> Averaged:
        assert session_id == "the session"
        self.asked.append(asked := Asked(call, vector, spares, progress))
        async with self._news:
            self._news.notify_all()
        return await asked.ending

    def is_free(self, session_id: str, spare: Vector) -> bool:
        return not any(spare is busy for busy in self.busy)

    def holds(self, session_id: str, vector: Vector) -> bool:
        return False

    async def run_jobs(self, jobs: Iterable[Callable[[], None]], total_bytes: int) -> None:
        for job in jobs:
            job()
            await asyncio.sleep(0)

    async def next(self, number: int) -> Asked:
        async with self._news, asyncio.timeout(20):
            await self._news.wait_for(lambda: len(self.asked) > number)
        return self.asked[number]


class Trainer:
    """A trainer with shared memory (two spares) or without."""

    def __init__(self, households: Households, session_id: str, spares: int = 2) -> None:
        self.households = households
        self.session_id = session_id
        self.spares = [Vector.empty(LAYOUT) for _ in range(spares)]
        self.told: list[str] = []

    def average(self, held: Vector, weight: float = 1.0) -> asyncio.Task[Averaged]:
        def tell(note: ProgressNote) -> None:
            self.told.append(note.text)

        return asyncio.create_task(
            self.households.average(self.session_id, Call(weight), held, tell, spares=self.spares)
        )


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def households(driver: Driver) -> Households:
    return Households(driver)  # type: ignore[arg-type]


async def trainers(households: Households, *spares: int, **options: str) -> list[Trainer]:
    return [
        Trainer(households, await households.open_session(SessionOptions(LAYOUT, **options)), count)  # type: ignore[arg-type]
        for count in spares
    ]


async def test_a_single_trainers_vector_is_averaged_where_it_lies(driver: Driver, households: Households) -> None:
    [trainer] = await trainers(households, 2)
    own = vector(1)
    averaging = trainer.average(own)
    asked = await driver.next(0)
    assert asked.vector is own
    assert list(asked.spares) == trainer.spares
    asked.complete(3)
    assert (await averaging).vector is trainer.spares[1]


async def test_each_gets_the_result_in_a_buffer_of_its_own(driver: Driver, households: Households) -> None:
    there = await trainers(households, 0, 2, 2, 1)
    callers = [
        trainer.average(vector(value), weight)
        for trainer, value, weight in zip(there, (1, 2, 3, 4), (1, 0, 2, 1), strict=True)
    ]
    asked = await driver.next(0)
    assert (asked.call.weight, asked.call.trainers, value(asked.vector)) == (4.0, 4, (1 + 2 * 3 + 4) / 4)
    asked.progress(ProgressNote("reducing", 0.5))
    assert all(trainer.told == ["reducing"] for trainer in there)
    asked.complete(7)
    results = [(await caller).vector for caller in callers]
    assert [value(result) for result in results] == [7] * 4
    assert len({result.buffer.ctypes.data for result in results}) == 4
    for trainer, result in zip(there[1:], results[1:], strict=True):
        assert any(result is spare for spare in trainer.spares)


async def test_a_buffer_that_a_late_job_may_write_to_takes_no_result(driver: Driver, households: Households) -> None:
    there = await trainers(households, 2, 2, 1)
    driver.busy = [there[1].spares[0], there[2].spares[0]]
    callers = [trainer.average(vector(1)) for trainer in there]
    (await driver.next(0)).complete(7)
    results = [(await caller).vector for caller in callers]
    assert results[1] is there[1].spares[1]
    assert not any(results[2] is spare for spare in there[2].spares), "it is streamed"
    assert [value(result) for result in results] == [7] * 3


async def test_trainers_that_stream_share_a_result_that_nobody_writes_to(
    driver: Driver, households: Households
) -> None:
    there = await trainers(households, 0, 0)
    callers = [trainer.average(vector(1)) for trainer in there]
    (await driver.next(0)).complete(7)
    first, second = [(await caller).vector for caller in callers]
    assert first is second


async def test_the_buffer_of_the_mean_is_kept_but_not_after_a_failure(driver: Driver, households: Households) -> None:
    """What ended without a receipt may still be served to other peers."""
    there = await trainers(households, 2, 2)
    held: list[Vector] = []
    for number in range(4):
        callers = [trainer.average(vector(number)) for trainer in there]
        asked = await driver.next(number)
        held.append(asked.vector)
        if number == 1:
            asked.ending.set_exception(Unavailable("no"))
            for caller in callers:
                with pytest.raises(Unavailable, match="no"):
                    await caller
        else:
            asked.complete(7)
            await asyncio.wait(callers)
    assert held[0] is held[1] and held[2] is held[3]
    assert held[1] is not held[2] and value(held[1]) == 1


async def test_who_leaves_an_averaging_gets_nothing_and_the_others_theirs(
    driver: Driver, households: Households
) -> None:
    there = await trainers(households, 2, 2, joining="contribute")
    callers = [trainer.average(vector(number)) for number, trainer in enumerate(there)]
    asked = await driver.next(0)
    callers[0].cancel()
    await asyncio.wait(callers[:1])
    again = there[0].average(vector(9))
    asked.complete(7)
    assert value((await callers[1]).vector) == 7
    callers[1] = there[1].average(vector(1))
    assert value((await driver.next(1)).vector) == 5
    driver.asked[1].complete(8)
    assert value((await again).vector) == 8
    await callers[1]


async def test_when_all_leave_the_driver_is_told(driver: Driver, households: Households) -> None:
    there = await trainers(households, 2, 2)
    callers = [trainer.average(vector(1)) for trainer in there]
    asked = await driver.next(0)
    for caller in callers:
        caller.cancel()
    await asyncio.wait([*callers, asked.ending], timeout=20)
    assert asked.ending.cancelled()
    callers = [trainer.average(vector(2)) for trainer in there]
    (await driver.next(1)).complete(7)
    assert [value((await caller).vector) for caller in callers] == [7, 7]


async def test_a_bug_reaches_those_who_wait(driver: Driver, households: Households) -> None:
    there = await trainers(households, 2, 2)
    callers = [trainer.average(vector(1)) for trainer in there]
    (await driver.next(0)).ending.set_exception(AssertionError("two and two are five"))
    for caller in callers:
        with pytest.raises(AssertionError, match="five"):
            await caller
    callers = [trainer.average(vector(2)) for trainer in there]
    (await driver.next(1)).complete(7)
    await asyncio.gather(*callers)


async def test_values_that_never_arrive_are_not_waited_for(driver: Driver, households: Households) -> None:
    there = await trainers(households, 2, 2)
    with pytest.raises(InvalidInput), households.coming(there[1].session_id):
        caller = there[0].average(vector(1))
        await asyncio.sleep(0)
        assert driver.asked == []
        raise InvalidInput("tensor 'w' holds nan")
    (await driver.next(0)).complete(7)
    await caller


async def test_the_session_is_one_and_closes_with_its_last_trainer(driver: Driver, households: Households) -> None:
    options = SessionOptions(LAYOUT)
    ids = await asyncio.gather(*(households.open_session(options) for _ in range(3)))
    assert (len(set(ids)), driver.open) == (3, 1)
    with pytest.raises(Precondition, match=r"lonely_wait_s is 5\.0 here and 1\.0 there"):
        await households.open_session(SessionOptions(LAYOUT, lonely_wait_s=5.0))
    for number, session_id in enumerate(ids):
        assert driver.open == 1, number
        await households.close_session(session_id)
        await households.close_session(session_id)
    assert driver.open == 0
    with pytest.raises(SessionNotFound):
        await households.average(ids[0], Call(), vector(1), lambda note: None)


async def test_a_session_that_cannot_be_opened_is_refused_to_all_and_may_be_tried_again(
    driver: Driver, households: Households
) -> None:
    driver.refusal = Unavailable("the daemon is leaving")
    options = SessionOptions(LAYOUT)
    answers = await asyncio.gather(*(households.open_session(options) for _ in range(2)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * 2
    driver.refusal = None
    assert await households.open_session(options)
    assert driver.open == 1


async def test_who_gives_up_while_it_opens_leaves_no_session_behind(driver: Driver, households: Households) -> None:
    opening = asyncio.create_task(households.open_session(SessionOptions(LAYOUT)))
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait([opening])
    assert opening.cancelled()
    assert driver.open == 0


async def test_closing_ends_the_call_that_is_open(driver: Driver, households: Households) -> None:
    there = await trainers(households, 2, 2)
    waiting = there[0].average(vector(1))
    await asyncio.sleep(0)
    await households.close_session(there[0].session_id)
    with pytest.raises(Unavailable, match="closed"):
        await waiting
    averaging = there[1].average(vector(1))
    await driver.next(0)
    await households.close_session(there[1].session_id)
    with pytest.raises(Unavailable, match="closed"):
        await averaging
    assert driver.open == 0


async def test_a_wait_avoiding_session_takes_one_trainer() -> None:
    households = Households(Driver())  # type: ignore[arg-type]
    options = SessionOptions(LAYOUT, min_peers=2, wait_avoidance=WaitAvoidance(2, 10))
    first = await households.open_session(options)
    for second in (options, SessionOptions(LAYOUT)):
        with pytest.raises(Precondition, match="takes one a daemon"):
            await households.open_session(second)
    await households.close_session(first)
    await households.close_session(await households.open_session(options))

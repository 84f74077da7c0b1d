"""A trainer with a compute budget: what it is asked, what is counted, what is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

import moshpit_client
from moshpit_client import ComputeBudget, Daemon, Session
from moshpit_client.compute_budget import BudgetState
from moshpit_client.v1 import daemon_pb2 as pb
from tests.client.conftest import DaemonProcess


class Clock:
    """Stands still until it is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def state(micro_batches: int = 4, tau: float = 0.0) -> BudgetState:
    return BudgetState(micro_batches, "computed", 0, tau, "", 0, 0, 0.0, 0.0, 0.0, 0.0, "")


def budget_of(clock: Clock, tau: float, micro_batches: int = 4) -> ComputeBudget:
    return ComputeBudget(state(micro_batches, tau), pb.SetComputeBudgetRequest(), clock)


def compute(budget: ComputeBudget, clock: Clock, *seconds: float) -> list[float]:
    """A step whose micro-batches take so long; when each began, from the step's start."""
    began = []
    with budget.step() as step:
        start = clock.now
        for each in seconds:
            if not step.proceed():
                break
            began.append(clock.now - start)
            clock.now += each
    return began


# ---- the clock


@pytest.mark.parametrize(
    ("tau", "began"),
    [
        (10.0, [0, 1, 3, 6]),
        (5.0, [0, 1, 3]),
        (3.0, [0, 1, 3]),
        (2.9, [0, 1]),
        (0.5, [0]),
        (1e-9, [0]),
        (0.0, [0, 1, 3, 6]),
    ],
)
def test_no_micro_batch_begins_after_tau_and_the_first_always_does(tau: float, began: list[float]) -> None:
    clock = Clock()
    budget = budget_of(clock, tau)
    assert compute(budget, clock, 1.0, 2.0, 3.0, 4.0) == began
    assert budget.offer() == (1.0, 2.0, 3.0, 4.0)[: len(began)]


def test_a_whole_step_is_enough_whoever_asks_for_more() -> None:
    clock = Clock()
    budget = budget_of(clock, 0.0, micro_batches=2)
    assert len(compute(budget, clock, 1.0, 1.0, 1.0)) == 2


def test_what_was_completed_is_known_inside_the_step() -> None:
    clock = Clock()
    with budget_of(clock, 0.0).step() as step:
        counted = []
        while step.proceed():
            counted.append(step.completed)
    assert counted == [1, 2, 3, 4]
    assert step.completed == 4


def test_a_step_that_raises_is_not_counted_and_the_next_one_may_begin() -> None:
    clock = Clock()
    budget = budget_of(clock, 0.0)
    with pytest.raises(ZeroDivisionError), budget.step() as step:
        step.proceed()
        _ = 1 / 0
    with pytest.raises(moshpit_client.InvalidInput, match="no step to be averaged"):
        budget.offer()
    compute(budget, clock, 1.0)
    assert budget.offer() == (1.0,)


def test_steps_out_of_turn_are_refused() -> None:
    clock = Clock()
    budget = budget_of(clock, 0.0)
    with budget.step() as step:
        step.proceed()
        with pytest.raises(moshpit_client.InvalidInput, match="still open: one step at a time"):
            budget.step()
        with pytest.raises(moshpit_client.InvalidInput, match="leave its `with` block"):
            budget.offer()
    with pytest.raises(moshpit_client.InvalidInput, match="not open"):
        step.proceed()
    with pytest.raises(moshpit_client.InvalidInput, match="was not averaged"):
        budget.step()
    assert budget.offer() == budget.offer(), "a failed averaging may be tried again"
    compute(budget, clock, 2.0)
    assert budget.offer() == (2.0,), "... or given up for the next step"


def test_a_step_open_in_another_thread_is_open() -> None:
    budget = budget_of(Clock(), 0.0)
    entered, leave = threading.Event(), threading.Event()

    def trainer() -> None:
        with budget.step() as step:
            step.proceed()
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=trainer)
    thread.start()
    assert entered.wait(10)
    with pytest.raises(moshpit_client.InvalidInput, match="still open"):
        budget.step()
    leave.set()
    thread.join(10)
    assert len(budget.offer()) == 1


def test_asking_reads_the_clock_once_and_calls_nobody() -> None:
    reads = 0

    def clock() -> float:
        nonlocal reads
        reads += 1
        return 0.0

    with ComputeBudget(state(100, 1.0), pb.SetComputeBudgetRequest(), clock).step() as step:  # without any daemon
        before = reads
        for _ in range(50):
            assert step.proceed()
    assert reads - before == 51, "one at the end of the last"


# ---- with a daemon


@pytest.fixture
def daemon(shared: DaemonProcess) -> Iterator[Daemon]:
    with moshpit_client.connect(shared.path) as daemon:
        yield daemon


@pytest.fixture
def session(daemon: Daemon) -> Iterator[Session]:
    with daemon.open_session({"w": ones()}) as session:
        yield session


def ones() -> npt.NDArray[np.float32]:
    return np.ones(3, np.float32)


def one_step(budget: ComputeBudget, micro_batches: int) -> None:
    with budget.step() as step:
        for _ in range(micro_batches):
            assert step.proceed()


def test_what_was_completed_goes_with_the_averaging_and_tau_comes_with_its_receipt(
    session: Session, shared: DaemonProcess
) -> None:
    budget = session.compute_budget(micro_batches=12, normalise="computed")
    assert (budget.micro_batches, budget.tau) == (12, None)
    one_step(budget, 5)
    told = shared.times("completed 5, weight 2")
    receipt = session.average(weight=2.0)
    shared.happened("completed 5, weight 2", told + 1)
    assert receipt.budget is not None
    assert (receipt.budget.completed, receipt.budget.normalise) == (5, "computed")
    assert budget.tau == receipt.budget.tau_seconds == 0.02
    assert budget.state is receipt.budget


def test_each_way_of_averaging_counts_a_step(session: Session, shared: DaemonProcess) -> None:
    budget = session.compute_budget(micro_batches=12, normalise="computed")
    told = shared.times("completed 7, weight 1")
    one_step(budget, 7)
    future = session.average_async()
    one_step(budget, 8)  # the next one, meanwhile
    assert future.result(30).budget is not None
    shared.happened("completed 7, weight 1", told + 1)
    _, receipt = session.average_values({"w": ones()})
    assert receipt.budget is not None and receipt.budget.completed == 8


def test_how_to_normalise_may_be_said_late(session: Session, shared: DaemonProcess) -> None:
    decided = shared.times("budget of 3 computed")
    budget = session.compute_budget(micro_batches=3)
    assert budget.state.normalise == ""
    one_step(budget, 3)
    session.average(normalise="computed")
    shared.happened("budget of 3 computed", decided + 1)
    one_step(budget, 3)
    session.average()
    assert (budget.state.normalise, shared.times("budget of 3 computed")) == ("computed", decided + 1)


def test_who_never_says_how_to_normalise_does_as_the_authors(session: Session) -> None:
    budget = session.compute_budget(micro_batches=3)
    one_step(budget, 3)
    session.average()
    assert budget.state.normalise == "fixed"


def test_tau_by_hand_holds_from_the_first_step(session: Session) -> None:
    assert session.compute_budget(micro_batches=3, tau=0.5).tau == 0.5


def test_an_averaging_without_a_step_is_refused(session: Session) -> None:
    session.compute_budget(micro_batches=3)
    for average in (session.average, session.average_async, lambda: session.average_values({"w": ones()})):
        with pytest.raises(moshpit_client.InvalidInput, match="there is no step to be averaged"):
            average()


def test_a_failed_averaging_may_be_tried_again(daemon: Daemon) -> None:
    with daemon.open_session({"w": ones()}, name="nobody") as session:
        budget = session.compute_budget(micro_batches=3, normalise="fixed")
        one_step(budget, 2)
        for _ in range(2):
            with pytest.raises(moshpit_client.NoGroup):
                session.average()


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"micro_batches": -2}, "micro_batches=-2"),
        ({"micro_batches": 2.5}, "micro_batches=2.5"),
        ({"micro_batches": 1 << 20}, "micro_batches 1048576"),
        ({"micro_batches": 4, "normalise": "mean"}, "normalise='mean': give 'fixed' or 'computed'"),
        ({"micro_batches": 4, "tau": 0.0}, "tau 0.0: must be more than 0"),
        ({"micro_batches": 4, "tau": -1}, "tau -1.0"),
        ({"micro_batches": 4, "tau": float("nan")}, "tau nan"),
        ({"micro_batches": 4, "tau": "soon"}, "tau='soon'"),
        ({"micro_batches": 4, "learn": 0}, "learn=0"),
        ({"micro_batches": 4, "refresh_every": 10}, "refresh_every 10"),
    ],
)
def test_budgets_that_make_no_sense_are_refused_by_name(
    session: Session, wish: dict[str, object], complaint: str
) -> None:
    with pytest.raises(moshpit_client.InvalidInput, match=complaint):
        session.compute_budget(**wish)  # type: ignore[arg-type]


def test_normalise_goes_with_a_budget(session: Session) -> None:
    with pytest.raises(moshpit_client.InvalidInput, match="normalise='fixed' without a compute budget"):
        session.average(normalise="fixed")
    budget = session.compute_budget(micro_batches=3)
    one_step(budget, 1)
    with pytest.raises(moshpit_client.InvalidInput, match="normalise='sum': give"):
        session.average(normalise="sum")  # type: ignore[arg-type]

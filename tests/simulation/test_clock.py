"""Virtual time: only the heap moves it."""

from __future__ import annotations

import pytest

from moshpitd.simulation.clock import Clock, Stuck


def test_events_come_in_order_of_their_moment_and_of_one_moment_as_asked_for() -> None:
    clock, seen = Clock(), list[str]()
    for moment, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        clock.at(moment, lambda name=name: seen.append(f"{name} at {clock.now}"))  # type: ignore[misc]
    clock.run_for(3.0)
    assert seen == ["a at 1.0", "b at 1.0", "c at 2.0"]
    assert (clock.now, clock.events) == (3.0, 3)


def test_what_is_asked_for_in_the_past_happens_now() -> None:
    clock, seen = Clock(), list[float]()
    clock.run_for(5.0)
    clock.at(1.0, lambda: seen.append(clock.now))
    clock.run_for(0.0)
    assert seen == [5.0]


def test_run_until_stops_at_once_when_it_is_done() -> None:
    clock, seen = Clock(), list[int]()
    for moment in range(10):
        clock.at(moment, lambda moment=moment: seen.append(moment))  # type: ignore[misc]
    clock.run_until(lambda: len(seen) == 4, limit_s=100.0)
    assert seen == [0, 1, 2, 3] and clock.now == 3.0


def test_what_never_gets_done_is_stuck_and_says_how_things_stand() -> None:
    clock = Clock()
    clock.at(99.0, lambda: None)
    with pytest.raises(Stuck, match=r"not done at 0\.000: p1 waits"):
        clock.run_until(lambda: False, limit_s=10.0, standing=lambda: "p1 waits")


def test_a_timer_that_is_always_due_stops_the_clock() -> None:
    clock = Clock()

    def again() -> None:
        clock.at(clock.now, again)

    again()
    with pytest.raises(Stuck, match=r"the clock stands at 0\.0"):
        clock.run_for(1.0)


def test_after_each_event_the_one_who_asked_is_called() -> None:
    clock, looks = Clock(), list[int]()
    clock.after_event = lambda: looks.append(clock.events)
    clock.at(1.0, lambda: None)
    clock.at(2.0, lambda: None)
    clock.run_for(2.0)
    assert looks == [1, 2]

"""Trainers of one daemon, on paper: who averages together, when, and with which weight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moshpitd.averaging.errors import InvalidInput, NoGroup, Precondition, Unavailable
from moshpitd.averaging.household import Abandon, Average, Household, HouseholdConfig, Refuse, State, Tell
from moshpitd.averaging.session import Call

GRACE_S = 1.0


class Paper:
    """A household, a clock that only these tests move, and what the household wished."""

    def __init__(self, *trainers: str, newcomers_receive: bool = True) -> None:
        self.now = 100.0
        self.house = Household(newcomers_receive=newcomers_receive, config=HouseholdConfig(grace_floor_s=GRACE_S))
        self.begun: list[Average] = []
        self.refused: dict[str, BaseException] = {}
        self.told: list[Tell] = []
        self.abandoned = 0
        for trainer in trainers:
            self.house.enter(trainer, self.now)

    def ask(self, trainer: str, weight: float = 1.0, *, timeout_s: float = 60.0, epoch: int | None = None) -> None:
        self.house.ask(trainer, Call(weight, timeout_s, epoch), self.now)
        self.take()

    def ask_all(self, trainers: str) -> None:
        for trainer in trainers:
            self.ask(trainer)

    def withdraw(self, trainer: str) -> None:
        self.house.withdraw(trainer, self.now)
        self.take()

    def leave(self, trainer: str) -> None:
        self.house.leave(trainer, self.now)
        self.take()

    def enter(self, trainer: str) -> None:
        self.house.enter(trainer, self.now)

    def end(self, *, delivered: bool = True) -> None:
        self.house.ended(self.now, delivered=delivered)
        self.take()

    def fail(self, error: Exception) -> None:
        self.house.failed(error, self.now)
        self.take()

    def settle(self, trainers: str) -> None:
        """One averaging of all of them."""
        self.ask_all(trainers)
        self.end()

    def wait(self, seconds: float) -> None:
        """Let time pass, ringing whenever it is asked for."""
        until = self.now + seconds
        while (due := self.house.next_deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            self.house.handle_timer(self.now)
            self.take()
        self.now = until

    def take(self) -> None:
        for effect in self.house.take_effects():
            match effect:
                case Average():
                    self.begun.append(effect)
                case Refuse(trainer=trainer, error=error):
                    self.refused[trainer] = error
                case Tell():
                    self.told.append(effect)
                case Abandon():
                    self.abandoned += 1

    @property
    def parties(self) -> list[str]:
        """Who averaged together so far."""
        return ["".join(share.trainer for share in average.shares) for average in self.begun]

    def shares(self) -> Iterator[tuple[str, float, bool]]:
        """Of the last averaging."""
        return ((share.trainer, share.weight, share.joined) for share in self.begun[-1].shares)


def test_one_trainer_waits_for_nobody() -> None:
    paper = Paper("A")
    paper.ask("A", 3.0, timeout_s=7.0, epoch=5)
    assert [average.call for average in paper.begun] == [Call(3.0, 7.0, 5)]
    paper.end()
    paper.ask("A")
    assert paper.parties == ["A", "A"]


def test_all_who_are_here_average_at_once_with_the_sum_of_their_weights_in_the_order_in_which_they_came() -> None:
    paper = Paper(*"ABC")
    paper.ask("C", 1.0)
    paper.ask("A", 2.0)
    assert paper.parties == []
    paper.ask("B", 4.0)
    [average] = paper.begun
    assert (average.call.weight, average.call.trainers) == (7.0, 3)
    assert list(paper.shares()) == [("A", 2.0, False), ("B", 4.0, False), ("C", 1.0, False)]


def test_the_shortest_callers_time_is_the_averagings() -> None:
    paper = Paper(*"AB")
    paper.ask("A", timeout_s=60.0)
    paper.wait(0.5)
    paper.ask("B", timeout_s=5.0)
    assert paper.begun[0].call.timeout_s == 5.0


def test_most_wait_for_one_no_longer_than_the_grace() -> None:
    paper = Paper(*"ABC")
    paper.settle("ABC")
    paper.ask_all("AB")
    paper.wait(GRACE_S - 0.01)
    assert len(paper.begun) == 1
    paper.wait(0.02)
    assert paper.parties == ["ABC", "AB"]


def test_fewer_than_are_missing_wait_half_of_their_time() -> None:
    """They are the ones out of step: going on alone, they would stay so for ever."""
    paper = Paper(*"ABC")
    paper.settle("ABC")
    paper.ask("C", timeout_s=20.0)
    paper.wait(9.9)
    assert len(paper.begun) == 1
    paper.wait(0.2)
    assert paper.parties == ["ABC", "C"]


def test_nobody_waits_longer_than_half_of_the_shortest_time() -> None:
    paper = Paper(*"ABC")
    paper.ask("A", timeout_s=60.0)
    paper.ask("B", timeout_s=1.0)
    paper.wait(0.49)
    assert paper.parties == []
    paper.wait(0.02)
    assert paper.parties == ["AB"]


def test_who_comes_late_waits_for_the_next_averaging_and_the_others_for_it() -> None:
    paper = Paper(*"ABC")
    paper.settle("ABC")
    paper.ask_all("AB")
    paper.wait(GRACE_S)
    paper.ask("C")
    assert paper.parties == ["ABC", "AB"]
    paper.end()
    paper.wait(10.0)
    assert len(paper.begun) == 2, "it waits for the others, who compute"
    paper.ask("A")
    paper.wait(0.5)
    paper.ask("B")
    assert paper.parties == ["ABC", "AB", "ABC"]


def test_who_was_missed_twice_is_not_waited_for_until_it_takes_part_again() -> None:
    paper = Paper(*"ABC")
    for _ in range(2):
        paper.ask_all("AB")
        paper.wait(GRACE_S)
        paper.end()
    paper.ask_all("AB")
    assert paper.parties == ["AB"] * 3, "at once"
    paper.end()
    paper.ask("C")
    assert len(paper.begun) == 3, "it waits for the others"
    paper.ask_all("AB")
    paper.end()
    paper.ask_all("AB")
    assert paper.parties == ["AB"] * 3 + ["ABC"], "they wait for it again"


def test_the_grace_follows_how_far_apart_trainers_are() -> None:
    paper = Paper(*"ABCD")
    for _ in range(4):
        for trainer in "ABCD":
            paper.wait(0.5)
            paper.ask(trainer)
        paper.end()
    assert paper.parties == ["ABCD"] * 4
    paper.ask_all("ABC")
    paper.wait(GRACE_S + 1.0)
    assert len(paper.begun) == 4, "longer than the floor"
    paper.wait(30.0)
    assert paper.parties[-1] == "ABC"


def test_the_time_in_which_an_earlier_averaging_ran_was_not_spent_on_waiting_for_the_others() -> None:
    paper = Paper(*"AB")
    paper.ask("A", timeout_s=1.0)
    paper.wait(0.5)
    paper.ask("B", timeout_s=60.0)
    paper.wait(20.0)
    paper.end()
    paper.wait(19.9)
    assert len(paper.begun) == 1
    paper.wait(0.2)
    assert paper.parties == ["A", "B"]


def test_one_whose_values_are_on_their_way_is_waited_for_beyond_the_grace() -> None:
    paper = Paper(*"ABC")
    paper.settle("ABC")
    paper.house.expect("C", paper.now)
    paper.ask_all("AB")
    paper.wait(GRACE_S + 5.0)
    assert len(paper.begun) == 1
    paper.ask("C")
    assert paper.parties == ["ABC", "ABC"]


def test_one_whose_values_are_refused_costs_the_others_nothing() -> None:
    paper = Paper(*"ABC")
    paper.settle("ABC")
    paper.house.expect("C", paper.now)
    paper.ask_all("AB")
    paper.house.excuse("C", paper.now)
    paper.take()
    assert paper.parties == ["ABC", "AB"]


def test_who_withdraws_before_the_beginning_is_out() -> None:
    paper = Paper(*"ABC")
    paper.ask_all("AB")
    paper.withdraw("B")
    assert paper.parties == []
    paper.wait(60.0)
    assert paper.parties == ["A"]
    paper.end()
    paper.ask("B")
    paper.withdraw("B")
    assert paper.house.state is State.IDLE


def test_who_withdraws_after_the_beginning_counts_and_is_not_told() -> None:
    paper = Paper(*"AB")
    paper.ask_all("AB")
    paper.withdraw("A")
    assert paper.abandoned == 0
    paper.fail(InvalidInput("no"))
    assert set(paper.refused) == {"B"}


def test_when_all_withdraw_the_averaging_is_abandoned_and_the_next_waits_for_its_end() -> None:
    paper = Paper(*"AB")
    paper.ask_all("AB")
    paper.withdraw("A")
    paper.withdraw("B")
    assert paper.abandoned == 1
    paper.ask_all("AB")
    assert len(paper.begun) == 1
    paper.fail(Unavailable("abandoned"))
    assert paper.parties == ["AB", "AB"]
    assert paper.refused == {}


def test_a_trainer_that_dies_is_waited_for_no_longer() -> None:
    paper = Paper(*"ABC")
    paper.settle("ABC")
    paper.ask_all("AB")
    paper.leave("C")
    assert paper.parties == ["ABC", "AB"]


def test_a_trainer_that_dies_in_the_averaging_leaves_the_others_their_result() -> None:
    paper = Paper(*"ABC")
    paper.ask_all("ABC")
    paper.leave("B")
    assert paper.abandoned == 0
    assert isinstance(paper.refused.pop("B"), Unavailable)
    paper.end()
    paper.ask_all("AC")
    assert paper.parties == ["ABC", "AC"]
    assert paper.refused == {}


def test_calls_that_name_different_epochs_never_mix_the_lowest_goes_first() -> None:
    paper = Paper(*"ABCD")
    paper.ask("A", epoch=8)
    paper.ask("B", epoch=7)
    paper.ask("C", epoch=8)
    paper.ask("D")
    assert paper.parties == ["BD"], "who names none goes along; those who are ahead are not waited for"
    assert paper.begun[0].call.epoch == 7
    paper.end()
    assert len(paper.begun) == 1, "B and D may come to 8 as well"
    paper.ask("B", epoch=8)
    paper.ask("D", epoch=8)
    assert paper.parties == ["BD", "ABCD"]
    assert paper.begun[1].call.epoch == 8


def test_who_named_no_epoch_does_not_fail_with_one_that_cannot_be() -> None:
    paper = Paper(*"AB")
    paper.ask("A", epoch=900_000)
    paper.ask("B")
    paper.fail(Precondition("epoch 900000 is far above the swarm's 9"))
    assert set(paper.refused) == {"A"}
    paper.leave("A")
    assert paper.parties == ["AB", "B"]
    assert paper.begun[1].call.epoch is None
    paper.fail(Precondition("this session differs from most of the swarm"))
    assert set(paper.refused) == {"A", "B"}


def test_who_has_time_left_goes_on_when_the_shortest_callers_time_is_up() -> None:
    paper = Paper(*"AB")
    paper.ask("A", timeout_s=5.0)
    paper.ask("B", timeout_s=60.0)
    paper.wait(5.0)
    paper.fail(NoGroup("1 of 8 peers here"))
    assert set(paper.refused) == {"A"}
    paper.wait(55.0)
    assert paper.parties == ["AB", "B"]
    paper.fail(NoGroup("1 of 8 peers here"))
    assert set(paper.refused) == {"A", "B"}


def test_a_newcomer_beside_settled_trainers_gives_no_weight_and_receives() -> None:
    paper = Paper(*"AB")
    paper.ask_all("AB")
    assert list(paper.shares()) == [("A", 1.0, False), ("B", 1.0, False)], "all are new"
    paper.end()
    paper.enter("C")
    paper.ask_all("ABC")
    assert list(paper.shares()) == [("A", 1.0, False), ("B", 1.0, False), ("C", 0.0, True)]
    assert paper.begun[-1].call.weight == 2.0
    paper.end(delivered=False)
    paper.ask_all("ABC")
    assert ("C", 0.0, True) in paper.shares(), "it has received nothing yet"
    paper.end()
    paper.ask_all("ABC")
    assert ("C", 1.0, False) in paper.shares()


def test_a_newcomer_that_wants_to_contribute_counts_at_once() -> None:
    paper = Paper("A", newcomers_receive=False)
    paper.settle("A")
    paper.enter("B")
    paper.ask_all("AB")
    assert list(paper.shares()) == [("A", 1.0, False), ("B", 1.0, False)]


def test_a_newcomer_whose_household_is_gone_counts_at_once() -> None:
    paper = Paper("A")
    paper.settle("A")
    paper.enter("B")
    paper.leave("A")
    paper.ask("B")
    assert list(paper.shares()) == [("B", 1.0, False)]


def test_weights_of_zero_are_a_household_of_weight_zero() -> None:
    paper = Paper(*"AB")
    paper.ask("A", 0.0)
    paper.ask("B", 0.0)
    assert paper.begun[0].call.weight == 0.0


@pytest.mark.parametrize("averaging_s", [30.0, 2.0])
def test_who_waits_is_told_for_what_and_no_longer_than_its_time(averaging_s: float) -> None:
    paper = Paper(*"AB")
    paper.ask("A")
    paper.wait(1.0)
    [told] = paper.told
    assert (told.trainer, told.text) == ("A", "1 of 2 trainers of this daemon here, waiting for 1 more, 29 s left")
    paper.ask("B")
    paper.withdraw("A")
    paper.ask("A", timeout_s=10.0)
    paper.wait(averaging_s)
    assert paper.told[-1].text == "an averaging of other trainers of this daemon is under way, the next one is ours"
    assert isinstance(paper.refused.get("A"), NoGroup if averaging_s > 10 else type(None))
    paper.end()
    assert paper.house.state is (State.IDLE if averaging_s > 10 else State.GATHERING)


def test_status_sees_what_each_does() -> None:
    paper = Paper(*"ABCD")
    paper.ask_all("ABC")
    paper.wait(GRACE_S)
    paper.withdraw("B")
    paper.ask("B")
    paper.house.expect("D", paper.now)
    assert [paper.house.does(trainer) for trainer in paper.house.trainers] == [
        "averaging",
        "waiting",
        "averaging",
        "waiting",
    ]
    paper.withdraw("B")
    assert paper.house.does("B") == "computing"

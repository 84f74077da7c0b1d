"""What a leader makes of the paths that the members of its group report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from moshpitd.averaging.losses import reliable_every
from moshpitd.averaging.messages import Member, PathReport
from moshpitd.averaging.transport import Transport, TransportChoice, choose_transport, report_is_sound
from tests.averaging.group_on_paper import group_of, normal_vectors, peer

LOSSY, AUTO = Transport("lossy"), Transport("auto")
GOOD = PathReport(packets=1000, loss=0.001, round_trip_s=0.001)


def members(reports: Sequence[PathReport], rate: float = 0.0) -> list[Member]:
    line = group_of(normal_vectors(len(reports), 10)).members
    return [replace(one, paths=each, up_bytes_s=rate) for one, each in zip(line, reports, strict=True)]


def chosen(transport: Transport, reports: Sequence[PathReport], k: int = 1, rate: float = 0.0) -> TransportChoice:
    return choose_transport(transport, members(reports, rate), k=k, ranges=1000)


def test_a_reliable_session_has_nothing_to_choose_and_says_nothing() -> None:
    assert chosen(Transport(), [GOOD] * 3) == TransportChoice(False, "")


def test_a_single_averaging_is_what_was_asked_for() -> None:
    assert all(chosen(Transport("lossy", every), [PathReport()] * 2, k=0).is_lossy for every in (0, 2, 8))


@pytest.mark.parametrize("every", [1, 2, 5])
def test_each_of_so_many_is_reliable_as_asked(every: int) -> None:
    reliable = [k for k in range(20) if not chosen(Transport("lossy", every), [GOOD] * 3, k=k).is_lossy]
    assert reliable == [k for k in range(20) if (k + 1) % every == 0]


def test_leaders_that_choose_differently_have_reliable_averagings_in_common() -> None:
    """Of two powers of two the larger one is a multiple."""
    for loss in (0.0, 0.001, 0.01, 0.05, 0.1, 0.3, 0.6):
        every, why = reliable_every(loss, ranges=3000, members=4)
        assert every & (every - 1) == 0
        assert not chosen(LOSSY, [replace(GOOD, loss=loss)] * 4, k=127).is_lossy
        assert str(every) in why


def test_a_group_of_firewalls_is_reliable_and_a_single_one_is_not() -> None:
    everybody = tuple(peer(n) for n in range(4))
    walled = [replace(GOOD, blocked=everybody)] + [GOOD] * 3
    assert chosen(LOSSY, walled).is_lossy, "3 of 6 pairs"
    choice = chosen(LOSSY, [replace(GOOD, blocked=everybody)] * 2 + [GOOD] * 2)
    assert (choice.is_lossy, "5 of 6 pairs of members" in choice.why) == (False, True)
    assert "between the two" in chosen(AUTO, [replace(GOOD, blocked=everybody)] * 2).why
    strangers = [replace(GOOD, blocked=(peer(77), peer(78)))] * 3
    assert chosen(LOSSY, strangers).is_lossy, "others are no matter of this group"


def test_a_group_too_large_for_packets_is_reliable() -> None:
    assert chosen(LOSSY, [GOOD] * 256).is_lossy
    assert "at most 256 members" in chosen(LOSSY, [GOOD] * 257).why


@pytest.mark.parametrize(
    "report", [{"loss": 1.5}, {"loss": -0.1}, {"round_trip_s": -1.0}, {"blocked": (peer(1),) * 33}]
)
def test_a_report_that_cannot_be_true_is_not_believed(report: dict[str, object]) -> None:
    assert report_is_sound(GOOD)
    assert not report_is_sound(replace(GOOD, **report))  # type: ignore[arg-type]


def test_auto_measures_first_and_takes_what_is_faster_then() -> None:
    assert "to measure the paths" in chosen(AUTO, [GOOD, PathReport()]).why
    assert not chosen(AUTO, [GOOD] * 3).is_lossy
    assert chosen(AUTO, [GOOD, replace(GOOD, loss=0.02)]).is_lossy
    assert chosen(AUTO, [GOOD] * 3, k=64).is_lossy, "now and then it measures anew"


def test_auto_knows_what_little_loss_does_to_a_fast_line_over_a_long_way() -> None:
    far = replace(GOOD, round_trip_s=0.08)
    assert not chosen(AUTO, [far] * 2, rate=0.1e6).is_lossy
    choice = chosen(AUTO, [far] * 2, rate=100e6)
    assert choice.is_lossy
    assert "carry 0.7 MB/s of the 100.0 that the line has for it" in choice.why

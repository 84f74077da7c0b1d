"""Whatever a hostile peer says on paper: nothing but RemoteProtocolError comes out, every call ends, others are spared.

Level one of two: the wire's translation and the pure rooms, in virtual time. `MOSHPITD_FUZZ=20` tries harder.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.nonsense import changes
from tests.fuzz.profile import tries
from tests.fuzz.theatre import Forgery, Lie, Theatre

moments = st.integers(0, 60)
lies = st.lists(
    st.builds(
        Lie,
        after_ms=moments,
        victim=st.integers(0, 3),
        by_stranger=st.booleans(),
        base=st.integers(0, 120),
        how=changes,
        damage=st.just(()) | changes,
    ),
    min_size=1,
    max_size=16,
)
forgeries = st.lists(
    st.builds(
        Forgery,
        after_ms=moments,
        victim=st.integers(0, 3),
        index=st.integers(0, 4),
        is_average=st.booleans(),
        payload=st.integers(0, 200),
        how=changes,
        damage=st.just(()) | changes,
    ),
    max_size=8,
)


@tries(40)
@given(lies=lies, forgeries=forgeries, seed=st.integers(0, 50))
def test_lies_and_forged_chunks_cost_their_teller_only(lies: list[Lie], forgeries: list[Forgery], seed: int) -> None:
    theatre = Theatre(seed=seed)
    for lie in lies:
        theatre.lie(lie)
    for forgery in forgeries:
        theatre.forge(forgery)
    endings = theatre.average_all([*theatre.honest, theatre.villain])
    assert set(theatre.honest) <= endings.keys()
    theatre.assert_nobody_else_was_harmed()
    theatre.assert_it_recovers()


@tries(40)
@given(leases=lies, plans=lies, seed=st.integers(0, 50))
def test_signed_nonsense_in_leases_and_plans_is_survived(leases: list[Lie], plans: list[Lie], seed: int) -> None:
    theatre = Theatre(seed=seed)
    for lie in leases:
        theatre.announce(lie)
    for lie in plans:
        theatre.lie(replace(lie, of_plan=True, damage=()))
    theatre.average_all([*theatre.honest, theatre.villain])
    theatre.assert_nobody_else_was_harmed()
    theatre.assert_it_recovers()

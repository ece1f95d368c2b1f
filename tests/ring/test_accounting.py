"""Charges, limits and the bounds on what a rank comes to hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.ring.accounting import Accounting, Reserve, decode_shares, usable, zigzag_share
from kvplane_runtime.ring.layout import Layout


@given(st.integers(1, 8), st.lists(st.integers(1, 30), max_size=8), st.integers(1, 100))
def test_no_rank_gets_more_of_a_prompt_than_its_share(ranks: int, windows: list[int], last: int) -> None:
    layout = Layout(ranks)
    for length in (*(2 * ranks * window for window in windows), last):
        layout.append_window(layout.length, length)
    assert max(layout.tokens(rank) for rank in range(ranks)) <= zigzag_share(layout.length, ranks)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 8))
def test_decode_shares_are_those_of_a_layout(first: int, count: int, ranks: int) -> None:
    assert decode_shares(first, count, ranks) == tuple(
        sum(position % ranks == rank for position in range(first, first + count)) for rank in range(ranks)
    )


def test_a_charge_replaces_the_one_before() -> None:
    accounting = Accounting(ranks=2, capacity=100, reserve=Reserve.OFF)
    accounting.charge(1, (15, 20))
    accounting.charge(2, (30, 30), kept=True)
    assert (accounting.active, accounting.kept, accounting.free) == ((15, 20), (30, 30), (55, 50))
    accounting.charge(1, (11, 24))
    assert accounting.free == (59, 46)
    accounting.drop(1)
    accounting.drop(2)
    assert accounting.free == (100, 100)


def test_what_is_kept_can_be_dropped_for_what_comes() -> None:
    accounting = Accounting(ranks=2, capacity=100, reserve=Reserve.OFF)
    accounting.charge(1, (60, 60), kept=True)
    assert not accounting.fits((50, 10))
    assert accounting.fits((50, 10), without=(1,))
    assert not accounting.fits((101, 0), without=(1,))


@given(st.integers(2, 16), st.integers(1000, 10**7))
def test_survive_leaves_room_for_the_share_of_any_rank(ranks: int, capacity: int) -> None:
    most = usable(capacity, ranks, Reserve.SURVIVE)
    assert most + most / (ranks - 1) <= capacity
    assert most > 0.98 * capacity * (ranks - 1) / ranks - 2


def test_survive_binds_requests_but_not_what_is_kept() -> None:
    accounting = Accounting(ranks=2, capacity=100, reserve=Reserve.SURVIVE)
    assert not accounting.fits((60, 60))
    assert accounting.fits((60, 60), reserved=False)
    accounting.charge(1, (60, 60), kept=True)
    assert accounting.fits((40, 40))


@pytest.mark.parametrize("reserve", list(Reserve))
def test_limits_never_exceed_the_capacity(reserve: Reserve) -> None:
    assert 0 <= usable(100, 1, reserve) <= 100

"""Ranges and runs against sets of positions."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.ring.ranges import Range, Run, count, cut, extend, merge, runs

BOUNDS = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted)
RANGES = BOUNDS.map(lambda bounds: Range(*bounds))
RUNS = st.builds(Run, first=st.integers(0, 30), count=st.integers(1, 9), step=st.integers(1, 5))


def positions(ranges: tuple[Range, ...]) -> list[int]:
    return [at for part in ranges for at in range(part.begin, part.end)]


def numbers(run: Run) -> list[int]:
    return [run.first + index * run.step for index in range(run.count)]


@pytest.mark.parametrize(("begin", "end"), [(-1, 3), (4, 3)])
def test_a_range_says_what_is_wrong_with_it(begin: int, end: int) -> None:
    with pytest.raises(ValueError, match=rf"A range begins at 0 or later .* it is {begin} to {end}\."):
        Range(begin, end)


@given(RANGES, st.integers(-1, 45))
def test_a_range_is_the_set_of_its_positions(one: Range, at: int) -> None:
    mine = positions((one,))
    assert (at in one) == (at in mine)
    assert len(one) == len(mine)


@given(st.lists(RANGES))
def test_merge_keeps_the_positions_in_the_fewest_ranges(some: list[Range]) -> None:
    merged = merge(some)
    assert positions(merged) == sorted(set(positions(tuple(some))))
    assert count(merged) == len(positions(merged))
    assert all(one.end < other.begin for one, other in itertools.pairwise(merged))


@given(RUNS, st.integers(0, 80))
def test_a_run_is_the_list_of_its_positions(run: Run, at: int) -> None:
    assert run.last == numbers(run)[-1]
    assert run.before(at) == sum(position < at for position in numbers(run))
    assert positions(run.ranges()) == numbers(run)
    assert numbers(run.part(0, 1)) == numbers(run)[:1]
    assert numbers(run.part(run.count // 2, run.count)) == numbers(run)[run.count // 2 :]


def test_one_position_has_no_stride() -> None:
    assert Run(7, 1, 4) == Run(7, 1)


@given(st.lists(st.integers(0, 100), unique=True).map(sorted), st.data())
def test_runs_keep_order_and_are_cut_anywhere(given_positions: list[int], data: st.DataObject) -> None:
    found = runs(given_positions)
    assert [at for run in found for at in numbers(run)] == given_positions
    bounds = sorted(data.draw(st.lists(st.integers(0, len(given_positions)), max_size=4)))
    bounds = [0, *bounds, len(given_positions)]
    pieces = cut(found, [end - begin for begin, end in itertools.pairwise(bounds)])
    assert [[at for run in piece for at in numbers(run)] for piece in pieces] == [
        given_positions[begin:end] for begin, end in itertools.pairwise(bounds)
    ]


def test_generated_tokens_of_one_rank_are_one_run() -> None:
    held = [Run(0, 100)]
    for position in range(103, 1000, 4):
        extend(held, Run(position, 1))
    assert held == [Run(0, 100), Run(103, 225, 4)]

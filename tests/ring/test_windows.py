"""Windows begin small, double at most, and then fill a slice of time."""

from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.ring.cost import NOTHING, Work, work
from kvplane_runtime.ring.ranges import Run, runs
from kvplane_runtime.ring.windows import Windows, span, whole


def all_of(tokens: int, start: int = 0) -> tuple[Run, ...]:
    return (Run(start, tokens),)


def test_the_first_window_is_the_least_and_the_next_at_most_double() -> None:
    windows = Windows(slice_seconds=1.0, tokens=100)
    assert windows.size(all_of(10**6), ranks=4, placement="zigzag") == 400
    assert windows.size(all_of(10**6), ranks=4, placement=2) == 100
    windows.learn(work(0, 400, 400, ranks=4, placement="zigzag"), missing=400, seconds=0.001)
    assert windows.size(all_of(10**6, 400), ranks=4, placement="zigzag") == 800


def test_a_window_never_has_less_than_hides_communication() -> None:
    windows = Windows(slice_seconds=0.001, tokens=1024)
    for _ in range(5):
        windows.learn(work(0, 4096, 4096, ranks=4, placement="zigzag"), missing=4096, seconds=10.0)
    assert windows.size(all_of(10**6), ranks=4, placement="zigzag") == 4096


@given(
    token=st.floats(1e-6, 1e-4),
    pair=st.floats(1e-10, 1e-8),
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    length=st.integers(10_000, 200_000),
)
def test_windows_of_a_long_prompt_come_to_a_slice_and_not_beyond_it(
    token: float, pair: float, ranks: int, length: int
) -> None:
    windows = Windows(slice_seconds=0.1, tokens=16)
    done = 0
    while done < length:
        size = windows.size(all_of(length - done, done), ranks=ranks, placement="zigzag")
        assert size % (2 * ranks) == 0
        one = work(done, done + size, size, ranks=ranks, placement="zigzag")
        seconds = token * one.tokens + pair * one.pairs
        least = 16 * ranks
        assert seconds <= 0.15 or size == least
        windows.learn(one, missing=size, seconds=seconds)
        done += size


@given(st.sets(st.integers(0, 60), min_size=1), st.integers(1, 70))
def test_a_span_holds_the_first_missing_positions_and_ends_with_one(positions: set[int], most: int) -> None:
    missing = runs(sorted(positions))
    begin, end = span(missing, most)
    assert begin == min(positions)
    assert end - 1 in positions
    assert sum(begin <= at < end for at in positions) == min(most, len(positions))


def test_what_takes_several_windows_is_judged_by_time_once_it_is_known() -> None:
    windows = Windows(slice_seconds=1.0, tokens=100)
    assert not windows.several(Work(100, 5_000.0))
    assert windows.several(Work(101, 5_100.0))
    windows.learn(Work(100, 5_000.0), missing=100, seconds=0.4)
    assert not windows.several(Work(200, 20_000.0))
    assert windows.several(Work(1_000, 500_000.0))


def test_the_work_of_all_that_is_missing() -> None:
    assert whole((), ranks=4, placement="zigzag") == NOTHING
    assert whole((Run(0, 100), Run(300, 100)), ranks=4, placement="zigzag") == Work(50.0, 10_000.0)
    assert whole((Run(0, 100),), ranks=4, placement=1) == Work(100, 5_000.0)

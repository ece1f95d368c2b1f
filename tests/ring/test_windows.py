"""Windows begin small, double at most, and then fill a slice of time; shorter ones than hide the exchange there are not."""

import bisect
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.ring.cost import NOTHING, Work, work
from kvplane_runtime.ring.exchange import choose, keys_per_query
from kvplane_runtime.ring.ranges import Run, runs
from kvplane_runtime.ring.windows import PLANNED, Windows, part, span, whole

LLAMA_8B = keys_per_query(query_heads=32, key_heads=8, head_dim=128, element_bytes=2)


def all_of(tokens: int, start: int = 0) -> tuple[Run, ...]:
    return (Run(start, tokens),)


def new(*, slice_seconds: float = 1.0, tokens: int = 100, ratio: float = LLAMA_8B) -> Windows:
    return Windows(slice_seconds=slice_seconds, tokens=tokens, keys_per_query=ratio)


def test_the_first_window_is_the_least_and_the_next_at_most_double() -> None:
    windows = new()
    assert windows.size(all_of(10**6), ranks=4, placement="zigzag") == 400
    assert windows.size(all_of(10**6), ranks=4, placement=2) == 100
    windows.learn(Work(100, 10**7), seconds=0.001, placement="zigzag")
    assert windows.size(all_of(10**6, 400), ranks=4, placement="zigzag") == 800, "twice the tokens"
    windows = new()
    windows.learn(Work(10_000, 125_000), seconds=0.001, placement="zigzag")
    assert windows.size(all_of(10**6, 400), ranks=4, placement="zigzag") == 1064, "twice the pairs: 266 x (400 + 532)"


def test_a_window_never_has_less_than_hides_keys_that_go_round() -> None:
    windows = new(slice_seconds=0.001, tokens=1024)
    for _ in range(5):
        done = work(0, 4096, 4096, ranks=4, placement="zigzag")
        windows.learn(done, seconds=10.0, placement="zigzag")
    beyond = next(past for past in range(10**6) if choose(new=4096, past=past, keys_per_query=LLAMA_8B) == "queries")
    assert windows.size(all_of(10**6), ranks=4, placement="zigzag") == 4096
    assert windows.size(all_of(10**6, beyond - 1), ranks=4, placement="zigzag") == 4096
    assert windows.size(all_of(10**6, beyond), ranks=4, placement="zigzag") == 8, (
        "queries go round: the slice alone counts"
    )
    assert windows.size(all_of(10**6), ranks=4, placement=0) == 1024


@pytest.mark.parametrize("e", [2, 4])
@pytest.mark.parametrize(("query_heads", "key_heads"), [(32, 8), (64, 8), (16, 8), (8, 8)])
def test_a_window_is_shorter_only_where_what_the_ranks_hold_hides_the_queries(
    query_heads: int, key_heads: int, e: int
) -> None:
    """A ring step sends e D + 4 (D + 1) bytes for each query and head, and computes 4 D FLOP for each of them with each key."""
    head_dim, flop_per_byte, ranks = 128, 500e12 / 11e9, 4
    least = 2 * round(e * key_heads / query_heads * flop_per_byte / 2)  # per rank: what hides keys (docs: sizing)
    ratio = keys_per_query(query_heads=query_heads, key_heads=key_heads, head_dim=head_dim, element_bytes=e)
    windows = new(slice_seconds=0.001, tokens=least, ratio=ratio)
    windows.learn(
        work(0, least * ranks, least * ranks, ranks=ranks, placement="zigzag"), seconds=9.0, placement="zigzag"
    )

    def is_shorter(past: int) -> bool:
        return windows.size(all_of(10**6, past), ranks=ranks, placement="zigzag") < least * ranks

    past = bisect.bisect_left(range(100_000_000), True, key=is_shorter)
    assert is_shorter(past)
    exchange = (e * head_dim + 4 * (head_dim + 1)) * flop_per_byte
    computing = 4 * head_dim * past / ranks
    assert exchange <= 1.01 * computing


def prefill(
    windows: Windows,
    length: int,
    *,
    ranks: int,
    costs: tuple[float, float, float],
    draw: random.Random,
    wait: Callable[[], float] = lambda: 0.0,
) -> list[float]:
    """Seconds of the windows of a prompt; they are measured with an error of up to 4 %. ``wait``: what is added to each."""
    launch, token, pair = costs
    found, done = [], 0
    while done < length:
        size = windows.size(all_of(length - done, done), ranks=ranks, placement="zigzag")
        assert size % (2 * ranks) == 0
        size = min(size, length - done)
        one = work(done, done + size, size, ranks=ranks, placement="zigzag")
        seconds = wait() + launch + token * one.tokens + pair * one.pairs
        found.append(seconds)
        windows.learn(one, seconds=seconds * draw.uniform(0.96, 1.04), placement="zigzag")
        done += size
    return found


@given(
    token=st.floats(1e-6, 1e-4),
    pair=st.floats(1e-10, 1e-8),
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    length=st.integers(10_000, 200_000),
    seed=st.integers(0, 1000),
)
def test_windows_of_a_long_prompt_come_to_a_slice_and_not_beyond_it(
    token: float, pair: float, ranks: int, length: int, seed: int
) -> None:
    windows = new(slice_seconds=0.1, tokens=16)
    draw = random.Random(seed)  # noqa: S311  (errors, no secrets)
    assert max(prefill(windows, length, ranks=ranks, costs=(1e-4, token, pair), draw=draw)) <= 0.1


@pytest.mark.parametrize("seed", range(2))
def test_short_prompts_do_not_make_it_forget_what_long_ones_cost(seed: int) -> None:
    windows = new(tokens=1024)
    draw = random.Random(seed)  # noqa: S311  (errors, no secrets)
    costs = 0.003, 3e-5, 1.6e-8
    prefill(windows, 100_000, ranks=2, costs=costs, draw=draw)
    for _ in range(2000):
        short = work(0, 64, 64, ranks=2, placement=1)
        windows.learn(short, seconds=draw.uniform(0.004, 0.006), placement=1)
    assert max(prefill(windows, 100_000, ranks=2, costs=costs, draw=draw)) <= 1.0


def test_the_first_window_on_a_long_past_has_no_more_pairs_than_one_of_the_least_length_at_the_begin() -> None:
    """As behind a rank 0 that is new and finds a prefix on its workers."""
    size = new(tokens=1024).size(all_of(5000, 100_000), ranks=4, placement="zigzag")
    first = work(0, 4096, 4096, ranks=4, placement="zigzag")
    assert 0.9 * first.pairs < part(all_of(size, 100_000), size, ranks=4, placement="zigzag").pairs <= first.pairs


def test_where_any_window_takes_longer_than_a_slice_half_of_it_is_work() -> None:
    windows = new(slice_seconds=0.01, tokens=16)
    draw = random.Random(1)  # noqa: S311  (errors, no secrets)
    took = prefill(windows, 100_000, ranks=4, costs=(0.02, 1e-5, 1e-9), draw=draw)
    assert max(took) <= 0.05
    assert sorted(took)[len(took) // 2] > 0.03


@pytest.mark.parametrize("ratio", [1.5, 3.0, LLAMA_8B])
@pytest.mark.parametrize("seed", range(4))
def test_where_each_window_waits_for_a_busy_machine_windows_do_not_get_ever_shorter(ratio: float, seed: int) -> None:
    """As where more ranks than processors share them: most windows take longer than a slice, however short they are."""
    draw = random.Random(seed)  # noqa: S311  (waits, no secrets)
    windows = new(slice_seconds=0.05, tokens=32, ratio=ratio)

    def wait() -> float:
        return 0.003 if draw.random() < 0.05 else 0.05 + draw.expovariate(10)

    costs = 0.0, 2e-5, 1e-8
    for length, ranks in ((500, 3), (500, 3), (300, 3), (500, 2), (300, 3)):
        prefill(windows, length, ranks=ranks, costs=costs, draw=draw, wait=wait)
    assert len(prefill(windows, 3900, ranks=2, costs=costs, draw=draw, wait=wait)) < 250


def test_where_work_alone_makes_the_shortest_window_too_long_others_have_twice_its_length_at_most() -> None:
    windows = new(slice_seconds=0.05, tokens=1)
    found = prefill(windows, 400, ranks=2, costs=(0.0, 0.1, 0.0), draw=random.Random(1))  # noqa: S311
    assert max(found) <= 1.1 * 0.1 * 4


def test_a_window_over_what_was_lost_is_judged_by_the_positions_that_it_spans() -> None:
    """Every fourth position is missing, so a window meets the keys of four times its length."""
    windows = new(tokens=16)
    for begin in range(0, 100_000, 10_000):
        done = work(begin, begin + 10_000, 10_000, ranks=4, placement="zigzag")
        windows.learn(done, seconds=1e-8 * done.pairs, placement="zigzag")
    lost = (Run(2, 25_000, 4),)
    size = windows.size(lost, ranks=4, placement="zigzag")
    assert 0.85 < windows.seconds(part(lost, size, ranks=4, placement="zigzag")) <= PLANNED


@given(st.sets(st.integers(0, 60), min_size=1), st.integers(1, 70))
def test_a_span_holds_the_first_missing_positions_and_ends_with_one(positions: set[int], most: int) -> None:
    missing = runs(sorted(positions))
    begin, end = span(missing, most)
    assert begin == min(positions)
    assert end - 1 in positions
    assert sum(begin <= at < end for at in positions) == min(most, len(positions))


def test_what_takes_several_windows_is_judged_by_time_once_it_is_known() -> None:
    windows = new()

    def several(tokens: float, pairs: float) -> bool:
        return windows.several(Work(tokens, pairs), ranks=4, placement="zigzag")

    assert not several(100, 20_000.0)
    assert several(101, 20_402.0)
    windows.learn(Work(100, 20_000.0), seconds=0.4, placement="zigzag")
    assert not several(200, 80_000.0)
    assert several(1_000, 2_000_000.0)
    assert not several(0, 0.0)


def test_few_tokens_take_one_window_while_keys_go_round_and_several_behind_a_long_past() -> None:
    windows = new()
    windows.learn(Work(100, 20_000.0), seconds=4.0, placement="zigzag")
    windows.learn(Work(100, 200_000.0), seconds=40.0, placement="zigzag")
    assert not windows.several(Work(100, 20_000.0), ranks=4, placement="zigzag")
    assert windows.several(Work(100, 100 * 50_000.0), ranks=4, placement="zigzag")
    assert not windows.several(Work(100, 100 * 50_000.0), ranks=4, placement=1)


def test_the_work_of_all_that_is_missing() -> None:
    assert whole((), ranks=4, placement="zigzag") == NOTHING
    assert whole((Run(0, 100), Run(300, 100)), ranks=4, placement="zigzag") == Work(50.0, 10_000.0)
    assert whole((Run(0, 100),), ranks=4, placement=1) == Work(100, 5_000.0)

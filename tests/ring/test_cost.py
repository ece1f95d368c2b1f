"""The prices of a window are learned from windows."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.ring.cost import Cost, Work, work


def test_nothing_is_known_at_first() -> None:
    assert not Cost().known
    assert Cost().seconds(Work(1000, 1000)) == 0


def test_one_window_prices_tokens() -> None:
    cost = Cost()
    cost.learn(Work(1024, 0.0), 0.5)
    assert cost.seconds(Work(2048, 0.0)) == pytest.approx(1.0)


@given(
    st.sampled_from([0.0, 0.005]), st.floats(1e-6, 1e-4), st.sampled_from([0.0, 1e-9, 1e-8]), st.sampled_from([1, 2, 4])
)
def test_the_three_prices_are_found(launch: float, token: float, pair: float, ranks: int) -> None:
    cost = Cost()
    for start in range(0, 60_000, 2_000):
        done = work(start, start + 1_000 + start // 20, 1_000 + start // 20, ranks=ranks, placement="zigzag")
        cost.learn(done, launch + token * done.tokens + pair * done.pairs)
    asked = work(30_000, 32_000, 2_000, ranks=ranks, placement="zigzag")
    assert cost.seconds(asked) == pytest.approx(launch + token * asked.tokens + pair * asked.pairs, rel=0.1)


@given(st.lists(st.tuples(st.floats(1, 1e5), st.floats(0, 1e10), st.floats(1e-4, 10)), min_size=1, max_size=30))
def test_no_price_is_negative_whatever_is_measured(windows: list[tuple[float, float, float]]) -> None:
    cost = Cost()
    for tokens, pairs, seconds in windows:
        cost.learn(Work(tokens, pairs), seconds)
    assert 0 <= cost.seconds(Work(0, 0)) <= cost.seconds(Work(1e4, 0)) <= cost.seconds(Work(1e4, 1e8))


def test_the_newest_windows_count() -> None:
    cost = Cost()
    for seconds in (1.0, 0.2):
        for _ in range(200):
            cost.learn(Work(1024, 1e6), seconds)
    assert cost.seconds(Work(1024, 1e6)) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("error", [0.0, 0.05])
def test_windows_that_were_made_to_take_the_same_do_not_seem_to_take_it_whatever_their_length(error: float) -> None:
    """As those of a long prompt are, over a past that grows: a price of any window alone explains them as well as the truth."""
    cost, at = Cost(), 200_000.0
    draw = random.Random(1)  # noqa: S311  (errors, no secrets)
    for _ in range(200):
        tokens = 0.9 / (1e-4 + 5e-9 * at)
        cost.learn(Work(tokens, tokens * at), 0.9 * draw.uniform(1 - error, 1 + error))
        at += 4 * tokens
    assert cost.seconds(Work(2 * tokens, 2 * tokens * at)) == pytest.approx(1.8, rel=0.05)


def test_the_price_of_any_window_is_not_above_what_it_is_known_to_be() -> None:
    free, bound = Cost(), Cost()
    for tokens in (1e3, 2e3, 4e3):
        free.learn(Work(tokens, tokens**2), 1.0)
        bound.learn(Work(tokens, tokens**2), 1.0, whatever=0.1)
    assert free.whatever_seconds > 0.9
    assert bound.whatever_seconds <= 0.1


def test_what_ages_nothing_leaves_what_was_learned_before() -> None:
    cost = Cost()
    cost.learn(Work(1024, 1e9), 1.0)
    for _ in range(1000):
        cost.learn(Work(64, 2048.0), 0.005, age=0.0)
    assert cost.seconds(Work(1024, 1e9)) == pytest.approx(1.0, rel=0.2)


def test_work_is_that_of_the_busiest_rank() -> None:
    assert work(0, 800, 800, ranks=4, placement="zigzag") == Work(200, 80_000)
    assert work(0, 800, 800, ranks=4, placement=2) == Work(800, 320_000)

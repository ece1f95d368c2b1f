"""Survival curves of output lengths."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.admission.lengths import Curve, OutputLengths, draw

SAMPLES = st.lists(st.tuples(st.integers(1, 5000), st.booleans()), min_size=0, max_size=200)


def test_without_censoring_it_is_the_share_of_longer_samples() -> None:
    curve = draw([(length, False) for length in range(1, 100)])
    # One sample longer than all is added: 100 instead of 99.
    assert curve.exceeds(50) == pytest.approx(50 / 100)
    assert curve.exceeds(0) == 1.0
    assert curve.exceeds(99) == pytest.approx(1 / 100)


def test_kaplan_and_meier_by_hand() -> None:
    """30 samples: 10 end at 10, 10 are cut off at 20, 10 end at 30."""
    curve = draw([(10, False)] * 10 + [(20, True)] * 10 + [(30, False)] * 10)
    assert curve.exceeds(9) == 1.0
    assert curve.exceeds(10) == pytest.approx(21 / 31)
    assert curve.exceeds(29) == pytest.approx(21 / 31)
    assert curve.exceeds(30) == pytest.approx(21 / 31 * 1 / 11)


def test_what_always_runs_into_its_limit_is_expected_to() -> None:
    curve = draw([(100, True)] * 200)
    assert curve.exceeds(99) == 1.0
    assert curve.expected(100) == 100
    assert curve.expected(400) > 390


def test_few_samples_give_an_exponential_curve() -> None:
    assert Curve().expected(None) == pytest.approx(512)
    curve = draw([(100, False)] * 9)
    assert curve.expected(None) == pytest.approx((900 + 512) / 10)
    assert curve.exceeds(141.2) == pytest.approx(math.exp(-1))


def test_an_output_that_has_outlived_every_sample_goes_on_for_a_while() -> None:
    curve = draw([(4, False)] * 100)
    assert curve.exceeds(20) / curve.exceeds(4) == pytest.approx(math.exp(-1))


@given(SAMPLES, st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_curve_never_rises_and_never_reaches_zero(samples: list[tuple[int, bool]], a: int, b: int) -> None:
    curve = draw(samples)
    low, high = sorted((a, b))
    assert 0 < curve.exceeds(high) <= curve.exceeds(low) <= 1


@given(SAMPLES, st.integers(1, 3000))
def test_the_expected_length_is_the_area_under_the_curve(samples: list[tuple[int, bool]], limit: int) -> None:
    curve = draw(samples)
    # Exact for the steps; the exponential tail is summed at the middle of each token.
    area = sum(curve.exceeds(x + 0.5) for x in range(limit))
    assert curve.expected(limit) == pytest.approx(max(1.0, area), rel=1e-3)
    assert curve.expected(limit) <= curve.expected(None)


@given(SAMPLES, st.integers(0, 2000), st.integers(1, 1000))
def test_what_remains_is_the_area_beyond_for_those_that_get_so_far(
    samples: list[tuple[int, bool]], generated: int, more: int
) -> None:
    curve = draw(samples)
    beyond = sum(curve.exceeds(x + 0.5) for x in range(generated, generated + more))
    wanted = max(1.0, beyond / curve.exceeds(generated))
    assert curve.remaining(generated, generated + more) == pytest.approx(wanted, rel=1e-3)
    assert curve.remaining(0, None) == pytest.approx(curve.expected(None))


def test_kinds_of_prompts_have_their_own_curves_once_enough_is_known() -> None:
    lengths = OutputLengths()
    for _ in range(29):
        lengths.learn(priority=0, prompt_tokens=100, output_tokens=10, capped=False)
    assert lengths.curve(priority=0, prompt_tokens=3000) == lengths.curve(priority=0, prompt_tokens=100)
    for _ in range(60):
        lengths.learn(priority=0, prompt_tokens=3000, output_tokens=500, capped=False)
        lengths.learn(priority=0, prompt_tokens=100, output_tokens=10, capped=False)
    assert lengths.curve(priority=0, prompt_tokens=127).expected(None) < 15
    assert lengths.curve(priority=0, prompt_tokens=2500).expected(None) > 450
    assert 15 < lengths.curve(priority=1, prompt_tokens=100).expected(None) < 450


def test_the_newest_samples_count() -> None:
    lengths = OutputLengths()
    for tokens in [1000] * 700 + [10] * 700:
        lengths.learn(priority=0, prompt_tokens=100, output_tokens=tokens, capped=False)
    assert lengths.curve(priority=0, prompt_tokens=100).expected(None) < 15


def test_memory_is_bounded() -> None:
    lengths = OutputLengths()
    for number in range(20_000):
        lengths.learn(priority=number % 97, prompt_tokens=1 << (number % 40), output_tokens=5, capped=False)
    assert len(lengths) <= 64 * 600 + 1500

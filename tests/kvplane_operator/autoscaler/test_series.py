"""Demand so far: what is kept, for how long, and what it says."""

import math
import random
import sys

import pytest

from kvplane_api.service import Autoscaling
from kvplane_operator.autoscaler.series import BUCKETS, MINUTES, RECENT_MOST, Series, Steps
from tests.kvplane_operator.autoscaler.world import START

DAY = 86_400.0


def noted(*demands: float, step: float = 5.0, start: float = START) -> Series:
    series = Series()
    for number, demand in enumerate(demands):
        series = series.noted(demand, now=start + number * step)
    return series


class TestBounds:
    def test_each_length_is_bounded(self) -> None:
        series = Series()
        for step in range(3 * BUCKETS):
            series = series.noted(1.0, now=START + 300 * step)
        assert len(series.buckets) == BUCKETS
        for step in range(2 * MINUTES):
            series = series.noted(1.0, now=START + 10 * DAY + 60 * step)
        assert len(series.minutes) == MINUTES
        for step in range(2 * RECENT_MOST):
            series = series.noted(1.0, now=START + 20 * DAY + step)
        assert len(series.recent) == RECENT_MOST

    def test_what_is_old_is_dropped(self) -> None:
        series = noted(9.0).noted(1.0, now=START + 10 * DAY)
        assert [demand for _, demand in series.recent] == [1.0]
        assert [demand for _, demand in series.minutes] == [1.0]
        assert [mean for _, mean in series.buckets] == [1.0]

    def test_what_is_from_the_future_is_dropped(self) -> None:
        series = noted(9.0, start=START + DAY).noted(1.0, now=START)
        assert [demand for _, demand in series.recent] == [1.0]
        assert [demand for _, demand in series.minutes] == [1.0]
        assert [mean for _, mean in series.buckets] == [1.0]


class TestSteps:
    def test_what_was_not_known_is_left_out(self) -> None:
        steps = Steps().noted(7, 1.0, most=5).noted(9, 0.0, most=5)
        assert steps == Steps.of([(7, 1.0), (9, 0.0)])
        assert (list(steps), len(steps), steps.last) == ([(7, 1.0), (9, 0.0)], 3, 9)
        assert [steps.at(step) for step in (6, 7, 8, 9, 10)] == [None, 1.0, None, 0.0, None]

    def test_the_last_ones_are_kept(self) -> None:
        """Of 7, 9 and 12 the first is too old, and the time up to 9 goes with it."""
        steps = Steps.of([(7, 1.0), (9, 3.0)]).noted(12, 2.0, most=5)
        assert steps == Steps.of([(9, 3.0), (12, 2.0)])

    def test_a_step_again_takes_its_place_and_the_future_is_dropped(self) -> None:
        steps = Steps.of([(7, 1.0), (8, 2.0), (9, 3.0)])
        assert steps.noted(9, 5.0, most=5) == Steps.of([(7, 1.0), (8, 2.0), (9, 5.0)])
        assert steps.noted(8, 5.0, most=5) == Steps.of([(7, 1.0), (8, 5.0)])
        assert steps.noted(5, 5.0, most=5) == Steps.of([(5, 5.0)])
        assert list(steps) == [(7, 1.0), (8, 2.0), (9, 3.0)]

    def test_highest(self) -> None:
        steps = Steps.of([(7, 3.0), (9, 1.0)])
        assert [steps.highest(since=step) for step in (0, 7, 8, 9, 10)] == [3.0, 3.0, 1.0, 1.0, 0.0]
        assert Steps().highest(since=0) == 0.0

    def test_none(self) -> None:
        assert (Steps.of([]), list(Steps()), Steps().last, Steps().at(0)) == (Steps(), [], None, None)

    def test_two_days_of_a_service_are_small(self) -> None:
        """A thousand services keep them in the memory of one operator."""
        series = Series()
        for step in range(BUCKETS):
            series = series.noted(1.0 + step, now=START + 300 * step)
        for step in range(MINUTES):
            series = series.noted(1.0, now=START + 300 * BUCKETS + 60 * step)
        size = sum(sys.getsizeof(steps.values) for steps in (series.minutes, series.buckets))
        assert size <= 10 * (MINUTES + BUCKETS)


def test_the_longest_window_that_a_spec_can_ask_for_is_kept() -> None:
    bounds = Autoscaling.model_fields["scale_down_window_seconds"].metadata
    (longest,) = (bound.le for bound in bounds if hasattr(bound, "le"))
    series = noted(5.0, *[1.0] * (longest // 60), step=60.0)
    assert series.highest(since=START) == 5.0


def test_highest_is_of_whole_minutes() -> None:
    """START is 20 s into its minute."""
    series = noted(5.0, 1.0, 2.0, step=60.0)
    assert series.highest(since=START + 120) == 2.0
    assert series.highest(since=START + 39) == 5.0
    assert series.highest(since=START + 40) == 2.0
    assert series.highest(since=START + 1000) == 0.0


def test_highest_of_a_minute_is_its_highest_moment() -> None:
    assert noted(1.0, 4.0, 2.0).highest(since=START) == 4.0


@pytest.mark.parametrize(("share", "value"), [(0.9, 9.0), (0.5, 5.0), (1.0, 10.0), (0.0, 1.0)])
def test_quantile_is_nearest_rank(share: float, value: float) -> None:
    assert noted(*(float(n) for n in range(10, 0, -1))).quantile(share) == value


def test_nothing_has_no_quantile() -> None:
    assert Series().quantile(0.9) is None


class TestNoise:
    def test_a_level_has_none(self) -> None:
        assert noted(*[2.0] * 12).noise(now=START + 60) == 0.0

    def test_a_trend_has_little(self) -> None:
        """A replica more each 5 s: its differences are 1, so it counts as that however far it goes."""
        assert noted(*(float(n) for n in range(12))).noise(now=START + 60) == pytest.approx(1.4826 / math.sqrt(2))

    def test_it_is_the_standard_deviation_of_independent_values(self) -> None:
        """A hundred of a normal distribution, within the error of so many."""
        gauss = random.Random(1).gauss  # noqa: S311
        series = noted(*(gauss(100.0, 2.0) for _ in range(100)), step=0.5)
        assert series.noise(now=START + 50) == pytest.approx(2.0, rel=0.25)

    @pytest.mark.parametrize("after", [1, 2, 3, 9])
    def test_a_step_is_none(self, after: int) -> None:
        """Of a quiet service, which is looked at every 15 s, and every 5 s from then on."""
        series = noted(0.0, 0.0, 0.0, step=15.0)
        for look in range(after):
            series = series.noted(3.2, now=START + 45 + 5 * look)
        assert series.noise(now=START + 45 + 5 * after) == 0.0

    def test_only_the_last_minute_counts(self) -> None:
        assert noted(*[1.0, 3.0] * 6, *[2.0] * 13).noise(now=START + 125) == 0.0

    def test_two_values_are_too_few(self) -> None:
        assert noted(1.0, 9.0).noise(now=START + 10) == 0.0


class TestYesterday:
    def days(self, count: float) -> Series:
        """Each five minutes' demand is its number in the day."""
        series = Series()
        for number in range(int(count * 288)):
            series = series.noted(float(number % 288), now=START + 300 * number)
        return series

    def test_the_mean_of_the_same_five_minutes(self) -> None:
        assert self.days(2.5).yesterday(at=START + 2.5 * DAY) == 144.0

    def test_not_before_two_days_are_known(self) -> None:
        assert self.days(1.9).yesterday(at=START + 1.9 * DAY) is None
        assert Series().yesterday(at=START) is None

    def test_a_gap_is_not_guessed(self) -> None:
        series = self.days(2.5).noted(1.0, now=START + 3.5 * DAY)
        assert series.yesterday(at=START + 3.6 * DAY) is None

    def test_several_looks_make_a_mean(self) -> None:
        series = noted(1.0, 2.0, 6.0)
        assert ([mean for _, mean in series.buckets], series.looks) == ([3.0], 3)

"""Forecasts: each one, and which of them is believed."""

import random
from collections.abc import Callable

import pytest

from kvplane_operator.autoscaler.forecast import AWAITED_MOST, Forecast, Loss, Method, Outlook, Trend, look_ahead
from kvplane_operator.autoscaler.series import Series
from tests.kvplane_operator.autoscaler.world import START

HORIZON = 60.0


class Course:
    """Forecasting of a demand over time."""

    def __init__(self, demand: Callable[[float], float]) -> None:
        self.demand = demand
        self.outlook = Outlook()
        self.series = Series()
        self.seconds = 0.0

    def run(self, seconds: float) -> Forecast:
        """The last forecast."""
        until = self.seconds + seconds
        forecast = self._step()
        while self.seconds < until:
            forecast = self._step()
        return forecast

    def _step(self) -> Forecast:
        now, demand = START + self.seconds, self.demand(self.seconds)
        self.series = self.series.noted(demand, now=now)
        forecast, self.outlook = look_ahead(self.outlook, self.series, demand, horizon=HORIZON, quantile=0.9, now=now)
        self.seconds += 5.0
        return forecast


class TestTrend:
    def test_begins_level(self) -> None:
        assert Trend(START, 2.0).ahead(60.0) == 2.0

    def test_finds_a_slope(self) -> None:
        trend = Trend(START, 1.0)
        for step in range(1, 241):
            trend = trend.moved(1.0 + 0.05 * step, now=START + 5 * step)  # 0.01 a second
        assert trend.slope == pytest.approx(0.01, rel=0.05)
        assert trend.ahead(60.0) == pytest.approx(13.0 + 0.6, rel=0.05)

    def test_is_not_followed_without_end(self) -> None:
        assert Trend(START, 2.0, slope=1.0).ahead(600.0) == 5.0
        assert Trend(START, 2.0, slope=-1.0).ahead(600.0) == 0.0

    def test_rises_with_the_demand(self) -> None:
        trend = Trend(START, 2.0, slope=0.01)
        ahead = [trend.moved(demand, now=START + 5).ahead(60.0) for demand in (0.0, 1.0, 2.0, 5.0, 50.0)]
        assert ahead == sorted(ahead)

    @pytest.mark.parametrize("seconds", [61.0, -5.0])
    def test_after_a_silence_or_a_clock_set_back_it_begins_anew(self, seconds: float) -> None:
        assert Trend(START, 2.0, slope=1.0).moved(3.0, now=START + seconds) == Trend(START + seconds, 3.0)

    def test_the_same_moment_twice_counts_once(self) -> None:
        assert Trend(START, 2.0, slope=1.0).moved(3.0, now=START) == Trend(START, 2.0, slope=1.0)


class TestBelief:
    def test_at_first_things_stay_as_they_are(self) -> None:
        assert Course(lambda seconds: 1 + 0.01 * seconds).run(HORIZON).method is Method.PERSISTENCE

    def test_a_trend_that_lasts_is_followed(self) -> None:
        course = Course(lambda seconds: 1 + 0.01 * seconds)
        forecast = course.run(900.0)
        assert forecast.method is Method.TREND
        assert forecast.demand == pytest.approx(course.demand(course.seconds + HORIZON), rel=0.05)

    def test_of_a_level_with_noise_a_high_is_expected(self) -> None:
        random_ = random.Random(1)  # noqa: S311
        noise = [random_.uniform(-1, 1) for _ in range(400)]
        course = Course(lambda seconds: 2 + noise[int(seconds / 5)])
        forecast = course.run(1800.0)
        losses = course.outlook.losses
        assert losses[Method.RECENT].mean < losses[Method.PERSISTENCE].mean
        assert forecast.demand >= forecast.values[Method.RECENT] > 2.4

    def test_a_level_is_forecast_as_it_is(self) -> None:
        assert Course(lambda _: 2.0).run(900.0) == Forecast(
            2.0, Method.PERSISTENCE, {Method.PERSISTENCE: 2.0, Method.TREND: 2.0, Method.RECENT: 2.0}
        )

    @pytest.mark.parametrize(
        ("loss", "method"),
        [
            (Loss(0.1, 8), Method.TREND),
            (Loss(0.2, 8), Method.PERSISTENCE),  # errs more
            (Loss(0.1, 7), Method.PERSISTENCE),  # hardly tried
        ],
    )
    def test_only_what_errs_no_more_than_persistence_is_believed(self, loss: Loss, method: Method) -> None:
        outlook = Outlook(
            trend=Trend(START - 5, 2.0, slope=0.1), losses={Method.PERSISTENCE: Loss(0.1, 50), Method.TREND: loss}
        )
        series = Series().noted(2.5, now=START)
        forecast, _ = look_ahead(outlook, series, 2.5, horizon=HORIZON, quantile=0.9, now=START)
        assert forecast.method is method

    def test_a_daily_rise_is_known_on_the_third_day(self) -> None:
        def demand(seconds: float) -> float:
            return 5.0 if seconds % 86_400 >= 43_200 else 1.0

        series, outlook = Series(), Outlook(losses={each: Loss(0.0, 100) for each in Method})
        forecast = Forecast(0.0, Method.PERSISTENCE)
        for number in range(int(2.5 * 288)):
            seconds = 300.0 * number
            series = series.noted(demand(seconds), now=START + seconds)
            forecast, _ = look_ahead(outlook, series, demand(seconds), horizon=300.0, quantile=0.9, now=START + seconds)
        assert demand(seconds) == 1.0
        assert (forecast.method, forecast.demand) == (Method.YESTERDAY, 5.0)

    def test_a_decision_never_discredits_a_forecast_by_its_own_demand(self) -> None:
        """Else more demand could ask for less."""
        course = Course(lambda seconds: 1 + 0.01 * seconds)
        course.run(900.0)
        ahead = []
        for demand in (0.0, 5.0, 10.0, 20.0, 100.0):
            now = START + course.seconds
            series = course.series.noted(demand, now=now)
            forecast, _ = look_ahead(course.outlook, series, demand, horizon=HORIZON, quantile=0.9, now=now)
            ahead.append(forecast.demand)
        assert ahead == sorted(ahead)


class TestErrors:
    def test_a_lack_weighs_nine_times_an_excess(self) -> None:
        """As now is 1 replica short at every check, then 1 too many."""
        rising, falling = Course(lambda seconds: seconds / 60), Course(lambda seconds: 100 - seconds / 60)
        rising.run(600.0)
        falling.run(600.0)
        assert rising.outlook.losses[Method.PERSISTENCE].mean == pytest.approx(0.9)
        assert falling.outlook.losses[Method.PERSISTENCE].mean == pytest.approx(0.1)

    def test_forecasts_that_fell_due_in_a_silence_are_not_compared(self) -> None:
        course = Course(lambda _: 2.0)
        course.run(30.0)
        course.seconds += 600.0
        course.run(5.0)
        assert course.outlook.losses == {}

    def test_what_is_awaited_is_bounded(self) -> None:
        outlook, series = Outlook(), Series()
        for step in range(500):
            now = START + step
            series = series.noted(1.0, now=now)
            _, outlook = look_ahead(outlook, series, 1.0, horizon=10.0 + step, quantile=0.9, now=now)
        assert len(outlook.awaited) <= AWAITED_MOST

    def test_a_mean_forgets(self) -> None:
        loss = Loss()
        for _ in range(100):
            loss = loss.noted(1.0)
        assert loss.mean == pytest.approx(1.0)
        for _ in range(100):
            loss = loss.noted(0.0)
        assert loss.mean < 0.05

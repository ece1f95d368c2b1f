"""A replica is kept for bursts that are likely to come back before a new one could serve."""

import pytest

from kvplane_operator.autoscaler.hold import chance_of_need, worth_keeping
from kvplane_operator.autoscaler.series import Series, Steps


def minutes(*demands: float | None) -> Series:
    """Of each minute the highest; None: not known."""
    known = ((minute, demand) for minute, demand in enumerate(demands) if demand is not None)
    return Series(minutes=Steps.of(known))


BURSTS = (3.0, *[0.5] * 4) * 5
"""Every five minutes one of three replicas."""


class TestChance:
    def test_regular_bursts_come_back(self) -> None:
        """Four minutes since the last of five: all four gaps were that long."""
        assert chance_of_need(minutes(*BURSTS), 1, within_seconds=60.0) == pytest.approx(4 / 5)

    def test_not_before_they_are_due(self) -> None:
        assert chance_of_need(minutes(*BURSTS[:-3]), 1, within_seconds=120.0) == 0.0
        assert chance_of_need(minutes(*BURSTS[:-3]), 1, within_seconds=240.0) == pytest.approx(4 / 5)

    def test_overdue_ones_hardly(self) -> None:
        assert chance_of_need(minutes(*BURSTS, *[0.5] * 10), 1, within_seconds=300.0) == 0.0

    def test_what_was_enough_is_enough(self) -> None:
        assert chance_of_need(minutes(*BURSTS), 3, within_seconds=600.0) == 0.0

    def test_two_gaps_tell_nothing(self) -> None:
        assert chance_of_need(minutes(*BURSTS[:15]), 1, within_seconds=60.0) == 0.0

    def test_what_was_not_seen_is_no_gap(self) -> None:
        """Between the first and the second pair of bursts nothing was known for a day."""
        pair = (3.0, 0.5, 3.0, 0.5)
        assert chance_of_need(minutes(*pair, *[None] * 1440, *pair), 1, within_seconds=60.0) == 0.0

    def test_nothing(self) -> None:
        assert chance_of_need(Series(), 1, within_seconds=60.0) == 0.0


class TestWorth:
    def kept(self, *, cost: float, asked: int = 4, low: int = 1, seen: Series | None = None) -> int:
        series = minutes(*BURSTS) if seen is None else seen
        return worth_keeping(series, low=low, asked=asked, cost_of_miss=cost, within_seconds=60.0)

    def test_as_many_as_the_burst_needs(self) -> None:
        assert self.kept(cost=4.0) == 3

    def test_not_where_a_miss_costs_less(self) -> None:
        assert self.kept(cost=1.25) == 1  # 0.8 x 1.25 is what keeping costs
        assert self.kept(cost=1.26) == 3

    def test_no_more_than_there_are(self) -> None:
        assert self.kept(cost=4.0, asked=2) == 2

    def test_without_bursts_none(self) -> None:
        assert self.kept(cost=1000.0, seen=minutes(*[0.5] * 60)) == 1

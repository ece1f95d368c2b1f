"""Demand when a replica that is asked for now will serve: several forecasts, and the errors they made.

Persistence, "as now", is always believed. Each other forecast is believed while its error so far, at the same distance, is
not above that of persistence; of all that are believed the highest counts. Errors are weighed by the pinball loss of a high
quantile (Koenker and Bassett 1978), as a lack costs more than an excess. Errors count from the decision after the one
that finds them, so that a higher demand never discredits a forecast in the same decision.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from kvplane_operator.autoscaler.series import Series

_LEVEL_SECONDS: Final = 30.0
_SLOPE_SECONDS: Final = 120.0
"""Time constants of level and slope: a slope is a difference of levels, so it needs the longer one."""
_GAP_SECONDS: Final = 60.0
"""After a silence of so long the trend begins anew."""
_MOST_GROWTH: Final = 2.0
"""A trend is followed up to so many times its level, and one replica."""
_CHECKS: Final = 16
"""Forecasts that are kept over one horizon to be compared with what comes."""
AWAITED_MOST: Final = 64
_LATE_SECONDS: Final = 30.0
"""A forecast that fell due longer ago, while nothing was known, is not compared."""
_LEAST_CHECKED: Final = 8
"""Errors of a forecast that are needed to believe it."""
_LOSS_WEIGHT: Final = 1 / 32
_ROUNDING: Final = 1e-9


class Method(StrEnum):
    """Where a forecast comes from."""

    PERSISTENCE = "as now"
    TREND = "level and trend"
    YESTERDAY = "same time yesterday"
    RECENT = "recent high"


@dataclass(frozen=True, slots=True)
class Trend:
    """Level, and slope per second, of demand: Holt's linear exponential smoothing (1957), for uneven steps."""

    at: float
    level: float
    slope: float = 0.0

    def moved(self, demand: float, *, now: float) -> "Trend":
        """After the demand of ``now``."""
        seconds = now - self.at
        if seconds == 0:
            return self
        if not 0 < seconds <= _GAP_SECONDS:
            return Trend(now, demand)
        expected = self.level + self.slope * seconds
        level = expected + (1 - math.exp(-seconds / _LEVEL_SECONDS)) * (demand - expected)
        grown = (level - self.level) / seconds
        return Trend(now, level, self.slope + (1 - math.exp(-seconds / _SLOPE_SECONDS)) * (grown - self.slope))

    def ahead(self, seconds: float) -> float:
        """Demand so long from now."""
        return max(0.0, min(self.level + self.slope * seconds, _MOST_GROWTH * self.level + 1))


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean error of a method, and of how many."""

    mean: float = 0.0
    count: int = 0

    def noted(self, loss: float) -> "Loss":
        """A plain mean at first, then one that forgets."""
        weight = max(_LOSS_WEIGHT, 1 / (self.count + 1))
        return Loss(self.mean + weight * (loss - self.mean), self.count + 1)


@dataclass(frozen=True, slots=True)
class Awaited:
    """Forecasts made at one time that fall due at another."""

    made: float
    due: float
    values: Mapping[Method, float]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What forecasting remembers."""

    trend: Trend | None = None
    losses: Mapping[Method, Loss] = field(default_factory=dict)
    awaited: tuple[Awaited, ...] = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast that counts, and all that were made."""

    demand: float
    method: Method
    values: Mapping[Method, float] = field(default_factory=dict)


def look_ahead(
    outlook: Outlook, series: Series, demand: float, *, horizon: float, quantile: float, now: float
) -> tuple[Forecast, Outlook]:
    """The forecast for ``now + horizon``; ``series`` ends with the ``demand`` of now."""
    trend = outlook.trend.moved(demand, now=now) if outlook.trend else Trend(now, demand)
    values = {Method.PERSISTENCE: demand, Method.TREND: trend.ahead(horizon)}
    if (yesterday := series.yesterday(at=now + horizon)) is not None:
        values[Method.YESTERDAY] = yesterday
    if (recent := series.quantile(quantile)) is not None:
        values[Method.RECENT] = recent
    believed = [method for method in values if _believed(method, outlook.losses)]
    method = max(believed, key=lambda each: values[each])  # of equals the first: persistence
    awaited = tuple(each for each in outlook.awaited if each.due > now and each.made <= now)
    if not awaited or now - awaited[-1].made >= horizon / _CHECKS:
        awaited = (*awaited, Awaited(now, now + horizon, values))[-AWAITED_MOST:]
    losses = _checked(outlook, demand, quantile=quantile, now=now)
    return Forecast(values[method], method, values), replace(outlook, trend=trend, losses=losses, awaited=awaited)


def _believed(method: Method, losses: Mapping[Method, Loss]) -> bool:
    if method is Method.PERSISTENCE:
        return True
    own, persistence = losses.get(method, Loss()), losses.get(Method.PERSISTENCE, Loss())
    return own.count >= _LEAST_CHECKED and own.mean <= persistence.mean + _ROUNDING


def _checked(outlook: Outlook, demand: float, *, quantile: float, now: float) -> dict[Method, Loss]:
    """The losses, with those of forecasts that have fallen due."""
    losses = dict(outlook.losses)
    for awaited in outlook.awaited:
        if now - _LATE_SECONDS <= awaited.due <= now:
            for method, value in awaited.values.items():
                losses[method] = losses.get(method, Loss()).noted(_pinball(demand - value, quantile))
    return losses


def _pinball(error: float, quantile: float) -> float:
    return max(quantile * error, (quantile - 1) * error)

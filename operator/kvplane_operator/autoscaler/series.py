"""Demand so far, in three lengths, each bounded: every decision of the last minutes, the highest of each minute of the last
hours, and the mean of each five minutes of the last two days.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

RECENT_SECONDS: Final = 300.0
RECENT_MOST: Final = 128
MINUTE: Final = 60.0
MINUTES: Final = 241
"""Four hours, the longest window that a spec can ask for, and the minute under way."""
BUCKET: Final = 300.0
DAY_BUCKETS: Final = 288
BUCKETS: Final = 2 * DAY_BUCKETS + 2
"""Two days, and what is under way at either end."""
_NOISE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Bucket:
    """Mean demand of five minutes, and how often it was looked at."""

    index: int
    """Of five minutes since the epoch."""
    mean: float
    count: int = 1


@dataclass(frozen=True, slots=True)
class Series:
    """Demand of decisions that had all signals."""

    recent: tuple[tuple[float, float], ...] = ()
    """(time, demand)."""
    minutes: tuple[tuple[int, float], ...] = ()
    """(minutes since the epoch, highest demand), without those in which nothing was known."""
    buckets: tuple[Bucket, ...] = ()

    def noted(self, demand: float, *, now: float) -> "Series":
        """With the demand of now; what is older than kept, or from the future, is dropped."""
        recent = tuple(sample for sample in self.recent if now - RECENT_SECONDS < sample[0] < now)
        return Series(
            recent=(*recent, (now, demand))[-RECENT_MOST:],
            minutes=_minutes(self.minutes, math.floor(now / MINUTE), demand),
            buckets=_buckets(self.buckets, math.floor(now / BUCKET), demand),
        )

    def highest(self, *, since: float) -> float:
        """Of the minutes that end after ``since``; 0 without any."""
        first = math.floor(since / MINUTE)
        return max((demand for minute, demand in self.minutes if minute >= first), default=0.0)

    def quantile(self, share: float) -> float | None:
        """Of recent demand, nearest rank."""
        values = sorted(demand for _, demand in self.recent)
        return values[max(0, math.ceil(share * len(values)) - 1)] if values else None

    def noise(self, *, now: float) -> float:
        """Standard deviation of the last minute's demand around its trend, 0 where too little is known.

        From squared differences of neighbours (von Neumann 1941), which a trend hardly moves.
        """
        values = [demand for at, demand in self.recent if at > now - _NOISE_SECONDS]
        if len(values) < 3:
            return 0.0
        squares = [(after - before) ** 2 for before, after in pairwise(values)]
        return math.sqrt(sum(squares) / (2 * len(squares)))

    def yesterday(self, *, at: float) -> float | None:
        """Mean demand one day before the five minutes of ``at``; ``None`` before two days are known."""
        index = math.floor(at / BUCKET)
        if not self.buckets or self.buckets[0].index > index - 2 * DAY_BUCKETS + 1:
            return None
        wanted = index - DAY_BUCKETS
        found = bisect_left(self.buckets, wanted, key=lambda bucket: bucket.index)
        if found < len(self.buckets) and self.buckets[found].index == wanted:
            return self.buckets[found].mean
        return None


def _minutes(minutes: tuple[tuple[int, float], ...], minute: int, demand: float) -> tuple[tuple[int, float], ...]:
    kept = tuple(entry for entry in minutes if minute - MINUTES < entry[0] <= minute)
    if kept and kept[-1][0] == minute:
        return (*kept[:-1], (minute, max(kept[-1][1], demand)))
    return (*kept, (minute, demand))


def _buckets(buckets: tuple[Bucket, ...], index: int, demand: float) -> tuple[Bucket, ...]:
    if buckets and buckets[-1].index == index:
        last = buckets[-1]
        mean = last.mean + (demand - last.mean) / (last.count + 1)
        return (*buckets[:-1], replace(last, mean=mean, count=last.count + 1))
    kept = tuple(bucket for bucket in buckets if index - BUCKETS < bucket.index < index)
    return (*kept, Bucket(index, demand))

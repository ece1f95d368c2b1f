"""Demand so far, in three lengths, each bounded: every decision of the last minutes, the highest of each minute of the last
hours, and the mean of each five minutes of the last two days.
"""

import math
import statistics
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

RECENT_SECONDS: Final = 300.0
RECENT_MOST: Final = 128
MINUTE: Final = 60.0
MINUTES: Final = 241
"""Four hours, the longest window that a spec can ask for, and the minute under way."""
REMEMBERED_SECONDS: Final = MINUTE * (MINUTES - 1)
BUCKET: Final = 300.0
DAY_BUCKETS: Final = 288
BUCKETS: Final = 2 * DAY_BUCKETS + 2
"""Two days, and what is under way at either end."""
_NOISE_SECONDS: Final = 60.0
_OF_MEDIAN: Final = 1.4826
"""Standard deviation over the median of the absolute value, of the normal distribution."""
_UNKNOWN: Final = -1.0


@dataclass(frozen=True, slots=True)
class Steps:
    """Demand at equal steps of time, in eight bytes each: as pairs of objects, a thousand services would take 100 MB."""

    first: int = 0
    """The step of the first value, from the epoch."""
    values: "array[float]" = field(default_factory=lambda: array("d"))
    """From there on, of the first and the last known; below 0: not known. Copied, never written to."""

    @classmethod
    def of(cls, entries: Iterable[tuple[int, float]]) -> "Steps":
        """Of (step, demand), ascending."""
        known = list(entries)
        if not known:
            return cls()
        first = known[0][0]
        values = array("d", [_UNKNOWN]) * (known[-1][0] - first + 1)
        for step, demand in known:
            values[step - first] = demand
        return cls(first, values)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """(step, demand), without those in which nothing was known."""
        return ((self.first + at, demand) for at, demand in enumerate(self.values) if demand >= 0)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def last(self) -> int | None:
        """The last step; None: there is none."""
        return self.first + len(self.values) - 1 if self.values else None

    def at(self, step: int) -> float | None:
        """Demand of a step; None where it is not known."""
        at = step - self.first
        return self.values[at] if 0 <= at < len(self.values) and self.values[at] >= 0 else None

    def highest(self, *, since: int) -> float:
        """From that step on; 0 without any."""
        return max(0.0, max(self.values[max(0, since - self.first) :], default=0.0))

    def noted(self, step: int, demand: float, *, most: int) -> "Steps":
        """The last ``most`` steps with the demand of a step; what is older, or from the future, is dropped."""
        oldest = max(0, step - most + 1 - self.first)
        kept = self.values[oldest : max(0, step - self.first)]
        unknown = next((at for at, value in enumerate(kept) if value >= 0), len(kept))
        if unknown:
            kept = kept[unknown:]
        if not kept:
            return Steps(step, array("d", [demand]))
        first = self.first + oldest + unknown
        kept.extend([_UNKNOWN] * (step - first - len(kept)))
        kept.append(demand)
        return Steps(first, kept)


@dataclass(frozen=True, slots=True)
class Series:
    """Demand of decisions that had all signals."""

    recent: tuple[tuple[float, float], ...] = ()
    """(time, demand)."""
    minutes: Steps = field(default_factory=Steps)
    """Highest demand of each."""
    buckets: Steps = field(default_factory=Steps)
    """Mean demand of each five minutes."""
    looks: int = 1
    """That the last of these means is made of."""

    def noted(self, demand: float, *, now: float) -> "Series":
        """With the demand of now; what is older than kept, or from the future, is dropped."""
        recent = tuple(sample for sample in self.recent if now - RECENT_SECONDS < sample[0] < now)
        minute, bucket = math.floor(now / MINUTE), math.floor(now / BUCKET)
        highest, mean = self.minutes.at(minute), self.buckets.at(bucket)
        again = mean is not None and self.buckets.last == bucket
        looks = self.looks + 1 if again else 1
        return Series(
            recent=(*recent, (now, demand))[-RECENT_MOST:],
            minutes=self.minutes.noted(minute, demand if highest is None else max(highest, demand), most=MINUTES),
            buckets=self.buckets.noted(
                bucket, demand if mean is None or not again else mean + (demand - mean) / looks, most=BUCKETS
            ),
            looks=looks,
        )

    def highest(self, *, since: float) -> float:
        """Of the minutes that end after ``since``; 0 without any."""
        return self.minutes.highest(since=math.floor(since / MINUTE))

    def quantile(self, share: float) -> float | None:
        """Of recent demand, nearest rank."""
        values = sorted(demand for _, demand in self.recent)
        return values[max(0, math.ceil(share * len(values)) - 1)] if values else None

    def noise(self, *, now: float) -> float:
        """Standard deviation of the last minute's demand around its trend, 0 where too little is known.

        From differences of neighbours (von Neumann 1941), which a trend hardly moves; by their median, as a scale is estimated
        where a value may be no noise (Hampel 1974): a step is one large difference, and all of it is in the demand already.
        """
        values = [demand for at, demand in self.recent if at > now - _NOISE_SECONDS]
        if len(values) < 3:
            return 0.0
        return _OF_MEDIAN * statistics.median(abs(after - before) for before, after in pairwise(values)) / math.sqrt(2)

    def yesterday(self, *, at: float) -> float | None:
        """Mean demand one day before the five minutes of ``at``; ``None`` before two days are known."""
        index = math.floor(at / BUCKET)
        if not self.buckets or self.buckets.first > index - 2 * DAY_BUCKETS + 1:
            return None
        return self.buckets.at(index - DAY_BUCKETS)

"""Means of paired differences with their 95 % intervals. Pure.

Runs are paired: the same seed gives the same arrivals and lengths to every policy. The cells (mix x load) are fixed, not
drawn from anything, so they are strata: the mean is the mean of the cells' means, and only the spread between seeds
within a cell counts as noise (Cochran, Sampling Techniques, 5.4), with Student's t for as many degrees of freedom as
there are seeds beyond one in each cell.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_T_975 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    12: 2.179, 15: 2.131, 20: 2.086, 24: 2.064, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980,
}  # fmt: skip
"""Student's t, two-sided 95 %, by degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; the bounds are nan where nothing was repeated."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def stratified(differences: Mapping[str, Sequence[float]]) -> Interval:
    """The mean over cells of differences by seed. Raises ValueError where a cell has none."""
    if not differences or not all(differences.values()):
        raise ValueError("Every cell needs at least one pair of runs.")
    means = [statistics.fmean(values) for values in differences.values()]
    mean = statistics.fmean(means)
    freedom = sum(len(values) - 1 for values in differences.values())
    if any(len(values) < 2 for values in differences.values()):
        return Interval(mean, math.nan, math.nan)
    variance = sum(statistics.variance(values) / len(values) for values in differences.values()) / len(means) ** 2
    half = t_975(freedom) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def t_975(freedom: int) -> float:
    """Student's t; between the table's rows that of the smaller one, which errs towards the wider interval."""
    return _T_975[max(row for row in _T_975 if row <= freedom)]

"""Histograms as Prometheus knows them: read from an engine, or counted here. Pure."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Histogram:
    """What was counted, in the buckets of who counted it."""

    buckets: tuple[tuple[str, float], ...]
    """Upper bound as exported and cumulative count, ascending; the last bound is ``+Inf``."""
    sum: float

    @property
    def count(self) -> float:
        """Of all observations."""
        return self.buckets[-1][1]


class Buckets:
    """Counts values by bucket, and sums them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """``bounds``: upper bounds of the buckets, ascending; one without bound comes last by itself."""
        self._bounds = (*bounds, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Counts one value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def histogram(self) -> Histogram:
        """What was counted so far."""
        names = ("+Inf" if math.isinf(bound) else repr(float(bound)) for bound in self._bounds)
        return Histogram(tuple(zip(names, map(float, accumulate(self._counts)), strict=True)), self._sum)

"""A histogram that is counted here, in the shape of those that come from the engine."""

import bisect
import math
from collections.abc import Sequence
from itertools import accumulate

from kvplane_runtime.sidecar.signals import Histogram


class Tally:
    """Values by bucket, and their sum."""

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

"""How long a new replica takes until it serves: scheduling, pull, load, compile; measured, by state of the image.

A start is timed from the replica's creation to the first decision that finds it ready. The 90th percentile is the time
that decisions look ahead; the samples also say how likely a replica that is on its way will be there in time.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

SAMPLES: Final = 32
"""Kept of each state: a new version of the engine has driven out the old one's after so many starts."""
_MOST_SECONDS: Final = 24 * 3600.0
_LATE_CHANCE: Final = 0.5
"""Of a replica that takes longer than any before it."""
_LOST: Final = 2.0
"""Times the longest start after which a replica is no longer counted on."""


@dataclass(frozen=True, slots=True)
class StartTimes:
    """Seconds of the last starts, the newest last."""

    cached: tuple[float, ...] = ()
    """Where the node had the image."""
    pulled: tuple[float, ...] = ()
    """Where it had not, or it is not known."""

    def noted(self, seconds: float, *, image_cached: bool | None) -> "StartTimes":
        """With one more; unchanged where a clock has lied."""
        if not 0 < seconds <= _MOST_SECONDS:
            return self
        if image_cached:
            return replace(self, cached=(*self.cached, seconds)[-SAMPLES:])
        return replace(self, pulled=(*self.pulled, seconds)[-SAMPLES:])

    def p90(self, image_cached: bool | None, *, unknown: float) -> float:
        """90th percentile, nearest rank; without a start of that kind the longer of ``unknown`` and what there is."""
        samples = self._of(image_cached)
        if samples:
            return p90(samples)
        others = self.cached + self.pulled
        return max(unknown, p90(others)) if others else unknown

    def chance(self, age: float, *, within: float, image_cached: bool | None) -> float:
        """That a replica of this age, not yet ready, will be within the next ``within`` seconds; 1 before any was timed."""
        samples = self._of(image_cached) or self.cached + self.pulled
        if not samples:
            return 1.0
        longer = [seconds for seconds in samples if seconds > age]
        if longer:
            return sum(seconds <= age + within for seconds in longer) / len(longer)
        return _LATE_CHANCE if age <= _LOST * max(samples) else 0.0

    def _of(self, image_cached: bool | None) -> tuple[float, ...]:
        if image_cached is None:
            return self.cached + self.pulled
        return self.cached if image_cached else self.pulled


def p90(samples: Collection[float]) -> float:
    """90th percentile, nearest rank, of one sample or more."""
    return sorted(samples)[-(-9 * len(samples) // 10) - 1]

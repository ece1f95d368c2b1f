"""When a refused client should come back.

Clients told the same second come back together, and most are refused again. So those already told to come back are kept
as a *backlog* of work that drains at the rate at which the engine takes work, and each further one is sent behind it.
"""

import math
from typing import Final

LEAST_SECONDS: Final = 1
MOST_SECONDS: Final = 30
_SPREAD: Final = (0.8, 1.3)
_RATE_SECONDS: Final = 10.0
"""Time constant of the rate at which work is let in."""
_ENOUGH_SECONDS: Final = 1.0
"""Time in which requests waited, before a rate is known."""


def seconds(wait: float, *, uniform: float) -> int:
    """``Retry-After`` for an expected wait: spread by 0.8 to 1.3, whole seconds, 1 to 30. ``uniform`` is in [0, 1)."""
    low, high = _SPREAD
    spread = min(wait, 1e6) * (low + (high - low) * uniform)
    return max(LEAST_SECONDS, min(MOST_SECONDS, math.ceil(spread)))


class Backlog:
    """Prompt tokens of refused requests that will be asked for again, and the rate at which prompt tokens are let in.

    The rate is that of the time in which requests waited: otherwise it would be the clients' rate, not the engine's.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._admitted = 0.0
        self._seconds = 0.0
        self._waited = False
        self._at = 0.0

    def until(self, now: float, *, waited: bool) -> None:
        """Time has passed until ``now``; ``waited``: requests waited all the while."""
        elapsed = max(0.0, now - self._at)
        self._at = now
        self._waited = waited
        self._tokens = max(0.0, self._tokens - self._rate * elapsed)
        if waited:
            keep = math.exp(-elapsed / _RATE_SECONDS)
            self._seconds = keep * self._seconds + elapsed
            self._admitted *= keep

    def admitted(self, tokens: float) -> None:
        """Takes in work that was let in."""
        if self._waited:
            self._admitted += tokens

    def refused(self, tokens: float) -> None:
        """Takes in work that was sent away for a while."""
        self._tokens = min(self._tokens + tokens, self._rate * MOST_SECONDS)

    @property
    def drains(self) -> bool:
        """Whether a rate is known."""
        return self._rate > 0

    def seconds(self, ahead: float, *, returning: bool = False) -> float:
        """Seconds until ``ahead`` more tokens are let in; 0 while no rate is known.

        ``returning``: behind those that were told to come back.
        """
        rate = self._rate
        return (ahead + (self._tokens if returning else 0.0)) / rate if rate > 0 else 0.0

    @property
    def _rate(self) -> float:
        return self._admitted / self._seconds if self._seconds >= _ENOUGH_SECONDS else 0.0

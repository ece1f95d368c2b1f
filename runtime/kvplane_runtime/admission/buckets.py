"""Token buckets: what each tenant may use per second, prompt and output together, with a minute's worth in hand.

A request is let in while the bucket is not empty, and pays when it is let in: its prompt and its expected output, set
right at its end. So a bucket can be overdrawn by one request, and a request larger than the bucket is not shut out.
"""

from collections import OrderedDict
from typing import Final

_HELD_SECONDS: Final = 60
_TENANTS: Final = 4096
"""Buckets remembered; the one unused for longest is forgotten first, which fills it."""


class TokenBuckets:
    """One bucket for each tenant, all of one size."""

    def __init__(self) -> None:
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Tokens in hand, and when."""

    def __len__(self) -> int:
        """Tenants remembered."""
        return len(self._levels)

    def wait(self, tenant: str, *, rate: int, now: float) -> float:
        """Seconds until the tenant may send again; 0 if now."""
        return max(0.0, -self._level(tenant, rate=rate, now=now) / rate)

    def pay(self, tenant: str, tokens: float, *, rate: int, now: float) -> None:
        """Takes tokens out; negative to give back."""
        self._levels[tenant] = self._level(tenant, rate=rate, now=now) - tokens, now
        self._levels.move_to_end(tenant)
        if len(self._levels) > _TENANTS:
            self._levels.popitem(last=False)

    def _level(self, tenant: str, *, rate: int, now: float) -> float:
        full = float(rate * _HELD_SECONDS)
        level, at = self._levels.get(tenant, (full, now))
        return min(full, level + rate * max(0.0, now - at))

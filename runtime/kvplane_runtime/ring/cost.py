"""What prefill costs on this ring, learned from the windows it has computed.

A window takes a + b x tokens + c x pairs seconds: launches and messages, the dense layers, and attention, where a pair is
one query that sees one key. Both counts are those of the busiest rank, so one model serves windows that are cut over all
ranks and windows that lie whole on one. The three prices are fitted by least squares with exponential forgetting and are
never negative.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvplane_runtime.ring.layout import Placement

_KEEP: Final = 0.97
"""Weight of all earlier windows when a new one of full age comes: the last 30 or so count."""
_TOKENS: Final = 1024.0
_PAIRS: Final = 1024.0**2
"""Units in which the three prices are of one order."""
_BETTER: Final = 0.9
"""A fit that comes later among ``_SUBSETS`` is taken only if it leaves less than this share of the error."""
_ROUNDING: Final = 1e-9
"""Of the sum of squares: an error below it is none."""
_SUBSETS: Final = ((1,), (2,), (1, 2), (0, 1), (0, 2), (0, 1, 2), (0,))
"""Prices that may be other than zero, the likeliest to matter first: of two fits that are as good, as there are while few
windows were seen, the one with a price for tokens. That of any window alone comes last: it explains windows that were all made
to take a slice, and then one of any length would seem to take no longer."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the busiest rank computes."""

    tokens: float
    pairs: float


NOTHING: Final = Work(0.0, 0.0)


def work(begin: int, end: int, missing: int, *, ranks: int, placement: Placement) -> Work:
    """The work of computing ``missing`` positions spread over ``begin`` to ``end``."""
    tokens = missing / ranks if placement == "zigzag" else missing
    return Work(tokens, tokens * (begin + end) / 2)


class Cost:
    """The three prices, as far as they are known."""

    def __init__(self) -> None:
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._products = [0.0] * 3
        self._total = 0.0
        self._prices = (0.0, 0.0, 0.0)

    @property
    def known(self) -> bool:
        """Whether a window was seen."""
        return self._total > 0

    @property
    def whatever_seconds(self) -> float:
        """What any window is expected to take whatever its work is; 0 while nothing is known."""
        return self._prices[0]

    def learn(self, done: Work, seconds: float, *, age: float = 1.0, whatever: float = math.inf) -> None:
        """Takes in a window and the time it took. ``age``, 0 to 1: how much older it makes all that was taken in before.
        ``whatever``: what a window costs whatever its work is at most this; the shortest one that was seen is such a bound.
        """
        point, keep = _features(done), _KEEP**age
        for i in range(3):
            for j in range(3):
                self._squares[i][j] = keep * self._squares[i][j] + point[i] * point[j]
            self._products[i] = keep * self._products[i] + point[i] * seconds
        self._total = keep * self._total + seconds * seconds
        self._prices = self._fit(whatever)

    def seconds(self, of: Work) -> float:
        """Expected time of one window; 0 while nothing is known."""
        return sum(price * count for price, count in zip(self._prices, _features(of), strict=True))

    def _fit(self, whatever: float) -> tuple[float, float, float]:
        best, least = (0.0, 0.0, 0.0), self._total
        for subset in _SUBSETS:
            prices = self._solve(subset)
            if prices is None or prices[0] > whatever:
                continue
            error = max(0.0, self._error(prices))
            if error + _ROUNDING * self._total < _BETTER * least:
                best, least = prices, error
        return best

    def _solve(self, subset: Sequence[int]) -> tuple[float, float, float] | None:
        """The prices of ``subset`` that fit best; None where they are not determined, or one would not be positive."""
        rows = [[*(self._squares[i][j] for j in subset), self._products[i]] for i in subset]
        size = len(rows)
        for k in range(size):  # elimination without pivots: the matrix is positive semidefinite
            if rows[k][k] <= 1e-9 * self._squares[subset[k]][subset[k]]:
                return None
            for i in range(k + 1, size):
                factor = rows[i][k] / rows[k][k]
                rows[i] = [value - factor * above for value, above in zip(rows[i], rows[k], strict=True)]
        prices = [0.0] * 3
        for k in reversed(range(size)):
            rest = sum(rows[k][j] * prices[subset[j]] for j in range(k + 1, size))
            prices[subset[k]] = (rows[k][size] - rest) / rows[k][k]
        if min(prices[i] for i in subset) <= 0:
            return None
        return prices[0], prices[1], prices[2]

    def _error(self, prices: Sequence[float]) -> float:
        """Sum of the squared errors, weighted by age."""
        error = self._total
        for i in range(3):
            error -= 2 * prices[i] * self._products[i]
            error += sum(prices[i] * prices[j] * self._squares[i][j] for j in range(3))
        return error


def _features(of: Work) -> tuple[float, float, float]:
    return 1.0, of.tokens / _TOKENS, of.pairs / _PAIRS

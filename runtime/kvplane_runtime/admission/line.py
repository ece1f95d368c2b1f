"""A straight line through the newest points: y = intercept + slope * x, neither negative."""

from typing import Final

_ENOUGH: Final = 8
"""Points before the line says anything."""


class Line:
    """Least squares with exponential forgetting: each new point takes the weight of all earlier ones times ``keep``."""

    def __init__(self, *, keep: float) -> None:
        self._keep = keep
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._points = 0

    def add(self, x: float, y: float) -> None:
        """Takes in a point."""
        self._n = self._keep * self._n + 1
        self._x = self._keep * self._x + x
        self._y = self._keep * self._y + y
        self._xx = self._keep * self._xx + x * x
        self._xy = self._keep * self._xy + x * y
        self._points += 1

    def fit(self) -> tuple[float, float] | None:
        """(intercept, slope); None with fewer than 8 points. Points of one x give a line through the origin."""
        if self._points < _ENOUGH:
            return None
        x, y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - x * x
        if x <= 0 or y <= 0:
            return max(0.0, y), 0.0
        steepest = y / x
        slope = (self._xy / self._n - x * y) / spread if spread > 1e-4 * x * x else steepest
        slope = min(max(0.0, slope), steepest)
        return y - slope * x, slope

"""A straight line through the newest points: y = intercept + slope * x, neither negative."""

from typing import Final

_ENOUGH: Final = 8
"""Points before the line says anything."""


class Line:
    """Least squares with exponential forgetting, drawn towards what is likely where the points lie close together.

    keep: weight of all earlier points when a new one comes.
    through_origin: what is likely: a line through the origin, else a flat one.
    doubt: variance of x at which the points and that count the same.
    """

    def __init__(self, *, keep: float, through_origin: bool, doubt: float) -> None:
        self._keep = keep
        self._through_origin = through_origin
        self._doubt = doubt
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._points = 0
        self._fit: tuple[float, float] | None = None
        """None while nobody has asked since the newest point."""

    def add(self, x: float, y: float) -> None:
        """Takes in a point; neither is negative."""
        self._n = self._keep * self._n + 1
        self._x = self._keep * self._x + x
        self._y = self._keep * self._y + y
        self._xx = self._keep * self._xx + x * x
        self._xy = self._keep * self._xy + x * y
        self._points += 1
        self._fit = None

    def fit(self) -> tuple[float, float] | None:
        """(intercept, slope); None with fewer than 8 points."""
        if self._fit is None and self._points >= _ENOUGH:
            self._fit = self._drawn()
        return self._fit

    def _drawn(self) -> tuple[float, float]:
        x, y = self._x / self._n, self._y / self._n
        if x <= 0:
            return y, 0.0
        steepest = y / x
        likely = steepest if self._through_origin else 0.0
        variance, covariance = max(0.0, self._xx / self._n - x * x), self._xy / self._n - x * y
        slope = (covariance + self._doubt * likely) / (variance + self._doubt)
        slope = min(max(0.0, slope), steepest)
        return y - slope * x, slope

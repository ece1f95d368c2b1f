"""How long the next window of a prompt is: at most a slice of time, at least what hides communication.

What a window costs is learned from those before it (:mod:`cost`). Nothing is known at first, so windows begin with the least
and at most double: a guess from small windows is not trusted far beyond them.
"""

from collections.abc import Sequence
from typing import Final

from kvplane_runtime.ring.cost import NOTHING, Cost, Work, work
from kvplane_runtime.ring.layout import Placement
from kvplane_runtime.ring.ranges import Run

_GROWTH: Final = 2
"""A window is at most so many times the largest one of which the cost is known."""


class Windows:
    """The sizes of one engine's windows."""

    def __init__(self, *, slice_seconds: float, tokens: int) -> None:
        """``tokens``: the least new ones per rank, whatever they take."""
        self._slice_seconds = slice_seconds
        self._tokens = tokens
        self._cost = Cost()
        self._largest = 0
        """Most missing positions of a window whose cost is known."""

    def seconds(self, of: Work) -> float:
        """What so much work is expected to take; 0 while nothing is known."""
        return self._cost.seconds(of)

    def several(self, of: Work) -> bool:
        """Whether so much work takes more than one window, once windows have grown.

        As far as is known now: while nothing is, all that is more than the least.
        """
        return of.tokens > self._tokens and (not self._cost.known or self.seconds(of) > self._slice_seconds)

    def learn(self, done: Work, *, missing: int, seconds: float) -> None:
        """Takes in a window that has computed ``missing`` positions."""
        self._cost.learn(done, seconds)
        self._largest = max(self._largest, missing)

    def size(self, missing: Sequence[Run], *, ranks: int, placement: Placement) -> int:
        """Most missing positions of the next window; a multiple of 2 x ranks where it is cut over them."""
        zigzag = placement == "zigzag"
        unit = 2 * ranks if zigzag else 1
        least = max(1, self._tokens * (ranks if zigzag else 1) // unit)
        if not missing or not self._cost.known:
            return least * unit
        begin = missing[0].first
        most = max(least, _GROWTH * self._largest // unit)
        while least < most:  # the most units that take no longer than a slice
            middle = (least + most + 1) // 2
            done = work(begin, begin + middle * unit, middle * unit, ranks=ranks, placement=placement)
            if self.seconds(done) <= self._slice_seconds:
                least = middle
            else:
                most = middle - 1
        return least * unit


def whole(missing: Sequence[Run], *, ranks: int, placement: Placement) -> Work:
    """The work of all that is missing."""
    if not missing:
        return NOTHING
    count = sum(run.count for run in missing)
    return work(missing[0].first, missing[-1].last + 1, count, ranks=ranks, placement=placement)


def span(missing: Sequence[Run], most: int) -> tuple[int, int]:
    """Begin and end of the positions that hold the first ``most`` missing ones."""
    left = most
    end = missing[0].first
    for run in missing:
        taken = min(left, run.count)
        if not taken:
            break
        end = run.part(0, taken).last + 1
        left -= taken
    return missing[0].first, end

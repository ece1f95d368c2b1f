"""How long the next window of a prompt is: at most a slice of time, and what hides communication while keys go round.

What a window costs is learned from those before it (:mod:`cost`). Nothing is known at first, and little for a while: no
window has more than twice the tokens, or twice the pairs, of those whose cost is known. The first one has the least length
at the begin of a prompt, and on a long past as many pairs as that.

The least length holds while a window of that length sends keys round (:mod:`exchange`), and where a prompt lies whole on a
rank, which short ones do. On a longer past queries go round, which are hidden whatever the length, and windows keep to the slice.
Where not even the shortest one keeps to it, as on a machine with more to do than processors, longer ones are tried again.
"""

import math
from collections.abc import Sequence
from typing import Final

from kvplane_runtime.ring.cost import NOTHING, Cost, Work, work
from kvplane_runtime.ring.exchange import choose
from kvplane_runtime.ring.layout import Placement
from kvplane_runtime.ring.ranges import Run

PLANNED: Final = 0.9
"""Of a slice: what is learned has an error, and the slice is what was promised."""
_GROWTH: Final = 2
"""A window has at most so many times the work of those whose cost is known."""
_ERROR: Final = 1.25
"""A window may have been measured so many times too short."""
_AT_WORK: Final = 0.5
"""Share of a window's time, at least, that depends on its length. Where a slice is hardly longer than what any window costs, as
where all weights have to be read for each, windows are longer than it: a prompt would never end."""
_SHORTEST_TOKENS: Final = 2
"""On each rank, of the shortest window that is cut: one of each of its two parts of the zigzag."""


class Windows:
    """The sizes of one engine's windows."""

    def __init__(self, *, slice_seconds: float, tokens: int, keys_per_query: float) -> None:
        """``tokens``: the least new ones per rank while keys go round, whatever they take. ``keys_per_query``: the model's
        (:mod:`exchange`).
        """
        self._slice_seconds = slice_seconds
        self._tokens = tokens
        self._keys_per_query = keys_per_query
        self._cost = Cost()
        self._most = NOTHING
        """Most tokens, and most pairs, of a window whose cost is known."""
        self._shortest = math.inf
        """Seconds of the quickest window that was cut over the ranks: what each costs whatever its length is no more."""
        self._in_vain = False
        """The last window was as short as can be, and still longer than a slice."""

    def seconds(self, of: Work) -> float:
        """What so much work is expected to take; 0 while nothing is known."""
        return self._cost.seconds(of)

    def several(self, of: Work, *, ranks: int, placement: Placement) -> bool:
        """Whether so much work takes more than one window, once windows have grown.

        As far as is known now: while nothing is, all that is more than the least.
        """
        if not self._cost.known:
            return of.tokens > self._tokens
        if self.seconds(of) <= self._longest_seconds or not of.tokens:
            return False
        middle, new = of.pairs / of.tokens, of.tokens * (ranks if placement == "zigzag" else 1)
        return of.tokens > self._tokens or not self._has_least(middle - new / 2, ranks=ranks, placement=placement)

    def learn(self, done: Work, *, seconds: float, placement: Placement) -> None:
        """Takes in a window. It ages what was learned before by the part of a slice that it took: thousands of short prompts
        do not make it forget what long ones cost.
        """
        if placement == "zigzag":
            self._in_vain = done.tokens <= _SHORTEST_TOKENS and seconds > self._slice_seconds
            # A machine that got slower, or busy, is learned anew: each window costs more than the quickest one of before.
            self._shortest = seconds if self._in_vain else min(self._shortest, seconds)
        self._most = Work(max(self._most.tokens, done.tokens), max(self._most.pairs, done.pairs))
        self._cost.learn(done, seconds, age=min(1.0, seconds / self._slice_seconds), whatever=_ERROR * self._shortest)

    def size(self, missing: Sequence[Run], *, ranks: int, placement: Placement) -> int:
        """Most missing positions of the next window, of at least one; a multiple of 2 x ranks where it is cut over them."""
        zigzag = placement == "zigzag"
        unit, share = (2 * ranks, ranks) if zigzag else (1, 1)
        floor = max(1, self._tokens * share // unit)
        first = work(0, floor * unit, floor * unit, ranks=ranks, placement=placement)
        most = Work(max(first.tokens, _GROWTH * self._most.tokens), max(first.pairs, _GROWTH * self._most.pairs))
        past = span(missing, floor * unit)[1] - min(floor * unit, _count(missing))
        low = floor if self._has_least(past, ranks=ranks, placement=placement) else 1
        if self._in_vain:  # a slice is out of reach; whether twice the length takes longer at all is to be seen
            low = max(low, _GROWTH)
        high = max(low, int(most.tokens * share) // unit)
        while low < high:  # the most units that are allowed
            middle = (low + high + 1) // 2
            if self._allowed(part(missing, middle * unit, ranks=ranks, placement=placement), most):
                low = middle
            else:
                high = middle - 1
        return low * unit

    def _allowed(self, of: Work, most: Work) -> bool:
        return of.tokens <= most.tokens and of.pairs <= most.pairs and self.seconds(of) <= self._longest_seconds

    @property
    def _longest_seconds(self) -> float:
        return max(PLANNED * self._slice_seconds, self._cost.whatever_seconds / (1 - _AT_WORK))

    def _has_least(self, past: float, *, ranks: int, placement: Placement) -> bool:
        """Whether a window behind so many positions has the least length, whatever it takes.

        Where ``tokens`` queries hide the keys, s = e Hk / Hq x C / BW (docs: sizing), queries are hidden by s x keys per query / 2
        keys on each rank: a ring step sends e D + 4 (D + 1) bytes for each query and head, and computes 4 D FLOP with each key.
        """
        if placement != "zigzag":
            return True
        least = self._tokens * ranks
        keys = choose(new=least, past=past, keys_per_query=self._keys_per_query) == "keys"
        return keys or past < least * self._keys_per_query / 2


def whole(missing: Sequence[Run], *, ranks: int, placement: Placement) -> Work:
    """The work of all that is missing."""
    return part(missing, _count(missing), ranks=ranks, placement=placement) if missing else NOTHING


def part(missing: Sequence[Run], most: int, *, ranks: int, placement: Placement) -> Work:
    """The work of a window over the first ``most`` missing positions."""
    begin, end = span(missing, most)
    return work(begin, end, min(most, _count(missing)), ranks=ranks, placement=placement)


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


def _count(missing: Sequence[Run]) -> int:
    return sum(run.count for run in missing)

"""Who holds the KV of which positions of one sequence, and in which order.

Every rank keeps the same layout and changes it by the same steps, so nobody has to ask where something lies. A rank's
slots are its positions in the order in which they came: prompt pieces, generated tokens, and at the end what was computed
again after another rank was lost. So the n-th position of ``held(rank)`` lies in slot n of that rank, and no table from
positions to slots is needed. Positions that were placed and that nobody holds any more are *missing*; a window over them
places them anew.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from kvplane_runtime.ring import zigzag
from kvplane_runtime.ring.ranges import Range, Run, cut, extend

Placement = Literal["zigzag"] | int
"""Cut over all ranks, or whole on this one."""
Pieces = tuple[tuple[tuple[Run, ...], ...], ...]
"""By rank, the pieces it gets of a window, ascending; each piece is an ascending sequence of runs and may be empty."""


class Layout:
    """The layout of one sequence; empty at first. It changes in place; ``copy`` keeps a state."""

    def __init__(self, ranks: int, *, held: Iterable[Iterable[Range | Run]] = (), length: int = 0) -> None:
        """``held`` by rank in slot order, and the length where it is more than the end of what is held."""
        if ranks < 1:
            raise ValueError(f"A ring has at least one rank; ranks is {ranks}.")
        self.ranks = ranks
        self.length = length
        """Positions 0 to length - 1 have been placed, whether they are held or missing."""
        self._runs: list[list[Run]] = [[] for _ in range(ranks)]
        self._tokens = [0] * ranks
        for rank, parts in enumerate(held):
            if rank >= ranks:
                raise ValueError(f"held is by rank and has more entries than the ring ranks, which are {ranks}.")
            self._add(
                rank,
                (
                    part if isinstance(part, Run) else Run(part.begin, len(part))
                    for part in parts
                    if isinstance(part, Run) or part
                ),
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        if (self.ranks, self.length, self._tokens) != (other.ranks, other.length, other._tokens):
            return False
        # The same positions may be cut into runs in different ways.
        return self._runs == other._runs or all(self.held(rank) == other.held(rank) for rank in range(self.ranks))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Layout(ranks={self.ranks}, length={self.length}, tokens={self._tokens})"

    def copy(self) -> "Layout":
        other = Layout(self.ranks, length=self.length)
        other._runs = [list(runs) for runs in self._runs]
        other._tokens = list(self._tokens)
        return other

    # What there is.

    def held(self, rank: int) -> tuple[Range, ...]:
        """The rank's positions in slot order; generated tokens are one range each."""
        return tuple(part for run in self._runs[rank] for part in run.ranges())

    def runs(self, rank: int) -> tuple[Run, ...]:
        """The rank's positions in slot order, in few numbers."""
        return tuple(self._runs[rank])

    def tokens(self, rank: int) -> int:
        """Positions that the rank holds: the slots it uses."""
        return self._tokens[rank]

    def complete(self) -> bool:
        """Whether nothing is missing."""
        return sum(self._tokens) == self.length

    def missing(self, start: int = 0, end: int | None = None) -> tuple[Run, ...]:
        """Positions from ``start`` to before ``end`` (the length, or beyond it) that nobody holds, ascending."""
        end = self.length if end is None else end
        if start >= end:
            return ()
        if start >= self.length or self.complete():
            begin = max(start, self.length)
            return (Run(begin, end - begin),) if begin < end else ()
        there = bytearray(end - start)
        for rank_runs in self._runs:
            for run in rank_runs:
                first, last = run.before(start), run.before(end)
                if first < last:
                    inner = run.part(first, last)
                    begin, stop = inner.first - start, inner.last - start + 1
                    there[begin : stop : inner.step] = b"\1" * inner.count
        return _gaps(there, start)

    def pieces(self, start: int, length: int, placement: Placement) -> Pieces:
        """Who would compute what of a window: its missing positions, cut over the ranks. Changes nothing.

        Raises ValueError for a window that begins behind the end, or that misses nothing.
        """
        if start > self.length:
            raise ValueError(
                f"A window begins at {start} and the sequence ends at {self.length}: positions between them would be left out."
            )
        positions = self.missing(start, start + length)
        total = sum(run.count for run in positions)
        if not total:
            raise ValueError(f"A window covers {start} to {start + length}, and all of its positions are held already.")
        if placement == "zigzag":
            return zigzag.deal(cut(positions, zigzag.counts(total, self.ranks)))
        if not 0 <= placement < self.ranks:
            raise ValueError(f"A window is to lie on rank {placement}; the ring's ranks are 0 to {self.ranks - 1}.")
        return tuple((positions,) if rank == placement else () for rank in range(self.ranks))

    # What changes it.

    def append(self, pieces: Pieces) -> None:
        """Places what ``pieces`` gave."""
        for rank, parts in enumerate(pieces):
            self._add(rank, (run for piece in parts for run in piece))

    def append_window(self, start: int, length: int) -> None:
        """Places the missing positions of a window zigzag over all ranks."""
        self.append(self.pieces(start, length, "zigzag"))

    def append_whole(self, rank: int, start: int, length: int) -> None:
        """Places the missing positions of a window on one rank."""
        self.append(self.pieces(start, length, rank))

    def append_token(self, position: int) -> int:
        """Places a generated token; the rank that gets it, which is ``position % ranks``."""
        if position != self.length:
            raise ValueError(f"The next token's position is {self.length}; it is given as {position}.")
        rank = position % self.ranks
        self._add(rank, (Run(position, 1),))
        return rank

    def truncate(self, length: int) -> None:
        """Gives up the positions from ``length`` on; slots behind them move up."""
        if length >= self.length:
            return
        for rank, rank_runs in enumerate(self._runs):
            self._runs[rank], self._tokens[rank] = [], 0
            self._add(rank, (run.part(0, kept) for run in rank_runs if (kept := run.before(length))))
        self.length = length

    def _add(self, rank: int, added: Iterable[Run]) -> None:
        mine = self._runs[rank]
        for run in added:
            extend(mine, run)
            self._tokens[rank] += run.count
            self.length = max(self.length, run.last + 1)


def slots(rank_runs: Sequence[Run], begin: int, end: int) -> tuple[Range, ...]:
    """The slots whose positions are from ``begin`` to before ``end``, in the fewest ranges, ascending."""
    found: list[Range] = []
    slot = 0
    for run in rank_runs:
        first, last = run.before(begin), run.before(end)
        if first < last:
            if found and found[-1].end == slot + first:
                found[-1] = Range(found[-1].begin, slot + last)
            else:
                found.append(Range(slot + first, slot + last))
        slot += run.count
    return tuple(found)


def clip(rank_runs: Sequence[Run], begin: int, end: int) -> tuple[Run, ...]:
    """The positions from ``begin`` to before ``end``, in slot order."""
    return tuple(run.part(first, last) for run in rank_runs if (first := run.before(begin)) < (last := run.before(end)))


def _gaps(there: bytearray, start: int) -> tuple[Run, ...]:
    gaps: list[Run] = []
    at = there.find(0)
    while at >= 0:
        stop = there.find(1, at)
        stop = len(there) if stop < 0 else stop
        extend(gaps, Run(start + at, stop - at))
        at = there.find(0, stop)
    return tuple(gaps)

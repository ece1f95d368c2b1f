"""Token positions in bulk: ranges, and runs with a stride.

Who holds which positions is replicated on every rank and looked at in every step, so it is kept as a few numbers however
long the sequence is. A prompt is made of contiguous :class:`Range` s. Tokens that were generated lie round robin over the
ranks, so one rank's share of them is an arithmetic :class:`Run` with the number of ranks as its stride.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Positions ``begin`` to ``end - 1``; empty if they are equal."""

    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end:
            raise ValueError(
                f"A range begins at 0 or later and ends where it begins or later; it is {self.begin} to {self.end}."
            )

    def __len__(self) -> int:
        return self.end - self.begin

    def __contains__(self, position: int) -> bool:
        return self.begin <= position < self.end


def merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same positions in the fewest ranges, ascending."""
    merged: list[Range] = []
    for part in sorted(ranges):
        if not part:
            continue
        if merged and part.begin <= merged[-1].end:
            merged[-1] = Range(merged[-1].begin, max(merged[-1].end, part.end))
        else:
            merged.append(part)
    return tuple(merged)


def count(ranges: Iterable[Range]) -> int:
    """Positions in ranges that do not overlap."""
    return sum(part.end - part.begin for part in ranges)


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` positions, at least one: ``first``, ``first + step``, ..."""

    first: int
    count: int
    step: int = 1

    def __post_init__(self) -> None:
        if self.count == 1:  # one position has no stride: equal runs are equal
            object.__setattr__(self, "step", 1)

    @property
    def last(self) -> int:
        return self.first + (self.count - 1) * self.step

    def before(self, position: int) -> int:
        """How many of its positions are less than ``position``; they are its first ones."""
        if position <= self.first:
            return 0
        return min(self.count, (position - self.first + self.step - 1) // self.step)

    def part(self, begin: int, end: int) -> "Run":
        """Its ``begin``-th to ``end - 1``-th position, at least one."""
        return Run(self.first + begin * self.step, end - begin, self.step)

    def ranges(self) -> tuple[Range, ...]:
        """The same positions as ranges: one, or as many as there are positions."""
        if self.step == 1 or self.count == 1:
            return (Range(self.first, self.last + 1),)
        return tuple(Range(at, at + 1) for at in range(self.first, self.last + 1, self.step))


def extend(runs: list[Run], run: Run) -> None:
    """Appends ``run`` to ``runs``, in place; it becomes part of the last one where it goes on as that one does."""
    if runs:
        last = runs[-1]
        gap = run.first - last.last
        if gap > 0 and (last.count == 1 or last.step == gap) and (run.count == 1 or run.step == gap):
            runs[-1] = Run(last.first, last.count + run.count, gap)
            return
    runs.append(run)


def runs(positions: Iterable[int]) -> tuple[Run, ...]:
    """The positions, in the order given, as runs."""
    found: list[Run] = []
    for position in positions:
        extend(found, Run(position, 1))
    return tuple(found)


def cut(parts: Sequence[Run], counts: Sequence[int]) -> tuple[tuple[Run, ...], ...]:
    """``parts`` cut into pieces of that many positions each; the counts add up to all of them."""
    pieces: list[tuple[Run, ...]] = []
    index, used = 0, 0
    for size in counts:
        piece: list[Run] = []
        rest = size
        while rest:
            run = parts[index]
            taken = min(rest, run.count - used)
            piece.append(run.part(used, used + taken))
            rest, used = rest - taken, used + taken
            if used == run.count:
                index, used = index + 1, 0
        pieces.append(tuple(piece))
    return tuple(pieces)

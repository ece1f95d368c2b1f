"""What a new ring still holds, what is lost, and how the lost part is computed again. Pure.

Each process is believed about its own KV only. From what the members of a new epoch report, every sequence gets a new
layout, in which a position that nobody holds is missing; nothing else is lost. So one rule serves all cases: a rank that
died (its positions are missing), a step that broke half way (those who had finished it agree with those who had not), a
rank that was only away (it brings its positions back, less those that were computed anew meanwhile), and a new rank 0,
which knows nothing but what the workers bring.

What is missing is computed again by the scheduler's windows, ascending, each spread zigzag over the living: 1/N of a
sequence where one rank of N is lost.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvplane_runtime.ring.layout import Layout, clip
from kvplane_runtime.ring.messages import Step, Table
from kvplane_runtime.ring.ranges import Run, runs

_BLOCK: Final = 1 << 16
"""Tokens that are compared in one go: the interpreter's lock is held meanwhile, and heartbeats wait for it."""
Report = Mapping[int, Sequence[Run]]
"""The positions of each sequence that one process holds, in slot order."""


def reconcile(lengths: Mapping[int, int], reports: Sequence[Report], *, seniority: Sequence[int]) -> dict[int, Layout]:
    """The layout of each sequence of ``lengths`` over the ranks whose reports these are.

    A position that two hold stays with the one that comes first in ``seniority``, which names every rank once. Positions
    at or behind a sequence's length are what an unfinished step left, and are nobody's.
    """
    layouts = {}
    for sequence, length in lengths.items():
        held: list[tuple[Run, ...]] = [()] * len(reports)
        taken = bytearray(length)
        for rank in seniority:
            held[rank] = _claim(taken, clip(reports[rank].get(sequence, ()), 0, length))
        layouts[sequence] = Layout(len(reports), held=held, length=length)
    return layouts


def _claim(taken: bytearray, claimed: Iterable[Run]) -> tuple[Run, ...]:
    """What of ``claimed`` is not taken yet, in slot order; it is taken then."""
    mine: list[Run] = []
    for run in claimed:
        where = slice(run.first, run.last + 1, run.step)
        if any(taken[where]):
            mine += runs(at for at in range(run.first, run.last + 1, run.step) if not taken[at])
        else:
            mine.append(run)
        taken[where] = b"\1" * run.count
    return tuple(mine)


@dataclass(frozen=True, slots=True)
class _Before:
    """What a step was about to change."""

    number: int
    layouts: dict[int, Layout | None]
    """Of the sequences that it adds to; None where there was none yet."""
    cuts: dict[int, int]
    """Lengths to which it cut sequences, 0 where it released them: what a rank that has not finished it surely still holds."""


class Lag:
    """What the layouts were before the last steps, for ranks that may not have finished them."""

    def __init__(self) -> None:
        self._before: deque[_Before] = deque(maxlen=4)

    def begin(self, step: Step, layouts: Mapping[int, Layout]) -> None:
        """Keeps what ``step`` is about to change; ``layouts`` are those before it."""
        touched = {decode.sequence for decode in step.decode}
        if step.window:
            touched.add(step.window.sequence)
        before = {sequence: layouts[sequence].copy() if sequence in layouts else None for sequence in touched}
        before.update(dict.fromkeys((fork.child for fork in step.fork), None))
        cuts = {cut.sequence: cut.length for cut in step.truncate}
        self._before.append(_Before(step.number, before, cuts | dict.fromkeys(step.release, 0)))

    def report(self, rank: int, finished: int, layouts: Mapping[int, Layout]) -> Report:
        """What a rank holds for sure that has finished the step of that number, where ``layouts`` are those of now."""
        undone: dict[int, Layout | None] = {}
        cuts: dict[int, int] = {}
        for before in reversed(self._before):
            if before.number > finished:
                undone |= before.layouts
                for sequence, length in before.cuts.items():
                    cuts[sequence] = min(length, cuts.get(sequence, length))
        then = {sequence: undone.get(sequence, layout) for sequence, layout in layouts.items()}
        return {
            sequence: clip(layout.runs(rank), 0, cuts.get(sequence, layout.length))
            for sequence, layout in then.items()
            if layout is not None
        }

    def clear(self) -> None:
        """A new ring begins, in which all have the same layouts."""
        self._before.clear()


def brought(tables: Iterable[Table], known: Mapping[int, Sequence[int]]) -> Report:
    """What a process that was away may keep of what it brings: KV of the ``known`` tokens only.

    A sequence may have been cut while it was away, and gone on with other tokens.
    """
    report = {}
    for table in tables:
        mine, (held,) = known.get(table.sequence, ()), table.held
        runs_held = tuple(Run(part.first, part.count, part.step) for part in held)
        report[table.sequence] = clip(runs_held, 0, _agreeing(table.tokens, mine))
    return report


def gather(tables: Iterable[Table]) -> dict[int, Sequence[int]]:
    """The tokens of the sequences that workers bring to a rank 0 that knows nothing: the longest they agree on."""
    found: dict[int, Sequence[int]] = {}
    settled: set[int] = set()
    for table in tables:
        known = found.setdefault(table.sequence, table.tokens)
        shorter = min(len(known), len(table.tokens))
        agreeing = _agreeing(known, table.tokens)
        if agreeing < shorter:
            found[table.sequence], settled = known[:agreeing], settled | {table.sequence}
        elif len(table.tokens) > len(known) and table.sequence not in settled:
            found[table.sequence] = table.tokens
    return found


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    both = min(len(one), len(other))
    for begin in range(0, both, _BLOCK):
        end = min(begin + _BLOCK, both)
        if list(one[begin:end]) != list(other[begin:end]):
            return next(at for at in range(begin, end) if one[at] != other[at])
    return both

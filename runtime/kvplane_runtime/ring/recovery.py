"""What a new ring still holds, what is lost, and how the lost part is computed again. Pure.

Each process is believed about its own KV only. From what the members of a new epoch report, every sequence gets a new
layout, in which a position that nobody holds is missing; nothing else is lost. So one rule serves all cases: a rank that
died (its positions are missing), a step that broke half way (those who had finished it agree with those who had not), a
rank that was only away (it brings its positions back, less those that were computed anew meanwhile), and a new rank 0,
which knows nothing but what the workers bring.

What is missing is computed again in windows, ascending, each spread zigzag over the living: 1/N of a sequence where one
rank of N is lost. Requests for which the living have no room are parked: those with most slack.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvplane_runtime.ring.accounting import zigzag_share
from kvplane_runtime.ring.layout import Layout, clip
from kvplane_runtime.ring.ranges import Range, Run, runs

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
        layouts[sequence] = Layout(
            len(reports), held=[[part for run in mine for part in run.ranges()] for mine in held], length=length
        )
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


def windows(layout: Layout, *, most: int) -> tuple[Range, ...]:
    """Windows over all that is missing of a sequence, ascending, each with at most ``most`` missing positions.

    A window begins and ends with a missing position. Those in between that are held are left as they are.
    """
    found: list[Range] = []
    begin, end, room = 0, 0, 0
    for run in layout.missing():
        at = 0
        while at < run.count:
            if not room:
                if end:
                    found.append(Range(begin, end))
                begin, room = run.part(at, run.count).first, most
            part = run.part(at, min(run.count, at + room))
            at, room, end = at + part.count, room - part.count, part.last + 1
    if end:
        found.append(Range(begin, end))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Need:
    """KV tokens of one request after a loss, by rank."""

    sequence: int
    held: tuple[int, ...]
    missing: int
    """To be computed again, over all ranks."""
    coming: tuple[int, ...]
    """The most that it may still come to hold beyond what it held before the loss."""


def park(needs: Sequence[Need], *, capacity: int) -> tuple[int, ...]:
    """The sequences that have to wait for a larger ring, of ``needs`` with the least slack first.

    What all of them hold now is there already and stays. Room for the rest is given in order: a request that does not
    fit is parked, and a smaller one behind it may still go on.
    """
    if not needs:
        return ()
    ranks = len(needs[0].held)
    used = [sum(need.held[rank] for need in needs) for rank in range(ranks)]
    parked: list[int] = []
    for need in needs:
        more = [zigzag_share(need.missing, ranks) + coming for coming in need.coming]
        if any(before + extra > capacity for before, extra in zip(used, more, strict=True)):
            parked.append(need.sequence)
        else:
            used = [before + extra for before, extra in zip(used, more, strict=True)]
    return tuple(parked)

"""Which queries meet which keys of one window: computed once for a window from positions, used in every layer.

A rank's keys are an index space of their own: what it holds of the positions up to the window's end, in slot order, and
after it its new keys. Per pair of ranks the planner gives the few rectangles that attention has to compute. Position
decides alone: a query at p sees keys at positions up to p. So windows that are computed again, with later positions there
already, need no case of their own.

For layers with a sliding window a rank needs no ring: only the positions just before its pieces, from whoever holds them
(:func:`tails`), and then bands along the diagonal (:func:`bands`).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvplane_runtime.ring.layout import Layout, Pieces, clip, slots
from kvplane_runtime.ring.ranges import Range, Run, count, merge

BAND = 256
"""Queries of one band, at most. Shorter: more calls; longer: more masked work, (BAND + window) / window of what is needed."""
GAP = 256
"""Queries that lie further apart than this are in blocks of their own. In one block all keys between them would be masked, with
a number for each pair: after a loss, between the two pieces of the lost rank, that can be gigabytes."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that a rank shows to the queries of a window."""

    slots: tuple[Range, ...]
    """Its slots, in order; the index of a key counts through them."""
    runs: tuple[Run, ...]
    """Their positions, by index."""
    own: int
    """Index of its first new key."""
    total: int


@dataclass(frozen=True, slots=True)
class Block:
    """One rectangle of attention: indices of queries and of keys."""

    queries: Range
    keys: Range
    kind: str = "full"
    """full: all queries see all keys; causal: query i sees keys 0 to i; masked: by position."""


@dataclass(frozen=True, slots=True)
class Band:
    """Queries of one piece with the keys just before and among them, both by index; ascending positions."""

    queries: Range
    keys: Range
    first_query: int
    """Position of the first query; ``stride`` to the next."""
    stride: int
    first_key: int
    """Position of the first key; the others follow without gaps."""


def keys(layout: Layout, pieces: Pieces, rank: int) -> Keys:
    """What ``rank`` shows to the queries of the window that ``pieces`` place; the layout is that before the window."""
    end = 1 + max(run.last for parts in pieces for piece in parts for run in piece)
    held = layout.runs(rank)
    used = layout.tokens(rank)
    new = tuple(run for piece in pieces[rank] for run in piece)
    added = sum(run.count for run in new)
    visible = (*slots(held, 0, end), *((Range(used, used + added),) if added else ()))
    return Keys(
        slots=merge(visible),
        runs=(*clip(held, 0, end), *new),
        own=count(visible) - added,
        total=count(visible),
    )


def blocks(queries: Sequence[Sequence[Run]], shown: Keys, *, own: bool, gap: int = GAP) -> tuple[Block, ...]:
    """The blocks of the ``queries`` (a rank's pieces) with the keys that a rank shows; ``own``: the rank is the same.

    Queries that see nothing have no block. Blocks do not overlap, and together they are what the positions allow.
    """
    found: list[Block] = []
    begin = 0
    runs = _until(shown.runs, shown.own) if own else shown.runs
    for near in (near for piece in queries for near in _near(piece, gap)):
        size = sum(run.count for run in near)
        rows = Range(begin, begin + size)
        begin += size
        everything, some = _visible(runs, near[0].first, near[-1].last)
        for part in everything:
            above = next((at for at, other in enumerate(found) if _stacks(other, part, rows)), None)
            if above is None:
                found.append(Block(rows, part))
            else:
                found[above] = Block(Range(found[above].queries.begin, rows.end), part)
        found += [Block(rows, part, "masked") for part in some]
    if own and begin:
        found.append(Block(Range(0, begin), Range(shown.own, shown.total), "causal"))
    return tuple(found)


def _near(piece: Sequence[Run], gap: int) -> list[list[Run]]:
    """The runs of a piece in groups, with at most ``gap`` positions from one run to the next in each."""
    groups: list[list[Run]] = []
    for run in piece:
        if groups and run.first - groups[-1][-1].last <= gap:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _stacks(above: Block, part: Range, rows: Range) -> bool:
    return above.kind == "full" and above.keys == part and above.queries.end == rows.begin


def _until(runs: Sequence[Run], index: int) -> list[Run]:
    kept: list[Run] = []
    for run in runs:
        if index <= 0:
            break
        kept.append(run if run.count <= index else run.part(0, index))
        index -= run.count
    return kept


def _visible(runs: Sequence[Run], first: int, last: int) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """Key indices that all queries from positions ``first`` to ``last`` see, and those that only some of them see."""
    everything: list[Range] = []
    some: list[Range] = []
    index = 0
    for run in runs:
        seen, touched = run.before(first + 1), run.before(last + 1)
        everything.append(Range(index, index + seen))
        some.append(Range(index + seen, index + touched))
        index += run.count
    return merge(everything), merge(some)


def reach(queries: Sequence[Sequence[Run]], window: int) -> tuple[Range, ...]:
    """The positions that queries with a sliding window of so many tokens see, their own included; ascending.

    Between the positions of a run with a stride everything is taken.
    """
    return merge(Range(max(0, run.first - window + 1), run.last + 1) for piece in queries for run in piece)


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has of the positions in reach of another's queries."""

    slots: tuple[Range, ...]
    runs: tuple[Run, ...]
    total: int


def share(layout: Layout, pieces: Pieces, rank: int, wanted: Sequence[Range]) -> Share:
    """The slots of ``rank``, its new ones included, whose positions are wanted; in slot order for each wanted range."""
    runs = (*layout.runs(rank), *(run for piece in pieces[rank] for run in piece))
    found = [(slots(runs, part.begin, part.end), clip(runs, part.begin, part.end)) for part in wanted]
    taken = tuple(slot for part, _ in found for slot in part)
    return Share(taken, tuple(run for _, part in found for run in part), count(taken))


def bands(queries: Sequence[Sequence[Run]], wanted: Sequence[Range], window: int) -> Iterator[Band]:
    """The queries in bands; key indices count through the ``wanted`` positions, ascending."""
    starts = [part.begin for part in wanted]
    offsets = [0]
    for part in wanted:
        offsets.append(offsets[-1] + len(part))
    begin = 0
    for run in (run for piece in queries for run in piece):
        for at in range(0, run.count, BAND):
            band = run.part(at, min(at + BAND, run.count))
            first = max(0, band.first - window + 1)
            inside = bisect_right(starts, first) - 1
            index = offsets[inside] + first - starts[inside]
            yield Band(
                queries=Range(begin + at, begin + at + band.count),
                keys=Range(index, index + band.last + 1 - first),
                first_query=band.first,
                stride=band.step,
                first_key=first,
            )
        begin += run.count

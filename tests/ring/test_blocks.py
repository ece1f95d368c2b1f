"""The planned blocks and bands against the definition: a query at p sees a key at k if k <= p (and k > p - window)."""

from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.ring.blocks import GAP, Block, Keys, bands, blocks, keys, reach, share
from kvplane_runtime.ring.layout import Layout, Pieces
from kvplane_runtime.ring.ranges import Range, Run, count


@st.composite
def windows(draw: st.DrawFn) -> tuple[Layout, Pieces]:
    """A layout with a past, and a window on it: new, or over what was lost."""
    ranks = draw(st.integers(1, 4))
    layout = Layout(ranks)
    for length in draw(st.lists(st.integers(1, 40), max_size=3)):
        layout.append_window(layout.length, length)
        for _ in range(draw(st.integers(0, 9))):
            layout.append_token(layout.length)
    if layout.length and draw(st.booleans()):
        lost = draw(st.integers(0, ranks - 1))
        held = [() if rank == lost else layout.runs(rank) for rank in range(ranks)]
        layout = Layout(ranks, held=held, length=layout.length)
    for _ in range(draw(st.integers(0, 2))):  # windows before the one in question
        if (missing := layout.missing()) and missing[0].last < layout.length:
            layout.append_window(missing[0].first, draw(st.integers(1, 20)))
    missing = layout.missing()
    start = missing[0].first if missing else layout.length
    placement = draw(st.sampled_from(["zigzag", *range(ranks)]))
    return layout, layout.pieces(start, draw(st.integers(1, 60)), placement)


def numbers(runs: tuple[Run, ...]) -> list[int]:
    return [run.first + index * run.step for run in runs for index in range(run.count)]


def flat(ranges: tuple[Range, ...]) -> list[int]:
    return [at for part in ranges for at in range(part.begin, part.end)]


def queries(pieces: Pieces, rank: int) -> list[int]:
    return [at for piece in pieces[rank] for at in numbers(piece)]


def area(found: tuple[Block, ...], mine: list[int], shown: Keys) -> list[tuple[int, int]]:
    """Pairs of (query index, key index) that the blocks let see each other."""
    positions = numbers(shown.runs)
    return [
        (row, column)
        for block in found
        for row in range(block.queries.begin, block.queries.end)
        for column in range(block.keys.begin, block.keys.end)
        if block.kind == "full"
        or (block.kind == "causal" and column - block.keys.begin <= row - block.queries.begin)
        or (block.kind == "masked" and positions[column] <= mine[row])
    ]


@given(windows(), st.sampled_from([1, 4, GAP]))
def test_the_blocks_are_what_positions_allow(world: tuple[Layout, Pieces], gap: int) -> None:
    layout, pieces = world
    for rank in range(layout.ranks):
        mine = queries(pieces, rank)
        for other in range(layout.ranks):
            shown = keys(layout, pieces, other)
            positions = numbers(shown.runs)
            assert shown.total == len(positions) == count(shown.slots)
            assert positions[shown.own :] == queries(pieces, other)
            found = area(blocks(pieces[rank], shown, own=rank == other, gap=gap), mine, shown)
            allowed = [(q, k) for q, at in enumerate(mine) for k, seen in enumerate(positions) if seen <= at]
            assert sorted(found) == allowed


@given(windows())
def test_keys_lie_in_the_slots_that_are_said(world: tuple[Layout, Pieces]) -> None:
    layout, pieces = world
    for rank in range(layout.ranks):
        shown = keys(layout, pieces, rank)
        after = layout.copy()
        after.append(pieces)
        held = [at for part in after.held(rank) for at in range(part.begin, part.end)]
        assert [held[slot] for slot in flat(shown.slots)] == numbers(shown.runs)


@given(windows(), st.integers(1, 70))
def test_the_bands_are_what_the_window_allows(world: tuple[Layout, Pieces], window: int) -> None:
    layout, pieces = world
    after = layout.copy()
    after.append(pieces)
    for rank in range(layout.ranks):
        mine = queries(pieces, rank)
        wanted = reach(pieces[rank], window)
        gathered: list[int] = []
        for other in range(layout.ranks):
            given_ = share(layout, pieces, other, wanted)
            held = [at for part in after.held(other) for at in range(part.begin, part.end)]
            assert [held[slot] for slot in flat(given_.slots)] == numbers(given_.runs)
            assert given_.total == len(numbers(given_.runs))
            gathered += numbers(given_.runs)
        gathered.sort()
        assert gathered == flat(wanted)
        found: set[tuple[int, int]] = set()
        for band in bands(pieces[rank], wanted, window):
            for row in range(band.queries.begin, band.queries.end):
                at = band.first_query + (row - band.queries.begin) * band.stride
                assert at == mine[row]
                for column in range(band.keys.begin, band.keys.end):
                    seen = band.first_key + column - band.keys.begin
                    assert seen == gathered[column]
                    if 0 <= at - seen < window:
                        found.add((at, seen))
        assert found == {(at, seen) for at in mine for seen in range(max(0, at - window + 1), at + 1)}


def test_a_normal_window_is_two_or_three_blocks_for_each_pair() -> None:
    layout = Layout(4)
    layout.append_window(0, 800)
    pieces = layout.pieces(800, 800, "zigzag")
    shown = [keys(layout, pieces, rank) for rank in range(4)]
    assert shown[1].slots == (Range(0, 400),)
    assert blocks(pieces[1], shown[1], own=True) == (
        Block(Range(0, 200), Range(0, 200)),
        Block(Range(0, 200), Range(200, 400), "causal"),
    )
    assert blocks(pieces[1], shown[0], own=False) == (Block(Range(0, 200), Range(0, 300)),)
    assert blocks(pieces[1], shown[2], own=False) == (
        Block(Range(0, 100), Range(0, 200)),
        Block(Range(100, 200), Range(0, 400)),
    )


def test_a_window_over_what_a_rank_held_of_a_prompt_needs_no_mask() -> None:
    """Its pieces begin and end anywhere in those that are lost, which lie far apart."""
    before = Layout(4)
    for length in (8000, 12000, 12000):
        before.append_window(before.length, length)
    layout = Layout(3, held=[before.runs(rank) for rank in (0, 2, 3)], length=before.length)
    pieces = layout.pieces(layout.missing()[0].first, before.length, "zigzag")
    assert max(len(piece) for parts in pieces for piece in parts) > 1
    for rank in range(3):
        for other in range(3):
            found = blocks(pieces[rank], keys(layout, pieces, other), own=rank == other)
            assert {block.kind for block in found} <= {"full", "causal"}

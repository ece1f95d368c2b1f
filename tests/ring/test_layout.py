"""Zigzag pieces and layouts: every position on one rank, equal shares, and nothing lost but what is said to be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvplane_runtime.ring import zigzag
from kvplane_runtime.ring.layout import Layout, clip, slots
from kvplane_runtime.ring.ranges import Range, Run


def positions(layout: Layout, rank: int) -> list[int]:
    return [at for part in layout.held(rank) for at in range(part.begin, part.end)]


@given(st.integers(0, 50), st.integers(1, 300), st.integers(1, 9))
def test_zigzag_deals_every_position_once_and_the_last_to_rank_0(start: int, length: int, ranks: int) -> None:
    dealt = zigzag.pieces(Range(start, start + length), ranks)
    every = sorted(at for pair in dealt for piece in pair for at in range(piece.begin, piece.end))
    assert every == list(range(start, start + length))
    assert start + length - 1 in dealt[0][1]
    sizes = [len(early) + len(late) for early, late in dealt]
    assert max(sizes) - min(sizes) <= 2
    assert all(early.end <= late.begin for early, late in dealt)


@given(st.integers(1, 64), st.integers(1, 8))
def test_zigzag_gives_each_rank_the_same_area_of_the_triangle(unit: int, ranks: int) -> None:
    areas = [
        sum(at + 1 for piece in pair for at in range(piece.begin, piece.end))
        for pair in zigzag.pieces(Range(0, 2 * ranks * unit), ranks)
    ]
    assert len(set(areas)) == 1


def test_a_window_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="A window has at least one token and a ring one rank; they are 0 and 3"):
        zigzag.counts(0, 3)


def test_what_a_prompt_and_its_answer_look_like() -> None:
    layout = Layout(2)
    layout.append_window(0, 8)
    for position in range(8, 13):
        assert layout.append_token(position) == position % 2
    assert layout.held(0) == (Range(0, 2), Range(6, 9), Range(10, 11), Range(12, 13))
    assert layout.runs(1) == (Run(2, 4), Run(9, 2, 2))
    assert (layout.tokens(0), layout.tokens(1), layout.length) == (7, 6, 13)
    assert layout.complete()


def test_a_short_prompt_lies_whole_on_one_rank() -> None:
    layout = Layout(3)
    layout.append_whole(1, 0, 5)
    assert [layout.tokens(rank) for rank in range(3)] == [0, 5, 0]


def test_lost_tokens_are_computed_again_and_only_they() -> None:
    layout = Layout(3)
    layout.append_window(0, 12)
    for position in range(12, 18):
        layout.append_token(position)
    assert layout.held(1) == (Range(2, 4), Range(8, 10), Range(13, 14), Range(16, 17))
    layout = Layout(2, held=[layout.runs(0), layout.runs(2)], length=18)
    assert layout.missing() == (Run(2, 2), Run(8, 2), Run(13, 2, 3))
    assert layout.missing(3, 9) == (Run(3, 2, 5),)
    assert layout.pieces(0, 10, "zigzag") == (((Run(2, 1),), (Run(9, 1),)), ((Run(3, 1),), (Run(8, 1),)))
    before = layout.copy()
    layout.append_window(0, 10)
    layout.append_window(10, 8)
    assert layout.complete()
    assert positions(layout, 0)[: before.tokens(0)] == positions(before, 0)


@pytest.mark.parametrize(
    ("start", "length", "placement", "message"),
    [
        (9, 3, "zigzag", "A window begins at 9 and the sequence ends at 8: positions between them would be left out"),
        (2, 4, "zigzag", "A window covers 2 to 6, and all of its positions are held already"),
        (8, 4, 2, "A window is to lie on rank 2; the ring's ranks are 0 to 1"),
    ],
)
def test_a_window_that_cannot_be_placed(start: int, length: int, placement: int, message: str) -> None:
    layout = Layout(2)
    layout.append_window(0, 8)
    with pytest.raises(ValueError, match=message):
        layout.pieces(start, length, placement)


def test_a_token_out_of_turn_is_refused() -> None:
    with pytest.raises(ValueError, match="The next token's position is 0; it is given as 1"):
        Layout(2).append_token(1)


def test_a_layout_goes_over_the_wire_as_ranges() -> None:
    layout = Layout(3)
    layout.append_window(0, 40)
    for position in range(40, 60):
        layout.append_token(position)
    again = Layout(3, held=[layout.held(rank) for rank in range(3)], length=layout.length)
    assert [positions(again, rank) for rank in range(3)] == [positions(layout, rank) for rank in range(3)]
    assert again == layout
    assert Layout(3, held=[layout.runs(rank) for rank in range(3)]) == layout
    with pytest.raises(ValueError, match="more entries than the ring ranks, which are 1"):
        Layout(1, held=[[], []])


class Life(RuleBasedStateMachine):
    """Any order of windows, tokens, losses, re-forms and truncations, beside a dictionary of positions."""

    @initialize(ranks=st.integers(1, 5))
    def begin(self, ranks: int) -> None:
        self.layout = Layout(ranks)
        self.slots: list[list[int]] = [[] for _ in range(ranks)]

    def missing(self, end: int) -> list[int]:
        held = {at for rank in self.slots for at in rank}
        return [at for at in range(end) if at not in held]

    @rule(data=st.data(), length=st.integers(1, 30), whole=st.booleans())
    def window(self, data: st.DataObject, length: int, whole: bool) -> None:
        start = data.draw(st.integers(0, self.layout.length))
        expected = [at for at in self.missing(start + length) if at >= start]
        placement = data.draw(st.integers(0, self.layout.ranks - 1)) if whole else "zigzag"
        if not expected:
            with pytest.raises(ValueError, match="all of its positions are held already"):
                self.layout.pieces(start, length, placement)
            return
        pieces = self.layout.pieces(start, length, placement)
        self.layout.append(pieces)
        for rank, parts in enumerate(pieces):
            self.slots[rank] += [
                run.first + index * run.step for piece in parts for run in piece for index in range(run.count)
            ]
        sizes = [sum(run.count for piece in parts for run in piece) for parts in pieces]
        assert sum(sizes) == len(expected)
        assert whole or max(sizes) - min(sizes) <= 2

    @rule(tokens=st.integers(1, 12))
    def generate(self, tokens: int) -> None:
        for _ in range(tokens):
            position = self.layout.length
            self.slots[self.layout.append_token(position)].append(position)

    @rule(data=st.data(), ranks=st.integers(1, 5), lost=st.booleans())
    def reform(self, data: st.DataObject, ranks: int, lost: bool) -> None:
        """Some have a new rank, some are gone, and some are new and come empty."""
        kept = min(ranks, self.layout.ranks) - lost
        new = data.draw(st.permutations(range(ranks)))[:kept]
        old = data.draw(st.permutations(range(self.layout.ranks)))[:kept]
        source = dict(zip(new, old, strict=True))
        held = [self.layout.runs(source[rank]) if rank in source else () for rank in range(ranks)]
        self.slots = [self.slots[source[rank]] if rank in source else [] for rank in range(ranks)]
        self.layout = Layout(ranks, held=held, length=self.layout.length)

    @precondition(lambda self: self.layout.length > 0)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, self.layout.length))
        self.layout.truncate(length)
        self.slots = [[at for at in rank if at < length] for rank in self.slots]
        assert self.layout.length == length

    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        rank = data.draw(st.integers(0, self.layout.ranks - 1))
        begin = data.draw(st.integers(0, self.layout.length))
        end = data.draw(st.integers(begin, self.layout.length))
        found = slots(self.layout.runs(rank), begin, end)
        expected = [slot for slot, at in enumerate(self.slots[rank]) if begin <= at < end]
        assert [slot for part in found for slot in range(part.begin, part.end)] == expected
        inside = [
            run.first + index * run.step
            for run in clip(self.layout.runs(rank), begin, end)
            for index in range(run.count)
        ]
        assert inside == [at for at in self.slots[rank] if begin <= at < end]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "layout"):
            return
        assert [positions(self.layout, rank) for rank in range(self.layout.ranks)] == self.slots
        assert [self.layout.tokens(rank) for rank in range(self.layout.ranks)] == [len(rank) for rank in self.slots]
        missing = [at for run in self.layout.missing() for part in run.ranges() for at in range(part.begin, part.end)]
        assert missing == self.missing(self.layout.length)
        assert self.layout.complete() == (not missing)
        assert self.layout.copy() == self.layout


TestLife = Life.TestCase

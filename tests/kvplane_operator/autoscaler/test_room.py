"""How much room prompts need: from what became of answers, and without asking for what does not help."""

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_operator.autoscaler.room import (
    BINS,
    LEAST_MARGIN,
    MOST_MARGIN,
    RATIO,
    SHOWN_SECONDS,
    Answers,
    Room,
    choices,
    index_of,
    restored,
)
from tests.kvplane_operator.autoscaler.world import START

TICK = 5.0


def bins(*answers: tuple[float, float, float]) -> dict[int, Answers]:
    """Of (margin, kept, broken)."""
    return {index_of(margin): Answers(kept, broken) for margin, kept, broken in answers}


def lived(room: Room, *ticks: tuple[list[float], Answers]) -> Room:
    """After ticks of (pace of each replica, answers that were over)."""
    at = room.works[-1][0] if room.works else START
    for number, (paces, answers) in enumerate(ticks, 1):
        room = room.noted(paces, answers, seconds=TICK, now=at + number * TICK)
    return room


class TestChoices:
    def test_while_promises_are_kept_there_is_none(self) -> None:
        assert choices({}) == ()
        assert choices(bins((1.0, 1000, 40), (3.0, 1000, 0))) == ()

    def test_a_few_broken_ones_say_nothing(self) -> None:
        assert choices(bins((1.0, 20, 5))) == ()
        assert choices(bins((1.0, 40, 2.5))) == ()

    def test_each_margin_has_what_it_breaks_beyond_the_widest(self) -> None:
        found = choices(bins((1.0, 80, 20), (2.0, 90, 10), (4.0, 98, 2)))
        assert [share for _, share in found] == pytest.approx([0.0, 0.08, 0.18])
        assert [margin for margin, _ in found] == pytest.approx([4.0, 2.0, 1.0], rel=RATIO - 1)

    def test_more_room_breaks_no_more_so_what_says_so_is_pooled(self) -> None:
        found = choices(bins((1.0, 70, 30), (2.0, 95, 5), (4.0, 90, 10)))
        assert len(found) == 2
        assert found[0][0] == pytest.approx(math.sqrt(2.0 * 4.0), rel=RATIO - 1)
        assert found[1][1] == pytest.approx(0.3 - 0.075)

    def test_a_wider_margin_is_tried_while_all_break_many(self) -> None:
        ((margin, share),) = choices(bins((2.0, 50, 50)))
        assert 2.0 < margin < 2.0 * RATIO**2.01
        assert share == 0.0

    def test_what_is_broken_with_twice_the_room_is_not_for_want_of_room(self) -> None:
        """Goals that no replica can keep must not keep the most replicas that there may be."""
        assert choices(bins((2.0, 50, 50), (2.0 * RATIO**6, 50, 50))) == ()

    def test_a_margin_with_few_answers_is_no_end(self) -> None:
        found = choices(bins((1.0, 50, 50), (2.0, 99, 1), (8.0, 5, 0)))
        assert len(found) == 2


class TestNeeded:
    ROOM = restored(bins((1.0, 80, 20), (4.0, 100, 0)), fastest=1000.0)

    def test_none_while_nothing_says_that_room_is_short(self) -> None:
        assert Room().needed(500.0, 0.0, cost_of_miss=4.0) is None
        assert restored(bins((4.0, 100, 0)), fastest=1000.0).needed(500.0, 0.0, cost_of_miss=4.0) is None

    def test_the_work_and_the_root_of_it(self) -> None:
        needed = self.ROOM.needed(4000.0, 0.0, cost_of_miss=100.0)
        assert needed is not None
        assert needed.replicas == pytest.approx(4 + 2 * needed.margin)
        assert needed.margin == pytest.approx(4.0, rel=RATIO - 1)

    def test_what_piles_up_counts_as_work(self) -> None:
        assert self.ROOM.needed(1000.0, 3000.0, cost_of_miss=4.0) == self.ROOM.needed(4000.0, 0.0, cost_of_miss=4.0)

    def test_promises_that_cost_little_are_worth_little_room(self) -> None:
        margins = [
            needed.margin
            for cost in (0.0, 1.0, 100.0)
            if (needed := self.ROOM.needed(4000.0, 0.0, cost_of_miss=cost)) is not None
        ]
        assert margins[0] == margins[1] < margins[2]

    def test_of_late_the_highest_work_counts(self) -> None:
        """Bursts of some seconds are what breaks promises."""
        room = lived(self.ROOM, ([800.0], Answers()), ([100.0], Answers()))
        assert room.needed(100.0, 0.0, cost_of_miss=4.0) == room.needed(800.0, 0.0, cost_of_miss=4.0)
        calm = lived(room, *[([100.0], Answers())] * 4)
        assert calm.needed(100.0, 0.0, cost_of_miss=4.0) != calm.needed(800.0, 0.0, cost_of_miss=4.0)

    @given(
        st.lists(st.tuples(st.floats(LEAST_MARGIN, MOST_MARGIN), st.floats(0, 500), st.floats(0, 500)), max_size=9),
        st.floats(0, 1e5),
        st.floats(0, 1e5),
        st.floats(0, 1e5),
        st.floats(0, 100),
    )
    def test_more_work_never_needs_less(
        self, seen: list[tuple[float, float, float]], pace: float, backlog: float, more: float, cost: float
    ) -> None:
        room = restored(bins(*seen), fastest=1000.0)
        less, greater = (room.needed(pace + each, backlog, cost_of_miss=cost) for each in (0.0, more))
        assert (less is None) == (greater is None)
        if less is not None and greater is not None:
            assert greater.replicas >= less.replicas - 1e-9


class TestNoted:
    ROOM = TestNeeded.ROOM

    def test_answers_belong_to_the_work_that_is_seen_with_them_or_soon_after(self) -> None:
        """The first answers of a burst are over before its work is counted."""
        fast = lived(Room(), ([1000.0], Answers()), *[([0.0], Answers())] * 5)
        begun = lived(fast, ([0.0, 0.0], Answers(kept=1, broken=9)))
        assert begun.bins == {}
        shown = lived(begun, ([400.0, 400.0], Answers()), *[([0.0, 0.0], Answers())] * 3)
        work = 0.8
        assert list(shown.bins) == [index_of((2 - work) / math.sqrt(work))]
        assert shown.over == ()

    def test_without_work_there_is_all_the_room(self) -> None:
        idle = lived(Room(fastest=1000.0), *[([0.0], Answers(kept=1))] * int(SHOWN_SECONDS / TICK + 1))
        assert list(idle.bins) == [index_of(MOST_MARGIN)]

    def test_nothing_is_counted_before_any_prompt_was(self) -> None:
        assert lived(Room(), ([0.0], Answers(kept=9))) == Room()
        assert lived(Room(), ([], Answers(kept=9))) == Room()

    def test_the_fastest_is_remembered_for_hours_and_not_for_days(self) -> None:
        room = lived(Room(), ([1000.0], Answers()))
        hour = room.noted([1.0], Answers(), seconds=3600.0, now=START + 3600).fastest
        week = room.noted([1.0], Answers(), seconds=7 * 86_400.0, now=START + 7 * 86_400).fastest
        assert hour == pytest.approx(1000.0 * math.exp(-1 / 12))
        assert week == 1.0

    def test_a_bin_remembers_the_last_thousands(self) -> None:
        """A model that has become slower shows within minutes, however long the old one was good."""
        good = lived(Room(), *[([1000.0, 0.0], Answers(kept=1000))] * 30)
        bad = lived(good, *[([1000.0, 0.0], Answers(broken=1000))] * 12)
        (answers,) = bad.bins.values()
        assert answers.count == pytest.approx(2000.0)
        assert answers.share > 0.8

    def test_what_is_kept_is_bounded(self) -> None:
        uniform = random.Random(1).uniform  # noqa: S311
        room = Room()
        for tick in range(3000):
            paces = [10 ** uniform(-3, 5) for _ in range(tick % 9)]
            room = room.noted(paces, Answers(uniform(0, 9), uniform(0, 9)), seconds=1.0, now=START + tick)
        assert len(room.bins) <= BINS
        assert len(room.works) <= 64
        assert len(room.over) <= 64

    def test_after_a_pause_the_work_before_it_counts_no_more(self) -> None:
        room = lived(self.ROOM, ([800.0], Answers(kept=1))).resumed()
        assert room.over == ()
        after, fresh = (each.needed(100.0, 0.0, cost_of_miss=4.0) for each in (room, self.ROOM))
        assert after is not None
        assert fresh is not None
        assert after.replicas == pytest.approx(fresh.replicas, rel=0.001)

    def test_a_clock_that_goes_back_counts_nothing_twice(self) -> None:
        room = lived(Room(fastest=1000.0), ([100.0], Answers(kept=5)))
        back = room.noted([100.0], Answers(), seconds=0.0, now=START - 3600)
        assert back.over == ()
        assert [at for at, _ in back.works] == [START - 3600]


def learned(kept: Callable[[float], float], *, replicas: int, work: float) -> list[float]:
    """Replicas from minute to minute, where this share of promises is kept at a margin, and what is needed is done."""
    room, counts = Room(fastest=1000.0), [replicas]
    for minute in range(240):
        have = counts[-1]
        share = kept((have - work) / math.sqrt(work))
        for tick in range(12):
            answers = Answers(kept=10 * share, broken=10 * (1 - share))
            at = START + 60 * minute + TICK * tick
            room = room.noted([1000 * work / have] * have, answers, seconds=TICK, now=at)
        needed = room.needed(1000 * work, 0.0, cost_of_miss=4.0)
        counts.append(max(1, math.ceil(needed.replicas)) if needed else have)
    return counts


def test_room_is_found_and_then_kept() -> None:
    counts = learned(lambda margin: 1 - min(1.0, math.exp(-margin)), replicas=2, work=1.0)
    assert counts[-1] >= 4
    assert len(set(counts[60:])) <= 2


def test_where_room_does_not_help_none_is_asked_for() -> None:
    """A goal of 1 ms: at first a little more is tried."""
    counts = learned(lambda _: 0.5, replicas=2, work=1.0)
    assert max(counts) <= 5

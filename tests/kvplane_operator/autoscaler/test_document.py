"""What survives a restart, and that nothing else can be read into it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_operator.autoscaler.document import MOST_BYTES, dump, load
from kvplane_operator.autoscaler.forecast import Loss, Method, Outlook
from kvplane_operator.autoscaler.history import History, fresh
from kvplane_operator.autoscaler.learned import Learned, Usable
from kvplane_operator.autoscaler.panic import Panic
from kvplane_operator.autoscaler.room import BINS, LEAST_MARGIN, MOST_MARGIN, Answers, Room, index_of, restored
from kvplane_operator.autoscaler.series import BUCKETS, MINUTES, Series, Steps
from kvplane_operator.autoscaler.startup import SAMPLES, StartTimes
from tests.kvplane_operator.autoscaler.world import START, TUNING, World

SOME = History(
    learned=Learned(
        usable=Usable(share=0.9),
        prefill_tokens_per_second=1234.5,
        residence_seconds=7.25,
        room=restored({-17: Answers(80.5, 20.25), 3: Answers(100.0, 0.0)}, fastest=4321.5),
    ),
    starts=StartTimes(cached=(31.5, 33.0), pulled=(300.0,)),
    series=Series(
        minutes=Steps.of([(28_333_333, 1.5), (28_333_335, 2.0)]),
        buckets=Steps.of([(5_666_666, 1.25), (5_666_669, 3.0)]),
    ),
    outlook=Outlook(losses={Method.PERSISTENCE: Loss(0.25, 40), Method.TREND: Loss(0.125, 39)}),
    panic=Panic(until=START + 60, peak=7),
)


def test_what_takes_long_to_learn_survives() -> None:
    assert load(dump(SOME), TUNING) == SOME


def test_what_is_of_this_process_does_not() -> None:
    world = World(lambda _: 1.5)
    world.run(600.0)
    loaded = load(dump(world.history), TUNING)
    assert (loaded.began_at, loaded.decided_at, loaded.watched_since, loaded.idle_since) == (None, None, None, None)
    assert (loaded.meters, loaded.known, loaded.refused, loaded.asked) == ({}, None, {}, ())
    assert loaded.series.recent == ()


def test_nothing_is_a_fresh_history() -> None:
    assert load(None, TUNING) == fresh(TUNING)
    assert load(dump(fresh(TUNING)), TUNING) == fresh(TUNING)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"usable_share": 7},
        {"usable_share": None},
        {"residence_seconds": -1},
        {"answers": [[99, 1.0, 1.0]]},
        {"answers": [[3, -1.0, 1.0]]},
        {"answers": [[3, 1.0, 1.0]] * (BINS + 1)},
        {"fastest_prompt_tokens_per_second": "fast"},
        {"starts_cached": [1.0] * (SAMPLES + 1)},
        {"minutes": {"first": -1, "values": [1.0]}},
        {"minutes": {"first": 0, "values": ["one"]}},
        {"buckets": {"first": 0, "values": [1.0] * (BUCKETS + 1)}},
        {"losses": {"by dice": [0.1, 9]}},
        {"panic_peak": 1.5},
    ],
)
def test_what_was_changed_by_hand_is_not_believed(change: dict[str, Any]) -> None:
    document = json.loads(dump(SOME)) | change
    assert load(json.dumps(document), TUNING) == fresh(TUNING)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"version": 1}', dump(SOME).replace("0.9", "NaN")])
def test_what_is_no_document_is_none(text: str) -> None:
    assert load(text, TUNING) == fresh(TUNING)


def test_a_document_of_before_room_was_learned_is_read() -> None:
    document = json.loads(dump(SOME))
    del document["answers"], document["fastest_prompt_tokens_per_second"]
    got = load(json.dumps(document), TUNING).learned
    assert (got.room, got.usable) == (Room(), SOME.learned.usable)


def test_a_share_beyond_todays_bounds_is_brought_into_them() -> None:
    document = json.loads(dump(SOME)) | {"usable_share": 1.0}
    assert load(json.dumps(document), TUNING).learned.usable.share == TUNING.usable_most


def test_the_largest_history_fits() -> None:
    """A ConfigMap holds 1 MiB, and each write of it passes through etcd."""
    demand = 9999.9994
    full = History(
        learned=Learned(
            usable=Usable(share=0.8501),
            prefill_tokens_per_second=123_456.7894,
            residence_seconds=999.9994,
            room=restored({index - 17: Answers(1999.9994, 1999.9994) for index in range(BINS)}, fastest=123_456.7894),
        ),
        starts=StartTimes(cached=(3599.9994,) * SAMPLES, pulled=(3599.9994,) * SAMPLES),
        series=Series(
            minutes=Steps.of((28_333_333 + minute, demand) for minute in range(MINUTES)),
            buckets=Steps.of((5_666_666 + index, demand) for index in range(BUCKETS)),
        ),
        outlook=Outlook(losses={method: Loss(demand, 10**9) for method in Method}),
        panic=Panic(until=START, peak=10_000),
    )
    assert len(dump(full).encode()) <= MOST_BYTES


amounts = st.floats(0, 1e9)
runs = st.lists(st.none() | amounts, max_size=MINUTES)


@st.composite
def histories(draw: st.DrawFn) -> History:
    minutes, buckets = draw(runs), draw(runs)
    return History(
        learned=Learned(
            usable=Usable(share=draw(st.floats(TUNING.usable_least, TUNING.usable_most))),
            prefill_tokens_per_second=draw(st.none() | st.floats(1, 1e9)),
            residence_seconds=draw(st.floats(0.1, 3600)),
            room=restored(
                draw(
                    st.dictionaries(
                        st.integers(index_of(LEAST_MARGIN), index_of(MOST_MARGIN)),
                        st.builds(Answers, st.floats(0, 2000), st.floats(0, 2000)),
                    )
                ),
                fastest=draw(st.none() | st.floats(1, 1e9)),
            ),
        ),
        starts=StartTimes(
            cached=tuple(draw(st.lists(amounts, max_size=SAMPLES))),
            pulled=tuple(draw(st.lists(amounts, max_size=SAMPLES))),
        ),
        series=Series(
            minutes=Steps.of((28_333_333 + at, value) for at, value in enumerate(minutes) if value is not None),
            buckets=Steps.of((5_666_666 + at, value) for at, value in enumerate(buckets) if value is not None),
        ),
        outlook=Outlook(
            losses=draw(st.dictionaries(st.sampled_from(Method), st.builds(Loss, amounts, st.integers(0, 10**6))))
        ),
        panic=Panic(until=draw(st.none() | st.floats(0, 1e10)), peak=draw(st.none() | st.integers(0, 10_000))),
    )


@given(histories())
def test_there_and_back_changes_nothing_more(history: History) -> None:
    """The first way rounds to thousandths; after that each is the same."""
    once = load(dump(history), TUNING)
    assert load(dump(once), TUNING) == once
    assert once.panic.peak == history.panic.peak
    assert [minute for minute, _ in once.series.minutes] == [minute for minute, _ in history.series.minutes]
    assert [value for _, value in once.series.minutes] == pytest.approx(
        [value for _, value in history.series.minutes], abs=0.001
    )


@given(st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_any_text_can_be_read(text: str) -> None:
    assert load(text, TUNING) == fresh(TUNING)

"""From what callers got while a real service scaled itself to the spot check's table and last line."""

import math
from dataclasses import replace

import pytest

from bench import report
from bench.autoscaling.spot.figures import HEADER, Goals, Results, spell
from e2e.tests.client import Answered

GOALS = Goals(ttft_seconds=10.0, tpot_seconds=1.0)


def answered(ended: float, *, first: float = 2.0, took: float = 20.0, tokens: int = 101) -> Answered:
    """An answer whose first token came after ``first`` seconds, and the last one ``took`` seconds later."""
    return Answered(ended - took - first, ended - took, ended, tokens)


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (answered(100.0), True),
        (answered(100.0, first=11.0), False),
        (answered(200.0, took=101.0), False),
        (answered(100.0, took=0.0, tokens=1), True),
    ],
)
def test_a_good_answer_keeps_both_promises(answer: Answered, good: bool) -> None:
    assert GOALS.met_by(answer) == good


def test_a_spell_counts_what_ended_in_it() -> None:
    answers = [
        answered(99.9),
        answered(100.0, first=4.0),
        answered(110.0, first=12.0),
        answered(119.0),
        answered(120.0),
    ]
    found = spell(answers, GOALS, begin=100.0, end=120.0)
    assert (found.answers, found.good, found.goodput) == (3, 2, 0.1)
    assert found.first_token_seconds == pytest.approx(4.0)


def test_without_an_answer_nothing_is_known_of_first_tokens() -> None:
    found = spell([], GOALS, begin=0.0, end=10.0)
    assert found.goodput == 0.0
    assert math.isnan(found.first_token_seconds)


RESULTS = Results(
    signal_to_ask_seconds=2.5,
    ask_to_ready_seconds=80.0,
    alone=spell([answered(5.0), answered(6.0, first=15.0)], GOALS, begin=0.0, end=10.0),
    both=spell([answered(each) for each in range(20, 30)], GOALS, begin=20.0, end=40.0),
    back_to_one_seconds=330.0,
    gone_seconds=12.0,
    answers=120,
    refusals=7,
    lost=[],
    events=[("ScaledUp", "From 1 to 2 replicas: …")],
)


def test_the_last_line() -> None:
    assert report.last_line("autoscaling-spot", RESULTS.last_line()) == (
        "bench autoscaling-spot: signal_to_ask_s=2.50 ask_to_ready_s=80.0 goodput_before_per_s=0.10 "
        "goodput_after_per_s=0.50 back_to_one_s=330 lost=0"
    )


def test_rows() -> None:
    rows = dict(RESULTS.rows())
    assert rows["good answers/s on one replica / on two"] == "0.10 / 0.50"
    assert rows["… good ones of all, on one / on two"] == "1 of 2 / 10 of 10"
    assert rows["answers / refusals / lost"] == "120 / 7 / 0"
    assert dict(replace(RESULTS, lost=["cut"]).rows())["answers / refusals / lost"] == "120 / 7 / 1"
    assert report.table(HEADER, RESULTS.rows())

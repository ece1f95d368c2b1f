"""The benchmark of the thrash detector: how it judges, and a small sweep with fixed seeds in simulated time."""

import math

import pytest

from bench.thrash.cases import Case, chats, longer_answers, must_not_fire, questions
from bench.thrash.judge import Verdict, judge, together
from bench.thrash.trial import Tick, Trial


def trial(shares: list[float], alarms: list[tuple[float, float]] = []) -> Trial:  # noqa: B006  (never changed)
    """Ticks with these wasted shares; ``alarms`` from when to when."""
    ticks = (
        Tick(
            ended=10.0 * number,
            wasted=round(1000 * share),
            handled=1000,
            alarm="prefix" if any(on <= 10.0 * number < off for on, off in alarms) else None,
        )
        for number, share in enumerate(shares, start=1)
    )
    return Trial(tuple(ticks), tuple((on, "prefix") for on, _ in alarms))


def test_an_episode_begins_with_its_first_wasteful_ten_seconds() -> None:
    shares = [0.0] * 12 + [0.5] * 10 + [0.0] * 12
    (episode,) = trial(shares).thrashing()
    assert episode.began == 120.0
    assert episode.ended > 220.0


def test_a_short_waste_is_no_episode() -> None:
    assert trial([0.0] * 10 + [0.3] + [0.0] * 10).thrashing() == []


def test_an_alarm_is_late_by_the_time_since_the_waste_began() -> None:
    shares = [0.0] * 12 + [0.5] * 10 + [0.0] * 12
    verdict = judge(trial(shares, [(151.0, 300.0)]))
    assert verdict == Verdict(episodes=1, delays=(31.0,), alarms=1, false_alarms=0, kinds=("prefix",))
    assert judge(trial(shares, [(100.0, 300.0)])).delays == (0.0,)


def test_an_alarm_without_waste_is_false_and_one_in_between_is_not() -> None:
    assert judge(trial([0.0] * 30, [(100.0, 200.0)])).precision == 0
    assert judge(trial([0.05] * 30, [(100.0, 200.0)])).precision == 1


def test_an_episode_without_an_alarm_costs_recall() -> None:
    missed = judge(trial([0.0] * 12 + [0.5] * 12))
    assert (missed.recall, missed.precision, missed.delays) == (0, 1, ())
    assert math.isnan(missed.delay)
    told = judge(trial([0.0] * 12 + [0.5] * 12, [(150.0, 240.0)]))
    assert together([missed, told]).recall == 0.5


@pytest.mark.parametrize(
    ("case", "kind"), [(chats(1.2), "prefix"), (questions(1.0), "prefix"), (longer_answers(2.0), "preemption")]
)
def test_thrashing_is_told(case: Case, kind: str) -> None:
    run = case.run(seed=1)
    verdict = judge(run.sighted)
    assert (verdict.recall, verdict.precision, verdict.kinds) == (1, 1, (kind,))
    assert verdict.episodes == 1
    assert verdict.delay < 60
    blind = judge(run.blind)  # without KV events only preemptions are seen
    assert blind.recall == (1 if kind == "preemption" else 0)
    assert blind.false_alarms == 0


def test_offloading_that_goes_to_and_fro_is_told_apart() -> None:
    assert judge(chats(1.5, offload=True).run(seed=1).sighted).kinds == ("offload",)


@pytest.mark.parametrize("case", [chats(0.5), *must_not_fire()], ids=lambda case: case.name)
def test_it_is_silent_where_nothing_is_computed_twice(case: Case) -> None:
    run = case.run(seed=1)
    assert run.sighted.healthy
    assert (run.sighted.alarms, run.blind.alarms) == ((), ())

"""Rates are differences of counters, and unknown where those say nothing."""

import math

import pytest

from kvplane_operator.autoscaler.flows import UNKNOWN, Meter, Rates, metered
from kvplane_operator.autoscaler.signals import Reading
from tests.kvplane_operator.autoscaler.world import START, reading, replica


def counted(at: float, total: float | None, *, queue: float = 0.0) -> Reading:
    """All counters at ``total``."""
    return reading(
        0.5,
        queue,
        at=START + at,
        admitted_total=total,
        refused_total=total,
        shed_tokens_total=total,
        prompt_tokens_total=total,
        generation_tokens_total=total,
        kept_total=total,
        broken_total=total,
    )


def after(*readings: Reading | None) -> Meter:
    """The meter of one replica after these readings."""
    meters: dict[str, Meter] = {}
    for each in readings:
        meters = metered(meters, [replica("a", reading=each)])
    return meters["a"]


def test_a_rate_is_a_difference_over_its_time() -> None:
    assert after(counted(0, 100), counted(5, 150)).rates == Rates(10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0)


def test_prompts_that_the_prefix_cache_has_are_not_computed() -> None:
    """A prefill rate learned with a cold cache must not make nine replicas of a load that hits it nine times in ten."""
    before, now = (
        reading(0.5, at=START + at, prompt_tokens_total=100.0 * at, prefix_hits_tokens_total=90.0 * at) for at in (1, 6)
    )
    assert after(before, now).rates.prompt_tokens == 10.0


def test_hits_that_are_counted_before_their_prompt_make_no_negative_rate() -> None:
    before = reading(0.5, at=START, prompt_tokens_total=0.0, prefix_hits_tokens_total=0.0)
    now = reading(0.5, at=START + 5, prompt_tokens_total=0.0, prefix_hits_tokens_total=900.0)
    assert after(before, now).rates.prompt_tokens == 0.0


def test_the_first_reading_gives_no_rate() -> None:
    assert after(counted(0, 100)) == Meter(counted(0, 100), UNKNOWN)


@pytest.mark.parametrize(
    "readings",
    [
        (counted(0, 100), counted(5, 50)),  # restarted
        (counted(0, 100), counted(61, 150)),  # too long ago
        (counted(0, None), counted(5, 50)),
        (counted(0, 50), counted(5, None)),
        (counted(0, 0), counted(5, 1e11)),  # absurd
        (counted(5, 100), counted(0, 150)),  # the clock went back
        (counted(0, 100), counted(5, 150), None),
    ],
)
def test_what_says_nothing_gives_no_rate(readings: tuple[Reading | None, ...]) -> None:
    assert after(*readings).rates == UNKNOWN


def test_the_rates_stand_until_the_next_reading() -> None:
    assert after(counted(0, 100), counted(5, 150), counted(5, 150)) == after(counted(0, 100), counted(5, 150))


def test_a_pace_is_the_rate_of_some_readings() -> None:
    """An engine counts a prompt when all of it is computed: in one reading there may be all of a minute's work."""
    first, second = counted(5, 500), counted(10, 500)
    assert after(counted(0, 0)).pace is None
    assert after(counted(0, 0), first).pace == 100.0
    assert after(counted(0, 0), first, second).pace == pytest.approx(100 * math.exp(-0.5))
    assert after(counted(0, 0), first, None).pace == 100.0
    assert after(counted(0, 0), first, counted(10, 100)).pace == 100.0  # the engine was restarted
    assert after(counted(0, 0), first, counted(100, 500)).pace is None


def test_a_silence_is_bridged_by_the_counters() -> None:
    assert after(counted(0, 100), None, counted(10, 150)).rates.admitted == 5.0


def test_replicas_that_are_gone_are_forgotten() -> None:
    meters = metered({}, [replica("a", reading=counted(0, 1)), replica("b", reading=counted(0, 1))])
    assert set(metered(meters, [replica("b", reading=counted(5, 2))])) == {"b"}
    assert metered({}, [replica("a")]) == {}


@pytest.mark.parametrize(("before", "now", "kept"), [(1.0, 1.0, True), (0.0, 1.0, False), (1.0, 0.0, False)])
def test_kept_waiting_means_at_both_ends(before: float, now: float, kept: bool) -> None:
    assert after(counted(0, 1, queue=before), counted(5, 2, queue=now)).kept_waiting is kept

"""Start-up times: percentile, chance, and clocks that lie."""

import math

import pytest

from kvplane_operator.autoscaler.startup import SAMPLES, StartTimes

TIMES = StartTimes(cached=(20.0, 30.0, 40.0), pulled=(200.0, 300.0))


@pytest.mark.parametrize(("image_cached", "seconds"), [(True, 40.0), (False, 300.0), (None, 300.0)])
def test_p90_of_the_state_of_the_image(image_cached: bool | None, seconds: float) -> None:
    assert TIMES.p90(image_cached, unknown=120.0) == seconds


def test_nearest_rank() -> None:
    assert StartTimes(cached=tuple(float(n) for n in range(1, 11))).p90(True, unknown=0.0) == 9.0
    assert StartTimes(cached=tuple(float(n) for n in range(1, 12))).p90(True, unknown=0.0) == 10.0


def test_before_the_first_start_a_default_stands() -> None:
    assert StartTimes().p90(True, unknown=120.0) == 120.0


def test_without_a_start_of_that_kind_the_longer_of_default_and_the_other_kind() -> None:
    assert StartTimes(cached=(30.0,)).p90(False, unknown=120.0) == 120.0
    assert StartTimes(cached=(500.0,)).p90(False, unknown=120.0) == 500.0


def test_the_last_starts_of_each_kind_are_kept() -> None:
    times = StartTimes()
    for second in range(1, SAMPLES + 3):
        times = times.noted(float(second), image_cached=True).noted(1000.0 + second, image_cached=second % 2 == 0)
    assert len(times.cached) == SAMPLES
    assert times.cached[-1] == 1000.0 + SAMPLES + 2
    assert set(times.pulled) == {1000.0 + second for second in range(1, SAMPLES + 3, 2)}


def test_an_unknown_image_counts_as_pulled() -> None:
    assert StartTimes().noted(5.0, image_cached=None) == StartTimes(pulled=(5.0,))


@pytest.mark.parametrize("seconds", [0.0, -5.0, math.nan, math.inf, 1e6])
def test_a_clock_that_lies_teaches_nothing(seconds: float) -> None:
    assert StartTimes().noted(seconds, image_cached=True) == StartTimes()


@pytest.mark.parametrize(
    ("age", "within", "chance"),
    [
        (0.0, 40.0, 1.0),
        (0.0, 35.0, 2 / 3),
        (0.0, 10.0, 0.0),
        (25.0, 10.0, 0.5),  # two took longer, one of them ended by 35
        (45.0, 40.0, 0.5),  # longer than any
        (81.0, 40.0, 0.0),  # longer than twice any
    ],
)
def test_chance_to_be_ready_in_time(age: float, within: float, chance: float) -> None:
    assert TIMES.chance(age, within=within, image_cached=True) == pytest.approx(chance)


def test_before_anything_was_timed_a_replica_is_counted_on() -> None:
    assert StartTimes().chance(10_000.0, within=1.0, image_cached=None) == 1.0


def test_where_only_the_other_kind_was_timed_that_is_what_there_is() -> None:
    assert StartTimes(pulled=(200.0,)).chance(0.0, within=100.0, image_cached=True) == 0.0

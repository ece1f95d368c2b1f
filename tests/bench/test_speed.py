"""The watch on the machine's speed."""

import time

import pytest

from bench.speed import EVERY_SECONDS, SpeedWatch, steadiest, steady


def test_it_takes_the_processor_time_of_a_block() -> None:
    with SpeedWatch() as watch:
        time.sleep(2 * EVERY_SECONDS)
    assert 0 < watch.seconds < EVERY_SECONDS


def test_a_figure_is_there_however_short_it_lasted() -> None:
    with SpeedWatch() as watch:
        pass
    assert watch.seconds > 0


@pytest.mark.parametrize(("speed", "expected"), [(0.5, False), (0.84, False), (0.9, True), (1.1, True), (1.3, False)])
def test_what_counts_as_the_same_machine(speed: float, expected: bool) -> None:
    assert steady(speed) is expected


def test_the_try_nearest_to_the_reference_is_taken() -> None:
    assert steadiest([0.5, 0.8, 1.3]) == 1

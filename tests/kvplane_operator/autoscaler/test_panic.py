"""Overload: what shows it, how long it lasts, and the line in which its replicas go."""

from dataclasses import replace
from typing import Any

import pytest

from kvplane_operator.autoscaler.panic import Load, Panic, lowered, overload, raised, renewed
from tests.kvplane_operator.autoscaler.world import START, TUNING

CALM = Load(demand=2.0, ready=2, coming=2.0, forecast=2.0, reach=1.17, shed_share=0.0, waste=0.0)
LASTS = 65.0


class TestEvidence:
    def test_a_busy_service_is_not_overloaded(self) -> None:
        assert overload(CALM, TUNING) is None

    @pytest.mark.parametrize(
        ("change", "cause"),
        [
            ({"demand": 3.0}, "demand is 1.5 times what serves"),
            ({"shed_share": 0.03}, "3% of the requests are refused"),
            ({"forecast": 3.0}, "22% of the demand is forecast to find no room"),
            ({"waste": 0.25}, "thrash takes 0.25 replicas"),
        ],
    )
    def test_causes(self, change: dict[str, Any], cause: str) -> None:
        assert overload(replace(CALM, **change), TUNING) == cause

    @pytest.mark.parametrize(
        "change", [{"demand": 2.9}, {"shed_share": 0.02}, {"forecast": 2.4}, {"forecast": 0.0, "coming": 0.0}]
    )
    def test_bounds(self, change: dict[str, Any]) -> None:
        assert overload(replace(CALM, **change), TUNING) is None

    def test_nothing_serves_so_nothing_is_known(self) -> None:
        assert overload(replace(CALM, demand=0.0, ready=0, coming=0.0, forecast=0.0), TUNING) is None


def looks(*seen: bool, step: float = 5.0, begin: Panic | None = None) -> Panic:
    """The state after looks so far apart, the last one at START."""
    panic = begin or Panic()
    for number, each in enumerate(seen):
        now = START - step * (len(seen) - 1 - number)
        panic = renewed(panic, seen=each, lasts_seconds=LASTS, now=now, tuning=TUNING)
    return panic


class TestCourse:
    def test_a_moment_is_no_panic(self) -> None:
        assert looks(True, True).until is None

    def test_ten_seconds_are(self) -> None:
        assert looks(True, True, True).until == START + LASTS

    def test_they_must_be_without_a_break(self) -> None:
        assert looks(True, True, False, True, True).until is None

    def test_it_lasts_for_a_start_after_the_last_sign(self) -> None:
        panic = looks(True, True, True)
        still = renewed(panic, seen=False, lasts_seconds=LASTS, now=START + LASTS - 1, tuning=TUNING)
        over = renewed(still, seen=False, lasts_seconds=LASTS, now=START + LASTS, tuning=TUNING)
        assert (still.until, over.until) == (START + LASTS, None)

    def test_a_clock_set_back_does_not_prolong_it(self) -> None:
        panic = replace(looks(True, True, True), until=START + 1e6)
        assert renewed(panic, seen=False, lasts_seconds=LASTS, now=START, tuning=TUNING).until == START + LASTS

    def test_its_peak_is_remembered(self) -> None:
        panic = looks(True, True, True)
        assert raised(raised(panic, desired=8), desired=5).peak == 8
        assert raised(Panic(), desired=8).peak is None


class TestGlide:
    OVER = Panic(peak=10)

    def at(self, seconds: float, *, asked: int = 10, low: int = 2) -> int:
        """Replicas so long after the first moment in which they may go, of 100 s."""
        _, gliding = lowered(self.OVER, asked=10, low=low, lasts_seconds=100.0, now=START)
        reached, _ = lowered(gliding, asked=asked, low=low, lasts_seconds=100.0, now=START + seconds)
        return reached

    @pytest.mark.parametrize(("seconds", "replicas"), [(0, 10), (12, 10), (13, 9), (50, 6), (90, 3), (99, 3), (100, 2)])
    def test_goes_in_a_line(self, seconds: float, replicas: int) -> None:
        assert self.at(seconds) == replicas

    def test_never_raises(self) -> None:
        assert self.at(0, asked=4) == 4

    def test_ends_at_once_where_all_are_needed(self) -> None:
        assert lowered(self.OVER, asked=10, low=10, lasts_seconds=100.0, now=START) == (10, Panic())

    def test_without_a_panic_there_is_none(self) -> None:
        assert lowered(Panic(), asked=10, low=2, lasts_seconds=100.0, now=START) == (2, Panic())

    def test_ends(self) -> None:
        gliding = Panic(peak=10, gliding_since=START)
        assert lowered(gliding, asked=3, low=2, lasts_seconds=100.0, now=START + 100) == (2, Panic())

    def test_begins_anew_after_a_need(self) -> None:
        assert raised(Panic(peak=10, gliding_since=START), desired=7) == Panic(peak=10)

"""What is learned: usable share, prefill rate, residence."""

import math
from dataclasses import replace

import pytest

from kvplane_operator.autoscaler.flows import Meter, Rates
from kvplane_operator.autoscaler.learned import FIRST_RESIDENCE, Learned, Usable, learn
from kvplane_operator.autoscaler.signals import Reading
from tests.kvplane_operator.autoscaler.world import CAPACITY, START, TUNING, reading, signals

FRESH = Learned(usable=Usable(share=0.85))
CALM = Rates(admitted=10.0, refused=0.0, shed_tokens=0.0, prompt_tokens=600.0, generation_tokens=400.0)


def learned(
    told: Reading,
    rates: Rates,
    *,
    seconds: float,
    before: Learned = FRESH,
    waiting: bool = False,
    prompts_lead: bool = False,
) -> Learned:
    """After so long of the same, in steps of 5 s."""
    after = before
    for step in range(int(seconds / 5) + 1):
        after = learn(
            after,
            signals=signals(told),
            meters={"r0": Meter(told, rates, kept_waiting=waiting)},
            prompts_lead=prompts_lead,
            seconds=5.0,
            now=START + 5 * step,
            tuning=TUNING,
        )
    return after


def share(fill: float, rates: Rates, *, seconds: float = 600.0, wasted: float = 0.0, before: Learned = FRESH) -> float:
    told = reading(held_tokens=fill * CAPACITY, running=9.0, wasted_tokens_per_second=wasted)
    return learned(told, rates, seconds=seconds, before=before).usable.share


class TestUsableShare:
    def test_ten_good_minutes_near_it_raise_it(self) -> None:
        assert share(0.83, CALM) == pytest.approx(0.86)

    def test_not_before_ten_minutes(self) -> None:
        assert share(0.83, CALM, seconds=595.0) == 0.85

    def test_what_was_not_tried_is_not_raised(self) -> None:
        assert share(0.5, CALM) == 0.85

    def test_waste_within_the_plan_lowers_it(self) -> None:
        assert share(0.83, CALM, wasted=6.0) == pytest.approx(0.82)  # 6 of 1,006 tokens
        assert share(0.83, CALM, wasted=4.0) == pytest.approx(0.86)

    def test_refusals_within_the_plan_lower_it(self) -> None:
        """Something other than KV memory ran out, so a replica that is planned less full meets its goals."""
        assert share(0.5, replace(CALM, refused=0.2, shed_tokens=10.0)) == pytest.approx(0.82)

    def test_requests_that_fit_no_engine_say_nothing(self) -> None:
        assert share(0.5, replace(CALM, refused=5.0)) == 0.85

    def test_beyond_the_plan_nothing_is_learned(self) -> None:
        assert share(0.95, replace(CALM, refused=5.0, shed_tokens=10.0), wasted=50.0) == 0.85

    def test_it_stays_in_its_bounds(self) -> None:
        high = replace(FRESH, usable=Usable(share=0.92))
        low = replace(FRESH, usable=Usable(share=0.61))
        assert share(0.91, CALM, before=high) == 0.92
        assert share(0.5, CALM, before=low, wasted=50.0) == 0.6


class TestPrefillRate:
    BUSY = reading(0.5, queued=3.0, queued_prompt_tokens=500.0)

    def rate(self, told: Reading, seen: float, *, waiting: bool = True, before: float | None = None) -> float | None:
        start = replace(FRESH, prefill_tokens_per_second=before)
        after = learned(told, Rates(prompt_tokens=seen), seconds=0.0, before=start, waiting=waiting)
        return after.prefill_tokens_per_second

    def test_a_replica_that_was_kept_busy_by_prompts_shows_it(self) -> None:
        assert self.rate(self.BUSY, 800.0) == 800.0

    def test_so_does_a_ring_that_keeps_prompts_waiting_itself(self) -> None:
        ring = replace(self.BUSY, queued_prompt_tokens=0.0, waiting_prompt_tokens=500.0)
        assert self.rate(ring, 800.0) == 800.0

    def test_it_rises_fast_and_falls_slowly(self) -> None:
        assert self.rate(self.BUSY, 900.0, before=800.0) == pytest.approx(850.0)
        assert self.rate(self.BUSY, 700.0, before=800.0) == pytest.approx(798.0)

    def test_an_idle_moment_shows_nothing(self) -> None:
        assert self.rate(self.BUSY, 800.0, waiting=False) is None
        assert self.rate(replace(self.BUSY, queued_prompt_tokens=0.0), 800.0) is None
        assert self.rate(self.BUSY, 0.0) is None

    def test_where_kv_is_full_requests_wait_for_that(self) -> None:
        assert self.rate(replace(self.BUSY, held_tokens=0.95 * CAPACITY), 800.0) is None
        assert self.rate(replace(self.BUSY, held_tokens=0.5 * CAPACITY, kappa=0.5), 800.0) is None

    def test_while_nothing_shows_it_it_rises_as_long_as_prompts_ask_for_replicas(self) -> None:
        low, quiet = replace(FRESH, prefill_tokens_per_second=100.0), reading(0.1)

        def after_an_hour(told: Reading, seen: float, *, waiting: bool, prompts_lead: bool) -> float | None:
            rates = Rates(prompt_tokens=seen)
            after = learned(told, rates, seconds=3595.0, before=low, waiting=waiting, prompts_lead=prompts_lead)
            return after.prefill_tokens_per_second

        assert after_an_hour(quiet, 80.0, waiting=False, prompts_lead=True) == pytest.approx(
            100 * math.exp(1 / 12), rel=1e-4
        )
        assert after_an_hour(quiet, 80.0, waiting=False, prompts_lead=False) == 100.0
        assert after_an_hour(self.BUSY, 100.0, waiting=True, prompts_lead=True) == pytest.approx(100.0)

    def test_an_unknown_one_stays_unknown(self) -> None:
        after = learned(reading(0.1), Rates(prompt_tokens=80.0), seconds=60.0, prompts_lead=True)
        assert after.prefill_tokens_per_second is None


class TestResidence:
    def test_follows_littles_law(self) -> None:
        """9 requests run and 0.5 are let in each second: each stays 18 s."""
        after = learned(reading(0.5, running=9.0), Rates(admitted=0.5), seconds=5.0)
        assert after.residence_seconds == pytest.approx(18 - 0.9**2 * (18 - FIRST_RESIDENCE))

    @pytest.mark.parametrize("rates", [Rates(), Rates(admitted=0.0)])
    def test_without_admissions_it_stays(self, rates: Rates) -> None:
        assert learned(reading(0.5, running=9.0), rates, seconds=5.0).residence_seconds == FIRST_RESIDENCE

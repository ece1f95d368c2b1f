"""How much work there is, in replicas, and that hidden work counts."""

from dataclasses import replace

import pytest

from kvplane_operator.autoscaler.demand import Demand, measure, shed_share
from kvplane_operator.autoscaler.flows import UNKNOWN, Meter, Rates
from kvplane_operator.autoscaler.learned import Learned, Usable
from kvplane_operator.autoscaler.room import Answers, restored
from kvplane_operator.autoscaler.settings import Settings
from kvplane_operator.autoscaler.signals import Reading
from tests.kvplane_operator.autoscaler.world import CAPACITY, USABLE, reading, signals

LEARNED = Learned(usable=Usable(share=0.85), residence_seconds=10.0)
KNOWN = replace(LEARNED, prefill_tokens_per_second=1000.0)


def demand(*readings: Reading | None, rates: Rates | None = None, learned: Learned = LEARNED) -> Demand:
    """Of replicas r0, r1, ...; ``rates`` are those of r0."""
    seen = signals(*readings)
    meters = {"r0": Meter(readings[0], rates)} if rates and readings[0] else {}
    return measure(seen, meters, learned, Settings(max_replicas=9))


class TestKv:
    def test_what_is_held_and_what_waits_counts_over_all_replicas(self) -> None:
        got = demand(reading(0.5), reading(1.0, 0.25))
        assert (got.held, got.queued, got.shed) == pytest.approx((1.5, 0.25, 0.0))
        assert got.total == pytest.approx(1.75)

    def test_a_full_cache_is_more_than_one_replica(self) -> None:
        """1 / 0.85: at its limit a replica preempts, so it is planned with less."""
        assert demand(reading(held_tokens=CAPACITY, running=9.0)).total == pytest.approx(1 / 0.85)

    def test_where_admission_lets_in_less_a_replica_counts_for_less(self) -> None:
        assert demand(reading(kappa=0.5, held_tokens=50_000.0, running=9.0)).total == pytest.approx(1.0)

    def test_no_more_is_planned_with_than_is_usable(self) -> None:
        assert demand(reading(kappa=1.25, held_tokens=USABLE, running=9.0)).total == pytest.approx(1.0)

    def test_what_is_unread_counts_nothing(self) -> None:
        assert demand(reading(0.5), None).total == pytest.approx(0.5)


class TestOneRequest:
    """A request never fills more than one replica: on a ring it fills the group, and a second group would not help."""

    def test_that_runs(self) -> None:
        assert demand(reading(held_tokens=CAPACITY, running=1.0)).total == 1.0

    def test_that_waits(self) -> None:
        assert demand(reading(queued_tokens=CAPACITY, queued=1.0)).total == 1.0

    def test_beside_another(self) -> None:
        one = reading(held_tokens=CAPACITY, running=1.0, queued_tokens=CAPACITY, queued=1.0)
        assert demand(one).total == pytest.approx(2.0)

    def test_that_was_refused(self) -> None:
        """One request in 10 s, which stays 10 s, is one request at a time, however much it would have held."""
        got = demand(reading(), rates=Rates(admitted=0.0, refused=0.1, shed_tokens=10 * USABLE))
        assert got.shed == pytest.approx(1.0)

    def test_whose_prompt_is_computed(self) -> None:
        """At the full rate, which is more than is planned with."""
        got = demand(reading(running=1.0), rates=Rates(prompt_tokens=1000.0), learned=KNOWN)
        assert got.prefill == 1.0

    def test_whose_prompt_waits(self) -> None:
        """A million tokens in 10 s would be the work of 118 replicas."""
        assert demand(reading(queued=1.0, waiting_prompt_tokens=1e6), learned=KNOWN).prefill == 1.0
        assert demand(reading(queued=1.0, queued_prompt_tokens=1e6), learned=KNOWN).prefill == 1.0

    def test_whose_prompt_waits_beside_another(self) -> None:
        both = reading(running=1.0, queued=1.0, waiting_prompt_tokens=1e6)
        assert demand(both, rates=Rates(prompt_tokens=1000.0), learned=KNOWN).prefill == 2.0


class TestRefused:
    RATES = Rates(admitted=8.0, refused=2.0, shed_tokens=17_000.0)

    def test_what_is_refused_counts_for_as_long_as_it_would_have_stayed(self) -> None:
        """17,000 tokens/s for 10 s are 170,000 tokens: two replicas."""
        assert demand(reading(1.0), rates=self.RATES).shed == pytest.approx(2.0)

    def test_longer_requests_count_for_more(self) -> None:
        longer = replace(LEARNED, residence_seconds=20.0)
        assert demand(reading(1.0), rates=self.RATES, learned=longer).shed == pytest.approx(4.0)

    def test_share(self) -> None:
        assert shed_share({"a": Meter(reading(), self.RATES)}) == pytest.approx(0.2)

    def test_what_fits_no_engine_is_not_for_want_of_room(self) -> None:
        too_long = Rates(admitted=8.0, refused=2.0, shed_tokens=0.0)
        assert shed_share({"a": Meter(reading(), too_long)}) == 0.0
        assert demand(reading(), rates=too_long).shed == 0.0

    def test_nothing_known_is_nothing_refused(self) -> None:
        assert shed_share({}) == 0.0
        assert shed_share({"a": Meter(reading())}) == 0.0


class TestPrefill:
    def test_prompts_computed_per_second_over_what_one_replica_can(self) -> None:
        got = demand(reading(0.2), rates=Rates(prompt_tokens=1700.0), learned=KNOWN)
        assert got.prefill == pytest.approx(2.0)
        assert got.total == pytest.approx(2.0)

    def test_prompts_that_wait_and_prompts_that_were_refused_count(self) -> None:
        rates = Rates(admitted=10.0, refused=5.0, shed_tokens=1.0, prompt_tokens=850.0)
        got = demand(reading(0.2, queued_prompt_tokens=4250.0, queued=3.0), rates=rates, learned=KNOWN)
        assert got.prefill == pytest.approx(1.0 + 0.5 + 0.5)

    def test_of_prompts_that_wait_the_cached_part_counts_nothing(self) -> None:
        """Three of four tokens were in the prefix cache so far: 10,200 that wait are 2,550 to compute within 10 s."""
        told = reading(0.2, queued_prompt_tokens=10_200.0, queued=3.0, prompt_tokens_total=4e6)
        cached = replace(told, prefix_hits_tokens_total=3e6)
        assert demand(told, learned=KNOWN).prefill == pytest.approx(1.2)
        assert demand(cached, learned=KNOWN).prefill == pytest.approx(0.3)
        assert demand(replace(cached, prefix_hits_tokens_total=5e6), learned=KNOWN).prefill == 0.0

    def test_of_prompts_that_wait_inside_a_ring_all_that_is_told_counts(self) -> None:
        """It leaves out itself what it has in its cache."""
        told = reading(0.2, queued=3.0, waiting_prompt_tokens=4250.0, prompt_tokens_total=4e6)
        cached = replace(told, prefix_hits_tokens_total=3e6)
        assert demand(told, learned=KNOWN).prefill == pytest.approx(0.5)
        assert demand(cached, learned=KNOWN).prefill == pytest.approx(0.5)
        assert demand(replace(cached, queued_prompt_tokens=3400.0), learned=KNOWN).prefill == pytest.approx(0.6)

    def test_requests_that_came_and_went_count(self) -> None:
        """Nobody is there at the moment of the reading."""
        assert demand(reading(), rates=Rates(prompt_tokens=425.0), learned=KNOWN).prefill == pytest.approx(0.5)

    def test_kv_counts_where_it_is_the_larger(self) -> None:
        assert demand(reading(1.0), rates=Rates(prompt_tokens=85.0), learned=KNOWN).total == pytest.approx(1.0)

    def test_without_a_known_rate_kv_alone_counts(self) -> None:
        got = demand(reading(0.2), rates=Rates(prompt_tokens=1e6))
        assert got.prefill is None
        assert got.total == pytest.approx(0.2)


class TestRoom:
    """Once promises were broken for want of room, prompts are given the room that they need."""

    SHORT = replace(KNOWN, room=restored({0: Answers(80, 20), 10: Answers(100, 0)}, fastest=1000.0))

    def of(self, told: Reading, pace: float, rates: Rates = UNKNOWN, *, cost_of_miss: float = 100.0) -> Demand:
        settings = Settings(max_replicas=9, cost_of_miss=cost_of_miss)
        return measure(signals(told), {"r0": Meter(told, rates, pace=pace)}, self.SHORT, settings)

    def test_beside_the_work_of_computed_prompts(self) -> None:
        got = self.of(reading(0.2), 1000.0)
        assert got.margin is not None
        assert got.prefill == pytest.approx(1 + got.margin)
        assert got.total == got.prefill
        assert f"prefill {got.prefill:.2f} with a margin of {got.margin:.2f};" in str(got)

    def test_and_of_those_that_wait_or_were_refused(self) -> None:
        waiting = self.of(reading(0.2, queued_prompt_tokens=4000.0, queued=3.0), 600.0)
        assert waiting.prefill == pytest.approx(self.of(reading(0.2), 1000.0).prefill)
        rates = Rates(admitted=10.0, refused=4.0, shed_tokens=1.0, prompt_tokens=1000.0)
        assert self.of(reading(0.2), 600.0, rates).prefill == pytest.approx(self.of(reading(0.2), 1000.0).prefill)

    def test_one_prompt_that_waits_is_no_more_work_than_one_replica_does(self) -> None:
        assert (
            self.of(reading(queued=1.0, waiting_prompt_tokens=1e6), 0.0).prefill == self.of(reading(), 1000.0).prefill
        )

    def test_as_far_as_promises_are_worth_it(self) -> None:
        frugal, generous = (self.of(reading(0.2), 1000.0, cost_of_miss=cost).prefill or 0.0 for cost in (0.0, 100.0))
        assert frugal < generous

    def test_kv_counts_where_it_is_the_larger(self) -> None:
        assert self.of(reading(1.0), 1.0).total == pytest.approx(1.0)


class TestWaste:
    RATES = Rates(prompt_tokens=60.0, generation_tokens=20.0)

    def test_work_done_again_is_a_share_of_its_replica(self) -> None:
        got = demand(reading(0.5, wasted_tokens_per_second=20.0), rates=self.RATES)
        assert got.waste == pytest.approx(0.2)
        assert got.total == pytest.approx(0.7)

    def test_without_rates_it_cannot_be_told(self) -> None:
        assert demand(reading(0.5, wasted_tokens_per_second=20.0)).waste == 0.0


def test_in_words() -> None:
    assert str(Demand(held=1.5, queued=0.25, shed=0.5, waste=0.125)) == (
        "2.38 replicas (KV 2.25: held 1.50, queued 0.25, refused 0.50; prefill not known; thrash 0.12)"
    )
    assert "prefill 3.00" in str(Demand(prefill=3.0))

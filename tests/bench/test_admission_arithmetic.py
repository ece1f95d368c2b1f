"""Goals, goodput, intervals, the search for capacity, and the engine's counters: the arithmetic of the benchmark."""

import math
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.admission import counters, goals
from bench.admission.goals import End, Goals, Outcome
from bench.admission.intervals import stratified, t_975
from bench.admission.policy import Scrape
from bench.admission.search import STEP, Probe, best, next_rate
from bench.engine.plugin import kvplane_pace

GOALS = Goals(ttft_seconds=0.2, tpot_seconds=0.03)


def _complete(first: float, last: float, tokens: int) -> Outcome:
    return Outcome(End.COMPLETE, first_token=first, last_token=last, tokens=tokens)


class TestGoals:
    def test_five_times_the_median_first_token_and_twice_the_median_time_per_token(self) -> None:
        unloaded = [_complete(first, first + 0.010 * 10, 11) for first in (0.02, 0.03, 0.90)]
        found = goals.goals(unloaded)
        assert found.ttft_seconds == pytest.approx(0.15)
        assert found.tpot_seconds == pytest.approx(0.02)

    def test_an_engine_that_answered_nothing_gives_no_goals(self) -> None:
        with pytest.raises(ValueError, match="nothing to derive goals from"):
            goals.goals([Outcome(End.REFUSED)])

    @pytest.mark.parametrize(
        ("outcome", "met"),
        [
            (_complete(0.2, 0.2 + 0.3, 11), True),
            (_complete(0.201, 0.3, 11), False),
            (_complete(0.1, 0.1 + 0.31, 11), False),
            (_complete(0.1, 0.1, 1), True),  # one token has no time between tokens
            (Outcome(End.REFUSED), False),
            (Outcome(End.UNFINISHED, first_token=0.1, last_token=0.2, tokens=5), False),
        ],
    )
    def test_a_good_request_is_complete_and_met_both(self, outcome: Outcome, met: bool) -> None:
        assert GOALS.met(outcome) is met

    @pytest.mark.parametrize(
        ("age", "first_token", "hopeless"),
        [(0.19, None, False), (0.21, None, True), (0.5, 0.21, True), (0.39, 0.1, False), (0.41, 0.1, True)],
    )
    def test_when_a_request_can_no_longer_meet_them(
        self, age: float, first_token: float | None, hopeless: bool
    ) -> None:
        assert GOALS.out_of_reach(age=age, first_token=first_token, output_tokens=11) is hopeless

    @given(first=st.floats(0, 1), duration=st.floats(0, 5), tokens=st.integers(2, 200))
    def test_a_request_that_was_never_out_of_reach_is_good(self, first: float, duration: float, tokens: int) -> None:
        outcome = _complete(first, first + duration, tokens)
        if not GOALS.out_of_reach(age=first + duration, first_token=first, output_tokens=tokens):
            assert GOALS.met(outcome) or math.isclose(outcome.tpot or 0.0, GOALS.tpot_seconds, rel_tol=1e-9)

    def test_goodput_is_the_share_of_all_that_were_offered(self) -> None:
        outcomes = [_complete(0.1, 0.2, 11), _complete(0.3, 0.4, 11), Outcome(End.REFUSED), Outcome(End.UNFINISHED)]
        figures = goals.summary(outcomes, GOALS)
        assert (figures.goodput, figures.refused, figures.unfinished) == (0.25, 1, 1)
        assert figures.ttft_median == pytest.approx(0.2)

    def test_a_run_with_a_failed_request_is_no_measurement(self) -> None:
        with pytest.raises(ValueError, match="1 of 2 requests failed"):
            goals.summary([_complete(0.1, 0.2, 2), Outcome(End.FAILED)], GOALS)

    def test_a_run_in_which_nothing_was_let_through_has_no_latencies(self) -> None:
        figures = goals.summary([Outcome(End.REFUSED)], GOALS)
        assert (figures.ttft_median, figures.tpot_p99, figures.goodput) == (None, None, 0.0)

    def test_goals_are_read_as_they_were_written(self, tmp_path: Path) -> None:
        goals.write({"chat": GOALS}, tmp_path / "goals.json")
        assert goals.read(tmp_path / "goals.json") == {"chat": GOALS}


class TestIntervals:
    def test_one_cell_is_students_paired_interval(self) -> None:
        differences = [4.0, 6.0, 8.0]
        found = stratified({"a": differences})
        half = 4.303 * statistics.stdev(differences) / math.sqrt(3)
        assert (found.mean, found.low, found.high) == pytest.approx((6.0, 6.0 - half, 6.0 + half))

    def test_differences_between_cells_are_no_noise(self) -> None:
        found = stratified({"a": [1.0, 1.0], "b": [9.0, 9.0]})
        assert (found.mean, found.low, found.high) == (5.0, 5.0, 5.0)

    def test_one_seed_gives_a_mean_without_bounds(self) -> None:
        found = stratified({"a": [1.0], "b": [3.0]})
        assert found.mean == 2.0
        assert math.isnan(found.low)
        assert math.isnan(found.high)

    def test_a_cell_without_a_pair_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="at least one pair"):
            stratified({"a": [1.0], "b": []})

    def test_it_covers_the_truth_about_as_often_as_it_says(self) -> None:
        random_ = random.Random(5)  # noqa: S311
        hits = 0
        for _ in range(1000):
            cells = {str(cell): [cell + random_.gauss(2.0, 3.0) for _ in range(3)] for cell in range(12)}
            found = stratified(cells)
            hits += found.low <= 2.0 + statistics.fmean(range(12)) <= found.high
        assert 930 <= hits <= 970

    @pytest.mark.parametrize(("freedom", "expected"), [(2, 4.303), (24, 2.064), (23, 2.086), (5000, 1.980)])
    def test_between_the_rows_of_the_table_the_wider_one_holds(self, freedom: int, expected: float) -> None:
        assert t_975(freedom) == expected


class TestSearch:
    @given(capacity=st.floats(0.2, 50.0), first=st.floats(0.5, 10.0))
    def test_it_ends_just_below_the_capacity(self, capacity: float, first: float) -> None:
        probes: list[Probe] = []
        while (rate := next_rate(probes, first=first)) is not None:
            probes.append(Probe(rate, passed=rate <= capacity))
            assert len(probes) < 40
        found = best(probes)
        assert found is not None
        assert found <= capacity <= found * STEP * 1.0001

    def test_a_failure_below_a_rate_that_passed_was_noise(self) -> None:
        probes = [Probe(3.0, passed=False), Probe(2.0, passed=True), Probe(4.5, passed=True)]
        assert next_rate(probes, first=3.0) == pytest.approx(4.5 * 1.5)
        assert best(probes) == 4.5


EXPOSITION = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 3.0
vllm:num_requests_waiting{engine="0",model_name="demo"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25
vllm:num_preemptions_total{engine="0",model_name="demo"} 7.0
vllm:prompt_tokens_total{engine="0",model_name="demo"} 1000.0
vllm:generation_tokens_total{engine="0",model_name="demo"} 500.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="demo",source="local_compute"} 900.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="demo",source="local_cache_hit"} 100.0
"""
LOG = (
    b"(APIServer pid=7) INFO 11-21 05:00:00 [loggers.py:199] Engine 000: Iteration(%d): %d context requests, "
    b"%d context tokens, %d generation requests, %d generation tokens, iteration elapsed time: 9.10 ms, KV cache usage: 1%%\n"
)


def _log(*steps: tuple[int, int, int, int]) -> bytes:
    return b"".join(LOG % (number, *step) for number, step in enumerate(steps)) + b"some other line\n"


class TestCounters:
    def test_the_metrics_of_the_engine(self) -> None:
        found = counters.parse(EXPOSITION, now=12.0)
        assert found.computed_prompt_tokens == 900
        assert found.scrape == Scrape(
            taken_at=12.0,
            kv_cache_usage=0.25,
            running=3,
            waiting=2,
            preemptions=7,
            prompt_tokens=1000,
            generation_tokens=500,
        )

    def test_a_missing_metric_is_an_error_and_not_0(self) -> None:
        without = "\n".join(line for line in EXPOSITION.splitlines() if "preemptions" not in line)
        with pytest.raises(ValueError, match="vllm:num_preemptions_total"):
            counters.parse(without, now=0.0)

    def _work(self, log: bytes, *, prompts: int) -> counters.Work:
        before = counters.parse(EXPOSITION, now=0.0)
        after = counters.parse(EXPOSITION.replace("} 900.0", f"}} {900 + prompts}").replace("} 7.0", "} 8.0"), now=1.0)
        return counters.work(before, after, log)

    def test_a_request_that_starts_over_computes_more_than_one_token_in_a_step(self) -> None:
        # Two prompts of 100; one request is preempted at 150 tokens and starts over.
        work = self._work(_log((2, 200, 0, 0), (0, 0, 2, 2), (0, 0, 2, 151), (0, 0, 2, 2)), prompts=200)
        assert (work.preemptions, work.computed_tokens, work.recomputed_tokens) == (1, 355, 149)
        assert work.recomputed_percent == pytest.approx(100 * 149 / 355)

    def test_an_engine_that_shows_it_as_a_context_request(self) -> None:
        work = self._work(_log((2, 200, 0, 0), (0, 0, 2, 2), (1, 150, 1, 1)), prompts=200)
        assert work.recomputed_tokens == 150

    def test_steps_that_were_not_done_in_their_time(self) -> None:
        log = b"kvplane_pace: a step of 10.4 ms took 14.4 ms\nother\n" + kvplane_pace.overrun(0.010, 0.012).encode()
        assert self._work(log, prompts=0).overrun_seconds == pytest.approx(0.006)

    def test_nothing_done_is_nothing_done_again(self) -> None:
        work = self._work(b"", prompts=0)
        assert (work.computed_tokens, work.recomputed_percent) == (0, 0.0)

"""The replay's clock, its bookkeeping, and what a policy is told, on runs small enough to follow by hand."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from bench.admission.policies.unlimited import Unlimited
from bench.admission.policy import Engine, Request, Ruling, Verdict, View
from bench.admission.replay.driver import Outcome, replay
from bench.admission.replay.ours import Kvplane
from bench.admission.replay.traces import CEILINGS, NAMES, Line, arrivals, load
from bench.admission.workload import Arrival
from bench.engine.model import EngineConfig, StepTime

CONFIG = EngineConfig(num_gpu_blocks=9, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=32)
TENTH = StepTime(base=0.1, per_prefill_token=0.0, per_decode=0.0, per_context_token=0.0)


class Scripted:
    """Answers as it is told, and writes down what it sees."""

    name = "scripted"

    def __init__(
        self,
        verdicts: Mapping[int, Verdict] | None = None,
        *,
        rulings: Sequence[tuple[float, Ruling]] = (),
        scrape_seconds: float | None = None,
        progress_seconds: float | None = None,
    ) -> None:
        self.verdicts, self.rulings = dict(verdicts or {}), list(rulings)
        self.scrape_seconds, self.progress_seconds = scrape_seconds, progress_seconds
        self.seen: list[tuple[str, float, object]] = []
        self.views: list[View] = []

    def on_arrival(self, request: Request, view: View, now: float) -> Verdict:
        self.seen.append(("arrival", round(now, 6), request.id))
        return self.verdicts.get(request.id, Verdict.PASS)

    def on_first_token(self, request: Request, view: View, now: float) -> None:
        self.seen.append(("first token", round(now, 6), request.id))

    def on_progress(self, generated: Mapping[int, int], view: View, now: float) -> None:
        self.seen.append(("progress", round(now, 6), dict(generated)))

    def on_finish(self, request: Request, output_tokens: int, view: View, now: float) -> None:
        self.seen.append(("finish", round(now, 6), (request.id, output_tokens)))

    def on_scrape(self, view: View, now: float) -> None:
        self.views.append(view)

    def on_tick(self, view: View, now: float) -> Sequence[Ruling]:
        due = [ruling for at, ruling in self.rulings if at <= now]
        self.rulings = [(at, ruling) for at, ruling in self.rulings if at > now]
        return due

    def next_tick_at(self, now: float) -> float | None:
        return min((at for at, _ in self.rulings), default=None)


def run(policy: Scripted | Unlimited, *requests: tuple[float, int, int], config: EngineConfig = CONFIG) -> Outcome:
    return replay(
        [Arrival(at, prompt, output, 256) for at, prompt, output in requests],
        policy=policy,
        config=config,
        step_time=TENTH,
    )


def test_the_clock_jumps_from_step_to_step_and_an_idle_engine_starts_at_once() -> None:
    policy = Scripted()
    outcome = run(policy, (1.0, 4, 3), (1.05, 4, 1))
    assert policy.seen == [
        ("arrival", 1.0, 0),
        ("arrival", 1.05, 1),
        ("first token", 1.1, 0),
        ("first token", 1.2, 1),
        ("finish", 1.2, (1, 1)),
        ("finish", 1.3, (0, 3)),
    ]
    first, second = outcome.fates
    assert (first.ttft, first.tpot) == (pytest.approx(0.1), pytest.approx(0.1))
    assert (second.ttft, second.tpot) == (pytest.approx(0.15), 0.0), (
        "it waited for the running step; one token has no gap"
    )
    assert outcome.seconds == pytest.approx(1.3)


def test_goodput_counts_both_goals_and_a_refusal_as_failed() -> None:
    outcome = run(Scripted({1: Verdict.REFUSE}), (0.0, 4, 3), (0.0, 4, 3))
    assert outcome.refused_percent == 50.0
    assert outcome.fates[1].ttft == outcome.fates[1].tpot == math.inf
    assert outcome.goodput_percent(ttft_seconds=0.11, tpot_seconds=0.11) == 50.0
    assert outcome.goodput_percent(ttft_seconds=0.09, tpot_seconds=0.11) == 0.0
    assert outcome.goodput_percent(ttft_seconds=0.11, tpot_seconds=0.09) == 0.0
    assert outcome.counters.generation_tokens == 3, "what is refused costs nothing"


def test_a_held_request_comes_when_it_is_ruled_on_and_waited_from_its_arrival() -> None:
    policy = Scripted({0: Verdict.HOLD, 1: Verdict.HOLD},
                      rulings=[(0.5, Ruling(0, Verdict.PASS)), (0.7, Ruling(1, Verdict.REFUSE))])  # fmt: skip
    outcome = run(policy, (0.2, 4, 1), (0.2, 4, 1))
    assert outcome.fates[0].passed_at == 0.5
    assert outcome.fates[0].ttft == pytest.approx(0.4)
    assert outcome.fates[1].refused


def test_a_policy_that_forgets_a_request_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="scripted keeps 1 requests"):
        run(Scripted({0: Verdict.HOLD}), (0.0, 4, 1))
    with pytest.raises(RuntimeError, match="scripted keeps 1 requests"):
        run(Scripted({0: Verdict.HOLD}, scrape_seconds=1.0), (0.0, 4, 1))


def test_a_long_silence_between_requests_is_no_fault_of_the_policy() -> None:
    outcome = run(Scripted({0: Verdict.HOLD}, scrape_seconds=10.0, rulings=[(1.0, Ruling(0, Verdict.REFUSE))]),
                  (0.0, 4, 1), (2000.0, 4, 1))  # fmt: skip
    assert outcome.fates[1].ttft == pytest.approx(0.1)


def test_a_scrape_shows_the_end_of_the_last_step() -> None:
    policy = Scripted(scrape_seconds=0.25)
    run(policy, (0.0, 8, 4), (0.01, 8, 4))
    empty, second = policy.views[:2]
    assert empty.engine.blocks == 9
    assert empty.scrape is not None
    assert (empty.scrape.running, empty.scrape.kv_cache_usage) == (0, 0.0)
    assert second.scrape is not None
    assert second.scrape.taken_at == 0.25
    assert (second.scrape.running, second.scrape.waiting, second.scrape.kv_cache_usage) == (2, 0, 5 / 8)
    assert (second.scrape.prompt_tokens, second.scrape.generation_tokens) == (16, 3)


def test_progress_is_told_of_those_that_moved() -> None:
    policy = Scripted(progress_seconds=0.25)
    run(policy, (0.0, 4, 5))
    assert [each for each in policy.seen if each[0] == "progress"] == [("progress", 0.25, {0: 2})], "then it was over"


def test_preempted_work_is_counted_as_done_again() -> None:
    outcome = run(Scripted(), (0.0, 8, 12), (0.0, 8, 12), (0.0, 8, 12))
    assert outcome.counters.num_preemptions >= 1
    assert outcome.peak_usage == 1.0
    lost = outcome.counters.recomputed_tokens
    assert outcome.recomputed_percent == pytest.approx(100 * lost / outcome.counters.computed_tokens)
    assert outcome.counters.computed_tokens == 3 * (8 + 12 - 1) + lost, "the last token of an output is never computed"


@pytest.mark.parametrize("name", NAMES)
def test_the_traces_are_whole(name: str) -> None:
    trace = load(name)
    assert len(trace) == {"conv": 19366, "code": 8819}[name]
    assert trace[0].at == 0.0
    assert all(one.at <= two.at for one, two in pairwise(trace))
    assert trace[-1].at == pytest.approx({"conv": 3501.7, "code": 3435.9}[name], abs=0.1)


def test_a_trace_file_is_read_by_its_columns(tmp_path: Path) -> None:
    (tmp_path / "azure23_conv.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n"
    )
    assert load("conv", tmp_path) == [Line(0.0, 374, 44), Line(pytest.approx(4.314579, abs=1e-6), 396, 109)]


def test_a_run_has_the_rate_and_its_seed() -> None:
    trace = load("code")
    run_ = arrivals(trace, rate=4.0, seed=1)
    assert len(run_) == pytest.approx(0.9 * len(trace), rel=0.02)
    assert len(run_) / run_[-1].at == pytest.approx(4.0)
    assert run_ == arrivals(trace, rate=4.0, seed=1)
    assert [each.prompt_tokens for each in run_] != [each.prompt_tokens for each in arrivals(trace, rate=4.0, seed=2)]
    assert all(one.at <= two.at for one, two in pairwise(run_))
    assert len(arrivals(trace, rate=4.0, seed=1, share=0.1)) == pytest.approx(0.09 * len(trace), rel=0.1)


def test_nobody_announces_less_than_the_answer() -> None:
    run_ = arrivals(load("code"), rate=4.0, seed=1)
    assert {each.max_tokens for each in run_} == set(CEILINGS)
    assert all(each.max_tokens >= each.output_tokens for each in run_)


def test_our_admission_loses_less_than_none_under_overload() -> None:
    config = EngineConfig(
        num_gpu_blocks=601, block_size=16, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8192
    )
    step_time = StepTime(base=0.02, per_prefill_token=1e-4, per_decode=0.0, per_context_token=1e-7)
    load_ = [
        Arrival(each.at, min(each.prompt_tokens, 4000), each.output_tokens, each.max_tokens)
        for each in arrivals(load("conv"), rate=4.0, seed=1, share=0.02)
    ]
    engine = Engine(blocks=601, block_size=16, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8192)
    without = replay(load_, policy=Unlimited(), config=config, step_time=step_time)
    ours = replay(
        load_,
        policy=Kvplane(ttft_seconds=2.0, tpot_seconds=0.05, engine=engine),
        config=config,
        step_time=step_time,
    )
    goals = {"ttft_seconds": 2.0, "tpot_seconds": 0.05}
    assert ours.goodput_percent(**goals) > without.goodput_percent(**goals) + 20
    assert ours.recomputed_percent < without.recomputed_percent
    assert len(ours.fates) == len(load_)

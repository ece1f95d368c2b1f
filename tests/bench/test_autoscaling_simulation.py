"""The fluid engine keeps its books, agrees with the engine that plans every step, and the fleet around it costs what it should."""

import math
import random
from dataclasses import dataclass, replace

import pytest

from bench.admission.workload import Arrival
from bench.autoscaling.clairvoyant import needs
from bench.autoscaling.policies.fixed import Clairvoyant, Static
from bench.autoscaling.policies.wva import WvaV1
from bench.autoscaling.replica import Engine, Gate, Goals, Job, Replica, engine_of
from bench.autoscaling.scalers import OurScaler, PeerScaler, Seen
from bench.autoscaling.simulate import Outcome, World, simulate
from bench.engine import simulate as steps
from bench.engine.load import Job as StepJob
from bench.engine.model import EngineConfig, StepTime
from bench.engine.presets import PRESETS
from kvplane_operator.autoscaler.settings import Settings

TIME = StepTime(base=0.01, per_prefill_token=1e-5, per_decode=0.0, per_context_token=0.0)
ENGINE = Engine(kv_tokens=10_000, max_sequences=64, max_batched_tokens=1000, step_time=TIME)
GATE = Gate(ttft_seconds=2.0)


def job(prompt: int = 1000, output: int = 11, at: float = 0.0) -> Job:
    return Job(at, prompt, output)


def worked(*jobs: Job, engine: Engine = ENGINE, gate: Gate | None = None, seconds: float = 60.0) -> Replica:
    """All offered at once, and worked on."""
    replica = Replica(engine, gate)
    for each in jobs:
        replica.offer(each, 0.0)
    for step in range(round(seconds / 0.5)):
        replica.advance(0.5 * step, 0.5)
    return replica


class TestFluid:
    def test_a_lone_request_takes_its_steps(self) -> None:
        """1,000 tokens in one step of 20 ms, then ten steps of 10 ms."""
        one = job()
        worked(one)
        assert one.first_at == pytest.approx(0.02)
        assert one.done_at == pytest.approx(0.12)

    def test_prompts_come_in_order_and_decodes_go_on_beside_them(self) -> None:
        first, second = job(output=3), job(prompt=500, output=2)
        worked(first, second)
        assert first.first_at is not None
        assert second.first_at is not None
        assert first.first_at < second.first_at
        assert first.done_at is not None

    def test_a_long_prompt_comes_in_chunks(self) -> None:
        long = job(prompt=5000, output=1)
        worked(long)
        assert long.first_at == pytest.approx(0.1)

    def test_the_context_slows_a_step(self) -> None:
        slow = replace(ENGINE, step_time=replace(TIME, per_context_token=1e-5))
        one = job()
        worked(one, engine=slow)
        assert one.done_at is not None
        assert one.done_at > 0.12 + 10 * 0.01

    def test_nothing_is_left_in_the_books(self) -> None:
        random_ = random.Random(1)  # noqa: S311
        jobs = [job(random_.randint(1, 3000), random_.randint(1, 300)) for _ in range(100)]
        replica = worked(*jobs, seconds=600.0)
        assert all(each.done_at is not None for each in jobs)
        assert (replica.running, len(replica.waiting)) == (0, 0)
        assert (replica.context, replica.reserved) == (0.0, 0.0)
        assert replica.totals.prompt_tokens == sum(each.prompt for each in jobs)
        assert replica.totals.admitted >= len(jobs)  # once more for one that lost its place within its prompt

    def test_memory_is_never_exceeded_and_the_newest_pays(self) -> None:
        jobs = [job(prompt=2000, output=1500) for _ in range(4)]
        replica = Replica(ENGINE, None)
        for each in jobs:
            replica.offer(each, 0.0)
        now = 0.0
        while now < 120.0:
            replica.advance(now, 0.5)
            now += 0.5
            assert replica.context <= ENGINE.kv_tokens + 64 or replica.running == 1
        assert replica.totals.lost_tokens > 0
        assert all(each.done_at is not None for each in jobs)
        assert jobs[0].done_at is not None
        assert jobs[3].done_at is not None
        assert jobs[0].done_at < jobs[3].done_at

    def test_the_gate_keeps_what_would_not_fit(self) -> None:
        """Two of three are expected to fit, 2,256 tokens each."""
        jobs = [job(prompt=2000, output=200) for _ in range(4)]
        small = replace(ENGINE, kv_tokens=6000)
        replica = worked(*jobs, engine=small, gate=Gate(ttft_seconds=1000.0))
        assert replica.totals.lost_tokens == 0
        assert all(each.done_at is not None for each in jobs)

    def test_the_gate_refuses_whom_waiting_cannot_help(self) -> None:
        jobs = [job(prompt=3000, output=2000) for _ in range(20)]
        replica = worked(*jobs, gate=GATE, seconds=10.0)
        assert replica.totals.refused > 0
        assert replica.totals.refused == sum(each.refused for each in jobs)
        assert replica.totals.shed_tokens > 0
        assert all(each.first_at is None for each in jobs if each.refused)

    def test_what_is_cached_is_neither_computed_nor_held_but_counted(self) -> None:
        """500 tokens in one step of 15 ms, then ten steps of 10 ms."""
        one = Job(0.0, 1000, 11, cached=500)
        replica = worked(one)
        assert (one.first_at, one.done_at) == pytest.approx((0.015, 0.115))
        assert (replica.totals.prompt_tokens, replica.totals.prefix_hits_tokens) == (1000, 500)
        assert replica.context == 0.0

    def test_where_prompts_are_cached_more_of_them_fit(self) -> None:
        def running(cached: int) -> int:
            replica = Replica(ENGINE, None)
            for _ in range(20):
                replica.offer(Job(0.0, 1000, 500, cached=cached), 0.0)
            return replica.running

        assert running(cached=0) == 10
        assert running(cached=500) == 20

    def test_a_forward_pass_tells_what_is_in_a_step(self) -> None:
        """A request that decodes beside two prompts of which 1,000 tokens less one fit into a step."""
        replica = Replica(ENGINE, None)
        assert replica.forward_pass() is None
        replica.offer(job(prompt=100, output=50), 0.0)
        replica.advance(0.0, 0.1)
        for prompt in (600, 2000):
            replica.offer(job(prompt=prompt), 0.1)
        step = replica.forward_pass()
        assert step is not None
        assert (step.prompts, step.decodes, step.prompt_tokens) == (2, 1, 999.0)
        assert step.decode_kv_tokens == pytest.approx(replica.context)
        assert step.seconds == pytest.approx(0.01 + 999 * 1e-5)

    def test_without_a_gate_nobody_is_refused(self) -> None:
        assert worked(*[job(prompt=3000, output=2000) for _ in range(20)], seconds=10.0).totals.refused == 0


def test_the_fluid_agrees_with_the_engine_that_plans_every_step() -> None:
    """Poisson arrivals at a middling load: mean latency within a tenth, and the end within a twentieth."""
    random_ = random.Random(7)  # noqa: S311
    config = EngineConfig(
        num_gpu_blocks=2001, block_size=16, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8192
    )
    time = StepTime(base=0.02, per_prefill_token=1e-4, per_decode=1e-4, per_context_token=1e-7)
    at, planned = 0.0, []
    for _ in range(300):
        at += random_.expovariate(1.5)
        planned.append(StepJob(at, random_.randint(100, 2000), random_.randint(10, 300)))
    exact = steps.simulate(planned, config=config, step_time=time, frontend_seconds=0.0)
    fluid = Replica(Engine(32_000, 64, 2048, time), None)
    jobs = [Job(each.at, each.prompt_tokens, each.output_tokens) for each in planned]
    now, coming = 0.0, 0
    while any(each.done_at is None for each in jobs):
        while coming < len(jobs) and jobs[coming].at <= now + 0.05:
            fluid.advance(now, jobs[coming].at - now)
            now = jobs[coming].at
            fluid.offer(jobs[coming], now)
            coming += 1
        fluid.advance(now, 0.05)
        now += 0.05
    ttft = [each.first_at - each.at for each in jobs if each.first_at is not None]
    done = [each.done_at for each in jobs if each.done_at is not None]
    tpot = [
        (each.done_at - each.first_at) / (each.output - 1)
        for each in jobs
        if each.done_at is not None and each.first_at is not None
    ]
    assert sum(tpot) / len(tpot) == pytest.approx(sum(exact.tpot) / len(exact.tpot), rel=0.1)
    assert sum(ttft) / len(ttft) == pytest.approx(sum(exact.ttft) / len(exact.ttft), rel=0.35)
    assert max(done) == pytest.approx(exact.seconds, rel=0.05)


def arrivals(rate: float, seconds: float, *, seed: int = 1, prompt: int = 500, output: int = 50) -> list[Arrival]:
    random_ = random.Random(seed)  # noqa: S311
    made, at = [], random_.expovariate(rate)
    while at < seconds:
        made.append(Arrival(at, prompt, output, max_tokens=512))
        at += random_.expovariate(rate)
    return made


WORLD = World(engine=ENGINE, gated=True, startup_seconds=60.0, scrape_seconds=5.0)


def static(replicas: int, *, rate: float = 5.0, seconds: float = 600.0, world: World = WORLD) -> Outcome:
    scaler = PeerScaler(Static(replicas), lowest=1, highest=20)
    return simulate(arrivals(rate, seconds), replace(world, begin_replicas=replicas), scaler)


class TestFleet:
    def test_static_replicas_cost_their_time(self) -> None:
        outcome = static(3)
        assert outcome.hours == pytest.approx(3 * 600 / 3600, rel=0.02)
        assert outcome.reversals_per_hour == 0.0

    def test_an_easy_load_is_served(self) -> None:
        assert static(2).goodput_percent == pytest.approx(100.0, abs=0.5)

    def test_more_replicas_serve_more(self) -> None:
        met = [static(each, rate=60.0, seconds=120.0).goodput_percent for each in (1, 2, 4)]
        assert met == sorted(met)
        assert met[0] < met[2]

    def test_a_part_of_a_run_is_judged_by_who_came_in_it(self) -> None:
        outcome = static(2)
        halves = [outcome.goodput_between(begin, begin + 300) for begin in (0.0, 300.0)]
        assert min(halves) <= outcome.goodput_percent <= max(halves)

    def test_replicas_ready_over_a_part_of_a_run(self) -> None:
        outcome = simulate(arrivals(5.0, 600.0), WORLD, PeerScaler(Static(2), lowest=1, highest=20))
        assert outcome.ready_between(100.0, 200.0) == ((0.0, 2),)
        (first, later) = outcome.ready_between(10.0, 200.0)
        assert first == (0.0, 1)
        assert later == (pytest.approx(50.0, abs=1.0), 2)

    def test_the_same_again_is_the_same(self) -> None:
        one, other = static(2), static(2)
        assert (one.goodput_percent, one.hours, one.counts) == (other.goodput_percent, other.hours, other.counts)

    def test_a_replica_serves_after_its_start_and_costs_from_before(self) -> None:
        scaler = PeerScaler(Static(2), lowest=1, highest=20)
        outcome = simulate(arrivals(5.0, 600.0), WORLD, scaler)
        assert outcome.seconds_to(2, since=0.0) == pytest.approx(60.0, abs=1.0)
        assert outcome.hours == pytest.approx(2 * 600 / 3600, rel=0.02)

    def test_goals_are_both_of_them(self) -> None:
        strict = replace(WORLD, goals=Goals(ttft_seconds=2.0, tpot_seconds=0.005))
        assert static(2, world=strict).goodput_percent < 5.0

    def test_a_silent_scrape_leaves_the_old_figures(self) -> None:
        silent = replace(WORLD, silent=((100.0, 200.0),), begin_replicas=2)
        scaler = OurScaler(Settings(max_replicas=10))
        assert simulate(arrivals(5.0, 300.0), silent, scaler).goodput_percent == pytest.approx(100.0, abs=0.5)


@dataclass
class Watching:
    """Keeps what it is shown."""

    shown: list[list[Seen]]
    name: str = "watching"
    tick_seconds: float = 5.0

    def decide(self, asked: int, replicas: list[Seen], now: float) -> int:
        self.shown.append(replicas)
        return 3 if now < 300 else 1


def test_what_a_scaler_is_shown() -> None:
    watching = Watching([])
    simulate(arrivals(5.0, 600.0), replace(WORLD, scrape_seconds=15.0), watching)
    first, late, last = watching.shown[1], watching.shown[30], watching.shown[-1]
    assert [seen.ready for seen in first] == [True, False, False]
    assert [seen.scraped is None for seen in first] == [False, True, True]
    assert [seen.ready for seen in late] == [True] * 3
    assert len(last) == 1
    ages = [
        5.0 * number - seen.scraped.at for number, each in enumerate(watching.shown) for seen in each if seen.scraped
    ]
    assert min(ages) >= 0.0
    assert max(ages) <= 15.5


@pytest.mark.parametrize("gated", [True, False])
def test_our_law_follows_a_step(gated: bool) -> None:
    """From 10 to 90 requests a second, with an engine that takes some 40."""
    late = [replace(each, at=each.at + 600) for each in arrivals(90.0, 300.0, seed=2)]
    world = replace(WORLD, gated=gated)
    outcome = simulate([*arrivals(10.0, 600.0), *late], world, OurScaler(Settings(max_replicas=10)))
    asked = [asked for at, asked, _ in outcome.counts if 600 <= at <= 640]
    assert max(asked) >= 2
    assert outcome.ready_at(850.0) >= 2


def test_prefix_hits_are_shown() -> None:
    watching = Watching([])
    simulate(arrivals(5.0, 60.0), replace(WORLD, cached_share=0.5), watching)
    scraped = watching.shown[-1][0].scraped
    assert scraped is not None
    assert scraped.prefix_hits_tokens == scraped.prompt_tokens / 2 > 0


def test_what_became_of_answers_is_shown() -> None:
    watching = Watching([])
    outcome = simulate(arrivals(5.0, 60.0), replace(WORLD, goals=Goals(tpot_seconds=0.0)), watching)
    scraped = watching.shown[-1][0].scraped
    assert scraped is not None
    one = [job for job in outcome.jobs if job.output < 2]
    assert scraped.kept <= len(one) < scraped.broken + scraped.kept <= len(outcome.jobs)


def test_a_peer_is_kept_within_the_bounds() -> None:
    scaler = PeerScaler(Static(50), lowest=1, highest=4)
    assert scaler.decide(1, [], 0.0) == 4
    assert PeerScaler(WvaV1(), lowest=2, highest=4).decide(1, [], 0.0) == 2


class TestClairvoyant:
    def test_needs_are_known_before_they_come(self) -> None:
        """3,000 tokens for ten seconds from the hundredth on, where a replica may hold 2,500."""
        burst = [Arrival(100.0, 900, 200, max_tokens=512) for _ in range(3)]
        needed = needs(burst, ENGINE, Goals(tpot_seconds=0.05), share=0.25)
        assert [needed(at, at + 1) for at in (0.0, 98.0, 105.0, 120.0)] == [1, 1, 2, 1]
        assert needed(0.0, 1000.0) == 2
        assert needed(5000.0, 6000.0) == 1

    def test_prompts_need_replicas_too(self) -> None:
        """400,000 tokens in a second are 4 s of work, and two seconds are allowed; they are gone before they hold much."""
        burst = [Arrival(10.0, 4000, 1, max_tokens=256) for _ in range(100)]
        needed = needs(burst, replace(ENGINE, kv_tokens=10**9), Goals(), share=0.8)
        assert needed(10.0, 10.0) == 3

    def test_it_is_there_in_time(self) -> None:
        """A step that one replica does not serve: the others are ready when it comes."""
        late = [replace(each, at=each.at + 300) for each in arrivals(60.0, 120.0, seed=2)]
        traffic = [*arrivals(1.0, 300.0), *late]
        needed = needs(traffic, ENGINE, WORLD.goals, share=0.7)
        assert needed(310.0, 400.0) > needed(100.0, 200.0) == 1
        scaler = PeerScaler(Clairvoyant(needed, startup_seconds=60.0), lowest=1, highest=20)
        outcome = simulate(traffic, WORLD, scaler)
        assert outcome.ready_at(305.0) >= needed(305.0, 306.0)


def test_presets_have_a_fluid() -> None:
    engine = engine_of(PRESETS["32b-h100"])
    assert engine.kv_tokens > 10_000
    assert math.isfinite(engine.step_time.base)

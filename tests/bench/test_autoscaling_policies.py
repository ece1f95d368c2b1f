"""The peers' laws decide as their sources do: the numbers are those of the sources' own tests, where they have any."""

from dataclasses import replace
from functools import reduce
from typing import Literal

import pytest

from bench.autoscaling.policies import aibrix, dynamo_model, dynamo_sla, hpa, keda, knative, kthena, kubeai, wva
from bench.autoscaling.policies.aibrix import Apa
from bench.autoscaling.policies.dynamo import Dynamo, decided
from bench.autoscaling.policies.dynamo_model import Constant, Kalman, Model, Plane
from bench.autoscaling.policies.dynamo_sla import DynamoSla
from bench.autoscaling.policies.fixed import Clairvoyant, Static
from bench.autoscaling.policies.hpa import HorizontalPodAutoscaler
from bench.autoscaling.policies.keda import Keda
from bench.autoscaling.policies.knative import Knative
from bench.autoscaling.policies.kthena import Kthena, Step
from bench.autoscaling.policies.kubeai import KubeAI
from bench.autoscaling.policies.wva import WvaV1, WvaV2
from bench.autoscaling.policy import Engine, Fleet, ForwardPass, Policy

EVERY: list[Policy] = [
    HorizontalPodAutoscaler(),
    Keda(),
    Knative(concurrency=10),
    KubeAI(target_requests=10),
    Apa(),
    Kthena(),
    WvaV1(),
    WvaV2(),
    Dynamo("throughput"),
    Dynamo("latency"),
    DynamoSla(),
]


def engine(
    kv: float = 0.5, waiting: int = 0, running: int = 5, *, waiting_prompt_tokens: int = 0, prompt: float = 100.0
) -> Engine:
    return Engine(
        name="e",
        kv_cache_usage=kv,
        running=running,
        waiting=waiting,
        waiting_prompt_tokens=waiting_prompt_tokens,
        kv_tokens=100_000,
        mean_prompt_tokens=prompt,
        forward_pass=ForwardPass(0.02 + 0.08 * kv, 100.0, 1, kv * 100_000, running) if running else None,
    )


def fleet(*engines: Engine | None, asked: int | None = None) -> Fleet:
    """Ready replicas, by default as many as are asked for."""
    return Fleet(len(engines) if asked is None else asked, engines)


def first(policy: Policy, seen: Fleet) -> int:
    """The first decision."""
    replicas, _ = policy.decide(seen, policy.start(seen, 0.0), 0.0)
    return replicas


def after(policy: Policy, *seen: Fleet) -> list[int]:
    """Decisions on these, a tick apart."""
    memory, decisions = policy.start(seen[0], 0.0), []
    for number, each in enumerate(seen):
        replicas, memory = policy.decide(each, memory, number * policy.tick_seconds)
        decisions.append(replicas)
    return decisions


class TestAll:
    @pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
    def test_without_metrics_nothing_changes(self, policy: Policy) -> None:
        assert first(policy, fleet(None, None, None)) == 3
        assert first(policy, fleet(asked=2)) == 2

    @pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
    def test_full_engines_ask_for_more(self, policy: Policy) -> None:
        full = engine(0.99, waiting=50, running=100, waiting_prompt_tokens=50_000, prompt=1000.0)
        assert max(after(policy, *[fleet(full, full)] * 60)) > 2

    @pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
    def test_empty_engines_ask_for_fewer_in_the_end(self, policy: Policy) -> None:
        light, empty = engine(0.1, running=2), engine(0.0, running=0)
        assert min(after(policy, *[fleet(light, light, light)] * 5, *[fleet(empty, empty, empty)] * 200)) < 3

    @pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
    def test_nobody_goes_to_zero(self, policy: Policy) -> None:
        assert min(after(policy, *[fleet(engine(0.0, running=0))] * 200)) == 1

    def test_names_are_told_apart(self) -> None:
        assert len({policy.name for policy in EVERY}) == len(EVERY)


class TestFixed:
    def test_static_is_static(self) -> None:
        assert after(Static(3), fleet(engine(0.0)), fleet(engine(1.0), asked=9)) == [3, 3]

    def test_the_clairvoyant_looks_a_start_and_a_decision_ahead(self) -> None:
        policy = Clairvoyant(needed=lambda begin, end: 7 if begin <= 64.0 <= end else 2, startup_seconds=60.0)
        assert policy.decide(fleet(), None, 0.0) == (7, None)
        assert policy.decide(fleet(), None, 65.0) == (2, None)


class TestHpa:
    @pytest.mark.parametrize(
        ("values", "target", "silent", "current", "replicas"),
        [
            ([20, 10, 30], 15, 0, 3, 4),  # TestReplicaCalcScaleUpCM
            ([12] * 5, 20, 0, 5, 3),  # TestReplicaCalcScaleDownCM
            ([8600], 4400, 0, 1, 2),  # TestReplicaCalcScaleUpCMExternal
            ([20.0, 20.001, 21.0], 20, 0, 3, 3),  # TestToleranceCM
            ([50, 70], 30, 1, 3, 4),  # TestReplicaCalcScaleUpUnreadyLessScale
            ([40], 30, 2, 3, 3),  # TestReplicaCalcScaleUpUnreadyNoScale
        ],
    )
    def test_recommendation(self, values: list[float], target: float, silent: int, current: int, replicas: int) -> None:
        assert hpa.recommended(values, target=target, silent=silent, current=current) == replicas

    def test_pods_that_do_not_report_count_as_the_target_on_the_way_down(self) -> None:
        assert hpa.recommended([0.1] * 4, target=1.0, silent=4, current=8) == 5  # 4.4

    @pytest.mark.parametrize(
        ("current", "added", "limit"), [(3, 0, 7), (1, 0, 5), (10, 0, 20), (20, 10, 20), (6, 4, 6)]
    )
    def test_four_more_or_double_within_the_period(self, current: int, added: int, limit: int) -> None:
        assert hpa.up_limit(current, added) == limit

    def test_stabilised_over_five_minutes(self) -> None:
        """TestStabilizeDownscale: 10 were recommended 10 minutes ago, 4 a minute ago, 2 now."""
        memory = hpa.Memory(recommendations=((0.0, 10), (540.0, 4)))
        desired, memory = hpa.normalized(2, memory, current=4, now=600.0)
        assert desired == 4
        assert hpa.normalized(2, memory, current=4, now=841.0)[0] == 2

    def test_the_larger_metric_counts(self) -> None:
        assert first(HorizontalPodAutoscaler(), fleet(engine(0.7, waiting=8))) == 2
        assert first(HorizontalPodAutoscaler(), fleet(engine(0.9, waiting=0))) == 2

    def test_the_rate_counts_what_was_just_added(self) -> None:
        busy = engine(0.99, waiting=100)
        assert after(HorizontalPodAutoscaler(), fleet(busy), fleet(*[busy] * 5)) == [5, 10]


class TestKeda:
    @pytest.mark.parametrize(
        ("total", "per_replica", "current", "replicas"),
        [
            (8600, 2150, 3, 4),  # TestReplicaCalcScaleUpPerPodCMExternal
            (8600, 2867, 5, 3),  # TestReplicaCalcScaleDownPerPodCMExternal
            (8.6, 2.2, 4, 4),  # TestTolerancePerPodCMExternal
        ],
    )
    def test_recommendation(self, total: float, per_replica: float, current: int, replicas: int) -> None:
        assert keda.recommended(total, per_replica=per_replica, current=current) == replicas

    def test_one_replica_for_each_five_that_wait(self) -> None:
        assert first(Keda(), fleet(engine(waiting=7), engine(waiting=7))) == 3

    def test_taken_at_its_word_it_stops_at_two(self) -> None:
        written = Keda(aggregated=False)
        assert first(written, fleet(engine(waiting=7))) == 2
        assert first(written, fleet(engine(waiting=90), engine(waiting=90))) == 2


class TestKnative:
    TEN = knative.Spec(target=10, max_scale_up_rate=10, max_scale_down_rate=10)
    ONE = knative.Spec(target=1, max_scale_up_rate=10, max_scale_down_rate=10)
    CALM = knative.Memory()

    def pods(
        self,
        stable: float,
        panic: float,
        *,
        ready: int = 1,
        spec: knative.Spec = TEN,
        memory: knative.Memory = CALM,
        now: float = 0.0,
    ) -> int:
        return knative.scale(stable, panic, ready=ready, spec=spec, memory=memory, now=now)[0]

    @pytest.mark.parametrize(
        ("stable", "panic", "ready", "pods"),
        [
            (50, 10, 1, 5),  # TestAutoscalerStableModeIncreaseWithConcurrencyDefault
            (100, 10, 1, 10),
            (100, 100, 8, 10),  # TestAutoscalerStableModeDecrease
            (50, 50, 8, 5),
            (1, 0, 1, 1),  # TestAutoscalerStableModeNoTrafficScaleToZero
            (0, 0, 1, 0),
            (50, 50, 5, 5),  # AutoscalerStableModeNoChangeAlreadyScaled
            (50, 100, 1, 10),  # AutoscalerPanicModeDoublePodCount
            (1000, 1001, 1, 10),  # TestAutoscalerRateLimitScaleUp
            (1000, 1001, 10, 100),
            (1, 1, 100, 10),  # TestAutoscalerRateLimitScaleDown
            (1, 1, 10, 1),
            (1000, 888, 0, 10),  # TestAutoscalerUseOnePodAsMinimumIfEndpointsNotFound
        ],
    )
    def test_scale(self, stable: float, panic: float, ready: int, pods: int) -> None:
        assert self.pods(stable, panic, ready=ready) == pods

    def test_small_rates(self) -> None:
        """AutoscalerStableModeIncreaseWithSmallScaleUpRate, AutoscalerStableModeDecreaseWithSmallScaleDownRate."""
        up = knative.Spec(target=1, max_scale_up_rate=1.1, max_scale_down_rate=10)
        down = knative.Spec(target=10, max_scale_up_rate=10, max_scale_down_rate=1.1)
        assert self.pods(3, 3.1, ready=2, spec=up) == 3
        assert self.pods(1, 1, ready=100, spec=down) == 90

    @pytest.mark.parametrize(("stable", "panic", "pods"), [(50, 30, 50), (20, 30, 30)])
    def test_in_panic_the_larger_window_counts(self, stable: float, panic: float, pods: int) -> None:
        """AutoscalerPanicStableLargerThanPanic, AutoscalerPanicStableLessThanPanic."""
        panicking = knative.Memory(panic_since=-5.0, panic_pods=5)
        assert self.pods(stable, panic, ready=5, spec=self.ONE, memory=panicking) == pods

    def test_panic_ends_after_a_stable_window(self) -> None:
        """TestAutoscalerUnpanicAfterSlowIncrease."""
        pods, memory = knative.scale(11, 25, ready=10, spec=self.ONE, memory=self.CALM, now=0.0)
        assert (pods, memory.panic_since) == (25, 0.0)
        pods, memory = knative.scale(30, 41, ready=40, spec=self.ONE, memory=memory, now=30.0)
        assert (pods, memory.panic_since) == (41, 0.0)
        pods, memory = knative.scale(50, 56, ready=55, spec=self.ONE, memory=memory, now=62.0)
        assert (pods, memory.panic_since) == (50, None)

    def test_a_surge_that_lasts_prolongs_it(self) -> None:
        """TestAutoscalerExtendPanicWindow."""
        _, memory = knative.scale(11, 25, ready=10, spec=self.ONE, memory=self.CALM, now=0.0)
        pods, memory = knative.scale(30, 80, ready=40, spec=self.ONE, memory=memory, now=30.0)
        assert (pods, memory.panic_since) == (80, 30.0)

    def test_then_it_falls_off_a_cliff(self) -> None:
        """TestAutoscalerPanicThenUnPanicScaleDown."""
        _, memory = knative.scale(100, 1000, ready=10, spec=self.TEN, memory=self.CALM, now=0.0)
        pods, memory = knative.scale(1, 1, ready=10, spec=self.TEN, memory=memory, now=30.0)
        assert pods == 100
        assert self.pods(1, 1, ready=10, memory=memory, now=61.0) == 1

    def test_begins_in_panic_where_there_are_several(self) -> None:
        """TestStartInPanicMode."""
        policy = Knative(concurrency=10)
        assert policy.start(fleet(engine(), engine()), 0.0) == knative.Memory(panic_since=0.0, panic_pods=2)
        assert policy.start(fleet(engine()), 0.0).panic_since is None

    def test_never_below_one(self) -> None:
        assert after(Knative(concurrency=10), *[fleet(engine(running=0))] * 40)[-1] == 1


class TestKubeAI:
    @pytest.mark.parametrize(
        ("size", "values", "mean"),
        [(3, [1, 2, 3], 2), (3, [3, 2, 1], 2), (3, [3, 2, 1, 1, 1, 1], 1), (2, [2, 3], 2.5), (3, [2, 2, 2], 2)],
    )
    def test_mean_of_the_window(self, size: int, values: list[float], mean: float) -> None:
        history = (0.0,) * size
        for value in values:
            history = kubeai.noted(history, value)
        assert sum(history) / len(history) == mean

    def test_down_after_enough_lower_results_in_a_row(self) -> None:
        replicas, lower, taken = 3, 0, []
        for wanted in (2, 2, 3, 2, 2, 2, 2):
            replicas, lower = kubeai.settled(wanted, asked=replicas, lower=lower, required=3)
            taken.append(replicas)
        assert taken == [3, 3, 3, 3, 3, 3, 2]

    def test_a_burst_is_a_tenth_of_itself_after_a_minute(self) -> None:
        """Ten minutes of nothing weigh as much as any others."""
        busy = fleet(engine(running=90, waiting=10))
        assert after(KubeAI(target_requests=10), *[busy] * 60)[5::54] == [1, 10]


class TestAibrix:
    @pytest.mark.parametrize(
        ("current", "use", "up_rate", "down_rate", "replicas"),
        [
            (2, 45, 2, 2, 3),
            (2, 35, 2, 2, 3),
            (2, 90, 2, 2, 4),
            (2, 90, 2.5, 2, 5),
            (6, 20, 2, 2, 4),
            (6, 18, 2, 2, 4),
            (6, 10, 2, 2, 3),
            (6, 5, 2, 2.5, 2),
            (2, 33, 2, 2, 2),
            (2, 27, 2, 2, 2),
        ],
    )
    def test_target_replicas(self, current: int, use: float, up_rate: float, down_rate: float, replicas: int) -> None:
        """TestAPAAlgorithm_ComputeTargetReplicas, target 30."""
        got = aibrix.target_replicas(current, use=use, target=30, max_up_rate=up_rate, max_down_rate=down_rate)
        assert got == replicas

    def test_multiplies_what_is_asked_for_by_what_reports(self) -> None:
        assert first(Apa(kv_usage=0.5), fleet(engine(0.9), asked=3)) == 6


class TestKthena:
    @pytest.mark.parametrize(
        ("values", "target", "unready", "missing", "current", "tolerance", "replicas"),
        [
            ([500.0] * 3, 5.0, 0, 0, 3, 0.0, 300),
            ([19.1, 3.1, 7.1], 1.0, 0, 0, 3, 0.0, 30),
            ([0.51] * 10, 1.0, 0, 0, 9, 0.5, 9),
            ([0.49] * 10, 1.0, 0, 0, 9, 0.5, 5),
            ([1.49] * 10, 1.0, 0, 0, 9, 0.5, 9),
            ([1.51] * 10, 1.0, 0, 0, 9, 0.5, 16),
            ([0.15] * 8, 1.0, 50, 0, 58, 0.0, 2),
            ([3.9] * 8, 1.0, 10, 0, 18, 0.0, 32),
            ([3.9] * 8, 1.0, 50, 0, 58, 0.0, 58),
            ([105.0], 10.0, 0, 0, 10, 0.1, 11),
            ([0.5] * 8, 1.0, 0, 2, 10, 0.0, 6),
            ([2.9] * 8, 1.0, 0, 2, 10, 0.0, 24),
            ([2.9] * 8, 1.0, 0, 50, 58, 0.0, 58),
            ([2.9] * 8, 1.0, 0, 4, 58, 0.0, 58),
        ],
    )
    def test_recommendation(
        self,
        *,
        values: list[float],
        target: float,
        unready: int,
        missing: int,
        current: int,
        tolerance: float,
        replicas: int,
    ) -> None:
        """TestGetRecommendedInstances."""
        got = kthena.recommended(
            values, target=target, unready=unready, missing=missing, current=current, tolerance=tolerance
        )
        assert got == replicas

    @pytest.mark.parametrize(("value", "target"), [(1.0, 0.0), (1e100, 1e-100)])
    def test_a_target_of_nothing_asks_for_all(self, value: float, target: float) -> None:
        assert kthena.recommended([value], target=target, current=1, tolerance=0.0) == 1_000_000_000

    def test_no_metric_is_no_recommendation(self) -> None:
        assert kthena.recommended([], target=0.5, current=7, tolerance=0.1) is None

    @pytest.mark.parametrize(
        ("step", "recommended", "highest", "wanted", "replicas"),
        [
            (Step(1, 40), None, 10, 5, 6),
            (Step(1, 40, either=False), None, 10, 5, 9),
            (Step(2, 20), 9, 10, 5, 9),
            (Step(3, 25), None, 12, 3, 9),
            (Step(), None, 10, 5, 5),
        ],
    )
    def test_corrected_down(
        self, step: Step, recommended: int | None, highest: int, wanted: int, replicas: int
    ) -> None:
        """TestGetCorrectedInstances, from 10."""
        got = kthena.corrected_down(wanted, current=10, highest_recommended=recommended, highest=highest, step=step)
        assert got == replicas

    @pytest.mark.parametrize(
        ("step", "recommended", "current", "lowest", "wanted", "replicas"),
        [
            (Step(3, 100), None, 5, 5, 20, 10),
            (Step(3, 100, either=False), None, 5, 5, 20, 8),
            (Step(3, 100), 12, 5, 5, 20, 10),
            (Step(2, 50), None, 10, 6, 50, 10),
        ],
    )
    def test_corrected_up(
        self, *, step: Step, recommended: int | None, current: int, lowest: int, wanted: int, replicas: int
    ) -> None:
        """TestGetCorrectedInstances."""
        got = kthena.corrected_up(wanted, current=current, lowest_recommended=recommended, lowest=lowest, step=step)
        assert got == replicas

    @pytest.mark.parametrize(
        ("current", "lowest", "percent", "wanted", "replicas"),
        [(5, 5, 1000, 15, 15), (5, 5, 100, 15, 10), (10, 6, 100, 30, 12), (0, 0, 100, 5, 5), (10, 10, 1000, 3, 10)],
    )
    def test_corrected_in_panic(self, current: int, lowest: int, percent: int, wanted: int, replicas: int) -> None:
        """TestGetCorrectedInstances."""
        assert kthena.corrected_in_panic(wanted, current=current, lowest=lowest, percent=percent) == replicas

    def test_a_panic_holds_for_a_minute(self) -> None:
        busy, empty = engine(0.9, waiting=20), engine(0.0)
        got = after(Kthena(), fleet(busy), *[fleet(*[empty] * 4)] * 30)
        assert got[0] == 4
        assert min(got[1:5]) == 4
        assert got[-1] == 1


class TestWvaV1:
    @pytest.mark.parametrize(
        ("replicas", "up"),
        [
            ([(0.75, 2), (0.76, 2)], True),
            ([(0.50, 3), (0.50, 3)], True),
            ([(0.50, 1), (0.50, 1)], False),
            ([(0.85, 2), (0.50, 6), (0.90, 7)], True),
        ],
    )
    def test_up(self, replicas: list[tuple[float, float]], up: bool) -> None:
        """TestAnalyzeModelSaturation_ScaleUp, _AllSaturated."""
        assert wva.saturation(replicas).up is up

    @pytest.mark.parametrize(
        ("replicas", "safe"),
        [
            ([(0.20, 1), (0.30, 1), (0.25, 1)], True),
            ([(0.70, 2), (0.75, 2)], False),
            ([(0.50, 2)], False),
            ([(0.85, 2), (0.50, 6), (0.90, 7)], False),
        ],
    )
    def test_down_is_safe(self, replicas: list[tuple[float, float]], safe: bool) -> None:
        """TestAnalyzeModelSaturation_ScaleDownSafety, _AllSaturated."""
        assert wva.saturation(replicas).down_is_safe is safe

    def test_saturated_replicas_have_nothing_to_spare(self) -> None:
        """TestAnalyzeVariant_SaturatedReplicas."""
        assert wva.saturation([(0.85, 2), (0.50, 6), (0.60, 2)]).not_saturated == 1

    def test_one_at_a_time_and_locked_while_one_is_under_way(self) -> None:
        full, empty = engine(0.9), engine(0.1)
        assert first(WvaV1(), fleet(full, full)) == 3
        assert first(WvaV1(), fleet(full, full, asked=3)) == 3
        assert first(WvaV1(), fleet(empty, empty, empty)) == 2
        assert first(WvaV1(), fleet(empty, empty, empty, asked=4)) == 4


class TestWvaV2:
    def test_capacity_is_what_memory_allows_or_what_was_in_use_at_a_full_queue(self) -> None:
        """Its cases k1/k2 interaction, and k2 history."""
        history: tuple[float, ...] = ()
        capacity, history = wva.effective_capacity(kv_tokens=16_000, in_use=5000, waiting=0, full_queues=history)
        assert (capacity, history) == (12_800, ())
        capacity, history = wva.effective_capacity(kv_tokens=16_000, in_use=8000, waiting=6, full_queues=history)
        assert (capacity, history) == (8000, (8000,))
        capacity, _ = wva.effective_capacity(kv_tokens=16_000, in_use=6000, waiting=2, full_queues=history)
        assert capacity == 8000
        capacity, _ = wva.effective_capacity(kv_tokens=16_000, in_use=4000, waiting=10, full_queues=())
        assert capacity == 4000

    def test_the_last_ten_full_queues_count(self) -> None:
        history: tuple[float, ...] = ()
        for tokens in range(1, 16):
            _, history = wva.effective_capacity(kv_tokens=16_000, in_use=tokens, waiting=5, full_queues=history)
        assert sum(history) / len(history) == pytest.approx(10.5)  # 6 to 15

    def test_what_is_under_way_counts_for_up_and_not_for_down(self) -> None:
        """Its cases Pending replicas."""
        assert wva.required(10_000, replicas=2, capacity=12_800) == 0
        assert wva.required(10_000, replicas=0, capacity=12_800) == 1
        assert wva.spare(1000, ready=2, capacity=12_800) == 1

    def test_up_by_as_many_as_are_required(self) -> None:
        """90,000 in use and 4 x 5,000 waiting; 80,000 each: 129,412 over 80,000, less one."""
        assert first(WvaV2(), fleet(engine(0.9, waiting=4, prompt=5000.0))) == 2
        assert first(WvaV2(), fleet(engine(0.9, waiting=4, prompt=50_000.0))) == 5


class TestDynamo:
    @pytest.mark.parametrize(
        ("utilizations", "target", "workers"),
        [
            ([1.1], "throughput", 2),
            ([0.4, 0.4], "throughput", 1),
            ([0.7, 0.7], "throughput", 2),
            ([0.45], "latency", 2),
            ([0.05, 0.05], "latency", 1),
            ([0.5, 1.1], "throughput", 3),
            ([0.2, 0.7], "throughput", 2),
            ([0.2, 0.3, 0.25], "throughput", 2),
            ([0.3], "throughput", 1),
        ],
    )
    def test_any_above_all_below(
        self, utilizations: list[float], target: Literal["throughput", "latency"], workers: int
    ) -> None:
        """TestDecodeThroughputEasy, TestDecodeLatencyEasy, TestAnyUpAllDown."""
        assert decided(utilizations, workers=len(utilizations), target=target) == workers

    def test_queued_prompts_count(self) -> None:
        """TestAggEasy: 20,000 in use and 90,000 queued of 100,000."""
        assert first(Dynamo(), fleet(engine(0.2, waiting_prompt_tokens=90_000))) == 2

    def test_one_replica_under_way_blocks(self) -> None:
        """TestScalingInProgress."""
        assert first(Dynamo(), fleet(engine(1.0, waiting_prompt_tokens=90_000), asked=2)) == 2


TRAINED = [(100.0, 1000.0), (200.0, 2000.0), (300.0, 3000.0), (400.0, 4000.0), (500.0, 5000.0)]
"""Prompt tokens and KV tokens of _train_agg, which move together."""


def taught(*loads: tuple[float, float], most: int = dynamo_model.SAMPLES) -> Model:
    """A model that saw these steps, each with one prompt and ten decodes, of 1 ms, 1 ms a prompt token, 0.1 ms a KV token."""
    steps = [ForwardPass(0.001 * prompt + 0.0001 * kv + 0.001, prompt, 1, kv, 10) for prompt, kv in loads]
    return reduce(lambda model, step: dynamo_model.noted(model, step, most=most), steps, Model())


class TestDynamoModel:
    def test_too_few_steps_tell_nothing(self) -> None:
        """TestAggRegressionModel.test_insufficient_data, .test_heartbeat_skipped."""
        assert dynamo_model.fitted(taught(*TRAINED[:4]).samples) is None
        idle = dynamo_model.noted(Model(), None)
        assert idle == Model()

    def test_loads_that_move_together_share_the_time(self) -> None:
        """Its test_2d_regression: on the line of the steps seen both parts are right together, beside it by least norm."""
        model = taught(*TRAINED)
        plane = dynamo_model.fitted(model.samples)
        assert plane is not None
        first = dynamo_model.first_token_seconds(plane, model.prompt, queued=0, kv_tokens=3000, budget=2048)
        assert first == pytest.approx(0.601)
        assert plane.seconds(model.chunk, 3000 + model.context) == pytest.approx(0.660406, rel=1e-5)

    def test_loads_that_do_not_are_told_apart(self) -> None:
        plane = dynamo_model.fitted(taught(*TRAINED, (500.0, 1000.0), (100.0, 5000.0)).samples)
        assert plane is not None
        assert (plane.base, plane.per_prompt_token, plane.per_kv_token) == pytest.approx((0.001, 0.001, 0.0001))

    def test_more_work_in_less_time_is_no_fit(self) -> None:
        falling = [(100.0 * at, 0.0, 1.0 / at) for at in range(1, 9)]
        assert dynamo_model.fitted(falling) is None

    def test_a_long_queue_comes_in_steps(self) -> None:
        """5,000 queued and 300 of its own: two steps of 2,048 tokens, one of 1,204."""
        plane = Plane(0.01, 1e-4, 0.0)
        seconds = dynamo_model.first_token_seconds(plane, 300.0, queued=5000, kv_tokens=0, budget=2048)
        assert seconds == pytest.approx(0.56)

    def test_the_fullest_bucket_loses_its_oldest(self) -> None:
        """TestBucketedRetirement.test_2d_bucketed_retirement."""
        grid, same = [(100.0, 500.0), (200.0, 1000.0), (300.0, 1500.0), (400.0, 2000.0)], [(100.0, 500.0)] * 4
        model = taught(*grid, *same, (350.0, 1800.0), most=8)
        assert len(model.samples) == 8
        assert sum(sample[:2] == (100.0, 500.0) for sample in model.samples) == 4

    @pytest.mark.parametrize(
        ("plane", "more", "rate"),
        [
            (Plane(0.01, 0.0, 0.0), {}, 500.0),  # 50 sequences, ten steps each
            (Plane(0.01, 0.0, 1e-5), {}, 38 / 0.499),  # of 39 a step takes 51 ms
            (Plane(0.01, 0.0, 1e-5), {"itl_seconds": 0.001}, 1 / 0.1105),  # unreachable: what one stream takes
            (Plane(0.01, 0.0, 0.0), {"kv_tokens": 500}, 40.0),
            (Plane(0.01, 0.0, 0.0), {"budget": 30}, 200.0),  # 20 leave ten tokens of a step for the next prompt
            (Plane(0.01, 0.0, 0.0), {"prompt": 0.0}, 0.0),
        ],
    )
    def test_capacity(self, plane: Plane, more: dict[str, float], rate: float) -> None:
        limits: dict[str, float] = {
            "prompt": 100.0, "output": 10.0, "kv_tokens": 10_000, "max_sequences": 50, "budget": 1000,
            "ttft_seconds": 2.0, "itl_seconds": 0.05,
        }  # fmt: skip
        found = dynamo_model.capacity(plane, 0.0, **{**limits, **more})  # type: ignore[arg-type]
        assert found == pytest.approx(rate, rel=1e-3)

    def test_the_last_value_until_there_are_enough(self) -> None:
        """TestKalmanPredictor.test_uses_last_value_until_minimum_points, with its noise."""
        kalman = Kalman(level_noise=1e-4, trend_noise=1e-5, noise=0.1, least=3)
        assert kalman.forecast() == 0.0
        kalman = kalman.seen(10.0)
        assert kalman.forecast() == 10.0
        kalman = kalman.seen(20.0)
        assert kalman.forecast() == 20.0
        assert kalman.seen(30.0).forecast() == pytest.approx(40.0, abs=1.0)

    def test_never_less_than_nothing(self) -> None:
        """Its test_predict_returns_non_negative_on_declining_traffic."""
        kalman = Kalman(level_noise=1e-4, trend_noise=1e-5, noise=0.1, least=3)
        for value in (10.0, 15.0, 20.0, 15.0, 10.0, 5.0, 2.0, 1.0, 0.0):
            kalman = kalman.seen(value)
            assert kalman.forecast() >= 0.0

    def test_silence_before_the_first_value_does_not_count(self) -> None:
        """TestConstantPredictor.test_skips_leading_zeros, .test_does_not_skip_zeros_after_nonzero."""
        assert Kalman().seen(0.0).count == 0
        assert Constant().seen(0.0) == Constant()
        assert Constant().seen(5.0).seen(0.0).forecast() == 0.0


class TestDynamoSla:
    FLAT = Plane(0.04, 0.0, 0.0)
    GOALS = dynamo_sla.Goals()

    def workers(self, *engines: Engine, plane: Plane = FLAT) -> int:
        return dynamo_sla.decided(plane, Model(prompts=(100.0,)), engines, self.GOALS)

    def test_up_where_all_would_miss_the_first_tokens_goal(self) -> None:
        """150,100 tokens in steps of 2,048 are 74, of 40 ms each."""
        late, idle = engine(0.0, waiting_prompt_tokens=150_000), engine(0.0)
        assert self.workers(late, late) == 3
        assert self.workers(late, idle) == 2

    def test_up_where_all_would_miss_the_next_tokens_goal(self) -> None:
        assert self.workers(engine(0.0), plane=Plane(0.06, 0.0, 0.0)) == 2

    def test_down_where_the_others_could_take_it(self) -> None:
        quick = Plane(0.02, 0.0, 0.0)
        assert self.workers(engine(0.4), engine(0.4), plane=quick) == 1
        assert self.workers(engine(0.6), engine(0.6), plane=quick) == 2  # 120,000 tokens for 100,000 places
        assert self.workers(engine(0.4), engine(0.4), plane=Plane(0.045, 0.0, 0.0)) == 2  # above 0.8 of the goal
        assert self.workers(engine(0.0), plane=quick) == 1

    def test_a_queue_of_one_keeps_all(self) -> None:
        """Doubled, 80,100 tokens are 0.8 s in steps of 20 ms, and 0.8 of 1.98 s is free; 200,100 are 2 s."""
        quick = Plane(0.02, 0.0, 0.0)
        short, long = (engine(0.0, waiting_prompt_tokens=tokens) for tokens in (40_000, 100_000))
        assert self.workers(short, engine(0.0), plane=quick) == 1
        assert self.workers(long, engine(0.0), plane=quick) == 2

    def test_one_replica_under_way_blocks(self) -> None:
        slow = engine(0.99, waiting_prompt_tokens=200_000)
        assert after(DynamoSla(), *[fleet(slow, slow, asked=3)] * 10) == [3] * 10
        assert after(DynamoSla(), *[fleet(slow, slow)] * 10)[-1] == 3

    def test_the_forecast_sets_a_floor(self) -> None:
        """10 requests a second, of 100 and 1,000 tokens: 166 fit, a step takes 40 ms, so one engine takes 4.15 a second."""

        def seen(seconds: int) -> Fleet:
            step = ForwardPass(0.04, 100.0, 1, 0.0, 5)
            came = 10.0 * seconds
            counted = replace(
                engine(0.0),
                forward_pass=step,
                admitted_total=0.75 * came,
                refused_total=0.25 * came,
                prompt_tokens_total=100 * 0.75 * came,
                generation_tokens_total=1000 * 0.75 * came,
            )
            return fleet(counted)

        decisions = after(DynamoSla(forecast=Constant()), *[seen(5 * tick) for tick in range(40)])
        assert decisions == [1] * 37 + [3] * 3
        assert set(after(DynamoSla(forecast=None), *[seen(5 * tick) for tick in range(40)])) == {1}


def test_nothing_over_nothing_is_nothing() -> None:
    assert kthena.recommended([0.0], target=0.0, current=1, tolerance=0.1) == 0

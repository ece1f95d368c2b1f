"""The peers' policies decide as their sources do: the numbers are those of the sources' own tests, where they have any."""

import pytest

from bench.admission.policies.held import HeldRequests
from bench.admission.policies.kaito import QueueDepthGuard
from bench.admission.policies.llmd import ConcurrencyDetector, FlowControl, UtilizationDetector, estimate_output
from bench.admission.policies.reservations import (
    Running,
    prompt_and_fixed,
    prompt_and_maximum,
    prompt_and_ratio,
    reserve_maximum,
)
from bench.admission.policies.unlimited import Unlimited
from bench.admission.policies.vllm_caps import QueueCaps
from bench.admission.policy import Engine, Policy, Request, Ruling, Scrape, Verdict, View

ENGINE = Engine(blocks=97, block_size=32, max_num_seqs=4, max_num_batched_tokens=2048, max_model_len=2048)


def _request(number: int = 0, *, prompt: int = 100, maximum: int | None = None, arrived: float = 0.0) -> Request:
    return Request(id=number, arrived=arrived, prompt_tokens=prompt, max_tokens=maximum)


def _scrape(*, waiting: int = 0, usage: float = 0.0, taken_at: float = 0.0) -> Scrape:
    return Scrape(
        taken_at=taken_at,
        kv_cache_usage=usage,
        running=0,
        waiting=waiting,
        preemptions=0,
        prompt_tokens=0,
        generation_tokens=0,
    )


def _view(scrape: Scrape | None = None, engine: Engine = ENGINE) -> View:
    return View(engine=engine, scrape=scrape)


def _pass(policy: Policy, count: int, *, prompt: int = 100, view: View | None = None) -> None:
    """That many requests pass, numbered from 0."""
    for number in range(count):
        verdict = policy.on_arrival(_request(number, prompt=prompt), view or _view(), 0.0)
        assert verdict is Verdict.PASS


def test_without_admission_everything_passes() -> None:
    _pass(Unlimited(), 1000)


class TestVllmCaps:
    @pytest.mark.parametrize(
        ("cap", "unfinished", "verdict"),
        [(10, 5, Verdict.PASS), (10, 10, Verdict.REFUSE), (10, 9, Verdict.PASS), (0, 0, Verdict.REFUSE)],
    )
    def test_requests_in_flight(self, cap: int, unfinished: int, verdict: Verdict) -> None:
        policy = QueueCaps(max_num_queued_reqs=cap)
        _pass(policy, unfinished)
        assert policy.on_arrival(_request(99), _view(), 0.0) is verdict

    @pytest.mark.parametrize(
        ("cap", "queued", "verdict"),
        [
            (1000, 500, Verdict.PASS),
            (1000, 1000, Verdict.REFUSE),
            (0, 0, Verdict.REFUSE),
        ],
    )
    def test_prompt_tokens_without_a_first_token(self, cap: int, queued: int, verdict: Verdict) -> None:
        policy = QueueCaps(max_num_queued_tokens=cap)
        if queued:
            _pass(policy, 1, prompt=queued)
        assert policy.on_arrival(_request(99), _view(), 0.0) is verdict

    def test_the_candidate_does_not_count_so_the_cap_can_be_passed(self) -> None:
        policy = QueueCaps(max_num_queued_tokens=1000)
        _pass(policy, 2, prompt=750)  # 1,500 of 1,000
        assert policy.on_arrival(_request(99), _view(), 0.0) is Verdict.REFUSE

    def test_prompts_with_a_first_token_no_longer_count(self) -> None:
        policy = QueueCaps(max_num_queued_tokens=151)
        for number, prompt in enumerate((100, 50)):
            assert policy.on_arrival(_request(number, prompt=prompt), _view(), 0.0) is Verdict.PASS
        assert policy.on_arrival(_request(2, prompt=200), _view(), 0.0) is Verdict.PASS  # 150 < 151
        policy.on_first_token(_request(2, prompt=200), _view(), 0.0)
        assert policy.on_arrival(_request(3), _view(), 0.0) is Verdict.PASS  # 150 again
        assert policy.on_arrival(_request(4), _view(), 0.0) is Verdict.REFUSE  # 250

    def test_both_caps_are_checked(self) -> None:
        policy = QueueCaps(max_num_queued_reqs=100, max_num_queued_tokens=1000)
        _pass(policy, 5, prompt=200)
        assert policy.on_arrival(_request(99), _view(), 0.0) is Verdict.REFUSE

    def test_a_request_that_ends_frees_its_place(self) -> None:
        policy = QueueCaps(max_num_queued_reqs=1, max_num_queued_tokens=10)
        _pass(policy, 1)
        policy.on_finish(_request(0), 5, _view(), 1.0)
        assert policy.on_arrival(_request(1), _view(), 1.0) is Verdict.PASS


class TestKaito:
    @pytest.mark.parametrize(
        ("waiting", "pending", "verdict"),
        [
            (4, 0, Verdict.PASS),
            (1, 0, Verdict.PASS),
            (5, 0, Verdict.REFUSE),
            (10, 0, Verdict.REFUSE),
            (0, 9, Verdict.REFUSE),
            (100, 0, Verdict.REFUSE),
            (0, 4, Verdict.PASS),
        ],
    )
    def test_the_larger_of_gauge_and_own_count_against_the_threshold(
        self, waiting: int, pending: int, verdict: Verdict
    ) -> None:
        policy = QueueDepthGuard(max_num_seqs=4)
        _pass(policy, pending)
        assert policy.on_arrival(_request(99), _view(_scrape(waiting=waiting)), 0.0) is verdict

    def test_the_engines_batch_is_the_threshold(self) -> None:
        assert QueueDepthGuard().on_arrival(_request(), _view(_scrape(waiting=5)), 0.0) is Verdict.REFUSE
        assert QueueDepthGuard().on_arrival(_request(), _view(_scrape(waiting=4)), 0.0) is Verdict.PASS

    def test_without_a_gauge_only_the_own_count_decides(self) -> None:
        assert QueueDepthGuard().on_arrival(_request(), _view(), 0.0) is Verdict.PASS

    def test_requests_that_end_no_longer_count(self) -> None:
        policy = QueueDepthGuard(max_num_seqs=4)
        _pass(policy, 9)
        policy.on_finish(_request(0), 1, _view(), 0.0)
        assert policy.on_arrival(_request(99), _view(_scrape()), 0.0) is Verdict.PASS


class TestUtilizationDetector:
    @pytest.mark.parametrize(
        ("waiting", "usage", "age", "saturation"),
        [
            (2, 0.5, 0.0, 0.5 / 0.9),
            (1, 0.1, 0.2, 1.0),  # stale
            (10, 0.1, 0.0, 2.0),
            (1, 0.95, 0.0, 0.95 / 0.9),
            (1, 0.1, 0.0, 0.2),
            (0, 0.2, 0.0, 0.2 / 0.9),
            (15, 0.2, 0.0, 3.0),
            (20, 0.2, 0.0, 4.0),
            (1, 0.99, 0.0, 1.1),
            (5, 0.1, 0.0, 1.0),
            (1, 0.1, 0.101, 1.0),
        ],
    )
    def test_saturation(self, waiting: int, usage: float, age: float, saturation: float) -> None:
        detector = UtilizationDetector(queue_depth=5, kv_cache_utilization=0.9, staleness_seconds=0.1)
        scrape = _scrape(waiting=waiting, usage=usage, taken_at=50.0)
        assert detector.saturation(scrape, 50.0 + age) == pytest.approx(saturation)

    def test_no_metrics_is_full(self) -> None:
        assert UtilizationDetector().saturation(None, 0.0) == 1.0


class TestTokenEstimate:
    @pytest.mark.parametrize(("prompt", "total"), [(0, 0), (1, 3), (10, 25)])
    def test_prompt_and_output(self, prompt: int, total: int) -> None:
        assert prompt + estimate_output(prompt, None) == total

    @pytest.mark.parametrize(
        ("ratio", "operator_cap", "prompt", "client_cap", "expected"),
        [
            (2.0, None, 0, None, 0),
            (2.0, None, -5, None, 0),
            (2.0, None, 8, None, 16),
            (0.0, None, 100, None, 0),
            (1.5, None, 100, 50, 50),
            (1.5, None, 100, 500, 150),
            (1.5, None, 100, 0, 0),
            (1.5, None, 100, -10, 150),
            (1.5, 40, 100, None, 40),
            (1.5, 80, 100, 30, 30),
            (1.5, 30, 100, 80, 30),
            (1.5, 500, 100, 500, 150),
        ],
    )
    def test_bounds(
        self, ratio: float, operator_cap: int | None, prompt: int, client_cap: int | None, expected: int
    ) -> None:
        assert estimate_output(prompt, client_cap, ratio=ratio, cap=operator_cap) == expected


class TestConcurrencyDetector:
    @pytest.mark.parametrize(("load", "saturation"), [(0, 0.0), (5, 0.5), (10, 1.0), (15, 1.5)])
    def test_requests(self, load: int, saturation: float) -> None:
        detector = ConcurrencyDetector(mode="requests", max_concurrency=10)
        for number in range(load):
            detector.dispatched(_request(number))
        assert detector.saturation(None, 0.0) == pytest.approx(saturation)

    @pytest.mark.parametrize(("count", "prompt", "saturation"), [(0, 4, 0.0), (1, 1, 0.03), (5, 4, 0.5), (10, 4, 1.0)])
    def test_tokens(self, count: int, prompt: int, saturation: float) -> None:
        detector = ConcurrencyDetector(mode="tokens", max_token_concurrency=100, add_estimated_output_tokens=True)
        for number in range(count):
            detector.dispatched(_request(number, prompt=prompt))
        assert detector.saturation(None, 0.0) == pytest.approx(saturation)

    @pytest.mark.parametrize(
        ("requests", "tokens", "saturation"), [(2, 80, 0.8), (9, 10, 0.9), (10, 5, 1.0), (1, 100, 1.0)]
    )
    def test_hybrid_is_the_fuller_of_both(self, requests: int, tokens: int, saturation: float) -> None:
        detector = ConcurrencyDetector(mode="hybrid", max_concurrency=10, max_token_concurrency=100)
        for number in range(requests):
            detector.dispatched(_request(number, prompt=tokens if number == 0 else 0))
        assert detector.saturation(None, 0.0) == pytest.approx(saturation)

    def test_prompt_tokens_until_the_first_token_output_tokens_until_the_end(self) -> None:
        detector = ConcurrencyDetector(mode="tokens", max_token_concurrency=100, add_estimated_output_tokens=True)
        request = _request(prompt=4)
        detector.dispatched(request)
        assert detector.saturation(None, 0.0) == pytest.approx(0.1)
        detector.first_token(request)
        assert detector.saturation(None, 0.0) == pytest.approx(0.06)
        detector.finished(request)
        assert detector.saturation(None, 0.0) == 0.0

    def test_without_estimated_output_only_the_prompt_counts(self) -> None:
        detector = ConcurrencyDetector(mode="tokens", max_token_concurrency=100)
        detector.dispatched(_request(prompt=4))
        assert detector.saturation(None, 0.0) == pytest.approx(0.04)
        detector.first_token(_request(prompt=4))
        assert detector.saturation(None, 0.0) == 0.0


class TestFlowControl:
    def _saturated(self, at: float = 0.0) -> View:
        return _view(_scrape(waiting=5, taken_at=at))

    def _idle(self, at: float = 0.0) -> View:
        return _view(_scrape(taken_at=at))

    def test_holds_while_saturated_and_dispatches_one_a_millisecond_afterwards(self) -> None:
        policy = FlowControl(UtilizationDetector(), limit_seconds=60)
        for number in range(3):
            assert policy.on_arrival(_request(number), self._saturated(), 0.0) is Verdict.HOLD
            assert policy.on_tick(self._saturated(), 0.0) == []
        assert policy.next_tick_at(0.0) == 60.0
        now: float | None = 0.05
        for number in range(3):
            assert now is not None
            assert policy.on_tick(self._idle(0.05), now) == [Ruling(number, Verdict.PASS)]
            assert policy.on_tick(self._idle(0.05), now) == []
            now = policy.next_tick_at(now)
            assert now == (None if number == 2 else pytest.approx(0.051 + number * 0.001))

    def test_a_newcomer_does_not_overtake(self) -> None:
        policy = FlowControl(UtilizationDetector(), limit_seconds=60)
        policy.on_arrival(_request(0), self._saturated(), 0.0)
        assert policy.on_arrival(_request(1), self._idle(), 0.0) is Verdict.HOLD
        assert policy.on_tick(self._idle(), 0.0) == [Ruling(0, Verdict.PASS)]
        assert policy.next_tick_at(0.0) == pytest.approx(0.001)

    def test_a_request_that_waited_too_long_is_refused(self) -> None:
        policy = FlowControl(UtilizationDetector(), limit_seconds=0.2)
        policy.on_arrival(_request(0), self._saturated(), 0.0)
        assert policy.on_tick(self._saturated(0.2), 0.2) == [Ruling(0, Verdict.REFUSE)]

    def test_sheddable_requests_are_refused_at_once(self) -> None:
        policy = FlowControl(UtilizationDetector(), limit_seconds=0)
        assert policy.on_arrival(_request(0), self._saturated(), 0.0) is Verdict.REFUSE
        assert policy.on_arrival(_request(1), self._idle(), 0.0) is Verdict.PASS

    def test_a_detector_of_requests_in_flight_learns_of_dispatches_and_ends(self) -> None:
        policy = FlowControl(ConcurrencyDetector(max_concurrency=1), limit_seconds=60)
        assert policy.on_arrival(_request(0), _view(), 0.0) is Verdict.PASS
        assert policy.on_arrival(_request(1), _view(), 0.0) is Verdict.HOLD
        policy.on_first_token(_request(0), _view(), 0.5)
        policy.on_finish(_request(0), 3, _view(), 1.0)
        assert policy.on_tick(_view(), 1.0) == [Ruling(1, Verdict.PASS)]
        assert policy.on_tick(_view(), 1.0) == []


class TestReservations:
    def test_prompt_and_half_as_much_again_of_output(self) -> None:
        running = [Running(_request(prompt=10)), Running(_request(prompt=10, maximum=3))]
        assert prompt_and_ratio(running, ENGINE) == 25 + 13

    @pytest.mark.parametrize(("tokens", "blocks"), [(8, 4), (7, 4)])
    def test_whole_blocks_for_the_most_that_is_allowed(self, tokens: int, blocks: int) -> None:
        engine = Engine(blocks=12, block_size=2, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)
        running = [Running(_request(prompt=4, maximum=tokens - 4 + 1))]
        assert prompt_and_maximum(running, engine) == blocks * 2

    def test_all_blocks_but_the_reserved_one_can_be_taken(self) -> None:
        engine = Engine(blocks=7, block_size=1, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)
        policy = reserve_maximum(limit_seconds=1.0)
        assert policy.on_arrival(_request(0, prompt=4, maximum=1), _view(engine=engine), 0.0) is Verdict.PASS
        assert policy.on_arrival(_request(1, prompt=2, maximum=1), _view(engine=engine), 0.0) is Verdict.PASS
        assert policy.on_arrival(_request(2, prompt=1, maximum=1), _view(engine=engine), 0.0) is Verdict.HOLD
        policy.on_finish(_request(0), 1, _view(engine=engine), 0.5)
        assert policy.on_tick(_view(engine=engine), 0.5) == [Ruling(2, Verdict.PASS)]

    def test_the_peak_falls_when_the_first_request_ends(self) -> None:
        # Each holds 101 tokens. The shorter has 20 - 1 + 6 left, the longer 60 - 1 + 6.
        running = [Running(_request(prompt=100, maximum=20)), Running(_request(prompt=100, maximum=60))]
        assert prompt_and_fixed(running, ENGINE) == max(65 + 101, 25 * 2 + 202) + 1

    def test_a_fixed_output_counts_until_the_request_has_outgrown_it(self) -> None:
        young, old = Running(_request(prompt=10)), Running(_request(prompt=10), generated=1000)
        assert prompt_and_fixed([young], ENGINE) == 11 + 1024 - 1 + 6 + 1
        assert prompt_and_fixed([old], ENGINE) == 1011 + 1100 - 1001 + 6 + 1

    def test_a_request_without_a_bound_may_fill_the_context(self) -> None:
        assert prompt_and_maximum([Running(_request(prompt=48))], ENGINE) == 64 * 32  # 2,047 tokens in whole blocks

    def test_alone_even_the_largest_passes(self) -> None:
        engine = Engine(blocks=3, block_size=32, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=2048)
        policy = reserve_maximum(limit_seconds=1.0)
        assert policy.on_arrival(_request(0, prompt=500), _view(engine=engine), 0.0) is Verdict.PASS
        assert policy.on_arrival(_request(1, prompt=1, maximum=1), _view(engine=engine), 0.0) is Verdict.HOLD
        assert policy.next_tick_at(0.0) == 1.0
        assert policy.on_tick(_view(engine=engine), 1.0) == [Ruling(1, Verdict.REFUSE)]


def test_held_requests_leave_in_order() -> None:
    held = HeldRequests(limit_seconds=2.0)
    for number in range(3):
        held.add(_request(number, arrived=float(number)))
    assert held.take() == Ruling(0, Verdict.PASS)
    assert held.refuse_expired(3.0) == [Ruling(1, Verdict.REFUSE)]
    assert (len(held), held.expires_at()) == (1, 4.0)


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (Unlimited(), "none"),
        (QueueCaps(max_num_queued_reqs=64), "queue-cap 64"),
        (QueueCaps(max_num_queued_tokens=2048), "queued-tokens-cap 2048"),
        (QueueDepthGuard(), "kaito"),
        (FlowControl(UtilizationDetector(), limit_seconds=1), "gateway utilization 0.8/5"),
        (FlowControl(ConcurrencyDetector(mode="tokens", max_token_concurrency=9), limit_seconds=1), "gateway tokens 9"),
        (reserve_maximum(limit_seconds=1), "reserve prompt + max_tokens"),
    ],
)
def test_names_say_the_setting(policy: Policy, name: str) -> None:
    assert policy.name == name

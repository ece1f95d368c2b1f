"""An hour of two services, made up, as a Prometheus would have it: for previews and for the tests of panels.

Between minutes 25 and 40 the load of the service `chat` is more than its replicas hold, and its admission only observes:
`chat-b` preempts and thrashes. Its autoscaler wants a third replica, which is there too late. The service `code` enforces under
the same load and refuses instead. `big` waits for a node.
The figures are invented; what the panels make of them is not.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Final

STEP_SECONDS: Final = 30
HOUR_SECONDS: Final = 3600

Course = Callable[[float], float]
"""A value by seconds since the hour began."""
Series = tuple[str, str, Mapping[str, str], Course]
"""Kind, name, labels and course; of a counter and of a histogram's bucket the course is the increase per second."""

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40)
_TOKENS: Final = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_SIGMA: Final = 0.7
_CAPACITY_TOKENS: Final = 60_000
_BLOCKS: Final = 3_750
_RELOADED_AT: Final = 1200
_HEALED_AT: Final = 2700
_CRASHED_AT: Final = 600
_ASKED_AT: Final = 1500
_START_SECONDS: Final = 120
_LET_GO_AT: Final = 3300
_RANK_LOST_AT: Final = 900
_RANK_BACK_AT: Final = 960


def openmetrics(end: int) -> str:
    """The hour that ends at `end` (seconds since 1970), as OpenMetrics text with times."""
    families: dict[tuple[str, str], list[str]] = {}
    for kind, name, labels, course in _series():
        text = ",".join(f'{label}="{value}"' for label, value in labels.items())
        suffix = "_total" if kind == "counter" else ""
        lines = families.setdefault((kind, name), [])
        for second, value in _values(kind, course):
            lines.append(f"{name}{suffix}{{{text}}} {value:.6g} {end - HOUR_SECONDS + second}")
    # A histogram's own type would not allow to write it bucket by bucket.
    types = {"gauge": "gauge", "counter": "counter", "bucket": "unknown"}
    blocks = (f"# TYPE {name} {types[kind]}\n" + "\n".join(lines) for (kind, name), lines in families.items())
    return "\n".join(blocks) + "\n# EOF\n"


def _values(kind: str, course: Course) -> Iterator[tuple[int, float]]:
    seconds = range(0, HOUR_SECONDS + 1, STEP_SECONDS)
    values = (round(course(second), 6) for second in seconds)
    return zip(seconds, values if kind == "gauge" else accumulate(STEP_SECONDS * v for v in values), strict=True)


def _series() -> Iterator[Series]:
    yield from _replica("chat", "chat-a", 0.0, enforced=False, thrash=_always(0))
    yield from _replica("chat", "chat-b", 1.0, enforced=False, thrash=_peak)
    yield from _replica("code", "code-a", 2.0, enforced=True, thrash=_always(0))
    yield from _operator()
    for service, reason, replicas in (("chat", "Serving", 2), ("code", "Serving", 1), ("big", "Unschedulable", 0)):
        yield from _service(service, reason, replicas)
    yield from _autoscaler("chat")
    yield from _rounds()
    yield from _rings()


def _peak(second: float) -> float:
    """The overload: 0 outside, 1 within."""
    return 1 / (1 + math.exp(-(second - 1500) / 40)) - 1 / (1 + math.exp(-(second - 2400) / 40))


def _replica(service: str, pod: str, phase: float, *, enforced: bool, thrash: Course) -> Iterator[Series]:
    where = {"namespace": "team", "service": service, "pod": pod, "model_name": service}
    held = 1.0 if enforced else 0.0

    def offered(second: float) -> float:
        return 4 * (1 + 0.15 * math.sin(second / 300 + phase)) * (1 + _peak(second))

    def refused(second: float) -> float:
        return 0.45 * offered(second) * _peak(second) * held

    def served(second: float) -> float:
        return offered(second) - refused(second)

    def usage(second: float) -> float:
        return min(0.995, 0.15 * offered(second) * (1 - (0.3 * held + 0.1) * _peak(second)))

    def gauge(name: str, course: Course, **labels: str) -> Series:
        return "gauge", f"kvplane_{name}", where | labels, course

    def counter(name: str, course: Course, **labels: str) -> Series:
        return "counter", f"kvplane_{name}", where | labels, course

    def histogram(name: str, median: Course, bounds: tuple[float, ...], rate: Course = served) -> Iterator[Series]:
        return _histogram(f"kvplane_{name}", where, bounds, median, rate)

    yield from (
        gauge("engine_ready", _always(1)),
        gauge("engine_info", _always(1), version="0.32.0"),
        gauge("startup_seconds", _always(80 + 10 * phase)),
        *(
            gauge("signal_age_seconds", lambda s: 0.5 + 0.3 * math.sin(s / 20 + phase), signal=name)
            for name in _SIGNALS
        ),
        gauge("kv_cache_capacity_tokens", _always(_CAPACITY_TOKENS)),
        gauge("kv_cache_usage_ratio", usage),
        gauge("kv_cache_blocks", lambda s: _BLOCKS * usage(s), state="used"),
        gauge("kv_cache_blocks", lambda s: _BLOCKS * 0.7 * (1 - usage(s)), state="cached"),
        gauge("kv_cache_blocks", lambda s: _BLOCKS * 0.3 * (1 - usage(s)), state="free"),
        gauge("kv_cache_tail_waste_tokens", lambda s: 240 * usage(s)),
        gauge("thrashing", lambda s: float(thrash(s - 40) > 0.5), kind="preemption"),
        gauge("thrashing", _always(0), kind="prefix"),
        gauge("thrashing", _always(0), kind="offload"),
        counter("wasted_tokens", lambda s: 500 * thrash(s), source="exact"),
        counter("preemptions", lambda s: 1.4 * thrash(s)),
        counter("preempted_tokens", lambda s: 600 * thrash(s)),
        counter("kv_block_evictions", lambda s: 1.5 * offered(s) + 60 * thrash(s), source="exact"),
        counter("prefix_cache_queries_tokens", lambda s: 350 * served(s)),
        counter("prefix_cache_hits_tokens", lambda s: 350 * served(s) * (0.45 - 0.3 * thrash(s))),
        counter("prompt_tokens", lambda s: 350 * served(s)),
        counter("generation_tokens", lambda s: 180 * served(s) * (1 - 0.15 * thrash(s))),
        gauge("requests_running", lambda s: 40 * usage(s)),
        gauge("requests_waiting", lambda s: 25 * _peak(s) * (1 - held)),
    )
    yield from (
        gauge("admission_info", _always(1), policy="Enforce" if enforced else "Observe", reservation="Expected"),
        gauge("admission_requests", lambda s: 18 * _peak(s) * held, state="queued"),
        gauge("admission_requests", lambda s: 40 * usage(s), state="running"),
        gauge("admission_kv_peak_ratio", lambda s: usage(s) * (1.05 + 0.4 * _peak(s) * (1 - held))),
        gauge("admission_kappa", lambda s: 1 - 0.12 * thrash(s)),
        counter("admission_decisions", served, decision="admitted", reason=""),
        *(
            counter("admission_decisions", _times(share, refused), decision="refused", reason=reason)
            for reason, share in (("kv", 0.6), ("deadline", 0.3), ("queue-full", 0.1), ("tenant", 0.0))
        ),
        counter(
            "admission_decisions",
            lambda s: 0.4 * offered(s) * _peak(s) * (1 - held),
            decision="would-refuse",
            reason="kv",
        ),
        counter("slo_requests", lambda s: served(s) * (1 - 0.7 * thrash(s)), result="met"),
        counter("slo_requests", lambda s: 0.5 * served(s) * thrash(s), result="ttft-missed"),
        counter("slo_requests", lambda s: 0.2 * served(s) * thrash(s), result="tpot-missed"),
        counter("slo_requests", _always(0), result="total-missed"),
        counter("slo_requests", refused, result="refused"),
        counter("slo_requests", _always(0), result="failed"),
        counter("sidecar_config_reloads", _once(_RELOADED_AT), result="applied"),
        counter("sidecar_config_reloads", _always(0), result="refused"),
        counter("proxy_responses", served, code="200", origin="engine"),
        counter("proxy_responses", refused, code="429", origin="proxy"),
        counter("proxy_cut_responses", _always(0)),
        counter("proxy_client_disconnects", lambda s: 0.05 + 0.4 * thrash(s)),
    )
    yield from histogram("time_to_first_token_seconds", lambda s: 0.15 + 3 * thrash(s), _SECONDS)
    yield from histogram(
        "client_time_to_first_token_seconds", lambda s: 0.17 + 0.8 * _peak(s) * held + 3 * thrash(s), _SECONDS
    )
    yield from histogram("inter_token_latency_seconds", lambda s: 0.02 + 0.03 * thrash(s), _SECONDS)
    yield from histogram("e2e_request_latency_seconds", lambda s: 4 + 8 * thrash(s), _SECONDS)
    yield from histogram("queue_time_seconds", lambda s: 0.02 + 2 * thrash(s), _SECONDS)
    yield from histogram("request_prompt_tokens", lambda s: 300 + 100 * _peak(s), _TOKENS)
    yield from histogram("request_generation_tokens", lambda s: 150 + 120 * _peak(s), _TOKENS)
    yield from histogram("admission_queue_seconds", lambda s: 0.02 + 0.8 * _peak(s) * held, _SECONDS)
    yield from histogram("retry_after_seconds", _always(3), _SECONDS, refused)


_SIGNALS: Final = ("kv_cache", "kv_cache_usage_ratio", "preemptions", "requests_running", "requests_waiting")


def _operator() -> Iterator[Series]:
    where = {"namespace": "kvplane-system", "pod": "kvplane-operator-0"}

    def gauge(name: str, course: Course, **labels: str) -> Series:
        return "gauge", f"kvplane_operator_{name}", where | labels, course

    def counter(name: str, course: Course, **labels: str) -> Series:
        return "counter", f"kvplane_operator_{name}", where | labels, course

    def reconciles(second: float) -> float:
        return 0.1 + 0.2 * _peak(second)

    yield from (
        gauge("leading", _always(1)),
        gauge("leading", _always(0), pod="kvplane-operator-1"),
        gauge("services", _always(3)),
        gauge("queue_depth", lambda s: float(s % 600 == 0)),
        gauge("event_loop_lag_seconds", lambda s: 0.002 + 0.001 * math.sin(s / 30)),
        counter("reconcile_errors", lambda s: 0.1 if 1500 < s < 1560 else 0),
        counter("drift_healed", _once(_HEALED_AT), kind="Deployment"),
        counter("drift_healed", _always(0), kind="Service"),
        counter("api_requests", _always(0.4), verb="get", kind="Lease", code="200"),
        counter("api_requests", reconciles, verb="patch", kind="LLMService", code="200"),
        counter("api_requests", _always(0.01), verb="patch", kind="LLMService", code="409"),
        ("bucket", "kvplane_operator_reconcile_seconds_count", where, reconciles),
    )
    for name, median in (("reconcile", 0.03), ("queue", 0.012)):
        yield from _histogram(f"kvplane_operator_{name}_seconds", where, _SECONDS, _always(median), reconciles)
    for verb, median in (("get", 0.006), ("patch", 0.02)):
        labels = where | {"verb": verb}
        yield from _histogram("kvplane_operator_api_request_seconds", labels, _SECONDS, _always(median), reconciles)


def _service(service: str, reason: str, replicas: int) -> Iterator[Series]:
    """What the operator exports of a service."""
    where = {"namespace": "team", "service": service}
    serves = float(replicas > 0)
    yield "gauge", "kvplane_service_condition", where | {"condition": "Ready", "reason": reason}, _always(serves)
    yield "gauge", "kvplane_service_condition", where | {"condition": "Progressing", "reason": "Stable"}, _always(0)
    yield "gauge", "kvplane_service_replicas", where | {"state": "ready"}, _always(replicas)
    yield "gauge", "kvplane_service_replicas", where | {"state": "desired"}, _always(max(replicas, 1))
    if replicas:
        fresh = {"condition": "SignalsFresh", "reason": "SignalsRead"}
        yield "gauge", "kvplane_service_condition", where | fresh, _always(1)
        about = where | {"pod": f"{service}-a"}
        restarts = "kvplane_service_container_restarts"
        yield "counter", restarts, about | {"container": "engine"}, _once(_CRASHED_AT if service == "chat" else -1)
        yield "counter", restarts, about | {"container": "kvplane-sidecar"}, _always(0)


def _autoscaler(service: str) -> Iterator[Series]:
    """What the operator exports of the scaling of a service that has two replicas, and three in the overload."""
    where = {"namespace": "team", "service": service}

    def gauge(name: str, course: Course, **labels: str) -> Series:
        return "gauge", f"kvplane_autoscaler_{name}", where | labels, course

    def counter(name: str, course: Course, **labels: str) -> Series:
        return "counter", f"kvplane_autoscaler_{name}", where | labels, course

    def demand(second: float) -> float:
        return 1.3 * (1 + 0.15 * math.sin(second / 300)) * (1 + _peak(second))

    def desired(second: float) -> float:
        return 2.0 + (_ASKED_AT <= second < _LET_GO_AT)

    def ready(second: float) -> float:
        return 2.0 + (_ASKED_AT + _START_SECONDS <= second < _LET_GO_AT)

    yield from (
        gauge("desired_replicas", desired),
        gauge("replicas", desired, state="asked"),
        gauge("replicas", ready, state="ready"),
        gauge("replicas", lambda s: desired(s) - ready(s), state="pending"),
        gauge("limit_replicas", _always(1), limit="min"),
        gauge("limit_replicas", _always(4), limit="max"),
        gauge("demand_replicas", demand),
        gauge("demand_cause_replicas", lambda s: 0.8 * demand(s), cause="held"),
        gauge("demand_cause_replicas", lambda s: 0.2 * demand(s), cause="queued"),
        gauge("demand_cause_replicas", _always(0), cause="shed"),
        gauge("demand_cause_replicas", lambda s: 0.7 * demand(s), cause="prefill"),
        gauge("demand_cause_replicas", lambda s: 0.1 * _peak(s), cause="waste"),
        gauge("forecast_replicas", lambda s: max(demand(s), demand(s - 60))),
        gauge("forecast_method_replicas", demand, method="persistence"),
        gauge("forecast_method_replicas", lambda s: 1.1 * demand(s), method="trend"),
        gauge("forecast_method_replicas", lambda s: demand(s - 60), method="recent"),
        gauge("horizon_seconds", _always(_START_SECONDS + 5)),
        gauge("usable_ratio", lambda s: 0.85 - 0.1 * _peak(s - 300)),
        gauge("kv_tokens", lambda s: _CAPACITY_TOKENS * ready(s), state="capacity"),
        gauge("kv_tokens", lambda s: 0.6 * _CAPACITY_TOKENS * demand(s), state="held"),
        gauge("kv_tokens", lambda s: 0.2 * _CAPACITY_TOKENS * _peak(s), state="queued"),
        gauge("requests_per_second", lambda s: 8 * (1 + _peak(s)), result="admitted"),
        gauge("requests_per_second", _always(0), result="refused"),
        gauge("answers_per_second", lambda s: 8 * (1 - 0.5 * _peak(s)), promises="kept"),
        gauge("answers_per_second", lambda s: 4 * _peak(s), promises="broken"),
        gauge("signals_missing", _always(0)),
        gauge("active", _always(1)),
        gauge("panic", lambda s: float(_ASKED_AT <= s < _ASKED_AT + 300)),
        gauge("decision_age_seconds", lambda s: 2 + 2 * math.sin(s / 7)),
        counter("decisions", lambda s: 0.2 * (1 - _peak(s)), reason="Steady"),
        counter("decisions", lambda s: 0.2 * _peak(s), reason="Overloaded"),
        counter("decisions", _once(_ASKED_AT), reason="ScaledUp"),
        counter("decisions", _once(_LET_GO_AT), reason="GlidingDown"),
        counter("changes", _once(_ASKED_AT), direction="up"),
        counter("changes", _once(_LET_GO_AT), direction="down"),
        counter("reversals", _once(_LET_GO_AT)),
    )
    acts = {"condition": "ScalingActive", "reason": "FollowsDemand"}
    yield "gauge", "kvplane_service_condition", where | acts, _always(1)


def _rounds() -> Iterator[Series]:
    """What the operator exports of its own scaling."""
    where = {"namespace": "kvplane-system", "pod": "kvplane-operator-0"}
    for name, median in (("round", 0.02), ("decision", 0.0004)):
        bounds = (0.0001, 0.001, *_SECONDS)
        yield from _histogram(f"kvplane_autoscaler_{name}_seconds", where, bounds, _always(median), _always(0.3))
    yield "counter", "kvplane_autoscaler_errors", where, _always(0)
    for result, rate in (("written", 0.01), ("failed", 0.0)):
        yield "counter", "kvplane_autoscaler_state_writes", where | {"result": result}, _always(rate)


def _rings() -> Iterator[Series]:
    """What is exported of a ring of four that lost a rank and got it back."""
    where = {"namespace": "team", "service": "long"}
    for state, count in (("formed", 1), ("degraded", 0), ("failed", 0)):
        yield "gauge", "kvplane_service_ring_groups", where | {"state": state}, _always(count)
    about = where | {"pod": "long-ring-0-0", "model_name": "long"}

    def gauge(name: str, course: Course, **labels: str) -> Series:
        return "gauge", f"kvplane_ring_{name}", about | labels, course

    def counter(name: str, course: Course, **labels: str) -> Series:
        return "counter", f"kvplane_ring_{name}", about | labels, course

    def without_a_rank(second: float) -> bool:
        return _RANK_LOST_AT <= second < _RANK_BACK_AT

    def load(second: float) -> float:
        """One long prompt after the other, with a pause between."""
        return 0.0 if second % _PROMPT_SECONDS > 0.8 * _PROMPT_SECONDS else 1.0

    yield from (
        gauge("formed", _always(1)),
        gauge("world_size", _always(_RANKS)),
        gauge("members", lambda s: _RANKS - without_a_rank(s)),
        gauge("epoch", lambda s: 3.0 + (s >= _RANK_LOST_AT) + (s >= _RANK_BACK_AT)),
        gauge("kv_capacity_tokens", _always(_RANK_TOKENS)),
        gauge("imbalance_ratio", lambda s: 0.02 + 0.01 * math.sin(s / 200)),
        counter("prefill_tokens", lambda s: 9000 * load(s), kind="new"),
        counter("prefill_tokens", _times(80_000, _once(_RANK_LOST_AT)), kind="refilled"),
        counter("parked_requests", _always(0)),
        ("bucket", "kvplane_ring_recovery_seconds_count", about, _once(_RANK_LOST_AT)),
        ("bucket", "kvplane_ring_recovery_seconds_sum", about, _times(1.2, _once(_RANK_LOST_AT))),
    )
    for rank in range(_RANKS):
        yield from _rank(gauge, counter, rank, load)
    for rank in range(1, _RANKS):
        here = about | {"pod": f"long-ring-0-{rank}"}
        lost: Course = without_a_rank if rank == _RANKS - 1 else _always(0)
        yield "gauge", "kvplane_ring_worker_inside", here, _not(lost)
    for cause, at in (("lost", _RANK_LOST_AT), ("joined", _RANK_BACK_AT)):
        yield counter("reforms", _once(at), cause=cause)


_RANKS: Final = 4
_RANK_TOKENS: Final = 120_000
_PROMPT_SECONDS: Final = 300


def _rank(gauge: Callable[..., Series], counter: Callable[..., Series], number: int, load: Course) -> Iterator[Series]:
    """What rank 0 exports of one rank; the last one is that which is lost, and comes back empty."""
    rank = str(number)

    def held(second: float) -> float:
        began = _RANK_BACK_AT if number == _RANKS - 1 and second >= _RANK_LOST_AT else 0
        return max(0.0, min(90_000.0, 50.0 * (second - began)))

    yield from (
        gauge("kv_tokens", held, rank=rank, state="held"),
        gauge("kv_tokens", lambda s: 60_000 * load(s), rank=rank, state="reserved"),
        gauge("kv_tokens", lambda s: max(0.0, held(s) - 60_000 * load(s)), rank=rank, state="kept"),
        counter("step_seconds", lambda s: (0.94 + 0.005 * number) * load(s), rank=rank, part="computing"),
        counter("step_seconds", lambda s: (0.02 - 0.002 * number) * load(s), rank=rank, part="waited"),
        counter("step_seconds", lambda s: 0.03 * load(s), rank=rank, part="other"),
        counter("sent_bytes", lambda s: 1.2e9 * load(s), rank=rank),
    )


def _always(value: float) -> Course:
    return lambda _: value


def _not(course: Course) -> Course:
    return lambda second: 1 - course(second)


def _times(factor: float, course: Course) -> Course:
    return lambda second: factor * course(second)


def _once(at: int) -> Course:
    """One event at a moment."""
    return lambda second: 1 / STEP_SECONDS if second == at else 0


def _histogram(
    name: str, labels: Mapping[str, str], bounds: tuple[float, ...], median: Course, rate: Course
) -> Iterator[Series]:
    """The buckets of a log-normal distribution."""

    def below(bound: float) -> Course:
        return lambda s: rate(s) * 0.5 * (1 + math.erf(math.log(bound / median(s)) / (_SIGMA * math.sqrt(2))))

    for bound in (*bounds, math.inf):
        le = "+Inf" if math.isinf(bound) else f"{bound:g}"
        yield "bucket", f"{name}_bucket", {**labels, "le": le}, below(bound)

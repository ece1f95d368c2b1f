"""The sidecar's metrics: one table, and the collector that fills it from what is known now.

Rules: base units, ``kvplane_`` prefix, one series per pod; a metric appears only when its value is known, since an
absent series can be alerted on and a made-up 0 cannot. Labels never carry a request id, a prompt or a user. The table is
also the source of docs/metrics.md.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from kvplane_runtime.admission.demand import Reason
from kvplane_runtime.metric import Kind, Metric, Samples, families
from kvplane_runtime.proxy.server import Proxy
from kvplane_runtime.sidecar import passed_on, signals
from kvplane_runtime.sidecar.admit import AdmissionGate
from kvplane_runtime.sidecar.config import WatchedConfig
from kvplane_runtime.sidecar.drain import DrainGate
from kvplane_runtime.sidecar.engine import EngineMonitor
from kvplane_runtime.sidecar.promises import Result
from kvplane_runtime.sidecar.signals import KV_BLOCK_LIFETIME, PREFIX, SIGNALS
from kvplane_runtime.signals.thrash import KINDS

KV_EVENTS: Final = "kv_events"
"""The KV event stream among the signals that age."""

FROM_SIGNALS: Final = {
    signal.name: Metric(
        f"kvplane_{signal.name}",
        Kind.GAUGE if signal.kind is signals.Kind.RATIO else Kind(signal.kind.value),
        signal.description,
        source="engine: " + ", ".join(f"`{PREFIX}{source}`" for source in signal.sources),
    )
    for signal in SIGNALS
}
_CACHE_SOURCE: Final = f"engine: `{PREFIX}cache_config_info`"

KV_CACHE_BLOCKS: Final = Metric(
    "kvplane_kv_cache_blocks",
    Kind.GAUGE,
    "KV blocks by state: used (held by running requests), cached (held by none, with content that a prompt may find; known "
    "only by KV events) or free (the rest, with the cached ones in it while those are not known).",
    ("state",),
    f"{_CACHE_SOURCE} and the usage ratio; KV events",
)
KV_CACHE_BLOCK_SIZE: Final = Metric(
    "kvplane_kv_cache_block_size_tokens", Kind.GAUGE, "Tokens per KV block.", source=_CACHE_SOURCE
)
KV_CACHE_CAPACITY: Final = Metric(
    "kvplane_kv_cache_capacity_tokens", Kind.GAUGE, "Tokens that the engine's KV cache holds.", source=_CACHE_SOURCE
)
KV_CACHE_TAIL_WASTE: Final = Metric(
    "kvplane_kv_cache_tail_waste_tokens",
    Kind.GAUGE,
    "Slots without a token in the last KV blocks of running requests: what the block size costs.",
    source=f"the sidecar's requests, {_CACHE_SOURCE}",
)
EVICTIONS: Final = Metric(
    "kvplane_kv_block_evictions",
    Kind.COUNTER,
    "Cached KV blocks evicted to make room, by how it is known: exact (KV events), sampled (an upper bound, for the "
    "engine's default sample rate of 1 %) or estimated (the context of preempted requests). Each counts only while there "
    "is nothing better, so their sum counts nothing twice.",
    ("source",),
    f"KV events; else engine: `{PREFIX}{KV_BLOCK_LIFETIME}`; else `{PREFIX}num_preemptions`",
)
PREEMPTED_TOKENS: Final = Metric(
    "kvplane_preempted_tokens",
    Kind.COUNTER,
    "Context that preempted requests lost, estimated as that of the youngest running ones. What the prefix cache gives "
    "back is not computed again: see the wasted tokens.",
    source=f"engine: `{PREFIX}num_preemptions`, and the sidecar's requests",
)
WASTED_TOKENS: Final = Metric(
    "kvplane_wasted_tokens",
    Kind.COUNTER,
    "Tokens computed again after their KV blocks were evicted, by how it is known: exact (KV events; full blocks that come "
    "back within 5 minutes) or estimated (the preempted tokens). Each counts only while there is nothing better.",
    ("source",),
    f"KV events; else engine: `{PREFIX}num_preemptions`",
)
THRASHING: Final = Metric(
    "kvplane_thrashing",
    Kind.GAUGE,
    "1 while the engine spends its time on tokens it had computed before, by what is thrown away: preemption (the contexts "
    "of running requests), prefix (cached prefixes), offload (blocks that go to another tier and back); else 0.",
    ("kind",),
)
KV_EVENT_BATCHES: Final = Metric(
    "kvplane_kv_event_batches",
    Kind.COUNTER,
    "Batches of KV events, by what became of them: applied, or lost, which makes the exact counts lower bounds.",
    ("result",),
    "KV events",
)
KV_EVENTS_PASSED_OVER: Final = Metric(
    "kvplane_kv_events_passed_over",
    Kind.COUNTER,
    "KV events, or batches of them, that could not be read (unreadable), and blocks that the ledger had no room for "
    "(untracked).",
    ("reason",),
    "KV events",
)
SIGNAL_AGE: Final = Metric(
    "kvplane_signal_age_seconds",
    Kind.GAUGE,
    "Time since each engine signal was last present in a scrape, or since the KV event sockets last answered (kv_events); "
    "a signal that was never seen has no series.",
    ("signal",),
)
ENGINE_INFO: Final = Metric(
    "kvplane_engine_info", Kind.GAUGE, "Always 1; the engine's version.", ("version",), "engine: `GET /version`"
)
ENGINE_READY: Final = Metric(
    "kvplane_engine_ready",
    Kind.GAUGE,
    "1 while the engine's health check passes, else 0.",
    source="engine: `GET /health`",
)
STARTUP: Final = Metric(
    "kvplane_startup_seconds",
    Kind.GAUGE,
    "From the sidecar's start to the engine's first passing health check; absent if it found the engine up.",
)
SLO_REQUESTS: Final = Metric(
    "kvplane_slo_requests",
    Kind.COUNTER,
    "Generating requests that are over, by what became of the promises in slo: met; ttft-missed (first token late); "
    "tpot-missed (tokens slow); total-missed (not streamed, and longer than both promises allow together); refused (429, also "
    "by a tenant's own limit, or the engine's 503); failed (another 5xx, a cut answer, or no engine). Not counted: clients that "
    "left, other 4xx, answers whose tokens are not known.",
    ("result",),
)
CLIENT_TTFT: Final = Metric(
    "kvplane_client_time_to_first_token_seconds",
    Kind.HISTOGRAM,
    "Time from a request's arrival here to its first token, admission's queue included: what slo.ttftMilliseconds promises. "
    "Of streamed answers only; of the others it is not known.",
)
ADMISSION_DECISIONS: Final = Metric(
    "kvplane_admission_decisions",
    Kind.COUNTER,
    "Decisions on generating requests: admitted; refused, by what was short; with policy Observe would-refuse, by the same.",
    ("decision", "reason"),
)
ADMISSION_REQUESTS: Final = Metric(
    "kvplane_admission_requests",
    Kind.GAUGE,
    "Generating requests by state: queued here, or running (let through to the engine and not over).",
    ("state",),
)
ADMISSION_KV_PEAK: Final = Metric(
    "kvplane_admission_kv_peak_ratio",
    Kind.GAUGE,
    "KV blocks that the requests let through are expected to hold at most, over the engine's blocks.",
)
ADMISSION_KAPPA: Final = Metric(
    "kvplane_admission_kappa",
    Kind.GAUGE,
    "Learned factor: requests are let through while the expected peak is at most this share of the engine's blocks.",
)
ADMISSION_QUEUE_SECONDS: Final = Metric(
    "kvplane_admission_queue_seconds", Kind.HISTOGRAM, "Time that requests waited here before they were let through."
)
RETRY_AFTER: Final = Metric(
    "kvplane_retry_after_seconds", Kind.HISTOGRAM, "Retry-After of the requests that were refused."
)
ADMISSION_INFO: Final = Metric(
    "kvplane_admission_info",
    Kind.GAUGE,
    "Always 1; the admission policy and the reservation in force.",
    ("policy", "reservation"),
)
DRAINING: Final = Metric("kvplane_draining", Kind.GAUGE, "1 while the pod drains, else 0.")
IN_FLIGHT: Final = Metric("kvplane_proxy_requests_in_flight", Kind.GAUGE, "Requests inside the proxy now.")
HELD_BYTES: Final = Metric("kvplane_proxy_held_body_bytes", Kind.GAUGE, "Request bodies the proxy holds now.")
RESPONSES: Final = Metric(
    "kvplane_proxy_responses",
    Kind.COUNTER,
    "Responses sent, by HTTP status and by who answered: engine, or proxy (an error made here).",
    ("code", "origin"),
)
DISCONNECTS: Final = Metric(
    "kvplane_proxy_client_disconnects",
    Kind.COUNTER,
    "Requests aborted because their client went away, or stopped reading, before the answer was complete.",
)
CUT_RESPONSES: Final = Metric(
    "kvplane_proxy_cut_responses", Kind.COUNTER, "Responses that the engine broke off after they had begun."
)
RETRIES: Final = Metric(
    "kvplane_proxy_upstream_retries",
    Kind.COUNTER,
    "Requests sent again because the idle engine connection first used had been closed.",
)
CONFIG_RELOADS: Final = Metric(
    "kvplane_sidecar_config_reloads",
    Kind.COUNTER,
    "Changed configuration files, by result: applied, or refused (not valid; the previous one stays in force).",
    ("result",),
)

METRICS: Final = (
    *FROM_SIGNALS.values(),
    KV_CACHE_BLOCKS,
    KV_CACHE_BLOCK_SIZE,
    KV_CACHE_CAPACITY,
    KV_CACHE_TAIL_WASTE,
    EVICTIONS,
    PREEMPTED_TOKENS,
    WASTED_TOKENS,
    THRASHING,
    KV_EVENT_BATCHES,
    KV_EVENTS_PASSED_OVER,
    SIGNAL_AGE,
    ENGINE_INFO,
    ENGINE_READY,
    STARTUP,
    SLO_REQUESTS,
    CLIENT_TTFT,
    ADMISSION_DECISIONS,
    ADMISSION_REQUESTS,
    ADMISSION_KV_PEAK,
    ADMISSION_KAPPA,
    ADMISSION_QUEUE_SECONDS,
    RETRY_AFTER,
    ADMISSION_INFO,
    DRAINING,
    IN_FLIGHT,
    HELD_BYTES,
    RESPONSES,
    DISCONNECTS,
    CUT_RESPONSES,
    RETRIES,
    CONFIG_RELOADS,
)


class SidecarCollector(Collector):
    """Renders the state of the running sidecar at the moment of a scrape."""

    def __init__(
        self,
        *,
        config: WatchedConfig,
        engine: EngineMonitor,
        drain: DrainGate,
        gate: AdmissionGate,
        proxy: Proxy,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._engine = engine
        self._drain = drain
        self._gate = gate
        self._proxy = proxy
        self._clock = clock

    def describe(self) -> Iterable[Family]:
        """Every family that may be collected."""
        return [metric.family() for metric in METRICS]

    def collect(self) -> Iterator[Family]:
        """The families that have a value now."""
        yield from families(self._known(), served_name=self._config.current.served_name)
        if self._engine.passed_on is not None:
            yield from passed_on.families(self._engine.passed_on)

    def _known(self) -> Iterator[tuple[Metric, Samples]]:
        yield from self._from_scrape()
        yield from self._from_account()
        yield from self._from_promises()
        yield from self._from_admission()
        engine, now = self._engine, self._clock()
        heard = {} if engine.kv.ledger.heard_at is None else {KV_EVENTS: engine.kv.ledger.heard_at}
        yield SIGNAL_AGE, {(signal,): now - seen for signal, seen in (engine.seen | heard).items()}
        if engine.version is not None:
            yield ENGINE_INFO, {(engine.version,): 1}
        yield ENGINE_READY, {(): engine.ready()}
        if engine.health.startup_seconds is not None:
            yield STARTUP, {(): engine.health.startup_seconds}
        yield DRAINING, {(): self._drain.draining}
        stats = self._proxy.stats
        yield IN_FLIGHT, {(): self._drain.in_flight}
        yield HELD_BYTES, {(): self._proxy.held_bytes}
        yield RESPONSES, {(str(code), origin): count for (code, origin), count in stats.responses.items()}
        yield DISCONNECTS, {(): stats.client_disconnects}
        yield CUT_RESPONSES, {(): stats.cut_responses}
        yield RETRIES, {(): stats.retries}
        yield CONFIG_RELOADS, {(result,): count for result, count in self._config.reloads.items()}

    def _from_scrape(self) -> Iterator[tuple[Metric, Samples]]:
        scrape = self._engine.scrape
        if scrape is None:
            return
        for name, value in scrape.values.items():
            yield FROM_SIGNALS[name], {(): value}
        for name, histogram in scrape.histograms.items():
            yield FROM_SIGNALS[name], {(): histogram}
        cache, used = scrape.kv_cache, scrape.kv_blocks_used
        if cache is not None:
            yield KV_CACHE_BLOCK_SIZE, {(): cache.block_size_tokens}
            yield KV_CACHE_CAPACITY, {(): cache.capacity_tokens}
            if used is not None:
                states: dict[tuple[str, ...], float] = {("used",): used, ("free",): cache.blocks - used}
                cached = self._engine.kv.cached_blocks
                if cached is not None:
                    states |= {("cached",): cached, ("free",): cache.blocks - used - cached}
                yield KV_CACHE_BLOCKS, states

    def _from_account(self) -> Iterator[tuple[Metric, Samples]]:
        kv, ledger = self._engine.kv, self._engine.kv.ledger
        yield EVICTIONS, {(source,): count for source, count in kv.evictions.items()}
        yield WASTED_TOKENS, {(source,): count for source, count in kv.wasted_tokens.items()}
        if kv.preempted_tokens is not None:
            yield PREEMPTED_TOKENS, {(): kv.preempted_tokens}
        if kv.tail_waste_tokens is not None:
            yield KV_CACHE_TAIL_WASTE, {(): kv.tail_waste_tokens}
        if kv.wasted_tokens:
            yield THRASHING, {(kind,): kind == kv.thrash.kind for kind in KINDS}
        if ledger.heard_at is not None:
            yield KV_EVENT_BATCHES, {("applied",): ledger.batches_total, ("lost",): ledger.holes}
            yield (
                KV_EVENTS_PASSED_OVER,
                {("unreadable",): ledger.unreadable_total, ("untracked",): ledger.untracked_total},
            )

    def _from_promises(self) -> Iterator[tuple[Metric, Samples]]:
        promises = self._gate.promises
        yield SLO_REQUESTS, {(result.value,): promises.results[result] for result in Result}
        yield CLIENT_TTFT, {(): promises.first_token_seconds.histogram()}

    def _from_admission(self) -> Iterator[tuple[Metric, Samples]]:
        gate, admission = self._gate, self._config.current.admission
        yield ADMISSION_INFO, {(admission.policy, admission.reservation): 1}
        if admission.policy == "Off":
            return
        state = gate.admission.state(now=self._clock())
        yield ADMISSION_DECISIONS, _from_zero(gate.admission.decisions)
        yield ADMISSION_REQUESTS, {("queued",): state.queued, ("running",): state.running}
        if state.kv_peak_ratio is not None:
            yield ADMISSION_KV_PEAK, {(): state.kv_peak_ratio}
        if not gate.admission.ring:
            yield ADMISSION_KAPPA, {(): state.kappa}
        yield ADMISSION_QUEUE_SECONDS, {(): gate.queue_seconds.histogram()}
        yield RETRY_AFTER, {(): gate.retry_after_seconds.histogram()}


def _from_zero(decisions: Mapping[tuple[str, str], int]) -> Samples:
    """Counters whose labels are known begin at 0, so that a rate sees their first increase."""
    refusals = [(decision, reason.value) for decision in ("refused", "would-refuse") for reason in Reason]
    return {labels: decisions.get(labels, 0) for labels in [("admitted", ""), *refusals]}

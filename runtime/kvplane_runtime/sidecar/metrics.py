"""The sidecar's metrics: one table, and the collector that fills it from what is known now.

Rules: base units, ``kvplane_`` prefix, one series per pod; a metric appears only when its value is known, since an
absent series can be alerted on and a made-up 0 cannot. Labels never carry a request id, a prompt or a user. The table is
also the source of docs/metrics.md.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from kvplane_runtime.proxy.server import Proxy
from kvplane_runtime.sidecar.config import WatchedConfig
from kvplane_runtime.sidecar.drain import DrainGate
from kvplane_runtime.sidecar.engine import EngineMonitor
from kvplane_runtime.sidecar.signals import PREFIX, SIGNALS, Histogram, Kind

LABEL_MODEL: Final = "model_name"
_TYPES: Final = {
    Kind.GAUGE: GaugeMetricFamily,
    Kind.RATIO: GaugeMetricFamily,
    Kind.COUNTER: CounterMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as it is exported and documented."""

    name: str
    """With the prefix, without ``_total``."""
    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    """Beside ``model_name``, which every metric has."""
    source: str = "the sidecar"
    """Where the value comes from; the names an engine version may use, newest first."""

    @property
    def exported_name(self) -> str:
        """As it stands in the exposition."""
        return f"{self.name}_total" if self.kind is Kind.COUNTER else self.name

    def family(self) -> Family:
        """An empty family to add samples to."""
        family: Family = _TYPES[self.kind](self.name, self.description, labels=(*self.labels, LABEL_MODEL))
        return family


FROM_SIGNALS: Final = {
    signal.name: Metric(
        f"kvplane_{signal.name}",
        signal.kind,
        signal.description,
        source="engine: " + ", ".join(f"`{PREFIX}{source}`" for source in signal.sources),
    )
    for signal in SIGNALS
}
_CACHE_SOURCE: Final = f"engine: `{PREFIX}cache_config_info`"

KV_CACHE_BLOCKS: Final = Metric(
    "kvplane_kv_cache_blocks",
    Kind.GAUGE,
    "KV blocks by state: used (held by running requests) or free (which includes cached but unreferenced ones).",
    ("state",),
    f"{_CACHE_SOURCE} and the usage ratio",
)
KV_CACHE_BLOCK_SIZE: Final = Metric(
    "kvplane_kv_cache_block_size_tokens", Kind.GAUGE, "Tokens per KV block.", source=_CACHE_SOURCE
)
KV_CACHE_CAPACITY: Final = Metric(
    "kvplane_kv_cache_capacity_tokens", Kind.GAUGE, "Tokens that the engine's KV cache holds.", source=_CACHE_SOURCE
)
SIGNAL_AGE: Final = Metric(
    "kvplane_signal_age_seconds",
    Kind.GAUGE,
    "Time since each engine signal was last present in a scrape; a signal that was never seen has no series.",
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
    SIGNAL_AGE,
    ENGINE_INFO,
    ENGINE_READY,
    STARTUP,
    DRAINING,
    IN_FLIGHT,
    HELD_BYTES,
    RESPONSES,
    DISCONNECTS,
    CUT_RESPONSES,
    RETRIES,
    CONFIG_RELOADS,
)


Samples = Mapping[tuple[str, ...], float | Histogram]
"""Values by the values of the metric's own labels."""


class SidecarCollector(Collector):
    """Renders the state of the running sidecar at the moment of a scrape."""

    def __init__(
        self,
        *,
        config: WatchedConfig,
        engine: EngineMonitor,
        gate: DrainGate,
        proxy: Proxy,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._engine = engine
        self._gate = gate
        self._proxy = proxy
        self._clock = clock

    def describe(self) -> Iterable[Family]:
        """Every family that may be collected."""
        return [metric.family() for metric in METRICS]

    def collect(self) -> Iterator[Family]:
        """The families that have a value now."""
        model = self._config.current.served_name
        for metric, samples in self._known():
            if samples:
                family = metric.family()
                for labels, value in samples.items():
                    _add(family, (*labels, model), value)
                yield family

    def _known(self) -> Iterator[tuple[Metric, Samples]]:
        yield from self._from_scrape()
        engine, now = self._engine, self._clock()
        yield SIGNAL_AGE, {(signal,): now - seen for signal, seen in engine.seen.items()}
        if engine.version is not None:
            yield ENGINE_INFO, {(engine.version,): 1}
        yield ENGINE_READY, {(): engine.ready()}
        if engine.health.startup_seconds is not None:
            yield STARTUP, {(): engine.health.startup_seconds}
        yield DRAINING, {(): self._gate.draining}
        stats = self._proxy.stats
        yield IN_FLIGHT, {(): self._gate.in_flight}
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
                yield KV_CACHE_BLOCKS, {("used",): used, ("free",): cache.blocks - used}


def _add(family: Family, labels: tuple[str, ...], value: float | Histogram) -> None:
    match family:
        case HistogramMetricFamily():
            assert isinstance(value, Histogram)  # noqa: S101  (the table pairs them)
            family.add_metric(labels, buckets=list(value.buckets), sum_value=value.sum)
        case GaugeMetricFamily() | CounterMetricFamily():
            assert not isinstance(value, Histogram)  # noqa: S101  (the table pairs them)
            family.add_metric(labels, value)

"""The simulated engine's ``/metrics``: the names, types, labels and buckets of vLLM 0.32 (``vllm/v1/metrics/loggers.py``).

Of what vLLM exports, that which the simulator knows; what is not there it does not know.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bench.engine.model import Engine

_TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_BUCKETS: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY_BUCKETS: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


def length_buckets(max_model_len: int) -> list[float]:
    """1, 2, 5, 10, ... up to the longest text (``build_1_2_5_buckets``)."""
    found: list[float] = []
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power > max_model_len:
                return found
            found.append(float(digit * power))
        power *= 10


@dataclass(frozen=True)
class Gauges:
    """What the gauges say: the state at the end of the last step."""

    running: int = 0
    waiting: int = 0
    usage: float = 0.0


class Exposition:
    """All metrics of one simulated engine."""

    def __init__(self, *, model: str, engine: Engine) -> None:
        self.gauges = Gauges()
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0, "repetition": 0}
        """``vllm:request_success`` by reason."""
        self._engine, self._model = engine, model
        self._registry = CollectorRegistry()
        self._registry.register(self)
        lengths = length_buckets(engine.config.max_model_len)
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", _TTFT_BUCKETS)
        self.inter_token_latency = self._histogram("inter_token_latency_seconds", _TOKEN_BUCKETS)
        self.e2e_request_latency = self._histogram("e2e_request_latency_seconds", _LATENCY_BUCKETS)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", lengths)
        self.request_generation_tokens = self._histogram("request_generation_tokens", lengths)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters, as a collector of prometheus_client."""
        config, counters, gauges = self._engine.config, self._engine.counters, self.gauges
        yield self._gauge("num_requests_running", gauges.running)
        yield self._gauge("num_requests_waiting", gauges.waiting)
        by_reason = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "Simulated.", labels=("engine", "model_name", "reason")
        )
        by_reason.add_metric(("0", self._model, "capacity"), gauges.waiting)
        by_reason.add_metric(("0", self._model, "deferred"), 0)
        yield by_reason
        yield self._gauge("kv_cache_usage_perc", gauges.usage)
        for name, value in (
            ("prefix_cache_queries", counters.prefix_cache_queries),
            ("prefix_cache_hits", counters.prefix_cache_hits),
            ("num_preemptions", counters.num_preemptions),
            ("prompt_tokens", counters.prompt_tokens),
            ("prompt_tokens_cached", counters.prompt_tokens_cached),
            ("generation_tokens", counters.generation_tokens),
        ):
            yield self._counter(name, value)
        computed = counters.prompt_tokens - counters.prompt_tokens_cached
        yield self._counter_by(
            "prompt_tokens_by_source",
            "source",
            {
                "local_compute": computed,
                "local_cache_hit": counters.prompt_tokens_cached,
                "external_kv_transfer": 0,
            },
        )
        yield self._counter_by("request_success", "finished_reason", self.finished)
        info = {
            "engine": "0",
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(config.num_gpu_blocks),
            "kv_cache_size_tokens": str(config.num_gpu_blocks * config.block_size),
            "enable_prefix_caching": str(config.enable_prefix_caching),
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "Simulated.", labels=tuple(info))
        family.add_metric(tuple(info.values()), 1)
        yield family

    def _gauge(self, name: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", "Simulated.", labels=("engine", "model_name"))
        family.add_metric(("0", self._model), value)
        return family

    def _counter(self, name: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", "Simulated.", labels=("engine", "model_name"))
        family.add_metric(("0", self._model), value)
        return family

    def _counter_by(self, name: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", "Simulated.", labels=("engine", label, "model_name"))
        for value, count in values.items():
            family.add_metric(("0", value, self._model), count)
        return family

    def _histogram(self, name: str, buckets: tuple[float, ...] | list[float]) -> Histogram:
        family = Histogram(
            f"vllm:{name}", "Simulated.", ("engine", "model_name"), buckets=buckets, registry=self._registry
        )
        return family.labels("0", self._model)

"""Each metric is exported exactly while it is known."""

import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvplane_api.wire import SidecarConfig
from kvplane_runtime.admission.controller import Admission
from kvplane_runtime.admission.demand import Demand
from kvplane_runtime.proxy.limits import Limits
from kvplane_runtime.proxy.server import Proxy
from kvplane_runtime.proxy.upstream import UpstreamPool
from kvplane_runtime.sidecar.admit import AdmissionGate
from kvplane_runtime.sidecar.config import WatchedConfig
from kvplane_runtime.sidecar.drain import DrainGate
from kvplane_runtime.sidecar.engine import EngineMonitor
from kvplane_runtime.sidecar.metrics import METRICS, SidecarCollector
from kvplane_runtime.sidecar.promises import Result
from kvplane_runtime.sidecar.reference import reference
from kvplane_runtime.sidecar.signals import SIGNALS, Kind, Signal, normalise
from kvplane_runtime.signals.ledger import Batch, BlocksStored
from tests.sidecar.clock import Clock

RECORDED = Path(__file__).parent / "expositions" / "vllm-0.32.0.recorded.txt"
ALWAYS_KNOWN = {
    "kvplane_engine_ready",
    "kvplane_draining",
    "kvplane_proxy_requests_in_flight",
    "kvplane_proxy_held_body_bytes",
    "kvplane_proxy_client_disconnects",
    "kvplane_proxy_cut_responses",
    "kvplane_proxy_upstream_retries",
    "kvplane_sidecar_config_reloads",
    "kvplane_admission_decisions",
    "kvplane_admission_info",
    "kvplane_admission_kappa",
    "kvplane_admission_queue_seconds",
    "kvplane_admission_requests",
    "kvplane_client_time_to_first_token_seconds",
    "kvplane_retry_after_seconds",
    "kvplane_slo_requests",
}
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Sidecar:
    """The parts that metrics are read from, without any I/O."""

    def __init__(self, directory: Path) -> None:
        file = directory / "sidecar.json"
        file.write_text(json.dumps({"servedName": "chat"}))
        self.clock = Clock()
        self.config = WatchedConfig(file)
        self.engine = EngineMonitor(base_url="http://127.0.0.1:1", clock=self.clock)
        self.drain = DrainGate(engine=self.engine, clock=self.clock)
        admission = Admission(config=self.config.current, uniform=lambda: 0.5)
        self.gate = AdmissionGate(
            drain=self.drain, admission=admission, config=self.config, engine=self.engine, clock=self.clock
        )
        self.proxy = Proxy(
            gate=self.gate,
            upstream=UpstreamPool(host="127.0.0.1", port=1, limits=Limits()),
            limits=Limits(),
            max_body_bytes=lambda: 1024,
        )
        self.registry = CollectorRegistry()
        self.registry.register(
            SidecarCollector(
                config=self.config,
                engine=self.engine,
                drain=self.drain,
                gate=self.gate,
                proxy=self.proxy,
                clock=self.clock,
            )
        )

    def feed(self, text: str) -> None:
        """As a scrape of the engine does."""
        self.engine.take(normalise(text))

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def families(self) -> set[str]:
        return {family.name for family in text_string_to_metric_families(self.text())}

    def series(self) -> Series:
        """Samples by name and labels; asserts that each has the model's name."""
        found: Series = {}
        for family in text_string_to_metric_families(self.text()):
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("model_name") == "chat"
                found[sample.name, frozenset(labels.items())] = sample.value
        return found

    def value(self, name: str, **labels: str) -> float | None:
        return self.series().get((name, frozenset(labels.items())))


@pytest.fixture
def sidecar(tmp_path: Path) -> Sidecar:
    return Sidecar(tmp_path)


def test_with_nothing_known_only_the_sidecars_own_state_is_exported(sidecar: Sidecar) -> None:
    assert sidecar.families() == ALWAYS_KNOWN
    assert sidecar.value("kvplane_engine_ready") == 0
    assert sidecar.value("kvplane_sidecar_config_reloads_total", result="refused") == 0


OPTIONAL = """
vllm:spec_decode_num_draft_tokens_total 8
vllm:spec_decode_num_accepted_tokens_total 5
""" + "".join(
    f'vllm:{name}_bucket{{le="+Inf"}} 3\nvllm:{name}_sum 9\n'
    for name in ("kv_block_lifetime_seconds", "kv_block_idle_before_evict_seconds", "kv_block_reuse_gap_seconds")
)
"""What an engine exports only when it is told to."""


def test_with_everything_known_the_whole_table_is_exported(sidecar: Sidecar) -> None:
    sidecar.engine.kv.ledger.apply(
        Batch(sequence=0, timestamp=0.0, events=(BlocksStored((1, 2), 16),)), sidecar.clock()
    )
    sidecar.engine.kv.contexts = lambda: [100] * 13
    for _ in range(2):
        sidecar.feed(RECORDED.read_text() + OPTIONAL)
    sidecar.gate.tick()
    sidecar.engine.health.refused()
    sidecar.engine.health.answered(sidecar.clock.now)
    sidecar.engine.version = "0.32.0"
    sidecar.proxy.stats.responses[200, "engine"] += 1
    assert sidecar.families() == {metric.name for metric in METRICS}


@pytest.mark.parametrize(
    ("exposition", "name", "labels", "value"),
    [
        ("vllm:kv_cache_usage_perc 0.5", "kvplane_kv_cache_usage_ratio", {}, 0.5),
        ("vllm:num_preemptions_total 3", "kvplane_preemptions_total", {}, 3),
        ("vllm:prefix_cache_queries_total 3", "kvplane_prefix_cache_queries_tokens_total", {}, 3),
        ("vllm:prefix_cache_hits_total 3", "kvplane_prefix_cache_hits_tokens_total", {}, 3),
        ("vllm:num_requests_running 3", "kvplane_requests_running", {}, 3),
        ("vllm:num_requests_waiting 3", "kvplane_requests_waiting", {}, 3),
        ("vllm:prompt_tokens_total 3", "kvplane_prompt_tokens_total", {}, 3),
        ("vllm:generation_tokens_total 3", "kvplane_generation_tokens_total", {}, 3),
    ],
)
def test_a_signal_is_exported_when_the_engine_has_it(
    sidecar: Sidecar, exposition: str, name: str, labels: dict[str, str], value: float
) -> None:
    assert sidecar.value(name, **labels) is None
    sidecar.feed(exposition)
    assert sidecar.value(name, **labels) == value
    assert {"kvplane_signal_age_seconds"} | ALWAYS_KNOWN < sidecar.families()
    sidecar.feed("")
    assert sidecar.value(name, **labels) is None


@pytest.mark.parametrize(
    "signal", [signal for signal in SIGNALS if signal.kind is Kind.HISTOGRAM], ids=lambda s: s.name
)
def test_a_histogram_keeps_the_engines_buckets(sidecar: Sidecar, signal: Signal) -> None:
    source = f"vllm:{signal.sources[0]}"
    sidecar.feed(f'{source}_bucket{{le="0.5"}} 1\n{source}_bucket{{le="+Inf"}} 3\n{source}_sum 9\n')
    name = f"kvplane_{signal.name}"
    series = sidecar.series()
    assert {key: value for key, value in series.items() if key[0].startswith(name)} == {
        (f"{name}_bucket", frozenset({("le", "0.5")})): 1,
        (f"{name}_bucket", frozenset({("le", "+Inf")})): 3,
        (f"{name}_count", frozenset()): 3,
        (f"{name}_sum", frozenset()): 9,
    }


def test_blocks_are_known_only_with_both_size_and_usage(sidecar: Sidecar) -> None:
    size = 'vllm:cache_config_info{block_size="32",num_gpu_blocks="97"} 1'
    sidecar.feed(size)
    assert sidecar.value("kvplane_kv_cache_capacity_tokens") == 96 * 32
    assert sidecar.value("kvplane_kv_cache_block_size_tokens") == 32
    assert sidecar.value("kvplane_kv_cache_blocks", state="used") is None
    sidecar.feed(size + "\nvllm:kv_cache_usage_perc 0.25\n")
    assert sidecar.value("kvplane_kv_cache_blocks", state="used") == 24
    assert sidecar.value("kvplane_kv_cache_blocks", state="free") == 72
    assert sidecar.value("kvplane_kv_cache_blocks", state="cached") is None  # not exported by the engine


def test_a_signal_that_vanishes_grows_old(sidecar: Sidecar) -> None:
    sidecar.feed("vllm:kv_cache_usage_perc 0.5\nvllm:num_requests_running 1\n")
    sidecar.clock.pass_seconds(7)
    sidecar.feed("vllm:num_requests_running 1\n")
    assert sidecar.value("kvplane_signal_age_seconds", signal="kv_cache_usage_ratio") == 7
    assert sidecar.value("kvplane_signal_age_seconds", signal="requests_running") == 0
    assert sidecar.value("kvplane_signal_age_seconds", signal="preemptions") is None


def test_the_engines_identity_and_startup(sidecar: Sidecar) -> None:
    assert sidecar.value("kvplane_startup_seconds") is None
    sidecar.clock.pass_seconds(61)
    sidecar.engine.health.refused()
    sidecar.engine.health.answered(sidecar.clock.now)
    sidecar.engine.version = "0.32.0"
    assert sidecar.value("kvplane_startup_seconds") == 61
    assert sidecar.value("kvplane_engine_ready") == 1
    assert sidecar.value("kvplane_engine_info", version="0.32.0") == 1


def test_the_proxys_own_counts(sidecar: Sidecar) -> None:
    stats = sidecar.proxy.stats
    stats.responses.update({(200, "engine"): 4, (503, "proxy"): 2})
    stats.client_disconnects, stats.cut_responses, stats.retries = 5, 6, 7
    sidecar.proxy.held_bytes = 8
    sidecar.drain.in_flight = 9
    sidecar.config.reloads["refused"] = 10
    sidecar.drain.begin()
    assert sidecar.value("kvplane_proxy_responses_total", code="200", origin="engine") == 4
    assert sidecar.value("kvplane_proxy_responses_total", code="503", origin="proxy") == 2
    assert sidecar.value("kvplane_proxy_client_disconnects_total") == 5
    assert sidecar.value("kvplane_proxy_cut_responses_total") == 6
    assert sidecar.value("kvplane_proxy_upstream_retries_total") == 7
    assert sidecar.value("kvplane_proxy_held_body_bytes") == 8
    assert sidecar.value("kvplane_proxy_requests_in_flight") == 9
    assert sidecar.value("kvplane_sidecar_config_reloads_total", result="refused") == 10
    assert sidecar.value("kvplane_draining") == 1


def test_the_reference_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == reference(), "run: python -m kvplane_runtime.sidecar.reference > docs/metrics.md"


def test_decisions_are_exported_from_zero_on_and_by_reason(sidecar: Sidecar) -> None:
    refused = {"decision": "refused", "reason": "kv"}
    assert sidecar.value("kvplane_admission_decisions_total", **refused) == 0
    sidecar.gate.admission.decisions["refused", "kv"] += 1
    assert sidecar.value("kvplane_admission_decisions_total", **refused) == 1
    entry = sidecar.gate.admission.offer(Demand(prompt_tokens=100), now=sidecar.clock())
    sidecar.gate.decided(entry)
    assert sidecar.value("kvplane_admission_decisions_total", decision="admitted", reason="") == 1
    assert sidecar.value("kvplane_admission_requests", state="running") == 1
    assert sidecar.value("kvplane_admission_queue_seconds_count") == 1


def test_the_expected_peak_is_known_with_the_capacity(sidecar: Sidecar) -> None:
    assert sidecar.value("kvplane_admission_kv_peak_ratio") is None
    sidecar.feed(RECORDED.read_text())
    sidecar.gate.tick()
    assert sidecar.value("kvplane_admission_kv_peak_ratio") is not None


@pytest.mark.parametrize("policy", ["Enforce", "Observe", "Off"])
def test_what_became_of_the_promises_is_exported_from_zero_on(sidecar: Sidecar, policy: str) -> None:
    configured = {"servedName": "chat", "admission": {"policy": policy}}
    sidecar.config.current = SidecarConfig.model_validate(configured)
    sidecar.gate.promises.results[Result.TTFT_MISSED] += 2
    counted = {result: sidecar.value("kvplane_slo_requests_total", result=result) for result in Result}
    assert counted == {result: 2 if result is Result.TTFT_MISSED else 0 for result in Result}
    told = sidecar.gate.promises.state()
    assert (told.kept_total, told.broken_total) == (0, 2)
    sidecar.gate.promises.first_token_seconds.add(2.5)
    name = "kvplane_client_time_to_first_token_seconds"
    assert [sidecar.value(f"{name}_bucket", le=bound) for bound in ("1.0", "2.5", "+Inf")] == [0, 1, 1]
    assert sidecar.value(f"{name}_sum") == 2.5


def test_policy_off_exports_no_decisions(sidecar: Sidecar) -> None:
    off = {"servedName": "chat", "admission": {"policy": "Off"}}
    sidecar.config.current = SidecarConfig.model_validate(off)
    sidecar.gate.tick()
    assert sidecar.value("kvplane_admission_info", policy="Off", reservation="Expected") == 1
    assert "kvplane_admission_decisions" not in sidecar.families()

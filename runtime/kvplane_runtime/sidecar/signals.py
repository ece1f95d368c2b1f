"""The engine's metrics, normalised over its versions. Pure.

vLLM renamed its metrics repeatedly, and readers that knew only one name broke silently. Here one table says under which
names a signal has been exported; the rule is: the first name present wins, and a signal that is not present is unknown
(absent, ``None``), never 0. Expositions of the versions at which names changed are kept in the tests.

Versions in the comments: "since 0.8.5-0.9.2" means that the name is absent in the former and present in the latter.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvplane_api.wire import EngineSignals
from kvplane_runtime.histogram import Histogram
from kvplane_runtime.sidecar import exposition
from kvplane_runtime.sidecar.exposition import Sample
from kvplane_runtime.signals.account import Counters

PREFIX: Final = "vllm:"
KV_BLOCK_LIFETIME: Final = "kv_block_lifetime_seconds"


class Kind(enum.StrEnum):
    """What the engine's metric is, and how its series (one per data-parallel rank) become the pod's one series."""

    GAUGE = "gauge"
    """Summed."""
    RATIO = "ratio"
    """A gauge in 0..1: the mean, as every rank has the same capacity."""
    COUNTER = "counter"
    """Summed; exported with the suffix ``_total`` by prometheus_client, without it by other libraries."""
    HISTOGRAM = "histogram"
    """Summed by bucket."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One thing the engine measures."""

    name: str
    """Normalised name: the ``kvplane_`` metric without that prefix and without ``_total``."""
    kind: Kind
    sources: tuple[str, ...]
    """The engine's names without ``vllm:`` and without ``_total``, newest first."""
    description: str


SIGNALS: Final = (
    Signal(
        "kv_cache_usage_ratio",
        Kind.RATIO,
        # since 0.8.5-0.9.2; the old name is hidden in 0.11 and gone in 0.12
        ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
        "Share of the engine's KV blocks that running requests hold, 0 to 1. Blocks that are cached but not referenced "
        "count as free, so it does not show prefix-cache pressure.",
    ),
    Signal(
        "preemptions",
        Kind.COUNTER,
        ("num_preemptions",),
        "Requests preempted: each lost all its KV blocks and is computed again.",
    ),
    Signal(
        "prefix_cache_queries_tokens",
        Kind.COUNTER,
        # since 0.8.5-0.9.2. The old name gpu_prefix_cache_queries is left out: in 0.8.5 it counts blocks, not tokens.
        ("prefix_cache_queries",),
        "Prompt tokens looked up in the prefix cache.",
    ),
    Signal(
        "prefix_cache_hits_tokens",
        Kind.COUNTER,
        ("prefix_cache_hits",),  # as above
        "Prompt tokens found in the prefix cache, not computed again.",
    ),
    Signal(
        "external_prefix_cache_hits_tokens",
        Kind.COUNTER,
        ("external_prefix_cache_hits",),  # since 0.10.2-0.12
        "Prompt tokens whose KV came from another tier (offloaded blocks, another engine) instead of being computed.",
    ),
    Signal("requests_running", Kind.GAUGE, ("num_requests_running",), "Requests in the engine's running batch."),
    Signal(
        "requests_waiting",
        Kind.GAUGE,
        # since 0.19-0.20, the same figure split by reason
        ("num_requests_waiting_by_reason", "num_requests_waiting"),
        "Requests waiting in the engine's own queue.",
    ),
    Signal("prompt_tokens", Kind.COUNTER, ("prompt_tokens",), "Prompt tokens processed."),
    Signal("generation_tokens", Kind.COUNTER, ("generation_tokens",), "Tokens generated."),
    Signal(
        "time_to_first_token_seconds",
        Kind.HISTOGRAM,
        ("time_to_first_token_seconds",),
        "Time from a request's arrival at the engine to its first token.",
    ),
    Signal(
        "inter_token_latency_seconds",
        Kind.HISTOGRAM,
        # since 0.9.2-0.10.2; the old name is gone in 0.16
        ("inter_token_latency_seconds", "time_per_output_token_seconds"),
        "Time between two tokens of a request.",
    ),
    Signal(
        "e2e_request_latency_seconds",
        Kind.HISTOGRAM,
        ("e2e_request_latency_seconds",),
        "Time from a request's arrival at the engine to its last token.",
    ),
    Signal(
        "queue_time_seconds",
        Kind.HISTOGRAM,
        ("request_queue_time_seconds",),
        "Time a request waited in the engine's own queue.",
    ),
    Signal("request_prompt_tokens", Kind.HISTOGRAM, ("request_prompt_tokens",), "Prompt tokens per finished request."),
    Signal(
        "request_generation_tokens",
        Kind.HISTOGRAM,
        ("request_generation_tokens",),
        "Tokens generated per finished request.",
    ),
    Signal(
        "request_prefill_kv_computed_tokens",
        Kind.HISTOGRAM,
        ("request_prefill_kv_computed_tokens",),  # since 0.12-0.13
        "Prompt tokens computed per finished request: those found in the prefix cache are not in it.",
    ),
    Signal(
        "spec_decode_draft_tokens",
        Kind.COUNTER,
        ("spec_decode_num_draft_tokens",),  # only with speculative decoding, as the next
        "Tokens that speculative decoding proposed.",
    ),
    Signal(
        "spec_decode_accepted_tokens",
        Kind.COUNTER,
        ("spec_decode_num_accepted_tokens",),
        "Tokens that speculative decoding proposed and the model accepted.",
    ),
    Signal(
        KV_BLOCK_LIFETIME,
        Kind.HISTOGRAM,
        ("kv_block_lifetime_seconds",),  # only with --kv-cache-metrics, as the next two
        "Time from the allocation of a KV block to its eviction, of a sample of blocks.",
    ),
    Signal(
        "kv_block_idle_before_evict_seconds",
        Kind.HISTOGRAM,
        ("kv_block_idle_before_evict_seconds",),
        "Time from the last use of a KV block to its eviction, of a sample of blocks.",
    ),
    Signal(
        "kv_block_reuse_gap_seconds",
        Kind.HISTOGRAM,
        ("kv_block_reuse_gap_seconds",),
        "Time between two uses of a KV block, of a sample of blocks.",
    ),
)

KV_CACHE: Final = "kv_cache"
"""Signal name of the cache's size, which is exported as labels of one info metric."""
_CACHE_INFO: Final = PREFIX + "cache_config_info"
NEEDED: Final = ("kv_cache_usage_ratio", "preemptions", KV_CACHE)
"""What admission cannot do without: without them it counts only what it let in itself."""


@dataclass(frozen=True, slots=True)
class KvCache:
    """Size of the KV cache over all data-parallel ranks."""

    blocks: int
    """Blocks that requests can use: vLLM keeps one per rank as its null block."""
    block_size_tokens: int
    capacity_tokens: int
    """Tokens that fit into these blocks: from the engine's own figure where it exports one (since 0.21-0.24; it holds for
    hybrid models too, but counts the null block), else blocks x size."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one scrape showed; a signal that is not a key is unknown."""

    values: Mapping[str, float]
    histograms: Mapping[str, Histogram]
    kv_cache: KvCache | None

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the signals that this scrape has."""
        return (*self.values, *self.histograms, *((KV_CACHE,) if self.kv_cache else ()))

    @property
    def kv_blocks_used(self) -> int | None:
        """Blocks that running requests hold; None unless both usage and size are known."""
        usage = self.values.get("kv_cache_usage_ratio")
        return None if usage is None or self.kv_cache is None else round(usage * self.kv_cache.blocks)

    def wire(self, *, max_model_len_tokens: int | None) -> EngineSignals:
        """The part of it that ``/state`` carries."""
        return EngineSignals(
            kv_cache_usage_ratio=self.values.get("kv_cache_usage_ratio"),
            kv_cache_blocks=self.kv_cache.blocks if self.kv_cache else None,
            kv_cache_block_size_tokens=self.kv_cache.block_size_tokens if self.kv_cache else None,
            kv_cache_capacity_tokens=self.kv_cache.capacity_tokens if self.kv_cache else None,
            requests_running=self._whole("requests_running"),
            requests_waiting=self._whole("requests_waiting"),
            preemptions_total=self._whole("preemptions"),
            prompt_tokens_total=self._whole("prompt_tokens"),
            prefix_hits_tokens_total=self._whole("prefix_cache_hits_tokens"),
            generation_tokens_total=self._whole("generation_tokens"),
            max_model_len_tokens=max_model_len_tokens,
        )

    def counters(self) -> Counters:
        """The part of it that is about KV memory."""
        lifetimes = self.histograms.get(KV_BLOCK_LIFETIME)
        return Counters(
            usage=self.values.get("kv_cache_usage_ratio"),
            kv_blocks=self.kv_cache.blocks if self.kv_cache else None,
            block_size_tokens=self.kv_cache.block_size_tokens if self.kv_cache else None,
            running=self.values.get("requests_running"),
            preemptions=self.values.get("preemptions"),
            prompt_tokens=self.values.get("prompt_tokens"),
            generation_tokens=self.values.get("generation_tokens"),
            prefix_queries_tokens=self.values.get("prefix_cache_queries_tokens"),
            prefix_hits_tokens=self.values.get("prefix_cache_hits_tokens"),
            reloaded_tokens=self.values.get("external_prefix_cache_hits_tokens"),
            sampled_evictions=lifetimes.count if lifetimes else None,
        )

    def _whole(self, name: str) -> int | None:
        value = self.values.get(name)
        return None if value is None else round(value)


def missing_signals(scrape: Scrape) -> tuple[str, ...]:
    """The NEEDED signals that ``scrape`` lacks, each with the engine's names that were looked for."""
    looked_for = {signal.name: tuple(PREFIX + source for source in signal.sources) for signal in SIGNALS}
    looked_for[KV_CACHE] = (_CACHE_INFO,)
    return tuple(f"{name} ({', '.join(looked_for[name])})" for name in NEEDED if name not in scrape.present)


def _series_names(signal: Signal, source: str) -> tuple[str, ...]:
    match signal.kind:
        case Kind.COUNTER:
            return (f"{PREFIX}{source}_total", f"{PREFIX}{source}")
        case Kind.HISTOGRAM:
            return (f"{PREFIX}{source}_bucket", f"{PREFIX}{source}_sum")
        case _:
            return (f"{PREFIX}{source}",)


WANTED: Final = frozenset(
    {name for signal in SIGNALS for source in signal.sources for name in _series_names(signal, source)} | {_CACHE_INFO}
)
"""Every series name that any version may export a signal under."""


def normalise(text: str) -> Scrape:
    """Reads an exposition; raises ValueError if a line of a known signal is malformed."""
    found = exposition.read(text, WANTED)
    values: dict[str, float] = {}
    histograms: dict[str, Histogram] = {}
    for signal in SIGNALS:
        if signal.kind is Kind.HISTOGRAM:
            histogram = _histogram(signal, found)
            if histogram is not None:
                histograms[signal.name] = histogram
            continue
        samples = _first_present(signal, found)
        numbers = [sample.value for sample in samples if math.isfinite(sample.value)]
        if numbers:
            total = math.fsum(numbers)
            values[signal.name] = total / len(numbers) if signal.kind is Kind.RATIO else total
    return Scrape(values=values, histograms=histograms, kv_cache=_kv_cache(found.get(_CACHE_INFO, ())))


def _first_present(signal: Signal, found: Mapping[str, list[Sample]]) -> list[Sample]:
    names = (name for source in signal.sources for name in _series_names(signal, source))
    return next((found[name] for name in names if name in found), [])


def _histogram(signal: Signal, found: Mapping[str, list[Sample]]) -> Histogram | None:
    for source in signal.sources:
        bucket_name, sum_name = _series_names(signal, source)
        if bucket_name in found and sum_name in found:
            counts: dict[str, float] = {}
            for sample in found[bucket_name]:
                bound = sample.labels["le"]
                counts[bound] = counts.get(bound, 0.0) + sample.value
            return Histogram(
                buckets=tuple(sorted(counts.items(), key=lambda bucket: float(bucket[0]))),
                sum=math.fsum(sample.value for sample in found[sum_name]),
            )
    return None


def _kv_cache(samples: Sequence[Sample]) -> KvCache | None:
    """Size from the labels of cache_config_info; a label that is not a number (``None`` before profiling) is unknown."""
    blocks = size = capacity = 0
    for sample in samples:
        try:
            total = int(sample.labels["num_gpu_blocks"])
            size = int(sample.labels["block_size"])
        except (KeyError, ValueError):
            return None
        if total < 2:
            return None
        exported = sample.labels.get("kv_cache_size_tokens", "")
        tokens = int(exported) if exported.isdecimal() else total * size
        blocks += total - 1
        capacity += tokens * (total - 1) // total
    return KvCache(blocks=blocks, block_size_tokens=size, capacity_tokens=capacity) if blocks else None

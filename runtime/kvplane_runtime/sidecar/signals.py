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


MOST_COUNT: Final = 2.0**53
"""Beyond it a float counts no more one by one. No engine's count, size or time comes near."""
_MOST_RATIO: Final = 1.05
"""1, and a rounding error."""
_MOST_DIGITS: Final = 15
"""Of a number in a label: all of them are below ``MOST_COUNT``."""


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

WAITING_PROMPT_TOKENS: Final = "kvplane_ring_waiting_prompt_tokens"
WAITING_KV_TOKENS: Final = "kvplane_ring_waiting_kv_tokens"
"""What waits inside a ring, for whoever scales it; no other engine tells it. Prometheus gets them as the ring's own metrics
(:mod:`passed_on`), so they are no signals of the table."""

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
    waiting_prompt_tokens: int | None = None
    """Of what waits inside a ring, as the next; None for any other engine."""
    waiting_kv_tokens: int | None = None

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
            waiting_prompt_tokens=self.waiting_prompt_tokens,
            waiting_kv_tokens=self.waiting_kv_tokens,
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


def _bounds(signal: Signal, name: str) -> tuple[float, float]:
    """Least and most that a sample of this series can be. A clock that is set back makes times negative, and so their sum."""
    if signal.kind is Kind.RATIO:
        return 0.0, _MOST_RATIO
    return -MOST_COUNT if signal.kind is Kind.HISTOGRAM and name.endswith("_sum") else 0.0, MOST_COUNT


_BOUNDS: Final = {
    name: _bounds(signal, name)
    for signal in SIGNALS
    for source in signal.sources
    for name in _series_names(signal, source)
} | dict.fromkeys((_CACHE_INFO, WAITING_PROMPT_TOKENS, WAITING_KV_TOKENS), (0.0, MOST_COUNT))
WANTED: Final = frozenset(_BOUNDS)
"""Every series name that any version may export a signal under."""


def normalise(text: str) -> Scrape:
    """Reads an exposition. Raises ValueError, with a sentence, and nothing else whatever the text is.

    That is for a line of a known signal that is malformed, and for a number that no engine can have. NaN and the infinite
    are what libraries write for what is not known, and mean that here.
    """
    found = exposition.read(text, WANTED)
    for name, samples in found.items():
        _check(name, samples)
    values: dict[str, float] = {}
    histograms: dict[str, Histogram] = {}
    for signal in SIGNALS:
        if signal.kind is Kind.HISTOGRAM:
            histogram = _histogram(signal, found)
            if histogram is not None:
                histograms[signal.name] = histogram
            continue
        numbers = _known(_first_present(signal, found))
        if numbers:
            total = math.fsum(numbers)
            values[signal.name] = total / len(numbers) if signal.kind is Kind.RATIO else total
    return Scrape(
        values=values,
        histograms=histograms,
        kv_cache=_kv_cache(found.get(_CACHE_INFO, ())),
        waiting_prompt_tokens=_tokens(found.get(WAITING_PROMPT_TOKENS, ())),
        waiting_kv_tokens=_tokens(found.get(WAITING_KV_TOKENS, ())),
    )


def _tokens(samples: Sequence[Sample]) -> int | None:
    """The number in a gauge without labels of its own; None where it is not known."""
    known = _known(samples)
    return round(math.fsum(known)) if known else None


def _known(samples: Sequence[Sample]) -> list[float]:
    """The values of those that are numbers: the others stand for what is not known."""
    return [sample.value for sample in samples if math.isfinite(sample.value)]


def _check(name: str, samples: Sequence[Sample]) -> None:
    """Raises ValueError for a finite value that this series cannot have."""
    least, most = _BOUNDS[name]
    for sample in samples:
        if math.isfinite(sample.value) and not least <= sample.value <= most:
            raise ValueError(f"{name} is {sample.value:g}, and can only be from {least:g} to {most:g}.")


def _first_present(signal: Signal, found: Mapping[str, list[Sample]]) -> list[Sample]:
    names = (name for source in signal.sources for name in _series_names(signal, source))
    return next((found[name] for name in names if name in found), [])


def _histogram(signal: Signal, found: Mapping[str, list[Sample]]) -> Histogram | None:
    for source in signal.sources:
        bucket_name, sum_name = _series_names(signal, source)
        if bucket_name in found and sum_name in found:
            return _summed(bucket_name, found[bucket_name], found[sum_name])
    return None


def _summed(name: str, buckets: Sequence[Sample], sums: Sequence[Sample]) -> Histogram | None:
    """One histogram of those of all ranks; None where a number of theirs is not known."""
    if not all(math.isfinite(sample.value) for sample in (*buckets, *sums)):
        return None
    counts: dict[str, float] = {}
    for sample in buckets:
        bound = sample.labels.get("le", "")
        counts[bound] = counts.get(bound, 0.0) + sample.value
    ascending = sorted(counts.items(), key=lambda bucket: _upper_bound(name, bucket[0]))
    last = ascending[-1][0]
    if _upper_bound(name, last) != math.inf:
        raise ValueError(f"{name} has no bucket with le='+Inf', which counts all; its last is le={last[:40]!r}.")
    return Histogram(buckets=tuple(ascending), sum=math.fsum(sample.value for sample in sums))


def _upper_bound(name: str, text: str) -> float:
    """The label ``le`` of a bucket as a number; one that is missing is the same as an empty one."""
    try:
        bound = float(text)
    except ValueError:
        bound = math.nan
    if math.isnan(bound):
        raise ValueError(f"{name} has a bucket with le={text[:40]!r}, which is no upper bound.")
    return bound


def _kv_cache(samples: Sequence[Sample]) -> KvCache | None:
    """Size from the labels of cache_config_info; a label that is not a number (``None`` before profiling) is unknown."""
    blocks = size = capacity = 0
    for sample in samples:
        total, each = _label(sample, "num_gpu_blocks"), _label(sample, "block_size")
        if total is None or total < 2 or not each:
            return None
        tokens = _label(sample, "kv_cache_size_tokens") or total * each
        size = each
        blocks += total - 1
        capacity += tokens * (total - 1) // total
    return KvCache(blocks=blocks, block_size_tokens=size, capacity_tokens=capacity) if blocks else None


def _label(sample: Sample, name: str) -> int | None:
    """The whole number in a label of cache_config_info; None where there is none."""
    text = sample.labels.get(name, "")
    if not text.isdecimal():
        return None
    if len(text) > _MOST_DIGITS:
        raise ValueError(
            f"{_CACHE_INFO} has {name}={text[:40]!r} ({len(text)} digits; at most {_MOST_DIGITS} are possible)."
        )
    return int(text)

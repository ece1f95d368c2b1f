"""What vLLM exports, by version, and what becomes of it.

The expositions: ``vllm-0.32.0.recorded.txt`` was recorded from a running engine; the others come from the sources of
their versions (see the head of each file), at which names changed.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvplane_runtime.ring.metrics import RingCollector, Tally
from kvplane_runtime.sidecar import exposition
from kvplane_runtime.sidecar.signals import (
    KV_CACHE,
    SIGNALS,
    WANTED,
    Kind,
    KvCache,
    Scrape,
    missing_signals,
    normalise,
)
from kvplane_runtime.signals.account import Counters, KvAccount
from kvplane_runtime.signals.ledger import KvEventLedger
from tests.ring.fake_engine import STATE

EXPOSITIONS = Path(__file__).parent / "expositions"
VERSIONS = ("0.8.5", "0.9.2", "0.10.2", "0.12.0", "0.16.0", "0.20.2")
OPTIONS = {
    "spec_decode_draft_tokens",
    "spec_decode_accepted_tokens",
    "kv_block_lifetime_seconds",
    "kv_block_idle_before_evict_seconds",
    "kv_block_reuse_gap_seconds",
}
"""What the engine exports only with speculative decoding, and with --kv-cache-metrics."""
ALL = {signal.name for signal in SIGNALS} | {KV_CACHE}
LATER = {
    "external_prefix_cache_hits_tokens": ("0.8.5", "0.9.2", "0.10.2"),
    "request_prefill_kv_computed_tokens": ("0.8.5", "0.9.2", "0.10.2", "0.12.0"),
}
"""Versions that did not have a signal yet."""


def load(version: str) -> str:
    (path,) = EXPOSITIONS.glob(f"vllm-{version}.*.txt")
    return path.read_text()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gives_the_same_signals(version: str) -> None:
    scrape = normalise(load(version))
    expected = {
        "kv_cache_usage_ratio": 0.25,
        "preemptions": 1,
        "prefix_cache_queries_tokens": 640,
        "prefix_cache_hits_tokens": 64,
        "requests_running": 2,
        "requests_waiting": 3,
        "prompt_tokens": 640,
        "generation_tokens": 120,
        "external_prefix_cache_hits_tokens": 0,
    }
    if version in LATER["external_prefix_cache_hits_tokens"]:
        del expected["external_prefix_cache_hits_tokens"]
    if version == "0.8.5":  # counts blocks, under another name: unknown rather than wrong
        expected = {name: value for name, value in expected.items() if not name.startswith("prefix_cache")}
    assert scrape.values == expected
    assert scrape.kv_cache == KvCache(blocks=96, block_size_tokens=32, capacity_tokens=96 * 32)
    assert scrape.kv_blocks_used == 24
    histograms = {signal.name for signal in SIGNALS if signal.kind is Kind.HISTOGRAM} - OPTIONS
    histograms -= {name for name, versions in LATER.items() if version in versions}
    assert set(scrape.present) == set(expected) | histograms | {KV_CACHE}
    assert missing_signals(scrape) == ()
    for name, total in {
        "time_to_first_token_seconds": 0.12,
        "inter_token_latency_seconds": 0.08,
        "e2e_request_latency_seconds": 1.6,
        "queue_time_seconds": 0.004,
        "request_prompt_tokens": 640,
        "request_generation_tokens": 120,
    }.items():
        histogram = scrape.histograms[name]
        assert histogram.sum == pytest.approx(total)
        counts = [count for _, count in histogram.buckets]
        assert counts == sorted(counts)
        assert counts[-1] == 4
        assert histogram.buckets[-1][0] == "+Inf"


def test_the_recorded_engine_has_every_signal() -> None:
    scrape = normalise(load("0.32.0"))
    assert set(scrape.present) == ALL - OPTIONS
    assert missing_signals(scrape) == ()
    assert scrape.values == {
        "kv_cache_usage_ratio": pytest.approx(95 / 96),
        "preemptions": 44,
        "prefix_cache_queries_tokens": 11553,
        "prefix_cache_hits_tokens": 6720,
        "requests_running": 13,
        "requests_waiting": 6,
        "prompt_tokens": 11553,
        "generation_tokens": 6626,
        "external_prefix_cache_hits_tokens": 0,
    }
    assert scrape.kv_cache == KvCache(blocks=96, block_size_tokens=32, capacity_tokens=96 * 32)
    assert scrape.kv_blocks_used == 95


def test_options_of_the_engine_add_signals() -> None:
    scrape = normalise(load("0.32.0-options"))
    assert set(scrape.present) == OPTIONS | {"requests_running", "kv_cache_usage_ratio"}
    assert scrape.values["spec_decode_draft_tokens"] == 6
    assert scrape.values["spec_decode_accepted_tokens"] == 3
    assert scrape.histograms["kv_block_lifetime_seconds"].sum == 74
    assert scrape.counters() == Counters(usage=0.25, running=2, sampled_evictions=2)


def test_the_account_gets_what_the_engine_says_of_its_cache() -> None:
    scrape = normalise(load("0.32.0"))
    assert scrape.counters() == Counters(
        usage=scrape.values["kv_cache_usage_ratio"],
        kv_blocks=96,
        block_size_tokens=32,
        running=13,
        preemptions=44,
        prompt_tokens=11553,
        generation_tokens=6626,
        prefix_queries_tokens=11553,
        prefix_hits_tokens=6720,
        reloaded_tokens=0,
        sampled_evictions=None,
    )


def test_a_missing_signal_is_named_with_all_that_was_looked_for() -> None:
    assert missing_signals(normalise("")) == (
        "kv_cache_usage_ratio (vllm:kv_cache_usage_perc, vllm:gpu_cache_usage_perc)",
        "preemptions (vllm:num_preemptions)",
        "kv_cache (vllm:cache_config_info)",
    )
    renamed = load("0.32.0").replace("vllm:num_preemptions", "vllm:num_evictions")
    assert missing_signals(normalise(renamed)) == ("preemptions (vllm:num_preemptions)",)


@pytest.mark.parametrize("version", [*VERSIONS, "0.32.0", "0.32.0-options"])
def test_the_reader_agrees_with_the_general_parser(version: str) -> None:
    text = load(version)
    expected: dict[str, list[exposition.Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in WANTED:
                expected.setdefault(sample.name, []).append(exposition.Sample(sample.labels, sample.value))
    assert exposition.read(text, WANTED) == expected


@pytest.mark.parametrize(
    ("line", "labels", "value"),
    [
        ("m 1", {}, 1.0),
        ("m{} 1e3", {}, 1000.0),
        ('m{a="b"} 1 1700000000000', {"a": "b"}, 1.0),
        ('m{ a = "b" , c="d",} NaN', {"a": "b", "c": "d"}, float("nan")),
        (r'm{a="q\"u\\o\nte, }"} -Inf', {"a": 'q"u\\o\nte, }'}, float("-inf")),
    ],
)
def test_lines_of_the_format(line: str, labels: dict[str, str], value: float) -> None:
    (sample,) = exposition.read(f"# HELP m x\n# TYPE m gauge\n{line}\nother 1\n", {"m"})["m"]
    assert sample.labels == labels
    assert sample.value == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("line", ["m", "m{ 1", "m one", 'm{a="b} 1', "m{a} 1", "m 1 2 3"])
def test_a_malformed_line_of_a_wanted_series_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match="malformed"):
        exposition.read(line, {"m"})
    assert exposition.read(line, {"n"}) == {}


def test_an_engine_without_metrics_is_unknown_not_zero() -> None:
    """``--disable-log-stats`` removes everything."""
    scrape = normalise("# nothing\n")
    assert scrape == Scrape(values={}, histograms={}, kv_cache=None)
    assert scrape.present == ()
    assert set(scrape.wire(max_model_len_tokens=None).model_dump().values()) == {None}


def test_what_waits_inside_a_ring_is_told_to_whoever_scales_it() -> None:
    registry = CollectorRegistry()
    registry.register(RingCollector(state=lambda: STATE, tally=Tally(), in_flight=lambda: 2))
    ring = normalise(generate_latest(registry).decode()).wire(max_model_len_tokens=None)
    assert (ring.requests_waiting, ring.waiting_prompt_tokens, ring.waiting_kv_tokens) == (2, 50, 30)
    paged = normalise(load("0.32.0")).wire(max_model_len_tokens=None)
    assert (paged.requests_waiting, paged.waiting_prompt_tokens, paged.waiting_kv_tokens) == (6, None, None)
    assert normalise("kvplane_ring_waiting_kv_tokens NaN").waiting_kv_tokens is None


RANK = """\
vllm:kv_cache_usage_perc{engine="N"} 0.N
vllm:num_requests_running{engine="N"} 3
vllm:num_preemptions_total{engine="N"} 5
vllm:cache_config_info{engine="N",block_size="16",num_gpu_blocks="101"} 1
vllm:time_to_first_token_seconds_bucket{engine="N",le="0.1"} 1
vllm:time_to_first_token_seconds_bucket{engine="N",le="+Inf"} 2
vllm:time_to_first_token_seconds_sum{engine="N"} 0.5
"""


def test_data_parallel_ranks_become_one_series() -> None:
    scrape = normalise(RANK.replace("N", "2") + RANK.replace("N", "4"))
    assert scrape.values == {"kv_cache_usage_ratio": pytest.approx(0.3), "requests_running": 6, "preemptions": 10}
    assert scrape.kv_cache == KvCache(blocks=200, block_size_tokens=16, capacity_tokens=3200)
    assert scrape.histograms["time_to_first_token_seconds"].buckets == (("0.1", 2), ("+Inf", 4))


@pytest.mark.parametrize(
    "labels", ['block_size="16"', 'block_size="16",num_gpu_blocks="None"', 'num_gpu_blocks="0",block_size="16"']
)
def test_a_cache_whose_size_is_not_known_yet_is_unknown(labels: str) -> None:
    assert normalise(f"vllm:cache_config_info{{{labels}}} 1").kv_cache is None


def test_the_engines_own_count_of_tokens_is_preferred() -> None:
    """Blocks x size is wrong for hybrid models."""
    text = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="101",kv_cache_size_tokens="5050"} 1'
    assert normalise(text).kv_cache == KvCache(blocks=100, block_size_tokens=16, capacity_tokens=5000)


def test_values_that_are_not_numbers_are_unknown() -> None:
    assert normalise("vllm:num_requests_running NaN\nvllm:kv_cache_usage_perc +Inf").values == {}


def test_counters_without_the_suffix_are_read_too() -> None:
    assert normalise("vllm:num_preemptions 3").values == {"preemptions": 3}


# What no engine should say.

TTFT = "vllm:time_to_first_token_seconds"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (f'{TTFT}_bucket{{engine="0"}} 1\n{TTFT}_sum 1', f"{TTFT}_bucket has a bucket with le=''"),
        (f'{TTFT}_bucket{{le="nan"}} 1\n{TTFT}_sum 1', f"{TTFT}_bucket has a bucket with le='nan'"),
        (f'{TTFT}_bucket{{le="1"}} 1\n{TTFT}_sum 1', f"{TTFT}_bucket has no bucket with le='\\+Inf'"),
        (f'{TTFT}_bucket{{le="+Inf"}} 1\n' + f"{TTFT}_sum 1e308\n" * 2, rf"{TTFT}_sum is 1e\+308"),
        (f'{TTFT}_bucket{{le="+Inf"}} -1\n{TTFT}_sum 1', f"{TTFT}_bucket is -1"),
        ("vllm:num_requests_running 1e308\n" * 2, r"vllm:num_requests_running is 1e\+308"),
        ("vllm:num_preemptions_total -1", "vllm:num_preemptions_total is -1"),
        ("vllm:kv_cache_usage_perc 95", "vllm:kv_cache_usage_perc is 95, and can only be from 0 to 1.05"),
        (
            f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{"9" * 400}"}} 1\nvllm:kv_cache_usage_perc 0.5',
            r"vllm:cache_config_info has num_gpu_blocks='9{40}' \(400 digits",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_value(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}.*\\.$"):
        normalise(text)


@pytest.mark.parametrize("numbers", ["1 2 NaN", "1 NaN 2", "1 2 +Inf", "1 +Inf 2"])
def test_a_histogram_with_a_number_that_is_not_known_is_unknown(numbers: str) -> None:
    first, last, total = numbers.split()
    text = f'{TTFT}_bucket{{le="1"}} {first}\n{TTFT}_bucket{{le="+Inf"}} {last}\n{TTFT}_sum {total}'
    assert normalise(text).present == ()


def test_times_may_sum_to_less_than_nothing() -> None:
    """They are differences of a clock that may be set back."""
    scrape = normalise(f'{TTFT}_bucket{{le="+Inf"}} 1\n{TTFT}_sum -3')
    assert scrape.histograms["time_to_first_token_seconds"].sum == -3


def test_a_line_of_any_length_fails_as_fast() -> None:
    with pytest.raises(ValueError, match="malformed"):
        exposition.read("m" + " " * 1_000_000 + "{", {"m"})


TOGETHER = (
    f"{TTFT}_bucket",
    f"{TTFT}_sum",
    "vllm:kv_block_lifetime_seconds_bucket",
    "vllm:kv_block_lifetime_seconds_sum",
    "vllm:cache_config_info",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:num_requests_running",
)
"""Series that make something only beside each other."""
POSSIBLE = ("0", "1", "0.5", "101", "-0.0", "1e-320", "1e15", "NaN", "+Inf")
IMPOSSIBLE = (
    "-1",
    "-Inf",
    "1e308",
    "-1e308",
    "1e999",
    "9" * 400,
    "9" * 5000,
    "",
    "None",
    "0x10",
    "1_0",
    "\u0663",
    "one",
)
NUMBERS = st.sampled_from(POSSIBLE) | st.sampled_from(IMPOSSIBLE) | st.floats().map(repr)
LABELS = st.dictionaries(
    st.sampled_from(("le", "num_gpu_blocks", "block_size", "kv_cache_size_tokens", "engine", "model name")),
    NUMBERS | st.sampled_from(("16", "2")) | st.text(max_size=6),
    max_size=4,
)


@st.composite
def expositions(draw: st.DrawFn) -> str:
    """Lines with names that an engine has, and labels and values that none should have."""
    lines = []
    for _ in range(draw(st.integers(0, 8))):
        name = draw(st.sampled_from(TOGETHER) | st.sampled_from(sorted(WANTED)))
        labels = ",".join(f'{label}="{value}"' for label, value in draw(LABELS).items())
        lines.append(f"{name}{{{labels}}} {draw(NUMBERS)}" if draw(st.integers(0, 3)) else draw(st.text(max_size=20)))
    return "\n".join(lines)


@given(st.lists(expositions(), min_size=1, max_size=3))
def test_any_exposition_is_understood_or_refused_with_a_sentence(texts: list[str]) -> None:
    """And what is understood can be counted, and told to others."""
    account = KvAccount(ledger=KvEventLedger())
    account.contexts = lambda: [100, 60]
    for now, text in enumerate(texts):
        try:
            scrape = normalise(text)
        except ValueError as error:
            assert str(error).endswith(".")
            continue
        account.observe(scrape.counters(), 10.0 * now)
        assert scrape.wire(max_model_len_tokens=None).model_dump_json()

"""KV memory and thrash: does an engine compute again what it had, how full is its cache, and which requests fill it?

The order is that of docs/debugging-cache-pressure.md.
"""

from charts.dashboards.panels import (
    CHOSEN_PODS,
    ENGINE_VARIABLES,
    Query,
    Row,
    bars,
    board,
    graph,
    quantile,
    quantiles,
    rate,
    stat,
)
from charts.dashboards.phrases import TOKENS, TOKENS_PER_SECOND, thrashing, wasted_share

UID = "kvplane-kv-memory"


def kv_memory() -> str:
    """The dashboard's JSON."""
    return board(
        UID,
        "kvplane / KV memory and thrash",
        "Does an engine compute again what it had computed, how full is its KV cache, and which requests fill it? "
        "How to read it: docs/debugging-cache-pressure.md.",
        variables=ENGINE_VARIABLES,
        content=(_thrash(), _memory(), _reuse(), _requests()),
    )


def _thrash() -> Row:
    return Row(
        "Is it thrashing?",
        (
            stat(
                "Replicas thrashing",
                "Replicas whose detector says so now, of any kind.",
                thrashing(CHOSEN_PODS),
                unit="none",
                steps=((1, "red"),),
            ),
            stat(
                "Work done twice",
                "Tokens computed again, as a share of all tokens processed and generated.",
                wasted_share(CHOSEN_PODS),
                unit="percentunit",
                steps=((0.005, "orange"), (0.02, "red")),
                none="no tokens",
            ),
            stat(
                "Preemptions",
                "Requests per second that lost all their KV blocks and are computed again.",
                rate("kvplane_preemptions_total", CHOSEN_PODS),
                unit="reqps",
                steps=((0.1, "orange"), (1, "red")),
            ),
            stat(
                "Evictions",
                "KV blocks per second that were removed from the cache to make room. Alone no fault: one-shot traffic "
                "evicts what nobody asks for again.",
                rate("kvplane_kv_block_evictions_total", CHOSEN_PODS),
                unit="suffix:blocks/s",
            ),
            stat(
                "Prefix hits",
                "Share of prompt tokens that were found in the prefix cache and not computed.",
                _hit_rate(),
                unit="percentunit",
                none="no prompts",
            ),
            stat(
                "Fullest KV cache",
                "Share of KV blocks that running requests hold, on the fullest replica.",
                f"max(kvplane_kv_cache_usage_ratio{{{CHOSEN_PODS}}})",
                unit="percentunit",
                steps=((0.9, "orange"), (0.95, "red")),
            ),
            graph(
                "Replicas thrashing, by kind",
                "Replicas whose detector says so. preemption: running requests do not fit together. prefix: cached prompts are "
                "evicted before they are asked for again. offload: blocks go back and forth between device and host.",
                Query(f"sum by (kind) (kvplane_thrashing{{{CHOSEN_PODS}}})", "{{kind}}"),
                unit="none",
                steps=((1, "red"),),
            ),
            graph(
                "Tokens computed again",
                "Tokens per second that had been computed before: of preempted requests, and of prefixes that were evicted.",
                Query(rate("kvplane_wasted_tokens_total", CHOSEN_PODS, "pod"), "{{pod}}"),
                unit=TOKENS_PER_SECOND,
            ),
            graph(
                "Preempted tokens",
                "KV tokens per second that preempted requests lost. Few preemptions of long contexts cost more than many of "
                "short ones.",
                Query(rate("kvplane_preempted_tokens_total", CHOSEN_PODS, "pod"), "{{pod}}"),
                unit=TOKENS_PER_SECOND,
            ),
        ),
    )


def _memory() -> Row:
    return Row(
        "How full is the KV cache?",
        (
            graph(
                "KV cache in use",
                "Share of KV blocks that running requests hold. Blocks that are cached but not referenced count as free, so "
                "that a cache under pressure from prefixes looks empty here.",
                Query(f"max by (pod) (kvplane_kv_cache_usage_ratio{{{CHOSEN_PODS}}})", "{{pod}}"),
                unit="percentunit",
                maximum=1,
                steps=((0.9, "orange"), (0.95, "red")),
            ),
            graph(
                "KV blocks by state",
                "used: held by running requests. cached: not referenced, kept for a prompt that begins alike (known only with "
                "the engine's KV events). free: the rest.",
                Query(f"sum by (state) (kvplane_kv_cache_blocks{{{CHOSEN_PODS}}})", "{{state}}"),
                unit="none",
                stacked=True,
            ),
            graph(
                "Lost at the ends of blocks",
                "Token slots in last blocks that their requests do not fill: half a block per request on average. A smaller "
                "engine.blockSize loses less.",
                Query(f"sum by (pod) (kvplane_kv_cache_tail_waste_tokens{{{CHOSEN_PODS}}})", "{{pod}}"),
                unit=TOKENS,
            ),
            bars(
                "Capacity",
                "Tokens that each replica's KV cache holds. Replicas of one service should be alike.",
                Query(f"max by (pod) (kvplane_kv_cache_capacity_tokens{{{CHOSEN_PODS}}})", "{{pod}}"),
                unit=TOKENS,
                span=12,
            ),
            graph(
                "Time to first token and time in the engine's queue, p95",
                "What cache pressure costs users: requests wait for blocks in the engine's own queue, then for their prompt.",
                Query(quantile(0.95, "kvplane_time_to_first_token_seconds", CHOSEN_PODS), "first token"),
                Query(quantile(0.95, "kvplane_queue_time_seconds", CHOSEN_PODS), "engine's queue"),
                unit="s",
                span=12,
            ),
        ),
    )


def _reuse() -> Row:
    return Row(
        "What is evicted, and would it have been used?",
        (
            graph(
                "Evictions by source",
                "KV blocks removed per second, by how it is known. exact: from the engine's KV events. Where these are off, "
                "sampled (an upper bound) or estimated (preemptions only).",
                Query(rate("kvplane_kv_block_evictions_total", CHOSEN_PODS, "source"), "{{source}}"),
                unit="suffix:blocks/s",
                span=12,
            ),
            graph(
                "Prefix hits",
                "Share of prompt tokens that were found in the prefix cache. Falling while evictions rise: prompts that begin "
                "alike come back later than the cache can keep them.",
                Query(_hit_rate("pod"), "{{pod}}"),
                unit="percentunit",
                maximum=1,
                span=12,
            ),
        ),
    )


def _requests() -> Row:
    return Row(
        "Which requests fill it?",
        (
            graph(
                "Prompt length",
                "Prompt tokens of finished requests.",
                *quantiles("kvplane_request_prompt_tokens", CHOSEN_PODS, 0.5, 0.95),
                unit=TOKENS,
            ),
            graph(
                "Output length",
                "Tokens generated by finished requests.",
                *quantiles("kvplane_request_generation_tokens", CHOSEN_PODS, 0.5, 0.95),
                unit=TOKENS,
            ),
            graph(
                "Active sequences",
                "Requests in each engine's batch. Times the length of a request, it is what the cache must hold.",
                Query(f"sum by (pod) (kvplane_requests_running{{{CHOSEN_PODS}}})", "{{pod}}"),
                unit="none",
            ),
            graph(
                "Waiting in the engine",
                "Requests in each engine's own queue. Admission keeps it near 0, so that admission's order decides.",
                Query(f"sum by (pod) (kvplane_requests_waiting{{{CHOSEN_PODS}}})", "{{pod}}"),
                unit="none",
                span=12,
            ),
            graph(
                "Tokens",
                "Tokens per second that the engines processed (prompt) and generated (output). They may look fine while a part "
                "of them is computed twice.",
                Query(rate("kvplane_prompt_tokens_total", CHOSEN_PODS), "prompt"),
                Query(rate("kvplane_generation_tokens_total", CHOSEN_PODS), "output"),
                unit=TOKENS_PER_SECOND,
                span=12,
            ),
        ),
    )


def _hit_rate(*by: str) -> str:
    hits = rate("kvplane_prefix_cache_hits_tokens_total", CHOSEN_PODS, *by)
    queries = rate("kvplane_prefix_cache_queries_tokens_total", CHOSEN_PODS, *by)
    return f"{hits} / ({queries} > 0)"

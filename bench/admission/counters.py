"""What the engine says of its work: its metrics, and its log of iterations for what the metrics leave out.

Recomputed tokens are exported nowhere: ``prompt_tokens`` counts a prompt once, however often it is computed. vLLM's
``--enable-logging-iteration-details`` (``compute_iteration_details`` in ``vllm/v1/utils.py``) logs for each step how
many tokens it computed for how many requests that had no output yet (context) and that had (generation). A request that
has output computes one token a step, unless it was preempted and starts over; so the excess of generation tokens over
generation requests is what was computed again, to the token. vLLM's newer model runner shows a resumed request as a
context one instead; there the excess is that of context tokens over the prompts' own, which the counter
``prompt_tokens_by_source{source="local_compute"}`` has. The sum of both holds for either.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from bench.admission.policy import Scrape
from kvplane_runtime.sidecar import exposition

ENGINE_ARGS = ("--enable-logging-iteration-details",)
"""Arguments that the log of iterations wants; every engine of the benchmark has them."""

_NAMES = {
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "preemptions": "vllm:num_preemptions_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
}
_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
_WANTED = frozenset({*_NAMES.values(), _BY_SOURCE})
_ITERATION = re.compile(
    rb"Iteration\(\d+\): (\d+) context requests, (\d+) context tokens, "
    rb"(\d+) generation requests, (\d+) generation tokens"
)
_OVERRUN = re.compile(rb"kvplane_pace: a step of ([\d.]+) ms took ([\d.]+) ms")


@dataclass(frozen=True)
class Counters:
    """One reading of the metrics."""

    scrape: Scrape
    computed_prompt_tokens: int
    """Prompt tokens computed, those found in the prefix cache left out; each prompt once."""


@dataclass(frozen=True)
class Work:
    """What the engine did between two readings."""

    preemptions: int
    computed_tokens: int
    recomputed_tokens: int
    overrun_seconds: float
    """By how much steps lasted longer than their pace, in all: this machine was too slow for it."""

    @property
    def recomputed_percent(self) -> float:
        """Of all tokens computed, those that had been computed before."""
        return 100 * self.recomputed_tokens / self.computed_tokens if self.computed_tokens else 0.0


async def read(session: aiohttp.ClientSession, url: str, *, now: float) -> Counters:
    """Reads ``/metrics``; raises what aiohttp raises, or ValueError where a metric is missing."""
    async with session.get(f"{url}/metrics") as answer:
        answer.raise_for_status()
        return parse(await answer.text(), now=now)


def parse(text: str, *, now: float) -> Counters:
    """From an exposition; raises ValueError where a metric is missing: absent is not 0."""
    found = exposition.read(text, _WANTED)
    missing = sorted(_WANTED - found.keys())
    if missing:
        raise ValueError(f"The engine does not export {', '.join(missing)}; is this not vLLM 0.32?")
    values = {field: found[name][0].value for field, name in _NAMES.items()}
    usage = values.pop("kv_cache_usage")
    return Counters(
        scrape=Scrape(taken_at=now, kv_cache_usage=usage, **{field: int(value) for field, value in values.items()}),
        computed_prompt_tokens=sum(
            int(sample.value) for sample in found[_BY_SOURCE] if sample.labels.get("source") == "local_compute"
        ),
    )


def work(before: Counters, after: Counters, log: bytes) -> Work:
    """``log``: what the engine logged between the two readings, both taken while it was idle."""
    iterations = [tuple(map(int, match.groups())) for match in _ITERATION.finditer(log)]
    return Work(
        preemptions=after.scrape.preemptions - before.scrape.preemptions,
        computed_tokens=sum(context + generated for _, context, _, generated in iterations),
        recomputed_tokens=_recomputed(iterations, after.computed_prompt_tokens - before.computed_prompt_tokens),
        overrun_seconds=sum(float(taken) - float(given) for given, taken in _OVERRUN.findall(log)) / 1000,
    )


def _recomputed(iterations: Sequence[tuple[int, ...]], computed_prompt_tokens: int) -> int:
    generation = sum(tokens - requests for _, _, requests, tokens in iterations)
    context = sum(tokens for _, tokens, _, _ in iterations)
    return generation + max(0, context - computed_prompt_tokens)

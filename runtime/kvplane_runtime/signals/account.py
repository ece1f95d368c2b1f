"""Adds up, scrape by scrape, what an engine evicts, loses and computes twice, and says how it is known.

Three sources, the best that there is at the moment of each scrape:

=========  ==================================================================================================
exact      the engine's KV events
sampled    its histogram of the lifetimes of a sample of blocks (``--kv-cache-metrics``, 1 % by default)
estimated  its preemptions, each taken to lose the context of the youngest running requests: that is whom vLLM
           preempts, and how many tokens a preemption cost is exported nowhere
=========  ==================================================================================================

Every total is kept by source and grows only while its source is the best one, so the sum over the sources counts
nothing twice. Sampled counts are an upper bound: vLLM samples every block that is handed out anew, cached or not
(vllm/v1/core/block_pool.py, ``_maybe_evict_cached_block``). Estimates miss what the prefix cache loses.
"""

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvplane_api.wire import ThrashState
from kvplane_runtime.signals.ledger import KvEventLedger
from kvplane_runtime.signals.thrash import Sample, ThrashDetector

SAMPLE_RATE: Final = 0.01
"""vLLM's default of ``--kv-cache-metrics-sample``; the rate in use is not exported."""
STALE_SECONDS: Final = 30.0
"""Event sockets that said nothing for so long are gone: the reader asks them every few seconds."""


class Source(enum.StrEnum):
    """How a figure is known."""

    EXACT = "exact"
    SAMPLED = "sampled"
    ESTIMATED = "estimated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What one scrape says of the KV cache. None: unknown."""

    usage: float | None = None
    """Share of the blocks that running requests hold, 0 to 1."""
    kv_blocks: int | None = None
    block_size_tokens: int | None = None
    running: float | None = None
    preemptions: float | None = None
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    prefix_queries_tokens: float | None = None
    prefix_hits_tokens: float | None = None
    reloaded_tokens: float | None = None
    """Tokens whose KV came from another tier."""
    sampled_evictions: float | None = None
    """Blocks in the sample that were evicted."""

    @property
    def used_blocks(self) -> int | None:
        """Blocks that running requests hold."""
        return None if self.usage is None or self.kv_blocks is None else round(self.usage * self.kv_blocks)


class KvAccount:
    """The totals of one engine, through its restarts."""

    def __init__(self, *, ledger: KvEventLedger) -> None:
        self.ledger = ledger
        self.contexts: Callable[[], Sequence[int]] = tuple
        """Tokens, prompt and output so far, of each request inside the engine, oldest first. Set by who admits requests;
        without it a preemption is taken to cost the mean context, and the tail waste is unknown."""
        self.evictions: dict[Source, float] = {}
        """Cached blocks evicted, by source; a source that was never the best has no entry."""
        self.wasted_tokens: dict[Source, float] = {}
        """Tokens computed again, by source."""
        self.preempted_tokens: float | None = None
        """Context that preempted requests lost, by estimate; what the prefix cache gives back is not computed again."""
        self.cached_blocks: int | None = None
        """Blocks with cached content that no running request holds; None unless KV events tell. Each running request is
        taken to hold one block that is not full yet, and so not cached."""
        self.tail_waste_tokens: int | None = None
        """Slots without a token in the last blocks of running requests."""
        self.thrash = ThrashState()
        self._detector = ThrashDetector()
        self._last = Counters()
        self._evictions_seen = 0
        self._recomputed_seen = 0

    def restarted(self) -> None:
        """The engine came up anew: its cache is empty. Totals stay."""
        self.ledger.restarted()

    def observe(self, counters: Counters, now: float) -> None:
        """Takes one scrape into account; ``now`` on the clock that the ledger is kept by."""
        ledger = self.ledger
        evicted = ledger.evictions_total - self._evictions_seen
        recomputed = ledger.recomputed_tokens_total - self._recomputed_seen
        self._evictions_seen, self._recomputed_seen = ledger.evictions_total, ledger.recomputed_tokens_total
        sampled = self._growth(counters, "sampled_evictions")
        reloaded = self._growth(counters, "reloaded_tokens") or 0.0
        lost = self._lost(counters)
        self._last = counters

        if lost is not None:
            self.preempted_tokens = (self.preempted_tokens or 0.0) + lost
        exact = self._exact(counters, now)
        if exact:
            _add(self.evictions, Source.EXACT, evicted)
            _add(self.wasted_tokens, Source.EXACT, max(0.0, recomputed - reloaded))
        elif sampled is not None:
            _add(self.evictions, Source.SAMPLED, sampled / SAMPLE_RATE)
        elif lost is not None and counters.block_size_tokens:
            _add(self.evictions, Source.ESTIMATED, math.ceil(lost / counters.block_size_tokens))
        if lost is not None and not exact:
            _add(self.wasted_tokens, Source.ESTIMATED, lost)
        self.cached_blocks = self._unheld_cached_blocks(counters) if exact else None
        self.tail_waste_tokens = self._tail_waste(counters)
        self.thrash = self._detector.observe(self._sample(counters, exact=exact), now)

    def _exact(self, counters: Counters, now: float) -> bool:
        """Whether KV events tell everything. An engine without prefix caching has none to tell, though it works."""
        ledger = self.ledger
        alive = ledger.heard_at is not None and now - ledger.heard_at <= STALE_SECONDS
        return alive and (ledger.batches_total > 0 or not counters.generation_tokens)

    def _growth(self, counters: Counters, name: str) -> float | None:
        """Of an engine's counter since the last scrape: 0 if that lacked it, None if this one does. A counter that went
        back started again from 0."""
        before, after = getattr(self._last, name), getattr(counters, name)
        if after is None:
            return None
        if before is None:
            return 0.0
        return float(after - before if after >= before else after)

    def _lost(self, counters: Counters) -> float | None:
        """Context lost to preemptions since the last scrape: that of the youngest requests that ran."""
        preempted = self._growth(counters, "preemptions")
        if not preempted:
            return preempted
        running = counters.running or 0.0
        victims = self.contexts()[: round(running + preempted)][-round(preempted) :]
        if victims:
            return preempted * math.fsum(victims) / len(victims)
        if counters.used_blocks is None or not counters.block_size_tokens:
            return None
        return preempted * counters.used_blocks * counters.block_size_tokens / max(running, 1.0)

    def _unheld_cached_blocks(self, counters: Counters) -> int | None:
        used = counters.used_blocks
        if used is None or counters.kv_blocks is None:
            return None
        full = max(0, used - round(counters.running or 0.0))
        return min(max(0, self.ledger.cached_blocks - full), counters.kv_blocks - used)

    def _tail_waste(self, counters: Counters) -> int | None:
        contexts = self.contexts()
        if counters.running is None or not counters.block_size_tokens or (counters.running and not contexts):
            return None
        return sum(-tokens % counters.block_size_tokens for tokens in contexts[: round(counters.running)])

    def _sample(self, counters: Counters, *, exact: bool) -> Sample:
        ledger = self.ledger if exact else None
        return Sample(
            usage=counters.usage,
            kv_blocks=counters.kv_blocks,
            preemptions_total=counters.preemptions,
            prompt_tokens_total=counters.prompt_tokens,
            generation_tokens_total=counters.generation_tokens,
            prefix_queries_tokens_total=counters.prefix_queries_tokens,
            prefix_hits_tokens_total=counters.prefix_hits_tokens,
            reloaded_tokens_total=counters.reloaded_tokens,
            evictions_total=math.fsum(self.evictions.values()) if self.evictions else None,
            wasted_tokens_total=math.fsum(self.wasted_tokens.values()) if self.wasted_tokens else None,
            preempted_tokens_total=self.preempted_tokens,
            stored_blocks_total=ledger.stored_blocks_total if ledger else None,
            restored_blocks_total=ledger.restored_blocks_total if ledger else None,
            restored_tokens_total=ledger.recomputed_tokens_total if ledger else None,
        )


def _add(totals: dict[Source, float], source: Source, amount: float) -> None:
    totals[source] = totals.get(source, 0.0) + amount

"""Which source each total comes from, and what it adds up to."""

from dataclasses import replace

import pytest

from kvplane_runtime.signals.account import SAMPLE_RATE, STALE_SECONDS, Counters, KvAccount, Source
from kvplane_runtime.signals.ledger import Batch, BlocksRemoved, BlocksStored, Event, KvEventLedger

IDLE = Counters(
    usage=0.0,
    kv_blocks=100,
    block_size_tokens=16,
    running=0,
    preemptions=0,
    prompt_tokens=0,
    generation_tokens=0,
    prefix_queries_tokens=0,
    prefix_hits_tokens=0,
)
BUSY = replace(IDLE, usage=0.5, running=4, prompt_tokens=800, generation_tokens=100)


class Engine:
    """Its events and its scrapes, a second apart."""

    def __init__(self) -> None:
        self.account = KvAccount(ledger=KvEventLedger())
        self.now = 0.0
        self.sequence = 0

    def events(self, *events: Event) -> None:
        batch = Batch(sequence=self.sequence, timestamp=self.now, events=events)
        self.account.ledger.apply(batch, self.now)
        self.sequence += 1

    def scrape(self, counters: Counters) -> KvAccount:
        self.now += 1.0
        self.account.observe(counters, self.now)
        return self.account


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_events_are_exact(engine: Engine) -> None:
    engine.events(BlocksStored((1, 2, 3), 16))
    account = engine.scrape(BUSY)
    assert (account.evictions, account.wasted_tokens) == ({Source.EXACT: 0}, {Source.EXACT: 0})
    engine.events(BlocksRemoved((1, 2)), BlocksStored((1,), 16))
    account = engine.scrape(BUSY)
    assert (account.evictions, account.wasted_tokens) == ({Source.EXACT: 2}, {Source.EXACT: 16})


def test_tokens_that_came_from_another_tier_were_not_computed_again(engine: Engine) -> None:
    engine.events(BlocksStored((1, 2, 3), 16))
    engine.scrape(replace(BUSY, reloaded_tokens=100))
    engine.events(BlocksRemoved((1, 2, 3)), BlocksStored((1, 2, 3), 16))
    account = engine.scrape(replace(BUSY, reloaded_tokens=132))
    assert account.wasted_tokens == {Source.EXACT: 16}


def test_without_events_a_sample_is_scaled_up(engine: Engine) -> None:
    engine.scrape(replace(BUSY, sampled_evictions=5))
    account = engine.scrape(replace(BUSY, sampled_evictions=7))
    assert account.evictions == {Source.SAMPLED: 2 / SAMPLE_RATE}
    assert account.wasted_tokens == {Source.ESTIMATED: 0}


def test_without_either_a_preemption_costs_the_youngest_context(engine: Engine) -> None:
    engine.account.contexts = lambda: [900, 500, 100, 30, 7]
    engine.scrape(BUSY)
    account = engine.scrape(replace(BUSY, running=3, preemptions=1))
    assert account.preempted_tokens == 30  # the fourth ran until then, the fifth never did
    assert account.evictions == {Source.ESTIMATED: 2}
    assert account.wasted_tokens == {Source.ESTIMATED: 30}
    account = engine.scrape(replace(BUSY, running=2, preemptions=3))
    assert account.preempted_tokens == 30 + 130


def test_without_knowing_the_requests_it_costs_the_mean_context(engine: Engine) -> None:
    engine.scrape(BUSY)
    account = engine.scrape(replace(BUSY, preemptions=2))
    assert account.preempted_tokens == 2 * 50 * 16 / 4


def test_what_cannot_be_estimated_is_unknown(engine: Engine) -> None:
    engine.scrape(Counters(preemptions=0))
    account = engine.scrape(Counters(preemptions=1))
    assert account.preempted_tokens == 0  # known until the first preemption
    assert engine.scrape(Counters()).evictions == {}
    assert account.thrash.kind is None


def test_nothing_known_is_nothing_claimed(engine: Engine) -> None:
    account = engine.scrape(Counters())
    assert (account.evictions, account.wasted_tokens, account.preempted_tokens) == ({}, {}, None)
    assert (account.cached_blocks, account.tail_waste_tokens) == (None, None)
    assert account.thrash.wasted_tokens_per_second is None


def test_preemptions_before_the_first_scrape_are_not_ours(engine: Engine) -> None:
    assert engine.scrape(replace(BUSY, preemptions=1000)).preempted_tokens == 0


def test_a_counter_that_goes_back_starts_again_from_0(engine: Engine) -> None:
    engine.account.contexts = lambda: [10]
    engine.scrape(replace(BUSY, preemptions=1000))
    assert engine.scrape(replace(BUSY, preemptions=2)).preempted_tokens == 20


def test_each_source_counts_only_while_it_is_the_best(engine: Engine) -> None:
    engine.account.contexts = lambda: [100]
    engine.scrape(BUSY)
    engine.scrape(replace(BUSY, preemptions=1))
    engine.events(BlocksStored((1,), 16), BlocksRemoved((1,)), BlocksStored((1,), 16))
    account = engine.scrape(replace(BUSY, preemptions=2))
    assert account.wasted_tokens == {Source.ESTIMATED: 100, Source.EXACT: 16}
    assert account.evictions == {Source.ESTIMATED: 7, Source.EXACT: 1}
    assert account.preempted_tokens == 200
    engine.now += STALE_SECONDS
    account = engine.scrape(replace(BUSY, preemptions=3))
    assert account.wasted_tokens == {Source.ESTIMATED: 200, Source.EXACT: 16}


def test_an_engine_that_works_without_a_word_has_no_prefix_cache(engine: Engine) -> None:
    engine.account.ledger.heard(0.0)
    assert list(engine.scrape(IDLE).evictions) == [Source.EXACT]
    engine.account.contexts = lambda: [100]
    assert engine.scrape(replace(BUSY, preemptions=1)).wasted_tokens == {Source.EXACT: 0, Source.ESTIMATED: 100}


def test_cached_blocks_are_those_that_nobody_holds(engine: Engine) -> None:
    engine.events(BlocksStored(tuple(range(60)), 16))
    assert engine.scrape(BUSY).cached_blocks == 60 - (50 - 4)
    assert engine.scrape(replace(BUSY, usage=0.9)).cached_blocks == 0
    engine.events(BlocksStored(tuple(range(100, 200)), 16))
    assert engine.scrape(BUSY).cached_blocks == 50
    assert engine.scrape(replace(BUSY, usage=None)).cached_blocks is None


def test_the_tail_waste_follows_the_block_size(engine: Engine) -> None:
    engine.account.contexts = lambda: [16, 17, 31, 1, 5]
    assert engine.scrape(BUSY).tail_waste_tokens == 0 + 15 + 1 + 15
    assert engine.scrape(replace(BUSY, block_size_tokens=32)).tail_waste_tokens == 16 + 15 + 1 + 31
    assert engine.scrape(replace(BUSY, running=0)).tail_waste_tokens == 0
    engine.account.contexts = tuple
    assert engine.scrape(BUSY).tail_waste_tokens is None


def test_a_restart_empties_the_cache_and_keeps_the_totals(engine: Engine) -> None:
    engine.events(BlocksStored((1, 2), 16), BlocksRemoved((1,)))
    engine.scrape(BUSY)
    engine.account.restarted()
    engine.sequence = 0
    engine.now += 60
    engine.events(BlocksStored((1, 2), 16))
    account = engine.scrape(BUSY)
    assert (account.evictions, account.wasted_tokens) == ({Source.EXACT: 1}, {Source.EXACT: 0})
    assert account.ledger.holes == 0

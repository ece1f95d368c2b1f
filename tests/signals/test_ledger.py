"""What the ledger knows of the prefix cache, against a cache that really is one."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.signals.ledger import Batch, BlocksRemoved, BlocksStored, CacheCleared, Event, KvEventLedger

SIZE = 16


def stored(*blocks: int) -> BlocksStored:
    return BlocksStored(blocks, SIZE)


def removed(*blocks: int) -> BlocksRemoved:
    return BlocksRemoved(blocks)


class Feed:
    """Numbers the batches, as an engine does."""

    def __init__(self, ledger: KvEventLedger) -> None:
        self.ledger = ledger
        self.sequence = 0

    def __call__(self, *events: Event, at: float | None = None) -> Batch:
        batch = Batch(sequence=self.sequence, timestamp=self.sequence / 1000 if at is None else at, events=events)
        self.ledger.apply(batch, 0.0)
        self.sequence += 1
        return batch


@pytest.fixture
def ledger() -> KvEventLedger:
    return KvEventLedger()


@pytest.fixture
def feed(ledger: KvEventLedger) -> Feed:
    return Feed(ledger)


def test_a_block_that_comes_back_after_its_eviction_was_computed_twice(ledger: KvEventLedger, feed: Feed) -> None:
    feed(stored(1, 2, 3))
    feed(removed(1, 2))
    assert (ledger.cached_blocks, ledger.evictions_total, ledger.recomputed_tokens_total) == (1, 2, 0)
    feed(stored(1, 4))
    assert (ledger.cached_blocks, ledger.restored_blocks_total, ledger.recomputed_tokens_total) == (3, 1, SIZE)
    assert ledger.stored_blocks_total == 5


def test_traffic_without_repeats_evicts_and_restores_nothing(ledger: KvEventLedger, feed: Feed) -> None:
    for block in range(1000):
        feed(stored(block), *([removed(block - 10)] if block >= 10 else []))
    assert (ledger.cached_blocks, ledger.evictions_total, ledger.restored_blocks_total) == (10, 990, 0)


def test_a_copy_that_goes_leaves_the_content_cached(ledger: KvEventLedger, feed: Feed) -> None:
    feed(stored(1), stored(1))
    feed(removed(1))
    feed(stored(1))
    assert (ledger.cached_blocks, ledger.evictions_total, ledger.restored_blocks_total) == (2, 1, 0)
    feed(removed(1), removed(1))
    feed(stored(1))
    assert (ledger.cached_blocks, ledger.restored_blocks_total) == (1, 1)


def test_a_report_of_what_was_found_is_no_store(ledger: KvEventLedger, feed: Feed) -> None:
    """vLLM's kv_cache_report_mode: hits, reported as stored."""
    feed(BlocksStored((1, 2), SIZE, from_start=True))
    feed(BlocksStored((1, 2), SIZE, from_start=True))
    assert (ledger.cached_blocks, ledger.stored_blocks_total) == (2, 2)
    feed(removed(2))
    feed(BlocksStored((1, 2), SIZE, from_start=True))
    assert ledger.restored_blocks_total == 1


def test_what_comes_back_much_later_was_not_evicted_too_early() -> None:
    ledger = KvEventLedger(remember_seconds=300)
    feed = Feed(ledger)
    feed(stored(1, 2), at=0)
    feed(removed(1, 2), at=10)
    feed(stored(1), at=310)
    assert ledger.restored_blocks_total == 1
    feed(stored(2), at=310.1)
    assert ledger.restored_blocks_total == 1


def test_a_cleared_cache_is_no_eviction_and_its_return_no_waste(ledger: KvEventLedger, feed: Feed) -> None:
    feed(stored(1, 2), removed(2))
    feed(CacheCleared())
    feed(stored(1, 2))
    assert (ledger.cached_blocks, ledger.evictions_total, ledger.restored_blocks_total) == (2, 1, 0)


def test_a_batch_that_was_entered_before_changes_nothing(ledger: KvEventLedger, feed: Feed) -> None:
    first = feed(stored(1))
    feed(removed(1))
    ledger.apply(first, 5.0)
    assert (ledger.cached_blocks, ledger.batches_total, ledger.next_sequence, ledger.heard_at) == (0, 2, 2, 5.0)


def test_a_hole_makes_the_counts_lower_bounds(ledger: KvEventLedger, feed: Feed) -> None:
    feed(stored(1, 2, 3))
    feed.sequence += 2
    feed(stored(4))
    assert (ledger.holes, ledger.cached_blocks) == (2, 1)  # 1, 2 and 3 may be gone
    feed(removed(1))
    feed(stored(1))
    assert (ledger.evictions_total, ledger.restored_blocks_total, ledger.holes) == (1, 1, 2)


def test_a_batch_that_cannot_be_read_is_a_hole(ledger: KvEventLedger, feed: Feed) -> None:
    feed(stored(1))
    ledger.lose(1)
    ledger.lose(1)
    ledger.lose(0)
    assert (ledger.holes, ledger.next_sequence, ledger.cached_blocks) == (1, 2, 0)


def test_a_new_life_of_the_engine_starts_with_an_empty_cache(ledger: KvEventLedger, feed: Feed) -> None:
    feed(stored(1, 2))
    feed(removed(1))
    ledger.apply(Batch(sequence=0, timestamp=2000.0, events=(stored(1, 2),)), 0.0)
    assert (ledger.cached_blocks, ledger.evictions_total, ledger.restored_blocks_total) == (2, 1, 0)
    assert (ledger.holes, ledger.next_sequence) == (0, 1)


def test_a_new_life_that_is_known_of_is_not_taken_for_a_gap(ledger: KvEventLedger, feed: Feed) -> None:
    feed(stored(1))
    ledger.restarted()
    assert (ledger.next_sequence, ledger.cached_blocks) == (0, 0)
    ledger.apply(Batch(sequence=0, timestamp=2000.0, events=(stored(1),)), 0.0)
    assert (ledger.holes, ledger.cached_blocks, ledger.restored_blocks_total) == (0, 1, 0)


def test_memory_is_bounded_and_what_does_not_fit_is_counted() -> None:
    ledger = KvEventLedger(max_blocks=3, max_removed=2)
    feed = Feed(ledger)
    feed(stored(1, 2, 3, 4))
    assert (ledger.cached_blocks, ledger.untracked_total) == (3, 1)
    feed(removed(1, 2, 3))
    assert ledger.untracked_total == 2
    feed(stored(1))
    assert ledger.restored_blocks_total == 0  # the oldest was forgotten
    feed(stored(3))
    assert ledger.restored_blocks_total == 1


def test_unreadable_events_are_counted(ledger: KvEventLedger) -> None:
    ledger.apply(Batch(sequence=0, timestamp=1.0, events=(), unreadable_events=3), 0.0)
    assert ledger.unreadable_total == 3


@given(
    st.lists(st.integers(0, 9), max_size=200),
    st.integers(1, 8),
)
def test_the_ledger_agrees_with_the_cache(contents: list[int], size: int) -> None:
    """A cache of ``size`` blocks, copies allowed, whose oldest block makes room."""
    ledger = KvEventLedger()
    feed = Feed(ledger)
    cache: list[int] = []
    lost: set[int] = set()
    evictions = restored = 0
    for content in contents:
        events: list[Event] = []
        if len(cache) == size:
            gone = cache.pop(0)
            events.append(removed(gone))
            evictions += 1
            if gone not in cache:
                lost.add(gone)
        restored += content in lost
        lost.discard(content)
        cache.append(content)
        feed(*events, stored(content))
    assert ledger.cached_blocks == sum(Counter(cache).values())
    assert (ledger.evictions_total, ledger.restored_blocks_total) == (evictions, restored)
    assert ledger.recomputed_tokens_total == restored * SIZE
    assert (ledger.holes, ledger.untracked_total) == (0, 0)

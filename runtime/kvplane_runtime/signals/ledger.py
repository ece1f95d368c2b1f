"""A ledger of the blocks in an engine's prefix cache, kept from its KV events.

The engine's metrics cannot tell a cache that is warm from one that churns: cached blocks count as free, and a block that
is evicted and computed again leaves no trace. The events do. A block stored under a hash that was removed shortly before
is work done twice, and that is the one signature of thrashing that no healthy load shows.

Four things make the ledger more than a set:

- Identical blocks are not merged by vLLM: two requests that compute the same prefix at once store its hash twice and
  remove it twice. So copies are counted, and a hash is lost only when its last copy is.
- A request that asks for it (``kv_cache_report_mode``, open to clients) has the blocks that it found reported as stored.
  Such a report begins with the text and names cached blocks only; it is passed over.
- A batch can be lost. What was stored in it is unknown from then on, and so is what was removed: the ledger then forgets
  which blocks are cached rather than keep some that are gone. Every count is a lower bound after that, and ``holes``
  says that it is.
- Memory is bounded: at most ``max_blocks`` cached hashes and ``max_removed`` removed ones, the latter at most
  ``remember_seconds`` old. What does not fit is not followed, and ``untracked_total`` says how many.

Event semantics: vLLM 0.32, vllm/v1/core/block_pool.py (one BlockRemoved per evicted block, when it is handed out anew;
AllBlocksCleared on a reset of the cache) and vllm/distributed/kv_events.py.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

REMEMBER_SECONDS: Final = 300.0
"""A block that comes back within this time was evicted too early. Longer than the pause between two turns of a chat."""
MAX_BLOCKS: Final = 1 << 20
"""About 200 MB of ledger; 16 million tokens at vLLM's default block size."""
MAX_REMOVED: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Full blocks entered the prefix cache: they were computed, or loaded from another tier."""

    blocks: tuple[Hashable, ...]
    """What identifies each block's content: its hash, and its group in a hybrid model."""
    block_size_tokens: int
    from_start: bool = False
    """Whether the first of them begins a text."""


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks were evicted, each to make room for another."""

    blocks: tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """The whole prefix cache was dropped on purpose, as after an update of the weights."""


Event = BlocksStored | BlocksRemoved | CacheCleared


@dataclass(frozen=True, slots=True)
class Batch:
    """The events of one engine step."""

    sequence: int
    """Counts up from 0 in each life of the engine."""
    timestamp: float
    """The engine's wall clock, seconds."""
    events: tuple[Event, ...]
    """Those about device memory, in order."""
    unreadable_events: int = 0
    """Events of an unknown kind or shape, which are not in ``events``."""


class KvEventLedger:
    """The prefix cache as the events tell it. Counters never decrease, also when the engine starts again."""

    def __init__(
        self,
        *,
        remember_seconds: float = REMEMBER_SECONDS,
        max_blocks: int = MAX_BLOCKS,
        max_removed: int = MAX_REMOVED,
    ) -> None:
        self._remember_seconds = remember_seconds
        self._max_blocks = max_blocks
        self._max_removed = max_removed
        self._copies: dict[Hashable, int] = {}
        self._removed: OrderedDict[Hashable, float] = OrderedDict()
        """When each lost block was removed; oldest first."""
        self._last_timestamp = 0.0
        self.next_sequence = 0
        """Of the batch that comes next if none is lost."""
        self.heard_at: float | None = None
        """When the engine last said anything on its event sockets, on the caller's clock; None before that."""
        self.cached_blocks = 0
        """Blocks that hold complete cached content, whether a running request uses them or not."""
        self.evictions_total = 0
        """Cached blocks evicted to make room."""
        self.stored_blocks_total = 0
        self.restored_blocks_total = 0
        """Blocks stored again within ``remember_seconds`` of the eviction of their last copy."""
        self.recomputed_tokens_total = 0
        """Tokens in those blocks. Tokens in a block that never became full are not seen."""
        self.batches_total = 0
        self.holes = 0
        """Batches that are lost for good. Not 0: the counts are lower bounds."""
        self.unreadable_total = 0
        """Batches and events of an unknown shape, which were passed over."""
        self.untracked_total = 0
        """Blocks not followed because a bound was reached. Not 0: the counts are lower bounds."""

    def heard(self, now: float) -> None:
        """The event sockets are alive, though there may have been nothing to say."""
        self.heard_at = now

    def is_of_new_life(self, batch: Batch) -> bool:
        """Whether the engine must have started again: its sequence went back while its clock went on."""
        return batch.sequence < self.next_sequence and batch.timestamp > self._last_timestamp

    def apply(self, batch: Batch, now: float) -> None:
        """Enters a batch. One that was entered before changes nothing; a gap before it is counted in ``holes``.

        Blocks age by the engine's clock, so that a history that is replayed late ages as it did.
        """
        self.heard(now)
        if self.is_of_new_life(batch):
            self.restarted()
        if batch.sequence < self.next_sequence:
            return
        self._skip_to(batch.sequence)
        self.next_sequence = batch.sequence + 1
        self._last_timestamp = batch.timestamp
        self.batches_total += 1
        self.unreadable_total += batch.unreadable_events
        self._forget(before=batch.timestamp - self._remember_seconds)
        for event in batch.events:
            match event:
                case BlocksStored():
                    self._store(event)
                case BlocksRemoved():
                    self._remove(event, batch.timestamp)
                case CacheCleared():
                    self._clear()

    def lose(self, sequence: int) -> None:
        """The batch with this sequence, and those before it that are missing, will never be read."""
        if sequence >= self.next_sequence:
            self._skip_to(sequence + 1)

    def restarted(self) -> None:
        """The engine began a new life: its cache is empty, and its sequence starts again."""
        self._clear()
        self.next_sequence = 0

    def _skip_to(self, sequence: int) -> None:
        lost = sequence - self.next_sequence
        if lost:
            self.holes += lost
            self.next_sequence = sequence
            self._clear()

    def _store(self, event: BlocksStored) -> None:
        if event.from_start and all(block in self._copies for block in event.blocks):
            return  # found, not stored: what is cached from the start on is never computed
        self.stored_blocks_total += len(event.blocks)
        for block in event.blocks:
            copies = self._copies.get(block, 0)
            if not copies:
                if self._removed.pop(block, None) is not None:
                    self.restored_blocks_total += 1
                    self.recomputed_tokens_total += event.block_size_tokens
                if len(self._copies) >= self._max_blocks:
                    self.untracked_total += 1
                    continue
            self._copies[block] = copies + 1
            self.cached_blocks += 1

    def _remove(self, event: BlocksRemoved, at: float) -> None:
        self.evictions_total += len(event.blocks)
        for block in event.blocks:
            copies = self._copies.get(block, 0)
            if copies:
                self.cached_blocks -= 1
            if copies > 1:
                self._copies[block] = copies - 1
                continue
            self._copies.pop(block, None)
            self._removed.pop(block, None)  # so that it enters as the newest
            if len(self._removed) >= self._max_removed:
                self._removed.popitem(last=False)
                self.untracked_total += 1
            self._removed[block] = at

    def _forget(self, *, before: float) -> None:
        while self._removed and next(iter(self._removed.values())) < before:
            self._removed.popitem(last=False)

    def _clear(self) -> None:
        self._copies.clear()
        self._removed.clear()
        self.cached_blocks = 0

"""The paged KV cache: which blocks are free, which hold a prefix that a later request may use again.

Rules, as in vLLM 0.32.0 with one full-attention group (``vllm/v1/core/block_pool.py`` unless another file is named):

- one block is the null block, so ``num_gpu_blocks - 1`` can be used; usage = 1 - free / (num_gpu_blocks - 1)
  (``BlockPool.__init__``, ``get_usage``);
- a block is hashed when its last token is scheduled (``cache_full_blocks``); equal blocks are not merged, a lookup finds
  the oldest of them (``BlockHashToBlockMap``);
- a block that nobody references is free, and keeps its hash until it is handed out again: cached blocks count as free;
- free blocks without a hash are handed out first, the last freed of them before the others; then hashed ones, the
  least recently used first (``free_blocks``, ``get_new_blocks``). A request's blocks are freed from its end, so that
  its tail goes before its head (``kv_cache_manager.py`` ``free``);
- handing out a hashed block removes its hash, which is the eviction that KV events report (``_maybe_evict_cached_block``).

Blocks without a hash cannot be told apart by any rule above, so the free ones are only counted.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Block:
    """One block that is referenced, or free and hashed."""

    __slots__ = ("hash", "references")

    def __init__(self) -> None:
        self.hash: int | None = None
        self.references = 1


@dataclass(frozen=True)
class Stored:
    """KV event: blocks of a request became full. ``parent`` is the hash of the block before them."""

    hashes: tuple[int, ...]
    parent: int | None
    request: object
    """Name of the request."""
    first: int
    """Index of the first of these blocks in the request."""


@dataclass(frozen=True)
class Removed:
    """KV event: a block was evicted."""

    hash: int


class BlockPool:
    """The blocks of one engine."""

    def __init__(self, *, num_gpu_blocks: int, prefix_caching: bool, keep_events: bool = False) -> None:
        self.usable = num_gpu_blocks - 1
        self._prefix_caching = prefix_caching
        self._blank = self.usable
        self._cached: OrderedDict[Block, None] = OrderedDict()
        """Free and hashed, the next to be evicted first."""
        self._by_hash: dict[int, Block] = {}
        self._twins: dict[int, list[Block]] = {}
        """Younger blocks with the hash of one in ``_by_hash``."""
        self.evicted = 0
        self._events: list[Stored | Removed] | None = [] if keep_events else None

    @property
    def free(self) -> int:
        """Blocks that can be handed out."""
        return self._blank + len(self._cached)

    @property
    def cached(self) -> int:
        """Free blocks that hold a prefix."""
        return len(self._cached)

    @property
    def usage(self) -> float:
        """``vllm:kv_cache_usage_perc``, 0 to 1."""
        return 1.0 - self.free / self.usable

    def find(self, hashes: Iterable[int]) -> list[Block]:
        """The longest run of hashed blocks from the beginning of ``hashes``; they are not yet referenced."""
        found: list[Block] = []
        for each in hashes:
            block = self._by_hash.get(each)
            if block is None:
                break
            found.append(block)
        return found

    def reference(self, blocks: Iterable[Block]) -> None:
        """Take found blocks into use; free ones leave the free list (``touch``)."""
        for block in blocks:
            if block.references == 0:
                del self._cached[block]
            block.references += 1

    def allocate(self, count: int) -> list[Block]:
        """``count`` new blocks; the caller has made sure that as many are free."""
        blank = min(count, self._blank)
        self._blank -= blank
        handed_out = [Block() for _ in range(blank)]
        for _ in range(count - blank):
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            block.references = 1
            handed_out.append(block)
        return handed_out

    def store(
        self, blocks: Sequence[Block], hashes: Sequence[int], parent: int | None, request: object, first: int
    ) -> None:
        """Hash blocks that are full; the arguments after ``hashes`` are for the event."""
        if not self._prefix_caching:
            return
        by_hash = self._by_hash
        for block, each in zip(blocks, hashes, strict=True):
            block.hash = each
            if each in by_hash:
                self._twins.setdefault(each, []).append(block)
            else:
                by_hash[each] = block
        if self._events is not None:
            self._events.append(Stored(tuple(hashes), parent, request, first))

    def release(self, blocks: list[Block]) -> None:
        """Give back one request's blocks, given in its order."""
        for block in reversed(blocks):
            block.references -= 1
            if block.references == 0:
                if block.hash is None:
                    self._blank += 1
                else:
                    self._cached[block] = None

    def take_events(self) -> list[Stored | Removed]:
        """The events since the last call; always empty without ``keep_events``."""
        events = self._events
        if events is None:
            return []
        self._events = []
        return events

    def _forget(self, block: Block) -> None:
        each = block.hash
        assert each is not None
        block.hash = None
        self.evicted += 1
        twins = self._twins.get(each)
        if twins is None:
            del self._by_hash[each]
        else:
            if self._by_hash[each] is block:
                self._by_hash[each] = twins.pop(0)
            else:
                twins.remove(block)
            if not twins:
                del self._twins[each]
        if self._events is not None:
            self._events.append(Removed(each))

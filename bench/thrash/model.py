"""vLLM's KV cache and scheduler, block by block, with the truth about every token: computed for the first time, or again.

What decides about thrashing is here as in vLLM 0.32 (vllm/v1/core/block_pool.py, vllm/v1/core/sched/scheduler.py):

- free blocks are a queue, used from its head; a finished or preempted request gives its blocks back tail first, those
  with cached content to the end of the queue (so the least recently used go first), the others to its head;
- a block is evicted when it is handed out, not before; identical blocks are not merged;
- a prompt finds the longest run of cached full blocks at its beginning, but its last token is always computed;
- running requests go first, one step at a time, prompts in chunks; when there is no block for one, the newest running
  request loses all blocks and goes to the front of the queue, and nothing is admitted in that step;
- a request is admitted when blocks for all its tokens are free.

Left out: layers of several kinds, speculation, priorities. Time is a straight line per step, which is enough, since the
detector looks at shares.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from kvplane_runtime.signals.ledger import Batch, BlocksRemoved, BlocksStored, CacheCleared, Event

Key = tuple[int, int]
"""A block's content: the text it belongs to, and its place in it."""

STEP_SECONDS: Final = 0.02
TOKEN_SECONDS: Final = 1e-4


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and its answer. The text up to ``shared_tokens`` (full blocks) is ``shared``, from there on ``text``."""

    text: int
    prompt_tokens: int
    output_tokens: int
    shared: int = 0
    shared_tokens: int = 0
    generated: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    """Leading blocks that are full and in the prefix cache."""
    preempted: bool = False

    @property
    def tokens(self) -> int:
        """Of the whole text so far."""
        return self.prompt_tokens + self.generated


@dataclass(slots=True)
class Counts:
    """What vLLM counts, and what only the model knows."""

    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    reloaded_tokens: int = 0
    computed_tokens: int = 0
    wasted_tokens: int = 0
    """Truth: computed, though they had been computed before and were thrown away."""
    reloaded_again_tokens: int = 0
    """Truth: loaded from the other tier, though they had been here before."""


class Engine:
    """One engine."""

    def __init__(
        self,
        *,
        blocks: int,
        block_size: int = 16,
        max_batched_tokens: int = 2048,
        max_running: int = 64,
        offload_blocks: int = 0,
    ) -> None:
        """``offload_blocks``: size of a second tier, which every full block is copied to."""
        self.now = 0.0
        self.blocks = blocks
        self.block_size = block_size
        self.counts = Counts()
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._max_batched_tokens = max_batched_tokens
        self._max_running = max_running
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._content: list[Key | None] = [None] * blocks
        self._holders = [0] * blocks
        self._cached: dict[Key, list[int]] = {}
        self._lost: dict[Key, int] = {}
        """Tokens at the beginning of a block that had been computed and are gone."""
        self._offloaded: OrderedDict[Key, None] = OrderedDict()
        self._offload_blocks = offload_blocks
        self._events: list[Event] = []
        self._sequence = 0

    @property
    def usage(self) -> float:
        """As vLLM has it: cached blocks that nobody holds count as free."""
        return 1 - len(self._free) / self.blocks

    def add(self, request: Request) -> None:
        """A request arrives."""
        self.waiting.append(request)

    def clear_cache(self) -> None:
        """Drops the prefix cache, as after an update of the weights; what is running goes on."""
        for block, content in enumerate(self._content):
            if content is not None and not self._holders[block]:
                self._content[block] = None
        self._cached = {
            key: kept for key, blocks in self._cached.items() if (kept := [b for b in blocks if self._holders[b]])
        }
        self._lost.clear()
        self._events.append(CacheCleared())

    def step(self) -> list[Request]:
        """One batch; the requests that it completes. Does nothing but pass time when there is nothing to do."""
        scheduled, tokens = self._schedule()
        self.now += STEP_SECONDS + tokens * TOKEN_SECONDS
        done = [request for request in scheduled if self._answer(request)]
        for request in done:
            self.running.remove(request)
            self._release(request)
        return done

    def take_batch(self) -> Batch | None:
        """The KV events since the last call, as one batch; None if there were none."""
        if not self._events:
            return None
        batch = Batch(sequence=self._sequence, timestamp=self.now, events=tuple(self._events))
        self._sequence += 1
        self._events = []
        return batch

    def _schedule(self) -> tuple[list[Request], int]:
        """The requests of this step, with their blocks, and the tokens it computes."""
        budget = self._max_batched_tokens
        scheduled: list[Request] = []
        preempted = False
        for request in list(self.running):
            if budget == 0:
                break
            count = min(request.tokens - request.computed, budget)
            while request in self.running and not self._fits(request, count):
                self._preempt(self.running.pop())
                preempted = True
            if request in self.running:
                self._compute(request, count)
                scheduled.append(request)
                budget -= count
        while budget and self.waiting and not preempted and len(self.running) < self._max_running:
            request = self.waiting[0]
            if not self._admit(request):
                break
            self.running.append(self.waiting.popleft())
            count = min(request.tokens - request.computed, budget)
            self._compute(request, count)
            scheduled.append(request)
            budget -= count
        return scheduled, self._max_batched_tokens - budget

    def _fits(self, request: Request, count: int) -> bool:
        return self._blocks_of(request.computed + count) - len(request.blocks) <= len(self._free)

    def _admit(self, request: Request) -> bool:
        """Gives the request the cached blocks at its beginning, if all of it fits."""
        hits: list[int] = []
        loads = 0
        for key in self._keys(request, 0, (request.tokens - 1) // self.block_size):
            if not loads and key in self._cached:
                hits.append(self._cached[key][0])
            elif key in self._offloaded:
                loads += 1
            else:
                break
        revived = sum(1 for block in hits if not self._holders[block])
        if self._blocks_of(request.tokens) - len(hits) + revived > len(self._free):
            return False
        for block in hits:
            self._free.pop(block, None)
            self._holders[block] += 1
        request.blocks = hits
        request.cached = len(hits)
        request.computed = len(hits) * self.block_size
        if not request.preempted:
            self.counts.prefix_queries_tokens += request.tokens
            self.counts.prefix_hits_tokens += request.computed
        if loads:
            self._load(request, loads)
        return True

    def _load(self, request: Request, loads: int) -> None:
        upto = request.computed + loads * self.block_size
        self._extend(request, upto)
        again = sum(self._lost.get(key, 0) for key in self._keys(request, request.cached, request.cached + loads))
        self.counts.reloaded_again_tokens += again
        self.counts.reloaded_tokens += loads * self.block_size
        request.computed = upto
        self._cache_full_blocks(request)

    def _extend(self, request: Request, tokens: int) -> None:
        """Blocks for the first ``tokens`` tokens; evicts what they held."""
        removed: list[Key] = []
        for _ in range(self._blocks_of(tokens) - len(request.blocks)):
            block, _none = self._free.popitem(last=False)
            content = self._content[block]
            if content is not None:
                copies = self._cached[content]
                copies.remove(block)
                if not copies:
                    del self._cached[content]
                    self._lost[content] = self.block_size
                self._content[block] = None
                removed.append(content)
            self._holders[block] = 1
            request.blocks.append(block)
        if removed:
            self._events.append(BlocksRemoved(tuple(removed)))

    def _compute(self, request: Request, count: int) -> None:
        """Blocks and content for ``count`` more tokens. Full blocks are cached at once, so that the next request of the
        same step finds them: vLLM enters them when it schedules."""
        first, last = request.computed, request.computed + count
        self._extend(request, last)
        self.counts.computed_tokens += count
        place = first // self.block_size
        for key in self._keys(request, place, self._blocks_of(last)):
            start = place * self.block_size
            lost = start + self._lost.get(key, 0)
            self.counts.wasted_tokens += max(0, min(last, lost) - max(first, start))
            place += 1
        request.computed = last
        self._cache_full_blocks(request)

    def _answer(self, request: Request) -> bool:
        """The next token, once the prompt is complete; whether it is the last."""
        if request.computed < request.tokens:
            return False
        if request.generated == 0:
            self.counts.prompt_tokens += request.prompt_tokens
        request.generated += 1
        self.counts.generation_tokens += 1
        return request.generated >= request.output_tokens

    def _cache_full_blocks(self, request: Request) -> None:
        full = request.computed // self.block_size
        stored = tuple(self._keys(request, request.cached, full))
        for key, block in zip(stored, request.blocks[request.cached : full], strict=True):
            self._content[block] = key
            self._cached.setdefault(key, []).append(block)
            self._lost.pop(key, None)
            if self._offload_blocks:
                self._offloaded[key] = None
                self._offloaded.move_to_end(key)
                if len(self._offloaded) > self._offload_blocks:
                    self._offloaded.popitem(last=False)
        request.cached = full
        if stored:
            self._events.append(BlocksStored(stored, self.block_size))

    def _preempt(self, request: Request) -> None:
        tail = request.computed % self.block_size
        if tail:
            (key,) = self._keys(request, request.cached, request.cached + 1)
            self._lost[key] = max(tail, self._lost.get(key, 0))
        self._release(request)
        request.computed = request.cached = 0
        request.preempted = True
        self.counts.preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        for block in reversed(request.blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=self._content[block] is not None)
        request.blocks = []

    def _keys(self, request: Request, first: int, last: int) -> Iterator[Key]:
        shared = request.shared_tokens // self.block_size
        return ((request.shared if place < shared else request.text, place) for place in range(first, last))

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

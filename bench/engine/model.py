"""The simulated engine: vLLM's scheduler and KV cache without tensors. Pure; time is what the caller makes of a batch.

One step is ``schedule`` (what runs, who is preempted), a wait of ``StepTime.seconds(batch)`` by whatever clock, and
``complete`` (tokens, ends). Requests may be added and aborted in between, as in ``EngineCore.step``.

Rules, as in vLLM 0.32.0, ``vllm/v1/core/sched/scheduler.py`` unless another file is named; the recorded schedules of a
real engine in tests/bench/schedules are matched step by step:

- a step has a budget of ``max_num_batched_tokens``; there is no prefill phase, each request gets what it lacks, a prompt
  in chunks where the budget is short (``schedule``);
- running requests come first, in the order in which they were let in; a request for which no block is left preempts
  the *last* running one until there is room, itself at worst, and then nobody else runs in this step (``schedule``);
- a preempted request loses its blocks and goes to the *front* of the queue, with its output; what it computed is
  computed again but for blocks that are still cached (``_preempt_request``);
- then the queue, first come first served, unless somebody was preempted in this step: while there is budget, fewer than
  ``max_num_seqs`` run, and the whole text of the first request fits into the free blocks, those counted that its
  prefix takes from the cache (``scheduler_reserve_full_isl``, on by default; ``kv_cache_manager.py`` ``allocate_slots``;
  ``watermark`` is 0);
- of a cached prefix the last token is always computed again, so a hit is at most (tokens - 1) // block size blocks
  (``kv_cache_manager.py`` ``get_computed_blocks``);
- a request ends at its output length or at ``max_model_len``, and its blocks are free for the next step
  (``update_from_output``, ``utils.py`` ``check_stop``).

Scheduling is synchronous, as on CPU (``platforms/cpu.py``); with asynchronous scheduling an end is seen one step later.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.engine.blocks import Block, BlockPool

_PRIVATE = 1 << 63
"""Hashes of blocks that no other request can share; hashes of prefixes are below."""
_BLOCKS_OF_ONE = 1 << 20


@dataclass(frozen=True)
class EngineConfig:
    """vLLM's arguments of the same names."""

    num_gpu_blocks: int
    """The null block included, as in ``vllm:cache_config_info``."""
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        room = (self.num_gpu_blocks - 1) * self.block_size
        if self.max_model_len > room:
            raise ValueError(
                f"max_model_len must be at most what the KV cache holds, {room} tokens, got {self.max_model_len}: "
                "a request of that length could never run. Add blocks or lower max_model_len."
            )


class Request:
    """One request in the engine; the engine writes everything after ``prefix_hashes``."""

    __slots__ = (
        "blocks", "cached_tokens", "computed", "done", "generated", "key", "lost", "name", "output_tokens",
        "preemptions", "prefix_hashes", "prompt_tokens", "room", "stored", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        *,
        name: object,
        prompt_tokens: int,
        output_tokens: int,
        prefix_hashes: tuple[int, ...] = (),
    ) -> None:
        """``output_tokens``: after how many it ends. ``prefix_hashes``: of the prompt's full blocks that may be shared."""
        self.name = name
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.prefix_hashes = prefix_hashes
        self.key = 0
        """Where its private hashes begin; the engine gives it."""
        self.generated = 0
        self.tokens = prompt_tokens
        """Prompt and output."""
        self.computed = 0
        """Tokens whose KV is in the cache, or is being computed in this step."""
        self.lost = 0
        """Tokens that had been computed before the last preemption: below this, work is done again."""
        self.cached_tokens = 0
        """Taken from the prefix cache when it first ran."""
        self.preemptions = 0
        self.blocks: list[Block] = []
        self.room = 0
        """Tokens that its blocks hold."""
        self.stored = 0
        """Its blocks that are hashed, always the first."""
        self.done = False

    def hashes(self, begin: int, end: int) -> list[int]:
        """Of its blocks from ``begin`` to before ``end``."""
        shared = self.prefix_hashes
        if begin >= len(shared):
            return list(range(self.key + begin, self.key + end))
        return [shared[i] if i < len(shared) else self.key + i for i in range(begin, end)]


@dataclass(slots=True)
class Batch:
    """What one step computes."""

    requests: list[Request] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    """Of each request: what this step computes; the rest of ``computed`` was there before."""
    prefill_tokens: int = 0
    """Tokens of requests that compute more than one."""
    decodes: int = 0
    """Requests that compute one token."""
    context_tokens: int = 0
    """Tokens in the cache that the batch attends to, summed over its requests."""
    preempted: list[Request] = field(default_factory=list)
    recomputed_tokens: int = 0
    """Of all that is computed, what had been computed before."""


@dataclass(slots=True)
class Completed:
    """What a step gave."""

    tokens: list[Request] = field(default_factory=list)
    """Requests that got one token."""
    first: list[Request] = field(default_factory=list)
    """Those of them whose first it was."""
    finished: list[Request] = field(default_factory=list)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, linear in what it computes; fitted by ``bench.engine.fit`` or derived in ``presets``."""

    base: float
    per_prefill_token: float
    per_decode: float
    per_context_token: float

    def seconds(self, batch: Batch) -> float:
        return (
            self.base
            + self.per_prefill_token * batch.prefill_tokens
            + self.per_decode * batch.decodes
            + self.per_context_token * batch.context_tokens
        )


@dataclass(slots=True)
class Counters:
    """Since the start; those that vLLM exports are called as there."""

    num_preemptions: int = 0
    prompt_tokens: int = 0
    """Of requests that got their first token."""
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    """Tokens looked up by requests that were not preempted before (``metrics/stats.py`` ``PrefixCacheStats``)."""
    prefix_cache_hits: int = 0
    computed_tokens: int = 0
    """Not exported by vLLM: everything computed, what is done again included."""
    recomputed_tokens: int = 0
    """Not exported by vLLM."""
    steps: int = 0


class Engine:
    """The scheduler with its block pool."""

    def __init__(self, config: EngineConfig, *, keep_events: bool = False) -> None:
        self.config = config
        self.pool = BlockPool(
            num_gpu_blocks=config.num_gpu_blocks,
            prefix_caching=config.enable_prefix_caching,
            keep_events=keep_events,
        )
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.counters = Counters()
        self._keys = 0

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: its prompt leaves no room for one token of output.
        """
        if request.prompt_tokens >= self.config.max_model_len:
            raise ValueError(
                f"prompt_tokens must be below max_model_len, {self.config.max_model_len}, got {request.prompt_tokens}."
            )
        request.key = _PRIVATE + self._keys * _BLOCKS_OF_ONE
        self._keys += 1
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """End a request whose client has gone; nothing happens if it is over."""
        if request.done:
            return
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
        self._end(request)

    def schedule(self) -> Batch | None:
        """The next step; None where there is nothing to do."""
        if not self.running and not self.waiting:
            return None
        batch = Batch()
        budget = self._schedule_running(batch, self.config.max_num_batched_tokens)
        if not batch.preempted:
            self._schedule_waiting(batch, budget)
        counters = self.counters
        counters.steps += 1
        counters.computed_tokens += batch.prefill_tokens + batch.decodes
        counters.recomputed_tokens += batch.recomputed_tokens
        return batch

    def complete(self, batch: Batch) -> Completed:
        """Hand out the tokens of a step; requests that were aborted meanwhile get none."""
        completed = Completed()
        counters, longest = self.counters, self.config.max_model_len
        for request in batch.requests:
            if request.computed != request.tokens or request.done:
                continue  # a chunk of a prompt, or aborted
            request.generated += 1
            request.tokens += 1
            completed.tokens.append(request)
            if request.generated == 1:
                completed.first.append(request)
                counters.prompt_tokens += request.prompt_tokens
                counters.prompt_tokens_cached += request.cached_tokens
            if request.generated >= request.output_tokens or request.tokens >= longest:
                self._end(request)
                completed.finished.append(request)
        counters.generation_tokens += len(completed.tokens)
        if completed.finished:
            self.running = [request for request in self.running if not request.done]
        return completed

    def _schedule_running(self, batch: Batch, budget: int) -> int:
        """Give each running request what it lacks; the budget that is left."""
        running, pool, block_size = self.running, self.pool, self.config.block_size
        scheduled, new_tokens = batch.requests, batch.new_tokens
        decodes = context = 0
        index = 0
        while index < len(running) and budget > 0:
            request = running[index]
            computed = request.computed
            new = min(request.tokens - computed, budget)
            end = computed + new
            if end > request.room:
                need = -(-end // block_size) - len(request.blocks)
                while need > pool.free:
                    victim = running.pop()
                    self._preempt(victim)
                    batch.preempted.append(victim)
                    if victim is request:
                        break
                else:
                    request.blocks += pool.allocate(need)
                    request.room = len(request.blocks) * block_size
                if request.room < end:
                    break  # it was the victim itself
            scheduled.append(request)
            new_tokens.append(new)
            context += computed
            if new == 1:
                decodes += 1
            else:
                batch.prefill_tokens += new
            if computed < request.lost:
                batch.recomputed_tokens += min(end, request.lost) - computed
            budget -= new
            request.computed = end
            if end >= (request.stored + 1) * block_size:
                self._store(request)
            index += 1
        batch.decodes += decodes
        batch.context_tokens += context
        return budget

    def _schedule_waiting(self, batch: Batch, budget: int) -> None:
        """Let requests in while there is budget, a place and memory for the first of the queue."""
        config, pool = self.config, self.pool
        while budget > 0 and self.waiting and len(self.running) < config.max_num_seqs:
            request = self.waiting[0]
            prefix = self._cached_prefix(request)
            hit = len(prefix) * config.block_size
            unreferenced = sum(block.references == 0 for block in prefix)
            if -(-request.tokens // config.block_size) - len(prefix) + unreferenced > pool.free:
                break
            self.waiting.popleft()
            self.running.append(request)
            if request.preemptions == 0:
                self.counters.prefix_cache_queries += request.tokens
                self.counters.prefix_cache_hits += hit
                request.cached_tokens = hit
            new = min(request.tokens - hit, budget)
            end = hit + new
            pool.reference(prefix)
            request.blocks = prefix
            request.stored = len(prefix)
            request.blocks += pool.allocate(-(-end // config.block_size) - len(prefix))
            request.room = len(request.blocks) * config.block_size
            request.computed = end
            if end >= (request.stored + 1) * config.block_size:
                self._store(request)
            batch.requests.append(request)
            batch.new_tokens.append(new)
            batch.context_tokens += hit
            if new == 1:
                batch.decodes += 1
            else:
                batch.prefill_tokens += new
            if hit < request.lost:
                batch.recomputed_tokens += min(end, request.lost) - hit
            budget -= new

    def _cached_prefix(self, request: Request) -> list[Block]:
        if not self.config.enable_prefix_caching:
            return []
        return self.pool.find(request.hashes(0, (request.tokens - 1) // self.config.block_size))

    def _store(self, request: Request) -> None:
        begin, end = request.stored, request.computed // self.config.block_size
        hashes = request.hashes(max(begin - 1, 0), end)
        parent = hashes.pop(0) if begin else None
        self.pool.store(request.blocks[begin:end], hashes, parent, request.name, begin)
        request.stored = end

    def _preempt(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.lost = max(request.lost, request.computed)
        request.computed = request.room = request.stored = 0
        request.blocks = []
        request.preemptions += 1
        self.counters.num_preemptions += 1
        self.waiting.appendleft(request)

    def _end(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
        request.done = True


def shared_prefix(name: int, tokens: int, block_size: int) -> tuple[int, ...]:
    """``prefix_hashes`` of prompts that begin with the same ``tokens`` tokens, told apart by ``name``."""
    return tuple(name * _BLOCKS_OF_ONE + i for i in range(tokens // block_size))


def prompt_hashes(token_ids: Iterable[int], block_size: int) -> tuple[int, ...]:
    """``prefix_hashes`` of a prompt that is known by its tokens: chained, so that equal means equal from the start."""
    found: list[int] = []
    block: list[int] = []
    parent = 0
    for token in token_ids:
        block.append(token)
        if len(block) == block_size:
            parent = hash((parent, *block)) & (_PRIVATE - 1)
            found.append(parent)
            block.clear()
    return tuple(found)

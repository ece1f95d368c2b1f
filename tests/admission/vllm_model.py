"""A small model of vLLM's V1 scheduler, exact in blocks, for what admission promises about preemptions.

As in ``vllm/v1/core/sched/scheduler.py`` and ``kv_cache_manager.py`` (0.32): one token budget per step; running requests
first, in order of arrival, each given blocks for its next tokens plus the speculative lookahead; if none is free the
newest running request loses all its blocks and goes to the front of the waiting ones; waiting requests only in steps
without a preemption. No prefix cache: sharing only lowers what is needed.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass(eq=False)
class Sequence:
    """One output of a request."""

    prompt: int
    length: int
    """Tokens after which it ends."""
    computed: int = 0
    generated: int = 0
    blocks: int = 0

    @property
    def over(self) -> bool:
        return self.generated >= self.length


@dataclass
class Engine:
    """Blocks, and the sequences that run or wait."""

    blocks: int
    block_size: int
    batched_tokens: int = 64
    lookahead: int = 0
    preemptions: int = 0
    running: list[Sequence] = field(default_factory=list)
    waiting: deque[Sequence] = field(default_factory=deque)

    @property
    def used(self) -> int:
        return sum(sequence.blocks for sequence in self.running)

    def step(self) -> list[Sequence]:
        """One step; the sequences that got a token."""
        budget = self.batched_tokens
        scheduled: dict[Sequence, int] = {}
        preempted = False
        at = 0
        while at < len(self.running) and budget > 0:
            sequence = self.running[at]
            tokens = min(sequence.prompt + sequence.generated - sequence.computed, budget)
            while not self._allocate(sequence, tokens):
                victim = self.running.pop()
                preempted = True
                self.preemptions += 1
                victim.blocks = victim.computed = 0
                budget += scheduled.pop(victim, 0)
                self.waiting.appendleft(victim)
                if victim is sequence:
                    break
            else:
                scheduled[sequence] = tokens
                budget -= tokens
                at += 1
                continue
            break
        while self.waiting and budget > 0 and not preempted:
            sequence = self.waiting[0]
            tokens = min(sequence.prompt + sequence.generated - sequence.computed, budget)
            if not self._allocate(sequence, tokens):
                break
            self.running.append(self.waiting.popleft())
            scheduled[sequence] = tokens
            budget -= tokens
        got: list[Sequence] = []
        for sequence, tokens in scheduled.items():
            sequence.computed += tokens
            if sequence.computed == sequence.prompt + sequence.generated:
                sequence.generated += 1
                got.append(sequence)
        self.running = [sequence for sequence in self.running if not sequence.over]
        return got

    def _allocate(self, sequence: Sequence, tokens: int) -> bool:
        needed = -(-(sequence.computed + tokens + self.lookahead) // self.block_size) - sequence.blocks
        if needed > self.blocks - self.used:
            return False
        sequence.blocks += max(0, needed)
        return True

"""One engine as a fluid: tokens flow at the pace of ``bench.engine``'s step times, and only requests are discrete.

Between two events (a prompt computed, an output ended) the batch does not change, so all decodes advance by the same count
of steps, and one number, the clock of steps, carries them all. Two events for each request make an hour of four replicas a
second's work; ``bench.engine.model``, which plans every step, takes minutes for it.

What is kept of vLLM: prompts in order and in chunks beside the decodes, the whole prompt must fit to be let in, the newest
loses its KV when memory runs out and begins again. What is lost: blocks, and what happens within a step. A prefix that is shared
is told by its length only: it was computed once and is held once, for all, so to a request it is as if it were not there.

``Gate`` is our admission in short: the expected peak below the capacity by the mean output so far, a window of prompts
under way, and refusal of whom waiting cannot help. ``None`` lets vLLM queue without end.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from bench.autoscaling.policy import ForwardPass
from bench.engine.model import StepTime
from bench.engine.presets import Preset

_TOKENS: Final = 1e-6
"""Below this a rest of a token is rounding."""
_FIRST_OUTPUT: Final = 256.0
_OUTPUT_WEIGHT: Final = 0.02
_LEAST_OUTPUT: Final = 16.0
_CHECK_SECONDS: Final = 0.25
"""Between two looks at those that wait."""
_EARLY: Final = 1.25
"""By how much the work ahead must exceed the time before a request is refused at once, as in our admission."""


@dataclass(frozen=True)
class Engine:
    """What a replica is made of."""

    kv_tokens: int
    max_sequences: int
    max_batched_tokens: int
    step_time: StepTime


def engine_of(preset: Preset) -> Engine:
    """The fluid of a preset."""
    config = preset.config
    return Engine(
        kv_tokens=(config.num_gpu_blocks - 1) * config.block_size,
        max_sequences=config.max_num_seqs,
        max_batched_tokens=config.max_num_batched_tokens,
        step_time=preset.step_time,
    )


@dataclass(frozen=True)
class Goals:
    """What a good request meets."""

    ttft_seconds: float = 2.0
    tpot_seconds: float = 0.05


GOALS: Final = Goals()


@dataclass(frozen=True)
class Gate:
    """Admission that promises ``ttft_seconds``."""

    ttft_seconds: float


@dataclass(slots=True, eq=False)
class Job:
    """One request, and what became of it."""

    at: float
    prompt: int
    output: int
    generated: float = 0.0
    left: float = 0.0
    """Tokens to compute before it decodes."""
    began: float = 0.0
    """The clock of steps when it began to decode, less what it had generated."""
    reserved: float = 0.0
    first_at: float | None = None
    done_at: float | None = None
    refused: bool = False
    cached: int = 0
    """Of the prompt, what the prefix cache has."""

    @property
    def fresh(self) -> int:
        """Prompt tokens to compute, and to hold."""
        return self.prompt - self.cached

    def good(self, goals: Goals) -> bool:
        """Whether it met both goals."""
        if self.first_at is None or self.done_at is None or self.first_at - self.at > goals.ttft_seconds:
            return False
        return self.output < 2 or (self.done_at - self.first_at) / (self.output - 1) <= goals.tpot_seconds


@dataclass(slots=True)
class Totals:
    """Since the start."""

    admitted: int = 0
    refused: int = 0
    shed_tokens: float = 0.0
    prompt_tokens: float = 0.0
    prefix_hits_tokens: float = 0.0
    """Of the prompts' tokens, those that the prefix cache had."""
    generation_tokens: float = 0.0
    kept: int = 0
    """Answers that are over and met the goals."""
    broken: int = 0
    """Those that did not."""
    lost_tokens: float = 0.0
    """Computed, and computed again."""


class Replica:
    """An engine with its admission. Time only goes forward, by :meth:`advance`."""

    def __init__(self, engine: Engine, gate: Gate | None, goals: Goals = GOALS) -> None:
        self._goals = goals
        self.engine = engine
        self.gate = gate
        self.totals = Totals()
        self.waiting: deque[Job] = deque()
        self.prefilling: deque[Job] = deque()
        self.decoding: dict[Job, None] = {}
        """In the order in which they began."""
        self.context = 0.0
        """Tokens in the KV cache."""
        self.reserved = 0.0
        self.waiting_tokens = 0.0
        """To compute for those that wait."""
        self._clock = 0.0
        self._ends: list[tuple[float, int, Job]] = []
        self._pushed = 0
        self._mean_output = _FIRST_OUTPUT
        self._checked_at = -math.inf

    @property
    def running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    @property
    def load(self) -> float:
        """Tokens in it, under way and before it: by this requests are spread."""
        return self.context + self._prefill_left() + self.waiting_tokens

    def forward_pass(self) -> ForwardPass | None:
        """The step of the batch as it is; None: nothing runs."""
        if not self.running:
            return None
        seconds, chunk = self._step()
        prompts, covered = 0, 0.0
        for job in self.prefilling:
            if covered >= chunk:
                break
            prompts += 1
            covered += job.left
        computed = sum(job.fresh + job.generated - job.left for job in self.prefilling)
        return ForwardPass(
            seconds=seconds,
            prompt_tokens=chunk if self.prefilling else 0.0,
            prompts=prompts,
            decode_kv_tokens=max(0.0, self.context - computed),
            decodes=len(self.decoding),
        )

    def expected(self, job: Job) -> float:
        """KV tokens that a request is expected to hold at its end."""
        return job.fresh + job.generated + max(_LEAST_OUTPUT, self._mean_output - job.generated)

    def offer(self, job: Job, now: float) -> None:
        """A new request."""
        job.left = float(job.fresh)
        if self.gate is not None:
            ahead = self._prefill_left() + self.waiting_tokens
            if (ahead + job.left) * self.engine.step_time.per_prefill_token > _EARLY * self.gate.ttft_seconds:
                self._refuse(job)
                return
        self.waiting.append(job)
        self.waiting_tokens += job.left
        self._let_in(now)

    def advance(self, now: float, seconds: float) -> None:
        """Work for so long from ``now`` on; in small steps, as context that grows slows only the steps after the next event."""
        until = now + seconds
        self._let_in(now)
        while now < until and self.running:
            step, chunk = self._step()
            to_prompt = self.prefilling[0].left / chunk * step if self.prefilling else math.inf
            to_end = max(0.0, self._ends[0][0] - self._clock) * step if self._ends else math.inf
            span = min(until - now, to_prompt, to_end, self._seconds_until_full(step, chunk))
            self._flow(span / step, chunk)
            now += span
            if self._settle(now):
                self._let_in(now)

    def _step(self) -> tuple[float, float]:
        """Seconds of a step of the batch as it is, and the prompt tokens in it."""
        time, decodes = self.engine.step_time, len(self.decoding)
        chunk = min(self._prefill_left(), float(max(1, self.engine.max_batched_tokens - decodes)))
        seconds = time.base + time.per_prefill_token * chunk + time.per_decode * decodes
        return seconds + time.per_context_token * self.context, max(chunk, _TOKENS)

    def _is_full(self) -> bool:
        return self.context >= self.engine.kv_tokens - _TOKENS

    def _seconds_until_full(self, step: float, chunk: float) -> float:
        grows = len(self.decoding) + (chunk if self.prefilling else 0.0)
        if self._is_full() or not grows:
            return math.inf
        return (self.engine.kv_tokens - self.context) / grows * step

    def _flow(self, steps: float, chunk: float) -> None:
        self._clock += steps
        made = len(self.decoding) * steps
        self.context += made
        self.totals.generation_tokens += made
        if self.prefilling:
            computed = min(chunk * steps, self.prefilling[0].left)
            self.prefilling[0].left -= computed
            self.context += computed

    def _settle(self, now: float) -> bool:
        """What is due; whether anybody may be let in."""
        changed = bool(self.prefilling) and self.prefilling[0].left <= _TOKENS
        if changed:
            self._first_token(self.prefilling.popleft(), now)
        while self._ends and self._ends[0][0] <= self._clock + _TOKENS:
            target, _, job = heapq.heappop(self._ends)
            if job in self.decoding and target == job.began + job.output:
                self._finish(job, now)
                changed = True
        preempted = False
        while self._is_full() and self.running > 1:
            self._preempt()
            preempted = True
        return changed and not preempted

    def _first_token(self, job: Job, now: float) -> None:
        if job.first_at is None:
            job.first_at = now
            self.totals.prompt_tokens += job.prompt
            self.totals.prefix_hits_tokens += job.cached
        job.generated += 1
        self.context += 1
        job.began = self._clock - job.generated
        self.decoding[job] = None
        self._pushed += 1
        heapq.heappush(self._ends, (job.began + job.output, self._pushed, job))

    def _finish(self, job: Job, now: float) -> None:
        del self.decoding[job]
        job.done_at = now
        if job.good(self._goals):
            self.totals.kept += 1
        else:
            self.totals.broken += 1
        self.context -= job.fresh + job.output
        self.reserved -= job.reserved
        self._mean_output += _OUTPUT_WEIGHT * (job.output - self._mean_output)
        if not self.running:
            self.context = self.reserved = 0.0  # no rounding outlives a batch

    def _preempt(self) -> None:
        """The newest gives its memory back and will begin again."""
        if self.prefilling:
            job = self.prefilling.pop()
            held = job.fresh + job.generated - job.left
        else:
            job, _ = self.decoding.popitem()
            job.generated = self._clock - job.began
            held = job.fresh + job.generated
        self.context -= held
        self.totals.lost_tokens += held
        self.reserved -= job.reserved
        job.left = job.fresh + job.generated
        self.waiting.appendleft(job)
        self.waiting_tokens += job.left

    def _let_in(self, now: float) -> None:
        self._refuse_late(now)
        while self.waiting and self.running < self.engine.max_sequences and self._fits(self.waiting[0]):
            job = self.waiting.popleft()
            self.waiting_tokens -= job.left
            job.reserved = self.expected(job)
            self.reserved += job.reserved
            self.totals.admitted += job.first_at is None  # one that was preempted was let in before
            self.prefilling.append(job)

    def _fits(self, job: Job) -> bool:
        if not self.running:
            return True
        if self.gate is None:
            return self.context + self._prefill_left() + job.left <= self.engine.kv_tokens
        if self._prefill_left() + job.left > self.engine.max_batched_tokens and self.prefilling:
            return False
        return max(self.reserved, self.context) + self.expected(job) <= self.engine.kv_tokens

    def _refuse_late(self, now: float) -> None:
        """Those that waiting cannot help any more; one that was preempted has its first token."""
        if self.gate is None or not self.waiting or now < self._checked_at + _CHECK_SECONDS:
            return
        self._checked_at = now
        time, kept = self.engine.step_time, deque[Job]()
        for job in self.waiting:
            late = now + job.left * time.per_prefill_token - job.at > self.gate.ttft_seconds
            if late and job.first_at is None:
                self._refuse(job)
            else:
                kept.append(job)
        self.waiting = kept
        self.waiting_tokens = sum(job.left for job in kept)

    def _refuse(self, job: Job) -> None:
        job.refused = True
        self.totals.refused += 1
        self.totals.shed_tokens += self.expected(job)

    def _prefill_left(self) -> float:
        return sum(job.left for job in self.prefilling)

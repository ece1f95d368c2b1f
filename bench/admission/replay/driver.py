"""One run: arrivals, a policy, the simulated engine, and a virtual clock that jumps from event to event. Pure.

Events: an arrival; the end of an engine step; a scrape, of what the engine's gauges said at the end of its last step (vLLM
writes them there); a report of progress; a tick that the policy asked for. Of events at one moment the engine's come
first. The next step begins when one ends, or when a request comes to an idle engine. The network takes no time.

What a request that fails costs is the policy's to save: a refused one costs nothing, one that passed runs to its end
even if it is late, as clients do not give up here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.admission import policy as protocol
from bench.admission.policy import Policy, Verdict, View
from bench.admission.workload import Arrival
from bench.engine import model

_IMPATIENCE_SECONDS = 600.0
"""A policy that keeps a request for so long after the last event of any other kind has forgotten it."""
_TICK_SECONDS = 0.001
"""Between two ticks at the least: a policy may ask for one at once, but time must pass."""


@dataclass(slots=True)
class Fate:
    """What became of one request."""

    arrival: Arrival
    refused: bool = False
    passed_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None
    output_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token; infinite without one."""
        return math.inf if self.first_at is None else self.first_at - self.arrival.at

    @property
    def tpot(self) -> float:
        """Mean seconds between tokens; 0 for a single one, infinite where it did not finish."""
        if self.first_at is None or self.last_at is None:
            return math.inf
        return (self.last_at - self.first_at) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    def good(self, *, ttft_seconds: float, tpot_seconds: float) -> bool:
        """Whether it met both goals."""
        return self.ttft <= ttft_seconds and self.tpot <= tpot_seconds


@dataclass(frozen=True)
class Outcome:
    """One run."""

    fates: Sequence[Fate]
    counters: model.Counters
    seconds: float
    """Virtual, until the engine was idle."""
    peak_usage: float
    """Of the KV cache, highest at the end of a step."""

    def goodput_percent(self, *, ttft_seconds: float, tpot_seconds: float) -> float:
        """Share of all offered requests that met both goals; refused ones did not."""
        good = sum(fate.good(ttft_seconds=ttft_seconds, tpot_seconds=tpot_seconds) for fate in self.fates)
        return 100.0 * good / len(self.fates)

    @property
    def refused_percent(self) -> float:
        return 100.0 * sum(fate.refused for fate in self.fates) / len(self.fates)

    @property
    def recomputed_percent(self) -> float:
        """Of all tokens computed, those that had been computed before."""
        return 100.0 * self.counters.recomputed_tokens / max(1, self.counters.computed_tokens)


class Replay:
    """One policy in front of one engine; made for one run."""

    def __init__(self, *, policy: Policy, config: model.EngineConfig, step_time: model.StepTime) -> None:
        self._policy = policy
        self._engine = model.Engine(config)
        self._step_time = step_time
        self._batch: model.Batch | None = None
        self._step_ends = math.inf
        self._now = 0.0
        self._fates: list[Fate] = []
        self._requests: list[protocol.Request] = []
        self._held: set[int] = set()
        self._in_engine: dict[int, model.Request] = {}
        self._reported: dict[int, int] = {}
        self._gauges = protocol.Scrape(0.0, 0.0, 0, 0, 0, 0, 0)
        self._peak_usage = 0.0
        self._tick_at = math.inf
        self._view = View(
            engine=protocol.Engine(
                blocks=config.num_gpu_blocks,
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
            ),
            scrape=None,
        )

    def run(self, arrivals: Sequence[Arrival]) -> Outcome:
        """Until all that was offered is refused or finished.

        Raises:
            RuntimeError: the policy keeps requests and asks for nothing that could release them.
        """
        policy = self._policy
        scrape_every = policy.scrape_seconds if policy.scrape_seconds is not None else math.inf
        progress_every = policy.progress_seconds if policy.progress_seconds is not None else math.inf
        scrape_at = 0.0 if scrape_every < math.inf else math.inf
        progress_at = progress_every
        coming, count, alive_at = 0, len(arrivals), 0.0
        while coming < count or self._held or self._in_engine:
            arrives_at = arrivals[coming].at if coming < count else math.inf
            now = min(self._step_ends, scrape_at, arrives_at, progress_at, self._tick_at)
            idle = min(self._step_ends, arrives_at) == math.inf
            if now == math.inf or (idle and now > alive_at + _IMPATIENCE_SECONDS):
                raise RuntimeError(
                    f"Policy {policy.name} keeps {len(self._held)} requests and would never rule on them."
                )
            self._now = now
            if now == self._step_ends:
                alive_at = now
                self._complete()
            elif now == scrape_at:
                scrape_at = now + scrape_every
                self._scrape()
            elif now == arrives_at:
                alive_at = now
                self._arrive(arrivals[coming])
                coming += 1
            elif now == progress_at:
                progress_at = now + progress_every
                self._progress()
            else:
                self._tick()
            if self._batch is None and self._in_engine:
                self._begin()
        return Outcome(self._fates, self._engine.counters, self._now, self._peak_usage)

    def _begin(self) -> None:
        self._batch = self._engine.schedule()
        if self._batch is not None:
            self._step_ends = self._now + self._step_time.seconds(self._batch)

    def _complete(self) -> None:
        batch, engine, now = self._batch, self._engine, self._now
        assert batch is not None
        completed = engine.complete(batch)
        usage = engine.pool.usage
        self._peak_usage = max(self._peak_usage, usage)
        self._gauges = protocol.Scrape(
            taken_at=now,
            kv_cache_usage=usage,
            running=len(engine.running),
            waiting=len(engine.waiting),
            preemptions=engine.counters.num_preemptions,
            prompt_tokens=engine.counters.prompt_tokens,
            generation_tokens=engine.counters.generation_tokens,
        )
        # The next step first: an engine does not wait for what clients do with its tokens.
        self._batch = engine.schedule()
        self._step_ends = now + self._step_time.seconds(self._batch) if self._batch is not None else math.inf
        for request in completed.first:
            number = _number(request)
            self._fates[number].first_at = now
            self._policy.on_first_token(self._requests[number], self._view, now)
            self._tick()
        for request in completed.finished:
            number = _number(request)
            fate = self._fates[number]
            fate.last_at, fate.output_tokens = now, request.generated
            del self._in_engine[number]
            self._reported.pop(number, None)
            self._policy.on_finish(self._requests[number], request.generated, self._view, now)
            self._tick()

    def _arrive(self, arrival: Arrival) -> None:
        number = len(self._fates)
        request = protocol.Request(
            id=number,
            arrived=arrival.at,
            prompt_tokens=arrival.prompt_tokens,
            max_tokens=arrival.max_tokens,
        )
        self._fates.append(Fate(arrival))
        self._requests.append(request)
        verdict = self._policy.on_arrival(request, self._view, self._now)
        if verdict is Verdict.HOLD:
            self._held.add(number)
        else:
            self._follow(number, verdict)
        self._tick()

    def _scrape(self) -> None:
        gauges = self._gauges
        self._view = View(
            engine=self._view.engine,
            scrape=protocol.Scrape(
                taken_at=self._now,
                kv_cache_usage=gauges.kv_cache_usage,
                running=gauges.running,
                waiting=gauges.waiting,
                preemptions=gauges.preemptions,
                prompt_tokens=gauges.prompt_tokens,
                generation_tokens=gauges.generation_tokens,
            ),
        )
        self._policy.on_scrape(self._view, self._now)
        self._tick()

    def _progress(self) -> None:
        reported = self._reported
        changed = {
            number: request.generated
            for number, request in self._in_engine.items()
            if request.generated != reported.get(number, 0)
        }
        if changed:
            reported.update(changed)
            self._policy.on_progress(changed, self._view, self._now)
            self._tick()

    def _tick(self) -> None:
        for ruling in self._policy.on_tick(self._view, self._now):
            self._held.remove(ruling.request)
            self._follow(ruling.request, ruling.verdict)
        wanted = self._policy.next_tick_at(self._now)
        self._tick_at = math.inf if wanted is None else max(wanted, self._now + _TICK_SECONDS)

    def _follow(self, number: int, verdict: Verdict) -> None:
        fate = self._fates[number]
        if verdict is Verdict.REFUSE:
            fate.refused = True
            return
        fate.passed_at = self._now
        request = model.Request(
            name=number,
            prompt_tokens=fate.arrival.prompt_tokens,
            output_tokens=fate.arrival.output_tokens,
        )
        self._engine.add(request)
        self._in_engine[number] = request


def _number(request: model.Request) -> int:
    assert isinstance(request.name, int)
    return request.name


def replay(
    arrivals: Sequence[Arrival], *, policy: Policy, config: model.EngineConfig, step_time: model.StepTime
) -> Outcome:
    """One run of one policy, made anew for it."""
    return Replay(policy=policy, config=config, step_time=step_time).run(arrivals)

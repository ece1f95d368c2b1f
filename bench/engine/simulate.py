"""The same jobs through the simulated engine in virtual time, seen as a client of the real one would see them. Pure."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from bench.engine.load import Job
from bench.engine.model import Engine, EngineConfig, Request, StepTime, shared_prefix


@dataclass(frozen=True)
class Run:
    """What an engine made of a load; times in seconds from its start."""

    ttft: tuple[float, ...]
    """By job."""
    tpot: tuple[float, ...]
    """By job, of those with more than one token."""
    preemptions: int
    usage: tuple[tuple[float, float], ...]
    """Moments, and the usage of the KV cache from then on."""
    seconds: float

    def usage_at(self, at: float) -> float:
        """0 before the first step."""
        index = bisect_right(self.usage, at, key=lambda point: point[0])
        return self.usage[index - 1][1] if index else 0.0


def simulate(jobs: Sequence[Job], *, config: EngineConfig, step_time: StepTime, frontend_seconds: float) -> Run:
    """``frontend_seconds``: what a request spends outside the engine core; half of it before."""
    engine = Engine(config)
    requests = [
        Request(
            name=number,
            prompt_tokens=job.prompt_tokens,
            output_tokens=job.output_tokens,
            prefix_hashes=shared_prefix(job.prefix, job.prefix_tokens, config.block_size),
        )
        for number, job in enumerate(jobs)
    ]
    first = [math.nan] * len(jobs)
    last = [math.nan] * len(jobs)
    usage: list[tuple[float, float]] = []
    now, coming = 0.0, 0
    while True:
        while coming < len(jobs) and jobs[coming].at + frontend_seconds / 2 <= now:
            engine.add(requests[coming])
            coming += 1
        batch = engine.schedule()
        if batch is None:
            if coming == len(jobs):
                break
            now = jobs[coming].at + frontend_seconds / 2
            continue
        usage.append((now, engine.pool.usage))
        now += step_time.seconds(batch)
        completed = engine.complete(batch)
        for request in completed.first:
            first[_number(request)] = now
        for request in completed.finished:
            last[_number(request)] = now
    usage.append((now, engine.pool.usage))
    return Run(
        ttft=tuple(at + frontend_seconds / 2 - job.at for at, job in zip(first, jobs, strict=True)),
        tpot=tuple(
            (end - begin) / (job.output_tokens - 1)
            for begin, end, job in zip(first, last, jobs, strict=True)
            if job.output_tokens > 1
        ),
        preemptions=engine.counters.num_preemptions,
        usage=tuple(usage),
        seconds=now,
    )


def _number(request: Request) -> int:
    assert isinstance(request.name, int)
    return request.name


def usage_rmse(one: Run, other: Run, *, every: float = 0.1) -> float:
    """Root of the mean squared difference of two usage curves, 0 to 1, until the later of both is over."""
    count = max(1, math.ceil(max(one.seconds, other.seconds) / every))
    squares = [(one.usage_at(i * every) - other.usage_at(i * every)) ** 2 for i in range(count)]
    return math.sqrt(sum(squares) / count)

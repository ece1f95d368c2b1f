"""Load for the comparison of the real and the simulated engine, and the real engine's answer to it.

Lengths are lognormal, arrivals Poisson, one seed for both engines. ``ignore_eos`` makes an answer as long as its
``max_tokens``; where a share of prompts begins alike, the prefix cache has something to find.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from bench.admission.client import FIRST_TOKEN, VOCABULARY, Progress, complete


@dataclass(frozen=True)
class Job:
    """One request to send."""

    at: float
    """Seconds from the start."""
    prompt_tokens: int
    output_tokens: int
    prefix: int = 0
    """Prompts with the same number begin with the same tokens; 0: with nobody's."""
    prefix_tokens: int = 0

    def prompt(self, random_: random.Random) -> list[int]:
        """Its tokens."""
        shared = random.Random(f"prefix {self.prefix}").choices(range(FIRST_TOKEN, VOCABULARY), k=self.prefix_tokens)
        own = random_.choices(range(FIRST_TOKEN, VOCABULARY), k=self.prompt_tokens - self.prefix_tokens)
        return shared + own


@dataclass(frozen=True)
class Seen:
    """What a client saw of one request; times on the monotonic clock."""

    job: Job
    sent: float
    first_token: float
    last_token: float


def mixed(*, rate: float, seconds: float, seed: int, sharing: float = 0.0) -> list[Job]:
    """Prompts of 150 and outputs of 90 tokens in the median, wide; a share of prompts has one of three prefixes, the seed's own."""
    random_ = random.Random(f"load {seed}")
    jobs: list[Job] = []
    at = 0.0
    while (at := at + random_.expovariate(rate)) < seconds:
        prompt = _length(random_, 150, 0.8, 8, 900)
        output = _length(random_, 90, 0.7, 4, 400)
        prefix = 10 * seed + random_.randrange(1, 4) if random_.random() < sharing else 0
        jobs.append(Job(at, prompt + (128 if prefix else 0), output, prefix, 128 if prefix else 0))
    return jobs


def _length(random_: random.Random, median: float, sigma: float, smallest: int, largest: int) -> int:
    return max(smallest, min(largest, round(random_.lognormvariate(math.log(median), sigma))))


async def drive(url: str, model: str, jobs: Sequence[Job], *, seed: int) -> list[Seen]:
    """Sends each at its time and reads all answers; raises what ``complete`` raises."""
    random_ = random.Random(f"tokens {seed}")
    bodies = [_body(job, model, random_) for job in jobs]
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # the engine closes what was idle for five seconds
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        start = time.monotonic()
        return list(
            await asyncio.gather(
                *(_send(session, url, job, body, start) for job, body in zip(jobs, bodies, strict=True))
            )
        )


async def keep_busy(
    url: str, model: str, *, clients: int, prompt_tokens: int, output_tokens: int, seconds: float, seed: int
) -> list[Seen]:
    """Clients that each send one request after the other, all of the same lengths."""
    random_ = random.Random(f"tokens {seed}")
    seen: list[Seen] = []
    end = time.monotonic() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < end:
            job = Job(0.0, prompt_tokens, output_tokens)
            seen.append(await _send(session, url, job, _body(job, model, random_), time.monotonic()))

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return seen


def _body(job: Job, model: str, random_: random.Random) -> bytes:
    return json.dumps(
        {
            "model": model,
            "prompt": job.prompt(random_),
            "max_tokens": job.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ).encode()


async def _send(session: aiohttp.ClientSession, url: str, job: Job, body: bytes, start: float) -> Seen:
    await asyncio.sleep(max(0.0, start + job.at - time.monotonic()))
    sent, progress = time.monotonic(), Progress()
    await complete(
        session,
        f"{url}/v1/completions",
        body,
        output_tokens=job.output_tokens,
        clock=time.monotonic,
        progress=progress,
        on_tokens=lambda tokens: None,
    )
    assert progress.first_token is not None
    assert progress.last_token is not None
    return Seen(job, sent, progress.first_token, progress.last_token)

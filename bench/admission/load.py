"""One run: an open loop of requests against one address, each timed from the moment it was due.

Nobody hangs up because of a slow answer, as a queue that empties itself would flatter whoever has one. The run ends when
everything has been sent and each request is complete or out of reach of its goals; what is left is aborted then, which
ends the engine's work on it too.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

from bench.admission.client import CompletionError, Progress, RefusedError, body, complete
from bench.admission.gate import Gate
from bench.admission.goals import End, Goals, Outcome
from bench.admission.policy import Request
from bench.admission.workload import Arrival

LOOK_SECONDS = 0.1
"""How often the end of a run looks whether anything can still be in time."""


@dataclass
class _Flight:
    """One request under way; times on the loop's clock."""

    arrival: Arrival
    due: float
    progress: Progress = field(default_factory=Progress)
    end: End | None = None

    def hopeless(self, goals: Goals, now: float) -> bool:
        first = self.progress.first_token
        return goals.out_of_reach(
            age=now - self.due,
            first_token=None if first is None else first - self.due,
            output_tokens=self.arrival.output_tokens,
        )

    def outcome(self) -> Outcome:
        first, last = self.progress.first_token, self.progress.last_token
        return Outcome(
            end=self.end or End.UNFINISHED,
            first_token=None if first is None else first - self.due,
            last_token=None if last is None else last - self.due,
            tokens=self.progress.tokens,
        )


@dataclass(frozen=True)
class Run:
    """What came of a run."""

    outcomes: tuple[Outcome, ...]
    """By arrival."""
    late_seconds: float
    """How late the generator itself was at worst: more than some milliseconds, and the run says nothing."""
    errors: tuple[str, ...]
    """What requests failed of, at most a few."""


class LoadGenerator:
    """Sends requests to one base URL; with a gate, only those that it lets pass."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, model: str, gate: Gate | None = None) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._model = model
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._generated: dict[int, int] = {}
        self._errors: list[str] = []

    async def open_loop(self, arrivals: Sequence[Arrival], goals: Goals, *, salt: str) -> Run:
        """Sends each when it is due, until nothing can be in time any more."""
        bodies = self._bodies(arrivals, salt)
        async with self._gate.running(self._generated) if self._gate else contextlib.nullcontext():
            start, late = self._loop.time() + 0.1, 0.0
            flights = [_Flight(arrival, start + arrival.at) for arrival in arrivals]
            tasks = []
            for number, flight in enumerate(flights):
                await asyncio.sleep(flight.due - self._loop.time())
                late = max(late, self._loop.time() - flight.due)
                tasks.append(asyncio.create_task(self._one(number, flight, bodies[number])))
            while any(flight.end is None and not flight.hopeless(goals, self._loop.time()) for flight in flights):  # noqa: ASYNC110  time decides, not an event
                await asyncio.sleep(LOOK_SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return Run(tuple(flight.outcome() for flight in flights), late, tuple(self._errors[:3]))

    async def closed_loop(self, arrivals: Sequence[Arrival], *, concurrency: int, salt: str) -> Run:
        """Sends them one after another, ``concurrency`` at a time; their due times do not matter."""
        bodies = self._bodies(arrivals, salt)
        turn = asyncio.Semaphore(concurrency)
        flights = [_Flight(arrival, 0.0) for arrival in arrivals]

        async def next_one(number: int) -> None:
            async with turn:
                flights[number].due = self._loop.time()
                await self._one(number, flights[number], bodies[number])

        await asyncio.gather(*(next_one(number) for number in range(len(flights))))
        return Run(tuple(flight.outcome() for flight in flights), 0.0, tuple(self._errors[:3]))

    def _bodies(self, arrivals: Sequence[Arrival], salt: str) -> list[bytes]:
        return [body(arrival, model=self._model, salt=f"{salt} {i}") for i, arrival in enumerate(arrivals)]

    async def _one(self, number: int, flight: _Flight, body_: bytes) -> None:
        arrival = flight.arrival
        request = Request(
            id=number, arrived=flight.due, prompt_tokens=arrival.prompt_tokens, max_tokens=arrival.max_tokens
        )
        if self._gate is not None and not await self._gate.admit(request):
            flight.end = End.REFUSED
            return

        def count(tokens: int) -> None:
            if self._gate is not None and request.id not in self._generated:
                self._gate.first_token(request)
            self._generated[request.id] = tokens

        try:
            await complete(
                self._session,
                self._url,
                body_,
                output_tokens=arrival.output_tokens,
                clock=self._loop.time,
                progress=flight.progress,
                on_tokens=count,
            )
            flight.end = End.COMPLETE
        except RefusedError:
            flight.end = End.REFUSED
        except (CompletionError, aiohttp.ClientError) as error:
            self._errors.append(f"{type(error).__name__}: {error}")
            flight.end = End.FAILED
        finally:
            self._generated.pop(request.id, None)
            if self._gate is not None:
                self._gate.finish(request, flight.progress.tokens)

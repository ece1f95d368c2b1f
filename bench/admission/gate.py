"""A peer's policy in front of the real engine, within the load generator: the policy's rulings, without a hop's cost.

A peer's own proxy would add its latency and its CPU time; here a request that the policy lets through goes straight to
the engine, so every peer is measured at its best. Our own policy gets no such favour: it runs as the real sidecar.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from bench.admission.policy import Engine, Policy, Request, Scrape, Verdict, View

Reader = Callable[[], Awaitable[Scrape | None]]
"""Reads the engine's metrics; None where that failed."""


class Gate:
    """Drives one policy by the clock of the running loop; made anew for each run."""

    def __init__(self, policy: Policy, *, engine: Engine, read: Reader) -> None:
        self._policy = policy
        self._read = read
        self._view = View(engine=engine, scrape=None)
        self._held: dict[int, asyncio.Future[Verdict]] = {}
        self._generated: Mapping[int, int] = {}
        self._reported: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    @contextlib.asynccontextmanager
    async def running(self, generated: Mapping[int, int]) -> AsyncIterator[None]:
        """Scrapes and counts tokens for the policy while the body runs.

        ``generated``: output tokens so far by request that was let through, kept up to date by the caller.
        """
        self._generated = generated
        polls = []
        if self._policy.scrape_seconds is not None:
            await self._scrape()
            polls.append(asyncio.create_task(_every(self._policy.scrape_seconds, self._scrape)))
        if self._policy.progress_seconds is not None:
            polls.append(asyncio.create_task(_every(self._policy.progress_seconds, self._progress)))
        try:
            yield
        finally:
            for poll in polls:
                poll.cancel()
            await asyncio.gather(*polls, return_exceptions=True)
            if self._timer is not None:
                self._timer.cancel()

    async def admit(self, request: Request) -> bool:
        """Waits for the policy's ruling; whether the request may go to the engine."""
        verdict = self._policy.on_arrival(request, self._view, self._loop.time())
        if verdict is Verdict.HOLD:
            ruling = self._held[request.id] = self._loop.create_future()
            self._tick()
            try:
                verdict = await ruling
            finally:
                self._held.pop(request.id, None)
        else:
            self._tick()
        return verdict is Verdict.PASS

    def first_token(self, request: Request) -> None:
        self._policy.on_first_token(request, self._view, self._loop.time())
        self._tick()

    def finish(self, request: Request, output_tokens: int) -> None:
        """The request is over, however it ended."""
        self._reported.pop(request.id, None)
        self._policy.on_finish(request, output_tokens, self._view, self._loop.time())
        self._tick()

    async def _scrape(self) -> None:
        scrape = await self._read()
        if scrape is not None:
            self._view = View(engine=self._view.engine, scrape=scrape)
            self._policy.on_scrape(self._view, self._loop.time())
            self._tick()

    async def _progress(self) -> None:
        changed = {
            request: tokens for request, tokens in self._generated.items() if tokens != self._reported.get(request, 0)
        }
        if changed:
            self._reported.update(changed)
            self._policy.on_progress(changed, self._view, self._loop.time())
            self._tick()

    def _tick(self) -> None:
        for ruling in self._policy.on_tick(self._view, self._loop.time()):
            held = self._held.get(ruling.request)
            if held is not None and not held.done():
                held.set_result(ruling.verdict)
        if self._timer is not None:
            self._timer.cancel()
        wanted = self._policy.next_tick_at(self._loop.time())
        self._timer = None if wanted is None else self._loop.call_at(wanted, self._tick)


async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    """Does it at a fixed rate; a round that took longer than its turn is followed by the next one at once."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        due = max(due + seconds, loop.time())
        await asyncio.sleep(due - loop.time())
        await work()

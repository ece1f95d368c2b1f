"""A queue of keys with coalescing, bounded workers, back-off and wake-ups.

A key is in the queue at most once, and worked on by at most one worker: a burst of a hundred events of one service is one
reconcile, and a key added while it is worked on runs once more afterwards. All wake-ups share one heap and one timer.
"""

import asyncio
import heapq
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kvplane_operator import metrics

logger = logging.getLogger(__name__)

Work = Callable[[str], Awaitable[float | None]]
"""Works on one key; returns the seconds after which it wants to run again without a cause, None for never."""

Gate = Callable[[], Awaitable[None]]
"""Returns when work may begin; a key that waits here counts as queued, not as worked on."""


async def _open() -> None:
    return


@dataclass(frozen=True)
class Backoff:
    """Delay before a failed key runs again: doubled from ``first`` up to ``longest`` seconds, with jitter."""

    first: float = 0.2
    longest: float = 30.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after that many failures in a row; between half and the whole of the exponential delay."""
        whole = min(self.longest, self.first * 2.0 ** min(failures - 1, 32))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311  spread, not secrecy


class WorkQueue:
    """Runs ``work`` for keys as they come, on the running event loop."""

    def __init__(self, work: Work, *, workers: int, gate: Gate = _open, backoff: Backoff | None = None) -> None:
        self._work = work
        self._gate = gate
        self._workers = workers
        self._backoff = backoff or Backoff()
        self._ready: asyncio.Queue[tuple[str, float]] = asyncio.Queue()
        self._queued: set[str] = set()
        self._working: dict[str, float] = {}
        self._again: set[str] = set()
        self._failures: dict[str, int] = {}
        self._wakeups: list[tuple[float, str]] = []
        self._wake_at: dict[str, float] = {}
        self._timer_changed = asyncio.Event()

    def add(self, key: str) -> None:
        """Run ``key`` as soon as a worker is free."""
        if key in self._working:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait((key, self._now()))
            metrics.QUEUE_DEPTH.set(self._ready.qsize())

    def add_after(self, key: str, seconds: float) -> None:
        """Run ``key`` in ``seconds`` at the latest; an earlier wake-up stands."""
        at = self._now() + seconds
        if at < self._wake_at.get(key, float("inf")):
            self._wake_at[key] = at
            heapq.heappush(self._wakeups, (at, key))
            self._timer_changed.set()

    def forget(self, key: str) -> None:
        """Drop what is remembered of a key that will not come back."""
        self._failures.pop(key, None)
        self._wake_at.pop(key, None)

    def oldest_work_seconds(self) -> float:
        """How long the longest-running work has been going on; 0 if none is."""
        return self._now() - min(self._working.values(), default=self._now())

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_timer())
            for _ in range(self._workers):
                group.create_task(self._run_worker())

    async def _run_timer(self) -> None:
        while True:
            self._timer_changed.clear()
            now = self._now()
            while self._wakeups and self._wakeups[0][0] <= now:
                at, key = heapq.heappop(self._wakeups)
                if self._wake_at.get(key) == at:  # not superseded by an earlier one
                    del self._wake_at[key]
                    self.add(key)
            pause = self._wakeups[0][0] - now if self._wakeups else None
            try:
                async with asyncio.timeout(pause):
                    await self._timer_changed.wait()
            except TimeoutError:
                continue

    async def _run_worker(self) -> None:
        while True:
            key, added = await self._ready.get()
            await self._gate()
            self._queued.discard(key)
            metrics.QUEUE_DEPTH.set(self._ready.qsize())
            metrics.QUEUE_SECONDS.observe(self._now() - added)
            self._working[key] = self._now()
            try:
                wake_after = await self._work(key)
                self._failures.pop(key, None)
            except Exception as error:
                self._again.discard(key)
                failures = self._failures[key] = self._failures.get(key, 0) + 1
                metrics.RECONCILE_ERRORS.inc()
                logger.warning(
                    "%s failed (%d in a row), will be tried again: %s", key, failures, error, exc_info=failures == 1
                )
                wake_after = self._backoff.delay(failures)
            finally:
                del self._working[key]
            if key in self._again or wake_after == 0:
                self._again.discard(key)
                self.add(key)
            elif wake_after is not None:
                self.add_after(key, wake_after)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

"""The queue: coalescing, one worker per key, back-off, wake-ups; in virtual time."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable

import pytest

from kvplane_operator.workqueue import Backoff, WorkQueue


class Recorder:
    """Work that takes as long as told and remembers when it ran."""

    def __init__(self) -> None:
        self.runs: list[tuple[float, str]] = []
        self.seconds = 0.0
        self.wake_after: dict[str, float] = {}
        self.failures: dict[str, int] = {}
        self.running: set[str] = set()
        self.most_at_once = 0

    async def __call__(self, key: str) -> float | None:
        assert key not in self.running, "two workers on one key"
        self.runs.append((asyncio.get_running_loop().time(), key))
        self.running.add(key)
        self.most_at_once = max(self.most_at_once, len(self.running))
        try:
            await asyncio.sleep(self.seconds)
            if self.failures.get(key, 0):
                self.failures[key] -= 1
                raise RuntimeError("the API server said no")
        finally:
            self.running.discard(key)
        return self.wake_after.get(key)

    def times(self, key: str) -> list[float]:
        return [at for at, worked in self.runs if worked == key]


@contextlib.asynccontextmanager
async def running(queue: WorkQueue) -> AsyncIterator[None]:
    task = asyncio.create_task(queue.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def work() -> Recorder:
    return Recorder()


async def test_a_burst_is_one_run(work: Recorder) -> None:
    queue = WorkQueue(work, workers=4)
    for _ in range(100):
        queue.add("a")
    async with running(queue):
        await asyncio.sleep(1)
    assert work.times("a") == [0.0]


async def test_events_while_working_are_one_more_run(work: Recorder) -> None:
    work.seconds = 10
    queue = WorkQueue(work, workers=4)
    async with running(queue):
        queue.add("a")
        await asyncio.sleep(1)
        for _ in range(100):
            queue.add("a")
        await asyncio.sleep(100)
    assert work.times("a") == [0.0, 10.0]


async def test_workers_bound_what_runs_at_once(work: Recorder) -> None:
    work.seconds = 1
    queue = WorkQueue(work, workers=3)
    async with running(queue):
        for number in range(10):
            queue.add(str(number))
        await asyncio.sleep(100)
    assert work.most_at_once == 3
    assert [at for at, _ in work.runs] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


async def test_first_come_first_served(work: Recorder) -> None:
    queue = WorkQueue(work, workers=1)
    async with running(queue):
        for key in "cab":
            queue.add(key)
        await asyncio.sleep(1)
    assert [key for _, key in work.runs] == ["c", "a", "b"]


async def test_work_wakes_itself(work: Recorder) -> None:
    work.wake_after["a"] = 60
    queue = WorkQueue(work, workers=1)
    async with running(queue):
        queue.add("a")
        await asyncio.sleep(185)
    assert work.times("a") == [0.0, 60.0, 120.0, 180.0]


async def test_an_earlier_wake_up_stands(work: Recorder) -> None:
    queue = WorkQueue(work, workers=1)
    async with running(queue):
        queue.add_after("a", 10)
        queue.add_after("a", 60)
        queue.add_after("b", 60)
        queue.add_after("b", 10)
        await asyncio.sleep(200)
    assert (work.times("a"), work.times("b")) == ([10.0], [10.0])


async def test_failures_back_off_and_a_success_resets(work: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    work.failures["a"] = 4
    queue = WorkQueue(work, workers=1, backoff=Backoff(first=1, longest=4))
    with caplog.at_level(logging.WARNING):
        async with running(queue):
            queue.add("a")
            await asyncio.sleep(100)
    times = work.times("a")
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) == 5
    for pause, whole in zip(pauses, (1, 2, 4, 4), strict=True):
        assert whole / 2 <= pause <= whole
    assert [bool(record.exc_info) for record in caplog.records] == [True, False, False, False]
    assert "a failed (4 in a row), will be tried again: the API server said no" in caplog.text


async def test_a_failing_key_holds_up_no_other(work: Recorder) -> None:
    work.failures["bad"] = 1000
    queue = WorkQueue(work, workers=1, backoff=Backoff(first=10))
    async with running(queue):
        queue.add("bad")
        queue.add("good")
        await asyncio.sleep(5)
    assert work.times("good") == [0.0]


async def test_a_cause_does_not_wait_for_the_back_off(work: Recorder) -> None:
    work.failures["a"] = 1
    queue = WorkQueue(work, workers=1, backoff=Backoff(first=10))
    async with running(queue):
        queue.add("a")
        await asyncio.sleep(1)
        queue.add("a")
        await asyncio.sleep(1)
    assert work.times("a") == [0.0, 1.0]


async def test_a_forgotten_key_is_not_woken(work: Recorder) -> None:
    queue = WorkQueue(work, workers=1)
    async with running(queue):
        queue.add_after("a", 10)
        queue.forget("a")
        await asyncio.sleep(100)
    assert work.runs == []


async def test_progress_is_visible(work: Recorder) -> None:
    work.seconds = 30
    queue = WorkQueue(work, workers=2)
    assert queue.oldest_work_seconds() == 0
    async with running(queue):
        queue.add("a")
        await asyncio.sleep(5)
        queue.add("b")
        await asyncio.sleep(5)
        assert queue.oldest_work_seconds() == 10
        await asyncio.sleep(100)
        assert queue.oldest_work_seconds() == 0


async def test_a_closed_gate_holds_work_back_and_loses_none(work: Recorder) -> None:
    gate = asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    queue = WorkQueue(work, workers=1, gate=wait)
    async with running(queue):
        for key in ("a", "b", "a"):
            queue.add(key)
        await asyncio.sleep(10)
        assert work.runs == []
        gate.set()
        await asyncio.sleep(1)
    assert work.runs == [(10.0, "a"), (10.0, "b")]


@pytest.mark.parametrize("failures", [1, 2, 5, 40, 10_000])
def test_delays_stay_within_bounds(failures: int) -> None:
    backoff = Backoff(first=0.2, longest=30)
    delay: Callable[[], float] = lambda: backoff.delay(failures)  # noqa: E731
    assert all(0.1 <= delay() <= 30 for _ in range(50))

"""What is measured, in the order in which it is: from an empty API server to a thousand objects and a kill -9.

Objects are numbered for ever (`next_name`), so that what is left of one measure cannot be taken for the next one's.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from bench import report
from bench.operator.client import Client, Json
from bench.operator.controllers import Controller, child_image
from bench.operator.process import Process
from bench.operator.requests import Requests

T = TypeVar("T")

IMAGE = "registry.example/engine:1"
PAUSE_SECONDS = 0.1
"""Between two objects made one after another, so that each meets a controller that is done with the one before."""
QUIET_SECONDS = 3.0
LONGEST_SECONDS = 900.0
"""Nothing measured here takes longer; a controller that needs more is given up."""


@dataclass(frozen=True)
class Timing:
    """One object: seconds from the request to the child as the watch brought it."""

    since_sent: float
    since_answered: float
    """Can be negative: the controller may be faster than the answer of the API server to whoever asked."""


@dataclass(frozen=True)
class Burst:
    """Many objects at once."""

    count: int
    seconds: float
    """From the first request to the last child."""
    complete_seconds: float
    """From the first request until all children of all objects were counted (every 0.1 s)."""
    timings: tuple[Timing, ...]

    def per_second(self) -> float:
        return self.count / self.seconds


@dataclass(frozen=True)
class Idle:
    """A controller with nothing to do."""

    objects: int
    seconds: float
    requests: Requests
    noise_per_second: float
    rss_mb: float
    cpu_percent: float
    """Of one CPU."""

    def per_second(self) -> float:
        """Requests per second that the API server would not have had without the controller."""
        return self.requests.total() / self.seconds - self.noise_per_second


@dataclass(frozen=True)
class Recovery:
    """kill -9 in the middle of a burst, and a start at once."""

    seconds: float
    """From the kill until every object has all its children."""
    leading_seconds: float
    """Of these, until the new process held the Lease; nan where its identity was the old one's and nothing showed it."""
    doubled: int
    """Children beyond one set per object."""

    def working_seconds(self) -> float:
        return self.seconds - self.leading_seconds


class Bench:
    """One controller on one API server."""

    def __init__(self, controller: Controller, client: Client, process: Process) -> None:
        self._controller = controller
        self._client = client
        self._process = process
        self._numbers: Iterator[int] = itertools.count()

    async def start(self) -> None:
        """Start the controller; return when it has made the children of a first object, which is then removed."""
        self._process.start()
        await self.burst(1)
        await self.clear()

    async def one_by_one(self, count: int) -> list[Timing]:
        """Make objects one after another."""
        timings = []
        async with self._children() as seen:
            for _ in range(count):
                name = self._next_name()
                sent, answered = await self._create(name)
                moment = await self._within(seen.wait(name))
                timings.append(Timing(moment - sent, moment - answered))
                await asyncio.sleep(PAUSE_SECONDS)
        return timings

    async def burst(self, count: int) -> Burst:
        """Make objects all at once."""
        wanted = [self._next_name() for _ in range(count)]
        there = await self._client.count(self._controller.objects)
        begin = time.perf_counter()
        async with self._children() as seen:
            created = await asyncio.gather(*(self._create(name) for name in wanted))
            moments = await self._within(seen.wait_all(wanted))
        complete = await self._complete(there + count)
        return Burst(
            count=count,
            seconds=max(moments) - begin,
            complete_seconds=complete - begin,
            timings=tuple(
                Timing(moment - sent, moment - answered)
                for moment, (sent, answered) in zip(moments, created, strict=True)
            ),
        )

    async def updates(self, count: int) -> list[Timing]:
        """Change the image of objects that exist, one after another; timed until the child has it."""
        listed = await self._client.get(self._controller.objects)
        timings = []
        async with self._children() as seen:
            for number, item in enumerate(listed["items"][:count]):
                name, image = item["metadata"]["name"], f"registry.example/engine:changed-{number}"
                sent, answered = await self._client.patch(
                    f"{self._controller.objects}/{name}", self._controller.reimage(image)
                )
                moment = await self._within(seen.wait(name, image))
                timings.append(Timing(moment - sent, moment - answered))
                await asyncio.sleep(PAUSE_SECONDS)
        return timings

    async def noise(self, seconds: float) -> float:
        """Requests per second of the API server's own, and of this measurement."""
        before, begin = await self._client.requests(), time.perf_counter()
        await asyncio.sleep(seconds)
        after, end = await self._client.requests(), time.perf_counter()
        return after.since(before).total() / (end - begin)

    async def idle(self, seconds: float, *, noise_per_second: float) -> Idle:
        """Do nothing for a while and look at what the controller does."""
        await self._quiet()
        objects = await self._client.count(self._controller.objects)
        before, cpu, begin = await self._client.requests(), self._process.cpu_seconds(), time.perf_counter()
        await asyncio.sleep(seconds)
        after, cpu_after, end = await self._client.requests(), self._process.cpu_seconds(), time.perf_counter()
        return Idle(
            objects=objects,
            seconds=end - begin,
            requests=after.since(before),
            noise_per_second=noise_per_second,
            rss_mb=self._process.rss_mb(),
            cpu_percent=100 * (cpu_after - cpu) / (end - begin),
        )

    async def recovery(self, count: int, **environment: str) -> Recovery:
        """kill -9 when half of the children of a burst are there; start again at once."""
        wanted = [self._next_name() for _ in range(count)]
        leading: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        killed = float("inf")

        def notice(event: Json, moment: float) -> None:
            ours = event["object"]["metadata"]["name"] == self._controller.lease_name
            if ours and moment > killed and not leading.done():
                leading.set_result(moment)

        async with self._children() as seen, self._client.watching(self._controller.lease, notice):
            creations = asyncio.gather(*(self._create(name) for name in wanted))
            await self._within(seen.wait_for_number(count // 2))
            self._process.kill()
            killed = time.perf_counter()
            self._process.start(**environment)
            await creations
            held = await self._within(leading)
            await self._within(seen.wait_all(wanted))
        complete = await self._complete(count)
        await self._quiet()
        doubled = sum(
            [await self._client.count(path) - count * each for path, each in self._controller.children.items()]
        )
        return Recovery(seconds=complete - killed, leading_seconds=held - killed, doubled=doubled)

    async def clear(self) -> None:
        """Remove all objects, then their children: nobody collects garbage on this API server."""
        for path in (self._controller.objects, *self._controller.children):
            await self._client.delete_collection(path)
            await self._until(partial(self._empty, path))
        await self._quiet()

    async def _empty(self, path: str) -> bool:
        return await self._client.count(path) == 0

    async def _create(self, name: str) -> tuple[float, float]:
        return await self._client.create(self._controller.objects, self._controller.manifest(name, IMAGE))

    def _next_name(self) -> str:
        return f"svc-{next(self._numbers)}"

    async def _complete(self, objects: int) -> float:
        """The moment when every object has all its children."""
        for path, each in self._controller.children.items():
            await self._until(partial(self._has, path, objects * each))
        return time.perf_counter()

    async def _has(self, path: str, count: int) -> bool:
        return await self._client.count(path) >= count

    async def _quiet(self) -> None:
        """Return once nobody has written for a while: the tail of the work before is not part of what comes next."""
        last, since = await self._client.requests(), time.perf_counter()
        while time.perf_counter() - since < QUIET_SECONDS:
            await asyncio.sleep(1.0)
            now = await self._client.requests()
            if now.since(last).writes():
                last, since = now, time.perf_counter()

    async def _until(self, check: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(LONGEST_SECONDS):
            while not await check():  # noqa: ASYNC110  the condition is on the API server, not in this loop
                await asyncio.sleep(0.1)

    async def _within(self, moment: Awaitable[T]) -> T:
        """Wait for something; a controller that ended, or that takes for ever, is an error and not a long wait."""
        waiting = asyncio.ensure_future(moment)
        end = time.perf_counter() + LONGEST_SECONDS
        while not (await asyncio.wait([waiting], timeout=5.0))[0]:
            self._process.check()
            if time.perf_counter() > end:
                waiting.cancel()
                raise RuntimeError(f"{self._controller.name} did not get done within {LONGEST_SECONDS:.0f} s.")
        return waiting.result()

    @asynccontextmanager
    async def _children(self) -> "AsyncIterator[_Sightings]":
        seen = _Sightings()
        async with self._client.watching(self._controller.child, seen.notice):
            yield seen


class _Sightings:
    """When each child was first seen, and when first with a given image."""

    def __init__(self) -> None:
        self._moments: dict[tuple[str, str], float] = {}
        self._names: set[str] = set()
        self._waiting: dict[tuple[str, str], asyncio.Event] = {}
        self._half: tuple[int, asyncio.Event] = (0, asyncio.Event())

    def notice(self, event: Json, moment: float) -> None:
        if event["type"] == "DELETED":
            return
        name = event["object"]["metadata"]["name"]
        for key in ((name, ""), (name, child_image(event["object"]))):
            if key not in self._moments:
                self._moments[key] = moment
                if key in self._waiting:
                    self._waiting.pop(key).set()
        self._names.add(name)
        if len(self._names) >= self._half[0]:
            self._half[1].set()

    async def wait(self, name: str, image: str = "") -> float:
        """The moment when the child of this name, with this image if one is given, was first seen."""
        if (name, image) not in self._moments:
            await self._waiting.setdefault((name, image), asyncio.Event()).wait()
        return self._moments[name, image]

    async def wait_all(self, names: Sequence[str]) -> list[float]:
        """The moments when the children of these names were first seen."""
        return [await self.wait(name) for name in names]

    async def wait_for_number(self, count: int) -> None:
        """Return once that many children have been seen."""
        self._half = (count, asyncio.Event())
        if len(self._names) < count:
            await self._half[1].wait()


def milliseconds(timings: Sequence[Timing]) -> report.Distribution:
    """The times since the requests were sent."""
    return report.distribution([1000 * timing.since_sent for timing in timings])

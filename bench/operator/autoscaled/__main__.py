"""``python -m bench.operator.autoscaled``: steady load first, then overloads one after the other."""

import argparse
import asyncio
import http.client
import math
import random
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench import report
from bench.operator import controllers
from bench.operator.autoscaled import SIDECARS, figures, fleet
from bench.operator.autoscaled.figures import Outcome, Window
from bench.operator.autoscaled.sidecars import Load, Sidecars
from bench.operator.client import Client, Json
from bench.operator.process import Process
from e2e.cluster.controlplane import ControlPlane
from e2e.cluster.progress import Progress

_LONGEST_SECONDS: Final = 600.0
"""For the children of all services; what needs more is given up."""
_UNDECIDED_SECONDS: Final = 60.0
"""For a decision, four times the target."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    services: int = 1000
    pods_each: int = 2
    busy: int = 100
    noise_seconds: float = 60.0
    settle_seconds: float = 60.0
    """After all pods were read once: status and what was learned are written then."""
    steady_seconds: float = 300.0
    """What was learned of each service is written once in it, and each watch is renewed."""
    scrape_seconds: float = 15.0
    """Between two looks of a Prometheus: the figures of a thousand services take a part of a second to write."""
    overloads: int = 60
    """Of busy services, and as many of quiet ones."""
    spread_seconds: float = 60.0
    """In which they begin, at random."""


class Fleet:
    """The services and their pods' addresses; the first ones are busy."""

    def __init__(self, size: Size) -> None:
        self.names = [fleet.service_name(number) for number in range(size.services)]
        self.busy, self.quiet = self.names[: size.busy], self.names[size.busy :]
        self.ips = {
            name: [fleet.address(number * size.pods_each + each) for each in range(size.pods_each)]
            for number, name in enumerate(self.names)
        }
        busy = set(self.busy)
        self.sidecars = Sidecars(
            {
                ip: (fleet.pod_name(name, each), Load.BUSY if name in busy else Load.QUIET)
                for name, ips in self.ips.items()
                for each, ip in enumerate(ips)
            }
        )

    def of(self, names: list[str]) -> list[str]:
        """The addresses of the pods of services."""
        return [ip for name in names for ip in self.ips[name]]


class Decisions:
    """When each Deployment was first seen with more replicas than it began with."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self.moments: dict[str, float] = {}

    def notice(self, event: Json, moment: float) -> None:
        found = event["object"]
        if event["type"] != "DELETED" and found["spec"].get("replicas", 1) > self._replicas:
            self.moments.setdefault(found["metadata"]["name"], moment)


async def measure(size: Size, control_plane: ControlPlane, progress: Progress) -> Outcome:
    """All of it, on one fresh API server."""
    controllers.kvplane().install(control_plane)
    control_plane.kubectl("create", "namespace", fleet.NAMESPACE)
    control_plane.kubectl("create", "serviceaccount", "default", "-n", fleet.NAMESPACE)
    all_of_them = Fleet(size)
    async with (
        Client(control_plane.kubeconfig) as client,
        all_of_them.sidecars.serving() as url,
        _operator(control_plane, url) as operator,
    ):
        with progress.step("the API server alone"):
            noise = await _requests_per_second(client, size.noise_seconds)
        with progress.step(f"{size.services} services and what was learned of them"):
            await _known(all_of_them, size, client)
        operator.process.start()
        with progress.step("their children and pods"):
            await _made(all_of_them, size, client, operator.process)
        with progress.step("all pods read"):
            await _until(all_of_them.sidecars.all_read, operator.process, "All pods were not read")
            await asyncio.sleep(size.settle_seconds)
        async with _scraped(operator.scrapes, size.scrape_seconds):
            with progress.step("steady load"):
                window = await _steady(all_of_them, size, client, operator, noise=noise)
            with progress.step(f"{2 * size.overloads} overloads") as step:
                waited = await _overloads(all_of_them, size, client, operator.process)
                undecided = [name for name, seconds in waited.items() if math.isinf(seconds)]
                step.detail = f"without a decision within {_UNDECIDED_SECONDS:.0f} s: {', '.join(undecided) or 'none'}"
    return Outcome(
        services=len(all_of_them.names),
        pods=len(all_of_them.of(all_of_them.names)),
        window=window,
        busy=[waited[name] for name in all_of_them.busy if name in waited],
        quiet=[waited[name] for name in all_of_them.quiet if name in waited],
        undecided=undecided,
        scrapes=operator.scrapes.made,
        scrapes_failed=operator.scrapes.failed,
    )


@dataclass
class Scrapes:
    """Looks at the operator's metrics. One that fails is counted: minutes of measuring are not lost by it."""

    url: str
    made: int = 0
    failed: int = 0

    async def text(self) -> str:
        """What it exports now; empty where that cannot be had."""
        self.made += 1
        try:
            return await asyncio.to_thread(self._fetch)
        except (OSError, http.client.HTTPException):
            self.failed += 1
            return ""

    def _fetch(self) -> str:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.url, timeout=10) as answer:
            text: str = answer.read().decode()
            return text


@dataclass(frozen=True)
class _Operator:
    process: Process
    scrapes: Scrapes


@asynccontextmanager
async def _operator(control_plane: ControlPlane, sidecars: str) -> AsyncIterator[_Operator]:
    environment = controllers.operator_environment(control_plane) | {SIDECARS: sidecars}
    command = [sys.executable, "-m", "bench.operator.autoscaled.under_test"]
    process = Process(command, environment, log=control_plane.logs / "operator.log")
    try:
        url = f"http://127.0.0.1:{environment['KVPLANE_OPERATOR_METRICS_PORT']}/metrics"
        yield _Operator(process, Scrapes(url))
    finally:
        process.kill()


@asynccontextmanager
async def _scraped(scrapes: Scrapes, seconds: float) -> AsyncIterator[None]:
    """What a Prometheus costs the operator, while in the context."""

    async def scrape() -> None:
        while True:
            await scrapes.text()
            await asyncio.sleep(seconds)

    scraping = asyncio.create_task(scrape())
    try:
        yield
    finally:
        scraping.cancel()
        with suppress(asyncio.CancelledError):
            await scraping


async def _requests_per_second(client: Client, seconds: float) -> float:
    before, begin = await client.requests(), time.perf_counter()
    await asyncio.sleep(seconds)
    after, end = await client.requests(), time.perf_counter()
    return after.since(before).total() / (end - begin)


async def _known(found: Fleet, size: Size, client: Client) -> None:
    """Services, and what two days taught: an operator that has just begun holds less than one that runs for long."""
    await asyncio.gather(
        *(client.create(fleet.SERVICES, fleet.service(name, replicas=size.pods_each)) for name in found.names)
    )
    services = (await client.get(fleet.SERVICES))["items"]
    now = time.time()
    await asyncio.gather(
        *(
            client.create(
                fleet.CONFIG_MAPS, fleet.state(each["metadata"]["name"], uid=each["metadata"]["uid"], now=now)
            )
            for each in services
        )
    )


async def _made(found: Fleet, size: Size, client: Client, process: Process) -> None:
    """The children by the operator, then their pods, which serve at once."""

    async def complete() -> bool:
        return await client.count(fleet.DEPLOYMENTS) == len(found.names)

    await _until(complete, process, "The services have not all got their Deployments")

    async def make(name: str, each: int, ip: str) -> None:
        await client.create(fleet.PODS, fleet.pod(name, each))
        await client.patch(f"{fleet.PODS}/{fleet.pod_name(name, each)}/status", fleet.serving(ip))

    await asyncio.gather(*(make(name, each, ip) for name, ips in found.ips.items() for each, ip in enumerate(ips)))


async def _steady(found: Fleet, size: Size, client: Client, operator: _Operator, *, noise: float) -> Window:
    found.sidecars.forget()
    rounds = await _rounds(operator)
    before, cpu, begin = await client.requests(), operator.process.cpu_seconds(), time.perf_counter()
    await asyncio.sleep(size.steady_seconds)
    after, cpu_after, end = await client.requests(), operator.process.cpu_seconds(), time.perf_counter()
    return Window(
        seconds=end - begin,
        requests=after.since(before),
        noise_per_second=noise,
        rss_mb=operator.process.rss_mb(),
        cpu_cores=(cpu_after - cpu) / (end - begin),
        rounds=figures.since(await _rounds(operator), rounds),
        busy_gaps=found.sidecars.gaps(found.of(found.busy)),
        quiet_gaps=found.sidecars.gaps(found.of(found.quiet)),
    )


async def _rounds(operator: _Operator) -> figures.Buckets:
    """The ticks so far; read beside the loop, as the sidecars answer on it."""
    return await asyncio.to_thread(figures.buckets, await operator.scrapes.text())


async def _overloads(found: Fleet, size: Size, client: Client, process: Process) -> dict[str, float]:
    """Seconds to the decision of each service that was overloaded; infinite where none came."""
    random_ = random.Random(1)
    busy, quiet = (random_.sample(names, min(size.overloads, len(names))) for names in (found.busy, found.quiet))
    plan = sorted((random_.uniform(0, size.spread_seconds), name) for name in (*busy, *quiet))
    decisions, told = Decisions(size.pods_each), dict[str, float]()
    async with client.watching(fleet.DEPLOYMENTS, decisions.notice):
        begin = time.perf_counter()
        for offset, name in plan:
            await asyncio.sleep(max(0.0, begin + offset - time.perf_counter()))
            told[name] = time.perf_counter()
            for ip in found.ips[name]:
                found.sidecars.tell(ip, Load.OVERLOADED)
        await _holds(lambda: told.keys() <= decisions.moments.keys(), process, seconds=_UNDECIDED_SECONDS)
    return figures.waited(told, decisions.moments)


async def _until(holds: Callable[[], Any], process: Process, otherwise: str) -> None:
    """Wait until it holds; raises RuntimeError, with a sentence, where it takes too long."""
    if not await _holds(holds, process, seconds=_LONGEST_SECONDS):
        raise RuntimeError(f"{otherwise} within {_LONGEST_SECONDS:.0f} s.")


async def _holds(holds: Callable[[], Any], process: Process, *, seconds: float) -> bool:
    """Whether it holds within so long, asking twice a second; a process that ended is an error and not a long wait."""
    end = time.perf_counter() + seconds
    while True:
        answer = holds()
        if await answer if asyncio.iscoroutine(answer) else answer:
            return True
        process.check()
        if time.perf_counter() > end:
            return False
        await asyncio.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.operator.autoscaled", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small numbers, to see that it works; its figures are none"
    )
    parser.add_argument("--keep", type=Path, help="keep the API server's and the operator's logs in this new folder")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the operator is killed
    size = Size()
    if arguments.quick:
        size = Size(
            services=50,
            busy=10,
            noise_seconds=10.0,
            settle_seconds=20.0,
            steady_seconds=30.0,
            overloads=5,
            spread_seconds=10.0,
        )
    started, machine, progress = report.now(), report.machine(), Progress()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="kvplane-bench-"))
    try:
        with ControlPlane(folder / "control-plane", progress=progress) as control_plane:
            outcome = asyncio.run(measure(size, control_plane, progress))
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    written = report.Report(
        bench="operator-autoscaled",
        machine=machine,
        started=started,
        settings=asdict(size),
        header=("", "kvplane"),
        rows=figures.rows(outcome),
        last_line=figures.last_line(outcome),
        samples=_plain(outcome),
    )
    progress.say(f"written: {written.write()}")
    print(written.text())


def _plain(outcome: Outcome) -> dict[str, object]:
    """As JSON can hold it: requests are counted by pairs, and a histogram has no bound above its last."""
    plain = asdict(outcome)
    plain["window"]["requests"] = outcome.window.requests.by_kind()
    plain["window"]["rounds"] = {str(bound): count for bound, count in outcome.window.rounds.items()}
    return plain


if __name__ == "__main__":
    main()

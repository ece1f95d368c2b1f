"""Liveness and metrics over HTTP.

Live means: the event loop turns and no reconcile hangs. Whether the API server answers is not part of it: an outage must
not restart operators. A standby that waits for the Lease is live and ready.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.registry import Collector

from kvplane_operator import metrics
from kvplane_operator.settings import OperatorSettings

STUCK_SECONDS: Final = 120.0
"""One reconcile makes about a dozen requests of at most 5 s; longer means that it hangs."""


async def measure_loop_lag() -> None:
    """Export once a second how late the event loop is."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + 1.0
        await asyncio.sleep(1.0)
        metrics.LOOP_LAG.set(max(0.0, loop.time() - due))


@dataclass(frozen=True)
class _Collected(Collector):
    families: tuple[Metric, ...]

    def collect(self) -> Iterable[Metric]:
        """What was collected before."""
        return self.families


async def exposition(registry: Collector) -> bytes:
    """All metrics as text.

    Values are taken on the loop, where nobody changes them meanwhile; put into words in a thread, as the text of a thousand
    services would stop the loop for a part of a second.
    """
    return await asyncio.to_thread(generate_latest, _Collected(tuple(registry.collect())))


async def serve(settings: OperatorSettings, *, oldest_work_seconds: Callable[[], float]) -> list[web.AppRunner]:
    """Start both servers; clean the returned runners up at the end."""

    async def live(_: web.Request) -> web.Response:
        # That this answers at all shows that the loop turns.
        seconds = oldest_work_seconds()
        if seconds > STUCK_SECONDS:
            return web.Response(status=503, text=f"A reconcile has not ended for {seconds:.0f} s.\n")
        return web.Response(text="ok\n")

    async def ready(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def expose(_: web.Request) -> web.Response:
        return web.Response(body=await exposition(metrics.REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    health = web.Application()
    health.router.add_get("/livez", live)
    health.router.add_get("/readyz", ready)
    exporter = web.Application()
    exporter.router.add_get("/metrics", expose)
    runners = []
    for app, port in ((health, settings.health_port), (exporter, settings.metrics_port)):
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, settings.bind_address, port).start()
        runners.append(runner)
    return runners

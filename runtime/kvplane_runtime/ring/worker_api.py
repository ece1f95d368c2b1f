"""What a worker answers on its engine port: ``/health``, ``/metrics`` and ``/version``, on a thread of its own.

The model's thread stands in kernels for as long as a window takes, and the control thread must not miss a heartbeat for a
scrape. Nothing here is needed by the ring: a fault of this thread leaves the worker as it is, and the sidecar, which asks
here, sees it.
"""

import asyncio
import importlib.metadata
import threading
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kvplane_runtime.ring import health
from kvplane_runtime.ring.metrics import WorkerCollector
from kvplane_runtime.ring.worker import Worker

_STOP_SECONDS: Final = 5.0


class WorkerApi:
    """The port of one worker."""

    def __init__(self, *, worker: Worker, served_name: str, capacity_tokens: int, host: str, port: int) -> None:
        self._worker = worker
        self._host, self._port = host, port
        self._registry = CollectorRegistry()
        self._registry.register(
            WorkerCollector(
                account=lambda: worker.account,
                inside=lambda: worker.outside() is None,
                served_name=served_name,
                capacity_tokens=capacity_tokens,
            )
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()
        self._started = threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="ring-worker-api", daemon=True)

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application()
        application.router.add_get("/health", self.health)
        application.router.add_get("/metrics", self.metrics)
        application.router.add_get("/version", self.version)
        return application

    def start(self) -> None:
        """Returns when the port is open; raises OSError if it cannot be."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Closes the port."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(_STOP_SECONDS)

    async def health(self, _: web.Request) -> web.Response:
        """``GET /health``: 200 inside a ring that works, 500 where this process has to be started anew for that."""
        hung = self._worker.hung()
        return health.answer(self._worker.outside()) if hung is None else health.hangs(hung)

    async def metrics(self, request: web.Request) -> web.Response:
        """``GET /metrics``, in the format that the scraper prefers."""
        encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encoder(self._registry), headers={"Content-Type": content_type})

    async def version(self, _: web.Request) -> web.Response:
        """``GET /version``."""
        return web.json_response({"version": importlib.metadata.version("kvplane")})

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            self._started.set()

    async def _serve(self) -> None:
        runner = web.AppRunner(self.application(), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
            self._loop = asyncio.get_running_loop()
            self._started.set()
            await self._over.wait()
        except OSError as error:
            self._failure = error
        finally:
            await runner.cleanup()

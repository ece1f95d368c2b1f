"""The admin server: what kubelet, operator and Prometheus ask. Never on the client port.

=================  =====================================================================================
``/healthz``       200: the sidecar itself runs (its own liveness and startup; never waits for the engine)
``/ready``         200 while the engine is healthy and the pod does not drain, else 503: pod readiness
``/engine/startup``  200 once the engine is healthy, or a rank of a ring answers: the engine container's startup probe
``/engine/live``   200 unless the engine has been silent or failing for longer than the tolerance
``/drain``         starts a drain and answers when it is over: GET is the engine container's preStop, POST the operator
``/state``         kvplane_api.wire.SidecarState as JSON
``/metrics``       ``kvplane_*`` for Prometheus
=================  =====================================================================================

The preStop of an engine that loads ends it: its pod is to go. The operator's drain never does: it may outlive an engine that
crashes, and to end the next one would count as another crash.

``/drain`` of a ring's worker, which serves nobody, waits for rank 0's (:mod:`leader`): while rank 0 ends its requests, no other
rank may go.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kvplane_api.names import DRAIN_GRACE_SECONDS
from kvplane_api.wire import EngineSignals, SidecarState
from kvplane_runtime.sidecar.admit import AdmissionGate
from kvplane_runtime.sidecar.config import WatchedConfig
from kvplane_runtime.sidecar.drain import DrainGate
from kvplane_runtime.sidecar.engine import EngineMonitor
from kvplane_runtime.sidecar.leader import LeaderDrain
from kvplane_runtime.sidecar.signals import missing_signals

log = logging.getLogger(__name__)

_DRAIN_CHECK_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Admin:
    """Handlers over the running sidecar's parts."""

    pod: str
    config: WatchedConfig
    engine: EngineMonitor
    drain_gate: DrainGate
    gate: AdmissionGate
    registry: CollectorRegistry
    close_idle: Callable[[], None]
    """Closes the client connections on which no request is served."""
    end_engine: Callable[[], None]
    """Ends an engine that does not serve yet."""
    clock: Callable[[], float]
    leader: LeaderDrain | None = None
    """Rank 0 of the ring that the engine is a worker of."""

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application()
        application.router.add_get("/healthz", self.healthz)
        application.router.add_get("/ready", self.ready)
        application.router.add_get("/engine/startup", self.engine_startup)
        application.router.add_get("/engine/live", self.engine_live)
        application.router.add_get("/drain", self.drain)
        application.router.add_post("/drain", self.drain)
        application.router.add_get("/state", self.state)
        application.router.add_get("/metrics", self.metrics)
        return application

    async def healthz(self, _: web.Request) -> web.Response:
        """Being able to answer is the answer."""
        return web.Response(text="ok\n")

    async def ready(self, _: web.Request) -> web.Response:
        """Readiness of the pod."""
        if self.drain_gate.draining:
            return web.Response(status=503, text="The pod is draining.\n")
        return self._engine_is(self.engine.ready(), "The engine is not ready: it is loading, restarting or silent.\n")

    async def engine_startup(self, _: web.Request) -> web.Response:
        """Startup of the engine container."""
        return self._engine_is(self.engine.started(), "The engine has not answered its health check yet.\n")

    async def engine_live(self, _: web.Request) -> web.Response:
        """Liveness of the engine container."""
        return self._engine_is(self.engine.alive(), "The engine has not passed its health check for too long.\n")

    async def drain(self, request: web.Request) -> web.Response:
        """Begins a drain, or joins the one that runs, and waits for its end."""
        if not self.drain_gate.draining:
            log.info("Draining, with %d requests in flight.", self.drain_gate.in_flight)
        self.drain_gate.begin()
        self.close_idle()
        began = self.clock()
        # Polled, since the end depends on the clock, the configuration and the engine's health, not on one event.
        while not self._drained():  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_CHECK_SECONDS)
        if self.leader is not None and not self.engine.dead():
            await self.leader.over(until=began + DRAIN_GRACE_SECONDS + self.config.current.drain_seconds)
        log.info("Drain over, with %d requests in flight.", self.drain_gate.in_flight)
        if self.engine.health.loading and request.method == "GET":
            self.end_engine()
        return web.json_response({"inFlight": self.drain_gate.in_flight})

    async def state(self, _: web.Request) -> web.Response:
        """What the autoscaler reads."""
        engine = self.engine
        scrape = engine.scrape
        state = SidecarState(
            pod=self.pod,
            served_name=self.config.current.served_name,
            engine_ready=engine.ready(),
            draining=self.drain_gate.draining,
            drained=self.drain_gate.draining and self._drained(),
            in_flight=self.drain_gate.in_flight,
            signal_age_seconds=None if engine.scraped_at is None else self.clock() - engine.scraped_at,
            startup_seconds=engine.health.startup_seconds,
            missing_signals=() if scrape is None else missing_signals(scrape),
            admission=self.gate.admission.state(now=self.clock()),
            promises=self.gate.promises.state(),
            thrash=engine.kv.thrash,
            engine=EngineSignals(max_model_len_tokens=engine.max_model_len_tokens)
            if scrape is None
            else scrape.wire(max_model_len_tokens=engine.max_model_len_tokens),
        )
        return web.Response(text=state.model_dump_json(by_alias=True), content_type="application/json")

    async def metrics(self, request: web.Request) -> web.Response:
        """The exposition, in the format that the scraper prefers."""
        encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encoder(self.registry), headers={"Content-Type": content_type})

    def _drained(self) -> bool:
        return self.drain_gate.drained(drain_seconds=self.config.current.drain_seconds)

    @staticmethod
    def _engine_is(well: bool, otherwise: str) -> web.Response:
        return web.Response(text="ok\n") if well else web.Response(status=503, text=otherwise)

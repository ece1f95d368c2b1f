"""The running sidecar: start, run, stop.

Start: the admin server first (the kubelet probes it at once), then the client port; the engine may take an hour to
load, nothing here waits for it. Stop, on SIGTERM: accept no more, finish what is in flight, at most drainSeconds, then
go. In a pod this comes after the drain and after the engine's exit, as a native sidecar is stopped last.
"""

import asyncio
import contextlib
import logging
import random
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry

from kvplane_api.names import PORT_ADMIN, PORT_ENGINE, PORT_SERVING
from kvplane_runtime.admission.controller import Admission
from kvplane_runtime.proxy.limits import Limits
from kvplane_runtime.proxy.server import Proxy
from kvplane_runtime.proxy.upstream import UpstreamPool
from kvplane_runtime.sidecar.admin import Admin
from kvplane_runtime.sidecar.admit import AdmissionGate
from kvplane_runtime.sidecar.config import CHECK_SECONDS, WatchedConfig
from kvplane_runtime.sidecar.drain import DrainGate
from kvplane_runtime.sidecar.engine import EngineMonitor
from kvplane_runtime.sidecar.engine_process import end_engine
from kvplane_runtime.sidecar.kv_events import KvEventReader
from kvplane_runtime.sidecar.leader import LeaderDrain, ip_of, rank_0
from kvplane_runtime.sidecar.metrics import SidecarCollector

log = logging.getLogger(__name__)

_LOOPBACK: Final = "127.0.0.1"
_ADMIN_CLOSE_SECONDS: Final = 1.0
"""Time for admin answers under way when everything else has ended; aiohttp would give a minute."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What cannot change while the sidecar runs."""

    config_file: Path
    pod: str
    host: str | None = None
    """Address of both listeners; None is every address of both families."""
    port: int = PORT_SERVING
    admin_port: int = PORT_ADMIN
    engine_port: int = PORT_ENGINE
    ring: bool = False
    """The engine is a rank of a ring; which one is told by the end of ``pod``."""


async def run(settings: Settings, *, limits: Limits | None = None, stop: asyncio.Event | None = None) -> None:
    """Runs until SIGTERM or SIGINT, or until ``stop`` is set.

    Raises ConfigError before anything is started if the configuration is not valid, OSError if a port is taken.
    """
    stop = stop or _stop_on_signals()
    clock = time.monotonic
    config = WatchedConfig(settings.config_file)
    limits = limits or Limits()
    host = rank_0(settings.pod) if settings.ring else None
    engine = EngineMonitor(
        base_url=f"http://{_LOOPBACK}:{settings.engine_port}",
        clock=clock,
        ring=settings.ring,
        worker=host is not None,
    )
    drain = DrainGate(engine=engine, clock=clock)
    admission = Admission(config=config.current, uniform=random.random, ring=settings.ring)
    gate = AdmissionGate(drain=drain, admission=admission, config=config, engine=engine, clock=clock)
    upstream = UpstreamPool(host=_LOOPBACK, port=settings.engine_port, limits=limits)
    proxy = Proxy(gate=gate, upstream=upstream, limits=limits, max_body_bytes=lambda: config.current.max_body_bytes)
    registry = CollectorRegistry()
    registry.register(SidecarCollector(config=config, engine=engine, drain=drain, gate=gate, proxy=proxy, clock=clock))
    leader = LeaderDrain(host=host, port=PORT_ADMIN, clock=clock, look_up=ip_of) if host is not None else None
    admin = Admin(
        pod=settings.pod,
        config=config,
        engine=engine,
        drain_gate=drain,
        gate=gate,
        registry=registry,
        close_idle=proxy.close_idle,
        end_engine=partial(end_engine, port=settings.engine_port),
        clock=clock,
        leader=leader,
    )

    runner = web.AppRunner(
        admin.application(), access_log=None, handle_signals=False, shutdown_timeout=_ADMIN_CLOSE_SECONDS
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.admin_port).start()
        await proxy.listen(host=settings.host, port=settings.port)
        log.info(
            "Serving on port %d, admin on %d, engine on %d.", settings.port, settings.admin_port, settings.engine_port
        )
        async with asyncio.TaskGroup() as background:  # a poll that fails by our own fault ends the process, visibly
            work = [engine.run(), gate.run(), _watch(config)]
            if config.current.engine.kv_events:
                work.append(KvEventReader(ledger=engine.kv.ledger, clock=clock).run())
            if leader is not None:
                work.append(leader.run())
            polls = [background.create_task(coroutine) for coroutine in work]
            await stop.wait()
            proxy.stop_accepting()
            await _finish(drain, seconds=config.current.drain_seconds)
            for poll in polls:
                poll.cancel()
    finally:
        proxy.abort()
        await gate.reader.close()
        await runner.cleanup()


async def _watch(config: WatchedConfig) -> None:
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        config.check()


async def _finish(drain: DrainGate, *, seconds: float) -> None:
    log.info("Stopping, with %d requests in flight.", drain.in_flight)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await drain.empty.wait()


def _stop_on_signals() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def first() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first)
    return stop

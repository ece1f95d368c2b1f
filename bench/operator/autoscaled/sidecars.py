"""The sidecars of all pods as one server: ``GET /POD_IP/state`` answers as that pod's sidecar would.

Who asked when is kept: how often the operator looks is seen from here, and not believed of it.
"""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Final

from aiohttp import web

from kvplane_api.wire import AdmissionState, EngineSignals, PromisesState, SidecarState

CAPACITY_TOKENS: Final = 100_000
_BLOCK_TOKENS: Final = 16
_REQUESTS_PER_SECOND: Final = 2


class Load(Enum):
    """What a pod has to do."""

    QUIET = "quiet"
    BUSY = "busy"
    """Half full: two such pods need no third."""
    OVERLOADED = "overloaded"
    """Full, with more than as much in the queue."""


@dataclass(frozen=True)
class _Fill:
    used: float
    reserved: float
    running: int
    queued: int
    queued_tokens: float


_FILLS: Final = {
    Load.QUIET: _Fill(used=0.0, reserved=0.0, running=0, queued=0, queued_tokens=0.0),
    Load.BUSY: _Fill(used=0.4, reserved=0.5, running=8, queued=0, queued_tokens=0.0),
    Load.OVERLOADED: _Fill(used=0.97, reserved=0.98, running=20, queued=30, queued_tokens=1.5),
}
"""Shares of the capacity."""


def state_of(pod: str, load: Load, *, seconds: float) -> SidecarState:
    """What the sidecar of a pod tells that has had this load for so long."""
    fill = _FILLS[load]
    requests = int(seconds * _REQUESTS_PER_SECOND) if fill.running else 0
    return SidecarState(
        pod=pod,
        served_name="bench",
        engine_ready=True,
        draining=False,
        in_flight=fill.running + fill.queued,
        signal_age_seconds=0.4,
        startup_seconds=60.0,
        engine=EngineSignals(
            kv_cache_usage_ratio=fill.used,
            kv_cache_blocks=CAPACITY_TOKENS // _BLOCK_TOKENS,
            kv_cache_block_size_tokens=_BLOCK_TOKENS,
            kv_cache_capacity_tokens=CAPACITY_TOKENS,
            requests_running=fill.running,
            requests_waiting=0,
            preemptions_total=0,
            prompt_tokens_total=500 * requests,
            generation_tokens_total=200 * requests,
            max_model_len_tokens=8192,
        ),
        promises=PromisesState(kept_total=requests, broken_total=requests // 50),
        admission=AdmissionState(
            policy="Enforce",
            running=fill.running,
            queued=fill.queued,
            queued_prompt_tokens=500 * fill.queued,
            queued_reservation_tokens=int(fill.queued_tokens * CAPACITY_TOKENS),
            reserved_tokens=int(fill.reserved * CAPACITY_TOKENS),
            kv_peak_ratio=fill.reserved,
            kappa=1.0,
            admitted_total=requests,
            refused_total=0,
            shed_reservation_tokens_total=0,
        ),
    )


class Sidecars:
    """The pods by address, and what each has to do."""

    def __init__(self, pods: Mapping[str, tuple[str, Load]]) -> None:
        """``pods``: name and load by address."""
        self._names = {ip: name for ip, (name, _) in pods.items()}
        self._loads = {ip: load for ip, (_, load) in pods.items()}
        self._since = dict.fromkeys(pods, time.perf_counter())
        """Since when each counts its requests."""
        self._reads: dict[str, list[float]] = {ip: [] for ip in pods}

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Answer while the body runs; yields the URL before the pod's address."""
        application = web.Application()
        application.router.add_get("/{ip}/state", self._answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
            await site.start()
            host, port = runner.addresses[0][:2]
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()

    def tell(self, ip: str, load: Load) -> None:
        """What the sidecar at an address tells from now on; one that had nothing to do begins to count its requests."""
        if self._loads[ip] is Load.QUIET:
            self._since[ip] = time.perf_counter()
        self._loads[ip] = load

    def forget(self) -> None:
        """Begin to count anew."""
        self._reads = {ip: [] for ip in self._reads}

    def all_read(self, *, times: int = 1) -> bool:
        """Whether each has been asked so often."""
        return all(len(moments) >= times for moments in self._reads.values())

    def gaps(self, ips: list[str]) -> list[float]:
        """Seconds between two reads of each of these."""
        return [after - before for ip in ips for before, after in pairwise(self._reads[ip])]

    async def _answer(self, request: web.Request) -> web.Response:
        ip, now = request.match_info["ip"], time.perf_counter()
        if ip not in self._names:
            return web.Response(status=404)
        self._reads[ip].append(now)
        state = state_of(self._names[ip], self._loads[ip], seconds=now - self._since[ip])
        return web.Response(text=state.model_dump_json(by_alias=True), content_type="application/json")

"""The sidecar's gate: readiness and drain.

A drain exists so that a pod can go without losing a request. The order (kubelet calls ``/drain`` from the engine's
preStop, before the engine gets SIGTERM): unready at once; new requests are still served, since clients and Services learn
of it late, but their connections end: the idle ones at once, the others with their answer; when no request has come for
DRAIN_GRACE_SECONDS, or after LONGEST_GRACE_SECONDS, 503 with Retry-After; over when nothing is in flight, or drainSeconds
are over, or the engine is dead. An engine that is started again ends the drain: the probe that killed the old one runs
preStop too, and the pod goes on living.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvplane_api.names import DRAIN_GRACE_SECONDS
from kvplane_runtime.proxy.gate import End, Refusal, Relay
from kvplane_runtime.proxy.http1 import Request, RequestHead, ResponseHead

LONGEST_GRACE_SECONDS = 30.0
"""A request that comes shows that somebody still takes this pod for a replica; who does so for longer than this is told."""

_DRAINING = Refusal(503, "draining", "This replica is shutting down; retry, and another one will answer.", 1)
_NOT_READY = Refusal(503, "engine_not_ready", "The engine is loading its model or restarting; retry soon.", 5)


class Engine(Protocol):
    """What the gate must know of the engine."""

    @property
    def starts(self) -> int:
        """How often it was seen to come up."""

    def ready(self) -> bool:
        """Whether requests may be sent."""

    def dead(self) -> bool:
        """Whether waiting for it is pointless."""


class DrainGate:
    """Lets requests in while the engine is ready and no drain has closed the gate; counts those inside."""

    def __init__(self, *, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._drain: tuple[int, float] | None = None
        """The engine's life (``starts``) that is drained, and since when on the clock."""
        self._entered = -math.inf
        """When the last request came in."""
        self.in_flight = 0
        self.empty = asyncio.Event()
        """Set while nothing is in flight."""
        self.empty.set()

    @property
    def draining(self) -> bool:
        """Whether the engine's present life is being drained."""
        return self._draining_since() is not None

    def begin(self) -> None:
        """Starts a drain; while one runs this changes nothing."""
        if not self.draining:
            self._drain = self._engine.starts, self._clock()

    def drained(self, *, drain_seconds: float) -> bool:
        """Whether nothing more is to be waited for (also when the drain was ended by a new engine)."""
        since = self._draining_since()
        if since is None or self._engine.dead():
            return True
        waited = self._clock() - since
        return (self._closed(since) and not self.in_flight) or waited >= DRAIN_GRACE_SECONDS + drain_seconds

    def enter(self, head: RequestHead) -> "Visit | Refusal":
        """Refuses while the gate is closed, whatever the request is."""
        del head
        since = self._draining_since()
        if since is not None and self._closed(since):
            return _DRAINING
        if not self._engine.ready():
            return _NOT_READY
        self._entered = self._clock()
        self.in_flight += 1
        self.empty.clear()
        return Visit(self)

    def check_engine(self) -> Refusal | None:
        """Refuses if the engine is not ready."""
        return None if self._engine.ready() else _NOT_READY

    def leave(self) -> None:
        """One request that had entered is over."""
        self.in_flight -= 1
        if not self.in_flight:
            self.empty.set()

    def _closed(self, since: float) -> bool:
        """Whether a drain that began then lets nothing more in."""
        now = self._clock()
        return now - max(since, self._entered) >= DRAIN_GRACE_SECONDS or now - since >= LONGEST_GRACE_SECONDS

    def _draining_since(self) -> float | None:
        if self._drain is None:
            return None
        life, since = self._drain
        return since if life == self._engine.starts else None


@dataclass(frozen=True, slots=True)
class Visit:
    """One request inside the gate."""

    gate: DrainGate

    @property
    def last_on_connection(self) -> bool:
        """During a drain the client is to come back on a new connection, which leads to another replica."""
        return self.gate.draining

    def admit_now(self, request: Request) -> Request | Refusal:
        """The engine may have died while the body was read."""
        return self.gate.check_engine() or request

    async def admit(self, request: Request) -> Request | Refusal:
        """The same: nothing is waited for."""
        return self.admit_now(request)

    def answered(self, head: ResponseHead) -> Relay:
        """Whatever the engine answers goes to the client."""
        del head
        return Relay()

    def leave(self, end: End) -> None:
        """One request fewer."""
        del end
        self.gate.leave()

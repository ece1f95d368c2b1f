"""Reads the state of every serving pod from its sidecar: ``GET http://POD_IP:8001/state``.

One loop looks once a second for pods that are due, so that services without pods cost nothing, and only the leader polls.
Each poll is a task of its own with a short limit: a pod that hangs delays no other. What was read goes into the store;
a service is planned again at once only where something changed that status tells. Pods of services for which the
autoscaler decides are read when it asks for them, all pods of a service at the same time.
"""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import aiohttp

from kvplane_api import names
from kvplane_api.wire import SidecarState
from kvplane_operator import metrics
from kvplane_operator.plan.ring.groups import tells
from kvplane_operator.plan.scaling import decides
from kvplane_operator.plan.signals import answered, failed, telling
from kvplane_operator.plan.snapshot import Manifest
from kvplane_operator.store import POD, Store, service_of

TIMEOUT_SECONDS: Final = 2.0
_ASKING: Final = aiohttp.ClientTimeout(total=1.0)
_TICK_SECONDS: Final = 1.0
_AT_ONCE: Final = 256
"""Polls, so that half of 2,000 pods may hang for the whole limit without making the others wait for more than seconds."""
_ANSWER_BYTES: Final = 64 * 1024
"""A state takes about 1 KiB; whoever else answers at a pod's address may send without end."""


class StateError(Exception):
    """A pod's state cannot be read; the message says why, and says the same for the same cause."""


Fetch = Callable[[str], Awaitable[SidecarState]]
"""The state at a pod's IP; raises StateError."""

Resolve = Callable[[str], str]
"""Base URL of the sidecar's admin port for a pod's IP. A simulation of thousands of pods leads to one address."""


def admin_port(ip: str) -> str:
    """Where the sidecar of a real pod answers."""
    return f"http://{f'[{ip}]' if ':' in ip else ip}:{names.PORT_ADMIN}"


class Sidecars:
    """A client of the pods' sidecars."""

    def __init__(self, session: aiohttp.ClientSession, *, resolve: Resolve = admin_port) -> None:
        self._session = session
        self._resolve = resolve

    async def fetch(self, ip: str) -> SidecarState:
        """The state that the sidecar at that IP tells; raises StateError."""
        url = f"{self._resolve(ip)}/state"
        body = b""
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status != 200:
                    raise StateError(f"{url} answers {response.status}")
                async for part in response.content.iter_any():
                    body += part
                    if len(body) > _ANSWER_BYTES:
                        raise StateError(f"{url} answers with more than {_ANSWER_BYTES} bytes")
        except TimeoutError as error:
            raise StateError(f"{url} does not answer within {TIMEOUT_SECONDS:.0f} s") from error
        except aiohttp.ClientConnectorError as error:
            why = os.strerror(error.os_error.errno) if error.os_error.errno else "several addresses failed"
            raise StateError(f"{url} takes no connection ({why})") from error
        except (aiohttp.ClientError, OSError) as error:
            raise StateError(f"{url} breaks the answer off") from error
        try:
            return SidecarState.model_validate_json(body)
        except ValueError as error:
            raise StateError(f"{url} answers with something that is not a sidecar's state") from error

    async def drain(self, ip: str) -> None:
        """Ask the sidecar at that IP to take no more requests.

        It answers once it holds none, which nobody waits for here: whether it drains is read from its state.
        """
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._session.post(f"{self._resolve(ip)}/drain", allow_redirects=False, timeout=_ASKING):
                pass

    async def close(self) -> None:
        """End all connections."""
        await self._session.close()


def connect_to_sidecars(resolve: Resolve = admin_port) -> Sidecars:
    """A client that asks nobody for a proxy, and keeps no connection to an address that may be another pod's next time."""
    return Sidecars(
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_AT_ONCE, force_close=True),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
            trust_env=False,
        ),
        resolve=resolve,
    )


@dataclass(frozen=True)
class _Target:
    uid: str
    name: str
    ip: str
    namespace: str
    service: str


class SignalPoller:
    """Polls the pods of the store, and keeps their readings there."""

    def __init__(
        self,
        *,
        store: Store,
        fetch: Fetch,
        leading: Callable[[], bool],
        enqueue: Callable[[str], None],
        period_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._fetch = fetch
        self._leading = leading
        self._enqueue = enqueue
        self._period = period_seconds
        self._clock = clock
        self._due: dict[str, float] = {}
        self._polling: set[str] = set()
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        """Poll until cancelled."""
        async with asyncio.TaskGroup() as polls:
            while True:
                if self._leading():
                    for target in self._take_due():
                        polls.create_task(self._poll(target))
                await asyncio.sleep(_TICK_SECONDS)

    async def read(self, uid: str) -> None:
        """Read all pods of a service that tell, now and at the same time; returns when each has answered or failed."""
        found = (_target(pod) for pod in self._store.pods_of(uid))
        targets = [target for target in found if target is not None and target.uid not in self._polling]
        self._polling.update(target.uid for target in targets)
        await asyncio.gather(*(self._poll(target) for target in targets))

    def _take_due(self) -> list[_Target]:
        """Pods to poll now: one that began to serve at once, then each period with jitter."""
        now = asyncio.get_running_loop().time()
        serving = {
            target.uid: target
            for pod in self._store.pods()
            if (target := _target(pod)) is not None and not self._read_by_others(target)
        }
        for uid in self._due.keys() - serving.keys():
            del self._due[uid]
        targets = []
        for uid, target in serving.items():
            early = self._store.reading(uid) is not None and now < self._due.get(uid, now)
            if early or uid in self._polling:
                continue
            # The first period is cut at random, so that pods that were found together are not polled together for ever.
            share = random.uniform(0.9, 1.1) if uid in self._due else random.uniform(0.5, 1.0)  # noqa: S311
            self._due[uid] = now + share * self._period
            targets.append(target)
        return targets

    def _read_by_others(self, target: _Target) -> bool:
        """Whether the autoscaler sees to it; the first time it is read here, as it may not be the autoscaler's turn soon."""
        service = self._store.service(target.namespace, target.service)
        return service is not None and decides(service["spec"]) and self._store.reading(target.uid) is not None

    async def _poll(self, target: _Target) -> None:
        self._polling.add(target.uid)
        try:
            async with self._slots:
                before = self._store.reading(target.uid)
                try:
                    state = await self._fetch(target.ip)
                    reading = answered(before, state, at=self._clock())
                except StateError as error:
                    reading = failed(before, str(error))
        finally:
            self._polling.discard(target.uid)
        metrics.STATE_POLLS.labels("failed" if reading.error else "answered").inc()
        if not self._store.note(target.uid, reading):
            return  # it stopped serving meanwhile
        if before is None or telling(target.name, before) != telling(target.name, reading):
            uid = self._store.uid_of(target.namespace, target.service)
            if uid is not None:
                self._enqueue(uid)


def _target(pod: Manifest) -> _Target | None:
    """What is polled of a pod; None of one that has nothing to tell."""
    metadata, ip = pod["metadata"], pod["status"].get("podIP")
    service = service_of(POD, metadata)
    if not ip or service is None or not tells(pod):
        return None
    return _Target(metadata["uid"], metadata["name"], ip, metadata["namespace"], service)

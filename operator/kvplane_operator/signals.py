"""Reads the state of every serving pod from its sidecar: ``GET http://POD_IP:8001/state``.

One loop looks once a second for pods that are due, so that services without pods cost nothing, and only the leader polls.
Each poll is a task of its own with a short limit: a pod that hangs delays no other. What was read goes into the store;
a service is planned again at once only where something changed that status tells.
"""

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import aiohttp

from kvplane_api import names
from kvplane_api.wire import SidecarState
from kvplane_operator import metrics
from kvplane_operator.plan.ring.groups import tells
from kvplane_operator.plan.signals import answered, failed, telling
from kvplane_operator.store import POD, Store, service_of

TIMEOUT_SECONDS: Final = 2.0
_ASKING: Final = aiohttp.ClientTimeout(total=1.0)
_TICK_SECONDS: Final = 1.0
_AT_ONCE: Final = 64
_ANSWER_BYTES: Final = 64 * 1024
"""A state takes about 1 KiB; whoever else answers at a pod's address may send without end."""


class StateError(Exception):
    """A pod's state cannot be read; the message says why, and says the same for the same cause."""


Fetch = Callable[[str], Awaitable[SidecarState]]
"""The state at a pod's IP; raises StateError."""


class Sidecars:
    """A client of the pods' sidecars."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def fetch(self, ip: str) -> SidecarState:
        """The state that the sidecar at that IP tells; raises StateError."""
        url = _url(ip, "/state")
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
            async with self._session.post(_url(ip, "/drain"), allow_redirects=False, timeout=_ASKING):
                pass

    async def close(self) -> None:
        """End all connections."""
        await self._session.close()


def _url(ip: str, path: str) -> str:
    return f"http://{f'[{ip}]' if ':' in ip else ip}:{names.PORT_ADMIN}{path}"


def connect_to_sidecars() -> Sidecars:
    """A client that asks nobody for a proxy, and keeps no connection to an address that may be another pod's next time."""
    return Sidecars(
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_AT_ONCE, force_close=True),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
            trust_env=False,
        )
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
    ) -> None:
        self._store = store
        self._fetch = fetch
        self._leading = leading
        self._enqueue = enqueue
        self._period = period_seconds
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

    def _take_due(self) -> list[_Target]:
        """Pods to poll now: one that began to serve at once, then each period with jitter."""
        now = asyncio.get_running_loop().time()
        serving = {
            pod["metadata"]["uid"]: pod for pod in self._store.pods() if tells(pod) and pod["status"].get("podIP")
        }
        for uid in self._due.keys() - serving.keys():
            del self._due[uid]
        targets = []
        for uid, pod in serving.items():
            early = self._store.reading(uid) is not None and now < self._due.get(uid, now)
            if early or uid in self._polling:
                continue
            # The first period is cut at random, so that pods that were found together are not polled together for ever.
            share = random.uniform(0.9, 1.1) if uid in self._due else random.uniform(0.5, 1.0)  # noqa: S311
            self._due[uid] = now + share * self._period
            metadata = pod["metadata"]
            service = service_of(POD, metadata)
            if service is not None:
                targets.append(_Target(uid, metadata["name"], pod["status"]["podIP"], metadata["namespace"], service))
        return targets

    async def _poll(self, target: _Target) -> None:
        self._polling.add(target.uid)
        try:
            async with self._slots:
                before = self._store.reading(target.uid)
                try:
                    reading = answered(before, await self._fetch(target.ip))
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

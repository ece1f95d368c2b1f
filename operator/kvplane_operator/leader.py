"""Leader election on a ``coordination.k8s.io`` Lease.

A lease makes two writers rare; it does not fence them. So the holder counts its own time: on the monotonic clock, from
before the request that renewed, and ``check`` refuses every write once ``renew_deadline_seconds`` are over, also in a
process that was stopped and continued. What a write in flight could still do is harmless by its preconditions.
A candidate never compares clocks with the holder: it measures how long the Lease has not changed, as it saw it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from kvplane_operator import metrics
from kvplane_operator.cluster import ApiError, Cluster, ConflictError, NotFoundError
from kvplane_operator.settings import OperatorSettings

logger = logging.getLogger(__name__)


class NotLeadingError(Exception):
    """This process may not write: it does not hold the Lease, or could not renew it in time."""


class Leadership:
    """One candidate's view of the Lease."""

    def __init__(
        self,
        settings: OperatorSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._renewed_at: float | None = None
        self._leading = asyncio.Event()
        self._held: dict[str, Any] | None = None  # the Lease as this process wrote it last
        self._seen: tuple[str, float] | None = None  # resourceVersion of a foreign Lease, and since when it has it

    def check(self) -> None:
        """Raise NotLeadingError unless this process holds the Lease surely."""
        if not self.held():
            raise NotLeadingError("This process does not hold the leader Lease; another one reconciles.")

    def held(self) -> bool:
        """Whether the last renewal is younger than the deadline."""
        age = None if self._renewed_at is None else self._clock() - self._renewed_at
        return age is not None and age < self._settings.renew_deadline_seconds

    async def wait(self) -> None:
        """Return once this process holds the Lease."""
        while not self.held():
            await self._leading.wait()
            if not self.held():  # lost, and the campaign has not noticed yet
                await asyncio.sleep(self._settings.renew_seconds / 4)

    async def campaign(self, cluster: Cluster) -> None:
        """Take the Lease when it is free, renew it, and take it again after an outage; until cancelled.

        A leader that could not renew in time only stops writing: what it watches stays up to date, and an API server
        that comes back after an outage finds it at work at once.
        """
        while True:
            self._note(await self._try(cluster))
            await asyncio.sleep(self._settings.renew_seconds)

    def _note(self, renewed: bool) -> None:
        leading = renewed or self.held()
        if leading and not self._leading.is_set():
            logger.info("Leading as %s.", self._settings.identity)
            self._leading.set()
        elif not leading and self._leading.is_set():
            logger.warning("Not leading any more: the Lease was lost, or not renewed in time.")
            self._leading.clear()
        metrics.LEADING.set(1 if leading else 0)

    async def release(self, cluster: Cluster) -> None:
        """Give the Lease up at a clean end, so that a standby need not wait for it to expire."""
        if not self.held():
            return
        self._renewed_at = self._held = None
        try:
            lease = await cluster.get_lease(self._settings.lease_namespace, self._settings.lease_name)
            if lease and lease["spec"].get("holderIdentity") == self._settings.identity:
                lease["spec"]["holderIdentity"] = ""
                await cluster.replace_lease(self._settings.lease_namespace, lease)
        except ApiError as error:
            logger.info("The Lease was not released and will expire: %s", error)

    async def _try(self, cluster: Cluster) -> bool:
        """Take or renew the Lease; False if another holds it, or the API server does not answer."""
        asked_at = self._clock()
        try:
            # A holder replaces the version that it wrote last: one request, and a conflict if anybody came between.
            lease = self._held or await cluster.get_lease(self._settings.lease_namespace, self._settings.lease_name)
            if lease is None:
                self._held = await cluster.create_lease(self._settings.lease_namespace, self._lease(None))
            elif self._mine(lease) or self._free(lease):
                self._held = await cluster.replace_lease(self._settings.lease_namespace, self._lease(lease))
            else:
                self._held = self._renewed_at = None
                return False
        except (ConflictError, NotFoundError):
            self._held = None
            return False
        except ApiError as error:
            # Whether the write arrived is not known: read the Lease next time.
            self._held = None
            logger.warning("The leader Lease could not be renewed: %s", error)
            return False
        self._renewed_at = asked_at
        return True

    def _mine(self, lease: dict[str, Any]) -> bool:
        return bool(lease["spec"].get("holderIdentity") == self._settings.identity)

    def _free(self, lease: dict[str, Any]) -> bool:
        version = lease["metadata"]["resourceVersion"]
        if self._seen is None or self._seen[0] != version:
            self._seen = (version, self._clock())
        if not lease["spec"].get("holderIdentity"):
            return True
        duration = lease["spec"].get("leaseDurationSeconds") or self._settings.lease_seconds
        return self._clock() - self._seen[1] >= duration

    def _lease(self, held: dict[str, Any] | None) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = dict(held["spec"]) if held else {}
        if held is None or not self._mine(held):
            spec["acquireTime"] = now
            spec["leaseTransitions"] = spec.get("leaseTransitions", -1) + 1
        spec |= {
            "holderIdentity": self._settings.identity,
            "leaseDurationSeconds": self._settings.lease_seconds,
            "renewTime": now,
        }
        metadata = (
            held["metadata"]
            if held
            else {"name": self._settings.lease_name, "namespace": self._settings.lease_namespace}
        )
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}

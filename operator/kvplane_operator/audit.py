"""Finds what the watches missed: objects that vanished while a watch was down are never reported as deleted.

Every five minutes one metadata-only list per kind, answered from the API server's cache; services of vanished children
are queued.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from kvplane_operator.cluster import ApiError, Cluster
from kvplane_operator.handlers import CHILD_SELECTOR, WATCHED
from kvplane_operator.settings import OperatorSettings
from kvplane_operator.store import SERVICE, Store, service_of

logger = logging.getLogger(__name__)

AUDIT_SECONDS: Final = 300.0


async def audit(*, cluster: Cluster, store: Store, settings: OperatorSettings, enqueue: Callable[[str], None]) -> None:
    """Audit for ever; an API server that does not answer is tried again next time."""
    while True:
        await asyncio.sleep(AUDIT_SECONDS)
        try:
            await audit_once(cluster=cluster, store=store, settings=settings, enqueue=enqueue)
        except ApiError as error:
            logger.info("The audit was put off: %s", error)


async def audit_once(
    *, cluster: Cluster, store: Store, settings: OperatorSettings, enqueue: Callable[[str], None]
) -> None:
    """One listing of each kind."""
    for kind in WATCHED:
        for namespace in settings.watch_namespaces or (None,):
            selector = None if kind == SERVICE else CHILD_SELECTOR
            listing = await cluster.list_metadata(kind, namespace, selector=selector)
            for lost in store.retain(
                kind, listing.uids, resource_version=listing.resource_version, namespace=namespace
            ):
                metadata = lost["metadata"]
                logger.info("%s %s/%s vanished unseen.", kind, metadata["namespace"], metadata["name"])
                name = service_of(kind, metadata)
                uid = store.uid_of(metadata["namespace"], name) if name else None
                if uid is not None:
                    enqueue(uid)

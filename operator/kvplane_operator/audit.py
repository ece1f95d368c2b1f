"""Finds what the watches missed: what vanished while a watch was down, and what a watch never brought.

A minute after the start and every five minutes from then on, one metadata-only list per kind, answered from the API server's cache.
Vanished objects are forgotten; those whose listed version the store does not have even some seconds later are read one by one.
The services of both are queued.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from kvplane_operator.cluster import ApiError, Cluster, Listing, NotFoundError, RefusedError
from kvplane_operator.handlers import CHILD_SELECTOR, WATCHED
from kvplane_operator.settings import OperatorSettings
from kvplane_operator.store import SERVICE, Store

logger = logging.getLogger(__name__)

FIRST_SECONDS: Final = 60.0
AUDIT_SECONDS: Final = 300.0
LATE_SECONDS: Final = 5.0
"""A watch that is only behind the listing has caught up by then."""


async def audit(*, cluster: Cluster, store: Store, settings: OperatorSettings, enqueue: Callable[[str], None]) -> None:
    """Audit for ever; an API server that does not answer is tried again next time."""
    pause = FIRST_SECONDS
    while True:
        await asyncio.sleep(pause)
        pause = AUDIT_SECONDS
        try:
            await audit_once(cluster=cluster, store=store, settings=settings, enqueue=enqueue)
        except ApiError as error:
            logger.info("The audit was put off: %s", error)


async def audit_once(
    *,
    cluster: Cluster,
    store: Store,
    settings: OperatorSettings,
    enqueue: Callable[[str], None],
    late_seconds: float = LATE_SECONDS,
) -> None:
    """One listing of each kind and namespace; one that is refused hides nothing of another."""
    listings: list[tuple[str, Listing]] = []
    listed, refused = set[str | None](), set[str | None]()
    for kind in WATCHED:
        for namespace in settings.watch_namespaces or (None,):
            selector = None if kind == SERVICE else CHILD_SELECTOR
            try:
                listing = await cluster.list_metadata(kind, namespace, selector=selector)
            except (NotFoundError, RefusedError) as error:
                refused.add(namespace)
                logger.info("The audit leaves %s of %s out: %s", kind, namespace or "all namespaces", error)
                continue
            listed.add(namespace)
            listings.append((kind, listing))
            for lost in store.retain(
                kind, listing.objects, resource_version=listing.resource_version, namespace=namespace
            ):
                _tell(store, kind, lost["metadata"], enqueue, what="vanished unseen")
    if any(store.behind(kind, listing.objects) for kind, listing in listings):
        await asyncio.sleep(late_seconds)
    for kind, listing in listings:
        for namespace, name in store.behind(kind, listing.objects):
            unseen = await cluster.find(kind, namespace, name)
            if unseen is not None and store.put(kind, unseen):
                _tell(store, kind, unseen["metadata"], enqueue, what="was missed by its watch")
    if listed and not listed & refused:
        store.complete = True  # where watches fail, or there is nothing to watch, nobody else says so


def _tell(store: Store, kind: str, metadata: Mapping[str, Any], enqueue: Callable[[str], None], *, what: str) -> None:
    logger.warning("%s %s/%s %s.", kind, metadata["namespace"], metadata["name"], what)
    uid = store.service_uid(kind, metadata)
    if uid is not None:
        enqueue(uid)

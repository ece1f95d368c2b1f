"""Who else scales: HorizontalPodAutoscalers that target a service, or a child of one. KEDA makes such an object too.

They are listed twice a minute, from the API server's cache, not watched: a conflict of two scalers is a mistake of somebody's
configuration, which nobody needs to see within a second, and a watch would bring each of them whenever its status changes, up to
every 15 s. Without the right, or where the API is not served, nothing is news: whoever is known to scale stays so until a listing
succeeds that does not have it, as a refusal may pass (RBAC is read from a cache, by each API server for itself).

Nothing is written before the first look: of a Deployment that somebody else scales it would be spec.replicas, and pods would
go with all that they serve.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, Final

from kvplane_api import names
from kvplane_operator.cluster import ApiError, Cluster, NotFoundError, RefusedError
from kvplane_operator.plan.ring.groups import service_of_set
from kvplane_operator.plan.snapshot import Kind, Manifest, Scaler
from kvplane_operator.settings import OperatorSettings
from kvplane_operator.store import Store

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 30.0
FIRST_SECONDS: Final = 1.0
"""Between looks until the first has succeeded."""
FIRST_TRIES: Final = 3
"""Then nobody is taken to scale: what fails for this list alone must not keep all services waiting."""
REFUSED_SECONDS: Final = 600.0
"""The right may be given later, without a word to the operator."""


async def look_for_scalers(
    *,
    cluster: Cluster,
    store: Store,
    settings: OperatorSettings,
    enqueue: Callable[[str], None],
    looked: asyncio.Event,
) -> None:
    """Look for ever; services to which something is news are planned again. ``looked`` is set after the first look
    that succeeds, or when so many have failed.
    """
    left_out: dict[str | None, int] = {}
    for tries in itertools.count(1):
        try:
            await look_once(cluster=cluster, store=store, settings=settings, enqueue=enqueue, left_out=left_out)
        except ApiError as error:
            logger.info("Looking for HorizontalPodAutoscalers was put off: %s", error)
        else:
            looked.set()
        if tries == FIRST_TRIES:
            looked.set()
        await asyncio.sleep(LOOK_SECONDS if looked.is_set() else FIRST_SECONDS)


async def look_once(
    *,
    cluster: Cluster,
    store: Store,
    settings: OperatorSettings,
    enqueue: Callable[[str], None],
    left_out: dict[str | None, int],
) -> None:
    """One listing of each namespace that is watched; ``left_out``: in how many looks one that was refused is not asked for."""
    found: dict[tuple[str, str], tuple[Scaler, ...]] = {}
    unlisted: set[str | None] = set()
    for namespace in settings.watch_namespaces or (None,):
        listed = await _listed(cluster, namespace, left_out)
        if listed is None:
            unlisted.add(namespace)
        for manifest in listed or ():
            target = manifest.get("spec", {}).get("scaleTargetRef") or {}
            service = concerned(target)
            if service is not None:
                metadata = manifest["metadata"]
                key = (metadata["namespace"], service)
                scaler = Scaler(metadata["name"], target["kind"], target["name"])
                found[key] = tuple(sorted((*found.get(key, ()), scaler)))
    for uid in store.put_scalers(found, unlisted=unlisted):
        enqueue(uid)


async def _listed(cluster: Cluster, namespace: str | None, left_out: dict[str | None, int]) -> list[Manifest] | None:
    """Those of a namespace; None where it may not be listed, which hides nothing of another one."""
    if left := left_out.get(namespace, 0):
        left_out[namespace] = left - 1
        return None
    try:
        return await cluster.list_pod_autoscalers(namespace)
    except (NotFoundError, RefusedError) as error:
        where = f" of {namespace}" if namespace else ""
        logger.info("HorizontalPodAutoscalers%s cannot be listed, so none is news: %s", where, error)
        left_out[namespace] = round(REFUSED_SECONDS / LOOK_SECONDS) - 1
        return None


def concerned(target: dict[str, Any]) -> str | None:
    """Name of the service that a ``scaleTargetRef`` may concern, by itself or by the name of a child; None if none."""
    group, kind, name = str(target.get("apiVersion", "")).split("/")[0], target.get("kind"), str(target.get("name", ""))
    if (group, kind) in ((names.GROUP, names.KIND), ("apps", Kind.DEPLOYMENT.value)):
        return name
    return service_of_set(name) if (group, kind) == ("apps", Kind.STATEFUL_SET.value) else None

"""Which of the namespaces to be watched can be.

A namespace that was deleted takes the operator's Role in it along, and its objects answer 403 from then on. kopf asks for each
listing until it is answered, and tells of no object before all are: one such namespace would stop the services of all others
when an operator starts. So those that may not be listed are left out, and a process that has left some out ends as soon as one
of them may be: the next one watches it too.
"""

import asyncio
import logging
from typing import Final

from kvplane_operator.cluster import ApiError, Cluster, NotFoundError, RefusedError
from kvplane_operator.store import SERVICE

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 2.0
"""Between tries while nothing can be listed at all."""
LOOK_SECONDS: Final = 60.0
"""Between looks at the namespaces that were left out."""


class Namespaces:
    """Those of an installation; ``wanted`` empty: all of the cluster, by one right."""

    def __init__(self, wanted: tuple[str, ...]) -> None:
        self._wanted = wanted
        self.watched: tuple[str, ...] = ()
        """To be watched; as empty as ``wanted``."""
        self.left_out: tuple[str, ...] = ()

    async def choose(self, cluster: Cluster, *, poll_seconds: float = POLL_SECONDS) -> None:
        """Waits for the CRD, and for the API server to list its objects somewhere: of one just made it answers 429 at first, and no
        watch should begin in that moment.
        """
        while True:
            try:
                watched = [namespace for namespace in self._wanted or (None,) if await _listed(cluster, namespace)]
            except NotFoundError:
                logger.warning("The CRD of LLMService is not installed; waiting for it.")
            except ApiError as error:
                logger.warning("Waiting for the API server: %s", error)
            else:
                if watched:
                    self.watched = tuple(namespace for namespace in watched if namespace is not None)
                    self.left_out = tuple(namespace for namespace in self._wanted if namespace not in watched)
                    return
            await asyncio.sleep(poll_seconds)

    async def join(self, cluster: Cluster, *, look_seconds: float = LOOK_SECONDS) -> None:
        """Returns when one that was left out can be watched; without any, never."""
        while True:
            await asyncio.sleep(look_seconds)
            for namespace in self.left_out:
                try:
                    listed = await _listed(cluster, namespace)
                except ApiError:
                    continue  # whatever it is, the others have it as well
                if listed:
                    logger.warning("Namespace %s can be watched now.", namespace)
                    return


async def _listed(cluster: Cluster, namespace: str | None) -> bool:
    """Whether its services may be listed; raises ApiError where that is not the question."""
    try:
        await cluster.list_metadata(SERVICE, namespace, selector=None)
    except RefusedError as error:
        where = f"Namespace {namespace}" if namespace else "The cluster"
        logger.warning("%s cannot be watched and is left out: %s", where, error)
        return False
    return True

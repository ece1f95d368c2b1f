"""What kopf calls: every watched object goes into the store, and the service it concerns into the queue.

Only index and event handlers: daemons, timers and deletion handlers would put a finalizer on every object, which would
hang in Terminating once the operator is uninstalled, and creation handlers write their progress into the object. The
index handlers make kopf hold events back until everything that exists is in the store.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import kopf

from kvplane_api import names
from kvplane_operator.store import POD, SERVICE, Store

WATCHED: Final[Mapping[str, tuple[str, str, str]]] = {
    SERVICE: (names.GROUP, names.VERSION, names.PLURAL),
    "Deployment": ("apps", "v1", "deployments"),
    "StatefulSet": ("apps", "v1", "statefulsets"),
    "Service": ("", "v1", "services"),
    "ConfigMap": ("", "v1", "configmaps"),
    "PodDisruptionBudget": ("policy", "v1", "poddisruptionbudgets"),
    POD: ("", "v1", "pods"),
}
"""Kind to group, version and plural."""

NODES: Final = ("", "v1", "nodes")

CHILD_SELECTOR: Final = names.LABEL_SERVICE
"""Label selector of children and pods: the label exists. Applied by the API server, so other people's are not sent."""

# Watches end and begin anew on the operator's terms, not at the server's random half hour, so that a connection that died
# silently is noticed; connecting and short requests have limits that a hanging API server cannot stretch.
_SERVER_TIMEOUT = 120  # an integer: it goes into the URL as it is
_CLIENT_TIMEOUT = 150.0
_CONNECT_TIMEOUT = 5.0
_REQUEST_TIMEOUT = 10.0


class _UntilItAnswers:
    """Pauses between kopf's attempts, without end: an outage of the API server must not end the operator."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((0.2, 0.5, 1.0, 2.0, 3.0), itertools.repeat(5.0))


class _NoDiffBase(kopf.DiffBaseStorage):
    """Keeps nothing of an object. kopf compares each object with how it was last handled, which only handlers of
    changes need; for the others the deep copies are a third of its time per event."""

    def build(self, *, body: kopf.Body, extra_fields: object = None) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        return


def build_registry(
    *, store: Store, enqueue: Callable[[str], None], forget: Callable[[str], None], nodes: bool
) -> kopf.OperatorRegistry:
    """Handlers for all watched kinds, and for ``nodes`` where they may be read, bound to one store and one queue."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    for kind, (group, version, plural) in WATCHED.items():
        _register(registry, kind, (group, version, plural), store=store, enqueue=enqueue, forget=forget)
    if nodes:
        _register_nodes(registry, store=store, enqueue=enqueue)
    return registry


def configure(settings: kopf.OperatorSettings) -> kopf.OperatorSettings:
    """kopf's settings: nothing is written into objects, nothing waits, watches carry the label selector."""
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=names.GROUP)
    settings.persistence.diffbase_storage = _NoDiffBase()
    settings.persistence.finalizer = f"{names.GROUP}/unused"
    settings.posting.enabled = False
    settings.posting.loggers = False
    settings.scanning.disabled = True
    settings.watching.server_timeout = _SERVER_TIMEOUT
    settings.watching.client_timeout = _CLIENT_TIMEOUT
    settings.watching.connect_timeout = _CONNECT_TIMEOUT
    settings.networking.request_timeout = _REQUEST_TIMEOUT
    settings.networking.connect_timeout = _CONNECT_TIMEOUT
    settings.networking.error_backoffs = _UntilItAnswers()
    for kind, resource in WATCHED.items():
        if kind != SERVICE:
            settings.watching.label_selectors[resource] = CHILD_SELECTOR
    return settings


def _register(
    registry: kopf.OperatorRegistry,
    kind: str,
    resource: tuple[str, str, str],
    *,
    store: Store,
    enqueue: Callable[[str], None],
    forget: Callable[[str], None],
) -> None:
    news: set[str] = set()
    """UIDs whose last event told something new: kopf calls `index`, then `event`, in turn for each object."""

    @kopf.index(*resource, registry=registry, id=f"store-{kind}")
    async def index(body: kopf.Body, **_: Any) -> None:
        if store.put(kind, dict(body)):
            news.add(body["metadata"]["uid"])

    @kopf.on.event(*resource, registry=registry, id=f"event-{kind}")
    async def event(event: kopf.RawEvent, **_: Any) -> None:
        store.complete = True  # kopf holds events back until everything is indexed
        manifest: dict[str, Any] = dict(event["object"])
        metadata = manifest["metadata"]
        told = metadata["uid"] in news
        news.discard(metadata["uid"])
        if event["type"] == "DELETED":
            told = store.remove(kind, manifest)
            if kind == SERVICE:
                forget(metadata["uid"])
                enqueue(metadata["uid"])  # once more: it finds nothing, and what was remembered of the service goes
        uid = store.service_uid(kind, metadata)
        if told and uid is not None:
            enqueue(uid)


def _register_nodes(registry: kopf.OperatorRegistry, *, store: Store, enqueue: Callable[[str], None]) -> None:
    news: dict[str, list[str]] = {}
    """By node, the services to which its last event told something new."""

    @kopf.index(*NODES, registry=registry, id="store-Node")
    async def index(body: kopf.Body, **_: Any) -> None:
        news[body["metadata"]["name"]] = store.put_node(dict(body))

    @kopf.on.event(*NODES, registry=registry, id="event-Node")
    async def event(event: kopf.RawEvent, **_: Any) -> None:
        name = event["object"]["metadata"]["name"]
        for uid in news.pop(name, ()):
            enqueue(uid)
        if event["type"] == "DELETED":
            store.remove_node(name)

"""What the handlers make of an event; that kopf calls them is for tests/integration to show."""

from typing import Any, cast

from kvplane_operator.cluster import Cluster
from kvplane_operator.handlers import build_registry
from kvplane_operator.reconcile import Reconciler
from kvplane_operator.store import SERVICE, Store
from tests.kvplane_operator.world import settings


async def drain(ip: str) -> None:
    raise AssertionError(f"Nobody is drained here, and {ip} was.")


async def test_of_a_service_that_is_gone_nothing_is_remembered() -> None:
    """Services come and go for as long as the operator runs."""
    store, queued, forgotten = Store(), list[str](), list[str]()
    reconciler = Reconciler(store=store, cluster=cast("Cluster", None), settings=settings(), drain=drain)
    registry = build_registry(store=store, enqueue=queued.append, forget=forgotten.append, nodes=False)
    event: Any = next(h.fn for h in registry._watching.get_all_handlers() if h.id == f"event-{SERVICE}")
    metadata = {"namespace": "team", "name": "chat", "uid": "u1", "resourceVersion": "2", "generation": 1}
    store.put(SERVICE, {"metadata": {**metadata, "deletionTimestamp": "2026-01-01T12:00:00Z"}, "spec": {}})
    store.complete = True
    assert await reconciler.reconcile("u1") is None
    assert "u1" in reconciler._memory

    await event(event={"type": "DELETED", "object": {"metadata": {**metadata, "resourceVersion": "3"}, "spec": {}}})
    assert forgotten == ["u1"]
    for uid in queued:
        assert await reconciler.reconcile(uid) is None
    assert not reconciler._memory

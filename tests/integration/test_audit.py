"""The audit against a real API server: what vanished while nobody watched is forgotten, what no watch brought is read, and the
services of both are queued.
"""

import asyncio
from typing import Any

import pytest

from kvplane_operator.audit import audit_once
from kvplane_operator.cluster import Cluster as ApiServer
from kvplane_operator.cluster import UnreachableError, connect
from kvplane_operator.settings import OperatorSettings
from kvplane_operator.store import SERVICE, Store
from tests.integration.conftest import Cluster, llmservice


def _seen(namespace: str, kind: str, name: str, **more: Any) -> dict[str, Any]:
    metadata = {"namespace": namespace, "name": name, "uid": f"{kind}-{name}", "resourceVersion": "2", "generation": 1}
    return {"metadata": {**metadata, "labels": {"kvplane.dev/service": "chat"}}, "spec": {}, **more}


async def _listed(api_server: ApiServer, cluster: Cluster, namespace: str) -> None:
    """Wait until a listing from the API server's cache, which may be behind, or not there yet, has all services as they are."""
    services = [service["metadata"] for service in cluster.get(namespace, "llmservices")]
    wanted = {(namespace, each["name"]): each["resourceVersion"] for each in services}
    async with asyncio.timeout(60):
        while True:
            try:
                found = (await api_server.list_metadata(SERVICE, namespace, selector=None)).objects
            except UnreachableError:
                found = {}
            if {where: version.resource_version for where, version in found.items()} == wanted:
                return
            await asyncio.sleep(0.05)


async def _audit(cluster: Cluster, store: Store, namespace: str, queued: list[str]) -> None:
    api = await connect()
    api_server = ApiServer(api, timeout_seconds=10)
    try:
        await _listed(api_server, cluster, namespace)
        await audit_once(
            cluster=api_server,
            store=store,
            settings=OperatorSettings(watch_namespaces=(namespace,)),  # most kinds have no objects here
            enqueue=queued.append,
            late_seconds=0,
        )
    finally:
        await api.close()


async def test_vanished_child_is_forgotten_and_its_service_queued(
    cluster: Cluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    cluster.apply(llmservice("chat", namespace))
    service = cluster.get(namespace, "llmservice chat")
    store, queued = Store(), list[str]()
    store.put("LLMService", service)
    store.put("Deployment", _seen(namespace, "Deployment", "chat"))
    store.put("LLMService", _seen(namespace, "LLMService", "deleted-unseen"))
    await _audit(cluster, store, namespace, queued)
    assert queued == [service["metadata"]["uid"]]
    assert store.services() == 1
    snapshot = store.snapshot(service["metadata"]["uid"])
    assert snapshot is not None
    assert not snapshot.children


async def test_what_no_watch_brought_is_read_and_its_service_queued(
    cluster: Cluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    cluster.apply(llmservice("unseen", namespace), llmservice("changed", namespace), llmservice("known", namespace))
    store, queued = Store(), list[str]()
    unseen, changed, known = (cluster.get(namespace, f"llmservice {name}") for name in ("unseen", "changed", "known"))
    store.put("LLMService", changed)
    store.put("LLMService", known)
    cluster.apply(llmservice("changed", namespace, replicas=3))

    await _audit(cluster, store, namespace, queued)

    assert sorted(queued) == sorted(each["metadata"]["uid"] for each in (unseen, changed))
    snapshot = store.snapshot(changed["metadata"]["uid"])
    assert snapshot is not None
    assert snapshot.spec["replicas"] == 3
    assert store.service(namespace, "unseen") is not None

    queued.clear()
    await _audit(cluster, store, namespace, queued)
    assert queued == []

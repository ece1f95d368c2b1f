"""The audit against a real API server: what vanished while nobody watched is forgotten, what no watch brought is read, and the
services of both are queued.
"""

from typing import Any

import pytest

from kvplane_operator.audit import audit_once
from kvplane_operator.cluster import Cluster as ApiServer
from kvplane_operator.cluster import connect
from kvplane_operator.settings import OperatorSettings
from kvplane_operator.store import Store
from tests.integration.conftest import Cluster, llmservice


def _seen(namespace: str, kind: str, name: str, **more: Any) -> dict[str, Any]:
    metadata = {"namespace": namespace, "name": name, "uid": f"{kind}-{name}", "resourceVersion": "2", "generation": 1}
    return {"metadata": {**metadata, "labels": {"kvplane.dev/service": "chat"}}, "spec": {}, **more}


async def _audit(store: Store, namespace: str, queued: list[str]) -> None:
    api = await connect()
    try:
        await audit_once(
            cluster=ApiServer(api, timeout_seconds=10),
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
    await _audit(store, namespace, queued)
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

    await _audit(store, namespace, queued)

    assert sorted(queued) == sorted(each["metadata"]["uid"] for each in (unseen, changed))
    snapshot = store.snapshot(changed["metadata"]["uid"])
    assert snapshot is not None
    assert snapshot.spec["replicas"] == 3
    assert store.service(namespace, "unseen") is not None

    queued.clear()
    await _audit(store, namespace, queued)
    assert queued == []

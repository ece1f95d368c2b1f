"""One service on a real API server: its children, what heals, what is refused, what survives."""

import json
from collections.abc import Callable

import pytest

from tests.integration.conftest import (
    CHILDREN,
    Cluster,
    Operator,
    children,
    contents,
    create_chat,
    eventually,
    llmservice,
)


def test_children_status_and_events(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace)
    service = eventually(lambda: cluster.get(namespace, "llmservice chat"))
    conditions = {c["type"]: (c["status"], c["reason"]) for c in service["status"]["conditions"]}
    shown = ["Accepted", "Available", "Progressing", "Degraded", "SignalsFresh", "ScalingActive", "Ready"]
    assert list(conditions) == shown
    assert conditions["Accepted"] == ("True", "Valid")
    assert conditions["Available"] == ("False", "Starting")
    assert service["status"]["endpoint"] == f"http://chat.{namespace}.svc:8000/v1"
    assert not service["metadata"].get("finalizers")
    assert not service["metadata"].get("annotations", {}).keys() - {"kubectl.kubernetes.io/last-applied-configuration"}
    eventually(lambda: "Scaling" in cluster.kubectl("describe", "llms", "chat", "-n", namespace), what="an event")
    table = cluster.kubectl("get", "llms", "-n", namespace, "-o", "wide")
    assert "hf://acme/tiny" in table
    assert "Starting" in table


def test_replicas_follow_the_scale_subresource(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace)
    template = cluster.get(namespace, "deployment chat")["spec"]["template"]
    cluster.kubectl("scale", "llms", "chat", "-n", namespace, "--replicas=3")
    eventually(lambda: cluster.get(namespace, "deployment chat")["spec"]["replicas"] == 3)
    eventually(lambda: cluster.get(namespace, "poddisruptionbudget chat"))
    assert cluster.get(namespace, "deployment chat")["spec"]["template"] == template
    cluster.kubectl("scale", "llms", "chat", "-n", namespace, "--replicas=0")
    eventually(lambda: cluster.condition(namespace, "chat", "Available")["reason"] == "ScaledToZero")
    eventually(lambda: cluster.get(namespace, "poddisruptionbudget chat") is None)


def test_children_edited_by_hand_are_healed(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace)
    before = contents(cluster, namespace)
    cluster.kubectl("scale", "deployment", "chat", "-n", namespace, "--replicas=7")
    cluster.kubectl("set", "image", "deployment/chat", "engine=evil:1", "-n", namespace)
    patch = {"spec": {"selector": {"kvplane.dev/service": "other"}}}
    cluster.kubectl("patch", "service", "chat", "-n", namespace, "--type=merge", "-p", json.dumps(patch))
    cluster.kubectl(
        "patch", "configmap", "chat", "-n", namespace, "--type=merge", "-p", '{"data":{"sidecar.json":"{}"}}'
    )
    cluster.kubectl("label", "service", "chat-pods", "-n", namespace, "kvplane.dev/service-")

    def healed() -> bool:
        now = children(cluster, namespace)
        deployment = now["deployment chat"]["spec"]
        return bool(
            deployment["replicas"] == 1
            and deployment["template"]["spec"]["containers"][0]["image"] != "evil:1"
            and now["service chat"]["spec"]["selector"]["kvplane.dev/service"] == "chat"
            and json.loads(now["configmap chat"]["data"]["sidecar.json"])
            and now["service chat-pods"]["metadata"]["labels"].get("kvplane.dev/service") == "chat"
        )

    eventually(healed)
    after = contents(cluster, namespace)
    assert after["configmap chat"] == before["configmap chat"]


def test_children_deleted_by_hand_come_back(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace)
    before = {child: o["metadata"]["uid"] for child, o in children(cluster, namespace).items()}
    for child in CHILDREN:
        cluster.kubectl("delete", "-n", namespace, *child.split(), "--wait=false")

    def renewed() -> bool:
        now = children(cluster, namespace)
        return all(o and o["metadata"]["uid"] != before[child] for child, o in now.items())

    eventually(renewed)


def test_foreign_child_is_never_taken_over(cluster: Cluster, namespace: str, operator: Operator) -> None:
    foreign = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "chat", "namespace": namespace, "labels": {"kvplane.dev/service": "chat"}},
        "data": {"mine": "yes"},
    }
    cluster.apply(foreign)
    before = cluster.get(namespace, "configmap chat")
    cluster.apply(llmservice("chat", namespace))
    condition = eventually(
        lambda: (c := cluster.condition(namespace, "chat", "Accepted")) and c["status"] == "False" and c
    )
    assert condition["reason"] == "ChildConflict"
    assert "ConfigMap chat exists" in condition["message"]
    assert cluster.get(namespace, "configmap chat") == before
    assert cluster.get(namespace, "deployment chat") is None
    # Once it is out of the way, the service goes on (here: at once, since the label lets the watch see it go).
    cluster.kubectl("delete", "configmap", "chat", "-n", namespace)
    cluster.kubectl("annotate", "llms", "chat", "-n", namespace, "example.com/look=again")
    eventually(lambda: all(children(cluster, namespace).values()))
    eventually(lambda: cluster.condition(namespace, "chat", "Accepted")["status"] == "True")


def test_rejected_overlay_leaves_what_runs(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace)
    before = contents(cluster, namespace)
    overlay = {"spec": {"containers": [{"name": "engine", "ports": [{"containerPort": 700000}]}]}}
    cluster.apply(llmservice("chat", namespace, podTemplate=overlay))
    condition = eventually(lambda: (c := cluster.condition(namespace, "chat", "Accepted"))["status"] == "False" and c)
    assert condition["reason"] == "ChildRejected"
    assert "700000" in condition["message"]
    assert contents(cluster, namespace) == before
    cluster.apply(llmservice("chat", namespace, podTemplate={"spec": {"nodeSelector": {"disk": "fast"}}}))
    eventually(lambda: cluster.condition(namespace, "chat", "Accepted")["status"] == "True")
    deployment = cluster.get(namespace, "deployment chat")
    assert deployment["spec"]["template"]["spec"]["nodeSelector"] == {"disk": "fast"}


def test_path_source_needs_the_installations_consent(
    cluster: Cluster, namespace: str, operators: Callable[..., Operator]
) -> None:
    first = operators()
    cluster.apply(llmservice("chat", namespace, model={"source": "path:///srv/models/tiny"}))
    eventually(lambda: cluster.condition(namespace, "chat", "Accepted").get("reason") == "PathNotAllowed")
    assert cluster.get(namespace, "deployment chat") is None
    first.stop()
    operators(allow_path_sources=True)
    eventually(lambda: cluster.condition(namespace, "chat", "Accepted").get("status") == "True")


def test_configuration_reaches_pods_without_a_rollout(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace)
    pod = eventually(lambda: cluster.get(namespace, "pods -l kvplane.dev/service=chat"))[0]
    cluster.apply(llmservice("chat", namespace, admission={"maxBodyBytes": 4096}))

    def touched() -> bool:
        now = cluster.get(namespace, f"pod {pod['metadata']['name']}")
        key = "kvplane.dev/config-hash"
        return bool(now["metadata"]["annotations"][key] != pod["metadata"]["annotations"][key])

    eventually(touched)
    config = json.loads(cluster.get(namespace, "configmap chat")["data"]["sidecar.json"])
    assert config["maxBodyBytes"] == 4096
    assert [p["metadata"]["uid"] for p in cluster.get(namespace, "pods")] == [pod["metadata"]["uid"]]


@pytest.mark.usefixtures("garbage_collector")
def test_service_deleted_while_starting_takes_its_children_along(
    cluster: Cluster, namespace: str, operator: Operator
) -> None:
    cluster.apply(llmservice("chat", namespace))
    eventually(lambda: cluster.get(namespace, "deployment chat"))
    cluster.kubectl("delete", "llms", "chat", "-n", namespace, "--wait=false")
    eventually(lambda: not any(children(cluster, namespace).values()))
    eventually(lambda: not cluster.get(namespace, "pods"))


@pytest.mark.usefixtures("garbage_collector")
def test_service_made_again_under_the_same_name(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace)
    uid = cluster.get(namespace, "llmservice chat")["metadata"]["uid"]
    cluster.kubectl("delete", "llms", "chat", "-n", namespace)
    cluster.apply(llmservice("chat", namespace))

    def owned_anew() -> bool:
        new = cluster.get(namespace, "llmservice chat")["metadata"]["uid"]
        found = children(cluster, namespace)
        return uid != new and all(o and o["metadata"]["ownerReferences"][0]["uid"] == new for o in found.values())

    eventually(owned_anew)


@pytest.mark.usefixtures("garbage_collector")
def test_without_an_operator_deletion_still_works(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace)
    assert operator.stop() == 0
    cluster.kubectl("delete", "llms", "chat", "-n", namespace, "--timeout=30s")
    eventually(lambda: not any(children(cluster, namespace).values()))

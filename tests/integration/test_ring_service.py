"""A service of rings on a real API server: what it is taken for, that it settles, and that a group changes as a whole."""

import json
from typing import Any

from tests.integration.conftest import Cluster, Operator, eventually, llmservice

RING: dict[str, Any] = {
    "model": {"source": "pvc://models"},
    "mode": "Ring",
    "ring": {"size": 3, "image": "ring:1", "recovery": {"reformGraceSeconds": 0}},
}
SETS = ("statefulset long-ring-0", "statefulset long-ring-1")


def create(cluster: Cluster, namespace: str, **spec: Any) -> None:
    """A service `long`, with its sets and their pods."""
    cluster.apply(llmservice("long", namespace, **(RING | spec)))
    groups = spec.get("replicas", 1)
    eventually(lambda: all(cluster.get(namespace, child) for child in SETS[:groups]), what="a set for each group")
    eventually(lambda: len(ranks(cluster, namespace)) == 3 * groups, what="all ranks")


def ranks(cluster: Cluster, namespace: str) -> dict[str, dict[str, Any]]:
    """The pods that are not on their way out, by uid."""
    pods = cluster.get(namespace, "pods", "-l", "kvplane.dev/pool=ring")
    return {p["metadata"]["uid"]: p for p in pods if "deletionTimestamp" not in p["metadata"]}


def form(cluster: Cluster, namespace: str, group: int, *, without: tuple[int, ...] = ()) -> None:
    """What the kubelets would say of a ring that has formed."""
    for ordinal in range(3):
        ready = {"type": "Ready", "status": str(ordinal not in without), "lastTransitionTime": "2026-01-01T12:00:00Z"}
        status = json.dumps({"status": {"phase": "Running", "conditions": [ready]}})
        name = f"long-ring-{group}-{ordinal}"
        cluster.kubectl("patch", "pod", name, "-n", namespace, "--subresource=status", "--type=merge", "-p", status)


def generations(cluster: Cluster, namespace: str) -> dict[str, Any]:
    """Of everything that the operator writes, its version as far as others do not write it."""
    kinds = ("statefulsets", "services", "configmaps", "poddisruptionbudgets")
    label = ("-l", "kvplane.dev/service=long")
    found = [child for kind in kinds for child in cluster.get(namespace, kind, *label)]
    return {
        f"{child['kind']} {child['metadata']['name']}": [
            child["metadata"].get("generation"),
            child["metadata"]["annotations"]["kvplane.dev/plan-hash"],
        ]
        for child in found
    }


def test_a_ring_settles_and_nothing_is_written_twice(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create(cluster, namespace, replicas=2)
    before = generations(cluster, namespace)
    assert set(before) >= {"StatefulSet long-ring-0", "StatefulSet long-ring-1", "PodDisruptionBudget long"}
    for group in (0, 1):
        form(cluster, namespace, group)
    # Available is True with the first of them.
    eventually(
        lambda: cluster.get(namespace, "llmservice long").get("status", {}).get("readyReplicas") == 2, what="two rings"
    )
    assert cluster.condition(namespace, "long", "Available")["status"] == "True"
    assert cluster.get(namespace, "llmservice long")["status"]["mode"] == "Ring"
    assert generations(cluster, namespace) == before
    assert 'kvplane_operator_drift_healed_total{kind="StatefulSet"} 0.0' in operator.metrics()


def test_clients_are_led_to_rank_0(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create(cluster, namespace)
    selector = cluster.get(namespace, "service long")["spec"]["selector"]
    chosen = cluster.get(namespace, "pods", "-l", ",".join(f"{key}={value}" for key, value in selector.items()))
    assert [pod["metadata"]["name"] for pod in chosen] == ["long-ring-0-0"]


def test_a_ring_with_a_rank_less_says_so(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create(cluster, namespace)
    form(cluster, namespace, 0, without=(2,))
    # With rank 0 alone it is degraded too, as long as rank 1 has not been seen to be Ready.
    eventually(
        lambda: (
            cluster.condition(namespace, "long", "Degraded")
            .get("message", "")
            .startswith("Ring group 0 serves with 2 of 3 ranks.")
        )
    )
    assert cluster.condition(namespace, "long", "Degraded")["reason"] == "RingDegraded"
    pool = cluster.get(namespace, "llmservice long")["status"]["pools"][0]
    assert (pool["kind"], pool["degradedGroups"]) == ("Ring", [0])


def test_a_change_of_the_spec_renews_all_ranks_of_a_group(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create(cluster, namespace)
    before = set(ranks(cluster, namespace))
    cluster.apply(llmservice("long", namespace, **(RING | {"ring": {**RING["ring"], "windowTokens": 4096}})))
    eventually(lambda: len(now := ranks(cluster, namespace)) == 3 and before.isdisjoint(now), what="new ranks")


def test_a_rank_0_that_serves_is_marked_before_its_group_changes(
    cluster: Cluster, namespace: str, operator: Operator
) -> None:
    create(cluster, namespace)
    form(cluster, namespace, 0)
    eventually(lambda: cluster.condition(namespace, "long", "Available").get("status") == "True")
    before = set(ranks(cluster, namespace))
    cluster.apply(llmservice("long", namespace, **(RING | {"ring": {**RING["ring"], "windowTokens": 4096}})))

    def marked() -> bool:
        leader = cluster.get(namespace, "pod long-ring-0-0")
        return "kvplane.dev/drain-since" in leader["metadata"]["annotations"]

    eventually(marked, what="the mark of a drain")
    assert set(ranks(cluster, namespace)) == before


def test_a_ring_of_another_size_keeps_its_set(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create(cluster, namespace)
    uid = cluster.get(namespace, SETS[0])["metadata"]["uid"]
    cluster.apply(llmservice("long", namespace, **(RING | {"ring": {**RING["ring"], "size": 2}})))
    eventually(lambda: len(ranks(cluster, namespace)) == 2, what="two ranks")
    assert cluster.get(namespace, SETS[0])["metadata"]["uid"] == uid


def test_scaling_down_takes_a_whole_group(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create(cluster, namespace, replicas=2)
    form(cluster, namespace, 0)
    eventually(lambda: cluster.condition(namespace, "long", "Available").get("status") == "True")
    cluster.kubectl("scale", "llms", "long", "-n", namespace, "--replicas=1")
    eventually(lambda: cluster.get(namespace, SETS[1]) is None, what="no group 1, which serves nobody")
    eventually(lambda: cluster.get(namespace, "service long-ring-1") is None, what="no Service of it")
    assert cluster.get(namespace, SETS[0]) is not None


def test_the_size_of_a_ring_has_to_be_known(cluster: Cluster, namespace: str, operator: Operator) -> None:
    spec = {"model": {"source": "pvc://models"}, "context": {"maxTokens": 200_000}, "ring": {"image": "ring:1"}}
    cluster.apply(llmservice("long", namespace, **spec))
    condition = eventually(lambda: (c := cluster.condition(namespace, "long", "Accepted")) and c)
    assert condition["reason"] == "RingSizeUnknown"
    assert "Mode Auto chose Ring: context.maxTokens is 200000" in condition["message"]

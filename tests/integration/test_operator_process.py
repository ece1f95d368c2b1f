"""Operators that stop, die, are upgraded, or lose the API server: what they leave alone and what they catch up with."""

import signal
import time
from collections.abc import Callable

from tests.integration.conftest import Cluster, Operator, children, contents, create_chat, eventually, llmservice


def test_restart_and_upgrade_leave_children_alone(
    cluster: Cluster, namespace: str, operators: Callable[..., Operator]
) -> None:
    first = operators()
    create_chat(cluster, namespace, replicas=2)
    before = contents(cluster, namespace)
    first.stop()
    second = operators(sidecar_image="kvplane/control:next", engine_image="vllm/vllm-openai:next")
    eventually(lambda: "Leading" in second.log())
    cluster.kubectl("annotate", "llms", "chat", "-n", namespace, "example.com/look=again")
    cluster.kubectl("scale", "llms", "chat", "-n", namespace, "--replicas=3")
    eventually(lambda: cluster.get(namespace, "deployment chat")["spec"]["replicas"] == 3)
    now = contents(cluster, namespace)
    assert {k: v for k, v in now.items() if "deployment" not in k} == {
        k: v for k, v in before.items() if "deployment" not in k
    }
    template = cluster.get(namespace, "deployment chat")["spec"]["template"]["spec"]
    assert template["initContainers"][0]["image"] == "kvplane/control:dev"
    # A change of the spec is what brings the new images.
    cluster.apply(llmservice("chat", namespace, replicas=3, engine={"maxSequences": 8}))
    eventually(
        lambda: (
            cluster.get(namespace, "deployment chat")["spec"]["template"]["spec"]["initContainers"][0]["image"]
            == "kvplane/control:next"
        )
    )


def test_killed_in_the_middle_of_a_hundred(
    cluster: Cluster, namespace: str, operators: Callable[..., Operator]
) -> None:
    first = operators()
    eventually(lambda: "Leading" in first.log())
    cluster.apply(*(llmservice(f"s{i}", namespace, replicas=0) for i in range(100)))
    eventually(lambda: len(cluster.get(namespace, "deployments")) >= 10)
    first.kill()
    operators()

    def converged() -> bool:
        deployments = cluster.get(namespace, "deployments -l kvplane.dev/service")
        services = cluster.get(namespace, "services -l kvplane.dev/service")
        configs = cluster.get(namespace, "configmaps -l kvplane.dev/service")
        told = cluster.get(namespace, "llmservices")
        return (len(deployments), len(services), len(configs)) == (100, 200, 100) and all(
            "conditions" in s.get("status", {}) for s in told
        )

    eventually(converged, seconds=200)


def test_api_server_down_for_thirty_seconds(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace)
    cluster.control_plane.stop_apiserver()
    time.sleep(30)
    cluster.control_plane.start_apiserver()
    cluster.kubectl("scale", "llms", "chat", "-n", namespace, "--replicas=2")
    eventually(lambda: cluster.get(namespace, "deployment chat")["spec"]["replicas"] == 2, seconds=60)
    assert operator.stop() == 0, "the same process went on"


def test_stopped_leader_writes_nothing_after_it_continues(
    cluster: Cluster, namespace: str, operators: Callable[..., Operator]
) -> None:
    first = operators()
    eventually(lambda: "Leading" in first.log())
    create_chat(cluster, namespace)
    second = operators()
    first.signal(signal.SIGSTOP)
    eventually(lambda: "Leading" in second.log(), seconds=60)
    cluster.apply(llmservice("chat", namespace, replicas=2, engine={"maxSequences": 8}))
    eventually(lambda: cluster.get(namespace, "deployment chat")["spec"]["replicas"] == 2)
    eventually(lambda: cluster.get(namespace, "poddisruptionbudget chat"))
    before = contents(cluster, namespace)
    first.signal(signal.SIGCONT)
    time.sleep(5)
    assert contents(cluster, namespace) == before
    assert cluster.get(namespace, "lease kvplane-operator")["spec"]["holderIdentity"] == second.identity
    writers = {
        field["manager"]
        for child in children(cluster, namespace).values()
        for field in child["metadata"].get("managedFields", ())
    }
    assert "kvplane-operator" in writers or not writers


def test_a_released_lease_is_taken_at_once(
    cluster: Cluster, namespace: str, operators: Callable[..., Operator]
) -> None:
    # A Lease that is not released is free only long after the test: whoever leads before has taken a released one.
    first = operators(lease_seconds=600)
    eventually(lambda: "Leading" in first.log())
    second = operators(lease_seconds=600)
    first.stop()
    eventually(lambda: "Leading" in second.log())

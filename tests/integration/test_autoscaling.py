"""A service scales itself, on a real API server with the real controllers: pods by them, kubelets and sidecars by the test."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.integration.conftest import Cluster, Operator, create_chat, eventually
from tests.integration.test_signals import Replica
from tests.kvplane_operator.world import state

CAPACITY = 100_000
NATIVE = {"policy": "Native", "maxReplicas": 4}


class Fleet:
    """All pods of `chat`: each that comes is made Ready, and tells of its share of the load."""

    def __init__(self, cluster: Cluster, namespace: str, operator: Operator) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self.operator = operator
        self.load = 0.0
        """Demand in replicas, each 0.85 of its KV memory full."""
        self._replicas: dict[str, Replica] = {}

    def step(self) -> "Fleet":
        """Make pods Ready that came, end those that go, and tell what there is to do."""
        pods = self._cluster.get(self._namespace, "pods -l kvplane.dev/service=chat")
        for pod in pods:
            name = pod["metadata"]["name"]
            if "deletionTimestamp" in pod["metadata"]:
                self._end(name)
            elif name not in self._replicas:
                self._replicas[name] = Replica(self._cluster, self._namespace, pod, operator=self.operator)
        for name in self._replicas.keys() - {pod["metadata"]["name"] for pod in pods}:
            self._replicas.pop(name).silence()
        self._tell()
        for name, replica in self._replicas.items():
            if not _ready(next(pod for pod in pods if pod["metadata"]["name"] == name)):
                replica.ready(True)
        return self

    def silence(self) -> None:
        """No sidecar answers any more."""
        for replica in self._replicas.values():
            replica.silence()

    def _tell(self) -> None:
        share = self.load / len(self._replicas) if self._replicas else 0.0
        wanted = round(share * 0.85 * CAPACITY)
        held = min(wanted, CAPACITY)
        for name, replica in self._replicas.items():
            replica.tell(
                state(
                    name,
                    engine={
                        "kvCacheCapacityTokens": CAPACITY,
                        "kvCacheUsageRatio": held / CAPACITY,
                        "requestsRunning": 100 if held else 0,
                        "requestsWaiting": 0,
                    },
                    admission={"queued": 100 if wanted > held else 0, "queuedReservationTokens": wanted - held},
                )
            )

    def _end(self, name: str) -> None:
        """What the kubelet does at last."""
        if name in self._replicas:
            self._replicas.pop(name).silence()
        self._cluster.kubectl(
            "delete", "pod", name, "-n", self._namespace, "--force", "--grace-period=0", "--ignore-not-found"
        )


def _ready(pod: dict[str, Any]) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))


@pytest.fixture
def fleet(cluster: Cluster, namespace: str, operators: Callable[..., Operator]) -> Iterator[Fleet]:
    fleet = Fleet(cluster, namespace, operators())
    yield fleet
    fleet.silence()


def replicas(cluster: Cluster, namespace: str) -> int:
    return int(cluster.get(namespace, "deployment chat")["spec"]["replicas"])


def active(cluster: Cluster, namespace: str) -> tuple[str, str]:
    found = cluster.condition(namespace, "chat", "ScalingActive")
    return str(found.get("status")), str(found.get("reason"))


def events(cluster: Cluster, namespace: str, reason: str) -> list[dict[str, Any]]:
    return [event for event in cluster.get(namespace, "events") if event["reason"] == reason]


def exports(operator: Operator, line: str) -> bool:
    """Whether it does; one that has just been started may not answer yet."""
    try:
        return line in operator.metrics()
    except OSError:
        return False


def served(fleet: Fleet, cluster: Cluster, namespace: str, count: int) -> None:
    """Wait for so many replicas, all of them Ready."""

    def there() -> bool:
        fleet.step()
        status = (cluster.get(namespace, "deployment chat") or {}).get("status", {})
        return replicas(cluster, namespace) == status.get("readyReplicas", 0) == count

    eventually(there, seconds=150, what=f"{count} replicas")


def test_demand_brings_replicas_and_a_restart_takes_none(
    cluster: Cluster, namespace: str, fleet: Fleet, operators: Callable[..., Operator]
) -> None:
    create_chat(cluster, namespace, autoscaling={**NATIVE, "maxReplicas": 3})
    served(fleet, cluster, namespace, 1)
    eventually(lambda: active(cluster, namespace) == ("True", "FollowsDemand"))
    fleet.load = 2.6
    served(fleet, cluster, namespace, 3)
    (event,) = eventually(lambda: events(cluster, namespace, "ScaledUp"))
    assert event["message"].startswith("From 1 to 3 replicas: ")
    assert event["type"] == "Normal"
    assert cluster.get(namespace, "llmservice chat")["spec"]["replicas"] == 1  # the user's, and left alone
    # The status is written after the Deployment.
    eventually(lambda: cluster.get(namespace, "llmservice chat")["status"]["desiredReplicas"] == 3)
    three = f'kvplane_autoscaler_desired_replicas{{namespace="{namespace}",service="chat"}} 3.0'
    assert exports(fleet.operator, three)

    fleet.operator.kill()
    fleet.load = 0.0
    fleet.step()
    second = operators()
    eventually(lambda: exports(second, three), seconds=60)
    assert replicas(cluster, namespace) == 3


def test_silent_sidecars_lower_nothing_and_it_is_said(cluster: Cluster, namespace: str, fleet: Fleet) -> None:
    create_chat(cluster, namespace, autoscaling={**NATIVE, "scaleDownWindowSeconds": 0})
    fleet.load = 1.2
    served(fleet, cluster, namespace, 2)
    eventually(lambda: active(cluster, namespace) == ("True", "FollowsDemand"))
    fleet.silence()
    eventually(lambda: active(cluster, namespace) == ("False", "ScalerBlind"), seconds=150)
    assert replicas(cluster, namespace) == 2
    assert "are missing, so nothing goes down" in cluster.condition(namespace, "chat", "ScalingActive")["message"]
    fleet.step()
    eventually(lambda: active(cluster, namespace) == ("True", "FollowsDemand"), seconds=60)


def test_to_zero_and_back(cluster: Cluster, namespace: str, fleet: Fleet) -> None:
    idle = {**NATIVE, "scaleToZeroAfterSeconds": 1, "scaleDownWindowSeconds": 0}
    create_chat(cluster, namespace, autoscaling=idle)
    served(fleet, cluster, namespace, 1)

    def asleep() -> bool:
        fleet.step()
        return replicas(cluster, namespace) == 0

    eventually(asleep, seconds=150, what="zero")
    eventually(lambda: cluster.condition(namespace, "chat", "Available").get("reason") == "ScaledToZero")
    eventually(lambda: events(cluster, namespace, "ScaledToZero"))
    stamp = datetime.now(UTC).isoformat()
    cluster.kubectl("annotate", "llms", "chat", "-n", namespace, f"kvplane.dev/wake={stamp}")
    eventually(lambda: replicas(cluster, namespace) == 1, seconds=10, what="the wake-up")
    eventually(lambda: events(cluster, namespace, "Woken"))

    def kept_since() -> Any:
        """What was learned, as it was written after the wake-up; it may have been written before, too."""
        found = cluster.get(namespace, "configmap chat.autoscaler")
        return found if found and found["data"]["woken"] == stamp else None

    kept = eventually(kept_since)
    assert kept["metadata"]["ownerReferences"][0]["name"] == "chat"
    assert len(kept["data"]["state.json"]) <= 16 * 1024


@pytest.mark.usefixtures("garbage_collector")
def test_what_was_learned_goes_with_the_service(cluster: Cluster, namespace: str, fleet: Fleet) -> None:
    create_chat(cluster, namespace, autoscaling={**NATIVE, "scaleToZeroAfterSeconds": 600}, replicas=0)
    cluster.kubectl("annotate", "llms", "chat", "-n", namespace, "kvplane.dev/wake=now")
    eventually(lambda: cluster.get(namespace, "configmap chat.autoscaler"))
    cluster.kubectl("delete", "llms", "chat", "-n", namespace)
    eventually(lambda: not cluster.get(namespace, "configmap chat.autoscaler"))


def hpa(namespace: str, target: dict[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "theirs", "namespace": namespace},
        "spec": {
            "scaleTargetRef": target,
            "minReplicas": 1,
            "maxReplicas": 3,
            "metrics": [
                {
                    "type": "Resource",
                    "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}},
                }
            ],
        },
    }


def test_an_hpa_of_the_deployment_is_named_and_not_fought(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace, autoscaling=NATIVE)
    cluster.apply(hpa(namespace, {"apiVersion": "apps/v1", "kind": "Deployment", "name": "chat"}))
    eventually(lambda: active(cluster, namespace) == ("False", "ForeignScaler"), seconds=120)
    message = cluster.condition(namespace, "chat", "ScalingActive")["message"]
    assert "HorizontalPodAutoscaler theirs targets Deployment chat" in message
    cluster.kubectl("scale", "deployment", "chat", "-n", namespace, "--replicas=3")
    eventually(lambda: cluster.get(namespace, "llmservice chat")["status"]["desiredReplicas"] == 3)
    assert replicas(cluster, namespace) == 3
    assert 'kvplane_operator_drift_healed_total{kind="Deployment"} 0.0' in operator.metrics()
    cluster.kubectl("delete", "hpa", "theirs", "-n", namespace)
    eventually(lambda: active(cluster, namespace)[1] != "ForeignScaler", seconds=120)


def test_an_hpa_of_a_service_that_scales_itself_is_named(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace, autoscaling=NATIVE)
    target = {"apiVersion": "kvplane.dev/v1alpha1", "kind": "LLMService", "name": "chat"}
    cluster.apply(hpa(namespace, target))
    eventually(lambda: active(cluster, namespace) == ("True", "ForeignScalerIgnored"), seconds=120)
    cluster.kubectl("scale", "llms", "chat", "-n", namespace, "--replicas=3")
    eventually(lambda: cluster.get(namespace, "llmservice chat")["spec"]["replicas"] == 3)
    assert replicas(cluster, namespace) == 1


def test_external_scalers_write_scale_and_read_what_would_be_right(
    cluster: Cluster, namespace: str, fleet: Fleet
) -> None:
    create_chat(cluster, namespace, autoscaling={"policy": "External"})
    fleet.load = 2.6
    served(fleet, cluster, namespace, 1)
    wanted = f'kvplane_autoscaler_desired_replicas{{namespace="{namespace}",service="chat"}} 3.0'
    eventually(lambda: exports(fleet.step().operator, wanted), seconds=60, what=wanted)
    assert replicas(cluster, namespace) == 1
    cluster.kubectl("scale", "llms", "chat", "-n", namespace, "--replicas=3")
    eventually(lambda: replicas(cluster, namespace) == 3)
    assert active(cluster, namespace) == ("Unknown", "ScaledExternally")

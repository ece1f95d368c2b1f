"""What sidecars say reaches status: pods made by the real controllers, their kubelet and their sidecars by the test.

A pod "runs" where the test writes its status; its address is one of loopback, where the test answers for its sidecar.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvplane_api.wire import SidecarState
from tests.integration.conftest import Cluster, Operator, create_chat, eventually
from tests.kvplane_operator.test_signal_poller import Server
from tests.kvplane_operator.world import state

RENAMED = "kv_cache_usage_ratio (vllm:kv_cache_usage_perc, vllm:gpu_cache_usage_perc)"
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
ADDRESSES = (f"127.21.{_WORKER}.{n}" for n in itertools.count(1))
"""Each process of the tests has its own: sidecars all listen on one port."""


class Replica:
    """One pod of the service `chat`, with the test as its kubelet and its sidecar."""

    def __init__(self, cluster: Cluster, namespace: str, pod: dict[str, Any], *, operator: Operator) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self.operator = operator
        self.name: str = pod["metadata"]["name"]
        self.ip = next(ADDRESSES)
        self._server: Server | None = None

    def tell(self, state: SidecarState) -> None:
        """What the sidecar answers from now on."""
        if self._server is None:
            self._server = Server(self.ip)
        self._server.answer["body"] = state.model_dump_json(by_alias=True).encode()

    def silence(self) -> None:
        """Nobody listens any more."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def polls(self) -> int:
        """How often the sidecar was asked."""
        return self._server.asked if self._server else 0

    def ready(self, well: bool) -> None:
        """What the kubelet reports."""
        containers = [{"name": "engine", "image": "e", "imageID": "", "restartCount": 0, "ready": well}]
        sidecars = [{"name": "kvplane-sidecar", "image": "s", "imageID": "", "restartCount": 0, "ready": well}]
        status = {
            "phase": "Running",
            "podIP": self.ip,
            "podIPs": [{"ip": self.ip}],
            "containerStatuses": containers,
            "initContainerStatuses": sidecars,
            "conditions": [{"type": kind, "status": str(well)} for kind in ("Ready", "ContainersReady")],
        }
        patch = json.dumps({"status": status})
        self._cluster.kubectl(
            "patch", "pod", self.name, "-n", self._namespace, "--subresource=status", "--type=merge", "-p", patch
        )


@pytest.fixture
def replica(cluster: Cluster, namespace: str, operators: Callable[..., Operator]) -> Iterator[Replica]:
    """The only pod of `chat`, which serves and answers as it should; the operator asks it each second."""
    operator = operators(signals_seconds=1)
    create_chat(cluster, namespace)
    (pod,) = eventually(lambda: cluster.get(namespace, "pods -l kvplane.dev/service=chat"))
    replica = Replica(cluster, namespace, pod, operator=operator)
    replica.tell(state(replica.name))
    replica.ready(True)
    yield replica
    replica.silence()


def signals(cluster: Cluster, namespace: str) -> str:
    return str(cluster.condition(namespace, "chat", "SignalsFresh").get("reason"))


def degraded(cluster: Cluster, namespace: str) -> str:
    return str(cluster.condition(namespace, "chat", "Degraded").get("reason"))


def status(cluster: Cluster, namespace: str) -> dict[str, Any]:
    found: dict[str, Any] = cluster.get(namespace, "llmservice chat")["status"]
    return found


def test_before_anything_serves_nothing_is_claimed(cluster: Cluster, namespace: str, operator: Operator) -> None:
    create_chat(cluster, namespace)
    assert signals(cluster, namespace) == "NoServingPods"
    assert "capacity" not in status(cluster, namespace)


def test_fresh_signals_and_their_figures(cluster: Cluster, namespace: str, replica: Replica) -> None:
    eventually(lambda: signals(cluster, namespace) == "SignalsRead")
    eventually(lambda: cluster.condition(namespace, "chat", "Ready")["status"] == "True")
    found = status(cluster, namespace)
    assert found["capacity"] == {"kvTokens": 1600, "kvUsedPercent": 40, "headroomTokens": 880, "startupSecondsP90": 42}
    (pool,) = found["pools"]
    assert (pool["kvTokensPerReplica"], pool["maxContextTokens"]) == (1600, 1520)
    table = cluster.kubectl("get", "llms", "-n", namespace, "-o", "wide")
    assert table.splitlines()[1].split()[-2:] == ["40", "Serving"]
    labels = f'condition="SignalsFresh",namespace="{namespace}",reason="SignalsRead",service="chat"'
    assert f"kvplane_service_condition{{{labels}}} 1.0" in replica.operator.metrics()
    assert 'kvplane_operator_state_polls_total{result="failed"}' not in replica.operator.metrics()


def test_a_renamed_signal_is_named_and_admission_is_impaired(
    cluster: Cluster, namespace: str, replica: Replica
) -> None:
    eventually(lambda: signals(cluster, namespace) == "SignalsRead")
    unknown = {"kvCacheUsageRatio": None}
    replica.tell(state(replica.name, missingSignals=[RENAMED], engine=unknown))
    eventually(lambda: degraded(cluster, namespace) == "AdmissionImpaired")
    condition = cluster.condition(namespace, "chat", "SignalsFresh")
    assert (condition["status"], condition["reason"]) == ("False", "SignalMissing")
    assert RENAMED in condition["message"]
    assert cluster.condition(namespace, "chat", "Available")["status"] == "True"
    assert status(cluster, namespace)["capacity"] == {"kvTokens": 1600, "startupSecondsP90": 42}
    events = eventually(lambda: [e for e in cluster.get(namespace, "events") if e["reason"] == "SignalMissing"])
    assert events[0]["type"] == "Warning"
    replica.tell(state(replica.name, admission={"policy": "Off"}, missingSignals=[RENAMED], engine=unknown))
    eventually(lambda: degraded(cluster, namespace) == "AsAsked")
    replica.tell(state(replica.name))
    eventually(lambda: signals(cluster, namespace) == "SignalsRead")
    eventually(lambda: status(cluster, namespace)["capacity"]["kvUsedPercent"] == 40)


def test_a_sidecar_that_cannot_read_its_engine(cluster: Cluster, namespace: str, replica: Replica) -> None:
    replica.tell(state(replica.name, signalAgeSeconds=60))
    eventually(lambda: signals(cluster, namespace) == "SignalsStale")
    eventually(lambda: degraded(cluster, namespace) == "AdmissionImpaired")
    assert "capacity" not in status(cluster, namespace)


def test_a_sidecar_that_nobody_reaches(cluster: Cluster, namespace: str, replica: Replica) -> None:
    eventually(lambda: signals(cluster, namespace) == "SignalsRead")
    # Which may be before the Deployment's controller has counted the pod.
    eventually(lambda: degraded(cluster, namespace) == "AsAsked")
    replica.silence()
    condition = eventually(
        lambda: (c := cluster.condition(namespace, "chat", "SignalsFresh"))["status"] == "False" and c
    )
    assert condition["reason"] == "SidecarUnreachable"
    assert f"http://{replica.ip}:8001/state takes no connection" in condition["message"]
    assert degraded(cluster, namespace) == "AsAsked"  # the pod itself is well, as far as anybody knows
    assert "capacity" not in status(cluster, namespace)


def test_another_pod_at_the_address(cluster: Cluster, namespace: str, replica: Replica) -> None:
    replica.tell(state("somebody-else"))
    eventually(lambda: signals(cluster, namespace) == "PodMismatch")
    found = status(cluster, namespace)
    assert "capacity" not in found
    assert "kvTokensPerReplica" not in found["pools"][0]


def test_figures_are_written_in_steps_and_rarely(cluster: Cluster, namespace: str, replica: Replica) -> None:
    eventually(lambda: "capacity" in status(cluster, namespace))
    eventually(lambda: cluster.condition(namespace, "chat", "Ready")["status"] == "True")
    before = cluster.get(namespace, "llmservice chat")
    replica.tell(state(replica.name, engine={"kvCacheUsageRatio": 0.87}))
    # Other things are written meanwhile; the figures wait for their minute.
    cluster.kubectl("scale", "llms", "chat", "-n", namespace, "--replicas=2")
    eventually(lambda: status(cluster, namespace)["desiredReplicas"] == 2)
    polls = replica.polls()
    eventually(lambda: replica.polls() >= polls + 3)
    assert status(cluster, namespace)["capacity"] == before["status"]["capacity"]


def test_polls_that_tell_nothing_new_write_nothing(cluster: Cluster, namespace: str, replica: Replica) -> None:
    eventually(lambda: cluster.condition(namespace, "chat", "Ready")["status"] == "True")
    eventually(lambda: "capacity" in status(cluster, namespace))
    before = cluster.get(namespace, "llmservice chat")["metadata"]["resourceVersion"]
    polls = replica.polls()
    eventually(lambda: replica.polls() >= polls + 4)
    assert cluster.get(namespace, "llmservice chat")["metadata"]["resourceVersion"] == before


def test_an_engine_that_restarts_is_read_anew(cluster: Cluster, namespace: str, replica: Replica) -> None:
    eventually(lambda: signals(cluster, namespace) == "SignalsRead")
    replica.ready(False)
    eventually(lambda: signals(cluster, namespace) == "NoServingPods")
    assert "capacity" not in status(cluster, namespace)
    replica.tell(state(replica.name, engine={"kvCacheCapacityTokens": 3200, "kvCacheBlocks": 200}))
    replica.ready(True)
    eventually(lambda: signals(cluster, namespace) == "SignalsRead")
    assert status(cluster, namespace)["capacity"]["kvTokens"] == 3200


def test_a_restart_of_the_operator_changes_nothing(
    cluster: Cluster, namespace: str, operators: Callable[..., Operator], replica: Replica
) -> None:
    eventually(lambda: cluster.condition(namespace, "chat", "Ready")["status"] == "True")
    eventually(lambda: "capacity" in status(cluster, namespace))
    before = cluster.get(namespace, "llmservice chat")["metadata"]["resourceVersion"]
    second = operators(signals_seconds=1)
    assert replica.operator.stop() == 0
    eventually(lambda: "Leading" in second.log())
    polls = replica.polls()
    eventually(lambda: replica.polls() >= polls + 2)
    assert cluster.get(namespace, "llmservice chat")["metadata"]["resourceVersion"] == before

"""A pod is deleted by force only where somebody told it to go, its node was lost for long enough, and no volume is at risk."""

from typing import Any

import pytest

from kvplane_operator.plan.ring.stuck import Stuck, stuck, writes_to_claim
from kvplane_operator.plan.snapshot import NodeView
from tests.kvplane_operator.ring_groups import ago
from tests.kvplane_operator.world import NOW, pod

LOST = NodeView(ready=False, since=ago(31))


def using(volume: dict[str, Any], **uses: Any) -> dict[str, Any]:
    """Parts of a pod's spec: a volume, and how the engine uses it."""
    return {"volumes": [{"name": "v", **volume}], "containers": [{"name": "engine", **uses}]}


def found(*, node: NodeView | None = LOST, going: bool = True, claim: bool = False) -> Stuck:
    made = pod("chat-ring-0-1", node="node-1")
    if going:
        made["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    if claim:
        made["spec"] |= using({"persistentVolumeClaim": {"claimName": "m"}}, volumeMounts=[{"name": "v"}])
    nodes = {"node-2": LOST} if node is None else {"node-1": node}
    return stuck([made], nodes, grace_seconds=30, now=NOW)


def test_a_pod_that_cannot_end_is_ended() -> None:
    assert [p["metadata"]["name"] for p in found().pods] == ["chat-ring-0-1"]


def test_the_node_has_its_grace() -> None:
    early = found(node=NodeView(ready=False, since=ago(10)))
    assert (early.pods, early.wake_after_seconds) == ((), 20)


@pytest.mark.parametrize(
    "case",
    [
        {"going": False},
        {"node": NodeView(ready=True, since=ago(3600))},
        {"node": None},
        {"claim": True},
    ],
    ids=["nobody told it to go", "its node is well", "its node is not known", "it may write to a claim"],
)
def test_else_it_is_left_alone(case: dict[str, Any]) -> None:
    assert found(**case) == Stuck()


def test_a_claim_is_safe_once_somebody_vouches_for_the_node() -> None:
    vouched = NodeView(ready=False, since=ago(31), out_of_service=True)
    assert len(found(node=vouched, claim=True).pods) == 1


@pytest.mark.parametrize(
    ("volume", "mount", "writes"),
    [
        ({"emptyDir": {}}, {}, False),
        ({"persistentVolumeClaim": {"claimName": "m", "readOnly": True}}, {}, False),
        ({"persistentVolumeClaim": {"claimName": "m"}}, {"readOnly": True}, False),
        ({"persistentVolumeClaim": {"claimName": "m"}}, {}, True),
        ({"ephemeral": {"volumeClaimTemplate": {}}}, {}, True),
    ],
)
def test_which_pods_write_to_a_claim(volume: dict[str, Any], mount: dict[str, Any], writes: bool) -> None:
    spec = using(volume, volumeMounts=[{"name": "v", "mountPath": "/v", **mount}])
    assert writes_to_claim({"spec": spec}) is writes


def test_a_claim_may_be_a_device() -> None:
    device = using({"persistentVolumeClaim": {"claimName": "m"}}, volumeDevices=[{"name": "v", "devicePath": "/dev/v"}])
    assert writes_to_claim({"spec": device})

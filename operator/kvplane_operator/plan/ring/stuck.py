"""Which pods are to be deleted by force: those that were told to go on a node that cannot say that they did.

A StatefulSet makes a rank again only when its pod is gone from the API, and a kubelet that is cut off never says so.
Deleting by force means that two processes of one rank may run for a while: the ring's epochs keep them apart, and the old
one leaves when the cut heals. A volume has no epochs, so a rank that can write to a claim waits for the taint
node.kubernetes.io/out-of-service, by which somebody vouches that nothing runs on the node any more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kvplane_operator.plan.snapshot import NodeView


@dataclass(frozen=True)
class Stuck:
    """Pods to delete by force, and when to look again."""

    pods: tuple[Mapping[str, Any], ...] = ()
    wake_after_seconds: float | None = None


def stuck(
    pods: Sequence[Mapping[str, Any]],
    nodes: Mapping[str, NodeView],
    *,
    grace_seconds: int,
    now: datetime,
) -> Stuck:
    """Pods that are being deleted, on nodes that were not ready for longer than the grace.

    Only what somebody else decided to delete (the taint manager after the pod's own toleration, a person) is brought to
    its end. A node that is not known is no reason: it may be the right to read nodes that is missing.
    """
    found, waits = [], []
    for pod in pods:
        node = nodes.get(pod["spec"].get("nodeName") or "")
        if node is None or node.ready or "deletionTimestamp" not in pod["metadata"]:
            continue
        if writes_to_claim(pod) and not node.out_of_service:
            continue
        wait = grace_seconds - (now - node.since).total_seconds()
        if wait <= 0:
            found.append(pod)
        else:
            waits.append(wait)
    return Stuck(tuple(found), min(waits, default=None))


def writes_to_claim(pod: Mapping[str, Any]) -> bool:
    """Whether a pod mounts a PersistentVolumeClaim that it may write to: what it runs with counts, since the template may be a
    newer one.

    Its access mode is not asked for, which would take the right to read claims: ReadWriteOnce is assumed.
    """
    spec = pod["spec"]
    containers = (*(spec.get("initContainers") or ()), *(spec.get("containers") or ()))
    for volume in spec.get("volumes") or ():
        claim = volume.get("persistentVolumeClaim")
        if "ephemeral" not in volume and (claim is None or claim.get("readOnly")):
            continue
        for container in containers:
            mounts = (m for m in container.get("volumeMounts") or () if not m.get("readOnly"))
            if any(use["name"] == volume["name"] for use in (*mounts, *(container.get("volumeDevices") or ()))):
                return True
    return False

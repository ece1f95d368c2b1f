"""The objects: services that scale by themselves, and the pods that would be theirs.

No controller makes pods here and none removes them, so a Deployment that is scaled up stays as it is: what follows a decision
costs other people's processors. minReplicas is what there is, so that nothing goes down while the cost of steady load is
measured.
"""

import math
from typing import Any, Final

from kvplane_api import names
from kvplane_operator.autoscaler import document
from kvplane_operator.autoscaler.history import History
from kvplane_operator.autoscaler.learned import Learned, Usable
from kvplane_operator.autoscaler.series import BUCKET, BUCKETS, MINUTE, MINUTES, Series, Steps
from kvplane_operator.autoscaler.startup import SAMPLES, StartTimes
from kvplane_operator.plan.pods import common_labels, selector
from kvplane_operator.plan.scaling import state_ref
from kvplane_operator.scaling import KEY_MODE, KEY_STATE

Json = dict[str, Any]

NAMESPACE: Final = "bench"
SERVICES: Final = f"/apis/{names.GROUP}/{names.VERSION}/namespaces/{NAMESPACE}/{names.PLURAL}"
DEPLOYMENTS: Final = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"
CONFIG_MAPS: Final = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
PODS: Final = f"/api/v1/namespaces/{NAMESPACE}/pods"
IMAGE: Final = "registry.example/engine:1"
MOST_REPLICAS: Final = 8


def service_name(number: int) -> str:
    return f"svc-{number}"


def service(name: str, *, replicas: int) -> Json:
    """A service with as many replicas at least as it begins with."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name},
        "spec": {
            "model": {"source": "hf://acme/llama-8b"},
            "replicas": replicas,
            "engine": {"image": IMAGE},
            "autoscaling": {"policy": "Native", "minReplicas": replicas, "maxReplicas": MOST_REPLICAS},
        },
    }


def state(name: str, *, uid: str, now: float) -> Json:
    """What the autoscaler would have kept of a service after two days of less demand than its replicas serve."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": state_ref(name).name,
            "labels": {names.LABEL_SERVICE: name} | common_labels(name),
            "ownerReferences": [
                {
                    "apiVersion": names.API_VERSION,
                    "kind": names.KIND,
                    "name": name,
                    "uid": uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "data": {KEY_STATE: document.dump(_two_days(now)), KEY_MODE: "Paged"},
    }


def _two_days(now: float) -> History:
    """As long as a history gets."""

    def steps(seconds: float, count: int) -> Steps:
        last = math.floor(now / seconds)
        return Steps.of((step, 0.5 + step % 97 / 1000) for step in range(last - count + 1, last + 1))

    return History(
        learned=Learned(usable=Usable(share=0.85), prefill_tokens_per_second=10_000.0),
        starts=StartTimes(cached=(60.25,) * SAMPLES, pulled=(90.25,) * SAMPLES),
        series=Series(minutes=steps(MINUTE, MINUTES), buckets=steps(BUCKET, BUCKETS)),
    )


def pod_name(service: str, number: int) -> str:
    return f"{service}-{number}"


def pod(service: str, number: int) -> Json:
    """As the Deployment's controller would make it, but for what nobody here reads."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod_name(service, number), "labels": selector(service) | common_labels(service)},
        "spec": {"containers": [{"name": names.CONTAINER_ENGINE, "image": IMAGE}]},
    }


def address(number: int) -> str:
    """Of the pod with that number among all; nobody sends anything there."""
    return f"10.77.{number // 250}.{number % 250 + 1}"


def serving(ip: str) -> Json:
    """The status of a pod that serves, as a kubelet would write it."""
    return {
        "status": {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": kind, "status": "True"} for kind in ("PodScheduled", "Ready", "ContainersReady")],
        }
    }

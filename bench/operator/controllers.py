"""The controllers under test: what each is given, what it should make of it, and how it is run."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import lws
from bench.operator.process import Process
from e2e.cluster.controlplane import ControlPlane
from e2e.cluster.ports import free_ports
from e2e.cluster.progress import Progress

Json = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parents[2]
NAMESPACE = "bench"


@dataclass(frozen=True)
class Controller:
    """One controller, and how its objects look."""

    name: str
    objects: str
    """Path of the collection it watches."""
    child: str
    """Path of the collection of the child whose appearance is timed: same name as its object."""
    children: Mapping[str, int]
    """Path of each collection of children, to how many of them one object has."""
    lease: str
    """Path of the collection of its leader Lease."""
    lease_name: str
    manifest: Callable[[str, str], Json]
    """The object of this name whose engine runs this image."""
    reimage: Callable[[str], Json]
    """Merge patch that changes the image."""
    install: Callable[[ControlPlane], None]
    """Install its CRDs and what else it needs."""
    process: Callable[[ControlPlane, Path], Process]
    """The process, not yet started, which logs to the given file."""


def child_image(child: Json) -> str:
    """The image of a Deployment's or a StatefulSet's main container."""
    containers: list[Json] = child["spec"]["template"]["spec"]["containers"]
    return str(containers[0]["image"])


# --------------------------------------------------------------------------------------------------------- kvplane


def kvplane() -> Controller:
    """This project's operator."""
    core, apps = f"/api/v1/namespaces/{NAMESPACE}", f"/apis/apps/v1/namespaces/{NAMESPACE}"
    return Controller(
        name="kvplane",
        objects=f"/apis/kvplane.dev/v1alpha1/namespaces/{NAMESPACE}/llmservices",
        child=f"{apps}/deployments",
        children={f"{apps}/deployments": 1, f"{core}/services": 2, f"{core}/configmaps": 1},
        lease="/apis/coordination.k8s.io/v1/namespaces/kvplane-system/leases",
        lease_name="kvplane-operator",
        manifest=lambda name, image: {
            "apiVersion": "kvplane.dev/v1alpha1",
            "kind": "LLMService",
            "metadata": {"name": name},
            "spec": {"model": {"source": "hf://acme/llama-8b"}, "replicas": 1, "engine": {"image": image}},
        },
        reimage=lambda image: {"spec": {"engine": {"image": image}}},
        install=_install_kvplane,
        process=_kvplane_process,
    )


def _install_kvplane(control_plane: ControlPlane) -> None:
    control_plane.kubectl("apply", "--server-side", "-f", str(REPOSITORY / "crds" / "llmservices.yaml"))
    control_plane.kubectl("wait", "--for=condition=Established", "crd/llmservices.kvplane.dev", "--timeout=60s")
    control_plane.kubectl("create", "namespace", "kvplane-system")


def _kvplane_process(control_plane: ControlPlane, log: Path) -> Process:
    return Process([sys.executable, "-m", "kvplane_operator"], operator_environment(control_plane), log=log)


def operator_environment(control_plane: ControlPlane) -> dict[str, str]:
    """Of this project's operator as a process beside that API server."""
    health, metrics = free_ports(2)
    return {
        "PYTHONPATH": os.pathsep.join(str(REPOSITORY / folder) for folder in ("operator", "runtime", ".")),
        "KUBECONFIG": str(control_plane.kubeconfig),
        "KVPLANE_OPERATOR_BIND_ADDRESS": "127.0.0.1",
        "KVPLANE_OPERATOR_HEALTH_PORT": str(health),
        "KVPLANE_OPERATOR_METRICS_PORT": str(metrics),
        "KVPLANE_OPERATOR_LOG_LEVEL": "INFO",  # that of its Deployment
    }


# ------------------------------------------------------------------------------------------------- LeaderWorkerSet


def leader_worker_set() -> Controller:
    """LeaderWorkerSet's controller manager."""
    core, apps = f"/api/v1/namespaces/{NAMESPACE}", f"/apis/apps/v1/namespaces/{NAMESPACE}"
    return Controller(
        name=lws.NAME,
        objects=f"/apis/leaderworkerset.x-k8s.io/v1/namespaces/{NAMESPACE}/leaderworkersets",
        child=f"{apps}/statefulsets",
        children={f"{apps}/statefulsets": 1, f"{core}/services": 1},
        lease="/apis/coordination.k8s.io/v1/namespaces/lws-system/leases",
        lease_name="b8b2488c.x-k8s.io",
        manifest=_leader_worker_set,
        reimage=lambda image: {"spec": {"leaderWorkerTemplate": {"workerTemplate": _pod(image)}}},
        install=_install_lws,
        process=_lws_process,
    )


def _pod(image: str) -> Json:
    return {"spec": {"containers": [{"name": "engine", "image": image}]}}


def _leader_worker_set(name: str, image: str) -> Json:
    """Complete with what its admission webhook would fill in: the webhook is off, which spares it that round trip."""
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": name},
        "spec": {
            "replicas": 1,
            "leaderWorkerTemplate": {
                "size": 2,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "workerTemplate": _pod(image),
            },
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {"maxUnavailable": 1, "maxSurge": 0, "partition": 0},
            },
            "networkConfig": {"subdomainPolicy": "Shared"},
        },
    }


def _install_lws(control_plane: ControlPlane) -> None:
    control_plane.kubectl("apply", "--server-side", "-f", str(lws.sources() / lws.CRDS))
    control_plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    control_plane.kubectl("create", "namespace", "lws-system")


def _lws_process(control_plane: ControlPlane, log: Path) -> Process:
    program = lws.program(Progress())
    metrics, health = free_ports(2)
    configuration = {
        "apiVersion": "config.lws.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "metrics": {"bindAddress": f"127.0.0.1:{metrics}"},
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "leaderElection": {"leaderElect": True},
        # Webhooks need a Service that leads back to this process; what they would default is in the manifests.
        "internalCertManagement": {"enable": False},
    }
    path = log.with_suffix(".configuration.json")
    path.write_text(json.dumps(configuration))
    environment = {"KUBECONFIG": str(control_plane.kubeconfig), "ENABLE_WEBHOOKS": "false"}
    # The log level is that of its Deployment.
    return Process([str(program), f"--config={path}", "--zap-log-level=2"], environment, log=log)

"""A release on a control plane without nodes: no pod runs, so the operator and the self-test run as processes here.

They get what their containers would: the environment that the chart wrote, and the token of the chart's ServiceAccount.
"""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from charts.generate import CHART
from e2e.cluster.api import wait_for
from e2e.cluster.errors import ApiError
from e2e.cluster.ports import free_ports
from tests.chart.helm import RELEASE, Helm, Manifest, Rendered, environment
from tests.chart.recorder import Recorder
from tests.conftest import served
from tests.integration.conftest import Cluster, Operator


@dataclass(frozen=True)
class Installation:
    """What helm installed, and the way to the API server for who acts in its name."""

    namespace: str
    rendered: Rendered
    recorder: Recorder
    folder: Path
    ports: dict[str, int] = field(
        default_factory=lambda: dict(zip(("health_port", "metrics_port"), free_ports(2), strict=True))
    )

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    @contextmanager
    def operator(self) -> Iterator[Operator]:
        """The operator, while in the context."""
        given = environment(self.rendered.operator, namespace=self.namespace)
        settings = {name.removeprefix("KVPLANE_OPERATOR_").lower(): value for name, value in given.items()}
        operator = Operator(self.kubeconfig, self.folder / "operator.log", **(settings | self.ports))
        operator.start()
        try:
            yield operator
        finally:
            operator.stop()
            print(operator.log())

    def selftest(self, *, seconds: float) -> subprocess.CompletedProcess[str]:
        """What the pod of `helm test` does, the Service's name aside."""
        container = self.rendered.selftest
        program, *arguments = container["command"]
        assert program == "python"
        return subprocess.run(
            [sys.executable, *arguments, "--operator=127.0.0.1", f"--seconds={seconds}"],
            env={
                **os.environ,
                **environment(container, namespace=self.namespace),
                **{f"KVPLANE_OPERATOR_{name.upper()}": str(port) for name, port in self.ports.items()},
                "KUBECONFIG": str(self.kubeconfig),
            },
            capture_output=True,
            text=True,
            check=False,
        )


@contextmanager
def installed(
    cluster: Cluster, folder: Path, namespace: str, *, values: Mapping[str, object] | None = None, chart: Path = CHART
) -> Iterator[Installation]:
    """Install the chart in a namespace of that name, which is made and enforces pod security restricted.

    The CRD that an earlier release left is taken over.
    """
    helm = Helm(folder, cluster.kubeconfig)
    cluster.kubectl("create", "namespace", namespace)
    cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    helm.must("install", RELEASE, str(chart), f"--namespace={namespace}", "--take-ownership", values=values)
    parts = (helm.must("get", what, RELEASE, f"--namespace={namespace}") for what in ("manifest", "hooks"))
    rendered = Rendered(tuple(m for part in parts for m in yaml.load_all(part, Loader=yaml.CSafeLoader) if m))
    account = rendered.pod["spec"]["serviceAccountName"]
    token = cluster.kubectl("create", "token", account, "-n", namespace).strip()
    admin = yaml.safe_load(cluster.kubeconfig.read_text())["clusters"][0]["cluster"]
    ca = base64.b64decode(admin["certificate-authority-data"]).decode()
    with Recorder(admin["server"], ca) as recorder:
        installation = Installation(namespace, rendered, recorder, folder)
        installation.kubeconfig.write_text(_kubeconfig(recorder.url, token))
        yield installation


def await_served(cluster: Cluster) -> None:
    """Not `kubectl wait`: it fails on a CRD that has no conditions yet."""
    control_plane = cluster.control_plane
    wait_for("The CRD's place in the API", lambda: served(control_plane), seconds=60, where=str(control_plane.logs))


_PATHS = {
    "crd": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    "clusterrole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "clusterrolebinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "rolebinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
    "llmservice": "/apis/kvplane.dev/v1alpha1/namespaces/{}/llmservices",
    "statefulset": "/apis/apps/v1/namespaces/{}/statefulsets",
    "deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "poddisruptionbudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "service": "/api/v1/namespaces/{}/services",
    "configmap": "/api/v1/namespaces/{}/configmaps",
    "event": "/api/v1/namespaces/{}/events",
    "pod": "/api/v1/namespaces/{}/pods",
}


def get(cluster: Cluster, namespace: str, what: str) -> Manifest | None:
    """The object "KIND NAME", None if there is none; without a kubectl process, since tests poll."""
    kind, name = what.split()
    try:
        return cluster.control_plane.api.get(f"{_PATHS[kind].format(namespace)}/{name}")
    except ApiError as error:
        if error.status == 404:
            return None
        raise


def get_all(cluster: Cluster, namespace: str, kind: str) -> list[Manifest]:
    """All objects of a kind."""
    found: list[Manifest] = cluster.control_plane.api.get(_PATHS[kind].format(namespace))["items"]
    return found


def is_gone(cluster: Cluster, namespace: str, what: str) -> bool:
    return get(cluster, namespace, what) is None


def _kubeconfig(server: str, token: str) -> str:
    named = {"name": "chart"}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "chart",
            "clusters": [named | {"cluster": {"server": server}}],
            "users": [named | {"user": {"token": token}}],
            "contexts": [named | {"context": {"cluster": "chart", "user": "chart"}}],
        }
    )

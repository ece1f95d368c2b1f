"""The operator as a process of its own, on a real API server with the real controllers, but no nodes."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster.api import wait_for
from e2e.cluster.controlplane import ControlPlane
from e2e.cluster.ports import free_ports
from e2e.kubectl import get
from kvplane_api import names

REPOSITORY = Path(__file__).resolve().parents[2]


class Operator:
    """One operator process."""

    def __init__(self, kubeconfig: Path, log: Path, **settings: object) -> None:
        self._log = log
        self._environment = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "KVPLANE_OPERATOR_BIND_ADDRESS": "127.0.0.1",
            "KVPLANE_OPERATOR_HEALTH_PORT": str(free_ports(1)[0]),
            "KVPLANE_OPERATOR_METRICS_PORT": str(free_ports(1)[0]),
            "KVPLANE_OPERATOR_IDENTITY": f"test-{uuid.uuid4().hex[:6]}",
            **{f"KVPLANE_OPERATOR_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def identity(self) -> str:
        return self._environment["KVPLANE_OPERATOR_IDENTITY"]

    def start(self) -> "Operator":
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvplane_operator"], env=self._environment, stderr=log
            )
        return self

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(10)
        self._process = None

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        code = self._process.wait(30)
        self._process = None
        return code

    def log(self) -> str:
        return self._log.read_text()

    def metrics(self) -> str:
        """What it exports now."""
        port = self._environment["KVPLANE_OPERATOR_METRICS_PORT"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return text


class Cluster:
    """kubectl and a little waiting."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self.control_plane = control_plane
        self.kubeconfig = control_plane.kubeconfig

    def kubectl(self, *args: str, stdin: str | None = None) -> str:
        return self.control_plane.kubectl(*args, stdin=stdin)

    def apply(self, *objects: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))

    def get(self, namespace: str, what: str, *more: str) -> Any:
        """See :func:`e2e.kubectl.get`; ``what``: kind and name, as in "deployment chat"."""
        return get(self.kubectl, namespace, *what.split(), *more)

    def condition(self, namespace: str, name: str, kind: str) -> dict[str, Any]:
        service = self.get(namespace, f"llmservice {name}") or {}
        return next((c for c in service.get("status", {}).get("conditions", ()) if c["type"] == kind), {})


def eventually(check: Callable[[], Any], *, seconds: float = 40.0, what: str = "") -> Any:
    """The first truthy answer of ``check``; fails with the last one."""
    end = time.monotonic() + seconds
    while True:
        answer = check()
        if answer:
            return answer
        assert time.monotonic() < end, f"not within {seconds} s: {what or check}; last: {answer!r}"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ControlPlane(tmp_path_factory.mktemp("control-plane"), controllers=True) as control_plane:
        cluster = Cluster(control_plane)
        cluster.kubectl("apply", "-f", str(REPOSITORY / "crds"))
        eventually(lambda: "llmservices" in cluster.kubectl("api-resources", "--api-group=kvplane.dev"), what="the CRD")
        yield cluster


@pytest.fixture(scope="session")
def garbage_collector(cluster: Cluster) -> None:
    """The garbage collector knows LLMServices: it looks for new kinds every 30 s, and does nothing for owners of others."""
    owner = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "none", "uid": str(uuid.uuid4())}
    metadata = {"name": "owned-by-none", "namespace": "default", "ownerReferences": [owner]}
    cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
    eventually(lambda: not cluster.get("default", "configmap owned-by-none"), seconds=120)


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own; the operator under test watches only it and keeps its Lease there."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    # Until its controller has made it no pod is admitted, and services say so.
    api, account = cluster.control_plane.api, f"/api/v1/namespaces/{name}/serviceaccounts/default"
    wait_for("Its account", lambda: bool(api.get(account)), seconds=60, where=str(cluster.control_plane.logs))
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def operators(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[Callable[..., Operator]]:
    """Starts operators for the test's namespace; all are ended after the test."""
    made: list[Operator] = []

    def make(**settings: object) -> Operator:
        defaults: dict[str, object] = {"watch_namespaces": namespace, "lease_namespace": namespace}
        operator = Operator(cluster.kubeconfig, tmp_path / f"operator-{len(made)}.log", **(defaults | settings))
        made.append(operator.start())
        return operator

    yield make
    for operator in made:
        operator.stop()
        print(operator.log())


@pytest.fixture
def operator(operators: Callable[..., Operator]) -> Operator:
    return operators()


def llmservice(name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    """The smallest service, with ``spec`` over it."""
    return {
        "apiVersion": "kvplane.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"model": {"source": "hf://acme/tiny"}, **spec},
    }


CHILDREN = ("deployment chat", "service chat", "service chat-pods", "configmap chat")


def children(cluster: Cluster, namespace: str) -> dict[str, Any]:
    """The children of the service `chat`, None for each that is missing."""
    return {child: cluster.get(namespace, child) for child in CHILDREN}


def contents(cluster: Cluster, namespace: str) -> dict[str, str]:
    """What must not change of the children of `chat`: identity and content, without the status others write."""
    return {
        child: json.dumps([o["metadata"].get("generation"), o.get("spec"), o.get("data"), o["metadata"]["uid"]])
        for child, o in children(cluster, namespace).items()
    }


def create_chat(cluster: Cluster, namespace: str, **spec: Any) -> None:
    """A service `chat`, with its children and its first status."""
    cluster.apply(llmservice("chat", namespace, **spec))
    eventually(lambda: all(children(cluster, namespace).values()), what="all children")
    eventually(lambda: cluster.condition(namespace, "chat", "Available"), what="conditions")

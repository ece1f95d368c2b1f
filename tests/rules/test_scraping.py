"""Scraping: the documented jobs find the pods that the operator makes, by a real API server, and label them as promised."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e import prometheus
from e2e.cluster.api import wait_for
from e2e.cluster.controlplane import ControlPlane
from e2e.cluster.progress import Progress
from kvplane_api import names
from kvplane_operator.plan.pods import common_labels, selector
from tests.rules import promtool

ENGINE, OPERATOR = "127.77.0.1", "127.77.0.2"
"""Addresses of this host that stand for pods."""
EXPOSITIONS = {
    ENGINE: 'kvplane_engine_ready{model_name="tiny"} 1\n',
    OPERATOR: 'kvplane_service_replicas{namespace="team",service="chat",state="ready"} 1\n',
}


def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").write_text("{}")
    config = tmp_path / "prometheus.yaml"
    config.write_text(yaml.safe_dump(prometheus.watching(tmp_path / "kubeconfig")))
    done = promtool.run("check", "config", config)
    assert done.returncode == 0, done.stdout


class _Exposition(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        host = self.headers["Host"].partition(":")[0]
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(EXPOSITIONS[host].encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def exporters() -> Iterator[None]:
    places = ((ENGINE, names.PORT_ADMIN), (OPERATOR, names.PORT_OPERATOR_METRICS))
    servers = [ThreadingHTTPServer(place, _Exposition) for place in places]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    yield
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


def pod(name: str, labels: dict[str, str], **spec: Any) -> dict[str, Any]:
    containers = {"containers": [{"name": "main", "image": "none"}]}
    return {"metadata": {"name": name, "labels": labels}, "spec": containers | spec}


def port(name: str, number: int) -> dict[str, Any]:
    return {"name": "kvplane", "image": "none", "ports": [{"name": name, "containerPort": number}]}


def test_pods_are_found_and_labelled(
    control_plane: ControlPlane, make_namespace: Callable[..., str], exporters: None, tmp_path: Path
) -> None:
    namespace = make_namespace()
    path = f"/api/v1/namespaces/{namespace}"
    control_plane.api.create(f"{path}/serviceaccounts", {"metadata": {"name": "default"}})
    sidecar = {**port("admin", names.PORT_ADMIN), "restartPolicy": "Always"}
    engine_labels = selector("chat") | common_labels("chat")
    operator_labels = {"app.kubernetes.io/name": "kvplane", "app.kubernetes.io/component": "operator"}
    pods = {
        ENGINE: pod("chat-1", engine_labels, initContainers=[sidecar]),
        OPERATOR: pod("operator-1", operator_labels, containers=[port("metrics", names.PORT_OPERATOR_METRICS)]),
    }
    for address, manifest in pods.items():
        control_plane.api.create(f"{path}/pods", manifest)
        status = {"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}}
        where = f"{path}/pods/{manifest['metadata']['name']}/status"
        control_plane.api.patch(where, status)

    configuration = prometheus.watching(control_plane.kubeconfig)
    with prometheus.running(configuration, tmp_path, progress=Progress(quiet=True)) as found:

        def seen() -> bool:
            return bool(found.query("kvplane_engine_ready")) and bool(found.query("kvplane_service_replicas"))

        wait_for("Both pods scraped", seen, seconds=30, where=str(tmp_path / "prometheus.log"))
        (engine,) = found.query("kvplane_engine_ready")
        labels = {"namespace": namespace, "service": "chat", "pod": "chat-1", "job": "kvplane-engines"}
        assert labels.items() <= engine.labels.items()
        (replicas,) = found.query("kvplane_service_replicas")
        assert {"namespace": "team", "service": "chat", "pod": "operator-1"}.items() <= replicas.labels.items()
        assert {target["health"] for target in found.targets()} == {"up"}

"""The control plane on loopback: what integration tests and benchmarks stand on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster.api import wait_for
from e2e.cluster.controlplane import ControlPlane
from e2e.cluster.errors import ApiError, CommandError
from e2e.kubectl import get

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("cp") / "cp", controllers=True) as started:
        yield started


def test_controllers_make_pods_of_deployments(control_plane: ControlPlane) -> None:
    control_plane.kubectl("create", "deployment", "web", "--image=web", "--replicas=2")
    pods = "/api/v1/namespaces/default/pods?labelSelector=app%3Dweb"
    wait_for("Two pods", lambda: len(control_plane.api.get(pods)["items"]) == 2, seconds=60, where="the test")
    control_plane.kubectl("delete", "deployment", "web")
    wait_for("No pods", lambda: not control_plane.api.get(pods)["items"], seconds=60, where="the test")


def test_errors_are_those_of_kubectl_and_of_the_server(control_plane: ControlPlane) -> None:
    with pytest.raises(CommandError, match='services "nope" not found'):
        control_plane.kubectl("get", "service", "nope")
    with pytest.raises(ApiError, match='The API server answered 404: pods "nope" not found'):
        control_plane.api.get("/api/v1/namespaces/default/pods/nope")


def test_objects_by_name_and_lists(control_plane: ControlPlane) -> None:
    """A list without items prints nothing, as a name does that is not there."""
    kubectl = control_plane.kubectl
    assert get(kubectl, "kube-public", "deployments") == get(kubectl, "kube-public", "pods", "-l", "app=web") == []
    assert get(kubectl, "kube-public", "deployment", "web") is None
    assert get(kubectl, "default", "service", "kubernetes")["metadata"]["name"] == "kubernetes"
    assert [service["metadata"]["name"] for service in get(kubectl, "default", "services")] == ["kubernetes"]


def test_rights_are_checked(control_plane: ControlPlane) -> None:
    can = ("auth", "can-i", "list", "secrets", "--as=system:serviceaccount:default:default")
    with pytest.raises(CommandError):
        control_plane.kubectl(*can)


def test_the_api_server_goes_and_comes_back_with_its_objects(control_plane: ControlPlane) -> None:
    control_plane.kubectl("create", "configmap", "kept", "--from-literal=a=b")
    control_plane.stop_apiserver()
    with pytest.raises(OSError):
        control_plane.api.ready()
    control_plane.start_apiserver()
    assert control_plane.api.get("/api/v1/namespaces/default/configmaps/kept")["data"] == {"a": "b"}


def test_it_listens_on_loopback_only(control_plane: ControlPlane) -> None:
    shown = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    pids = {control_plane.pid(name) for name in ("etcd", "kube-apiserver", "kube-controller-manager")}
    own = [line.split()[3] for line in shown if any(f"pid={pid}," in line for pid in pids)]
    assert len(own) >= 4
    assert all(address.startswith("127.0.0.1:") for address in own)


KILLED = """
import os, signal, sys
from pathlib import Path
from e2e.cluster.controlplane import ControlPlane
with ControlPlane(Path(sys.argv[1])) as control_plane:
    print(control_plane.pid("etcd"), control_plane.pid("kube-apiserver"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_survives_a_killed_owner(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "cp")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 30
    for pid in map(int, done.stdout.split()):
        while alive(pid):
            assert time.monotonic() < end
            time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

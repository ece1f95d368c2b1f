"""The local cluster is what it says: real, whole again after any crash, and gone without a trace.

Runs on real nodes and needs root, as the cluster does. Clusters have names of their own here, so that a cluster that a
developer has up is not touched.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.cluster import cache, pause
from e2e.cluster.api import Json, condition, wait_for
from e2e.cluster.cgroups import Cgroups
from e2e.cluster.cluster import Cluster
from e2e.cluster.commands import run
from e2e.cluster.containerd import digest
from e2e.cluster.errors import ApiError, ClusterStateError, CommandError
from e2e.cluster.registry import Registry
from e2e.cluster.spec import ClusterSpec
from images.build import build_images
from images.storage import buildah_environment, default_storage
from images.tools import Tool

REPOSITORY = Path(__file__).resolve().parents[2]
NAMESPACE = "/api/v1/namespaces/default"
SERVER = "import http.server as h\nh.test(h.SimpleHTTPRequestHandler, h.ThreadingHTTPServer, port=8080)"


def eventually(what: str, ready: Callable[[], bool], seconds: float = 120) -> float:
    """Wait for something; the seconds that it took."""
    begin = time.monotonic()
    wait_for(what, ready, seconds=seconds, where="the test")
    return time.monotonic() - begin


def traces(cluster: Cluster) -> list[str]:
    """Everything on this host that is the cluster's: nothing, once it is down."""
    name, folder = cluster.kernel_name, str(cluster.folder)
    found = [f"process {pid}" for pid in cluster.cgroups.processes()]
    found += [f"cgroup {h / name}" for h in cluster.cgroups.hierarchies() if (h / name).exists()]
    found += [f"link {line}" for line in run("ip", "-oneline", "link").splitlines() if name in line]
    found += [f"nft {line}" for line in run("nft", "list", "ruleset").splitlines() if name in line]
    for mountinfo in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            found += [
                f"mount {mountinfo} {line}" for line in mountinfo.read_text().splitlines() if f"{folder}/" in line
            ]
        except OSError:
            continue  # ended since
    if cluster.folder.exists():
        found.append(f"folder {folder}")
    found += [str(path) for path in cache.clusters().glob(f".{cluster.spec.name}*")]
    found += [str(path) for path in Path("/run/kvplane/users").glob(name)]
    return found


def routes(index: int) -> list[str]:
    """This host's routes into the range of a cluster."""
    return [line for line in run("ip", "route", "show", "table", "all").splitlines() if f"10.{200 + index}." in line]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "e2e.cluster", *arguments]


@pytest.fixture(scope="module")
def image() -> str:
    (name,) = build_images(("control",))
    return name


@pytest.fixture(scope="module")
def cluster(image: str) -> Iterator[Cluster]:
    cluster = Cluster(ClusterSpec(name="e2ecluster", nodes=3))
    cluster.load([image])
    cluster.up(recreate=True)
    yield cluster
    cluster.down()


def pod_status(cluster: Cluster, name: str) -> Json:
    return cluster.api.get(f"{NAMESPACE}/pods/{name}")


def pod_ready(cluster: Cluster, name: str) -> bool:
    return condition(pod_status(cluster, name))


def restarts(cluster: Cluster, name: str) -> int:
    return sum(status["restartCount"] for status in pod_status(cluster, name)["status"].get("containerStatuses", ()))


def node_ready(cluster: Cluster, name: str) -> bool:
    return condition(cluster.api.get(f"/api/v1/nodes/{name}"))


def await_nodes(*clusters: Cluster) -> None:
    """Until all of their nodes are Ready: one that could not report for a while, as others took the processors, is not."""
    for cluster in clusters:
        eventually(f"all nodes of {cluster.spec.name} are Ready", cluster.all_nodes_ready)


def gone(cluster: Cluster, path: str) -> bool:
    try:
        cluster.api.get(path)
    except ApiError as error:
        return error.status == 404
    return False


def web_pod(name: str, image: str, node: str) -> Json:
    """A web server on a node, with the host's /etc from a claim and its own image as a volume."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "web",
                    "image": image,
                    "imagePullPolicy": "Never",
                    "command": ["python3", "-c", SERVER],
                    "workingDir": "/",
                    "readinessProbe": {"httpGet": {"path": "/model/", "port": 8080}, "periodSeconds": 1},
                    # Patient: a test that stops the server has to find it there again, however late it comes.
                    "livenessProbe": {
                        "httpGet": {"path": "/model/", "port": 8080},
                        "periodSeconds": 1,
                        "failureThreshold": 60,
                    },
                    "volumeMounts": [{"name": "model", "mountPath": "/model"}],
                }
            ],
            "volumes": [{"name": "model", "image": {"reference": image, "pullPolicy": "Never"}}],
        },
    }


def service(name: str) -> Json:
    return {
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8080}]},
    }


@pytest.fixture
def web(cluster: Cluster, image: str) -> Iterator[str]:
    """A pod "web" on node-2 behind a Service of that name."""
    cluster.api.create(f"{NAMESPACE}/pods", web_pod("web", image, "node-2"))
    cluster.api.create(f"{NAMESPACE}/services", service("web"))
    eventually("web is Ready", lambda: pod_ready(cluster, "web"))
    yield "web"
    cluster.api.delete(f"{NAMESPACE}/services/web")
    try:
        cluster.api.delete(f"{NAMESPACE}/pods/web?gracePeriodSeconds=0")
    except ApiError as error:
        if error.status != 404:  # it was evicted
            raise
    eventually("web is gone", lambda: gone(cluster, f"{NAMESPACE}/pods/web"))


# ------------------------------------------------------------------------------------------------ what a cluster can


def test_up_keeps_what_is_up(cluster: Cluster) -> None:
    """Before any fault: a node that is still taken for lost is a reason to begin anew."""
    before = cluster.api.get("/api/v1/namespaces/kube-system")["metadata"]["uid"]
    await_nodes(cluster)
    cluster.up()
    assert cluster.api.get("/api/v1/namespaces/kube-system")["metadata"]["uid"] == before


def test_pods_are_reached_by_name_address_and_exec(cluster: Cluster, web: str) -> None:
    address = cluster.api.get(f"{NAMESPACE}/services/{web}")["spec"]["clusterIP"]
    eventually("the service answers this host", lambda: status_of(f"http://{address}/etc/hostname") == 200)
    script = "import urllib.request as u; print(u.urlopen('http://web.default.svc.cluster.local/etc/').status)"
    # The pod's node has a kube-proxy of its own, which may be later than the one that this host's way leads through.
    eventually("the service answers the pod by its name", lambda: said_in(cluster, web, script) == "200")
    eventually("the log has the request", lambda: "GET /etc/ " in cluster.kubectl("logs", web))


def said_in(cluster: Cluster, pod: str, script: str) -> str:
    """What a Python script prints in a pod; OSError where it fails, so that `eventually` goes on and tells it at last."""
    try:
        return cluster.kubectl("exec", pod, "--", "python3", "-c", script).strip()
    except CommandError as error:
        raise OSError(str(error)) from None


def status_of(url: str) -> int:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own URLs
        return int(answer.status)


def test_image_volumes_show_the_image(cluster: Cluster, web: str) -> None:
    assert "python3" in cluster.kubectl("exec", web, "--", "ls", "/model/usr/bin")


def test_names_outside_of_the_cluster_do_not_exist(cluster: Cluster, web: str) -> None:
    script = "import socket\ntry: socket.gethostbyname('example.org')\nexcept OSError as e: print(e.errno)"
    assert cluster.kubectl("exec", web, "--", "python3", "-c", script).strip() == "-2"  # EAI_NONAME, at once


def test_no_machine_has_a_way_out(cluster: Cluster) -> None:
    for name in cluster.spec.machine_names:
        shown = run("nsenter", "--target", str(cluster.machine(name).pid()), "--net", "ip", "route", "show", "default")
        assert all(line.startswith("unreachable default") for line in shown.splitlines())


def test_pods_see_this_host(cluster: Cluster, web: str, tmp_path: Path) -> None:
    """A test's own server, such as a model hub, is reachable from pods at the host's address."""
    (tmp_path / "hello").write_text("from the host")
    host = cluster.addresses.host
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", "8099", "--bind", host, "--directory", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually("the host's server answers", lambda: status_of(f"http://{host}:8099/hello") == 200)
        script = f"import urllib.request as u; print(u.urlopen('http://{host}:8099/hello').read().decode())"
        assert cluster.kubectl("exec", web, "--", "python3", "-c", script).strip() == "from the host"
    finally:
        server.terminate()
        server.wait()


def test_static_host_path_volumes_are_bound(cluster: Cluster, image: str, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("42")
    tmp_path.chmod(0o755)  # the container's user is not root
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "weights"},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "hostPath": {"path": str(tmp_path)},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "weights"},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "volumeName": "weights",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    pod = web_pod("reader", image, "node-1")
    pod["spec"]["volumes"].append({"name": "weights", "persistentVolumeClaim": {"claimName": "weights"}})
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": "weights", "mountPath": "/weights"})
    objects = {"apiVersion": "v1", "kind": "List", "items": [volume, claim, pod]}
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(objects))
    eventually("the pod with the claim is Ready", lambda: pod_ready(cluster, "reader"))
    assert cluster.kubectl("exec", "reader", "--", "cat", "/weights/weights") == "42"
    cluster.kubectl("delete", "-f", "-", "--wait", stdin=json.dumps(objects))


def test_pod_security_is_enforced(cluster: Cluster, image: str) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.api.create("/api/v1/namespaces", {"metadata": {"name": "strict", "labels": labels}})
    # Without it every pod is refused, for lack of it.
    account = "/api/v1/namespaces/strict/serviceaccounts/default"
    eventually("the namespace has its service account", lambda: bool(cluster.api.get(account)))
    with pytest.raises(ApiError, match="violates PodSecurity"):
        cluster.api.create("/api/v1/namespaces/strict/pods", web_pod("web", image, "node-1"))
    cluster.api.delete("/api/v1/namespaces/strict")


def test_kubelets_may_not_change_other_nodes(cluster: Cluster) -> None:
    """The Node authorizer and NodeRestriction are on."""
    own = "--kubeconfig=/var/lib/kubernetes/kubelet.kubeconfig"
    node = cluster.machine("node-1")
    node.run("kubectl", own, "annotate", "--overwrite", "node", "node-1", "mine=yes")
    with pytest.raises(CommandError, match=r"node-2.* is forbidden"):
        node.run("kubectl", own, "annotate", "--overwrite", "node", "node-2", "mine=yes")


def test_what_a_killed_build_left_is_removed_by_the_next(image: str) -> None:
    """Its container, and the mount in the cache, which could not be removed before."""
    storage = default_storage()

    def buildah(*arguments: str) -> str:
        environment = buildah_environment()
        done = subprocess.run(storage.buildah(*arguments), check=True, capture_output=True, text=True, env=environment)
        return done.stdout.strip()

    mount = buildah("mount", buildah("from", "scratch"))
    assert mount in Path("/proc/self/mounts").read_text()
    assert build_images(("control",), tool=Tool.BUILDAH) == (image,)
    assert str(storage.root) not in Path("/proc/self/mounts").read_text()
    assert not buildah("containers", "--quiet")


def test_an_archive_reaches_running_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """Twice with another content under one name: nodes must show the newer one."""
    for content in ("one", "two"):
        image = pause.image(cache.go() / "mod", name="localhost/late:1", labels={"content": content})
        archive = tmp_path / f"{content}.tar"
        archive.write_bytes(image.archive())
        cluster.load([str(archive)])
        assert_runs(cluster, "late", image)


def test_image_volumes_are_pulled_from_a_registry_in_the_network(cluster: Cluster, image: str, tmp_path: Path) -> None:
    archive = tmp_path / "model.tar"
    archive.write_bytes(pause.image(cache.go() / "mod", name="model", labels={"model": "tiny"}).archive())
    pod = web_pod("puller", image, "node-3")
    pod["spec"]["volumes"] = [{"name": "model", "image": {"reference": "registry.test:5000/models/tiny:1"}}]
    with Registry({"models/tiny:1": archive}, address=cluster.addresses.host) as registry:
        cluster.trust_registry("registry.test:5000", registry.url)
        cluster.api.create(f"{NAMESPACE}/pods", pod)
        eventually("the pod with the pulled volume is Ready", lambda: pod_ready(cluster, "puller"))
    assert "pause" in cluster.kubectl("exec", "puller", "--", "ls", "/model")
    assert any("/v2/models/tiny/blobs/" in request for request in registry.requests)
    cluster.api.delete(f"{NAMESPACE}/pods/puller")


def assert_runs(cluster: Cluster, name: str, image: pause.BuiltImage, node: str = "node-1") -> None:
    container = {"name": name, "image": image.name, "imagePullPolicy": "Never"}
    spec = {
        "containers": [container],
        "terminationGracePeriodSeconds": 0,
        "nodeSelector": {"kubernetes.io/hostname": node},
        # A node that is slow to come back would else have the pod evicted, which nobody makes anew.
        "tolerations": [{"operator": "Exists", "effect": "NoExecute"}],
    }
    pod = {"metadata": {"name": name}, "spec": spec}
    cluster.api.create(f"{NAMESPACE}/pods", pod)
    eventually(f"{name} runs", lambda: pod_ready(cluster, name))
    (status,) = pod_status(cluster, name)["status"]["containerStatuses"]
    assert status["imageID"] == digest(image.config)
    cluster.api.delete(f"{NAMESPACE}/pods/{name}")
    eventually(f"{name} is gone", lambda: gone(cluster, f"{NAMESPACE}/pods/{name}"))


# --------------------------------------------------------------------------------------------------------- faults


def test_a_killed_container_is_restarted(cluster: Cluster, web: str) -> None:
    before = restarts(cluster, web)
    cluster.kill_pod_process("default", web)
    eventually("web was restarted", lambda: restarts(cluster, web) > before and pod_ready(cluster, web))


def test_a_stopped_container_is_noticed_and_goes_on(cluster: Cluster, web: str) -> None:
    before = restarts(cluster, web)
    cluster.kill_pod_process("default", web, signal="STOP")
    eventually("web is not Ready", lambda: not pod_ready(cluster, web))
    cluster.kill_pod_process("default", web, signal="CONT")
    eventually("web is Ready again", lambda: pod_ready(cluster, web))
    assert restarts(cluster, web) == before


def test_an_address_is_hidden_from_one_pod_alone(cluster: Cluster, web: str) -> None:
    address = cluster.api.get(f"{NAMESPACE}/services/{web}")["spec"]["clusterIP"]
    eventually("the service answers this host", lambda: status_of(f"http://{address}/etc/hostname") == 200)
    script = (
        f"import socket\ntry: socket.create_connection(('{address}', 80), 5).close(); print('there')\n"
        "except OSError as e: print(e.errno)"
    )

    eventually("the service answers the pod", lambda: said_in(cluster, web, script) == "there")
    cluster.hide("default", web, address)
    assert said_in(cluster, web, script) == str(errno.EHOSTUNREACH)
    assert status_of(f"http://{address}/etc/hostname") == 200
    cluster.unhide("default", web, address)
    assert said_in(cluster, web, script) == "there"


def test_a_cut_node_is_lost_and_comes_back(cluster: Cluster) -> None:
    cluster.cut("node-3")
    eventually("node-3 is lost", lambda: not node_ready(cluster, "node-3"))
    cluster.heal("node-3")
    eventually("node-3 is back", lambda: node_ready(cluster, "node-3"))


def test_pods_outlive_their_kubelet(cluster: Cluster, web: str) -> None:
    before = restarts(cluster, web)
    address = pod_status(cluster, web)["status"]["podIP"]
    cluster.stop_kubelet("node-2")
    assert status_of(f"http://{address}:8080/etc/hostname") == 200
    cluster.start_kubelet("node-2")
    eventually("node-2 is Ready", lambda: node_ready(cluster, "node-2"))
    assert restarts(cluster, web) == before


def test_a_node_survives_a_power_failure(cluster: Cluster, web: str) -> None:
    before = cluster.api.get("/api/v1/nodes/node-2")["metadata"]["uid"]
    cluster.power_off("node-2")
    with pytest.raises(ClusterStateError, match="node-2 is off"):
        cluster.stop_kubelet("node-2")
    eventually("node-2 is lost", lambda: not node_ready(cluster, "node-2"))
    cluster.boot("node-2")
    eventually("node-2 is back", lambda: node_ready(cluster, "node-2"))
    assert cluster.api.get("/api/v1/nodes/node-2")["metadata"]["uid"] == before
    eventually(
        "web is evicted or Ready",
        lambda: gone(cluster, f"{NAMESPACE}/pods/{web}") or pod_ready(cluster, web),
    )


def test_images_that_came_later_survive_a_power_failure(cluster: Cluster, tmp_path: Path) -> None:
    image = pause.image(cache.go() / "mod", name="localhost/survivor:1")
    archive = tmp_path / "image.tar"
    archive.write_bytes(image.archive())
    cluster.load([str(archive)])
    cluster.power_off("node-1")
    cluster.boot("node-1")
    eventually("node-1 is back", lambda: node_ready(cluster, "node-1"))
    assert_runs(cluster, "survivor", image)


def test_the_api_server_goes_and_comes_back(cluster: Cluster) -> None:
    cluster.stop_daemon("cp", "kube-apiserver")
    with pytest.raises(OSError):
        cluster.api.ready()
    cluster.start_daemon("cp", "kube-apiserver")
    eventually("the API server is ready", cluster.api.ready)
    await_nodes(cluster)


# ------------------------------------------------------------------------------------------------------- life cycle


def test_two_clusters_side_by_side(cluster: Cluster) -> None:
    other = Cluster(ClusterSpec(name="e2esecond", nodes=1))
    try:
        other.up()
        assert other.record().index != cluster.record().index
        await_nodes(other, cluster)
        index = other.record().index
    finally:
        other.down()
    assert traces(other) == []
    assert routes(index) == []
    await_nodes(cluster)


def test_two_clusters_may_come_up_at_once() -> None:
    """They choose ranges under a lock; neither gets the other's."""
    clusters = [Cluster(ClusterSpec(name=name, nodes=1)) for name in ("e2eleft", "e2eright")]
    try:
        running = [
            subprocess.Popen(command("--name", c.spec.name, "up", "--nodes", "1"), cwd=REPOSITORY) for c in clusters
        ]
        assert [process.wait() for process in running] == [0, 0]
        assert clusters[0].record().index != clusters[1].record().index
        await_nodes(*clusters)
    finally:
        for cluster in clusters:
            cluster.down()
    assert [traces(cluster) for cluster in clusters] == [[], []]


def test_a_killed_load_is_healed_by_the_next(cluster: Cluster, tmp_path: Path) -> None:
    image = pause.image(cache.go() / "mod", name="localhost/killed:1")
    archive = tmp_path / "image.tar"
    archive.write_bytes(image.archive())
    for seconds in (0.2, 0.35, 0.5):
        killed = subprocess.Popen(
            command("--name", cluster.spec.name, "load", str(archive)), cwd=REPOSITORY, stderr=subprocess.DEVNULL
        )
        time.sleep(seconds)
        killed.kill()
        killed.wait()
    cluster.load([str(archive)])
    assert_runs(cluster, "killed", image)


def test_cgroups_of_both_versions_are_made_and_killed() -> None:
    """On a host with v1, an empty v2 hierarchy is mounted beside it: enough for all but the controllers."""
    cgroups = Cgroups("kvplane-test", Path("/sys/fs/cgroup/unified"))
    if Cgroups("kvplane-test").unified:
        cgroups = Cgroups("kvplane-test")
    assert cgroups.unified
    try:
        cgroups.create("node-1")
        sleeper = subprocess.Popen(["sleep", "1000"])
        (cgroups.daemons("node-1") / "cgroup.procs").write_text(str(sleeper.pid))
        assert cgroups.processes("node-1") == [sleeper.pid]
        cgroups.kill()
        assert sleeper.wait() == -signal.SIGKILL
    finally:
        cgroups.remove()
    assert not cgroups.tracking().exists()


@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0, 2.0, 4.0])
def test_a_killed_up_is_healed_by_the_next_and_down_leaves_nothing(seconds: float) -> None:
    cluster = Cluster(ClusterSpec(name="e2ekilled", nodes=2))
    up = command("--name", cluster.spec.name, "up", "--nodes", "2")
    killed = subprocess.Popen(up, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(seconds)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        healed = subprocess.run(up, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert healed.stdout == f"export KUBECONFIG={cluster.kubeconfig}\n"
        await_nodes(Cluster.named("e2ekilled"))
        index = cluster.record().index
    finally:
        subprocess.run(command("--name", cluster.spec.name, "down"), cwd=REPOSITORY, check=True)
    assert traces(cluster) == []
    assert routes(index) == []


@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0, 2.0])
def test_down_clears_up_after_a_killed_up(seconds: float) -> None:
    cluster = Cluster(ClusterSpec(name="e2ekilled", nodes=2))
    up = command("--name", cluster.spec.name, "up", "--nodes", "2")
    killed = subprocess.Popen(up, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    Cluster.named("e2ekilled").down()
    assert traces(cluster) == []

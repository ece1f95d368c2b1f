import io
import json
from pathlib import Path

import pytest

from e2e.cluster import provider
from e2e.cluster.cluster import Cluster
from e2e.cluster.errors import ClusterStateError, RequirementError
from e2e.cluster.progress import Progress
from e2e.cluster.provider import GivenCluster, Kind, KindCluster, existing_cluster, resolve, wanted
from e2e.cluster.spec import ClusterSpec

QUIET = Progress(quiet=True)


def test_the_default_is_our_own_cluster() -> None:
    assert wanted({}) is Kind.LOCAL
    assert isinstance(resolve(environment={}, progress=QUIET), Cluster)


def test_another_value_is_refused_with_the_right_ones() -> None:
    with pytest.raises(ClusterStateError, match="KVPLANE_CLUSTER is 'minikube'; give local, kind, kubeconfig"):
        wanted({"KVPLANE_CLUSTER": "minikube"})


def test_a_given_cluster_is_that_of_kubeconfig(tmp_path: Path) -> None:
    config = tmp_path / "config"
    environment = {"KVPLANE_CLUSTER": "kubeconfig", "KUBECONFIG": f"{config}:/other"}
    with pytest.raises(ClusterStateError, match=r"there is no file .*config: set KUBECONFIG"):
        existing_cluster(environment)
    config.touch()
    assert existing_cluster(environment) == config
    assert existing_cluster({"KUBECONFIG": str(config)}) is None
    assert resolve(environment=environment, progress=QUIET) == GivenCluster(config, QUIET)


def test_images_of_a_given_cluster_must_be_pulled() -> None:
    told = io.StringIO()
    GivenCluster(Path("/config"), Progress(stream=told)).load(["kvplane/control:dev"])
    assert "must be able to pull kvplane/control:dev" in told.getvalue()
    assert "make images PUSH=" in told.getvalue()


def test_kind_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(RequirementError, match="needs kind and docker and kubectl"):
        resolve(environment={"KVPLANE_CLUSTER": "kind"}, progress=QUIET)


class Recorder:
    """Stands for the programs: answers `kind get clusters`, notes everything else."""

    def __init__(self, clusters: str = "") -> None:
        self.clusters = clusters
        self.calls: list[tuple[str, ...]] = []
        self.stdin: str | None = None

    def __call__(self, *command: object, stdin: str | None = None) -> str:
        words = tuple(map(str, command))
        if words[:3] == ("kind", "get", "clusters"):
            return self.clusters
        self.calls.append(words)
        self.stdin = stdin
        return ""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVPLANE_CACHE", str(tmp_path))
    return tmp_path


def test_kind_makes_a_cluster_with_our_nodes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "run", programs := Recorder())
    kind = KindCluster(ClusterSpec(name="a", nodes=2), QUIET)
    kind.up()
    ((*words,),) = programs.calls
    assert words[:5] == ["kind", "create", "cluster", "--name", "a"]
    assert str(cache / "clusters" / "a.kind-kubeconfig") in words
    assert programs.stdin
    roles = [node["role"] for node in json.loads(programs.stdin)["nodes"]]
    assert roles == ["control-plane", "worker", "worker"]


def test_kind_keeps_a_cluster_that_is_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "run", programs := Recorder("other\na\n"))
    KindCluster(ClusterSpec(name="a"), QUIET).up()
    assert [words[1:3] for words in programs.calls] == [("export", "kubeconfig")]


def test_kind_loads_images_and_archives(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "run", programs := Recorder())
    (cache / "image.tar").touch()
    KindCluster(ClusterSpec(name="a"), QUIET).load(["kvplane/control:dev", str(cache / "image.tar")])
    assert [words[2] for words in programs.calls] == ["docker-image", "image-archive"]

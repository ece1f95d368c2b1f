"""All four model sources, each with a real vLLM on it. The image volume is what every other test here runs on."""

import base64
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import images as node_images
from e2e.cluster.cluster import Cluster
from e2e.cluster.containerd import UnpackedImage
from e2e.hub import Hub, Model, serve
from e2e.stack import Images, Stack, cpu_service
from e2e.tests.client import address, complete

TOKEN = "hub-token-of-the-test"  # noqa: S105
PRIVILEGED = {"pod-security.kubernetes.io/enforce": "privileged"}


@pytest.fixture(scope="module")
def model(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's files in a folder that any user may read."""
    found = node_images.find(images.model)
    assert isinstance(found, UnpackedImage)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(found.layers[-1].tree, folder)
    for path in (folder.parent, folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.fixture(scope="module")
def hub(cluster: Cluster, model: Path) -> Iterator[tuple[Hub, str]]:
    """A hub that wants a token and breaks the first download of each file halfway."""
    half = (model / "model.safetensors").stat().st_size // 2
    hub = Hub([Model("acme/tiny", model, token=TOKEN, revisions={"v1": model})], break_after=half)
    with serve(hub, host=cluster.addresses.host) as url:
        yield hub, url


def _volume(name: str, folder: Path, mode: str, namespace: str) -> list[dict[str, Any]]:
    """A static volume on a directory of the nodes (here: of this host), and the claim for it."""
    shape = {"accessModes": [mode], "storageClassName": "", "volumeName": name}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": [mode],
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": str(folder), "type": "Directory"},
                "claimRef": {"name": name, "namespace": namespace},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {**shape, "resources": {"requests": {"storage": "1Gi"}}},
        },
    ]


def test_volume_directory_and_hub(
    stack: Stack,
    model: Path,
    hub: tuple[Hub, str],
    make_namespace: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Started together, since each start takes a core for half a minute."""
    restricted, privileged = make_namespace(), make_namespace(PRIVILEGED)
    cache = tmp_path_factory.mktemp("cache")
    cache.chmod(0o777)
    hub_server, hub_url = hub
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "hub", "namespace": restricted},
        "data": {"token": base64.b64encode(TOKEN.encode()).decode()},
    }
    gated = cpu_service("hub", restricted, "hf://acme/tiny@v1")
    gated["spec"]["model"] |= {"tokenSecretRef": {"name": "hub"}, "cache": {"claimName": "cache"}}
    gated["spec"]["engine"]["env"] += [{"name": "HF_ENDPOINT", "value": hub_url}]
    stack.apply(
        secret,
        *_volume("models", model.parent, "ReadOnlyMany", restricted),
        *_volume("cache", cache, "ReadWriteMany", restricted),
        cpu_service("volume", restricted, "pvc://models/tiny"),
        cpu_service("directory", privileged, f"path://{model}"),
        gated,
    )
    for namespace, name in ((restricted, "volume"), (privileged, "directory"), (restricted, "hub")):
        stack.wait_ready(namespace, name)
        complete(address(stack, namespace, name), name)
    stack.kubectl("delete", "llms", "volume", "-n", restricted)
    stack.kubectl("delete", "namespace", privileged, "--wait=false")

    weights = [served for served in hub_server.downloads() if served.path.endswith("model.safetensors")]
    assert [served.status for served in weights] == [200, 206], "broken once, then resumed where it stopped"
    assert all("/v1/" in s.path or "/resolve/" in s.path for s in weights)

    before = len(hub_server.downloads())
    stack.kubectl("scale", "llms", "hub", "-n", restricted, "--replicas=2")
    stack.wait_for(restricted, "hub", "readyReplicas", 2)
    assert len(hub_server.downloads()) == before, "the second pod found the model in the cache"
    stack.kubectl("delete", "namespace", restricted, "--wait=false")
    stack.kubectl("delete", "persistentvolumes", "models", "cache", "--wait=false")

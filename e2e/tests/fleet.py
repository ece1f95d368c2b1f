"""Three services side by side, from three model sources, with little KV memory, so that a few dozen callers exhaust it.

| service | its model comes from | admission |
|---|---|---|
| volume | a persistent volume, read-only | as a user gets it, except for the promises |
| directory | a directory of the node | reservation: Worst; only 10 may wait |
| hub | a hub that asks for a token | as a user gets it, but only 4 may wait |

They start together, since each start takes most of a core for half a minute.
"""

import base64
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from e2e.cluster import images as node_images
from e2e.cluster.cluster import Cluster
from e2e.cluster.containerd import UnpackedImage
from e2e.hub import Hub, Model, serve
from e2e.stack import Images, Stack, cpu_service
from e2e.tests import sidecar
from e2e.tests.client import address, complete

PRIVILEGED: Final = {"pod-security.kubernetes.io/enforce": "privileged"}
BLOCK_TOKENS: Final = 32
KV_BLOCKS: Final = 96
"""3,072 tokens; vLLM keeps one block more for itself."""
MAX_SEQUENCES: Final = 64
"""More than fit: what keeps requests out is the KV memory."""
_TOKEN: Final = "hub-token-of-the-test"  # noqa: S105


@dataclass(frozen=True)
class Fleet:
    """The three services, Ready."""

    namespaces: Mapping[str, str]
    """By service."""
    hub: Hub


def unpacked_model(images: Images, folder: Path) -> Path:
    """The demo model's files below `folder`, readable for any user."""
    found = node_images.find(images.model)
    assert isinstance(found, UnpackedImage)
    model = folder / "tiny"
    shutil.copytree(found.layers[-1].tree, model)
    for path in (folder, model, *model.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return model


@contextmanager
def running(
    stack: Stack, cluster: Cluster, model: Path, cache: Path, make_namespace: Callable[..., str]
) -> Iterator[Fleet]:
    """The fleet, and the hub that one of them comes from; the hub breaks the first download of each file halfway."""
    cache.chmod(0o777)
    half = (model / "model.safetensors").stat().st_size // 2
    hub = Hub([Model("acme/tiny", model, token=_TOKEN, revisions={"v1": model})], break_after=half)
    restricted, privileged = make_namespace(), make_namespace(PRIVILEGED)
    namespaces = {"volume": restricted, "directory": privileged, "hub": restricted}
    with serve(hub, host=cluster.addresses.host) as url:
        stack.apply(
            _secret(restricted),
            *_volume("models", model.parent, "ReadOnlyMany", restricted),
            *_volume("cache", cache, "ReadWriteMany", restricted),
            _service("volume", restricted, "pvc://models/tiny"),
            _service(
                "directory",
                privileged,
                f"path://{model}",
                admission={"reservation": "Worst", "queue": {"maxRequests": 10, "maxWaitSeconds": 60}},
            ),
            _from_hub(restricted, url),
        )
        for name, namespace in namespaces.items():
            stack.wait_ready(namespace, name)
            reachable(stack, namespace, name)
        yield Fleet(namespaces, hub)
    stack.kubectl("delete", "namespace", restricted, privileged, "--wait=false")
    stack.kubectl("delete", "persistentvolumes", "models", "cache", "--wait=false")


def reachable(stack: Stack, namespace: str, name: str) -> None:
    """Wait until this host's way to a Ready service is there: kube-proxy writes it a moment after the pod is Ready."""
    where = address(stack, namespace, name)

    def answers() -> bool:
        try:
            complete(where, name, max_tokens=1)
        except ConnectionRefusedError:
            return False
        return True

    sidecar.eventually(answers, seconds=30, otherwise=lambda: f"{where} refuses connections")


def _service(
    name: str, namespace: str, source: str, *, engine: Mapping[str, Any] | None = None, **spec: Any
) -> dict[str, Any]:
    settings = {
        "blockSize": BLOCK_TOKENS,
        "maxSequences": MAX_SEQUENCES,
        "extraArgs": ["--enforce-eager", "--num-gpu-blocks-override", str(KV_BLOCKS + 1)],
        **(engine or {}),
    }
    return cpu_service(name, namespace, source, engine=settings, **spec)


def _from_hub(namespace: str, url: str) -> dict[str, Any]:
    service = _service("hub", namespace, "hf://acme/tiny@v1", admission={"queue": {"maxRequests": 4}})
    service["spec"]["model"] |= {"tokenSecretRef": {"name": "hub"}, "cache": {"claimName": "cache"}}
    service["spec"]["engine"]["env"] += [{"name": "HF_ENDPOINT", "value": url}]
    return service


def _secret(namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "hub", "namespace": namespace},
        "data": {"token": base64.b64encode(_TOKEN.encode()).decode()},
    }


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

"""Where buildah keeps our images on this machine, and how to name that place to buildah.

The store lies below kvplane's cache folder instead of /var/lib/containers: removing the cache removes the images,
another user of buildah on the machine sees nothing of ours, and the cluster's golden store, in the same cache and so on
the same file system, can take the layers by hard link.

The format is containers/storage's with its overlay driver: `overlay-images/images.json` and
`overlay-layers/layers.json` list images and layers, `overlay/LAYER-ID/diff` is a layer's unpacked tree with the
kernel's own whiteouts.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Storage:
    """One containers/storage folder; nothing in it is created before buildah runs."""

    root: Path
    """Images and layers; survives reboots."""
    runroot: Path
    """Locks and state of running builds; worthless after a reboot."""

    @property
    def images_file(self) -> Path:
        """JSON list of images: `id`, `names`, `layer` (the top layer's id)."""
        return self.root / "overlay-images" / "images.json"

    @property
    def containers_file(self) -> Path:
        """JSON list of the containers in which images are being built."""
        return self.root / "overlay-containers" / "containers.json"

    @property
    def layers_file(self) -> Path:
        """JSON list of layers: `id`, `parent`, `diff-digest`, `diff-size` (bytes)."""
        return self.root / "overlay-layers" / "layers.json"

    def layer_tree(self, layer_id: str) -> Path:
        """The unpacked tree of one layer."""
        return self.root / "overlay" / layer_id / "diff"

    def buildah(self, *arguments: str) -> tuple[str, ...]:
        """The argument list of a buildah command on this store; run it with `buildah_environment()`.

        `skip_mount_home` keeps buildah from bind-mounting the store onto itself: no mount outlives the command.
        """
        where = ("--root", str(self.root), "--runroot", str(self.runroot))
        return ("buildah", *where, "--storage-opt", "overlay.skip_mount_home=true", *arguments)


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """kvplane's cache: `$KVPLANE_CACHE`, by default `~/.cache/kvplane`."""
    return Path(environment.get("KVPLANE_CACHE") or Path.home() / ".cache" / "kvplane")


def default_storage(environment: Mapping[str, str] = os.environ) -> Storage:
    """The store that `python -m images.build` fills and the local cluster adopts from."""
    containers = cache_folder(environment) / "containers"
    return Storage(root=containers / "storage", runroot=containers / "run")


def buildah_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environment` with what buildah needs where containers cannot be run: chroot isolation, overlay layers."""
    return {**environment, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "overlay"}

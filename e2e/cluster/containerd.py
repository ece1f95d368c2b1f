"""Images in one containerd, whoever runs it: list, import an archive, adopt layers that are unpacked already.

Adopting is what makes images cheap here. buildah keeps every layer as an unpacked folder in the kernel's own overlay
format, which is also what containerd's overlayfs snapshotter keeps. So a layer is made a snapshot by hard links, without
tar, compression or copy: a 6 GB image in seconds, and no disk. Manifest and configuration are imported as usual; the
layers' blobs never exist.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster.commands import run
from e2e.cluster.errors import CommandError

NAMESPACE = "k8s.io"
"""containerd's namespace that kubelets see."""
SNAPSHOTS = "io.containerd.snapshotter.v1.overlayfs/snapshots"
DRAFT = "kvplane-adopting"
_OCI = "application/vnd.oci.image"


@dataclass(frozen=True)
class Layer:
    """A layer that is unpacked in `tree`; `diff_id` is the digest ("sha256:…") of its tar, `size` that tar's bytes."""

    diff_id: str
    size: int
    tree: Path


@dataclass(frozen=True)
class UnpackedImage:
    """An image whose layers are folders; `config` is its OCI configuration, byte for byte."""

    names: tuple[str, ...]
    config: bytes
    layers: tuple[Layer, ...]

    def manifest(self) -> bytes:
        """An OCI manifest with uncompressed layers."""
        layers = [
            {"mediaType": f"{_OCI}.layer.v1.tar", "digest": layer.diff_id, "size": layer.size} for layer in self.layers
        ]
        return _json(
            {
                "schemaVersion": 2,
                "mediaType": f"{_OCI}.manifest.v1+json",
                "config": _descriptor(f"{_OCI}.config.v1+json", self.config),
                "layers": layers,
            }
        )

    def archive(self, blobs: Mapping[str, bytes] | None = None) -> bytes:
        """An OCI archive of everything but the layers, and of those in `blobs` (digest to content)."""
        manifest = self.manifest()
        entry = _descriptor(f"{_OCI}.manifest.v1+json", manifest)
        index = {
            "schemaVersion": 2,
            "manifests": [{**entry, "annotations": {"io.containerd.image.name": name}} for name in self.names],
        }
        files = {
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
            "index.json": _json(index),
            _blob(digest(manifest)): manifest,
            _blob(digest(self.config)): self.config,
            **{_blob(name): content for name, content in (blobs or {}).items()},
        }
        return tar(files)


def chain_ids(diff_ids: tuple[str, ...]) -> tuple[str, ...]:
    """What a snapshotter calls each layer on top of those before it (OCI image specification, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)


def digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def tar(files: Mapping[str, bytes], mode: int = 0o644) -> bytes:
    """A tar of these files, the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _descriptor(kind: str, content: bytes) -> dict[str, object]:
    return {"mediaType": kind, "digest": digest(content), "size": len(content)}


def _blob(name: str) -> str:
    return "blobs/" + name.replace(":", "/")


@dataclass(frozen=True)
class Store:
    """The images of a containerd that listens on `socket` and whose root folder this host sees as `root`."""

    ctr: Path
    socket: Path
    root: Path

    def command(self, *arguments: str | Path, stdin: bytes | None = None) -> str:
        return run(self.ctr, "--address", self.socket, "--namespace", NAMESPACE, *arguments, stdin=stdin)

    def images(self) -> dict[str, str]:
        """Image name to the digest of its manifest."""
        lines = self.command("images", "ls").splitlines()[1:]
        return {fields[0]: fields[2] for fields in map(str.split, lines) if len(fields) > 2}

    def import_archive(self, archive: Path) -> None:
        """Unpack a docker- or OCI-archive."""
        self._forget(archive_names(archive))
        self.command("images", "import", "--local", "--discard-unpacked-layers", archive)

    def adopt(self, image: UnpackedImage) -> bool:
        """Take the image in by hard links; False where it was there already, as it is.

        Raises:
            CommandError: containerd refused, or the layers lie on another file system than `root`.
        """
        chain = chain_ids(tuple(layer.diff_id for layer in image.layers))
        known = {line.split()[0] for line in self.command("snapshots", "ls").splitlines()[1:] if line.strip()}
        present, manifest = self.images(), digest(image.manifest())
        if chain[-1] in known and all(present.get(name) == manifest for name in image.names):
            return False
        self._forget(image.names)
        self.command("images", "import", "--local", "--no-unpack", "-", stdin=image.archive())
        if DRAFT in known:  # of a load that was killed
            self.command("snapshots", "rm", DRAFT)
        parent = ""
        for layer, name in zip(image.layers, chain, strict=True):
            if name not in known:
                self._adopt(layer, name, parent)
            parent = name
        # From now on the garbage collector sees: image -> manifest -> configuration -> top snapshot -> the others.
        label = f"containerd.io/gc.ref.snapshot.overlayfs={chain[-1]}"
        self.command("content", "label", digest(image.config), label)
        for name in chain:
            self.command("snapshots", "label", name, "containerd.io/gc.root=")
        return True

    def _forget(self, names: Iterable[str]) -> None:
        """Drop names that are about to be given to other images.

        A kubelet's containerd makes its own entry (the image's id) of a name that is new, not of one that changes.
        """
        for name in set(names) & set(self.images()):
            self.command("images", "rm", name)

    def _adopt(self, layer: Layer, name: str, parent: str) -> None:
        self.command("snapshots", "prepare", DRAFT, *([parent] if parent else []))
        folder = self.root / SNAPSHOTS / snapshot_number(self.command("snapshots", "mounts", "/", DRAFT)) / "fs"
        folder.rmdir()
        same_disk = layer.tree.stat().st_dev == folder.parent.stat().st_dev
        run("cp", "--archive", *(["--link"] if same_disk else []), layer.tree, folder)
        self.command("snapshots", "commit", name, DRAFT)


def archive_names(archive: Path) -> tuple[str, ...]:
    """The image names that a docker- or OCI-archive gives.

    Raises:
        CommandError: it is neither.
    """
    try:
        with tarfile.open(archive) as content:
            files = {name.removeprefix("./") for name in content.getnames()}
            if "manifest.json" in files:
                docker: list[dict[str, Any]] = json.loads(_member(content, "manifest.json"))
                return tuple(name for image in docker for name in image.get("RepoTags") or ())
            index: dict[str, Any] = json.loads(_member(content, "index.json"))
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise CommandError(f"{archive} is no docker- or OCI-archive: {error}") from None
    annotations = [manifest.get("annotations") or {} for manifest in index["manifests"]]
    keys = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
    return tuple(found[key] for found in annotations for key in keys if key in found)


def _member(content: tarfile.TarFile, name: str) -> bytes:
    file = content.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


def snapshot_number(mounts: str) -> str:
    """The folder's name of a snapshot, from what `ctr snapshots mounts` prints of it while it is writable.

    Raises:
        CommandError: this containerd prints something else.
    """
    # One layer: "mount -t bind /…/snapshots/1/fs / -o rw,rbind"; on top of others: "… -o …upperdir=/…/snapshots/2/fs"
    found = re.search(r"(?:upperdir=|-t bind )[^\s,:]*/snapshots/(\d+)/fs\b", mounts)
    if not found:
        raise CommandError("containerd's overlayfs snapshotter reports its mounts in a form that is not known.", mounts)
    return found.group(1)

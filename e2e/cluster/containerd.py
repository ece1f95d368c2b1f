"""Images in one containerd, whoever runs it: list, import an archive, adopt layers that are unpacked already.

Adopting is what makes images cheap here. buildah keeps every layer as an unpacked folder in the kernel's own overlay
format, which is also what containerd's overlayfs snapshotter keeps. So a layer is made a snapshot by hard links, without
tar, compression or copy: a 6 GB image in seconds, and no disk. A node adopts from the golden store in turn, by mounts.
Manifest and configuration are imported as usual; the layers' blobs never exist.
"""

import hashlib
import io
import json
import platform
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster.commands import run
from e2e.cluster.errors import CommandError

NAMESPACE = "k8s.io"
"""containerd's namespace that kubelets see."""
SNAPSHOTS = "io.containerd.snapshotter.v1.overlayfs/snapshots"
DRAFT = "kvplane-adopting"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""What the kernel calls a processor, and what Go and OCI call it."""
NAME_ANNOTATION = "io.containerd.image.name"
_OCI = "application/vnd.oci.image"


@dataclass(frozen=True)
class Layer:
    """A layer that is unpacked in `tree`; `diff_id` is the digest ("sha256:…") of its uncompressed tar."""

    diff_id: str
    tree: Path


@dataclass(frozen=True)
class UnpackedImage:
    """An image whose layers are folders; manifest and configuration are OCI's, byte for byte."""

    names: tuple[str, ...]
    manifest: bytes
    config: bytes
    layers: tuple[Layer, ...]

    def archive(self, blobs: Mapping[str, bytes] | None = None) -> bytes:
        """An OCI archive of everything but the layers, and of those in `blobs` (digest to content)."""
        entry = _descriptor(f"{_OCI}.manifest.v1+json", self.manifest)
        index = {
            "schemaVersion": 2,
            "manifests": [{**entry, "annotations": {NAME_ANNOTATION: name}} for name in self.names],
        }
        files = {
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
            "index.json": _json(index),
            _blob(digest(self.manifest)): self.manifest,
            _blob(digest(self.config)): self.config,
            **{_blob(name): content for name, content in (blobs or {}).items()},
        }
        return tar(files)


Show = Callable[[Path, str], None]
"""Makes the snapshot folder of this number show this tree of files."""


def make_manifest(config: bytes, layers: Iterable[tuple[str, int]]) -> bytes:
    """An OCI manifest of uncompressed layers, each given by its digest and its size in bytes."""
    return _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{_OCI}.manifest.v1+json",
            "config": _descriptor(f"{_OCI}.config.v1+json", config),
            "layers": [{"mediaType": f"{_OCI}.layer.v1.tar", "digest": name, "size": size} for name, size in layers],
        }
    )


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

    def import_archive(self, archive: Path) -> tuple[str, ...]:
        """Unpack a docker- or OCI-archive; the names that its images have here."""
        self._forget(spelling for name in archive_names(archive) for spelling in spellings(name))
        before = self.images()
        self.command("images", "import", "--local", "--discard-unpacked-layers", archive)
        return tuple(sorted(name for name, manifest in self.images().items() if before.get(name) != manifest))

    def unpacked(self, name: str) -> UnpackedImage:
        """An image that is in this store, with the folders of its layers."""
        manifest = self._content(self.images()[name])
        if "manifests" in (index := json.loads(manifest)):
            manifest = self._content(_for_this_machine(index["manifests"]))
        config = self._content(json.loads(manifest)["config"]["digest"])
        diff_ids = json.loads(config)["rootfs"]["diff_ids"]
        self._remove_draft()
        # Not `view`: the garbage collector, awake when an image was dropped before, may take one before it is asked for.
        self.command("snapshots", "prepare", DRAFT, chain_ids(tuple(diff_ids))[-1])
        mounts = self.command("snapshots", "mounts", "/", DRAFT)
        numbers = [number for number in shown_snapshots(mounts) if number != writable_snapshot(mounts)]
        self.command("snapshots", "rm", DRAFT)
        trees = [self.root / SNAPSHOTS / number / "fs" for number in numbers]
        layers = tuple(Layer(diff_id, tree) for diff_id, tree in zip(diff_ids, trees, strict=True))
        return UnpackedImage((name,), manifest, config, layers)

    def adopt(self, image: UnpackedImage, show: Show) -> bool:
        """Take the image in without unpacking it; False where it was there already, as it is.

        Raises:
            CommandError: containerd refused.
        """
        chain = chain_ids(tuple(layer.diff_id for layer in image.layers))
        known, present, manifest = self._snapshots(), self.images(), digest(image.manifest)
        if chain[-1] in known and all(present.get(name) == manifest for name in image.names):
            return False
        self._remove_draft()  # of a load that was killed
        # Dropping the names' old images below lets the garbage collector go: what the new ones share with them is held.
        for name in known.intersection(chain):
            self.command("snapshots", "label", name, "containerd.io/gc.root=adopting")
        self._forget(image.names)
        self.command("images", "import", "--local", "--no-unpack", "-", stdin=image.archive())
        parent = ""
        for layer, name in zip(image.layers, chain, strict=True):
            if name not in known:
                self.command("snapshots", "prepare", DRAFT, *([parent] if parent else []))
                show(layer.tree, writable_snapshot(self.command("snapshots", "mounts", "/", DRAFT)))
                self.command("snapshots", "commit", name, DRAFT)
            parent = name
        # From now on the garbage collector sees: image -> manifest -> configuration -> top snapshot -> the others.
        label = f"containerd.io/gc.ref.snapshot.overlayfs={chain[-1]}"
        self.command("content", "label", digest(image.config), label)
        for name in chain:
            self.command("snapshots", "label", name, "containerd.io/gc.root=")
        return True

    def link(self, tree: Path, number: str) -> None:
        """Show a tree by hard links of its files (by copies, where it lies on another file system)."""
        folder = self.root / SNAPSHOTS / number / "fs"
        folder.rmdir()
        same_disk = tree.stat().st_dev == folder.parent.stat().st_dev
        run("cp", "--archive", *(["--link"] if same_disk else []), tree, folder)

    def _content(self, name: str) -> bytes:
        return self.command("content", "get", name).encode()

    def _snapshots(self) -> set[str]:
        return {line.split()[0] for line in self.command("snapshots", "ls").splitlines()[1:] if line.strip()}

    def _remove_draft(self) -> None:
        if DRAFT in self._snapshots():
            self.command("snapshots", "rm", DRAFT)

    def _forget(self, names: Iterable[str]) -> None:
        """Drop names that are about to be given to other images.

        A kubelet's containerd makes its own entry (the image's id) of a name that is new, not of one that changes.
        """
        for name in set(names) & set(self.images()):
            self.command("images", "rm", name)


def spellings(name: str) -> frozenset[str]:
    """The full names that an image may have which is called `name` for short."""
    tagged = name if ":" in name.rpartition("/")[2] or "@" in name else f"{name}:latest"
    return frozenset({tagged, f"localhost/{tagged}", f"docker.io/{tagged}", f"docker.io/library/{tagged}"})


def _for_this_machine(manifests: list[dict[str, Any]]) -> str:
    architecture = ARCHITECTURES.get(platform.machine(), platform.machine())
    for entry in manifests:
        if entry.get("platform", {}).get("architecture", architecture) == architecture:
            return str(entry["digest"])
    raise CommandError(f"The image is not made for this machine's architecture, {architecture}.")


def archive_names(archive: Path) -> tuple[str, ...]:
    """The image names that a docker- or OCI-archive gives.

    Raises:
        CommandError: it is neither.
    """
    try:
        with tarfile.open(archive) as content:
            files = {name.removeprefix("./") for name in content.getnames()}
            if "manifest.json" in files:
                docker: list[dict[str, Any]] = json.loads(read_member(content, "manifest.json"))
                return tuple(name for image in docker for name in image.get("RepoTags") or ())
            index: dict[str, Any] = json.loads(read_member(content, "index.json"))
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise CommandError(f"{archive} is no docker- or OCI-archive: {error}") from None
    annotations = [manifest.get("annotations") or {} for manifest in index["manifests"]]
    keys = (NAME_ANNOTATION, "org.opencontainers.image.ref.name")
    return tuple(found[key] for found in annotations for key in keys if key in found)


def read_member(content: tarfile.TarFile, name: str) -> bytes:
    """A file of a tar, whether its names begin with "./" or not.

    Raises:
        KeyError: there is no such file.
    """
    names = content.getnames()
    file = content.extractfile(name if name in names else f"./{name}")
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


def writable_snapshot(mounts: str) -> str:
    """The folder's name of a snapshot, from what `ctr snapshots mounts` prints of it while it is writable.

    Raises:
        CommandError: this containerd prints something else.
    """
    # One layer: "mount -t bind /…/snapshots/1/fs / -o rw,rbind"; on top of others: "… -o …upperdir=/…/snapshots/2/fs"
    found = re.search(r"(?:upperdir=|-t bind )[^\s,:]*/snapshots/(\d+)/fs\b", mounts)
    if not found:
        raise CommandError("containerd's overlayfs snapshotter reports its mounts in a form that is not known.", mounts)
    return found.group(1)


def shown_snapshots(mounts: str) -> list[str]:
    """The folders' names of all layers, lowest first, from what `ctr snapshots mounts` prints; among them a writable one's own."""
    return re.findall(r"/snapshots/(\d+)/fs\b", mounts)[::-1]

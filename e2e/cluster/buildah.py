"""Images in buildah's store, read from its files: containers/storage with the overlay driver (images/storage.py)."""

import base64
import json
from pathlib import Path
from typing import Any

from e2e.cluster.containerd import Layer, UnpackedImage, digest, make_manifest, spellings
from e2e.cluster.errors import ClusterStateError, CommandError
from images.storage import Storage


def image(storage: Storage, name: str) -> UnpackedImage:
    """The image called `name`, with or without "localhost/" and ":latest", under all its names that match.

    Raises:
        ClusterStateError: there is none.
        CommandError: the store is not in the form that we know.
    """
    listed: list[dict[str, Any]] = _read(storage.images_file)
    wanted = spellings(name)
    for entry in listed:
        if names := tuple(known for known in entry.get("names") or () if known in wanted):
            return _unpacked(storage, entry, names)
    available = sorted(known for entry in listed for known in entry.get("names") or ())
    raise ClusterStateError(
        f"There is no image {name!r} in {storage.root}, and no archive of that name; there are: "
        f"{', '.join(available) or 'none'}. Build it with `python -m images.build`, or give a docker- or OCI-archive."
    )


def _unpacked(storage: Storage, entry: dict[str, Any], names: tuple[str, ...]) -> UnpackedImage:
    config_digest = f"sha256:{entry['id']}"
    config = (storage.images_file.parent / entry["id"] / big_data_file(config_digest)).read_bytes()
    diff_ids = json.loads(config)["rootfs"]["diff_ids"]
    by_id = {layer["id"]: layer for layer in _read(storage.layers_file)}
    layers: list[dict[str, Any]] = []
    top: str | None = entry["layer"]
    while top:
        layers.insert(0, by_id[top])
        top = by_id[top].get("parent")
    if digest(config) != config_digest or [layer.get("diff-digest") for layer in layers] != diff_ids:
        raise CommandError(
            f"buildah's store {storage.root} keeps {names[0]} in a form that is not known (its layers are not those of "
            f"its configuration); push it to an archive: `buildah push {names[0]} docker-archive:image.tar`."
        )
    return UnpackedImage(
        names=names,
        manifest=make_manifest(config, [(layer["diff-digest"], int(layer["diff-size"])) for layer in layers]),
        config=config,
        layers=tuple(Layer(layer["diff-digest"], storage.layer_tree(layer["id"])) for layer in layers),
    )


def big_data_file(key: str) -> str:
    """The file that containers/storage keeps a blob under whose key is no plain name."""
    return "=" + base64.b64encode(key.encode()).decode()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    content: list[dict[str, Any]] = json.loads(path.read_text())
    return content

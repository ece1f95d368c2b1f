import base64
import hashlib
import io
import json
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import buildah
from e2e.cluster.containerd import (
    Layer,
    UnpackedImage,
    archive_names,
    chain_ids,
    digest,
    make_manifest,
    shown_snapshots,
    spellings,
    tar,
    writable_snapshot,
)
from e2e.cluster.errors import ClusterStateError, CommandError
from e2e.cluster.images import golden_config
from images.storage import Storage

ROOT = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots"


def test_chain_ids_follow_the_specification() -> None:
    """ChainID(L0) = DiffID(L0); ChainID(L0|…|Ln) = Digest(ChainID(L0|…|Ln-1) + " " + DiffID(Ln))."""
    one, two = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    both = "sha256:" + hashlib.sha256(f"{one} {two}".encode()).hexdigest()
    assert chain_ids((one, two)) == (one, both)
    assert chain_ids(()) == ()


@pytest.mark.parametrize(
    ("printed", "number"),
    [
        (f"mount -t bind {ROOT}/12/fs / -o rw,rbind", "12"),
        (f"mount -t overlay overlay / -o workdir={ROOT}/13/work,upperdir={ROOT}/13/fs,lowerdir={ROOT}/1/fs", "13"),
        (f"mount -t overlay overlay / -o lowerdir={ROOT}/1/fs:{ROOT}/2/fs,upperdir={ROOT}/14/fs,index=off", "14"),
    ],
)
def test_the_writable_snapshot_is_read_off_its_mounts(printed: str, number: str) -> None:
    assert writable_snapshot(printed) == number


def test_an_unknown_form_of_mounts_is_an_error() -> None:
    with pytest.raises(CommandError, match="a form that is not known"):
        writable_snapshot("mount -t erofs /dev/loop0 /")


@pytest.mark.parametrize(
    ("printed", "numbers"),
    [
        (f"mount -t bind {ROOT}/3/fs / -o ro,rbind", ["3"]),
        (f"mount -t overlay overlay / -o lowerdir={ROOT}/9/fs:{ROOT}/4/fs:{ROOT}/2/fs,index=off", ["2", "4", "9"]),
    ],
)
def test_the_layers_of_a_view_are_read_lowest_first(printed: str, numbers: list[str]) -> None:
    assert shown_snapshots(printed) == numbers


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("kvplane/control:dev", "localhost/kvplane/control:dev"),
        ("kvplane/control", "localhost/kvplane/control:latest"),
        ("localhost/kvplane/control:dev", "localhost/kvplane/control:dev"),
        ("busybox", "docker.io/library/busybox:latest"),
        ("registry.test:5000/a", "registry.test:5000/a:latest"),
    ],
)
def test_short_names_mean_what_they_mean_elsewhere(asked: str, kept: str) -> None:
    assert kept in spellings(asked)


def oci_image(names: tuple[str, ...] = ("localhost/a:1",)) -> tuple[UnpackedImage, bytes]:
    layer = tar({"file": b"content"})
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [digest(layer)]}}).encode()
    manifest = make_manifest(config, [(digest(layer), len(layer))])
    return UnpackedImage(names, manifest, config, (Layer(digest(layer), Path("/tree")),)), layer


def test_archives_hold_what_their_index_names_and_are_reproducible() -> None:
    image, layer = oci_image(("localhost/a:1", "localhost/a:2"))
    archive = image.archive({digest(layer): layer})
    assert archive == image.archive({digest(layer): layer})
    with tarfile.open(fileobj=io.BytesIO(archive)) as content:
        files = {member.name: content.extractfile(member).read() for member in content}  # type: ignore[union-attr]
    entries = json.loads(files["index.json"])["manifests"]
    assert [entry["annotations"]["io.containerd.image.name"] for entry in entries] == ["localhost/a:1", "localhost/a:2"]
    manifest = json.loads(files["blobs/" + entries[0]["digest"].replace(":", "/")])
    for entry in (manifest["config"], *manifest["layers"]):
        blob = files["blobs/" + entry["digest"].replace(":", "/")]
        assert (digest(blob), len(blob)) == (entry["digest"], entry["size"])


def test_names_are_read_from_both_kinds_of_archive(tmp_path: Path) -> None:
    image, _ = oci_image()
    oci, docker = tmp_path / "oci.tar", tmp_path / "docker.tar"
    oci.write_bytes(image.archive())
    docker.write_bytes(tar({"./manifest.json": json.dumps([{"RepoTags": ["b:2"]}, {"RepoTags": None}]).encode()}))
    assert archive_names(oci) == ("localhost/a:1",)
    assert archive_names(docker) == ("b:2",)


@pytest.mark.parametrize("content", [b"", b"not a tar", tar({"other": b""})])
def test_other_files_are_no_archives(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(CommandError, match=r"x.tar is no docker- or OCI-archive"):
        archive_names(tmp_path / "x.tar")


@pytest.mark.parametrize("collect", [True, False])
def test_the_golden_store_collects_garbage_only_when_nobody_looks(collect: bool) -> None:
    config = tomllib.loads(golden_config(Path("/g"), Path("/s"), collect=collect))
    assert ("startup_delay" in config["plugins"]["io.containerd.gc.v1.scheduler"]) is not collect
    assert config["grpc"]["address"] == "/s/containerd.sock"


# ---------------------------------------------------------------------------------------------- buildah's store


def make_store(root: Path, **layer_changes: Any) -> tuple[Storage, UnpackedImage]:
    """A store with one image, "localhost/kvplane/control:dev", of two layers."""
    storage = Storage(root=root, runroot=root / "run")
    diff_ids = ["sha256:" + "1" * 64, "sha256:" + "2" * 64]
    config = json.dumps({"rootfs": {"diff_ids": diff_ids}}).encode()
    image_id = hashlib.sha256(config).hexdigest()
    layers = [
        {"id": "low", "diff-digest": diff_ids[0], "diff-size": 10},
        {"id": "high", "parent": "low", "diff-digest": diff_ids[1], "diff-size": 20, **layer_changes},
    ]
    entry = {"id": image_id, "layer": "high", "names": ["localhost/kvplane/control:dev", "localhost/kvplane/control:1"]}
    for file, content in ((storage.images_file, [{"id": "unnamed"}, entry]), (storage.layers_file, layers)):
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    blob = storage.images_file.parent / image_id / ("=" + base64.b64encode(f"sha256:{image_id}".encode()).decode())
    blob.parent.mkdir()
    blob.write_bytes(config)
    wanted = UnpackedImage(
        names=("localhost/kvplane/control:dev",),
        manifest=make_manifest(config, [(diff_ids[0], 10), (diff_ids[1], 20)]),
        config=config,
        layers=(Layer(diff_ids[0], root / "overlay/low/diff"), Layer(diff_ids[1], root / "overlay/high/diff")),
    )
    return storage, wanted


@pytest.mark.parametrize("name", ["kvplane/control:dev", "localhost/kvplane/control:dev"])
def test_images_of_buildah_are_read_from_its_files(tmp_path: Path, name: str) -> None:
    storage, wanted = make_store(tmp_path)
    assert buildah.image(storage, name) == wanted


def test_an_image_that_is_not_there_is_an_error_that_lists_what_is(tmp_path: Path) -> None:
    storage, _ = make_store(tmp_path / "full")
    with pytest.raises(ClusterStateError, match=r"no image 'x'.*localhost/kvplane/control:dev.*images.build"):
        buildah.image(storage, "x")
    with pytest.raises(ClusterStateError, match="there are: none"):
        buildah.image(Storage(root=tmp_path / "empty", runroot=tmp_path), "x")


def test_a_store_that_does_not_fit_its_configuration_is_not_trusted(tmp_path: Path) -> None:
    storage, _ = make_store(tmp_path, **{"diff-digest": "sha256:" + "3" * 64})
    with pytest.raises(CommandError, match=r"form that is not known.*docker-archive"):
        buildah.image(storage, "kvplane/control:dev")

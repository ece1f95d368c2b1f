import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from e2e.cluster.containerd import UnpackedImage, digest, make_manifest, tar
from e2e.cluster.errors import CommandError
from e2e.cluster.registry import Registry

LAYER = tar({"config.json": b"{}"})
CONFIG = json.dumps({"rootfs": {"diff_ids": [digest(LAYER)]}}).encode()
MANIFEST = make_manifest(CONFIG, [(digest(LAYER), len(LAYER))])


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "model.tar"
    path.write_bytes(UnpackedImage(("model",), MANIFEST, CONFIG, ()).archive({digest(LAYER): LAYER}))
    return path


def get(url: str, method: str = "GET") -> tuple[bytes, str, str]:
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as answer:  # noqa: S310
        return answer.read(), answer.headers["Content-Type"], answer.headers["Content-Length"]


def test_an_image_can_be_pulled_by_tag(archive: Path) -> None:
    with Registry({"models/tiny:1": archive}) as registry:
        base = f"{registry.url}/v2/models/tiny"
        assert get(f"{registry.url}/v2/")[0] == b""
        manifest, kind, _ = get(f"{base}/manifests/1")
        assert (manifest, kind) == (MANIFEST, "application/vnd.oci.image.manifest.v1+json")
        assert get(f"{base}/manifests/{digest(MANIFEST)}")[0] == MANIFEST
        assert get(f"{base}/manifests/1", "HEAD") == (b"", kind, str(len(MANIFEST)))
        assert get(f"{base}/blobs/{digest(LAYER)}?ns=registry.test")[0] == LAYER
        assert len(registry.requests) == 5


@pytest.mark.parametrize("path", ["/v2/models/tiny/manifests/2", "/v2/other/manifests/1", "/v2/x/blobs/sha256:0", "/"])
def test_what_is_not_there_is_not_found(archive: Path, path: str) -> None:
    with Registry({"models/tiny:1": archive}) as registry, pytest.raises(urllib.error.HTTPError, match="404") as error:
        get(registry.url + path)
    error.value.close()


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar({"other": b""}))
    with pytest.raises(CommandError, match=r"x.tar is no OCI archive of one image"):
        Registry({"x:1": tmp_path / "x.tar"})

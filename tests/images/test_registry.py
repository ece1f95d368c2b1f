"""The test registry: what is pushed can be pulled, by tag and digest; nothing is kept under a wrong digest."""

import hashlib
import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.registry import serve

IMAGE = "/v2/acme/model"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with serve(tmp_path) as running:
        yield running


def ask(address: str, method: str, path: str, body: bytes | None = None) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request(method, path, body=body)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def push_blob(address: str, content: bytes) -> str:
    started, _ = ask(address, "POST", f"{IMAGE}/blobs/uploads/")
    assert started.status == 202
    location = started.headers["Location"]
    patched, _ = ask(address, "PATCH", location, content)
    assert (patched.status, patched.headers["Range"]) == (202, f"0-{len(content) - 1}")
    finished, _ = ask(address, "PUT", f"{patched.headers['Location']}?digest={digest_of(content)}")
    assert finished.status == 201
    return digest_of(content)


def test_it_says_that_it_is_a_registry(address: str) -> None:
    response, _ = ask(address, "GET", "/v2/")
    assert response.status == 200


def test_what_is_pushed_is_pulled_by_tag_and_by_digest(address: str) -> None:
    config = push_blob(address, b"{}")
    manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": {"digest": config}}).encode()
    pushed, _ = ask(address, "PUT", f"{IMAGE}/manifests/dev", manifest)
    assert pushed.headers["Docker-Content-Digest"] == digest_of(manifest)
    for reference in ("dev", digest_of(manifest)):
        pulled, content = ask(address, "GET", f"{IMAGE}/manifests/{reference}")
        assert (pulled.status, content) == (200, manifest)
        assert pulled.headers["Content-Type"] == MANIFEST_TYPE
    assert ask(address, "GET", f"{IMAGE}/blobs/{config}")[1] == b"{}"


def test_a_tag_moves(address: str) -> None:
    for manifest in (b'{"first": 1}', b'{"second": 2}'):
        ask(address, "PUT", f"{IMAGE}/manifests/dev", manifest)
    assert ask(address, "GET", f"{IMAGE}/manifests/dev")[1] == b'{"second": 2}'


def test_head_tells_size_and_digest_without_the_content(address: str) -> None:
    digest = push_blob(address, b"layer")
    response, content = ask(address, "HEAD", f"{IMAGE}/blobs/{digest}")
    assert (response.status, response.headers["Content-Length"], content) == (200, "5", b"")


def test_content_with_another_digest_is_refused_and_not_kept(address: str) -> None:
    started, _ = ask(address, "POST", f"{IMAGE}/blobs/uploads/")
    wrong = digest_of(b"other")
    response, body = ask(address, "PUT", f"{started.headers['Location']}?digest={wrong}", b"content")
    assert response.status == 400
    assert json.loads(body)["errors"][0]["code"] == "DIGEST_INVALID"
    assert ask(address, "GET", f"{IMAGE}/blobs/{wrong}")[0].status == 404
    assert ask(address, "PUT", f"{IMAGE}/manifests/{wrong}", b"{}")[0].status == 400


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (f"{IMAGE}/manifests/none", "MANIFEST_UNKNOWN"),
        (f"{IMAGE}/blobs/sha256:{'0' * 64}", "BLOB_UNKNOWN"),
        (f"{IMAGE}/blobs/../../etc/passwd", "UNSUPPORTED"),
        ("/v1/", "UNSUPPORTED"),
    ],
)
def test_the_unknown_is_answered_with_the_specifications_codes(address: str, path: str, code: str) -> None:
    response, body = ask(address, "GET", path)
    assert response.status == 404
    assert json.loads(body)["errors"][0]["code"] == code

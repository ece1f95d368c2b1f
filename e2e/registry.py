"""A small image registry for tests: push to it, pull from it, by the OCI distribution specification 1.1.

Blobs and manifests lie in one folder by digest, tags as files that hold a digest. Checked: every digest. Left out:
authentication, deletion, listings, uploads in several chunks out of order, mounts between repositories.

    python -m e2e.registry FOLDER [--host IP] [--port PORT]
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BufferedIOBase
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from e2e.serving import serve_threads

NAME = r"/v2/(?P<name>[a-z0-9]+(?:[._/-][a-z0-9]+)*)"
DIGEST = r"sha256:[0-9a-f]{64}"
CHUNK_BYTES = 1 << 20
DEFAULT_MEDIA_TYPE = "application/vnd.oci.image.manifest.v1+json"


class DigestError(Exception):
    """Content does not have the digest that it was pushed under."""


class Store:
    """The registry's folder. Content is only visible under its digest once it is whole and checked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for part in ("blobs", "tags", "uploads"):
            (folder / part).mkdir(parents=True, exist_ok=True)

    def blob(self, digest: str) -> Path | None:
        """The file of a blob or manifest, None where there is none."""
        path = self._folder / "blobs" / digest
        return path if path.is_file() else None

    def resolve(self, name: str, reference: str) -> str | None:
        """The digest behind a tag; a digest stands for itself."""
        if re.fullmatch(DIGEST, reference):
            return reference
        tag = self._tag(name, reference)
        return tag.read_text() if tag.is_file() else None

    def start(self) -> str:
        """Begin an upload; its id."""
        upload = uuid.uuid4().hex
        (self._folder / "uploads" / upload).touch()
        return upload

    def append(self, upload: str, source: BufferedIOBase, length: int | None) -> int | None:
        """Add `length` bytes to an upload (None: until the source ends); its size so far, None if unknown."""
        path = self._folder / "uploads" / upload
        if not path.is_file():
            return None
        with path.open("ab") as target:
            left = length
            while left is None or left:
                chunk = source.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
                if not chunk:
                    break
                target.write(chunk)
                left = None if left is None else left - len(chunk)
            return target.tell()

    def finish(self, upload: str, digest: str) -> None:
        """Make a whole upload a blob; raises DigestError where its content has another digest."""
        path = self._folder / "uploads" / upload
        with path.open("rb") as file:
            found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        if found != digest:
            path.unlink()
            raise DigestError(f"The content has digest {found}, it was pushed as {digest}.")
        path.rename(self._folder / "blobs" / digest)

    def put_manifest(self, name: str, reference: str, content: bytes) -> str:
        """Keep a manifest under its digest, and under a tag where `reference` is one; the digest."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if reference.startswith("sha256:") and reference != digest:
            raise DigestError(f"The manifest has digest {digest}, it was pushed as {reference}.")
        (self._folder / "blobs" / digest).write_bytes(content)
        if reference != digest:
            self._tag(name, reference).write_text(digest)
        return digest

    def _tag(self, name: str, tag: str) -> Path:
        return self._folder / "tags" / quote(f"{name}:{tag}", safe="")


def media_type(manifest: bytes) -> str:
    """The Content-Type to serve a manifest with: what it says of itself."""
    try:
        said = json.loads(manifest).get("mediaType")
    except (ValueError, AttributeError):
        said = None
    return said if isinstance(said, str) else DEFAULT_MEDIA_TYPE


def _handler(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path in ("/v2", "/v2/"):
                return self._answer(HTTPStatus.OK)
            if match := re.fullmatch(rf"{NAME}/blobs/(?P<digest>{DIGEST})", path):
                blob = store.blob(match["digest"])
                if blob is None:
                    return self._error(HTTPStatus.NOT_FOUND, "BLOB_UNKNOWN", f"There is no blob {match['digest']}.")
                headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": match["digest"]}
                return self._file(blob, headers)
            if match := re.fullmatch(rf"{NAME}/manifests/(?P<reference>[^/]+)", path):
                digest = store.resolve(match["name"], match["reference"])
                manifest = store.blob(digest) if digest is not None else None
                if digest is None or manifest is None:
                    image = f"{match['name']}:{match['reference']}"
                    return self._error(HTTPStatus.NOT_FOUND, "MANIFEST_UNKNOWN", f"There is no image {image}.")
                headers = {"Content-Type": media_type(manifest.read_bytes()), "Docker-Content-Digest": digest}
                return self._file(manifest, headers)
            return self._unknown()

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            path = urlsplit(self.path).path
            if match := re.fullmatch(rf"{NAME}/blobs/uploads/", path):
                location = f"/v2/{match['name']}/blobs/uploads/{store.start()}"
                return self._answer(HTTPStatus.ACCEPTED, {"Location": location, "Range": "0-0"})
            return self._unknown()

        def do_PATCH(self) -> None:
            if match := re.fullmatch(rf"{NAME}/blobs/uploads/(?P<upload>[0-9a-f]+)", urlsplit(self.path).path):
                size = self._append(match["upload"])
                if size is None:
                    return self._error(
                        HTTPStatus.NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", f"There is no upload {match['upload']}."
                    )
                headers = {"Location": match[0], "Range": f"0-{max(0, size - 1)}"}
                return self._answer(HTTPStatus.ACCEPTED, headers)
            return self._unknown()

        def do_PUT(self) -> None:
            url = urlsplit(self.path)
            try:
                if match := re.fullmatch(rf"{NAME}/blobs/uploads/(?P<upload>[0-9a-f]+)", url.path):
                    if self._append(match["upload"]) is None:
                        return self._error(
                            HTTPStatus.NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", f"There is no upload {match['upload']}."
                        )
                    digest = parse_qs(url.query).get("digest", [""])[0]
                    store.finish(match["upload"], digest)
                    location = f"/v2/{match['name']}/blobs/{digest}"
                    return self._answer(HTTPStatus.CREATED, {"Location": location, "Docker-Content-Digest": digest})
                if match := re.fullmatch(rf"{NAME}/manifests/(?P<reference>[^/]+)", url.path):
                    content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                    digest = store.put_manifest(match["name"], match["reference"], content)
                    location = f"/v2/{match['name']}/manifests/{digest}"
                    return self._answer(HTTPStatus.CREATED, {"Location": location, "Docker-Content-Digest": digest})
            except DigestError as error:
                return self._error(HTTPStatus.BAD_REQUEST, "DIGEST_INVALID", str(error))
            return self._unknown()

        def _append(self, upload: str) -> int | None:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return store.append(upload, self.rfile, int(self.headers.get("Content-Length") or 0))
            size = None
            while True:
                length = int(self.rfile.readline().split(b";")[0], 16)
                size = store.append(upload, self.rfile, length)
                self.rfile.readline()
                if length == 0:
                    return size

        def _file(self, file: Path, headers: Mapping[str, str]) -> None:
            self.send_response(HTTPStatus.OK)
            for name, value in {**headers, "Content-Length": str(file.stat().st_size)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                with file.open("rb") as source:
                    shutil.copyfileobj(source, self.wfile, CHUNK_BYTES)

        def _answer(self, status: HTTPStatus, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _error(self, status: HTTPStatus, code: str, message: str) -> None:
            body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
            self._answer(status, {"Content-Type": "application/json"}, body)

        def _unknown(self) -> None:
            self._error(HTTPStatus.NOT_FOUND, "UNSUPPORTED", f"This registry knows no {self.command} {self.path}.")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Nothing."""

    return Handler


@contextmanager
def serve(folder: Path, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve `folder` from threads while the body runs; yields `HOST:PORT`, as image names begin with."""
    with serve_threads(_handler(Store(folder)), host=host, port=port) as address:
        yield address


def main() -> None:
    """Command line; serves until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m e2e.registry", description="Serve a folder as an image registry.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    arguments = parser.parse_args()
    with serve(arguments.folder, host=arguments.host, port=arguments.port) as address:
        print(address, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.exit(0)


if __name__ == "__main__":
    main()

"""A small read-only image registry for tests of `oci://`: serves OCI archives as they lie on the disk.

    with Registry({"models/tiny:1": Path("tiny.tar")}, address=cluster.addresses.host) as registry:
        cluster.trust_registry("registry.test", registry.url)
        # pods may now use registry.test/models/tiny:1, as an image or as an image volume

`buildah push IMAGE oci-archive:FILE` makes such an archive. Pull only; of the OCI distribution specification it has what
containerd asks for: the ping, manifests by tag or digest, and blobs.
"""

import json
import tarfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from e2e.cluster.containerd import read_member
from e2e.cluster.errors import CommandError

CHUNK = 1 << 20
OCTETS = "application/octet-stream"


@dataclass(frozen=True)
class Blob:
    """`size` bytes at `offset` of a file."""

    file: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Content:
    """What a registry serves: blobs by digest, and tags ("models/tiny:1") as the digest of a manifest and its type."""

    blobs: Mapping[str, Blob]
    tags: Mapping[str, tuple[str, str]]


def read_archives(archives: Mapping[str, Path]) -> Content:
    """Index the archives, each under the tag that it is given.

    Raises:
        CommandError: one is no OCI archive of a single image.
    """
    blobs: dict[str, Blob] = {}
    tags: dict[str, tuple[str, str]] = {}
    for tag, path in archives.items():
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive.getmembers():
                    kind, _, hexadecimal = member.name.removeprefix("./").removeprefix("blobs/").partition("/")
                    if hexadecimal and member.isfile():
                        blobs[f"{kind}:{hexadecimal}"] = Blob(path, member.offset_data, member.size)
                (entry,) = json.loads(read_member(archive, "index.json"))["manifests"]
        except (tarfile.TarError, KeyError, ValueError) as error:
            raise CommandError(f"{path} is no OCI archive of one image: {error}") from None
        tags[tag] = (entry["digest"], entry["mediaType"])
    return Content(blobs, tags)


class Registry:
    """Serves from a thread while its context is entered; `port` 0 takes a free one."""

    def __init__(self, archives: Mapping[str, Path], *, address: str = "127.0.0.1", port: int = 0) -> None:
        content = read_archives(archives)
        types = dict(content.tags.values())

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def _answer(self, *, body: bool) -> None:
                if self.path.rstrip("/") == "/v2":
                    self._head(HTTPStatus.OK, 0, OCTETS)
                    return
                found, kind = find(content, types, self.path)
                if found is None:
                    self._head(HTTPStatus.NOT_FOUND, 0, OCTETS)
                    return
                digest, blob = found
                self._head(HTTPStatus.OK, blob.size, kind, digest)
                if body:
                    self._send(blob)

            def _head(self, status: HTTPStatus, size: int, kind: str, digest: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(size))
                if digest:
                    self.send_header("Docker-Content-Digest", digest)
                self.end_headers()

            def _send(self, blob: Blob) -> None:
                with blob.file.open("rb") as file:
                    file.seek(blob.offset)
                    left = blob.size
                    while left:
                        chunk = file.read(min(CHUNK, left))
                        self.wfile.write(chunk)
                        left -= len(chunk)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                requests.append(format % args)

        requests: list[str] = []
        self.requests = requests
        """The request lines that were answered."""
        self._server = ThreadingHTTPServer((address, port), Handler)
        self.url = f"http://{address}:{self._server.server_port}"

    def __enter__(self) -> "Registry":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def find(content: Content, types: Mapping[str, str], path: str) -> tuple[tuple[str, Blob] | None, str]:
    """(digest, blob) and media type of what a request path names; None where there is no such thing."""
    where, _, reference = path.partition("?")[0].rpartition("/")
    name, _, what = where.removeprefix("/v2/").rpartition("/")
    digest = content.tags.get(f"{name}:{reference}", (reference, ""))[0] if what == "manifests" else reference
    blob = content.blobs.get(digest)
    kind = types.get(digest, "application/vnd.oci.image.manifest.v1+json") if what == "manifests" else OCTETS
    return ((digest, blob) if blob else None), kind

"""A model hub on one port: what huggingface_hub and vLLM ask of `HF_ENDPOINT`, answered from local folders.

Read-only, and no more of the hub's API than a download needs: model information, file tree, path information, refs,
and files with ETag, commit and byte ranges. Gated repositories want a bearer token. To prove that downloads survive,
the hub can break the connection in the middle of the first GET of each file; to prove that a cache is used, it keeps a
log of requests, also served at `GET /-/requests`.

    python -m e2e.hub --model acme/tiny=FOLDER [--token SECRET] [--break-after BYTES] [--host IP] [--port PORT]
"""

import argparse
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from e2e.serving import serve_threads

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Model:
    """One repository of the hub."""

    name: str
    """`organisation/name`."""
    folder: Path
    """The files of the branch `main`."""
    token: str | None = None
    """The bearer token that every request must carry; None for a public repository."""
    revisions: Mapping[str, Path] = field(default_factory=dict)
    """Further branches or tags, with their files."""

    def commits(self) -> dict[str, Path]:
        """The folder of every name a revision goes by: branch, tag, or commit id."""
        named = {"main": self.folder, **self.revisions}
        return named | {commit_id(folder): folder for folder in named.values()}


@dataclass(frozen=True)
class Served:
    """One request, as answered."""

    method: str
    path: str
    status: int
    first_byte: int
    """Where a range request began, 0 for a whole file."""
    sent_bytes: int
    broken: bool
    """Whether the hub broke the connection on purpose."""


@dataclass(frozen=True)
class _Answer:
    """What the hub says to one request: a JSON document, a file, or an error."""

    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: Path | None = None


def commit_id(folder: Path) -> str:
    """40 hexadecimal digits that change with any file of `folder`, as a git commit's do."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name, path in _files(folder).items():
        digest.update(f"{name} {_sha256(path)}\n".encode())
    return digest.hexdigest()


class Hub:
    """The repositories and the log; thread-safe, knows nothing of sockets but how to break one."""

    def __init__(self, models: Iterable[Model], *, break_after: int | None = None) -> None:
        """`break_after` bytes into the first GET of each larger file the connection breaks; None: never.

        huggingface_hub keeps what it got in steps of 10 MiB: less than that and the file begins anew.
        """
        self._models = {model.name: model for model in models}
        self._commits = {model.name: model.commits() for model in self._models.values()}
        self._break_after = break_after
        self._broken: set[str] = set()
        self._lock = threading.Lock()
        self._served: list[Served] = []

    @property
    def served(self) -> tuple[Served, ...]:
        """Every request so far, oldest first."""
        with self._lock:
            return tuple(self._served)

    def downloads(self) -> tuple[Served, ...]:
        """The GETs of files among the requests: what a warm cache must not cause."""
        return tuple(s for s in self.served if s.method == "GET" and "/resolve/" in s.path and s.sent_bytes)

    def record(self, served: Served) -> None:
        with self._lock:
            self._served.append(served)

    def break_point(self, path: str, size: int) -> int | None:
        """After how many bytes to break the GET of `path`, None for not at all; a path is broken once."""
        with self._lock:
            if self._break_after is None or size <= self._break_after or path in self._broken:
                return None
            self._broken.add(path)
            return self._break_after

    def answer(self, path: str, authorization: str | None, body: bytes) -> _Answer:
        """The answer to a request for `path` (decoded, without its query)."""
        if path == "/-/requests":
            return _json([asdict(served) for served in self.served])
        for pattern, respond in (
            (r"/api/models/(?P<model>[^/]+/[^/]+)", self._information),
            (r"/api/models/(?P<model>[^/]+/[^/]+)/revision/(?P<revision>.+)", self._information),
            (r"/api/models/(?P<model>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<below>.*))?", self._tree),
            (r"/api/models/(?P<model>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", self._paths),
            (r"/api/models/(?P<model>[^/]+/[^/]+)/refs", self._refs),
            (r"/(?P<model>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._file),
        ):
            if (match := re.fullmatch(pattern, path)) is None:
                continue
            asked = match.groupdict()
            model = self._models.get(asked["model"])
            if model is None:
                return _error(HTTPStatus.NOT_FOUND, "RepoNotFound", f"There is no repository {asked['model']}.")
            if model.token is not None and authorization != f"Bearer {model.token}":
                status = HTTPStatus.FORBIDDEN if authorization else HTTPStatus.UNAUTHORIZED
                return _error(status, "GatedRepo", f"Access to {model.name} is restricted.")
            revision = asked.get("revision") or "main"
            folder = self._commits[model.name].get(revision)
            if folder is None:
                return _error(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"{model.name} has no revision {revision}.")
            return respond(model, folder, asked, body)
        return _error(HTTPStatus.NOT_FOUND, "", f"This hub knows no {path}.")

    def _information(self, model: Model, folder: Path, _: Mapping[str, str | None], __: bytes) -> _Answer:
        siblings = [{"rfilename": name} for name in _files(folder)]
        return _json(
            {
                "id": model.name,
                "modelId": model.name,
                "sha": commit_id(folder),
                "private": False,
                "gated": "manual" if model.token is not None else False,
                "tags": ["safetensors"],
                "pipeline_tag": "text-generation",
                "siblings": siblings,
            }
        )

    def _tree(self, _: Model, folder: Path, asked: Mapping[str, str | None], __: bytes) -> _Answer:
        below = f"{asked['below']}/" if asked.get("below") else ""
        return _json([_entry(name, path) for name, path in _files(folder).items() if name.startswith(below)])

    def _paths(self, _: Model, folder: Path, __: Mapping[str, str | None], body: bytes) -> _Answer:
        wanted = parse_qs(body.decode()).get("paths", [])
        files = _files(folder)
        return _json([_entry(name, files[name]) for name in wanted if name in files])

    def _refs(self, model: Model, _: Path, __: Mapping[str, str | None], ___: bytes) -> _Answer:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_id(folder)}
            for name, folder in {"main": model.folder, **model.revisions}.items()
        ]
        return _json({"branches": branches, "converts": [], "tags": []})

    def _file(self, model: Model, folder: Path, asked: Mapping[str, str | None], _: bytes) -> _Answer:
        path = _files(folder).get(str(asked["file"]))
        if path is None:
            return _error(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{model.name} has no file {asked['file']}.")
        headers = {"ETag": f'"{_sha256(path)}"', "X-Repo-Commit": commit_id(folder), "Accept-Ranges": "bytes"}
        return _Answer(headers=headers, file=path)


def _files(folder: Path) -> dict[str, Path]:
    """Files of `folder` by their path in it, sorted."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


_hashes: dict[tuple[Path, int, int], str] = {}


def _sha256(path: Path) -> str:
    """The file's SHA-256, computed once for each size and time of change."""
    status = path.stat()
    key = (path, status.st_size, status.st_mtime_ns)
    if key not in _hashes:
        with path.open("rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]


def _entry(name: str, path: Path) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _sha256(path)}


def _json(document: object) -> _Answer:
    return _Answer(headers={"Content-Type": "application/json"}, body=json.dumps(document).encode())


def _error(status: HTTPStatus, code: str, message: str) -> _Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    return _Answer(status=status, headers=headers, body=json.dumps({"error": message}).encode())


def first_byte(header: str | None) -> int:
    """Where a `Range` header begins; 0 without one. Only `bytes=N-` is known: what a resumed download asks."""
    match = re.fullmatch(r"bytes=(\d+)-", header or "")
    return int(match[1]) if match else 0


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = hub.answer(path, self.headers.get("Authorization"), body)
            start = first_byte(self.headers.get("Range")) if answer.file is not None else 0
            size = answer.file.stat().st_size if answer.file is not None else len(answer.body)
            status, headers = answer.status, dict(answer.headers)
            if start >= size > 0:
                status, headers, size = (
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                    {"Content-Range": f"bytes */{size}"},
                    0,
                )
            elif start:
                status, headers["Content-Range"] = HTTPStatus.PARTIAL_CONTENT, f"bytes {start}-{size - 1}/{size}"
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(max(0, size - start)))
            self.end_headers()
            sent, broken = 0, False
            if self.command != "HEAD" and size:
                if answer.file is None:
                    self.wfile.write(answer.body)
                    sent = size
                else:
                    breaks_at = hub.break_point(path, size) if self.command == "GET" else None
                    sent, broken = (
                        self._send(answer.file, start, size if breaks_at is None else breaks_at),
                        breaks_at is not None,
                    )
            if path != "/-/requests":
                hub.record(Served(self.command, path, status, start, sent, broken))
            if broken:
                self._break()

        do_HEAD = do_GET  # noqa: N815
        do_POST = do_GET  # noqa: N815

        def _send(self, file: Path, start: int, end: int) -> int:
            """Send the bytes from `start` to `end`; the number sent is less where the client went away."""
            sent = 0
            with file.open("rb") as source:
                source.seek(start)
                while start + sent < end:
                    chunk = source.read(min(CHUNK_BYTES, end - start - sent))
                    try:
                        self.wfile.write(chunk)
                    except OSError:
                        self.close_connection = True
                        break
                    sent += len(chunk)
            return sent

        def _break(self) -> None:
            """End the connection as a failing network does: what was sent arrives, the rest never comes."""
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Nothing: `Hub.served` is the log."""

    return Handler


@contextmanager
def serve(hub: Hub, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve `hub` from threads while the body runs; yields the endpoint (`http://HOST:PORT`)."""
    with serve_threads(_handler(hub), host=host, port=port) as address:
        yield f"http://{address}"


def main() -> None:
    """Command line; serves until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m e2e.hub", description="Serve model folders as a model hub.")
    parser.add_argument("--model", action="append", required=True, metavar="ORG/NAME=FOLDER")
    parser.add_argument("--token", help="the bearer token that all models require")
    parser.add_argument("--break-after", type=int, metavar="BYTES", help="break the first download of each file there")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8090)
    arguments = parser.parse_args()
    models = []
    for given in arguments.model:
        name, equals, folder = given.partition("=")
        if not equals or name.count("/") != 1 or not Path(folder).is_dir():
            parser.error(f"--model must be ORG/NAME=FOLDER with an existing folder, got {given}")
        models.append(Model(name, Path(folder), token=arguments.token))
    with serve(Hub(models, break_after=arguments.break_after), host=arguments.host, port=arguments.port) as endpoint:
        print(f"HF_ENDPOINT={endpoint}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.exit(0)


if __name__ == "__main__":
    main()

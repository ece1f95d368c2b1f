"""The load: requests over connections that stay open, and watches that stamp what they see with one clock.

Everything is timed by ``time.perf_counter`` of this process: when a request was sent, when it was answered, when the
watch brought the child. The clocks of API server and controller do not matter.
"""

import asyncio
import base64
import contextlib
import json
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Self

import aiohttp

from bench.operator import requests

Json = dict[str, Any]

CONNECTIONS = 32
"""Requests at the same time: enough to keep the API server busy, few enough that the handshakes do not count."""


class Client:
    """Requests as the admin of the kubeconfig (the JSON form that e2e.cluster writes)."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())
        self._server: str = config["clusters"][0]["cluster"]["server"]
        self._tls = _tls(config)
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        # Watches hold connections of their own; requests are limited by the semaphore, so that a request is stamped as
        # sent when it is, and not when it begins to wait for a connection.
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0, keepalive_timeout=600)
        self._session = aiohttp.ClientSession(
            self._server, connector=connector, timeout=aiohttp.ClientTimeout(total=60)
        )
        await asyncio.gather(*(self.get("/version") for _ in range(CONNECTIONS)))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, path: str, **query: str) -> Json:
        return await self._request("GET", path, query=query)

    async def count(self, path: str) -> int:
        """How many objects a collection has."""
        listed = await self.get(path, limit="1")
        return len(listed["items"]) + int(listed["metadata"].get("remainingItemCount", 0))

    async def create(self, path: str, body: Json) -> tuple[float, float]:
        """When the request was sent, and when it was answered."""
        async with self._slots:
            sent = time.perf_counter()
            await self._request("POST", path, body)
            return sent, time.perf_counter()

    async def patch(self, path: str, body: Json) -> tuple[float, float]:
        """A merge patch; when it was sent, and when it was answered."""
        async with self._slots:
            sent = time.perf_counter()
            await self._request("PATCH", path, body, content_type="application/merge-patch+json")
            return sent, time.perf_counter()

    async def delete_collection(self, path: str) -> None:
        await self._request("DELETE", path, {"propagationPolicy": "Background"})

    async def requests(self) -> requests.Requests:
        """What the API server has answered so far; not this request."""
        async with self._session.get("/metrics") as response:
            return requests.parse(await response.text())

    @contextlib.asynccontextmanager
    async def watching(self, path: str, notice: Callable[[Json, float], None]) -> AsyncIterator[None]:
        """While the body runs, call ``notice(event, moment)`` for whatever happens to a collection from now on."""
        version = (await self.get(path, limit="1"))["metadata"]["resourceVersion"]
        query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": "3600"}
        unlimited = aiohttp.ClientTimeout(total=None)
        async with self._session.get(path, params=query, timeout=unlimited, read_bufsize=2**20) as response:
            response.raise_for_status()

            async def read() -> None:
                async for line in response.content:
                    moment = time.perf_counter()
                    notice(json.loads(line), moment)
                raise RuntimeError(f"The watch of {path} ended before its time.")

            async with asyncio.TaskGroup() as group:  # an error of the reader ends the body
                reader = group.create_task(read())
                yield
                reader.cancel()

    async def _request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Json:
        data = None if body is None else json.dumps(body).encode()
        async with self._session.request(
            method, path, params=query, data=data, headers={"Content-Type": content_type}
        ) as response:
            text = await response.read()
            if response.status >= 300:
                raise RuntimeError(
                    f"{method} {path} was answered {response.status}: {text[:500].decode(errors='replace')}"
                )
        answer: Json = json.loads(text)
        return answer


def _tls(config: Json) -> ssl.SSLContext:
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    context = ssl.create_default_context(cadata=authority)
    with tempfile.NamedTemporaryFile() as pair:  # ssl reads a client certificate only from a file
        for part in ("client-certificate-data", "client-key-data"):
            pair.write(base64.b64decode(user[part]) + b"\n")
        pair.flush()
        context.load_cert_chain(pair.name)
    return context

"""A front of an API server that notes which rights its clients make use of.

It speaks plain HTTP on loopback and passes everything on, the client's token included, so that the API server behind it
authorises as ever. A right is counted as RBAC does: a server-side apply that creates needs `create` beside `patch`.
"""

import asyncio
import ssl
import threading
from typing import Self
from urllib.parse import parse_qs

import aiohttp
from aiohttp import web

Right = tuple[str, str, str]
"""(verb, API group, resource or resource/subresource)."""

_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_HOP_BY_HOP = {"host", "content-length", "transfer-encoding", "connection", "content-encoding", "accept-encoding"}


class Recorder:
    """Runs in a thread of its own while in its context; `used` and `refused` grow as requests are answered."""

    def __init__(self, server: str, ca: str) -> None:
        self._server = server
        self._ca = ca
        self.used: set[Right] = set()
        self.refused: list[str] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        context = ssl.create_default_context(cadata=self._ca)
        self._upstream = aiohttp.ClientSession(
            self._server,
            connector=aiohttp.TCPConnector(ssl=context, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )
        app = web.Application(client_max_size=16 << 20)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._upstream.close()
        watches = asyncio.all_tasks() - {asyncio.current_task()}
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        # Before it is passed on: who sees its effect may count on the note.
        right = needed(request.method, request.path, request.query_string)
        if right is not None:
            self.used.add(right)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        async with self._upstream.request(
            request.method, request.raw_path, headers=headers, data=await request.read() or None
        ) as answer:
            if answer.status in (401, 403):
                text = await answer.text()
                self.refused.append(f"{request.method} {request.path_qs}: {text}")
                return web.Response(status=answer.status, text=text, content_type=answer.content_type)
            if right is not None and request.method == "PATCH" and answer.status == 201:
                self.used.add(("create", *right[1:]))
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response


def needed(method: str, path: str, query: str) -> Right | None:
    """The right that a request needs; None if it is no request for a resource."""
    parts = path.strip("/").split("/")
    if parts[0] == "api":
        group, rest = "", parts[2:]
    elif parts[0] == "apis" and len(parts) >= 3:
        group, rest = parts[1], parts[3:]
    else:
        return None
    if len(rest) > 2 and rest[0] == "namespaces":
        rest = rest[2:]
    if not rest:
        return None
    resource = "/".join([rest[0], *rest[2:3]])
    if method == "GET":
        watching = parse_qs(query).get("watch", ["false"])[0].lower() in ("true", "1")
        return ("watch" if watching else "get" if len(rest) > 1 else "list", group, resource)
    return (_VERBS[method], group, resource)

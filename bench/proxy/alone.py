"""``python -m bench.proxy.alone PORT ENGINE-PORT``: the sidecar's proxy without the sidecar, behind a gate that lets all in.

Requests are read and answers are metered as in the sidecar. What is missing is what the sidecar costs beyond its proxy:
decisions, the accounts that they are made by, and all that is asked of the engine and of the sidecar itself.
"""

import asyncio
import sys
from dataclasses import replace

import uvloop

from kvplane_runtime.proxy import openai, sse
from kvplane_runtime.proxy.gate import End, Refusal, Relay
from kvplane_runtime.proxy.http1 import Request, RequestHead, ResponseHead
from kvplane_runtime.proxy.limits import Limits
from kvplane_runtime.proxy.reader import BodyReader
from kvplane_runtime.proxy.server import Proxy, prepare_process
from kvplane_runtime.proxy.upstream import UpstreamPool


class MeteredVisit:
    """One request: read, asked for usage, counted."""

    last_on_connection = False

    def __init__(self, endpoint: openai.Endpoint | None, reader: BodyReader) -> None:
        self._endpoint = endpoint
        self._reader = reader
        self._drop_usage = False

    def admit_now(self, request: Request) -> Request | Refusal | None:
        if self._endpoint is None:
            return request
        generation = self._reader.read_now(self._endpoint, request.body)
        return None if generation is None else self._read(request, generation)

    async def admit(self, request: Request) -> Request | Refusal:
        assert self._endpoint is not None  # else it was let in at once
        return self._read(request, await self._reader.read(self._endpoint, request.body))

    def _read(self, request: Request, generation: openai.Generation | Refusal) -> Request | Refusal:
        if isinstance(generation, Refusal):
            return generation
        edited = openai.with_usage(request.body, generation)
        self._drop_usage = edited is not None
        return request if edited is None else replace(request, body=edited)

    def answered(self, head: ResponseHead) -> Relay:
        if self._endpoint is None:
            return Relay()
        return Relay(sse.meter(head, self._endpoint, drop_usage=self._drop_usage, on_first_token=_nothing))

    def leave(self, end: End) -> None:
        del end


class OpenGate:
    """Lets everything in."""

    def __init__(self) -> None:
        self._reader = BodyReader()

    def enter(self, head: RequestHead) -> MeteredVisit:
        return MeteredVisit(openai.endpoint(head), self._reader)


def _nothing() -> None: ...


async def serve(port: int, engine_port: int) -> None:
    limits = Limits()
    upstream = UpstreamPool(host="127.0.0.1", port=engine_port, limits=limits)
    proxy = Proxy(gate=OpenGate(), upstream=upstream, limits=limits, max_body_bytes=lambda: 16 * 1024 * 1024)
    await proxy.listen(host="127.0.0.1", port=port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    prepare_process()
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))

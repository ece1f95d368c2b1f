"""Random bytes and random splits, over real sockets: nothing is misread, nothing crashes, nothing leaks."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvplane_runtime.proxy.limits import Limits
from tests.proxy.peers import HELLO, Client, Stage, UpstreamSocket, staged
from tests.proxy.test_failing import half_close
from tests.proxy.test_gate import Metering
from tests.proxy.test_sse import USAGE

FEW = settings(max_examples=60, deadline=None)
QUICK = Limits(header_seconds=0.2, body_seconds=0.2)
"""No upstream here is silent: each answers or hangs up, if only after a while on a busy machine."""
GET = b"GET /after HTTP/1.1\r\nHost: a\r\n\r\n"


@asynccontextmanager
async def without_errors(stage: Stage) -> AsyncIterator[Stage]:
    """Fails if a callback or a task of the proxy raised, and checks that it still serves."""
    raised: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: raised.append(context))
    yield stage
    await stage.settled()
    assert (await stage.ask(GET)).status in (200, 502, 504)
    assert not raised


BODIES = st.binary(max_size=200)


@st.composite
def a_request(draw: st.DrawFn, bodies: st.SearchStrategy[bytes] = BODIES) -> tuple[bytes, bytes]:
    """A valid request with a body, and that body."""
    body = draw(bodies)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
    if draw(st.booleans()):
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body), body
    cuts = sorted({0, len(body), *draw(st.lists(st.integers(0, len(body)), max_size=4))})
    chunks = [body[a:b] for a, b in itertools.pairwise(cuts)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n", body


CUTS = st.lists(st.integers(0, 2000), max_size=12)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    """``data`` in pieces."""
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


@FEW
@given(requests=st.lists(a_request(), min_size=1, max_size=4), cuts=CUTS)
async def test_any_split_of_the_bytes_gives_the_same_requests(
    requests: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    data = b"".join(request for request, _ in requests)
    async with staged() as stage, without_errors(stage):
        client = await stage.client()
        for piece in split(data, cuts):
            await client.send(piece)
            await asyncio.sleep(0)
        for _ in requests:
            assert (await client.response()).status == 200
        assert [body for _, body in stage.upstream.requests] == [body for _, body in requests]


TOKENS = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\n",
        b"POST / HTTP/1.0\r\n",
        b"Host: a\r\n",
        b"Content-Length: 3\r\n",
        b"Content-Length: -1\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"Connection: host, content-length\r\n",
        b"Expect: 100-continue\r\n",
        b"Upgrade: h2c\r\nConnection: upgrade\r\n",
        b"\r\n",
        b"\n",
        b"\r",
        b"3\r\nabc\r\n",
        b"0\r\n\r\n",
        b"abc",
        b"\x00",
        b"\xff\xfe",
    ]
)
GARBAGE = st.one_of(st.binary(max_size=300), st.lists(TOKENS, max_size=12).map(b"".join))


async def say_and_go(client: Client, data: bytes, cut: int, *, half_closes: bool) -> None:
    """Sends it in two pieces; then waits for the other side to close, or is gone."""
    for piece in split(data, [cut]):
        await client.send(piece)
        await asyncio.sleep(0)
    if half_closes:
        half_close(client)
        await client.closed()
    else:
        await asyncio.sleep(0.002)
        client.abort()


@FEW
@given(data=GARBAGE, cut=st.integers(0, 300), half_closes=st.booleans())
async def test_garbage_from_a_client_harms_nobody(data: bytes, cut: int, half_closes: bool) -> None:
    async with staged(limits=QUICK) as stage, without_errors(stage):
        await say_and_go(await stage.client(), data, cut, half_closes=half_closes)


RESPONSE_TOKENS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n",
        b"HTTP/1.0 200 OK\r\n",
        b"content-length: 3\r\n",
        b"content-length: 5\r\n",
        b"transfer-encoding: chunked\r\n",
        b"content-type: text/event-stream\r\n",
        b"connection: close\r\n",
        b"\r\n",
        b"\n",
        b"3\r\nabc\r\n",
        b"0\r\n\r\n",
        b"abc",
        b'c\r\n"choices":[{\r\n',
        b"%x\r\n%b\r\n" % (len(USAGE), USAGE),
        b"2\r\n\n\n\r\n",
        HELLO,
        b"\x00",
    ]
)


@FEW
@given(
    answer=st.one_of(st.binary(max_size=100), st.lists(RESPONSE_TOKENS, max_size=8).map(b"".join)),
    version=st.sampled_from([b"1.0", b"1.1"]),
    metering=st.none() | st.builds(Metering, drop_usage=st.booleans()),
)
async def test_garbage_from_the_upstream_harms_nobody(answer: bytes, version: bytes, metering: Metering | None) -> None:
    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(answer)

    async with staged(script, limits=QUICK) as stage, without_errors(stage):
        stage.gate.meter = metering or stage.gate.meter
        client = await stage.client()
        await client.send(b"GET / HTTP/%b\r\nHost: a\r\nConnection: close\r\n\r\n" % version)
        received = await client.closed()
        assert received.startswith((b"HTTP/1.1 2", b"HTTP/1.1 502")) or not received

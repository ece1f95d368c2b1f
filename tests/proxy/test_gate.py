"""The seam: what tickets are asked, what they can do to requests and answers, and that each is left once."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from kvplane_runtime.proxy.gate import Again, End, Refusal
from kvplane_runtime.proxy.http1 import Request, ResponseHead
from kvplane_runtime.proxy.limits import Limits
from kvplane_runtime.proxy.openai import Endpoint
from kvplane_runtime.proxy.sse import StreamMeter, Usage, meter
from tests.proxy.peers import HELLO, Client, Script, Stage, UpstreamSocket, answer_hello, staged, until
from tests.proxy.test_sse import CHAT, DONE, LAST, ROLE, TOKEN, USAGE

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
OVERLOADED = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nfull"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
BUSY = Refusal(429, "engine_overloaded", "The engine has no room; retry.", 2, reason="kv")


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def streaming(
    *writes: bytes, head: bytes = SSE + b"transfer-encoding: chunked\r\n\r\n", end: bytes = b"0\r\n\r\n"
) -> Script:
    """An upstream that streams these writes, each by itself, and keeps the connection."""

    async def script(socket: UpstreamSocket) -> None:
        while True:
            await socket.request()
            await socket.send(head)
            for write in (*writes, end):
                await asyncio.sleep(0.001)
                await socket.send(write)

    return script


@dataclass
class Metering:
    """Makes meters that drop usage, and keeps them."""

    drop_usage: bool = True
    meters: list[StreamMeter] = field(default_factory=list)
    first_tokens: int = 0

    def __call__(self, head: ResponseHead) -> StreamMeter | None:
        made = meter(head, Endpoint.CHAT, drop_usage=self.drop_usage, on_first_token=self._first)
        if isinstance(made, StreamMeter):
            self.meters.append(made)
            return made
        return None

    def _first(self) -> None:
        self.first_tokens += 1


# Requests.


async def test_the_request_that_admission_returns_is_sent() -> None:
    async with staged() as stage:
        stage.gate.edit = lambda request: replace(request, body=b'{"more":1}')
        assert (await stage.ask(POST)).status == 200
        head, body = stage.upstream.requests[0]
        assert body == b'{"more":1}'
        assert b"content-length: 10\r\n" in head


async def test_a_refusal_names_what_was_short() -> None:
    async with staged() as stage:
        stage.gate.refusal_after_body = replace(BUSY, param="prompt")
        response = await stage.ask(POST)
        assert (response.status, response.header(b"x-kvplane-reason")) == (429, b"kv")
        assert json.loads(response.body)["error"] == {
            "message": "The engine has no room; retry.",
            "type": "rate_limit_error",
            "param": "prompt",
            "code": "engine_overloaded",
        }
        stage.gate.refusal_after_body = Refusal(400, "x", "No.")
        assert (await stage.ask(POST)).header(b"x-kvplane-reason") is None


# Answers.


def first_overloaded(times: int) -> Script:
    """An upstream whose first answers, over all connections, are 503."""
    left = times

    async def script(socket: UpstreamSocket) -> None:
        nonlocal left
        while True:
            await socket.request()
            left -= 1
            await socket.send(OVERLOADED if left >= 0 else HELLO)

    return script


async def test_an_answer_can_be_dropped_and_the_request_admitted_again() -> None:
    async with staged(first_overloaded(1)) as stage:
        stage.gate.verdicts = [Again()]
        client = await stage.client()
        for _ in range(2):
            response = await client.ask(POST)
            assert (response.status, response.body) == (200, b"hello")
        assert stage.gate.answered == [503, 200, 200]
        assert [request.body for request in stage.gate.admitted] == [b"{}"] * 3
        assert (stage.gate.entered, stage.gate.completed) == (2, [True, True])
        assert stage.proxy.stats.responses == {(200, "engine"): 2}


async def test_each_admission_starts_from_the_request_as_it_came() -> None:
    async with staged(first_overloaded(1)) as stage:
        stage.gate.verdicts = [Again()]
        stage.gate.edit = lambda request: replace(request, body=request.body + b"!")
        await stage.ask(POST)
        assert [body for _, body in stage.upstream.requests] == [b"{}!", b"{}!"]


async def test_an_answer_can_be_replaced_by_a_refusal() -> None:
    async with staged(first_overloaded(2)) as stage:
        stage.gate.verdicts = [Again(), BUSY]
        client = await stage.client()
        response = await client.ask(POST)
        assert (response.status, response.header(b"retry-after")) == (429, b"2")
        assert b"full" not in response.body
        assert (await client.ask(POST)).status == 200
        assert stage.gate.completed == [False, True]
        assert stage.proxy.stats.responses == {(429, "proxy"): 1, (200, "engine"): 1}


async def test_the_rest_of_a_dropped_answer_is_not_waited_for() -> None:
    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(b"HTTP/1.1 503 Service Unavailable\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        await socket.hung_up()

    async with staged(script) as stage:
        stage.gate.verdicts = [BUSY]
        assert (await stage.ask(POST)).status == 429


async def test_a_client_that_goes_while_it_waits_anew_leaves() -> None:
    async with staged(first_overloaded(1)) as stage:
        stage.gate.verdicts = [Again()]
        client = await stage.client()
        stage.gate.hold = asyncio.Event()
        await client.send(POST)
        await until(lambda: len(stage.gate.admitted) == 1)
        stage.gate.hold.set()
        stage.gate.hold = asyncio.Event()
        await until(lambda: len(stage.gate.admitted) == 2)
        client.abort()
        await stage.settled()
        assert stage.gate.completed == [False]


# Bodies.

BODY = b"".join(event for event in CHAT if event is not USAGE)


@pytest.mark.parametrize(
    "writes",
    [
        [chunks(event) for event in CHAT],
        [chunks(*CHAT)],
        [chunks(b"".join(CHAT))],
        [bytes([byte]) for byte in chunks(*CHAT)],
        [chunks(*(bytes([byte]) for byte in b"".join(CHAT)))],
        [b"5;x=y\r\n" + ROLE[:5] + b"\r\n" + chunks(ROLE[5:], TOKEN, LAST, USAGE, DONE)],
    ],
    ids=["event by event", "at once", "one chunk", "byte by byte", "chunks of one byte", "extensions"],
)
async def test_a_metered_stream_is_well_framed_whatever_the_split(writes: list[bytes]) -> None:
    async with staged(streaming(*writes)) as stage:
        stage.gate.meter = metering = Metering()
        client = await stage.client()
        for number in (1, 2):
            response = await client.ask(POST)
            assert (response.body, response.header(b"transfer-encoding")) == (BODY, b"chunked")
            assert metering.first_tokens == number
        assert [(made.token_events, made.usage()) for made in metering.meters] == [(2, Usage(5, 2))] * 2
        assert stage.gate.completed == [True, True]
        assert len(stage.upstream.sockets) == 1


async def test_each_event_of_a_metered_stream_passes_when_it_comes() -> None:
    taken = asyncio.Semaphore(0)

    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(SSE + b"transfer-encoding: chunked\r\n\r\n")
        for event in CHAT:
            await socket.send(chunks(event))
            if event is not USAGE:
                await taken.acquire()  # the next is made only once the client has this one
        await socket.send(b"0\r\n\r\n")

    async with staged(script) as stage:
        stage.gate.meter = Metering()
        client = await stage.client()
        await client.send(POST)
        await client.head()
        for event in (ROLE, TOKEN, LAST, DONE):
            assert await client.chunk() == event
            taken.release()
        assert await client.chunk() == b""
        await stage.settled()


async def test_what_was_held_back_comes_with_the_end() -> None:
    async with staged(streaming(chunks(TOKEN[:-1]))) as stage:
        stage.gate.meter = Metering()
        assert (await stage.ask(POST)).body == TOKEN[:-1]


async def test_an_http_1_0_client_gets_a_metered_stream_without_chunks() -> None:
    async with staged(streaming(*map(chunks, CHAT))) as stage:
        stage.gate.meter = metering = Metering()
        response = await stage.ask(b"POST / HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}")
        assert (response.header(b"transfer-encoding"), response.body) == (None, BODY)
        assert metering.meters[0].token_events == 2


async def test_a_metered_stream_can_end_with_its_connection() -> None:
    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(SSE + b"\r\n" + b"".join(CHAT))

    async with staged(script) as stage:
        stage.gate.meter = metering = Metering()
        assert (await stage.ask(POST)).body == BODY
        assert metering.meters[0].usage() == Usage(5, 2)
        assert stage.gate.completed == [True]


async def test_a_metered_body_of_announced_length_keeps_it() -> None:
    whole = b"".join(CHAT)
    head = SSE + b"content-length: %d\r\n\r\n" % len(whole)
    async with staged(streaming(whole[:50], whole[50:], head=head, end=b"")) as stage:
        stage.gate.meter = metering = Metering()
        assert (await stage.ask(POST)).body == whole
        assert metering.meters[0].usage() == Usage(5, 2)


async def test_a_metered_stream_that_breaks_off_is_cut_for_the_client() -> None:
    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(SSE + b"transfer-encoding: chunked\r\n\r\n" + chunks(ROLE, TOKEN, TOKEN[:9]))

    async with staged(script) as stage:
        stage.gate.meter = metering = Metering()
        client = await stage.client()
        await client.send(POST)
        received = await client.closed()
        assert received.endswith(chunks(ROLE + TOKEN)) or received.endswith(chunks(TOKEN))
        assert metering.meters[0].token_events == 1
        assert stage.gate.ends == [End.UNSERVED]


@pytest.mark.parametrize(
    "garbage",
    [
        [chunks(b"no event at all")],
        [chunks(b"\x00" * 100_000)],
        [chunks(b"data: {\n\n", b'data: {"choices":[{]}\n\n', b'data: "usage":{"choices":[]\n\n')],
        [chunks(b'{"object":"list"}')],
    ],
)
@pytest.mark.parametrize("drop_usage", [False, True])
async def test_an_engine_that_streams_no_events_passes(garbage: list[bytes], drop_usage: bool) -> None:
    async with staged(streaming(*garbage)) as stage:
        stage.gate.meter = Metering(drop_usage=drop_usage)
        response = await stage.ask(POST)
        assert response.status == 200
        if not drop_usage:
            assert chunks(response.body) == chunks(b"".join(_payloads(b"".join(garbage))))


def _payloads(framed: bytes) -> list[bytes]:
    found = []
    while framed:
        size, _, framed = framed.partition(b"\r\n")
        found.append(framed[: int(size, 16)])
        framed = framed[int(size, 16) + 2 :]
    return found


# Outcomes.


async def test_completed_is_told_of_whole_answers_only() -> None:
    async with staged(answer_hello) as stage:
        await stage.ask(POST)
        stage.gate.refusal_after_body = BUSY
        await stage.ask(POST)
        assert stage.gate.completed == [True, False]


async def _refused_body(stage: Stage) -> Client:
    client = await stage.client()
    await client.send(POST.replace(b"Content-Length: 2\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n"))
    return client


async def _slow_body(stage: Stage) -> Client:
    client = await stage.client()
    await client.send(POST[:-1])
    return client


async def _silent_engine(stage: Stage) -> Client:
    client = await stage.client()
    await client.send(POST)
    return client


async def _client_goes(stage: Stage) -> Client:
    client = await _silent_engine(stage)
    await until(lambda: bool(stage.upstream.requests))
    client.abort()
    return client


@pytest.mark.parametrize(
    ("fault", "end", "limits"),
    [
        (_refused_body, End.UNSERVED, Limits()),
        (_slow_body, End.UNSERVED, Limits(body_seconds=0.05)),
        (_silent_engine, End.UNSERVED, Limits(silence_seconds=0.3)),
        (_client_goes, End.ABANDONED, Limits()),
    ],
)
async def test_a_request_that_fails_is_left_once_and_says_how_it_ended(
    fault: Callable[[Stage], object], end: End, limits: Limits
) -> None:
    async def silent(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.hung_up()

    async with staged(silent, limits=limits) as stage:
        await fault(stage)  # type: ignore[misc]
        await until(lambda: bool(stage.gate.ends))
        assert stage.gate.ends == [end]


async def test_admission_that_fails_by_its_own_fault_drops_the_connection_and_leaves() -> None:
    def broken(request: Request) -> Request:
        raise ZeroDivisionError

    async with staged() as stage:
        stage.gate.edit = broken
        client = await stage.client()
        await client.send(POST)
        assert await client.closed() == b""
        await stage.settled()
        assert stage.gate.completed == [False]


async def test_a_ticket_that_fails_at_the_answer_ends_the_request() -> None:
    def broken(head: ResponseHead) -> None:
        raise ZeroDivisionError

    raised: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context["exception"]))
    async with staged() as stage:
        stage.gate.meter = broken
        assert (await stage.ask(POST)).status == 502
        await stage.settled()
        assert stage.gate.completed == [False]
    assert [type(error) for error in raised] == [ZeroDivisionError]

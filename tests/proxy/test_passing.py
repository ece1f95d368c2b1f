"""Requests and responses that pass: framing, fields, streaming, connections."""

import asyncio
import re

import pytest

from kvplane_runtime.proxy.limits import Limits
from tests.proxy.peers import Script, UpstreamSocket, header, staged, until

GET = b"GET /x HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


def answer(response: bytes) -> Script:
    """An upstream that answers everything with these bytes."""

    async def script(socket: UpstreamSocket) -> None:
        while True:
            await socket.request()
            await socket.send(response)

    return script


async def test_a_body_passes_with_its_length() -> None:
    async with staged() as stage:
        response = await stage.ask(POST + b"Content-Length: 7\r\n\r\n{\xff\x00\r\n\r}")
        assert (response.status, response.body) == (200, b"hello")
        assert stage.upstream.requests[0][1] == b"{\xff\x00\r\n\r}"


async def test_a_chunked_body_reaches_the_upstream_counted() -> None:
    async with staged() as stage:
        client = await stage.client()
        await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n")
        await client.send(b"3;x=y\r\nabc\r\n0\r\nX: y\r\n\r\n")
        assert (await client.response()).status == 200
        head, body = stage.upstream.requests[0]
        assert (header(head, b"content-length"), body) == (b"5", b"{}abc")


async def test_the_request_id_is_kept_or_made_and_the_trace_context_kept() -> None:
    async with staged() as stage:
        client = await stage.client()
        kept = await client.ask(GET + b"X-Request-ID: mine\r\ntraceparent: 00-ab-cd-01\r\ntracestate: a=1,b=2\r\n\r\n")
        made = await client.ask(GET + b"X-Request-ID: a b\r\n\r\n")
        heads = [head for head, _ in stage.upstream.requests]
        assert kept.header(b"x-request-id") == header(heads[0], b"x-request-id") == b"mine"
        assert header(heads[0], b"traceparent") == b"00-ab-cd-01"
        assert header(heads[0], b"tracestate") == b"a=1,b=2"
        assert re.fullmatch(rb"[0-9a-f]{32}", made.header(b"x-request-id") or b"")
        assert made.header(b"x-request-id") == header(heads[1], b"x-request-id")


async def test_an_upstreams_own_request_id_is_not_doubled() -> None:
    async with staged(answer(b"HTTP/1.1 200 OK\r\nX-Request-Id: theirs\r\ncontent-length: 0\r\n\r\n")) as stage:
        assert (await stage.ask(GET + b"\r\n")).header(b"x-request-id") == b"theirs"


async def test_each_event_is_written_when_it_comes() -> None:
    events = [b"data: %d\n\n" % number for number in range(5)]
    taken = asyncio.Semaphore(0)

    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in events:
            await socket.send(b"%x\r\n%b\r\n" % (len(event), event))
            await taken.acquire()  # the next is made only once the client has this one
        await socket.send(b"0\r\n\r\n")

    async with staged(script) as stage:
        client = await stage.client()
        await client.send(POST + b"Content-Length: 2\r\n\r\n{}")
        head = await client.head()
        assert header(head, b"content-type") == b"text/event-stream"
        for event in events:
            assert await client.chunk() == event
            taken.release()
        assert await client.chunk() == b""
        await stage.settled()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
async def test_a_response_passes_however_it_is_split(size: int) -> None:
    whole = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"

    async def script(socket: UpstreamSocket) -> None:
        while True:
            await socket.request()
            for start in range(0, len(whole), size):
                await socket.send(whole[start : start + size])
                await asyncio.sleep(0)

    async with staged(script) as stage:
        client = await stage.client()
        for _ in range(2):
            assert (await client.ask(GET + b"\r\n")).body == b"abcde"
        assert len(stage.upstream.sockets) == 1


async def test_connections_are_kept_on_both_sides() -> None:
    async with staged() as stage:
        client = await stage.client()
        for _ in range(3):
            assert (await client.ask(GET + b"\r\n")).body == b"hello"
        assert len(stage.upstream.sockets) == 1
        assert len(stage.upstream.requests) == 3


async def test_a_connection_ends_when_the_client_says_so() -> None:
    async with staged() as stage:
        client = await stage.client()
        response = await client.ask(GET + b"Connection: close\r\n\r\n")
        assert response.header(b"connection") == b"close"
        assert await client.closed() == b""
        assert header(stage.upstream.requests[0][0], b"connection") is None


async def test_pipelined_requests_are_answered_in_order() -> None:
    async def script(socket: UpstreamSocket) -> None:
        while True:
            _, body = await socket.request()
            await socket.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    async with staged(script) as stage:
        client = await stage.client()
        await client.send(
            POST
            + b"Content-Length: 1\r\n\r\n1"
            + POST
            + b"Transfer-Encoding: chunked\r\n\r\n1\r\n2\r\n0\r\n\r\n"
            + POST
            + b"Content-Length: 1\r\n\r\n3"
        )
        assert [(await client.response()).body for _ in range(3)] == [b"1", b"2", b"3"]
        assert stage.gate.entered == 3


async def test_more_pipelined_bytes_than_are_kept_wait_in_the_socket() -> None:
    async with staged(limits=Limits(max_pipelined_bytes=100)) as stage:
        stage.gate.hold = asyncio.Event()
        client = await stage.client()
        await client.send((GET + b"\r\n") * 200)
        await until(lambda: bool(stage.gate.inside))
        stage.gate.hold.set()
        for _ in range(200):
            assert (await client.response()).body == b"hello"


@pytest.mark.parametrize(
    ("request_line", "response", "body"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", b""),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", b""),
        (b"GET", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b""),
        (b"GET", b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx", b"x"),
    ],
)
async def test_responses_without_a_body_leave_the_connection_usable(
    request_line: bytes, response: bytes, body: bytes
) -> None:
    async with staged(answer(response)) as stage:
        client = await stage.client()
        for _ in range(2):
            answered = await client.ask(request_line + b" / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert answered.body == body
            assert b"Early" not in answered.head
        assert len(stage.upstream.sockets) == 1


async def test_a_response_that_ends_with_its_connection_ends_the_clients_too() -> None:
    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(b"HTTP/1.1 200 OK\r\n\r\nall of it")

    async with staged(script) as stage:
        response = await stage.ask(GET + b"\r\n")
        assert (response.header(b"connection"), response.body) == (b"close", b"all of it")


async def test_an_http_1_0_client_gets_a_chunked_response_decoded() -> None:
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    async with staged(answer(chunked)) as stage:
        response = await stage.ask(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert response.header(b"transfer-encoding") is None
        assert (response.header(b"connection"), response.body) == (b"close", b"abcde")


async def test_an_http_1_0_client_can_keep_its_connection() -> None:
    async with staged() as stage:
        client = await stage.client()
        for _ in range(2):
            response = await client.ask(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert (response.header(b"connection"), response.body) == (b"keep-alive", b"hello")


async def test_a_client_that_asks_first_is_told_to_continue() -> None:
    async with staged() as stage:
        client = await stage.client()
        await client.send(POST + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.response()).status == 100
        assert not stage.upstream.requests
        assert (await client.ask(b"{}")).status == 200
        assert header(stage.upstream.requests[0][0], b"expect") is None


async def test_nothing_is_sent_upstream_before_the_body_is_complete() -> None:
    async with staged() as stage:
        client = await stage.client()
        await client.send(POST + b"Content-Length: 4\r\n\r\n{")
        await until(lambda: bool(stage.gate.inside))
        assert stage.proxy.held_bytes == 1
        assert not stage.upstream.sockets
        assert (await client.ask(b"  }")).status == 200
        assert stage.gate.admitted[0].body == b"{  }"


async def test_unknown_paths_pass() -> None:
    async with staged() as stage:
        await stage.ask(b"PURGE /../any?thing=%20 HTTP/1.1\r\nHost: a\r\n\r\n")
        assert stage.upstream.requests[0][0].startswith(b"PURGE /../any?thing=%20 HTTP/1.1\r\n")


async def test_the_gate_can_make_a_request_the_last_on_its_connection() -> None:
    async with staged() as stage:
        client = await stage.client()
        assert (await client.ask(GET + b"\r\n")).header(b"connection") is None
        stage.gate.last_on_connection = True
        assert (await client.ask(GET + b"\r\n")).header(b"connection") == b"close"
        assert await client.closed() == b""


async def test_when_the_proxy_stops_requests_in_flight_are_finished() -> None:
    async with staged() as stage:
        stage.gate.hold = asyncio.Event()
        idle, busy = await stage.client(), await stage.client()
        await busy.send(GET + b"\r\n")
        await until(lambda: bool(stage.gate.inside))
        stage.proxy.stop_accepting()
        assert await idle.closed() == b""
        stage.gate.hold.set()
        response = await busy.response()
        assert (response.body, response.header(b"connection")) == (b"hello", b"close")
        with pytest.raises(ConnectionRefusedError):
            await stage.client()


async def test_counters_say_who_answered() -> None:
    async with staged() as stage:
        await stage.ask(GET + b"\r\n")
        await stage.ask(b"nonsense\r\n\r\n")
        assert stage.proxy.stats.responses == {(200, "engine"): 1, (400, "proxy"): 1}

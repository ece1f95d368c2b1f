"""What goes wrong behind and before the proxy: every request still ends, and leaves nothing behind."""

import asyncio
import json
from unittest.mock import create_autospec

import pytest

from kvplane_runtime.proxy.limits import Limits
from kvplane_runtime.proxy.server import ClientConnection
from tests.proxy.peers import HELLO, Client, Script, UpstreamSocket, answer_hello, staged, until

GET = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS = CHUNKED + b"5\r\nhello\r\n"


def once(response: bytes) -> Script:
    """An upstream that answers one request per connection with these bytes and closes."""

    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(response)

    return script


async def silent(socket: UpstreamSocket) -> None:
    """An upstream that takes a request and never answers."""
    await socket.request()
    await socket.hung_up()


IMPROPER = [
    b"",
    b"HTTP/1.1 200 OK\r\ncontent-le",
    b"garbage that is no HTTP\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nx: " + b"x" * 40_000 + b"\r\n\r\n",
    CHUNKED + b"nonsense\r\n",
    CHUNKED + b"5\r\nhello\r\nnonsense\r\n",
]
"""Answers in which no client gets a byte of the upstream's."""


@pytest.mark.parametrize("response", IMPROPER)
async def test_an_upstream_that_does_not_answer_properly_is_a_502(response: bytes) -> None:
    async with staged(once(response)) as stage:
        client = await stage.client()
        for _ in range(2):
            answered = await client.ask(POST)
            assert (answered.status, json.loads(answered.body)["error"]["code"]) == (502, "engine_error")


async def test_an_upstream_that_is_not_there_is_a_503() -> None:
    async with staged() as stage:
        await stage.upstream.stop()
        answered = await stage.ask(POST)
        assert (answered.status, answered.header(b"retry-after")) == (503, b"1")
        assert json.loads(answered.body)["error"]["code"] == "engine_unavailable"


async def test_an_upstream_that_is_silent_is_a_504() -> None:
    async with staged(silent, limits=Limits(silence_seconds=0.05)) as stage:
        answered = await stage.ask(POST)
        assert (answered.status, json.loads(answered.body)["error"]["code"]) == (504, "engine_timeout")


@pytest.mark.parametrize(
    "response",
    [
        [ENDLESS],
        [CHUNKED],
        [ENDLESS, b"5\r\nhello\r\nnonsense\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello"],
    ],
)
async def test_a_response_that_breaks_off_breaks_off_for_the_client(response: list[bytes]) -> None:
    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        for piece in response:
            await socket.send(piece)
            await until(lambda: bool(stage.gate.answered))  # the first is taken by itself

    async with staged(script) as stage:
        client = await stage.client()
        await client.send(POST)
        rest = await client.closed()
        assert rest.startswith(b"HTTP/1.1 200 OK")
        assert not rest.endswith(b"0\r\n\r\n")
        assert stage.proxy.stats.cut_responses == 1
        assert stage.gate.completed == [False]


async def test_a_stream_that_falls_silent_is_cut() -> None:
    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(ENDLESS)
        await socket.hung_up()

    # So long that the beginning of the answer is in time on a busy machine too.
    async with staged(script, limits=Limits(silence_seconds=1)) as stage:
        client = await stage.client()
        await client.send(POST)
        assert (await client.closed()).endswith(b"5\r\nhello\r\n")


async def test_an_engine_that_restarts_in_mid_stream_serves_the_next_request() -> None:
    async with staged(once(ENDLESS)) as stage:
        port = stage.upstream.port
        client = await stage.client()
        await client.send(POST)
        assert not (await client.closed()).endswith(b"0\r\n\r\n")
        await stage.upstream.stop()
        assert (await stage.ask(POST)).status == 503
        stage.upstream.script = answer_hello
        await stage.upstream.start(port)
        assert (await stage.ask(POST)).status == 200
        await stage.settled()
        assert stage.gate.completed == [False, False, True]


async def test_bytes_behind_a_response_never_reach_a_client() -> None:
    """Response splitting: what nobody asked for must not answer the next request."""

    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(HELLO + b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nEVIL!")
        await socket.hung_up()

    async with staged(script) as stage:
        client = await stage.client()
        for _ in range(3):
            assert (await client.ask(GET)).body == b"hello"
        assert len(stage.upstream.sockets) == 3


async def test_unasked_bytes_on_an_idle_connection_end_it() -> None:
    sent = asyncio.Event()

    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(HELLO)
        await sent.wait()
        await socket.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nEVIL!")
        await socket.hung_up()

    async with staged(script) as stage:
        assert (await stage.ask(GET)).body == b"hello"
        sent.set()
        await stage.upstream.sockets[0].hung_up()
        assert (await stage.ask(GET)).body == b"hello"


# Reuse of upstream connections.


async def close_at_second_request(socket: UpstreamSocket) -> None:
    await socket.request()
    await socket.send(HELLO)
    await socket.request()


async def test_an_idempotent_request_on_a_stale_connection_is_sent_again() -> None:
    async with staged(close_at_second_request) as stage:
        client = await stage.client()
        for _ in range(3):
            assert (await client.ask(GET)).status == 200
        assert stage.proxy.stats.retries == 2


async def test_a_post_on_a_stale_connection_is_not_sent_again() -> None:
    """The upstream may have acted on it before it went."""
    async with staged(close_at_second_request) as stage:
        client = await stage.client()
        assert [(await client.ask(POST)).status for _ in range(2)] == [200, 502]
        assert stage.proxy.stats.retries == 0


async def test_a_connection_that_was_seen_to_close_is_not_used() -> None:
    async with staged(once(HELLO)) as stage:
        client = await stage.client()
        assert (await client.ask(POST)).status == 200
        await stage.upstream.sockets[0].writer.wait_closed()
        await until(lambda: not stage.proxy.upstream._idle)  # the proxy has seen it
        assert (await client.ask(POST)).status == 200


async def test_a_connection_idle_for_too_long_is_not_used() -> None:
    async with staged(limits=Limits(upstream_idle_seconds=0.02)) as stage:
        client = await stage.client()
        for _ in range(2):
            assert (await client.ask(POST)).status == 200
            await asyncio.sleep(0.03)
        assert len(stage.upstream.sockets) == 2


async def test_a_fresh_connection_that_closes_is_not_tried_again() -> None:
    async with staged(once(b"")) as stage:
        assert (await stage.ask(GET)).status == 502
        assert len(stage.upstream.sockets) == 1


# Clients that go.


def half_close(client: Client) -> None:
    client.writer.write_eof()


@pytest.mark.parametrize("leave", [Client.abort, lambda client: client.writer.close(), half_close])
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_goes_aborts_its_request(leave, streaming: bool) -> None:  # type: ignore[no-untyped-def]
    gone = asyncio.Event()

    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        if streaming:
            await socket.send(ENDLESS)
        await socket.hung_up()
        gone.set()

    async with staged(script) as stage:
        client = await stage.client()
        await client.send(POST)
        if streaming:
            await client.head()
        await until(lambda: bool(stage.upstream.requests))
        leave(client)
        async with asyncio.timeout(5):
            await gone.wait()
        await stage.settled()
        assert stage.proxy.stats.client_disconnects == 1


async def test_a_client_that_goes_while_it_waits_at_the_gate_never_reaches_the_upstream() -> None:
    async with staged() as stage:
        stage.gate.hold = asyncio.Event()
        client = await stage.client()
        await client.send(POST)
        await until(lambda: bool(stage.gate.admitted))
        client.abort()
        await stage.settled()
        stage.gate.hold.set()
        assert (await stage.ask(GET)).status == 200
        assert [body for _, body in stage.upstream.requests] == [b""]


async def test_a_client_that_goes_in_the_turn_of_its_request_ends_what_was_sent() -> None:
    gone = asyncio.Event()

    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(HELLO)
        await socket.hung_up()
        gone.set()

    async with staged(script) as stage:
        assert (await stage.ask(GET)).status == 200  # leaves an idle connection behind
        connection = ClientConnection(stage.proxy, asyncio.get_running_loop())
        connection.connection_made(create_autospec(asyncio.Transport, instance=True))
        connection.data_received(POST)
        assert stage.gate.inside
        connection.connection_lost(None)
        assert not stage.gate.inside
        async with asyncio.timeout(5):
            await gone.wait()


async def test_a_client_that_goes_while_it_uploads_leaves_the_gate() -> None:
    async with staged() as stage:
        client = await stage.client()
        await client.send(POST[:-1])
        await until(lambda: bool(stage.gate.inside))
        client.abort()
        await stage.settled()


# Backpressure.

BIG = 64 * 1024 * 1024


async def test_a_slow_client_slows_its_upstream_and_not_the_proxys_memory() -> None:
    sent = 0

    async def script(socket: UpstreamSocket) -> None:
        nonlocal sent
        await socket.request()
        await socket.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % BIG)
        piece = b"x" * 65536
        while sent < BIG:
            await socket.send(piece)
            sent += len(piece)
        await socket.hung_up()

    async with staged(script) as stage:
        client = await stage.client()
        client.reader._limit = 1024  # type: ignore[attr-defined]  # asyncio pauses reading beyond twice this
        await client.send(GET)
        before = -1
        while before != sent or not sent:  # until nothing moves any more
            before = sent
            await asyncio.sleep(0.1)
        assert sent < BIG // 2
        (connection,) = stage.proxy.connections
        assert connection._transport.get_write_buffer_size() < 1024 * 1024
        taken = 0
        await client.head()
        while taken < BIG:
            taken += len(await client.reader.read(1 << 20))
        assert taken == BIG
        await stage.settled()


async def test_a_client_that_stops_reading_is_dropped() -> None:
    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(CHUNKED)
        piece = b"%x\r\n%b\r\n" % (65536, b"x" * 65536)
        while True:
            await socket.send(piece)

    async with staged(script, limits=Limits(stall_seconds=0.2)) as stage:
        client = await stage.client()
        client.reader._limit = 1024  # type: ignore[attr-defined]
        await client.send(GET)
        await until(lambda: bool(stage.gate.entered))
        await stage.settled()
        assert stage.proxy.stats.client_disconnects == 1


async def test_a_client_that_goes_with_bytes_still_waiting_for_it_aborts_its_request() -> None:
    gone = asyncio.Event()

    async def script(socket: UpstreamSocket) -> None:
        await socket.request()
        await socket.send(CHUNKED)
        try:
            while True:
                await socket.send(b"10000\r\n%b\r\n" % (b"x" * 65536))
        finally:
            gone.set()

    async with staged(script) as stage:
        client = await stage.client()
        client.reader._limit = 1024  # type: ignore[attr-defined]
        await client.send(GET)
        await until(lambda: any(c._write_paused for c in stage.proxy.connections))
        half_close(client)
        async with asyncio.timeout(5):
            await gone.wait()
        await stage.settled()


async def test_a_slow_upstream_gets_a_large_body_whole() -> None:
    body = b"x" * 8_000_000

    async def script(socket: UpstreamSocket) -> None:
        head = await socket.reader.readuntil(b"\r\n\r\n")
        taken = 0
        while taken < len(body):
            taken += len(await socket.reader.read(100_000))
            await asyncio.sleep(0)
        socket.requests.append((head, b""))
        await socket.send(HELLO)

    async with staged(script, max_body_bytes=len(body)) as stage:
        assert (
            await stage.ask(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        ).status == 200


async def test_an_early_answer_to_a_body_that_is_not_read_passes() -> None:
    """The upstream's connection is not used again: half of the body is still on its way."""

    async def script(socket: UpstreamSocket) -> None:
        await socket.reader.readuntil(b"\r\n\r\n")
        await socket.send(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 2\r\n\r\nno")
        await socket.hung_up()

    body = b"x" * 8_000_000
    async with staged(script, max_body_bytes=len(body)) as stage:
        client = await stage.client()
        for _ in range(2):
            request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            assert (await client.ask(request)).body == b"no"


async def test_many_clients_at_once_leave_nothing_behind() -> None:
    async with staged(answer_hello) as stage:

        async def one(number: int) -> None:
            client = await stage.client()
            for _ in range(3):
                if number % 3:
                    assert (await client.ask(POST)).status == 200
                else:
                    await client.send(POST)
            client.abort()

        await asyncio.gather(*(one(number) for number in range(60)))
        await stage.settled()

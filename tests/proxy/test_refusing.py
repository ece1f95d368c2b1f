"""Requests that are refused: an OpenAI-style error, and nothing reaches the upstream."""

import asyncio
import json

import pytest

from kvplane_runtime.proxy.gate import Refusal
from kvplane_runtime.proxy.limits import Limits
from tests.proxy.peers import Response, staged, until

GET = b"GET /x HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
BUSY = Refusal(429, "kv", "No room; retry.", 3)


def code(response: Response) -> str:
    """The error's code; asserts the shape that OpenAI clients parse."""
    error = json.loads(response.body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    kinds = {429: "rate_limit_error", 503: "server_error"}
    assert error["type"] == kinds.get(
        response.status, "invalid_request_error" if response.status < 500 else "server_error"
    )
    assert response.header(b"content-type") == b"application/json"
    assert response.header(b"x-request-id")
    return str(error["code"])


@pytest.mark.parametrize(
    ("request_bytes", "status", "expected"),
    [
        (b"nonsense\r\n\r\n", 400, "malformed_http"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "malformed_http"),
        (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400, "malformed_http"),
        (POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "malformed_http"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400, "malformed_http"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", 400, "malformed_http"),
        (GET + b"X: " + b"x" * 40_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (GET + b"X: y\r\n" * 200 + b"\r\n", 431, "too_many_headers"),
        (GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 501, "upgrade_not_supported"),
        (POST + b"Content-Length: 2000\r\n\r\n", 413, "body_too_large"),
        (POST + b"Content-Length: 2000\r\nExpect: 100-continue\r\n\r\n", 413, "body_too_large"),
        (
            POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1f4\r\n" + b"x" * 500 + b"\r\n" + b"fff\r\n" + b"x" * 600,
            413,
            "body_too_large",
        ),
    ],
)
async def test_a_broken_request_is_refused_and_its_connection_closed(
    request_bytes: bytes, status: int, expected: str
) -> None:
    async with staged(max_body_bytes=1024) as stage:
        client = await stage.client()
        response = await client.ask(request_bytes)
        assert (response.status, code(response)) == (status, expected)
        assert response.header(b"connection") == b"close"
        assert await client.closed() == b""
        assert not stage.upstream.requests


async def test_a_client_that_is_still_sending_can_read_why_it_was_refused() -> None:
    async with staged(max_body_bytes=1024) as stage:
        client = await stage.client()
        client.writer.write(POST + b"Content-Length: 5000000\r\n\r\n" + b"x" * 5_000_000)
        response = await client.response()
        assert (response.status, code(response)) == (413, "body_too_large")
        assert b"1024 bytes (admission.maxBodyBytes)" in response.body


@pytest.mark.parametrize("after_body", [False, True])
async def test_the_gate_refuses_with_its_own_answer(after_body: bool) -> None:
    async with staged() as stage:
        if after_body:
            stage.gate.refusal_after_body = BUSY
        else:
            stage.gate.refusal = BUSY
        client = await stage.client()
        for _ in range(2):
            response = await client.ask(GET + b"\r\n")
            assert (response.status, code(response), response.header(b"retry-after")) == (429, "kv", b"3")
        assert response.header(b"connection") is None
        stage.gate.refusal = stage.gate.refusal_after_body = None
        assert (await client.ask(GET + b"\r\n")).status == 200


async def test_a_refused_upload_is_not_read() -> None:
    async with staged() as stage:
        stage.gate.refusal = BUSY
        client = await stage.client()
        response = await client.ask(POST + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert (response.status, response.header(b"connection")) == (429, b"close")
        assert await client.closed() == b""


async def test_the_answer_to_head_has_no_body() -> None:
    async with staged() as stage:
        stage.gate.refusal = BUSY
        client = await stage.client()
        for _ in range(2):
            assert (await client.ask(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")).status == 429


async def test_all_bodies_together_are_bounded() -> None:
    async with staged(limits=Limits(max_held_bytes=1000)) as stage:
        stage.gate.hold = asyncio.Event()
        first, second = await stage.client(), await stage.client()
        await first.send(POST + b"Content-Length: 600\r\n\r\n" + b"x" * 600)
        await until(lambda: bool(stage.gate.admitted))
        response = await second.ask(POST + b"Content-Length: 600\r\n\r\n" + b"x" * 600)
        assert (response.status, code(response), response.header(b"retry-after")) == (503, "proxy_overloaded", b"1")
        stage.gate.hold.set()
        assert (await first.response()).status == 200


@pytest.mark.parametrize(
    ("limits", "start", "what"),
    [
        (Limits(header_seconds=0.05), b"GET / HT", "head"),
        (Limits(header_seconds=0.05), b"\r\n", "head"),
        (Limits(body_seconds=0.05), POST + b"Content-Length: 2\r\n\r\n{", "body"),
        (Limits(body_seconds=0.05), POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", "body"),
    ],
)
async def test_a_request_that_does_not_end_times_out(limits: Limits, start: bytes, what: str) -> None:
    async with staged(limits=limits) as stage:
        client = await stage.client()
        response = await client.ask(start)
        assert (response.status, code(response)) == (408, "request_timeout")
        assert what.encode() in response.body
        assert await client.closed() == b""


@pytest.mark.parametrize(
    "start", [b"GET / HTTP/1.1\r\nX: ", POST + b"Content-Length: 5000\r\n\r\n"], ids=["head", "body"]
)
async def test_a_client_that_sends_a_byte_now_and_then_times_out_all_the_same(start: bytes) -> None:
    """Slow loris: what is timed is the whole head or body, not the pause between two bytes."""
    async with staged(limits=Limits(header_seconds=0.1, body_seconds=0.1)) as stage:
        client = await stage.client()
        await client.send(start)
        answer = asyncio.create_task(client.response())
        while not answer.done():
            client.writer.write(b"x")
            await asyncio.sleep(0.01)
        assert (answer.result().status, code(answer.result())) == (408, "request_timeout")
        await stage.settled()
        assert not stage.upstream.requests


async def test_a_connection_without_requests_is_closed() -> None:
    # So long that the request is in time on a busy machine too.
    async with staged(limits=Limits(keep_alive_seconds=1)) as stage:
        fresh, used = await stage.client(), await stage.client()
        assert (await used.ask(GET + b"\r\n")).status == 200
        assert await fresh.closed() == b""
        assert await used.closed() == b""


async def test_a_closing_connection_does_not_wait_for_its_client_for_ever() -> None:
    async with staged(limits=Limits(linger_seconds=0.05)) as stage:
        client = await stage.client()
        await client.ask(GET + b"Connection: close\r\n\r\n")
        await until(lambda: not stage.proxy.connections)

"""Large bodies: read by the child process as by the parser itself, whatever happens to the child."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import pytest

from kvplane_runtime.proxy.gate import Refusal
from kvplane_runtime.proxy.openai import Endpoint, Generation, Prompt, parse
from kvplane_runtime.proxy.reader import INLINE_BYTES, BodyReader

COMPLETION, CHAT = Endpoint.COMPLETION, Endpoint.CHAT


@pytest.fixture
async def reader() -> AsyncIterator[BodyReader]:
    reader = BodyReader()
    yield reader
    await reader.close()


def child(reader: BodyReader) -> int:
    assert reader._child is not None
    return reader._child.pid


def large(prompt: object = "x" * INLINE_BYTES, **fields: object) -> bytes:
    return json.dumps({"prompt": prompt} | fields).encode()


async def test_a_small_body_needs_no_child(reader: BodyReader) -> None:
    body = large("x")
    assert await reader.read(COMPLETION, body) == parse(COMPLETION, body)
    assert reader._child is None


@pytest.mark.parametrize(
    ("at", "body"),
    [
        (COMPLETION, large()),
        (COMPLETION, large(max_tokens=5, n=2, stream=True, stream_options={"include_usage": True})),
        (COMPLETION, large([["x" * 64]] * 1)),
        (COMPLETION, large([1] * INLINE_BYTES)),
        (COMPLETION, large(["x" * 64] * 2048)),
        (CHAT, large(messages=[{"role": "user", "content": [{"type": "image_url"}]}])),
        (COMPLETION, large(n=100)),
        (COMPLETION, large()[:-1]),
        (COMPLETION, b'{"prompt":' + b"[" * INLINE_BYTES),
        (COMPLETION, b"\xff" * (INLINE_BYTES + 1)),
    ],
)
async def test_a_large_body_is_read_as_a_small_one(reader: BodyReader, at: Endpoint, body: bytes) -> None:
    for data in (body, bytearray(body)):
        assert await reader.read(at, data) == parse(at, body)


async def test_one_child_reads_one_body_after_another(reader: BodyReader) -> None:
    prompts = [b'{"prompt":"%b"}' % (b"x" * (INLINE_BYTES + number)) for number in range(8)]
    read = await asyncio.gather(*(reader.read(COMPLETION, body) for body in prompts))
    assert [
        generation.prompts[0].text_bytes - INLINE_BYTES for generation in read if isinstance(generation, Generation)
    ] == [*range(8)]


async def test_50_mb_are_read_while_the_loop_goes_on(reader: BodyReader) -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(turn())
    generation = await reader.read(COMPLETION, b'{"prompt":"%b"}' % (b"x" * 50_000_000))
    other.cancel()
    assert isinstance(generation, Generation)
    assert generation.prompts == (Prompt(50_000_000),)
    assert turns > 100


async def test_a_body_of_too_many_values_is_refused_and_the_next_one_read(reader: BodyReader) -> None:
    refusal = await reader.read(COMPLETION, b'{"x":[' + b"[]," * 12_000_000 + b"[]]}")
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code) == (400, "body_too_complex")
    assert await reader.read(COMPLETION, large()) == parse(COMPLETION, large())


async def test_a_child_that_died_is_replaced(reader: BodyReader) -> None:
    await reader.read(COMPLETION, large())
    first = child(reader)
    os.kill(first, signal.SIGKILL)
    refusal = await reader.read(COMPLETION, large())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "body_too_complex"
    assert await reader.read(COMPLETION, large()) == parse(COMPLETION, large())
    assert child(reader) != first


async def test_a_child_that_takes_too_long_is_replaced() -> None:
    reader = BodyReader(seconds=0)
    refusal = await reader.read(COMPLETION, large())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "body_too_complex"
    assert reader._child is None


async def test_a_client_that_goes_does_not_mix_up_the_answers(reader: BodyReader) -> None:
    await reader.read(COMPLETION, large())
    gone = asyncio.create_task(reader.read(COMPLETION, large("y" * 5_000_000)))
    await asyncio.sleep(0.001)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert await reader.read(COMPLETION, large()) == parse(COMPLETION, large())


async def test_where_no_process_can_be_started_the_client_is_to_retry(
    reader: BodyReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent")
    refusal = await reader.read(COMPLETION, large())
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.retry_after_seconds) == (503, 1)

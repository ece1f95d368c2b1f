"""Faults of clients and engines, before and behind the real gate: nothing stays reserved, whatever goes wrong.

What the proxy itself makes of them is in tests/proxy; that each request's stay ends is what ``staged`` checks.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.proxy.limits import Limits
from tests.proxy.peers import Client, Script, UpstreamSocket, until
from tests.proxy.test_failing import IMPROPER, half_close, once, silent
from tests.proxy.test_fuzz import CUTS, FEW, QUICK, RESPONSE_TOKENS, TOKENS, a_request, say_and_go, split
from tests.sidecar.test_admit import STREAM, TOKEN, Stage, answers, event, ids, staged

LARGE: dict[str, Any] = {"prompt": ids(200), "max_tokens": 64}
"""Two of these do not fit beside each other."""
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"


def reserved(stage: Stage) -> int:
    return stage.gate.admission.state(now=stage.clock()).reserved_tokens


def queued(stage: Stage) -> int:
    return stage.gate.admission.state(now=stage.clock()).queued


# One fault after the other.

Act = Callable[[Stage], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """An engine and a client, one of which is at fault, and the limits within which that shows."""

    engine: Script
    client: Act
    limits: Limits | None = None
    blocks: int = 20
    """Of the engine."""


def gets(status: int) -> Act:
    """A client that is as it should be."""

    async def act(stage: Stage) -> None:
        assert (await stage.ask(LARGE)).status == status
        assert stage.gate.admission.state(now=stage.clock()).admitted_total == 1

    return act


async def is_cut_off(stage: Stage) -> None:
    client = await stage.post(LARGE | {"stream": True})
    received = await client.closed()
    assert received.startswith(b"HTTP/1.1 200")
    assert not received.endswith(b"0\r\n\r\n")


def goes(leave: Callable[[Client], None]) -> Act:
    """Two clients that go, one while it waits and one while it is served."""

    async def act(stage: Stage) -> None:
        inside = await stage.post(LARGE)
        await until(lambda: stage.running() == 1)
        waiting = await stage.post(LARGE)
        await until(lambda: queued(stage) == 1)
        assert reserved(stage) > 0
        leave(waiting)
        leave(inside)

    return act


async def trickles_its_head(stage: Stage) -> None:
    client = await stage.client()
    for byte in (HEAD % 1000)[:-2]:
        await client.send(bytes([byte]))
    assert (await client.response()).status == 408


async def trickles_its_body(stage: Stage) -> None:
    client = await stage.client()
    await client.send(HEAD % 1000)
    # On a busy machine it may be over before anybody looks.
    await until(lambda: stage.drain.in_flight == 1 or bool(stage.proxy.stats.responses))
    for byte in b'{"prompt":':
        await client.send(bytes([byte]))
    assert (await client.response()).status == 408


async def does_not_read(stage: Stage) -> None:
    client = await stage.client()
    client.reader._limit = 1024  # type: ignore[attr-defined]  # asyncio pauses reading beyond twice this
    body = json.dumps(LARGE | {"stream": True}).encode()
    await client.send(HEAD % len(body) + body)
    await until(lambda: reserved(stage) > 0)
    await until(lambda: not stage.drain.in_flight)


MEGABYTES = b'{"max_tokens":64,"prompt":"%b"}' % (b"x" * 50_000_000)


async def sends_50_megabytes(stage: Stage) -> None:
    client = await stage.client()
    await client.send(HEAD % len(MEGABYTES))
    await client.send(MEGABYTES)
    assert (await client.response()).status == 200
    assert stage.gate.admission.state(now=stage.clock()).admitted_total == 1


async def sends_50_megabytes_that_never_fit(stage: Stage) -> None:
    client = await stage.client()
    await client.send(HEAD % len(MEGABYTES))
    await client.send(MEGABYTES)
    refused = await client.response()
    assert (refused.status, json.loads(refused.body)["error"]["code"]) == (400, "context_length_exceeded")


async def sends_50_megabytes_and_goes(stage: Stage) -> None:
    client = await stage.client()
    await client.send(HEAD % len(MEGABYTES))
    await client.send(MEGABYTES)
    await until(lambda: stage.proxy.held_bytes == len(MEGABYTES))  # now it is read, which takes a while
    client.abort()


async def sends_more_than_is_taken(stage: Stage) -> None:
    client = await stage.client()
    await client.send(HEAD % 70_000_000)
    assert (await client.response()).status == 413


async def hangs_in_mid_stream(socket: UpstreamSocket) -> None:
    await socket.request()
    await socket.send(STREAM + TOKEN)
    await socket.hung_up()


async def streams_without_end(socket: UpstreamSocket) -> None:
    await socket.request()
    await socket.send(STREAM)
    while True:
        await socket.send(event({"choices": [{"text": "x" * 60_000}]}))


SHORT = Limits(header_seconds=0.2, body_seconds=0.2, silence_seconds=1.5, stall_seconds=0.2)
"""An answer that begins at once has to be in time on a busy machine too."""
FAULTS = {
    "the engine hangs": Fault(silent, gets(504), SHORT),
    "the engine hangs in mid-stream": Fault(hangs_in_mid_stream, is_cut_off, SHORT),
    "the engine dies in mid-stream": Fault(once(STREAM + TOKEN), is_cut_off),
    **{f"the engine answers garbage {number}": Fault(once(said), gets(502)) for number, said in enumerate(IMPROPER)},
    "the client aborts": Fault(silent, goes(Client.abort)),
    "the client half-closes": Fault(silent, goes(half_close)),
    "the client trickles its head": Fault(answers, trickles_its_head, SHORT),
    "the client trickles its body": Fault(answers, trickles_its_body, SHORT),
    "the client does not read": Fault(streams_without_end, does_not_read, SHORT),
    "50 MB": Fault(answers, sends_50_megabytes, blocks=10_000_000),
    "50 MB that never fit": Fault(answers, sends_50_megabytes_that_never_fit),
    "50 MB of a client that goes": Fault(silent, sends_50_megabytes_and_goes, blocks=10_000_000),
    "70 MB": Fault(answers, sends_more_than_is_taken),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_after_any_fault_the_next_request_finds_all_the_room(fault: Fault, tmp_path: Path) -> None:
    async with staged(fault.engine, tmp_path, limits=fault.limits, max_body_bytes=64 << 20) as stage:
        stage.scraped(blocks=fault.blocks)
        await fault.client(stage)
        await stage.settled()
        stage.upstream.script = answers
        assert (await stage.ask(LARGE)).status == 200


# Any fault, at any moment.


@asynccontextmanager
async def in_time(script: Script, directory: Path, **options: Any) -> AsyncIterator[Stage]:
    """A stage on which time passes, fifty times as fast; fails also if a callback of the proxy or the gate raised."""
    raised: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    async with staged(script, directory, **options) as stage:
        stage.scraped()
        time = asyncio.create_task(_pass(stage))
        try:
            yield stage
            for client in stage.clients:
                client.abort()
            await stage.settled()
        finally:
            time.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await time
    assert not raised


async def _pass(stage: Stage) -> None:
    while True:
        await asyncio.sleep(0.005)
        stage.clock.pass_seconds(0.25)
        stage.engine.health.answered(stage.clock())
        stage.scraped()


def generation(**fields: Any) -> bytes:
    """A body with those of the fields that are not None."""
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


GENERATIONS = st.builds(
    generation,
    prompt=st.integers(1, 400).map(ids) | st.text(max_size=60),
    max_tokens=st.none() | st.integers(0, 80),
    n=st.none() | st.integers(1, 3),
    stream=st.booleans(),
)
REQUESTS = a_request(GENERATIONS | st.binary(max_size=40))


@FEW
@given(requests=st.lists(st.tuples(REQUESTS, st.booleans()), min_size=1, max_size=4), cuts=CUTS)
async def test_requests_in_any_pieces_leave_nothing_reserved(
    requests: list[tuple[tuple[bytes, bytes], bool]], cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    async with in_time(answers, tmp_path_factory.mktemp("sidecar")) as stage:
        for (data, _), _ in requests:
            client = await stage.client()
            for piece in split(data, cuts):
                await client.send(piece)
                await asyncio.sleep(0)
        for client, (_, stays) in zip(stage.clients, requests, strict=True):
            if stays:
                assert (await client.response()).status in (200, 400, 429)
            else:
                client.abort()


GENERATING = st.sampled_from(
    [
        HEAD % 14 + b'{"prompt":"x"}',
        HEAD % 14,
        b"POST /v1/completions HTTP/1.1\r\n",
        b"Content-Length: 14\r\n",
        b'{"prompt":"x"}',
    ]
)


@FEW
@given(
    data=st.lists(TOKENS | GENERATING, max_size=12).map(b"".join), cut=st.integers(0, 300), half_closes=st.booleans()
)
async def test_garbage_from_a_client_leaves_nothing_reserved(
    data: bytes, cut: int, half_closes: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async with in_time(answers, tmp_path_factory.mktemp("sidecar"), limits=QUICK) as stage:
        await say_and_go(await stage.client(), data, cut, half_closes=half_closes)


BUSY_TOKENS = st.sampled_from(
    [
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 3\r\n",
        b"content-type: application/json\r\n",
        STREAM + TOKEN,
    ]
)


@FEW
@given(
    answer=st.binary(max_size=100) | st.lists(RESPONSE_TOKENS | BUSY_TOKENS, max_size=8).map(b"".join),
    stream=st.booleans(),
    policy=st.sampled_from(["Enforce", "Observe"]),
)
async def test_garbage_from_the_engine_leaves_nothing_reserved(
    answer: bytes, stream: bool, policy: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("sidecar")
    async with in_time(once(answer), directory, limits=QUICK, policy=policy) as stage:
        client = await stage.post(LARGE | {"stream": stream}, connection="close")
        await client.closed()

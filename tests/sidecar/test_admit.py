"""The admission gate between a real proxy and a scripted engine: what waits, what is refused, what is given back."""

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvplane_api.wire import SidecarConfig
from kvplane_runtime.admission.controller import Admission
from kvplane_runtime.proxy.limits import Limits
from kvplane_runtime.proxy.server import Proxy
from kvplane_runtime.proxy.upstream import UpstreamPool
from kvplane_runtime.sidecar.admit import AdmissionGate
from kvplane_runtime.sidecar.config import WatchedConfig
from kvplane_runtime.sidecar.drain import DrainGate
from kvplane_runtime.sidecar.engine import EngineMonitor
from kvplane_runtime.sidecar.promises import Result
from kvplane_runtime.sidecar.signals import KvCache, Scrape
from tests.proxy.peers import Client, FakeUpstream, Response, Script, UpstreamSocket, serving, until
from tests.sidecar.clock import Clock

BLOCK = 16


@dataclass
class Stage:
    proxy: Proxy
    gate: AdmissionGate
    drain: DrainGate
    engine: EngineMonitor
    config: WatchedConfig
    upstream: FakeUpstream
    clock: Clock
    port: int
    clients: list[Client]

    def scraped(self, *, blocks: int = 20, used: int = 0, **values: float) -> None:
        """The engine's metrics as of now, and the gate's look at them."""
        self.engine.take(
            Scrape(
                values={"kv_cache_usage_ratio": used / blocks, "preemptions": 0, "requests_waiting": 0} | values,
                histograms={},
                kv_cache=KvCache(blocks=blocks, block_size_tokens=BLOCK, capacity_tokens=blocks * BLOCK),
            )
        )
        self.gate.tick()

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.append(client)
        return client

    async def post(self, fields: dict[str, Any], path: str = "/v1/completions", **headers: str) -> Client:
        """Sends a request; returns the connection on which its answer will come."""
        body = json.dumps(fields).encode()
        lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        client = await self.client()
        await client.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return client

    async def ask(self, fields: dict[str, Any], path: str = "/v1/completions", **headers: str) -> Response:
        return await (await self.post(fields, path, **headers)).response(method=b"POST")

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """What came to the engine."""
        return [json.loads(body) for _, body in self.upstream.requests]

    def running(self) -> int:
        return self.gate.admission.state(now=self.clock()).running

    async def settled(self) -> None:
        """Nothing is in flight, and nothing is held for what was."""
        await until(lambda: not self.drain.in_flight and not serving())
        state = self.gate.admission.state(now=self.clock())
        assert (state.running, state.queued, state.reserved_tokens) == (0, 0, 0)
        assert (self.gate._tickets, self.proxy.held_bytes) == ({}, 0)


def config(**admission: Any) -> SidecarConfig:
    return SidecarConfig.model_validate({"servedName": "chat", "admission": admission})


@asynccontextmanager
async def staged(
    script: Script,
    directory: Path,
    *,
    ring: bool = False,
    limits: Limits | None = None,
    max_body_bytes: int = 1 << 20,
    **admission: Any,
) -> AsyncIterator[Stage]:
    """A gate and a proxy in front of a scripted engine that is ready; nothing may be left at the end."""
    clock, limits = Clock(), limits or Limits()
    upstream = FakeUpstream(script)
    await upstream.start()
    engine = EngineMonitor(base_url="http://127.0.0.1:1", clock=clock)
    file = directory / "sidecar.json"
    file.write_text(config(**admission).model_dump_json(by_alias=True))
    watched = WatchedConfig(file)
    drain = DrainGate(engine=engine, clock=clock)
    gate = AdmissionGate(
        drain=drain,
        admission=Admission(config=watched.current, uniform=lambda: 0.5, ring=ring),
        config=watched,
        engine=engine,
        clock=clock,
    )
    engine.health.answered(clock())
    gate.tick()
    proxy = Proxy(
        gate=gate,
        upstream=UpstreamPool(host="127.0.0.1", port=upstream.port, limits=limits),
        limits=limits,
        max_body_bytes=lambda: max_body_bytes,
    )
    (socket,) = await proxy.listen(host="127.0.0.1", port=0)
    stage = Stage(proxy, gate, drain, engine, watched, upstream, clock, socket.getsockname()[1], [])
    try:
        yield stage
    finally:
        for client in stage.clients:
            client.abort()
        try:
            await stage.settled()
        finally:
            proxy.stop_accepting()
            proxy.abort()
            await gate.reader.close()
            await upstream.stop()


def answer(*, completion_tokens: int = 4, prompt_tokens: int = 8) -> bytes:
    body = json.dumps(
        {
            "choices": [{"text": "x"}],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
        }
    ).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def event(fields: dict[str, Any]) -> bytes:
    data = b"data: %b\n\n" % json.dumps(fields).encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = event({"choices": [{"text": "x"}]})
USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"


async def answers(socket: UpstreamSocket) -> None:
    while True:
        await socket.request()
        await socket.send(answer())


class Held:
    """An engine that answers when it is told to."""

    def __init__(self, says: bytes | None = None) -> None:
        self.go = asyncio.Event()
        self._says = answer() if says is None else says

    async def __call__(self, socket: UpstreamSocket) -> None:
        while True:
            await socket.request()
            await self.go.wait()
            await socket.send(self._says)


def ids(count: int) -> list[int]:
    """A prompt of exactly that many tokens."""
    return [1] * count


async def test_a_request_that_does_not_fit_now_waits_for_one_that_ends(tmp_path: Path) -> None:
    engine = Held()
    async with staged(engine, tmp_path) as stage:
        stage.scraped()
        first = await stage.post({"prompt": ids(200), "max_tokens": 64})
        await until(lambda: len(stage.upstream.requests) == 1)
        second = await stage.post({"prompt": ids(200), "max_tokens": 64})
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 1)
        assert len(stage.upstream.requests) == 1
        engine.go.set()
        assert (await first.response()).status == 200
        assert (await second.response()).status == 200


async def test_waiting_ends_in_429_that_says_when_to_come_back_and_why(tmp_path: Path) -> None:
    async with staged(Held(), tmp_path) as stage:
        stage.scraped()
        await stage.post({"prompt": ids(200), "max_tokens": 64})
        await until(lambda: stage.running() == 1)
        second = await stage.post({"prompt": ids(200), "max_tokens": 64})
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 1)
        stage.clock.pass_seconds(2.5)
        stage.scraped()
        refused = await second.response()
        assert refused.status == 429
        assert 1 <= int(refused.header(b"retry-after") or 0) <= 30
        assert refused.header(b"x-kvplane-reason") in (b"kv", b"prefill", b"deadline", b"sequences")
        error = json.loads(refused.body)["error"]
        assert error["code"] == "engine_overloaded"
        assert error["message"].endswith(".")


async def test_a_prompt_that_never_fits_is_refused_at_once_with_the_numbers(tmp_path: Path) -> None:
    async with staged(answers, tmp_path) as stage:
        stage.scraped(blocks=20)
        refused = await stage.ask({"prompt": ids(400)})
        assert refused.status == 400
        assert refused.header(b"retry-after") is None
        error = json.loads(refused.body)["error"]
        assert error["code"] == "context_length_exceeded"
        assert "400" in error["message"]
        assert not stage.upstream.requests


async def test_a_text_that_only_seems_too_long_is_the_engines_to_judge(tmp_path: Path) -> None:
    async with staged(answers, tmp_path) as stage:
        stage.scraped(blocks=20)
        assert (await stage.ask({"prompt": "x" * 1200})).status == 200  # 400 tokens by estimate, 320 fit
        assert (await stage.ask({"prompt": "x" * 12_000})).status == 400


async def test_many_prompts_in_one_request_are_too_long_only_one_by_one(tmp_path: Path) -> None:
    async with staged(answers, tmp_path) as stage:
        stage.scraped(blocks=20)
        assert (await stage.ask({"prompt": [ids(100)] * 4, "max_tokens": 4})).status == 200
        assert (await stage.ask({"prompt": [ids(10), ids(400)], "max_tokens": 4})).status == 400


async def test_malformed_json_is_refused_before_anything_is_reserved(tmp_path: Path) -> None:
    async with staged(answers, tmp_path) as stage:
        client = await stage.client()
        await client.send(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n{")
        assert (await client.response()).status == 400
        assert not stage.upstream.requests


async def test_what_does_not_generate_passes_unread(tmp_path: Path) -> None:
    async with staged(answers, tmp_path) as stage:
        client = await stage.client()
        await client.send(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n{")
        assert (await client.response()).status == 200
        assert stage.upstream.requests[0][1] == b"{"


async def test_a_streams_usage_is_asked_for_and_taken_out_again_and_teaches_the_size_of_prompts(tmp_path: Path) -> None:
    async def streams(socket: UpstreamSocket) -> None:
        while True:
            await socket.request()
            await socket.send(STREAM + TOKEN * 3 + USAGE + DONE)

    async with staged(streams, tmp_path) as stage:
        stage.scraped()
        text = "seven bytes per token is a rare thing to see now!"
        for _ in range(2):
            got = await stage.ask({"prompt": text, "stream": True})
            assert b"usage" not in got.body
            assert got.body.count(b"data: ") == 4
        assert all(body["stream_options"] == {"include_usage": True} for body in stage.bodies)
        ticket = await stage.post({"prompt": text, "stream": True, "stream_options": {"include_usage": True}})
        assert b'"completion_tokens": 3' in (await ticket.response()).body
        await until(lambda: not stage.running())
        assert stage.gate._prompts.bytes_per_token("") == pytest.approx(len(text) / 7, rel=0.01)


async def test_the_engines_own_503_sends_a_request_back_once(tmp_path: Path) -> None:
    said = [BUSY, answer(), BUSY, BUSY]

    async def refuses(socket: UpstreamSocket) -> None:
        while True:
            await socket.request()
            await socket.send(said.pop(0))

    async with staged(refuses, tmp_path) as stage:
        stage.scraped()
        again = await stage.post({"prompt": ids(8), "max_tokens": 4})
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 1)
        stage.clock.pass_seconds(0.3)
        stage.gate.tick()
        assert (await again.response()).status == 200
        twice = await stage.post({"prompt": ids(8), "max_tokens": 4})
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 1)
        stage.clock.pass_seconds(0.3)
        stage.gate.tick()
        refused = await twice.response()
        assert (refused.status, refused.header(b"x-kvplane-reason")) == (429, b"queue-full")


FULL = (
    b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 7\r\nx-kvplane-reason: %b\r\n"
    b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
)


@pytest.mark.parametrize(("said", "reason"), [(b"kv", "kv"), (b"requests", "sequences")])
async def test_a_rings_own_429_goes_to_the_client_and_counts_as_a_refusal(
    tmp_path: Path, said: bytes, reason: str
) -> None:
    async def full(socket: UpstreamSocket) -> None:
        while True:
            await socket.request()
            await socket.send(FULL % said)

    async with staged(full, tmp_path, ring=True) as stage:
        stage.scraped()
        refused = await stage.ask({"prompt": ids(8), "max_tokens": 4})
        assert (refused.status, refused.header(b"retry-after"), refused.body) == (429, b"7", b"{}")
        assert refused.header(b"x-kvplane-reason") == said
        assert stage.gate.admission.decisions["refused", reason] == 1
        assert stage.gate.retry_after_seconds.histogram().sum == 7
        await stage.settled()
        state = stage.gate.admission.state(now=stage.clock())
        assert (state.refused_total, state.shed_reservation_tokens_total > 0) == (1, True)
        assert stage.gate.promises.results == {Result.REFUSED: 1}


async def test_a_rings_429_with_a_retry_after_that_is_no_time_goes_to_the_client_all_the_same(tmp_path: Path) -> None:
    async def full(socket: UpstreamSocket) -> None:
        while True:
            await socket.request()
            await socket.send((FULL % b"kv").replace(b": 7", b": " + b"9" * 5000))

    async with staged(full, tmp_path, ring=True) as stage:
        stage.scraped()
        assert (await stage.ask({"prompt": ids(8), "max_tokens": 4})).status == 429
        await stage.settled()
        assert stage.gate.admission.decisions["refused", "kv"] == 1
        assert stage.gate.retry_after_seconds.histogram().count == 0


async def test_in_front_of_a_ring_what_would_not_fit_is_sent_all_the_same(tmp_path: Path) -> None:
    async with staged(answers, tmp_path, ring=True) as stage:
        stage.scraped(blocks=20)
        assert (await stage.ask({"prompt": ids(100 * BLOCK), "max_tokens": 4})).status == 200


async def test_a_client_that_leaves_the_queue_or_the_engine_leaves_nothing_behind(tmp_path: Path) -> None:
    async with staged(Held(), tmp_path) as stage:
        stage.scraped()
        inside = await stage.post({"prompt": ids(200), "max_tokens": 64})
        await until(lambda: stage.running() == 1)
        waiting = await stage.post({"prompt": ids(200), "max_tokens": 64})
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 1)
        waiting.abort()
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 0)
        inside.abort()
        await stage.settled()
        assert not stage.gate._tickets


async def test_tenants_and_classes_come_from_the_head(tmp_path: Path) -> None:
    async def counts(socket: UpstreamSocket) -> None:
        while True:
            await socket.request()
            await socket.send(answer(prompt_tokens=100))

    fairness = {"header": "x-tenant", "tokensPerSecond": 1}
    async with staged(counts, tmp_path, fairness=fairness, priorities=["chat", "batch"]) as stage:
        stage.scraped()
        big = {"prompt": ids(100), "max_tokens": 100}
        assert (await stage.ask(big, x_tenant="a")).status == 200
        overdrawn = await stage.ask(big, x_tenant="a")
        assert (overdrawn.status, overdrawn.header(b"x-kvplane-reason")) == (429, b"tenant")
        assert (await stage.ask(big, x_tenant="b", x_kvplane_priority="batch")).status == 200


@pytest.mark.parametrize("policy", ["Observe", "Off"])
async def test_policies_that_do_not_enforce_let_everything_pass(policy: str, tmp_path: Path) -> None:
    engine = Held()
    async with staged(engine, tmp_path, policy=policy) as stage:
        stage.scraped()
        clients = [await stage.post({"prompt": ids(200), "max_tokens": 64}) for _ in range(4)]
        await until(lambda: len(stage.upstream.requests) == 4)
        engine.go.set()
        assert [(await client.response()).status for client in clients] == [200] * 4
        if policy == "Off":
            assert "stream_options" not in stage.bodies[0]


@pytest.mark.parametrize("policy", ["Observe", "Off"])
async def test_without_a_queue_the_engines_own_503_is_the_answer(policy: str, tmp_path: Path) -> None:
    async def refuses(socket: UpstreamSocket) -> None:
        while True:
            await socket.request()
            await socket.send(BUSY)

    async with staged(refuses, tmp_path, policy=policy) as stage:
        stage.scraped()
        refused = await stage.ask({"prompt": ids(8), "max_tokens": 4})
        assert (refused.status, refused.header(b"x-kvplane-reason")) == (503, None)
        assert len(stage.upstream.requests) == 1


async def test_policy_off_leaves_even_malformed_bodies_to_the_engine(tmp_path: Path) -> None:
    async with staged(answers, tmp_path, policy="Off") as stage:
        client = await stage.client()
        await client.send(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n{")
        assert (await client.response()).status == 200


async def test_a_changed_configuration_holds_for_what_waits(tmp_path: Path) -> None:
    engine = Held()
    async with staged(engine, tmp_path) as stage:
        stage.scraped()
        await stage.post({"prompt": ids(200), "max_tokens": 64})
        await until(lambda: stage.running() == 1)
        await stage.post({"prompt": ids(200), "max_tokens": 64})
        await until(lambda: stage.gate.admission.state(now=stage.clock()).queued == 1)
        stage.config.current = config(policy="Off")
        stage.gate.tick()
        await until(lambda: len(stage.upstream.requests) == 2)
        engine.go.set()


async def test_an_answer_that_is_not_streamed_is_taken_to_grow_as_others_did(tmp_path: Path) -> None:
    engine = Held()
    async with staged(engine, tmp_path) as stage:
        stage.scraped()
        stage.gate._seconds_per_token, stage.gate._prefill_tokens_per_second = 0.1, 100.0
        await stage.post({"prompt": ids(10), "max_tokens": 50})
        await until(lambda: stage.running() == 1)
        (entry,) = stage.gate._tickets
        began = []
        for _ in range(2):
            stage.clock.pass_seconds(0.09)
            stage.gate.tick()
            began.append(entry.first_token_at is not None)
        assert began == [False, True]
        stage.clock.pass_seconds(2.0)
        stage.gate.tick()
        assert entry.generated == 20
        stage.clock.pass_seconds(60.0)
        stage.gate.tick()
        assert entry.generated == 50
        engine.go.set()


async def test_a_first_token_that_can_be_seen_is_not_guessed(tmp_path: Path) -> None:
    """What prompts take is learned from first tokens: a guess would teach what was believed before."""
    engine = Held(STREAM + TOKEN + DONE)
    async with staged(engine, tmp_path) as stage:
        stage.scraped()
        stage.gate._seconds_per_token, stage.gate._prefill_tokens_per_second = 0.1, 100.0
        await stage.post({"prompt": ids(10), "max_tokens": 50, "stream": True})
        await until(lambda: stage.running() == 1)
        (entry,) = stage.gate._tickets
        stage.clock.pass_seconds(2.0)
        stage.gate.tick()
        assert entry.first_token_at is None
        engine.go.set()
        await until(lambda: entry.first_token_at == stage.clock())


async def test_of_guessed_first_tokens_nothing_is_learned(tmp_path: Path) -> None:
    engine = Held()
    async with staged(engine, tmp_path) as stage:
        stage.scraped(blocks=1000)
        stage.gate._prefill_tokens_per_second = 100.0
        for number in range(1, 11):
            await stage.post({"prompt": ids(10), "max_tokens": 50})
            await until(lambda number=number: stage.running() == number)
            stage.clock.pass_seconds(0.5)
            stage.gate.tick()
        assert all(entry.first_token_at is not None for entry in stage.gate._tickets)
        assert stage.gate.admission._prefill.seconds(10) == 0
        engine.go.set()


async def test_an_engine_restart_forgets_what_was_in_flight_and_is_filled_slowly(tmp_path: Path) -> None:
    async with staged(Held(), tmp_path) as stage:
        stage.scraped()
        assert stage.gate.admission.state(now=stage.clock()).kappa == 1.0  # not so in the first life
        client = await stage.post({"prompt": ids(200), "max_tokens": 64})
        await until(lambda: stage.running() == 1)
        stage.engine.health.refused()
        stage.engine.health.answered(stage.clock())
        stage.gate.tick()
        assert stage.running() == 0
        assert stage.gate.admission.state(now=stage.clock()).kappa == 0.5
        client.abort()


async def test_the_503_of_a_new_engine_to_what_was_let_in_before_goes_to_the_client(tmp_path: Path) -> None:
    engine = Held(BUSY)
    async with staged(engine, tmp_path) as stage:
        stage.scraped()
        client = await stage.post({"prompt": ids(8), "max_tokens": 4})
        await until(lambda: stage.running() == 1)
        stage.engine.health.refused()
        stage.engine.health.answered(stage.clock())
        stage.gate.tick()
        engine.go.set()
        assert (await client.response()).status == 503
        assert len(stage.upstream.requests) == 1


async def test_old_signals_make_admission_careful(tmp_path: Path) -> None:
    async with staged(answers, tmp_path) as stage:
        stage.scraped()
        assert stage.gate.admission.state(now=stage.clock()).kappa > 0.85
        stage.clock.pass_seconds(2.1)
        stage.gate.tick()
        assert stage.gate.admission.state(now=stage.clock()).kappa == 0.85


async def test_what_is_inside_the_engine_is_told_to_its_account(tmp_path: Path) -> None:
    engine = Held()
    async with staged(engine, tmp_path) as stage:
        stage.scraped()
        await stage.post({"prompt": ids(20), "max_tokens": 4})
        await until(lambda: len(stage.upstream.requests) == 1)
        stage.scraped(requests_running=1)
        assert stage.engine.kv.tail_waste_tokens == 2 * BLOCK - 20
        engine.go.set()


async def test_a_stream_that_is_over_leaves_nothing_for_the_collector(tmp_path: Path) -> None:
    """Its work stops every stream: 13 ms at a time with 500 of them."""
    engine = Held(STREAM + TOKEN + USAGE + DONE)
    async with staged(engine, tmp_path) as stage:
        stage.scraped()
        client = await stage.post({"prompt": ids(8), "max_tokens": 4, "stream": True})
        await until(lambda: stage.running() == 1)
        (ticket,) = map(weakref.ref, stage.gate._tickets.values())
        gc.disable()
        try:
            engine.go.set()
            await client.response(method=b"POST")
            await until(lambda: ticket() is None)
        finally:
            gc.enable()


async def test_many_streams_are_counted_in_turn(tmp_path: Path) -> None:
    engine = Held(STREAM + 5 * TOKEN)
    async with staged(engine, tmp_path) as stage:
        stage.scraped(blocks=1000)
        for _ in range(40):
            await stage.post({"prompt": ids(4), "max_tokens": 8, "stream": True})
        engine.go.set()
        counting = asyncio.create_task(stage.gate.run())
        try:
            await until(lambda: [entry.generated for entry in stage.gate._tickets] == [5] * 40)
        finally:
            counting.cancel()
